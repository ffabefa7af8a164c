"""Fixtures that several test modules share."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from helpers import load_model, tiny_llama
from helpers.reports import find_notebook


@pytest.fixture(scope="session")
def bundled():
    """``(model, tokenizer)`` of the bundled model: for meaning. Leave it as you found it."""
    return load_model()


@pytest.fixture(scope="session")
def tiny():
    """``(model, tokenizer)`` of the toy: for exact statements. Leave it as you found it."""
    return tiny_llama()


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory):
    """The toy saved as a model folder, for whatever takes a model by name."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    for part in tiny:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hostile():
    """A prompt that breaks whatever mistakes text for code, markup, paths or formulas."""
    return "<script>document.title='taken'</script> \"'{x} NA $a$ \\n\n你好 مرحبا 🙂 ../../etc"


@pytest.fixture(scope="session")
def reports(tiny_folder, hostile, tmp_path_factory):
    """``(folder, finished process)``: a real run of three prompts, of which one fails.

    The comparison runs on the toy model; the failing prompt has a notebook of its own.
    """
    work = tmp_path_factory.mktemp("reports")
    broken = nbformat.read(find_notebook("08_comparison"), as_version=4)
    broken.cells = [cell for cell in broken.cells if "parameters" in cell.metadata.get("tags", [])]
    broken.cells.append(nbformat.v4.new_code_cell("1 / 0"))
    nbformat.write(broken, work / "broken.ipynb")
    prompts = [
        {"id": "plain", "prompt": "The keys to"},
        {"id": "fails", "prompt": "The keys to", "notebook": str(work / "broken.ipynb")},
        {"id": "hostile", "prompt": hostile},
    ]
    (work / "prompts.yml").write_text(yaml.safe_dump(prompts), encoding="utf-8")
    command = [sys.executable, "-m", "helpers.reports", work / "prompts.yml", "--out", work / "out"]
    done = subprocess.run(
        [*map(str, command), "--model", str(tiny_folder)], capture_output=True, text=True
    )
    return Path(work / "out"), done
