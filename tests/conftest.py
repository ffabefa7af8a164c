"""Fixtures that several test modules share.

They import torch when they are used: of several processes of pytest one runs no test.
"""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from running import write_notebook
from typer.testing import CliRunner

import helpers
from llama_reports.command import app

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


@pytest.fixture(scope="session")
def bundled():
    """``(model, tokenizer)`` of the bundled model: for meaning. Leave it as you found it."""
    return helpers.load_model()


@pytest.fixture(scope="session")
def tiny():
    """``(model, tokenizer)`` of the toy: for exact statements. Leave it as you found it.

    Some methods try a model the first time they see it, which no test is to count as its own rows.
    """
    model, tokenizer = helpers.tiny_llama()
    for method in helpers.METHODS.values():
        assert method.refusal(model) is None
    return model, tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory):
    """The toy saved as a model folder, for whatever takes a model by name."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    for part in tiny:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def long_word():
    """``(model, tokenizer, word)``: a toy with one token more, of 100,000 characters."""
    (model, tokenizer), word = helpers.tiny_llama(), "x" * 100_000
    tokenizer.add_tokens(word)
    model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer, word


@pytest.fixture(scope="session")
def hostile():
    """A prompt that breaks whatever mistakes text for code, markup, paths or formulas."""
    return "<script>document.title='taken'</script> \"'{x} NA $a$ \\n\n你好 مرحبا 🙂 ../../etc"


@pytest.fixture
def command(monkeypatch):
    """A function: the command line in this process, where torch is imported; gives typer's result.

    What ends the process, and what a signal does, needs a process of its own.
    """
    monkeypatch.setattr("signal.signal", lambda *given: None)  # which belongs to pytest here
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which a run sets, and leaves

    def command(*given):
        plain = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
        done = CliRunner().invoke(app, [*map(str, given)], env=plain)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    return command


QUICK = """
from pathlib import Path
import pandas as pd
from helpers import ask, attribute, load_model
prompt: str = "The keys to"
messages: list = []
target: str = ""
foil: str = ""
options: list = []
answer: int = 0
answer_text: str = ""
units: str = "tokens"
sources: list = []
chat: bool = False
raw: bool = False
evidence: str = ""
methods: list = []
model_name: str = "SmolLM2-135M-Instruct"
output_dir: str = "."
---
model, tokenizer = load_model(model_name)
asked = {"target": target or None, "foil": foil or None, "answer": answer_text or answer or None}
asked |= {"options": options or None, "units": units}
asked |= {"sources": sources or None, "chat": chat, "raw": raw}
question = ask(model, tokenizer, messages or prompt, **asked)
result = attribute(model, question, "relevance")
---
table = pd.DataFrame({"unit": range(len(result.units)), "score": result.scores.tolist()})
table = table.assign(method="relevance", output=None, error=None)
for name in ("part", "label"):
    table[name] = [getattr(unit, name) for unit in result.units]
table["start"] = [unit.positions[0] for unit in result.units]
table["end"] = [unit.positions[-1] + 1 for unit in result.units]
table.to_csv(Path(output_dir) / "scores.csv", index=False)
"""


@pytest.fixture(scope="session")
def quick_notebook(tmp_path_factory):
    """A notebook that takes what report takes and is done in no time, for many runs of it.

    ``quick_notebook(*cells)`` gives the path of one with more cells at its end.
    """

    def write(*cells):
        path = tmp_path_factory.mktemp("notebooks") / "quick.ipynb"
        return write_notebook(path, *QUICK.strip().split("---\n"), *cells)

    return write


@pytest.fixture(scope="session")
def reports(tiny_folder, hostile, tmp_path_factory):
    """``(folder, finished process)``: a real run of three prompts, of which one fails."""
    work = tmp_path_factory.mktemp("reports")
    notebook = nbformat.read(NOTEBOOKS / "report.ipynb", as_version=4)
    parameters = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    place = notebook.cells.index(parameters)
    fails = nbformat.v4.new_code_cell("if prompt == 'This fails': 1 / 0")
    notebook.cells.insert(place + 1, fails)
    nbformat.write(notebook, work / "report.ipynb")
    prompts = [
        {"id": "plain", "prompt": "The keys to"},
        {"id": "fails", "prompt": "This fails"},
        {"id": "hostile", "prompt": hostile},
    ]
    (work / "prompts.yml").write_text(yaml.safe_dump(prompts), encoding="utf-8")
    command = [sys.executable, "-m", "llama_reports", work / "prompts.yml", "--out", work / "out"]
    command += ["--model", tiny_folder, "--notebook", work / "report.ipynb"]
    secret = {"SOME_SERVICE_TOKEN": "hf_abcdefghijklmnop"}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=os.environ | secret
    )
    return work / "out", done
