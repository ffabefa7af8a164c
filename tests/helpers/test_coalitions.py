"""The family of coalitions against its definitions, written out over all subsets."""

import itertools
import math
import random

import pytest
import torch
from linear_model import LinearCausalModel

from helpers import InputError, ask, attribute
from helpers.attribution import asking, average_gains, interactions
from helpers.attribution.perturbation import coalition_values, draw_coalitions

PROMPT = "Riga is in"  # ten tokens of the toy's byte tokenizer
KEEPS = [None, 0.0, 0.3, 0.5, 0.9, 1.0]


def subsets(units):
    return list(itertools.product((False, True), repeat=units))


def chances(others, keep):
    """The probability of one coalition of 0, 1, … of the others."""
    if keep is None:
        return [1 / math.comb(others, k) / (others + 1) for k in range(others + 1)]
    return [keep**k * (1 - keep) ** (others - k) for k in range(others + 1)]


def with_units(some, units, there):
    return tuple(there if unit in units else held for unit, held in enumerate(some))


def exact_gains(game, units, keep):
    """Each unit's average gain by definition; ``game`` maps tuples of bools to numbers."""
    chance = chances(units - 1, keep)
    gains = []
    for unit in range(units):
        without = [some for some in subsets(units) if not some[unit]]
        gains.append(
            sum(
                chance[sum(some)] * (game[with_units(some, [unit], True)] - game[some])
                for some in without
            )
        )
    return torch.tensor(gains, dtype=torch.float64)


def exact_pairs(game, units, keep):
    """What two units gain together beyond what each does alone, by definition."""
    found, chance = torch.zeros(units, units).double(), chances(units - 2, keep)
    for one, other in itertools.permutations(range(units), 2):
        for some in subsets(units):
            if not some[one] and not some[other]:
                first, second = (game[with_units(some, [unit], True)] for unit in (one, other))
                both = game[with_units(some, [one, other], True)]
                found[one, other] += chance[sum(some)] * (both - first - second + game[some])
    return found


def random_game(units, seed, factor=0.3):
    """Every subset of units adds a random amount where it is there, smaller for larger ones."""
    generator = random.Random(seed)
    amounts = {some: generator.gauss(0, 1) * factor ** (sum(some) - 1) for some in subsets(units)}
    return {
        some: sum(
            amount
            for of, amount in amounts.items()
            if all(held for held, needed in zip(some, of, strict=True) if needed)
        )
        for some in amounts
    }


def rows_of(game, kept):
    """What ``average_gains`` takes of a game: coalitions, their values, and that of all units."""
    whole = (True,) * len(kept[0])
    values = torch.tensor([[game[tuple(some)]] for some in kept], dtype=torch.float64)
    return torch.tensor(kept), values, torch.tensor([game[whole]], dtype=torch.float64)


def drawn(units, rows, seed):
    """Coalitions as tuples, among them those of none, one and all but one unit."""
    generator = random.Random(seed)
    few = [some for some in subsets(units) if sum(some) in (0, 1, units - 1)]
    rest = [some for some in subsets(units) if 1 < sum(some) < units - 1]
    return few + generator.sample(rest, rows - len(few))


# --- the definitions ---------------------------------------------------------------------------


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("units", [1, 2, 5])
def test_all_subsets_give_the_definition_and_no_error(units, keep):
    game = random_game(units, seed=units)
    found = average_gains(*rows_of(game, subsets(units)[:-1]), keep)
    torch.testing.assert_close(found[0][0], exact_gains(game, units, keep), rtol=0, atol=1e-12)
    assert found[1].eq(0).all()
    pairs, errors = average_gains(*rows_of(game, subsets(units)[:-1]), keep, pairs=True)
    torch.testing.assert_close(pairs[0], exact_pairs(game, units, keep), rtol=0, atol=1e-12)
    assert errors.eq(0).all()


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_all_or_none_of_the_others_need_one_row_a_unit(keep):
    game = random_game(6, seed=1)
    kept = [some for some in subsets(6) if sum(some) == 5 or (keep == 0 and sum(some) < 2)]
    scores, errors = average_gains(*rows_of(game, kept), keep)
    torch.testing.assert_close(scores[0], exact_gains(game, 6, keep), rtol=0, atol=1e-12)
    assert errors.eq(0).all()


