"""The benchmarks measure the same work: their peers agree, and their tables keep what was found."""

import hashlib
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import captum.attr
import pandas as pd
import pytest
import torch

from helpers import METHODS, Attribution, ask, attribute
from helpers.attribution import baseline_embeds, embed_prompt, objective, objective_gradient
from helpers.faithfulness import evidence_table
from helpers.ground_truth import FAMILIES, cases, evidence_positions, reciprocal_rank, solved
from helpers.models import weights_digest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import attribution as benchmark  # noqa: E402
import evidence  # noqa: E402
import ig_answers  # noqa: E402
import precision  # noqa: E402
import report  # noqa: E402
import yardsticks  # noqa: E402
from peers import guide  # noqa: E402
from prompt_sets import questions  # noqa: E402


@pytest.mark.parametrize("length", [6, 35, 151, 512, 2048])
def test_a_question_has_exactly_the_length_asked_for(bundled, length):
    assert benchmark.question_of(*bundled, length).input_ids.shape == (1, length)


@pytest.mark.parametrize("peer", ["Captum LayerIntegratedGradients", "ours"])
def test_the_peers_compute_what_the_guides_code_computes(bundled, peer):
    model, tokenizer = bundled
    question = benchmark.question_of(model, tokenizer, 6)
    expected = benchmark.guide(model, tokenizer, question, 3).double()
    found = torch.as_tensor(benchmark.PEERS[peer](model, tokenizer, question, 3)).double()
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_both_gradients_are_the_same(bundled):
    model, tokenizer = bundled
    question = benchmark.question_of(model, tokenizer, 6)
    expected = benchmark.guide_gradient(model, tokenizer, question, 1)
    torch.testing.assert_close(
        benchmark.ours_gradient(model, tokenizer, question, 1), expected, rtol=1e-3, atol=1e-3
    )


