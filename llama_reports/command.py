"""The command line: ``llama-reports``, or ``python -m llama_reports``."""

import errno
import json
import os
import signal
import warnings
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import papermill  # noqa: F401
except ModuleNotFoundError:
    raise SystemExit("Reports need more: pip install 'llama-notebooks[reports]'") from None

import psutil
import typer
from tqdm import tqdm
from typer.core import TyperGroup

from helpers import ask, load_model
from helpers.attribution.methods import BUILT_IN
from helpers.errors import InputError
from helpers.machine import SlowPrecision
from helpers.models import BUNDLED
from helpers.summary import default_units, explain
from llama_reports.costs import measure, model_shape, needs, slow_dtype
from llama_reports.estimate import estimate, long_run, refuse_what_does_not_fit
from llama_reports.files import only_writer, read_mapping, write_whole
from llama_reports.gallery import write_index
from llama_reports.jobs import DEFAULT_NOTEBOOK, finished, plan
from llama_reports.pages import summary_page
from llama_reports.run import TIMEOUT, keep_failure, report_source, run_report
from llama_reports.scores import (
    chunks,
    discard_unfinished,
    finished_ids,
    score_part,
)
from llama_reports.terminal import inert, print_summary
from llama_reports.two_runs import compare_runs

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
NAMES = [method.name for method in BUILT_IN] + ["or one of another package"]
REPORTS = "reports"  # the command that needs no name
Model = Annotated[str, typer.Option(help="Bundled, hub name, folder or .gguf.")]
Methods = Annotated[
    list[str] | None, typer.Option(help=f"Only this method (repeatable): {', '.join(NAMES)}.")
]
WeightsDtype = Annotated[Dtype, typer.Option(help="Of the weights; auto: as saved.")]


class _Commands(TyperGroup):
    """What does not begin with the name of a command is a prompts file, or an option of a run."""

    def parse_args(self, ctx, args):
        named = args[:1] and args[0] in self.commands
        return super().parse_args(ctx, args if named else [REPORTS, *args])

    def resolve_command(self, ctx, args):
        name, command, rest = super().resolve_command(ctx, args)
        return "" if name == REPORTS else name, command, rest


app = typer.Typer(cls=_Commands, add_completion=False, pretty_exceptions_enable=False)