@pytest.mark.parametrize("keep", [None, 0.3, 0.5, 0.9])
def test_the_errors_are_those_that_are_made(keep):
    """Over 60 games: two thirds of the scores are within one error, and 19 of 20 within two."""
    off, off_pairs = [], []
    for seed in range(60):
        game = random_game(6, seed)
        rows = rows_of(game, drawn(6, 32, seed))
        scores, errors = average_gains(*rows, keep)
        off.append(((scores[0] - exact_gains(game, 6, keep)) / errors[0]).abs())
        scores, errors = average_gains(*rows, keep, pairs=True)
        away = (scores[0] - exact_pairs(game, 6, keep)) / errors[0]
        off_pairs.append(away[~torch.eye(6, dtype=torch.bool)].abs())
    for some in (torch.cat(off), torch.cat(off_pairs)):
        assert 0.58 < (some < 1).double().mean() < 0.85
        assert 0.90 < (some < 2).double().mean() < 0.995


@pytest.mark.parametrize("keep", [None, 0.3, 0.5, 0.9])
def test_units_that_only_add_up_are_found_whatever_else_is_there(keep):
    amounts = [3.0, -1.0, 0.5, 0.0, 2.0, 7.0]
    game = {
        some: sum(amount for amount, held in zip(amounts, some, strict=True) if held)
        for some in subsets(6)
    }
    scores, errors = average_gains(*rows_of(game, drawn(6, 24, 0)), keep)
    torch.testing.assert_close(scores[0], torch.tensor(amounts).double(), rtol=0, atol=1e-3)
    assert errors.max() < 1e-2
    pairs, _ = average_gains(*rows_of(game, drawn(6, 24, 0)), keep, pairs=True)
    assert pairs.abs().max() < 1e-2


def test_two_units_that_need_each_other_and_two_that_stand_in_for_each_other():
    game = {some: 4.0 * (some[0] and some[1]) + (some[2] or some[3]) for some in subsets(8)}
    pairs, _ = average_gains(*rows_of(game, drawn(8, 90, 0)), None, pairs=True)
    assert pairs[0, 0, 1] == pytest.approx(4, abs=0.1)
    assert pairs[0, 2, 3] == pytest.approx(-1, abs=0.1)
    assert torch.equal(pairs, pairs.mT) and pairs[0].diagonal().eq(0).all()
    rest = pairs[0].clone()
    rest[[0, 1, 2, 3], [1, 0, 3, 2]] = 0
    assert rest.abs().max() < 0.1


# --- the method --------------------------------------------------------------------------------


def value_of_all(model, question, replacement=None):
    """``{kept: value}`` of all subsets of a question's units."""
    units = len(question.units)
    with asking(model, [question]) as asked:
        _, (values,) = coalition_values(asked, [torch.tensor(subsets(units))], replacement)
    return dict(zip(subsets(units), values[:, 0].double().tolist(), strict=True))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("units", ["tokens", "words", "sentences"])
def test_the_methods_scores_are_those_of_the_definition(tiny, units, keep):
    text = {"tokens": "Riga", "words": "a b cd e", "sentences": "It is. We are. So on."}[units]
    question = ask(*tiny, text, target="c", foil="d", units=units)
    count = len(question.units)
    result = attribute(tiny[0], question, "coalitions", keep=keep)
    expected = exact_gains(value_of_all(tiny[0], question), count, keep).float()
    torch.testing.assert_close(result.scores, expected, rtol=1e-4, atol=1e-5)
    assert result.forwards == (count + 1 + (keep == 0) if keep in (0, 1) else 2**count)


def test_occlusion_and_shapley_values_are_members_of_the_family(tiny):
    question = ask(*tiny, PROMPT, target="b", foil="c")
    one = attribute(tiny[0], question, "coalitions", keep=1)
    assert one.errors is None
    assert torch.equal(one.scores, attribute(tiny[0], question, "occlusion").scores)
    rows = 8 * 9 + 1
    own = attribute(tiny[0], question, "shapley", permutations=8, seed=3)
    same = attribute(tiny[0], question, "coalitions", keep=None, rows=rows, seed=3)
    assert torch.equal(own.scores, same.scores) and torch.equal(own.errors, same.errors)
    assert own.forwards == same.forwards == rows + 1
    other = attribute(tiny[0], question, "coalitions", keep=None, rows=rows, seed=4)
    assert not torch.equal(other.scores, same.scores)


