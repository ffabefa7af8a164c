"""Two folders of reports side by side: what is joined, what moved, what is refused."""

import re

import pytest
from report_folders import write_report

from helpers import InputError
from llama_reports.gallery import read_reports
from llama_reports.two_runs import compare_reports, compare_runs


def report(out, slug, scores, **facts):
    told = {"method": "occlusion", "heading": f"Why {slug}?", "probability": 0.25} | facts
    said = {"occlusion": {"scores": scores}, "saliency": {}}
    return write_report(out, slug, f"the prompt {slug}", said, summary=told)


@pytest.fixture
def runs(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    report(one, "same", [1, 2, 3], answer="<b>Riga</b>")
    report(other, "same", [1, 2, 3], answer="Tallinn", probability=0.5, model="B")
    report(one, "turned", [4, 1, -3])
    report(other, "turned", [-3, 1, 4])
    report(one, "alone", [1, 2, 3])
    write_report(other, "fails", "x", error="no memory")
    write_report(one, "fails", "x", {"occlusion": {}})
    return one, other


def pair_of(runs, slug):
    reports = [{each.slug: each for each in read_reports(out)[0]}[slug] for out in runs]
    return compare_reports(*reports)


def test_agreement_is_that_of_ranks_and_what_moved_is_a_share_of_all_scores(runs):
    pair = pair_of(runs, "turned")
    assert pair.method == "occlusion" and pair.agreement == pytest.approx(-1)
    assert [label for label, *_ in pair.moved] == [" 0", " 2"]
    assert pair.moved[0][1:] == pytest.approx((50, -37.5))
    assert pair.top(pair.first)[0] == " 0" and pair.top(pair.second)[0] == " 2"
    same = pair_of(runs, "same")
    assert same.agreement == pytest.approx(1) and same.moved == ()


def test_other_words_have_no_agreement_and_no_shared_method_is_said(tmp_path):
    report(tmp_path / "one", "a", [1, 2, 3])
    report(tmp_path / "other", "a", [1, 2, 3, 4])
    pair = pair_of((tmp_path / "one", tmp_path / "other"), "a")
    assert pair.method == "occlusion" and pair.agreement is None and pair.moved == ()
    write_report(tmp_path / "third", "a", "x", {"attention": {}}, summary={"method": "attention"})
    assert pair_of((tmp_path / "one", tmp_path / "third"), "a").method == ""


def test_the_page_has_both_sides_of_every_shared_id_the_most_different_first(runs):
    page = compare_runs(*runs)
    text = page.read_text(encoding="utf-8")
    assert page == runs[0] / "compared.html"
    assert re.findall(r"Why (\w+)\?", text) == ["turned", "same"]
    assert "&lt;b&gt;Riga&lt;/b&gt;" in text and "Tallinn" in text and "no memory" in text
    assert "25\xa0%" in text and "50\xa0%" in text and "1 in A alone" in text
    assert 'href="same/report.html"' in text and 'href="../other/same/report.html"' in text
    elsewhere = compare_runs(*runs, runs[0].parent / "page.html")
    assert 'href="one/same/report.html"' in elsewhere.read_text(encoding="utf-8")


def test_folders_without_reports_or_shared_ids_are_refused(command, tmp_path, runs):
    report(tmp_path / "third", "b", [1, 2, 3])
    with pytest.raises(InputError, match="share no id"):
        compare_runs(runs[0], tmp_path / "third")
    done = command("compare", runs[0], tmp_path / "no")
    assert done.exit_code == 2 and "There are no reports in" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_text_acts_on_the_page(tmp_path):
    text = "<script>alert(1)</script>"
    for side in ("one", "other"):
        told = {"heading": text, "answer": text, "method": "occlusion"}
        write_report(tmp_path / side, "a", text, {"occlusion": {}}, summary=told, model=text)
    page = compare_runs(tmp_path / "one", tmp_path / "other").read_text(encoding="utf-8")
    assert text not in page and page.count("&lt;script&gt;") >= 4
