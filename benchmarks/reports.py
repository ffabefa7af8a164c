"""What a report costs above its notebook's own work, and whether a killed run is the same run.

``python benchmarks/reports.py`` writes reports on the thirty shortest prompts, each by plain
papermill and by the warm engine, in turns. With ``--killed`` it runs a short notebook over two
hundred prompts on two workers twice, once with everything killed on the way. With ``--make`` it
makes the five reports of ``make report`` as that does, once the set-up is there.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import yaml
from report import keep, table

from helpers.ground_truth import FAMILIES, cases
from llama_reports import kernels
from llama_reports.jobs import NOTEBOOKS, plan
from llama_reports.run import report_source, run_report

METHODS = ["saliency", "gradient_x_input", "relevance", "random"]
REPORTING = Path(__file__).with_name("prompts") / "reporting.yml"
BEGIN = """
import time
from IPython import get_ipython
clock = {"spent": 0.0}
def _start(info): clock["began"] = time.perf_counter()
def _stop(result): clock["spent"] += time.perf_counter() - clock.get("began", time.perf_counter())
get_ipython().events.register("pre_run_cell", _start)
get_ipython().events.register("post_run_cell", _stop)
"""
END = """
import json, pathlib
pathlib.Path("spent.json").write_text(json.dumps(clock["spent"]))
"""

SHORT = (
    """
prompt: str = ""
model_name: str = "SmolLM2-135M-Instruct"
output_dir: str = "."
""",
    """
import pandas as pd
from helpers import ask, attribute, load_model
model, tokenizer = load_model(model_name)
question = ask(model, tokenizer, prompt)
scores = attribute(model, question, "relevance").scores.tolist()
table = pd.DataFrame({"unit": range(len(scores)), "label": question.labels, "score": scores})
table = table.assign(start=table["unit"], end=table["unit"] + 1, part="prompt", error=None)
table = table.assign(prompt=prompt, method="relevance", output=None)
table.to_csv(f"{output_dir}/scores.csv", index=False)
""",
)


def timed_source():
    """08_comparison with a clock that adds up what its cells take, inside the kernel."""
    notebook = nbformat.reads(report_source(NOTEBOOKS / "08_comparison.ipynb"), as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(BEGIN))
    notebook.cells.append(nbformat.v4.new_code_cell(END))
    return nbformat.writes(notebook)


def overhead(count):
    """The same reports by both engines, in turns; the notebook's own work is that of the warm one.

    In a fork imports are done and the model is there, so its cells take what they have to do and
    nothing else. What is left of a report's time is the kernel, papermill, nbconvert and files.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    source, rows = timed_source(), []
    with tempfile.TemporaryDirectory() as folder:
        jobs = sorted(plan(REPORTING, methods=METHODS), key=lambda job: job.tokens)[:count]
        began = time.perf_counter()
        run_report(jobs[0], Path(folder) / "first", source=source)  # starts what later ones find
        first = time.perf_counter() - began
        for number, job in enumerate(jobs):
            row = {"prompt": job.prompt, "tokens": job.tokens}
            engines = ["warm", None] if number % 2 else [None, "warm"]
            for engine in engines:
                out = Path(folder) / str(engine)
                began = time.perf_counter()
                facts = run_report(job, out, source=source, engine=engine)
                row[engine or "plain"] = time.perf_counter() - began
                assert facts["error"] is None, facts
            row["own"] = json.loads((Path(folder) / "warm" / job.slug / "spent.json").read_text())
            plain, warm = (
                pd.read_csv(Path(folder) / engine / job.slug / "scores.csv", keep_default_na=False)
                for engine in ("None", "warm")
            )
            pd.testing.assert_frame_equal(plain, warm, check_exact=True)
            rows.append(row)
            print(f"{number + 1}/{len(jobs)}", {k: v for k, v in row.items() if k != "prompt"})
    memory = sum(p.memory_full_info().pss for p in psutil.Process().children(recursive=True))
    kernels.close()
    measured = pd.DataFrame(rows)
    measured["plain overhead"] = measured["plain"] - measured["own"]
    measured["warm overhead"] = measured["warm"] - measured["own"]
    ratio = measured["plain overhead"] / measured["warm overhead"]
    text = table(
        [
            {
                "by": name,
                "seconds a report, median": f"{measured[column].median():.2f}",
                "above the notebook's own work, median": f"{above.median():.2f}",
                "10 % to 90 %": " to ".join(f"{above.quantile(q):.2f}" for q in (0.1, 0.9)),
                "times less than plain": f"{times.median():.1f}",
            }
            for name, column, above, times in (
                ("papermill's own engine", "plain", measured["plain overhead"], ratio / ratio),
                ("the warm engine", "warm", measured["warm overhead"], ratio),
            )
        ]
    )
    load = np.mean(os.getloadavg())
    text += (
        f"\n\n{len(measured)} prompts of {measured['tokens'].min()} to {measured['tokens'].max()} "
        f"tokens, `08_comparison` with {', '.join(METHODS)}, one thread, each prompt by both in "
        f"turns; every score equal in all its digits. The notebook's own work took "
        f"{measured['own'].median():.2f} s in the median. The first warm report took {first:.1f} "
        f"s, with the start of the process that kernels are forked from, which holds "
        f"{memory / 2**20:,.0f} MiB. Load average of the machine: {load:.1f}."
    )
    keep("reports", "Reports: what papermill costs, plain and warm", text)


