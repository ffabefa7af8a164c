"""Methods that change the prompt and look at what the objective does."""

import math

import torch

from helpers.attribution.engine import (
    contrast,
    embed_prompt,
    in_batches,
    logits_after,
    prompt_cache,
)
from helpers.attribution.path import baseline_embeds, completeness_gap
from helpers.attribution.result import Attribution
from helpers.errors import InputError

FULL_PASS = 256  # tokens in a pass from which a processor is about as fast as it gets


def occlusion(model, question, baseline="mean"):
    """How far the objective falls when one token at a time is replaced: signed, in logits.

    Each token's embedding in turn is replaced by the baseline's; one forward row a token.
    Source: Zeiler and Fergus 2014, arXiv:1311.2901.

    notebooks/08_comparison.ipynb takes it apart.
    """
    seq = question.input_ids.shape[1]
    whole, values = replaced_values(model, question, torch.eye(seq, dtype=torch.bool), baseline)
    return Attribution(whole - values, forwards=seq + 1)


def shapley(model, question, baseline="mean", permutations=20, seed=0):
    """What a token adds to the objective, on average over the orders of adding tokens: in logits.

    Tokens come one by one to a prompt of nothing but the baseline, and what the objective gains is
    the newcomer's. ``permutations`` (even) orders are drawn in pairs, one the other backwards, so
    that a token that came late in one came early in the other; ``errors`` are the standard errors
    over the pairs. Where all 2**seq subsets take no more rows than that, all of them are run: then
    the scores are exact and the errors zero. Scores add up to what the whole prompt gained, by
    construction: ``gap`` is float32's rounding.

    Raises ``InputError`` for a number of permutations that is not even or below 4. Sources: Shapley
    1953; Castro et al. 2009, doi:10.1016/j.cor.2008.04.004, for sampling orders; Mitchell et al.
    2022, arXiv:2104.12199, for orders and their reverse.

    notebooks/10_faithfulness.ipynb takes it apart.
    """
    if permutations < 4 or permutations % 2:
        raise InputError(
            f"Shapley values need an even number of orders from 4, not {permutations}."
        )
    seq = question.input_ids.shape[1]
    exact = 2**seq <= permutations * (seq - 1) + 2
    kept = _subsets(seq) if exact else _growing(seq, permutations, seed)
    rows, place = kept.flatten(0, -2).unique(dim=0, return_inverse=True)
    whole, values = replaced_values(model, question, ~rows, baseline)
    values = values.double().cpu()[place].view(kept.shape[:-1])
    if exact:
        scores, errors = _average_gain(kept, values), torch.zeros(seq)
    else:
        gains = _gains(kept, values)  # [orders, seq]
        pairs = (gains[0::2] + gains[1::2]) / 2
        scores, errors = pairs.mean(dim=0), pairs.std(dim=0) / math.sqrt(len(pairs))
    moved = whole.item() - values.flatten()[0].item()  # the first subset of both is the empty one
    gap = completeness_gap(scores, moved)
    return Attribution(scores, gap=gap, closed=gap < 1e-2, errors=errors, forwards=len(rows) + 1)


def _subsets(seq):
    """Every subset of the positions: BoolTensor [2**seq, seq], the empty one first."""
    return (torch.arange(2**seq)[:, None] >> torch.arange(seq)) % 2 == 1


def _growing(seq, permutations, seed):
    """What is there while tokens are added in random orders: BoolTensor [orders, seq + 1, seq].

    Orders 2k and 2k + 1 are each other's reverse.
    """
    generator = torch.Generator().manual_seed(seed)
    turn = torch.stack([torch.randperm(seq, generator=generator) for _ in range(permutations // 2)])
    turn = torch.stack([turn, seq - 1 - turn], dim=1).flatten(0, 1)  # when each token is added
    return turn[:, None, :] < torch.arange(seq + 1)[:, None]


def _gains(kept, values):
    """What each token added in each order: [orders, seq] from values [orders, seq + 1]."""
    arrived = (kept[:, 1:] & ~kept[:, :-1]).double()  # [orders, seq, seq]: one token a step
    return (values.diff(dim=1)[..., None] * arrived).sum(dim=1)


def _average_gain(kept, values):
    """Shapley values from the values of all subsets, each order of adding tokens counted once."""
    seq = kept.shape[1]
    size = kept.sum(dim=1, keepdim=True)  # [2**seq, 1]
    # a subset that lacks a token stands for 1 in seq * C(seq - 1, size) of the orders
    share = torch.tensor([1 / (seq * math.comb(seq - 1, k)) for k in range(seq)] + [0.0])
    share = share.double()
    weights = torch.where(kept, share[(size - 1).clamp_min(0)], -share[size])  # [2**seq, seq]
    return (weights * values[:, None]).sum(dim=0)


def replaced_values(model, question, replaced, baseline="mean"):
    """The objective of the prompt, and of variants of it with some tokens replaced.

    ``replaced`` BoolTensor [variants, seq] is true where a token's embedding gives way to the
    baseline's. Returns ``(whole, values)``: the prompt's objective, and FloatTensor [variants].
    """
    return replaced_outputs(
        model, question, replaced, lambda logits: contrast(logits, question), baseline
    )


def replaced_outputs(model, question, replaced, read, baseline="mean"):
    """``read(logits)`` of the prompt, and of variants of it with some tokens replaced.

    ``read`` takes the logits [rows, vocab] after the last position and returns [rows, ...]. Returns
    ``(whole, values)`` of shapes [1, ...] and [variants, ...]; see ``replaced_values``.

    A causal model computes a position from those before it, so up to its first replacement a
    variant is the prompt itself. That part is computed once and shared: variants are run in the
    order of their first replacement, a group from the first one of its first member.
    """
    embeds = embed_prompt(model, question)
    blank = baseline_embeds(model, question, baseline)
    seq = embeds.shape[1]
    replaced = replaced.to(embeds.device)
    firsts = torch.where(replaced.any(dim=1), replaced.int().argmax(dim=1), seq - 1)
    order = firsts.argsort(stable=True)
    with torch.inference_mode():
        logits, cache = prompt_cache(model, embeds)
        whole, groups, ran = read(logits), [], []
        while len(order):
            first = int(firsts[order[0]]) if cache is not None else 0
            size = max(1, FULL_PASS // (seq - first))
            group, order = order[:size], order[size:]

            def run(some, first=first):
                rows = torch.where(
                    replaced[some, first:, None], blank[:, first:], embeds[:, first:]
                )
                return read(logits_after(model, rows, first, cache))

            groups.append(torch.cat(in_batches(model, run, group, seq - first)))
            ran.append(group)
        values = torch.cat(groups)[torch.cat(ran).argsort()]
    return whole, values
