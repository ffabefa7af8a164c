"""Where the reading positions looked: attention weights, without their full maps."""

import torch
from torch import Tensor

from helpers.attribution.engine import Asked, attending, attention_weights, sdpa
from helpers.attribution.result import Attribution, attribution


def attention(asked: Asked) -> list[Attribution]:
    """How much the last position attends to each token, averaged over layers and heads.

    Scores are >= 0 and sum to 1, or to less where a sink of the model's own (gpt-oss) takes a
    share. They do not depend on target or foil: attention says where the model looked, not what it
    concluded. Of several outputs, the mean over the positions at which they are read.
    notebooks/06_attention.ipynb takes it apart.
    """
    layers = attention_rows(asked)
    rows = torch.stack([weights.mean(dim=1).to(layers[0].device) for weights in layers])
    return _scores(asked, rows.mean(dim=0))


def attention_rows(asked: Asked) -> list[Tensor]:
    """The weights with which outputs are read: a tensor a layer.

    Each is [questions x texts, heads, outputs, length].

    No map is ever formed: while inside, the model attends through a function of ours, which
    computes the weights of those positions and leaves the rest to torch's fused attention.
    """
    layers = []

    def keep_rows(module, query, key, value, mask, **options):
        layers.append(attention_weights(query, key, mask, at=asked.positions, **options))
        return sdpa(module, query, key, value, mask, **options)

    with torch.inference_mode(), attending(asked.model, keep_rows):
        asked.values()
    return layers


def attention_rollout(asked: Asked, sink: bool = True) -> list[Attribution]:
    """How much of the last position flowed in from each token, by attention rollout.

    Half of each layer is taken to be the residual connection and half its attention, averaged over
    heads; the layers are multiplied. Scores are >= 0, sum to 1, and do not depend on target or
    foil. ``sink=False`` leaves position 0, which takes much of the weight, out of every map but its
    own row. Source: Abnar and Zuidema 2020, arXiv:2005.00928.

    notebooks/06_attention.ipynb takes it apart.
    """
    seq = asked.embeds.shape[2]
    flow = same = torch.eye(seq, device=asked.embeds.device)  # [seq, seq]

    def roll(module, query, key, value, mask, **options):
        nonlocal flow
        weights = torch.stack(  # row by row: the maps of all heads are large
            [
                attention_weights(query[i : i + 1], key[i : i + 1], mask, **options)[0].mean(dim=0)
                for i in range(len(query))
            ]
        ).to(flow.device)  # [rows, seq, seq]
        if not sink and seq > 1:
            weights[:, 1:, 0] = 0
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        flow = (0.5 * weights + 0.5 * same) @ flow
        return sdpa(module, query, key, value, mask, **options)

    with torch.inference_mode(), attending(asked.model, roll):
        asked.values()
    return _scores(asked, flow[:, asked.positions.to(flow.device)])


def _scores(asked, rows):
    """Of what was looked at, [questions x texts, outputs, length]."""
    texts = asked.embeds.shape[1]
    rows = rows.unflatten(0, (-1, texts))  # [questions, texts, outputs, length]
    own = rows[:, asked.text_of, range(len(asked.text_of)), : asked.columns]
    told = own[:, asked.signs > 0].mean(dim=1, keepdim=True)
    return [
        attribution(
            asked,
            row,
            asked.per_unit((own if asked.each else told)[row], row),
            scores=asked.per_unit(told[row, 0], row),
            forwards=1,
            signed=False,
        )
        for row in range(len(asked))
    ]
