"""Integrated gradients that close: against exact answers, Captum, and their own promises."""

import numpy as np
import pytest
import torch
from linear_model import LinearCausalModel

from helpers import InputError, ask, attribute, tiny_llama
from helpers.attribution import (
    baseline_embeds,
    embed_prompt,
    fixed_step_integrated_gradients,
    halve,
    objective,
    objective_gradient,
    refine,
    simpson,
)
from helpers.attribution.path import FIRST_EVALUATIONS

PROMPT = "Riga is in"
METHOD = "integrated_gradients"


def same(scores, expected, tolerance=1e-4):
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance)


def moved(model, question, baseline="mean"):
    ends = torch.cat([baseline_embeds(model, question, baseline), embed_prompt(model, question)])
    with torch.inference_mode():
        start, end = objective(model, ends, question).tolist()
    return end - start


def slopes_at(model, question, start, alphas):
    """Values [points] and slopes [points, seq] of the line from ``start`` to the prompt."""
    step = embed_prompt(model, question) - start
    rows = start + alphas.float()[:, None, None] * step
    with torch.no_grad():
        values = objective(model, rows, question)
    return values, (objective_gradient(model, rows, question) * step).sum(dim=-1)


# --- the parts ---------------------------------------------------------------------------------


def cubic(alphas):
    """Values and slopes of two functions of the path whose slopes are cubic: a^4 and a^3 - a."""
    values = alphas**4 + alphas**3 - alphas
    return values, torch.stack([4 * alphas**3, 3 * alphas**2 - 1], dim=-1)


def test_simpsons_rule_is_exact_for_cubic_slopes():
    alphas = torch.tensor([[0.2, 0.45, 0.7], [0.7, 0.85, 1.0]], dtype=torch.float64)
    _, slopes = cubic(alphas.flatten())
    scores = simpson(alphas, slopes.view(2, 3, 2)).sum(dim=0)
    same(scores, torch.tensor([1 - 0.2**4, 0 - (0.2**3 - 0.2)], dtype=torch.float64), 1e-12)


def test_halving_takes_two_new_points_a_piece_and_keeps_the_three_old_ones():
    asked = []

    def run(alphas):
        asked.append(alphas)
        return cubic(alphas)

    alphas = torch.tensor([[0.0, 0.25, 0.5], [0.5, 0.75, 1.0]], dtype=torch.float64)
    values, slopes = cubic(alphas.flatten())
    halves = halve(run, alphas, values.view(2, 3), slopes.view(2, 3, 2))
    assert torch.cat(asked).tolist() == [0.125, 0.375, 0.625, 0.875]
    expected = torch.tensor([[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8]]) / 8
    assert torch.equal(halves[0], expected.double())
    for found, known in zip(halves[1:], cubic(halves[0]), strict=True):
        assert torch.equal(found, known)


def test_outs_share_their_points_and_each_closes():
    """Two outs at once: one is done at the first look, the other has a kink."""

    def run(alphas):
        kink = (alphas - 0.37).abs()
        values = torch.stack([alphas**4, 20 * kink], dim=1)
        smooth = torch.stack([4 * alphas**3, 0 * alphas], dim=1)
        rough = torch.stack([0 * alphas, 20 * (alphas - 0.37).sign()], dim=1)
        return values, torch.stack([smooth, rough], dim=1)

    done = refine(run, 1e-3, 2000)
    assert done["closed"] and done["evaluations"] < 200
    same(done["scores"], torch.tensor([[1.0, 0], [0, 20 * 0.26]]).double(), 6e-3)
    same(done["moved"], torch.tensor([1.0, 20 * 0.26]).double(), 1e-6)
    assert done["errors"].shape == (2, 2)
    assert not refine(run, 1e-9, 40)["closed"]


def test_a_step_is_not_halved_for_ever_and_the_path_does_not_close():
    def run(alphas):
        return (alphas > 0.37).double()[:, None], torch.zeros(len(alphas), 1, 1).double()

    done = refine(run, 1e-3, 100_000)
    assert not done["closed"] and done["evaluations"] < 1000
    assert done["moved"].item() == 1 and done["scores"].item() == 0


# --- right where the answer is known -----------------------------------------------------------


@pytest.mark.parametrize("options", [{"objective": "logit"}, {"foil": "b"}], ids=str)
@pytest.mark.parametrize("baseline", ["mean", "zero", "eos"])
def test_a_linear_model_closes_at_the_first_look(tiny, baseline, options):
    linear = LinearCausalModel(tiny[1])
    question = ask(linear, tiny[1], PROMPT, target="a", **options)
    result = attribute(linear, question, METHOD, baseline=baseline)
    start = baseline_embeds(linear, question, baseline)
    known = linear.known_gradient(question) * (embed_prompt(linear, question) - start)[0]
    same(result.scores, known.sum(dim=-1), 1e-5)
    assert result.closed and result.gap < 1e-5 and result.errors.max() < 1e-5
    assert result.evaluations == FIRST_EVALUATIONS


@pytest.mark.parametrize("options", [{}, {"foil": "b"}, {"target": "ab", "foil": "cd"}], ids=str)
@pytest.mark.parametrize("chat", [False, True])
def test_equal_to_captum_where_captum_converges(tiny, options, chat):
    """From a baseline near the prompt; far from it fixed steps do not converge on a Llama."""
    model, question = tiny[0], ask(*tiny, PROMPT, chat=chat, **options)
    near = embed_prompt(model, question) * 0.9
    captum = fixed_step_integrated_gradients(model, question, near, n_steps=200)
    assert captum.gap < 1e-4
    same(attribute(model, question, METHOD, baseline=near, tolerance=1e-4).scores, captum.scores)


