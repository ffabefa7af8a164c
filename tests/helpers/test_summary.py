"""What a report says at first sight: that the numbers are the model's, and that text stays text."""

import html
import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from linear_model import LinearCausalModel
from running import option_rows

from helpers import ask, attribute, attribute_all
from helpers.attribution import objective
from helpers.attribution.methods import erasure_size
from helpers.attribution.path import baseline_embeds
from helpers.coloured import FEW, coloured_text, percent, quoted
from helpers.faithfulness import against_random
from helpers.prompts import joined_units
from helpers.summary import (
    BLOCKS,
    LONG,
    REPORTED,
    TRUSTED,
    default_units,
    erasure_test,
    explain,
    most_trusted,
    probabilities_without,
    reported,
    show,
    summarise,
)
from helpers.tables import method_table, ranked_units, score_table

METHODS = [*TRUSTED, "random"]


@pytest.fixture(scope="module")
def linear(tiny):
    return LinearCausalModel(tiny[1])


def summary_of(model, tokenizer, prompt="The keys to the", methods=METHODS, **asked):
    question = ask(model, tokenizer, prompt, **asked)
    ((question, results),) = attribute_all(model, [question], methods)
    tested = against_random(model, question, results, steps=4)
    return summarise(model, question, results, tested), question, results, tested


# --- the numbers -------------------------------------------------------------------------------


def test_orders_are_tested_on_what_somebody_wrote(bundled):
    said = [{"role": "user", "content": "Is Riga in Latvia?"}]
    question = ask(*bundled, said, units="words")
    results = {name: attribute(bundled[0], question, name) for name in ("relevance", "random")}
    ranked = ranked_units(question)
    assert {question.units[unit].part for unit in ranked} == {"user"}
    tested = erasure_test(bundled[0], question, results)
    steps = erasure_size(len(ranked), len(question.labels))[1]
    options = {"among": ranked, "count": 10, "steps": steps}
    by_hand = against_random(bundled[0], question, results, **options)
    pd.testing.assert_frame_equal(tested, by_hand)


@pytest.mark.parametrize("pair", [{}, {"target": " b", "foil": " a"}, {"target": "bcd"}])
def test_probabilities_without_units_are_those_of_the_embeddings_put_in_by_hand(tiny, pair):
    model, tokenizer = tiny
    question = ask(model, tokenizer, "The keys", **pair)
    alone = replace(question, foil=None, foil_label=None)
    blank = baseline_embeds(model, question, "mean")
    embeds = model.get_input_embeddings()(question.input_ids)
    for found in probabilities_without(model, question, [(), (0,), (2, 3), (0, 1, 2, 3)]):
        changed = embeds.clone()
        for unit in found.units:
            places = list(question.units[unit].positions)
            changed[0, places] = blank[0, places]
        with torch.inference_mode():
            probability = objective(model, changed, alone).exp().item()
            both = objective(model, changed, question)
            fell = (objective(model, embeds, question) - both).item()
        assert math.exp(found.log_probability) == pytest.approx(probability, rel=1e-4)
        assert found.moved == pytest.approx(fell, abs=1e-4)
        assert (found.against is None) == (question.foil is None)
        if question.foil is not None:
            assert found.against == pytest.approx(both.sigmoid().item(), rel=1e-4)


def test_what_the_sentences_say_is_what_the_model_says(tiny):
    summary, question, _, _ = summary_of(*tiny, target="b", foil="a")
    with torch.inference_mode():
        logits = tiny[0](question.input_ids).logits[0, -1]
    pair = logits[[question.target[0], question.foil[0]]].softmax(dim=0)[0].item()
    assert percent(logits.softmax(dim=0)[question.target[0]].item()) in summary.answered
    assert summary.answered.endswith(f"Had it to be one of the two: {percent(pair)}.")
    for sentence, found in zip(summary.removed, summary.without, strict=True):
        after = percent(found.against)
        falls = "falls" if found.against < pair else "rises"
        moves = f"{falls} from {percent(pair)} to {after}"
        assert (f"stays at {after}" if after == percent(pair) else moves) in sentence
    assert [found.units for found in summary.without[:-1]] == [(u,) for u in summary.strongest]
    assert summary.without[-1].units == summary.strongest


