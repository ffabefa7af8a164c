"""Questions: labels one can read, targets that are one token, prompts refused in one sentence."""

import base64
import copy
import hashlib
import re
import string
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from helpers import InputError, ask, tiny_llama
from helpers.models import _download_wheel, load_tokenizer
from helpers.questions import check_question, encode, token_labels, top_tokens

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
    assert message.endswith((".", "'.", '".'))
    assert "\n" not in message
    assert "Traceback" not in message
    return message


# --- labels ------------------------------------------------------------------------------------


@given(prompt=st.text(st.sampled_from(string.printable), min_size=1, max_size=60))
@settings(deadline=None, max_examples=60)
@example(prompt=" two  spaces \n\n\ttab  ")
@example(prompt="don't , isn't . 1234")
def test_labels_of_an_ascii_prompt_joined_are_the_prompt(tokenizer, prompt):
    assert "".join(token_labels(tokenizer, encode(tokenizer, prompt))) == prompt


@given(
    prompt=st.text(st.characters(codec="utf-8", exclude_characters="[]"), min_size=1, max_size=40)
)
@settings(deadline=None, max_examples=150)
@example(prompt=f"a real {REPLACEMENT} in the prompt")
@example(prompt=f"at the end {REPLACEMENT}")
@example(prompt="拉" * 30)
@example(prompt="🏰" * 20)
@example(prompt="a rare \U0010ffff character \U000e0041 or two")
def test_labels_spell_any_prompt_one_label_a_token(tokenizer, prompt):
    ids = encode(tokenizer, prompt)
    labels = token_labels(tokenizer, ids)
    assert len(labels) == len(ids)
    assert REPLACEMENT in prompt or not any(REPLACEMENT in label for label in labels)
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False) == prompt:
        # always so but where a vocabulary lacks a rare byte, and so drops it
        assert spelled(labels) == prompt


@pytest.mark.parametrize("prompt", MANY_SCRIPTS)
def test_labels_are_readable_in_many_scripts(tokenizer, prompt):
    labels = token_labels(tokenizer, encode(tokenizer, prompt))
    assert not any(REPLACEMENT in label for label in labels)
    assert spelled(labels) == prompt


def test_tokens_that_share_a_character_are_numbered(tiny):
    assert token_labels(tiny[1], encode(tiny[1], "a你")) == ["a", "你[1/3]", "你[2/3]", "你[3/3]"]


def test_a_text_that_breaks_off_inside_a_character_keeps_one_label_a_token(tiny):
    ids = encode(tiny[1], "a你")[:3]
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


# --- target and foil ---------------------------------------------------------------------------


@both_models
@pytest.mark.parametrize("chat", [False, True], ids=["raw", "chat"])
def test_the_default_target_is_the_most_likely_next_token(which, chat, request):
    model, tokenizer = request.getfixturevalue(which)
    question = ask(model, tokenizer, LATVIA, chat=chat)
    with torch.no_grad():
        logits = model(question.input_ids).logits[0, -1]
    assert question.target == logits.argmax()
    assert question.foil is None
    assert question.target_label == tokenizer.decode([question.target])


def test_the_bundled_model_answers_riga(bundled):
    raw = ask(*bundled, LATVIA)
    assert (raw.target_label, str(raw)) == (" Rig", "why ' Rig'?")
    assert ask(*bundled, "What is the Capital City of Latvia?", chat=True).target_label == "The"


def test_target_and_foil_may_be_text_or_ids(bundled):
    as_text = ask(*bundled, LATVIA, target=" Rig", foil=" Tall")
    as_ids = ask(*bundled, LATVIA, target=as_text.target, foil=as_text.foil)
    assert (as_ids.target_label, as_ids.foil_label) == (" Rig", " Tall")
    assert (as_ids.target, as_ids.foil) == (as_text.target, as_text.foil)
    assert bundled[1](" Rig")["input_ids"] == [as_text.target]
    assert str(as_text) == "why ' Rig' rather than ' Tall'?"


def test_the_first_and_last_token_ids_are_accepted(tiny):
    last = len(tiny[1]) - 1
    question = ask(*tiny, "Riga", target=0, foil=last)
    assert (question.target, question.foil) == (0, last)


def test_a_target_is_one_token_even_where_the_tokenizer_adds_bos(bundled):
    model, tokenizer = bundled
    question = ask(model, adding_bos(tokenizer), LATVIA, target=" Rig", foil=" Tall")
    assert question.labels[0] == tokenizer.bos_token
    assert (question.target_label, question.foil_label) == (" Rig", " Tall")


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", " ", "\n\t ", None, 7, ["Riga"]], ids=repr)
def test_a_prompt_without_a_word_is_refused(tiny, prompt):
    assert "empty" in refusal(*tiny, prompt)


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(tiny):
    context = tiny[0].config.max_position_embeddings
    assert ask(*tiny, "a" * context).input_ids.shape == (1, context)
    message = refusal(*tiny, "a" * (context + 1))
    assert "2,049" in message
    assert "2,048" in message


