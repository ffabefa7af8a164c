"""Which notebooks need not run again: what each depends on, and that a skip is told."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.notebooks.unchanged import COMPARES, REASON, digest, modules

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"


def test_a_notebook_depends_on_what_it_imports_and_on_what_that_imports():
    found = modules(NOTEBOOKS / "12_patching.ipynb")
    assert {"helpers", "helpers.patching", "helpers.attribution.engine", "helpers.errors"} <= found
    assert "helpers.ground_truth" not in found and not {m for m in found if "reports" in m}
    assert "helpers.ground_truth" in modules(NOTEBOOKS / "11_ground_truth.ipynb")


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a notebook depends on, with one notebook of two cells."""
    for part in ("helpers", "tests/notebooks"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )
    for number, source in enumerate(("import helpers.errors", "print(1)"), start=1):
        cell = nbformat.v4.new_code_cell(source, execution_count=number)
        if number == 2:
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="1\n")]
        notebook.cells.append(cell)
    nbformat.write(notebook, tmp_path / "one.ipynb")
    return tmp_path


@pytest.mark.parametrize(
    "changed, counts",
    [
        ("one.ipynb", True),
        ("helpers/errors.py", True),
        ("helpers/data/precision.csv", True),
        ("requirements.lock", True),
        (COMPARES, True),
        ("helpers/patching.py", False),
        ("tests/notebooks/test_unchanged.py", False),
    ],
)
def test_what_a_notebook_depends_on_counts_and_nothing_else(checkout, changed, counts):
    before = digest(checkout / "one.ipynb", checkout)
    assert before == digest(checkout / "one.ipynb", checkout)
    with (checkout / changed).open("a", encoding="utf-8") as file:
        file.write("\n")
    assert (digest(checkout / "one.ipynb", checkout) != before) == counts


@pytest.mark.thorough
def test_what_passed_is_skipped_and_told_and_what_changed_or_failed_runs(checkout):
    """With workers, as the suite runs, and without."""
    command = [sys.executable, "-m", "pytest", "--nbval", "--skip-unchanged", "-rs"]
    command += ["-p", "tests.notebooks.unchanged", "-p", "no:hypothesispytest"]
    command += ["--rootdir", ".", "one.ipynb", "-n"]

    def told(workers):
        given = [*command, str(workers)]
        plain = os.environ | {"PYTEST_ADDOPTS": ""}
        done = subprocess.run(given, cwd=checkout, env=plain, capture_output=True, text=True)
        return re.findall(r"\d+ (?:passed|failed|skipped)", done.stdout), done.stdout

    assert told(1)[0] == ["2 passed"]
    counts, printed = told(1)
    assert counts == ["2 skipped"] and f"one.ipynb: {REASON}" in printed
    text = (checkout / "one.ipynb").read_text(encoding="utf-8")
    (checkout / "one.ipynb").write_text(text.replace("print(1)", "print(2)"), encoding="utf-8")
    for _ in range(2):  # what failed is not taken for what passed
        assert told(0)[0] == ["1 failed", "1 passed"]
