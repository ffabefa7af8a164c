"""The pages over all reports: what is read, what is left out, and the numbers of the comparison."""

import base64
import hashlib
import html
import json
import re
import shutil

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from report_folders import write_report

from helpers.faithfulness import bootstrap_interval, rank_correlation
from llama_reports.gallery import agreement, compare, read_reports, write_index
from llama_reports.pages import content_policy, report_page, shown

METHODS = {"saliency": {}, "occlusion": {}, "random": {}}


def text_of(page):
    """What is read on a page, roughly: no tags, no style, no script."""
    page = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def comparison(out):
    write_index(out)
    return text_of((out / "comparison.html").read_text(encoding="utf-8"))


# --- what is read ------------------------------------------------------------------------------


def test_no_reports_is_a_page_that_says_so(tmp_path):
    index = write_index(tmp_path)
    assert index == tmp_path / "index.html" and "0 reports" in text_of(index.read_text())
    assert "no report to compare" in comparison(tmp_path)
    assert not (tmp_path / "scores.parquet").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b'{"slug": "x"}', b'{"prompt": 5}', b"\xff\xfe", b"[" * 100_000],
)
def test_a_folder_without_a_valid_report_is_left_out_and_counted(tmp_path, content):
    write_report(tmp_path, "good", "The keys to", METHODS)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "report.json").write_bytes(content)
    (tmp_path / "notes").mkdir()
    shutil.copytree(tmp_path / "good", tmp_path / ".making-x")  # one that is being written
    page = text_of(write_index(tmp_path).read_text(encoding="utf-8"))
    assert "1 report, 0 failed. 1 folder left out" in page


@pytest.mark.parametrize("name", ["evidence.csv", "scores.csv", "provenance.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"a,b\n1,2\n", b'"unclosed\n', b"[]"])
def test_a_broken_file_takes_no_other_report_with_it(tmp_path, name, content):
    for slug in ("good", "broken"):
        write_report(tmp_path, slug, f"A {slug} prompt", METHODS)
    (tmp_path / "broken" / name).write_bytes(content)
    page = text_of(write_index(tmp_path).read_text(encoding="utf-8"))
    assert "A good prompt" in page and "A broken prompt" in page and "2 reports, 0 failed." in page


def test_wrong_types_in_a_report_are_shown_as_nothing(tmp_path):
    folder = write_report(tmp_path, "odd", "The keys to", METHODS, target=5, tokens="many")
    facts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    facts |= {"seconds": float("nan"), "model": None, "notebook": ["x"], "more": {}}
    (folder / "report.json").write_text(json.dumps(facts), encoding="utf-8")
    page = text_of(write_index(tmp_path).read_text(encoding="utf-8"))
    assert "The keys to" in page and "nan" not in page and "None" not in page


def test_labels_that_look_like_numbers_or_nothing_stay_text_in_the_table(tmp_path):
    labels = {"a": "42", "b": "NA", "c": "1e5", "d": 'a "b",\r\nc\n'}
    for slug, label in labels.items():
        scores = write_report(tmp_path, slug, "A prompt", METHODS) / "scores.csv"
        pd.read_csv(scores).assign(label=label).to_csv(scores, index=False)
    write_index(tmp_path)
    table = pd.read_parquet(tmp_path / "scores.parquet")
    columns = "slug method output unit part start end label score error"
    assert list(table.columns) == columns.split()
    assert table.groupby("slug")["label"].unique().map(list).to_dict() == {
        slug: [label] for slug, label in labels.items()
    }
    assert table["score"].dtype == float and table["unit"].dtype == int


def test_a_report_that_is_gone_is_gone_from_the_table(tmp_path):
    write_report(tmp_path, "only", "The keys to", METHODS)
    write_index(tmp_path)
    assert (tmp_path / "scores.parquet").exists()
    shutil.rmtree(tmp_path / "only")
    write_index(tmp_path)
    assert not (tmp_path / "scores.parquet").exists()


def test_links_are_encoded_and_reach_the_folder_not_what_the_file_says(tmp_path):
    name = "a b#c?d%2e&'e\"<f>:é"
    write_report(tmp_path, name, "The keys to", METHODS)
    facts = json.loads((tmp_path / name / "report.json").read_text(encoding="utf-8"))
    facts["slug"] = "../../elsewhere"
    (tmp_path / name / "report.json").write_text(json.dumps(facts), encoding="utf-8")
    page = write_index(tmp_path).read_text(encoding="utf-8")
    assert 'href="a%20b%23c%3Fd%252e%26%27e%22%3Cf%3E%3A%C3%A9/report.html"' in page
    assert "elsewhere" not in page


def test_failures_come_first_with_their_error_and_their_notebook(tmp_path):
    write_report(tmp_path, "a", "one", METHODS)
    write_report(tmp_path, "b", "two", {"occlusion": {"closed": "NO", "gap": 0.3}})
    write_report(tmp_path, "c", "three", error="RuntimeError: out of memory")
    page = write_index(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r'<tr id="(\w)" data-state="([\w ]+)"', page) == [
        ("c", "failed"),
        ("a", "done"),
        ("b", "done"),
    ]
    assert "RuntimeError: out of memory" in page and 'href="c/report.ipynb"' in page


def test_of_a_failed_report_on_a_long_prompt_the_error_stands_before_its_beginning():
    cell = nbformat.v4.new_code_cell("1 / 0", execution_count=1)
    notebook = nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_markdown_cell("never run")])
    page = report_page(notebook, {"prompt": "word " * 5000, "error": "ZeroDivisionError: 0"})
    text = text_of(page[page.index("<body") :])
    assert text.index("ZeroDivisionError") < text.index("word word")
    assert "(24,400 more characters)" in text and "never run" not in text and "1 / 0" in text
    done = text_of(report_page(notebook, {"prompt": "word", "error": None}))
    assert "never run" in done and "This report failed" not in done