def test_one_measurement_is_a_process_that_prints_one_line_of_json():
    command = [sys.executable, str(ROOT / "benchmarks" / "attribution.py"), "--peer", "ours"]
    command += ["--length", "6", "--steps", "2"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert min(found["seconds"], found["rate"], found["share of rate"]) > 0
    assert len(found["scores"]) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_measured_memory_is_the_memory_that_was_taken():
    from machine import measured

    with measured() as took:
        block = torch.ones(50_000_000)  # 200 MB
    assert 1.9e8 < took.bytes < 3e8 and len(block)


def test_the_gpu_benchmark_runs_on_the_cpu_too():
    shape = {**benchmark.LLAMA_3_2_1B, "vocab_size": 64, "hidden_size": 64, "head_dim": 16}
    shape |= {"intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    (row,) = benchmark.on_accelerator("cpu", shape, lengths=(5,), steps=3)
    assert float(row["times as fast"]) > 0


def test_tuning_and_reporting_prompts_are_apart(bundled):
    tuning, reporting = (
        {(q.prompt, q.target, q.foil) for q in questions(*bundled, split)}
        for split in ("tuning", "reporting")
    )
    assert len(tuning) >= 40 and len(reporting) >= 50
    assert not tuning & reporting


def test_a_table_replaces_the_one_it_kept_before_and_leaves_the_others(tmp_path, monkeypatch):
    file = tmp_path / "results.md"
    file.write_text("# Benchmarks\n", encoding="utf-8")
    monkeypatch.setattr(report, "RESULTS", file)
    report.keep("one", "First", report.table([{"a": 1, "b": "x"}]))
    report.keep("two", "Second", "text")
    report.keep("one", "First", r"again \1 with a backslash")
    kept = file.read_text(encoding="utf-8")
    assert kept.count("## First") == kept.count("## Second") == 1
    assert "again \\1" in kept and "| a | b |" not in kept
    assert kept.startswith("# Benchmarks")


# --- the evidence ------------------------------------------------------------------------------


def test_the_guides_norm_is_the_guides(bundled):
    model, tokenizer = bundled
    question = ask(model, tokenizer, "The keys to the cabinet", objective="logit")
    expected, target = guide.compute_integrated_gradients(
        model, tokenizer, question.input_ids, "pad", 4
    )
    found = evidence.guides_norm(model, question, n_steps=4).scores
    assert (target,) == question.target and tokenizer.pad_token_id == model.config.eos_token_id
    torch.testing.assert_close(found, expected.norm(dim=-1)[0].float(), rtol=1e-2, atol=1e-3)


def test_captums_default_is_captums(bundled):
    model, tokenizer = bundled
    question = ask(model, tokenizer, "The keys to the cabinet", target=" are", foil=" is")
    direct = captum.attr.IntegratedGradients(lambda rows: objective(model, rows, question))
    expected = direct.attribute(embed_prompt(model, question), internal_batch_size=50)
    found = evidence.captums_default(model, question).scores
    torch.testing.assert_close(found, expected.sum(dim=-1)[0].float(), rtol=1e-2, atol=1e-2)


def test_a_prompt_that_was_measured_is_not_measured_again(bundled, tmp_path, monkeypatch):
    """Two runs over the same prompts: the second, of which every part is there, runs none."""
    measured = []

    def measure(case, number):
        measured.append(case)
        rows = [(name, "mean", "faithfulness", 1.0) for name in METHODS]
        rows += [(name, "", what, 1.0) for name in METHODS for what in ONES]
        return 5, rows

    ONES = ("reciprocal_rank", "chance_reciprocal_rank", "evaluations", "forwards", "seconds")
    monkeypatch.setattr(evidence, "measure", measure)
    monkeypatch.setattr(evidence, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(evidence, "FAMILIES", ("capital",))
    monkeypatch.setattr(evidence, "CLOSED", 0)
    monkeypatch.setattr(evidence, "start_worker", lambda: None)
    monkeypatch.setattr(evidence, "WORKER", dict(zip(("model", "tokenizer"), bundled, strict=True)))
    wanted = list(islice(solved(*bundled, cases("capital", "tuning")), 3))
    for number, (case, _, _) in enumerate(wanted):
        evidence.run_one("tuning", "capital", number, case)
    assert len(measured) == 3
    evidence.main(split="tuning", per_family=3, workers=1, out=tmp_path / "table.parquet")
    assert len(measured) == 3
    table = evidence_table(tmp_path / "table.parquet")
    assert table.groupby("case").ngroups == 3 and set(table["method"]) == set(METHODS)
    assert not list((tmp_path / "kept").glob("*.part"))


def test_the_committed_table_is_what_this_code_measures(bundled):
    """One prompt of it again, for the methods that take a pass or two."""
    model, tokenizer = bundled
    table = evidence_table()
    row = table[(table["split"] == "reporting") & (table["family"] == "capital")]
    row = row[(row["case"] == 0) & (row["measure"] == "reciprocal_rank")].set_index("method")
    case, question, other = next(solved(model, tokenizer, cases("capital", "reporting")))
    places = evidence_positions(question, other)
    for method in ("saliency", "gradient_x_input", "relevance", "alti_logit", "occlusion"):
        result = attribute(model, question, method)
        found = reciprocal_rank(result.scores, places, result.signed)
        assert found == pytest.approx(row.loc[method, "value"]), (case.prompt, method)


def test_the_committed_table_covers_every_family_and_method():
    table = evidence_table()
    assert set(table["split"]) == {"reporting"}
    assert set(METHODS) | {evidence.GUIDE, evidence.CAPTUM} <= set(table["method"])
    prompts = table.groupby("family", observed=True)["case"].nunique()
    assert set(prompts.index) == set(FAMILIES) and prompts.sum() >= 200


# --- precisions --------------------------------------------------------------------------------


def test_a_model_is_measured_in_every_precision_once_and_others_stay_in_the_table(
    tiny_folder, tmp_path, monkeypatch
):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(precision, "KEPT", tmp_path / "kept")
    out, other = tmp_path / "table.csv", dict.fromkeys(precision.COLUMNS, "another")
    pd.DataFrame([other]).to_csv(out, index=False)
    precision.main(model=[str(tiny_folder)], prompts=1, out=out)
    table = precision._read(out)
    assert (table.iloc[0] == "another").all()
    found = table[table["sha256"] == weights_digest(tiny_folder)]
    assert set(found["precision"]) == set(precision.PRECISIONS)
    half = found[found["precision"] == "bfloat16"]
    assert set(half["method"]) == {"", *METHODS}
    moved = half[half["measure"] == "moved"].set_index("method")["value"].astype(float)
    assert moved["random"] == 0 and (moved.drop("random") > 0).all()
    monkeypatch.setattr(precision, "in_precision", None)  # nothing is loaded a second time
    precision.main(model=[str(tiny_folder)], prompts=1, out=out)
    assert precision._read(out).equals(table)


def test_the_committed_table_of_precisions_is_of_this_model_and_in_the_results(bundled):
    table = precision._read(precision.TABLE)
    results = report.RESULTS.read_text(encoding="utf-8")
    assert weights_digest() in set(table["sha256"])
    assert all(digest in results for digest in set(table["sha256"]))
    for _, some in table.groupby("sha256"):
        assert set(some["precision"]) == set(precision.PRECISIONS)
        for name in ("bfloat16", "float16"):
            assert {"", *METHODS} == set(some[some["precision"] == name]["method"])
    own = table[(table["sha256"] == weights_digest()) & (table["prompt"] == 0)]
    own = own[(own["precision"] == "bfloat16") & (own["measure"] == "divergence")]
    model, tokenizer = bundled
    question = next(
        q for q in questions(model, tokenizer, "reporting") if len(q.labels) in precision.TOKENS
    )
    half = precision.next_logits(
        precision.in_precision("SmolLM2-135M-Instruct", "bfloat16"), question
    )
    exact = precision.next_logits(model, question)
    found = {what: value for _, what, value in precision.compared((exact, {}), (half, {}))}
    assert (
        0.2 < found["divergence"] / own["value"].astype(float).item() < 5
    )  # digits of half precision


# --- the old code and the new ------------------------------------------------------------------


def test_two_checkouts_take_turns_and_their_scores_are_compared():
    """This checkout against itself: the same scores, and a ratio that can be read."""
    command = [sys.executable, str(ROOT / "benchmarks" / "old_and_new.py"), str(ROOT)]
    command += ["--repeats", "1", "--only", "relevance, 6"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| rel")]
    assert [row[0] for row in rows] == ["| relevance, 6", "| relevance, 6, no foil"]
    assert all(float(row[3]) > 0 for row in rows) and rows[0][5] == "0e+00 |"


# --- integrated gradients on other paths --------------------------------------------------------


def test_one_token_at_a_time_adds_up_to_occlusion(tiny, monkeypatch):
    monkeypatch.setattr(ig_answers, "NODES", 64)
    model, tokenizer = tiny
    question = ask(model, tokenizer, "abcde", target="f", foil="g")
    found = ig_answers.one_token_at_a_time(model, question)
    expected = attribute(model, question, "occlusion", replacement="mean").scores
    torch.testing.assert_close(found.scores, expected, rtol=1e-3, atol=1e-3)
    assert found.evaluations == 5 * 64


def test_subsets_that_keep_every_token_are_the_slope_at_the_prompt(tiny):
    model, tokenizer = tiny
    question = ask(model, tokenizer, "abcde", target="f", foil="g")
    embeds = embed_prompt(model, question)
    step = embeds - baseline_embeds(model, question, "mean")
    expected = (objective_gradient(model, embeds, question) * step).sum(dim=-1)[0]
    whole = ig_answers.random_subsets(model, question, 1.0, seed=0)
    assert list(whole) == list(ig_answers.SUBSETS)
    for result in whole.values():
        torch.testing.assert_close(result.scores, expected, rtol=1e-4, atol=1e-4)
    some = ig_answers.random_subsets(model, question, 0.5, seed=0)
    assert (some[16].scores - expected).abs().max() > 0.01


def test_the_mean_takes_each_tokens_norm(tiny):
    model, tokenizer = tiny
    question = ask(model, tokenizer, "abcde", target="f", foil="g")
    found = ig_answers.starts(model, question, question)["line from the mean at each token's norm"]
    norms = embed_prompt(model, question)[0].norm(dim=-1)
    torch.testing.assert_close(found.norm(dim=-1), norms)


def test_the_committed_answers_are_those_of_the_results():
    found = pd.read_csv(ig_answers.TABLE)
    results = report.RESULTS.read_text(encoding="utf-8")
    section = results.partition("<!-- ig_answers -->")[2].partition("<!-- end ig_answers -->")[0]
    assert {"occlusion", "chance", "line from the mean", ig_answers.ALONE} <= set(found["method"])
    for row in found.itertuples():
        band = f"{row.rank_mean:.2f} ({row.rank_low:.2f} to {row.rank_high:.2f})"
        assert f"| {row.method} | {band} |" in section


# --- yardsticks of others ----------------------------------------------------------------------


def test_the_indirect_objects_are_the_published_ones():
    """Each of 1,000 prompts holds the name that is the answer once, and the other twice."""
    digest = hashlib.sha256((yardsticks.DATA / "ioi.csv").read_bytes()).hexdigest()
    assert digest in (yardsticks.DATA / "README.md").read_text(encoding="utf-8")
    found = list(yardsticks.indirect_objects())
    assert len(found) == 1000
    for prompt in found:
        assert len(yardsticks.places_of(prompt.target, prompt.text)) == 1
        first, second = yardsticks.places_of(prompt.foil, prompt.text)
        assert prompt.evidence[yardsticks.GIVER] == second > first


def test_sentences_of_agreement_have_a_noun_of_the_other_number_in_between():
    for prompt in islice(yardsticks.agreement(), 200):
        begin, end = prompt.evidence[yardsticks.AGREEMENT]
        subject, last = prompt.text[begin:end], prompt.text.split()[-1]
        assert subject.endswith("s") == (prompt.target == "are")
        # the last word is that noun, or the verb of the clause that it is the subject of
        is_verb = last.removesuffix("s") in ("like", "admire", "hate", "love")
        assert (last.endswith("s") == (prompt.target == "are")) == is_verb


@pytest.mark.parametrize("kind", [yardsticks.indirect_objects, yardsticks.agreement])
def test_the_deciding_word_is_found_among_the_tokens(bundled, kind):
    _, tokenizer = bundled
    for prompt in islice(kind(), 40):
        ids = tokenizer(prompt.text)["input_ids"]
        for begin, end in prompt.evidence.values():
            places = yardsticks.positions_of(tokenizer, prompt.text, (begin, end))
            assert tokenizer.decode([ids[p] for p in places]).strip() == prompt.text[begin:end]
            before = tokenizer.decode(ids[: places[0]])
            assert before.strip() == prompt.text[:begin].strip()  # this occurrence, no other


def test_soft_erasure_takes_nothing_of_no_score_and_all_of_equal_scores(bundled):
    prompt, question = next(yardsticks.answered(*bundled, yardsticks.agreement()))
    assert prompt.text == question.prompt
    units = question.units
    some = {
        "against": Attribution(-torch.ones(len(units)), units),
        "alike": Attribution(torch.ones(len(units)), units),
    }
    rows = yardsticks.soft_comprehensiveness(bundled[0], question, some, seed=0)
    found = {(name, what): value for name, what, value in rows}
    assert found["against", "fall"] == pytest.approx(0, abs=1e-5)
    assert found["against", "erased"] == 0 and found["alike", "erased"] == 1
    assert found["alike", "fall of all"] > 0
    assert found["alike", "fall"] == pytest.approx(found["alike", "fall of all"], abs=1e-5)
