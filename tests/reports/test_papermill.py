"""Every notebook runs under papermill with prompts and models it was not written for.

What its cells assert must hold for any of them. They run in the warm engine, as reports do. All
five prompts with the bundled model take an hour: a few run here, and all with ``EVERY_CASE=1``.
Every notebook gets a long prompt with a small model of the same tokens, and every other one a
strange prompt, with a model of another shape.
"""

import nbformat
import pandas as pd
import papermill
import pytest
import torch
from llama3_rope import LLAMA3_ROPE
from running import EVERY_CASE
from transformers import LlamaForCausalLM
from wrong_answers import told, with_checks

from helpers import tiny_llama
from llama_reports.jobs import NOTEBOOKS

NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
PROMPTS = {
    "question": "Who wrote the play Romeo and Juliet?",
    "code": 'def mean(xs):\n    """Return the $average$ of \'xs\'."""\n    return sum(xs) / len(',
    "scripts": "里加 مرحبا 🙂 <script>alert(1)</script>",
    "one token": "Hello",
    "300 tokens": "The harbour froze over in January, and the ferries that tied the islands to the "
    "mainland stayed in port for six weeks. " * 12,
}
# With the bundled model: those that are read or run as reports, and one on a prompt of one token.
GETS = {
    "00_start": "question",
    "08_comparison": "question",
    "12_patching": "one token",
    "report": "scripts",
}
ONE_HEAD_TIED = {"key_value_heads": 1, "tie_word_embeddings": True}
SHAPES = {
    "as usual": {},
    "no sharing, Llama 3 positions": {"key_value_heads": 4, "rope_parameters": LLAMA3_ROPE},
}
# 300 tokens but for one move too little in a small model for a patch: 12 says so, and ends
SMALL = [(name, "300 tokens", "as usual") for name in NAMES if name != "12_patching"]
EVERY_OTHER = 1 if EVERY_CASE else 2
SMALL += [
    (name, ("code", "scripts")[place % 2], "no sharing, Llama 3 positions")
    for place, name in enumerate(NAMES[1::EVERY_OTHER])
]
# Most wrong answers need some tokens; one exercise needs few.
CHECKED = [(name, "The keys to the cabinet") for name in NAMES] + [("10_faithfulness", "A")]
# At most six units; all others need some tokens.
FOR_SHORT_PROMPTS = {"2. The best possible order"}


def run(name, folder, notebook=None, **parameters):
    return papermill.execute_notebook(
        str(notebook or NOTEBOOKS / f"{name}.ipynb"),
        str(folder / "out.ipynb"),
        parameters={"output_dir": ".", **parameters},
        engine_name="warm",
        kernel_name="python3",
        cwd=str(folder),
        progress_bar=False,
        execution_timeout=600,
    )


def stderr_of(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.text for output in outputs if output.get("name") == "stderr"]


def bundled_runs():
    for name in NAMES:
        for kind in PROMPTS:
            later = kind != GETS.get(name) and not EVERY_CASE
            skip = pytest.mark.skipif(later, reason="every notebook and prompt: EVERY_CASE=1")
            yield pytest.param(name, kind, marks=skip)


def runs_whole(name, folder, **parameters):
    notebook = run(name, folder, **parameters)
    assert not stderr_of(notebook)
    figures = list(folder.glob("*.png"))
    assert figures and all(figure.with_suffix(".svg").exists() for figure in figures)


@pytest.mark.thorough
@pytest.mark.parametrize("name, kind", list(bundled_runs()))
def test_runs_on_an_unlike_prompt(name, kind, tmp_path):
    runs_whole(name, tmp_path, prompt=PROMPTS[kind])


@pytest.fixture(scope="module")
def small(request, bundled, tmp_path_factory):
    """The folder of a toy model of some shape that reads the bundled model's tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("small") / "small-llama", bundled[1]
    config = tiny_llama(**SHAPES[request.param])[0].config
    config.vocab_size = len(tokenizer)
    for token in ("bos", "eos", "pad"):
        setattr(config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return str(folder)


@pytest.mark.thorough
@pytest.mark.parametrize("name, kind, small", SMALL, indirect=["small"])
def test_runs_on_a_long_and_on_a_strange_prompt(name, kind, small, tmp_path):
    runs_whole(name, tmp_path, prompt=PROMPTS[kind], model_name=small)


@pytest.fixture(scope="module")
def one_head(tmp_path_factory):
    """The folder of a toy model of another shape, whose tokens are characters."""
    folder = tmp_path_factory.mktemp("shapes") / "tiny-llama"
    for part in tiny_llama(**ONE_HEAD_TIED):
        part.save_pretrained(folder)
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("name, prompt", CHECKED)
def test_runs_on_another_shape_of_llama(name, prompt, one_head, tmp_path):
    """And its exercises: undone and wrong answers are told from the lesson's own."""
    source = tmp_path / "with_checks.ipynb"
    nbformat.write(with_checks(nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)), source)
    asked = {"prompt": prompt, "model_name": str(one_head)}
    if name == "11_ground_truth":  # its third exercise needs a pair; no built-in one is solved
        asked["counterfactual"] = prompt.replace("keys", "kegs")
    notebook = run(name, tmp_path, source, **asked, output_dir="")  # shown, and not saved
    assert not stderr_of(notebook)
    undone, done, wrong = (told(notebook, tag) for tag in ("undone", "done", "wrong"))
    for before, after, changed in zip(undone, done, wrong, strict=True):
        title = after.partition(": ")[0]
        checked = "nothing to check" not in after
        assert after.endswith(": Right.\n") or not checked, after
        assert "Wrong: " in before or not checked, before
        if (prompt == "A") == (title in FOR_SHORT_PROMPTS):
            assert "Wrong: " in changed, after


@pytest.mark.thorough
def test_an_attribution_that_did_not_close_says_so_where_it_is_shown(tmp_path):
    """This path needed hundreds of evaluations; here it may take the first look and no more."""
    parameters = {"prompt": "The dog barked at the", "methods": ["integrated_gradients"]}
    notebook = run("08_comparison", tmp_path, budget=33, **parameters)
    titles = [
        o.metadata["image/png"]["alt"]
        for cell in notebook.cells
        for o in cell.get("outputs", [])
        if "image/png" in o.get("data", {})
    ]
    assert any("NOT closed" in title for title in titles)
    assert "NO" in (tmp_path / "evidence.csv").read_text(encoding="utf-8").split(",")


@pytest.mark.thorough
def test_a_report_gives_integrated_gradients_their_part_of_the_time(tmp_path):
    """What this path closes with takes hundreds; beside two methods it may take the first look."""
    methods = ["integrated_gradients", "occlusion", "random"]
    run("08_comparison", tmp_path, prompt="The dog barked at the", methods=methods)
    found = pd.read_csv(tmp_path / "evidence.csv").set_index("method").loc["integrated_gradients"]
    assert found["evaluations"] == 33 and found["closed"] == "NO"
    assert found["gap"] > 0.02
