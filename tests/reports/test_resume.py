"""Runs that end before they are done: what is kept, and what the next run does."""

import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from running import EVERY_CASE, PATIENCE, scores, wait_for

from helpers.errors import InputError
from llama_reports.files import UNFINISHED, only_writer

pytestmark = pytest.mark.thorough

WORDS = ["keys", "doors", "boats", "lamps", "chairs", "roads", "books", "stones"]
KILLS = 10 if EVERY_CASE else 3
# imports helpers once, and forks a process for every run
forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["llama_reports.all_prompts"])


@pytest.fixture
def prompts(tmp_path):
    """A prompts file of eight."""
    path = tmp_path / "prompts.yml"
    path.write_text(yaml.safe_dump([f"The {word} to" for word in WORDS]), encoding="utf-8")
    return path


def arguments(prompts, out, model, notebook, *more):
    given = [prompts, "--out", out, "--model", model, "--notebook", notebook, *more]
    return [str(argument) for argument in given]


def command_line(given, output):
    """The command line, in a process that is killed from outside or ends by itself."""
    from llama_reports.command import app

    with Path(output).open("a") as sys.stdout:
        sys.stderr = sys.stdout
        app(given)


def run(given, output, kill_after=None):
    """Run to the end, or kill after some seconds; gives the exit code."""
    process = forked.Process(target=command_line, args=(given, str(output)))
    process.start()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode


def finished(out):
    """When each finished report was written, by name."""
    return {file.parent.name: file.stat().st_mtime_ns for file in out.glob("[!.]*/report.json")}


def test_killed_at_random_moments_it_goes_on_and_ends_as_if_nothing_had_happened(
    prompts, tmp_path, tiny_folder, quick_notebook
):
    # the last report waits for the end of the killing: no run ends before it is killed
    gate = tmp_path / "gate"
    waits = f"import time\nwhile 'stones' in prompt and not Path({str(gate)!r}).exists():\n"
    notebook = quick_notebook(waits + "    time.sleep(0.05)")
    gate.touch()
    given = arguments(prompts, tmp_path / "whole", tiny_folder, notebook)
    assert run(["--help"], tmp_path / "log") == 0  # after imports, which later runs share
    began = time.monotonic()
    assert run(given, tmp_path / "log") == 0
    took = time.monotonic() - began

    gate.unlink()
    given = arguments(prompts, tmp_path / "killed", tiny_folder, notebook)
    out, kept = tmp_path / "killed", {}
    moments = random.Random(time.time_ns())
    for _ in range(KILLS):
        moment = moments.uniform(0, 0.7 * took)
        assert run(given, tmp_path / "log", kill_after=moment) == -signal.SIGKILL
        now = finished(out)
        assert kept.items() <= now.items(), f"a finished report was lost or redone at {moment}"
        for name in now:
            assert {"report.html", "report.ipynb", "scores.csv"} <= {
                path.name for path in (out / name).iterdir()
            }
        kept = now
    gate.touch()
    assert run(given, tmp_path / "log") == 0
    assert kept.items() <= finished(out).items() and len(finished(out)) == len(WORDS)
    pd.testing.assert_frame_equal(scores(out), scores(tmp_path / "whole"), check_exact=True)
    names = [{path.name for path in folder.iterdir()} for folder in (out, tmp_path / "whole")]
    assert names[0] == names[1] and not [name for name in names[0] if UNFINISHED in name]


def test_only_what_changed_is_run_again(command, prompts, tmp_path, tiny_folder, quick_notebook):
    out = tmp_path / "out"
    some = prompts.with_name("some.yml")
    some.write_text("- The keys to\n- {id: fails, prompt: This fails}\n- The doors to\n")
    notebook = quick_notebook("if prompt == 'This fails': 1 / 0")
    given = arguments(some, out, tiny_folder, notebook)
    done = command(*given)
    assert done.exit_code == 1 and "2 of 3 reports done, 1 failed." in done.output
    first = finished(out)
    some.write_text("- The doors to\n- {id: fails, prompt: This works}\n- The boats to\n")
    done = command(*given)
    assert done.exit_code == 0  # the failed one stands for another question now
    assert "2 of 2 reports done, 0 failed, 1 finished before." in done.output
    second = finished(out)
    assert first.items() - second.items() == {("fails", first["fails"])}
    assert set(second) == {"the-keys-to", "the-doors-to", "the-boats-to", "fails"}
    given = arguments(some, out, tiny_folder, quick_notebook("print('another notebook')"))
    assert command(*given).exit_code == 0
    third = finished(out)
    assert {name for name in third if third[name] == second[name]} == {"the-keys-to"}


def test_a_run_stopped_by_ctrl_c_says_what_it_has(prompts, tmp_path, tiny_folder, quick_notebook):
    out = tmp_path / "out"
    # every report but the first says that it runs, and does not end
    runs = tmp_path / "runs"
    endless = f"import time; Path({str(runs)!r}).touch(); time.sleep({PATIENCE})"
    notebook = quick_notebook(f"if {WORDS[0]!r} not in prompt:\n    {endless}")
    given = [sys.executable, "-m", "llama_reports"]
    given += arguments(prompts, out, tiny_folder, notebook)
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background
    try:  # of a shell ignores Ctrl-C, and so would what it starts
        process = subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, found)
    wait_for(runs.exists, process)
    process.send_signal(signal.SIGINT)
    told, complaints = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert f"1 of {len(WORDS)} reports done, 0 failed." in told and "Open" in told
    assert "the same command goes on" in complaints and "Traceback" not in complaints
    assert len(finished(out)) == len(scores(out)["slug"].unique()) == 1
    assert not list(out.glob(f"{UNFINISHED}*"))


def test_a_full_disk_is_one_sentence_and_what_was_finished_stays(
    prompts, tmp_path, tiny_folder, quick_notebook
):
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        probe = ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size=1m tmpfs {disk}"]
        if subprocess.run(probe, capture_output=True).returncode:
            pytest.skip("this system lets us mount no small disk to fill")
    except FileNotFoundError:
        pytest.skip("no unshare on this system, to mount a small disk with")
    # each report writes half of a megabyte; the disk holds the first and not the last
    notebook = quick_notebook("(Path(output_dir) / 'more.bin').write_bytes(bytes(500_000))")
    given = arguments(prompts, disk / "out", tiny_folder, notebook)
    inside = (
        f"mount -t tmpfs -o size=3m tmpfs {disk} && "
        f"{sys.executable} -m llama_reports {' '.join(given)}; code=$?; "
        f"ls -A {disk}/out > {tmp_path}/left; cp {disk}/out/*/report.json {tmp_path}; exit $code"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", inside], capture_output=True, text=True)
    told = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(told) == 1 and "The disk is full" in told[0] and "make room" in told[0]
    left = (tmp_path / "left").read_text().split()
    assert [name for name in left if name.startswith("the-")]
    assert not [name for name in left if name.startswith(UNFINISHED)]
    assert json.loads((tmp_path / "report.json").read_text())["error"] is None


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    (tmp_path / f"{UNFINISHED}x").mkdir()
    with only_writer(tmp_path):
        assert not (tmp_path / f"{UNFINISHED}x").exists()  # left by a run that was killed
        with pytest.raises(InputError, match="Another run is writing"), only_writer(tmp_path):
            pass
    with only_writer(tmp_path):
        pass
