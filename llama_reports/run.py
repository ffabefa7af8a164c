"""One report: a notebook executed for one prompt, and the folder that it leaves."""

import errno
import json
import os
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError

from helpers.models import BUNDLED, public_name
from llama_reports.files import UNFINISHED, move_into_place, read_mapping
from llama_reports.jobs import Job, literal
from llama_reports.pages import report_page
from llama_reports.privacy import private
from llama_reports.versions import code_version

# What a notebook says of itself in summary.json, and report.json passes on.
SUMMARY = [
    *("heading", "answered", "answer", "probability", "method", "strongest", "top_units"),
    *("without", "trust", "warnings"),
]
ATTEMPTS = 2  # kernels that may die of one prompt


_code_version = cache(code_version)  # what this process runs, whatever becomes of the files


@cache
def report_source(notebook: Path) -> str:
    """A notebook as JSON without its exercises and outputs: what a report runs and shows."""
    nodes = nbformat.read(notebook, as_version=4)
    lessons = {"not-in-report", "solution"}
    nodes.cells = [c for c in nodes.cells if not lessons & set(c.metadata.get("tags", []))]
    for cell in nodes.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(nodes)


def run_report(
    job: Job,
    out: str | Path,
    model: str = BUNDLED,
    *,
    source: str | None = None,
    engine: str | None = "warm",
) -> dict[str, Any]:
    """Execute one job and move its finished folder to ``out/<slug>``; returns the folder's facts.

    A notebook that fails leaves the same folder, with the notebook up to its error and the error
    in ``report.json``; nothing is raised for it. A kernel that dies is tried once more. The folder
    is made elsewhere and moved when whole, so a reader never finds half of one.

    ``source`` is the notebook as ``report_source`` gives it, for a machine that has no such file;
    ``engine`` is papermill's, ``None`` for its own. Raises ``OSError`` if the disk is full: that
    is no fault of the prompt, and the next one would fare no better.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    source = source or report_source(job.notebook)
    started, attempt, died = time.perf_counter(), 0, True
    while died and attempt < ATTEMPTS:
        attempt += 1
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=out) as name:
            error, died = _execute(source, job.parameters, Path(name), engine)
            if not died or attempt == ATTEMPTS:
                seconds = time.perf_counter() - started
                facts = _finish(Path(name), out, job, model, error, attempt, seconds)
    return facts


def keep_failure(job: Job, out: Path, model: str, error: str) -> dict[str, Any]:
    """The folder of a job that came to no end of its own, with ``error``; returns its facts."""
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=out) as name:
        Path(name, "report.ipynb").write_text(report_source(job.notebook), encoding="utf-8")
        return _finish(Path(name), out, job, model, error)


def _execute(source, parameters, work, engine):
    """Run the notebook in ``work``; gives its error as text or ``None``, and if the kernel died."""
    report = work / "report.ipynb"
    report.write_text(source, encoding="utf-8")
    try:
        papermill.execute_notebook(
            literal(report),
            literal(report),
            parameters=parameters,
            engine_name=engine,
            kernel_name="python3",
            cwd=str(work),
            progress_bar=False,
            # only a real error is worth a line between the progress bar's
            extra_arguments=["--log-level=ERROR"],
        )
    except papermill.PapermillExecutionError as failure:
        if failure.ename == "OSError" and f"[Errno {errno.ENOSPC}]" in failure.evalue:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work.parent)) from None
        return f"{failure.ename}: {failure.evalue}", False
    except DeadKernelError:
        return "The kernel died, most often for lack of memory: try a shorter prompt.", True
    return None, False


def _finish(work, out, job, model, error, attempts=ATTEMPTS, seconds=0.0):
    """Complete a report's folder and move it to ``out``; returns its facts.

    Figures get a folder of their own, and nothing private is left.
    """
    figures = work / "figures"
    figures.mkdir()
    for file in [*work.glob("*.png"), *work.glob("*.svg")]:
        file.rename(figures / file.name)
    hidden = private(model, {work: ".", out: "…", job.notebook.parent: "…"})
    facts = {
        "slug": job.slug,
        "prompt": job.prompt,
        "notebook": job.notebook.stem,
        "model": public_name(model),
        "question": job.question,
        "identity": job.identity,
        "code_version": _code_version(),
        "tokens": job.tokens,
        "error": error and error[:2000],
        "attempts": attempts,
        "seconds": round(seconds, 2),
    }
    told = read_mapping(work / "summary.json")  # of a notebook that has come so far
    facts = {name: told[name] for name in SUMMARY if name in told} | facts
    facts = hidden.without(facts)
    notebook = nbformat.read(work / "report.ipynb", as_version=4)
    _clean(notebook, hidden, facts)
    nbformat.write(notebook, work / "report.ipynb")
    (work / "report.html").write_text(report_page(notebook, facts), encoding="utf-8")
    (work / "report.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    hidden.clean(work)
    move_into_place(work, out / job.slug)
    return facts


def _clean(notebook, hidden, facts):
    about = notebook.metadata.get("papermill", {})
    about.update(input_path=f"{facts['notebook']}.ipynb", output_path="report.ipynb")
    about.pop("environment_variables", None)
    notebook.metadata = nbformat.from_dict(hidden.without(dict(notebook.metadata)))
    for cell in notebook.cells:
        cell.update(nbformat.from_dict(hidden.without(dict(cell))))
