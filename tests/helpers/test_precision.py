"""Half precision: who decides a tie, what overflows, and what this machine is slow at."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from toys import SHAPE
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from helpers import METHODS, InputError, ask, attribute, attribute_all, load_model, tiny_llama
from helpers.attribution.engine import working_precision
from helpers.machine import (
    SLOWER,
    SlowPrecision,
    linear_for,
    products_in_float32,
    slow_precision,
    slow_precision_of,
)
from helpers.questions import float32_logits, output_logits, read_question

HALF = [torch.bfloat16, torch.float16]
PROMPTS = [f"{a} {b}" for a in "abcdefghijklmnop" for b in ("of", "in", "is", "to", "at", "on")]
ROOT = Path(__file__).resolve().parents[2]


def halved(dtype=torch.bfloat16):
    model, tokenizer = tiny_llama()
    return model.to(dtype), tokenizer


def last_state(model, question):
    with torch.inference_mode():
        return model.model(question.input_ids, use_cache=False).last_hidden_state[0, -1]


# --- which of two equal tokens -----------------------------------------------------------------


def test_of_two_tokens_that_half_precision_rounds_alike_the_nearer_is_the_target():
    """Reports ask one by one and scores in batches: both find what exact arithmetic finds."""
    model, tokenizer = halved()
    questions = [read_question(tokenizer, prompt, model=model) for prompt in PROMPTS]
    states = torch.stack([last_state(model, question) for question in questions])
    logits = states.double() @ model.lm_head.weight.double().T  # [prompts, vocab]
    expected = logits.argmax(dim=1).tolist()
    rounded = F.linear(states, model.lm_head.weight)
    ties = (rounded == rounded.amax(dim=1, keepdim=True)).sum(dim=1) > 1
    assert ties.any()  # else nothing is tested
    assert [ask(model, tokenizer, prompt).target[0] for prompt in PROMPTS] == expected
    answers = [ask(model, tokenizer, prompt, answer=2).target[0] for prompt in PROMPTS]
    assert answers == expected
    together = attribute_all(model, questions, ["saliency"])
    assert [question.target[0] for question, _ in together] == expected


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_logits_in_float32_are_those_of_the_widened_matrix(dtype):
    model, tokenizer = halved(dtype)
    ids = ask(model, tokenizer, "Riga").input_ids
    bias = torch.linspace(-1, 1, len(model.lm_head.weight)).to(dtype)
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    with torch.inference_mode():
        states = model.model(ids, use_cache=False).last_hidden_state
        before = model(ids).logits
        with float32_logits(model):
            found = model(ids).logits
        assert torch.equal(model(ids).logits, before) and before.dtype == dtype
    expected = F.linear(states.double(), model.lm_head.weight.double(), bias.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    weight = model.lm_head.weight.repeat(20, 1)  # several portions
    torch.testing.assert_close(
        output_logits(states, weight, None), F.linear(states.float(), weight.float())
    )


def test_a_model_in_float32_is_left_as_it_is(tiny):
    ids = ask(*tiny, "Riga").input_ids
    with torch.inference_mode(), float32_logits(tiny[0]):
        assert not tiny[0].lm_head._forward_hooks
        assert torch.equal(tiny[0](ids).logits, tiny[0].lm_head(tiny[0].model(ids)[0]))


def test_a_batch_that_rounds_another_way_does_not_choose_another_target():
    """The last norm of a batch is off by what was measured on real ones; alone it is not."""
    model, tokenizer = halved()
    with torch.inference_mode():
        questions = [read_question(tokenizer, prompt, model=model) for prompt in PROMPTS]

    def jitter(module, args, out):
        if len(out) == 1:
            return out
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        return out + 0.02 * noise.to(out.dtype)

    expected = [ask(model, tokenizer, prompt).target for prompt in PROMPTS]
    model.model.norm.register_forward_hook(jitter)
    found = [question.target for question, _ in attribute_all(model, questions, ["saliency"])]
    with torch.inference_mode(), float32_logits(model):
        ids = torch.cat([question.input_ids for question in questions])
        moved = model(ids, use_cache=False).logits[:, -1].argmax(dim=1).tolist()
    assert moved != [target[0] for target in expected]  # else nothing is tested
    assert found == expected


def test_products_in_half_precision_do_not_choose_another_target(tiny):
    model, tokenizer = tiny
    questions = [read_question(tokenizer, prompt, model=model) for prompt in PROMPTS]
    expected = [ask(model, tokenizer, prompt).target for prompt in PROMPTS]
    with working_precision(model, "bfloat16"):
        moved = [ask(model, tokenizer, prompt).target for prompt in PROMPTS]
    assert moved != expected  # else nothing is tested
    found = attribute_all(model, questions, ["saliency"], precision="bfloat16")
    assert [question.target for question, _ in found] == expected


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_foil_that_is_the_models_own_answer_comes_back_open(dtype):
    model, tokenizer = halved(dtype)
    own = ask(model, tokenizer, "ab").target
    questions = [
        read_question(tokenizer, "ab", model=model, foil_ids=own),
        read_question(tokenizer, "cd", model=model),
    ]
    (one, nothing), (other, results) = attribute_all(model, questions, ["saliency"])
    assert one.target is None and nothing == {}
    assert other.target == ask(model, tokenizer, "cd").target and set(results) == {"saliency"}


# --- numbers that are not finite ---------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_overflows_in_float16_is_an_error_and_never_a_score(method):
    model, tokenizer = overflowing()
    exact = attribute(model, ask(model, tokenizer, "Riga", target="a"), method)
    assert exact.scores.isfinite().all()
    model = model.to(torch.float16)
    question = ask(model, tokenizer, "Riga", target="a")
    with pytest.raises(InputError, match=f"{method} (are not finite.* float32|cannot run)"):
        attribute(model, question, method)
    with pytest.raises(InputError, match=r"not finite|cannot run"):
        list(attribute_all(model, [read_question(tokenizer, "ab", model=model)], [method]))


def overflowing():
    """A toy whose residual stream goes beyond 65,504, float16's largest number."""
    model, tokenizer = tiny_llama()
    model.model.layers[0].mlp.down_proj.weight.mul_(1e6).clamp_(-6e4, 6e4)
    return model, tokenizer


