"""A method of another package: installed with pip, found by its entry point, known everywhere."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from helpers import METHODS
from llama_reports.jobs import plan
from llama_reports.run import finished

pytestmark = pytest.mark.thorough

MODULE = '''
"""Scores by the length of an embedding, at the price of some rows that nobody needs."""
from helpers.attribution import Method, Price, attributions


def length(asked, rows=1):
    for _ in range(rows):
        asked.values()
    norms = asked.embeds[:, :1, : asked.columns].norm(dim=-1)  # [questions, 1, columns]
    scores = norms.expand(-1, asked.outs, -1)
    return attributions(asked, scores, forwards=rows, signed=False)


def options(units, tokens, budget):
    return {"rows": budget // 3000} if tokens < 50 else None


def price(units, tokens, options):
    return Price(forwards=options["rows"])


length = Method("length", length, price, signed=False, options=options)
broken = "no Method"
'''
WHEEL = {
    "METADATA": "Metadata-Version: 2.1\nName: llama-length\nVersion: 1.0\n",
    "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": "",
}


def installed(folder, entry_point):
    """The environment in which a package with this entry point is installed."""
    wheel, target = folder / "llama_length-1.0-py3-none-any.whl", folder / "installed"
    points = {"entry_points.txt": f"[llama_notebooks.methods]\n{entry_point}\n"}
    with zipfile.ZipFile(wheel, "w") as file:  # made by hand, so that no build tool is needed
        file.writestr("llama_length.py", MODULE)
        for name, text in (WHEEL | points).items():
            file.writestr(f"llama_length-1.0.dist-info/{name}", text)
    with zipfile.ZipFile(wheel) as file:  # all that installing a pure wheel is
        file.extractall(target)
    return os.environ | {"PYTHONPATH": str(target)}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return installed(tmp_path_factory.mktemp("theirs"), "length = llama_length:length")


def run(environment, *command):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


ASKED = """
import json
from helpers import METHODS, ask, attribute, tiny_llama
from helpers.attribution import BUDGET
from llama_reports.costs import Size, forward, methods_work, model_shape
import sys

model, tokenizer = tiny_llama()
question = ask(model, tokenizer, "Riga is in", target="a", foil="b")
result = attribute(model, question, "length", budget=BUDGET)
shape = model_shape(sys.argv[1])
cost = methods_work(shape, Size(10, 10), ["length"])
assert list(cost) == list(forward(shape, BUDGET // 3000, 10)), cost
assert not methods_work(shape, Size(60, 60), ["length"]).any()
print(json.dumps([list(METHODS), result.scores.tolist(), result.forwards, result.signed]))
"""


def test_a_method_of_another_package_is_among_the_methods(theirs, tiny_folder, tiny):
    done = run(theirs, "-c", ASKED, tiny_folder)
    assert done.returncode == 0, done.stderr
    names, scores, forwards, signed = json.loads(done.stdout)
    assert names[-1] == "length" and len(names) == len(METHODS) + 1
    assert (forwards, signed) == (10, False)
    model, tokenizer = tiny
    ids = tokenizer("Riga is in", return_tensors="pt")["input_ids"]
    norms = model.get_input_embeddings()(ids)[0].norm(dim=-1)
    assert scores == pytest.approx(norms.tolist(), rel=1e-4)


def test_a_method_of_another_package_is_in_the_scores(theirs, tiny_folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"Riga is in"\n' + json.dumps("a" * 60), encoding="utf-8")
    command = ["-m", "llama_reports", prompts, "--scores-only", "--out", tmp_path / "out"]
    command += ["--model", tiny_folder, "--method", "length", "--method", "random"]
    done = run(theirs, *command)
    assert done.returncode == 0 and "2 of 2 prompts done" in done.stdout, done.stderr
    scores = pd.read_parquet(tmp_path / "out" / "scores").groupby("method", observed=True).size()
    assert dict(scores) == {"length": 10, "random": 70}
    left_out = pd.read_parquet(tmp_path / "out" / "prompts")["left_out"]
    assert sorted(map(list, left_out)) == [[], ["length"]]


ALL = """
from helpers import METHODS
results = {name: attribute(model, question, name) for name in METHODS}
rows = [table.assign(method=n, score=r.scores.tolist()) for n, r in results.items()]
pd.concat(rows).to_csv(Path(output_dir) / "scores.csv", index=False)
"""


def test_a_method_of_another_package_is_in_a_report(theirs, tiny_folder, quick_notebook, tmp_path):
    prompts, notebook = tmp_path / "prompts.jsonl", quick_notebook(ALL)
    prompts.write_text('{"id": "one", "prompt": "Riga is in"}', encoding="utf-8")
    command = ["-m", "llama_reports", prompts, "--out", tmp_path / "out", "--model", tiny_folder]
    done = run(theirs, *command, "--notebook", notebook)
    assert done.returncode == 0 and "1 of 1 reports done" in done.stdout, done.stderr
    found = pd.read_csv(tmp_path / "out" / "one" / "scores.csv")
    assert "length" in set(found["method"]) and len(set(found["method"])) == len(METHODS) + 1
    together = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    assert "length" in set(together["method"].astype(str))
    (job,) = plan(prompts, model=str(tiny_folder), notebook=notebook)
    assert finished(job, tmp_path / "out")


@pytest.mark.parametrize(
    ("entry_point", "fault"),
    [
        ("length = llama_length:absent", "cannot be loaded (AttributeError"),
        ("length = no_such_module:length", "cannot be loaded (ModuleNotFoundError"),
        ("length = llama_length:broken", "is no Method"),
        ("saliency = llama_length:length", "is there already"),
    ],
)
def test_a_broken_entry_point_is_one_sentence(
    command, monkeypatch, entry_point, fault, tiny_folder, tmp_path
):
    monkeypatch.syspath_prepend(installed(tmp_path, entry_point)["PYTHONPATH"])
    monkeypatch.delitem(vars(METHODS), "_found", raising=False)  # so they are looked for anew
    monkeypatch.delitem(sys.modules, "llama_length", raising=False)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"Riga is in"', encoding="utf-8")
    given = [prompts, "--scores-only", "--out", tmp_path / "out", "--model", tiny_folder]
    done = command(*given, "--method", "random")
    assert done.exit_code == 2 and "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    name = entry_point.partition(" ")[0]
    assert line.startswith(f"Error: The method {name!r} of the package llama-length {fault}")
    assert not Path(tmp_path / "out" / "prompts").exists()
