"""Questions: what is read and explained, how probable, what is weak, what is refused."""

import base64
import copy
import hashlib
import math
import re
import string
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import gpt2, sentencepiece
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from helpers import InputError, ask, attribute, attribute_all, tiny_llama
from helpers.faithfulness import erasure_curves
from helpers.model_folders import download_wheel
from helpers.models import load_tokenizer
from helpers.prompts import read_prompt, token_labels
from helpers.questions import (
    ask_of,
    greedy_answer,
    read_question,
    top_tokens,
    with_answer,
    with_likeliest,
)

LATVIA = "The capital city of Latvia is"
MANY_SCRIPTS = [
    "拉脱维亚的首都是哪里？",
    "ما هي عاصمة لاتفيا؟",
    "Riga 🏰 is a 👩‍👩‍👧 city: é ü ñ",
    "లాత్వియా రాజధాని",
    "𓀀 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

both_models = pytest.mark.parametrize("which", ["tiny", "bundled"])


@pytest.fixture(scope="module", params=["tiny", "bundled"])
def tokenizer(request):
    return request.getfixturevalue(request.param)[1]


def adding_bos(tokenizer):
    """A copy of ``tokenizer`` that begins every text with BOS, as Llama 3's own does."""
    with_bos = copy.deepcopy(tokenizer)
    bos = with_bos.bos_token
    with_bos.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, with_bos.bos_token_id)]
            ),
        ]
    )
    return with_bos


def spelled(labels):
    """The text that labels spell, a run such as ``你[1/2]``, ``你[2/2]`` counted once."""
    runs = [re.fullmatch(r"(.*)\[(\d)/\d\]", label, flags=re.DOTALL) for label in labels]
    return "".join(
        label if run is None else run[1] * (run[2] == "1")
        for label, run in zip(labels, runs, strict=True)
    )


def refusal(*args, **options):
    """What the ``InputError`` of ``ask`` says: a sentence or two, on one line."""
    with pytest.raises(InputError) as error:
        ask(*args, **options)
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert error.value.field
    return message


def with_tokenizer(tokenizer, seed=0):
    """A toy model that has an embedding for each token of ``tokenizer``, and the tokenizer."""
    config = copy.deepcopy(tiny_llama()[0].config)
    config.vocab_size = len(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval().requires_grad_(False), tokenizer


SENTENCEPIECE = with_tokenizer(sentencepiece())
GPT2 = with_tokenizer(gpt2())


def chance(model, ids, target):
    """The probability of ``target`` after ``ids``, one whole pass for each of its tokens."""
    found, ids = 1.0, list(ids)
    for token in target:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        found *= (logits.exp() / logits.exp().sum())[token].item()
        ids.append(token)
    return found


def greedy(model, ids, most, ends):
    """The most likely token, again and again, every pass from the beginning."""
    ids, written = list(ids), []
    while len(written) < most and not (written and written[-1] in ends):
        with torch.no_grad():
            written.append(model(torch.tensor([ids + written])).logits[0, -1].argmax().item())
    return written


ENDS = "The model ends its text at once: its answer is empty."
INSTRUCT = "The model has a chat template and was asked without it"
OTHER = "not the model's own answer"
RANK = "not among the model's ten best"
UNDER = "under 1 %"


# --- labels ------------------------------------------------------------------------------------


@given(prompt=st.text(st.sampled_from(string.printable), min_size=1, max_size=60).filter(str.strip))
@settings(deadline=None, max_examples=60)
@example(prompt=" two  spaces \n\n\ttab  ")
@example(prompt="don't , isn't . 1234")
def test_labels_of_an_ascii_prompt_joined_are_the_prompt(tokenizer, prompt):
    read = read_prompt(tokenizer, prompt)
    assert "".join(token_labels(tokenizer, read.ids)) == prompt
    assert "".join(read.labels) == prompt


@given(
    prompt=st.text(
        st.characters(codec="utf-8", exclude_characters="[]"), min_size=1, max_size=40
    ).filter(str.strip)
)
@settings(deadline=None, max_examples=150)
@example(prompt=f"a real {REPLACEMENT} in the prompt")
@example(prompt=f"at the end {REPLACEMENT}")
@example(prompt="拉" * 30)
@example(prompt="🏰" * 20)
@example(prompt="a rare \U0010ffff character \U000e0041 or two")
def test_labels_spell_any_prompt_one_label_a_token(tokenizer, prompt):
    ids = tokenizer(prompt)["input_ids"]
    labels = token_labels(tokenizer, ids)
    assert len(labels) == len(ids)
    assert REPLACEMENT in prompt or not any(REPLACEMENT in label for label in labels)
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False) == prompt:
        # always so but where a vocabulary lacks a rare byte, and so drops it
        assert spelled(labels) == prompt


@pytest.mark.parametrize("prompt", MANY_SCRIPTS)
def test_labels_are_readable_in_many_scripts(tokenizer, prompt):
    read = read_prompt(tokenizer, prompt)
    for labels in (read.labels, token_labels(tokenizer, read.ids)):
        assert not any(REPLACEMENT in label for label in labels)
        assert spelled(labels) == prompt


