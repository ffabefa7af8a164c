"""What a plan will take, before any of it is run: ``llama_reports.costs``, over all its prompts."""

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers.attribution import METHODS, Price
from helpers.attribution.engine import TOKENS_PER_BATCH
from helpers.attribution.methods import erasure_price
from helpers.errors import InputError
from helpers.model_folders import public_name
from helpers.summary import LONG, STRONGEST, reported
from llama_reports.costs import (
    MARGIN,
    Machine,
    Shape,
    Size,
    counted,
    device_of_runs,
    free,
    in_bytes,
    in_time,
    measure,
    methods_work,
    model_shape,
    most_held,
    priced,
    rates_in_words,
)
from llama_reports.files import read_mapping
from llama_reports.jobs import DEFAULT_NOTEBOOK, Plan
from llama_reports.run import Job, finished
from llama_reports.scores import DEFAULT_METHODS, PART, WINDOW, seconds_of

SHOWN = 10  # reports that are named
ENOUGH = 3  # finished reports from which on the estimate is corrected by them
LOOKED_AT = 500  # of them
START = 5.0  # seconds until a worker has imported everything and has the model
# measured over reports of the bundled model, of 4 to 145 tokens, and of toys, of up to 1,709
FIXED = 0.5, 0.01  # seconds of a report beside the model's, and those a unit: figures, pages
DISK = 130_000, 5_000, 20_000  # bytes of a report's folder, those a unit, and those a unit drawn
DRAWN = 24  # units of which a figure grows
SCORE = 16  # bytes of a score on disk, and of what stands beside it
PROCESS = 600_000_000  # bytes of a process that has imported everything, without a model
HOUR = 3600.0  # seconds from which on a run says how long it will take
FASTER = 0.9  # of the time: what takes more than that is not called faster
ROOM = 0.8  # of the free memory, for as many workers as fit
LAST = 1000  # reports that are dealt to workers one by one; those before them keep all busy
FAST = 1e12, 1e11, 1e-5, 1e10, 1e10  # a machine beside which this one is slow


@dataclass(frozen=True)
class Estimate:
    """What a plan takes. ``seconds`` of a clock on the wall, ``memory`` and ``disk`` in bytes.

    ``memory`` is the most that all processes hold together, on the accelerator where there is one.
    ``first`` are the names of the first reports to run, ``replaced`` counts those that take the
    place of another question's, ``basis`` is in words what all of this rests on, ``faster`` are
    sentences on what would take less time, and ``text`` is what ``--dry-run`` prints.
    """

    to_run: int
    finished: int
    replaced: int
    first: list[str]
    seconds: float = 0.0
    memory: int = 0
    disk: int = 0
    basis: str = ""
    workers: int = 1
    threads: int = 1
    unit: str = "report"
    faster: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        lines = [f"{counted(self.to_run, self.unit)} would run" + (":" if self.first else ".")]
        lines += [f"  {name}" for name in self.first]
        if self.to_run > len(self.first) and self.first:
            lines.append(f"  … and {self.to_run - len(self.first):,} more")
        if self.finished:
            lines.append(f"{self.finished:,} finished before: not run again.")
        if self.replaced:
            lines.append(f"{self.replaced:,} of another question under the same id: replaced.")
        if self.to_run:
            memory, disk = in_bytes(self.memory), in_bytes(self.disk)
            lines.append(
                f"About {in_time(self.seconds)} with {_in_words(self.workers, self.threads)}; at "
                f"most {memory} of memory; {disk} of disk."
            )
            lines.append(f"Basis: {self.basis}")
            lines += [f"Faster: {sentence}" for sentence in self.faster]
        return "\n".join(lines)


