"""Every shape that a checkpoint comes in: the right numbers, or one sentence."""

import json
import os
from functools import cache

import accelerate
import by_hand
import pytest
import torch
import transformers
from gguf_files import as_stored, write_gguf
from small_tokenizers import sentencepiece
from test_architectures import near, of_family
from test_models import check_sentence, refusal
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from toys import GROUPED, SHAPE
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from helpers import METHODS, InputError, ask, attribute, attribute_all, load_model, tiny_llama
from helpers.questions import read_question

PROMPT = "Riga is in"


def scores(model, tokenizer, method):
    return attribute(model, ask(model, tokenizer, PROMPT, foil="b"), method).scores


@pytest.fixture
def alike(record_property):
    """Holds that every method gives the scores of another model, or refuses in a sentence.

    Only those in ``may_refuse`` may. Both are a model and its tokenizer; ``make models`` prints
    what is recorded under ``name``.
    """

    def check(name, found, expected, tolerance=0.0, may_refuse=()):
        for method in METHODS:
            try:
                near(scores(*found, method), scores(*expected, method), tolerance)
                works = "yes"
            except InputError as error:
                check_sentence(str(error))
                assert method in may_refuse, error
                works = "no"
            record_property(name, (method, works))

    return check


def save(folder, *parts, **options):
    for part in parts:
        part.save_pretrained(folder, **options)
    return folder


# --- safetensors -------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_sharded_folder_gives_the_scores_of_the_whole(tmp_path, tied, alike):
    whole, tokenizer = tiny_llama(tie_word_embeddings=tied)
    save(tmp_path, tokenizer)
    save(tmp_path, whole, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = load_model(tmp_path)
    shared = found[0].lm_head.weight.data_ptr() == found[0].model.embed_tokens.weight.data_ptr()
    assert shared == tied
    alike(f"shards, {'tied' if tied else 'untied'}", found, (whole, tokenizer))


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_half_precision_is_read_as_float32_or_as_it_is_stored(tmp_path, stored, alike):
    whole, tokenizer = tiny_llama(tie_word_embeddings=True)
    half = tiny_llama(tie_word_embeddings=True)[0].to(getattr(torch, stored))
    save(tmp_path, half, tokenizer)
    for weight, rounded in zip(whole.parameters(), half.parameters(), strict=True):
        weight.data.copy_(rounded)
    found = load_model(tmp_path)
    assert found[0].dtype == torch.float32
    alike(f"{stored} as float32", found, (whole, tokenizer))
    found = load_model(tmp_path, dtype="auto")
    assert found[0].dtype == getattr(torch, stored)
    tolerance = 0.15 if stored == "bfloat16" else 0.02
    alike(f"{stored} as stored", found, (whole, tokenizer), tolerance)


@pytest.mark.parametrize("change", [{"intermediate_size": 2**22}, {"num_hidden_layers": 99_999}])
def test_a_configuration_far_larger_than_its_files_is_refused_before_it_is_made(tmp_path, change):
    folder = save(tmp_path / "toy", *tiny_llama())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert refusal(load_model, folder).startswith("toy asks for ")


# --- .gguf -------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of its own for what a test unpacks."""
    monkeypatch.setenv("LLAMA_NOTEBOOKS_CACHE", str(tmp_path / "cache"))


TEXTS = [
    "The capital city of Latvia is Riga.",
    "Zażółć gęślą jaźń; 12 345,67",
    "你好，世界。今天是2024年",
    "مرحبا بالعالم",
    "Привет, мир!",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "🙂👩‍👩‍👧 e\u0301 I'LL",
    "def f(x):\n    return x  # 12\n\n\n1. item\n\n   34",
    "  two  spaces\t\ttabs \r\n",
    "<|im_start|>user\nHi<|im_end|>\n",
]


@cache
def original(pre):
    """A byte-level tokenizer that cuts texts into words as ``pre`` says, as its authors make it."""
    parts = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    }
    rule = GGUF_PRE_TOKENIZER_SPLITS.get(pre)
    before = parts.get(pre) or ([pre_tokenizers.Split(Regex(rule), "isolated")] if rule else [])
    before.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule is None))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(before)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator([text for text in TEXTS if "<" not in text] * 3, trainer)
    if pre == "llama-bpe":
        state = json.loads(trained.to_str())
        state["model"]["ignore_merges"] = True  # some of Llama 3's words are not made of merges
        state["model"]["merges"] = state["model"]["merges"][:200]
        trained = Tokenizer.from_str(json.dumps(state))
        trained.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A",
            special_tokens=[("<|im_start|>", trained.token_to_id("<|im_start|>"))],
        )
    trained.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=tiny_llama()[1].chat_template,
    )


