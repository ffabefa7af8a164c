"""Which method should be believed? All of them and their rivals, on prompts with an answer key.

Runs every method over minimal pairs of ``helpers/ground_truth.py`` that the bundled model gets
right, and keeps one tidy table, ``helpers/data/evidence.parquet``, a summary in results.md and a
figure. Every finished prompt is kept in outputs/evidence as it is made, and is not made again by
the next run: delete that folder to start over.

    python benchmarks/evidence.py                        the reporting half, 34 prompts a family
    python benchmarks/evidence.py --split tuning --per-family 4 --table /tmp/tuning.parquet
"""

import hashlib
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import pandas as pd
import torch
import typer
from captum.attr import IntegratedGradients
from tqdm import tqdm

from helpers import METHODS, Attribution, ask, attribute, load_model
from helpers.attribution import (
    baseline_embeds,
    completeness_gap,
    embed_prompt,
    fixed_step_integrated_gradients,
    objective,
    rows_per_batch,
)
from helpers.faithfulness import (
    EVIDENCE,
    against_random,
    by_method,
    randomisation,
    rank_correlation,
)
from helpers.ground_truth import (
    FAMILIES,
    cases,
    evidence_positions,
    random_reciprocal_rank,
    reciprocal_rank,
    solved,
)
from helpers.patching import causal_scores, patch_positions

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts, not a package
from report import keep, table, with_interval

KEPT = Path(__file__).parents[1] / "outputs" / "evidence"
FIGURE = Path(__file__).parents[1] / "docs" / "evidence.png"
GUIDE, CAPTUM = "guide's IG norm", "Captum's IG"
# Integrated gradients to 5 % and not 2 %, and to a budget: they are most of the time as it is.
IG = "integrated_gradients"
OPTIONS = {"integrated_gradients": {"tolerance": 0.05, "max_evaluations": 129}}
# The costlier experiments run on the first prompts of each family.
REPLACED, PATCHED, STABLE, RANDOMISED = 6, 6, 2, 2
CLOSED = 8  # prompts of each family on which integrated gradients may spend what they ask for
RANDOM_ORDERS = 5
SHORTER = {"integrated_gradients": {"max_evaluations": 65}, "shapley": {"permutations": 8}}
DEPTHS = (1, 5, 15, 30)  # layers re-initialised, from the top
BEGINNING = "Read this: "
REPLACEMENTS = ("mean", "eos", "neighbour")  # of erased tokens


# --- who is compared ---------------------------------------------------------------------------


def guides_norm(model, question, n_steps=50):
    """The guide's integrated gradients: from end-of-text, the norm over the hidden dimension."""
    embeds, start = embed_prompt(model, question), baseline_embeds(model, question, "eos")
    per_feature = IntegratedGradients(lambda rows: objective(model, rows, question)).attribute(
        embeds,
        baselines=start,
        n_steps=n_steps,
        internal_batch_size=rows_per_batch(embeds.shape[1]),
    )  # [1, seq, dim]
    with torch.inference_mode():
        end, begin = objective(model, torch.cat([embeds, start]), question)
    scores = per_feature.norm(dim=-1)[0].detach().float()
    gap = completeness_gap(scores, end - begin)
    return Attribution(
        scores, question.units, gap=gap, evaluations=n_steps, forwards=2, signed=False
    )


def captums_default(model, question):
    """Captum's integrated gradients with its defaults: from zero, 50 steps, Gauss-Legendre."""
    return fixed_step_integrated_gradients(model, question, baseline="zero")


def first_token(model, question):
    return Attribution(-torch.arange(float(len(question.units))), question.units)


def last_token(model, question):
    return Attribution(torch.arange(float(len(question.units))), question.units)


RIVALS = {
    GUIDE: guides_norm,
    CAPTUM: captums_default,
    "first token": first_token,
    "last token": last_token,
}
VARIANTS = {
    "attention_rollout, no sink": ("attention_rollout", {"sink": False}),
    "relevance, CP-LRP": ("relevance", {"through_attention": False}),
}


