"""One order of the units for two goals: the word that decides first, and erasure borne out."""

import torch
from torch import Tensor

from helpers.attribution.engine import Asked
from helpers.attribution.perturbation import (
    average_gains,
    coalition_values,
    draw_coalitions,
    nothing_unread,
)
from helpers.attribution.relevance import relevance
from helpers.attribution.result import Attribution, attribution
from helpers.errors import InputError

CUT = 0.3  # of the strongest unit of the first stage: see notebooks/10_faithfulness.ipynb
KEEP = 0.5  # the Banzhaf value: of all chances to keep a unit the one that erasure bears out most
FEWEST = 38  # coalitions: with the whole prompt and the baseline, forty rows


def find_then_rank(
    asked: Asked, cut: float = CUT, rows: int | None = None, seed: int = 0
) -> list[Attribution]:
    """First the units that slope and removal both point at, then the others by their average gain.

    Finding the word that decides and predicting what erasure does are two goals, and each has its
    best methods. The first stage finds: ``relevance`` (one gradient) and ``occlusion`` (a row a
    unit), each over its Euclidean norm, are added, and the units that reach ``cut`` of the largest
    sum come first. The second stage ranks what is left by the Banzhaf value, what a unit adds where
    each of the others is there with probability 1/2, from the same rows and ``rows`` less these
    more: see ``coalitions``. By default that is a gradient and forty rows, and two rows a unit for
    more than twenty units.

    Scores have no unit, as the stages have none in common: those of the first stage are from 1 +
    ``cut`` to 2, those of the second from -1 to 1, in proportion. ``errors`` are the standard
    errors of the second stage; the first one draws nothing by chance.

    Raises ``InputError`` for a ``cut`` that is not above 0 and at most 1, and for fewer rows than
    one a unit, and one. notebooks/10_faithfulness.ipynb takes it apart.
    """
    if not 0 < cut <= 1:
        raise InputError(f"The cut is a share above 0 and at most 1 of the largest sum, not {cut}.")
    without = [~torch.eye(len(units), dtype=torch.bool) for units in asked.units]
    most = [most_rows(len(some)) if rows is None else rows for some in without]
    kept = [
        draw_coalitions(len(some), KEEP, count, seed, first=some)
        for some, count in zip(without, most, strict=True)
    ]
    slopes = relevance(asked)
    whole, values = coalition_values(asked, kept)
    found = []
    for row, slope in enumerate(slopes):
        places = (without[row][:, None] == kept[row]).all(dim=-1).long().argmax(dim=1)
        removal = whole[row].cpu() - values[row][places].cpu()  # [units, outs]
        gains, errors = average_gains(kept[row], values[row], whole[row], KEEP)  # [outs, units]
        scores, off = two_stages(
            slope.scores,
            removal.sum(dim=1),
            gains.sum(dim=0),
            errors.square().sum(dim=0).sqrt(),
            cut,
        )
        each = scores[None]
        if slope.each is not None:
            read = nothing_unread(asked, row, gains)
            of_outs = zip(slope.each, removal.T, read, errors, strict=True)
            each = torch.stack([two_stages(*some, cut)[0] for some in of_outs])
        found.append(
            attribution(
                asked,
                row,
                each,
                scores=scores,
                errors=off[None],
                evaluations=slope.evaluations,
                forwards=slope.forwards + len(kept[row]) + 1,
            )
        )
    return found


def most_rows(units: int) -> int:
    """The coalitions of so many units that ``find_then_rank`` runs by default."""
    return min(2**units - 1, max(FEWEST, 2 * units - 2))


def two_stages(
    slope: Tensor, removal: Tensor, gains: Tensor, errors: Tensor, cut: float = CUT
) -> tuple[Tensor, Tensor]:
    """Scores and errors [units] of ``find_then_rank``, from those of the methods in it.

    Where neither slope nor removal speaks for any unit, all are of the second stage.

    notebooks/10_faithfulness.ipynb takes it apart.
    """
    pointed = _unit_length(slope) + _unit_length(removal)
    share = pointed / pointed.max().clamp_min(1e-12)
    first = share >= cut
    scale = gains.masked_fill(first, 0).abs().max().clamp_min(1e-12)
    scores = torch.where(first, 1 + share, gains / scale)
    return scores, torch.where(first, 0, errors / scale)


def _unit_length(scores):
    scores = scores.double()
    return scores / scores.norm().clamp_min(1e-12)
