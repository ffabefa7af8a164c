"""Many workers: the same results in any order, and what happens when one of them dies."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from operator import neg
from unittest import mock

import pandas as pd
import psutil
import pytest
import yaml
from distributed import Client, KilledWorker
from running import PATIENCE, process, scores, wait_for
from tasks import addresses, environment, square, work

from helpers.errors import InputError
from llama_reports import all_prompts as module
from llama_reports import cluster
from llama_reports.cluster import run_on_cluster
from llama_reports.jobs import plan
from llama_reports.versions import model_digest

pytestmark = pytest.mark.thorough


@pytest.fixture(autouse=True)
def environment_of_its_own():
    """What a cluster sets for its workers, it leaves in the environment of who started it."""
    with mock.patch.dict(os.environ):
        yield


KILL_THE_WORKER = """
import psutil
if prompt == "A poisoned prompt":
    psutil.Process().parents()[2].kill()  # above what holds the model, and what imported
"""


def test_every_task_comes_back_once_and_the_poisoned_one_alone_fails(tmp_path):
    tasks = range(12)
    done = list(run_on_cluster(partial(work, tmp_path), tasks, tmp_path, workers=2))
    results = {task: result for task, result, error in done if error is None}
    errors = {task: error for task, _, error in done if error is not None}
    assert len(done) == len(tasks)
    assert results == {task: task * task for task in tasks if task not in (5, 7)}
    assert isinstance(errors.pop(5), KilledWorker) and str(errors.pop(7)) == "seven" and not errors
    times = {task: len((tmp_path / f"ran-{task}").read_text()) for task in tasks}
    assert times[3] >= 2 and 2 <= times[5] <= 8
    assert not list(tmp_path.glob(".probe-*"))


def test_a_worker_keeps_freed_memory_for_the_next_row(tmp_path):
    names = ["MALLOC_TRIM_THRESHOLD_", "OMP_NUM_THREADS"]
    found = {
        name: value for name, value, _ in run_on_cluster(environment, names, tmp_path, workers=1)
    }
    assert found["MALLOC_TRIM_THRESHOLD_"] is None and found["OMP_NUM_THREADS"] is not None


STRANGER = """
import sys
from pathlib import Path
from distributed import Client, Security

address, mark, key = sys.argv[1:]
keys = {"security": Security.temporary()} if key else {}
try:
    with Client(address, timeout=4, **keys) as client:
        client.run(Path(mark).touch)
except (OSError, TypeError, ValueError) as error:
    print("refused:", type(error).__name__)