def everyone(model, question, seed):
    """``{name: Attribution}`` of every method, variant and rival."""
    found = {}
    for name in METHODS:
        options = {"seed": seed} if name == "random" else OPTIONS.get(name, {})
        found[name] = attribute(model, question, name, **options)
    for name, (method, options) in VARIANTS.items():
        found[name] = attribute(model, question, method, **options)
    for name, rival in RIVALS.items():
        found[name] = rival(model, question)
        found[name] = replace(found[name], scores=found[name].scores.cpu(), method=name)
    return found


# --- one prompt --------------------------------------------------------------------------------


def measure(case, number):
    """All that is measured on one prompt: rows ``(method, replacement, measure, value)``."""
    model, tokenizer = WORKER["model"], WORKER["tokenizer"]
    ((_, question, other),) = solved(model, tokenizer, [case])
    results = everyone(model, question, seed=number)
    rows = [*ground_truth(question, other, results), *costs(results)]
    for replacement in REPLACEMENTS if number < REPLACED else ("mean",):
        found = against_random(
            model, question, results, count=RANDOM_ORDERS, seed=number, replacement=replacement
        )
        rows += [
            (name, replacement, what, value)
            for name, some in found.iterrows()
            for what, value in some.items()
        ]
    if number < PATCHED:
        rows += causes(model, question, other, results)
    if number < STABLE:
        rows += stability(model, tokenizer, case, question, results)
    if number < RANDOMISED:
        rows += notices(model, question)
    return len(question.labels), rows


def measure_closed(case, number):
    """Integrated gradients with their own tolerance and budget: is it the budget that they lack?"""
    model, tokenizer = WORKER["model"], WORKER["tokenizer"]
    ((_, question, other),) = solved(model, tokenizer, [case])
    results = {f"{IG}, closed": attribute(model, question, IG)}
    found = against_random(model, question, results, count=RANDOM_ORDERS, seed=number)
    rows = [
        (n, "mean", what, value) for n, some in found.iterrows() for what, value in some.items()
    ]
    rows += [*ground_truth(question, other, results), *costs(results)]
    return len(question.labels), rows


def ground_truth(question, other, results):
    positions = evidence_positions(question, other)
    chance = random_reciprocal_rank(len(question.labels), len(positions))
    for name, result in results.items():
        found = reciprocal_rank(result.scores, positions, result.signed)
        yield name, "", "reciprocal_rank", found
        yield name, "", "top1", float(found == 1)
        yield name, "", "chance_reciprocal_rank", chance


def costs(results):
    for name, result in results.items():
        yield name, "", "evaluations", result.evaluations
        yield name, "", "forwards", result.forwards
        if result.seconds:
            yield name, "", "seconds", result.seconds
        if result.gap is not None:
            yield name, "", "gap", result.gap
        if result.closed is not None:
            yield name, "", "closed", float(result.closed)


def causes(model, question, other, results):
    """How the scores agree with what patching finds, over the layers and at the embeddings."""
    patched = patch_positions(model, question, other)
    causal = causal_scores(patched.effects)
    for name, result in results.items():
        scores = result.scores if result.signed else result.scores.abs()
        yield name, "", "causal_rank_correlation", rank_correlation(scores, causal)
        yield name, "", "causal_top1", float(scores.argmax() == causal.argmax())


def stability(model, tokenizer, case, question, results):
    """Rank correlation of the scores with those of a run that differs in what should not matter."""
    ids = {"target_ids": question.target, "foil_ids": question.foil}
    longer = ask(model, tokenizer, BEGINNING + case.prompt, **ids)
    shared = len(question.labels) - 1  # the first token has no space before it
    assert torch.equal(longer.input_ids[0, -shared:], question.input_ids[0, 1:])
    for name in METHODS:
        if name == "random":
            continue  # stable or not as its seed is
        options, scores = OPTIONS.get(name, {}), results[name].scores
        half = attribute(model, question, name, precision="bfloat16", **options).scores
        yield name, "", "stability_bfloat16", rank_correlation(scores, half)
        after = attribute(model, longer, name, **options).scores[-shared:]
        yield name, "", "stability_beginning", rank_correlation(scores[1:], after)
        if name == "shapley":
            again = attribute(model, question, name, seed=1000, **options).scores
            yield name, "", "stability_seed", rank_correlation(scores, again)


