"""The pages in a real browser, from files, with the network off."""

import json
import re
import shutil
from urllib.parse import quote

import nbformat
import pytest
from playwright.sync_api import expect, sync_playwright
from report_folders import write_report
from running import PATIENCE

from helpers import ask, attribute
from helpers.faithfulness import against_random
from helpers.summary import summarise
from llama_reports.gallery import write_index
from llama_reports.pages import report_page, summary_page

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

# Each is a prompt, a target, an error, a model, a method, a token, and what a notebook printed.
HOSTILE = [
    "<script>document.title='taken'</script>",
    "</script><script>document.title='taken'</script>",
    "<ScRiPt src=https://example.org/x.js></sCrIpT>",
    "<script type=module>import 'https://example.org/x.js'</script>",
    "<img src=x onerror=alert(1)>",
    "<img src='https://example.org/x.png'>",
    "<img srcset='https://example.org/x.png 2x'>",
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
    "<svg><use href='data:image/svg+xml,<svg id=x onload=alert(1)>#x'/></svg>",
    "<math><mtext><table><mglyph><style><img src onerror=alert(1)>",
    "<math href='javascript:alert(1)'>CLICK</math>",
    "<a href='javascript:alert(1)'>here</a>",
    "<a href='data:text/html,<script>alert(1)</script>'>here</a>",
    "javascript:alert(1)",
    " JaVaScRiPt:alert(1)//",
    "data:text/html,<script>alert(1)</script>",
    "<meta http-equiv=refresh content='0;url=https://example.org/'>",
    "<meta http-equiv='Content-Security-Policy' content='default-src *'>",
    "<base href='https://example.org/'>",
    "<iframe src='https://example.org/'></iframe>",
    "<iframe srcdoc='<script>parent.document.title=1</script>'></iframe>",
    "<object data='https://example.org/x.swf'></object><embed src=x>",
    "<form action='https://example.org/'><button>Go</button></form>",
    "<input autofocus onfocus=alert(1)>",
    "<details open ontoggle=alert(1)>x</details>",
    "<video><source onerror=alert(1)></video>",
    "<body onload=alert(1)>",
    "<link rel=stylesheet href='https://example.org/x.css'>",
    "<style>body { display: none } @import 'https://example.org/x.css';</style>",
    "</style><style>* { display: none !important }</style>",
    "} body { display: none } /*",
    "<div style='position:fixed;inset:0;background:red'>over all</div>",
    "<template><img src=x onerror=alert(1)></template>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<!-- --><!--><img src=x onerror=alert(1)>-->",
    "]]><![CDATA[<img src=x onerror=alert(1)>]]>",
    "</a></td></tr></tbody></table></main></body></html><h1>after</h1>",
    "</code></span></li></ul></td></tr><tr><td>another row",
    "</title></head><body><h1>body</h1>",
    "</option></select><img src=x onerror=alert(1)>",
    "</blockquote></header><main hidden>",
    "</pre></details><img src=x onerror=alert(1)>",
    "</textarea></xmp></plaintext><plaintext>",
    '" onmouseover="alert(1)" x="',
    "' onfocus='alert(1)' autofocus='",
    "` onclick=`alert(1)` \\\" \\' \\u003cscript\\u003e",
    "{{ 7 * 7 }} {{ config }} {{ ''.__class__.__mro__ }}",
    "{% for x in range(9) %}{{ x }}{% endfor %} {# no #}",
    "${7*7} #{7*7} <%= 7*7 %> $\\alpha$ $$x$$",
    "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#60;b&#62; &nbsp",
    "\u202eevitisop\u202c \u2066isolated\u2069 \u200f\u200e\u202dright to left",
    "\u202e\u202e\u202e never closed",
    "nul \x00 bell \x07 escape \x1b[31m delete \x7f",
    "line\r\nbreaks\rof\nevery\u2028kind\u2029 \x0b \x0c \x85",
    "half a pair: \ud800 and \udfff",
    "zero\u200bwidth\ufeff \u00ad soft \u0301\u0301\u0301\u0301\u0301 combining",
    "W" * 1500,
    "<b>" * 200,
    "../../../etc/passwd",
    "..\\..\\windows\\system32\\C:/x?y#z%2e%2e%2f",
    "file:///etc/passwd",
    '=HYPERLINK("https://example.org";"x")',
    "NA,\"quoted\",'x';\tTab",
    "你好 مرحبا שלום 🙂 \U0001f468\u200d\U0001f469\u200d\U0001f467 ﷽",
    "__proto__",
    "constructor",
    "  two  spaces  ",
]
# What HTML cannot carry is shown as a picture of it.
PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