def test_tokens_that_share_a_character_are_numbered(tiny):
    assert token_labels(tiny[1], read_prompt(tiny[1], "a你").ids) == [
        "a",
        "你[1/3]",
        "你[2/3]",
        "你[3/3]",
    ]


def test_a_text_that_breaks_off_inside_a_character_keeps_one_label_a_token(tiny):
    ids = read_prompt(tiny[1], "a你").ids[:3]
    labels = token_labels(tiny[1], ids)
    assert len(labels) == 3
    assert labels[0] == "a"
    assert not any(REPLACEMENT in label for label in labels)


@both_models
def test_a_question_has_one_label_a_token(which, request):
    model, tokenizer = request.getfixturevalue(which)
    question = ask(model, tokenizer, LATVIA, target="i")
    assert question.input_ids.shape == (1, len(question.labels))
    assert question.input_ids.dtype == torch.long
    assert question.input_ids.device == model.device
    assert "".join(question.labels) == question.prompt == LATVIA
    assert [unit.positions for unit in question.units] == [
        (place,) for place in range(len(question.labels))
    ]


# --- target and foil ---------------------------------------------------------------------------


@both_models
@pytest.mark.parametrize("chat", [False, True], ids=["raw", "chat"])
def test_the_default_target_is_the_most_likely_next_token(which, chat, request):
    model, tokenizer = request.getfixturevalue(which)
    question = ask(model, tokenizer, LATVIA, chat=chat)
    with torch.no_grad():
        logits = model(question.input_ids).logits[0, -1]
    assert question.target == (logits.argmax().item(),)
    assert question.foil is None
    assert question.target_label == tokenizer.decode(question.target)
    assert question.probability == pytest.approx(logits.softmax(-1).max().item(), rel=1e-4)
    assert (question.rank, question.top) == (1, question.target[0])
    assert question.top_probability == pytest.approx(question.probability)


def test_the_bundled_model_answers_riga(bundled):
    raw = ask(*bundled, LATVIA)
    assert (raw.target_label, str(raw)) == (" Rig", "why ' Rig'?")
    assert ask(*bundled, "What is the Capital City of Latvia?", chat=True).target_label == "The"


def test_a_target_of_several_tokens_is_one_target(bundled):
    question = ask(*bundled, LATVIA, target=" Riga", foil=" Tallinn")
    assert token_labels(bundled[1], question.target) == [" Rig", "a"]
    assert str(question) == "why ' Riga' rather than ' Tallinn'?"
    assert question.answer == " Riga"
    assert question.probability == pytest.approx(
        chance(bundled[0], question.input_ids[0].tolist(), question.target), rel=1e-4
    )
    assert {unit.part for unit in question.units} == {"prompt"}  # with a foil, what was read
    (note,) = question.notes
    assert INSTRUCT in note
    alone = ask(*bundled, LATVIA, target=" Riga")
    assert alone.units[-1].label == " Rig"
    assert (alone.units[-1].positions, alone.units[-1].part) == ((6,), "answer")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("text", ["a", "ab", " very negative", "你好"])
def test_a_probability_is_that_of_the_chain_rule(text, seed):
    model, tokenizer = tiny_llama(seed=seed)
    for prompt in ("The cat", [{"role": "user", "content": "The cat"}]):
        question = ask(model, tokenizer, prompt, target=text)
        assert question.target == tuple(tokenizer(text)["input_ids"])
        expected = chance(model, question.input_ids[0].tolist(), question.target)
        assert question.probability == pytest.approx(expected, rel=1e-3)
        with torch.no_grad():
            order = model(question.input_ids).logits[0, -1].argsort(descending=True).tolist()
        assert question.rank == order.index(question.target[0]) + 1
        assert question.top == order[0]


def test_sequences_may_share_a_beginning(tiny):
    question = ask(*tiny, "It is", target=" very negative", foil=" very positive")
    assert question.target_label == " very negative"
    assert question.foil_label == " very positive"


def test_ids_are_asked_for_by_name(tiny):
    model, tokenizer = tiny
    as_text = ask(model, tokenizer, LATVIA, target="ab", foil="c")
    for make in (list, tuple, torch.tensor):
        as_ids = ask(
            model,
            tokenizer,
            LATVIA,
            target_ids=make(list(as_text.target)),
            foil_ids=make(list(as_text.foil)),
        )
        assert (as_ids.target, as_ids.foil) == (as_text.target, as_text.foil)
        assert (as_ids.target_label, as_ids.foil_label) == ("ab", "c")
    question = ask(model, tokenizer, "Riga", target_ids=[0], foil_ids=[len(tokenizer) - 1])
    assert (question.target, question.foil) == ((0,), (len(tokenizer) - 1,))


def test_a_text_of_digits_is_text(tiny):
    assert ask(*tiny, "In", target=" 1066").target_label == " 1066"
    assert "Ids go by target_ids" in refusal(*tiny, "In", target=1066)