def test_on_a_linear_model_the_strongest_units_are_those_with_the_largest_scores(linear, tiny):
    summary, question, results, _ = summary_of(linear, tiny[1], "abcdef", ["occlusion", "random"])
    scores = results["occlusion"].scores
    written = [i for i, unit in enumerate(question.units) if unit.part == "prompt"]
    best = sorted(written, key=lambda i: -scores[i])[:3]
    assert list(summary.strongest) == best
    assert summary.without[0].moved == pytest.approx(scores[best[0]].item(), abs=1e-4)


OPTIONS = ["bcd", "a", "bce", "xy"]


@pytest.mark.parametrize("replacement", ["mean", "remove"])
def test_shares_of_options_are_those_of_the_model_run_by_hand(tiny, replacement):
    model, tokenizer = tiny
    units = "tokens" if replacement == "mean" else "sentences"  # sentences are taken out
    question = ask(model, tokenizer, "The keys. To the.", options=OPTIONS, units=units)
    blank = baseline_embeds(model, question, "mean")
    table = model.get_input_embeddings()
    embeds = table(question.input_ids)
    last = len(question.units) - 1
    groups = [(), (0,), (0, last)] if replacement == "mean" else [(), (0,), (last,)]
    for found in probabilities_without(model, question, groups):
        gone = [place for unit in found.units for place in question.units[unit].positions]
        changed = embeds.clone()
        changed[0, gone] = blank[0, gone]
        if replacement == "remove":
            stay = [place for place in range(embeds.shape[1]) if place not in gone]
            changed = embeds[:, stay]
        expected = []
        for option in question.options:
            rest = table(torch.tensor([option.ids]))
            with torch.no_grad():
                rows = model(inputs_embeds=torch.cat([changed, rest], dim=1)).logits
            rows = rows[0, -len(option.ids) - 1 : -1].double().log_softmax(dim=-1)
            chances = [rows[at, token].item() for at, token in enumerate(option.ids)]
            expected.append(sum(chances))
        assert found.options == pytest.approx(expected, abs=1e-4)
        whole = sum(math.exp(value) for value in expected)
        shares = [math.exp(value) / whole for value in expected]
        assert found.shares == pytest.approx(shares, rel=1e-3)
        assert sum(found.shares) == pytest.approx(1)


def test_a_table_has_the_share_of_each_option_and_the_facts_have_them_too(bundled):
    cities = [" Tallinn", " Riga", " <b>Minsk", " Vilnius"]
    question = ask(*bundled, "The capital city of Latvia is", options=cities, units="words")
    summary = explain(bundled[0], question, ["occlusion"])
    assert summary.heading == "Why “Riga” rather than “Tallinn”, the next of 4 options?"
    share = percent(summary.whole.shares[1])
    assert summary.answered.endswith(f"Had it to be one of the 4: {share}.")
    first, then = summary.removed[0], summary.without[0].shares
    assert first.startswith(f"Without “Latvia”, “Riga” among the 4 options falls from {share} to ")
    likeliest = quoted(cities[then.index(max(then))])
    assert then.index(max(then)) != 1 and f"the likeliest is then {likeliest}" in first
    head, *rows = option_rows(summary._repr_html_())
    assert head == [
        *("option", "probability", "share", "without 1", "without 2", "without 3", "without all")
    ]
    order = sorted(range(4), key=lambda at: -summary.whole.options[at])
    columns = [summary.whole.shares, *(found.shares for found in summary.without)]
    assert rows == [
        [quoted(cities[at]), percent(math.exp(summary.whole.options[at]))]
        + [percent(shares[at]) for shares in columns]
        for at in order
    ]
    bold = re.findall(r"<td><b>([^<]*)</b>", summary._repr_html_())
    chances = [math.exp(value) for value in summary.whole.options]
    assert sorted(bold) == sorted(percent(max(some)) for some in [chances, *columns])
    facts = summary.facts()["options"]
    assert [fact["option"] for fact in facts] == cities
    assert [fact["probability"] for fact in facts] == chances
    assert [[fact["share"], *fact["without"]] for fact in facts] == [
        list(some) for some in zip(*columns, strict=True)
    ]
    assert "“Vilnius”" in repr(summary) and "without all" in repr(summary)