def as_shown(text):
    return re.sub("[\ud800-\udfff]", "\ufffd", text.translate(PICTURES))


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install it to run the browser tests")
    expect.set_options(timeout=1000 * PATIENCE)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(offline=True, viewport={"width": 1400, "height": 900})
    yield watched(context)
    context.close()


def watched(context):
    """A new page that notes every request, complaint and dialog."""
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    page.asked, page.complaints = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("dialog", lambda dialog: (page.complaints.append(dialog.message), dialog.dismiss()))
    return page


def loaded_pictures(page):
    """Widths in pixels of the pictures on the page; a broken one has width 0."""
    page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    page.evaluate("Promise.all([...document.images].map(i => i.decode().catch(() => null)))")
    return page.evaluate("[...document.images].map(image => image.naturalWidth)")


# --- a real run --------------------------------------------------------------------------------


def test_index_leads_to_a_report_with_its_figures_and_no_network(page, reports):
    folder, _ = reports
    page.goto((folder / "index.html").as_uri())
    assert page.locator("tbody tr").count() == 3
    assert page.locator("tr#plain .coloured mark").count() == 3
    page.locator("tr#plain td.words a").click()
    page.wait_for_url("**/plain/report.html")
    widths = loaded_pictures(page)
    assert widths and all(width > 100 for width in widths)
    assert all(picture.get_attribute("alt") for picture in page.locator("img").all())
    page.get_by_role("link", name="All reports").click()
    page.get_by_role("link", name="All prompts compared").click()
    page.wait_for_url("**/comparison.html")
    assert "1 failed" in page.locator("main").inner_text()
    assert all(width > 100 for width in loaded_pictures(page))
    assert not [url for url in page.asked if not url.startswith(("file:", "data:"))]
    assert not page.complaints


@pytest.mark.parametrize("width", [1400, 420])
def test_a_reports_first_screen_answers_before_anything_else(page, reports, width):
    folder, _ = reports
    told = json.loads((folder / "plain" / "report.json").read_text(encoding="utf-8"))
    page.set_viewport_size({"width": width, "height": 900})
    page.goto((folder / "plain" / "report.html").as_uri())
    assert page.locator("h1").all_text_contents() == [told["heading"]]
    assert page.locator(".answered").text_content() == told["answered"]
    numbers = page.locator(".coloured mark sup").all_text_contents()
    assert sorted(numbers) == ["1", "2", "3"] and len(told["strongest"]) == 3
    assert page.locator(".summary ol li").count() == 3
    trust = page.locator(".trust")
    assert trust.text_content().endswith(" ".join(told["trust"]["sentences"]))
    assert trust.bounding_box()["y"] < 900 and page.locator("blockquote").count() == 0
    first = page.locator("main").inner_text().splitlines()[0]
    assert first == told["heading"] and "code" not in page.locator(".summary").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    top = told["top_units"][told["method"]]
    assert [row["units"] for row in told["without"]][:3] == [[unit] for unit in top]


def test_a_hostile_prompt_is_shown_as_text_and_runs_nothing(page, reports, hostile):
    folder, _ = reports
    page.goto((folder / "index.html").as_uri())
    numbers = "[...document.querySelectorAll('tr#hostile sup')].forEach(each => each.remove())"
    page.evaluate(numbers)
    assert page.locator("tr#hostile .coloured").text_content() == hostile
    page.locator("tr#hostile td.words a").click()
    page.wait_for_url("**/report.html")
    page.evaluate("[...document.querySelectorAll('sup')].forEach(each => each.remove())")
    assert page.locator(".coloured").text_content() == hostile
    assert "taken" not in (page.title().removeprefix("<script>document.title='taken'"))
    assert page.locator("script").count() == 0 and not page.complaints


