"""The machine under the methods: the same numbers however rows are run, and no needless work."""

import subprocess
import sys
from dataclasses import replace

import by_hand
import pytest
import torch
from linear_model import LinearCausalModel
from llama3_rope import LLAMA3_ROPE
from toys import OTHERS, toy
from transformers import AttentionInterface, AttentionMaskInterface
from watching import backward_passes, rows_run, tensor_sizes

from helpers import METHODS, InputError, ask, attribute, tiny_llama
from helpers.attribution import (
    asking,
    baseline_embeds,
    embed_prompt,
    engine,
    objective,
    objective_gradient,
)
from helpers.attribution.attention import attention_rows
from helpers.attribution.engine import (
    attending,
    free_memory,
    frozen,
    gradient_bytes,
    in_batches,
    sdpa,
    texts_and_outputs,
    token_budget,
    working_precision,
)
from helpers.attribution.perturbation import coalition_values
from helpers.questions import read_question

PROMPT = "Riga is in"
LONG = "a long prompt " * 8
VARIANTS = {
    "plain": {},
    "one key-value head": {"key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
}

SHAPES = {
    "next token": {},
    "foil": {"foil": "b"},
    "two tokens": {"target": "ab"},
    "two texts": {"target": "ab", "foil": "cde"},
    "a shared beginning": {"target": "abc", "foil": "abd"},
    "two texts that begin alike": {"target": "axyz", "foil": "abc"},
    "raw logits": {"target": "ab", "objective": "logit"},
}

every_shape = pytest.mark.parametrize("shape", SHAPES)
every_variant = pytest.mark.parametrize("variant", VARIANTS)
with_and_without_foil = pytest.mark.parametrize("foil", [None, "b"], ids=["no foil", "foil"])


def same(scores, expected, tolerance=1e-4):
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance)


# --- what is asked -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, foil, texts, outputs",
    [  # texts as what is read behind the prompt, outputs as (text, place, target, foil, sign)
        ("a", None, [""], [(0, 0, "a", None, 1)]),
        ("abc", None, ["ab"], [(0, 0, "a", None, 1), (0, 1, "b", None, 1), (0, 2, "c", None, 1)]),
        ("a", "b", [""], [(0, 0, "a", "b", 1)]),
        (
            "ab",
            "cd",
            ["a", "c"],
            [(0, 0, "a", "c", 1), (0, 1, "b", None, 1), (1, 1, "d", None, -1)],
        ),
        ("ab", "ac", ["a"], [(0, 1, "b", "c", 1)]),
        ("a", "bc", ["b"], [(0, 0, "a", "b", 1), (0, 1, "c", None, -1)]),
        ("abx", "ac", ["ab"], [(0, 1, "b", "c", 1), (0, 2, "x", None, 1)]),
    ],
)
def test_what_target_and_foil_share_is_read_once_and_compared_where_they_part(
    tiny, target, foil, texts, outputs
):
    question = ask(*tiny, "xy", target=target, foil=foil)
    ids = question.input_ids[0].tolist()

    def token(text):
        return -1 if text is None else tiny[1](text)["input_ids"][0]

    found_texts, found = texts_and_outputs(question)
    assert found_texts == [ids + [token(letter) for letter in text] for text in texts]
    expected = [(t, 1 + at, token(a), token(b), sign) for t, at, a, b, sign in outputs]
    assert [(o.text, o.position, o.target, o.foil, o.sign) for o in found] == expected


def test_very_negative_against_very_positive_is_about_the_second_word(bundled):
    model, tokenizer = bundled
    texts = {"target": " very negative", "foil": " very positive"}
    question = ask(model, tokenizer, "The film was boring. The review is", **texts)
    text, (only,) = texts_and_outputs(question)
    assert len(text) == 1 and tokenizer.decode([only.target, only.foil]) == " negative positive"
    value = objective(model, embed_prompt(model, question), question)

    def log_probability(ids):
        read = torch.cat([question.input_ids[0], torch.tensor(ids)])[None]
        with torch.no_grad():
            logs = model(read).logits[0, len(question.labels) - 1 : -1].log_softmax(-1)
        return logs.gather(1, torch.tensor(ids)[:, None]).sum()

    same(value[0], log_probability(question.target) - log_probability(question.foil))


