"""Every notebook runs under papermill with prompts and models it was not written for.

What its cells assert must hold for any of them. They run in the warm engine, as reports do. All
five prompts with the bundled model take an hour, so each notebook gets one of them there, the
costlier ones a short one, and the others with ``EVERY_CASE=1``. A long prompt it gets with a small
model of the same tokens. Every other notebook gets a strange one there, too, or a second shape.
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
    "scripts": "拉脱维亚的首都是 مرحبا 🙂 <script>alert(1)</script>",
    "one token": "Hello",
    "300 tokens": "The harbour froze over in January, and the ferries that tied the islands to the "
    "mainland stayed in port for six weeks. " * 12,
}
# with the bundled model
GETS = {
    "00_start": "question",
    "01_loading": "code",
    "02_tokenization": "300 tokens",
    "03_generation": "scripts",
    "04_embeddings": "question",
    "05_gradients": "one token",
    "06_attention": "question",
    "07_integrated_gradients": "one token",
    "08_comparison": "question",
    "09_relevance": "code",
    "10_faithfulness": "one token",
    "11_ground_truth": "one token",
    "12_patching": "one token",
    "13_answers": "one token",
    "14_precision": "one token",
    "report": "scripts",
}
# The committed notebooks and the small model run these in full, so fewer are enough here.
LESS = {
    "07_integrated_gradients": {"n_steps": 20},
    "11_ground_truth": {
        "cases_per_family": 1,
        "methods": ["integrated_gradients", "occlusion", "relevance", "random"],
    },
    "13_answers": {"max_evaluations": 33, "max_new_tokens": 4},
    "14_precision": {"precisions": ["bfloat16", "8 bits"]},
}
# with a small model, which 300 tokens but for one move too little for a patch: 12 says so, and ends
SMALL = [(name, "300 tokens") for name in NAMES if name != "12_patching"]
EVERY_OTHER = 1 if EVERY_CASE else 2
SMALL += [
    (name, ("code", "scripts")[place % 2]) for place, name in enumerate(NAMES[1::EVERY_OTHER])
]
SHAPES = {
    "one key-value head, tied": {"key_value_heads": 1, "tie_word_embeddings": True},
    "no sharing, Llama 3 positions": {
        "key_value_heads": 4,
        "rope_parameters": LLAMA3_ROPE,
    },
}
# Most wrong answers need some tokens, which a prompt for the first shape has: all notebooks get it.
ON_SHAPES = [
    (name, shape)
    for shape, some in zip(SHAPES, (NAMES, NAMES[::EVERY_OTHER]), strict=True)
    for name in some
]
# At most six units; all others need some tokens.
FOR_SHORT_PROMPTS = {"2. The best possible order"}


def run(name, folder, notebook=None, **parameters):
    return papermill.execute_notebook(
        str(notebook or NOTEBOOKS / f"{name}.ipynb"),
        str(folder / "out.ipynb"),
        parameters={**parameters, "output_dir": "."},
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
            later = kind != GETS[name] and not EVERY_CASE
            skip = pytest.mark.skipif(later, reason="all five prompts run with EVERY_CASE=1")
            yield pytest.param(name, kind, marks=skip)


def runs_whole(name, folder, **parameters):
    notebook = run(name, folder, **parameters)
    assert not stderr_of(notebook)
    figures = list(folder.glob("*.png"))
    assert figures and all(figure.with_suffix(".svg").exists() for figure in figures)


@pytest.mark.thorough
@pytest.mark.parametrize("name, kind", list(bundled_runs()))
def test_runs_on_an_unlike_prompt(name, kind, tmp_path):
    less = {} if EVERY_CASE else LESS.get(name, {})
    runs_whole(name, tmp_path, prompt=PROMPTS[kind], **less)


@pytest.fixture(scope="module")
def small(bundled, tmp_path_factory):
    """The folder of a toy model that reads the bundled model's tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("small") / "small-llama", bundled[1]
    config = tiny_llama()[0].config
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
@pytest.mark.parametrize("name, kind", SMALL)
def test_runs_on_a_long_and_on_a_strange_prompt(name, kind, small, tmp_path):
    runs_whole(name, tmp_path, prompt=PROMPTS[kind], model_name=small)


@pytest.fixture(scope="module")
def other_llama(request, tmp_path_factory):
    """The folder of a toy model of another shape, and a prompt for it."""
    folder, shape = tmp_path_factory.mktemp("shapes") / "tiny-llama", SHAPES[request.param]
    for part in tiny_llama(**shape):
        part.save_pretrained(folder)
    return folder, "A" if "rope_parameters" in shape else "The keys to the cabinet"


@pytest.mark.thorough
@pytest.mark.parametrize("name, other_llama", ON_SHAPES, indirect=["other_llama"])
def test_runs_on_another_shape_of_llama(name, other_llama, tmp_path):
    """And its exercises: undone and wrong answers are told from the lesson's own."""
    folder, prompt = other_llama
    source = tmp_path / "with_checks.ipynb"
    nbformat.write(with_checks(nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)), source)
    asked = {"prompt": prompt, "model_name": str(folder)}
    if name == "11_ground_truth":  # its third exercise needs a pair; no built-in one is solved
        asked["counterfactual"] = prompt.replace("keys", "kegs")
    notebook = run(name, tmp_path, source, **asked)
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