def llama_for(tokenizer, tied=False):
    """The toy with a table for ``tokenizer``."""
    model = tiny_llama(tie_word_embeddings=tied)[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model.requires_grad_(False)


KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_holds_what_its_blocks_say(own_cache, tmp_path, kind, alike):
    tokenizer, tied = original("gpt-2"), kind in ("Q4_0", "BF16")
    whole = llama_for(tokenizer, tied)
    without = ["output.weight"] if tied else []
    file = write_gguf(tmp_path / f"toy.{kind}.gguf", whole, tokenizer, kind, without=without)
    stored = as_stored(whole, kind)
    model, again = load_model(file)
    assert model.config.tie_word_embeddings == tied
    weights = dict(model.named_parameters())
    for name, weight in stored.named_parameters():
        # the two dequantise in another order
        torch.testing.assert_close(weights[name], weight, rtol=1e-6, atol=1e-7, msg=name)
    alike(f".gguf, {kind}", (model, again), (stored, tokenizer), 1e-4)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_gguf_file_reads_a_text_as_its_own_tokenizer_does(own_cache, tmp_path, pre):
    tokenizer = original(pre)
    if pre == "qwen2":  # from its vocabulary, by the class that its authors use
        state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        merges = [tuple(pair) for pair in state["merges"]]
        theirs = transformers.Qwen2Tokenizer(vocab=state["vocab"], merges=merges)
        theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    file = write_gguf(tmp_path / "toy.gguf", llama_for(tokenizer), tokenizer, pre=pre)
    model, again = load_model(file)
    for text in TEXTS:
        expected = (theirs if pre == "qwen2" else tokenizer)(text)["input_ids"]
        assert again(text)["input_ids"] == expected, text
    assert (again.bos_token, again.eos_token) == ("<|im_start|>", "<|im_end|>")
    messages = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert again.apply_chat_template(messages, tokenize=False) == rendered
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_gguf_file_with_sentencepiece_reads_a_text_as_its_tokenizer_does(own_cache, tmp_path):
    tokenizer = sentencepiece("metaspace")  # which of the two styles it is, no file says
    file = write_gguf(tmp_path / "toy.gguf", llama_for(tokenizer), tokenizer)
    again = load_model(file)[1]
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"], text


def test_what_transformers_would_leave_out_of_a_gguf_file_is_named(own_cache, tmp_path):
    tokenizer = original("gpt-2")
    whole = llama_for(tokenizer)

    def refused(**options):
        file = write_gguf(tmp_path / "toy.gguf", whole, tokenizer, **options)
        message = refusal(load_model, file)
        assert message.startswith(("toy.gguf", "The weights of toy.gguf"))
        return message

    assert "1 are missing, such as model.layers.1.mlp.up_proj.weight" in refused(
        without=["blk.1.ffn_up.weight"]
    )
    extra = [("blk.0.attn_q_norm.weight", torch.ones(8).numpy())]
    assert "some of its tensors would be left out" in refused(more=extra)
    scaled = {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0}
    assert "rope.scaling.factor would be left out" in refused(**scaled)
    window = {"llama__attention__sliding_window": 16}
    assert "attention.sliding_window would be left out" in refused(**window)
    assert "by the rule 'deepseek-llm', which is not known" in refused(pre="deepseek-llm")
    assert "by the rule None" in refused(pre="")
    odd = [("rope_freqs.weight", torch.tensor([1.0, 2.0, 3.0, 5.0]).numpy())]
    assert "rope_freqs.weight would be left out" in refused(more=odd)
    assert "more layers or heads than it holds (llama.block_count)" in refused(
        llama__block_count=1000
    )


def test_an_architecture_or_a_type_that_nobody_reads_is_one_sentence(own_cache, tmp_path):
    tokenizer = original("gpt-2")
    file = write_gguf(tmp_path / "toy.gguf", llama_for(tokenizer), tokenizer, "Q8_0")
    content, length = file.read_bytes(), b"\x05" + b"\0" * 7  # of the architecture's name
    file.write_bytes(content.replace(length + b"llama", length + b"novas"))
    assert "novas" in refusal(load_model, file)
    name = b"blk.0.attn_q.weight"
    place = content.index(name) + len(name) + 4 + 16
    assert content[place] == 8  # the number of Q8_0
    file.write_bytes(content[:place] + b"\xc8" + content[place + 1 :])
    message = refusal(load_model, file)
    assert "200" in message and "Fetch it again" in message
    file.write_bytes(content.replace(length + b"llama", length + b"\xff" * 5))
    message = refusal(load_model, file)  # the file's fault, not the cache's, and no path is told
    assert message.startswith("toy.gguf cannot be unpacked") and str(tmp_path) not in message


def test_llama_3_turns_its_angles_as_its_configuration_says(own_cache, tmp_path):
    tokenizer = original("llama-bpe")
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    whole = tiny_llama(rope_parameters=rope)[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        whole.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    plain = 1 / 500_000.0 ** (torch.arange(0, 8, 2) / 8)
    factors = plain / whole.model.rotary_emb.inv_freq
    assert factors.max() > 30
    more = [("rope_freqs.weight", factors.numpy())]
    file = write_gguf(tmp_path / "toy.gguf", whole, tokenizer, pre="llama-bpe", more=more)
    model, again = load_model(file)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)
    near(scores(model, again, "relevance"), scores(whole, tokenizer, "relevance"))


# --- layers of few bits ------------------------------------------------------------------------

FEW_BITS = {
    "eight": {"load_in_8bit": True},
    "four": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
    "twice four": {
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": torch.float32,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
}


@pytest.fixture(scope="module")
def few_bits(tmp_path_factory):
    """Saved folders of the toy in 8 and in 4 bits, by the names of ``FEW_BITS``."""
    pytest.importorskip("bitsandbytes")
    root = tmp_path_factory.mktemp("bits")
    whole, tokenizer = tiny_llama()
    save(root / "whole", whole)
    for name, options in FEW_BITS.items():
        quantised = transformers.AutoModelForCausalLM.from_pretrained(
            root / "whole", quantization_config=transformers.BitsAndBytesConfig(**options)
        )
        save(root / name, quantised, tokenizer)
    return root


def dequantised(model):
    """The toy with the weights that the layers of few bits of ``model`` stand for."""
    from bitsandbytes.functional import dequantize_4bit

    plain = tiny_llama()[0]
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        if hasattr(weight, "quant_state"):
            weight = dequantize_4bit(weight.data, weight.quant_state)
        elif weight.dtype == torch.int8:
            weight = weight.data.float() * module.state.SCB[:, None] / 127
        plain.get_submodule(name).weight.data.copy_(weight)
    return plain


@pytest.mark.parametrize("name", FEW_BITS)
def test_layers_of_few_bits_give_the_scores_of_what_they_stand_for_or_refuse(few_bits, name, alike):
    found = load_model(few_bits / name)
    plain = dequantised(found[0])
    up, whole = plain.model.layers[0].mlp.up_proj, tiny_llama()[0].model.layers[0].mlp.up_proj
    assert not torch.equal(up.weight, whole.weight)
    may_refuse, tolerance = {"alti_logit"}, 1e-3
    if name == "eight":  # activations are rounded too, of a toy with 32 of them
        may_refuse, tolerance = {"alti_logit", "relevance", "find_then_rank"}, 0.2
    alike(f"bitsandbytes, {name} bits", found, (plain, found[1]), tolerance, may_refuse)


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed-tensors", "eetq", "hqq"])
def test_layers_that_need_another_package_are_one_sentence(tmp_path, kind):
    folder = save(tmp_path / "toy", *tiny_llama())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": kind, "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    message = refusal(load_model, folder)
    assert message.startswith(("toy cannot be loaded", "The weights of toy"))


# --- vocabularies ------------------------------------------------------------------------------


def test_rows_of_the_table_that_no_token_has_are_never_the_answer_without_a_word(tmp_path):
    whole, tokenizer = tiny_llama()
    tokens = len(tokenizer)
    whole.resize_token_embeddings(tokens + 61, mean_resizing=False)
    with torch.no_grad():
        whole.lm_head.weight[tokens:] = 0
    model, again = load_model(save(tmp_path / "padded", whole, tokenizer))
    assert len(model.get_input_embeddings().weight) == tokens + 61
    question = ask(model, again, PROMPT)
    assert question.target[0] < tokens
    assert attribute(model, question, "occlusion").scores.isfinite().all()
    with torch.no_grad():  # the likeliest by far, whatever was read
        state = model.model(question.input_ids).last_hidden_state[0, -1]
        model.lm_head.weight[tokens + 3] = 9 * state
    told = f"the token id {tokens + 3}, a row of the embedding table that stands for no token"
    for options in ({}, {"answer": 2}, {"target_ids": [tokens + 3]}, {"foil_ids": [tokens + 3]}):
        assert told in refusal(ask, model, again, PROMPT, **options)
    opened = read_question(again, PROMPT)
    assert list(attribute_all(model, [opened], ["occlusion"])) == [(opened, {})]


def test_a_resized_table_takes_the_added_token_and_one_that_was_not_says_so(tmp_path):
    whole, tokenizer = tiny_llama()
    tokenizer.add_tokens(["<tool>"])
    short = load_model(save(tmp_path / "short", whole, tokenizer))
    message = refusal(ask, *short, "Riga <tool> is")
    assert "'<tool>', which was added to the tokenizer" in message
    assert "for which the model has no embedding" in refusal(
        ask, *short, "Riga is", target="<tool>"
    )
    assert ask(*short, "Riga is").probability > 0
    whole.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model, again = load_model(save(tmp_path / "long", whole, tokenizer))
    question = ask(model, again, "Riga <tool> is", target="<tool>")
    assert question.target == (len(tokenizer) - 1,)


@pytest.mark.parametrize("name", ["BertLMHeadModel", "RobertaForCausalLM"])
def test_a_model_that_reads_in_both_directions_is_one_sentence(tiny, tmp_path, name):
    kind = {"BertLMHeadModel": "BertConfig", "RobertaForCausalLM": "RobertaConfig"}[name]
    config = getattr(transformers, kind)(vocab_size=len(tiny[1]), **SHAPE)
    model = getattr(transformers, name)(config)
    folder = save(tmp_path / "both", model, tiny[1])
    config.is_decoder = True
    assert load_model(save(tmp_path / "one", getattr(transformers, name)(config), tiny[1]))
    assert "reads a text in both directions" in refusal(load_model, folder)


# --- models that read images too ---------------------------------------------------------------

READER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
READER |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
AROUND = {  # the text model inside, and what reads images
    "Gemma3": ({"sliding_window": 16}, {}),
    "Llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model"}),
    "Mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral", "head_dim": 16}),
    "Llama4": (
        {"intermediate_size_mlp": 64, "num_local_experts": 2},
        {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "Qwen2VL": ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}, None),
}


