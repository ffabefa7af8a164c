"""Methods that look inside, on other families than Llama: the right numbers, or a refusal."""

import os
from pathlib import Path

import accelerate
import by_hand
import pytest
import torch
import transformers
from toys import GROUPED, toy
from watching import rows_run

from helpers import METHODS, InputError, ask, attribute, load_model, tiny_llama
from helpers.architectures import gain_of, gated_parts, places_of, stack_of
from helpers.attribution import asking
from helpers.attribution import relevance as module
from helpers.attribution.relevance import relevance_rules

PROMPT = "Riga is in"
PHI3 = {"pad_token_id": 0, "sliding_window": None}
# Families whose layers are a Llama's, or nearly: what to add to the shape.
LIKE_LLAMA = {
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Granite": {"attention_multiplier": 8**-0.5},
    "Phi3": PHI3,
    "SmolLM3": {"no_rope_layers": [1, 1], "pad_token_id": 0},
}
OTHERS = {
    "Qwen3": {"head_dim": 8},
    "Gemma": {"head_dim": 8},
    "Gemma3": {"head_dim": 8},
    "Olmo2": {},
}
REFUSED = {
    "Gemma2": ({"head_dim": 8}, "caps its logits"),
    "GPTNeoX": ({}, "LayerNorm of a GPTNeoXForCausalLM"),
    "Mixtral": ({"num_local_experts": 2}, "of a MixtralForCausalLM"),
    "Cohere": ({}, "CohereLayerNorm of a CohereForCausalLM"),
}


def of_family(name, more, tokenizer):
    """A small frozen model of a family, drawn at random, biases and gains too."""
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    tokens |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config(**(GROUPED | tokens | more)))
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.data += 0.1 * torch.randn_like(weight)
    return model.requires_grad_(False).eval()


def as_llama(name, more, tokenizer):
    """A model of a family that is a Llama by another name, and that Llama, of the same weights."""
    llama = tiny_llama()[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for weight in llama.parameters():
            if weight.dim() == 1:
                weight.data += 0.1 * torch.randn_like(weight)
    alike = ("rope_parameters", "rms_norm_eps")
    more = more | {key: getattr(llama.config, key) for key in alike}
    model = of_family(name, more, tokenizer)
    weights = dict(llama.named_parameters())
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"], requires_grad=False)
    for key, weight in model.named_parameters():
        if key.endswith("bias"):
            weight.data.zero_()
        elif "qkv_proj" in key:
            parts = [weights[key.replace("qkv", part)] for part in "qkv"]
            weight.data.copy_(torch.cat(parts))
        elif "gate_up" in key:
            parts = [weights[key.replace("gate_up", part)] for part in ("gate", "up")]
            weight.data.copy_(torch.cat(parts))
        else:
            weight.data.copy_(weights[key])
    return model, llama


def near(found, expected, tolerance=1e-5):
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * float(expected.abs().max())
    )


@pytest.mark.parametrize("method", ["relevance", "alti_logit", "gradient_x_input", "attention"])
@pytest.mark.parametrize("options", [{}, {"foil": "b"}], ids=["no foil", "foil"])
@pytest.mark.parametrize("name", LIKE_LLAMA)
def test_a_llama_by_another_name_gets_the_scores_of_that_llama(tiny, name, options, method):
    model, llama = as_llama(name, LIKE_LLAMA[name], tiny[1])
    question = ask(model, tiny[1], PROMPT, **options)
    same_question = ask(llama, tiny[1], PROMPT, **options)
    assert question.target == same_question.target
    if (name, method) == ("Granite", "alti_logit"):  # whose logits are scaled
        with pytest.raises(InputError, match="output layer"):
            attribute(model, question, method)
        return
    found, expected = attribute(model, question, method), attribute(llama, same_question, method)
    near(found.scores, expected.scores)


def takes(model, question, method):
    try:
        return bool(attribute(model, question, method).scores.isfinite().all())
    except InputError:
        return False