def test_the_failed_report_says_so(page, reports):
    folder, _ = reports
    page.goto((folder / "index.html").as_uri())
    row = page.locator("tr#fails")
    assert "ZeroDivisionError" in row.text_content()
    row.locator("a").first.click()
    page.wait_for_url("**/report.html")
    assert page.locator("h1").text_content() == "This report failed"
    error, todo = page.locator("header p").all()
    assert "ZeroDivisionError" in error.text_content() and error.bounding_box()["y"] < 200
    assert todo.text_content().startswith("What to do: correct what the error names")
    assert page.locator("blockquote").text_content() == "This fails"
    # what was run, and no more, nor papermill's own word on it
    assert "ZeroDivisionError" in page.locator("main pre").last.text_content()
    assert "What speaks for each method" not in page.locator("main").text_content()
    assert "Exception was encountered" not in page.locator("body").text_content()
    todo.get_by_role("link").click()
    page.wait_for_url("**/report.ipynb")


@pytest.fixture(scope="module")
def answer_page(bundled, tmp_path_factory):
    """A page whose answer's tokens can be opened, and these tokens."""
    question = ask(*bundled, "One, two, three,", answer=30, units="words")
    path = tmp_path_factory.mktemp("answer") / "one.html"
    results = {"relevance": attribute(bundled[0], question, "relevance", each=True)}
    tested = against_random(bundled[0], question, results, steps=2, count=2)
    summary = summarise(bundled[0], question, results, tested)
    path.write_text(summary_page(summary), encoding="utf-8")
    return path.as_uri(), summary.outputs


@pytest.mark.parametrize("width", [1400, 420])
def test_an_answers_tokens_stand_in_a_line_and_open_by_keyboard(page, answer_page, width):
    address, outputs = answer_page
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(address)
    tokens = page.locator(".answer summary")
    assert tokens.count() == len(outputs) == 30

    def lines():
        tops = tokens.evaluate_all("all => all.map(one => one.getBoundingClientRect().top)")
        return [round(top - tops[0]) for top in tops]

    def opened():
        return page.locator(".answer details[open] > summary > .came").all_text_contents()

    closed = lines()
    assert len(set(closed)) < 8 and closed == sorted(closed)
    came = page.locator(".answer .came").first.bounding_box()  # read aloud, and not seen
    assert came["width"] <= 1 and came["height"] <= 1
    assert page.locator(".answer .from").first.is_hidden()
    tokens.nth(3).focus()
    page.keyboard.press("Enter")
    box = page.locator(".answer .from").nth(3)
    assert box.is_visible() and len(opened()) == 1
    assert box.bounding_box()["width"] > 0.8 * page.locator(".answer").bounding_box()["width"]
    assert lines()[:5] == closed[:5]  # the line goes on beside what is open
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.locator(".answer .from").nth(4).is_visible() and len(opened()) == 1
    assert box.is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not page.complaints and page.locator("script").count() == 0


# --- hostile texts everywhere ------------------------------------------------------------------

SLUGS = [
    "a.b_c-d",
    "javascript",
    "find",
    "method",
    "count",
    "constructor",
    "A" * 80,
    "0..0",
    "1.html",
]


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory):
    """A folder of reports in which every text is one of ``HOSTILE``."""
    out = tmp_path_factory.mktemp("hostile")
    for i, text in enumerate(HOSTILE):
        slug = SLUGS[i] if i < len(SLUGS) else f"h{i}"
        told = text.encode("utf-8", "replace").decode()  # what a file in UTF-8 can hold
        said = {told: {"strongest unit": told, "closed": "NO"}, "saliency": {}}
        said[told]["gap"] = 0.5 if i == 4 else None  # one figure is enough
        names = {"target": text, "foil": text, "model": text, "notebook": text}
        write_report(out, slug, text, said, error=text if i % 4 == 3 else None, **names)
    write_index(out)
    return out


ROWS = """() => {
  const texts = (row, what) => [...row.querySelectorAll(what)].map((each) => each.textContent);
  return Object.fromEntries([...document.querySelectorAll("tbody tr")].map((row) => [row.id, {
    prompt: row.querySelector(".words a").textContent,
    about: texts(row, ".words code, .words bdi"),
    error: row.querySelector("p.error")?.textContent,
    method: row.querySelector("li > span")?.textContent,
    token: row.querySelector("li > code")?.textContent,
  }]));
}"""


def row_of(text):
    i = HOSTILE.index(text)
    return SLUGS[i] if i < len(SLUGS) else f"h{i}"