def test_an_option_that_was_named_is_compared_with_the_likeliest(bundled):
    question = ask(*bundled, "The capital city of Latvia is", options=CITIES, target=" Minsk")
    summary = explain(bundled[0], question, ["occlusion"])
    assert summary.heading == "Why “Minsk” rather than “Riga”, the likeliest of 3 options?"
    assert summary.option_rows[1][0] == "“Riga”"
    pair = explain(bundled[0], ask(*bundled, "The capital", options=[" a", " b"]), ["occlusion"])
    assert pair.heading == "Why “a” rather than “b”?" and pair.option_rows == []
    assert pair.facts()["options"] == [] and "<table" not in pair._repr_html_()
    alike = ask(*bundled, "The capital", options=[" is", "is", " was"])
    assert "' is'" in explain(bundled[0], alike, ["occlusion"]).removed[0]


CITIES = [" Riga", " Tallinn", " Minsk"]

# --- whom to trust -----------------------------------------------------------------------------


def test_the_trusted_method_that_erasing_bears_out_best_is_shown():
    assert most_trusted({"shapley": 9.0, "occlusion": 2.0, "relevance": 3.0}) == "relevance"
    assert most_trusted({name: 1.0 for name in reversed(TRUSTED)}) == TRUSTED[0]
    assert most_trusted({"random": 5.0, "saliency": 1.0, "attention": 2.0}) == "attention"
    assert most_trusted({"random": 5.0}) == "random"


def borne_out(tiny, beats, first, moved, methods=TRUSTED):
    """``borne_out`` of made-up findings about a real question."""
    from helpers.summary import Without, _trust

    question = ask(*tiny, "The keys to")
    order = {name: [place, 2, 3] for name, place in zip(methods, first, strict=True)}
    tested = pd.DataFrame({"beats_random": beats}, index=list(methods))
    found = [Without((first[0],), -2.0, None, moved)]
    return _trust(question, methods[0], order, found, tested)


def test_trust_takes_three_tests(tiny):
    assert borne_out(tiny, 1.0, [1, 1, 1], 2.0)[0] == "yes"
    assert borne_out(tiny, 0.6, [1, 1, 1], 2.0)[0] == "weak"
    level, sentences = borne_out(tiny, 1.0, [1, 4, 1], 2.0)
    assert level == "weak" and "Methods differ" in sentences[-1]
    level, sentences = borne_out(tiny, 1.0, [1, 1, 1], 0.3)
    assert level == "no" and "does not even halve" in sentences[0]
    assert borne_out(tiny, 1.0, [1], 2.0, ["occlusion"])[0] == "weak"


