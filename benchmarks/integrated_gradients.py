"""Do the integrated gradients close, at what price, and have their scores settled?

Runs over the reporting prompts, on which nothing was tuned, and keeps a table in results.md. Every
finished measurement is kept in outputs/benchmarks as it is made, and is not made again by the next
run: delete the file to start over.

    python benchmarks/integrated_gradients.py            half an hour on two cores
"""

import sys
from pathlib import Path

import pandas as pd
import torch

from helpers import attribute, load_model
from helpers.attribution import fixed_step_integrated_gradients

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts, not a package
from prompt_sets import questions
from report import keep, keep_row, kept_rows, table

KEPT = Path(__file__).parents[1] / "outputs" / "benchmarks" / "integrated_gradients.csv"
RULES = ("gausslegendre", "riemann_trapezoid", "riemann_middle")
FINER = 20  # times the evaluations, for the scores that are taken as the truth
COLUMNS = [
    "prompt",
    "what",
    "tokens",
    "evaluations",
    "gap",
    "closed",
    "rank correlation",
    "seconds",
    "largest error",
]


def main():
    model, tokenizer = load_model()
    asked = list(questions(model, tokenizer, "reporting"))
    short = [number for number, q in enumerate(asked) if 4 <= len(q.labels) <= 6][:6]
    done = {(row["prompt"], row["what"]) for row in kept()}

    def measure(number, what, run):
        if (str(number), what) not in done:
            note(number, what, len(asked[number].labels), run(asked[number]))

    def closing(baseline):
        return lambda q: row(attribute(model, q, "integrated_gradients", baseline=baseline))

    for number in range(len(asked)):
        measure(number, "mean", closing("mean"))
    for number in short:
        measure(number, "finer", lambda q, n=number: finer(model, q, evaluations_of(n)))
    for number in short:
        for rule in RULES:
            n_steps = 8 * evaluations_of(number)
            measure(number, f"8x {rule}", lambda q, r=rule, n=n_steps: captum(model, q, r, n))
    for number in short:
        measure(number, "eos", closing("eos"))
    for number in short[:2]:
        measure(number, "zero", closing("zero"))
    for rule in RULES:
        measure(short[0], f"5000 {rule}", lambda q, r=rule: captum(model, q, r, 5000))
    keep("integrated_gradients", "Integrated gradients that close", summary(pd.read_csv(KEPT)))


def row(result, **more):
    return {
        "evaluations": result.evaluations,
        "gap": result.gap,
        "closed": result.closed,
        "seconds": result.seconds,
        "largest error": None if result.errors is None else float(result.errors.max()),
        **more,
    }


def finer(model, question, evaluations):
    """The ranks of the scores against those of a run that may take twenty times as long."""
    plain = attribute(model, question, "integrated_gradients")
    fine = attribute(
        model, question, "integrated_gradients", tolerance=1e-9, max_evaluations=FINER * evaluations
    )
    both = pd.DataFrame({"plain": plain.scores, "fine": fine.scores})
    apart = float((plain.scores - fine.scores).abs().max() / fine.scores.abs().max())
    return row(fine, **{"rank correlation": both.rank().corr().iloc[0, 1], "largest error": apart})


def captum(model, question, rule, n_steps):
    return row(fixed_step_integrated_gradients(model, question, n_steps=n_steps, rule=rule))


def evaluations_of(number):
    (found,) = (r for r in kept() if r["prompt"] == str(number) and r["what"] == "mean")
    return int(found["evaluations"])


def kept():
    return kept_rows(KEPT)


def note(number, what, tokens, found):
    keep_row(KEPT, COLUMNS, {"prompt": number, "what": what, "tokens": tokens, **found})
    print(number, what, found, file=sys.stderr)


def summary(found):
    rows = []
    for what, some in found.groupby("what", sort=False):
        rows.append(
            {
                "run": NAMES.get(what, what),
                "prompts": len(some),
                "evaluations, median (most)": (
                    f"{some['evaluations'].median():.0f} ({some['evaluations'].max()})"
                ),
                "gap, median (largest)": f"{some['gap'].median():.2%} ({some['gap'].max():.1%})",
                "within 2 %": f"{(some['gap'] <= 0.02).mean():.0%}",
            }
        )
    mean, fine = found[found["what"] == "mean"], found[found["what"] == "finer"]
    text = [
        "Reporting prompts, default options: 2 % tolerance, at most 2,000 evaluations.",
        table(rows),
        f"Closed, by the result's own word: {mean['closed'].astype(str).eq('True').mean():.0%} of "
        f"{len(mean)} from the mean embedding.",
        f"Against the finer run ({FINER} times the evaluations, {len(fine)} prompts of 4 to 6 "
        f"tokens): rank correlation {fine['rank correlation'].median():.3f} in the median, "
        f"{fine['rank correlation'].min():.3f} at the least; the scores are off by "
        f"{fine['largest error'].median():.1%} of the largest in the median, at most "
        f"{fine['largest error'].max():.1%}.",
    ]
    wins = []
    for number, some in found[found["what"].str.startswith("8x")].groupby("prompt"):
        ours = mean[mean["prompt"] == number]["gap"].iloc[0]
        wins.append(some["gap"].min() > ours)
    text.append(
        f"With eight times our evaluations the best of Captum's {len(RULES)} rules still had a "
        f"larger gap than ours on {sum(wins)} of {len(wins)} prompts."
    )
    return "\n\n".join(text)


NAMES = {
    "mean": "ours, from the mean embedding",
    "eos": "ours, from the end-of-text token",
    "zero": "ours, from zeros",
    "finer": f"ours, {FINER} times the evaluations",
    **{f"8x {rule}": f"Captum {rule}, 8 times our evaluations" for rule in RULES},
    **{f"5000 {rule}": f"Captum {rule}, 5,000 evaluations" for rule in RULES},
}

if __name__ == "__main__":
    torch.manual_seed(0)
    main()