def test_no_text_acts_in_the_gallery_and_each_is_shown_exactly(page, hostile_folder):
    page.goto((hostile_folder / "index.html").as_uri())
    assert page.locator("tbody tr").count() == len(HOSTILE) >= 50
    assert page.title() == "Attribution reports" and page.locator("script").count() == 1
    shown = page.evaluate(ROWS)
    for i, text in enumerate(HOSTILE):
        row, failed = shown[row_of(text)], i % 4 == 3
        told = text.encode("utf-8", "replace").decode()
        names = [text, text] if failed else [repr(text), repr(text), text, text]
        assert row["prompt"] == as_shown(text)
        assert row["about"] == [as_shown(name) for name in names]
        assert row.get("error") == (as_shown(text) if failed else None)
        assert row.get("method") == (None if failed else as_shown(told))
        assert row.get("token") == (None if failed else as_shown(repr(told)))
    assert not page.complaints
    assert all(url.startswith(hostile_folder.as_uri()) for url in page.asked)


def test_hostile_names_can_be_chosen_found_and_sorted(page, hostile_folder):
    page.goto((hostile_folder / "index.html").as_uri())
    for text in ("<svg onload=alert(1)>", "__proto__", '" onmouseover="alert(1)" x="'):
        if HOSTILE.index(text) % 4 == 3:
            continue
        page.get_by_role("combobox", name="Method").select_option(text)
        assert visible(page) == [row_of(text)]
        address = page.url
        page.goto("about:blank")
        page.goto(address)
        assert visible(page) == [row_of(text)]
        page.get_by_role("button", name="Clear").click()
    page.get_by_role("searchbox", name="Find").fill("{{ 7 * 7 }}")
    assert visible(page) == [row_of("{{ 7 * 7 }} {{ config }} {{ ''.__class__.__mro__ }}")]
    page.get_by_role("button", name="Clear").click()
    for head in ("Question", "Trust", "Seconds", "Above random", "Gap"):
        page.get_by_role("columnheader", name=head).get_by_role("button").click()
    assert page.locator("tbody tr:visible").count() == len(HOSTILE) and not page.complaints


def test_no_text_acts_in_the_comparison(page, hostile_folder):
    page.goto((hostile_folder / "comparison.html").as_uri())
    # a model is named by its text, and models that differ are not averaged
    assert page.locator("h2 bdi").count() >= 50
    named = set(page.locator("h2 bdi").all_text_contents())
    assert {as_shown(text) for text in HOSTILE if text.strip()} <= named
    methods = set(page.locator("tbody th[scope=row]").all_text_contents())
    kept = [
        text.encode("utf-8", "replace").decode() for i, text in enumerate(HOSTILE) if i % 4 != 3
    ]
    assert {as_shown(text) for text in kept} <= methods
    assert page.title() == "All prompts compared" and not page.complaints
    assert all(url.startswith(hostile_folder.as_uri()) for url in page.asked)


def test_no_text_acts_in_a_report(page, tmp_path):
    for i, text in enumerate(HOSTILE):
        told = text.encode("utf-8", "replace").decode()  # what a notebook file can hold
        error = {"ename": "E", "evalue": told, "traceback": [told]}
        outputs = [
            nbformat.v4.new_output("stream", text=told),
            nbformat.v4.new_output("display_data", {"text/plain": told}),
            nbformat.v4.new_output("display_data", {"text/html": told}),
            nbformat.v4.new_output("display_data", {"text/markdown": told}),
            nbformat.v4.new_output("display_data", {"text/latex": told}),
            nbformat.v4.new_output("display_data", {"image/svg+xml": f"<svg>{told}</svg>"}),
            nbformat.v4.new_output("display_data", {"application/javascript": told}),
            nbformat.v4.new_output("error", **error),
        ]
        cells = [
            nbformat.v4.new_markdown_cell(told),
            nbformat.v4.new_code_cell(told, outputs=outputs, execution_count=1),
        ]
        notebook = nbformat.v4.new_notebook(cells=cells)
        file = tmp_path / f"{i}.html"
        facts = {"prompt": text, "error": text if i % 2 else None}
        file.write_text(report_page(notebook, facts), encoding="utf-8")
        page.goto(file.as_uri())
        acting = "script, iframe, object, form, [style]"
        prompts, errors, acting = page.evaluate(
            "(asked) => asked.map((what) => [...document.querySelectorAll(what)].map("
            "(each) => each.textContent))",
            ["blockquote.prompt-text", "header bdi", acting],
        )
        assert prompts[0] == as_shown(text) and errors == [as_shown(text)] * (i % 2)
        assert acting == [] and "taken" not in page.title().replace("title='taken'", "")
        assert page.url == file.as_uri() and not page.complaints, text
    assert all(url.startswith((tmp_path.as_uri(), "data:")) for url in page.asked)