@app.command(REPORTS)
def main_command(
    prompts: Annotated[
        Path, typer.Argument(help="Prompts: .yml, .csv, .jsonl or .parquet.", metavar="PROMPTS")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the reports.")] = Path("outputs/reports"),
    model: Model = BUNDLED,
    notebook: Annotated[
        str, typer.Option(help="Notebook to run: a name, or a path to an .ipynb file.")
    ] = DEFAULT_NOTEBOOK,
    method: Methods = None,
    dtype: WeightsDtype = "float32",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes of a Dask cluster here; 0: as many as fit.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="A running Dask scheduler, such as tcp://10.0.0.1:8786.")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads a report; last digits depend on it.")
    ] = 1,
    scores_only: Annotated[
        bool, typer.Option("--scores-only", help="No notebooks: batches, and Parquet in OUT.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that a report, and any cell of it, may take.")
    ] = TIMEOUT,
    only: Annotated[
        list[str] | None, typer.Option(help="Only the entry of this id (repeatable).")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Only what failed before.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace reports of another model in OUT.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and what it takes.")
    ] = False,
) -> None:
    """Execute a notebook over every prompt of a file: one report each, and a gallery of them all.

    An entry of PROMPTS is a text, or a mapping with "prompt" or "messages" and, as wanted, "id",
    "target", "foil", "answer", "options", "units", "sources", "chat", "raw", "evidence", "methods"
    and "notebook": docs/reports.md says what each means. Other keys are carried to the results. The
    whole file is checked before anything runs. What an earlier run has finished is not run again,
    so a run that was stopped goes on where it was. A report that fails is kept and listed, the
    others go on, and the exit status is 1. With --scores-only no report is written: scores and
    evidence go to Parquet files, as docs/scores.md describes.

    "llama-reports plan --help" tells of the command that plans: what methods take on a prompt of
    some length, in time and memory; "ask --help" of the one that asks one question and prints the
    answer; "compare --help" of the one that compares two folders of reports. Prompts files of these
    names are ./plan, ./ask and ./compare.
    """
    # what batch systems and containers send first
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _refusals(out):
        if workers is not None and scheduler is not None:
            raise InputError("--workers starts a cluster and --scheduler joins one: give one.")
        if scores_only and (only or retry_failed):
            raise InputError("--only and --retry-failed choose reports: drop --scores-only.")
        options: dict[str, Any] = {"model": model, "notebook": notebook, "dtype": dtype}
        options["replace"] = replace
        jobs = plan(prompts, out=out, folders=not scores_only, methods=method or (), **options)
        scored = cache(finished_ids)  # looked up where it is asked for
        skipped = _skipped(jobs, out, only or (), retry_failed)
        done = (lambda job: job.identity in scored(out, jobs.carried)) if scores_only else skipped
        given: dict[str, Any] = {"scores_only": scores_only, "done": done}
        planned = partial(estimate, jobs, out, threads=threads, **given)
        if scheduler is None and (slow := slow_dtype(model, dtype, threads)):
            _say(f"Note: {slow}", err=True)
            warnings.simplefilter("ignore", SlowPrecision)  # load_model would say it again
        if workers == 0:
            fit = int(0.8 * psutil.virtual_memory().available / max(1, planned(workers=1).memory))
            workers = max(1, min(_cores() // threads, fit, len(jobs)))
        if dry_run:
            _say(planned(workers=workers or 1).text)
        if scheduler is None:  # else the memory is that of other machines
            refuse_what_does_not_fit(jobs, workers=workers or 1, **given)
        if dry_run:
            return
        if scheduler is None:
            told = long_run(jobs, out, threads=threads, workers=workers or 1, **given)
            if told:
                _say(told, err=True)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the kernels, and a cluster of our own
        run = _score_all if scores_only else partial(_report_all, done=done, timeout=timeout)
        with only_writer(out):
            failed, interrupted = run(jobs, out, (workers, scheduler), threads)
            if interrupted:
                stopped = "Stopped. What was finished is kept, and the same command goes on."
                _say(stopped, err=True)
                raise typer.Exit(130)
    if failed:
        raise typer.Exit(1)


@app.command("ask")
def ask_command(
    prompt: Annotated[str, typer.Argument(help="The text that is asked.")],
    target: Annotated[str | None, typer.Option(help="Why this text comes next.")] = None,
    foil: Annotated[str | None, typer.Option(help="Rather than this text.")] = None,
    answer: Annotated[
        int | None, typer.Option(min=1, help="Explain an answer of at most so many tokens.")
    ] = None,
    units: Annotated[
        str | None, typer.Option(help="What gets a score: tokens, words, sentences or turns.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Through the chat template.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the page to this file, too.")] = None,
    model: Model = BUNDLED,
    method: Methods = None,
    dtype: WeightsDtype = "float32",
) -> None:
    """Ask one question: the answer, the words that it hangs on, and whether to believe that.

    The prompt is coloured where the output is a terminal. Without --target and --answer the model's
    own next token is explained. Mind the space: --target " Riga".
    """
    with _refusals(html):
        if html is not None and not html.parent.is_dir():
            raise InputError(f"There is no folder {html.parent} for the page: make it first.")
        loaded, tokenizer = load_model(model, dtype=dtype)
        asked: dict[str, Any] = {"target": target, "foil": foil, "answer": answer, "chat": chat}
        question = ask(loaded, tokenizer, prompt, **asked, units=units or "tokens")
        found = explain(loaded, question if units else default_units(question), method)
        if html is not None:
            write_whole(html, summary_page(found).encode("utf-8"))
    print_summary(found)


@app.command("compare")
def compare_command(
    first: Annotated[Path, typer.Argument(help="Folder of reports.")],
    second: Annotated[Path, typer.Argument(help="Another one, with the same ids.")],
    html: Annotated[
        Path | None, typer.Option(help="The page; FIRST/compared.html by default.")
    ] = None,
) -> None:
    """Compare the reports of two folders by id: answers, strongest words, and what moved."""
    with _refusals(html or first):
        page = compare_runs(first, second, html)
    _say(f"Open {page.resolve()}")


@app.command("plan")
def plan_command(
    tokens: Annotated[list[int], typer.Option(help="Length of a prompt in tokens (repeatable).")],
    model: Model = BUNDLED,
    method: Methods = None,
    dtype: WeightsDtype = "float32",
    threads: Annotated[int, typer.Option(min=1, help="Threads that compute.")] = 1,
) -> None:
    """Say what methods take on a prompt of so many tokens: rows, seconds and memory, by part.

    Nothing is loaded: sizes are read off the headers of the model's files, and the speed of this
    machine is measured in about a second. Each method has what a report's budget gives it. Memory
    is that of one process which does nothing else; seconds are after a first call, without loading.
    """
    with _refusals(model):
        machine = measure(model_shape(model, dtype), dtype, threads)
        options: dict[str, Any] = {"dtype": dtype, "machine": machine}
        found = [needs(model, length, method, **options) for length in tokens]
    _say("\n\n".join([found[0].heading, *(need.text for need in found)]))


def _skipped(jobs, out, only, retry_failed):
    """What says of a job that it is not to be run: it is finished, or was not chosen."""
    known = {job.slug for job in jobs} if only else only
    unknown = [name for name in only if name not in known]
    if unknown:
        raise InputError(
            f"{jobs.path} has no entry {unknown[0]!r} for --only: give its id, or the name of its "
            "folder."
        )

    def skipped(job):
        failed = read_mapping(out / job.slug / "report.json").get("error") is not None
        chosen = (not only or job.slug in only) and (failed or not retry_failed)
        return not chosen or finished(job, out)

    return skipped


def _cores():
    """The cores that this process may use, where the system says so; else all."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS or Windows
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _say(text, err=False):
    """Print a text, whatever it quotes: nothing in it can steer the terminal."""
    typer.echo(inert(text), err=err)


def _log(out, facts):
    """Add a line on a report to ``out/log.jsonl``, as soon as it ends."""
    told = {name: facts.get(name) for name in ("slug", "seconds", "memory", "attempts")}
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps({"ended": ended, **told, "failed": facts["error"] is not None})
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


@contextmanager
def _refusals(place):
    """What cannot be done is one sentence, and exit status 2."""
    try:
        yield
    except (InputError, OSError) as error:
        _say(f"Error: {_told(error, place)}", err=True)
        raise typer.Exit(2) from None


def _told(error, out):
    """Our own error, or a system's, as one sentence."""
    if isinstance(error, InputError):
        return str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"The disk is full: {out}. What was finished is kept: make room, and run the same "
            "command again."
        )
    return f"{error.strerror or error}: {error.filename or out}"


def _report_all(jobs, out, cluster, threads, done, timeout):
    """Run every job that is not ``done``, and print what came of it.

    Returns how many failed, and whether the run was interrupted.
    """
    open_slugs = {job.slug for job in jobs if not done(job)}
    before = sum(finished(job, out) for job in jobs)
    left, ended, failed, interrupted = len(open_slugs), 0, [], True
    tasks = ((job, report_source(job.notebook)) for job in jobs if job.slug in open_slugs)
    function = partial(_report, out=out.resolve(), model=jobs.model, threads=threads)
    function = partial(function, timeout=timeout)
    with (
        suppress(KeyboardInterrupt),
        closing(_results(function, tasks, jobs, out, cluster)) as results,
        tqdm(total=left, unit="report", disable=None) as bar,
    ):
        for (job, _), facts, error in results:
            if error is not None:
                facts = keep_failure(job, out, jobs.model, _why(error))
            _log(out, facts)
            ended += 1
            failed += [facts] if facts["error"] else []
            bar.set_postfix_str(job.slug[:40])
            bar.update()
        interrupted = False
    for facts in failed:
        _say(f"failed: {facts['slug']}: {facts['error'].splitlines()[0]}", err=True)
    index = write_index(out) if ended or before else None
    _sum_up("reports", ended - len(failed), left, len(failed), before)
    if index:
        _say(f"Open {index.resolve()}")
    return len(failed), interrupted


def _report(task, out, model, threads, timeout):
    """One report, in whatever process this is."""
    job, source = task
    if finished(job, out):  # by a worker whose word was lost, with a scheduler or with itself
        return read_mapping(out / job.slug / "report.json")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # a worker that others started has its own
    os.environ.pop("MALLOC_TRIM_THRESHOLD_", None)  # see OWN_CLUSTER in cluster.py
    return run_report(job, out, model, source=source, timeout=timeout)


def _score_all(jobs, out, cluster, threads):
    """Attribute every prompt that is not in the tables of ``out``; returns as ``_report_all``."""
    known = finished_ids(out, jobs.carried)  # which refuses other tables: nothing is touched
    discard_unfinished(out)
    before = sum(job.identity in known for job in jobs)
    options = {"model": jobs.model, "dtype": jobs.dtype, "threads": threads}
    options["methods"] = jobs.methods
    function = partial(score_part, out=out.resolve(), **options)
    parts, done, failed, told, interrupted = chunks(jobs, done=known), 0, 0, 0, True
    with (
        suppress(KeyboardInterrupt),
        tqdm(total=len(jobs) - before, unit="prompt", disable=None) as bar,
    ):
        while parts:
            halves = []
            with closing(_results(function, parts, jobs, out, cluster)) as results:
                for part, facts, error in results:
                    if error is None:
                        done += facts["prompts"]
                        failed += facts["failed"]
                    elif len(part) > 1:  # until the prompt that kills its worker is alone
                        half = len(part) // 2
                        halves += [part[:half], part[half:]]
                        continue
                    else:
                        done, failed, told = done + 1, failed + 1, told + 1
                        _say(f"failed: {part[0].prompt[:60]!r}: {_why(error)}", err=True)
                    bar.update(len(part))
            parts = halves
        interrupted = False
    _sum_up("prompts", done - failed, len(jobs) - before, failed, before)
    if failed > told:
        _say(f"What failed is in the column error of {out / 'prompts'}.", err=True)
    return failed, interrupted


def _results(function, tasks, jobs, out, cluster):
    """``(task, result, error)`` of every task: here, or on a cluster.

    An error that is no task's own, such as a full disk, is raised.
    """
    workers, scheduler = cluster
    if scheduler is None and (workers or 1) == 1:
        results = ((task, *_tried(function, task)) for task in tasks)
    else:
        from llama_reports.cluster import run_on_cluster  # takes a second to import

        # workers here read the same files
        model = None if scheduler is None else (jobs.model, jobs.model_digest)
        options: dict[str, Any] = {"workers": workers, "scheduler": scheduler, "model": model}
        results = run_on_cluster(function, tasks, out, **options)
    with closing(results):
        for task, result, error in results:
            if isinstance(error, (InputError, OSError)):
                raise error
            yield task, result, error


def _tried(function, task):
    try:
        return function(task), None
    except Exception as error:
        return None, error


def _sum_up(things, done, left, failed, before):
    earlier = f", {before:,} finished before" if before else ""
    _say(f"{done:,} of {left:,} {things} done, {failed:,} failed{earlier}.")


def _why(error):
    """What to say of a report that could not even fail by itself."""
    if type(error).__name__ == "KilledWorker":
        return (
            "Every worker that ran this prompt died, most often for lack of memory: try a shorter "
            "prompt, or fewer workers."
        )
    return f"{type(error).__name__}: {error}"


def main() -> None:
    app()
