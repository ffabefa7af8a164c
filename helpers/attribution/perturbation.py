"""Methods that change the prompt and look at what the objective does."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from helpers.attribution.engine import FINE, Asked, end_of_text, mean_embedding
from helpers.attribution.result import Attribution, attribution
from helpers.errors import InputError

REPLACEMENTS = ("mean", "eos", "neighbour", "zero", "remove")


def occlusion(asked: Asked, replacement: str | Tensor | None = None) -> list[Attribution]:
    """How far the objective falls when one unit at a time is gone: signed, in nats.

    Of a log-probability, a positive score says that the answer is less probable without the unit.
    One forward row a unit, whatever its length. ``replacement`` is what stands in for its tokens:
    see ``blank``. Source: Zeiler and Fergus 2014, arXiv:1311.2901.

    notebooks/08_comparison.ipynb takes it apart.
    """
    kept = [~torch.eye(len(units), dtype=torch.bool) for units in asked.units]
    whole, values = coalition_values(asked, kept, replacement)
    return [
        attribution(asked, row, (whole[row] - some).T, forwards=len(some) + 1)
        for row, some in enumerate(values)
    ]


def shapley(
    asked: Asked,
    replacement: str | Tensor | None = None,
    permutations: int = 20,
    seed: int = 0,
) -> list[Attribution]:
    """What a unit adds to the objective, on average over the orders of adding units: in nats.

    Units come one by one to a prompt of nothing but the replacement, and what the objective gains
    is the newcomer's. ``permutations`` (even) orders are drawn in pairs, one the other backwards,
    so that a unit that came late in one came early in the other; ``errors`` are the standard errors
    over the pairs. Where all 2**units subsets take no more rows than that, all of them are run:
    then the scores are exact and the errors zero. Scores add up to what the whole prompt gained, by
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
    sets, places, exact = [], [], []
    for units in asked.units:
        exact.append(takes_all_subsets(len(units), permutations))
        kept = _subsets(len(units)) if exact[-1] else _growing(len(units), permutations, seed)
        rows, place = kept.flatten(0, -2).unique(dim=0, return_inverse=True)
        sets.append((kept, rows))
        places.append(place)
    whole, values = coalition_values(asked, [rows for _, rows in sets], replacement)
    found = []
    for row, (kept, rows) in enumerate(sets):
        of_sets = values[row].double().cpu()[places[row]].unflatten(0, kept.shape[:-1])
        errors = torch.zeros(asked.outs, kept.shape[-1])
        if exact[row]:
            scores = _average_gain(kept, of_sets)
        else:
            gains = _gains(kept, of_sets)  # [orders, outs, units]
            pairs = (gains[0::2] + gains[1::2]) / 2
            scores, errors = pairs.mean(dim=0), pairs.std(dim=0) / math.sqrt(len(pairs))
        # the first subset of both is the empty one
        moved = whole[row].double().cpu() - of_sets.flatten(0, -2)[0]
        result = attribution(asked, row, scores, moved=moved, errors=errors, forwards=len(rows) + 1)
        found.append(replace(result, closed=(result.gap or 0) < 1e-2))
    return found


def takes_all_subsets(units: int, permutations: int) -> bool:
    """Whether all subsets of so many units are no more rows than the orders would take."""
    return 2**units <= permutations * (units - 1) + 2


