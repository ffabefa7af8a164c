"""The book's sources: what they must name, whether or not a book can be built here."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
NAMED = re.compile(r"(?:arxiv:|arxiv\.org/abs/)(\d{4}\.\d{4,5})|(10\.\d{4,}/[^\s,;\"<>\\]+)", re.I)


def sources_named(text):
    """Numbers of arXiv and DOIs that stand in ``text``."""
    named = {arxiv or doi.rstrip(".") for arxiv, doi in NAMED.findall(text)}
    return {name[: -1 if name.count(")") > name.count("(") else None] for name in named}


def test_the_bibliography_has_every_source_that_code_and_notebooks_name():
    said = [file.read_text(encoding="utf-8") for file in (ROOT / "helpers").rglob("*.py")]
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        said += [cell.source for cell in nbformat.read(file, as_version=4).cells]
    named = sources_named("\n".join(said))
    listed = (DOCS / "bibliography.md").read_text(encoding="utf-8")
    assert len(named) > 60 and not [source for source in named if source not in listed]


def modules(package):
    """Every module of ``package`` by its dotted name; a name with underscores in front has none."""
    for file in (ROOT / package).rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if len(parts) > 1 and not parts[-1].startswith("_"):
            yield ".".join(parts)


@pytest.mark.parametrize("package", ["helpers", "llama_reports"])
def test_the_functions_of_every_module_have_a_place(package):
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"automodule:: (\S+)", pages)
    assert sorted(name for name in documented if name.startswith(package)) == sorted(
        modules(package)
    )


def test_the_glossary_is_in_order_and_each_entry_ends_with_its_notebook():
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    terms, entries = zip(*re.findall(r"^## (.+)\n\n((?:(?!## ).*\n?)+)", text, re.M), strict=True)
    assert len(terms) > 40 and list(terms) == sorted(terms, key=str.casefold)
    for term, entry in zip(terms, entries, strict=True):
        assert re.search(r"(\.\./notebooks/\w+\.ipynb|#[\w-]+)\)\.?\s*$", entry), term
