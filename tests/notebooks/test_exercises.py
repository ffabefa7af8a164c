"""The exercises: how they are told, and the lessons that ``make student`` writes of them."""

import ast
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from helpers.errors import InputError
from helpers.exercises import TITLE, as_exercise, check, is_solution, write_exercises

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
LESSONS = sorted(path for path in NOTEBOOKS.glob("*.ipynb") if path.stem[:2].isdigit())[1:]
HINT = re.compile(r"<details><summary>Hint</summary>\n\n(.+?)\n\n</details>", re.DOTALL)

every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def cells(path):
    return nbformat.read(path, as_version=4).cells


def before_solutions(path):
    """``(what is asked, solution)`` of each exercise, as cells."""
    found = cells(path)
    return [(found[i - 1], cell) for i, cell in enumerate(found) if is_solution(cell)]


@every_lesson
def test_an_exercise_has_a_title_minutes_a_difficulty_and_one_folded_hint(path):
    exercises = before_solutions(path)
    assert 2 <= len(exercises) <= 4
    for number, (asked, _) in enumerate(exercises, start=1):
        text = asked.source.partition("## On your own\n")[2] or asked.source
        (title,) = TITLE.findall(text)
        assert title[0].startswith(f"{number}. ") and 1 <= int(title[1]) <= 30
        (hint,) = HINT.findall(text)
        assert text.count("<details>") == 1 and 30 < len(hint) < 400


@every_lesson
def test_solutions_are_folded(path):
    solutions = [cell for cell in cells(path) if is_solution(cell)]
    assert all(cell.metadata.get("jupyter", {}).get("source_hidden") for cell in solutions)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The folder that the command wrote."""
    folder = tmp_path_factory.mktemp("work") / "student"
    command = [sys.executable, "-m", "helpers.exercises", str(folder)]
    done = subprocess.run(command, cwd=NOTEBOOKS.parent, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.startswith(f"{len(list(NOTEBOOKS.glob('*.ipynb')))} notebooks are in ")
    return folder


@every_lesson
def test_a_students_lesson_asks_and_checks_and_gives_nothing_away(path, student):
    notebook = nbformat.read(student / path.name, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    rest = iter(notebook.cells)
    for cell in cells(path):
        found = next(rest)
        if not is_solution(cell):
            assert found.source == cell.source or "](../" in cell.source
            continue
        nodes = ast.parse(found.source).body  # imports, and comments
        assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes)
        imports, block = ast.parse(next(rest).source).body
        assert isinstance(imports, ast.ImportFrom) and isinstance(block, ast.With)
        inside = {type(node) for top in block.body for node in ast.walk(top)}
        assert {kind for kind in inside if issubclass(kind, ast.stmt)} <= {
            ast.Assert,
            ast.If,
            ast.Raise,
        }
        asserts = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Assert)]
        kept = [node for node in ast.walk(block) if isinstance(node, ast.Assert)]
        assert [*map(ast.unparse, kept)] == [*map(ast.unparse, asserts)]
    assert next(rest, None) is None


def test_links_lead_out_of_the_students_folder(student):
    for path in student.glob("*.ipynb"):
        for cell in cells(path):
            for link in re.findall(r"\]\((\.\.[^)#]*)", cell.source):
                assert (student / link).resolve().exists(), (path.name, link)


def test_what_somebody_worked_on_is_left_as_it_is(student, tmp_path):
    begun = shutil.copytree(student, tmp_path / "student") / "01_loading.ipynb"
    begun.write_text("my answers", encoding="utf-8")
    (begun.parent / "02_tokenization.ipynb").unlink()
    written, left = write_exercises(begun.parent)
    assert written == ["02_tokenization.ipynb"] and begun.name in left
    assert begun.read_text(encoding="utf-8") == "my answers"


def test_a_folder_that_cannot_be_made_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"The folder .* cannot be made"):
        write_exercises(tmp_path / "file")


# --- one exercise ------------------------------------------------------------------------------

SOLUTION = """
from math import pi

def area(r):
    own = 2
    return pi * r**own

areas, unit = [area(r) for r in (1, 2)], 1
whole = sum(areas)
if unit == 1:  # a comment
    assert whole > areas[0]
    print(whole)
assert area(unit) == pi, "the first is pi"
"""


def test_the_asserts_of_a_solution_become_its_check():
    blank, checker = as_exercise(SOLUTION, "1. A title")
    assert blank == (
        "from math import pi\n\n# Your answer. The check looks at: area, areas, unit, whole"
    )
    assert checker == (
        "from helpers.exercises import check\n\n"
        'with check("1. A title"):\n'
        "    if unit == 1:  # a comment\n"
        "        assert whole > areas[0]\n"
        '    assert area(unit) == pi, "the first is pi"'
    )


def test_an_assert_that_not_every_prompt_meets_is_not_called_right():
    _, checker = as_exercise("a = 1\nif many:\n    assert a == 1", "1. A title")
    assert checker.endswith("else:\n        raise Unchecked")


@pytest.mark.parametrize(
    "solution, told",
    [
        ("for i in range(2):\n    assert i < 2", "stands inside of 'for i in range"),
        ("with torch.no_grad():\n    a = 1\n    assert a", "stands inside of 'with torch"),
        ("a = 1", "no assert about a name"),
        ("a = 1\nassert b", "no assert about a name"),
    ],
)
def test_a_solution_that_cannot_be_checked_is_refused(solution, told):
    with pytest.raises(InputError, match=re.escape(told)):
        as_exercise(solution, "1. A title")


def fails():
    raise ValueError("too few")


@pytest.mark.parametrize(
    "inside, told",
    [
        (lambda: None, "1. A title: Right.\n"),
        (lambda: missing, "1. A title: Wrong: there is no 'missing' yet.\n"),  # noqa: F821
        (fails, "1. A title: Wrong: ValueError: too few, in inside()\n"),
    ],
)
def test_a_check_says_what_it_found(inside, told, capsys):
    with check("1. A title"):
        inside()
    assert capsys.readouterr().out == told


CHECKS = """
from helpers.exercises import Unchecked, check
with check("1. A title"):
    assert len("a") == 2, "one is not two"
with check("1. A title"):
    assert len("a") == 2  # as said
with check("1. A title"):
    raise Unchecked
"""


def test_a_check_shows_the_message_or_else_the_line(tmp_path, capsys):
    (tmp_path / "checks.py").write_text(CHECKS, encoding="utf-8")  # pytest rewrites its own
    runpy.run_path(str(tmp_path / "checks.py"))
    message, line, nothing = capsys.readouterr().out.splitlines()
    assert message == "1. A title: Wrong: one is not two"
    assert line == '1. A title: Wrong: assert len("a") == 2  # as said'
    assert nothing == "1. A title: With this prompt there is nothing to check."
