"""Where the last position looked: attention weights, without their full maps."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from helpers.attribution.engine import attending, attention_weights, sdpa
from helpers.attribution.result import Attribution


def attention(model, question):
    """How much the last position attends to each token, averaged over layers and heads.

    Scores are >= 0 and sum to 1. They do not depend on target or foil: attention says where the
    model looked, not what it concluded. Introduced in notebooks/06_attention.ipynb.
    """
    rows = last_attention_rows(model, question)  # [layers, heads, seq]
    return Attribution(rows.mean(dim=(0, 1)), forwards=1, signed=False)


def last_attention_rows(model, question):
    """The last position's attention weights in every layer and head: [layers, heads, seq].

    No map is ever formed: while inside, the model attends through a function of ours, which
    computes the weights of the last query and leaves the rest to torch's fused attention.

    Introduced in notebooks/06_attention.ipynb.
    """
    rows = []

    def keep_last_row(module, query, key, value, mask, scaling=None, **options):
        last = query[0, :, -1].unflatten(0, (key.shape[1], -1))  # [kv_heads, heads per kv, dim]
        weights = (last @ key[0].transpose(1, 2)).float() * scaling  # [kv_heads, heads per kv, seq]
        if mask is not None:  # a sliding window; a plain causal mask shows the last query all
            weights = weights.masked_fill(~mask[0, :, -1:], -torch.inf)
        rows.append(weights.softmax(dim=-1).flatten(0, 1))
        attend = AttentionInterface()["sdpa"]
        value = value.to(query.dtype)
        return attend(module, query, key, value, mask, scaling=scaling, **options)

    AttentionInterface.register("keep_last_row", keep_last_row)
    AttentionMaskInterface.register("keep_last_row", AttentionMaskInterface()["sdpa"])
    found = model.config._attn_implementation
    model.set_attn_implementation("keep_last_row")
    try:
        with torch.inference_mode():
            model(question.input_ids, use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(found)
    return torch.stack([row.to(rows[0].device) for row in rows])


def attention_rollout(model, question, sink=True):
    """How much of the last position flowed in from each token, by attention rollout.

    Half of each layer is taken to be the residual connection and half its attention, averaged over
    heads; the layers are multiplied. Scores are >= 0, sum to 1, and do not depend on target or
    foil. ``sink=False`` leaves position 0, which takes much of the weight, out of every map but its
    own row. Source: Abnar and Zuidema 2020, arXiv:2005.00928.

    notebooks/06_attention.ipynb takes it apart.
    """
    seq = question.input_ids.shape[1]
    flow = same = torch.eye(seq, device=question.input_ids.device)  # [seq, seq]

    def roll(module, query, key, value, mask, scaling=None, **options):
        nonlocal flow
        weights = attention_weights(query, key, mask, scaling).mean(dim=0).to(flow.device)
        if not sink and seq > 1:
            weights[1:, 0] = 0
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        flow = (0.5 * weights + 0.5 * same) @ flow
        return sdpa(module, query, key, value, mask, scaling=scaling, **options)

    with torch.inference_mode(), attending(model, roll):
        model(question.input_ids, use_cache=False, logits_to_keep=1)
    return Attribution(flow[-1], forwards=1, signed=False)
