"""What goes wrong in one report, or before it, is told there: the other reports are made."""

import json
import socket
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from running import PATIENCE, write_notebook

from helpers import InputError, tiny_llama
from llama_reports import run
from llama_reports.gallery import write_index
from llama_reports.jobs import plan
from llama_reports.kernels import ForkServer
from llama_reports.run import run_report


def prompts_file(folder, *entries):
    path = folder / "prompts.yml"
    path.write_text(yaml.safe_dump(list(entries)), encoding="utf-8")
    return path


def jobs_of(folder, notebook, model, *entries):
    return list(plan(prompts_file(folder, *entries), model=str(model), notebook=str(notebook)))


def facts_of(out, slug):
    return json.loads((out / slug / "report.json").read_text(encoding="utf-8"))


TWO = ({"id": "bad", "prompt": "The keys to"}, {"id": "good", "prompt": "The doors to"})


# --- time --------------------------------------------------------------------------------------


ASKED = """
from pathlib import Path
prompt: str = ""
model_name: str = ""
output_dir: str = ""
"""
ENDLESS = """
if 'keys' in prompt:
    import os, signal, subprocess, time
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"])
    Path(PLACE).write_text(f"{os.getpid()} {child.pid}")
    while True:
        time.sleep(0.1)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("engine", ["warm", None])
def test_a_cell_that_never_ends_is_stopped_and_the_next_report_is_made(
    tmp_path, quick_notebook, tiny_folder, engine
):
    place = tmp_path / "pids"
    endless = ENDLESS.replace("PLACE", repr(str(place)))
    bare = tmp_path / "bare.ipynb"  # a cold kernel would have torch to import for more
    notebook = quick_notebook(endless) if engine else write_notebook(bare, ASKED, endless)
    out = tmp_path / "out"
    jobs = jobs_of(tmp_path, notebook, tiny_folder, *TWO)
    began, seconds = time.monotonic(), 12
    given = {"engine": engine, "timeout": seconds}
    bad, good = (run_report(job, out, str(tiny_folder), **given) for job in jobs)
    assert f"more than {seconds} seconds" in bad["error"] and "--timeout" in bad["error"]
    assert good["error"] is None and time.monotonic() - began < PATIENCE / 2
    kernel, child = map(int, place.read_text().split())
    assert not psutil.pid_exists(kernel)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(child)


@pytest.mark.thorough
def test_a_report_as_a_whole_has_the_same_limit_as_a_cell(tmp_path, quick_notebook, tiny_folder):
    slow = ["import time; time.sleep(2)"] * 8
    (job,) = jobs_of(tmp_path, quick_notebook(*slow), tiny_folder, "The keys to")
    facts = run_report(job, tmp_path / "out", str(tiny_folder), timeout=8)
    assert "more than 8 seconds" in facts["error"]


# --- kernels -----------------------------------------------------------------------------------


DIES_AT_START = """
import os
with open(PLACE, "a+") as place:
    place.seek(0)
    times = len(place.read())
    place.write("x")
if times < TIMES:
    os._exit(1)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("times", [2, 1000])
def test_a_kernel_that_dies_before_it_is_ready_is_tried_again(
    tmp_path, quick_notebook, tiny_folder, monkeypatch, times
):
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    text = DIES_AT_START.replace("PLACE", repr(str(tmp_path / "starts")))
    (startup / "00.py").write_text(text.replace("TIMES", str(times)))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    (job,) = jobs_of(tmp_path, quick_notebook(), tiny_folder, "The keys to")
    facts = run_report(job, tmp_path / "out", str(tiny_folder))
    if times == 2:
        assert facts["error"] is None and facts["attempts"] == 1
        assert len((tmp_path / "starts").read_text()) == 3
    else:
        assert facts["error"].startswith("No kernel could be started")
        assert len((tmp_path / "starts").read_text()) == 5


