"""Integrated gradients: the gradient, added up along the line from a baseline to the prompt."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helpers.attribution.engine import Asked, asking, rows_per_batch
from helpers.attribution.perturbation import baseline_of
from helpers.attribution.result import Attribution, attribution, attributions
from helpers.errors import InputError
from helpers.questions import Question

FIRST_EVALUATIONS = 33  # sixteen pieces of the path, before anything is known about it
FIRST_ROUND = (FIRST_EVALUATIONS + 1) // 2  # their ends, which are asked for together
FEWEST_CUT = 8  # pieces at a time: a pass of fewer points hardly takes less time
LEAST_WIDTH = 2**-20  # of the path: a piece whose ends float32 can hardly tell apart stays whole
Points = Callable[[Tensor], tuple[Tensor, Tensor]]


def baseline_embeds(model: Any, question: Question, baseline: str | Tensor = "mean") -> Tensor:
    """What a prompt that says nothing looks like: embeddings [1, seq, dim] to compare with.

    ``"mean"`` puts the average of all token embeddings at each position, ``"eos"`` the
    end-of-text token's, ``"zero"`` zeros; a tensor is used as it is, broadcast to [1, seq, dim].

    notebooks/07_integrated_gradients.ipynb takes it apart.
    """
    return baseline_of(Asked(model, [question]), baseline)[:, : question.input_ids.shape[1]]


def simpson(alphas: Tensor, slopes: Tensor) -> Tensor:
    """Simpson's rule on pieces of three points, ``alphas`` [pieces, 3]: scores [pieces, seq].

    Introduced in notebooks/07_integrated_gradients.ipynb.
    """
    left, middle, right = slopes.unbind(dim=1)  # [pieces, seq] each
    width = alphas[:, 2:] - alphas[:, :1]  # [pieces, 1]
    return width / 6 * (left + 4 * middle + right)


def halve(run: Points, alphas: Tensor, values: Tensor, slopes: Tensor) -> list[Tensor]:
    """Two pieces for each one, at the price of two new points: the three old ones are kept.

    ``run`` gives values and slopes at new alphas. Takes and returns ``alphas`` and ``values``
    [pieces, 3] and ``slopes`` [pieces, 3, seq].

    Introduced in notebooks/07_integrated_gradients.ipynb.
    """
    between = (alphas[:, :-1] + alphas[:, 1:]) / 2  # [pieces, 2]
    new = between, *run(between.flatten())
    halves = []
    for old, some in zip((alphas, values, slopes), new, strict=True):
        some = some.view(-1, 2, *old.shape[2:])
        halves.append(torch.stack([old[:, :-1], some, old[:, 1:]], dim=2).flatten(0, 1))
    return halves


def refine(run: Points, tolerance: float, max_evaluations: int) -> dict[str, Any]:
    """Halve the pieces of a path that miss most, until little is missing for any of the outs.

    ``run`` gives values [points, outs] and slopes [points, outs, columns] at alphas. The outs share
    the points, and a piece is halved for whichever misses on it; what an out misses counts in units
    of what it may miss, so that none waits for the others. Returns ``scores`` and ``errors`` [outs,
    columns], ``moved`` [outs], ``evaluations`` and ``closed``: see ``integrated_gradients``.

    notebooks/07_integrated_gradients.ipynb takes it apart, for one out.
    """
    outs = 0

    def flat(alphas):
        nonlocal outs
        values, slopes = run(alphas)
        outs = values.shape[1]
        return values, slopes.flatten(1)

    alphas = torch.linspace(0, 1, FIRST_ROUND, dtype=torch.float64)
    pieces = [some.unfold(0, 3, 2) for some in (alphas, *flat(alphas))]
    pieces[1:] = [some.transpose(1, 2) for some in pieces[1:]]  # unfold puts the points last
    moved = pieces[1][-1, 2] - pieces[1][0, 0]  # [outs]
    scores = simpson(pieces[0], pieces[2])  # [pieces, outs x columns]
    errors, evaluations = torch.zeros_like(scores), len(alphas)
    cut = torch.ones(len(scores), dtype=torch.bool)
    while cut.any():
        halves = halve(flat, *(some[cut] for some in pieces))
        evaluations += len(halves[0])
        parts = simpson(halves[0], halves[2])
        change = (parts.unflatten(0, (-1, 2)).sum(dim=1) - scores[cut]).abs() / 15
        pieces = [torch.cat([old[~cut], new]) for old, new in zip(pieces, halves, strict=True)]
        scores = torch.cat([scores[~cut], parts])
        errors = torch.cat([errors[~cut], (change / 2).repeat_interleave(2, dim=0)])

        totals = scores.unflatten(1, (outs, -1)).sum(dim=2)  # [pieces, outs]
        missing = (pieces[1][:, 2] - pieces[1][:, 0] - totals).abs() / moved.abs().clamp(min=1)
        missing[pieces[0][:, 2] - pieces[0][:, 0] <= LEAST_WIDTH] = 0
        gaps = (totals.sum(dim=0) - moved).abs() / moved.abs().clamp(min=1)
        settled = missing.sum(dim=0) <= 5 * tolerance
        waiting = ~((gaps <= tolerance / 2) & settled)
        if not waiting.any():
            break
        worst_of = missing[:, waiting].amax(dim=1)  # [pieces]
        worst = worst_of.argsort(descending=True)
        cut = worst_of >= worst_of.max() / 8
        cut[worst[:FEWEST_CUT]] = True
        cut[worst[max(0, max_evaluations - evaluations) // 2 :]] = False
        cut &= worst_of > 0
    return {
        "scores": scores.sum(dim=0).unflatten(0, (outs, -1)),
        "errors": errors.sum(dim=0).unflatten(0, (outs, -1)),
        "moved": moved,
        "evaluations": evaluations,
        "closed": bool(((gaps <= tolerance) & settled).all()),
    }


def integrated_gradients(
    asked: Asked,
    baseline: str | Tensor = "mean",
    tolerance: float = 0.02,
    max_evaluations: int = 2000,
) -> list[Attribution]:
    """Integrated gradients that add up, or say that they do not: signed, in nats.

    The line from the baseline to the prompt is cut in pieces, each integrated by Simpson's rule.
    How far a piece is off is known for nothing: its scores have to add up to the difference of
    the objective between its ends, and both values came with the gradients. The worst pieces are
    halved until the gap is below half the ``tolerance`` and what the pieces miss, without letting
    one make up for another, below five times the tolerance; or until ``max_evaluations``
    gradients are spent, and then ``closed`` is false unless the tolerance itself was met.
    ``errors`` estimates each score's error from how much the last halving changed it. Nothing is
    rescaled to look complete.

    Raises ``InputError`` for an unknown baseline, a tolerance that is not above 0, or fewer
    evaluations than a first look takes. Sources: Sundararajan et al. 2017, arXiv:1703.01365;
    Lyness 1969, doi:10.1145/321526.321537, for halving with Simpson's rule.

    notebooks/07_integrated_gradients.ipynb takes it apart.
    """
    if not tolerance > 0 or max_evaluations < FIRST_EVALUATIONS:
        raise InputError(
            f"Integrated gradients need a tolerance above 0, not {tolerance}, and at least "
            f"{FIRST_EVALUATIONS} evaluations, not {max_evaluations}."
        )
    found = []
    for row in range(len(asked)):
        done = refine(_points(asked, row, baseline), tolerance, max_evaluations)
        scores, errors = (asked.per_unit(done.pop(name), row) for name in ("scores", "errors"))
        found.append(attribution(asked, row, scores, errors=errors, **done))
    return found


def _points(asked, row, baseline):
    """The outs of one question on the line from the baseline to its texts, as ``refine`` asks.

    A column's slope is the gradient at its position times what the line changes there, so a row
    adds up to the slope of the objective. A slope that overflows counts as zero, so that what it
    stands for is missed, not invented: at the zero baseline the gradient is multiplied by
    1/sqrt(eps) in every norm of every layer.
    """
    texts, columns = asked.embeds[row], asked.columns  # [texts, length, dim]
    start = texts.clone()
    start[:, :columns] = baseline_of(asked, baseline)[row]
    step = texts - start

    def run(some):
        rows = start + some.to(step)[:, None, None, None] * step  # [points, texts, length, dim]
        of = step[0, :columns]
        owner = torch.full((len(some),), row)
        values, slopes = asked.reactions(rows, lambda grad: (grad * of).sum(dim=-1), owner)
        return values.double().cpu(), slopes.where(slopes.isfinite(), 0).double().cpu()

    def points(alphas):
        values, slopes = zip(*asked.in_batches(run, alphas, texts.shape[1]), strict=True)
        return torch.cat(values), torch.cat(slopes)

    return points


def fixed_step_integrated_gradients(
    model: Any,
    question: Question,
    baseline: str | Tensor = "mean",
    n_steps: int = 50,
    rule: str = "gausslegendre",
) -> Attribution:
    """Captum's integrated gradients, summed over the hidden dimension: signed, in nats.

    Gradients are averaged over ``n_steps`` points of the line, whatever happens on it. On a Llama
    50 steps may be far from the integral, and more steps no nearer: read ``gap`` before the
    scores. ``rule`` is Captum's ``method``. Source: Sundararajan et al. 2017, arXiv:1703.01365.

    notebooks/07_integrated_gradients.ipynb takes it apart.
    """
    from captum.attr import IntegratedGradients  # takes a second, and no other method needs it

    with asking(model, [question]) as asked:
        start = asked.embeds.clone()
        start[:, :, : asked.columns] = baseline_of(asked, baseline)[:, None]

        def forward(rows):
            return asked.values(rows, torch.zeros(len(rows), dtype=torch.long))[:, 0]

        per_feature = IntegratedGradients(forward).attribute(
            asked.embeds,
            baselines=start,
            n_steps=n_steps,
            method=rule,
            internal_batch_size=rows_per_batch(asked.embeds[0, :, :, 0].numel()),
        )  # [1, texts, length, dim]
        scores = asked.in_columns(per_feature.sum(dim=-1))[:, None].detach()  # no norm: it adds up
        with torch.inference_mode():
            end_value, start_value = forward(torch.cat([asked.embeds, start]))
        moved = (end_value - start_value)[None, None]
        (found,) = attributions(asked, scores, moved=moved, evaluations=n_steps, forwards=2)
        return found
