"""The prompts whose decisive word is known: what they promise, and how a method is marked."""

from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from helpers import METHODS, InputError, ask, attribute
from helpers.ground_truth import (
    DATA,
    FAMILIES,
    Case,
    cases,
    evidence_positions,
    random_reciprocal_rank,
    reciprocal_rank,
    solved,
)

SPLITS = ("tuning", "reporting")
every_list = pytest.mark.parametrize(
    "family, split", [(family, split) for family in FAMILIES for split in SPLITS]
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


# --- the prompts -------------------------------------------------------------------------------


@every_list
def test_prompts_differ_in_the_evidence_word_alone(family, split):
    for case in cases(family, split):
        words, others = case.prompt.split(), case.counterfactual.split()
        differ = [pair for pair in zip(words, others, strict=True) if pair[0] != pair[1]]
        assert len(differ) == 1 and differ[0][0].strip(".,") == case.evidence
        assert case.prompt.strip() == case.prompt and "  " not in case.prompt


@every_list
def test_both_directions_of_every_pair_are_there(family, split):
    both = cases(family, split)
    one_way = {(case.prompt, case.counterfactual, case.target, case.foil) for case in both}
    assert one_way == {(other, prompt, foil, target) for prompt, other, target, foil in one_way}
    assert Counter(case.target for case in both) == Counter(case.foil for case in both)


@every_list
def test_no_prompt_is_asked_twice_and_there_are_enough(family, split):
    prompts = [case.prompt for case in cases(family, split)]
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


@pytest.mark.parametrize("family", FAMILIES)
def test_tuning_and_reporting_share_no_prompt_template_or_open_class_word(family):
    tuning, reporting = (yaml.safe_load(DATA.read_text())[family][split] for split in SPLITS)
    assert not set(tuning["templates"]) & set(reporting["templates"])
    for kind in ("names", "copied", "evidence", "capital_of"):
        one, two = ({str(word) for word in words.get(kind, [])} for words in (tuning, reporting))
        assert not one & two
    prompts = [{case.prompt for case in cases(family, split)} for split in SPLITS]
    assert not prompts[0] & prompts[1]


@every_list
def test_a_prompt_can_be_asked_after_other_words(family, split, bundled):
    """Only its first token may change, by the space before it."""
    _, tokenizer = bundled
    for case in cases(family, split):
        ids = tokenizer(case.prompt)["input_ids"]
        longer = tokenizer(f"Read this: {case.prompt}")["input_ids"]
        assert longer[1 - len(ids) :] == ids[1:]


def test_an_unknown_family_or_split_is_refused_with_the_ones_there_are():
    with pytest.raises(InputError, match="indirect_object"):
        cases("riddles", "tuning")
    with pytest.raises(InputError, match="reporting"):
        cases("copy", "validation")


# --- the filter --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_solved_is_what_one_prompt_at_a_time_says(family, bundled):
    model, tokenizer = bundled
    some = cases(family, "tuning")[:8]
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
