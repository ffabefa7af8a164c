"""How long a notebook takes to read, as its opening and the README say.

``python tests/notebooks/pacing.py`` measures the notebooks and writes the minutes into both.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WORDS_A_MINUTE, SECONDS_A_LINE, SECONDS_A_PICTURE = 220, 3, 12
FOLDED = re.compile(r"<details.*?</details>", re.DOTALL)
TOLD = re.compile(r"Reads in (\d+) min, runs in (\d+) s\.")


@dataclass(frozen=True)
class Pace:
    """What there is to read in a notebook; without what is folded, where nothing else is said."""

    words: int
    folded_words: int
    cells: tuple[int, ...]  # lines of each code cell, blank ones not counted
    folded_cells: tuple[int, ...]
    pictures: int

    @property
    def minutes(self):
        return _minutes(self.words, sum(self.cells), self.pictures)

    @property
    def minutes_with_folded(self):
        lines = sum(self.cells) + sum(self.folded_cells)
        return _minutes(self.words + self.folded_words, lines, self.pictures)

    @property
    def median(self):
        return median(self.cells)

    @property
    def p90(self):
        return sorted(self.cells)[round(0.9 * (len(self.cells) - 1))]


def _minutes(words, lines, pictures):
    seconds = SECONDS_A_LINE * lines + SECONDS_A_PICTURE * pictures
    return words / WORDS_A_MINUTE + seconds / 60


def pace(path):
    words = folded = pictures = 0
    shown, hidden = [], []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            aside = len(" ".join(FOLDED.findall(source)).split())
            words, folded = words + len(source.split()) - aside, folded + aside
        else:
            kind = hidden if cell["metadata"].get("jupyter", {}).get("source_hidden") else shown
            kind.append(sum(bool(line.strip()) for line in source.splitlines()))
            pictures += sum("image/png" in output.get("data", {}) for output in cell["outputs"])
    return Pace(words, folded, tuple(shown), tuple(hidden), pictures)


def told(path):
    """What the notebook's opening says: minutes to read, seconds to run; ``None`` if nothing."""
    found = TOLD.search(path.read_text(encoding="utf-8"))
    return found and (int(found[1]), int(found[2]))


def table():
    """All notebooks, a line each, and their sum."""
    lines = [f"{'':24}{'minutes':>8}{'all':>5}{'median':>8}{'p90':>5}{'words':>7}{'lines':>7}"]
    every = {path.stem: pace(path) for path in NOTEBOOKS}
    for name, at in every.items():
        numbers = f"{at.minutes:8.0f}{at.minutes_with_folded:5.0f}{at.median:8.1f}{at.p90:5}"
        lines.append(f"{name:24}{numbers}{at.words:7}{sum(at.cells):7}")
    minutes = sum(at.minutes for at in every.values())
    whole = sum(at.minutes_with_folded for at in every.values())
    return "\n".join([*lines, f"{'in all':24}{minutes:8.0f}{whole:5.0f}"])


def write():
    """Writes the minutes into the opening of each notebook, and both numbers into the README."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        minutes = f"{pace(path).minutes:.0f}"
        notebook = path.read_text(encoding="utf-8")
        notebook = TOLD.sub(rf"Reads in {minutes} min, runs in \2 s.", notebook, count=1)
        path.write_text(notebook, encoding="utf-8")
        if told(path):
            row = rf"(\(notebooks/{path.name}\).*\| )[^|]*\|$"
            text = re.sub(
                row, rf"\g<1>{minutes} min, {told(path)[1]} s |", text, flags=re.MULTILINE
            )
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
    print(table())