def test_readme_says_which_family_takes_which_method(tiny):
    """With WRITE_TABLE=1 it is written there."""
    methods = ["relevance", "alti_logit", "attention", "attention_rollout"]
    rest = [name for name in METHODS if name not in methods]
    families = {"Llama": {}} | LIKE_LLAMA | OTHERS | {name: REFUSED[name][0] for name in REFUSED}
    lines = [f"| | {' | '.join(f'`{name}`' for name in methods)} | the other {len(rest)} |"]
    lines += ["|---" * (len(methods) + 2) + "|"]
    for name, more in (families | {"GPT2": None}).items():
        known = more is not None
        model = of_family(name, more, tiny[1]) if known else toy("gpt2", tiny[1])
        question = ask(model, tiny[1], PROMPT, foil="b")
        taken = [takes(model, question, method) for method in methods]
        taken.append(all(takes(model, question, method) for method in rest))
        lines.append(f"| {name} | {' | '.join('yes' if each else 'no' for each in taken)} |")
    readme = Path(__file__).resolve().parents[2] / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, after = text.partition("<!-- families -->\n")
    old, _, after = after.partition("<!-- end families -->")
    table = "\n".join(lines) + "\n"
    if os.environ.get("WRITE_TABLE"):
        marked = f"<!-- families -->\n{table}<!-- end families -->"
        readme.write_text(before + marked + after, encoding="utf-8")
    else:
        assert old == table


@pytest.mark.parametrize("name", LIKE_LLAMA | OTHERS)
def test_what_relevance_hands_back_is_what_came_in_biases_counted(tiny, name):
    """With constant attention weights, from finite differences of nothing: an identity."""
    model = of_family(name, (LIKE_LLAMA | OTHERS)[name], tiny[1])
    assert METHODS["relevance"].refusal(model) is None
    question = ask(model, tiny[1], PROMPT, foil="b")
    result = attribute(model, question, "relevance", through_attention=False)
    value = by_hand.value(model, question).item()
    with_biases = any(key.endswith("bias") for key, _ in model.named_parameters())
    if not with_biases and name not in ("Gemma3",):
        assert result.scores.sum().item() == pytest.approx(value, rel=1e-3, abs=1e-4)
    assert result.gap == pytest.approx(
        abs(result.scores.sum().item() - value) / max(1, abs(value)), abs=1e-3
    )


@pytest.mark.parametrize("name", LIKE_LLAMA | OTHERS)
def test_rules_change_nothing_forward_and_are_gone_after(tiny, name):
    model = of_family(name, (LIKE_LLAMA | OTHERS)[name], tiny[1])
    ids = torch.tensor([[5, 9, 7]])
    with torch.no_grad():
        before = model(ids).logits
        with relevance_rules(model):
            assert torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_rules_do_not_fit_is_refused_in_a_sentence(tiny, name):
    more, told = REFUSED[name]
    model = of_family(name, more, tiny[1])
    question = ask(model, tiny[1], PROMPT)
    with pytest.raises(InputError, match=told):
        attribute(model, question, "relevance")
    if name == "Mixtral":  # experts are one feed-forward to ALTI
        result = attribute(model, question, "alti_logit")
        assert result.gap < 1e-3
    else:
        with pytest.raises(InputError, match="The method alti_logit cannot run"):
            attribute(model, question, "alti_logit")
    assert attribute(model, question, "occlusion").scores.isfinite().all()


@pytest.mark.parametrize("name", ["Gemma", "Gemma3", "Olmo2", "Qwen3"])
def test_alti_adds_up_or_is_refused(tiny, name):
    model = of_family(name, OTHERS[name], tiny[1])
    question = ask(model, tiny[1], PROMPT, foil="b")
    if METHODS["alti_logit"].refusal(model) is not None:
        assert name in ("Gemma3", "Olmo2")  # norms behind attention and feed-forward
        return
    result = attribute(model, question, "alti_logit")
    value = by_hand.value(model, question).item()
    assert result.scores.sum().item() == pytest.approx(value, rel=1e-3, abs=1e-3)


