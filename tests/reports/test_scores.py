"""Scores without notebooks: the tables, what a kill leaves, and what three libraries read."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from running import process

from helpers import METHODS, InputError, ask, attribute, tiny_llama
from helpers.attribution import BUDGET
from helpers.attribution.path import FIRST_EVALUATIONS
from helpers.ground_truth import FAMILIES, cases
from helpers.models import BUNDLED
from helpers.summary import REPORTED
from llama_reports import scores as module
from llama_reports.jobs import plan
from llama_reports.run import Job
from llama_reports.scores import (
    DEFAULT_METHODS,
    EVIDENCE,
    PROMPTS,
    SCORES,
    chunks,
    discard_unfinished,
    finished_ids,
    part_name,
    score_part,
)

DOCS = Path(__file__).resolve().parents[2] / "docs" / "scores.md"
WORDS = ["The", "keys", "to", "the", "old", "cabinet", "are", "in", "Riga", "not", "Oslo"]
ODD = "tab\tnul\x00 line\r\nquote'\" 你好 🙂 مرحبا NA \N{REPLACEMENT CHARACTER}"


def job(prompt, tokens=None, slug="", identity=None, **parameters):
    asked = {"messages" if isinstance(prompt, list) else "prompt": prompt, **parameters}
    identity = identity or hashlib.sha256(repr(asked).encode()).hexdigest()
    tokens = len(prompt) if tokens is None else tokens
    return Job(slug, str(prompt), Path("quick.ipynb"), asked, identity, identity, tokens)


def some_jobs(count):
    """Prompts of several lengths, each of its own id: targets, foils, chat, units, answers."""
    kinds = [
        {},
        {"target": "a", "foil": "b"},
        {"foil": "z"},
        {"chat": True},
        {"target": " two"},
        {"target": "ab", "foil": "ac d"},
        {"answer": 3, "units": "words"},
        {"answer_text": "yes", "units": "sentences"},
        {"options": ["a", "bcd", "bce"]},
        {"options": ["x", "yz", "w"], "target": "yz", "units": "words"},
    ]
    return [
        job(
            " ".join(WORDS[number % 5 : number % 5 + 2 + number % 3]) + f" {number % 7}",
            tokens=number % 5,
            slug=f"number-{number}",
            identity=f"{number:064x}",
            **kinds[number % 10],
        )
        for number in range(count)
    ]


def read(out, table):
    """All rows of a table, in one order, whatever the parts."""
    found = pd.read_parquet(out / table)
    if "method" in found:
        found["method"] = found["method"].astype(str)
    keys = [key for key in ("method", "id", "output", "unit") if key in found]
    return found.sort_values(keys, ignore_index=True)


def same_tables(out, expected):
    for table in ("scores", "evidence", "prompts"):
        both = [
            read(folder, table).drop(columns="seconds", errors="ignore")
            for folder in (out, expected)
        ]
        pd.testing.assert_frame_equal(*both, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def scored(tiny_folder, tmp_path_factory):
    """``(jobs, folder, facts)``: forty jobs in parts of ten, with occlusion among the methods."""
    out, jobs = tmp_path_factory.mktemp("scored"), [*some_jobs(39), job(ODD)]
    methods = (*DEFAULT_METHODS, "occlusion")
    facts = [
        score_part(part, out, model=str(tiny_folder), methods=methods) for part in chunks(jobs, 10)
    ]
    return jobs, out, facts


# --- what is written ---------------------------------------------------------------------------


def test_scores_are_those_of_each_prompt_alone(scored, tiny):
    jobs, out, _ = scored
    scores, prompts = read(out, "scores"), read(out, "prompts").set_index("id")
    evidence = read(out, "evidence").set_index(["method", "id"])
    assert (
        set(scores["method"]) == {*DEFAULT_METHODS, "occlusion"} and scores["output"].isna().all()
    )
    for one in jobs:
        question = ask(*tiny, **one.asked)
        losses = attribute(tiny[0], question, "occlusion").scores
        row = prompts.loc[one.identity]
        assert (row["prompt"], row["slug"]) == (one.prompt, one.slug) and pd.isna(row["error"])
        assert (tuple(row["target_ids"]), row["target"]) == (question.target, question.target_label)
        assert row["target_given"] == bool({"target", "answer_text"} & one.parameters.keys())
        assert row["chat"] == one.parameters.get("chat", False)
        assert row["units"] == one.parameters.get("units", "tokens")
        if question.foil is None:
            assert pd.isna(row["foil"]) and row["foil_ids"] is None
        else:
            assert row["foil"] == question.foil_label
            assert tuple(row["foil_ids"]) == question.foil
        assert row["probability"] == pytest.approx(question.probability, rel=1e-4)
        assert len(row["notes"]) == len(question.notes) and not len(row["left_out"])
        for method in set(scores["method"]):
            mine = scores[(scores["method"] == method) & (scores["id"] == one.identity)]
            single = attribute(tiny[0], question, method)
            largest = float(single.scores.abs().max())
            units = question.units
            assert list(mine["unit"]) == list(range(len(units)))
            assert list(mine["label"]) == [unit.label for unit in units]
            assert list(mine["part"]) == [unit.part for unit in units]
            spans = zip(mine["start"], mine["end"], strict=True)
            assert list(spans) == [(u.positions[0], u.positions[-1] + 1) for u in units]
            found = torch.tensor(mine["score"].to_numpy())
            assert (found - single.scores).abs().max() <= 1e-4 * largest
            row = evidence.loc[(method, one.identity)]
            assert row["evaluations"] == single.evaluations and row["seconds"] >= 0
            assert row["forwards"] == single.forwards and row["signed"] == single.signed
            assert row["strongest_loss"] == pytest.approx(float(losses[row["strongest"]]), abs=1e-3)
            written = [i for i, u in enumerate(units) if u.part not in ("template", "answer")]
            size = single.scores if single.signed else single.scores.abs()
            assert size[row["strongest"]] == pytest.approx(float(size[written].max()), rel=1e-3)
            assert row["strongest"] in written
            assert row["mean_loss"] == pytest.approx(float(losses[written].mean()), abs=1e-3)
            assert row["most_loss"] == pytest.approx(float(losses[written].max()), abs=1e-3)
            assert pd.isna(row["gap"]) == (single.gap is None)


def test_the_same_prompt_and_budget_give_the_same_numbers_alone_and_in_a_part(
    tiny_folder, tmp_path, tiny
):
    """Every method, at a length where Shapley values are sampled; what they cost is equal, too."""
    jobs = [job("x" * 39 + end, target="b", foil="c") for end in "yz"]
    score_part(jobs, tmp_path, model=str(tiny_folder), methods=list(METHODS))
    scores = read(tmp_path, "scores")
    evidence = read(tmp_path, "evidence").set_index(["method", "id"])
    for one in jobs:
        question = ask(*tiny, **one.asked)
        assert len(question.units) == 40
        for method in METHODS:
            alone = attribute(tiny[0], question, method, budget=BUDGET, beside=METHODS)
            mine = scores[(scores["method"] == method) & (scores["id"] == one.identity)]
            apart = np.abs(mine["score"].to_numpy() - alone.scores.numpy()).max()
            assert apart <= 1e-4 * float(alone.scores.abs().max()), method
            row = evidence.loc[(method, one.identity)]
            costs = row["evaluations"], row["forwards"], row["signed"]
            assert costs == (alone.evaluations, alone.forwards, alone.signed), method
    orders = METHODS["shapley"].options(40, 40, BUDGET)["permutations"]
    assert evidence.loc[("shapley", jobs[0].identity), "forwards"] <= orders * 39 + 3 < 2**40


@pytest.mark.thorough  # reports of its own, beside those that test_reports makes
def test_a_report_has_the_same_numbers(reports, tiny_folder, hostile, tmp_path):
    """A report's own table against that of a part: methods, scores, and rows that were run."""
    out, _ = reports
    asked = {"plain": "The keys to", "hostile": hostile}
    jobs = {slug: job(prompt, units="words") for slug, prompt in asked.items()}
    score_part(jobs.values(), tmp_path, model=str(tiny_folder), methods=list(REPORTED))
    scores, evidence = read(tmp_path, "scores"), read(tmp_path, "evidence")
    for slug, one in jobs.items():
        theirs = pd.read_csv(out / slug / "scores.csv", keep_default_na=False)
        mine = scores[scores["id"] == one.identity]
        assert set(mine["method"]) == set(theirs["method"])
        for method, rows in theirs.groupby("method"):
            own = mine[mine["method"] == method]["score"].to_numpy()
            assert np.abs(own - rows["score"]).max() <= 1e-4 * np.abs(own).max(), method
        costs = ["method", "evaluations", "forwards"]
        both = [
            table[costs].sort_values("method", ignore_index=True)
            for table in (
                evidence[evidence["id"] == one.identity],
                pd.read_csv(out / slug / "evidence.csv"),
            )
        ]
        pd.testing.assert_frame_equal(*both, check_dtype=False)


