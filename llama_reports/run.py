"""One report: a notebook executed for one prompt, and the folder that it leaves."""

import errno
import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbclient.exceptions import CellTimeoutError, DeadKernelError

from helpers import BUNDLED
from helpers.model_folders import public_name
from llama_reports import TIMEOUT
from llama_reports.files import UNFINISHED, move_into_place, read_mapping, remove
from llama_reports.pages import report_page
from llama_reports.privacy import private
from llama_reports.versions import code_version

# as a notebook and `ask` call them
ASKED = ("target", "foil", "options", "units", "sources", "chat", "raw")
# What a notebook says of itself in summary.json, and report.json passes on.
SUMMARY = [
    *("heading", "answered", "answer", "probability", "method", "strongest", "top_units"),
    *("without", "options", "inside", "trust", "warnings"),
]
ATTEMPTS = 2  # kernels that may die of one prompt
STARTS = 5  # kernels that may die before they are ready, which is no fault of a prompt
NOT_ALL_CAME = "Timeout waiting for IOPub output"  # as nbclient calls it
LATE = 60  # seconds after the end of a cell in which its outputs may still come
TOO_LONG = "It took more than {:g} seconds and was stopped: ask for less, or a longer --timeout."
FULL = (errno.ENOSPC, errno.EDQUOT)
OURS = ("report.ipynb", "report.html", "report.json")  # what a report's folder gets beside its own

_code_version = cache(code_version)  # what this process runs, whatever becomes of the files


@dataclass(frozen=True)
class Job:
    """An entry that has passed every check: what to run, and the folder it goes to.

    ``prompt`` is the text that people read; messages are ``role: text``, a line each. ``question``
    is the digest of what is asked: all that an entry says but its id. ``identity`` is that of what
    answers the question too: all parameters, the notebook's cells, the model and the code; two
    reports of the same identity say the same. ``model_digest`` is that of the model. All are
    SHA-256 in hexadecimal. ``tokens`` is the length of what is read, ``units`` the number of its
    scores, ``outputs`` that of the tokens explained, ``texts`` that of the texts read for them.
    ``meta`` is what the entry carries to the results: no part of either, and of the same
    names in all jobs of a plan.
    """

    slug: str
    prompt: str
    notebook: Path
    parameters: dict
    identity: str
    question: str
    tokens: int
    units: int = 0
    outputs: int = 1
    texts: int = 1
    model_digest: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> dict[str, Any]:
        """The question as the keywords of ``helpers.ask``."""
        return asked(self.parameters)