def test_of_a_long_answer_a_tokens_probability_is_told_and_each_token_by_itself(bundled):
    question = ask(*bundled, "One, two, three,", answer=8)
    results = {"occlusion": attribute(bundled[0], question, "occlusion", each=True)}
    tested = against_random(bundled[0], question, results, steps=2, count=4)
    summary = summarise(bundled[0], question, results, tested)
    mean = question.probability ** (1 / len(question.target))
    assert f"{percent(mean)} a token in the geometric mean" in summary.answered
    assert "the probability of a token of the answer" in summary.removed[0]
    *_, tokens = html.unescape(summary._repr_html_()).split('<div class="answer" dir="auto">')
    each = tokens.split('<details name="answer">')[1:]
    assert len(each) == len(question.target) == len(summary.outputs)
    for number, (shown, output) in enumerate(zip(each, summary.outputs, strict=True)):
        scores = summary.each[number]
        usable = [i for i, unit in enumerate(question.units) if unit.part != "template"]
        best = sorted((i for i in usable if scores[i] > 0), key=lambda i: -float(scores[i]))[:3]
        told = [f"{quoted(question.units[i].label)} {scores[i]:+.2f}" for i in best]
        came = f"from {', '.join(told)}"
        # the token is a line by itself where there is no style, with its numbers
        assert shown.startswith(f'<summary>{output}<span class="came"> {came}</span></summary>')
        assert f"<b>{quoted(output)}</b> {came}</p>" in shown
        assert shown.count("<sup>") == len(best)
        text = re.sub("<sup>.</sup>", "", shown.split("<pre")[1])  # what it was written after
        before = [question.prompt, *summary.outputs[:number]]
        assert re.sub("<[^>]*>", "", text.split(">", 1)[1]) == "answer".join(
            ["".join(before[:1]), "".join(before[1:])] if number else before
        )


def quickly_summarised(bundled, question):
    results = {"relevance": attribute(bundled[0], question, "relevance", each=True)}
    tested = against_random(bundled[0], question, results, steps=1, count=2)
    return summarise(bundled[0], question, results, tested)


def test_of_the_bytes_of_a_character_it_is_told_which_one_they_begin(bundled):
    prompt = "عاصمة فرنسا هي مدينة"
    question = ask(*bundled, prompt)
    assert question.target_label == "\ufffd"
    summary = quickly_summarised(bundled, question)
    assert summary.character == "،" and summary.heading == "Why a part of “،”?"
    assert summary.answered.startswith("After this prompt the model goes on with a part of “،”:")
    assert "the probability of a part of “،”" in summary.removed[0]
    assert ask(*bundled, prompt, answer=2).answer == "،"
    whole = quickly_summarised(bundled, ask(*bundled, prompt, target=" باريس"))
    assert whole.heading == "Why “باريس”?" and whole.character == ""
    assert "goes on with a part of a character" in whole.answered  # no more of it was asked for


def test_an_answer_that_ends_inside_a_character_is_shown_and_that_character_is_named(bundled):
    prompt = "拉脱维亚的首都是"
    cut = ask(*bundled, prompt, answer=7)
    assert cut.target_label == "一位被\ufffd"
    summary = quickly_summarised(bundled, cut)
    assert summary.heading == "Why “一位被…”?"
    whole = next(
        longer.answer
        for longer in (ask(*bundled, prompt, answer=count) for count in (8, 9, 10))
        if not longer.answer.endswith("\ufffd")
    )
    # and no letter that stands for a byte
    assert summary.outputs[-1].startswith(f"{whole[3]}[1/") and summary.character == whole[3]


def test_a_token_without_ink_can_be_chosen_and_the_answer_keeps_its_lines(tiny):
    question = ask(*tiny, "ab", answer="a\n  \tb\n")
    results = {"occlusion": attribute(tiny[0], question, "occlusion", each=True)}
    tested = against_random(tiny[0], question, results, steps=2, count=2)
    shown = summarise(tiny[0], question, results, tested)._repr_html_()
    chosen = re.findall(r'<summary>(.*?)<span class="came">', shown)
    assert chosen == ["a", "↵", "␣", "␣", "⇥", "b", "↵"]
    assert shown.count("</details><br>") == 2


def test_what_the_model_does_not_say_itself_is_never_called_its_own(bundled):
    begin = "The capital city of Latvia is"
    own = explain(*_asked(bundled, begin), ["occlusion"])
    assert own.answered.startswith("After this prompt the model goes on with “Rig”")
    half = explain(*_asked(bundled, begin, target=" Rigorous"), ["occlusion"])
    assert half.question.rank == 1 and half.answered.endswith("The model itself goes on otherwise.")
    other = explain(*_asked(bundled, begin, target=" Tallinn"), ["occlusion"])
    assert "The model itself goes on with “Rig” (31\xa0%)." in other.answered