def test_alti_refuses_layers_that_scale_what_they_add(tiny):
    model = of_family("Granite", {"residual_multiplier": 0.5}, tiny[1])
    question = ask(model, tiny[1], PROMPT, foil="b")
    with asking(model, [question]) as asked:
        asked.matrix = model.lm_head.weight, None  # the scale of its logits is 1
        with pytest.raises(InputError, match="alti_logit does not fit a GraniteForCausalLM"):
            METHODS["alti_logit"](asked)


def test_offloaded_weights_give_the_same_scores():
    whole, tokenizer = tiny_llama()
    model, _ = tiny_llama()
    accelerate.cpu_offload(model.model.layers, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in model.model.layers.parameters())
    question = ask(model, tokenizer, PROMPT, foil="b")
    for method in ("relevance", "gradient_x_input", "occlusion"):
        expected = attribute(whole, question, method).scores
        near(attribute(model, question, method).scores, expected)
    assert all(weight.is_meta for weight in model.model.layers.parameters())


class Sharp(torch.nn.Module):
    """A feed-forward that looks gated and multiplies by something else as well."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self.act_fn(gate) * up * gate)


def test_rules_that_lose_relevance_are_found_out(tiny):
    model = tiny_llama()[0]
    model.model.layers[1].mlp = Sharp(model.model.layers[1].mlp)
    with pytest.raises(InputError, match="was tried: they lose relevance"):
        attribute(model, ask(model, tiny[1], PROMPT), "relevance")


def test_a_model_is_tried_once_and_left_as_it_was(monkeypatch):
    model, tokenizer = tiny_llama()
    tried = []
    conserves = module._conserves
    monkeypatch.setattr(module, "_conserves", lambda m: tried.append(m) or conserves(m))
    question = ask(model, tokenizer, PROMPT)
    for _ in range(2):
        _, gradients, forwards = rows_run(model, lambda: attribute(model, question, "relevance"))
        assert (gradients, forwards) == (1, 0)
    assert tried == [model]
    assert not any(weight.requires_grad for weight in model.parameters())


def test_parts_are_found_by_what_they_do(tiny):
    gemma, llama = of_family("Gemma", OTHERS["Gemma"], tiny[1]), tiny[0]
    torch.testing.assert_close(gain_of(llama.model.norm), llama.model.norm.weight)
    torch.testing.assert_close(gain_of(gemma.model.norm), 1 + gemma.model.norm.weight)
    assert gain_of(torch.nn.LayerNorm(8, bias=False)) is None
    assert gain_of(torch.nn.Linear(8, 8)) is None
    assert len(places_of(llama).norms) == 5 and len(places_of(llama).products) == 2
    assert gated_parts(llama.model.layers[0].mlp)[1] is llama.model.layers[0].mlp.down_proj
    for name in ("gpt2", "gpt-neox"):
        layers, norm = stack_of(toy(name, tiny[1]))
        assert len(layers) == 2 and isinstance(norm, torch.nn.LayerNorm)


def test_weights_of_eight_bits_are_not_read_as_numbers(tmp_path):
    pytest.importorskip("bitsandbytes")
    model, tokenizer = tiny_llama()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "whole")
    eight = transformers.BitsAndBytesConfig(load_in_8bit=True)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=eight
    )
    for part in (quantised, tokenizer):
        part.save_pretrained(tmp_path / "eight")
    model, tokenizer = load_model(tmp_path / "eight")
    assert type(model.model.layers[0].self_attn.o_proj) is not torch.nn.Linear
    question = ask(model, tokenizer, PROMPT, foil="b")
    with pytest.raises(InputError, match="in plain matrices"):
        attribute(model, question, "alti_logit")
    with pytest.raises(InputError, match="they lose relevance"):
        attribute(model, question, "relevance")  # what eight bits round away is lost to the rules
    near(
        attribute(model, question, "occlusion").scores,
        by_hand.falls(model, question, "mean"),
        0.02,  # activations are rounded to eight bits too
    )