def test_a_method_that_the_budget_is_too_small_for_is_told(tiny_folder, tmp_path):
    short, long = job("a" * 20), job("a" * 120)
    score_part([short, long], tmp_path, model=str(tiny_folder), methods=["shapley", "random"])
    left_out = read(tmp_path, "prompts").set_index("id")["left_out"]
    assert list(left_out[short.identity]) == [] and list(left_out[long.identity]) == ["shapley"]
    for table in ("scores", "evidence"):
        found = read(tmp_path, table).groupby("method")["id"].unique()
        assert list(found["shapley"]) == [short.identity]
        assert set(found["random"]) == {short.identity, long.identity}


def test_what_did_not_close_is_told_in_words_with_its_gap(tmp_path):
    """Beside another method this path may take the first look, and needs hundreds of gradients."""
    one = job("The dog barked at the")
    score_part([one], tmp_path, model=BUNDLED, methods=["random", "integrated_gradients"])
    row = read(tmp_path, "evidence").set_index("method").loc["integrated_gradients"]
    assert row["evaluations"] == FIRST_EVALUATIONS and not row["closed"]
    (notes,) = read(tmp_path, "prompts")["notes"]
    (told,) = [note for note in notes if "did not close" in note]
    assert f"integrated_gradients did not close (gap {row['gap']:.1%})" in told
    assert len(notes) == len(set(notes)) == 2  # and that it was asked without its template


