"""The prompts whose decisive word is known: what they promise, and how a method is marked."""

import re
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import chain, islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from running import EVERY_CASE, few
from torch import nn

from helpers import METHODS, InputError, ask, attribute
from helpers.ground_truth import (
    DATA,
    FAMILIES,
    LONGER,
    PARAGRAPH,
    Case,
    cases,
    evidence_positions,
    evidence_units,
    random_reciprocal_rank,
    reciprocal_rank,
    solved,
)
from helpers.questions import read_question

SPLITS = ("tuning", "reporting")


def lists(families):
    return pytest.mark.parametrize(
        "family, split", [(family, split) for family in families for split in SPLITS]
    )


PAIRS = 12 if EVERY_CASE else 4
every_list, longer_list = lists(FAMILIES + LONGER), lists(LONGER)
# what both halves may say
FUNCTION_WORDS = (
    "a about after all although an and are at been both but by could for from had has he her his "
    "i in is it its nothing of on one only out she so some that the their them there to two up "
    "was we were what which who whose with you"
)


class CopyModel(nn.Module):
    """A causal model that repeats the token at one position and looks at nothing else.

    Embeddings are one-hot, and the logit of token v is the v-th number of what stands at
    ``position``: the right answer to "which token decided?" is certain. Before it, logits are 0.
    """

    def __init__(self, tokenizer, position):
        super().__init__()
        self.position = position
        self.embed = nn.Embedding.from_pretrained(torch.eye(len(tokenizer)))
        self.config = SimpleNamespace(
            eos_token_id=tokenizer.eos_token_id, max_position_embeddings=64
        )

    def get_input_embeddings(self):
        return self.embed

    def forward(
        self, input_ids=None, inputs_embeds=None, use_cache=None, logits_to_keep=0, **ignored
    ):
        embeds = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        copied = embeds[:, self.position : self.position + 1].expand(-1, embeds.shape[1], -1)
        past = torch.arange(embeds.shape[1]) >= self.position
        return SimpleNamespace(logits=(copied * past[:, None])[:, -logits_to_keep:])


def letters(prompt, evidence, other):
    """A case for the toy tokenizer, where every letter is a token."""
    counterfactual = prompt.replace(evidence, other)
    return Case("copy", "tuning", prompt, evidence, other, evidence, counterfactual)


def text_of(prompt):
    """A text, or all that messages say."""
    return prompt if isinstance(prompt, str) else "\n".join(each["content"] for each in prompt)


def strings(some):
    """Every text and number in nested lists and the values of mappings."""
    if isinstance(some, dict | list):
        for one in some.values() if isinstance(some, dict) else some:
            yield from strings(one)
    else:
        yield str(some)


def words_of(half):
    """All the words of a half of a family, slots left out."""
    known = [word for group in half["groups"] for word in group.get("capital_of", {})]
    text = " ".join([*strings(half), *known])
    return set(re.findall(r"[a-z']+", re.sub(r"\{\w+\}", "", text).lower()))


# --- the prompts -------------------------------------------------------------------------------


@every_list
def test_prompts_differ_in_the_evidence_word_alone(family, split):
    for case in cases(family, split):
        words, others = (text_of(some).split() for some in (case.prompt, case.counterfactual))
        differ = [pair for pair in zip(words, others, strict=True) if pair[0] != pair[1]]
        assert len(differ) == 1 and differ[0][0].strip('.,?:"') == case.evidence
        prompt = text_of(case.prompt)
        assert prompt.strip() == prompt and "  " not in prompt


@every_list
def test_both_directions_of_every_pair_are_there(family, split):
    both = cases(family, split)
    one_way = {
        (str(case.prompt), str(case.counterfactual), case.target, case.foil) for case in both
    }
    assert one_way == {(other, prompt, foil, target) for prompt, other, target, foil in one_way}
    assert Counter(case.target for case in both) == Counter(case.foil for case in both)


@every_list
def test_no_prompt_is_asked_twice_and_there_are_enough(family, split):
    prompts = [str(case.prompt) for case in cases(family, split)]
    assert len(prompts) == len(set(prompts)) >= {"tuning": 60, "reporting": 600}[split]


