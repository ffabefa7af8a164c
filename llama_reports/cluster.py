"""The same work on many processes or machines, through Dask's distributed.

Tasks are handed out as workers come free, and what comes back is kept in a folder that all of them
see, so nothing finished depends on a worker, the scheduler or this process staying alive.
"""

import contextlib
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import dask
from distributed import Client, KilledWorker, LocalCluster, Security, as_completed, get_worker
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError

from helpers.errors import InputError
from helpers.model_folders import public_name
from llama_reports.versions import code_version, model_digest

PATIENCE = 120  # seconds to wait for a scheduler that went away, or for a first worker
DEATHS = 1  # workers that may die under a task before it is set aside, on a cluster of our own
# Dask has workers give every freed page back at once, to be faulted in again by the next row.
OWN_CLUSTER = {
    "distributed.scheduler.allowed-failures": DEATHS,
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
}


def run_on_cluster(
    function: Callable[[Any], Any],
    tasks: Iterable[Any],
    folder: str | Path,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    patience: float = PATIENCE,
    model: tuple[str, str] | None = None,
) -> Iterator[tuple[Any, Any, Exception | None]]:
    """``function(task)`` for every task, on ``workers`` processes here or on a running cluster.

    ``tasks`` is an iterable, read as workers come free; each must pickle. Yields ``(task, result,
    error)`` as they finish, in any order: an exception that ``function`` raised is ``error``, and
    ``result`` is then None. A task whose worker dies goes to another one. One under which several
    died is tried once more at the end, with nothing beside it, and its ``error`` is then
    ``KilledWorker``. When the scheduler goes away, what was not finished is handed out again by
    the one that comes in its place.

    ``scheduler`` is an address such as ``"tcp://10.0.0.1:8786"``. A cluster that is started here
    speaks TLS, with a key that nobody else has and that ends with it. Raises ``InputError`` if
    there is no scheduler within ``patience`` seconds, no worker comes within it, or a worker does
    not see ``folder``, runs another version of this package, or has another ``model``: name and
    digest. A worker that joins later is asked the same, but for the folder, with its first task.
    """
    function = partial(_on_a_fit_worker, function, _version(), model)
    unfinished, suspects = list[Any](), list[Any]()
    tasks = iter(tasks)
    while True:
        with _client(workers, scheduler, patience) as client:
            _check_workers(client, folder, patience, model)
            try:
                yield from _hand_out(client, function, chain(unfinished, tasks), suspects)
                while suspects:  # one at a time, so that nothing else can be to blame
                    yield from _hand_out(client, function, [suspects.pop()], None)
                return
            except _SchedulerLost as lost:
                unfinished = lost.unfinished


class _SchedulerLost(Exception):
    def __init__(self, unfinished):
        super().__init__("The scheduler went away.")
        self.unfinished = unfinished


def _hand_out(client, function, tasks, suspects):
    """Yield what comes of ``tasks``; those that several workers died of go to ``suspects``."""
    running, waiting, results = {}, deque(), as_completed()
    tasks = iter(tasks)
    try:
        while True:
            # a few in reserve: no worker waits for us, and a cluster that grows sees the queue
            waiting.extend(islice(tasks, max(0, 2 * _threads(client) + 1 - len(running))))
            while waiting:
                future = client.submit(function, waiting[0], pure=False)
                running[future] = waiting.popleft()
                results.add(future)
            if not running:
                return
            future = next(results)
            try:
                result, error = future.result(), None
            except KilledWorker as killed:
                if suspects is not None:
                    suspects.append(running.pop(future))
                    continue
                result, error = None, killed
            except (FutureCancelledError, CommClosedError):
                raise
            except Exception as raised:
                result, error = None, raised
            yield running.pop(future), result, error
    except (FutureCancelledError, CommClosedError, TimeoutError) as lost:
        raise _SchedulerLost([*running.values(), *waiting]) from lost


def _threads(client):
    """How many tasks the cluster can run at once."""
    try:
        return sum(client.nthreads().values())
    except OSError as gone:  # of which a closed connection is only one
        raise CommClosedError(str(gone)) from gone


@contextlib.contextmanager
def _client(workers, scheduler, patience):
    """A client of the cluster; one that was started here ends with it."""
    for name in ("distributed", "distributed.client"):  # what died is told by the reports
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        if scheduler is None:
            stack.enter_context(dask.config.set(OWN_CLUSTER))
            scheduler = stack.enter_context(
                LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    dashboard_address="127.0.0.1:0",  # None would take a fixed port
                    silence_logs=logging.CRITICAL,
                    security=Security.temporary(),  # else any process here could run code there
                )
            )
        try:
            client = stack.enter_context(Client(scheduler, timeout=patience))
        except (OSError, ValueError) as error:
            raise InputError(
                f"There is no Dask scheduler at {scheduler} ({error}). What was finished is kept: "
                "start one and run the same command again."
            ) from error
        yield client


def _check_workers(client, folder, patience, model=None):
    """Raise ``InputError`` unless all workers see ``folder``, run this code and have ``model``."""
    try:
        client.wait_for_workers(1, timeout=patience)
    except TimeoutError:
        raise InputError(
            f"The scheduler has no worker after {patience} seconds: start some, with `dask worker`."
        ) from None
    probe = Path(folder).resolve() / f".probe-{uuid.uuid4().hex}"
    probe.touch()
    try:
        options = {"version": _version(), "model": model, "on_error": "return"}
        seen = client.run(_look, str(probe), **options)
    finally:
        probe.unlink()
    for worker, answer in seen.items():
        if isinstance(answer, Exception):
            why = f"cannot run reports ({answer}): install this package there."
        elif not answer[0]:
            why = f"does not see {probe.parent}: use a folder that all machines share, under the "
            why += "same path."
        elif answer[1]:
            why = answer[1]
        else:
            continue
        raise InputError(f"The worker {worker} {why}")


def _version():
    return code_version(), code_version(Path(__file__).resolve().parent)


def _look(path, version=None, model=None):
    """Whether this worker sees ``path``, and why it cannot be used, or ``None``."""
    deadline = time.monotonic() + 5  # a shared folder may be slow to tell
    while not Path(path).exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    return Path(path).exists(), _unfit(version, model)


@cache
def _unfit(version, model):
    """Why this process cannot be a worker: other code, another model; ``None`` if it can."""
    if version not in (None, _version()):
        return (
            "runs another version of helpers, llama_reports, torch, transformers, captum or "
            "numpy, and its numbers could differ: install the same there."
        )
    if model and model_digest(model[0]) != model[1]:
        name = public_name(model[0])
        return f"has another model under the name {name}: copy this one there."
    return None


def _on_a_fit_worker(function, version, model, task):
    """``function(task)``; ``InputError`` on a worker that came later and is unlike the others."""
    why = _unfit(version, model)
    if why:
        raise InputError(f"The worker {get_worker().address} {why}")
    return function(task)
