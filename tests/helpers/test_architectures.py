"""Methods that look inside, on other families than Llama: the right numbers, or a refusal."""

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace

import accelerate
import by_hand
import pytest
import torch
import transformers
from families import LIKE_LLAMA, REFUSED, WITH_RULES, of_family
from toys import toy
from watching import rows_run

from helpers import METHODS, InputError, ask, attribute, load_model, tiny_llama
from helpers.architectures import anatomy, gated_parts, is_activation, norm_of, places_of, stack_of
from helpers.attribution import relevance as module
from helpers.attribution.engine import attending, sdpa
from helpers.attribution.relevance import relevance_rules

PROMPT = "Riga is in"


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
    found, expected = attribute(model, question, method), attribute(llama, same_question, method)
    near(found.scores, expected.scores)


def explained(model, question):
    """The objective, less what a bias of the output layer puts in whatever the prompt is."""
    bias = getattr(model.get_output_embeddings(), "bias", None)
    own = 0 if bias is None else bias[question.target[0]] - bias[question.foil[0]]
    return (by_hand.value(model, question) - own).item()


def takes(model, question, method):
    try:
        return bool(attribute(model, question, method).scores.isfinite().all())
    except InputError as error:
        assert "cannot run" in str(error)
        return False


def test_readme_says_which_family_takes_which_method(tiny):
    """With WRITE_TABLE=1 it is written there."""
    methods = ["relevance", "alti_logit", "attention", "attention_rollout"]
    rest = [name for name in METHODS if name not in methods]
    families = WITH_RULES | {name: REFUSED[name][0] for name in REFUSED}
    lines = [f"| | {' | '.join(f'`{name}`' for name in methods)} | the other {len(rest)} |"]
    lines += ["|---" * (len(methods) + 2) + "|"]
    for name, more in families.items():
        model = of_family(name, more, tiny[1])
        question = ask(model, tiny[1], PROMPT, foil="b")
        taken = [takes(model, question, method) for method in methods]
        taken.append(all(takes(model, question, method) for method in rest))
        lines.append(f"| {name} | {' | '.join('yes' if each else 'no' for each in taken)} |")
    written_or_kept("README.md", "families", lines)


def test_the_docs_say_what_a_family_is_made_of(tiny):
    """With WRITE_TABLE=1 it is written there."""
    lines = []
    for name, more in (WITH_RULES | {name: REFUSED[name][0] for name in REFUSED}).items():
        found = anatomy(of_family(name, more, tiny[1])) | {"layers": name}
        if not lines:
            lines = [f"| | {' | '.join(list(found)[1:])} |", "|---" * len(found) + "|"]
        lines.append(f"| {' | '.join(found.values())} |")
    written_or_kept("docs/models.md", "anatomy", lines)


def written_or_kept(name, mark, lines):
    """The table between two marks of a file of the repository is this one, or is made this one."""
    file = Path(__file__).resolve().parents[2] / name
    text = file.read_text(encoding="utf-8")
    before, _, after = text.partition(f"<!-- {mark} -->\n")
    old, _, after = after.partition(f"<!-- end {mark} -->")
    table = "\n".join(lines) + "\n"
    if os.environ.get("WRITE_TABLE"):
        marked = f"<!-- {mark} -->\n{table}<!-- end {mark} -->"
        file.write_text(before + marked + after, encoding="utf-8")
    else:
        assert old == table


