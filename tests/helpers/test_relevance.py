"""AttnLRP against its own definition: each rule by hand, and all of them written out once more."""

import importlib
import sys
from dataclasses import replace
from math import log
from types import ModuleType, SimpleNamespace

import by_hand
import pytest
import torch
from families import WITH_RULES, of_family
from linear_model import LinearCausalModel
from llama3_rope import LLAMA3_ROPE
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half
from watching import tensor_sizes

from helpers import InputError, ask, attribute, attribute_all, tiny_llama
from helpers.attribution import embed_prompt, objective
from helpers.attribution.relevance import (
    attention_kept_constant,
    attention_rule,
    identity_rule,
    product_rule,
    relevance_rules,
    with_slope,
)

PROMPT = "Riga is in"
VARIANTS = {
    "plain": {},
    "one key-value head": {"key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
}

every_variant = pytest.mark.parametrize("variant", VARIANTS)
with_and_without_foil = pytest.mark.parametrize("foil", [None, "b"], ids=["no foil", "foil"])
either_way = pytest.mark.parametrize("through", [True, False], ids=["AttnLRP", "CP-LRP"])


def same(scores, expected, tolerance=1e-4):
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance)


PUBLISHED = {"through_attention": True, "baseline": "zero"}  # slope times embedding, AttnLRP


def run(model, question, **options):
    return attribute(model, question, "relevance", **PUBLISHED | options)


def gradient_x_input(model, question):
    return attribute(model, question, "gradient_x_input")


def value_of(model, question):
    with torch.inference_mode():
        return float(objective(model, embed_prompt(model, question), question))


def above_expected(model, question):
    """The target's logit minus the mean logit that the model expects, or minus the foil's."""
    logits = model(question.input_ids).logits[0, -1].detach()
    logit = logits[question.target[0]]
    if question.foil is not None:
        return float(logit - logits[question.foil[0]])
    return float(logit - (logits.softmax(-1) @ logits))


def share(out, *inputs):
    """What is left at each input of a relevance that is ``out`` itself: input times slope."""
    slopes = torch.autograd.grad(out.sum(), inputs)
    return [(slope * x).detach() for slope, x in zip(slopes, inputs, strict=True)]


def leaf(*numbers):
    return torch.tensor(numbers, requires_grad=True)


# --- one rule at a time ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_slope_is_the_value_to_the_last_bit_and_hands_back_the_slope(dtype):
    x = torch.randn(1000).to(dtype).requires_grad_(True)
    value = x.exp()
    out = with_slope(value, 3, x)
    assert torch.equal(out, value) and out.dtype == dtype
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full_like(x, 3))


def test_a_norm_hands_each_feature_what_it_received():
    """x = (3, 4) has rms sqrt(12.5); the plain gradient leaves nothing of it."""
    norm = LlamaRMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([2.0, 1.0])
    x = leaf(3.0, 4.0)
    plain = norm(x)
    (lost,) = share(plain, x)
    same(lost.sum(), torch.tensor(0.0), 1e-6)
    norm.register_forward_hook(identity_rule)
    (kept,) = share(norm(x), x)
    same(kept, torch.tensor([6.0, 4.0]) / 12.5**0.5, 1e-6)
    same(kept, plain.detach(), 1e-6)


def test_an_activation_hands_back_what_it_received_and_nothing_at_zero():
    silu = nn.SiLU()
    silu.register_forward_hook(identity_rule)
    x = leaf(2.0, -1.0, 0.0)
    (kept,) = share(silu(x), x)
    same(kept, torch.tensor([2 / (1 + 2.718281828**-2), -1 / (1 + 2.718281828), 0.0]), 1e-6)


def test_a_product_gives_each_factor_half():
    gate, up = leaf(2.0, -1.0), leaf(3.0, 5.0)
    down = nn.Linear(2, 1, bias=False)
    down.weight.data = torch.ones(1, 2)
    down.register_forward_pre_hook(product_rule)
    for kept in share(down(gate * up), gate, up):
        same(kept, torch.tensor([3.0, -2.5]), 1e-6)