def test_equal_to_a_much_finer_sum_where_fixed_steps_are_far_off(tiny):
    """Against 20,000 midpoints, of which more than one in four lie where the path is steep."""
    model, question = tiny[0], ask(*tiny, PROMPT)
    result = attribute(model, question, METHOD, tolerance=2e-3, max_evaluations=4000)
    steep = torch.linspace(0, 1, 5001, dtype=torch.float64) ** 3  # crowded towards the baseline
    middles, widths = (steep[1:] + steep[:-1]) / 2, steep.diff()
    _, slopes = slopes_at(model, question, baseline_embeds(model, question), middles)
    fine = (widths[:, None] * slopes).sum(dim=0).float()
    assert result.closed
    same(result.scores, fine, 0.01 * float(fine.abs().max()))


@pytest.mark.parametrize("baseline", ["mean", "eos"])
def test_the_bundled_model_closes(bundled, baseline):
    question = ask(*bundled, "Estonia's capital is", target=" Rig", foil=" Tall")
    result = attribute(bundled[0], question, METHOD, baseline=baseline, tolerance=0.05)
    assert result.closed and result.gap <= 0.05
    known = moved(bundled[0], question, baseline)
    assert abs(float(result.scores.sum()) - known) <= 0.05 * max(1, abs(known)) + 1e-3


# --- what it promises --------------------------------------------------------------------------


def test_the_gap_is_what_the_scores_miss_of_the_move_and_nothing_is_rescaled(tiny):
    model, question = tiny[0], ask(*tiny, PROMPT)
    result = attribute(model, question, METHOD, tolerance=1e-9, max_evaluations=40)
    missed = abs(float(result.scores.sum()) - moved(model, question))
    assert result.gap == pytest.approx(missed / max(1, abs(moved(model, question))), abs=1e-5)
    assert result.gap > 1e-6


@pytest.mark.parametrize("most", [FIRST_EVALUATIONS, 40, 101, 400])
def test_the_evaluations_allowed_are_not_exceeded(tiny, most):
    model, question = tiny[0], ask(*tiny, PROMPT)
    rows = []
    handle = model.register_forward_pre_hook(
        lambda module, args, named: rows.append(len(named["inputs_embeds"])), with_kwargs=True
    )
    try:
        result = attribute(model, question, METHOD, tolerance=1e-7, max_evaluations=most)
    finally:
        handle.remove()
    assert sum(rows) == result.evaluations <= most
    assert result.closed is False


@pytest.mark.thorough
def test_a_smaller_tolerance_costs_more_and_gives_smaller_errors(bundled):
    question = ask(*bundled, "The dog is")
    loose, tight = (attribute(bundled[0], question, METHOD, tolerance=t) for t in (0.2, 0.01))
    assert loose.closed and tight.closed
    assert tight.evaluations > loose.evaluations
    assert tight.gap <= 0.01 and tight.errors.max() < loose.errors.max()


def test_the_errors_are_of_the_size_of_the_real_ones(tiny):
    """Estimates, not bounds: on the whole within a factor of a few, and rather too large."""
    ratios = []
    for prompt in ("The dog is", "Riga is in", "keys", "Oslo", "one two"):
        question = ask(*tiny, prompt, foil="b")
        coarse, fine = (
            attribute(tiny[0], question, METHOD, tolerance=t, max_evaluations=4000)
            for t in (0.2, 1e-4)
        )
        assert fine.closed
        real = (coarse.scores - fine.scores).abs().max()
        ratios.append(float(coarse.errors.max() / real))
    assert 0.3 < sorted(ratios)[2] < 30, ratios


def test_from_zeros_the_scores_are_finite_and_say_that_they_did_not_close(bundled):
    """At zeros the gradient overflows: 30 layers, each with norms of slope 1/sqrt(eps)."""
    question = ask(*bundled, PROMPT)
    start = baseline_embeds(bundled[0], question, "zero")
    values, _ = slopes_at(bundled[0], question, start, torch.zeros(1))
    assert values.isfinite().all()  # whatever the slopes do
    result = attribute(bundled[0], question, METHOD, baseline="zero", max_evaluations=200)
    assert result.scores.isfinite().all() and not result.closed
    known = moved(bundled[0], question, "zero")
    assert result.gap == pytest.approx(
        abs(float(result.scores.sum()) - known) / max(1, abs(known)), rel=1e-2
    )


def test_a_prompt_that_is_its_own_baseline_moves_nothing(tiny):
    question = ask(*tiny, PROMPT)
    result = attribute(tiny[0], question, METHOD, baseline=embed_prompt(tiny[0], question))
    assert result.closed and result.evaluations == FIRST_EVALUATIONS
    assert not result.scores.any()


@pytest.mark.parametrize(
    "options", [{"tolerance": 0}, {"tolerance": -1}, {"tolerance": np.nan}, {"max_evaluations": 32}]
)
def test_what_cannot_be_done_is_refused(tiny, options):
    with pytest.raises(InputError, match="tolerance above 0"):
        attribute(tiny[0], ask(*tiny, PROMPT), METHOD, **options)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 16), (1, 99, 16)])
def test_a_baseline_of_the_wrong_shape_is_refused(shape):
    model, tokenizer = tiny_llama()
    with pytest.raises(InputError, match="baseline"):
        attribute(model, ask(model, tokenizer, PROMPT), METHOD, baseline=torch.zeros(shape))
