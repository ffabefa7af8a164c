"""The two stages of ``find_then_rank`` against the methods that they are made of."""

import pytest
import torch
from linear_model import LinearCausalModel

from helpers import InputError, ask, attribute
from helpers.attribution.find_then_rank import most_rows, two_stages

PROMPT = "Riga is in"


def by_hand(model, question, cut):
    """Both stages written out: the methods one by one, and sorting instead of scores."""
    slope, removal = (
        attribute(model, question, name).scores for name in ("relevance", "occlusion")
    )
    gains = attribute(model, question, "coalitions", keep=0.5).scores
    both = slope / slope.norm() + removal / removal.norm()
    first = [unit for unit in both.argsort(descending=True) if both[unit] >= cut * both.max()]
    return first + [unit for unit in gains.argsort(descending=True) if unit not in first]


@pytest.mark.parametrize("cut", [0.05, 0.3, 1])
@pytest.mark.parametrize("options", [{"target": "b", "foil": "c"}, {"target": "b"}], ids=str)
def test_the_order_is_that_of_both_stages_one_after_the_other(tiny, cut, options):
    question = ask(*tiny, "Riga", **options)  # few units: all coalitions are run
    result = attribute(tiny[0], question, "find_then_rank", cut=cut)
    assert result.scores.argsort(descending=True).tolist() == by_hand(tiny[0], question, cut)


def test_the_stages_keep_apart_and_only_the_second_has_errors(tiny):
    question = ask(*tiny, PROMPT, target="b", foil="c")
    result = attribute(tiny[0], question, "find_then_rank")
    first = result.scores > 1
    assert 0 < first.sum() < len(first) and result.scores.max() == 2
    assert (result.scores[first] >= 1.3).all() and (result.scores[~first].abs() <= 1).all()
    assert result.errors[first].eq(0).all() and result.errors[~first].gt(0).all()
    assert len(result.errors[~first].unique()) > 1  # a unit's own


def test_the_second_stage_is_the_average_gain_with_half_of_the_others(tiny):
    question = ask(*tiny, "Riga", target="b", foil="c")  # few units: all coalitions are run
    ranked = attribute(tiny[0], question, "find_then_rank").scores.double()
    gains = attribute(tiny[0], question, "coalitions", keep=0.5).scores.double()
    second = ranked <= 1
    assert second.sum() > 1
    expected = gains[second] / gains[second].abs().max()
    torch.testing.assert_close(ranked[second], expected, rtol=1e-4, atol=1e-5)


def test_errors_shrink_with_rows_and_are_zero_where_all_are_run(tiny):
    question = ask(*tiny, "Riga is", target="b", foil="c")
    few, many, all_ = (
        attribute(tiny[0], question, "find_then_rank", rows=rows).errors.max()
        for rows in (16, 100, 127)
    )
    assert few > many > all_ == 0


@pytest.mark.parametrize("units, rows", [(1, 1), (4, 15), (9, 38), (20, 38), (30, 58)])
def test_twenty_units_take_a_gradient_and_forty_rows(tiny, units, rows):
    assert most_rows(units) == rows
    if units == 20:
        question = ask(*tiny, "a" * units, target="b", foil="c")
        assert len(question.units) == units
        result = attribute(tiny[0], question, "find_then_rank")
        assert (result.evaluations, result.forwards) == (1, 40)


def test_a_linear_models_strongest_unit_comes_first_and_the_rest_in_order(tiny):
    model = LinearCausalModel(tiny[1])
    question = ask(model, tiny[1], PROMPT, target="c", foil="d")
    known = model.known_scores(question)
    found = attribute(model, question, "coalitions").scores  # its errors are below 2 %
    order = two_stages(known, known, found, torch.zeros(len(known)))[0].argsort(descending=True)
    torch.testing.assert_close(known[order], known.sort(descending=True).values, rtol=0, atol=2e-2)


def test_what_nothing_speaks_for_is_left_to_the_second_stage():
    none, gains = torch.zeros(3), torch.tensor([1.0, -2.0, 0.5])
    scores, errors = two_stages(none, none, gains, torch.ones(3))
    assert scores.tolist() == [0.5, -1, 0.25] and errors.tolist() == [0.5] * 3
    assert two_stages(none, none, none, none)[0].tolist() == [0, 0, 0]


def test_the_largest_score_of_the_second_stage_is_one():
    found, gains = torch.tensor([1.0, 0, 0]), torch.tensor([3.0, 0.25, -0.125])
    scores, errors = two_stages(found, found, gains, torch.full((3,), 0.5))
    assert scores.tolist() == [2, 1, -0.5] and errors.tolist() == [0, 2, 2]


@pytest.mark.parametrize("cut", [0, -1, 1.1, float("nan")])
def test_a_cut_that_is_no_share_is_refused(tiny, cut):
    with pytest.raises(InputError, match="at most 1 of the largest sum"):
        attribute(tiny[0], ask(*tiny, PROMPT), "find_then_rank", cut=cut)


@pytest.mark.parametrize("rows", [0, 10])
def test_too_few_rows_are_refused(tiny, rows):
    with pytest.raises(InputError, match=f"10 units need at least 11 rows, not {rows}"):
        attribute(tiny[0], ask(*tiny, PROMPT), "find_then_rank", rows=rows)