def test_each_output_has_rows_that_add_up_to_the_total(tiny_folder, tmp_path):
    jobs = [job("Riga is", answer=4), job("Oslo is", target="a"), job("a b", target="cd", foil="e")]
    score_part(jobs, tmp_path, model=str(tiny_folder), methods=["relevance"], each=True)
    scores, evidence = read(tmp_path, "scores"), read(tmp_path, "evidence").set_index("id")
    for one, outputs in zip(jobs, (4, 0, 2), strict=True):
        mine = scores[scores["id"] == one.identity]
        total = mine[mine["output"].isna()].set_index("unit")["score"]
        each = mine.dropna(subset=["output"])
        assert sorted(each["output"].unique()) == list(range(outputs))
        named = evidence.loc[one.identity, "outputs"]
        assert (0 if named is None else len(named)) == outputs
        if outputs:
            added = each.groupby("unit")["score"].sum()
            assert np.abs(added - total).max() <= 1e-4 * np.abs(total).max()


def test_messages_are_asked_in_the_template_and_kept_as_json(tiny_folder, tmp_path, tiny):
    messages = [{"role": "system", "content": "Say “ja”."}, {"role": "user", "content": "Ja?"}]
    one = job(messages, tokens=5, target="x")
    score_part([one], tmp_path, model=str(tiny_folder), methods=["saliency"])
    (row,) = read(tmp_path, "prompts").to_dict("records")
    assert json.loads(row["messages"]) == messages and row["chat"]
    question = ask(*tiny, messages, target="x")
    assert list(read(tmp_path, "scores")["part"]) == question.parts
    assert {"template", "system", "user"} <= set(question.parts)