@pytest.mark.parametrize("name", OTHERS)
@every_shape
def test_values_are_those_of_the_models_own_logits_whatever_it_does_to_them(tiny, name, shape):
    """Softmax after a cap, a scale, or nothing; from token ids, with the whole vocabulary."""
    model = toy(name, tiny[1])
    question = ask(model, tiny[1], PROMPT, **SHAPES[shape])
    value = objective(model, embed_prompt(model, question), question)
    same(value, by_hand.value(model, question), 1e-5)
    whole = by_hand.without(model, question, [], "remove")  # asked by ids
    assert value.item() == pytest.approx(whole, abs=1e-4)
    near(
        objective_gradient(model, embed_prompt(model, question), question)[0],
        by_hand.gradient(model, question)[0, : len(question.labels)],
    )
    if question.foil is None and question.objective != "logit":
        assert question.probability == pytest.approx(value.exp().item(), rel=1e-4)


def near(found, expected):
    """To 1e-5 of the largest."""
    off = 1e-5 * max(1, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=off)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("replacement", ["mean", "remove"])
@pytest.mark.parametrize("shape", ["foil", "two tokens", "two texts"])
def test_occlusion_holds_for_every_architecture(tiny, name, replacement, shape):
    model = toy(name, tiny[1])
    question = ask(model, tiny[1], PROMPT, units="words", **SHAPES[shape])
    result = attribute(model, question, "occlusion", replacement=replacement)
    near(result.scores, by_hand.falls(model, question, replacement))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("method", ["attention", "attention_rollout"])