@every_list
def test_the_list_is_the_same_every_time(family, split):
    assert cases(family, split) == cases(family, split)


def test_the_first_cases_are_those_that_were_published():
    """Fails if the seed, the word lists or the order of the draws change: then numbers do too."""
    first = [cases(family, "reporting")[0].prompt for family in FAMILIES]
    assert first == [
        "While Thomas and Daniel waited, Thomas offered a ticket to",
        "The broken bottle next to the table",
        "I saw how Sarah looked at one simple white",
        "In the evening the girl taught",
        "Mary took a train to the capital of Iraq,",
        "The secret password was silver. Again, the secret password was",
    ]


def test_the_first_longer_cases_are_those_that_were_published():
    first = [cases(family, "reporting")[0] for family in LONGER]
    assert [(text_of(case.prompt)[-25:], case.target, case.foil) for case in first] == [
        (" ended with a victory for", " Mary", " Julia"),
        ("outer has been changed to", " river", " bottle"),
        ("urope, after six years in", " Jakarta", " Caracas"),
        ("ted?\nA: It was started by", " Susan", " Sarah"),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_tuning_and_reporting_share_no_prompt_template_or_open_class_word(family):
    tuning, reporting = (yaml.safe_load(DATA.read_text())[family][split] for split in SPLITS)
    assert not set(tuning["templates"]) & set(reporting["templates"])
    for kind in ("names", "copied", "evidence", "capital_of"):
        one, two = ({str(word) for word in words.get(kind, [])} for words in (tuning, reporting))
        assert not one & two
    prompts = [{case.prompt for case in cases(family, split)} for split in SPLITS]
    assert not prompts[0] & prompts[1]


@lists(FAMILIES)
def test_a_prompt_can_be_asked_after_other_words(family, split, bundled):
    """Only its first token may change, by the space before it."""
    _, tokenizer = bundled
    for case in cases(family, split):
        ids = tokenizer(case.prompt)["input_ids"]
        longer = tokenizer(f"Read this: {case.prompt}")["input_ids"]
        assert longer[1 - len(ids) :] == ids[1:]


def test_an_unknown_family_or_split_is_refused_with_the_ones_there_are():
    with pytest.raises(InputError, match=r"indirect_object.*passages"):
        cases("riddles", "tuning")
    with pytest.raises(InputError, match="reporting"):
        cases("copy", "validation")


# --- the longer ones ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", LONGER)
def test_the_halves_of_a_longer_family_share_function_words_alone(family):
    halves = yaml.safe_load(DATA.read_text())[family]
    tuning, reporting = (words_of(halves[split]) for split in SPLITS)
    assert len(tuning) > 40 and len(reporting) > 40
    assert tuning & reporting <= set(FUNCTION_WORDS.split())


@lists(("long_fact", "passages"))
def test_no_text_around_the_fact_holds_a_word_that_may_be_evidence(family, split):
    half = yaml.safe_load(DATA.read_text())[family][split]
    around = " ".join(half["around"]["texts"]).lower()
    copied = {word.lower() for group in half["groups"] for word in group["copied"]}
    assert copied and not copied & set(re.findall(r"\w+", around))


@pytest.mark.parametrize("split", SPLITS)
def test_the_fact_stands_at_each_of_twelve_places_equally_often(split):
    around = yaml.safe_load(DATA.read_text())["long_fact"][split]["around"]["texts"]
    found = Counter()
    for case in cases("long_fact", split):
        differ = [a != b for a, b in zip(case.prompt, case.counterfactual, strict=False)]
        same = case.prompt[: differ.index(True)]
        assert sum(text in case.prompt for text in around) == 11
        found[sum(text in same for text in around)] += 1
    assert set(found) == set(range(12))
    assert max(found.values()) - min(found.values()) <= 2  # both directions of one pair


@longer_list
def test_the_two_of_a_longer_pair_are_of_equal_length_and_differ_in_one_run(family, split, bundled):
    _, tokenizer = bundled
    for case in few(cases(family, split), 40):
        both = [ask_nothing(case, tokenizer, way) for way in (False, True)]
        places = evidence_positions(*both)  # fails where the lengths differ
        assert places and places == list(range(places[0], places[-1] + 1))
        if family == "long_fact":
            assert 150 <= len(both[0].labels) <= 400
        if family == "answer":
            assert min(len(both[0].target), len(both[0].foil)) >= 2


def ask_nothing(case, tokenizer, counterfactual):
    """The question as it is read, without a run of the model."""
    return read_question(tokenizer, **case.asked(tokenizer, counterfactual=counterfactual))


@pytest.fixture(scope="module")
def some_solved(bundled):
    """``some_solved(family, split)``: the first that the bundled model solves, PAIRS pairs."""

    @cache
    def some(family, split):
        every = cases(family, split)
        passes = (every[start : start + 2 * PAIRS] for start in range(0, len(every), 2 * PAIRS))
        found = chain.from_iterable(solved(*bundled, several) for several in passes)
        return list(islice(found, 2 * PAIRS))

    return some


@pytest.mark.thorough
@longer_list
def test_the_bundled_model_solves_pairs_of_each_longer_list(family, split, some_solved):
    found = some_solved(family, split)
    assert len(found) == 2 * PAIRS
    for (case, question, _), (back, other, _) in zip(found[::2], found[1::2], strict=True):
        assert (case.prompt, case.counterfactual) == (back.counterfactual, back.prompt)
        assert (question.target, question.foil) == (other.foil, other.target)


@pytest.mark.thorough
@pytest.mark.parametrize("family", LONGER)
def test_a_longer_case_is_solved_as_it_would_be_asked(family, bundled, some_solved):
    model, tokenizer = bundled
    some = some_solved(family, "tuning")[:2]
    assert some
    for case, question, other in some:
        assert (question.prompt, other.prompt) == (case.prompt, case.counterfactual)
        for found, way in ((question, False), (other, True)):
            alone = ask(model, tokenizer, **case.asked(tokenizer, counterfactual=way))
            assert torch.equal(found.input_ids, alone.input_ids)
            for name in ("prompt", "target", "foil", "units", "notes", "top", "rank", "grouping"):
                assert getattr(found, name) == getattr(alone, name)
            assert found.probability == pytest.approx(alone.probability, rel=1e-3)


@pytest.mark.thorough
def test_whole_answers_are_compared_by_all_their_tokens(bundled):
    model, tokenizer = bundled
    some, by_hand = few(cases("answer", "reporting")[:12], 4), []

    def log_probability(prompt, answer):
        before, ids = (tokenizer(text)["input_ids"] for text in (prompt, answer))
        with torch.inference_mode():
            rows = model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1]
        return rows.log_softmax(dim=-1)[range(len(ids)), ids].sum()

    for case in some:
        leads = [
            log_probability(prompt, case.target) - log_probability(prompt, case.foil)
            for prompt in (case.prompt, case.counterfactual)
        ]
        if leads[0] > 0 > leads[1]:
            by_hand.append(case)
    found = list(solved(model, tokenizer, some))
    assert [case for case, _, _ in found] == by_hand
    assert 0 < len(by_hand) < len(some)
    for case, question, _ in found:
        assert (question.target_label, question.foil_label) == (case.target, case.foil)
        assert {unit.part for unit in question.units} == {"prompt"}  # with a foil no answer's


