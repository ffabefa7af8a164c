"""A run over a whole prompts file: planned, then done here or on a cluster, and told.

What the command line does once the file itself is known to be right.
"""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from helpers.errors import InputError
from helpers.machine import SlowPrecision
from llama_reports.costs import counted, slow_dtype
from llama_reports.estimate import (
    divided,
    estimate,
    long_run,
    refuse_what_does_not_fit,
    spread,
)
from llama_reports.files import only_writer, read_mapping
from llama_reports.gallery import write_index
from llama_reports.jobs import plan
from llama_reports.prompts import Row
from llama_reports.run import finished, keep_failure, report_source, report_task
from llama_reports.scores import chunks, discard_unfinished, finished_ids, part_name, score_part
from llama_reports.terminal import say

AHEAD = 64  # jobs that are put in order together


def run_all(
    prompts: Path,
    out: Path,
    *,
    model: str,
    notebook: str,
    method: Sequence[str] | None,
    dtype: str,
    workers: int | None,
    scheduler: str | None,
    threads: int | None,
    scores_only: bool,
    timeout: float,
    only: Sequence[str] | None,
    retry_failed: bool,
    replace: bool,
    dry_run: bool,
    attempts: int | None,
    rows: Iterator[Row] | None = None,
) -> tuple[int, bool]:
    """Do what the command asks for; gives how many failed, and whether it was interrupted.

    The parameters are the command's, said in command.py; ``rows`` is what ``open_entries`` gave.
    """
    options: dict[str, Any] = {"model": model, "notebook": notebook, "dtype": dtype}
    options |= {"replace": replace, "rows": rows, "methods": method or ()}
    jobs = plan(prompts, out=out, folders=not scores_only, **options)
    scored = cache(finished_ids)  # looked up where it is asked for
    skipped = _skipped(jobs, out, only or (), retry_failed)
    done = (lambda job: job.identity in scored(out, jobs.carried)) if scores_only else skipped
    given: dict[str, Any] = {"scores_only": scores_only, "done": done}
    if workers == 0:
        workers, threads = divided(jobs, _cores(), threads, **given)
    threads = threads or 1
    planned = partial(estimate, jobs, out, workers=workers or 1, threads=threads, **given)
    if scheduler is None and (slow := slow_dtype(model, dtype)):
        say(f"Note: {slow}", err=True)
        warnings.simplefilter("ignore", SlowPrecision)  # load_model would say it again
    cores = _cores() if scheduler is None else 0
    if dry_run and attempts is None:
        say(planned(cores=cores).text)
    if scheduler is None:  # else the memory is that of other machines
        refuse_what_does_not_fit(jobs, workers=workers or 1, **given)
    jobs.keep()  # nothing is written before all that can be refused has been
    if dry_run and attempts is None:
        return 0, False
    tried = None if attempts is None else spread(jobs, attempts, done)
    if scheduler is None and tried is None:
        told = long_run(jobs, out, threads=threads, workers=workers or 1, **given)
        if told:
            say(told, err=True)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the kernels, and a cluster of our own
    run = _score_all if scores_only else partial(_report_all, done=done, timeout=timeout)
    with only_writer(out):
        failed, interrupted = run(jobs, out, (workers, scheduler), threads, tried)
    if tried is not None and not interrupted:
        scored.cache_clear()
        say(_of_trial(tried, out) + planned(tried=tried, cores=cores).text)
    return failed, interrupted


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


def _log(out, facts):
    """Add a line on a report to ``out/log.jsonl``, as soon as it ends."""
    told = {name: facts.get(name) for name in ("slug", "seconds", "memory", "attempts")}
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps({"ended": ended, **told, "failed": facts["error"] is not None})
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


def _of_trial(tried, out):
    """What to say of the jobs that were ``tried``."""
    if not tried:
        return ""
    lengths = sorted(job.tokens for job in tried.values())
    between = f"{lengths[0]:,} to {lengths[-1]:,} tokens"
    return (
        f"Tried: {counted(len(tried), 'prompt')} of {between}, in {out} as in any run: what is "
        "finished there is not run again.\n"
    )


