"""The gallery over a thousand reports: how soon it is painted, how quickly it answers.

The reports are copies of real ones, under new names and with other prompts; no number in them is
made up. Every time is the median over fresh pages in headless Chromium, from files, with the
network off: paints by the browser's own clock, actions until the frame after them is drawn.

    python benchmarks/gallery.py                     over outputs/reports; writes results.md
    python benchmarks/gallery.py --count 200         fewer, for a look; writes nothing
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import nbformat
from playwright.sync_api import sync_playwright

from llama_reports.gallery import write_index
from llama_reports.pages import report_page

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts, not a package
from report import keep, table

FEW, MANY, ROUNDS = 5, 1000, 7
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
NAMES = ("report.json", "provenance.json", "scores.csv", "evidence.csv")
PAINTS = """async () => {
  const entry = () => performance.getEntriesByName('first-contentful-paint')[0];
  while (!entry() || !performance.getEntriesByType('navigation')[0].loadEventEnd)
    await new Promise(requestAnimationFrame);
  return [entry().startTime, performance.getEntriesByType('navigation')[0].loadEventEnd];
}"""
ACTION = """async (act) => {
  const start = performance.now();
  if (act === 'sort') document.querySelector('th[data-key=gap] button').click();
  else {
    const field = document.forms[0].elements[act === 'find' ? 'find' : 'method'];
    field.value = act === 'find' ? '7' : field.options[1].value;
    field.dispatchEvent(new Event('input', { bubbles: true }));
  }
  await new Promise(requestAnimationFrame);
  await new Promise((done) => setTimeout(done));
  return performance.now() - start;
}"""


def copies(sources, count, out):
    """Fill ``out`` with ``count`` report folders, each a copy of one of ``sources``."""
    for i in range(count):
        source = sources[i % len(sources)]
        folder = out / f"{source.name[:60]}-{i:05}"
        folder.mkdir(parents=True)
        for name in NAMES:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
        facts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        facts["prompt"] = f"{facts['prompt']} ({i})"
        (folder / "report.json").write_text(json.dumps(facts), encoding="utf-8")


def written(out):
    """Seconds for the pages over ``out``."""
    started = time.perf_counter()
    write_index(out)
    return time.perf_counter() - started


def shown(browser, index, rounds):
    """Medians in seconds: first paint, load, and each action until its frame is drawn."""
    found = []
    for _ in range(rounds):
        context = browser.new_context(offline=True, viewport={"width": 1400, "height": 900})
        page = context.new_page()
        page.goto(index.resolve().as_uri(), wait_until="commit")
        times = page.evaluate(PAINTS)
        times += [page.evaluate(ACTION, act) for act in ("sort", "find", "method")]
        found.append([value / 1000 for value in times])
        context.close()
    return [median(values) for values in zip(*found, strict=True)]


def report_seconds(source, rounds=5):
    """Seconds for one report page: the first of a process, and the median of those after it."""
    notebook = nbformat.read(source / "report.ipynb", as_version=4)
    facts = json.loads((source / "report.json").read_text(encoding="utf-8"))
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        report_page(notebook, facts)
        seconds.append(time.perf_counter() - started)
    return seconds[0], median(seconds[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reports", type=Path, default=Path("outputs/reports"))
    parser.add_argument("--count", type=int, default=MANY)
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    asked = parser.parse_args()
    sources = sorted(file.parent for file in asked.reports.glob("[!.]*/report.json"))
    if not sources:
        parser.error(f"there are no reports in {asked.reports}: run `make report` first.")
    first, later = report_seconds(sources[0])
    rows = []
    with tempfile.TemporaryDirectory() as work, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=asked.chromium, args=FLAGS)
        for count in (FEW, asked.count):
            out = Path(work) / str(count)
            copies(sources, count, out)
            took = written(out)
            paint, load, sort, find, method = shown(browser, out / "index.html", ROUNDS)
            rows.append(
                {
                    "reports": f"{count:,}",
                    "first paint, s": f"{paint:.2f}",
                    "loaded, s": f"{load:.2f}",
                    "sorted, s": f"{sort:.2f}",
                    "text found, s": f"{find:.2f}",
                    "method chosen, s": f"{method:.2f}",
                    "page, MB": f"{(out / 'index.html').stat().st_size / 1e6:.2f}",
                    "pages written, s": f"{took:.1f}",
                }
            )
            print(rows[-1], flush=True)
        browser.close()
    ratio = float(rows[1]["first paint, s"]) / max(float(rows[0]["first paint, s"]), 0.01)
    text = (
        f"{table(rows)}\n\nThe first paint of {asked.count:,} reports takes {ratio:.1f} times that "
        f"of {FEW}. One report page takes {first:.2f} s in a new process and {later:.2f} s after "
        "that. Reports: copies of real ones."
    )
    if asked.count == MANY:
        keep("gallery", "The gallery over a thousand reports", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
