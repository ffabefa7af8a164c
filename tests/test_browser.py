"""The pages in a real browser, from files, with the network off."""

import shutil

import pytest
from playwright.sync_api import sync_playwright

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = [
    "--no-sandbox",  # the tests may run as root, in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install it to run the browser tests")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.asked, page.complaints = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    yield page
    context.close()


def loaded_pictures(page):
    """Widths in pixels of the pictures on the page; a broken one has width 0."""
    page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    return page.evaluate("[...document.images].map(image => image.naturalWidth)")


def test_index_leads_to_a_report_with_its_figures_and_no_network(page, reports):
    folder, _ = reports
    page.goto((folder / "index.html").as_uri())
    assert page.locator("tbody tr").count() == 3
    widths = loaded_pictures(page)
    assert len(widths) == 2 and all(width > 100 for width in widths)
    page.locator("tr#plain a").first.click()
    page.wait_for_load_state()
    assert page.url.endswith("plain/report.html")
    widths = loaded_pictures(page)
    assert len(widths) >= 5 and all(width > 100 for width in widths)
    assert all(picture.get_attribute("alt") for picture in page.locator("img").all())
    assert not [url for url in page.asked if not url.startswith(("file:", "data:"))]
    assert not page.complaints


def test_a_hostile_prompt_is_shown_as_text_and_runs_nothing(page, reports, hostile):
    folder, _ = reports
    page.goto((folder / "index.html").as_uri())
    assert page.locator("tr#hostile td.words a").text_content() == hostile
    page.locator("tr#hostile a").first.click()
    page.wait_for_load_state()
    assert page.locator("blockquote").text_content() == hostile
    assert "taken" not in (page.title().removeprefix("<script>document.title='taken'"))
    assert page.locator("script").count() == 0 and not page.complaints


def test_the_failed_report_says_so(page, reports):
    folder, _ = reports
    page.goto((folder / "index.html").as_uri())
    row = page.locator("tr#fails")
    assert "ZeroDivisionError" in row.text_content()
    row.locator("a").first.click()
    page.wait_for_load_state()
    assert "ZeroDivisionError" in page.locator("header").text_content()