def test_a_target_gets_no_bos_where_the_tokenizer_adds_one(bundled):
    model, tokenizer = bundled
    question = ask(model, adding_bos(tokenizer), LATVIA, target=" Rig", foil=" Tall")
    assert question.labels[0] == tokenizer.bos_token
    assert (question.target_label, question.foil_label) == (" Rig", " Tall")


def test_a_sentencepiece_target_is_the_piece_that_continues():
    tokenizer = SENTENCEPIECE[1]
    two, space = tokenizer.convert_tokens_to_ids(["2", "▁"])
    question = ask(*SENTENCEPIECE, "The answer is 4", target="2")
    assert (question.target, question.target_label) == ((two,), "2")
    spaced = ask(*SENTENCEPIECE, "The answer is 4", target=" 2", foil=" 3")
    assert (spaced.target, spaced.target_label) == ((space, two), " 2")
    assert sum("is blank" in note for note in spaced.notes) == 2
    riga = ask(*SENTENCEPIECE, "The capital city of Latvia is", target=" Riga", foil=" Rome")
    assert (len(riga.target), riga.target_label) == (1, " Riga")
    assert riga.labels[1:] == ["The", " capital", " city", " of", " Latvia", " is"]


def test_the_first_blank_token_of_a_target_is_told(bundled):
    question = ask(*bundled, "The battle of Hastings was on", target=" 14 October 1066")
    assert question.target_label == " 14 October 1066"
    assert any("first token" in note and "is blank" in note for note in question.notes)


def test_a_target_that_merges_with_the_prompt_is_told_with_its_tokens():
    question = ask(*GPT2, "The capital city of Latv", target="ia")
    assert question.target_label == "ia"
    (note,) = [note for note in question.notes if "merges" in note]
    assert str(token_labels(GPT2[1], question.target)) in note
    assert not any("merges" in n for n in ask(*GPT2, "Latvia is", target=" Riga").notes)


def test_the_nearer_of_riga_with_and_without_a_space_is_named(bundled):
    model, tokenizer = bundled
    question = ask(model, tokenizer, LATVIA, target="Riga")
    (note,) = [note for note in question.notes if "nearer" in note]
    assert note.startswith("' Riga' is nearer")
    with torch.no_grad():
        first = model(question.input_ids).logits[0, -1].softmax(-1)
    for text in (" Riga", "Riga"):
        token = tokenizer(text, add_special_tokens=False)["input_ids"][0]
        assert f"{first[token].item():.2g}" in note
    assert not any("nearer" in n for n in ask(model, tokenizer, LATVIA, target=" Riga").notes)
    foil = ask(model, tokenizer, LATVIA, target=" Riga", foil="Tallinn")
    assert any(note.startswith("' Tallinn' is nearer") for note in foil.notes)


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [1, 7])
def test_an_answer_is_that_of_a_loop_by_hand(seed, most):
    model, tokenizer = tiny_llama(seed=seed)
    question = ask(model, tokenizer, "The cat", answer=most)
    ids = question.input_ids[0].tolist()
    assert question.target == tuple(greedy(model, ids, most, {tokenizer.eos_token_id}))
    assert question.probability == pytest.approx(chance(model, ids, question.target), rel=1e-3)
    assert not any(OTHER in note for note in question.notes)
    answer_units = [unit for unit in question.units if unit.part == "answer"]
    positions = [place for unit in answer_units for place in unit.positions]
    assert positions == list(range(len(ids), len(ids) + len(question.target) - 1))


HOSTILE_SETTINGS = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "num_beams": 3,
    "do_sample": True,
    "temperature": 9.0,
    "min_new_tokens": 5,
    "max_length": 3,
    "stop_strings": ["a"],
}


def test_what_a_checkpoint_sets_for_generation_changes_no_answer():
    model, tokenizer = tiny_llama()
    plain = ask(model, tokenizer, "The cat", answer=6)
    config = model.generation_config
    for name, value in HOSTILE_SETTINGS.items():
        setattr(config, name, value)
    config.suppress_tokens = config.begin_suppress_tokens = list(plain.target)
    config.bad_words_ids = [[token] for token in plain.target]
    config.forced_eos_token_id = config.forced_bos_token_id = 7
    again = ask(model, tokenizer, "The cat", answer=6)
    assert (again.target, again.probability) == (plain.target, plain.probability)
    assert any("(repetition_penalty, no_repeat_ngram_size, sup" in note for note in again.notes)
    assert not any("settings" in note for note in plain.notes)
    assert ask(model, tokenizer, "The cat").target == plain.target[:1]


@pytest.mark.parametrize("where", ["tokenizer", "generation_config", "list", "config"])
def test_an_answer_stops_at_any_end_and_has_it(where):
    model, tokenizer = tiny_llama()
    written = greedy(model, read_prompt(tokenizer, "The cat").ids, 9, set())
    end = next(token for token in written if token != written[0])
    if where == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    elif where == "config":
        model.config.eos_token_id = end
    else:
        model.generation_config.eos_token_id = [258, end] if where == "list" else end
    question = ask(model, tokenizer, "The cat", answer=9)
    assert question.target == tuple(written[: written.index(end) + 1])