def around(name, tokenizer):
    """A small model that reads images and texts."""
    text, vision = AROUND[name]
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    tokens |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = GROUPED | {"head_dim": 8} | tokens | text
    reader = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "patch_size": 14}
    reader = reader if vision is None else READER | vision
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=reader)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        for key, weight in model.named_parameters():
            if "vision" not in key and weight.dim() == 1:
                weight.data += 0.1 * torch.randn_like(weight)
            elif weight.dim() == 3:  # experts, which some leave as they were in memory
                weight.data = 0.2 * torch.randn_like(weight)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("name", ["Gemma3", "Llava", "Mistral3", "Llama4"])
def test_the_text_part_of_a_model_that_reads_images_is_explained(tiny, tmp_path, name, alike):
    whole, tokenizer = around(name, tiny[1]), tiny[1]
    folder = save(tmp_path / "images", whole, tokenizer)
    model, again = load_model(folder)
    assert type(model).__name__.endswith("ForCausalLM") and model.name_or_path == "images"
    question = ask(model, again, PROMPT, foil="b")
    with torch.inference_mode():
        expected = whole(input_ids=question.input_ids).logits[0, -1].log_softmax(-1)
    assert question.probability == pytest.approx(expected[question.target[0]].exp().item())
    near(
        attribute(model, question, "occlusion").scores, by_hand.falls(whole, question, "mean"), 1e-4
    )
    gradient = by_hand.gradient(whole, question) * by_hand.columns(whole, question)
    near(attribute(model, question, "gradient_x_input").scores, gradient[0].sum(dim=-1), 1e-4)
    alone = type(model)(model.config).requires_grad_(False).eval()  # the same part, put together
    inner = whole.base_model.language_model
    if inner.get_output_embeddings() is None:
        alone.model.load_state_dict(inner.state_dict())
        alone.lm_head.load_state_dict(whole.get_output_embeddings().state_dict())
    else:
        alone.load_state_dict(inner.state_dict())
    refused = {each for each in METHODS if METHODS[each].refusal(alone)}
    assert refused <= {"alti_logit", "relevance"} and not (refused and name == "Llava")
    alike(f"{name} with images", (model, again), (alone, again), 1e-4, refused)