def killed(count):
    """Two hundred reports on two workers: undisturbed, and with everything killed on the way."""
    chance = random.Random(6)
    prompts = {case.prompt for family in FAMILIES for case in cases(family, "reporting")}
    prompts = chance.sample(sorted(prompts), count)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.yml"
        file.write_text(yaml.safe_dump(prompts), encoding="utf-8")
        command = [sys.executable, "-m", "llama_reports", str(file), "--workers", "2"]
        command += ["--notebook", str(_short_notebook(Path(folder))), "--out"]
        seconds = {}
        began = time.perf_counter()
        subprocess.run([*command, f"{folder}/whole"], check=True, stdout=subprocess.DEVNULL)
        seconds["undisturbed"] = time.perf_counter() - began
        told, done = [], {}
        began = time.perf_counter()
        for victims in (["worker", "worker", "all"], ["worker", "all"], []):
            run = subprocess.Popen([*command, f"{folder}/killed"], stdout=subprocess.DEVNULL)
            for victim in victims:
                time.sleep(chance.uniform(0.08, 0.18) * seconds["undisturbed"])
                told.append(_kill(run, victim))
            if victims:
                run.wait()
            else:
                assert run.wait() == 0
            now = _finished(f"{folder}/killed")
            assert done.items() <= now.items(), "a finished report was lost or made again"
            told.append(f"{len(now)} of {count} finished")
            done = now
        seconds["killed"] = time.perf_counter() - began
        whole, after = (_scores(f"{folder}/{name}") for name in ("whole", "killed"))
        pd.testing.assert_frame_equal(whole, after, check_exact=True)
        assert whole["slug"].nunique() == count
    text = (
        f"{count} prompts, AttnLRP on the bundled model, on two workers: "
        f"{seconds['undisturbed']:.0f} s undisturbed, "
        f"{seconds['killed']:.0f} s killed and resumed ({'; '.join(told)}). All "
        f"{len(whole):,} scores are equal in all their digits, and no report that was finished was "
        "made again."
    )
    keep("killed", "Reports: two hundred prompts, killed and resumed", text)


def made():
    """The five reports of ``make report``, and what of their time each part took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "llama_reports", str(NOTEBOOKS / "prompts.yml")]
        command += ["--workers", "0", "--out", folder]
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - began)
        rows = [_parts(file.parent) for file in sorted(Path(folder).glob("[!.]*/report.json"))]
    text = (
        f"{table(rows)}\n\nSeconds. All {len(rows)} reports took {seconds[0]:.0f} s by the clock "
        f"on {os.cpu_count()} cores, with the start of all processes; the same command again, "
        f"which finds them finished, {seconds[1]:.0f} s."
    )
    keep("make_report", "Reports: the five of `make report`", text)


def _parts(folder):
    """A row of the table of ``made``: a report's seconds, and those of its longest parts."""
    facts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    took = pd.read_csv(folder / "evidence.csv").set_index("method")["seconds"]
    cells = nbformat.read(folder / "report.ipynb", 4).cells
    durations = {c.source.split("\n")[0]: c.metadata["papermill"]["duration"] or 0 for c in cells}
    tested = next(value for line, value in durations.items() if line.startswith("tested = "))
    row = {"report": facts["slug"], "tokens": facts["tokens"], "all": facts["seconds"]}
    row |= {"integrated gradients": took.pop("integrated_gradients"), "other methods": took.sum()}
    row |= {"erasing and what goes without": tested}
    row["rest"] = row["all"] - sum(list(row.values())[3:])
    return {k: f"{v:.1f}" if isinstance(v, float) else v for k, v in row.items()}


def _short_notebook(folder):
    """A notebook that is done in a second, so that two hundred of it are no long wait."""
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": spec})
    notebook.cells = [nbformat.v4.new_code_cell(source.strip()) for source in SHORT]
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, folder / "short.ipynb")
    return folder / "short.ipynb"


def _kill(run, victim):
    """SIGKILL for a worker of ``run``, or for ``run`` itself and so for all."""
    if victim == "all":
        run.kill()
        return "the run was killed"
    while not (workers := _workers(run.pid)):
        time.sleep(0.2)
    random.choice(workers).kill()
    return "a worker was killed"


def _workers(pid):
    """The workers that have a fork server, below a run."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = process.parent()
            serves = "llama_reports.fork_server" in process.cmdline()
            if serves and "llama_reports.fork_server" not in parent.cmdline():
                found.append(parent)
    return found


def _finished(out):
    return {file: file.stat().st_mtime_ns for file in Path(out).glob("[!.]*/report.json")}


def _scores(out):
    scores = pd.read_parquet(Path(out) / "scores.parquet")
    return scores.sort_values(["slug", "method", "unit"], ignore_index=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--killed", action="store_true", help="the two hundred prompts")
    parser.add_argument("--make", action="store_true", help="the five of make report")
    parser.add_argument("--count", type=int, help="prompts, for a trial")
    given = parser.parse_args()
    if given.make:
        made()
    elif given.killed:
        killed(given.count or 200)
    else:
        overhead(given.count or 30)