def test_an_answer_without_its_control_tokens(bundled):
    question = ask(*bundled, "Say hi.", chat=True, answer=True)
    assert question.target[-1] == bundled[1].eos_token_id
    assert question.target_label == question.answer + bundled[1].eos_token
    assert len(question.target) <= 40
    assert question.notes == ()


def test_a_given_answer_is_a_target(tiny):
    given_answer = ask(*tiny, "The cat", answer=" sat")
    target = ask(*tiny, "The cat", target=" sat")
    assert (given_answer.target, given_answer.units) == (target.target, target.units)
    assert given_answer.probability == target.probability
    assert ask(*tiny, "The cat", answer=False).target == ask(*tiny, "The cat").target


@pytest.mark.parametrize("units", ["words", "sentences", "turns"])
def test_the_units_of_an_answer_follow_those_of_the_prompt(tiny, units):
    question = ask(*tiny, "The cat sat.", target=" on it. Yes!", units=units)
    labels = [unit.label for unit in question.units if unit.part == "answer"]
    expected = {
        "words": [" on", " it", ".", " Yes"],
        "sentences": [" on it. ", "Yes"],
        "turns": [" on it. Yes"],
    }
    assert labels == expected[units]
    places = sorted(place for unit in question.units for place in unit.positions)
    assert places == list(range(12 + 11))


def test_sentencepiece_answers_keep_their_spaces():
    question = ask(*SENTENCEPIECE, "The cat sat", target=" on the mat.", units="words")
    assert question.answer == " on the mat."
    assert [u.label for u in question.units if u.part == "answer"] == [" on", " the", " mat"]


def test_an_answer_is_written_without_a_cache_too(tiny):
    model, tokenizer = tiny
    ids = read_question(tokenizer, "The cat").input_ids

    class Forgetful:
        modules, get_input_embeddings = model.modules, model.get_input_embeddings

        def __call__(self, ids, **_):
            return type("Output", (), {"logits": model(ids).logits})

    assert greedy_answer(Forgetful(), ids, 5, set()) == greedy_answer(model, ids, 5, set())


# --- what is weak ------------------------------------------------------------------------------


def test_weak_questions_are_told(bundled):
    notes = " ".join(ask(*bundled, LATVIA, target=" cheese").notes)
    for note in (INSTRUCT, OTHER, RANK, UNDER, "' Rig'"):
        assert note in notes


def test_an_end_of_text_at_once_is_told(bundled):
    question = ask(*bundled, "What is the Capital City of Latvia?")
    assert question.answer == "" and ENDS in question.notes and INSTRUCT in " ".join(question.notes)
    assert ENDS not in ask(*bundled, LATVIA).notes


def test_nothing_is_told_where_nothing_is_weak(bundled):
    model, tokenizer = bundled
    chat = [{"role": "user", "content": "What is the capital city of Latvia?"}]
    assert ask(model, tokenizer, chat).notes == ()
    begun = [*chat, {"role": "assistant", "content": "The capital city of Latvia is"}]
    assert ask(model, tokenizer, begun, target=" Riga", foil=" Tallinn").notes == ()
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert ask(model, tokenizer, text, raw=True).notes == ()
    base = copy.deepcopy(tokenizer)
    base.chat_template = None
    assert ask(model, base, LATVIA).notes == ()
    # not the model's own answer, but all of it likely: one note
    with torch.no_grad():
        second = model(ask(model, base, LATVIA).input_ids).logits[0, -1].topk(2).indices[1].item()
    (note,) = ask(model, base, LATVIA, target_ids=[second]).notes
    assert OTHER in note


def test_each_weakness_has_its_own_bound(tiny):
    model, tokenizer = tiny
    ids = read_prompt(tokenizer, LATVIA).ids
    with torch.no_grad():
        order = model(torch.tensor([ids])).logits[0, -1].argsort(descending=True).tolist()
    for place in (0, 1, 9, 10, 200):
        question = ask(model, tokenizer, LATVIA, target_ids=[order[place]])
        notes = " ".join(question.notes)
        assert (OTHER in notes) == (place > 0)
        assert (RANK in notes) == (place > 9)
        assert (UNDER in notes) == (question.probability < 0.01)


def test_where_a_target_leaves_the_models_own_answer_is_told(tiny):
    model, tokenizer = tiny
    own = greedy(model, read_prompt(tokenizer, LATVIA).ids, 3, set())
    other = [*own[:2], (own[2] + 1) % 200 + 3]
    (note,) = [n for n in ask(model, tokenizer, LATVIA, target_ids=other).notes if OTHER in n]
    assert "goes on otherwise after" in note
    assert not any(OTHER in n for n in ask(model, tokenizer, LATVIA, target_ids=own).notes)