@pytest.mark.thorough
def test_scores_without_notebooks_have_an_error_row_and_the_command_ends_with_1(command, tmp_path):
    import pandas as pd

    for part in overflowing():
        part.save_pretrained(tmp_path / "large")
    (tmp_path / "prompts.yml").write_text("- ab\n- cd\n", encoding="utf-8")
    given = [tmp_path / "prompts.yml", "--scores-only"]
    given += ["--model", tmp_path / "large", "--method", "saliency"]
    for dtype, status, errors in (("float16", 1, 2), ("float32", 0, 0)):
        out = tmp_path / dtype
        done = command(*given, "--out", out, "--dtype", dtype)
        assert done.exit_code == status, done.stderr
        rows = pd.read_parquet(out / "prompts")
        assert rows["error"].notna().sum() == errors
        assert rows["error"].dropna().str.contains("not finite").all()
        assert (out / "scores").exists() == (not errors)


# --- quantised weights -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_folder(tiny, tmp_path_factory):
    """A toy as wide as the blocks of 64 weights that 4 bits come in."""
    config = LlamaConfig(
        **SHAPE | {"hidden_size": 128, "intermediate_size": 256, "vocab_size": len(tiny[1])}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("models") / "wide"
    for part in (model, tiny[1]):
        part.save_pretrained(folder)
    return folder


def quantised(folder, bits):
    """A toy with quantised weights, and its layers of 4 bits."""
    modules = pytest.importorskip("bitsandbytes.nn")
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )
    layers = [module for module in loaded.modules() if type(module) is modules.Linear4bit]
    return loaded.requires_grad_(False).eval(), layers


GRADIENT = ["saliency", "gradient_x_input", "integrated_gradients"]


