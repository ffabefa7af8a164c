"""Estimates: operations counted by hand and by torch, and what a plan takes; no clock is read."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toys import GROUPED, OTHERS, toy
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from watching import rows_run, tensor_sizes

from helpers import InputError, ask, attribute, load_model
from helpers.attribution import BUDGET, METHODS, Method, Price
from helpers.attribution.engine import frozen
from helpers.faithfulness import against_random
from helpers.models import BUNDLED
from helpers.summary import REPORTED, STRONGEST
from llama_reports.costs import (
    MARGIN,
    PARTS,
    Machine,
    Size,
    forward,
    gradient,
    measure,
    methods_work,
    model_shape,
    needs,
    priced,
    work,
)
from llama_reports.estimate import (
    ENOUGH,
    HOUR,
    PROCESS,
    START,
    divided,
    estimate,
    long_run,
    refuse_what_does_not_fit,
    report_work,
    spread,
)
from llama_reports.jobs import plan

PLANNER = Path(__file__).parents[2] / "benchmarks" / "planner.py"

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
    sizes = (shape.layers, shape.width, shape.heads, shape.key_value_heads, shape.head_dim)
    assert (*sizes, shape.feed_forward, shape.vocabulary) == (2, 32, 4, 2, 8, 64, 259)
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


EXPERTS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"num_experts": 5, "head_dim": 16}),
}


@pytest.mark.parametrize("family", [*OTHERS, *EXPERTS])
def test_sizes_of_other_families_are_read_off_the_headers_of_their_files(tiny, tmp_path, family):
    """Whatever its matrices are called: as many numbers as there are, and torch's operations."""
    if family in OTHERS:
        model = toy(family, tiny[1])
    else:
        cls, config, more = EXPERTS[family]
        more |= {"num_experts_per_tok": 2, "vocab_size": len(tiny[1]), "pad_token_id": 0}
        model = cls(config(**(GROUPED | more))).eval()
    model.set_experts_implementation("eager")  # whose products are there to be counted
    model.save_pretrained(tmp_path)
    model.set_attn_implementation("eager")
    shape = model_shape(tmp_path)
    assert shape.parameters == model.num_parameters() and shape.mapped
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    table = model.get_input_embeddings().weight.numel()
    assert (shape.embeddings, shape.output_layer) == (table, 0 if tied else table)
    unseen = 2 * 4 * shape.heads * shape.head_dim * (17 * 17 - 17 * 18 // 2)
    with torch.no_grad():
        passes = counted(lambda: model(torch.arange(17)[None], use_cache=False, logits_to_keep=1))
    assert passes == forward(shape, 1, 17)[0] + unseen


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
    assert METHODS[method].refusal(model) is None  # the model is tried before it is counted
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


@pytest.mark.parametrize("method", ["occlusion", "shapley", "attention"])
def test_a_target_and_a_foil_of_several_tokens_are_two_texts(tiny, shape, planned, method):
    (entry,) = planned({"prompt": "a" * 12, "target": "bcd", "foil": "efg", "units": "tokens"})
    assert (entry.tokens, entry.units, entry.outputs, entry.texts) == (12, 12, 5, 2)
    size = Size(entry.tokens, entry.units, entry.outputs, entry.texts)
    assert size.length == 14
    question = ask(*tiny, entry.prompt, target="bcd", foil="efg")
    real = counted(lambda: attribute(tiny[0], question, method, budget=BUDGET))
    assert 0.5 < real / methods_work(shape, size, [method])[0] < 1.3
    (one,) = planned({"prompt": "a" * 12, "target": "b", "foil": "e"})
    (alone,) = planned({"prompt": "a" * 12, "target": "bcd"})
    assert (one.texts, one.outputs, alone.texts, alone.outputs) == (1, 1, 1, 3)


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
    beside = priced(cut, Price(forwards=2 + 2 * (STRONGEST + 1)), size)
    own = report_work(cut, size, ["random"] * 3) - beside
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
    assert (report_work(shape, Size(50, 50), METHODS)[0] - found[0]) > 0


@pytest.mark.parametrize("length", [9, 20, 40, 80])
def test_integrated_gradients_are_planned_with_what_a_report_gives_them(tiny, tiny_folder, length):
    model, tokenizer = tiny
    question = ask(model, tokenizer, "ab" * (length // 2) + "c" * (length % 2), target="b")
    name = "integrated_gradients"
    (alone,) = needs(tiny_folder, length, [name], machine=MACHINE).methods.values()
    assert alone.gradients == 300  # in the mean, of what the budget allows
    planned = needs(tiny_folder, length, machine=MACHINE).methods[name]
    options = {"tolerance": 1e-12, "budget": BUDGET, "beside": METHODS}
    spent = attribute(model, question, name, **options).evaluations
    assert planned.gradients - 2 < spent <= planned.gradients < 200
    real = model_shape(BUNDLED)
    path = needs(BUNDLED, length, REPORTED, machine=MACHINE).methods[name].seconds
    report = MACHINE.seconds(report_work(real, Size(length, length)), real)
    assert 0.15 < path / report <= 0.25


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

    one, two, long = of("abc"), of("abc", "xyz"), of("abc " * 50)
    assert one.seconds < two.seconds and one.seconds < long.seconds
    assert one.memory == two.memory and one.disk < two.disk and one.disk < long.disk
    fewer = estimate(planned("abc", methods=["saliency"]), machine=MACHINE)
    assert fewer.seconds < one.seconds and fewer.memory < one.memory
    pair = of("abc", "xyz", workers=2)
    assert pair.seconds == pytest.approx(one.seconds) and pair.memory > two.memory
    assert of("abc", workers=8) == one  # one prompt keeps one worker busy


def test_options_take_what_the_two_longest_of_them_take(planned):
    """Methods explain two, however many there are; ``texts`` and ``outputs`` are of these."""
    longest = {"prompt": "keys", "target": " bcdefg", "foil": " hijk"}
    options = [" l", " mn", " hijk", " bcdefg", " op", " qrs"]
    pair, undecided = planned(longest), planned({"prompt": "keys", "options": options})
    alike = planned({"prompt": "keys", "options": [" ab", " ac", " d"], "target": " d"})
    assert (pair.texts.tolist(), pair.outputs.tolist()) == ([2], [9])
    for plan_, (texts, outputs) in [(undecided, (2, 9)), (alike, (1, 2))]:
        assert (plan_.texts.tolist(), plan_.outputs.tolist()) == ([texts], [outputs])
    same, other = (estimate(some, machine=MACHINE) for some in (pair, undecided))
    assert (other.seconds, other.memory) == (same.seconds, same.memory)


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
    known = {"notebook": "report", "model": "tiny-llama", "tokens": job.tokens}
    known |= {
        "units": job.units,
        "slug": job.slug,
        "question": job.question,
        "identity": job.identity,
        "error": None,
    }
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


def test_a_run_ends_with_the_worker_that_ends_last(planned):
    one, three, four = (
        estimate(planned(*(f"number {i}" for i in range(count))), machine=MACHINE, workers=2)
        for count in (1, 3, 4)
    )
    assert three.seconds == pytest.approx(
        four.seconds
    )  # two workers, two reports one after another
    assert three.seconds - START == pytest.approx(2 * (one.seconds - START))


# --- a trial -----------------------------------------------------------------------------------


def test_a_trial_goes_from_the_shortest_to_the_longest_of_what_is_left(planned):
    jobs = planned(*["ab" * n for n in (9, 1, 5, 3, 7, 2, 8, 4, 6)])

    def lengths(count, done=None):
        return sorted(job.tokens // 2 for job in spread(jobs, count, done).values())

    assert lengths(1) == [5] and lengths(2) == [1, 9] and lengths(3) == [1, 5, 9]
    assert lengths(5) == [1, 3, 5, 7, 9] and lengths(100) == list(range(1, 10))
    assert lengths(2, lambda job: job.tokens in (2, 18)) == [2, 8]
    assert spread(jobs, 3, lambda job: True) == {}
    assert {jobs.tokens[index] for index in spread(jobs, 3)} == {2, 10, 18}


def test_the_estimate_is_fitted_to_what_was_tried_between_the_lengths(planned, tmp_path):
    out = tmp_path / "out"
    jobs = planned(*["ab" * n for n in (1, 10, 19, 20, 40)])
    tried = {index: job for index, job in enumerate(jobs) if job.tokens in (2, 40, 80)}
    (alone,) = (
        estimate(jobs, machine=MACHINE, done=lambda job, n=n: job.tokens != n).seconds - START
        for n in (20,)
    )
    for job, times in zip(tried.values(), (2, 3, 9), strict=True):
        done = lambda other, own=job.slug: other.slug != own  # noqa: E731
        planned_for_it = estimate(jobs, machine=MACHINE, done=done).seconds - START
        report(out, job, seconds=times * planned_for_it)
    left = estimate(jobs, out, machine=MACHINE, tried=tried, done=lambda job: job.tokens != 20)
    times = 2 + (20 - 2) / (40 - 2)  # between the two next to it
    assert left.seconds - START == pytest.approx(times * alone, rel=1e-4)
    assert "3 reports of 2 to 80 tokens took just now" in left.basis
    (one,) = [{index: job} for index, job in tried.items() if job.tokens == 40]
    left = estimate(jobs, out, machine=MACHINE, tried=one, done=lambda job: job.tokens != 20)
    assert left.seconds - START == pytest.approx(3 * alone, rel=1e-4)
    assert "1 report of 40 tokens took just now" in left.basis
    report(out, *one.values(), seconds=9.0, error="it failed")
    left = estimate(jobs, out, machine=MACHINE, tried=one, done=lambda job: job.tokens != 20)
    assert left.seconds - START == pytest.approx(alone) and "took" not in left.basis


def test_a_trial_without_a_dry_run_is_refused(command, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('"abc"', encoding="utf-8")
    done = command(tmp_path / "prompts.jsonl", "--try", 3, "--out", tmp_path / "out")
    assert done.exit_code == 2 and "add --dry-run" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_what_was_tried_is_not_run_again(command, tmp_path, tiny_folder, quick_notebook):
    prompts = [json.dumps("ab" * n) for n in (3, 9, 5)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts), encoding="utf-8")
    out = tmp_path / "out"
    given = [tmp_path / "prompts.jsonl", "--out", out, "--model", tiny_folder]
    given += ["--notebook", quick_notebook()]
    tried = command(*given, "--dry-run", "--try", 2)
    assert tried.exit_code == 0, tried.stderr
    assert "Tried: 2 prompts of 6 to 18 tokens" in tried.stdout
    assert "1 report would run:\n  ababababab\n2 finished before" in tried.stdout
    assert "quick, by what 2 reports of 6 to 18 tokens took just now" in tried.stdout
    made = {file: file.stat().st_mtime_ns for file in out.glob("*/report.json")}
    assert {file.parent.name for file in made} == {"ab" * 3, "ab" * 9}
    assert "1 of 1 reports done" in command(*given).stdout
    assert made.items() <= {f: f.stat().st_mtime_ns for f in out.glob("*/report.json")}.items()
    again = command(*given, "--dry-run", "--try", 2)
    assert again.exit_code == 0 and "0 reports would run.\n3 finished" in again.stdout


def test_scores_are_tried_as_a_part(command, tmp_path, tiny_folder):
    prompts = [json.dumps("ab" * n) for n in range(1, 8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts), encoding="utf-8")
    out = tmp_path / "out"
    given = [tmp_path / "prompts.jsonl", "--out", out, "--model", tiny_folder, "--scores-only"]
    tried = command(*given, "--dry-run", "--try", 3)
    assert tried.exit_code == 0, tried.stderr
    assert "4 prompts would run:" in tried.stdout and "3 finished before" in tried.stdout
    assert "by what 3 prompts of 2 to 14 tokens took just now" in tried.stdout
    (part,) = out.glob("prompts/*.parquet")
    before = part.stat().st_mtime_ns
    assert "4 of 4 prompts done, 0 failed, 3 finished before" in command(*given).stdout
    assert part.stat().st_mtime_ns == before and len(list(out.glob("prompts/*.parquet"))) == 2


# --- workers and threads -----------------------------------------------------------------------


def of_rates(threads_help, workers_hinder):
    """A stand-in for ``measure``: how rates change with threads, and with workers beside one."""

    def measured(shape, dtype="float32", threads=1, workers=1, wall=False):
        times = threads**threads_help / workers**workers_hinder
        rates = (MACHINE.flops, MACHINE.bandwidth, 1 / MACHINE.overhead, MACHINE.near, MACHINE.far)
        flops, bandwidth, layers, near, far = (times * rate / 1e5 for rate in rates)
        half = 3 if dtype == "bfloat16" else 1
        return Machine(half * flops, bandwidth, 1 / layers, near, far)

    return measured


@pytest.mark.parametrize(
    "threads_help, workers_hinder, jobs, chosen",
    [
        (0.5, 0.0, 8, (4, 1)),  # workers do not hinder each other
        (1.0, 1.0, 8, (1, 4)),  # four of them are as slow as one
        (1.0, 1.0, 1, (1, 4)),
        (0.0, 0.0, 1, (1, 1)),  # threads do not help
        (1.0, 0.0, 2, (2, 2)),  # no more workers than reports, but all cores
        (1.0, 0.05, 8, (4, 1)),  # too little faster to give up one thread each
    ],
)
def test_workers_and_threads_are_those_that_take_the_least_time(
    planned, monkeypatch, threads_help, workers_hinder, jobs, chosen
):
    monkeypatch.setattr("llama_reports.estimate.measure", of_rates(threads_help, workers_hinder))
    jobs = planned(*(f"number {i}" for i in range(jobs)))
    assert divided(jobs, 4) == chosen
    assert divided(jobs, 4, 1) == (min(4, len(jobs)), 1)  # given threads are obeyed
    assert divided(jobs, 4, 3) == (1, 3) and divided(jobs, 4, 8) == (1, 8)
    assert divided(jobs, 4, done=lambda job: True) == (1, 1)


def test_no_more_workers_than_there_is_memory_for(planned, monkeypatch, free):
    monkeypatch.setattr("llama_reports.estimate.measure", of_rates(1.0, 0.0))
    jobs = planned(*(f"number {i}" for i in range(8)))
    free(int(2.5 * estimate(jobs, machine=MACHINE).memory))
    assert divided(jobs, 4) == (2, 2)


def test_a_part_of_scores_is_one_workers(planned, monkeypatch):
    monkeypatch.setattr("llama_reports.estimate.measure", of_rates(1.0, 1.0))
    jobs = planned(*(f"number {i}" for i in range(8)), folders=False)
    assert divided(jobs, 4, scores_only=True) == (1, 4)
    assert estimate(jobs, machine=MACHINE, workers=4, scores_only=True).workers == 1


def test_what_would_be_faster_is_told_with_by_how_much(planned, monkeypatch):
    monkeypatch.setattr("llama_reports.estimate.measure", of_rates(1.0, 1.0))
    jobs = planned(*(f"number {i}" for i in range(8)))
    told = estimate(jobs, workers=4, cores=4)
    workers, dtype = told.faster
    assert workers.startswith("1 worker of 4 threads (--workers 1 --threads 4), about 0.")
    assert dtype.startswith("--dtype bfloat16, about 0.") and "Faster: --dtype" in told.text
    best = estimate(jobs, threads=4, cores=4)
    ratio = best.seconds / told.seconds
    assert f"about {ratio:.2g} times as long" in workers
    assert [line.split(",")[0] for line in best.faster] == ["--dtype bfloat16"]
    assert "with 1 worker of 4 threads;" in best.text
    assert estimate(jobs, workers=4).faster == ()  # where nobody asks
    monkeypatch.setattr("llama_reports.estimate.measure", lambda *given, **options: MACHINE)
    assert estimate(jobs, workers=4, cores=4).faster == ()


def test_workers_that_compute_at_once_are_measured_and_torch_left_as_it_was(shape):
    before = torch.get_num_threads()
    for threads, workers in ((1, 2), (2, 1), (2, 2)):
        machine = measure(shape, threads=threads, workers=workers, wall=True)
        rates = (machine.flops, machine.bandwidth, machine.overhead, machine.near, machine.far)
        assert min(rates) > 0 and torch.get_num_threads() == before


def test_the_text_names_ten_and_counts_the_rest(planned):
    jobs = planned(*[f"number {i}" for i in range(201)])
    text = estimate(jobs, machine=MACHINE, workers=2).text
    assert text.startswith("201 reports would run:\n  number-0\n") and "  number-9\n" in text
    assert "number-10" not in text and "… and 191 more" in text
    assert "with 2 workers" in text and "GFLOP/s" in text and "of memory" in text
    assert "replaced" not in text and "before" not in text


def test_another_notebook_says_how_it_was_counted(planned):
    assert (
        "09_relevance is counted as report"
        in estimate(planned("abc", notebook="09_relevance"), machine=MACHINE).text
    )


def test_this_machine_is_measured_and_torch_left_as_it_was(shape):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    machine = measure(shape, threads=1)
    assert min(machine.flops, machine.bandwidth, machine.overhead, machine.near, machine.far) > 0
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_weights_are_counted_once_a_worker_unless_they_are_pages_of_one_file(planned, tiny_folder):
    weights = sum(f.stat().st_size for f in Path(tiny_folder).glob("*.safetensors"))

    def of(workers, dtype="float32"):
        return estimate(planned("ab", "cd", dtype=dtype), machine=MACHINE, workers=workers).memory

    assert of(1) - of(1, "bfloat16") == pytest.approx(weights / 2, rel=0.1)
    both, half = of(2) - of(1), of(2, "bfloat16") - of(1, "bfloat16")
    assert half - both == pytest.approx(weights / 2, rel=0.1)


# --- what a method needs -----------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 40, 150])
def test_rows_are_those_that_are_run_and_parts_of_the_memory_add_up(tiny, tiny_folder, length):
    model, tokenizer = tiny
    question = ask(model, tokenizer, "ab" * (length // 2) + "c" * (length % 2), target="b")
    found = needs(tiny_folder, length, machine=MACHINE)
    weights = sum(weight.nbytes for weight in model.parameters())
    assert found.shape.weights == weights and list(found.methods) == list(METHODS)
    assert found.seconds == sum(need.seconds for need in found.methods.values() if need)
    for name, need in found.methods.items():
        if need is None:
            assert name in ("shapley", "coalitions", "find_then_rank") and length == 150
            continue
        parts = need.memory
        assert need.peak == sum(parts.values()) <= found.peak and need.least <= need.peak
        assert parts["layers"] + parts["embeddings"] + parts["output layer"] == weights
        assert parts["Python"] > 1e8 and set(parts) == {*found.before, *PARTS}
        assert METHODS[name].refusal(model) is None  # the model is tried before it is counted
        run = lambda name=name: attribute(model, question, name, budget=BUDGET)  # noqa: E731
        _, gradients, forwards = rows_run(model, run)
        if name != "integrated_gradients":  # how many it takes is known only afterwards
            assert gradients == need.gradients
            assert 0.75 * need.forwards <= forwards <= need.forwards


def test_what_is_kept_for_the_way_back_is_what_torch_saves(tiny, tiny_folder):
    model, tokenizer = tiny
    question = ask(model, tokenizer, "ab" * 50, target="b")
    weights = {weight.data_ptr() for weight in model.parameters()}
    saved = {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            saved[tensor.data_ptr()] = tensor  # held, so that no other gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attribute(model, question, "saliency")
    held = sum(tensor.nbytes for tensor in saved.values())
    need = needs(tiny_folder, 100, ["saliency"], machine=MACHINE).methods["saliency"]
    # the toy's last layer, of which one position goes on, is half of it
    assert 0.5 < held / need.memory["way back"] < 1


@pytest.mark.parametrize("method", ["attention", "attention_rollout", "alti_logit"])
def test_attention_maps_are_counted_where_a_method_forms_them(tiny, tiny_folder, method):
    model, tokenizer = tiny
    question = ask(model, tokenizer, "ab" * 100, target="b")
    with tensor_sizes() as sizes:
        attribute(model, question, method)
    maps = needs(tiny_folder, 200, [method], machine=MACHINE).methods[method].memory["maps"]
    if method == "attention":
        assert maps == 0 and max(sizes) < 4 * 200**2
    else:
        vectors = 32 if method == "alti_logit" else 4
        assert max(sizes) == vectors * 200**2 and maps > 3 * 4 * max(sizes)


def test_longer_prompts_units_outputs_and_halves_change_what_they_should(tiny_folder):
    def of(tokens, method, part=None, **options):
        need = needs(tiny_folder, tokens, [method], machine=MACHINE, **options).methods[method]
        return need.memory[part] if part else need

    assert of(80, "saliency", "way back") == pytest.approx(2 * of(40, "saliency", "way back"), 0.01)
    assert of(80, "alti_logit", "maps") > 3 * of(40, "alti_logit", "maps")
    assert of(80, "alti_logit").seconds > of(80, "attention").seconds
    assert of(40, "occlusion", units=10).forwards == 11
    assert of(40, "relevance", "logits", outputs=5) == 5 * of(40, "relevance", "logits")
    whole, half = of(40, "attention", "layers"), of(40, "attention", "layers", dtype="bfloat16")
    assert whole == 2 * half


def test_a_length_that_the_model_does_not_read_is_refused(tiny_folder):
    for tokens in (0, 5000):
        with pytest.raises(InputError, match="reads 1 to 2,048 tokens"):
            needs(tiny_folder, tokens, machine=MACHINE)
    with pytest.raises(InputError, match="'int3' is unknown"):
        needs(tiny_folder, 5, dtype="int3", machine=MACHINE)
    with pytest.raises(InputError, match="There is no method"):
        needs(tiny_folder, 5, ["magic"], machine=MACHINE)


@pytest.mark.thorough
def test_the_memory_of_the_bundled_model_is_within_a_quarter_of_what_a_process_takes():
    command = [sys.executable, PLANNER, "--model", BUNDLED, "--method", "relevance"]
    done = subprocess.run([*command, "--length", "512"], check=True, capture_output=True)
    found = json.loads(done.stdout)
    planned = needs(BUNDLED, 512, ["relevance"], machine=MACHINE)
    assert abs(planned.peak / found["bytes"] - 1) < 0.25
    need = planned.methods["relevance"]
    assert found["rows"] == need.gradients + need.forwards
    assert sum(planned.before.values()) / found["bytes"] < 0.75  # which weights alone would not be


# --- what does not fit -------------------------------------------------------------------------


@pytest.fixture
def free(monkeypatch):
    """A function that sets how many bytes the machine has free."""

    def free(number):
        for module in ("llama_reports.costs", "helpers.models"):
            monkeypatch.setattr(f"{module}.free_memory", lambda device: number)

    return free


def test_a_run_that_does_not_fit_is_refused_in_a_sentence_that_says_what_would(planned, free):
    jobs = planned("ab" * 1020, "ab", methods=list(METHODS))
    most = estimate(jobs, machine=MACHINE, workers=2).memory
    refuse_what_does_not_fit(jobs, workers=2)
    free(int(most / MARGIN / 4))
    with pytest.raises(InputError) as refused:
        refuse_what_does_not_fit(jobs, workers=2)
    assert str(refused.value).count(". ") == 0 and "a smaller model" in str(refused.value)
    (need,) = needs(jobs.model, 2040, ["alti_logit"], machine=MACHINE).methods.values()
    free(int(3 * PROCESS + need.memory["maps"] / 3))
    with pytest.raises(InputError) as refused:
        refuse_what_does_not_fit(jobs, workers=2)
    said = str(refused.value)
    assert "attention, " in said and "alone (--method)" in said and "alti_logit" not in said
    tokens = int(said.split("at most ")[1].split(" ")[0].replace(",", ""))
    assert 1 < tokens < 2040 and "(there is one of 2,040)" in said
    refuse_what_does_not_fit(jobs, workers=2, done=lambda job: job.tokens > 2)
    free(int(3 * PROCESS / MARGIN) + 10**6)  # another notebook's methods are not known
    refuse_what_does_not_fit(planned("ab" * 1020, "ab", notebook="05_gradients"), workers=2)
    free(int(3 * PROCESS + need.memory["maps"] / 3))
    refuse_what_does_not_fit(planned("a" * tokens, "ab"), workers=2)


def test_what_is_short_by_less_than_the_planners_own_error_is_let_through(planned, free):
    jobs = planned("abc", folders=False)
    for scores_only in (True, False):
        free(2**62)
        need = estimate(jobs, machine=MACHINE, scores_only=scores_only).memory
        free(int(need / MARGIN * 1.01))
        refuse_what_does_not_fit(jobs, scores_only=scores_only)
        free(int(need / MARGIN * 0.9))
        with pytest.raises(InputError, match="so nothing was started"):
            refuse_what_does_not_fit(jobs, scores_only=scores_only)


def test_fewer_workers_are_named_where_they_would_fit(planned, free):
    jobs = planned(*"abcd", methods=["saliency"])
    need = {n: estimate(jobs, machine=MACHINE, workers=n).memory for n in (2, 3)}
    free(int((need[2] + need[3]) / 2))
    with pytest.raises(InputError, match=r"would fit: 2 workers\.$"):
        refuse_what_does_not_fit(jobs, workers=8)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(tiny, tiny_folder, free):
    weights = sum(weight.nbytes for weight in tiny[0].parameters())
    free(weights)
    load_model(tiny_folder)
    free(weights - 1)
    with pytest.raises(InputError, match=r"'bfloat16' \(.*device_map='auto', or a smaller model"):
        load_model(tiny_folder)
    load_model(tiny_folder, dtype="bfloat16")
    load_model(tiny_folder, device_map="auto")  # which spreads it, and is not looked at
    free(weights // 2 - 1)
    with pytest.raises(InputError, match="are free on the cpu: use device_map"):
        load_model(tiny_folder, dtype="bfloat16")


# --- the command -------------------------------------------------------------------------------


def test_the_command_plans_the_bundled_model(command):
    given = ["--tokens", 6, "--tokens", 2048, "--method", "alti_logit", "--method", "shapley"]
    done = command("plan", *given)
    assert done.exit_code == 0 and not done.stderr
    assert done.stdout.startswith(f"{BUNDLED}: 134,515,008 parameters in float32.")
    assert "GFLOP/s" in done.stdout and "embeddings 113MB" in done.stdout
    short, long = done.stdout.split("\n\n")[1:]
    assert short.startswith("6 tokens") and long.startswith("2,048 tokens")
    assert "budget" in long and "budget" not in short


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["plan"], "--tokens"),
        (["plan", "--tokens", "0"], "reads 1 to"),
        (["plan", "--tokens", "5", "--method", "magic"], "There is no method"),
        (["plan", "--tokens", "5", "--model", "./none"], "There is no model folder"),
        (["./plan"], "There is no prompts file"),
        ([], "PROMPTS"),
    ],
)
def test_what_cannot_be_planned_is_told_with_status_2(command, arguments, complaint):
    done = command(*arguments)
    assert done.exit_code == 2 and complaint in done.stderr


def test_the_help_names_the_command_that_plans(command):
    assert "llama-reports plan --help" in " ".join(command("--help").stdout.split())
    shown = command("plan", "--help").stdout
    for option in ("--model", "--tokens", "--method", "--dtype", "--threads"):
        assert option in shown


def test_a_plan_says_for_what_there_is_no_room_and_up_to_which_length_there_is(tiny_folder, free):
    (need,) = needs(tiny_folder, 1500, ["alti_logit"], machine=MACHINE).methods.values()
    free(int(need.least / MARGIN * 1.01))
    methods = ["alti_logit", "attention"]
    assert not needs(tiny_folder, 1500, methods, machine=MACHINE).too_large
    free(int(need.least / MARGIN * 0.99))
    found = needs(tiny_folder, 1500, methods, machine=MACHINE)
    assert found.too_large == ["alti_logit"] and "No room for alti_logit" in found.text
    longest = found.longest("alti_logit")
    fits, not_any_more = (
        needs(tiny_folder, tokens, methods, machine=MACHINE).methods["alti_logit"].least
        for tokens in (longest, longest + 1)
    )
    assert fits <= found.free < not_any_more and f"up to {longest:,} tokens" in found.text


@pytest.mark.parametrize("more", [[], ["--scores-only"]])
def test_the_command_refuses_a_run_without_room_before_anything_is_written(
    command, free, tiny_folder, tmp_path, more
):
    (tmp_path / "plan").with_suffix(".jsonl").write_text('"abc"', encoding="utf-8")
    given = [tmp_path / "plan.jsonl", "--model", tiny_folder, "--out", tmp_path / "out", *more]
    free(10**8)
    done = command(*given)
    assert done.exit_code == 2 and done.stderr.startswith("Error: About ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    dry = command(*given, "--dry-run")
    assert dry.exit_code == 2 and "would run" in dry.stdout and dry.stderr == done.stderr


def test_a_run_of_hours_says_so_before_it_starts(planned, tmp_path, monkeypatch):
    slow = replace(MACHINE, flops=1e6)
    measured = []
    monkeypatch.setattr("llama_reports.estimate.measure", lambda *given: measured.append(1) or slow)
    assert long_run(planned("abc"), tmp_path) is None and not measured
    jobs = planned(*[f"number {i}" for i in range(200)])
    assert estimate(jobs, machine=slow).seconds > 2 * HOUR
    said = long_run(jobs, tmp_path)
    assert said.startswith("This will take about") and said.endswith("--dry-run tells more.")
    assert long_run(jobs, tmp_path, done=lambda job: True) is None
    monkeypatch.setattr("llama_reports.estimate.measure", lambda *given: MACHINE)
    assert long_run(jobs, tmp_path) is None