def test_a_text_part_that_is_no_model_by_itself_is_one_sentence(tiny, tmp_path):
    folder = save(tmp_path / "images", around("Qwen2VL", tiny[1]), tiny[1])
    message = refusal(load_model, folder)
    assert "Qwen2VLForConditionalGeneration, whose text part is no causal" in message


# --- weights that lie elsewhere ----------------------------------------------------------------

PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
PARTS += ["model.rotary_emb"]


def on_disk(*parts):
    return {part: "disk" if part in parts else "cpu" for part in PARTS}


PLACES = {
    "a layer": {"device_map": on_disk("model.layers.1")},
    "layers and norm": {"device_map": on_disk("model.layers.0", "model.layers.1", "model.norm")},
    "the output layer": {"device_map": on_disk("lm_head")},
    "the table": {"device_map": on_disk("model.embed_tokens")},
    "everything": {"device_map": {"": "disk"}},
    "what is left": {"max_memory": {"cpu": 60_000}},
    "nothing": {"device_map": "auto"},
}


@pytest.mark.parametrize("place", PLACES)
def test_offloaded_weights_give_the_scores_of_the_whole(tiny_folder, place, alike):
    model, tokenizer = load_model(tiny_folder, **PLACES[place])
    away = [name for name, weight in model.named_parameters() if weight.is_meta]
    assert bool(away) == (place not in ("nothing", "the table"))
    assert not model.get_input_embeddings().weight.is_meta
    may_refuse = {"alti_logit"} if "lm_head.weight" in away else ()
    alike(f"on disk: {place}", (model, tokenizer), load_model(tiny_folder), 1e-4, may_refuse)
    assert away == [name for name, weight in model.named_parameters() if weight.is_meta]