def test_attention_is_that_of_the_maps_of_any_architecture(tiny, name, method):
    model, eager = toy(name, tiny[1]), toy(name, tiny[1])
    question = ask(model, tiny[1], PROMPT, target="a", foil="b")
    eager.set_attn_implementation("eager")
    maps = torch.cat(eager(question.input_ids, output_attentions=True).attentions).mean(dim=1)
    flow = torch.eye(len(PROMPT))
    for layer in maps:
        flow = (layer + torch.eye(len(PROMPT))) / 2 @ flow
    expected = maps[:, -1].mean(dim=0) if method == "attention" else flow[-1]
    same(attribute(model, question, method).scores, expected, 1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_bfloat16_products_come_near_for_any_architecture(tiny, name):
    model = toy(name, tiny[1])
    question = ask(model, tiny[1], PROMPT, target="a", foil="b")
    exact = attribute(model, question, "occlusion").scores
    half = attribute(model, question, "occlusion", precision="bfloat16").scores
    assert (half - exact).abs().max() <= 0.2 * exact.abs().max()
    assert torch.equal(attribute(model, question, "occlusion").scores, exact)


# --- only what the answer needs ----------------------------------------------------------------


@every_variant
@every_shape
def test_the_smaller_model_has_the_objective_and_the_gradient_of_the_whole_one(variant, shape):
    model, tokenizer = tiny_llama(**VARIANTS[variant])
    question = ask(model, tokenizer, PROMPT, **SHAPES[shape])
    seq = question.input_ids.shape[1]
    rows = by_hand.columns(model, question).repeat(2, 1, 1)
    rows[1, :seq] = baseline_embeds(model, question)[0]
    values = objective(model, rows[:, :seq], question)
    same(values, by_hand.value(model, question, rows), 1e-5)
    grads = objective_gradient(model, rows[:, :seq], question)
    for grad, row in zip(grads, rows, strict=True):
        near(grad, by_hand.gradient(model, question, row[None])[0, :seq])


def test_an_output_layer_with_a_bias_keeps_it():
    model, tokenizer = tiny_llama()
    head = torch.nn.Linear(model.config.hidden_size, len(tokenizer))
    model.set_output_embeddings(head)
    for options in ({}, {"foil": "b"}, {"target": "ab", "foil": "cd"}):
        question = ask(model, tokenizer, PROMPT, **options)
        value = objective(model, embed_prompt(model, question), question)
        same(value, by_hand.value(model, question), 1e-5)
    assert model.get_output_embeddings() is head


class Wrapped(torch.nn.Linear):
    """An output layer that is no plain matrix, as a quantised one."""


@every_shape
def test_an_output_layer_that_is_no_plain_matrix_is_left_as_it_is(tiny, shape):
    model, tokenizer = tiny_llama()
    head = Wrapped(model.config.hidden_size, len(tokenizer), bias=False)
    head.weight = model.lm_head.weight
    model.set_output_embeddings(head)
    question = ask(model, tokenizer, PROMPT, **SHAPES[shape])
    with asking(model, [question]) as asked:
        assert asked.matrix is None and model.lm_head is head
    for method in ("gradient_x_input", "occlusion", "attention", "relevance", "alti_logit"):
        exact = attribute(tiny[0], question, method).scores
        same(attribute(model, question, method).scores, exact, 1e-4)


def test_a_model_without_an_output_layer_is_left_as_it_is(tiny):
    linear = LinearCausalModel(tiny[1])
    question = ask(linear, tiny[1], PROMPT, target="ab", foil="cd")
    with asking(linear, [question]) as asked:
        assert asked.matrix is None
        same(asked.values()[:, 0], by_hand.value(linear, question), 1e-5)


def test_the_output_layer_comes_back_after_an_error(tiny):
    model, question = tiny[0], ask(*tiny, PROMPT)
    head = model.get_output_embeddings()
    with pytest.raises(ZeroDivisionError), asking(model, [question]):
        assert model.get_output_embeddings() is not head
        raise ZeroDivisionError
    assert model.get_output_embeddings() is head


@pytest.mark.parametrize(
    "options, whole",
    [
        ({"target": "a", "foil": "b"}, False),
        ({"target": "abc", "foil": "abd"}, False),
        ({"target": "ab", "objective": "logit"}, False),
        ({"target": "a"}, True),
        ({"target": "ab", "foil": "cd"}, True),
    ],
)
def test_the_normaliser_is_computed_only_where_the_foil_does_not_cancel_it(options, whole):
    """The toy's vocabulary, 259, divides the size of no other tensor than its own weights."""
    model, tokenizer = tiny_llama()
    question = ask(model, tokenizer, PROMPT, **options)
    vocabulary, weight = len(tokenizer), model.lm_head.weight.numel()
    for method in ("saliency", "occlusion", "integrated_gradients", "shapley", "relevance"):
        with tensor_sizes() as sizes:
            attribute(model, question, method)
        seen = {size for size in sizes if size % vocabulary == 0 and size not in (0, weight)}
        assert bool(seen) == whole, method


@pytest.mark.parametrize("size", [1, 50, 259, 2048])
@pytest.mark.parametrize("scale", [1, 300], ids=["usual logits", "logits that overflow"])
@pytest.mark.parametrize("biased", [False, True])
def test_the_output_layer_read_in_portions_has_the_values_and_slopes_of_the_whole(
    monkeypatch, size, scale, biased
):
    monkeypatch.setitem(engine.ROWS_AT_ONCE, "cpu", size)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(259, 8, generator=generator)
    bias = torch.randn(259, generator=generator) if biased else None
    states = scale * torch.randn(3, 2, 8, generator=generator)
    ids = torch.tensor([[[3, 5], [7, -1]], [[258, -1], [0, -1]], [[1, 2], [4, 6]]])
    normalised = ids[..., 1] < 0
    normalised[1, 1] = False  # a raw logit
    states.requires_grad_(True)
    values = engine.OutputLayer.apply(states, ids, normalised, weight, bias)
    (slopes,) = torch.autograd.grad(values.sum(), states)

    exact = states.detach().double().requires_grad_(True)
    logits = torch.nn.functional.linear(
        exact, weight.double(), None if bias is None else bias.double()
    )
    target, foil = logits.gather(2, ids.clamp_min(0)).unbind(dim=2)
    other = torch.where(ids[..., 1] >= 0, foil, 0.0)
    expected = target - torch.where(normalised, logits.logsumexp(dim=2), other)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-4)
    (expected,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(slopes.double(), expected, rtol=1e-4, atol=1e-4)


def test_of_a_long_prompt_no_vocabulary_is_spread_over_the_positions(tiny):
    """The toy's vocabulary, 259, divides the size of no other tensor than its own weights."""
    question = ask(*tiny, LONG, target="a", foil="b")
    vocabulary, weight = len(tiny[1]), tiny[0].lm_head.weight.numel()

    def sizes_of(question):
        with tensor_sizes() as sizes:
            attribute(tiny[0], question, "gradient_x_input")
        return {size for size in sizes if size % vocabulary == 0 and size not in (0, weight)}

    assert sizes_of(question) == set()
    assert sizes_of(ask(*tiny, LONG, target="a")) == {vocabulary}
    assert max(sizes_of(ask(*tiny, LONG, target="ab", foil="cd"))) <= 2 * 3 * vocabulary


@pytest.mark.parametrize("method", ["gradient_x_input", "saliency", "relevance"])
@pytest.mark.parametrize("each, passes", [(False, 1), (True, 4)])
def test_a_summed_answer_takes_one_backward_pass(tiny, method, each, passes):
    model, question = tiny[0], ask(*tiny, PROMPT, target="abcd")
    _, found = backward_passes(
        model.model.layers[0].mlp, lambda: attribute(model, question, method, each=each)
    )
    assert found == passes


@pytest.mark.parametrize("entry", [{}, {"foil": "b"}, {"target": "ab"}], ids=str)
def test_no_pass_is_run_for_what_is_known_or_comes_along(tiny, entry):
    model, tokenizer = tiny
    question = read_question(tokenizer, PROMPT, model=model, **entry)
    with asking(model, [question]) as asked:
        _, gradients, forwards = rows_run(model, lambda: METHODS["saliency"](asked))
        assert (gradients, forwards) == (1, 0) and asked.facts is not None
        assert rows_run(model, asked.settle)[1:] == (0, 0)
    known = ask(model, tokenizer, PROMPT, **entry)
    with asking(model, [known]) as asked:
        assert rows_run(model, asked.settle)[1:] == (0, 0) and asked.facts is None


# --- precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(METHODS))
def test_bfloat16_products_come_near_float32_and_leave_nothing_behind(method):
    model, tokenizer = tiny_llama()
    question = ask(model, tokenizer, PROMPT)
    weights = list(model.parameters())
    exact = attribute(model, question, method)
    half = attribute(model, question, method, precision="bfloat16")
    assert half.scores.dtype == torch.float32
    close = 0.2 * exact.scores.abs().max()
    assert (half.scores - exact.scores).abs().max() <= close
    assert method in ("random",) or not torch.equal(half.scores, exact.scores)
    assert all(now is then for now, then in zip(model.parameters(), weights, strict=True))
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(attribute(model, question, method).scores, exact.scores)


def test_bfloat16_keeps_the_ranking_on_the_bundled_model(bundled):
    question = ask(*bundled, "The name of the river that flows through London is the")
    ranks = [
        attribute(bundled[0], question, "occlusion", precision=precision).scores.argsort().argsort()
        for precision in (None, "bfloat16")
    ]
    assert torch.corrcoef(torch.stack(ranks).float())[0, 1] > 0.9


def test_the_products_are_really_done_in_bfloat16_and_the_residual_stream_is_not():
    model, tokenizer = tiny_llama()
    question = ask(model, tokenizer, PROMPT)
    layer = model.model.layers[0]
    seen = {}
    for name in ("mlp.up_proj", "self_attn.q_proj"):
        module = layer.get_submodule(name)
        module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out.dtype}))
    layer.register_forward_hook(lambda m, i, out: seen.update(residual=out.dtype))
    attribute(model, question, "saliency", precision="bfloat16")
    assert seen == {
        "mlp.up_proj": torch.bfloat16,
        "self_attn.q_proj": torch.bfloat16,
        "residual": torch.float32,
    }


