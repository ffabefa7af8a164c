"""Prints which model and which checkpoint takes which method, as the tests found it.

pytest -p tests.matrix, as make models does: a test records a property, named by what it looked at,
that holds a method and "yes" or "no". The table of the families is README's, which a test compares.
"""

from pathlib import Path

from helpers import METHODS

ROOT = Path(__file__).resolve().parents[1]
found: dict[str, dict[str, str]] = {}


def pytest_runtest_logreport(report):
    for name, value in report.user_properties if report.when == "call" else ():
        method, works = value
        found.setdefault(name, {})[method] = works


def pytest_terminal_summary(terminalreporter):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    families = readme.partition("<!-- families -->\n")[2].partition("<!-- end families -->")[0]
    rows = [["checkpoint", *METHODS]]
    rows += [[name, *(some.get(each, "") for each in METHODS)] for name, some in found.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    cells = [[cell.ljust(widths[i]) for i, cell in enumerate(row)] for row in rows]
    text = families + "\n" + "".join(f"| {' | '.join(row)} |\n" for row in cells)
    text += "\nyes: the scores of the whole model, as it should be; no: refused in a sentence\n"
    terminalreporter.write(f"\n{text}\n")
    (ROOT / "outputs").mkdir(exist_ok=True)
    (ROOT / "outputs" / "models.md").write_text(text, encoding="utf-8")
