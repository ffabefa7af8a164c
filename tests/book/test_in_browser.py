"""Every page of the book in a real browser, narrow and wide, in the light and in the dark.

Minutes of work, so ``make test-book`` does it and names the book by ``BOOK``.
"""

import os
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from tests.reports.test_browser import CHROMIUM, FLAGS

axe = pytest.importorskip("axe_playwright_python.base", reason="axe is not installed")
AXE = "async () => (await axe.run(document, {resultTypes: ['violations']})).violations"
WIDER = """() => [...document.querySelectorAll("article *")]
  .filter((one) => one.getBoundingClientRect().right > innerWidth + 1)
  .filter((one) => !one.closest("pre, .table-wrapper, .output, .sig, div.math"))
  .map((one) => one.outerHTML.slice(0, 100))"""
BOOK = Path(os.environ.get("BOOK", "no book")).resolve()
BESIDE = {BOOK / "_static", BOOK / "reports"}
PAGES = sorted(  # but the first, which only leads to the book's own first page
    file
    for file in BOOK.rglob("*.html")
    if file != BOOK / "index.html" and not BESIDE & set(file.parents)
)

if not PAGES:
    pytest.skip("make test-book looks at every page in a browser", allow_module_level=True)


@pytest.fixture(scope="module", params=["light", "dark"])
def page(request):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install it to run the browser tests")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(color_scheme=request.param, reduced_motion="reduce")
        page.asked = []
        page.on("request", lambda asked: page.asked.append(asked.url))
        yield page
        browser.close()


@pytest.mark.parametrize("file", PAGES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_axe_finds_nothing_and_nothing_is_cut_off(page, file):
    page.set_viewport_size({"width": 1400, "height": 900})
    page.goto(file.as_uri())
    page.evaluate(f"{axe.AXE_SCRIPT}; 0")
    found = page.evaluate(AXE)
    told = [(one["id"], one["impact"], [n["html"] for n in one["nodes"]][:3]) for one in found]
    assert not told
    for width in (1400, 360):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width, page.evaluate(WIDER)
    assert all(url.startswith(("file:", "data:", "blob:")) for url in page.asked)


def test_a_search_finds_what_a_notebook_shows(page):
    page.goto(f"{(BOOK / 'search.html').as_uri()}?q=sink")
    for found in ("notebooks/06_attention.html", "docs/glossary.html"):
        page.locator(f"#search-results a[href*='{found}']").first.wait_for()
