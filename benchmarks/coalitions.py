"""How far are sampled Shapley values from the exact ones, and do their errors say so?

On tuning cases of the ground truth whose subsets are all run once, so that the exact values are
known and any estimator can be tried on them for nothing. Each is given the same number of rows and
is tried with several seeds. Tables of subsets are kept in outputs/benchmarks.

shapiq has an environment of its own, as it wants a later Python: --shapiq PATH/TO/python.

    python benchmarks/coalitions.py            ten minutes on one core
"""

import json
import math
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer

from helpers import load_model
from helpers.attribution import asking, average_gains
from helpers.attribution.perturbation import coalition_values, draw_coalitions
from helpers.ground_truth import FAMILIES, cases, solved

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts, not a package
from report import keep, table

HERE = Path(__file__).parent
KEPT = HERE.parent / "outputs" / "benchmarks" / "coalitions.pt"
ROWS = {8: (62,), 10: (124,), 12: (124, 222), 14: (124, 262)}  # units: rows, the whole among them
MOST = {8: 40, 10: 4, 12: 2, 14: 1}  # units: cases, as each takes 2**units rows
KEEPS = (None, 0.5, 0.75, 0.9)
USUAL = "orders and their reverse"


def main(
    per_family: Annotated[int, typer.Option(min=1, help="Cases a family that are looked at.")] = 16,
    seeds: Annotated[int, typer.Option(min=2, help="Draws an estimator.")] = 10,
    shapiq: Annotated[str | None, typer.Option(help="The python that has shapiq.")] = None,
):
    """Compare estimators of Shapley values and keep the tables in results.md."""
    games = list(tables(per_family))
    jobs = [(game, rows) for game in games for rows in ROWS[units_of(game)]]
    found = {USUAL: tried(jobs, by_orders, seeds), "coalitions": tried(jobs, by_coalitions, seeds)}
    found["the same rows, by regression (KernelSHAP)"] = tried(jobs, by_regression, seeds)
    if shapiq:
        found |= peers(jobs, shapiq, seeds)
    text = [
        "Root mean square error of Shapley values against those of all subsets, over that of "
        f"{USUAL}, at equal rows: the geometric mean over cases of the tuning half, on some of "
        f"which the prior was chosen, with {seeds} draws each. In brackets the share of scores "
        "within one error, where errors are told.",
        table(list(compared(jobs, found))),
        "Of `coalitions`, the share of scores within one and two of their errors, and the root "
        "mean square of score minus exact over error, which is 1 where errors are right:",
        table(list(calibrated(jobs, seeds))),
    ]
    if not shapiq:
        text.append("shapiq was not run: no environment was given (--shapiq).")
    keep("coalitions", "Shapley values from few rows", "\n\n".join(text))


# --- games: the values of all subsets of a prompt's units --------------------------------------


def tables(per_family):
    """The games [2**units] of tuning cases, from the file where they are there already."""
    found = torch.load(KEPT) if KEPT.exists() else {}
    model, tokenizer = load_model()
    count = dict.fromkeys(ROWS, 0)
    for family in FAMILIES:
        for case, question, _ in islice(
            solved(model, tokenizer, cases(family, "tuning")), per_family
        ):
            units = len(question.units)
            if count.get(units, 0) == MOST.get(units, 0):
                continue
            count[units] += 1
            if case.prompt not in found:
                print(f"{2**units:,} rows: {case.prompt}", file=sys.stderr)
                with asking(model, [question]) as asked:
                    kept = draw_coalitions(units, None, 2**units)
                    whole, (values,) = coalition_values(asked, [kept])
                found[case.prompt] = torch.cat([values, whole])[:, 0].double()
                KEPT.parent.mkdir(parents=True, exist_ok=True)
                torch.save(found, KEPT)
            yield found[case.prompt]


def units_of(game):
    return len(game).bit_length() - 1


def of_rows(game, kept):
    """The values of coalitions [rows, units]."""
    return game[(kept * 2 ** torch.arange(kept.shape[1])).sum(dim=1)]


def exact(game, keep=None):
    kept = draw_coalitions(units_of(game), None, len(game))
    return average_gains(kept, of_rows(game, kept)[:, None], game[-1:], keep)[0][0]


# --- estimators: a game, a number of rows and a seed to scores [units] and errors ---------------