@pytest.mark.parametrize("rows", [25, 60, 128])
def test_shapley_values_add_up_whatever_was_drawn(tiny, rows):
    question = ask(*tiny, PROMPT, target="abc")
    result = attribute(tiny[0], question, "coalitions", keep=None, rows=rows, each=True)
    assert result.gap < 1e-5 and result.gaps.max() < 1e-5 and result.closed
    torch.testing.assert_close(result.each.sum(dim=0), result.scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_linear_models_shares_are_found_by_every_member(tiny, keep):
    model = LinearCausalModel(tiny[1])
    question = ask(model, tiny[1], PROMPT, target="c", foil="d")
    result = attribute(model, question, "coalitions", keep=keep, rows=40)
    torch.testing.assert_close(
        result.scores, model.known_scores(question), rtol=0, atol=1e-5 if keep in (0, 1) else 2e-2
    )


@pytest.mark.parametrize("keep", [None, 0.5])
def test_pairs_are_those_of_the_definition(tiny, keep):
    question = ask(*tiny, "Riga i", target="b", foil="c")
    exact = exact_pairs(value_of_all(tiny[0], question), 6, keep)
    scores, errors = interactions(tiny[0], question, keep)
    torch.testing.assert_close(scores, exact.float(), rtol=1e-4, atol=1e-4)
    assert errors.eq(0).all() and exact.abs().max() > 0.01
    with_zeros = exact_pairs(value_of_all(tiny[0], question, "zero"), 6, keep).float()
    scores = interactions(tiny[0], question, keep, replacement="zero")[0]
    torch.testing.assert_close(scores, with_zeros, rtol=1e-4, atol=1e-4)
    assert (with_zeros - exact).abs().max() > 0.01
    scores, errors = interactions(tiny[0], question, keep, rows=40)
    off = ((scores - exact) / errors)[~torch.eye(6, dtype=torch.bool)].abs()
    assert (off < 3).double().mean() > 0.9


def test_of_a_linear_model_no_two_units_interact(tiny):
    model = LinearCausalModel(tiny[1])
    question = ask(model, tiny[1], PROMPT, target="c", foil="d")
    scores, _ = interactions(model, question, rows=60)
    assert scores.abs().max() < 2e-2 * model.known_scores(question).abs().max()


def test_who_is_named_twice_is_said_by_the_two_mentions_together(bundled):
    """Why a name's second mention, which decides, has no Shapley value to speak of."""
    question = ask(
        *bundled,
        "After Simon and Jack argued, Simon apologised to",
        target=" Jack",
        foil=" Simon",
    )
    first, second = (i for i, label in enumerate(question.labels) if label == " Simon")
    scores, errors = interactions(bundled[0], question)
    assert scores[second].argmax() == first
    assert scores[first, second] > 3 * errors[first, second]
    alone = attribute(bundled[0], question, "shapley").scores
    assert abs(alone[second]) < scores[first, second] / 4


@pytest.mark.parametrize("keep", [-0.1, 1.5, float("nan")])
def test_what_is_no_probability_is_refused(tiny, keep):
    for run in (
        lambda: attribute(tiny[0], ask(*tiny, PROMPT), "coalitions", keep=keep),
        lambda: interactions(tiny[0], ask(*tiny, PROMPT), keep),
    ):
        with pytest.raises(InputError, match=f"a probability from 0 to 1, not {keep}"):
            run()


@pytest.mark.parametrize("keep", KEEPS)
def test_what_is_drawn_is_what_the_definition_needs(keep):
    rows = [tuple(row) for row in draw_coalitions(8, keep, 61).tolist()]
    assert len(set(rows)) == 61 and (True,) * 8 not in rows
    first = [(False,) * 8]
    if keep is None:
        first += [tuple(other != unit for other in range(8)) for unit in range(8)]
        first += [tuple(other == unit for other in range(8)) for unit in range(8)]
    assert rows[: len(first)] == first
    drawn = rows[len(first) :]
    without = [some for some in drawn if tuple(not held for held in some) not in rows]
    # where a coalition counts as much as what it leaves out, that is there: but for a last one
    assert (len(without) <= 1) == (keep in (None, 0.5))
    of_one = [some for some in drawn if sum(some) in (1, 7)]
    assert len(of_one) < 16, "they are drawn, and not all of them"
    if keep in (0.3, 0.9):  # 0 and 1 have one coalition each
        shares = [sum(some) / 8 for some in drawn]
        others = sum(abs(share - keep) > 0.45 for share in shares)
        assert sum(abs(share - keep) < 0.3 for share in shares) > others


@pytest.mark.parametrize("rows", [0, 20])
def test_too_few_rows_are_refused(tiny, rows):
    with pytest.raises(InputError, match=f"10 units need at least 21 rows, not {rows}"):
        attribute(tiny[0], ask(*tiny, PROMPT), "coalitions", rows=rows)
