"""How often is a report's verdict right? On prompts of which it is known which word decides.

Every prompt is explained as a report does it by default: in words, by the trusted methods, with the
three tests of its first screen. A prompt counts as right where the unit with number 1 holds the
word that decides. The verdict says how far to believe it: is "borne out" more often right than
"not borne out"? Nothing is tuned here: the prompts are those of the reporting half. Each is kept in
outputs/trust.csv as it is done, and is not run again: delete that file to start over.

    python benchmarks/trust.py                  keeps a section of results.md, in about ten minutes
    python benchmarks/trust.py --per-family 2   fewer, for a look; changes no section
"""

import sys
from itertools import islice
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from tqdm import tqdm

from helpers import load_model
from helpers.faithfulness import bootstrap_interval
from helpers.ground_truth import FAMILIES, cases, evidence_units, solved
from helpers.summary import HALVED, TRUSTED, default_units, explain

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts, not a package
from report import command, keep, keep_row, kept_rows, table

PER_FAMILY = 14
KEPT = Path(__file__).parents[1] / "outputs" / "trust.csv"
VERDICTS = {"yes": "borne out", "weak": "weakly borne out", "no": "not borne out"}
FEWEST = 5  # pairs of prompts that are worth an interval


def main(
    per_family: Annotated[int, typer.Option(min=2, help="Prompts a family; even.")] = PER_FAMILY,
) -> None:
    """Explain the prompts and tabulate how often the first unit is right, by verdict."""
    torch.set_num_threads(1)
    model, tokenizer = load_model()
    done = {(row["family"], int(row["case"])) for row in kept_rows(KEPT)}
    for family in FAMILIES:
        some = islice(solved(model, tokenizer, cases(family, "reporting")), per_family)
        for number, (_, question, other) in enumerate(tqdm(some, total=per_family, disable=None)):
            if (family, number) not in done:
                row = {"family": family, "case": number} | judged(model, question, other)
                keep_row(KEPT, list(row), row)
    found = pd.read_csv(KEPT)
    text = report_of(found[found["case"] < per_family])
    if per_family == PER_FAMILY:
        keep("trust", "How far to trust a report's verdict", text)
    else:
        print(text)


def judged(model, question, other):
    """What the first screen says of a question, and whether its first unit is the right one."""
    question = default_units(question)
    found = explain(model, question)
    first = {found.top_units[name][0] for name in TRUSTED if name in found.top_units}
    return {
        "verdict": found.borne_out,
        "right": float(found.strongest[0] in evidence_units(question, other)),
        "the odds halve": found.without[-1].moved > HALVED,
        "methods agree": len(first) == 1,
        "units": sum(unit.part not in ("template", "answer") for unit in question.units),
    }


def report_of(found):
    """The section of results.md: by verdict, what the verdicts tell apart, and by family."""
    by_verdict = [
        {"verdict": told} | share(found[found["verdict"] == name])
        for name, told in VERDICTS.items()
    ]
    tests = [
        {
            "test": test,
            "passed": share_of(found[found[test]]),
            "failed": share_of(found[~found[test]]),
        }
        for test in ("the odds halve", "methods agree")
    ]
    families = [
        {"family": family, "prompts": len(some)}
        | {told: share_of(some[some["verdict"] == name]) for name, told in VERDICTS.items()}
        for family, some in found.groupby("family", sort=False)
    ]
    chance = (1 / found["units"]).mean()
    return "\n\n".join(
        [
            f"{len(found)} prompts of the reporting half that the model answers right, explained "
            "as a report does it. Right: the unit with number 1 holds the word that decides. "
            f"By chance it would in {chance:.0%}. 95 % bootstrap intervals over minimal pairs.",
            table(by_verdict),
            f"*Does the verdict separate?* {separates(found)}",
            "The two tests that can be seen apart:",
            table(tests),
            "Right, of how many, by family:",
            table(families),
        ]
    )


def pairs(some):
    """The share that is right in each minimal pair, both directions of which count as one."""
    return some.groupby([some["family"], some["case"] // 2])["right"].mean()


def share(some):
    row = {"prompts": len(some), "right": "", "95 % interval": ""}
    if len(some):
        row["right"] = f"{some['right'].mean():.0%}"
    if len(each := pairs(some)) >= FEWEST:
        _, low, high = bootstrap_interval(each)
        row["95 % interval"] = f"{low:.0%} to {high:.0%}"
    return row


def share_of(some):
    return f"{some['right'].mean():.0%} of {len(some)}" if len(some) else "none"


def separates(found):
    """By how much "borne out" is more often right than each other verdict, in words."""
    told = []
    for name in ("weak", "no"):
        groups = [pairs(found[found["verdict"] == verdict]) for verdict in ("yes", name)]
        if not len(groups[1]):
            told.append(f"{VERDICTS[name]!r} was said of none.")
            continue
        if min(map(len, groups)) < FEWEST:
            told.append(f"Of {VERDICTS[name]!r} there are too few prompts to say.")
            continue
        gap = groups[0].mean() - groups[1].mean()
        low, high = difference_interval(*groups)
        sure = "more often" if low > 0 else "hardly more often" if gap > 0 else "no more often"
        told.append(
            f"'borne out' is {sure} right than {VERDICTS[name]!r}: by {100 * gap:.0f} points "
            f"({100 * low:.0f} to {100 * high:.0f})."
        )
    each = found[found["verdict"] == "yes"].groupby("family", sort=False)["right"]
    wrong = [
        f"{family} ({100 * right:.0f}%)" for family, right in each.mean().items() if right < 0.5
    ]
    if wrong:
        told.append(f"It is no proof: of {', '.join(wrong)} what is 'borne out' is mostly wrong.")
    return " ".join(told)


def difference_interval(first, second, resamples=2000, seed=0):
    """The 95 % bootstrap interval of a difference of two means over other pairs of prompts."""
    draw = torch.Generator().manual_seed(seed)
    means = [
        values[torch.randint(len(values), (resamples, len(values)), generator=draw)].mean(dim=1)
        for values in (torch.tensor(first.to_numpy()), torch.tensor(second.to_numpy()))
    ]
    low, high = (means[0] - means[1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.double))
    return float(low), float(high)


if __name__ == "__main__":
    command(main)
