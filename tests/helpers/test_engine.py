"""The machine under the methods: the same numbers however rows are run, and no needless work."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from linear_model import LinearCausalModel
from llama3_rope import LLAMA3_ROPE
from watching import tensor_sizes

from helpers import METHODS, InputError, ask, attribute, tiny_llama
from helpers.attribution import (
    baseline_embeds,
    embed_prompt,
    last_attention_rows,
    objective,
    objective_gradient,
    replaced_values,
)
from helpers.attribution.engine import (
    answer_only,
    free_memory,
    frozen,
    gradient_bytes,
    in_batches,
    token_budget,
    working_precision,
)

PROMPT = "Riga is in"
LONG = "a long prompt " * 8
VARIANTS = {
    "plain": {},
    "one key-value head": {"key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
}

every_variant = pytest.mark.parametrize("variant", VARIANTS)
with_and_without_foil = pytest.mark.parametrize("foil", [None, "b"], ids=["no foil", "foil"])


def same(scores, expected, tolerance=1e-4):
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance)


# --- only what the answer needs ----------------------------------------------------------------


@every_variant
@with_and_without_foil
def test_the_smaller_model_has_the_objective_and_the_gradient_of_the_whole_one(variant, foil):
    model, tokenizer = tiny_llama(**VARIANTS[variant])
    question = ask(model, tokenizer, PROMPT, foil=foil)
    embeds = torch.cat([embed_prompt(model, question), baseline_embeds(model, question)])
    values = objective(model, embeds, question)
    grads = objective_gradient(model, embeds, question)
    with answer_only(model, question) as answer:
        same(objective(model, embeds, answer), values, 1e-5)
        same(objective_gradient(model, embeds, answer), grads, 1e-5)
    same(objective(model, embeds, question), values, 0)


def test_an_output_layer_with_a_bias_keeps_it(tiny):
    model, tokenizer = tiny_llama()
    head = torch.nn.Linear(model.config.hidden_size, len(tokenizer))
    model.set_output_embeddings(head)
    question = ask(model, tokenizer, PROMPT, foil="b")
    value = objective(model, embed_prompt(model, question), question)
    with answer_only(model, question) as answer:
        same(objective(model, embed_prompt(model, question), answer), value, 1e-5)
    assert model.get_output_embeddings() is head


def test_a_model_without_an_output_layer_is_left_as_it_is(tiny):
    linear = LinearCausalModel(tiny[1])
    question = ask(linear, tiny[1], PROMPT, target="a")
    with answer_only(linear, question) as answer:
        assert answer is question


def test_the_output_layer_comes_back_after_an_error(tiny):
    model, question = tiny[0], ask(*tiny, PROMPT)
    head = model.get_output_embeddings()
    with pytest.raises(ZeroDivisionError), answer_only(model, question):
        assert model.get_output_embeddings() is not head
        raise ZeroDivisionError
    assert model.get_output_embeddings() is head


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
question = ask(model, tokenizer, "one two three four five six seven eight " * 12)
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 700_000_000, resource.RLIM_INFINITY))
seen = []
def note(module, args, named):
    seen.append(len(named["inputs_embeds"]))
model.register_forward_pre_hook(note, with_kwargs=True)
result = attribute(model, question, "integrated_gradients", max_evaluations=33, tolerance=1e-9)
print(max(seen), min(seen), sum(seen), result.evaluations, bool(result.scores.isfinite().all()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, as Linux does")
def test_a_machine_that_runs_out_of_memory_halves_and_finishes():
    """The real thing: a process that may allocate 700 MB more than the model takes."""
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
from helpers.attribution import embed_prompt, objective_gradient
from helpers.attribution.engine import answer_only, gradient_bytes
def held(field):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(field))
model, tokenizer = load_model()
question = ask(model, tokenizer, "one two three four five six seven eight " * 64)
with answer_only(model, question) as answer:
    embeds = embed_prompt(model, question)
    objective_gradient(model, embeds[:, :8], answer)
    open("/proc/self/clear_refs", "w").write("5")
    before = held("VmRSS")
    objective_gradient(model, embeds, answer)
print((held("VmHWM") - before) / embeds.shape[1] / gradient_bytes(model))
"""


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
@with_and_without_foil
def test_replaced_tokens_give_the_objective_of_the_whole_variant(variant, foil, monkeypatch):
    model, tokenizer = tiny_llama(**VARIANTS[variant])
    question = ask(model, tokenizer, LONG, foil=foil)
    seq = question.input_ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    replaced = torch.rand(9, seq, generator=generator) < torch.linspace(0, 1, 9)[:, None]
    replaced[:, : seq // 2] &= torch.rand(9, 1, generator=generator) < 0.5
    monkeypatch.setattr("helpers.attribution.perturbation.FULL_PASS", 2 * seq)  # several groups
    whole, values = replaced_values(model, question, replaced, "eos")
    embeds, blank = embed_prompt(model, question), baseline_embeds(model, question, "eos")
    rows = torch.where(replaced[..., None], blank, embeds)
    same(values, objective(model, rows, question), 1e-5)
    same(whole, objective(model, embeds, question), 1e-5)
    assert not replaced[0].any() and replaced[-1, seq // 2 :].all()  # both ends are among them


def test_what_comes_before_the_first_change_is_computed_once(tiny):
    model, question = tiny[0], ask(*tiny, LONG * 3)
    seq = question.input_ids.shape[1]
    result, tokens = tokens_run(model, lambda: attribute(model, question, "occlusion"))
    assert result.forwards == seq + 1
    assert tokens < 0.6 * seq * (seq + 1)


def test_a_model_that_keeps_no_keys_and_values_is_run_whole(tiny):
    linear = LinearCausalModel(tiny[1])
    question = ask(linear, tiny[1], PROMPT, target="a")
    same(attribute(linear, question, "occlusion").scores, linear.known_scores(question), 1e-5)


def test_a_model_with_a_sliding_window_is_run_whole(tiny):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tiny[1]),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        eos_token_id=0,
    )
    model = MistralForCausalLM(config).eval()
    question = ask(model, tiny[1], LONG)
    seq = question.input_ids.shape[1]
    replaced = torch.eye(seq, dtype=torch.bool)
    _, values = replaced_values(model, question, replaced)
    rows = torch.where(
        replaced[..., None], baseline_embeds(model, question), embed_prompt(model, question)
    )
    with torch.no_grad():
        same(values, objective(model, rows, question), 1e-5)
    rows = last_attention_rows(model, question)
    model.set_attn_implementation("eager")
    maps = model(question.input_ids, output_attentions=True).attentions
    same(rows, torch.stack(maps)[:, 0, :, -1], 1e-6)
    assert (rows[..., : seq - 5] == 0).all()


# --- attention without maps --------------------------------------------------------------------


def test_the_last_rows_are_those_of_the_full_maps_and_none_is_formed():
    """2,000 tokens: the full maps of this model would be 64 MB each."""
    model, tokenizer = tiny_llama()
    question = replace(
        ask(model, tokenizer, PROMPT), input_ids=torch.arange(2000)[None] % len(tokenizer)
    )
    with tensor_sizes() as sizes:
        rows = last_attention_rows(model, question)
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