def test_the_weights_come_back_after_an_error():
    model, _ = tiny_llama()
    weights = list(model.parameters())
    with pytest.raises(ZeroDivisionError), working_precision(model, "bfloat16"):
        raise ZeroDivisionError
    assert all(now is then for now, then in zip(model.parameters(), weights, strict=True))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_an_unknown_precision_is_refused(tiny):
    with pytest.raises(InputError, match="bfloat16"):
        attribute(tiny[0], ask(*tiny, PROMPT), "saliency", precision="float8")


# --- batches and memory ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
def test_batched_rows_give_the_scores_of_single_rows(tiny, method, monkeypatch):
    question = ask(*tiny, LONG, foil="b")
    options = {"max_evaluations": 80} if method == "integrated_gradients" else {}
    batched = attribute(tiny[0], question, method, **options)
    monkeypatch.setattr("helpers.attribution.engine.token_budget", lambda model: 1)
    single = attribute(tiny[0], question, method, **options)
    same(batched.scores, single.scores, 1e-3 * float(batched.scores.abs().max()))
    assert (batched.evaluations, batched.forwards) == (single.evaluations, single.forwards)


def out_of_memory():
    return RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize(
    "error", [out_of_memory(), MemoryError(), torch.OutOfMemoryError("x out of memory.")]
)
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_computed_twice(tiny, error):
    sizes, done = [], []

    def run(items):
        sizes.append(len(items))
        if len(items) > 3:
            raise error
        done.extend(items)
        return items

    results = in_batches(tiny[0], run, list(range(10)), seq=1)
    assert [item for some in results for item in some] == done == list(range(10))
    assert sizes == [10, 5, 2, 2, 2, 2, 2]