def estimate(
    plan: Plan,
    out: str | Path | None = None,
    *,
    workers: int = 1,
    threads: int = 1,
    scores_only: bool = False,
    done: Callable[[Job], bool] | None = None,
    machine: Machine | None = None,
    tried: Mapping[int, Job] | None = None,
    cores: int = 0,
) -> Estimate:
    """What a ``Plan`` takes with ``workers`` processes of ``threads`` threads each.

    ``done(job)`` says if a job needs no more work; by default, if its report is in ``out``. With
    ``scores_only`` jobs are attributed in batches and no notebook is run. ``machine`` is measured
    here unless it is given. Where ``out`` holds reports of the same notebook and model, what they
    took corrects the estimate; where ``tried`` is given, as ``spread`` gives it, what these jobs
    took there. With ``cores`` that may be used, another dtype and other workers and threads are
    measured too, and what is faster is told. Returns an ``Estimate``.
    """
    if done is None and not scores_only and out is not None and Path(out).exists():
        done = partial(finished, out=out)
    left, first = _left(plan, done)
    unit, to_run = "prompt" if scores_only else "report", int(left.sum())
    found = Estimate(to_run, len(plan) - to_run, plan.replaced, first, unit=unit)
    if not to_run:
        return found
    shape, busy = model_shape(plan.model, plan.dtype), min(workers, _tasks(to_run, scores_only))
    machine = machine or measure(shape, plan.dtype, threads, busy)
    run = _Run(plan, left, scores_only, {})
    fits = _fits(run, shape, machine, out, tried)
    run = replace(run, fits=fits)
    seconds = run.seconds(shape, machine, busy)
    return replace(
        found,
        seconds=seconds,
        memory=_memory(plan, shape, left, scores_only, busy),
        disk=_disk(plan, left, scores_only),
        basis=_basis(machine, fits, run.notebooks, tried is not None),
        workers=busy,
        threads=threads,
        faster=tuple(_faster(run, shape, seconds, busy, threads, cores)) if cores else (),
    )


def spread(plan: Plan, count: int, done: Callable[[Job], bool] | None = None) -> dict[int, Job]:
    """``{index: job}`` of ``count`` jobs to try: from the shortest that is left to the longest.

    Between them they are quantiles of the length in tokens, so that what is fitted to them holds
    for all others; a single one is the median. ``done`` is as in ``estimate``.
    """
    left, _ = _left(plan, done)
    places = np.flatnonzero(left)
    places = places[np.lexsort((plan.units[places], plan.tokens[places]))]
    if not len(places):
        return {}
    shares = np.linspace(0, 1, count) if count > 1 else np.array([0.5])
    chosen = set(places[np.round(shares * (len(places) - 1)).astype(int)].tolist())
    return {index: job for index, job in enumerate(plan) if index in chosen}