def test_the_facts_are_those_of_the_files(scored):
    jobs, out, facts = scored
    assert sum(fact["prompts"] for fact in facts) == len(jobs) == len(read(out, "prompts"))
    assert sum(fact["tokens"] for fact in facts) == read(out, "prompts")["tokens"].sum()
    assert sum(fact["failed"] for fact in facts) == 0
    assert sum(fact["bytes"] for fact in facts) == sum(
        file.stat().st_size for file in out.rglob("*.parquet")
    )
    assert set(facts[0]["seconds"]) == {"loading", "asking", "attributing", "writing"}


def test_ids_that_are_done_are_left_out_and_new_ones_added(scored, tiny_folder, tmp_path):
    jobs, out, _ = scored
    assert finished_ids(out) == {one.identity for one in jobs}
    assert finished_ids(tmp_path) == set()
    assert list(chunks(jobs, 10, done=finished_ids(out))) == []
    for part in chunks(jobs[:4], 10):
        score_part(part, tmp_path, model=str(tiny_folder), methods=["random"])
    for part in chunks(jobs[:9], 10, done=finished_ids(tmp_path)):
        score_part(part, tmp_path, model=str(tiny_folder), methods=["random"])
    assert sorted(read(tmp_path, "prompts")["id"]) == sorted(one.identity for one in jobs[:9])
    assert not read(tmp_path, "scores").duplicated(["method", "id", "unit"]).any()


def test_a_job_may_have_methods_of_its_own(tiny_folder, tmp_path):
    jobs = [job("Riga is in"), job("Oslo is in", methods=["attention", "shapley"])]
    score_part(jobs, tmp_path, model=str(tiny_folder), methods=["saliency"])
    found = read(tmp_path, "scores").groupby("id")["method"].unique()
    assert list(found[jobs[0].identity]) == ["saliency"]
    assert sorted(found[jobs[1].identity]) == ["attention", "shapley"]
    prompts = read(tmp_path, "prompts").set_index("id")
    assert list(prompts.loc[jobs[1].identity, "methods"]) == ["attention", "shapley"]
    errors = read(tmp_path, "scores").groupby("method")["error"].count()
    assert errors["shapley"] == len("Oslo is in") and errors["saliency"] == 0


def test_a_method_that_runs_only_where_it_is_named_has_its_tables(tiny_folder, tmp_path):
    score_part([job("Riga is in")], tmp_path, model=str(tiny_folder), methods=["coalitions"])
    for table in ("scores", "evidence"):
        assert set(read(tmp_path, table)["method"]) == {"coalitions"}


def test_neither_threads_nor_anything_else_of_torch_is_left_changed(tiny_folder, tmp_path):
    before = torch.get_num_threads()
    score_part([job("a")], tmp_path, model=str(tiny_folder), methods=["random"], threads=before + 1)
    assert torch.get_num_threads() == before


# --- what goes wrong ---------------------------------------------------------------------------


def test_a_bad_prompt_has_its_error_and_the_others_their_scores(tiny_folder, tmp_path, tiny):
    some = (f"Riga {letter}" for letter in "abcdefghijklmnopqrstuvwxyz")
    open_target = next(text for text in some if ask(*tiny, text).target_label.isascii())
    own = ask(*tiny, open_target).target_label
    bad = [
        job(" "),
        job("half \ud800"),
        job("a", target="ab", foil="a"),
        job("a", foil="\udc00"),
        job("a" * 3000),
        job(open_target, foil=own),
    ]
    good = [job("Riga is in"), job(ODD)]
    facts = score_part([*bad, *good], tmp_path, model=str(tiny_folder))
    assert (facts["prompts"], facts["failed"]) == (8, 6)
    prompts = read(tmp_path, "prompts").set_index("id")
    for one in bad:
        assert prompts.loc[one.identity, "error"]
        assert pd.isna(prompts.loc[one.identity, "target"])
    for one in good:
        assert pd.isna(prompts.loc[one.identity, "error"])
        assert prompts.loc[one.identity, "prompt"] == one.prompt
    assert set(read(tmp_path, "scores")["id"]) == {one.identity for one in good}
    assert finished_ids(tmp_path) == {one.identity for one in [*bad, *good]}


