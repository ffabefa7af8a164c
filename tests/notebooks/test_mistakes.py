"""docs/mistakes.md: what it quotes is in the notebook that it names, under the heading it names."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "mistakes.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^### (.+)\n((?:(?!#).*\n?)+)", TEXT, re.MULTILINE)


@pytest.mark.parametrize("symptom, told", ENTRIES, ids=[symptom for symptom, _ in ENTRIES])
def test_an_entry_leads_to_the_cell_that_shows_it(symptom, told):
    (name,) = re.findall(r"\]\(\.\./notebooks/(\w+)\.ipynb\)", told)
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    assert "**Cause" in told and "cure.**" in told.lower()
    named = re.search(r"ipynb\), \"((?:.|\n)+)\"\.", told)
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    if named:
        heading = " ".join(named[1].split())
        assert re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE), heading
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    printed = "\n".join(output.get("text", "") for output in outputs)
    message = re.fullmatch(r"`{1,2} ?(.+?) ?`{1,2}", symptom)
    if message:
        assert message[1] in printed


def test_every_error_that_a_notebook_shows_has_an_entry():
    wanted = ("NoneType' object", "non-empty TensorList", "padding token", "Inference tensors")
    assert all(message in TEXT for message in wanted) and len(ENTRIES) > 20