def divided(
    plan: Plan,
    cores: int,
    threads: int | None = None,
    *,
    scores_only: bool = False,
    done: Callable[[Job], bool] | None = None,
) -> tuple[int, int]:
    """``(workers, threads)`` that take a plan the least time on so many ``cores``.

    Each division of the cores is measured as it would be used, all workers at once, and the plan
    estimated with that. One thread a worker is given up only for what is clearly faster, so that
    the same machine chooses alike. As many workers as there is memory for, where ``threads`` are
    given or an accelerator computes. ``done`` is as in ``estimate``.
    """
    left, _ = _left(plan, done)
    if not left.any():
        return 1, threads or 1
    shape, run = model_shape(plan.model, plan.dtype), _Run(plan, left, scores_only, {})
    most = run.most_workers(shape, cores // (threads or 1))
    if threads or device_of_runs().type != "cpu":
        return most, threads or 1
    taken = run.divisions(shape, cores, most)
    best = min(taken, key=lambda pair: taken[pair])
    return best if taken[best] < FASTER * taken[most, 1] else (most, 1)


def long_run(
    plan: Plan,
    out: str | Path,
    *,
    threads: int = 1,
    done: Callable[[Job], bool] | None = None,
    **options: Any,
) -> str | None:
    """A sentence about a run of more than an hour, else ``None``; all is as in ``estimate``.

    What cannot take a minute on a fast machine is not estimated, and what is finished is looked up
    only where all of it would take an hour.
    """
    shape = _known_shape(plan)
    if shape is None or estimate(plan, machine=Machine(*FAST), **options).seconds < 60:
        return None
    machine = measure(shape, plan.dtype, threads)
    if estimate(plan, machine=machine, **options).seconds < HOUR:
        return None
    seconds = estimate(plan, out, machine=machine, done=done, **options).seconds
    if seconds < HOUR:
        return None
    return f"This will take about {in_time(seconds)}: --dry-run tells more."


def refuse_what_does_not_fit(
    plan: Plan,
    *,
    workers: int = 1,
    scores_only: bool = False,
    done: Callable[[Job], bool] | None = None,
) -> None:
    """Raise ``InputError`` where a run has no room even with one row a pass; nothing is loaded.

    The sentence says what would fit. The planner's own error is granted: what needs more than is
    free by less than that is let through. ``done`` is as in ``estimate``, asked only where it may
    make a difference.
    """
    shape, there_is = _known_shape(plan), free()
    everything = np.ones(len(plan), bool)

    def needed(left):
        return _memory(plan, shape, left, scores_only, min(workers, left.sum()), least=True)

    if not len(plan) or shape is None or needed(everything) <= MARGIN * there_is:
        return
    left = everything if done is None else np.array([not done(job) for job in plan])
    if needed(left) > MARGIN * there_is:
        raise InputError(_what_would_fit(plan, shape, left, scores_only, workers, there_is))


def _known_shape(plan):
    """The ``Shape`` of the plan's model; ``None`` where a stranger's files do not tell it.

    What is wrong with them is told when the model is loaded.
    """
    try:
        return model_shape(plan.model, plan.dtype)
    except Exception:
        return None


def _what_would_fit(plan, shape, left, scores_only, workers, there_is):
    """What a run needs, what there is, and each way by itself that would make it fit."""
    asked = _longest(plan, left, scores_only)
    methods, size = max(asked, key=lambda asked: most_held(shape, *asked, least=True))
    workers = min(workers, int(left.sum()))

    def need(shape=shape, methods=methods, size=size, workers=workers):
        return _processes(shape, most_held(shape, methods, size, least=True), scores_only, workers)

    ways = []
    fewer = [n for n in range(1, workers) if need(workers=n) <= there_is]
    if fewer:
        ways.append(counted(fewer[-1], "worker"))
    if plan.dtype == "float32" and need(replace(shape, itemsize=2)) <= there_is:
        ways.append("--dtype bfloat16")
    small = [name for name in methods if need(methods=[name]) <= there_is]
    if small:
        ways.append(f"{', '.join(small)} alone (--method)")
    shorter = bisect_right(
        range(1, size.tokens),
        there_is,
        key=lambda tokens: need(size=Size(tokens, min(size.units, tokens), size.outputs)),
    )
    if shorter:
        ways.append(f"prompts of at most {shorter:,} tokens (there is one of {size.tokens:,})")
    return (
        f"About {in_bytes(need())} of memory are needed and {in_bytes(there_is)} are free, so "
        f"nothing was started; what would fit: {', or '.join(ways) or 'a smaller model'}."
    )


def _left(plan, done):
    """Which jobs are to run, bool [jobs], and the names of the first of them."""
    left, first = np.ones(len(plan), bool), []
    for index, job in enumerate(plan):
        if done is None and len(first) == SHOWN:
            break
        left[index] = done is None or not done(job)
        if left[index] and len(first) < SHOWN:
            first.append(job.slug or job.prompt[:60])
    return left, first


def report_work(shape: Shape, size: Size, methods: Iterable[str] = ()) -> np.ndarray:
    """The ``work`` of ``DEFAULT_NOTEBOOK`` on a prompt; no methods are those of ``reported``.

    Its own part: the question, the prompt without its strongest units, of the target alone and
    beside a foil, in a long one without the strongest words too, and the erasure of units in the
    order of each method and in random ones.
    """
    methods = list(methods or reported(size.tokens))
    own = priced(shape, Price(forwards=2 + 2 * (STRONGEST + 1)), size)
    if size.tokens > LONG:
        own += priced(shape, Price(forwards=2 * (STRONGEST + 1)), size)
        if "relevance" not in methods:  # else the words inside are coloured by its own pass
            own += methods_work(shape, size, ["relevance"])
    own += priced(shape, erasure_price(size.units, size.tokens, len(methods)), size)
    return own + methods_work(shape, size, methods)


@dataclass(frozen=True)
class _Run:
    """Jobs that are left of a plan, and how far plans of such jobs were off."""

    plan: Plan
    left: np.ndarray  # bool [jobs]
    scores_only: bool
    fits: Mapping[str, "_Fit"]

    @property
    def notebooks(self):
        """The names of the notebooks that would run, none for scores alone."""
        kinds = [] if self.scores_only else np.unique(self.plan.kinds[self.left])
        return sorted({self.plan.asked[kind][0] for kind in kinds})

    def seconds(self, shape, machine, workers):
        """Seconds on the clock until all is done by so many workers."""
        each = _seconds_of_jobs(self.plan, shape, machine, self.left, self.scores_only)
        each = each * _ratios(self.plan, self.left, self.scores_only, self.fits)
        if self.scores_only:  # in parts, of which one is like another
            parts = _tasks(len(each), True)
            each = np.full(parts, each.sum() / parts)
        return _last_end(np.sort(each)[::-1], workers) + START

    def most_workers(self, shape, cores):
        """How many workers have memory and something to do, at most one a core."""
        one = _memory(self.plan, shape, self.left, self.scores_only, 1)
        tasks = _tasks(int(self.left.sum()), self.scores_only)
        return max(1, min(cores, int(ROOM * free() / max(1, one)), tasks))

    def divisions(self, shape, cores, most, *more):
        """``{(workers, threads): seconds}`` of the ways to divide the cores worth a try, and more.

        All by the clock on the wall, so that whatever else the machine does slows all down alike.
        """
        halves = (most >> times for times in range(most.bit_length()))
        pairs = [(most, 1), *((workers, cores // workers) for workers in halves), *more]
        found = {}
        for workers, threads in dict.fromkeys(pairs):
            machine = measure(shape, self.plan.dtype, threads, workers, wall=True)
            found[workers, threads] = self.seconds(shape, machine, workers)
        return found


def _tasks(jobs, scores_only):
    """How many pieces of work so many jobs are."""
    return math.ceil(jobs / PART) if scores_only else jobs


def _last_end(each, workers):
    """Seconds until all are done, each in its turn by the worker that is free first.

    Several workers take long ones first, as they do here.
    """
    many = each[:-LAST].sum() / workers  # of which the end hardly matters
    free_at = [many] * workers
    for seconds in each[-LAST:].tolist():
        heapq.heapreplace(free_at, free_at[0] + seconds)
    return float(max(free_at))


def _seconds_of_jobs(plan, shape, machine, left, scores_only):
    """Seconds of the jobs left, in their order: of a report, or a share of a batch alike."""

    @cache
    def of(kind, size, count):
        methods = plan.asked[kind][1]
        if not scores_only:
            return _report_seconds(shape, machine, size, methods)
        together = methods_work(shape, size, methods or DEFAULT_METHODS, count)
        return machine.seconds(together, shape) / count

    windows = np.arange(left.sum()) // WINDOW  # as many as are sorted by length together
    known = (plan.kinds, plan.tokens, plan.units, plan.outputs, plan.texts)
    facts = [of_all[left] for of_all in known]
    alike, place, counts = np.unique(
        [windows, *facts], axis=1, return_inverse=True, return_counts=True
    )
    columns = zip(alike.T.tolist(), counts.tolist(), strict=True)
    taken = [of(kind, Size(*size), count) for (_, kind, *size), count in columns]
    return np.array(taken)[place.ravel()]


def _in_words(workers, threads):
    """So many workers of so many threads."""
    of = "" if threads == 1 else f" of {counted(threads, 'thread')}"
    return f"{counted(workers, 'worker')}{of}"


def _faster(run, shape, seconds, workers, threads, cores):
    """A sentence on the fastest other division of the cores, and on half precision."""
    if device_of_runs().type != "cpu":
        return
    most = run.most_workers(shape, cores)
    taken = run.divisions(shape, cores, most, (workers, threads))
    best = min(taken, key=lambda pair: taken[pair])
    ratio = taken[best] / taken[workers, threads]
    if ratio < FASTER:
        times = f"about {ratio:.2g} times as long"
        option = "--workers {} --threads {}".format(*best)
        yield f"{_in_words(*best)} ({option}), {times} by the rates that they have here."
    if run.plan.dtype == "float32":
        half = replace(shape, itemsize=2)
        machine = measure(half, "bfloat16", threads, workers)
        ratio = run.seconds(half, machine, workers) / seconds
        if ratio < FASTER:
            yield (
                f"--dtype bfloat16, about {ratio:.2g} times as long by the rates that it has here; "
                "its scores have fewer right digits (14_precision)."
            )


# --- what was taken before ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Fit:
    """What some jobs took, over what was planned for them: a ratio for each length in tokens."""

    tokens: np.ndarray
    ratios: np.ndarray
    mean: float
    count: int

    @classmethod
    def of(cls, tokens, took, planned):
        lengths, place = np.unique(tokens, return_inverse=True)
        ratios = np.bincount(place, took) / np.bincount(place, planned)
        return cls(lengths, ratios, sum(took) / sum(planned), len(tokens))


def _ratios(plan, left, scores_only, fits):
    """By what the seconds of each job that is left are multiplied, [jobs]."""
    tokens, kinds = plan.tokens[left], plan.kinds[left]
    found = np.ones(len(tokens))
    for kind, (notebook, _) in enumerate(plan.asked):
        fit = fits.get("" if scores_only else notebook)
        if fit is not None:
            of = kinds == kind
            found[of] = np.interp(tokens[of], fit.tokens, fit.ratios)
    return found


def _fits(run, shape, machine, out, tried):
    """``{notebook: _Fit}`` where there is one; for scores alone the name is empty.

    The fits to what the jobs of a trial took, however few they are, or to finished reports.
    """
    if tried is None:
        rows = {name: _finished(run.plan, shape, machine, name, out) for name in run.notebooks}
        rows = {name: some for name, some in rows.items() if len(some) >= ENOUGH}
    else:
        rows = _trial(run.plan, shape, machine, run.scores_only, out, tried)
    return {name: _Fit.of(*zip(*some, strict=True)) for name, some in rows.items()}


def _trial(plan, shape, machine, scores_only, out, tried):
    """``{notebook: [(tokens, took, planned), …]}`` of the jobs that were tried."""
    chosen = np.isin(np.arange(len(plan)), list(tried))
    planned = _seconds_of_jobs(plan, shape, machine, chosen, scores_only)
    if scores_only:
        spent = seconds_of(out, [job.identity for job in tried.values()])
        took = {index: spent.get(job.identity) for index, job in tried.items()}
    else:
        took = {index: _took(job, out) for index, job in tried.items()}
    rows: dict[str, list] = {}
    for index, seconds in zip(np.flatnonzero(chosen).tolist(), planned.tolist(), strict=True):
        if took[index] is not None:
            name = "" if scores_only else plan.asked[plan.kinds[index]][0]
            rows.setdefault(name, []).append((plan.tokens[index], took[index], seconds))
    return rows


def _took(job, out):
    """The seconds of a report that is there and has no error, else ``None``."""
    facts = read_mapping(Path(out, job.slug, "report.json"))
    return facts["seconds"] if finished(job, out) else None


def _basis(machine, fits, notebooks, tried):
    """What the seconds rest on, in words."""
    basis = [rates_in_words(machine)]
    for notebook, fit in fits.items():
        of = f" for {notebook}" if notebook else ""
        things = counted(fit.count, "report" if notebook else "prompt")
        when = " just now" if tried else ""
        lengths = " to ".join(f"{n:,}" for n in dict.fromkeys([fit.tokens[0], fit.tokens[-1]]))
        took = f"by what {things} of {lengths} tokens took{when}"
        basis.append(f"Times {fit.mean:.2f} in the mean{of}, {took}.")
    for notebook in notebooks:
        if notebook not in (*fits, DEFAULT_NOTEBOOK):
            until = f"until {ENOUGH} of its reports are finished"
            basis.append(f"{notebook} is counted as {DEFAULT_NOTEBOOK}, {until}.")
    return " ".join(basis)


def _report_seconds(shape, machine, size, methods):
    took = machine.seconds(report_work(shape, size, methods), shape)
    return FIXED[0] + FIXED[1] * size.units + took


def _finished(plan, shape, machine, notebook, out):
    """``[(tokens, took, planned), …]`` of the reports of a notebook in ``out``."""
    alike, rows = [notebook, public_name(plan.model), None], []
    folders = Path(out).glob("*/report.json") if out is not None else ()
    for file in islice(folders, LOOKED_AT):
        facts = read_mapping(file)
        try:
            if [facts[name] for name in ("notebook", "model", "error")] != alike:
                continue
            tokens, seconds = int(facts["tokens"]), float(facts["seconds"])
            size = Size(
                tokens, *(int(facts.get(name) or 1) for name in ("units", "outputs", "texts"))
            )
        except (ValueError, KeyError, TypeError):
            continue
        planned = _report_seconds(shape, machine, size, _methods_of(file.parent))
        rows.append((tokens, seconds, planned))
    return rows


def _methods_of(folder):
    """The methods that a report has evidence of; none where it is another notebook's."""
    try:
        found = pd.read_csv(folder / "evidence.csv", usecols=["method"])["method"]
        return {name for name in found if name in METHODS}
    except (OSError, ValueError):  # what pandas raises is one of these
        return set()


def _memory(plan, shape, left, scores_only, workers, least=False):
    """Bytes that this process and its workers hold at most: weights, the largest pass, Python.

    ``least`` is with one row a pass, and of the longest prompts alone.
    """
    most = 0
    for methods, size in _longest(plan, left, scores_only, every=not least):
        rows = max(1, TOKENS_PER_BATCH["cpu"] // size.length) if scores_only else 1
        most = max(most, most_held(shape, methods, size, rows, least))
    return _processes(shape, most, scores_only, workers)


def _longest(plan, left, scores_only, every=False):
    """``(methods, size)`` of the longest prompts that are left, or of ``every`` size there is.

    Of which methods another notebook runs nothing is known: it is counted with all of them with
    every size, and else as if it ran none.
    """
    found = []
    for kind, (notebook, methods) in enumerate(plan.asked):
        there = left & (plan.kinds == kind)
        facts = np.stack([plan.tokens, plan.units, plan.outputs, plan.texts])[:, there]
        if facts.size:
            sizes = np.unique(facts, axis=1) if every else facts.max(axis=1, keepdims=True)
            for size in (Size(*size) for size in sizes.T.tolist()):
                default = notebook == DEFAULT_NOTEBOOK
                own = reported(size.tokens) if default else METHODS if every else ()
                own = DEFAULT_METHODS if scores_only else own
                found.append((sorted(methods or own), size))
    return found


def _processes(shape, most, scores_only, workers):
    """Bytes of all processes, each of which holds ``most`` at its worst moment."""
    if device_of_runs().type != "cpu":  # which the accelerator holds
        return workers * (shape.weights + most)
    alone = scores_only and workers == 1  # in this very process
    weights = shape.weights * (1 if shape.mapped else workers)
    return weights + (0 if alone else PROCESS) + workers * (PROCESS + most)


def _disk(plan, left, scores_only):
    units = plan.units[left].astype(float)
    if not scores_only:
        a_report, a_unit, a_drawn_one = DISK
        return int((a_report + a_unit * units + a_drawn_one * np.minimum(units, DRAWN)).sum())
    methods = np.array([len(methods or DEFAULT_METHODS) for _, methods in plan.asked])
    return int(SCORE * (units * methods[plan.kinds[left]]).sum())
