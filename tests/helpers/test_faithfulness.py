"""Deletion, insertion, randomisation: identities, and models on which the answer is known."""

import itertools
import math
from dataclasses import replace

import by_hand
import numpy as np
import pandas as pd
import pytest
import torch
from linear_model import LinearCausalModel

from helpers import InputError, ask, attribute, tiny_llama
from helpers.attribution.methods import erasure_price, erasure_size
from helpers.faithfulness import (
    Curves,
    against_random,
    area,
    best_by_interval,
    bootstrap_interval,
    by_method,
    erasure_curves,
    erasure_limit,
    erasure_measures,
    importance_order,
    random_orders,
    randomisation,
    randomised,
    rank_correlation,
)

PROMPT = "Riga is in"


def same(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def linear(tiny):
    return LinearCausalModel(tiny[1])


# --- curves ------------------------------------------------------------------------------------


SHAPES = {
    "next token": {},
    "foil": {"foil": "b"},
    "two texts": {"target": "ab", "foil": "cd"},
    "an answer in words": {"target": "a b", "units": "words"},
    "sentences": {"prompt": "Is it. It is! It", "units": "sentences", "foil": "b"},
    "raw logit": {"objective": "logit"},
    "raw logits": {"target": "ab", "foil": "c", "objective": "logit"},
}


def a_question(tiny, shape):
    return ask(*tiny, **{"prompt": PROMPT} | SHAPES[shape])


@pytest.mark.parametrize("replacement", ["mean", "eos", "neighbour", "zero", "remove"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_curve_is_the_objective_with_units_gone_one_after_the_other(tiny, replacement, shape):
    model, question = tiny[0], a_question(tiny, shape)
    units = len(question.units)
    order = random_orders(units, 1, seed=5)
    curves = erasure_curves(model, question, order, replacement)
    for step in range(units + 1):
        first, rest = order[0, :step].tolist(), order[0, step:].tolist()
        expected = [by_hand.without(model, question, gone, replacement) for gone in (first, rest)]
        found = torch.stack([curves.deletion[0, step, 0], curves.insertion[0, step, 0]])
        same(found, torch.tensor(expected), 2e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_probabilities_are_of_the_whole_target_or_of_target_and_foil(tiny, shape):
    """At every step, whatever the objective: the ratio of two probabilities of whole texts."""
    model, question = tiny[0], a_question(tiny, shape)
    normal = ask(*tiny, **{"prompt": PROMPT} | SHAPES[shape] | {"objective": "log_probability"})
    units = len(question.units)
    order = random_orders(units, 1, seed=2)
    curves = erasure_curves(model, question, order, "mean")
    for step in (0, 1, units):
        gone = order[0, :step].tolist()
        log = torch.tensor(by_hand.without(model, normal, gone, "mean"))
        expected = log.exp() if question.foil is None else log.exp() / (1 + log.exp())
        same(curves.deletion[0, step, 1], expected)
    start = question.probability if question.foil is None else None
    assert start is None or curves.deletion[0, 0, 1].item() == pytest.approx(start, rel=1e-3)


def test_the_ends_of_the_curves_meet(tiny):
    question = ask(*tiny, PROMPT)
    curves = erasure_curves(tiny[0], question, random_orders(len(question.labels), 3))
    assert torch.equal(curves.deletion[:, 0], curves.insertion[:, -1])
    assert torch.equal(curves.deletion[:, -1], curves.insertion[:, 0])
    assert curves.counts.tolist() == list(range(len(question.labels) + 1))


def test_on_a_linear_model_no_order_does_better_than_the_known_scores(linear, tiny):
    question = ask(linear, tiny[1], "Riga", target="a", foil="b")
    best = linear.known_scores(question).argsort(descending=True)
    orders = torch.tensor([best.tolist(), *itertools.permutations(range(4))])
    measures = erasure_measures(erasure_curves(linear, question, orders))
    assert measures["faithfulness"].argmax() == 0 or (
        measures["faithfulness"][0] == measures["faithfulness"].max()
    )
    assert measures["deletion"][0] == measures["deletion"].min()
    assert measures["faithfulness"].min() < measures["faithfulness"][0]
    same(measures["faithfulness"][1:].mean(), torch.tensor(0.0), 1e-4)  # chance, exactly


def test_the_measures_are_those_of_their_papers():
    """Of one order of five units in steps of 1, 2, 4 and 5, written out."""
    deletion = torch.tensor([[8.0, 0.9], [5.0, 0.5], [4.0, 0.4], [1.0, 0.2], [0.0, 0.1]])
    insertion = torch.tensor([[0.0, 0.1], [6.0, 0.6], [7.0, 0.8], [7.5, 0.7], [8.0, 0.9]])
    counts = torch.tensor([0, 1, 2, 4, 5])
    found = erasure_measures(Curves(counts, deletion[None], insertion[None], 9))
    below = (6.5 + 4.5 + 2 * 2.5 + 0.5) / 5
    above = (3 + 6.5 + 2 * 7.25 + 7.75) / 5
    chances = (0.35 + 0.7 + 2 * 0.75 + 0.8) / 5 - (0.7 + 0.45 + 2 * 0.3 + 0.15) / 5
    expected = {
        "deletion": below,
        "insertion": above,
        "faithfulness": above - below,
        "faithfulness_probability": chances,
        "comprehensiveness": ((8 - 5) + (8 - 4)) / 2,  # of one and of two units, of five
        "sufficiency": ((8 - 6) + (8 - 7)) / 2,
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)
    every = Curves(torch.arange(5), deletion[None], insertion[None], 9)
    found = erasure_measures(every)  # two units of four are half of them, and count
    assert found["comprehensiveness"].item() == ((8 - 5) + (8 - 4)) / 2
    alone = Curves(torch.tensor([0, 1]), deletion[None, :2], insertion[None, :2], 3)
    found = erasure_measures(alone)  # of one unit there is no half
    assert (found["comprehensiveness"].item(), found["sufficiency"].item()) == (3, 2)


def test_a_variant_that_orders_share_is_run_once(tiny):
    question = ask(*tiny, PROMPT)
    order = random_orders(len(question.labels), 1)
    once = erasure_curves(tiny[0], question, order)
    twice = erasure_curves(tiny[0], question, torch.cat([order, order]))
    assert twice.forwards == once.forwards == 2 * len(question.units) + 1
    assert torch.equal(twice.deletion[0], twice.deletion[1])


def test_a_limit_of_steps_takes_equal_portions(tiny):
    question = ask(*tiny, "Riga is in Latvia, and ")
    seq = len(question.labels)
    order = random_orders(seq, 2)
    fine, coarse = (erasure_curves(tiny[0], question, order, steps=n) for n in (None, 4))
    assert len(coarse.counts) == 5 and coarse.counts[-1] == seq
    same(coarse.deletion, fine.deletion[:, coarse.counts])


def test_a_prompt_of_one_token_has_measures(tiny):
    question = ask(*tiny, "R")
    measures = erasure_measures(erasure_curves(tiny[0], question, torch.tensor([[0]])))
    assert all(value.isfinite().all() for value in measures.values())


def test_units_that_are_not_among_those_tested_stay_in_every_variant(tiny):
    question, some = ask(*tiny, PROMPT), [2, 3, 7]
    curves = erasure_curves(tiny[0], question, torch.tensor([[2, 0, 1]]), among=some)
    order = torch.tensor([[7, 2, 3, *(i for i in range(10) if i not in some)]])
    whole = erasure_curves(tiny[0], question, order)
    assert curves.counts.tolist() == [0, 1, 2, 3]
    same(curves.deletion, whole.deletion[:, :4])
    same(curves.insertion[0, -1], curves.deletion[0, 0])  # with all of them it is the text itself
    same(curves.insertion[0, 0], curves.deletion[0, -1])  # and without any, without all of them


def test_against_random_orders_the_units_that_are_tested_alone(tiny):
    question, some = ask(*tiny, PROMPT), [1, 4, 5, 8]
    results = {m: attribute(tiny[0], question, m) for m in ("occlusion", "random")}
    table = against_random(tiny[0], question, results, count=3, among=some)
    for name, result in results.items():
        own = result.scores[some].argsort(descending=True, stable=True)[None]
        curves = erasure_curves(tiny[0], question, own, among=some)
        faithful = erasure_measures(curves)["faithfulness"]
        same(torch.tensor([table.loc[name, "faithfulness"]]), faithful)


def test_half_of_the_random_orders_are_the_others_from_behind(tiny):
    question = ask(*tiny, PROMPT)
    results = {"random": attribute(tiny[0], question, "random")}
    table = against_random(tiny[0], question, results, count=4, seed=7)
    drawn = random_orders(10, 2, 7)
    curves = erasure_curves(tiny[0], question, torch.cat([drawn, drawn.flip(1)]))
    chance = erasure_measures(curves)["faithfulness"]
    same(chance[:2], -chance[2:])
    assert table["random_faithfulness"].item() == pytest.approx(0, abs=1e-5)
    share = (chance < table["faithfulness"].item() - 1e-4).float().mean()
    assert table["beats_random"].item() == pytest.approx(share.item())
    alone = erasure_curves(tiny[0], question, drawn)
    assert curves.forwards == alone.forwards  # the same variants


def test_an_order_does_not_beat_itself(tiny):
    question, drawn = ask(*tiny, PROMPT), random_orders(10, 4, 7)
    result = attribute(tiny[0], question, "random")
    for order in drawn:
        own = replace(result, scores=-order.argsort().float())
        assert torch.equal(importance_order(own), order)
        table = against_random(tiny[0], question, {"own": own}, count=8, seed=7)
        curves = erasure_curves(tiny[0], question, torch.cat([drawn, drawn.flip(1)]))
        chance = erasure_measures(curves)["faithfulness"]
        value = table.loc["own", "faithfulness"]
        less = sum(value - other > 1e-3 for other in chance.tolist())
        assert table.loc["own", "beats_random"] == less / 8 < 1


SIZES = [(30, 30, 3), (12, 12, 2), (40, 100, 5), (3, 9, 4)]


@pytest.mark.parametrize("units, tokens, orders", SIZES)
def test_the_price_of_erasing_is_the_rows_that_run(tiny, units, tokens, orders):
    """Of ``tokens`` the price alone hangs on: the rows here are of the toy, one token a unit."""
    question = ask(*tiny, "".join(chr(97 + place % 26) for place in range(units)))
    count, steps = erasure_size(units, tokens)
    drawn = random_orders(units, count // 2, 0)
    orders_of_methods = random_orders(units, orders, 1)
    every = torch.cat([orders_of_methods, drawn, drawn.flip(1)])
    rows = erasure_curves(tiny[0], question, every, steps=steps).forwards
    assert erasure_price(units, tokens, orders).forwards == pytest.approx(rows, rel=0.15, abs=1.1)


@pytest.mark.parametrize("order", [[[0, 1]], [[0] * 10], [list(range(1, 11))]])
def test_an_order_that_is_no_permutation_is_refused(tiny, order):
    with pytest.raises(InputError, match="each of the 10 units once"):
        erasure_curves(tiny[0], ask(*tiny, PROMPT), torch.tensor(order))


def test_area_is_the_mean_height():
    counts = torch.tensor([0, 1, 4])
    same(area(counts, torch.tensor([2.0, 2, 2])), torch.tensor(2.0))
    same(area(counts, torch.tensor([0.0, 1, 4])), torch.tensor(2.0))


def test_scores_are_ordered_by_value_since_a_negative_one_pushes_away(linear, tiny):
    question = ask(linear, tiny[1], PROMPT, target="a", foil="b")
    result = attribute(linear, question, "gradient_x_input")
    assert result.scores[importance_order(result)].diff().le(0).all()
    assert result.scores.min() < 0


def test_against_random_beats_all_of_chance_where_the_scores_are_right(linear, tiny):
    question = ask(linear, tiny[1], "Riga is", target="a", foil="b")
    results = {m: attribute(linear, question, m) for m in ("occlusion", "random")}
    table = against_random(linear, question, results, count=30)
    assert table.loc["occlusion", "beats_random"] >= 0.9
    assert table.loc["occlusion", "faithfulness"] > table.loc["random", "faithfulness"]
    assert table.loc["occlusion", "random_faithfulness"] < table.loc["occlusion", "faithfulness"]


@pytest.mark.parametrize("shape", ["two texts", "an answer in words", "sentences"])
def test_against_random_takes_any_question(tiny, shape):
    question = a_question(tiny, shape)
    results = {m: attribute(tiny[0], question, m) for m in ("occlusion", "shapley")}
    table = against_random(tiny[0], question, results, count=5)
    orders = torch.stack([importance_order(result) for result in results.values()])
    measures = erasure_measures(erasure_curves(tiny[0], question, orders))
    assert table.index.tolist() == ["occlusion", "shapley"]
    for name, values in measures.items():
        same(torch.tensor(table[name].to_numpy()), values)


def test_orders_of_tokens_are_no_orders_of_words(tiny):
    question = a_question(tiny, "an answer in words")
    with pytest.raises(InputError, match="each of the 5 units once"):
        erasure_curves(tiny[0], question, random_orders(10, 1))


# --- the limit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", ["mean", "remove"])
@pytest.mark.parametrize("shape", ["next token", "foil", "two texts", "raw logit"])
def test_the_limit_is_the_best_of_all_orders(tiny, replacement, shape):
    model, question = tiny[0], ask(*tiny, **{"prompt": "Riga"} | SHAPES[shape])
    units = len(question.units)
    every = torch.tensor(list(itertools.permutations(range(units))))
    curves = erasure_curves(model, question, every, replacement=replacement)
    all_of_them = erasure_measures(curves)["faithfulness"].double()
    limit = erasure_limit(model, question, replacement)
    assert limit.best == pytest.approx(float(all_of_them.max()), abs=1e-4)
    assert all_of_them.mean() == pytest.approx(0, abs=1e-4)  # so that chance is a share of 0
    own = erasure_curves(model, question, limit.order[None], replacement=replacement)
    assert float(erasure_measures(own)["faithfulness"]) == pytest.approx(limit.best, abs=1e-4)
    assert limit.share(limit.best) == 1 and limit.share(0.0) == 0
    known = [limit.faithfulness(order) for order in every]
    assert known == pytest.approx(all_of_them.tolist(), abs=1e-4)
    assert limit.forwards == 2**units + 1
    scores = attribute(model, question, "shapley", replacement=replacement).scores
    torch.testing.assert_close(limit.shapley(), scores, atol=1e-4, rtol=0)


def test_on_a_linear_model_the_known_scores_reach_the_limit(linear, tiny):
    question = ask(linear, tiny[1], "Riga is")
    limit = erasure_limit(linear, question)
    known = importance_order(attribute(linear, question, "occlusion"))
    curves = erasure_curves(linear, question, torch.stack([known, known.flip(0)]))
    best, worst = erasure_measures(curves)["faithfulness"].tolist()
    assert limit.share(best) == pytest.approx(1, abs=1e-5) and limit.share(worst) < 0


def test_a_limit_without_room_has_no_shares_and_a_long_one_is_refused(linear, tiny):
    alone = erasure_limit(linear, ask(linear, tiny[1], "R"))
    assert math.isnan(alone.share(0.0)) and alone.order.tolist() == [0]
    with pytest.raises(InputError, match="only of 12"):
        erasure_limit(linear, ask(linear, tiny[1], "Riga is in Latvia"))


# --- randomisation -----------------------------------------------------------------------------


def test_randomised_changes_the_top_layers_only_and_gives_them_back():
    model, _ = tiny_llama()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    kept = [weight.data_ptr() for weight in model.parameters()]
    with pytest.raises(RuntimeError, match="half way"), randomised(model, 1):
        changed = {n for n, w in model.named_parameters() if not torch.equal(w, before[n])}
        assert changed and all(name.startswith("model.layers.1.") for name in changed)
        assert all("norm" not in name for name in changed)
        raise RuntimeError("half way")
    assert kept == [weight.data_ptr() for weight in model.parameters()]
    assert all(torch.equal(w, before[n]) for n, w in model.named_parameters())


def test_activations_keep_their_size():
    model, _ = tiny_llama()
    weight = model.model.layers[1].mlp.up_proj.weight
    mean, std = weight.mean().item(), weight.std().item()
    with randomised(model, 2):
        assert weight.mean().item() == pytest.approx(mean, abs=4 * std / weight.numel() ** 0.5)
        assert weight.std().item() == pytest.approx(std, rel=0.1)


def test_a_method_that_looks_at_no_model_does_not_notice_and_one_that_does_does(tiny):
    question = ask(*tiny, "Riga is in Latvia, and ")
    methods = {"random": {"seed": 3}, "gradient_x_input": {}}
    found = randomisation(tiny[0], question, methods, [0, 1, 2])
    assert found["random"] == pytest.approx([1] * 3)
    nothing, _, both = found["gradient_x_input"]
    assert nothing == pytest.approx(1) and both < 0.9


def test_more_layers_than_there_are_is_refused(tiny):
    with pytest.raises(InputError, match="There are 2 layers"), randomised(tiny[0], 3):
        pass


# --- statistics --------------------------------------------------------------------------------


def test_rank_correlation_is_spearmans():
    first, second = torch.tensor([1.0, 2, 2, 9]), torch.tensor([3.0, 1, 1, 0])
    table = pd.DataFrame({"first": first.numpy(), "second": second.numpy()})
    expected = table.corr(method="spearman").iloc[0, 1]
    assert rank_correlation(first, second) == pytest.approx(expected)
    assert np.isnan(rank_correlation(first[:2], second[:2]))


def test_bootstrap_intervals_cover_the_mean_as_often_as_they_say():
    draw = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        mean, low, high = bootstrap_interval(draw.exponential(1, 60), 500, seed=trial)
        assert low <= mean <= high
        hits += low <= 1 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_by_method_sorts_and_selects():
    table = pd.DataFrame(
        {
            "family": ["a", "a", "b", "a"],
            "case": [0, 0, 0, 0],
            "method": ["worse", "better", "better", "better"],
            "replacement": ["mean"] * 4,
            "measure": ["top1", "top1", "top1", "gap"],
            "value": [0.0, 1.0, 0.5, 9.0],
        }
    )
    found = by_method(table, "top1", replacement="mean")
    assert found.index.tolist() == ["better", "worse"]
    assert found.loc["better", "mean"] == 0.75 and found.loc["better", "prompts"] == 2
    assert found[["low", "high"]].isna().all(axis=1).tolist() == [False, True]  # of a single pair
    assert by_method(table, "top1", family="a").loc["better", "mean"] == 1


def test_the_two_directions_of_a_pair_count_as_one_prompt():
    """Ten pairs whose directions agree are ten facts, not twenty."""
    draw = np.random.default_rng(0).normal(size=10)
    table = pd.DataFrame(
        {
            "family": "a",
            "case": range(20),
            "method": "any",
            "replacement": "",
            "measure": "gap",
            "value": draw.repeat(2),
        }
    )
    found = by_method(table, "gap").loc["any"]
    mean, low, high = bootstrap_interval(draw)
    assert found["prompts"] == 20
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((mean, low, high))


def marks(methods, family="a", measure="reciprocal_rank"):
    """A table of ``{method: values}``; a method did not run on a prompt where that is None."""
    rows = [
        (family, case, method, "", measure, value)
        for method, values in methods.items()
        for case, value in enumerate(values)
        if value is not None
    ]
    columns = ["family", "case", "method", "replacement", "measure", "value"]
    return pd.DataFrame(rows, columns=columns)


def test_a_method_that_is_ahead_on_every_pair_wins_however_much_pairs_differ():
    hard = np.linspace(0, 0.8, 20)
    table = marks({"first": hard + 0.1, "second": hard, "third": hard / 2})
    best = best_by_interval(table, "reciprocal_rank")
    assert best.method == "first" and best.wins and best.alike == []
    assert best.leads.index.tolist() == ["second", "third"]  # the smallest lead first
    assert best.leads.loc["second", ["mean", "low", "high"]].tolist() == pytest.approx([0.1] * 3)
    assert best.leads.loc["second", "pairs"] == 10
    spread = by_method(table, "reciprocal_rank").loc["first"]
    assert spread["high"] - spread["low"] > 0.2  # though its own interval is wide


def test_methods_that_cannot_be_told_apart_are_named():
    lead = np.tile([0.3, 0.3, -0.2, -0.2], 5)
    table = marks({"first": 0.5 + lead, "second": [0.5] * 20, "third": [0.1] * 20})
    best = best_by_interval(table, "reciprocal_rank")
    assert best.method == "first" and not best.wins and best.alike == ["second"]


def test_a_lead_is_over_the_pairs_that_both_methods_ran_on():
    """The subset's method has the largest mean, on the easy prompts alone, and is worse there."""
    easy, hard = [0.9] * 12, [0.1] * 12
    table = marks({"all": easy + hard, "subset": [0.8] * 12 + [None] * 12, "bad": [0.0] * 24})
    assert by_method(table, "reciprocal_rank").index[0] == "subset"
    best = best_by_interval(table, "reciprocal_rank")
    assert best.method == "all" and best.wins
    assert best.leads.loc["subset", "mean"] == pytest.approx(0.1)
    assert best.leads["pairs"].to_dict() == {"subset": 6, "bad": 12}


def test_a_better_method_of_a_subset_keeps_the_other_from_winning():
    table = marks({"all": [0.5] * 24, "subset": [0.9] * 12 + [None] * 12})
    best = best_by_interval(table, "reciprocal_rank")
    assert best.method == "all" and best.alike == ["subset"]
    assert best.leads.loc["subset", "high"] < 0


def test_a_few_pairs_name_no_winner():
    """Five pairs that all point one way are no interval; six are."""
    for pairs, wins in ((5, False), (6, True)):
        table = marks({"first": [0.9] * 2 * pairs, "second": [0.2] * 2 * pairs})
        best = best_by_interval(table, "reciprocal_rank")
        assert best.wins == wins and best.leads["low"].isna().all() == (not wins)


@pytest.mark.thorough
def test_equal_methods_win_as_seldom_as_the_interval_says():
    """Two hundred tables of four methods that are alike: at most a few have a winner."""
    draw, won = np.random.default_rng(0), 0
    for _ in range(200):
        values = draw.normal(size=(4, 30)).repeat(2, axis=1)
        table = marks({f"method {i}": some for i, some in enumerate(values)})
        won += best_by_interval(table, "reciprocal_rank").wins
    assert won <= 15


def test_a_measure_that_is_not_there_names_no_best_method():
    with pytest.raises(InputError, match="no gap"):
        best_by_interval(marks({"one": [1.0] * 4}), "gap")


def test_the_best_method_of_categories_that_the_table_lacks():
    """As the kept table is read: its columns are categories, of which a part may be empty."""
    table = marks({"one": [1.0] * 12, "two": [0.0] * 12, "left out": [None]})
    table["method"] = pd.Categorical(table["method"], ["left out", "one", "two"])
    table["family"] = pd.Categorical(table["family"], ["a", "b"])
    best = best_by_interval(table, "reciprocal_rank", family="a", replacement="")
    assert best.method == "one" and best.leads.index.tolist() == ["two"]
