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

from helpers import METHODS, Attribution, InputError, ask, attribute
from helpers.attribution import baseline_embeds, embed_prompt, objective, objective_gradient
from helpers.attribution.perturbation import shapley_rows
from helpers.faithfulness import evidence_table
from helpers.ground_truth import (
    FAMILIES,
    LONGER,
    cases,
    evidence_positions,
    evidence_units,
    reciprocal_rank,
    solved,
)
from helpers.models import weights_digest
from helpers.summary import default_units, explain

pytestmark = pytest.mark.thorough
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import attribution as benchmark  # noqa: E402
import evidence  # noqa: E402
import ig_answers  # noqa: E402
import long_prompts  # noqa: E402
import precision  # noqa: E402
import report  # noqa: E402
import trust  # noqa: E402
import yardsticks  # noqa: E402
from peers import usual  # noqa: E402
from prompt_sets import questions  # noqa: E402


@pytest.mark.parametrize("length", [6, 35, 151, 512, 2048])
def test_a_question_has_exactly_the_length_asked_for(bundled, length):
    assert benchmark.question_of(*bundled, length).input_ids.shape == (1, length)


@pytest.mark.parametrize("peer", ["Captum LayerIntegratedGradients", "ours"])
def test_the_peers_compute_what_the_usual_code_computes(bundled, peer):
    model, tokenizer = bundled
    question = benchmark.question_of(model, tokenizer, 6)
    expected = benchmark.usual(model, tokenizer, question, 3).double()
    found = torch.as_tensor(benchmark.PEERS[peer](model, tokenizer, question, 3)).double()
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_both_gradients_are_the_same(bundled):
    model, tokenizer = bundled
    question = benchmark.question_of(model, tokenizer, 6)
    expected = benchmark.usual_gradient(model, tokenizer, question, 1)
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


def test_the_usual_norm_is_that_of_the_usual_code(bundled):
    model, tokenizer = bundled
    question = ask(model, tokenizer, "The keys to the cabinet", objective="logit")
    expected, target = usual.compute_integrated_gradients(
        model, tokenizer, question.input_ids, "pad", 4
    )
    found = evidence.usual_norm(model, question, n_steps=4).scores
    assert (target,) == question.target and tokenizer.pad_token_id == model.config.eos_token_id
    torch.testing.assert_close(found, expected.norm(dim=-1)[0].float(), rtol=1e-2, atol=1e-3)


def test_captums_default_is_captums(bundled):
    model, tokenizer = bundled
    question = ask(model, tokenizer, "The keys to the cabinet", target=" are", foil=" is")
    direct = captum.attr.IntegratedGradients(lambda rows: objective(model, rows, question))
    expected = direct.attribute(embed_prompt(model, question), internal_batch_size=50)
    found = evidence.captums_default(model, question).scores
    torch.testing.assert_close(found, expected.sum(dim=-1)[0].float(), rtol=1e-2, atol=1e-2)


ONES = ("reciprocal_rank", "chance_reciprocal_rank", "evaluations", "forwards", "seconds")


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """Prompts are marked 1 for every method, into a folder of their own; which ones, as a list."""
    seen = []

    def measure(case, number, more):
        seen.append(case)
        rows = [(name, "mean", "faithfulness", 1.0) for name in METHODS]
        rows += [(name, "", what, 1.0) for name in METHODS for what in ONES]
        return 5, 5, rows

    monkeypatch.setattr(evidence, "measure", measure)
    monkeypatch.setattr(evidence, "KEPT", tmp_path / "parts")
    monkeypatch.setattr(evidence, "WORKER", {})
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # the other tests keep theirs
    return seen


