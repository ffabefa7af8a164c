"""A bar for what takes long: where it is seen, what it counts, and that it leaves no trace."""

import io
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
from jupyter_client.manager import start_new_kernel

from helpers import METHODS, ask, attribute, attribute_all, progress
from helpers.faithfulness import against_random
from helpers.ground_truth import CASES_PER_PASS, cases, solved
from helpers.summary import explain

real = progress.tqdm


class Terminal(io.StringIO):
    """A terminal that keeps what it is sent."""

    def isatty(self):
        return True

    @property
    def shown(self):
        """Each state of the bars, and what is left of the lines at the end."""
        states = [state.strip() for state in self.getvalue().split("\r")]
        return [state for state in states if state], states[-1]


@pytest.fixture
def terminal(monkeypatch):
    return watched_by(Terminal(), monkeypatch)


def watched_by(file, monkeypatch):
    """Let bars go to ``file``, and at once."""

    def shown(*given, **options):
        return real(*given, file=file, mininterval=0, miniters=1, **options)

    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=file, modules={}))
    monkeypatch.setattr(progress, "tqdm", shown)
    monkeypatch.setattr(progress, "DELAY", 1e-9)
    return file


@pytest.mark.parametrize("method", ["find_then_rank", "occlusion", "relevance", "saliency"])
def test_the_rows_of_a_method_are_counted(tiny, terminal, method):
    question = ask(*tiny, "The keys to")
    result = attribute(tiny[0], question, method)
    states, left = terminal.shown
    units, tokens = len(question.units), len(question.labels)
    price = METHODS[method].price(units, tokens, {})
    told = f"{result.evaluations + result.forwards}/{price.gradients + price.forwards}"
    assert states[-1].startswith(f"{method}: 100%") and f"{told} [" in states[-1]
    assert left == ""  # wiped out


def test_what_is_quick_or_seen_by_nobody_has_no_bar(tiny, terminal, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 60)
    question = ask(*tiny, "The keys to")
    explain(tiny[0], question)
    assert terminal.getvalue() == ""
    nobody = watched_by(io.StringIO(), monkeypatch)
    explain(tiny[0], question)
    assert nobody.getvalue() == ""


def has_a_bar_on_a_terminal():
    progress.sys.stderr = Terminal()
    return progress._watched()


@pytest.mark.thorough
def test_of_several_processes_at_one_terminal_none_has_a_bar():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert not pool.submit(has_a_bar_on_a_terminal).result()


def test_one_bar_stands_for_all_that_an_explanation_runs(tiny, terminal):
    question = ask(*tiny, "The keys to", units="words")
    explain(tiny[0], question)
    states, left = terminal.shown
    assert {state.split(":")[0] for state in states} == {"explain"} and left == ""
    done = [int(state.split("| ")[1].split("/")[0]) for state in states if "| " in state]
    assert done == sorted(done) and done[-1] > 20


def test_erasing_and_many_questions_and_prompts_with_a_key_have_one(tiny, terminal, bundled):
    model, tokenizer = tiny
    questions = [ask(model, tokenizer, text) for text in ("The keys", "The doors", "A")]
    results = [found for _, found in attribute_all(model, questions, ["occlusion"])]
    against_random(model, questions[0], results[0], count=3)
    list(solved(*bundled, cases("copy", "tuning")[: 2 * CASES_PER_PASS]))
    states, left = terminal.shown
    assert left == "" and {state.split(":")[0] for state in states} == {
        "occlusion",
        "erasing",
        "solved",
    }
    last = [state for state in states if state.startswith("occlusion")][-1]
    rows = sum(found["occlusion"].forwards for found in results)
    assert f" {rows}/{sum(len(question.units) + 1 for question in questions)} " in last


@pytest.mark.thorough
@pytest.mark.parametrize("watched", [True, False])
def test_in_a_notebook_only_who_could_be_asked_sees_a_bar(watched):
    """JupyterLab lets a kernel ask its user; papermill, nbval and nbconvert do not."""
    code = """
from functools import partial
from helpers import ask, attribute, progress, tiny_llama
progress.DELAY, progress.tqdm = 1e-9, partial(progress.tqdm, mininterval=0)
model, tokenizer = tiny_llama()
attribute(model, ask(model, tokenizer, "The keys"), "shapley")
"""
    sent = []
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        reply = client.execute_interactive(
            code, allow_stdin=watched, output_hook=sent.append, timeout=300
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert reply["content"]["status"] == "ok", reply["content"]
    written = [one["content"]["text"] for one in sent if one["msg_type"] == "stream"]
    assert bool(written) == watched
    assert not watched or (("shapley" in "".join(written)) and "".join(written).endswith("\r"))