def attend_by_hand(rule):
    """One query of width 1 over two positions: logits (0, ln 3), weights (1/4, 3/4), output 7."""
    query, key, value = leaf(1.0), leaf(0.0, log(3)), leaf(4.0, 8.0)
    heads = [x[None, None, :, None] for x in (query, key, value)]  # [batch, heads, seq, dim]
    module = SimpleNamespace(is_causal=False)
    out, _ = rule(AttentionInterface()["sdpa"])(module, *heads, None, scaling=1.0)
    same(out.detach().flatten(), torch.tensor([7.0]), 1e-6)
    return torch.autograd.grad(out.sum(), [query, key, value], allow_unused=True), (key, value)


def test_attention_gives_values_a_half_and_queries_and_keys_a_quarter():
    """The weights hold 1/2 and 3 of 3.5; the softmax leaves ln 3 (3 - 3/4 3.5) at logit two."""
    (query, key, value), (keys, values) = attend_by_hand(attention_rule)
    same(value * values, torch.tensor([0.5, 3.0]), 1e-5)
    half = log(3) * (3 - 0.75 * 3.5) / 2
    same(query, torch.tensor([half]), 1e-5)  # times the query, which is 1
    same(key * keys, torch.tensor([0.0, half]), 1e-5)


def test_constant_attention_gives_all_to_the_values():
    (query, key, value), (_, values) = attend_by_hand(attention_kept_constant)
    assert query is None and key is None
    same(value * values, torch.tensor([1.0, 6.0]), 1e-5)


# --- all of them together ----------------------------------------------------------------------