def by_coalitions(game, rows, seed, keep=None):
    kept = draw_coalitions(units_of(game), keep, rows - 1, seed)
    scores, errors = average_gains(kept, of_rows(game, kept)[:, None], game[-1:], keep)
    return scores[0], errors[0]


def by_orders(game, rows, seed):
    """What ``shapley`` was before: pairs of orders, as long as their distinct subsets are paid."""
    units, seen, pairs = units_of(game), {0, len(game) - 1}, []
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(units, generator=generator)
        pair = [(2**turn).cumsum(dim=0) for turn in (order, order.flip(0))]
        more = seen | {int(subset) for one in pair for subset in one}
        if len(more) > rows and len(pairs) > 1:
            break
        seen, gains = more, torch.zeros(units, dtype=torch.float64)
        for turn, subsets in zip((order, order.flip(0)), pair, strict=True):
            before = torch.cat([torch.zeros_like(subsets[:1]), subsets[:-1]])
            gains[turn] += (game[subsets] - game[before]) / 2
        pairs.append(gains)
    pairs = torch.stack(pairs)
    return pairs.mean(dim=0), pairs.std(dim=0) / math.sqrt(len(pairs))


def by_regression(game, rows, seed):
    """KernelSHAP on the rows of ``coalitions``: least squares, with scores that add up."""
    units, moved = units_of(game), game[-1] - game[0]
    kept = draw_coalitions(units, None, rows - 1, seed)[1:]  # without the empty one
    size = kept.sum(dim=1)
    # each size counts as Shapley's kernel has it, whatever was drawn of it
    weight = 1 / (size * (units - size)).double() / size.bincount(minlength=units)[size]
    centred = kept.double() - (size / units)[:, None]
    left = of_rows(game, kept) - game[0] - moved * size / units
    inverse = torch.linalg.pinv(centred.T @ (weight[:, None] * centred), rtol=1e-9)
    return moved / units + inverse @ (centred.T @ (weight * left)), None


def tried(jobs, run, seeds):
    return [[run(*job, seed) for seed in range(seeds)] for job in jobs]


def peers(jobs, python, seeds):
    """What shapiq makes of the same games and rows, in an environment of its own."""
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "games.json"
        given.write_text(json.dumps([(game.tolist(), rows, seeds) for game, rows in jobs]))
        command = [python, str(HERE / "peers" / "shapiq_peer.py"), str(given)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {
        name: [[(torch.tensor(one).double(), None) for one in some] for some in of_jobs]
        for name, of_jobs in json.loads(done.stdout.splitlines()[-1]).items()
    }


# --- the tables --------------------------------------------------------------------------------


def off(job, draws, keep=None):
    """Scores minus the exact ones [seeds, units], and the same over their errors."""
    away = torch.stack([scores for scores, _ in draws]) - exact(job[0], keep)
    if draws[0][1] is None:
        return away, None
    return away, away / torch.stack([errors for _, errors in draws])


def compared(jobs, found):
    sizes = sorted({(units_of(game), rows) for game, rows in jobs})
    for name, of_jobs in found.items():
        row = {"estimator": name}
        for size in sizes:
            ratios, within = [], []
            for job, draws, usual in zip(jobs, of_jobs, found[USUAL], strict=True):
                if (units_of(job[0]), job[1]) == size:
                    away, over = off(job, draws)
                    ratios.append((away.norm() / off(job, usual)[0].norm()).log())
                    within += [] if over is None else [(over.abs() < 1).double().mean()]
            ratio = torch.stack(ratios).mean().exp()
            told = f" ({torch.stack(within).mean():.0%})" if within else ""
            row[f"{size[0]} units, {size[1]} rows, {len(ratios)} of them"] = f"{ratio:.2f}{told}"
        yield row


def calibrated(jobs, seeds):
    for chance in KEEPS:
        draws = [
            (job, [by_coalitions(*job, seed, chance) for seed in range(seeds)]) for job in jobs
        ]
        over = torch.cat([off(job, some, chance)[1].flatten() for job, some in draws]).abs()
        yield {
            "keep": "any (Shapley)" if chance is None else chance,
            "within one": f"{(over < 1).double().mean():.0%}",
            "within two": f"{(over < 2).double().mean():.0%}",
            "root mean square": f"{over.square().mean().sqrt():.2f}",
        }


if __name__ == "__main__":
    typer.run(main)
