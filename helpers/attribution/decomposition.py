"""Methods that take the answer's logit apart into what each position brought to it."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from helpers.architectures import epsilon_of, gain_of, places_of, stack_of
from helpers.attribution.engine import (
    Asked,
    attending,
    attention_weights,
    refuses_attending,
    sdpa,
)
from helpers.attribution.result import Attribution, attributions
from helpers.errors import InputError

MISSED = 0.01  # of the objective in float32: parts that miss more are not the model's
VECTORS_AT_ONCE = 2**24  # numbers in what one layer moves between positions, held in memory


def alti_logit(asked: Asked) -> list[Attribution]:
    """Each token's part in the objective, by following what attention moves: signed, in nats.

    With the final norm's scale held fixed, a logit is a sum over the layers of what each one adds
    to the last position: attention adds one vector for each position it reads, the feed-forward
    one. A vector read from a position is shared among the tokens that are mixed in that position,
    by ALTI: a source counts as far as the mixture comes nearer to it (in the L1 norm). What the
    feed-forward adds, and the last token's own embedding, is shared in the same way, so that all of
    the objective is accounted for; the paper leaves the feed-forward out. The scores add up to the
    objective itself, not to its difference from a baseline; for a log-probability, to the target's
    logit minus the mean logit that the model itself expects.

    Source: Ferrando et al. 2023, arXiv:2305.12535, and 2022, arXiv:2203.04212.

    notebooks/10_faithfulness.ipynb takes it apart.
    """
    asked.settle()
    questions, texts, length = asked.embeds.shape[:3]
    scores = torch.zeros(questions, len(asked.positions), length)
    moved = torch.zeros(questions, len(asked.positions))
    for row in range(questions):
        asked.look(asked.positions[None], length)
        seen = [_run(asked.model, text[None]) for text in asked.embeds[row]]
        hidden = torch.stack(
            [
                seen[text]["read"][position]
                for text, position in zip(asked.text_of.tolist(), asked.positions, strict=True)
            ]
        )  # [outputs, dim]
        directions = asked.slopes(hidden[None], torch.tensor([row]))[0]
        moved[row] = (directions.float() * hidden.float()).sum(dim=1)
        for text in range(texts):
            some = (asked.text_of == text).nonzero()[:, 0]
            read = directions[some.to(directions.device)].float()
            found = _parts(asked.model, seen[text], asked.positions[some], read)
            scores[row, some] = found.cpu()
    totals = scores.sum(dim=2)
    missed = (totals - moved).abs() / moved.abs().clamp(min=1)
    if missed.max() > (MISSED if asked.embeds.dtype == torch.float32 else 0.2):
        raise InputError(
            f"alti_logit does not fit a {type(asked.model).__name__}: its parts miss "
            f"{missed.max():.0%} of the objective. Take another method."
        )
    if not asked.each:
        scores, totals, moved = (some.sum(dim=1, keepdim=True) for some in (scores, totals, moved))
    return attributions(asked, scores[..., : asked.columns], totals=totals, moved=moved, forwards=1)


def refuses_parts(model: Any) -> str | None:
    """``None`` for a model whose layers can be taken apart here, else why they cannot."""
    try:
        (layers, norm), norms = stack_of(model), places_of(model).norms
        apart = norm in norms and all(_comes_apart(layer, norms) for layer in layers)
    except InputError:
        apart = False
    if apart:
        return refuses_attending(model)
    return (
        "It takes apart layers of an attention and a feed-forward that each read a norm and add to "
        f"the stream, in plain matrices, and a {type(model).__name__} is made otherwise: take "
        "another method, such as integrated_gradients."
    )


def _comes_apart(layer, norms):
    output = getattr(getattr(layer, "self_attn", None), "o_proj", None)
    own = [name for name, child in layer.named_children() if child in norms]
    return (
        type(output) is nn.Linear
        and output.weight.is_floating_point()
        and own == ["input_layernorm", "post_attention_layernorm"]
    )


def _parts(model: Any, seen: dict[str, Any], positions: Tensor, directions: Tensor) -> Tensor:
    """What each token of one text put into some states after the last norm: [outputs, length].

    Output i reads ``directions[i]`` [dim] at ``positions[i]``; ``seen`` is what ``_run`` gives.
    """
    layers, norm = stack_of(model)
    gain: Any = gain_of(norm)
    final = seen["final"][positions]  # [outputs, dim]
    scale = torch.rsqrt(final.pow(2).mean(dim=1, keepdim=True) + epsilon_of(norm))
    directions = directions * gain * scale  # [outputs, dim]
    mixed = torch.eye(len(seen["final"]), device=final.device)  # of which each position is made
    own = (seen["inputs"][0][positions] * directions).sum(dim=1, keepdim=True)
    scores = own * mixed[positions]
    for layer, states, weights, value, fed in zip(
        layers,
        seen["inputs"],
        seen["weights"],
        seen["values"],
        seen["fed"],
        strict=True,
    ):
        carried = _carried(layer.self_attn, value)  # [heads, length, dim]
        read = torch.einsum("hjd,od->ohj", carried, directions)
        from_each = (weights[:, positions].transpose(0, 1) * read).sum(dim=1)  # [outputs, length]
        scores = scores + from_each @ mixed
        mixed = _shares(states, weights, carried) @ mixed
        fed = (fed[positions] * directions).sum(dim=1, keepdim=True)
        scores = scores + fed * mixed[positions]
    return scores


def _run(model, embeds):
    """One forward pass, and what it passed through: see the keys below, in float32 but "read"."""
    seen = {"inputs": [], "weights": [], "values": [], "fed": [], "final": None, "read": None}

    def keep_weights(module, query, key, value, mask, scaling=None, **options):
        seen["weights"].append(attention_weights(query, key, mask, scaling)[0])  # [heads, seq, seq]
        seen["values"].append(value[0].float())  # [kv heads, seq, head_dim]
        return sdpa(module, query, key, value, mask, scaling=scaling, **options)

    layers, norm = stack_of(model)
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            before = layer.register_forward_pre_hook(
                lambda module, args: seen["inputs"].append(args[0][0].float())  # [seq, dim]
            )
            after = layer.mlp.register_forward_hook(
                lambda module, args, out: seen["fed"].append(out[0].float())  # [seq, dim]
            )
            hooks.enter_context(before)
            hooks.enter_context(after)
        last = norm.register_forward_pre_hook(
            lambda module, args: seen.update(final=args[0][0].float())  # [seq, dim]
        )
        hooks.enter_context(last)
        with torch.inference_mode(), attending(model, keep_weights):
            output = model.base_model(inputs_embeds=embeds, use_cache=False)
    seen["read"] = output.last_hidden_state[0].clone()  # not an inference tensor any more
    return seen


def _carried(attention, value):
    """What each head would move from each position at weight one: [heads, seq, dim]."""
    heads = attention.config.num_attention_heads
    value = value.repeat_interleave(heads // len(value), dim=0)  # [heads, seq, head_dim]
    blocks = attention.o_proj.weight.float().view(-1, heads, value.shape[-1])  # [dim, heads, ...]
    return torch.einsum("hsw,dhw->hsd", value, blocks)


def _shares(states, weights, carried):
    """ALTI: how much of each position, after attention, came from each one before: [seq, seq].

    ``states`` [seq, dim] went in. A share is how much the L1 norm of a sum falls short of the
    distance between the sum and one of its terms; never below zero, and a row sums to 1.
    """
    seq, dim = states.shape
    shares = []
    for some in torch.arange(seq, device=states.device).split(
        max(1, VECTORS_AT_ONCE // seq // dim)
    ):
        moved = torch.einsum("hij,hjd->ijd", weights[:, some], carried)  # [some, seq, dim]
        moved[range(len(some)), some] += states[some]  # the residual connection
        total = moved.sum(dim=1, keepdim=True)
        nearer = total.abs().sum(dim=-1) - (total - moved).abs().sum(dim=-1)
        shares.append(nearer.clamp_min(0))
    shares = torch.cat(shares)
    return shares / shares.sum(dim=-1, keepdim=True).clamp_min(1e-12)
