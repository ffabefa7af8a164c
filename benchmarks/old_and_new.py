"""The same work by this checkout and by another one, in turns: how many times as fast is this one?

A process for each checkout loads the model once and measures what it is asked to, on one thread.
The two take turns, measurement by measurement, so that a slow minute of the machine meets both.
What counts is processor time, of which a busy machine takes nothing; a ratio is the median over the
repeats, and above 1 where this checkout is faster. Where both explain the same, their scores are
compared, too.

    git worktree add ../old COMMIT
    python benchmarks/old_and_new.py ../old                  everything; writes nothing
    python benchmarks/old_and_new.py ../old --keep           the same, into results.md
    python benchmarks/old_and_new.py ../old --only "relevance, 6"   a look
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (6, 35, 151)
PROMPTS = 200
METHODS = ("gradient_x_input", "relevance", "50 fixed steps", "occlusion")
DEFAULT_METHODS = ("relevance", "saliency", "gradient_x_input", "random")
# tokens that a measurement takes together, so that a short prompt is measured several times
TIMES = {"gradient_x_input": 90, "relevance": 60, "50 fixed steps": 18, "occlusion": 12}


def works():
    """Everything that is measured: ``(name, method, length, whether there is a foil)``."""
    found = [
        (f"{method}, {length}{'' if foil else ', no foil'}", method, length, foil)
        for method in METHODS
        for length in LENGTHS
        for foil in (True, False)
    ]
    return [*found, (f"scores of {PROMPTS} prompts", "scores", 0, True)]


# --- one checkout, in a process of its own -----------------------------------------------------


class Old:
    """The API of ``attribute_many``: a target is one token id, and its raw logit is explained."""

    def ask(self, model, tokenizer, prompt, target, foil):
        from helpers import ask

        return ask(model, tokenizer, prompt, target=target, foil=foil)

    def fixed_steps(self, model, question):
        from helpers.attribution import fixed_step_integrated_gradients
        from helpers.attribution.engine import answer_only

        with answer_only(model, question) as answer:
            return fixed_step_integrated_gradients(model, answer)

    def all(self, model, tokenizer, entries, methods):
        from helpers.attribution.batches import ask_many, attribute_many

        wanted = [{"prompt": text, "target": t, "foil": f} for text, t, f in entries]
        questions = ask_many(model, tokenizer, wanted, open_targets=True)
        return [answer.results for answer in attribute_many(model, questions, methods)]


class New:
    """The API of ``attribute_all``: targets are texts or lists of ids, in log-probabilities."""

    def ask(self, model, tokenizer, prompt, target, foil):
        from helpers import ask

        ids = [None if token is None else [token] for token in (target, foil)]
        return ask(model, tokenizer, prompt, target_ids=ids[0], foil_ids=ids[1])

    def fixed_steps(self, model, question):
        from helpers.attribution import fixed_step_integrated_gradients

        return fixed_step_integrated_gradients(model, question)

    def all(self, model, tokenizer, entries, methods):
        from helpers import attribute_all
        from helpers.questions import read_question

        questions = []
        for text, target, foil in entries:
            ids = [None if token is None else [token] for token in (target, foil)]
            named = {"target_ids": ids[0], "foil_ids": ids[1]}
            questions.append(read_question(tokenizer, text, **named, model=model))
        return [results for _, results in attribute_all(model, questions, methods)]


def serve():
    """Measure what comes in, a line of JSON each; answer with seconds and scores."""
    import torch

    import helpers

    torch.set_num_threads(1)
    model, tokenizer = helpers.load_model()
    api = New() if hasattr(helpers, "attribute_all") else Old()
    print(json.dumps(str(Path(helpers.__file__).resolve().parents[1])), flush=True)
    questions = {}
    for line in sys.stdin:
        _, method, length, foil = json.loads(line)
        if method == "scores":
            asked = model, tokenizer, entries_of(tokenizer, PROMPTS), DEFAULT_METHODS
            took, found = measured(partial(api.all, *asked), 1)
            scores = [x for results in found for x in results["relevance"].scores.tolist()]
        else:
            if (length, foil) not in questions:
                asked = question_of(api, model, tokenizer, length, foil)
                questions[length, foil] = asked
            question = questions[length, foil]

            def run(method=method, question=question):
                if method == "50 fixed steps":
                    return api.fixed_steps(model, question)
                return helpers.attribute(model, question, method)

            if length == min(LENGTHS):
                run()  # warm
            took, found = measured(run, max(1, TIMES[method] // length))
            scores = found.scores.tolist()
        print(json.dumps({"seconds": took, "scores": scores}), flush=True)


def measured(run, times):
    """Seconds of processor time of one run, the median of ``times``; and what it gave."""
    seconds = []
    for _ in range(times):
        began = time.process_time()
        found = run()
        seconds.append(time.process_time() - began)
    return median(seconds), found


def question_of(api, model, tokenizer, length, foil):
    """Of ``length`` tokens of the licence; the model's first choice against its second."""
    import torch

    ids = tokenizer((ROOT / "LICENSE").read_text(encoding="utf-8"))["input_ids"]
    for start in range(20, 200):
        prompt = tokenizer.decode(ids[start : start + length])
        if tokenizer(prompt)["input_ids"] == ids[start : start + length]:
            with torch.inference_mode():
                logits = model(torch.tensor([ids[start : start + length]])).logits[0, -1]
            first, second = logits.topk(2).indices.tolist()
            return api.ask(model, tokenizer, prompt, first, second if foil else None)
    raise RuntimeError(f"no stretch of {length} tokens that decodes and encodes to itself")