def test_one_prompt_that_breaks_a_batch_fails_alone(tiny_folder, tmp_path, tiny):
    jobs = some_jobs(12)
    poison = ask(*tiny, **jobs[5].asked).input_ids
    model, _, _ = module._loaded(str(tiny_folder), "float32")

    def break_on_poison(module, args, ids):
        length = poison.shape[1]
        if ids.shape[-1] >= length and bool((ids[..., :length] == poison).all(dim=-1).any()):
            raise RuntimeError("poisoned")

    embed = model.get_input_embeddings()
    handle = embed.register_forward_hook(
        lambda module, args, out: break_on_poison(module, args, args[0])
    )
    try:
        facts = score_part(jobs, tmp_path, model=str(tiny_folder))
    finally:
        handle.remove()
    assert facts["failed"] == 1
    prompts = read(tmp_path, "prompts").set_index("id")
    assert prompts.loc[jobs[5].identity, "error"] == "RuntimeError: poisoned"
    assert prompts["error"].isna().sum() == 11


def test_a_fault_of_every_prompt_is_no_fault_of_theirs(tiny_folder, tmp_path):
    model, _, _ = module._loaded(str(tiny_folder), "float32")

    def fail(module, args):
        raise RuntimeError("the machine is ill")

    handle = model.model.layers[0].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="ill"):
            score_part([job("a"), job("bc")], tmp_path, model=str(tiny_folder))
    finally:
        handle.remove()
    assert not list(tmp_path.rglob("*.parquet")) and finished_ids(tmp_path) == set()


def test_numbers_that_are_not_finite_are_an_error_of_each_prompt(tiny, tmp_path):
    model, tokenizer = tiny_llama()
    model.lm_head.weight.fill_(3e38)  # finite, and every logit overflows
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "broken")
    facts = score_part([job("ab"), job("cd")], tmp_path, model=str(tmp_path / "broken"))
    assert (facts["prompts"], facts["failed"]) == (2, 2)
    prompts = read(tmp_path, "prompts")
    assert prompts["error"].str.contains("not finite").all()
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    "name, missing", [("attention sinks", ["relevance"]), ("a sliding window", [])]
)
def test_of_the_methods_that_nobody_named_those_run_that_the_model_supports(
    tiny, tmp_path, name, missing
):
    from toys import toy  # here: a process of another test imports this module without it

    folder = tmp_path / "another"
    for part in (toy(name, tiny[1]), tiny[1]):
        part.save_pretrained(folder)
    facts = score_part([job("ab"), job("cd")], tmp_path / "out", model=str(folder))
    assert (facts["prompts"], facts["failed"]) == (2, 0)
    prompts = read(tmp_path / "out", "prompts")
    assert [list(some) for some in prompts["left_out"]] == [missing] * 2
    found = set(read(tmp_path / "out", "scores")["method"])
    assert found == set(DEFAULT_METHODS) - set(missing)
    if missing:
        with pytest.raises(InputError, match="no rule for the GptOssExperts"):
            score_part([job("ab")], tmp_path / "no", model=str(folder), methods=missing)


def test_a_method_or_a_model_that_will_not_do_is_refused(tiny_folder, tmp_path):
    with pytest.raises(InputError, match="astrology"):
        score_part([job("a")], tmp_path, model=str(tiny_folder), methods=["astrology"])
    with pytest.raises(InputError, match="no model folder"):
        score_part([job("a")], tmp_path, model=str(tmp_path / "none"))
    assert not list(tmp_path.iterdir())


CARRIED = """,Prompt,Label,model,meta.model,tags
0,The keys,a,gpt,x,"[1]"
1,Riga is,NaN,,y,
"""


