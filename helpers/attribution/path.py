"""Integrated gradients: the gradient, added up along the line from a baseline to the prompt."""

import torch
from captum.attr import IntegratedGradients

from helpers.attribution.engine import embed_prompt, in_batches, objective, rows_per_batch
from helpers.attribution.result import Attribution
from helpers.errors import InputError

FIRST_EVALUATIONS = 33  # sixteen pieces of the path, before anything is known about it
FEWEST_CUT = 8  # pieces at a time: a pass of fewer points hardly takes less time
LEAST_WIDTH = 2**-20  # of the path: a piece whose ends float32 can hardly tell apart stays whole


def baseline_embeds(model, question, baseline="mean"):
    """What a prompt that says nothing looks like: embeddings [1, seq, dim] to compare with.

    ``"mean"`` puts the average of all token embeddings at each position, ``"eos"`` the
    end-of-text token's, ``"zero"`` zeros; a tensor is used as it is, broadcast to [1, seq, dim].

    Introduced in notebooks/07_integrated_gradients.ipynb.
    """
    embeds = embed_prompt(model, question)
    table = model.get_input_embeddings().weight.detach()  # [vocab, dim]
    if isinstance(baseline, torch.Tensor):
        try:
            return baseline.to(embeds).expand_as(embeds)
        except RuntimeError as error:
            raise InputError(
                f"The baseline is {list(baseline.shape)} and the prompt {list(embeds.shape)}: give "
                "one vector, one vector for each token, or a tensor of the prompt's shape."
            ) from error
    if baseline == "mean":
        return table.float().mean(dim=0).to(embeds).expand_as(embeds)
    if baseline == "eos":
        eos = model.config.eos_token_id
        return table[eos[0] if isinstance(eos, list) else eos].expand_as(embeds)
    if baseline == "zero":
        return torch.zeros_like(embeds)
    raise InputError(f"There is no baseline {baseline!r}: use mean, eos, zero or a tensor.")


def completeness_gap(scores, moved):
    """|sum(scores) - moved| / max(|moved|, 1 logit): 0 when the scores account for all of it.

    The denominator is never below one logit: where the objective hardly moved, a ratio to
    nothing would say nothing.

    Introduced in notebooks/07_integrated_gradients.ipynb.
    """
    return float(abs(scores.sum() - moved)) / max(abs(float(moved)), 1.0)


def path_slopes(model, question, start, alphas):
    """The objective at points of the line from ``start`` to the prompt, and each token's slope.

    ``alphas`` [points] runs from 0, the baseline, to 1, the prompt. Returns the values [points]
    and the slopes [points, seq], both float64 on the CPU: token i's slope is the gradient at its
    position times what the line changes there, so a row adds up to the slope of the objective.
    A slope that overflows counts as zero, so that what it stands for is missed, not invented: at
    the zero baseline the gradient is multiplied by 1/sqrt(eps) in every norm of every layer.

    Introduced in notebooks/07_integrated_gradients.ipynb.
    """
    embeds = embed_prompt(model, question)
    step = embeds - start

    def run(some):
        rows = start + some.to(embeds)[:, None, None] * step  # [points, seq, dim]
        rows = rows.detach().requires_grad_(True)
        values = objective(model, rows, question)
        (grads,) = torch.autograd.grad(values.sum(), rows)
        slopes = (grads * step).sum(dim=-1)  # [points, seq]
        slopes = slopes.where(slopes.isfinite(), 0)
        return values.detach().double().cpu(), slopes.double().cpu()

    values, slopes = zip(*in_batches(model, run, alphas, embeds.shape[1]), strict=True)
    return torch.cat(values), torch.cat(slopes)


def simpson(alphas, slopes):
    """Simpson's rule on pieces of three points, ``alphas`` [pieces, 3]: scores [pieces, seq].

    Introduced in notebooks/07_integrated_gradients.ipynb.
    """
    left, middle, right = slopes.unbind(dim=1)  # [pieces, seq] each
    width = alphas[:, 2:] - alphas[:, :1]  # [pieces, 1]
    return width / 6 * (left + 4 * middle + right)


def halve(run, alphas, values, slopes):
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


