"""Methods that change the prompt and look at what the objective does."""

import torch

from helpers.attribution.engine import embed_prompt, in_batches, objective_after, prompt_cache
from helpers.attribution.path import baseline_embeds
from helpers.attribution.result import Attribution

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


def replaced_values(model, question, replaced, baseline="mean"):
    """The objective of the prompt, and of variants of it with some tokens replaced.

    ``replaced`` BoolTensor [variants, seq] is true where a token's embedding gives way to the
    baseline's. Returns ``(whole, values)``: the prompt's objective, and FloatTensor [variants].

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
        whole, cache = prompt_cache(model, embeds, question)
        values = torch.empty(len(replaced), device=whole.device)
        while len(order):
            first = int(firsts[order[0]]) if cache is not None else 0
            size = max(1, FULL_PASS // (seq - first))
            group, order = order[:size], order[size:]

            def run(some, first=first):
                rows = torch.where(
                    replaced[some, first:, None], blank[:, first:], embeds[:, first:]
                )
                return objective_after(model, rows, question, first, cache)

            values[group] = torch.cat(in_batches(model, run, group, seq - first))
    return whole, values