def entries_of(tokenizer, count):
    """``(prompt, target, foil)`` of the reporting half; every other one is open, without a foil."""
    from helpers.ground_truth import FAMILIES, cases

    found = {}
    families = [cases(family, "reporting") for family in FAMILIES]
    for case in (case for some in zip_longest(*families) for case in some if case):
        ids = [
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (case.target, case.foil)
        ]
        if list(map(len, ids)) == [1, 1]:
            both = [ids[0][0], ids[1][0]] if len(found) % 2 else [None, None]
            found.setdefault(case.prompt, (case.prompt, *both))
        if len(found) == count:
            return list(found.values())
    raise RuntimeError(f"{len(found)} prompts, and {count} are wanted")


# --- both --------------------------------------------------------------------------------------


class Checkout:
    """The process of one checkout."""

    def __init__(self, root: Path):
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"],
            env=environment,
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = Path(json.loads(self.process.stdout.readline()))
        if found != root:
            raise SystemExit(f"helpers came from {found}, not from {root}.")

    def measure(self, work: tuple) -> dict:
        self.process.stdin.write(json.dumps(work) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def compare(old: Path, repeats: int, only: str) -> list[dict]:
    """A row for each work: seconds of both, the ratio, and how far the scores are apart."""
    both = [Checkout(old.resolve()), Checkout(ROOT)]
    rows = []
    try:
        for work in works():
            if only not in work[0]:
                continue
            found = []
            for repeat in range(repeats):
                order = both if repeat % 2 == 0 else both[::-1]
                pair = [checkout.measure(work) for checkout in order]
                found.append(pair if repeat % 2 == 0 else pair[::-1])
            ratios = [a["seconds"] / b["seconds"] for a, b in found]
            seconds = [median(pair[i]["seconds"] for pair in found) for i in range(2)]
            rows.append(
                {
                    "work": work[0],
                    "old, s": f"{seconds[0]:.3f}",
                    "new, s": f"{seconds[1]:.3f}",
                    "old / new": f"{median(ratios):.2f}",
                    "least to most": f"{min(ratios):.2f} to {max(ratios):.2f}",
                    "scores apart": _apart(*found[0]) if work[3] and work[2] else "",
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    finally:
        for checkout in both:
            checkout.close()
    return rows


def _apart(old, new):
    """The largest difference of two lists of scores, as a share of the largest score."""
    pairs = list(zip(old["scores"], new["scores"], strict=True))
    return f"{max(abs(a - b) for a, b in pairs) / max(abs(a) for a, _ in pairs):.0e}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, nargs="?", help="another checkout, such as a worktree")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="work whose name holds this text")
    parser.add_argument("--keep", action="store_true", help="write the table to results.md")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    if given.old is None:
        parser.error("name another checkout of this project.")
    rows = compare(given.old, given.repeats, given.only)
    sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts, not a package
    from report import keep, table

    text = (
        f"{table(rows)}\n\nProcessor time of one call on one thread, both in turns; ratios are "
        f"medians of {given.repeats}. Numbers are tokens. With a foil both explain the difference "
        "of two logits; without one the old code explains a raw logit, and the new code a "
        "log-probability, for which the whole vocabulary's logits are computed. Scores: "
        f"{', '.join(DEFAULT_METHODS)}, half of the prompts with a foil."
    )
    print(text)
    if given.keep:
        keep("old_and_new", "This code and the code before it", text)


if __name__ == "__main__":
    main()