def with_constants(model, places, through):
    """What counts calls, and hooks that make the model what its rules take it for.

    In the first pass constants are noted. From then on a norm multiplies by the slope that it had,
    an activation by the ratio; who weighs experts says what it said; a product, and one inside of
    experts, moves by a half; attention keeps its weights, or with ``through`` lets queries and keys
    move by a quarter and values by a half. No gradient is taken here.
    """
    state, known = SimpleNamespace(calls=0), {}

    def noted(value):
        """``value``, or what it was at the same place of the first pass: calls come in order."""
        state.calls += 1
        return known.setdefault(state.calls, value)

    def part(before, now, share):
        return before + share * (now - before)

    def ratio(module, args, out):
        x, bias = args[0], getattr(module, "bias", None)
        if module in places.norms and places.norms[module].centred:
            x = x - x.mean(dim=-1, keepdim=True)
        bias = torch.zeros(()) if bias is None else bias
        return noted(((out - bias) / x).where(x != 0, 0)) * x + bias

    def constant(module, args, out):
        return noted(out)

    def half_out(module, args, out):
        return part(noted(out), out, 0.5)

    def half_in(module, args):
        return (part(noted(args[0]), args[0], 0.5),)

    def attend(module, query, key, value, mask, **options):
        before = noted((query, key, value))
        if through:
            query, key = part(before[0], query, 0.25), part(before[1], key, 0.25)
            value = part(before[2], value, 0.5)
        else:
            query, key = before[:2]
        return sdpa(module, query, key, value, mask, **options)

    hooks = contextlib.ExitStack()
    for part_of in (*places.norms, *places.activations):
        hooks.enter_context(part_of.register_forward_hook(ratio))
    for router in places.routers:
        hooks.enter_context(router.register_forward_hook(constant))
    for experts in places.experts:
        hooks.enter_context(experts.register_forward_hook(half_out))
    for down in places.products:
        hooks.enter_context(down.register_forward_pre_hook(half_in))
    hooks.enter_context(attending(model, attend))
    return state, hooks


@pytest.mark.parametrize("through", [True, False], ids=["AttnLRP", "CP-LRP"])
@pytest.mark.parametrize("name", WITH_RULES)
def test_relevance_is_the_finite_difference_of_its_rules(tiny, name, through):
    """In double precision, of a network in which the rules' constants are constants."""
    model = of_family(name, WITH_RULES[name], tiny[1])
    assert METHODS["relevance"].refusal(model) is None
    question = ask(model, tiny[1], PROMPT, foil="b")
    options = {"through_attention": through, "baseline": "zero"}
    found = attribute(model, question, "relevance", **options).scores
    model.double().set_experts_implementation("eager")  # others know no doubles
    embeds, step = model.get_input_embeddings()(question.input_ids).detach(), 1e-4

    def value(rows):
        state.calls = 0
        logits = model(inputs_embeds=rows, use_cache=False).logits[0, -1]
        return logits[question.target[0]] - logits[question.foil[0]]

    state, hooks = with_constants(model, places_of(model), through)
    differences = []
    with hooks, torch.no_grad():
        value(embeds)
        for place in range(embeds.shape[1]):
            more, less = embeds.clone(), embeds.clone()
            more[0, place] *= 1 + step
            less[0, place] *= 1 - step
            differences.append((value(more) - value(less)) / (2 * step))
    near(found, torch.stack(differences).float(), 1e-3)


@pytest.mark.parametrize("name", WITH_RULES)
def test_what_relevance_hands_back_is_what_came_in(tiny, name):
    """With constant attention weights: an identity. Biases and positions keep a part."""
    model = of_family(name, WITH_RULES[name], tiny[1])
    question = ask(model, tiny[1], PROMPT, foil="b")
    result = attribute(model, question, "relevance", baseline="zero")
    value = explained(model, question)
    with_biases = any(key.endswith("bias") for key, _ in model.named_parameters())
    if not with_biases and name != "Gemma2":  # whose cap on logits is no line
        assert result.scores.sum().item() == pytest.approx(value, rel=1e-3, abs=1e-3)
    lost = abs(result.scores.sum().item() - value) / max(1, abs(value))
    assert result.gap == pytest.approx(lost, abs=1e-3 if name != "Gemma2" else 1)


@pytest.mark.parametrize("name", WITH_RULES)
def test_rules_change_nothing_forward_and_are_gone_after(tiny, name):
    model = of_family(name, WITH_RULES[name], tiny[1])
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
    if name == "GptOss":  # its experts are one feed-forward to ALTI, and its sinks bring nothing
        assert attribute(model, question, "alti_logit").gap < 1e-3
    else:
        with pytest.raises(InputError, match="The method alti_logit cannot run"):
            attribute(model, question, "alti_logit")
    assert attribute(model, question, "occlusion").scores.isfinite().all()