def _asked(loaded, *prompt, **options):
    return loaded[0], ask(*loaded, *prompt, **options)


def test_a_model_that_some_trusted_methods_do_not_fit_is_explained_by_the_others(linear, tiny):
    summary = explain(linear, ask(linear, tiny[1], "abcdef"))
    assert set(summary.top_units) == {"occlusion"}
    assert "No second method" in " ".join(summary.trust)


@pytest.mark.thorough
def test_a_chat_template_is_never_among_the_strongest(bundled):
    summary, question, _, _ = summary_of(
        *bundled,
        [{"role": "user", "content": "Name a colour"}],
        ("relevance", "occlusion", "attention"),
        target="Red",
        units="words",
    )
    assert all(question.units[unit].part == "user" for unit in summary.strongest)
    text = summary._repr_html_()
    assert "<|im_start|>" not in html.unescape(text) and '<b class="part">user</b>' in text


# --- what is shown -----------------------------------------------------------------------------


def test_a_known_answer_is_summed_up_right(bundled):
    summary, *_ = summary_of(
        *bundled, "The capital city of Latvia is", target=" Riga", foil=" Tallinn", units="words"
    )
    assert summary.heading == "Why “Riga” rather than “Tallinn”?"
    assert summary.top_units["occlusion"][0] == " Latvia"
    assert summary.removed[0].startswith("Without “Latvia”, “Riga” against “Tallinn” falls from")
    assert summary.borne_out == "yes" and summary.method in TRUSTED
    facts = summary.facts()
    assert facts["top_units"] == summary.top_units and facts["trust"]["borne_out"] == "yes"
    assert facts["without"][0]["units"] == [" Latvia"]


def test_text_is_never_markup_and_the_style_is_not_the_prompts():
    labels = ["<script>", "&amp;", "\"'", " </div>"]
    shown = coloured_text(labels, [1.0, -2, 3, 0], ["prompt"] * 4, [2])
    assert re.findall(r"<(\w+)", shown) == ["pre", "span", "span", "span", "mark", "sup"]
    assert "".join(map(html.escape, labels[:2])) in re.sub(r"</?span[^>]*>", "", shown)


def test_colour_is_by_amount_and_in_long_texts_by_rank():
    few = coloured_text(["a", "b", "c"], [4.0, -2.0, 0.0], ["prompt"] * 3)
    assert re.findall(r'"(up\d+|down\d+)"', few) == ["up10", "down5"] and few.endswith("c</pre>")
    scores = np.zeros(4 * FEW)
    scores[7], scores[9], scores[11] = 1000, -3, 2  # one that would leave the others white
    many = coloured_text(["x"] * len(scores), scores, ["prompt"] * len(scores))
    assert re.findall(r'"(up\d+|down\d+)"', many) == ["up10", "down10", "up10"]


def test_an_excerpt_keeps_the_beginning_and_what_is_strongest():
    labels = [f" word{i}" for i in range(1000)]
    scores = np.zeros(1000)
    scores[700] = 5
    shown = coloured_text(labels, scores, ["prompt"] * 1000, [700], most=300)
    assert "word700" in shown and " word0 word1" in shown and "word400" not in shown
    assert len(re.sub("<[^>]*>", "", shown)) < 500 and shown.count("…") == 2


@pytest.mark.parametrize(
    "share, text",
    [
        (1.0, "100\xa0%"),
        (0.9999, "over 99.9\xa0%"),
        (0.314, "31\xa0%"),
        (0.0951, "9.5\xa0%"),
        (2.1e-3, "0.21\xa0%"),
        (1e-9, "under 0.001\xa0%"),
    ],
)
def test_a_probability_has_the_digits_that_people_read(share, text):
    assert percent(share) == text


def test_words_are_quoted_as_people_write_them():
    assert quoted(" Riga") == "“Riga”" and quoted("\n") == "“\\n”"
    assert quoted(f"{'x' * 50} in 1900. It was") == f"“{'x' * 50} in 1900…”"
    assert len(quoted("x" * 500)) <= FEW + 2