def test_what_is_carried_joins_the_prompts_in_columns_of_its_own(tiny_folder, tmp_path):
    (tmp_path / "p.csv").write_text(CARRIED, encoding="utf-8")
    jobs = plan(tmp_path / "p.csv", model=str(tiny_folder), folders=False)
    out = tmp_path / "out"
    for part in chunks(jobs, 1):  # a part whose prompt carries no label has the column too
        score_part(part, out, model=str(tiny_folder), methods=["random"])
    names = ["prompt", "Label", "meta.model", "meta.meta.model", "tags", "error"]
    found = pd.read_parquet(out / "prompts")[names].sort_values("prompt", ignore_index=True)
    found = found.astype(object).where(found.notna(), None)
    assert found.to_numpy().tolist() == [
        ["Riga is", None, None, "y", None, None],
        ["The keys", "a", "gpt", "x", "[1]", None],
    ]
    assert len(duckdb.sql(f"SELECT Label FROM '{out}/prompts/*.parquet'").df()) == 2
    assert finished_ids(out, jobs.carried) == {one.identity for one in jobs}
    for others, why in (
        ((), "'Label' is there and is not carried"),
        ((*jobs.carried, "x"), "'x' is carried and not there"),
    ):
        with pytest.raises(InputError, match=why):
            finished_ids(out, others)


def test_values_that_are_no_text_are_carried_as_json(tiny_folder, tmp_path):
    meta = {"n": 3, "share": 0.5, "sure": True, "of": {"a": ["é", None]}, "none": None}
    one = replace(job("a"), meta=meta)
    score_part([one], tmp_path, model=str(tiny_folder), methods=["random"])
    (row,) = pq.read_table(tmp_path / "prompts").to_pylist()
    assert {name: row[name] for name in meta} == {
        "n": "3",
        "share": "0.5",
        "sure": "true",
        "of": '{"a": ["é", null]}',
        "none": None,
    }


def test_a_run_that_carries_other_columns_is_refused(command, tiny_folder, tmp_path):
    options = ["--scores-only", "--out", tmp_path / "out", "--model", tiny_folder]
    for content, status in [("prompt,label\nHi,x\n", 0), ("prompt,split\nHo,y\n", 2)]:
        (tmp_path / "p.csv").write_text(content, encoding="utf-8")
        given = [tmp_path / "p.csv", *options, "--method", "random"]
        done = command(*given)
        assert done.exit_code == status, done.output
    assert "'label' is there and is not carried: choose another folder." in done.output
    assert len(list(tmp_path.glob("out/prompts/*.parquet"))) == 1


def test_tables_of_another_version_are_refused(scored, tmp_path):
    _, out, _ = scored
    (tmp_path / "prompts").mkdir()
    table = pq.read_table(next(out.glob("prompts/*.parquet")), partitioning=None)
    other = table.replace_schema_metadata({module.VERSION_KEY: b"0"})
    pq.write_table(other, tmp_path / "prompts" / "part-0.parquet")
    with pytest.raises(InputError, match="version 0"):
        finished_ids(tmp_path)
    (tmp_path / "prompts" / "part-0.parquet").write_bytes(b"not a table")
    with pytest.raises(InputError, match="not one of our"):
        finished_ids(tmp_path)


# --- killed ------------------------------------------------------------------------------------