@pytest.mark.parametrize("split", SPLITS)
def test_messages_differ_in_the_words_of_the_system_or_of_the_user(split, bundled):
    parts = set()
    for case in few(cases("chat", split), 20):
        question, other = (ask_nothing(case, bundled[1], way) for way in (False, True))
        parts |= {question.parts[place] for place in evidence_positions(question, other)}
    assert parts == {"system", "user"}


@pytest.mark.thorough
@pytest.mark.parametrize("split", SPLITS)
def test_the_evidence_of_passages_is_the_one_that_differs(split, some_solved):
    for case, question, other in some_solved("passages", split):
        passages = case.prompt.split(PARAGRAPH)[:-1]
        assert 3 <= len(passages) <= 5 and question.grouping == "sources"
        (wanted,) = (text for text in passages if text not in case.counterfactual)
        (index,) = evidence_units(question, other)
        assert question.units[index].label.strip() == wanted
        assert [unit.label.strip() for unit in question.units[: len(passages)]] == passages


@pytest.mark.thorough
def test_passages_can_be_asked_by_tokens_too(bundled, some_solved):
    some = [case for case, _, _ in some_solved("passages", "tuning")[:4]]
    found = list(solved(*bundled, some, units="tokens"))
    assert [case for case, _, _ in found] == some
    for _, question, other in found:
        assert len(question.units) == len(question.labels)
        assert evidence_units(question, other) == evidence_positions(question, other)