def test_show_gives_back_what_it_shows(tiny, capsys):
    summary = show(tiny[0], ask(*tiny, "The keys to"), ["occlusion", "relevance"])
    assert summary.heading in capsys.readouterr().out
    assert set(summary.top_units) == {"occlusion", "relevance"} and len(summary.strongest) == 3


def test_a_word_of_any_length_is_cut_and_its_length_told(long_word):
    model, tokenizer, word = long_word
    question = ask(model, tokenizer, f"The {word} is {word[:3]}", target=word, foil=f" {word}a")
    ((question, results),) = attribute_all(model, [question], ["occlusion", "relevance"])
    tested = against_random(model, question, results, steps=2, count=2)
    summary = summarise(model, question, results, tested)
    assert word in [unit.label for unit in question.units]
    page, facts = summary._repr_html_(), json.dumps(summary.facts() | {"answer": ""})
    tables = score_table(question, results), method_table(question, results, tested)
    for shown in (page, facts, repr(summary), *(table.to_csv() for table in tables)):
        assert len(shown) < 60_000 and "x" * 2001 not in shown
    assert "x" * 2000 + "… (98,000 more characters)" in html.unescape(page)
    assert any(label.endswith("… (98,000 more characters)") for label in tables[0]["label"])


def test_a_passage_is_shown_to_a_length_that_no_word_has(tiny):
    passage = "word " * 1999
    shown = coloured_text([passage, "x" * 5000], [1.0, -1.0], ["prompt"] * 2)
    assert passage in shown and "x" * 2000 + "… (3,000 more characters)" in shown
    shown = coloured_text([passage * 2], [1.0], ["prompt"])
    assert "… (9,989 more characters) <" in shown
    shown = coloured_text([passage], [1.0], ["prompt"], [0], most=600)
    assert "… (9,694 more characters) <" in shown
    around = ["x y " * 200, passage, "x y " * 200, "The end"]
    shown = coloured_text(around, [0, 1.0, 0, 0], ["prompt"] * 4, [1], most=600)
    assert "x y" not in shown and "1</sup>word" in shown and shown.count(" … ") == 2
    assert "The end" not in shown and len(shown) < 800


# --- tables ------------------------------------------------------------------------------------


def test_a_score_is_a_row_and_a_method_is_a_row(tiny):
    _, question, results, tested = summary_of(*tiny)
    scores = score_table(question, results)
    assert len(scores) == len(results) * len(question.units)
    own = scores[scores["method"] == "occlusion"]
    assert own["score"].tolist() == results["occlusion"].scores.tolist()
    assert "".join(own["label"]) == "The keys to the"
    spans = zip(own["start"], own["end"], strict=True)
    assert [(a, b) for a, b in spans] == [
        (min(unit.positions), max(unit.positions) + 1) for unit in question.units
    ]
    methods = method_table(question, results, tested, "keys")
    order = results["occlusion"].scores.argsort(descending=True).tolist()
    positions = {p for place in question.places("keys") for p in place}
    rank = 1 + min(order.index(i) for i in range(len(order)) if i in positions)
    row = methods.set_index("method").loc["occlusion"]
    assert row["evidence_rank"] == rank and row["strongest unit"] == question.labels[order[0]]
    assert row["beats_random"] == tested.loc["occlusion", "beats_random"]
    assert math.isnan(method_table(question, results, tested)["evidence_rank"].iloc[0])


# --- long prompts ------------------------------------------------------------------------------

SENTENCES = [
    f"The {colour} keys were put on the {place} shelf. "
    for colour in ("red", "blue")
    for place in ("first", "second", "third", "fourth", "fifth", "sixth")
]