MORE_TO_ADD_UP = {
    "Granite": {"residual_multiplier": 0.3, "logits_scaling": 2},
    "Olmo2": {"attention_bias": True},  # which goes through a norm after attention
    "Mistral": {"sliding_window": 5},  # of ten tokens
}


@pytest.mark.parametrize("name", [*WITH_RULES, "GptOss"])
def test_alti_adds_up_to_the_objective(tiny, name):
    """Where layers scale, norm or bias what they add, or attention and feed-forward read alike."""
    more = REFUSED[name][0] if name in REFUSED else WITH_RULES[name]
    model = of_family(name, more | MORE_TO_ADD_UP.get(name, {}), tiny[1])
    for options in ({"foil": "b"}, {"target": "ab", "foil": "cd"}, {}):
        question = ask(model, tiny[1], PROMPT, **options)
        result = attribute(model, question, "alti_logit")
        assert result.gap < 1e-3
        if options == {"foil": "b"} and name != "Gemma2":  # whose cap on logits is no line
            value = explained(model, question)
            assert result.scores.sum().item() == pytest.approx(value, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name, beside", [("Cohere", True), ("Llama", False)])
def test_a_feed_forward_beside_attention_brings_nothing_of_other_positions(tiny, name, beside):
    """It reads what attention read, so other scores move by the last norm's factor alone."""
    found = []
    for times in (1, 3):
        model = of_family(name, {"num_hidden_layers": 1}, tiny[1])
        (layer,), _ = stack_of(model)
        layer.mlp.down_proj.weight.data *= times
        question = ask(model, tiny[1], PROMPT, target="a", foil="b")
        found.append(attribute(model, question, "alti_logit").scores[:-1])
    factors = found[1] / found[0]
    assert torch.allclose(factors, factors[0].expand(9), rtol=1e-3) == beside
    assert abs(factors[0] - 1) > 0.1


def test_alti_refuses_layers_that_add_more_than_their_parts():
    model, tokenizer = tiny_llama()
    model.model.layers[1].register_forward_hook(lambda m, args, out: out + 0.1 * out.roll(1, -1))
    with pytest.raises(InputError, match="adds something else to the stream than its parts"):
        attribute(model, ask(model, tokenizer, PROMPT), "alti_logit")


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
    assert (gradients, forwards) == (1, 1) and tried == [model]
    assert not any(weight.requires_grad for weight in model.parameters())


def test_parts_are_found_by_what_they_do(tiny):
    gemma, llama = of_family("Gemma", WITH_RULES["Gemma"], tiny[1]), tiny[0]
    torch.testing.assert_close(norm_of(llama.model.norm).gain, llama.model.norm.weight)
    torch.testing.assert_close(norm_of(gemma.model.norm).gain, 1 + gemma.model.norm.weight)
    assert norm_of(torch.nn.Linear(8, 8)) is norm_of(torch.nn.SiLU()) is None
    assert is_activation(torch.nn.ReLU()) and not is_activation(torch.nn.Sigmoid())  # 1/2 at 0
    assert not is_activation(torch.nn.Dropout().eval())
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
    with pytest.raises(InputError, match="goes through no plain matrix"):
        attribute(model, question, "alti_logit")
    with pytest.raises(InputError, match="they lose relevance"):
        attribute(model, question, "relevance")  # what eight bits round away is lost to the rules
    near(
        attribute(model, question, "occlusion").scores,
        by_hand.falls(model, question, "mean"),
        0.02,  # activations are rounded to eight bits too
    )


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_is_known_by_what_it_does(affine):
    norm = torch.nn.LayerNorm(7, elementwise_affine=affine)
    for weight in norm.parameters():
        torch.nn.init.normal_(weight)
    x = torch.randn(3, 7)
    found = norm_of(norm)
    centred = found.centre(x)
    near(centred * found.slope(centred) + found.bias, norm(x))
    assert found.centred and not norm_of(torch.nn.RMSNorm(7)).centred