# --- the filter --------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_solved_is_what_one_prompt_at_a_time_says(family, bundled):
    model, tokenizer = bundled
    some = few(cases(family, "tuning")[:8], 4)
    by_hand = []
    for case in some:
        target, foil = (tokenizer(text)["input_ids"][0] for text in (case.target, case.foil))
        ids, other = (
            torch.tensor([tokenizer(text)["input_ids"]])
            for text in (case.prompt, case.counterfactual)
        )
        with torch.inference_mode():
            logits, others = model(ids).logits[0, -1], model(other).logits[0, -1]
        right = logits[target] > logits[foil] and others[foil] > others[target]
        if target != foil and ids.shape == other.shape and right:
            by_hand.append(case)
    found = list(solved(model, tokenizer, some))
    assert [case for case, _, _ in found] == by_hand
    assert by_hand
    for case, question, other in found:
        places = evidence_positions(question, other)
        assert places == list(range(places[0], places[-1] + 1))
        text = tokenizer.decode(question.input_ids[0, places])
        assert text.strip() and text.strip() in case.evidence
        assert len(question.target) == len(question.foil) == 1
        assert question.target_label and case.target.startswith(question.target_label)
        assert (question.target, question.foil) == (other.target, other.foil)
    alone = ask(model, tokenizer, question.prompt, target_ids=question.target)
    assert question.probability == pytest.approx(alone.probability, rel=1e-3)
    assert (question.top, question.rank) == (alone.top, alone.rank)


def test_a_case_counts_only_if_the_model_gets_it_right(tiny):
    _, tokenizer = tiny
    case = letters("xayz", "a", "b")
    ((found, question, other),) = solved(CopyModel(tokenizer, 1), tokenizer, [case])
    assert found == case and (question.prompt, other.prompt) == ("xayz", "xbyz")
    assert not list(solved(CopyModel(tokenizer, 2), tokenizer, [case]))  # copies "y": a tie


def test_prompts_that_differ_in_two_places_do_not_count(tiny):
    _, tokenizer = tiny
    model = CopyModel(tokenizer, 1)
    assert not list(solved(model, tokenizer, [letters("xaya", "a", "b")]))
    assert list(solved(model, tokenizer, [letters("xaay", "aa", "bb")]))  # neighbours may


def test_a_case_that_is_right_in_one_direction_only_does_not_count(tiny):
    _, tokenizer = tiny

    class AlwaysA(CopyModel):
        def forward(self, *args, **options):
            output = super().forward(*args, **options)
            output.logits = output.logits.clone()
            output.logits[..., tokenizer("a")["input_ids"][0]] += 2
            return output

    assert not list(solved(AlwaysA(tokenizer, 1), tokenizer, [letters("xayz", "a", "b")]))


def test_prompts_of_unequal_length_and_answers_that_begin_alike_do_not_count(tiny):
    _, tokenizer = tiny
    model = CopyModel(tokenizer, 1)
    longer = Case("copy", "tuning", "xay", "a", "b", "a", "xbby")
    alike = Case("copy", "tuning", "xay", "aa", "ab", "a", "xby")
    good = letters("xay", "a", "b")
    assert [found[0] for found in solved(model, tokenizer, [longer, alike, good])] == [good]


def test_answers_that_begin_alike_count_if_they_are_whole(tiny):
    _, tokenizer = tiny
    model = CopyModel(tokenizer, 1)
    for target, foil in (("aa", "ab"), ("ca", "cb"), ("ca", "db")):
        case = Case("answer", "tuning", "xay", target, foil, "a", "xby")
        assert not list(solved(model, tokenizer, [case]))
        ((_, question, other),) = solved(model, tokenizer, [replace(case, whole=True)])
        assert len(question.target) == len(question.foil) == 2
        assert question.probability > other.probability
    ends = Case("answer", "tuning", "xay", "a", "ab", "a", "xby", whole=True)
    assert not list(solved(model, tokenizer, [ends]))  # the one is the beginning of the other