def test_a_link_reaches_a_folder_of_any_name(page, tmp_path):
    name = "a b#c?d%2e&'e\"<f>:é"
    write_report(tmp_path, name, "The keys to", {"saliency": {}})
    page.goto(write_index(tmp_path).as_uri())
    page.locator("td.words a").click()
    page.wait_for_url("**/report.html")
    assert page.title() == "a report" and page.url.endswith(f"{quote(name, safe='')}/report.html")


# --- the gallery at work -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The gallery of 1,000 reports, of which 12 failed and 11 did not close."""
    out = tmp_path_factory.mktemp("many")
    for i in range(1000):
        if i % 83 == 7:
            write_report(out, f"r{i:03}", f"broken {i}", error=f"MemoryError: at {i}", seconds=1)
            continue
        said = {
            "saliency": {"beats_random": (i % 21) / 20, "seconds": 0.1},
            "shapley": {
                "gap": i / 1000,
                "closed": "NO" if i % 97 == 3 else "yes",
                "beats_random": 1,
            },
        }
        if i % 5 == 0:
            said["occlusion"] = {"evidence_rank": 1 + i % 3, "beats_random": 0.5}
        write_report(out, f"r{i:03}", f"prompt {i}", said, seconds=10 + i % 50)
    return write_index(out)


def visible(page):
    """The reports that are shown, of which a gallery lays out a hundred at first."""
    return page.evaluate(
        "[...document.querySelectorAll('tbody tr:not([hidden])')].map(row => row.id)"
    )


def order(page):
    """All reports in the order of the table, shown or not."""
    return page.evaluate("[...document.querySelectorAll('tbody tr')].map(row => row.id)")


def press(page, head):
    page.get_by_role("columnheader", name=head).get_by_role("button").click()


def test_a_thousand_reports_are_filtered_by_text_method_and_state(page, many):
    page.goto(many.as_uri())
    count = page.get_by_role("status")
    assert count.text_content() == "1,000 of 1,000 reports"
    assert [row for row in visible(page)[:12]] == [f"r{i:03}" for i in range(7, 1000, 83)]
    find = page.get_by_role("searchbox", name="Find")
    find.fill("MEMORYERROR: AT 9")
    assert visible(page) == ["r090", "r920"] and count.text_content() == "2 of 1,000 reports"
    find.fill("prompt 99")
    assert len(visible(page)) == 11
    method = page.get_by_role("combobox", name="Method")
    method.select_option("occlusion")
    assert visible(page) == ["r990", "r995"]
    assert page.locator("tr#r990 li:visible").all_text_contents() == [
        page.locator("tr#r990 li[data-method=occlusion]").text_content()
    ]
    find.fill("")
    fitting = sum(i % 5 == 0 and i % 83 != 7 for i in range(1000))
    assert count.text_content() == f"{fitting} of 1,000 reports"
    page.get_by_role("button", name="Clear").click()
    state = page.get_by_role("combobox", name="State")
    state.select_option("not closed")
    assert visible(page) == [f"r{i:03}" for i in range(3, 1000, 97) if i % 83 != 7]
    method.select_option("saliency")  # which promises nothing, so it is not open anywhere
    assert visible(page) == [] and page.get_by_text("No report matches.").is_visible()
    method.select_option("")
    state.select_option("failed")
    assert len(visible(page)) == 12 and count.text_content() == "12 of 1,000 reports"
    assert not page.complaints