@pytest.mark.thorough
@pytest.mark.parametrize("port", ["shell_port", "iopub_port", "control_port"])
def test_a_port_that_another_program_took_is_another_port_the_next_time(
    tmp_path, quick_notebook, tiny_folder, monkeypatch, port
):
    """Ports are chosen before a kernel binds them: here somebody is faster, once."""
    taken, real = [], ForkServer.fork

    def fork(server, connection_file, *given):
        if not taken:
            number = json.loads(Path(connection_file).read_text())[port]
            taken.append(socket.create_server(("127.0.0.1", number)))
        else:
            taken.append(None)
        return real(server, connection_file, *given)

    monkeypatch.setattr(ForkServer, "fork", fork)
    (job,) = jobs_of(tmp_path, quick_notebook(), tiny_folder, "The keys to")
    try:
        facts = run_report(job, tmp_path / "out", str(tiny_folder))
    finally:
        taken[0].close()
    assert (facts["error"], facts["attempts"], len(taken)) == (None, 1, 2)


# the thread that sends outputs sleeps, while the kernel says that the cell has ended
LATE = """
if not Path(MARK).exists():
    Path(MARK).touch()
    import sys
    import time
    sys.stdout.flush_timeout = sys.stderr.flush_timeout = 0  # the cell ends without waiting for it
    get_ipython().kernel.iopub_thread.schedule(lambda: time.sleep(SECONDS))
    display("late")
"""


@pytest.mark.thorough
@pytest.mark.parametrize("seconds, patience, attempts", [(7, 60, 1), (40, 2, 2)])
def test_an_output_that_comes_late_is_waited_for_or_the_report_made_again(
    tmp_path, quick_notebook, tiny_folder, monkeypatch, seconds, patience, attempts
):
    monkeypatch.setattr(run, "LATE", patience)
    cell = LATE.replace("MARK", repr(str(tmp_path / "mark"))).replace("SECONDS", str(seconds))
    (job,) = jobs_of(tmp_path, quick_notebook(cell), tiny_folder, "The keys to")
    facts = run_report(job, tmp_path / "out", str(tiny_folder))
    assert (facts["error"], facts["attempts"]) == (None, attempts)
    text = (tmp_path / "out" / job.slug / "report.ipynb").read_text(encoding="utf-8")
    if attempts == 1:
        cells = nbformat.reads(text, as_version=4).cells
        assert [o["data"]["text/plain"] for o in cells[-1].outputs] == ["'late'"]


@pytest.mark.thorough
def test_outputs_that_never_come_are_told(tmp_path, quick_notebook, tiny_folder, monkeypatch):
    monkeypatch.setattr(run, "LATE", 2)
    cell = LATE.replace("MARK", repr(str(tmp_path / "no" / "mark"))).replace("SECONDS", "40")
    cell = cell.replace(".touch()", "")
    (job,) = jobs_of(tmp_path, quick_notebook(cell), tiny_folder, "The keys to")
    facts = run_report(job, tmp_path / "out", str(tiny_folder))
    assert facts["error"] == "Outputs of a cell did not come within 2 seconds: run it again."
    assert facts["attempts"] == 2


# --- folders -----------------------------------------------------------------------------------


SPOILS = {
    "import os, shutil; shutil.rmtree(os.getcwd())": "its folder is gone",
    "import os, shutil; d = os.getcwd(); shutil.rmtree(d); open(d, 'w').close()": "folder is gone",
    "import os, shutil; d = os.getcwd(); shutil.rmtree(d); os.symlink('/tmp', d)": "folder is gone",
    "Path('figures').mkdir(); Path('figures', 'a.png').mkdir(); Path('a.png').touch()": "folder",
    "Path('report.html', 'x').mkdir(parents=True)": "report.html is a name",
    "Path('report.ipynb').mkdir()": "report.ipynb is a name",
    "Path('report.json').symlink_to('/etc/passwd'); Path('report.json').mkdir(exist_ok=True)": None,
    "Path('figures').write_text('a file')": "figures is a name",
    "import os; os.mkfifo('pipe.png'); Path('figures').mkdir()": None,
    "import os; os.remove('scores.csv'); os.mkdir('scores.csv')": None,
}


