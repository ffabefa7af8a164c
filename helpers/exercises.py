"""The lessons as exercises: solutions blanked, and their asserts kept to tell right from wrong.

``python -m helpers.exercises [FOLDER]`` writes the notebooks so, into ``outputs/student`` unless a
folder is named. What lies there already is left as it is: somebody may have worked on it.
"""

import argparse
import ast
import json
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
TITLE = re.compile(r"^\*\*(\d\. .+?) \((\d+) minutes, (easy|medium|hard)\)\.\*\*", re.MULTILINE)
OWN_NAMES = (ast.Lambda, ast.GeneratorExp, ast.ListComp, ast.SetComp, ast.DictComp)


class Unchecked(Exception):
    """Of this exercise nothing can be checked with the prompt that the notebook was run on."""


@contextmanager
def check(title: str) -> Iterator[None]:
    """Prints "Right." if what is inside passes, else "Wrong: " and why. It raises nothing."""
    try:
        yield
    except Unchecked:
        print(f"{title}: With this prompt there is nothing to check.")
    except NameError as error:
        print(f"{title}: Wrong: there is no {error.name!r} yet.")
    except AssertionError as error:
        print(f"{title}: Wrong: {str(error) or _failed_line(error)}")
    except Exception as error:
        print(f"{title}: Wrong: {type(error).__name__}: {error}, in {_failed_line(error)}")
    else:
        print(f"{title}: Right.")


def _failed_line(error):
    frames = traceback.extract_tb(error.__traceback__)
    return next(frame.line for frame in frames if frame.filename != __file__)


def as_exercise(solution: str, title: str) -> tuple[str, str]:
    """The sources of two cells in place of a solution: one to be filled, and its check.

    The first keeps the imports and says which names the second looks at: those that the solution
    assigns and its asserts read. The second has the asserts, each within the ``if`` that it stood
    in. Raises ``InputError`` if an assert stands in another block, such as a loop, or if there is
    nothing to look at.
    """
    body, lines = ast.parse(solution).body, solution.splitlines()
    kept = _asserts(body, lines)
    asked = _asked(body, "\n".join(kept))
    if not asked:
        raise InputError(f"The solution of {title!r} has no assert about a name that it assigns.")
    if kept[0].startswith("if ") and all(line.startswith(" ") for line in kept[1:]):
        kept += ["else:", "    raise Unchecked"]  # one block: not every prompt meets its asserts
    imports = [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    told = f"Your answer. The check looks at: {', '.join(asked)}"
    blank = [*imports, *[""] * bool(imports), *(f"# {line}" for line in textwrap.wrap(told, 90))]
    names = "Unchecked, check" if "    raise Unchecked" in kept else "check"
    head = [
        f"from helpers.exercises import {names}",
        "",
        f"with check({json.dumps(title, ensure_ascii=False)}):",
    ]
    return "\n".join(blank), "\n".join([*head, textwrap.indent("\n".join(kept), "    ")])


def _asserts(body: list[ast.stmt], lines: list[str]) -> list[str]:
    """The lines of the asserts in ``body``, within their ``if`` blocks."""
    kept = []
    for node in body:
        if isinstance(node, ast.Assert):
            kept += textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).split("\n")
        elif isinstance(node, ast.If):
            yes, no = _asserts(node.body, lines), _asserts(node.orelse, lines)
            if yes or no:
                head = lines[node.lineno - 1].strip().removeprefix("el")
                kept += [head, *(f"    {line}" for line in yes or ["pass"])]
            if no:
                kept += ["else:", *(f"    {line}" for line in no)]
        elif any(isinstance(part, ast.Assert) for part in ast.walk(node)):
            found = lines[node.lineno - 1].strip()
            raise InputError(f"An assert stands inside of {found!r}: let it follow that block.")
    return kept


def _asked(body: list[ast.stmt], kept: str) -> list[str]:
    """The names that ``body`` assigns and ``kept`` reads, in the order of their assignment."""
    names = [node for node in ast.walk(ast.parse(kept)) if isinstance(node, ast.Name)]
    bound = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    read = {name.id for name in names} - bound
    return [name for name in dict.fromkeys(_assigned(body)) if name in read]


def _assigned(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif not isinstance(node, OWN_NAMES):
            yield from _assigned(ast.iter_child_nodes(node))


def is_solution(cell: dict[str, Any]) -> bool:
    """Whether a notebook's cell is the solution of an exercise."""
    return "solution" in cell["metadata"].get("tags", [])


def student_version(notebook: dict[str, Any], root: str = "..") -> dict[str, Any]:
    """A notebook (as JSON) without outputs, each solution replaced by a blank and its check.

    ``root`` is the repository's folder as seen from where the notebook will lie, for its links.
    Raises ``InputError`` for a solution without a title before it, or as ``as_exercise`` does.
    """
    cells: list[dict[str, Any]] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            cells.append({**cell, "source": source.replace("](../", f"]({root}/")})
        elif not is_solution(cell):
            cells.append({**cell, "source": source, "outputs": [], "execution_count": None})
        else:
            found = TITLE.search(cells[-1]["source"])
            if not found:
                raise InputError(f"No title with minutes and difficulty stands before: {source}")
            empty = {**cell, "outputs": [], "execution_count": None, "metadata": {}}
            blank, checker = as_exercise(source, found[1])
            cells.append({**empty, "source": blank})
            cells.append({**empty, "source": checker, "id": f"{cell['id']}-check"})
    return {**notebook, "cells": cells}


def write_exercises(folder: Path) -> tuple[list[str], list[str]]:
    """Write every notebook into ``folder``; returns the names written and those left as they were.

    Raises ``InputError`` if there are no notebooks beside this package, or no such folder can be.
    """
    sources = sorted((ROOT / "notebooks").glob("*.ipynb"))
    if not sources:
        raise InputError("The notebooks are not here: run this in a clone of the repository.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be made: {error.strerror}.") from None
    written, left = [], []
    for source in sources:
        goal = folder / source.name
        if goal.exists():
            left.append(source.name)
            continue
        root = Path(os.path.relpath(ROOT, folder)).as_posix()
        notebook = student_version(json.loads(source.read_text(encoding="utf-8")), root)
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        goal.write_text(text, encoding="utf-8")
        written.append(source.name)
    return written, left


def main() -> None:
    """The command: writes the notebooks and says where they are."""
    about = argparse.ArgumentParser(
        prog="python -m helpers.exercises", description="The lessons, for solving their exercises."
    )
    about.add_argument("folder", nargs="?", type=Path, default=ROOT / "outputs" / "student")
    folder = about.parse_args().folder.resolve()
    try:
        written, left = write_exercises(folder)
    except InputError as error:
        sys.exit(str(error))
    shown = os.path.relpath(folder)
    print(f"{len(written)} notebooks are in {shown}: jupyter lab {shown}")
    if left:
        print(f"Left as they were, since they may hold answers: {', '.join(left)}")


if __name__ == "__main__":
    main()