"""


def stranger(address, mark, key=""):
    """Another process of this machine that tries to run code on a cluster; what it says."""
    given = [sys.executable, "-c", STRANGER, address, str(mark), key]
    return subprocess.run(given, capture_output=True, text=True, timeout=PATIENCE).stdout


def test_nobody_without_the_key_runs_code_on_a_cluster_that_is_started_here(tmp_path):
    with closing(run_on_cluster(addresses, [1, 2], tmp_path, workers=1)) as done:
        _, listening, error = next(done)
        assert error is None and all(address.startswith("tls://") for address in listening)
        mark = tmp_path / "taken"
        for address in listening[:2]:
            bare = address.replace("tls://", "tcp://")
            for try_at, key in ((bare, ""), (address, ""), (address, "of my own")):
                assert stranger(try_at, mark, key).startswith("refused:"), (try_at, key)
        assert not mark.exists()
        assert next(done)[2] is None  # and the cluster goes on
    port = free_port()  # the same stranger where no key is asked for
    scheduler = ["dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"]
    at = f"tcp://127.0.0.1:{port}"
    with started(*scheduler), started("dask_worker", at, "--no-dashboard") as worker:
        with Client(at, timeout=PATIENCE) as client:
            client.wait_for_workers(1, timeout=PATIENCE)
        assert worker.poll() is None and stranger(at, mark) == "" and mark.exists()


OTHER_CODE = """
from llama_reports import cluster
cluster._version = lambda: "another"
"""


def test_a_worker_that_joins_later_with_other_code_gets_no_task(tmp_path):
    (tmp_path / "other.py").write_text(OTHER_CODE)
    port = free_port()
    at = f"tcp://127.0.0.1:{port}"
    scheduler = ["dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"]
    worker = ["dask_worker", at, "--nthreads", 1, "--no-dashboard"]
    worker += ["--local-directory", tmp_path]
    with started(*scheduler), started(*worker), contextlib.ExitStack() as later:
        tasks = range(100_000)
        done = later.enter_context(closing(run_on_cluster(neg, tasks, tmp_path, scheduler=at)))
        assert next(done)[2] is None
        later.enter_context(started(*worker, "--preload", tmp_path / "other.py"))
        deadline = time.monotonic() + PATIENCE
        with pytest.raises(InputError, match="runs another version"):
            for task, result, error in done:
                if isinstance(error, InputError):  # as the command raises it
                    raise error
                assert result == -task and time.monotonic() < deadline


def test_a_model_is_asked_for_by_its_digest(tiny_folder):
    model, digest = str(tiny_folder), model_digest(str(tiny_folder))
    assert cluster._unfit(cluster._version(), (model, digest)) is None
    assert "another model under the name" in cluster._unfit(None, (model, "of other weights"))


def test_what_a_worker_sends_back_for_another_prompt_is_not_taken(
    command, tmp_path, tiny_folder, quick_notebook, monkeypatch
):
    """The work of the command itself, where each report is answered for by another one."""
    prompts, out = prompts_file(tmp_path), tmp_path / "out"
    jobs = plan(prompts, model=str(tiny_folder), notebook=str(quick_notebook()), out=out)
    before = next(iter(jobs))
    real = module.report_task

    def of_the_first(task, *given, **options):
        facts = real(task, *given, **options)
        return facts if task[0] == before else facts | {"slug": before.slug}

    monkeypatch.setattr(module, "report_task", of_the_first)
    line = [prompts, "--model", tiny_folder, "--notebook", jobs._notebook, "--out", out]
    done = command(*line)
    assert done.exit_code == 1 and "1 of 5 reports done, 4 failed." in done.output
    assert done.output.count("no result of this prompt, and it was not taken") == 4
    shutil.rmtree(out)
    monkeypatch.setattr(module, "score_part", lambda part, out, **options: {"part": "x.parquet"})
    done = command(*line, "--scores-only")
    assert done.exit_code == 1 and "0 of 5 prompts done, 5 failed." in done.output


def endless():
    for number in range(10**9):
        assert number < 200, "tasks are read long before a worker is free for them"
        yield number


def test_tasks_are_read_as_workers_come_free(tmp_path):
    some = run_on_cluster(square, endless(), tmp_path, workers=1)
    assert all(result == task * task for task, result, _ in (next(some) for _ in range(20)))
    some.close()


PROMPTS = ["The keys to", "The doors to", "A poisoned prompt", "The boats to", "The lamps to"]


def prompts_file(folder):
    path = folder / "prompts.yml"
    path.write_text(yaml.safe_dump(PROMPTS), encoding="utf-8")
    return path


def test_reports_from_two_workers_equal_those_of_one_process(
    command, tmp_path, tiny_folder, quick_notebook, monkeypatch
):
    prompts = prompts_file(tmp_path)
    given = [prompts, "--model", tiny_folder, "--notebook", quick_notebook(KILL_THE_WORKER)]
    # each worker that dies takes what it imported with it; Dask's own three are counted above
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "0")
    many = process(*given, "--out", tmp_path / "many", "--workers", 2)
    assert many.returncode == 1 and "Traceback" not in many.stderr, many.stderr
    assert "4 of 5 reports done, 1 failed." in many.stdout
    assert "failed: a-poisoned-prompt: Every worker that ran this prompt died" in many.stderr
    assert not list((tmp_path / "many").glob(".making-*"))
    prompts.write_text(prompts.read_text().replace("- A poisoned prompt\n", ""))
    one = command(*given, "--out", tmp_path / "one")
    assert one.exit_code == 0, one.output
    pd.testing.assert_frame_equal(
        scores(tmp_path / "many"), scores(tmp_path / "one"), check_exact=True
    )


@contextlib.contextmanager
def started(*given):
    """A Dask process of its own, as somebody starts it on another machine."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli." + given[0], *map(str, given[1:])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_cluster_of_others_loses_nothing_when_a_worker_and_then_its_scheduler_dies(
    tmp_path, tiny_folder, quick_notebook
):
    prompts, out = prompts_file(tmp_path), tmp_path / "out"
    address = f"tcp://127.0.0.1:{(port := free_port())}"
    scheduler = ["dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"]
    worker = [
        "dask_worker",
        address,
        "--nthreads",
        1,
        "--no-dashboard",
        "--local-directory",
        tmp_path,
    ]
    given = [prompts, "--model", tiny_folder, "--out", out, "--scheduler", address]
    # one report waits until all has died that is to die: the run does not end before
    gate = tmp_path / "gate"
    waits = f"while prompt == {PROMPTS[-1]!r} and not Path({str(gate)!r}).exists():"
    given += ["--notebook", quick_notebook(f"import time\n{waits}\n    time.sleep(0.05)")]

    def finished():
        return {file: file.stat().st_mtime_ns for file in out.glob("[!.]*/report.json")}

    with contextlib.ExitStack() as stack:
        first = stack.enter_context(started(*scheduler))
        only = stack.enter_context(started(*worker))
        run = subprocess.Popen(
            [sys.executable, "-m", "llama_reports", *map(str, given)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        stack.callback(run.kill)
        wait_for(lambda: len(finished()) >= 1, run)
        for process in reversed(psutil.Process(only.pid).children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # it went with the one before
                process.kill()  # the nanny starts another worker in its place
        wait_for(lambda: len(finished()) >= 2, run)
        before = finished()
        first.kill()
        first.wait()
        stack.enter_context(started(*scheduler))
        stack.enter_context(started(*worker))  # as Slurm or Kubernetes would
        gate.touch()
        told, complaints = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0 and "Traceback" not in complaints, complaints
    assert "5 of 5 reports done, 0 failed." in told
    assert before.items() <= finished().items()  # what was finished is not done again
    assert len(scores(out)["slug"].unique()) == 5


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:{port}", "nonsense"])
def test_a_scheduler_that_is_not_there_is_told(tmp_path, address):
    """In a process of its own: what distributed leaves of a client that could not connect may, when
    it is collected, lock up the next cluster of the same process."""
    address = address.format(port=free_port())
    code = f"""
from helpers.errors import InputError
from llama_reports.cluster import run_on_cluster

try:
    next(run_on_cluster(abs, [1], {str(tmp_path)!r}, scheduler={address!r}, patience=1))
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"no Dask scheduler at {address}" in done.stdout, done.stderr


def test_a_worker_that_does_not_see_the_folder_is_named(tmp_path, monkeypatch, tiny_folder):
    from distributed import LocalCluster

    local = LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None)
    with local, Client(local) as client:
        elsewhere = partial(cluster._look, "/nowhere/probe")
        monkeypatch.setattr(client, "run", lambda *a, **k: Client.run(client, elsewhere))
        with pytest.raises(InputError, match="does not see"):
            cluster._check_workers(client, tmp_path, 5)
        monkeypatch.undo()
        model = str(tiny_folder)
        cluster._check_workers(client, tmp_path, 5, (model, model_digest(model)))
        with pytest.raises(InputError, match="another model under the name"):
            cluster._check_workers(client, tmp_path, 5, (model, "of other weights"))
        with pytest.raises(InputError, match=r"cannot run reports .*no model folder"):
            cluster._check_workers(client, tmp_path, 5, ("/no/such/model", "of none"))
        monkeypatch.setattr(cluster, "_version", lambda: "another")
        with pytest.raises(InputError, match="another version"):
            cluster._check_workers(client, tmp_path, 5)