def _report_all(jobs, out, cluster, threads, tried, done, timeout):
    """Run every job that is not ``done``, or those that are to be ``tried``; print what came of it.

    Returns how many failed, and whether the run was interrupted.
    """
    chosen = jobs if tried is None else tried.values()
    open_slugs = {job.slug for job in chosen if not done(job)}
    before = sum(finished(job, out) for job in jobs)
    left, ended, failed, interrupted = len(open_slugs), 0, [], True
    to_run = (job for job in jobs if job.slug in open_slugs)
    ordered = to_run if cluster == (None, None) else _longest_first(to_run)
    tasks = ((job, report_source(job.notebook)) for job in ordered)

    def fits(task, facts):
        names = ("slug", "identity")
        return [facts.get(name) for name in names] == [getattr(task[0], name) for name in names]

    function = partial(report_task, out=out.resolve(), model=jobs.model, threads=threads)
    function = partial(function, timeout=timeout)
    with (
        suppress(KeyboardInterrupt),
        closing(_results(function, tasks, jobs, out, cluster, fits)) as results,
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
        say(f"failed: {facts['slug']}: {facts['error'].splitlines()[0]}", err=True)
    index = write_index(out) if ended or before else None
    _sum_up("reports", ended - len(failed), left, len(failed), before)
    if index:
        say(f"Open {index.resolve()}")
    return len(failed), interrupted


def _longest_first(jobs):
    """Jobs in another order, so that no long one is left to a single worker at the end."""
    jobs = iter(jobs)
    while held := list(islice(jobs, AHEAD)):
        yield from sorted(held, key=lambda job: -job.tokens)


def _score_all(jobs, out, cluster, threads, tried):
    """Attribute prompts that are not in the tables of ``out``; all is as in ``_report_all``."""
    known = finished_ids(out, jobs.carried)  # which refuses other tables: nothing is touched
    discard_unfinished(out)
    chosen = jobs if tried is None else tried.values()
    before = sum(job.identity in known for job in chosen)
    options = {"model": jobs.model, "dtype": jobs.dtype, "threads": threads}
    options["methods"] = jobs.methods
    function = partial(score_part, out=out.resolve(), **options)
    parts, done, failed, told, interrupted = chunks(chosen, done=known), 0, 0, 0, True

    def fits(part, facts):
        return (facts.get("part"), facts.get("prompts")) == (part_name(part), len(part))

    with (
        suppress(KeyboardInterrupt),
        tqdm(total=len(chosen) - before, unit="prompt", disable=None) as bar,
    ):
        while parts:
            halves = []
            with closing(_results(function, parts, jobs, out, cluster, fits)) as results:
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
                        say(f"failed: {part[0].prompt[:60]!r}: {_why(error)}", err=True)
                    bar.update(len(part))
            parts = halves
        interrupted = False
    _sum_up("prompts", done - failed, len(chosen) - before, failed, before)
    if failed > told:
        say(f"What failed is in the column error of {out / 'prompts'}.", err=True)
    return failed, interrupted


class _OfAnotherTask(Exception):
    """What came back as the result of a task is not that."""


def _results(function, tasks, jobs, out, cluster, fits):
    """``(task, result, error)`` of every task: here, or on a cluster.

    A result counts only where it ``fits`` its task. An error that is no task's own, such as a full
    disk, is raised.
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
            if error is None and not (isinstance(result, dict) and fits(task, result)):
                result, error = None, _OfAnotherTask()
            yield task, result, error


def _tried(function, task):
    try:
        return function(task), None
    except Exception as error:
        return None, error


def _sum_up(things, done, left, failed, before):
    earlier = f", {before:,} finished before" if before else ""
    say(f"{done:,} of {left:,} {things} done, {failed:,} failed{earlier}.")


def _why(error):
    """What to say of a report that could not even fail by itself."""
    if type(error).__name__ == "KilledWorker":
        return (
            "Every worker that ran this prompt died, most often for lack of memory: try a shorter "
            "prompt, or fewer workers."
        )
    if isinstance(error, _OfAnotherTask):
        return (
            "A worker sent back what is no result of this prompt, and it was not taken: see who "
            "else can reach the scheduler, and run the same command again."
        )
    return f"{type(error).__name__}: {error}"