@pytest.mark.parametrize("role", ["target", "foil"])
def test_a_target_of_two_tokens_is_refused_with_its_pieces(bundled, role):
    message = refusal(*bundled, LATVIA, **{role: " Riga"})
    assert role in message
    assert "2 tokens" in message
    assert "[' Rig', 'a']" in message


@pytest.mark.parametrize("role", ["target", "foil"])
@pytest.mark.parametrize("value", ["", 1.5, True, [3]], ids=repr)
def test_a_target_that_is_neither_text_nor_id_is_refused(tiny, role, value):
    assert f"The {role} must be" in refusal(*tiny, "Riga", **{role: value})


@pytest.mark.parametrize("value", [-1, 259, 10**9])
def test_an_id_outside_the_vocabulary_is_refused_with_its_range(tiny, value):
    message = refusal(*tiny, "Riga", target=value)
    assert str(value) in message
    assert "from 0 to 258" in message


def test_a_foil_equal_to_the_target_is_refused(tiny):
    assert "foil 'a' is the target" in refusal(*tiny, "Riga", target="a", foil="a")


def test_a_foil_equal_to_the_default_target_is_refused(bundled):
    assert "foil ' Rig' is the target" in refusal(*bundled, LATVIA, foil=" Rig")


def test_chat_without_a_template_is_refused(tiny):
    model, tokenizer = tiny
    without = copy.deepcopy(tokenizer)
    without.chat_template = None
    assert "no chat template" in refusal(model, without, "Riga", chat=True)


def test_half_a_surrogate_pair_is_refused(tiny):
    """Not text that can be encoded; JSON and damaged files do contain it."""
    assert "prompt" in refusal(*tiny, "Riga \ud83d")


def test_a_prompt_the_tokenizer_drops_whole_is_refused(bundled):
    """The bundled model's vocabulary lacks a few control characters, and drops them."""
    assert bundled[1]("\x16")["input_ids"] == []
    assert "prompt" in refusal(*bundled, "\x16")


def test_a_question_can_be_checked_without_a_model(tiny):
    tokenizer = tiny[1]
    ids, target, foil = check_question(tokenizer, "Riga", target="a", context=4)
    assert (ids, target, foil) == (encode(tokenizer, "Riga"), *encode(tokenizer, "a"), None)
    with pytest.raises(InputError, match="shorten"):
        check_question(tokenizer, "Riga", context=3)


# --- chat --------------------------------------------------------------------------------------


def template_ids(tokenizer, prompt):
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]


@pytest.mark.parametrize("prompt", ["Riga?", *MANY_SCRIPTS])
def test_chat_ids_are_those_of_the_template(tokenizer, prompt):
    assert encode(tokenizer, prompt, chat=True) == template_ids(tokenizer, prompt)


def test_a_chat_has_no_second_bos_where_the_tokenizer_adds_one(tokenizer):
    with_bos = adding_bos(tokenizer)
    assert encode(with_bos, "Riga")[0] == with_bos.bos_token_id  # it does add one
    assert encode(with_bos, "Riga", chat=True) == encode(tokenizer, "Riga", chat=True)
    assert encode(with_bos, "Riga", chat=True)[:2].count(with_bos.bos_token_id) == 1


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
            wheel = _download_wheel(LLAMA3_WHEEL, work)
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


def test_llama3_splits_riga_and_says_so(llama3):
    assert "[' R', 'iga']" in refusal(*llama3, LATVIA, target=" Riga")


def test_llama3_chat_has_one_bos(llama3):
    ids = encode(llama3[1], "Riga?", chat=True)
    assert ids.count(llama3[1].bos_token_id) == 1
    assert ids == template_ids(llama3[1], "Riga?")


@pytest.mark.parametrize("prompt", MANY_SCRIPTS)
def test_llama3_labels_are_readable_in_many_scripts(llama3, prompt):
    labels = token_labels(llama3[1], encode(llama3[1], prompt))
    assert labels[0] == "<|begin_of_text|>"
    assert spelled(labels[1:]) == prompt
    assert not any(REPLACEMENT in label for label in labels)


@given(
    prompt=st.text(st.characters(codec="utf-8", exclude_characters="[]"), min_size=1, max_size=40)
)
@settings(deadline=None, max_examples=50)
def test_llama3_labels_spell_any_prompt(llama3, prompt):
    assert spelled(token_labels(llama3[1], encode(llama3[1], prompt))[1:]) == prompt


def test_two_tokenizers_of_the_toy_are_equal():
    first, second = tiny_llama()[1], tiny_llama(seed=1)[1]
    assert first.get_vocab() == second.get_vocab()


def test_load_tokenizer_is_the_tokenizer_of_load_model(bundled):
    assert load_tokenizer()(LATVIA) == bundled[1](LATVIA)
    assert load_tokenizer().padding_side == bundled[1].padding_side == "left"