RUN = """
import os, signal, sys, time
from llama_reports import files, scores
from test_scores import some_jobs
import torch
torch.set_num_threads(1)
model, expected = sys.argv[1:3]

def run(out, writes=None):
    "In a child: its exit status, and how long it took. After ``writes`` files it kills itself."
    began, child = time.time(), os.fork()
    if child == 0:
        done = []
        def write(path, content):
            if len(done) == writes:
                os.kill(os.getpid(), signal.SIGKILL)
            files.write_whole(path, content)
            done.append(path)
        scores.write_whole = write
        known = scores.finished_ids(out)
        for part in scores.chunks(some_jobs(24), 8, done=known):
            scores.score_part(part, out, model=model, methods=["relevance", "random"])
        os._exit(0)
    return began, child

def finish(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

scores._loaded(model, "float32")  # forked with the model, so that a run is short
began, child = run(expected)
assert finish(child) == 0
whole = time.time() - began
for number, out in enumerate(sys.argv[3:]):
    if number < 6:  # between any two files of the first part, and after its last
        began, child = run(out, writes=number)
        assert finish(child) == -signal.SIGKILL
    else:
        for share in (0.25, 0.5, 0.75):
            began, child = run(out)
            time.sleep(whole * share * (number - 5) / 2)
            os.kill(child, signal.SIGKILL)
            finish(child)
    print(number, len(scores.finished_ids(out)))
    began, child = run(out)
    assert finish(child) == 0
"""


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process as POSIX does")
def test_killed_at_any_moment_the_next_run_ends_as_an_uninterrupted_one(tiny_folder, tmp_path):
    """Killed between any two writes, and by the clock; a third of the prompts is one part."""
    outs = [tmp_path / f"killed-{number}" for number in range(8)]
    command = [sys.executable, "-c", RUN, tiny_folder, tmp_path / "whole", *outs]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    finished = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert finished[:6] == [0] * 5 + [8], "nothing counts before the last file, all does after it"
    for out in outs:
        names = [sorted(p.relative_to(o) for p in o.rglob("part-*")) for o in (out, outs[5])]
        assert names[0] == names[1]
        same_tables(out, tmp_path / "whole")
        assert not read(out, "scores").duplicated(["method", "id", "unit"]).any()


def test_what_a_killed_run_left_is_cleared_and_what_is_finished_kept(scored, tmp_path):
    _, out, _ = scored
    for file in out.rglob("*.parquet"):
        copy = tmp_path / file.relative_to(out)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    before = sorted(tmp_path.rglob("*"))
    left = [
        tmp_path / "scores" / "method=random" / "part-0123456789abcdef.parquet",
        tmp_path / "evidence" / "method=random" / ".part-0123456789abcdef.parquet-x1",
        tmp_path / "prompts" / ".part-0123456789abcdef.parquet-x1",
    ]
    for file in left:
        file.write_bytes(b"half of it")
    assert len(pd.read_parquet(tmp_path / "prompts")) == 40  # a hidden file is not read
    discard_unfinished(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


# --- parts -------------------------------------------------------------------------------------


def test_parts_hold_like_lengths_and_every_job_once():
    jobs = [job(f"{n}", tokens=n * 7919 % 60) for n in range(1000)]  # 60 lengths, 8 parts
    parts = list(chunks(iter(jobs), 50, window=400))
    assert sorted(j.identity for part in parts for j in part) == sorted(j.identity for j in jobs)
    assert [len(part) for part in parts] == [50] * 20
    assert max(len({j.tokens for j in part}) for part in parts[:16]) <= 10
    assert list(chunks(jobs[:400][::-1], 50, window=400)) == parts[:8]  # whatever the order


def test_a_stream_is_read_a_window_at_a_time():
    taken = []

    def stream():
        for number in range(10**6):
            taken.append(number)
            yield job("a", tokens=number % 9)

    next(chunks(stream(), 50, window=200))
    assert len(taken) == 200


def test_a_part_is_named_by_its_ids_alone():
    jobs = some_jobs(5)
    assert part_name(jobs) == part_name(jobs[::-1]) != part_name(jobs[:4])


# --- the documentation -------------------------------------------------------------------------


def python_blocks():
    return re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)


def test_pandas_polars_and_duckdb_read_the_same_as_documented(scored):
    _, out, _ = scored
    names = {"out": out}
    for block in python_blocks():
        exec(block, names)
    found = [names["by_pandas"], names["by_polars"].to_pandas(), names["by_duckdb"]]
    tables = [
        table.astype({"method": str}).sort_values(["method", "label"], ignore_index=True)
        for table in found
    ]
    assert len(tables[0]) > 5 * 20
    for other in tables[1:]:
        pd.testing.assert_frame_equal(
            tables[0], other[list(tables[0])], check_dtype=False, rtol=1e-4, atol=1e-4
        )
    joined = names["joined"]
    assert set(joined["method"]) == {"relevance"} and set(joined["prompt"]) >= {ODD}