def test_typed_control_tokens_are_told(tiny):
    notes = ask(*tiny, "Hi<|im_end|>").notes
    assert any("<|im_end|>" in note and "raw=True" in note for note in notes)
    assert not any("typed" in note for note in ask(*tiny, "Hi<|im_end|>", raw=True).notes)


# --- objective ---------------------------------------------------------------------------------


def test_the_objective_is_one_of_two(tiny):
    assert ask(*tiny, "Riga", target="a").objective == "log_probability"
    logit = ask(*tiny, "Riga", target="a", objective="logit")
    assert logit.objective == "logit"
    assert "log_probability or logit" in refusal(*tiny, "Riga", objective="probability")
    plain = ask(*tiny, "Riga is", target="a")
    # a score of occlusion is positive just where the answer is less probable without the token
    scores = attribute(tiny[0], plain, "occlusion", replacement="remove").scores
    for place, score in enumerate(scores.tolist()):
        ids = [i for p, i in enumerate(plain.input_ids[0].tolist()) if p != place]
        assert (score > 0) == (chance(tiny[0], ids, plain.target) < plain.probability)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", " ", "\n\t ", None, 7, []], ids=repr)
def test_a_prompt_without_a_word_is_refused(tiny, prompt):
    assert "at least one word" in refusal(*tiny, prompt)


def test_more_tokens_than_the_context_are_refused_with_both_lengths(tiny):
    context = tiny[0].config.max_position_embeddings
    assert ask(*tiny, "a" * context).input_ids.shape == (1, context)
    message = refusal(*tiny, "a" * (context + 1))
    assert "2,049" in message
    assert "2,048" in message
    # the last token of an answer is not read
    assert ask(*tiny, "a" * (context - 2), target="abc").probability
    for options in ({"target": "abcd"}, {"foil": "abcd"}, {"answer": 4}, {"answer": "abcd"}):
        assert "2,048" in refusal(*tiny, "a" * (context - 2), **options)
    assert "2,048" in refusal(*tiny, "a" * (context - 20), answer=True)


@pytest.mark.parametrize("role", ["target", "foil"])
@pytest.mark.parametrize("value", ["", 3, 1.5, True, [3], "\ud83d"], ids=repr)
def test_a_target_that_is_no_text_is_refused(tiny, role, value):
    assert f"The {role} " in refusal(*tiny, "Riga", **{role: value})


@pytest.mark.parametrize("role", ["target_ids", "foil_ids"])
@pytest.mark.parametrize("value", [[], 3, "3", [1.0], [True], ["a"], [[3]], torch.tensor([])])
def test_ids_that_are_no_ids_are_refused(tiny, role, value):
    assert role in refusal(*tiny, "Riga", **{role: value})


@pytest.mark.parametrize("value", [-1, 259, 10**9])
@pytest.mark.parametrize("role", ["target", "foil"])
def test_an_id_outside_the_embedding_table_is_refused_with_its_range(tiny, value, role):
    message = refusal(*tiny, "Riga", **{f"{role}_ids": [5, value]})
    assert f"The {role} holds the token id {value}" in message
    assert "from 0 to 258" in message


@pytest.mark.parametrize("content", ["zz", "<|new|>", "<new>"])
@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_without_an_embedding_is_refused(content, special):
    model, tokenizer = tiny_llama()
    tokenizer.add_tokens([content], special_tokens=special)
    assert len(tokenizer) > len(model.get_input_embeddings().weight)
    assert repr(content) in refusal(model, tokenizer, f"Riga {content} is")
    message = refusal(model, tokenizer, [{"role": "user", "content": f"Riga {content}"}])
    assert "no embedding" in message
    assert "no embedding" in refusal(model, tokenizer, "Riga", target=content)
    assert "no embedding" in refusal(model, tokenizer, f"a {content}", raw=True)
    assert ask(model, tokenizer, "Riga is").probability
    with pytest.raises(InputError, match="no embedding"):  # and without the model
        read_question(tokenizer, f"Riga {content}", vocabulary=259)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "a", "foil": "a"}, "The foil 'a' is the target itself"),
        ({"target_ids": [68], "foil_ids": [68]}, "is the target itself"),
        ({"target": "a", "foil": "ab"}, "begin alike and one of them ends there"),
        ({"target": "abc", "foil": "ab"}, "begin alike and one of them ends there"),
        ({"target": "a", "target_ids": [3]}, "as text or as ids, not both"),
        ({"target": "a", "answer": 3}, "a target or an answer, not both"),
        ({"foil": "a", "answer": 3}, "An answer has no foil"),
        ({"answer": 0}, "The answer 0 is neither a text nor a number"),
        ({"answer": -3}, "The answer -3 is neither a text nor a number"),
        ({"answer": 2.5}, "The answer 2.5 is neither a text nor a number"),
        ({"answer": ""}, "The answer is empty"),
        ({"answer": [3]}, "neither a text nor a number"),
        ({"units": "lines"}, "There are no units 'lines'"),
        ({"units": None}, "There are no units None"),
        ({"sources": ["dog"]}, "Source 0, 'dog', does not stand in the prompt"),
        ({"raw": True, "chat": True}, "raw and chat exclude each other"),
    ],
    ids=repr,
)
def test_a_question_that_means_nothing_is_refused(tiny, options, said):
    assert said in refusal(*tiny, "The cat", **options)