def test_one_row_that_does_not_fit_raises_what_it_met(tiny):
    with pytest.raises(RuntimeError, match="allocate memory"):
        in_batches(tiny[0], lambda items: (_ for _ in ()).throw(out_of_memory()), [1, 2], seq=1)


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny):
    tried = []

    def run(items):
        tried.append(items)
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        in_batches(tiny[0], run, [1, 2, 3, 4], seq=1)
    assert len(tried) == 1


REAL_LIMIT = """
import resource, sys
import torch
from helpers import ask, attribute, load_model
model, tokenizer = load_model()
question = ask(model, tokenizer, "one two three four five six seven eight " * 6)
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 1_000_000_000, resource.RLIM_INFINITY))
def filled(size):
    taken = []
    while True:
        try:
            taken.append(torch.empty(size, dtype=torch.uint8))
        except RuntimeError:
            return taken
# All that is free, also what loading has given back to the allocator: machines differ in that. Then
# 400 MB are given back: the larger pieces go to the system, the smaller ones are kept.
large, small = filled(40_000_000), filled(1_000_000)
del large[-10:]
seen = []
def note(module, args, named):
    seen.append(len(named["inputs_embeds"]))
model.register_forward_pre_hook(note, with_kwargs=True)
result = attribute(model, question, "integrated_gradients", max_evaluations=33, tolerance=1e-9)
print(max(seen), min(seen), sum(seen), result.evaluations, bool(result.scores.isfinite().all()))
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, as Linux does")
def test_a_machine_that_runs_out_of_memory_halves_and_finishes():
    """The real thing: a process that may allocate 400 MB more than the model takes."""
    done = subprocess.run([sys.executable, "-c", REAL_LIMIT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    largest, smallest, rows, evaluations, finite = done.stdout.split()
    assert int(smallest) < int(largest) and int(rows) > int(evaluations) == 33
    assert finite == "True"


def test_the_budget_follows_what_is_free(tiny, monkeypatch):
    each = gradient_bytes(tiny[0])
    for tokens, expected in ((100, 50), (10**9, 2048), (1, 1)):
        monkeypatch.setattr(
            "helpers.attribution.engine.free_memory", lambda device, n=tokens: n * each
        )
        assert token_budget(tiny[0]) == expected
    monkeypatch.undo()
    assert free_memory(torch.device("cpu")) > 2**20


MEASURE = """
from helpers import ask, load_model
from helpers.attribution import asking
from helpers.attribution.engine import gradient_bytes
def held(field):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(field))
model, tokenizer = load_model()
words = "one two three four five six seven eight "
short, long = (ask(model, tokenizer, words * n, foil=" b") for n in (1, 64))
with asking(model, [short]) as asked:
    asked.reactions(asked.embeds, lambda grad: grad)
with asking(model, [long]) as asked:
    open("/proc/self/clear_refs", "w").write("5")
    before = held("VmRSS")
    asked.reactions(asked.embeds, lambda grad: grad)
print((held("VmHWM") - before) / long.input_ids.shape[1] / gradient_bytes(model))
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_estimate_of_memory_is_near_what_a_gradient_takes():
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
    )
    assert 0.4 < float(done.stdout) < 1.1


# --- what causality saves ----------------------------------------------------------------------


def tokens_run(model, run):
    """Tokens (rows x length) that went through the model during ``run()``."""
    counted = []
    handle = model.register_forward_pre_hook(
        lambda m, args, named: counted.append(named["inputs_embeds"].shape[:2].numel()),
        with_kwargs=True,
    )
    try:
        return run(), sum(counted)
    finally:
        handle.remove()