def test_a_long_prompt_is_read_in_blocks_of_whole_sentences_and_then_in_words(tiny):
    question = default_units(ask(*tiny, "".join(SENTENCES), target="b"))
    assert len(question.labels) > LONG and question.grouping == "sentences"
    labels = [unit.label for unit in question.units]
    assert "".join(labels) == "".join(SENTENCES) and 1 < len(labels) <= BLOCKS
    assert all(label.endswith(". ") for label in labels)
    positions = [place for unit in question.units for place in unit.positions]
    assert positions == list(range(len(question.labels)))
    summary = explain(tiny[0], question)
    assert set(summary.top_units) == {"occlusion", "relevance"}
    inside, block = summary.inside, question.units[summary.strongest[0]]
    words = [inside.question.units[place] for place in inside.strongest]
    assert all(set(word.positions) < set(block.positions) for word in words)
    best = max(
        (unit for unit in inside.question.units if set(unit.positions) < set(block.positions)),
        key=lambda unit: float(inside.scores[inside.question.units.index(unit)]),
    )
    assert words[0] == best and len(inside.without) == 3
    whole = attribute(tiny[0], question, "relevance").scores[summary.strongest[0]].item()
    parts = [
        float(score)
        for unit, score in zip(inside.question.units, inside.scores, strict=True)
        if set(unit.positions) <= set(block.positions)
    ]
    assert sum(parts) == pytest.approx(whole, abs=1e-3)  # relevance adds up, inside too
    shown = html.unescape(summary._repr_html_())
    assert f"Inside {quoted(block.label)}" in shown and "proposed these words" in shown
    assert len(summary.facts()["inside"]) == 3
    assert "Jump to" not in shown  # the text fits on a screen
    longer = default_units(ask(*tiny, "".join(4 * SENTENCES)[:2040], target="b"))
    shown = explain(tiny[0], longer, ["relevance"])._repr_html_()
    assert 'href="#strongest-1"' in shown and shown.count('id="strongest-1"') == 1
    # what was found comes before the text of many screens
    order = ["Without all", 'class="trust', "<h2>Inside", "<h2>The prompt", 'id="strongest-1"']
    assert [shown.index(part) for part in order] == sorted(shown.index(part) for part in order)


def test_a_passage_has_its_number_where_it_begins():
    passage = "A passage of more than sixty characters, which ends in an empty line.\n\n"
    shown = coloured_text([passage, "word"], [2.0, 1.0], ["prompt"] * 2, [0, 1])
    assert f'<mark class="passage"><sup>1</sup>{passage}</mark>' in shown
    assert "<mark>word<sup>2</sup></mark>" in shown


def test_where_sources_are_named_they_alone_are_ranked_and_looked_into(tiny):
    sources = ["The keys are red and small.", "The doors are blue and tall."]
    prompt = f"{sources[0]} {sources[1]} What colour are the keys?"
    summary = explain(tiny[0], ask(*tiny, prompt, target="b", sources=sources))
    units = summary.question.units
    assert len(units) > len(sources)
    assert {units[i].label.strip() for i in summary.strongest} == set(sources)
    inside = summary.inside.question
    words = [inside.units[i].label.strip() for i in summary.inside.strongest]
    assert all(word in units[summary.strongest[0]].label for word in words)


def test_a_short_prompt_is_read_in_words_and_named_units_stay(tiny):
    question = default_units(ask(*tiny, "The keys to the", target="b"))
    assert [unit.label for unit in question.units] == ["The", " keys", " to", " the"]
    assert explain(tiny[0], question, ["occlusion"]).inside is None
    assert reported(LONG) == REPORTED and "find_then_rank" not in reported(LONG + 1)


def test_joined_units_keep_parts_and_templates_apart(bundled):
    chat = [{"role": "system", "content": "Be brief. Be kind."}, {"role": "user", "content": "Hi."}]
    question = ask(*bundled, chat, target="a", units="sentences")
    joined = joined_units(question.read, question.units, 1)
    assert [unit.part for unit in joined] == ["template", "system", "user"] or len(joined) == 4
    assert joined_units(question.read, question.units, 1000) == question.units
