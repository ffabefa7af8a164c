"""A lesson can be read in one sitting, and says how long that takes."""

import re

import pytest
from notebooks.pacing import NOTEBOOKS, ROOT, pace, table, told

LONGEST, IN_ALL = 35, 330  # minutes
MEDIAN, P90 = 6, 14  # lines of a code cell

LESSONS = [path for path in NOTEBOOKS if path.stem != "report"]  # which is a page, not a lesson
every_notebook = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


@every_notebook
def test_a_notebook_is_read_in_one_sitting(path):
    at = pace(path)
    assert at.minutes <= LONGEST
    assert at.median <= MEDIAN and at.p90 <= P90


def test_all_of_them_are_read_in_five_and_a_half_hours(capsys):
    with capsys.disabled():
        print(f"\n{table()}")
    assert sum(pace(path).minutes for path in NOTEBOOKS) <= IN_ALL


@every_notebook
def test_a_notebook_and_the_readme_say_how_long_it_takes(path):
    minutes, seconds = told(path)
    assert minutes == round(pace(path).minutes)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| \d\d \| \[.*\(notebooks/{path.name}\).*$", readme, re.MULTILINE)
    assert row.endswith(f"| {minutes} min, {seconds} s |")
