"""Methods that change the prompt and look at what the objective does."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from helpers.attribution.engine import FINE, Asked, asking, end_of_text, mean_embedding
from helpers.attribution.result import Attribution, attribution
from helpers.errors import InputError
from helpers.questions import Question

REPLACEMENTS = ("mean", "eos", "neighbour", "zero", "remove")
FACTORS = torch.logspace(-2.5, -0.02, 20).tolist()  # by which one more unit makes amounts vary less
LEVEL = 100.0  # variance of what all coalitions share, over that of the rest: it may be anything
OTHERS = 0.1  # share of the draws that are not by the probability that is asked for
ROUNDING = 1e-9  # variance by which a value may be off, over that of the rest


def coalitions(
    asked: Asked,
    keep: float | None = 0.5,
    rows: int | None = None,
    replacement: str | Tensor | None = None,
    seed: int = 0,
) -> list[Attribution]:
    """What a unit adds to the objective, on average over what else of the prompt is there: in nats.

    Each of the other units is there with probability ``keep``: 1/2, the default, is the Banzhaf
    value, 1 is ``occlusion``, and ``None``, the mean over all ``keep``, is ``shapley``, whose
    scores add up to what the whole prompt gained. ``rows`` are the variants that are run, 128 or
    four a unit by default; where all that count are no more, all of them are: then the scores are
    exact and the errors zero. Else ``errors`` are standard errors: see ``average_gains``.
    ``replacement`` is what stands in for a unit that is gone: see ``blank``.

    Raises ``InputError`` for a ``keep`` outside of 0 to 1, and for fewer rows than two a unit, and
    one. Source: Dubey, Neyman and Weber 1981, doi:10.1287/moor.6.1.122.
    """
    most = [coalition_rows(len(units)) if rows is None else rows for units in asked.units]
    return _of_coalitions(asked, keep, most, replacement, seed)


def occlusion(asked: Asked, replacement: str | Tensor | None = None) -> list[Attribution]:
    """How far the objective falls when one unit at a time is gone: signed, in nats.

    Of a log-probability, a positive score says that the answer is less probable without the unit.
    One forward row a unit, whatever its length. ``replacement`` is what stands in for its tokens:
    see ``blank``. Source: Zeiler and Fergus 2014, arXiv:1311.2901.

    notebooks/08_comparison.ipynb takes it apart.
    """
    return coalitions(asked, keep=1, replacement=replacement)


def shapley(
    asked: Asked,
    replacement: str | Tensor | None = None,
    permutations: int = 20,
    seed: int = 0,
) -> list[Attribution]:
    """What a unit adds to the objective, on average over the orders of adding units: in nats.

    Units come one by one to a prompt of nothing but the replacement, and what the objective gains
    is the newcomer's. That is the average over ``coalitions`` without a ``keep``; they are as many
    rows as ``permutations`` (even) orders would take. Scores add up to what the whole prompt
    gained: ``gap`` is rounding.

    Raises ``InputError`` for a number of permutations that is not even or below 4. Source: Shapley
    1953.

    notebooks/10_faithfulness.ipynb takes it apart.
    """
    if permutations < 4 or permutations % 2:
        raise InputError(
            f"Shapley values need an even number of orders from 4, not {permutations}."
        )
    most = [shapley_rows(len(units), permutations) for units in asked.units]
    return _of_coalitions(asked, None, most, replacement, seed)


def coalition_rows(units: int) -> int:
    """The variants of so many units that ``coalitions`` runs by default."""
    return max(128, 4 * units)


def shapley_rows(units: int, permutations: int) -> int:
    """The variants that Shapley values of so many units run: all, where the orders take as many."""
    return min(2**units - 1, permutations * (units - 1) + 1)


def interactions(
    model: Any,
    question: Question,
    keep: float | None = None,
    rows: int | None = None,
    replacement: str | Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """How much more two units add together than each by itself: in nats, with standard errors.

    Both FloatTensors [units, units], symmetric with a diagonal of zeros. The options are those of
    ``coalitions``, and the rows, but that with a ``keep`` of 0 or 1 some are drawn, too. Where two
    units are needed together, their number is positive; where one makes up for the other, negative.

    Raises ``InputError`` as ``coalitions`` does. Sources: Owen 1972, doi:10.1287/mnsc.18.5.64;
    Grabisch and Roubens 1999, doi:10.1007/s001820050125.
    """
    _check(keep)
    with asking(model, [question]) as asked:
        units = len(question.units)
        kept = draw_coalitions(units, keep, coalition_rows(units) if rows is None else rows, seed)
        whole, (values,) = coalition_values(asked, [kept], replacement)
    scores, errors = average_gains(kept, values, whole[0], keep, pairs=True)
    return scores[0].float(), errors[0].float()


def draw_coalitions(
    units: int, keep: float | None, rows: int, seed: int = 0, first: Tensor | None = None
) -> Tensor:
    """Coalitions, no two alike and that of all units not among them: BoolTensor [rows, units].

    Where all are no more than ``rows``, all of them. Else ``first`` [some, units], by default the
    empty one and without a ``keep`` those without one unit and those of one alone; then draws by
    ``keep``, and a few by any other probability, to learn from what kind of function it is. Where a
    coalition counts as much as what it leaves out, both are taken: the scores are of the function's
    odd part alone.

    Raises ``InputError`` for fewer rows than two a unit, and one; with ``first``, for fewer than
    these, and one.
    """
    if 2**units - 1 <= rows:
        return all_subsets(units)[:-1]
    alone = torch.eye(units, dtype=torch.bool)
    start = torch.cat([torch.zeros_like(alone[:1]), ~alone, alone][: 3 if keep is None else 1])
    least = 2 * units + 1
    if first is not None:
        start, least = first, len(first) + 1
    if rows < least:
        raise InputError(f"Coalitions of {units} units need at least {least} rows, not {rows}.")
    found = dict.fromkeys(map(tuple, start.tolist()))  # in their order
    generator = torch.Generator().manual_seed(seed)
    while len(found) < rows:
        chance, coin = torch.rand(2, generator=generator).tolist()
        if keep is not None and coin > OTHERS:
            chance = keep
        row = torch.rand(units, generator=generator) < chance
        for some in (row, ~row) if keep in (None, 0.5) else (row,):
            if len(found) < rows and not some.all():
                found[tuple(some.tolist())] = None
    return torch.tensor(list(found))


def all_subsets(units: int) -> Tensor:
    """Every subset of the units: BoolTensor [2**units, units], the empty one first, all last."""
    return (torch.arange(2**units)[:, None] >> torch.arange(units)) % 2 == 1


def average_gains(
    kept: Tensor, values: Tensor, whole: Tensor, keep: float | None = None, pairs: bool = False
) -> tuple[Tensor, Tensor]:
    """What each unit gains on average, and its standard error, from the values of some coalitions.

    ``kept`` BoolTensor [rows, units] are the coalitions, no two alike and all units not among them,
    ``values`` [rows, outs] theirs and ``whole`` [outs] that of all units. ``keep`` as in
    ``coalitions``. Returns float64 [outs, units] twice; with ``pairs`` [outs, units, units], what
    two units gain together beyond what each does alone.

    Where the rows are all that count the averages are taken. Else the values are what a Gaussian
    process on the coalitions says: its prior is that every unit, pair, triple … of units adds an
    amount of its own, and that all pairs together vary less than all units by one factor, all
    triples less than all pairs by the same; the factor that makes the values most probable is
    taken. So the scores agree with every row, Shapley values add up, and the errors are the
    posterior's. On a prompt of 19 tokens these were too small, by a quarter at 7 rows a unit and by
    an eighth at 18. Sources: O'Hagan 1991, doi:10.1016/0378-3758(91)90002-V; Rasmussen and Williams
    2006, chapter 2.
    """
    kept = torch.cat([kept, torch.ones_like(kept[:1])])
    values = torch.cat([values, whole[None]]).cpu().double()
    shares = _shares(kept, keep, pairs)  # [rows, units or pairs]
    if (shares.abs().sum(dim=0) < (4 if pairs else 2) - 1e-9).any():  # some coalitions lack
        scores, errors = _posterior(kept, values, keep, pairs)
    else:
        scores = values.T @ shares
        errors = torch.zeros_like(scores)
    return (_square(scores, kept), _square(errors, kept)) if pairs else (scores, errors)


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
    if isinstance(baseline, str) and baseline not in ("mean", "eos", "zero"):
        raise InputError(f"There is no baseline {baseline!r}: use mean, eos, zero or a tensor.")
    found: Any = blank(asked, baseline)  # none of these takes tokens out
    return found


def _check(keep):
    if keep is not None and not 0 <= keep <= 1:
        raise InputError(f"Units are kept with a probability from 0 to 1, not {keep}.")


def _of_coalitions(asked, keep, rows, replacement, seed):
    """``coalitions`` where each question has its number of rows."""
    _check(keep)
    alone = keep in (0, 1)  # then a unit meets all of the others or none of them
    kept = [
        _all_or_none(len(units), keep) if alone else draw_coalitions(len(units), keep, most, seed)
        for units, most in zip(asked.units, rows, strict=True)
    ]
    whole, values = coalition_values(asked, kept, replacement)
    found = []
    for row, (some, of_some) in enumerate(zip(kept, values, strict=True)):
        scores, errors = average_gains(some, of_some, whole[row], keep)
        if asked.each and errors.any():
            scores = nothing_unread(asked, row, scores)
        moved = None
        if keep is None:  # the first one drawn is the empty one
            moved = whole[row].cpu().double() - of_some[0].cpu().double()
        result = attribution(
            asked,
            row,
            scores,
            moved=moved,
            errors=None if alone else errors,
            forwards=len(some) + 1,
        )
        closed = None if moved is None else (result.gap or 0) < 1e-2
        found.append(replace(result, closed=closed))
    return found


def nothing_unread(asked: Asked, row: int, scores: Tensor) -> Tensor:
    """Scores [outs, units] with 0 where an output is read before the unit: the last one sees all.

    What was estimated there goes to the last output, which gives back as much in the units that the
    other one reads: neither an output's total nor a unit's is another one then. ``row`` is the
    question's place in ``asked``.
    """
    first = torch.tensor([unit.positions[0] for unit in asked.units[row]])
    unread = first > asked.positions[:, None]
    over = torch.where(unread, scores, 0)
    back = torch.where(unread, 0, over.sum(dim=1, keepdim=True))
    change = back / (~unread).sum(dim=1, keepdim=True) - over
    change[-1] -= change.sum(dim=0)
    return scores + change


def _all_or_none(units, keep):
    """The coalitions that count for units that meet all of the others, or none of them."""
    alone = torch.eye(units, dtype=torch.bool)
    kept = ~alone if keep else torch.cat([torch.zeros_like(alone[:1]), alone])
    return kept[~kept.all(dim=1)]


def _shares(kept, keep, pairs=False):
    """What share of the average gain each coalition stands for: float64 [rows, units or pairs].

    The gain of a unit is what coalitions with it have more than those without; of a pair, it is the
    one's gain where the other is there, less where it is not.
    """
    there, sides = _of_members(kept, pairs)
    others = kept.shape[1] - 1 - pairs
    if keep is None:
        of_size = [1 / ((others + 1) * math.comb(others, k)) for k in range(others + 1)]
    else:
        of_size = [keep**k * (1 - keep) ** (others - k) for k in range(others + 1)]
    size = kept.sum(dim=1, keepdim=True) - there
    return sides * torch.tensor(of_size, dtype=torch.float64)[size]


def _of_members(kept, pairs):
    """How many of a unit, or of the two of a pair, are there, and the product of their signs.

    Both [rows, units or pairs]; the sign of what is there is 1, else -1.
    """
    signs = kept.double() * 2 - 1
    if not pairs:
        return kept.long(), signs
    one, other = torch.triu_indices(kept.shape[1], kept.shape[1], 1)
    return kept[:, one].long() + kept[:, other], signs[:, one] * signs[:, other]


def _square(of_pairs, kept):
    """Numbers of pairs [outs, pairs] as [outs, units, units], symmetric with zeros between."""
    one, other = torch.triu_indices(kept.shape[1], kept.shape[1], 1)
    square = of_pairs.new_zeros(len(of_pairs), kept.shape[1], kept.shape[1])
    square[:, one, other] = square[:, other, one] = of_pairs
    return square


def _posterior(kept, values, keep, pairs):
    """Scores and errors [outs, units or pairs] by the Gaussian process of ``average_gains``.

    Of units that are there (1) or not (-1), what a subset of them adds is its amount times the
    product of their signs. So the covariance of two coalitions hangs on in how many units they
    differ, and that of a coalition and a gain on how many of the other units the coalition lacks.
    """
    units = kept.shape[1]
    others = units - 1 - pairs
    there, sides = _of_members(kept, pairs)
    lacks = others - (kept.sum(dim=1, keepdim=True) - there)  # [rows, units or pairs]
    differ = torch.cdist(kept.double(), kept.double(), p=1).round().long()  # [rows, rows]

    def root_of(factor):
        shares = _shares_of_orders(units, factor)
        covariance = (shares @ _signs(units))[differ] + LEVEL
        return torch.linalg.cholesky(covariance + ROUNDING * torch.eye(len(kept)).double())

    level = values.mean(dim=0)
    found = []
    for factor in FACTORS:
        root = root_of(factor)
        told = torch.linalg.solve_triangular(root, (values - level).sum(1, True), upper=False)
        found.append((float(len(kept) * told.norm().log() + root.diagonal().log().sum()), factor))
    factor = min(found)[1]  # the most probable one of the sum of the outs: then these add up to it
    root = root_of(factor)
    # of the subsets that hold the unit, or the pair: by the number of others that are in them
    shares = _shares_of_orders(units, factor)[1 + pairs :]
    shares = shares * _choose(others) / _choose(units)[1 + pairs :]
    mean = _mean_products(others, keep)
    together = 2 ** (1 + pairs) * ((shares * mean) @ _signs(others))[lacks] * sides
    alone = 4 ** (1 + pairs) * (shares * mean.square()).sum()
    known = torch.linalg.solve_triangular(root, together, upper=False)  # [rows, units or pairs]
    told = torch.linalg.solve_triangular(root, values - level, upper=False)  # [rows, outs]
    left = (alone - known.square().sum(dim=0)).clamp_min(0)
    return told.T @ known, (told.square().mean(dim=0)[:, None] * left).sqrt()


def _shares_of_orders(units, factor):
    """What part of the variance is that of the subsets of 0, 1, … units: float64 [units + 1]."""
    shares = factor ** torch.arange(units + 1).double()
    shares[0] = 0
    return shares / shares.sum()


def _choose(units):
    """How many subsets have 0, 1, … of so many units: float64 [units + 1]."""
    return torch.tensor([math.comb(units, k) for k in range(units + 1)], dtype=torch.float64)


def _mean_products(units, keep):
    """The mean product of 0, 1, … signs of units that are kept by chance: float64 [units + 1]."""
    order = torch.arange(units + 1).double()
    return (2 * keep - 1) ** order if keep is not None else (order % 2 == 0) / (order + 1)


@cache
def _signs(units):
    """The mean product of the signs of d units, where h of all are -1: float64 [d, h].

    These are Krawtchouk's polynomials, over their value at 0. Those of the larger half of d follow
    from the smaller half's: the product of all signs is that of the rest, times (-1)**h.
    """
    h = torch.arange(units + 1).double()
    signs = [torch.ones_like(h)]
    for d in range(units // 2):
        before = signs[d - 1] if d else 0
        signs.append(((units - 2 * h) * signs[d] - d * before) / (units - d))
    rest = [(-1) ** h * signs[units - d] for d in range(units // 2 + 1, units + 1)]
    return torch.stack(signs + rest)