@every_variant
@every_shape
@pytest.mark.parametrize("replacement", ["eos", "neighbour", "remove"])
def test_erased_units_give_the_objective_of_the_whole_variant(
    variant, shape, replacement, monkeypatch
):
    model, tokenizer = tiny_llama(**VARIANTS[variant])
    question = ask(model, tokenizer, PROMPT, **SHAPES[shape])
    units = len(question.units)
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(9, units, generator=generator) > torch.linspace(0, 1, 9)[:, None]
    kept[:, : units // 2] |= torch.rand(9, 1, generator=generator) < 0.5
    kept[0], kept[-1] = True, False  # nothing goes, everything goes
    kept[1], kept[1, 0] = True, False  # the first, the last, all but the first, all but the last
    kept[2], kept[2, -1] = True, False
    kept[3], kept[3, 0] = False, True
    kept[4], kept[4, -1] = False, True
    monkeypatch.setattr("helpers.attribution.engine.FULL_PASS", 2 * units)  # several groups
    with asking(model, [question]) as asked:
        whole, (values,) = coalition_values(asked, [kept], replacement)
    expected = [
        by_hand.without(model, question, (~some).nonzero()[:, 0].tolist(), replacement)
        for some in kept
    ]
    same(values[:, 0], torch.tensor(expected), 2e-4)
    same(whole[:, 0], by_hand.value(model, question))


@pytest.mark.parametrize("units", ["words", "sentences"])
def test_a_text_without_a_unit_is_the_shorter_text(bundled, units):
    """With real words: the text is written without the unit, tokenised anew, and asked."""
    model, tokenizer = bundled
    prompt = "Riga is old. Latvia is a country. The capital of Latvia is"
    texts = {"target": " Riga", "foil": " Tallinn"}
    question = ask(model, tokenizer, prompt, units=units, **texts)
    result = attribute(model, question, "occlusion", replacement="remove")
    whole = objective(model, embed_prompt(model, question), question).item()
    compared = 0
    for place, unit in enumerate(question.units):
        spans = [question.read.spans[position] for position in unit.positions]
        shorter = prompt[: spans[0][0]] + prompt[spans[-1][1] :]
        ids = [t for i, t in enumerate(question.input_ids[0].tolist()) if i not in unit.positions]
        if shorter.endswith(" ") or tokenizer(shorter)["input_ids"] != ids:
            continue  # what is left would be other tokens
        other = ask(model, tokenizer, shorter, **texts)
        value = objective(model, embed_prompt(model, other), other).item()
        assert result.scores[place].item() == pytest.approx(whole - value, abs=1e-3)
        compared += 1
    assert compared >= len(question.units) - 2


@every_shape
def test_padded_texts_give_what_each_gives_alone(tiny, shape):
    """Two texts of different length are filled up to one; each alone is not."""
    model, question = tiny[0], ask(*tiny, PROMPT, **SHAPES[shape])
    same(
        objective(model, embed_prompt(model, question), question),
        by_hand.value(model, question),
        1e-5,
    )
    texts, outputs = texts_and_outputs(question)
    with asking(model, [question], each=True) as asked:
        each = asked.values()[0]
        assert asked.embeds.shape[1:3] == (len(texts), max(map(len, texts)))
    for output, found in zip(outputs, each, strict=True):
        logits = model(torch.tensor([texts[output.text]])).logits[0, output.position]
        if question.objective == "log_probability":
            logits = logits.log_softmax(-1)
        value = logits[output.target] - (logits[output.foil] if output.foil >= 0 else 0)
        same(found, output.sign * value, 1e-5)


def test_what_comes_before_the_first_change_is_computed_once(tiny):
    model, question = tiny[0], ask(*tiny, LONG * 3)
    seq = question.input_ids.shape[1]
    result, tokens = tokens_run(model, lambda: attribute(model, question, "occlusion"))
    assert result.forwards == seq + 1
    assert tokens < 0.6 * seq * (seq + 1)


def test_a_model_that_keeps_no_keys_and_values_is_run_whole(tiny):
    linear = LinearCausalModel(tiny[1])
    question = ask(linear, tiny[1], PROMPT, target="a", foil="b")
    same(attribute(linear, question, "occlusion").scores, linear.known_scores(question), 1e-5)


@pytest.mark.parametrize(
    "options, texts",
    [("a b c", 1), ("a bcd bce", 1), ("bcd xyz q", 2), ("ab ba bcd", 2), ("abc de fgh", 3)],
)
def test_open_options_are_read_in_as_few_texts_as_hold_them(tiny, options, texts):
    question = read_question(tiny[1], PROMPT, options=options.split())
    assert question.undecided
    ids = question.input_ids[0].tolist()
    read, outputs = texts_and_outputs(question)
    assert len(read) == texts
    left = iter(outputs)
    for option in question.options:
        for place, token in enumerate(option.ids):
            output = next(left)
            before = read[output.text][: output.position + 1]
            assert (before, output.target) == (ids + list(option.ids[:place]), token)
            assert (output.foil, output.sign) == (-1, 1)
    assert next(left, None) is None
    with asking(tiny[0], [question], each=True) as asked:
        assert asked.values().shape == (1, len(outputs)) and asked.columns == len(ids)


def test_a_target_that_is_the_first_row_of_the_table_is_not_open(tiny):
    """Read without the model, so that what is open is found in the method's own pass."""
    model, tokenizer = tiny
    question = read_question(tokenizer, PROMPT, target_ids=[65, 0], foil="b")
    assert question.target == (65, 0)
    result = attribute(model, question, "gradient_x_input")
    expected = (by_hand.gradient(model, question) * embed_prompt(model, question)).sum(dim=-1)
    same(result.scores, expected[0], 1e-4)


def test_a_model_with_a_sliding_window_is_run_whole(tiny):
    model = toy("a sliding window", tiny[1])
    question = ask(model, tiny[1], LONG)
    seq = question.input_ids.shape[1]
    table = model.get_input_embeddings().weight
    rows = embed_prompt(model, question).repeat(seq, 1, 1)
    rows[range(seq), range(seq)] = table.mean(dim=0)
    with torch.no_grad():
        falls = by_hand.value(model, question) - by_hand.value(model, question, rows)
    same(attribute(model, question, "occlusion").scores, falls)
    with asking(model, [question]) as asked:
        found = torch.stack(attention_rows(asked))[:, 0, :, 0]  # [layers, heads, seq]
    model.set_attn_implementation("eager")
    maps = model(question.input_ids, output_attentions=True).attentions
    same(found, torch.stack(maps)[:, 0, :, -1], 1e-6)
    assert (found[..., : seq - 5] == 0).all()


# --- attention without maps --------------------------------------------------------------------


def test_the_last_rows_are_those_of_the_full_maps_and_none_is_formed():
    """2,000 tokens: the full maps of this model would be 64 MB each."""
    model, tokenizer = tiny_llama()
    question = replace(
        ask(model, tokenizer, PROMPT), input_ids=torch.arange(2000)[None] % len(tokenizer)
    )
    with tensor_sizes() as sizes, asking(model, [question]) as asked:
        rows = torch.stack(attention_rows(asked))[:, 0, :, 0]
    assert max(sizes) < 2000 * 2000
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(question.input_ids, output_attentions=True).attentions
    same(rows, torch.stack(maps)[:, 0, :, -1], 1e-5)


def test_frozen_freezes_and_thaws():
    model, _ = tiny_llama()
    model.requires_grad_(True)
    with frozen(model):
        assert not any(weight.requires_grad for weight in model.parameters())
    assert all(weight.requires_grad for weight in model.parameters())


def test_nothing_is_registered_for_a_call_and_an_error_leaves_nothing(tiny):
    model, question = tiny[0], ask(*tiny, PROMPT)

    def registered():
        return [dict(r._global_mapping) for r in (AttentionInterface, AttentionMaskInterface)]

    def fails(*args, **options):
        raise ZeroDivisionError

    before = registered()
    attribute(model, question, "attention_rollout")
    assert registered() == before
    with pytest.raises(ZeroDivisionError), attending(model, fails):
        model(question.input_ids)
    assert registered() == before and model.config._attn_implementation == "sdpa"


def test_a_model_that_refuses_another_attention_leaves_nothing_behind(tiny):
    class Stubborn:
        config = tiny[0].config

        def set_attn_implementation(self, name):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"), attending(Stubborn(), sdpa):
        pass
    attribute(tiny[0], ask(*tiny, PROMPT), "attention")