def propagate(model, question, through):
    """The same method by explicit propagation: R_in = x * W^T (R_out / W x), in float64.

    No gradient is taken. Every step divides a layer's relevance by the layer's output and hands it
    to the inputs by what they put in, as the paper writes its rules.
    """
    config, weights = model.config, {k: v.double() for k, v in model.state_dict().items()}
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    seq = question.input_ids.shape[1]
    angles = model.model.rotary_emb(torch.zeros(1).double(), torch.arange(seq)[None])
    cos, sin = (part[0] for part in angles)  # [seq, dim of a head]
    future = torch.ones(seq, seq).triu(1).bool()

    def linear(relevance, x, weight):
        return x * ((relevance / (x @ weight.T)) @ weight)

    def turned(relevance, x):  # rotary positions are linear too; the turn back is by -angle
        out = x * cos + rotate_half(x) * sin
        back = relevance / out
        return x * (back * cos - rotate_half(back * sin))

    def norm(x, name):
        rms = (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        return x / rms * weights[name]

    def split(x, count):
        return x.unflatten(-1, (count, -1)).transpose(0, 1)  # [heads, seq, dim]

    x, layers = weights["model.embed_tokens.weight"][question.input_ids[0]], []
    embeds = x
    for index in range(config.num_hidden_layers):
        at = f"model.layers.{index}."
        w = {n.split(".")[-2]: weights[n] for n in weights if n.startswith(at)}
        a = norm(x, at + "input_layernorm.weight")
        q, k, v = (
            split(a @ w[n].T, c)
            for n, c in [("q_proj", heads), ("k_proj", groups), ("v_proj", groups)]
        )
        turned_q, turned_k = (y * cos + rotate_half(y) * sin for y in (q, k))
        many_k, many_v = (y.repeat_interleave(heads // groups, dim=0) for y in (turned_k, v))
        logits = turned_q @ many_k.transpose(1, 2) * q.shape[-1] ** -0.5
        p = logits.masked_fill(future, -torch.inf).softmax(-1)
        o = p @ many_v
        joined = o.transpose(0, 1).flatten(1)
        middle = x + joined @ w["o_proj"].T
        b = norm(middle, at + "post_attention_layernorm.weight")
        gate, up = b @ w["gate_proj"].T, b @ w["up_proj"].T
        out = middle + (F.silu(gate) * up) @ w["down_proj"].T
        step = (w, x, a, q, k, turned_q, many_k, many_v, logits, p, o, joined)
        layers.append((*step, middle, b, gate, up, out))
        x = out
    rows, last = weights["lm_head.weight"], norm(x, "model.norm.weight")[-1]
    row = rows[question.target[0]]
    if question.foil is not None:
        row = row - rows[question.foil[0]]
    elif question.objective == "log_probability":  # the softmax to first order
        row = row - (rows @ last).softmax(-1) @ rows
    final = last * row
    r = torch.zeros_like(x)
    r[-1] = final
    for *step, middle, b, gate, up, out in reversed(layers):
        w, x, a, q, k, turned_q, many_k, many_v, logits, p, o, joined = step
        branch = out - middle
        hidden = linear(r * branch / out, F.silu(gate) * up, w["down_proj"]) / 2
        r = r * middle / out
        r = r + linear(hidden, b, w["gate_proj"]) + linear(hidden, b, w["up_proj"])
        branch = middle - x
        ro = split(linear(r * branch / middle, joined, w["o_proj"]), heads)
        r = r * x / middle
        each = ro / (o * (2 if through else 1))
        rv = (many_v * (p.transpose(1, 2) @ each)).unflatten(0, (groups, -1)).sum(1)
        parts = [(rv, "v_proj")]
        if through:
            rp = p * (each @ many_v.transpose(1, 2))
            rl = (logits * (rp - p * rp.sum(-1, keepdim=True))).masked_fill(future, 0)
            rest = rl / (2 * logits) * q.shape[-1] ** -0.5
            rq = turned_q * (rest @ many_k)
            rk = (many_k * (rest.transpose(1, 2) @ turned_q)).unflatten(0, (groups, -1)).sum(1)
            parts += [(turned(rq, q), "q_proj"), (turned(rk, k), "k_proj")]
        for part, name in parts:
            r = r + linear(part.transpose(0, 1).flatten(1), a, w[name])
    assert r.shape == embeds.shape
    return r.sum(-1)


@either_way
@every_variant
@pytest.mark.parametrize("options", [{}, {"foil": "b"}, {"objective": "logit"}], ids=str)
def test_equals_relevance_propagated_explicitly(variant, options, through):
    model, tokenizer = tiny_llama(**VARIANTS[variant])
    question = ask(model, tokenizer, PROMPT, **options)
    scores = run(model, question, through_attention=through).scores
    expected = propagate(model, question, through).float()
    same(scores, expected, 1e-4 * float(expected.abs().max()))


def test_equals_gradient_x_input_where_no_rule_changes_anything():
    """Norms with a constant factor, uniform attention, no feed-forward: linear already."""
    model, tokenizer = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.variance_epsilon = 1e8
            module.weight.fill_(1e4)  # so that what passes through is not small
    question = ask(model, tokenizer, PROMPT, foil="b")
    expected = gradient_x_input(model, question).scores
    assert (expected.abs() > 1e-3 * expected.abs().max()).all()  # attention does mix
    same(run(model, question, through_attention=False).scores / expected, torch.ones(len(expected)))


def test_with_nothing_but_the_norm_all_relevance_stays_at_the_last_token():
    model, tokenizer = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    question = ask(model, tokenizer, PROMPT)
    result = run(model, question)
    same(result.scores[-1], torch.tensor(above_expected(model, question)), 1e-5)
    assert not result.scores[:-1].any() and result.gap < 1e-5
    plain = gradient_x_input(model, question).scores  # a norm does not care how long its input is
    assert abs(plain.sum()) < 1e-2 * result.scores[-1]


@every_variant
@with_and_without_foil
def test_without_attention_the_scores_add_up(variant, foil):
    """To the target's logit above the mean that the model expects, or above the foil's."""
    model, tokenizer = tiny_llama(**VARIANTS[variant])
    question = ask(model, tokenizer, PROMPT * 5, foil=foil)
    result = run(model, question, through_attention=False)
    same(result.scores.sum(), torch.tensor(above_expected(model, question)), 1e-4)
    assert result.gap < 1e-4
    raw = run(model, question, through_attention=False, objective="logit")
    logits = model(question.input_ids).logits[0, -1].detach()
    other = 0 if foil is None else logits[question.foil[0]]
    same(raw.scores.sum(), logits[question.target[0]] - other, 1e-4)


@pytest.mark.parametrize(
    "options", [{"target": "abc"}, {"target": "ab", "foil": "cd"}, {"target": "a", "foil": "bc"}]
)
def test_several_tokens_conserve_one_by_one(tiny, options):
    question = ask(*tiny, PROMPT, **options)
    result = run(tiny[0], question, through_attention=False, each=True)
    assert result.gap < 1e-4 and (result.gaps < 1e-4).all()
    if question.foil is None:  # every token that was read is a unit
        for t, row in enumerate(result.each):
            before = ask(*tiny, PROMPT + options["target"][:t], target=options["target"][t])
            same(row.sum(), torch.tensor(above_expected(tiny[0], before)), 1e-4)
    summed = run(tiny[0], question, through_attention=False)
    same(summed.scores, result.each.sum(dim=0), 1e-4)


def test_units_hold_the_relevance_of_their_tokens(tiny):
    fine, coarse = (
        ask(*tiny, PROMPT, target="a", foil="b", units=units) for units in ("tokens", "words")
    )
    tokens, words = (run(tiny[0], question) for question in (fine, coarse))
    same(words.scores, by_hand.per_unit(tokens.scores, coarse), 1e-5)
    assert words.gap == pytest.approx(tokens.gap, abs=1e-6)


@pytest.mark.parametrize("foil", [None, " T"], ids=["no foil", "foil"])
def test_the_bundled_model_conserves_without_attention_and_leaks_with_it(bundled, foil):
    question = ask(*bundled, "The capital city of Latvia is", foil=foil)
    value = above_expected(bundled[0], question)
    closed = run(bundled[0], question, through_attention=False)
    leaking = run(bundled[0], question)
    assert abs(closed.scores.sum() - value) < 1e-3 * max(abs(value), 1) and closed.gap < 1e-3
    expected = abs(float(leaking.scores.sum()) - value) / max(abs(value), 1)
    assert leaking.gap == pytest.approx(expected, rel=1e-3) and leaking.gap > 0.05
    assert question.labels[int(leaking.scores.argmax())] == " Latvia"


def test_a_foil_subtracts_since_every_rule_is_linear_in_what_it_hands_back(tiny):
    ids = {"target": "a", "foil": "b"}
    both = run(tiny[0], ask(*tiny, PROMPT, **ids)).scores
    apart = [run(tiny[0], ask(*tiny, PROMPT, target=text)).scores for text in ids.values()]
    same(both, apart[0] - apart[1], 1e-3)


# --- counted from a baseline -------------------------------------------------------------------


@either_way
def test_a_baseline_takes_off_what_it_would_get_itself(tiny, through):
    """The slope is the prompt's, whatever the scores are counted from: so scores subtract."""
    question = ask(*tiny, PROMPT, target="a", foil="b")
    published, ones = (
        run(tiny[0], question, through_attention=through, baseline=baseline).scores
        for baseline in ("zero", torch.ones(tiny[0].config.hidden_size))
    )
    with relevance_rules(tiny[0], through):
        embeds = embed_prompt(tiny[0], question).requires_grad_(True)
        (slope,) = torch.autograd.grad(objective(tiny[0], embeds, question).sum(), embeds)
    same(published - ones, slope[0].sum(dim=-1))
    mean = tiny[0].get_input_embeddings().weight.detach().mean(dim=0)
    from_mean = run(tiny[0], question, through_attention=through, baseline="mean")
    same(from_mean.scores, (slope[0] * (embeds[0].detach() - mean)).sum(dim=-1))


@pytest.mark.parametrize("options", [{"foil": "b"}, {}, {"target": "ab", "foil": "cd"}], ids=str)
def test_the_gap_is_measured_against_what_the_prompt_gained(tiny, options):
    """``F(x) - F(b)`` by itself, of prompts that are the baseline and nothing else."""
    model, tokenizer = tiny
    question = ask(model, tokenizer, PROMPT, **options)
    embeds = embed_prompt(model, question)
    eos = model.get_input_embeddings().weight.detach()[model.config.eos_token_id]
    with torch.inference_mode():
        gained = value_of(model, question) - float(
            objective(model, eos.expand_as(embeds), question)
        )
    result = run(model, question, baseline="eos")
    missed = abs(float(result.scores.sum()) - gained) / max(abs(gained), 1)
    assert result.gap == pytest.approx(missed, abs=1e-5)
    assert (result.evaluations, result.forwards) == (1, 1)


def test_a_counterfactual_is_a_baseline(tiny):
    """Where two prompts hold the same token, no difference is scored."""
    question, other = (ask(*tiny, text, target="a", foil="b") for text in ("Riga", "Rita"))
    result = run(tiny[0], question, baseline=embed_prompt(tiny[0], other)[0])
    assert not result.scores[[0, 1, 3]].any() and result.scores[2]


@pytest.mark.parametrize("baseline", ["remove", "neighbour", "none", torch.ones(3)], ids=str)
def test_other_baselines_are_refused(tiny, baseline):
    with pytest.raises(InputError, match="baseline"):
        run(tiny[0], ask(*tiny, PROMPT), baseline=baseline)


@either_way
def test_one_token_is_enough(tiny, through):
    question = ask(*tiny, "A")
    result = run(tiny[0], question, through_attention=through)
    assert result.scores.shape == (1,) and result.scores.isfinite().all()
    assert through or result.gap < 1e-5


# --- what is promised to the engine ------------------------------------------------------------


@either_way
@pytest.mark.parametrize("found", ["sdpa", "eager"])
def test_the_forward_pass_is_unchanged(through, found):
    model, tokenizer = tiny_llama()
    model.set_attn_implementation(found)
    question = ask(model, tokenizer, PROMPT, foil="b")
    outside = value_of(model, question)
    with relevance_rules(model, through):
        assert value_of(model, question) == pytest.approx(outside, abs=1e-5)
        embeds = embed_prompt(model, question).requires_grad_(True)
        assert objective(model, embeds, question).item() == pytest.approx(outside, abs=1e-5)


def state(model):
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for m in model.modules()
    ]
    methods = [name for m in model.modules() for name in vars(m) if name == "forward"]
    grads = [(w.requires_grad, w.grad) for w in model.parameters()]
    return hooks, methods, grads, model.config._attn_implementation


@either_way
@pytest.mark.parametrize("found", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was_found(through, found):
    model, tokenizer = tiny_llama()
    model.set_attn_implementation(found)
    question, before = ask(model, tokenizer, PROMPT), state(model)
    plain = gradient_x_input(model, question).scores
    run(model, question, through_attention=through)
    assert state(model) == before
    assert torch.equal(gradient_x_input(model, question).scores, plain)


def test_the_model_is_left_as_it_was_found_after_an_error():
    model, tokenizer = tiny_llama()
    question, before = ask(model, tokenizer, PROMPT), state(model)
    with pytest.raises(ZeroDivisionError), relevance_rules(model):
        assert state(model) != before
        raise ZeroDivisionError
    assert state(model) == before
    run(model, question)  # which has been tried then
    model.model.norm.register_forward_pre_hook(lambda module, args: 1 / 0)
    before = state(model)
    with pytest.raises(ZeroDivisionError):  # in the middle of the forward pass
        run(model, question)
    assert state(model) == before


def test_one_row_goes_through_the_model_once(tiny):
    rows, question = [], ask(*tiny, PROMPT)
    hook = tiny[0].register_forward_hook(
        lambda m, args, named, out: rows.append(len(named["inputs_embeds"])), with_kwargs=True
    )
    try:
        result = run(tiny[0], question)
    finally:
        hook.remove()
    assert sum(rows) == result.evaluations == 1 and result.forwards == 0
    assert result.signed and result.closed is None and result.errors is None


def test_no_attention_map_is_formed():
    model, tokenizer = tiny_llama()
    question = replace(
        ask(model, tokenizer, PROMPT), input_ids=torch.arange(2000)[None] % len(tokenizer)
    )
    with tensor_sizes() as sizes:
        run(model, question)
    assert max(sizes) < 2000 * 2000


@either_way
def test_half_precision_comes_near(tiny, through):
    question = ask(*tiny, PROMPT)
    exact = run(tiny[0], question, through_attention=through).scores
    near = 0.15 * float(exact.abs().max())
    products = run(tiny[0], question, precision="bfloat16", through_attention=through).scores
    whole = tiny_llama()[0].to(torch.bfloat16)
    half = run(whole, question, through_attention=through).scores
    for scores in (products, half):
        assert not torch.equal(scores, exact)
        assert (scores - exact).abs().max() < near


def test_other_models_are_refused(tiny):
    linear = LinearCausalModel(tiny[1])
    with pytest.raises(InputError, match="A LinearCausalModel has no layers that are known"):
        run(linear, ask(linear, tiny[1], PROMPT, target="a"))


def test_the_gradient_that_relevance_leaves_is_the_gradient(tiny):
    """Both from one forward pass, for any question and each output; alone or together."""
    for options in ({}, {"foil": "b"}, {"target": "ab", "foil": "cd"}, {"target": "abc"}):
        question = ask(*tiny, PROMPT, **options)
        names = ["saliency", "relevance", "gradient_x_input"]
        ((_, together),) = attribute_all(tiny[0], [question], names, each=True)
        for name, result in together.items():
            alone = attribute(tiny[0], question, name, each=True)
            same(result.each, alone.each, 1e-5)
            assert result.gap == alone.gap


def test_rules_differ_from_the_gradient_and_each_other(tiny):
    question = ask(*tiny, PROMPT, foil="b")
    plain, through, constant = (
        gradient_x_input(tiny[0], question).scores,
        run(tiny[0], question).scores,
        run(tiny[0], question, through_attention=False).scores,
    )
    for one, other in ((plain, through), (through, constant), (plain, constant)):
        assert not torch.allclose(one, other, rtol=0.1)


# --- the authors' own package ------------------------------------------------------------------


LXT = ["llama", "qwen2", "qwen3", "gemma3", "gpt2"]


@pytest.fixture
def lxt_rules(monkeypatch, request):
    """``patch(model)`` of lxt, whose release does not import under this transformers as it is.

    Its package imports every architecture that it knows, among them a BERT that needs what
    transformers no longer has. Only the rules for one family are wanted: the two packages above
    them are stood in for by empty ones, and the patched table of attention functions, a plain dict,
    is given the one method that transformers now calls. All of it is undone after the test.
    """
    lxt = pytest.importorskip("lxt", reason="lxt is not installed: pip install --no-deps lxt==2.1")
    for name in ("lxt.efficient", "lxt.efficient.models"):
        package = ModuleType(name)
        package.__path__ = [f"{lxt.__path__[0]}/{'/'.join(name.split('.')[1:])}"]
        monkeypatch.setitem(sys.modules, name, package)
    family = request.param
    for name in ("rules", "patches", f"models.{family}"):  # forgotten again with their stand-ins
        monkeypatch.delitem(sys.modules, f"lxt.efficient.{name}", raising=False)

    class Table(dict):
        def get_interface(self, name, default):
            return self.get(name, default)

    def patch():
        modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        patches = importlib.import_module(f"lxt.efficient.models.{family}").attnLRP
        for target in patches:  # what will be put back
            names = ("eager_attention_forward", "ALL_ATTENTION_FUNCTIONS")
            for name in names if target is modeling else ("forward", "_norm"):
                if hasattr(target, name):
                    monkeypatch.setattr(target, name, getattr(target, name))
        for target, patch_it in patches.items():
            assert patch_it(target)
        table = Table(modeling.ALL_ATTENTION_FUNCTIONS)
        monkeypatch.setattr(modeling, "ALL_ATTENTION_FUNCTIONS", table)

    return family, patch


@with_and_without_foil
@pytest.mark.parametrize("lxt_rules", LXT, indirect=True)
def test_lxt_gives_the_same_scores(tiny, foil, lxt_rules):
    family, patch = lxt_rules
    name = next(each for each in WITH_RULES if each.lower() == family)
    model = of_family(name, WITH_RULES[name], tiny[1])
    question = ask(model, tiny[1], PROMPT, foil=foil)
    ours = run(model, question).scores
    plain = gradient_x_input(model, question).scores
    patch()
    theirs = gradient_x_input(model, question).scores  # of the model that lxt has patched
    assert not torch.allclose(theirs, plain, rtol=0.1)
    same(ours, theirs, 1e-4 * float(theirs.abs().max()))