# --- options -----------------------------------------------------------------------------------

CITIES = [" Tallinn", " Vilnius", " Riga", " Minsk"]


@pytest.mark.parametrize("which", ["tiny", "bundled", "sentencepiece"])
def test_of_options_the_likeliest_is_compared_with_the_next(which, request):
    loaded = SENTENCEPIECE if which == "sentencepiece" else request.getfixturevalue(which)
    question = ask(*loaded, LATVIA, options=CITIES)
    ids = question.input_ids[0].tolist()
    alone = [ask(*loaded, LATVIA, target=city).target for city in CITIES]
    assert [option.ids for option in question.options] == alone
    assert [option.label for option in question.options] == CITIES
    chances = [chance(loaded[0], ids, target) for target in alone]
    told = [math.exp(option.log_probability) for option in question.options]
    assert told == pytest.approx(chances, rel=1e-3)
    order = sorted(range(4), key=lambda place: -chances[place])
    assert (question.target, question.foil) == (alone[order[0]], alone[order[1]])
    assert question.probability == pytest.approx(chances[order[0]], rel=1e-3)
    pair = ask(*loaded, LATVIA, target=CITIES[order[0]], foil=CITIES[order[1]])
    notes = [note.replace("the target ", "the option ") for note in pair.notes]
    notes = [note.replace("the foil ", "the option ") for note in notes]
    assert (question.units, list(question.notes)) == (pair.units, notes)
    last = ask(*loaded, LATVIA, options=CITIES, target=CITIES[order[3]])
    assert (last.target, last.foil) == (alone[order[3]], alone[order[0]])
    assert last.target_label == CITIES[order[3]]


def test_options_are_chosen_among_in_a_stream_of_questions_as_alone(tiny):
    entries = [{"options": ["a", "bcd", "bce"]}, {"target": "a"}, {"options": ["x", "y", "zz"]}]
    questions = [read_question(tiny[1], LATVIA, model=tiny[0], **some) for some in entries]
    assert [q.undecided for q in questions] == [True, False, True]
    for (question, results), some in zip(
        attribute_all(tiny[0], questions, ["occlusion", "relevance"]), entries, strict=True
    ):
        asked = ask(*tiny, LATVIA, **some)
        assert (question.target, question.foil) == (asked.target, asked.foil)
        for name, result in results.items():
            scores = attribute(tiny[0], asked, name).scores
            assert torch.allclose(result.scores, scores, atol=1e-4)
    with pytest.raises(InputError, match="none of them is its target yet"):
        erasure_curves(tiny[0], questions[0], torch.arange(len(questions[0].units))[None])


def test_two_options_are_target_and_foil_and_no_pass_is_run_for_them(tiny):
    one = read_question(tiny[1], LATVIA, options=["ab", "cd"])
    other = read_question(tiny[1], LATVIA, options=["cd", "ab"], target="ab")
    pair = read_question(tiny[1], LATVIA, target="ab", foil="cd")
    assert (one.target, one.foil, one.options) == (pair.target, pair.foil, ())
    assert (other.target, other.foil) == (pair.target, pair.foil)


def test_of_equally_likely_options_the_first_is_the_target(tiny):
    question = read_question(tiny[1], LATVIA, options=["c", "a", "b"])
    found = with_likeliest(question, [-2.0, -1.0, -1.0])
    assert (found.target_label, found.foil_label) == ("a", "b")


def test_a_space_that_is_missing_is_told_of_the_two_that_are_compared(bundled):
    question = ask(*bundled, LATVIA, options=["Tallinn", "Riga", "Vilnius", "Minsk"])
    near = [note for note in question.notes if "nearer" in note]
    texts = [question.target_label, question.foil_label]
    assert len(near) == 2 and all(any(repr(f" {some}") in n for n in near) for some in texts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"options": ["a"]}, "give at least two"),
        ({"options": []}, "give at least two"),
        ({"options": "ab"}, "no list of texts"),
        ({"options": ["a", 2, "b"]}, "no list of texts"),
        ({"options": ["a", "b", "a"]}, "is there twice"),
        ({"options": list(string.ascii_letters[:21])}, "at most 20"),
        ({"options": ["c", "ab", "a"]}, "The options 'a' and 'ab' begin alike"),
        ({"options": ["a", "b", ""]}, "The option is empty"),
        ({"options": ["a", "b", "\ud83d"]}, "The option has half of a surrogate pair"),
        ({"options": ["a", "b", "c"], "target": "d"}, "is none of the options"),
        ({"options": ["a", "b", "c"], "foil": "a"}, "options and a foil"),
        ({"options": ["a", "b", "c"], "answer": 2}, "options and an answer"),
        ({"options": ["a", "b", "c"], "target_ids": [68]}, "options and token ids"),
    ],
    ids=repr,
)
def test_options_that_mean_nothing_are_refused(tiny, options, said):
    assert said in refusal(*tiny, "The cat", **options)