def asked(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a notebook that are its question, as the keywords of ``helpers.ask``."""
    given = {name: parameters[name] for name in ASKED if name in parameters}
    answer = parameters.get("answer_text", parameters.get("answer"))
    return {"prompt": parameters.get("messages") or parameters["prompt"], "answer": answer, **given}


def finished(job: Job, out: str | Path) -> bool:
    """True if ``out`` holds the report of this very job: the same identity, and no error."""
    facts = read_mapping(Path(out, job.slug, "report.json"))
    return bool(facts) and facts.get("identity") == job.identity and facts.get("error") is None


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
    timeout: float = TIMEOUT,
) -> dict[str, Any]:
    """Execute one job and move its finished folder to ``out/<slug>``; returns the folder's facts.

    A notebook that fails leaves the same folder, with the notebook up to its error and the error
    in ``report.json``; nothing is raised for it. So does one that takes more than ``timeout``
    seconds, whose kernel is killed. A kernel that dies is tried once more, and so is one whose
    outputs do not all come within a minute after a cell; one that dies before it is ready, as where
    another program took its port, is tried up to four times more. The folder is made elsewhere and
    moved when whole, so a reader never finds half of one.

    ``source`` is the notebook as ``report_source`` gives it, for a machine that has no such file;
    ``engine`` is papermill's, ``None`` for its own. Raises ``OSError`` if the disk is full: that
    is no fault of the prompt, and the next one would fare no better.
    """
    out = Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    source = source or report_source(job.notebook)
    attempt, starts, died, clock = 0, 0, True, _Clock(timeout)
    while died:
        with tempfile.TemporaryDirectory(
            prefix=UNFINISHED, dir=out, ignore_cleanup_errors=True
        ) as name:
            work = Path(name, "report")  # the notebook's own: it may do there what it likes
            try:
                work.mkdir()
                late = max(1, int(min(LATE, timeout)))
                error, died = _execute(source, job.parameters, work, engine, clock, late)
                attempt += 1
                if died and attempt < ATTEMPTS:
                    continue
                if error is TOO_LONG:
                    error = TOO_LONG.format(timeout)
                error = _settle(work) or error
                return _finish(work, out, job, model, error, attempt, clock)
            except _NotStarted as failure:
                starts += 1
                error, died = str(failure), starts < STARTS
                time.sleep(0.2 * starts)  # a machine that is short of something may recover
            except OSError as failure:
                if failure.errno in FULL:
                    raise
                error, died = f"Its folder cannot be kept: {failure.strerror or failure}.", False
    return keep_failure(job, out, model, error)


def keep_failure(job: Job, out: Path, model: str, error: str) -> dict[str, Any]:
    """The folder of a job that came to no end of its own, with ``error``; returns its facts."""
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=out) as name:
        Path(name, "report.ipynb").write_text(report_source(job.notebook), encoding="utf-8")
        return _finish(Path(name), out, job, model, error)


def report_task(
    task: tuple[Job, str], out: Path, model: str, threads: int, timeout: float
) -> dict[str, Any]:
    """One job, with its notebook as ``report_source`` gives it, in whatever process this is.

    A worker of a cluster finds no more to import here than a report takes: kernels have torch.
    """
    job, source = task
    if finished(job, out):  # by a worker whose word was lost, with a scheduler or with itself
        return read_mapping(out / job.slug / "report.json")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # a worker that others started has its own
    os.environ.pop("MALLOC_TRIM_THRESHOLD_", None)  # see OWN_CLUSTER in cluster.py
    return run_report(job, out, model, source=source, timeout=timeout)


class _Clock:
    """The seconds of a report, from its first cell on; called, those that a cell may still take.

    What comes before, such as loading the model for all kernels, is no matter of one report.
    """

    def __init__(self, timeout):
        self.timeout, self.began = timeout, None

    def __call__(self, cell):
        self.began = self.began or time.monotonic()
        return max(0.1, self.timeout - self.seconds)  # 0 would be no limit

    @property
    def seconds(self):
        return 0.0 if self.began is None else time.monotonic() - self.began


class _NotStarted(Exception):
    """A kernel that came to no cell: no fault of the prompt."""


def _execute(source, parameters, work, engine, clock, late):
    """Run the notebook in ``work``; gives its error as text or ``None``, and if to try again.

    The executed notebook is beside ``work``, out of its own reach. ``clock`` says how long a cell
    may take, ``late`` how many seconds after it an output may come.
    """
    report = work.with_name("report.ipynb")
    report.write_text(source, encoding="utf-8")
    try:
        papermill.execute_notebook(
            literal(report),
            literal(report),
            parameters=parameters,
            engine_name=engine,
            kernel_name="python3",
            # where the kernel starts; papermill's own cwd would take this process there, too, and
            # leave it without a folder once the notebook has removed that
            resources={"metadata": {"path": str(work)}},
            progress_bar=False,
            timeout_func=clock,
            iopub_timeout=late,  # 4 by default, which a busy machine may take
            # only a real error is worth a line between the progress bar's
            extra_arguments=["--log-level=ERROR"],
        )
    except papermill.PapermillExecutionError as failure:
        full = (code for code in FULL if f"[Errno {code}]" in failure.evalue)
        if failure.ename == "OSError" and (code := next(full, None)):
            raise OSError(code, os.strerror(code), str(work.parent)) from None
        return f"{failure.ename}: {failure.evalue}", False
    except CellTimeoutError as failure:
        if NOT_ALL_CAME in str(failure).partition("Here is a preview")[0]:  # a cell may hold it
            return f"Outputs of a cell did not come within {late} seconds: run it again.", True
        return TOO_LONG, False
    except DeadKernelError:
        return "The kernel died, most often for lack of memory: try a shorter prompt.", True
    except (RuntimeError, ConnectionError) as failure:
        raise _NotStarted(f"No kernel could be started ({failure}): run it again.") from failure
    return None, False


def literal(path: str | Path) -> str:
    """A path as papermill takes it: it fills ``{name}`` in paths, so braces are doubled."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _settle(work):
    """Make a folder that can be kept of ``work``, whatever its notebook made of it.

    It gets the executed notebook. What stands in the way is removed, and so are links, since they
    lead out of the folder. Gives the error that this is, or ``None``.
    """
    wrong = [] if work.is_dir() and not work.is_symlink() else ["its folder is gone"]
    if wrong:
        remove(work)
        work.mkdir()
    for path in list(work.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            path.unlink()
    taken = [name for name in OURS if (work / name).exists()]
    taken += ["figures"] if (work / "figures").is_file() else []
    for name in taken:
        remove(work / name)
        wrong.append(f"{name} is a name that a report needs itself")
    work.with_name("report.ipynb").rename(work / "report.ipynb")
    return f"What the notebook left cannot be kept: {', and '.join(wrong)}." if wrong else None


def _finish(work, out, job, model, error, attempts=ATTEMPTS, clock=None):
    """Complete a report's folder and move it to ``out``; returns its facts.

    ``clock`` is that of the report, if it had one, and goes on until the page is
    written. Figures get a folder of their own, and nothing private is left.
    """
    figures = work / "figures"
    figures.mkdir(exist_ok=True)
    pictures = [*work.glob("*.png"), *work.glob("*.svg")]
    plotted = {picture.with_suffix(".json") for picture in pictures}  # as save_figure names it
    for file in [*pictures, *filter(Path.exists, plotted)]:
        file.rename(figures / file.name)
    hidden = private(model, {work: ".", out: "…", job.notebook.parent: "…"})
    facts = {
        "slug": job.slug,
        "prompt": job.prompt,
        "notebook": job.notebook.stem,
        "model": public_name(model),
        "model_digest": job.model_digest,
        "meta": job.meta,
        "question": job.question,
        "identity": job.identity,
        "code_version": _code_version(),
        "tokens": job.tokens,
        "units": job.units,
        "outputs": job.outputs,
        "texts": job.texts,
        "error": error and error[:2000],
        "attempts": attempts,
        "seconds": 0.0,
    }
    told = read_mapping(work / "summary.json")  # of a notebook that has come so far
    facts = {name: told[name] for name in SUMMARY if name in told} | facts
    facts = hidden.without(facts)
    notebook = nbformat.read(work / "report.ipynb", as_version=4)
    facts["memory"] = notebook.metadata.get("papermill", {}).pop("peak_memory", None)
    _clean(notebook, hidden, facts)
    nbformat.write(notebook, work / "report.ipynb")
    (work / "report.html").write_text(report_page(notebook, facts), encoding="utf-8")
    facts["seconds"] = round(clock.seconds, 2) if clock else 0.0
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