def test_a_prompt_that_was_measured_is_not_measured_again(marked, tmp_path, monkeypatch):
    """Of two runs over the same prompts the second runs none, and one of more prompts the rest."""
    monkeypatch.setattr(evidence, "FAMILIES", ("capital",))
    monkeypatch.setattr(evidence, "LONGER", ())
    run = {"out": tmp_path, "split": "tuning", "workers": 1}
    for per_family, in_all in ((4, 4), (4, 4), (6, 6)):
        evidence.main(per_family=per_family, **run)
        assert len(marked) == len(set(map(repr, marked))) == in_all
    table = evidence_table(tmp_path / "evidence.parquet")
    assert table.groupby("case").ngroups == 6 and set(table["method"]) == set(METHODS)
    assert (tmp_path / "evidence.png").stat().st_size > 10_000
    assert not list((tmp_path / "parts").glob("*.part"))


def test_the_parts_of_two_models_and_of_other_options_are_apart(monkeypatch):
    case = cases("capital", "tuning")[0]
    job = evidence.Job("one", "tuning", "capital", 0, case, True)
    paths = {evidence.part_of(job), evidence.part_of(job._replace(weights="two"))}
    monkeypatch.setattr(evidence, "GRADIENTS", 5)
    assert len(paths | {evidence.part_of(job)}) == 3