@pytest.mark.parametrize("method", GRADIENT)
def test_a_kernel_without_a_gradient_is_refused_and_not_believed(wide_folder, tiny, method):
    model, layers = quantised(wide_folder, 4)
    if not layers[0].support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs 4 bits on processors with AVX512-BF16 only")
    question = ask(model, tiny[1], "the keys")  # packs the weights
    with pytest.raises(InputError, match=r"No gradient comes back .* train\(\) on its quantised"):
        attribute(model, question, method)
    with pytest.raises(InputError, match="No gradient comes back"):
        list(attribute_all(model, [question], [method]))
    assert attribute(model, question, "occlusion").scores.isfinite().all()
    model, layers = quantised(wide_folder, 4)
    for layer in layers:
        layer.train()
    unpacked = attribute(model, question, method).scores
    expected = attribute(widened(model, wide_folder), question, method).scores
    assert (unpacked - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("method", GRADIENT[:2])
def test_the_gradient_through_8_bits_is_near_that_of_the_weights(wide_folder, tiny, method):
    model, _ = quantised(wide_folder, 8)
    question = ask(model, tiny[1], "the keys")
    scores = attribute(model, question, method).scores
    expected = attribute(widened(model, wide_folder), question, method).scores
    assert (scores - expected).abs().max() < 0.5 * expected.abs().max()  # activations are rounded


def widened(model, folder):
    """A toy in float32 with the weights that a quantised one stands for."""
    exact, _ = load_model(str(folder))
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            from bitsandbytes.functional import dequantize_4bit

            exact.get_submodule(name).weight.data = dequantize_4bit(module.weight.data, state)
        elif hasattr(getattr(module, "weight", None), "SCB"):
            weight, scale = module.weight.data, module.state.SCB
            scale = module.weight.SCB if scale is None else scale
            exact.get_submodule(name).weight.data = weight.float() * scale[:, None] / 127
    return exact


# --- what this machine is slow at --------------------------------------------------------------

SLOWED = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
LOAD = "from helpers import load_model; load_model(dtype='bfloat16'); print('loaded')"


THRICE = """
import torch
from helpers import machine
for _ in range(3):
    machine._times_float32.cache_clear()
    print(machine.slow_precision(torch.bfloat16, 576), torch.get_num_threads())
"""


def python(code, **environment):
    command = [sys.executable, "-P", "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="slows an x86 processor of Linux down")
def test_a_machine_that_is_slow_at_bfloat16_is_told_once_and_on_stderr():
    done = python(LOAD, **SLOWED)
    assert done.stdout == "loaded\n"
    assert done.stderr.count("SlowPrecision: bfloat16 takes about") == 1
    times = float(done.stderr.partition("about ")[2].partition(" times as long")[0])
    assert SLOWER <= times < 100


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="slows an x86 processor of Linux down")
def test_other_work_on_the_cores_hides_no_slow_precision():
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        found = python(THRICE, **SLOWED, OMP_NUM_THREADS="2").stdout.splitlines()
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert len(found) == 3 and all(one.startswith("bfloat16 takes about") for one in found), found
    assert all(one.endswith(" 2") for one in found), "torch's threads are not as they were"


CPU = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""


@pytest.mark.skipif(
    not ("avx512_bf16" in CPU and torch.backends.cpu.get_cpu_capability() == "AVX512"),
    reason="this processor, or what of it torch may use, has no instructions for bfloat16",
)
def test_a_machine_with_instructions_for_bfloat16_is_told_nothing():
    assert python(LOAD).stderr == ""


@pytest.mark.thorough
def test_the_command_says_it_before_the_work_starts_and_once(
    command, tiny_folder, tmp_path, monkeypatch
):
    """What of it a slow processor says, and where, is told by processes of their own above."""
    monkeypatch.setattr("helpers.machine._times_float32", lambda *shape: 6.04)
    (tmp_path / "prompts.yml").write_text("- ab\n", encoding="utf-8")
    given = [str(tmp_path / "prompts.yml"), "--dry-run", "--model", str(tiny_folder)]
    done = command(*given, "--dtype", "bfloat16")
    assert done.exit_code == 0 and done.stderr.count("Note: bfloat16 takes about 6 times") == 1
    done = command(*given)
    assert done.exit_code == 0 and done.stderr == ""  # float32: nothing measured, nothing said


def test_float32_is_never_called_slow_and_a_model_is_asked_for_its_own(tiny, monkeypatch):
    monkeypatch.setattr("helpers.machine._times_float32", lambda *shape: 6.04)
    assert slow_precision(torch.float32, 576) is None and slow_precision_of(tiny[0]) is None
    sentence = slow_precision_of(halved()[0])
    assert sentence.startswith("bfloat16 takes about 6 times as long as float32")
    assert sentence.count(". ") == 1 and sentence.endswith(".")
    with pytest.warns(SlowPrecision, match="about 6 times"):
        attribute(tiny[0], ask(*tiny, "ab"), "saliency", precision="bfloat16")
    monkeypatch.setattr("helpers.machine._times_float32", lambda *shape: 1.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert slow_precision_of(halved()[0]) is None
        attribute(tiny[0], ask(*tiny, "ab"), "saliency", precision="bfloat16")


def test_loading_in_half_precision_warns_where_it_is_slow(tiny_folder, monkeypatch):
    monkeypatch.setattr("helpers.machine._times_float32", lambda *shape: 3.2)
    with pytest.warns(SlowPrecision, match="float16 takes about 3.2 times"):
        load_model(str(tiny_folder), dtype="float16")


# --- products in float32, where half precision is emulated -------------------------------------


@pytest.fixture
def emulates(monkeypatch):
    """A machine on which half precision is slow."""
    monkeypatch.setattr("helpers.machine._times_float32", lambda *shape: 6.0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_product_is_that_of_exact_arithmetic_rounded_once(dtype, bias, emulates):
    torch.manual_seed(0)
    rows = torch.randn(2, 5, 64).to(dtype).requires_grad_()
    weight, added = torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype) if bias else None
    ours = linear_for(weight.dtype, 64)(rows, weight, added)
    exact = rows.double() @ weight.double().T + (added.double() if bias else 0)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), exact, rtol=step, atol=1e-5)
    back = torch.randn_like(ours)
    (gradient,) = torch.autograd.grad(ours, rows, back)
    assert ours.dtype == gradient.dtype == dtype
    exact = back.double() @ weight.double()
    torch.testing.assert_close(gradient.double(), exact, rtol=step, atol=1e-5)