def test_a_thousand_reports_are_sorted_and_what_is_missing_comes_last(page, many):
    page.goto(many.as_uri())
    written = order(page)
    press(page, "Gap")
    gap = page.get_by_role("columnheader", name="Gap")
    assert gap.get_attribute("aria-sort") == "descending"
    assert order(page)[:2] == ["r999", "r998"] and set(order(page)[-12:]) == set(written[:12])
    press(page, "Gap")
    assert gap.get_attribute("aria-sort") == "ascending"
    assert order(page)[:2] == ["r000", "r001"] and set(order(page)[-12:]) == set(written[:12])
    press(page, "Gap")
    assert gap.get_attribute("aria-sort") == "none" and order(page) == written
    press(page, "Question")  # numbers inside a text by value
    assert order(page)[11:15] == ["r920", "r000", "r001", "r002"]
    assert gap.get_attribute("aria-sort") == "none"
    page.get_by_role("combobox", name="Method").select_option("saliency")
    press(page, "Above random")
    assert order(page)[:3] == ["r000", "r021", "r042"]
    page.get_by_role("combobox", name="Method").select_option("occlusion")
    press(page, "Evidence word")
    assert visible(page)[:2] == ["r000", "r015"] and not page.complaints


def test_more_reports_appear_as_the_last_comes_near(page, many):
    page.goto(many.as_uri())
    assert len(visible(page)) == 100
    for _ in range(3):
        before = len(visible(page))
        page.locator("p.more").scroll_into_view_if_needed()
        expect(page.locator("tbody tr:not([hidden])")).not_to_have_count(before)
    page.evaluate("scrollTo(0, 0)")  # at the end of the list more would appear by themselves
    page.get_by_role("searchbox", name="Find").fill("prompt")
    assert len(visible(page)) == 100
    page.get_by_role("button", name="Show more reports").press("Enter")
    assert len(visible(page)) >= 200 and not page.complaints


def test_the_address_keeps_filter_and_order(page, many):
    page.goto(many.as_uri())
    page.get_by_role("searchbox", name="Find").fill("prompt 1")
    page.get_by_role("combobox", name="Method").select_option("shapley")
    press(page, "Seconds")
    shown, address = visible(page), page.url
    assert shown[0] == "r149" and "#" in address
    page.goto("about:blank")
    page.goto(address)
    assert visible(page) == shown
    assert page.get_by_role("searchbox", name="Find").input_value() == "prompt 1"
    assert (
        page.get_by_role("columnheader", name="Seconds").get_attribute("aria-sort") == "descending"
    )
    page.goto(many.as_uri() + "#method=nonsense&sort=__proto__&state=%00&down=7")
    assert page.get_by_role("status").text_content() == "1,000 of 1,000 reports"
    page.goto("about:blank")
    page.goto(many.as_uri() + "#r500")
    assert 0 < page.locator("tr#r500").bounding_box()["y"] < 900
    assert not page.complaints


def test_everything_is_reached_and_done_with_the_keyboard(page, many):
    page.goto(many.as_uri())
    focus = "document.activeElement.textContent.trim() || document.activeElement.name"
    page.keyboard.press("Tab")
    assert page.evaluate(focus) == "Skip to the reports"
    assert page.locator("a.skip").bounding_box()["x"] >= 0
    for expected in ("All prompts compared", "scores.parquet", "find"):
        page.keyboard.press("Tab")
        assert page.evaluate(focus) == expected
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.type("prompt 99")
    page.keyboard.press("Tab")
    page.keyboard.press("o")  # occlusion
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate(focus) == "Question"
    page.keyboard.press("Enter")
    assert visible(page) == ["r990", "r995"] and page.evaluate(focus) == "Question"
    page.keyboard.press("Space")
    assert visible(page) == ["r995", "r990"]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.parametrize("width", [1400, 420])
def test_a_screen_reader_finds_a_table_with_heads_and_a_live_count(page, tmp_path, width):
    write_report(tmp_path, "a", "one", {"saliency": {"evidence_rank": 2}})
    write_report(tmp_path, "b", "two", error="no memory")
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(write_index(tmp_path).as_uri())
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree]
    roles = [role for role, _ in found]
    assert roles.count("table") == 1 and roles.count("row") == 3
    assert roles.count("cell") == 8
    assert {("searchbox", "Find"), ("combobox", "Method"), ("combobox", "State")} <= set(found)
    assert {("columnheader", "Question"), ("button", "Gap")} <= set(found)
    assert roles.count("listitem") == 1 and "status" in roles
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_without_script_the_table_is_whole_and_has_no_dead_controls(browser, many):
    context = browser.new_context(offline=True, java_script_enabled=False)
    page = watched(context)
    page.goto(many.as_uri())
    assert page.locator("tbody tr:visible").count() == 1000
    assert not page.locator("form").is_visible() and page.locator("button:visible").count() == 0
    for row, said in (("tr#r019", "95\xa0%"), ("tr#r000", "at place 1 of 3")):
        assert said in page.locator(row).inner_text()
    assert not page.complaints
    context.close()