def test_an_option_longer_than_what_the_model_reads_is_refused(tiny):
    with pytest.raises(InputError, match="shorten"):
        read_question(tiny[1], "Riga", options=["a", "bcdef", "g"], context=7)
    assert read_question(tiny[1], "Riga", options=["a", "bcdef", "g"], context=8).undecided


def test_a_foil_that_is_the_models_own_next_token_is_refused(bundled):
    assert "foil ' Rig' is the target" in refusal(*bundled, LATVIA, foil=" Rig")
    assert "begin alike" in refusal(*bundled, LATVIA, foil=" Riga")


@pytest.mark.parametrize(
    "options", [{"units": "sentences"}, {"units": "turns"}, {"sources": ["a"]}]
)
def test_one_token_cannot_be_grouped(tiny, options):
    assert "The prompt is one token" in refusal(*tiny, "a", **options)
    assert len(ask(*tiny, "a").units) == len(ask(*tiny, "a", units="words").units) == 1
    if "units" in options:  # a chat has its template beside the token
        assert len(ask(*tiny, "a", chat=True, **options).units) > 1


def test_chat_without_a_template_is_refused():
    assert "no chat template" in refusal(*GPT2, "Riga", chat=True)


def test_half_a_surrogate_pair_is_refused(tiny):
    """Not text that can be encoded; JSON and damaged files do contain it."""
    assert "prompt" in refusal(*tiny, "Riga \ud83d")


def test_a_prompt_the_tokenizer_drops_whole_is_refused(bundled):
    """The bundled model's vocabulary lacks a few control characters, and drops them."""
    assert bundled[1]("\x16")["input_ids"] == []
    assert "prompt" in refusal(*bundled, "\x16")


def test_a_question_can_be_checked_without_a_model(tiny):
    tokenizer = tiny[1]
    question = read_question(tokenizer, "Riga", target="ab", context=5, vocabulary=259)
    assert question.target == tuple(tokenizer("ab")["input_ids"])
    assert question.probability is None
    with pytest.raises(InputError, match="shorten"):
        read_question(tokenizer, "Riga", target="ab", context=4)
    with pytest.raises(InputError, match="no embedding"):
        read_question(tokenizer, "Riga", target_ids=[300], vocabulary=259)
    opened = read_question(tokenizer, "Riga")
    assert (opened.target, opened.units) == (None, question.units[:-1])
    complete, asked = ask_of(tiny[0], question), ask(*tiny, "Riga", target="ab")
    assert (complete.probability, complete.notes) == (asked.probability, asked.notes)
    assert (complete.target, complete.units) == (asked.target, asked.units)
    assert with_answer(tiny[0], opened, 3).target == ask(*tiny, "Riga", answer=3).target


# --- messages ----------------------------------------------------------------------------------


def test_a_conversation_is_read_and_split_into_turns(tiny):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where is Riga?"},
        {"role": "assistant", "content": "In"},
    ]
    question = ask(*tiny, messages, target=" Latvia", foil=" Estonia", units="turns")
    own = [(unit.part, unit.label) for unit in question.units if unit.part != "template"]
    assert own == [
        ("system", "Be brief."),
        ("user", "Where is Riga?"),
        ("assistant", "In"),
    ]
    assert question.places("Riga")
    assert question.places("assistant") == []
    assert question.prompt == messages
    assert len(question.parts) == len(question.labels)


# --- padding and next tokens -------------------------------------------------------------------


@both_models
def test_a_left_padded_batch_gives_the_logits_of_each_prompt_alone(which, request):
    model, tokenizer = request.getfixturevalue(which)
    prompts = ["Riga", LATVIA, "One, two, three,"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    assert (batch["attention_mask"][:, 0] == 0).any()  # something is padded, on the left
    assert (batch["attention_mask"][:, -1] == 1).all()
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        alone = [model(**tokenizer(p, return_tensors="pt")).logits[0, -1] for p in prompts]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-3, atol=1e-3)


def test_top_tokens_are_sorted_probabilities_of_the_logits(bundled):
    model, tokenizer = bundled
    ids = tokenizer(LATVIA, return_tensors="pt")["input_ids"]
    top = top_tokens(model, tokenizer, ids, k=4)
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    expected = logits.softmax(dim=-1).sort(descending=True)
    assert [text for text, _, _ in top] == [tokenizer.decode([i]) for i in expected.indices[:4]]
    assert [p for _, p, _ in top] == pytest.approx(expected.values[:4].tolist(), rel=1e-3)
    assert [logit for _, _, logit in top] == pytest.approx(logits.topk(4).values.tolist(), rel=1e-3)
    assert top[0][0] == ask(model, tokenizer, LATVIA).target_label


# --- Llama 3's own tokenizer -------------------------------------------------------------------

