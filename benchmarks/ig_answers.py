"""Is there a baseline or a path on which integrated gradients find the word that decides?

Puts them from several baselines, and along two other paths, to the examination of
``helpers/ground_truth.py``, occlusion beside them, and keeps a small table that
notebooks/07_integrated_gradients reads, helpers/data/ig_answers.csv, and a section of results.md.

    python benchmarks/ig_answers.py                      72 reporting prompts, twenty minutes
    python benchmarks/ig_answers.py --split tuning --per-family 4 --shares 0.5 --shares 0.9
"""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer

from helpers import Attribution, attribute, load_model
from helpers.attribution import asking, embed_prompt
from helpers.attribution.path import FIRST_EVALUATIONS
from helpers.attribution.perturbation import blank
from helpers.attribution.result import attributions
from helpers.faithfulness import against_random, by_method
from helpers.ground_truth import (
    FAMILIES,
    cases,
    evidence_positions,
    random_reciprocal_rank,
    reciprocal_rank,
    solved,
)

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts, not a package
from report import keep, table, with_interval

TABLE = Path(__file__).parents[1] / "helpers" / "data" / "ig_answers.csv"
EVALUATIONS = FIRST_EVALUATIONS  # of a line: the fewest that our integrated gradients take
NODES = 8  # of each token's own line, where one token moves at a time
SUBSETS = (16, 64)  # gradients: the first 16 are the same in both
SHARE = 0.5  # of the tokens that a subset keeps: chosen on tuning cases
RANDOM_ORDERS = 5
ABOUT = f"""\
A line has the budget of {EVALUATIONS} gradients, the fewest that ours take, and is refined where it
misses. Where one token moves at a time, from the mean to itself, each has {NODES} Gauss-Legendre
points. A random subset keeps each token with the probability given and puts the mean in the place
of the others; a token's score is its mean slope times what the mean would change. The probability
was chosen on 24 tuning prompts, of 50, 75 and 90 %: reciprocal ranks of 0.57, 0.53 and 0.45 with 64
gradients, 0.60, 0.55 and 0.46 with 16. The counterfactual is the other prompt of the pair, which
only an examiner has: all tokens but the deciding ones score zero by construction.
""".replace("\n", " ").strip()
ALONE, SUBSET = "one token at a time", "random subsets that keep {share:.0%}, {count} gradients"
COUNTERFACTUAL = "line from the counterfactual"


def starts(model, question, other):
    """``{name: baseline [seq, dim] or its name}``: where a line may begin."""
    with asking(model, [question]) as asked:
        mean, neighbour = (blank(asked, name)[0] for name in ("mean", "neighbour"))
        norms = asked.embeds[0, 0].norm(dim=-1, keepdim=True)  # [seq, 1]
    return {
        "line from zeros": "zero",
        "line from end-of-text": "eos",
        "line from the mean": "mean",
        "line from the mean at each token's norm": mean / mean.norm(dim=-1, keepdim=True) * norms,
        "line from the token before": neighbour,
        COUNTERFACTUAL: embed_prompt(model, other)[0],
    }


def reactions(asked, rows, step):
    """The slopes along ``step`` [seq, dim] at ``rows`` [rows, seq, dim]: [rows, seq]."""

    def run(some):
        owner = torch.zeros(len(some), dtype=torch.long)
        return asked.reactions(some[:, None], lambda grad: (grad * step).sum(dim=-1), owner)[1]

    return torch.cat(asked.in_batches(run, rows, rows.shape[1]))[:, 0].double().cpu()


def one_token_at_a_time(model, question):
    """Each token moves from the mean to itself while all others stand as they are.

    What such a line adds up to is what occlusion measures; here it is integrated all the same.
    """
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    with asking(model, [question]) as asked:
        embeds, start = asked.embeds[0, 0], blank(asked, "mean")[0]
        seq, step = len(embeds), embeds - start
        token = torch.arange(seq).repeat_interleave(NODES)
        alphas = torch.tensor((1 + nodes) / 2).repeat(seq).to(embeds)
        rows = embeds.repeat(len(token), 1, 1)
        rows[range(len(token)), token] = start[token] + alphas[:, None] * step[token]
        own = reactions(asked, rows, step)[range(len(token)), token].view(seq, NODES)
        scores = own @ torch.tensor(weights / 2)  # [seq]
        (found,) = attributions(asked, scores[None, None], evaluations=len(rows))
    return found


def random_subsets(model, question, share, seed):
    """``{gradients: Attribution}``: slope times difference, in the mean over random subsets."""
    generator = torch.Generator().manual_seed(seed)
    with asking(model, [question]) as asked:
        embeds, start = asked.embeds[0, 0], blank(asked, "mean")[0]
        kept = torch.rand(max(SUBSETS), len(embeds), generator=generator) < share
        rows = torch.where(kept[..., None].to(embeds.device), embeds, start)
        slopes = reactions(asked, rows, embeds - start)
        found = {
            count: attributions(asked, slopes[:count].mean(dim=0)[None, None], evaluations=count)[0]
            for count in SUBSETS
        }
    return found