def test_experts_that_are_fused_while_they_are_read_may_lie_on_the_disk(tiny, tmp_path):
    whole = of_family("Mixtral", {"num_local_experts": 2}, tiny[1])
    folder = save(tmp_path / "experts", whole, tiny[1])
    model, tokenizer = load_model(folder, device_map=on_disk("model.layers.0", "model.layers.1"))
    assert model.model.layers[0].mlp.experts.gate_up_proj.is_meta
    for method in ("occlusion", "gradient_x_input"):
        near(scores(model, tokenizer, method), scores(whole, tokenizer, method), 1e-4)


def test_a_table_that_the_caller_offloads_is_one_sentence():
    model, tokenizer = tiny_llama()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert "embedding table of this model is offloaded" in refusal(ask, model, tokenizer, PROMPT)


@pytest.mark.parametrize("place", ["nonsense", "cuda:77", 7, [1]], ids=repr)
def test_a_place_that_does_not_exist_is_one_sentence(tiny_folder, place):
    assert "tiny-llama cannot be loaded" in refusal(load_model, tiny_folder, device_map=place)


# --- a template that makes too much ------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**8 }}",
        "{{ 'x' * 10**13 }}",
        "{% set n = namespace(x='x') %}{% for i in range(28) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}{{ n.x }}",
    ],
)
def test_a_template_that_makes_more_than_any_model_reads_is_one_sentence(tiny, template):
    model, tokenizer = tiny_llama()
    tokenizer.chat_template = template
    message = refusal(ask, model, tokenizer, [{"role": "user", "content": "Hi"}])
    assert "makes more than 10,000,000 characters of these messages" in message


SECOND = os.environ.get("LLAMA_NOTEBOOKS_SECOND_MODEL")


@pytest.mark.skipif(not SECOND, reason="needs a second model, in LLAMA_NOTEBOOKS_SECOND_MODEL")
def test_the_second_model_reads_texts_and_answers():
    from gguf import GGUFReader, dequantize

    model, tokenizer = load_model(SECOND)
    reader = GGUFReader(SECOND)
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    assert {"Q4_K", "Q6_K"} <= kinds
    weights = dict(model.named_parameters())
    names = {
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.3.attn_v.weight": "model.layers.3.self_attn.v_proj.weight",
    }
    for tensor in reader.tensors:
        if tensor.name in names:
            expected = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
            near(weights[names[tensor.name]], expected, 1e-6)
    fields = {name: reader.get_field(f"tokenizer.ggml.{name}") for name in ("tokens", "merges")}
    tokens, merges = (field.contents() for field in fields.values())
    theirs = transformers.Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(pair.split(" ")) for pair in merges],
    )
    for text in TEXTS:
        if "<" not in text:  # which tokens are control tokens only the file says
            assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"], text
        composed = text.replace("e\u0301", "é")
        assert tokenizer.decode(tokenizer(composed)["input_ids"]) == composed
    assert tokenizer.convert_ids_to_tokens(tokenizer("<|im_start|>")["input_ids"]) == [
        "<|im_start|>"
    ]
    question = ask(model, tokenizer, "The capital of France is", target=" Paris")
    assert question.rank == 1