LLAMA3_WHEEL = "llama-models==0.3.0"
LLAMA3_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
LLAMA3_TEMPLATE = (  # the shape of the template in Llama 3's tokenizer_config.json
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


class Llama3Converter(TikTokenConverter):
    """transformers' own converter, reading the file without the tiktoken package."""

    @staticmethod
    def load_tiktoken_bpe(path):
        lines = [line.split() for line in Path(path).read_bytes().splitlines()]
        return {base64.b64decode(token): int(rank) for token, rank in lines}


@pytest.fixture(scope="session")
def llama3_file(request, tmp_path_factory):
    """Meta's tokenizer file, fetched once into pytest's cache and never kept in the repository."""
    cache = getattr(request.config, "cache", None)
    folder = cache.mkdir("llama3") if cache else tmp_path_factory.mktemp("llama3")
    file = Path(folder) / "tokenizer.model"
    if not file.exists():
        work = tmp_path_factory.mktemp("wheel")
        try:
            wheel = download_wheel(LLAMA3_WHEEL, work)
        except InputError as error:
            pytest.skip(f"needs the network, once, for Llama 3's tokenizer: {error}")
        with zipfile.ZipFile(wheel) as archive:
            Path(archive.extract("llama_models/llama3/tokenizer.model", work)).replace(file)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == LLAMA3_SHA256
    return file


@pytest.fixture(scope="session")
def llama3(llama3_file):
    """``(model, tokenizer)``: a toy model with Llama 3's 128,256 tokens."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    special += ["<|eot_id|>", *(f"<|reserved_special_token_{i}|>" for i in range(251))]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Llama3Converter(
            str(llama3_file), extra_special_tokens=special
        ).converted(),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|eot_id|>",
        padding_side="left",
    )
    tokenizer.chat_template = LLAMA3_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config).eval(), adding_bos(tokenizer)


def test_llama3_begins_every_prompt_with_bos_and_names_a_city_in_one_token(llama3):
    question = ask(*llama3, "The capital of France is", target=" Paris", foil=" Rome")
    assert question.labels == ["<|begin_of_text|>", "The", " capital", " of", " France", " is"]
    assert (question.target_label, question.foil_label) == (" Paris", " Rome")
    assert len(llama3[1]) == 128_256
    # Meta's own ids, from the model card's example
    assert question.input_ids.tolist() == [[128000, 791, 6864, 315, 9822, 374]]


def test_llama3_splits_riga_and_takes_both(llama3):
    question = ask(*llama3, LATVIA, target=" Riga", foil=" Tallinn")
    assert token_labels(llama3[1], question.target) == [" R", "iga"]
    assert (question.target_label, question.foil_label) == (" Riga", " Tallinn")


def test_llama3_typed_control_tokens_stay_text(llama3):
    tokenizer = llama3[1]
    typed = "a<|eot_id|><|start_header_id|>system<|end_header_id|>\n\nb<|reserved_special_token_3|>"
    ids = read_prompt(tokenizer, typed).ids
    assert [i for i in ids if i >= 128_000] == [tokenizer.bos_token_id]
    assert tokenizer.decode(ids[1:]) == typed
    chat = read_prompt(tokenizer, [{"role": "user", "content": typed}])
    assert sum(i >= 128_000 for i in chat.ids) == 6  # BOS, two headers of two, one end of turn
    raw = read_prompt(tokenizer, chat.text.removeprefix(tokenizer.bos_token), raw=True)
    assert sum(i >= 128_000 for i in raw.ids) == 10
    with pytest.raises(InputError, match="adds as well"):
        read_prompt(tokenizer, chat.text, raw=True)


def test_llama3_chat_has_one_bos(llama3):
    ids = read_prompt(llama3[1], "Riga?", chat=True).ids
    assert ids.count(llama3[1].bos_token_id) == 1
    messages = [{"role": "user", "content": "Riga?"}]
    assert ids == llama3[1].apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("prompt", MANY_SCRIPTS)
def test_llama3_labels_are_readable_in_many_scripts(llama3, prompt):
    labels = token_labels(llama3[1], read_prompt(llama3[1], prompt).ids)
    assert labels[0] == "<|begin_of_text|>"
    assert spelled(labels[1:]) == prompt
    assert not any(REPLACEMENT in label for label in labels)


@given(
    prompt=st.text(
        st.characters(codec="utf-8", exclude_characters="[]"), min_size=1, max_size=40
    ).filter(str.strip)
)
@settings(deadline=None, max_examples=50)
def test_llama3_labels_spell_any_prompt(llama3, prompt):
    assert spelled(token_labels(llama3[1], read_prompt(llama3[1], prompt).ids)[1:]) == prompt


def test_two_tokenizers_of_the_toy_are_equal():
    first, second = tiny_llama()[1], tiny_llama(seed=1)[1]
    assert first.get_vocab() == second.get_vocab()


def test_load_tokenizer_is_the_tokenizer_of_load_model(bundled):
    assert load_tokenizer()(LATVIA) == bundled[1](LATVIA)
    assert load_tokenizer().padding_side == bundled[1].padding_side == "left"