def test_a_very_long_prompt_is_cut_and_says_so(tmp_path):
    write_report(tmp_path, "long", "word " * 5000, METHODS)
    page = write_index(tmp_path).read_text(encoding="utf-8")
    assert "(23,000 more characters)" in page and len(page) < 60_000


def test_the_probability_of_the_target_is_a_column_where_it_is_known(tmp_path):
    write_report(tmp_path, "a", "one", METHODS)
    assert "Target %" not in text_of(write_index(tmp_path).read_text(encoding="utf-8"))
    write_report(tmp_path, "b", "two", METHODS, probability=0.87)
    page = text_of(write_index(tmp_path).read_text(encoding="utf-8"))
    assert "Target %" in page and "87 %" in page


# --- a row says what a report says --------------------------------------------------------------


def test_a_row_has_the_coloured_prompt_the_answer_and_the_trust(tmp_path):
    trust = {"borne_out": "weak", "sentences": ["Methods <differ>."]}
    said = {"occlusion": {"scores": [0.5, -1.0, 2.0]}, "saliency": {"scores": [3, 2, 1]}}
    told = {"heading": "Why “x”?", "answered": "It goes on with <x>: 31 %.", "trust": trust}
    told |= {"method": "occlusion", "strongest": [2, 0]}
    write_report(tmp_path, "b", "no heading", said, summary=told | {"heading": None})
    assert ">no heading</a>" in write_index(tmp_path).read_text(encoding="utf-8")
    shutil.rmtree(tmp_path / "b")
    write_report(tmp_path, "a", "one", said, summary=told)
    page = write_index(tmp_path).read_text(encoding="utf-8")
    (coloured,) = re.findall(r'<pre class="coloured".*?</pre>', page)
    marks = [("up10", " 2", "1"), ("up2", " 0", "2")]
    assert re.findall(r'"(up\d+)"><mark>([^<]*)<sup>(\d)', coloured) == marks[::-1]
    assert '"down5"> 1</span>' in coloured
    assert "It goes on with &lt;x&gt;: 31 %." in page and ">Why “x”?</a>" in page
    assert 'data-state="weakly borne out"' in page and 'title="Methods &lt;differ&gt;."' in page


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"method": "magic", "strongest": [0]},
        {"method": "saliency", "strongest": "012"},
        {"method": "saliency", "strongest": [3]},
        {"method": "saliency", "strongest": [-1]},
        {"method": "saliency", "strongest": ["<b>"]},
        {"method": ["saliency"], "strongest": [0], "heading": {}, "trust": [1]},
        {"trust": {"borne_out": ["yes"], "sentences": "all"}},
    ],
)
def test_facts_that_mean_nothing_leave_the_prompt_as_it_is(tmp_path, told):
    write_report(tmp_path, "a", "The keys <to>", {"saliency": {}}, summary=told)
    page = write_index(tmp_path).read_text(encoding="utf-8")
    assert 'class="coloured"' not in page and ">The keys &lt;to&gt;</a>" in page
    assert 'data-state="done"' in page


# --- the comparison ----------------------------------------------------------------------------


def scored(out, count, methods, seed=0, **facts):
    """``count`` reports with random scores; returns them as [count, methods, 6]."""
    scores = np.random.default_rng(seed).normal(size=(count, len(methods), 6))
    for i, each in enumerate(scores):
        said = {
            name: {"scores": row, "gap": 0.01 * (i + 1), "beats_random": 0.1 * i, "closed": "yes"}
            for name, row in zip(methods, each, strict=True)
        }
        write_report(out, f"{seed}-{i}", f"prompt {seed} {i}", said, figure=False, **facts)
    return scores