def refine(run, tolerance, max_evaluations):
    """Halve the pieces of a path that miss most, until little is missing.

    ``run`` gives values [points] and slopes [points, seq] at alphas. Returns the scores [seq],
    their estimated errors [seq], the gap, the evaluations spent, and whether the tolerance was
    met: see ``integrated_gradients``.

    Introduced in notebooks/07_integrated_gradients.ipynb.
    """
    alphas = torch.linspace(0, 1, (FIRST_EVALUATIONS + 1) // 2, dtype=torch.float64)
    pieces = [some.unfold(0, 3, 2) for some in (alphas, *run(alphas))]
    pieces[2] = pieces[2].transpose(1, 2)  # unfold puts the three points last
    moved = float(pieces[1][-1, 2] - pieces[1][0, 0])
    scores = simpson(pieces[0], pieces[2])  # [pieces, seq]
    errors, evaluations = torch.zeros_like(scores), len(alphas)
    cut = torch.ones(len(scores), dtype=torch.bool)
    while cut.any():
        halves = halve(run, *(some[cut] for some in pieces))
        evaluations += len(halves[0])
        parts = simpson(halves[0], halves[2])
        change = (parts.unflatten(0, (-1, 2)).sum(dim=1) - scores[cut]).abs() / 15
        pieces = [torch.cat([old[~cut], new]) for old, new in zip(pieces, halves, strict=True)]
        scores = torch.cat([scores[~cut], parts])
        errors = torch.cat([errors[~cut], (change / 2).repeat_interleave(2, dim=0)])

        missing = (pieces[1][:, 2] - pieces[1][:, 0] - scores.sum(dim=1)).abs()  # [pieces]
        missing[pieces[0][:, 2] - pieces[0][:, 0] <= LEAST_WIDTH] = 0
        gap = completeness_gap(scores, moved)
        settled = float(missing.sum()) <= 5 * tolerance * max(abs(moved), 1.0)
        if gap <= tolerance / 2 and settled:
            break
        worst = missing.argsort(descending=True)
        cut = missing >= missing.max() / 8
        cut[worst[:FEWEST_CUT]] = True
        cut[worst[max(0, max_evaluations - evaluations) // 2 :]] = False
        cut &= missing > 0
    return scores.sum(dim=0), errors.sum(dim=0), gap, evaluations, gap <= tolerance and settled


def integrated_gradients(model, question, baseline="mean", tolerance=0.02, max_evaluations=2000):
    """Integrated gradients that add up, or say that they do not: signed, in logits.

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

    Introduced in notebooks/07_integrated_gradients.ipynb.
    """
    if not tolerance > 0 or max_evaluations < FIRST_EVALUATIONS:
        raise InputError(
            f"Integrated gradients need a tolerance above 0, not {tolerance}, and at least "
            f"{FIRST_EVALUATIONS} evaluations, not {max_evaluations}."
        )
    start = baseline_embeds(model, question, baseline)
    scores, errors, gap, evaluations, closed = refine(
        lambda alphas: path_slopes(model, question, start, alphas), tolerance, max_evaluations
    )
    return Attribution(scores, gap=gap, closed=closed, errors=errors, evaluations=evaluations)


def fixed_step_integrated_gradients(
    model, question, baseline="mean", n_steps=50, rule="gausslegendre"
):
    """Captum's integrated gradients, summed over the hidden dimension: signed, in logits.

    Gradients are averaged over ``n_steps`` points of the line, whatever happens on it. On a Llama
    50 steps may be far from the integral, and more steps no nearer: read ``gap`` before the
    scores. ``rule`` is Captum's ``method``. Source: Sundararajan et al. 2017, arXiv:1703.01365.

    Introduced in notebooks/07_integrated_gradients.ipynb.
    """
    embeds = embed_prompt(model, question)
    start = baseline_embeds(model, question, baseline)
    per_feature = IntegratedGradients(lambda rows: objective(model, rows, question)).attribute(
        embeds,
        baselines=start,
        n_steps=n_steps,
        method=rule,
        internal_batch_size=rows_per_batch(embeds.shape[1]),
    )  # [1, seq, dim]
    scores = per_feature.sum(dim=-1)[0].detach().float()  # a norm would not add up
    with torch.inference_mode():
        end_value, start_value = objective(model, torch.cat([embeds, start]), question)
    gap = completeness_gap(scores, end_value - start_value)
    return Attribution(scores, gap=gap, evaluations=n_steps, forwards=2)
