"""Methods that take the answer's logit apart into what each position brought to it."""

import contextlib

import torch
from transformers import LlamaForCausalLM

from helpers.attribution.engine import attending, attention_weights, sdpa
from helpers.attribution.path import completeness_gap
from helpers.attribution.result import Attribution
from helpers.errors import InputError

VECTORS_AT_ONCE = 2**24  # numbers in what one layer moves between positions, held in memory


def alti_logit(model, question):
    """Each token's part in the objective, by following what attention moves: signed, in logits.

    With the final norm's scale held fixed, a logit is a sum over the layers of what each one adds
    to the last position: attention adds one vector for each position it reads, the feed-forward
    one. A vector read from a position is shared among the tokens that are mixed in that position,
    by ALTI: a source counts as far as the mixture comes nearer to it (in the L1 norm). What the
    feed-forward adds, and the last token's own embedding, is shared in the same way, so that all of
    the objective is accounted for; the paper leaves the feed-forward out. The scores add up to the
    objective itself, not to its difference from a baseline.

    Raises ``InputError`` for a model that is not a Llama. Source: Ferrando et al. 2023,
    arXiv:2305.12535, and 2022, arXiv:2203.04212.

    notebooks/10_faithfulness.ipynb takes it apart.
    """
    if not isinstance(model, LlamaForCausalLM):
        raise InputError(
            f"ALTI-Logit is written for Llama models, and this is a {type(model).__name__}: use "
            "another method."
        )
    seen = _run(model, question)
    objective = seen["objective"]
    final = seen["final"]
    norm = model.model.norm
    scale = torch.rsqrt(final.pow(2).mean() + norm.variance_epsilon)
    weight = model.get_output_embeddings().weight.float()
    direction = weight[question.target] - (0 if question.foil is None else weight[question.foil])
    direction = direction * norm.weight.float() * scale  # [dim]

    seq = len(seen["inputs"][0])
    mixed = torch.eye(seq, device=final.device)  # [seq, seq]: of which tokens each position is made
    scores = (seen["inputs"][0][-1] @ direction) * mixed[-1]
    for layer, states, weights, value, fed in zip(
        model.model.layers,
        seen["inputs"],
        seen["weights"],
        seen["values"],
        seen["fed"],
        strict=True,
    ):
        carried = _carried(layer.self_attn, value)  # [heads, seq, dim]
        from_each = torch.einsum("hj,hjd->jd", weights[:, -1], carried) @ direction  # [seq]
        scores = scores + from_each @ mixed
        mixed = _shares(states, weights, carried) @ mixed
        scores = scores + (fed @ direction) * mixed[-1]
    return Attribution(scores, gap=completeness_gap(scores, objective), forwards=1)


def _run(model, question):
    """One forward pass, and what it passed through: see the keys below, all in float32."""
    seen = {"inputs": [], "weights": [], "values": [], "fed": [], "final": None}

    def keep_weights(module, query, key, value, mask, scaling=None, **options):
        seen["weights"].append(attention_weights(query, key, mask, scaling))  # [heads, seq, seq]
        seen["values"].append(value[0].float())  # [kv heads, seq, head_dim]
        return sdpa(module, query, key, value, mask, scaling=scaling, **options)

    def keep(name, index):
        return lambda module, args: seen[name].append(args[0][0].float()[index])

    with contextlib.ExitStack() as hooks:
        for layer in model.model.layers:
            before = layer.register_forward_pre_hook(keep("inputs", slice(None)))  # [seq, dim]
            after = layer.mlp.register_forward_hook(
                lambda module, args, out: seen["fed"].append(out[0, -1].float())  # [dim]
            )
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        last = model.model.norm.register_forward_pre_hook(
            lambda module, args: seen.update(final=args[0][0, -1].float())  # [dim]
        )
        hooks.callback(last.remove)
        with torch.inference_mode(), attending(model, keep_weights):
            output = model(question.input_ids, use_cache=False, logits_to_keep=1)
    logits = output.logits[0, -1].float()
    foil = 0 if question.foil is None else logits[question.foil]
    return {**seen, "objective": logits[question.target] - foil}


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