def test_a_model_without_a_chat_template_is_refused_chats(tiny):
    model, tokenizer = tiny[0], deepcopy(tiny[1])
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        next(solved(model, tokenizer, cases("chat", "tuning")))


def test_prompts_of_several_lengths_come_back_in_the_order_they_were_given(tiny):
    _, tokenizer = tiny
    some = [letters("xa" + "y" * (n % 5), "a", "bcdefgh"[n % 7]) for n in range(40)]
    found = [case for case, _, _ in solved(CopyModel(tokenizer, 1), tokenizer, some)]
    assert found == some


def test_a_few_cases_do_not_wait_for_all_of_them(tiny):
    _, tokenizer = tiny
    model, rows = CopyModel(tokenizer, 1), []
    model.register_forward_pre_hook(
        lambda module, args, options: rows.append(len(args[0])), with_kwargs=True
    )
    some = [letters("xa" + "y" * n, "a", "b") for n in range(50)]
    assert len(list(islice(solved(model, tokenizer, some), 4))) == 4
    assert sum(rows) < 50


# --- a model whose answer is certain -----------------------------------------------------------

FOR_ANY_MODEL = [
    name
    for name in ("saliency", "gradient_x_input", "integrated_gradients", "occlusion", "shapley")
    if name in METHODS
]


@pytest.mark.parametrize("position", [0, 2, 5])
@pytest.mark.parametrize("name", FOR_ANY_MODEL)
def test_a_copied_token_is_found_wherever_it_stands(name, position, tiny):
    _, tokenizer = tiny
    case = letters("wvxyzu".replace("wvxyzu"[position], "a"), "a", "b")
    ((_, question, other),) = solved(CopyModel(tokenizer, position), tokenizer, [case])
    places = evidence_positions(question, other)
    result = attribute(CopyModel(tokenizer, position), question, name)
    assert places == [position]
    assert reciprocal_rank(result.scores, places, result.signed) == 1


def test_scores_that_know_nothing_do_not_always_find_it(tiny):
    _, tokenizer = tiny
    model = CopyModel(tokenizer, 2)
    question = ask(model, tokenizer, "wvayzu", target="a", foil="b")
    marks = [
        reciprocal_rank(attribute(model, question, "random", seed=seed).scores, [2], True)
        for seed in range(200)
    ]
    assert 0 < sum(mark == 1 for mark in marks) < 100
    assert abs(np.mean(marks) - random_reciprocal_rank(6, 1)) < 0.08


# --- marks -------------------------------------------------------------------------------------


def test_the_rank_is_that_of_the_best_placed_evidence():
    scores = torch.tensor([3.0, -9.0, 2.0, 1.0])
    assert reciprocal_rank(scores, [0], signed=True) == 1
    assert reciprocal_rank(scores, [2, 3], signed=True) == 1 / 2
    assert reciprocal_rank(scores, [1], signed=True) == 1 / 4


def test_without_a_sign_size_counts():
    assert reciprocal_rank([3.0, -9.0, 2.0], [1], signed=False) == 1


def test_tied_tokens_share_their_mean_rank():
    assert reciprocal_rank([5.0, 1.0, 1.0, 1.0], [2], signed=True) == 1 / 3
    assert reciprocal_rank([0.0] * 5, [4], signed=True) == 1 / 3


@pytest.mark.parametrize("seq, count", [(1, 1), (7, 1), (7, 3), (7, 7), (12, 2)])
def test_the_chance_level_is_that_of_shuffled_scores(seq, count):
    generator = np.random.default_rng(0)
    marks = [
        reciprocal_rank(generator.permutation(seq), list(range(count)), signed=True)
        for _ in range(4000)
    ]
    assert abs(np.mean(marks) - random_reciprocal_rank(seq, count)) < 0.02


def test_the_chance_level_of_one_evidence_token_is_a_harmonic_number():
    assert random_reciprocal_rank(4, 1) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