def test_whatever_a_notebook_makes_of_its_folder_the_others_are_made(
    tmp_path, quick_notebook, tiny_folder
):
    cells = [f"if prompt == 'The keys to {i}':\n    {cell}" for i, cell in enumerate(SPOILS)]
    entries = [{"id": f"bad-{i}", "prompt": f"The keys to {i}"} for i in range(len(SPOILS))]
    good = {"id": "good", "prompt": "The doors to"}
    out = tmp_path / "out"
    jobs = jobs_of(tmp_path, quick_notebook(*cells), tiny_folder, *entries, good)
    for job in jobs:
        run_report(job, out, str(tiny_folder))
    for i, complaint in enumerate(SPOILS.values()):
        error = facts_of(out, f"bad-{i}")["error"]
        assert (complaint in error) if complaint else (error is None or "FileExists" in error), i
        for name in ("report.html", "report.ipynb", "report.json"):
            assert (out / f"bad-{i}" / name).is_file() and not (
                out / f"bad-{i}" / name
            ).is_symlink()
    assert facts_of(out, "good")["error"] is None
    assert "good" in write_index(out).read_text(encoding="utf-8")
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []


# --- another model -----------------------------------------------------------------------------


def test_reports_of_another_model_are_not_replaced_unasked(command, tmp_path, quick_notebook):
    folders = []
    for seed, place in enumerate(("one", "two")):
        folder = tmp_path / place / "llama"  # one name, two models
        for part in tiny_llama(seed=seed):
            part.save_pretrained(folder)
        folders.append(str(folder))
    out, notebook = tmp_path / "out", str(quick_notebook())
    path = prompts_file(tmp_path, "The keys to")
    options = {"notebook": notebook, "out": out}
    (job,) = plan(path, model=folders[0], **options)
    run_report(job, out, folders[0])
    before = (out / job.slug / "report.json").stat().st_mtime_ns
    assert len(plan(path, model=folders[0], **options)) == 1
    with pytest.raises(InputError, match=r"choose another --out, or give --replace\.$"):
        plan(path, model=folders[1], **options)
    given = [path, "--out", out, "--model", folders[1], "--notebook", notebook]
    done = command(*given)
    assert done.exit_code == 2 and "--replace" in done.stderr
    assert (out / job.slug / "report.json").stat().st_mtime_ns == before
    done = command(*given, "--replace")
    assert done.exit_code == 0 and "1 of 1 reports done" in done.stdout
    assert facts_of(out, job.slug)["model_digest"] != job.model_digest


# --- the command line --------------------------------------------------------------------------


def test_only_what_was_chosen_is_run_and_each_report_has_a_line_in_the_log(
    command, tmp_path, quick_notebook, tiny_folder
):
    gate = tmp_path / "gate"
    fails = f"if 'keys' in prompt and not Path({str(gate)!r}).exists():\n"
    notebook = quick_notebook(fails + "    raise ValueError('\\x1b]0;taken\\x07\\x9b31m red')")
    third = {"id": "third", "prompt": "The boats to"}
    path, out = prompts_file(tmp_path, *TWO, third), tmp_path / "out"
    given = [path, "--out", out, "--model", tiny_folder, "--notebook", notebook]
    done = command(*given, "--only", "nobody")
    assert done.exit_code == 2 and "no entry 'nobody' for --only" in done.stderr
    assert not out.exists()
    done = command(*given, "--only", "bad", "--only", "good")
    assert done.exit_code == 1 and "1 of 2 reports done, 1 failed." in done.stdout
    assert "taken" in done.stderr and not set("\x1b\x07\x9b") & set(done.stderr + done.stdout)
    assert not (out / "third").exists()
    gate.touch()
    done = command(*given, "--retry-failed")
    assert done.exit_code == 0 and "1 of 1 reports done, 0 failed, 1 finished" in done.stdout
    assert not (out / "third").exists()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["slug"], line["failed"]) for line in lines] == [
        ("bad", True),
        ("good", False),
        ("bad", False),
    ]
    assert all(line["seconds"] > 0 and line["attempts"] == 1 for line in lines)
    if sys.platform == "linux":
        assert all(line["memory"] > 50e6 for line in lines)  # torch alone takes more


def test_as_many_workers_as_fit_where_the_system_tells_no_affinity(
    command, tmp_path, tiny_folder, monkeypatch
):
    path = prompts_file(tmp_path, "The keys to")
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    given = [path, "--out", tmp_path / "out", "--model", tiny_folder, "--workers", "0"]
    done = command(*given, "--dry-run")
    assert done.exit_code == 0, done.stderr