def test_a_model_that_solves_nothing_is_told_so_before_any_method_runs(
    marked, tiny_folder, tmp_path
):
    """On the command line that is one sentence, and an exit status of 2."""
    with pytest.raises(InputError, match="no method can be marked on it"):
        evidence.main(model=str(tiny_folder), out=tmp_path, workers=1, per_family=16)
    assert not marked and not (tmp_path / "verdict.md").exists()
    command = [sys.executable, str(ROOT / "benchmarks" / "evidence.py"), "--model", "/no/model"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_one_prompt_of_each_kind_is_measured_on_the_bundled_model(bundled, monkeypatch, tmp_path):
    """Its units, the best order, and what runs on the first prompts of short families alone."""
    monkeypatch.setattr(evidence, "WORKER", dict(zip(("model", "tokenizer"), bundled, strict=True)))
    monkeypatch.setattr(evidence, "GRADIENTS", 33)
    monkeypatch.setattr(evidence, "FEWER_SHAPLEY", 8)
    found = {}
    for family, number in (("agreement", 2), ("passages", 0)):
        case, question, other = next(
            solved(*bundled, cases(family, "tuning")[4:], evidence.UNITS.get(family))
        )  # the fifth's passages are short, and five
        tokens, units, rows = evidence.measure(case, number, more=False)
        assert (tokens, units) == (question.input_ids.shape[1], len(question.units))
        found[family] = pd.DataFrame(rows, columns=["method", "replacement", "measure", "value"])
        assert not set(evidence.COSTLY) & set(found[family]["method"])
        share = found[family].query("measure == 'share'")["value"]
        assert units <= evidence.EXACT and share.max() <= 1 + 1e-3 and share.max() > 0.5
        ranks = found[family].query("measure == 'reciprocal_rank'").set_index("method")["value"]
        assert set(evidence.runs(units)) - {evidence.IG} <= set(ranks.index)
        result = attribute(bundled[0], question, "occlusion")
        places = evidence_units(question, other)
        assert ranks["occlusion"] == reciprocal_rank(result.scores, places, result.signed)
        rows_run = found[family].query("method == 'shapley' and measure == 'forwards'")
        assert (rows_run["value"].item() == 2**units + 1) == (family == "agreement")


def test_shapley_gets_about_the_rows_asked_for():
    for units in (9, 20, 60):
        for short, asked in ((True, evidence.SHAPLEY), (False, evidence.FEWER_SHAPLEY)):
            rows = shapley_rows(units, **evidence.runs(units, short)["shapley"][1])
            assert max(asked, 4 * (units - 1)) <= rows <= asked + 4 * units


def measured(marks, costly=(), measure="reciprocal_rank"):
    """A table as ``make evidence`` keeps it: ``{method: values}``, for the costly half of them."""
    rows = []
    for method, values in marks.items():
        some = values[: len(values) // 2] if method in costly else values
        for case, value in enumerate(some):
            row = ("reporting", "capital", case, 7, 7, method)
            told = {"chance_reciprocal_rank": 0.3, "evaluations": 1, "forwards": 0, "seconds": 0.1}
            rows += [(*row, "", what, number) for what, number in told.items()]
            rows += [(*row, "", "reciprocal_rank", value)]
            rows += [(*row, "mean", what, value) for what in ("faithfulness", "share")]
    columns = ["split", "family", "case", "tokens", "units"]
    return pd.DataFrame(rows, columns=[*columns, "method", "replacement", "measure", "value"])


def test_the_verdict_names_the_winner_or_says_that_there_is_none():
    ahead = {"relevance": [0.9] * 24, "occlusion": [0.5] * 24, evidence.IG: [0.3] * 24}
    families = {
        "capital": evidence.Chosen([None] * 24, 30),
        "copy": evidence.Chosen([], 64),
        "chat": evidence.Chosen([], 0, "It has no template."),
    }
    refused = {"alti_logit": "It has no rules."}
    found = measured(ahead, costly=[evidence.IG])
    page = evidence.verdict(found, "a model", families, refused)
    for part in (
        "# Which method to believe: a model",
        "`relevance`, 0.90 (0.90 to 0.90) mean reciprocal rank, is ahead of every other method",
        "of `occlusion` by 0.40, 0.40 to 0.40",
        "| capital | 24 of 30 | `relevance`",
        "| copy | fewer than 4 of 64: left out |",
        "| chat | It has no template. |",
        "`alti_logit` is left out: It has no rules.",
        f"| {evidence.IG} | 12 |",
    ):
        assert part in page, (part, page)
    seldom = measured(ahead | {evidence.IG: [0.3] * 20}, costly=[evidence.IG])
    assert f"`{evidence.IG}` ran on too few prompts" in evidence.verdict(seldom, "", families, {})
    alike = {"relevance": [0.9, 0.9, 0.2, 0.2] * 4, "occlusion": [0.5] * 16}
    page = evidence.verdict(measured(alike), "a model", families, {})
    assert "No winner: `relevance`, 0.55" in page
    assert "its lead is not certain over `occlusion` (0.05, " in page
    few = evidence.verdict(measured({"one": [1.0] * 4, "two": [0.0] * 4}), "a model", families, {})
    assert "on too few prompts to name a winner" in few


def test_the_figure_marks_what_ran_on_fewer_prompts():
    found = measured({"relevance": [0.9] * 16, evidence.IG: [0.3] * 16}, costly=[evidence.IG])
    labels = [label.get_text() for label in evidence.draw(found).axes[0].get_yticklabels()]
    assert labels == [f"{evidence.IG} *", "relevance"]


def test_a_text_is_put_between_two_marks_and_the_rest_stays(tmp_path):
    file = tmp_path / "a.md"
    file.write_text("before\n<!-- x -->\n<!-- end x -->\nafter\n", encoding="utf-8")
    for text in ("one", "two\nlines"):
        evidence.between(file, "x", text)
        marked = f"before\n<!-- x -->\n{text}\n<!-- end x -->\nafter\n"
        assert file.read_text(encoding="utf-8") == marked
    with pytest.raises(ValueError, match="unpack"):
        evidence.between(file, "y", "lost")


def test_readme_has_the_table_that_is_kept():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    kept = text.partition("<!-- evidence -->\n")[2].partition("\n<!-- end evidence -->")[0]
    assert kept == evidence.readme(evidence_table())


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
    assert set(METHODS) | {evidence.USUAL, evidence.CAPTUM} <= set(table["method"])
    prompts = table.groupby("family", observed=True)["case"].nunique()
    assert set(FAMILIES + LONGER) == set(prompts.index) and prompts.sum() >= 150


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
    own = own[(own["precision"] == "bfloat16") & (own["measure"] == "logit")]
    model, tokenizer = bundled
    question = next(
        q for q in questions(model, tokenizer, "reporting") if len(q.labels) in precision.TOKENS
    )
    half = precision.next_logits(
        precision.in_precision("SmolLM2-135M-Instruct", "bfloat16"), question
    )
    exact = precision.next_logits(model, question)
    found = {what: value for _, what, value in precision.compared((exact, {}), (half, {}))}
    # processors round in other places; float16 is 5 times as close, 8 bits are 7 times as far
    assert 1 / 3 < found["logit"] / own["value"].astype(float).item() < 3


# --- the old code and the new ------------------------------------------------------------------


def test_two_checkouts_take_turns_and_their_scores_are_compared():
    """This checkout against itself: the same scores, and a ratio that can be read."""
    command = [sys.executable, str(ROOT / "benchmarks" / "old_and_new.py"), str(ROOT)]
    command += ["--repeats", "1", "--only", "occlusion, 6"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| occ")]
    assert [row[0] for row in rows] == ["| occlusion, 6", "| occlusion, 6, no foil"]
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


def test_a_model_that_gets_no_sentence_right_is_told_so(tiny, monkeypatch):
    monkeypatch.setattr(yardsticks, "answered", lambda model, tokenizer, prompts: iter([]))
    with pytest.raises(InputError, match="Of agreement this model gets 0 right"):
        yardsticks.enough(*tiny, 60)


def test_sentences_of_agreement_come_to_an_end_and_are_the_same_every_time():
    found = [list(yardsticks.agreement()) for _ in range(2)]
    assert len(found[0]) == yardsticks.SENTENCES and found[0] == found[1]


def test_a_kind_that_is_rarely_right_is_left_out_and_told(bundled, monkeypatch):
    monkeypatch.setattr(yardsticks, "indirect_objects", lambda: iter([]))
    (some,), (few,) = yardsticks.enough(*bundled, 2)
    assert len(some) == 2 and "Of indirect objects this model gets 0 right" in few


# --- long prompts ------------------------------------------------------------------------------


def test_of_a_long_prompt_one_passage_alone_holds_the_answer():
    for entry, place in long_prompts.entries(20):
        answer = f"is{entry['target']}."
        holds = [answer in source for source in entry["sources"]]
        assert holds.index(True) == place and sum(holds) == 1 and len(holds) == 12
        assert all(entry["prompt"].count(source) == 1 for source in entry["sources"])
        assert entry["prompt"].count(answer[:-1]) == 1  # the question does not give it away


# --- how far to trust a verdict ----------------------------------------------------------------


def test_a_prompt_is_right_where_its_first_unit_holds_the_word_that_decides(bundled):
    (_, question, other), *_ = solved(*bundled, cases("capital", "tuning"))
    found = trust.judged(bundled[0], question, other)
    words = default_units(question)
    first = explain(bundled[0], words).strongest[0]
    assert found["right"] == (first in evidence_units(words, other))
    assert found["verdict"] in trust.VERDICTS and found["units"] == len(words.units)


def verdicts(right):
    """A made-up table: ``{verdict: shares that are right}``, two prompts a pair."""
    rows = [
        {"family": verdict, "case": case, "verdict": verdict, "right": float(value)}
        for verdict, values in right.items()
        for case, value in enumerate(values)
    ]
    tests = {"the odds halve": True, "methods agree": False, "units": 5}
    return pd.DataFrame(rows).assign(**tests)


def test_a_verdict_that_does_not_separate_is_called_so():
    told = trust.separates(verdicts({"yes": [1] * 30, "weak": [1, 1, 0] * 10, "no": [0] * 30}))
    assert "'borne out' is more often right than 'not borne out': by 100 points" in told
    told = trust.separates(verdicts({"yes": [1, 1, 0, 0] * 5, "no": [0, 0, 1, 1] * 5}))
    assert "no more often right than 'not borne out': by 0 points" in told
    assert "'weakly borne out' was said of none." in told and "no proof" not in told
    told = trust.separates(verdicts({"yes": [1, 0, 0, 0] * 5, "no": [0, 0]}))
    assert "Of 'not borne out' there are too few prompts" in told
    assert "It is no proof: of yes (25%) what is 'borne out' is mostly wrong." in told
    text = trust.report_of(verdicts({"yes": [1, 0] * 10, "no": [0, 0]}))
    assert "| borne out | 20 | 50% | 50% to 50% |" in text and "By chance it would in 20%" in text
    assert "| methods agree | none | 45% of 22 |" in text