def notices(model, question):
    """Whether the scores change with the model: see ``randomisation``."""
    for name in METHODS:
        found = randomisation(model, question, name, DEPTHS, **SHORTER.get(name, {}))
        for depth, value in zip(DEPTHS, found, strict=True):
            yield name, "", f"randomised_{depth}", value


# --- all prompts -------------------------------------------------------------------------------

WORKER = {}


def start_worker():
    torch.set_num_threads(1)
    WORKER["model"], WORKER["tokenizer"] = load_model()


def part_of(split, family, number, case, closed=False):
    """The file that keeps what was measured on one prompt; another prompt has another file."""
    digest = hashlib.sha256(repr((case, OPTIONS, sorted(METHODS))).encode()).hexdigest()[:12]
    return KEPT / f"{'closed-' * closed}{split}-{family}-{number:03d}-{digest}.parquet"


def run_one(split, family, number, case, closed=False):
    path = part_of(split, family, number, case, closed)
    tokens, rows = measure_closed(case, number) if closed else measure(case, number)
    frame = pd.DataFrame(rows, columns=["method", "replacement", "measure", "value"])
    where = {"split": split, "family": family, "case": number, "tokens": tokens}
    frame = frame.assign(value=frame["value"].astype(float), **where)
    write_whole(frame, path)
    return path