def coalition_values(
    asked: Asked, kept: list[Tensor], replacement: str | Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The objective of the texts, and of variants that keep only some units.

    ``kept`` has a BoolTensor [variants, units] for each question. Returns FloatTensors [questions,
    outs] and, for each question, [variants, outs].
    """
    gone = [(~some).float() @ asked.members(row).float() > 0 for row, some in enumerate(kept)]
    owner = torch.arange(len(asked)).repeat_interleave(torch.tensor([len(some) for some in gone]))
    masks = torch.cat(gone)
    values = asked.erased(owner, masks, blank(asked, replacement))
    return asked.beginning()[0], list(values.split([len(some) for some in gone]))


def blank(asked: Asked, replacement: str | Tensor | None = None) -> Tensor | None:
    """What stands in for an erased token: [questions, columns, dim]; ``None`` to take it out.

    ``"mean"`` is the average of all token embeddings, ``"eos"`` the end-of-text token's, ``"zero"``
    zeros, ``"neighbour"`` the token before the unit (after it, for the first): a word of this very
    prompt, where the others are vectors that no text has in that place. ``"remove"`` takes the
    tokens out, so that what follows moves up; where nothing is left of a prompt, the end-of-text
    token stands for it. A tensor is used as it is, broadcast to [columns,
    dim]. By default tokens and words are replaced by the mean, and sentences, turns and sources
    removed: a run of average embeddings is no text.

    Raises ``InputError`` for any other.
    """
    if replacement is None:
        replacement = "mean" if asked.questions[0].grouping in FINE else "remove"
    embeds = asked.embeds[:, 0, : asked.columns]  # [questions, columns, dim]
    if isinstance(replacement, Tensor):
        try:
            return replacement.to(embeds).expand_as(embeds)
        except RuntimeError as error:
            raise InputError(
                f"The baseline is {list(replacement.shape)} and what is read "
                f"{list(embeds.shape[1:])}: give one vector, or one vector for each token."
            ) from error
    if replacement == "remove":
        return None
    if replacement == "zero":
        return torch.zeros_like(embeds)
    if replacement == "mean":
        return mean_embedding(asked.model).to(embeds).expand_as(embeds)
    if replacement == "eos":
        return end_of_text(asked.model).expand_as(embeds)
    if replacement == "neighbour":
        places = torch.arange(asked.columns).repeat(len(asked), 1)
        for row, units in enumerate(asked.units):
            for unit in units:
                inside = list(unit.positions)
                after = inside[-1] + 1 if inside[-1] + 1 < asked.columns else inside[0]
                places[row, inside] = inside[0] - 1 if inside[0] else after
        places = places.to(embeds.device)
        return embeds.gather(1, places[..., None].expand_as(embeds))
    raise InputError(
        f"There is no replacement {replacement!r}: use {', '.join(REPLACEMENTS)} or a tensor."
    )


def baseline_of(asked: Asked, baseline: str | Tensor) -> Tensor:
    """What scores are counted from, in the place of all that is explained: see ``blank``.

    [questions, columns, dim]. Raises ``InputError`` for another than mean, eos, zero and a tensor.
    """
    found = None
    if isinstance(baseline, Tensor) or baseline in ("mean", "eos", "zero"):
        found = blank(asked, baseline)
    if found is None:
        raise InputError(f"There is no baseline {baseline!r}: use mean, eos, zero or a tensor.")
    return found


def _subsets(units):
    """Every subset of the units: BoolTensor [2**units, units], the empty one first."""
    return (torch.arange(2**units)[:, None] >> torch.arange(units)) % 2 == 1


def _growing(units, permutations, seed):
    """What is there while units are added in random orders: BoolTensor [orders, units + 1, units].

    Orders 2k and 2k + 1 are each other's reverse.
    """
    generator = torch.Generator().manual_seed(seed)
    turn = torch.stack(
        [torch.randperm(units, generator=generator) for _ in range(permutations // 2)]
    )
    turn = torch.stack([turn, units - 1 - turn], dim=1).flatten(0, 1)  # when each unit is added
    return turn[:, None, :] < torch.arange(units + 1)[:, None]


def _gains(kept, values):
    """What each unit added in each order: [orders, outs, units] of values [orders, steps, outs]."""
    arrived = (kept[:, 1:] & ~kept[:, :-1]).double()  # [orders, steps, units]: one unit a step
    return torch.einsum("osv,osu->ovu", values.diff(dim=1), arrived)


def _average_gain(kept, values):
    """Shapley values [outs, units] from the values [subsets, outs] of all subsets."""
    units = kept.shape[1]
    size = kept.sum(dim=1, keepdim=True)  # [2**units, 1]
    # a subset that lacks a unit stands for 1 in units * C(units - 1, size) of the orders
    share = torch.tensor([1 / (units * math.comb(units - 1, k)) for k in range(units)] + [0.0])
    share = share.double()
    weights = torch.where(kept, share[(size - 1).clamp_min(0)], -share[size])  # [2**units, units]
    return values.T @ weights