def everyone(model, question, other, shares, seed):
    """``{name: Attribution}`` of all that is compared."""
    found: dict[str, Attribution] = {
        name: attribute(
            model, question, "integrated_gradients", baseline=start, max_evaluations=EVALUATIONS
        )
        for name, start in starts(model, question, other).items()
    }
    found[ALONE] = one_token_at_a_time(model, question)
    for share in shares:
        for count, result in random_subsets(model, question, share, seed).items():
            found[SUBSET.format(share=share, count=count)] = result
    found["occlusion"] = attribute(model, question, "occlusion")
    found["random"] = attribute(model, question, "random", seed=seed)
    return found


def measured(model, question, other, results, seed) -> Iterator[tuple[str, str, float]]:
    """Rows ``(method, measure, value)`` of one prompt."""
    positions = evidence_positions(question, other)
    yield "chance", "reciprocal_rank", random_reciprocal_rank(len(question.units), len(positions))
    for name, result in results.items():
        yield name, "reciprocal_rank", reciprocal_rank(result.scores, positions, result.signed)
        yield name, "gradients", result.evaluations
        if result.gap is not None:
            yield name, "gap", result.gap
            yield name, "closed", float(result.closed)
    erased = against_random(model, question, results, count=RANDOM_ORDERS, seed=seed)
    for name, value in erased["faithfulness"].items():
        yield name, "faithfulness", value
    exact = results["occlusion"].scores
    apart = (results[ALONE].scores - exact).abs().sum() / exact.abs().sum()
    yield ALONE, "from occlusion", float(apart)


def summary(rows):
    """One line a method: what ``rows``, a tidy DataFrame, say of it."""
    ranks, erased = by_method(rows, "reciprocal_rank"), by_method(rows, "faithfulness")
    medians = rows.pivot_table("value", "method", "measure", "median")
    means = rows.pivot_table("value", "method", "measure", "mean")
    found = ranks.drop(columns="prompts").add_prefix("rank_")
    found = found.join(erased.drop(columns="prompts").add_prefix("erasing_"))
    found["gap"], found["closed"] = medians["gap"], means["closed"]
    found["gradients"] = means["gradients"]
    return found.rename_axis("method").reset_index()


def told(found, rows):
    """The section of results.md."""

    def interval(row, what):
        if pd.isna(row[f"{what}_mean"]):
            return ""
        return with_interval(row, f"{what}_")

    lines = [
        {
            "from where, on which path": row["method"],
            "reciprocal rank of the evidence": interval(row, "rank"),
            "insertion - deletion, nats": interval(row, "erasing"),
            "gap, median": "" if pd.isna(row["gap"]) else f"{row['gap']:.1%}",
            "closed": "" if pd.isna(row["closed"]) else f"{row['closed']:.0%}",
            "gradients": "" if pd.isna(row["gradients"]) else f"{row['gradients']:.0f}",
        }
        for _, row in found.iterrows()
    ]
    prompts = rows.groupby(["family", "case"]).ngroups
    apart = rows[rows["measure"] == "from occlusion"]["value"].median()
    by_family = rows[rows["measure"] == "reciprocal_rank"].pivot_table(
        "value", "method", "family", "mean"
    )
    families = [
        {"from where, on which path": name}
        | {family: f"{by_family.loc[name, family]:.2f}" for family in FAMILIES}
        for name in found["method"]
    ]
    return "\n\n".join(
        [
            f"{prompts} prompts of the {rows['split'].iloc[0]} half. What is explained is a "
            f"difference of log-probabilities. {ABOUT} Means with 95 % bootstrap intervals over "
            "minimal pairs.",
            table(lines),
            "One token at a time adds up to occlusion. Its scores are away from occlusion's by "
            f"{apart:.1%} of their size in the median.",
            "Reciprocal rank by family:",
            table(families),
        ]
    )


def main(
    split: Annotated[str, typer.Option(help="tuning or reporting")] = "reporting",
    per_family: Annotated[int, typer.Option(min=1, help="prompts of each family")] = 12,
    shares: Annotated[list[float] | None, typer.Option(help="what subsets keep")] = None,
) -> None:
    """Measure; only a run on the reporting half is kept."""
    model, tokenizer = load_model()
    rows = []
    for family in FAMILIES:
        some = islice(solved(model, tokenizer, cases(family, split)), per_family)
        for number, (case, question, other) in enumerate(some):
            results = everyone(model, question, other, shares or [SHARE], number)
            rows += [
                (split, family, number, *row)
                for row in measured(model, question, other, results, number)
            ]
            print(family, number, case.prompt, file=sys.stderr, flush=True)
    tidy = pd.DataFrame(rows, columns=["split", "family", "case", "method", "measure", "value"])
    found = summary(tidy)
    text = told(found, tidy)
    if split == "reporting":
        found.to_csv(TABLE, index=False, float_format="%.4g")
        keep("ig_answers", "Integrated gradients, answered", text)
    else:
        print(text)


if __name__ == "__main__":
    typer.run(main)
