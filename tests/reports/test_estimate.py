"""Estimates: operations counted by hand and by torch, and what a plan takes; no clock is read."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import ask, attribute
from helpers.attribution import METHODS
from helpers.attribution.engine import frozen, objective
from helpers.faithfulness import against_random
from llama_reports.estimate import (
    ENOUGH,
    START,
    Machine,
    Shape,
    Work,
    affordable,
    answer,
    estimate,
    forward,
    gradient,
    measure,
    method_work,
    model_shape,
    report_work,
    scores_work,
)
from llama_reports.estimate import _erasure as erasure
from llama_reports.jobs import plan

MACHINE = Machine(flops=1e9, bandwidth=1e9, overhead=1e-4)


@pytest.fixture
def shape(tiny_folder):
    return model_shape(str(tiny_folder))


@pytest.fixture
def planned(tiny_folder, tmp_path):
    """A function: the plan of these prompts, for the toy model."""

    def planned(*prompts, **options):
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n".join(map(json.dumps, prompts)), encoding="utf-8")
        return plan(path, model=str(tiny_folder), **options)

    return planned


# --- operations --------------------------------------------------------------------------------


def test_operations_of_the_toy_counted_by_hand(shape):
    assert shape == Shape(2, 32, 64, 4, 2, 8, 259)
    q, k, v, o = 32 * 32, 32 * 16, 32 * 16, 32 * 32
    gate, up, down = 32 * 64, 32 * 64, 64 * 32
    linear = 2 * 3 * (q + k + v + o + gate + up + down)  # three tokens
    attention = 2 * 2 * 32 * (1 + 2 + 3)  # two products, four heads of eight, what each one sees
    assert forward(shape, 1, 3) == Work(2 * (linear + attention), forwards=1)
    assert gradient(shape, 1, 3) == Work(2 * (2 * linear + 3 * attention), gradients=1)
    one = linear / 3 + 2 * 2 * 32 * 3
    assert forward(shape, 5, 3, first=2).flops == 5 * 2 * one
    assert answer(shape, 4).flops == 4 * 2 * 32 * 259


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_operations_of_a_pass_are_those_that_torch_counts(tiny, shape):
    model, tokenizer = tiny
    question = ask(model, tokenizer, "Seventeen tokens.", target="a")
    rows = torch.randn(5, 17, 32)
    found = model.config._attn_implementation
    model.set_attn_implementation("eager")  # whose products are there to be counted
    try:
        with torch.no_grad():
            passes = counted(lambda: objective(model, rows, question))
        with frozen(model):
            rows.requires_grad_(True)  # backward(), since the counter cannot follow autograd.grad
            both = counted(lambda: objective(model, rows, question).sum().backward())
    finally:
        model.set_attn_implementation(found)
    unseen = 5 * 2 * 4 * 32 * (17 * 17 - 17 * 18 // 2)  # eager computes what no token sees, too
    head = answer(shape, 5).flops
    assert passes == forward(shape, 5, 17).flops + unseen + head
    assert both == gradient(shape, 5, 17).flops + 3 * unseen + 2 * head


@pytest.mark.parametrize(
    "method, length",
    [("attention", 9), ("occlusion", 9), ("occlusion", 40), ("shapley", 4), ("shapley", 30)],
)
def test_operations_of_a_method_are_about_those_that_torch_counts(tiny, shape, method, length):
    model, tokenizer = tiny
    question = ask(model, tokenizer, "a" * length, target="b")
    orders = 2 * max(2, min(10, affordable(length) // 8 // length))
    options = {"permutations": orders} if method == "shapley" else {}
    real = counted(lambda: attribute(model, question, method, **options))
    # the last of the toy's two layers is cut short, which a real model hardly notices
    assert 0.5 < real / method_work(shape, length, method).flops < 1.3


@pytest.mark.parametrize("length", [4, 12, 30])
def test_operations_of_the_erasure_test_are_about_those_that_torch_counts(tiny, shape, length):
    model, tokenizer = tiny
    question = ask(model, tokenizer, "x" + "ab" * length, target="b")
    seq = 1 + 2 * length
    results = {name: attribute(model, question, "random", seed=i) for i, name in enumerate("abc")}
    count, steps = (20 if seq <= 12 else 10), min(seq, max(2, 330 // seq))
    real = counted(lambda: against_random(model, question, results, count=count, steps=steps))
    assert 0.7 < real / erasure(shape, seq, 3).flops < 1.3


def test_every_method_has_a_cost_and_only_the_control_has_none(shape):
    for name in METHODS:
        short, long = (method_work(shape, seq, name).flops for seq in (10, 100))
        assert (short == long == 0) if name == "random" else 0 < short < long


def test_together_is_never_more_than_one_by_one(shape):
    methods = {"relevance", "saliency", "gradient_x_input", "occlusion"}
    alone = sum(MACHINE.seconds(scores_work(shape, 1, 9, methods), shape) for _ in range(50))
    assert MACHINE.seconds(scores_work(shape, 50, 9, methods), shape) < alone / 2
    assert scores_work(shape, 1, 9, {"saliency"}) == scores_work(
        shape, 1, 9, {"saliency", "gradient_x_input"}
    )


# --- plans -------------------------------------------------------------------------------------


def test_more_and_longer_prompts_take_more(planned):
    def of(*prompts, **options):
        return estimate(planned(*prompts), machine=MACHINE, **options)

    one, two, long = of("abc"), of("abc", "xyz"), of("abc" * 50)
    assert one.seconds < two.seconds and one.seconds < long.seconds
    assert one.memory == two.memory and one.disk < two.disk and one.disk < long.disk
    fewer = estimate(planned("abc", methods=["saliency"]), machine=MACHINE)
    assert fewer.seconds < one.seconds and fewer.memory < one.memory
    pair = of("abc", "xyz", workers=2)
    assert pair.seconds == pytest.approx(one.seconds) and pair.memory > two.memory
    assert of("abc", workers=8) == one  # one prompt keeps one worker busy


def test_a_machine_of_half_the_speed_takes_twice_the_time_of_the_model(shape):
    slow = Machine(MACHINE.flops / 2, MACHINE.bandwidth / 2, MACHINE.overhead * 2)
    work = report_work(shape, 9)
    assert slow.seconds(work, shape) == pytest.approx(2 * MACHINE.seconds(work, shape))


def test_scores_alone_take_less_than_reports(planned):
    jobs = planned(*[f"prompt {i:03}" for i in range(100)], folders=False)
    scores = estimate(jobs, machine=MACHINE, scores_only=True)
    assert 0 < scores.seconds < estimate(jobs, machine=MACHINE).seconds / 10
    assert scores.text.startswith("100 prompts would run:\n  prompt 000\n")  # without folders
    assert 0 < scores.disk < estimate(jobs, machine=MACHINE).disk / 100


def report(out, job, **facts):
    known = {"notebook": "08_comparison", "model": "tiny-llama", "tokens": job.tokens}
    known |= {"slug": job.slug, "question": job.question, "identity": job.identity, "error": None}
    (out / job.slug).mkdir(parents=True, exist_ok=True)
    (out / job.slug / "report.json").write_text(json.dumps(known | facts), encoding="utf-8")


def test_what_is_finished_takes_nothing(planned, tmp_path):
    out = tmp_path / "out"
    jobs = planned("abc", "xyz", out=out)
    for job in jobs:
        report(out, job, seconds=1.0)
    nothing = estimate(jobs, out)  # and measures nothing
    assert (nothing.to_run, nothing.finished) == (0, 2)
    assert nothing.seconds == nothing.memory == nothing.disk == 0 and nothing.first == []
    assert nothing.text == "0 reports would run.\n2 finished before: not run again."
    assert estimate(jobs, out, machine=MACHINE, done=lambda job: False).to_run == 2


def test_what_reports_took_corrects_the_estimate(planned, tmp_path):
    out = tmp_path / "out"
    jobs = planned(*[f"number {i}" for i in range(ENOUGH + 1)])
    before = estimate(jobs, machine=MACHINE)
    each = (before.seconds - START) / len(jobs)
    *some, last = jobs
    for job in some:
        report(out, job, seconds=3 * each)
    after = estimate(jobs, out, machine=MACHINE)
    assert after.first == [last.slug] and f"{ENOUGH} reports" in after.basis
    assert after.seconds - START == pytest.approx(3 * each)
    for changed in ({"model": "other"}, {"notebook": "other"}, {"error": "x"}, {"tokens": None}):
        report(out, some[0], seconds=3 * each, **changed)
        assert "by what" not in estimate(jobs, out, machine=MACHINE).basis


def test_the_text_names_ten_and_counts_the_rest(planned):
    jobs = planned(*[f"number {i}" for i in range(201)])
    text = estimate(jobs, machine=MACHINE, workers=2).text
    assert text.startswith("201 reports would run:\n  number-0\n") and "  number-9\n" in text
    assert "number-10" not in text and "… and 191 more" in text
    assert "with 2 workers" in text and "GFLOP/s" in text and "of memory" in text
    assert "replaced" not in text and "before" not in text


def test_another_notebook_says_how_it_was_counted(planned):
    assert (
        "09_relevance is counted as 08_comparison"
        in estimate(planned("abc", notebook="09_relevance"), machine=MACHINE).text
    )


def test_this_machine_is_measured_and_torch_left_as_it_was(shape):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    machine = measure(shape, threads=1)
    assert min(machine.flops, machine.bandwidth, machine.overhead) > 0
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_memory_counts_weights_once_a_worker(planned, tiny_folder):
    weights = sum(f.stat().st_size for f in Path(tiny_folder).glob("*.safetensors"))
    one, two = (estimate(planned("ab", "cd"), machine=MACHINE, workers=n).memory for n in (1, 2))
    half = estimate(planned("ab", "cd", dtype="bfloat16"), machine=MACHINE).memory
    assert two - one > weights and one - half == pytest.approx(weights / 2, rel=0.1)