def section_of(out):
    (section,) = compare(read_reports(out)[0])
    return section


def test_agreement_is_the_mean_rank_correlation_of_magnitudes(tmp_path):
    scores = scored(tmp_path, 7, ["a", "b", "c"])
    found = section_of(tmp_path)["agreement"]
    for i, j, pair in ((0, 1, ("a", "b")), (1, 2, ("b", "c"))):
        each = [rank_correlation(*np.abs(report[[i, j]])) for report in scores]
        mean, low, high = bootstrap_interval(each)
        expected = {"mean": mean, "low": low, "high": high, "prompts": 7}
        assert found[pair] == pytest.approx(expected)


def test_agreement_is_that_of_totals_whatever_single_outputs_say(tmp_path):
    scored(tmp_path, 1, ["a", "b"])
    write_index(tmp_path)
    table = pd.read_parquet(tmp_path / "scores.parquet")
    table["prompt"] = table["slug"]
    other = table.assign(output=1, score=np.arange(len(table)) % 5)
    assert agreement(pd.concat([table, other])) == agreement(table)


def test_reports_on_one_prompt_count_once(tmp_path):
    for slug, first in (("a", 0.2), ("b", 0.4), ("c", 0.9)):
        prompt = "other" if slug == "c" else "the same"
        write_report(tmp_path, slug, prompt, {"saliency": {"beats_random": first}})
    section = section_of(tmp_path)
    beats = section["methods"][0]["beats"]
    assert section["prompts"] == 2 and section["reports"] == 3
    assert beats == {
        "mean": pytest.approx((0.3 + 0.9) / 2),
        "low": None,
        "high": None,
        "prompts": 2,
    }


def test_few_prompts_have_no_interval_and_the_page_says_why(tmp_path):
    scored(tmp_path, 4, ["a", "b"])
    assert section_of(tmp_path)["agreement"]["a", "b"]["low"] is None
    page = comparison(tmp_path)
    assert "fewer than five prompts no interval" in page and "bootstrap" not in page
    scored(tmp_path, 4, ["a", "b"], seed=1)
    assert section_of(tmp_path)["agreement"]["a", "b"]["low"] is not None
    assert "no interval" not in comparison(tmp_path)


def test_one_report_and_reports_of_one_method_are_compared(tmp_path):
    write_report(tmp_path, "a", "one", {"saliency": {"beats_random": 0.75, "gap": None}})
    page = comparison(tmp_path)
    assert "1 prompt in 1 report" in page and "75" in page and "same order?" not in page


def test_methods_that_only_some_reports_have_keep_their_own_numbers(tmp_path):
    scored(tmp_path, 6, ["a", "b"])
    scored(tmp_path, 5, ["b", "c"], seed=1)
    section = section_of(tmp_path)
    assert {row["method"]: row["prompts"] for row in section["methods"]} == {
        "a": 6,
        "b": 11,
        "c": 5,
    }
    assert section["agreement"]["a", "b"]["prompts"] == 6
    assert section["agreement"]["b", "c"]["prompts"] == 5
    assert ("a", "c") not in section["agreement"]


def test_the_control_is_last_and_the_best_borne_out_first(tmp_path):
    said = {
        "random": {"beats_random": 0.99},
        "b": {"beats_random": 0.2},
        "a": {"beats_random": 0.8},
    }
    write_report(tmp_path, "x", "one", said)
    assert [row["method"] for row in section_of(tmp_path)["methods"]] == ["a", "b", "random"]
    assert "the control" in comparison(tmp_path)


def test_a_prompt_too_short_and_a_method_without_an_order_have_no_agreement(tmp_path):
    write_report(tmp_path, "a", "one", {"a": {"scores": [1, 2]}, "b": {"scores": [2, 1]}})
    write_report(tmp_path, "b", "two", {"a": {"scores": [1, 2, 3]}, "b": {"scores": [1, -1, 1]}})
    assert section_of(tmp_path)["agreement"] == {}
    assert "What the model says" in comparison(tmp_path)


def test_models_are_never_averaged_together(tmp_path):
    scored(tmp_path, 5, ["a", "b"], model="one")
    scored(tmp_path, 5, ["a", "b"], seed=1, model="two", weights_sha256="0" * 64)
    scored(tmp_path, 5, ["a", "b"], seed=2, model="two", weights_sha256="f" * 64)
    write_report(tmp_path, "failed", "x", error="no memory", model="two")
    sections = compare(read_reports(tmp_path)[0])
    assert [(s["model"], s["prompts"], s["failed"]) for s in sections] == [
        ("one", 5, 0),
        ("two", 5, 1),
        ("two", 5, 0),
    ]
    page = comparison(tmp_path)
    assert "They are of 3 models" in page and "weights ffffffffffff" in page