def test_polars_and_duckdb_round_trip_every_character(scored):
    import polars as pl

    _, out, _ = scored
    by_polars = pl.read_parquet(out / "prompts" / "*.parquet")["prompt"].to_list()
    by_duckdb = duckdb.execute(
        "SELECT prompt FROM read_parquet(?)", [f"{out}/prompts/*.parquet"]
    ).fetchall()
    assert ODD in by_polars and (ODD,) in by_duckdb


@pytest.mark.parametrize(
    ("table", "schema"), [("prompts", PROMPTS), ("scores", SCORES), ("evidence", EVIDENCE)]
)
def test_the_documented_columns_are_the_files(scored, table, schema):
    _, out, _ = scored
    section = DOCS.read_text(encoding="utf-8").split(f"### {table}\n")[1].split("\n##")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+?) \| (.+?) \|$", section, re.MULTILINE)
    documented = [(name, kind) for name, kind, _ in rows if kind != "folder's name"]
    written = pq.read_schema(next((out / table).rglob("*.parquet")))
    assert documented == [
        (column.name, f"{column.type}, null" if column.nullable else str(column.type))
        for column in written
    ]
    assert written.equals(schema) and all(meaning for *_, meaning in rows)
    assert written.metadata[module.VERSION_KEY].decode() == module.SCHEMA_VERSION
    assert f"version of this schema is `{module.SCHEMA_VERSION}`" in DOCS.read_text("utf-8")
    assert isinstance(written, pa.Schema)


# --- the benchmark -----------------------------------------------------------------------------


def test_the_benchmark_takes_its_short_prompts_from_the_reporting_half(bundled):
    sys.path.insert(0, str(DOCS.parents[1] / "benchmarks"))
    from scores import SHORT, short_jobs

    jobs = short_jobs(bundled[1], 500)
    reporting = {case.prompt for family in FAMILIES for case in cases(family, "reporting")}
    assert len({one.identity for one in jobs}) == 500
    assert {one.prompt for one in jobs} <= reporting and {one.tokens for one in jobs} <= set(SHORT)
    assert sum("foil" in one.parameters for one in jobs) == 250


# --- the command -------------------------------------------------------------------------------


@pytest.mark.thorough
def test_the_command_adds_to_what_is_there_and_two_workers_write_the_same(
    command, tmp_path, tiny_folder
):
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps(f"Prompt number {number}") for number in range(600)]
    prompts.write_text("\n".join(lines[:300]), encoding="utf-8")
    given = [prompts, "--model", tiny_folder, "--scores-only"]
    one = command(*given, "--out", tmp_path / "one")
    assert one.exit_code == 0 and "300 of 300 prompts done, 0 failed." in one.stdout, one.stderr
    prompts.write_text("\n".join(lines), encoding="utf-8")
    more = command(*given, "--out", tmp_path / "one")
    assert "300 of 300 prompts done, 0 failed, 300 finished before." in more.stdout, more.stderr
    two = process(*given, "--out", tmp_path / "two", "--workers", 2)
    assert two.returncode == 0 and "600 of 600 prompts done" in two.stdout, two.stderr
    found = [
        pd.read_parquet(tmp_path / out / "scores")
        .sort_values(["id", "method", "unit"], ignore_index=True)
        .assign(method=lambda table: table["method"].astype(str))
        for out in ("one", "two")
    ]
    assert found[0]["id"].nunique() == 600
    # parts differ in what is beside a prompt, and float32's last digits with them
    np.testing.assert_allclose(found[0]["score"], found[1]["score"], atol=1e-4)
    kept = [column for column in found[0] if column != "score"]
    pd.testing.assert_frame_equal(found[0][kept], found[1][kept])