def write_whole(frame, path):
    """Write beside ``path`` and rename, so that a killed run leaves no half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    frame.to_parquet(name, index=False)
    Path(name).chmod(0o644)
    Path(name).replace(path)


def main(
    split: Annotated[str, typer.Option(help="tuning or reporting")] = "reporting",
    per_family: Annotated[int, typer.Option(help="prompts of each family")] = 34,
    workers: Annotated[int, typer.Option(help="processes, one thread each")] = os.cpu_count(),
    out: Annotated[Path, typer.Option("--table", help="the table that is written")] = EVIDENCE,
):
    """Measure what has not been measured yet, then write the table, the summary and the figure."""
    start_worker()
    wanted = []
    for family in FAMILIES:
        some = islice(
            solved(WORKER["model"], WORKER["tokenizer"], cases(family, split)), per_family
        )
        wanted += [(split, family, number, case) for number, (case, _, _) in enumerate(some)]
    wanted += [(*job, True) for job in wanted if job[2] < CLOSED]
    # the costlier first prompts of each family go first, so that no worker ends with them alone
    wanted.sort(key=lambda job: job[2])
    missing = [job for job in wanted if not part_of(*job).exists()]
    print(f"{len(wanted)} runs, {len(missing)} to do.", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start_worker) as pool:
        running = [pool.submit(run_one, *job) for job in missing]
        for done in tqdm(as_completed(running), total=len(running), disable=None):
            done.result()
    found = pd.concat([pd.read_parquet(part_of(*job)) for job in wanted], ignore_index=True)
    order = ["split", "family", "case", "tokens", "method", "replacement", "measure", "value"]
    found = found[order].sort_values(["family", "case"], kind="stable", ignore_index=True)
    words = ["split", "family", "method", "replacement", "measure"]
    found = found.astype(dict.fromkeys(words, "category"))
    write_whole(found, out)
    print(summary(found))
    if out == EVIDENCE:
        text = f"{workers} processes of one thread each.\n\n{summary(found)}"
        keep("evidence", "Which method to believe", text)
        draw(found).savefig(FIGURE, dpi=110, bbox_inches="tight", metadata={"Software": None})


# --- the summary -------------------------------------------------------------------------------


COLUMNS = {
    "reciprocal rank of the evidence": ("reciprocal_rank", ""),
    "insertion - deletion, nats": ("faithfulness", "mean"),
    "the same, from end-of-text": ("faithfulness", "eos"),
    "the same, from the neighbour": ("faithfulness", "neighbour"),
    "names the token that patching finds": ("causal_top1", ""),
    "rank agreement with patching": ("causal_rank_correlation", ""),
}


def summary(found):
    best = by_method(found, "reciprocal_rank").index
    columns = {
        title: by_method(found, what, replacement=erased)
        for title, (what, erased) in COLUMNS.items()
    }
    counts = found.pivot_table("value", "method", "measure", "mean", observed=True)
    rows = []
    for name in best:
        row = {"method": name}
        for title, some in columns.items():
            row[title] = with_interval(some.loc[name]) if name in some.index else ""
        row["gradients"] = f"{counts.loc[name, 'evaluations']:.0f}"
        row["forward rows"] = f"{counts.loc[name, 'forwards']:.0f}"
        seconds = counts["seconds"].get(name)
        row["seconds"] = "" if pd.isna(seconds) else f"{seconds:.2f}"
        rows.append(row)
    each = found.groupby(["family", "case"], observed=True)["tokens"].first()
    family = each.groupby("family", observed=True).size()
    chance = found[found["measure"] == "chance_reciprocal_rank"]["value"].mean()
    text = [
        f"{len(each)} prompts of the {found['split'].iloc[0]} half, {family.min()} to "
        f"{family.max()} a family, {each.median():.0f} tokens in the median. Means with 95 % "
        "bootstrap intervals over minimal pairs.",
        table(rows),
        f"A random order has the evidence at a reciprocal rank of {chance:.2f} on average. "
        "Beware of the rank agreement with patching: in later layers every answer is at the last "
        "position, so knowing nothing but that (last token) agrees well.",
        "Reciprocal rank of the evidence by family:",
        table(
            [
                {"method": name}
                | {
                    family: with_interval(by_method(found, "reciprocal_rank", family).loc[name])
                    for family in FAMILIES
                }
                for name in best
            ]
        ),
        "Rank correlation of scores with themselves: layers re-initialised from the top, and runs "
        "that should not matter (half precision, other words before the prompt, another seed).",
        table(
            [
                {"method": name}
                | {
                    what: with_interval(some.loc[name]) if name in some.index else ""
                    for what, some in changed(found).items()
                }
                for name in METHODS
            ]
        ),
    ]
    return "\n\n".join(text)


def changed(found):
    measures = [
        *(f"randomised_{depth}" for depth in DEPTHS),
        "stability_bfloat16",
        "stability_beginning",
        "stability_seed",
    ]
    return {measure: by_method(found, measure) for measure in measures}


def draw(found):
    """Methods by ground truth, by faithfulness and by cost, in one order, with intervals."""
    order = by_method(found, "reciprocal_rank").index[::-1]
    fig, axes = plt.subplots(1, 3, figsize=(12, 5), layout="constrained", sharey=True)
    chance = found[found["measure"] == "chance_reciprocal_rank"]["value"].mean()
    dots(axes[0], by_method(found, "reciprocal_rank").loc[order], "o")
    axes[0].axvline(chance, color="0.3", linestyle=":")
    axes[0].set(xlabel="reciprocal rank of the word that decides", xlim=(0, 1))
    axes[0].set_yticks(range(len(order)), order)
    for shift, marker, erased in ((0, "o", "mean"), (-0.2, "s", "eos"), (-0.4, "d", "neighbour")):
        some = by_method(found, "faithfulness", replacement=erased).reindex(order)
        dots(axes[1], some, marker, shift, label=f"erased: {erased}")
    axes[1].axvline(0, color="0.3", linestyle=":")
    axes[1].set(xlabel="insertion minus deletion (nats)")
    axes[1].legend(fontsize=8, loc="lower right")
    cost = 2 * by_method(found, "evaluations")["mean"] + by_method(found, "forwards")["mean"]
    axes[2].barh(range(len(order)), cost[order], color="0.6")
    axes[2].set(xscale="log", xlabel="rows through the model; a gradient counts twice")
    axes[0].set_title("Finds the word (dotted: chance)", fontsize=10)
    axes[1].set_title("Erasing bears it out (dotted: chance)", fontsize=10)
    axes[2].set_title("Cost", fontsize=10)
    for label in axes[0].get_yticklabels():
        rival = label.get_text() in RIVALS or label.get_text() == "random"
        label.set_fontstyle("italic" if rival else "normal")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return fig


def dots(ax, rows, marker, shift=0.0, label=None):
    spread = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
    places = [place + shift for place in range(len(rows))]
    ax.errorbar(rows["mean"], places, xerr=spread, fmt=marker, ms=4, capsize=2, label=label)


if __name__ == "__main__":
    typer.run(main)