def test_for_the_way_back_no_weight_is_held_in_float32(emulates):
    kept, weight = [], torch.ones(48, 64, dtype=torch.bfloat16)
    rows = torch.ones(3, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_for(weight.dtype, 64)(rows, weight)
    assert [(one.shape, one.dtype) for one in kept] == [(weight.shape, weight.dtype)]


def in_float32(model):
    return [name for name, part in model.named_modules() if "forward" in vars(part)]


def test_every_layers_products_are_in_float32_while_inside_and_then_as_they_were(emulates):
    model, _ = halved()
    linears = [name for name, part in model.named_modules() if type(part) is torch.nn.Linear]
    with products_in_float32(model):
        assert in_float32(model) == [name for name in linears if name != "lm_head"]
        with products_in_float32(model):  # as a question is completed while a method asks
            assert len(in_float32(model)) == len(linears) - 1
        assert len(in_float32(model)) == len(linears) - 1
    assert not in_float32(model)
    with pytest.raises(ZeroDivisionError), products_in_float32(model):
        1 / 0  # noqa: B018
    assert not in_float32(model)


def test_where_half_precision_is_fast_or_not_asked_for_nothing_changes(tiny, monkeypatch):
    monkeypatch.setattr("helpers.machine._times_float32", lambda *shape: 1.1)
    half = halved()[0]
    with products_in_float32(half), products_in_float32(tiny[0]):
        assert not in_float32(half) and not in_float32(tiny[0])
    assert linear_for(half.dtype, 64) is linear_for(tiny[0].dtype, 64) is F.linear


def test_a_weight_that_is_being_trained_keeps_its_gradient(emulates):
    model, _ = halved()
    part = model.model.layers[0].mlp.up_proj
    part.weight.requires_grad_(True)
    with products_in_float32(model):
        assert "forward" not in vars(part)
        part(torch.ones(2, part.in_features, dtype=torch.bfloat16)).sum().backward()
    assert part.weight.grad is not None


def test_what_is_offloaded_is_left_to_the_hooks_that_fetch_it(emulates):
    model, _ = halved()
    part = model.model.layers[0].mlp.up_proj
    part.forward = fetches = lambda rows: F.linear(rows, part.weight)  # as accelerate's do
    with products_in_float32(model):
        assert part.forward is fetches
        assert "forward" in vars(model.model.layers[0].mlp.down_proj)
    assert part.forward is fetches


@pytest.mark.parametrize("name", METHODS)
def test_scores_are_the_same_but_for_rounding_whoever_multiplies(name, monkeypatch):
    """float16 rounds to 11 digits, so that the two ways to add up are near each other."""
    model, tokenizer = halved(torch.float16)
    found = []
    for times in (1.0, 6.0):
        monkeypatch.setattr("helpers.machine._times_float32", lambda *shape, times=times: times)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowPrecision)
            found.append(attribute(model, ask(model, tokenizer, "a b of c"), name).scores)
        assert not in_float32(model)
    most = found[0].abs().max()
    assert (found[0] - found[1]).abs().max() <= 0.05 * most


def test_precision_of_a_method_is_got_around_too(tiny, emulates, monkeypatch):
    """``precision="bfloat16"`` casts weights, whose products are then those that are slow."""
    seen = []
    product = linear_for(torch.bfloat16, 64)
    monkeypatch.setattr(
        "helpers.machine._linear_in_float32",
        lambda rows, weight, bias=None: seen.append(weight.dtype) or product(rows, weight, bias),
    )
    with pytest.warns(SlowPrecision):
        attribute(tiny[0], ask(*tiny, "ab"), "saliency", precision="bfloat16")
    layers = len(tiny[0].model.layers)
    assert seen and set(seen) == {torch.bfloat16} and len(seen) % (7 * layers) == 0