def test_reports_that_cannot_be_compared_are_told(tmp_path):
    write_report(tmp_path, "a", "one", error="no memory")
    write_report(tmp_path, "b", "two")  # another notebook, which saves no table
    page = comparison(tmp_path)
    assert "1 failed and is not in these numbers" in page
    assert "None of its reports can be compared: 1 failed, 1 saved neither" in page


def test_medians_of_the_comparison(tmp_path):
    for i, place in enumerate([1, 1, 4]):
        said = {"evidence_rank": place, "gap": [0.01, 0.5, 0.03][i], "seconds": [1, 9, 2][i]}
        said |= {"closed": ["yes", "NO", "yes"][i], "evaluations": [3, 5, 4][i]}
        write_report(tmp_path, f"r{i}", f"p{i}", {"m": said})
    (row,) = section_of(tmp_path)["methods"]
    assert (row["place"], row["first"], row["places"]) == (1, 2, 3)
    assert (row["gap"], row["closed"], row["promised"]) == (0.03, 2, 3)
    assert (row["seconds"], row["gradients"], row["forwards"]) == (2, 4, 2)
    page = comparison(tmp_path)
    assert "2 of 3" in page and "3.0 %" in page


def test_the_gaps_are_drawn_with_what_they_show_in_words(tmp_path):
    scored(tmp_path, 5, ["a_$x$", "b"])
    page_file = tmp_path / "comparison.html"
    comparison(tmp_path)
    alt = html.unescape(re.search(r'alt="([^"]*)"', page_file.read_text(encoding="utf-8"))[1])
    assert "a_$x$ 3.0% over 5" in alt and "logarithmic" in alt
    with Image.open(tmp_path / "_figures" / "gaps-1.png") as picture:
        assert picture.width > 400
    assert (tmp_path / "_figures" / "gaps-1.svg").read_bytes().startswith(b"<?xml")


# --- the policy --------------------------------------------------------------------------------


def test_the_policies_allow_the_page_s_own_style_and_script_by_hash_and_nothing_else(tmp_path):
    write_report(tmp_path, "a", "one", METHODS)
    write_index(tmp_path)
    report = report_page(nbformat.v4.new_notebook(), {"prompt": "x", "error": None})
    pages = [
        (tmp_path / name).read_text(encoding="utf-8") for name in ("index.html", "comparison.html")
    ]
    for page in [*pages, report]:
        policy = html.unescape(re.search(r'content="(default-src[^"]*)"', page)[1])
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
        assert "unsafe" not in policy and "*" not in policy
        for tag, rule in (("style", "style-src"), ("script", "script-src")):
            found = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page, flags=re.DOTALL)
            hashes = {base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in found}
            assert rules.get(rule, "").split() == [f"'sha256-{each}'" for each in hashes]
        assert not re.search(
            r"\s(style|on\w+)\s*=", re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
        )
    assert "script-src" not in report


def test_a_policy_without_a_script_allows_none():
    assert "script-src" not in content_policy(style="", images="data:")


def test_what_html_cannot_carry_is_made_visible_and_the_rest_left_alone():
    assert shown("a\x00b\r\nc\x7f\ud800\t") == "a␀b␍\nc␡\ufffd\t"
    assert shown("\u202e\u200b<é🙂") == "\u202e\u200b<é🙂"


def test_html_of_an_output_keeps_its_table_and_loses_what_acts():
    table = pd.DataFrame({"token": ["<b>x"], "score": [1.5]}).to_html()
    acts = (
        '<meta http-equiv="refresh" content="0;url=https://example.org"><style>p{}</style>'
        '<a href="javascript:alert(1)" onclick="alert(1)">link</a><iframe src="x"></iframe>'
        '<img src="https://example.org/x.png"><p style="color:red">red</p><base href="//x">'
    )
    outputs = [nbformat.v4.new_output("display_data", {"text/html": t}) for t in (table, acts)]
    outputs.append(nbformat.v4.new_output("stream", text="\x1b[38;5;28mgreen\x1b[0m <i>"))
    cells = [
        nbformat.v4.new_code_cell("x < 1", outputs=outputs),
        nbformat.v4.new_markdown_cell("## A heading\n\n| a | b |\n|---|--:|\n| 1 | **2** |"),
    ]
    page = report_page(nbformat.v4.new_notebook(cells=cells), {"prompt": "x", "error": None})
    body = page.split("</header>")[1]
    assert "<th>token</th>" in body and "&lt;b&gt;x" in body and "x &lt; 1" in body
    assert "<h2" in body and "<strong>2</strong>" in body and "green &lt;i&gt;" in body
    assert not re.search(r"<(meta|style|iframe|base|script)|javascript:|onclick|style=|//", body)
