"""Where should ``find_then_rank`` cut its two stages? A sweep, on the tuning half alone.

Every cut is one order of the same scores: the word that decides against what erasing bears out. The
parts that ``find_then_rank`` is made of stand beside it, and Shapley values of ten times the rows.

    python benchmarks/find_then_rank.py        ten minutes on one core
"""

import sys
from itertools import islice
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from tqdm import tqdm

from helpers import attribute, load_model
from helpers.attribution import asking, average_gains
from helpers.attribution.find_then_rank import KEEP, most_rows, two_stages
from helpers.attribution.perturbation import coalition_values, draw_coalitions
from helpers.faithfulness import by_method, erasure_curves, erasure_measures
from helpers.ground_truth import FAMILIES, cases, evidence_units, reciprocal_rank, solved

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts, not a package
from report import keep, table, with_interval

CUTS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.7, 1.0)
FAR = 1e-9  # a cut below all positive sums: the first stage alone


def main(
    per_family: Annotated[int, typer.Option(min=2, help="Cases a family; even.")] = 16,
):
    """Sweep the cut and keep the table in results.md."""
    torch.set_num_threads(1)
    model, tokenizer = load_model()
    found = []
    for family in FAMILIES:
        some = islice(solved(model, tokenizer, cases(family, "tuning")), per_family)
        for number, (_, question, other) in enumerate(tqdm(some, total=per_family, disable=None)):
            found += [
                {"family": family, "case": number, "method": name, "measure": what, "value": value}
                for name, what, value in measured(model, question, other, number)
            ]
    found = pd.DataFrame(found)
    finds, ranks = (by_method(found, what) for what in ("reciprocal rank", "erasing"))
    first, most = finds.loc["occlusion", "mean"], ranks.loc["Shapley values", "mean"]
    rows = [
        {
            "order": name,
            "reciprocal rank of the evidence": with_interval(finds.loc[name]),
            "over occlusion's": f"{finds.loc[name, 'mean'] - first:+.3f}",
            "insertion - deletion, nats": with_interval(ranks.loc[name]),
            "of Shapley values'": f"{ranks.loc[name, 'mean'] / most:.0%}",
        }
        for name in dict.fromkeys(found["method"])
    ]
    names = ranks.loc["Shapley values", "prompts"]
    text = [
        f"{names} prompts of the tuning half, {per_family} of each short family, with 95 % "
        "intervals over minimal pairs. `cut` is the share of the strongest unit of the first "
        "stage that a unit has to reach to be of that stage; 1 leaves one unit there. Shapley "
        "values are of 400 rows, or exact.",
        table(rows),
    ]
    keep("find_then_rank", "Where to cut between finding and ranking", "\n\n".join(text))


def measured(model, question, other, seed):
    """``(name, measure, value)`` of all orders of one prompt's units."""
    units = len(question.units)
    slope, removal = (attribute(model, question, name) for name in ("relevance", "occlusion"))
    shares = attribute(
        model, question, "coalitions", keep=None, rows=min(2**units - 1, 400), seed=seed
    )
    with asking(model, [question]) as asked:
        without = ~torch.eye(units, dtype=torch.bool)
        kept = draw_coalitions(units, KEEP, most_rows(units), seed, first=without)
        whole, (values,) = coalition_values(asked, [kept])
    gains, errors = (some.sum(dim=0) for some in average_gains(kept, values, whole[0], KEEP))
    scores = {
        "relevance": slope.scores,
        "occlusion": removal.scores,
        "Banzhaf value, from the same rows": gains,
        "Shapley values": shares.scores,
        "first stage alone": two_stages(slope.scores, removal.scores, gains, errors, FAR)[0],
    }
    for cut in CUTS:
        scores[f"cut {cut}"] = two_stages(slope.scores, removal.scores, gains, errors, cut)[0]
    orders = torch.stack([some.argsort(descending=True, stable=True) for some in scores.values()])
    erased = erasure_measures(erasure_curves(model, question, orders))["faithfulness"]
    evidence = evidence_units(question, other)
    for (name, some), value in zip(scores.items(), erased.tolist(), strict=True):
        yield name, "reciprocal rank", reciprocal_rank(some, evidence, signed=True)
        yield name, "erasing", value


if __name__ == "__main__":
    typer.run(main)
