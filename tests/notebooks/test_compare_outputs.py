"""Outputs of notebooks are compared as they should be: real runs of nbval on small notebooks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from compare_outputs import SLOW, differences

ROOT = Path(__file__).resolve().parents[2]

SAME = {
    "the same": ("entropy 3.86", "entropy 3.86"),
    "the last digit": ("entropy 3.87 of 10.80", "entropy 3.86 of 10.80"),
    "the last digit of a share": ("closed: 43% of it", "closed: 44% of it"),
    "the sign of nothing": ("moved by +0.00", "moved by -0.00"),
    "the columns": ("The    9.99\nmen   10.00", "The   10.00\nmen   10.00"),
    "an exponent": ("off by 9.9e-06", "off by 1.0e-05"),
    "many digits": ("sum 123.456001", "sum 123.456789"),
    "a table": ("<td>0.25</td>\n<td>of</td>", "<td>0.26</td>\n<td>of</td>"),
}
OTHER = {
    "a number": ("entropy 3.88", "entropy 3.86"),
    "a number of many digits": ("sum 123.5678", "sum 123.4567"),
    "a share": ("closed: 42%", "closed: 44%"),
    "a sign": ("moved by +0.86", "moved by -0.86"),
    "a count": ("of 49152 tokens", "of 49153 tokens"),
    "a count with commas": ("134,515,008 weights", "134,515,009 weights"),
    "a count that is none": ("2 of them", "2.0 of them"),
    "a version": ("torch 2.13.0", "torch 2.14.0"),
    "a name with a number": ("fp16", "fp32"),
    "a word": ("the most is ' of'", "the most is ' city'"),
    "the spaces of a text": ("'of  the'", "'of the'"),
    "the order of words": ("of 0.5\nthe 0.5", "the 0.5\nof 0.5"),
    "a missing number": ("sum", "sum 0.5"),
    "a missing line": ("one 0.5\n", "one 0.5\ntwo 0.7\n"),
    "one line too many": ("one 0.5\ntwo 0.7\n", "one 0.5\n"),
    "one line for two": ("one 0.5 two 0.7", "one 0.5\ntwo 0.7"),
}


@pytest.mark.parametrize("new, stored", SAME.values(), ids=SAME)
def test_what_a_processor_may_change_is_no_difference(new, stored):
    assert not differences(new, stored) and not differences(stored, new)


@pytest.mark.parametrize("new, stored", OTHER.values(), ids=OTHER)
def test_anything_else_is(new, stored):
    assert differences(new, stored) and differences(stored, new)


def test_a_difference_is_named_with_its_line():
    assert differences("a 1.0\nb 2.0", "a 1.0\nb 3.0") == [(2, "2.0", "3.0")]


# --- nbval ------------------------------------------------------------------------------------

TABLE = "from IPython.display import HTML\nHTML('<td>0.25</td>')"
SUM = "print('sum 0.25')"
WARN = f"import warnings\nclass {SLOW}(UserWarning): pass\nwarnings.warn('9 times', {{}})\n{SUM}"


def table(html):
    data = {"text/html": html, "text/plain": "<IPython.core.display.HTML object>"}
    return nbformat.v4.new_output("execute_result", data, execution_count=1)


def printed(text):
    return nbformat.v4.new_output("stream", name="stdout", text=text)


# a cell, the outputs that are stored with it, its tags, and what nbval is to say of it
CELLS = {
    "a last digit": (SUM, [printed("sum 0.26\n")], [], "PASSED"),
    "a last digit in a table": (TABLE, [table("<td>0.26</td>")], [], "PASSED"),
    "a number under our tag": (SUM, [printed("sum 17\n")], ["numbers-vary"], "PASSED"),
    "anything under nbval's": (SUM, [printed("all\n")], ["nbval-ignore-output"], "PASSED"),
    "a number": (SUM, [printed("sum 0.28\n")], [], "FAILED"),
    "a number in a table": (TABLE, [table("<td>0.28</td>")], [], "FAILED"),
    "a word": (SUM, [printed("all 0.25\n")], [], "FAILED"),
    "a word under our tag": (SUM, [printed("all 0.25\n")], ["numbers-vary"], "FAILED"),
    "a missing line": (SUM, [printed("sum 0.25\nmean 0.5\n")], [], "FAILED"),
    "a missing output": ("None", [printed("sum 0.25\n")], [], "FAILED"),
    "an output too many": (SUM, [], [], "FAILED"),
    "a slow machine": (WARN.format(SLOW), [printed("sum 0.25\n")], [], "PASSED"),
    "another warning": (WARN.format("UserWarning"), [printed("sum 0.25\n")], [], "FAILED"),
    "a missing table": (TABLE, [table("<td>0.25</td>")] * 2, [], "FAILED"),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What a real run of nbval, with the repository's settings, says of a notebook of these."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    for source, outputs, tags, _ in CELLS.values():
        cell = nbformat.v4.new_code_cell(source, execution_count=1, outputs=outputs)
        cell.metadata["tags"] = tags
        notebook.cells.append(cell)
    path = tmp_path_factory.mktemp("nbval") / "small.ipynb"
    nbformat.write(notebook, path)
    command = [sys.executable, "-m", "pytest", "--rootdir", ROOT, "-c", ROOT / "pyproject.toml"]
    command += ["-p", "tests.notebooks.compare_outputs", "-p", "no:cacheprovider"]
    command += ["--nbval", "-v", "--color=no", path]
    plain = os.environ | {"PYTEST_ADDOPTS": ""}  # ours would change what is printed
    command = [*map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("place, case", list(enumerate(CELLS)), ids=CELLS)
def test_nbval_lets_pass_what_a_processor_may_change_and_nothing_else(said, place, case):
    assert re.findall(rf"::Cell {place} ([A-Z]+)", said)[0] == CELLS[case][-1]


def test_nbval_names_the_piece_that_differs(said):
    assert "line 1 of stdout: '0.25' is stored as '0.28'" in said
