"""Estimates: operations counted by hand and by torch, and what a plan takes; no clock is read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import InputError, ask, attribute
from helpers.attribution import BUDGET, METHODS, Method, Price
from helpers.attribution.engine import frozen
from helpers.faithfulness import against_random
from llama_reports.estimate import (
    ENOUGH,
    START,
    Machine,
    Shape,
    Size,
    estimate,
    forward,
    gradient,
    measure,
    methods_work,
    model_shape,
    priced,
    report_work,
    work,
)
from llama_reports.jobs import plan

MACHINE = Machine(flops=1e9, bandwidth=1e9, overhead=1e-4, near=1e8, far=1e8)


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
    assert shape.feed_forward == 64
    q, k, v, o = 32 * 32, 32 * 16, 32 * 16, 32 * 32
    gate, up, down = 32 * 64, 32 * 64, 64 * 32
    linear = 2 * 3 * (q + k + v + o + gate + up + down)  # three tokens
    attention = 2 * 2 * 32 * (1 + 2 + 3)  # two products, four heads of eight, what each one sees
    head = 2 * 32 * 259
    assert list(forward(shape, 1, 3)) == list(work(2 * (linear + attention) + head, forwards=1))
    back = 2 * (2 * linear + 3 * attention) + 2 * head
    assert list(gradient(shape, 1, 3)) == list(work(back, gradients=1))
    one = 2 * (linear / 3 + 2 * 2 * 32 * 3)
    assert forward(shape, 5, 3, first=2)[0] == 5 * (one + head)
    assert forward(shape, 5, 3, first=2, outputs=4)[0] == 5 * (one + 4 * head)
    assert forward(shape, 5, 3, at_once=6)[1] == 3  # two rows of three tokens a pass


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_operations_of_a_pass_are_those_that_torch_counts(tiny, shape):
    model, _ = tiny
    rows = torch.randn(5, 17, 32)

    def logits():
        return model(inputs_embeds=rows, use_cache=False, logits_to_keep=1).logits

    found = model.config._attn_implementation
    model.set_attn_implementation("eager")  # whose products are there to be counted
    try:
        with torch.no_grad():
            passes = counted(logits)
        with frozen(model):
            rows.requires_grad_(True)  # backward(), since the counter cannot follow autograd.grad
            both = counted(lambda: logits().sum().backward())
    finally:
        model.set_attn_implementation(found)
    unseen = 5 * 2 * 4 * 32 * (17 * 17 - 17 * 18 // 2)  # eager computes what no token sees, too
    assert passes == forward(shape, 5, 17)[0] + unseen
    assert both == gradient(shape, 5, 17)[0] + 3 * unseen


@pytest.mark.parametrize("length", [4, 9, 40])
@pytest.mark.parametrize("method", ["attention", "attention_rollout", "occlusion", "shapley"])
def test_operations_of_a_method_are_about_those_that_torch_counts(tiny, shape, method, length):
    model, tokenizer = tiny
    question = ask(model, tokenizer, "a" * length, target="b")
    real = counted(lambda: attribute(model, question, method, budget=BUDGET))
    # the last of the toy's two layers is cut short, which a real model hardly notices
    assert 0.5 < real / methods_work(shape, Size(length, length), [method])[0] < 1.3


@pytest.mark.parametrize("length", [4, 9, 40, 150])
def test_rows_of_every_method_are_about_those_that_are_run(tiny, length):
    model, tokenizer = tiny
    question = ask(model, tokenizer, "ab" * (length // 2) + "c" * (length % 2), target="b")
    for name, method in METHODS.items():
        options = method.options(length, length, BUDGET)
        if options is None:
            with pytest.raises(InputError, match="budget"):
                attribute(model, question, name, budget=BUDGET)
            continue
        price = method.price(length, length, options)
        result = attribute(model, question, name, budget=BUDGET)
        if name == "integrated_gradients":  # how many it takes is known only afterwards
            assert result.evaluations <= options["max_evaluations"] >= price.gradients
            continue
        assert result.evaluations == price.gradients
        assert 0.75 * price.forwards <= result.forwards <= price.forwards


def test_units_and_outputs_are_priced(shape):
    tokens, words = (methods_work(shape, Size(60, n), ["occlusion"])[0] for n in (60, 12))
    assert 3 < tokens / words < 6
    one, many = (methods_work(shape, Size(60, 60, n), ["relevance"])[0] for n in (1, 40))
    assert many > 1.5 * one


@pytest.mark.parametrize("length", [4, 12, 30, 75])
def test_operations_of_the_erasure_test_are_about_those_that_torch_counts(tiny, shape, length):
    model, tokenizer = tiny
    question = ask(model, tokenizer, "x" + "ab" * length, target="b")
    seq = 1 + 2 * length
    results = {name: attribute(model, question, "random", seed=i) for i, name in enumerate("abc")}
    count, steps = (20 if seq <= 12 else 10), min(seq, max(2, 330 // seq))
    real = counted(lambda: against_random(model, question, results, count=count, steps=steps))
    size, keys = Size(seq, seq), 2 * 32 * 32  # of the last layer all positions have no more
    cut = replace(shape, layers=1 + keys / shape.layer_weights)
    own = report_work(cut, size, ["random"] * 3) - priced(cut, Price(forwards=6), size)
    own -= 2 * methods_work(cut, size, ["occlusion"])
    assert 0.7 < real / own[0] < 1.3


def test_every_method_has_a_cost_and_only_the_control_has_none(shape):
    for name in METHODS:
        short, long = (methods_work(shape, Size(seq, seq), [name])[0] for seq in (10, 80))
        assert (short == long == 0) if name == "random" else 0 < short < long


def test_a_method_of_another_package_costs_what_its_record_says(shape, monkeypatch):
    def options(units, tokens, budget):
        return {"rows": budget // tokens} if units < 100 else None

    record = Method("theirs", None, lambda u, t, o: Price(forwards=o["rows"]), options=options)
    monkeypatch.setitem(METHODS._found, "theirs", record)
    found = methods_work(shape, Size(50, 50), ["theirs"])
    assert list(found) == list(forward(shape, BUDGET // 50, 50))
    assert not methods_work(shape, Size(100, 100), ["theirs"]).any()
    assert (report_work(shape, Size(50, 50))[0] - found[0]) > 0


def test_together_is_never_more_than_one_by_one(shape):
    methods, size = {"relevance", "saliency", "gradient_x_input"}, Size(9, 9)
    alone = sum(MACHINE.seconds(methods_work(shape, size, methods), shape) for _ in range(50))
    assert MACHINE.seconds(methods_work(shape, size, methods, 50), shape) < alone / 2
    methods.add("occlusion")  # of which a prompt's own variants fill a pass
    alone = sum(MACHINE.seconds(methods_work(shape, size, methods), shape) for _ in range(50))
    assert MACHINE.seconds(methods_work(shape, size, methods, 50), shape) < alone
    one, both, three = (
        methods_work(shape, size, some)[0]
        for some in (
            {"saliency"},
            {"saliency", "gradient_x_input"},
            {"saliency", "gradient_x_input", "relevance"},
        )
    )
    assert one == both and three == 1.5 * one


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
    rates = (MACHINE.flops, MACHINE.bandwidth, 1 / MACHINE.overhead, MACHINE.near, MACHINE.far)
    flops, bandwidth, layers, near, far = (rate / 2 for rate in rates)
    slow = Machine(flops, bandwidth, 1 / layers, near, far)
    asked = report_work(shape, Size(9, 9))
    assert slow.seconds(asked, shape) == pytest.approx(2 * MACHINE.seconds(asked, shape))


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
    assert min(machine.flops, machine.bandwidth, machine.overhead, machine.near, machine.far) > 0
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_memory_counts_weights_once_a_worker(planned, tiny_folder):
    weights = sum(f.stat().st_size for f in Path(tiny_folder).glob("*.safetensors"))
    one, two = (estimate(planned("ab", "cd"), machine=MACHINE, workers=n).memory for n in (1, 2))
    half = estimate(planned("ab", "cd", dtype="bfloat16"), machine=MACHINE).memory
    assert two - one > weights and one - half == pytest.approx(weights / 2, rel=0.1)