def test_the_comparison_is_sorted_by_its_heads(page, many):
    page.goto((many.parent / "comparison.html").as_uri())
    methods = page.locator("table.numbers tbody th")
    assert methods.first.text_content() == "shapley"  # the best borne out
    press(page, "Method")
    assert methods.all_text_contents() == ["occlusion", "saliency", "shapley"]
    press(page, "Gap")  # only one has any: it comes first, in both directions
    assert methods.first.text_content() == "shapley"
    press(page, "Gap")
    assert methods.first.text_content() == "shapley"
    assert not page.complaints


# --- how it looks ------------------------------------------------------------------------------

# [ratio, where] of every text and every colour that may be behind it, as WCAG 2.2 defines them
CONTRASTS = """() => {
  const parse = (color) => {
    const parts = color.match(/[\\d.]+(e-?\\d+)?/g).map(Number);
    const scale = color.startsWith("color(") ? 1 : 255;
    return [...parts.slice(0, 3).map((part) => part / scale), parts[3] ?? 1];
  };
  const over = (top, below) =>
    top.slice(0, 3).map((part, i) => part * top[3] + below[i] * (1 - top[3]));
  const linear = (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const light = (color) => {
    const [r, g, b] = color.map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = parse(getComputedStyle(document.body).backgroundColor).slice(0, 3);
  const found = [];
  for (const element of document.querySelectorAll("body *:not(script)")) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!text && !element.matches("input, select")) continue;
    if (!element.getClientRects().length) continue;
    let grounds = [paper];
    const around = [];
    for (let each = element; each; each = each.parentElement) around.unshift(each);
    for (const style of around.map((each) => getComputedStyle(each))) {
      const colors = [style.backgroundColor];
      if (style.backgroundImage.startsWith("linear"))
        colors.push(...style.backgroundImage.match(/(rgba?|color)\\([^()]*\\)/g));
      grounds = colors.flatMap((color) => grounds.map((ground) => over(parse(color), ground)));
    }
    for (const part of [null, "::before", "::placeholder"]) for (const ground of grounds) {
      const ink = parse(getComputedStyle(element, part).color);
      const [a, b] = [light(over(ink, ground)), light(ground)].sort((x, y) => y - x);
      found.push([(a + 0.05) / (b + 0.05), `${element.tagName}.${element.className} ${part}`]);
    }
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(browser, tmp_path, scheme):
    methods = [f"m{i}" for i in range(12)]
    for j in range(6):
        said = {
            name: {
                "beats_random": i / 11,
                "closed": ["NO", "yes", "-"][i % 3],
                "gap": 0.1,
                "evidence_rank": 1,
                "scores": [i - 5, j * (i % 3) - 2, 3 - i, j - i * j],
            }
            for i, name in enumerate(methods)
        }
        write_report(tmp_path, f"r{j}", f"prompt {j}", {**said, "random": {"scores": [j, 2, 1, 5]}})
    write_report(tmp_path, "bad", "one", error="no memory")
    index = write_index(tmp_path)
    error = nbformat.v4.new_output("error", ename="E", evalue="x", traceback=["x"])
    cells = [
        nbformat.v4.new_markdown_cell("# A\n\n[b](https://example.org) `c`\n\n| d |\n|---|\n| e |"),
        nbformat.v4.new_code_cell("1 / 0", outputs=[error], execution_count=1),
    ]
    facts = {"prompt": "x", "error": "no memory"}
    report = report_page(nbformat.v4.new_notebook(cells=cells), facts)
    (tmp_path / "bad" / "report.html").write_text(report, encoding="utf-8")
    for name in (
        "index.html",
        "index.html#method=m1&sort=gap",
        "comparison.html",
        "bad/report.html",
    ):
        context = browser.new_context(color_scheme=scheme, viewport={"width": 1400, "height": 6000})
        page = watched(context)
        page.goto(f"{index.parent.as_uri()}/{name}")
        found = page.evaluate(CONTRASTS)
        assert len(found) > 10 and not page.complaints
        dark = (
            page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        )
        assert dark == (scheme == "dark")
        poor = {what: round(ratio, 2) for ratio, what in found if ratio < 4.5}
        assert not poor, name
        context.close()
