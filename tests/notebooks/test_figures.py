"""Figures can be made again: the same numbers as docs/figures.json says were drawn."""

import json
import os

import nbformat
import pytest

from llama_reports.figures import ACCEPTED, ROOT, differences, digest, main, make, manifest_text

MANIFEST = json.loads(ACCEPTED.read_text(encoding="utf-8"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = ("04_embeddings",)


def of(notebook):
    return [figure for figure in MANIFEST["figures"] if figure["notebook"] == notebook]


def figure(data, name="bars", varies=False):
    return {"notebook": "x", "name": name, "sha256": digest(data), "varies": varies, "data": data}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_manifest_has_every_figure_with_its_cell(path):
    drawn = []
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                drawn.append((number, output.metadata["image/png"]["name"]))
    assert drawn == [(known["cell"], known["name"]) for known in of(path.stem)]
    assert all(known["sha256"] == digest(known["data"]) for known in of(path.stem))
    assert all("prompt" in known["parameters"] for known in of(path.stem))


@pytest.mark.thorough
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_draws_the_numbers_of_the_manifest(path, tmp_path):
    if path.stem not in QUICK and not os.environ.get("EVERY_FIGURE"):
        pytest.skip("all notebooks with EVERY_FIGURE=1, or make figures")
    made = make(path, tmp_path)
    assert not differences(made, of(path.stem))
    for each in made:
        assert (tmp_path / f"{each['name']}.svg").stat().st_size > 1000


def test_last_digits_may_differ_and_nothing_else():
    before = [figure([{"lines": [0, 1.0, 1, 2.0]}])]
    assert not differences([figure([{"lines": [0, 1.01, 1, 2.0]}])], before)
    told = differences([figure([{"lines": [0, 1.2, 1, 2.0]}])], before)
    assert told == ["x, figure bars: axes 0, lines: 1.2 instead of 1"]
    told = differences([figure([{"lines": [0, 1.0]}])], before)
    assert told == ["x, figure bars: axes 0: 2 lines instead of 4"]
    assert differences([figure([{"lines": [0, None, 1, 2.0]}])], before)
    assert "2 axes instead of 1" in differences([figure([{"bars": [1]}] * 2)], before)[0]


def test_a_figure_that_is_new_or_gone_is_told():
    told = differences([figure([], "new")], [figure([], "old")])
    assert told == ["x, figure new: new", "x, figure old: no longer drawn"]


def test_numbers_that_depend_on_the_machine_are_not_compared():
    assert not differences([figure([{"lines": [9]}], varies=True)], [figure([{"lines": [1]}])])


def test_the_manifest_says_what_the_figures_were_made_with():
    assert {"python", "torch", "matplotlib", "seaborn"} <= set(MANIFEST["versions"])
    assert json.loads(manifest_text([figure([])]))["figures"] == [figure([])]


def test_an_unknown_notebook_is_refused_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["figures", "99_nothing"])
    with pytest.raises(SystemExit, match="There is no notebook '99_nothing'"):
        main()
