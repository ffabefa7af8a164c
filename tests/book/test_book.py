"""The book as it is built, without a warning: nothing from the network, all links and pictures."""

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LOADED = {"img", "script", "link", "iframe", "source", "video", "audio", "embed", "object"}


class Page(HTMLParser):
    """What a page links to, loads and shows, and where it can be linked to."""

    def __init__(self, file):
        super().__init__()
        self.file, self.anchors = file, {""}
        self.links, self.loaded, self.pictures, self.formulas, self.folded = [], [], [], 0, 0
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        has = dict(attributes)
        self.anchors |= {has[name] for name in ("id", "name") if has.get(name)}
        if tag == "a" and "href" in has:
            self.links.append(has["href"])
        if tag in LOADED:
            self.loaded += [has[name] for name in ("src", "href", "data") if name in has]
        if tag == "img":
            self.pictures.append(has)
        self.formulas += tag == "math"
        self.folded += tag == "details"


@pytest.fixture(scope="module")
def pages(built):
    """The pages of the book by their files. Reports beside them are tested as reports."""
    files = (file for file in built.rglob("*.html") if file.parent.name != "_static")
    return {file: Page(file) for file in files if file.relative_to(built).parts[0] != "reports"}


def test_every_notebook_has_its_page_and_can_be_downloaded(built, pages):
    for notebook in NOTEBOOKS:
        page = pages[built / "notebooks" / f"{notebook.stem}.html"]
        (link,) = [link for link in page.links if link.endswith(".ipynb")]
        assert (page.file.parent / link).read_bytes() == notebook.read_bytes()
        assert f"then open <code>{notebook.name}</code>" in page.file.read_text(encoding="utf-8")


def test_every_document_in_docs_has_its_page(built, pages):
    wanted = {file.relative_to(ROOT) for file in (ROOT / "docs").rglob("*.md")}
    assert wanted and wanted <= {page.relative_to(built).with_suffix(".md") for page in pages}


def test_nothing_is_loaded_from_elsewhere(built, pages):
    loaded = [(page.file.name, what) for page in pages.values() for what in page.loaded]
    styles = {
        (file.name, what)
        for file in built.rglob("*.css")
        for what in re.findall(r"(?:url\(|@import)\s*['\"]?([^)'\";]+)", file.read_text("utf-8"))
    }
    assert len(loaded) > 100
    elsewhere = [both for both in [*loaded, *styles] if re.match(r"(\w+:)?//", both[1])]
    assert not elsewhere


def test_every_internal_link_and_file_is_there(built, pages):
    seen, broken = 0, []
    for page in pages.values():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            seen += 1
            file = (page.file.parent / unquote(parts.path)).resolve() if parts.path else page.file
            known = pages.get(file)
            if not file.exists() or (known and unquote(parts.fragment) not in known.anchors):
                broken.append(f"{page.file.relative_to(built)}: {link}")
    assert seen > 1000 and not broken


def test_no_page_has_an_anchor_twice(pages):
    for page in pages.values():
        text = page.file.read_text(encoding="utf-8")
        body = re.sub(r"<svg.*?</svg>", "", text, flags=re.S)
        twice = [name for name, n in Counter(re.findall(r'\sid="([^"]+)"', body)).items() if n > 1]
        assert not twice, page.file


def test_every_picture_keeps_its_alternative_text(built, pages):
    for page in pages.values():
        assert all(len(picture.get("alt") or "") > 20 for picture in page.pictures), page.file
    for notebook in NOTEBOOKS:
        written = [
            output.metadata["image/png"]["alt"]
            for cell in nbformat.read(notebook, as_version=4).cells
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ]
        page = pages[built / "notebooks" / f"{notebook.stem}.html"]
        assert written and [picture["alt"] for picture in page.pictures] == written


def test_formulas_are_drawn_by_the_browser_and_solutions_open_when_asked(built, pages):
    for notebook in NOTEBOOKS:
        cells = nbformat.read(notebook, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        page = pages[built / "notebooks" / f"{notebook.stem}.html"]
        assert page.formulas == len(re.findall(r"\$\$[^$]+\$\$|\$[^$\n]+\$", text))
        solutions = sum("solution" in cell.metadata.get("tags", []) for cell in cells)
        shown = page.file.read_text(encoding="utf-8").count("Show a solution")
        assert shown == solutions <= page.folded


def test_the_words_of_a_notebook_can_be_searched(built):
    index = (built / "searchindex.js").read_text(encoding="utf-8")
    assert '"notebooks/06_attention"' in index and '"patch_position' in index


def test_html_that_a_cell_left_is_shown_as_it_is(built):
    cells = nbformat.read(ROOT / "notebooks" / "report.ipynb", as_version=4).cells
    (first,) = [cell for cell in cells if "first-screen" in cell.metadata.get("tags", [])]
    (markup,) = [o.data["text/html"] for o in first.outputs if "text/html" in o.get("data", {})]
    assert "<style>" in markup
    page = (built / "notebooks" / "report.html").read_text(encoding="utf-8")
    assert markup.strip() in page


def test_reports_that_are_there_are_linked(built, pages):
    page = pages[built / "docs" / "gallery.html"]
    there = (ROOT / "outputs" / "reports" / "index.html").is_file()
    assert ("../reports/index.html" in page.links) == there
    assert (built / "reports" / "index.html").is_file() == there
