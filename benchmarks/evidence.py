"""Which method should be believed? All of them and their rivals, on prompts with an answer key.

Runs every method over minimal pairs of ``helpers/ground_truth.py`` that a model gets right, and
writes into a folder one tidy table, evidence.parquet, a page that says who wins, verdict.md, and a
figure, evidence.png. Of the bundled model's reporting half the table that the notebooks read, the
section of results.md, README's table and docs/evidence.png are written too. Every finished prompt
is kept in outputs/evidence/parts as it is made, and is not made again by the next run: delete that
folder to start over.

    python benchmarks/evidence.py                        the bundled model
    python benchmarks/evidence.py --model model.gguf     one's own; a hub name or a folder works too
    python benchmarks/evidence.py --split tuning --per-family 4
"""

import hashlib
import inspect
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import torch
import typer
from captum.attr import IntegratedGradients
from matplotlib.ticker import MultipleLocator, NullFormatter
from tqdm import tqdm

import helpers.plots  # noqa: F401, for the style of figures
from helpers import METHODS, Attribution, InputError, ask, attribute, load_model
from helpers.architectures import stack_of
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
    best_by_interval,
    by_method,
    erasure_curves,
    erasure_limit,
    erasure_measures,
    evidence_table,
    importance_order,
    randomisation,
    rank_correlation,
)
from helpers.ground_truth import (
    FAMILIES,
    LONGER,
    Case,
    cases,
    evidence_units,
    random_reciprocal_rank,
    reciprocal_rank,
    solved,
)
from helpers.machine import free_memory
from helpers.model_folders import public_name
from helpers.models import BUNDLED, weights_digest
from helpers.patching import causal_scores, patch_positions

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts, not a package
from compared import RELEVANCE
from report import command, digest_of, keep, table, with_interval

ROOT = Path(__file__).parents[1]
OUTPUTS = ROOT / "outputs" / "evidence"
KEPT = OUTPUTS / "parts"
FIGURE, README = ROOT / "docs" / "evidence.png", ROOT / "README.md"
PROMPTS = dict.fromkeys(FAMILIES, 22) | dict.fromkeys(LONGER, 6) | {"long_fact": 4}  # whole pairs
CANDIDATES = 4  # for each prompt that is wanted, so that a weak model comes to an end
FEWEST = 4  # solved prompts of a family that are worth a mean
UNITS = dict.fromkeys(("long_fact", "chat"), "sentences")  # else tokens, or passages
# On the first prompts of each short family: the costliest methods, patching, and all replacements.
SUBSET = 2
REPEATED = 1  # of these prompts are asked again and again, to see what scores depend on
USUAL, CAPTUM = "usual IG norm", "Captum's IG"
IG = "integrated_gradients"
COSTLY = (IG, USUAL, CAPTUM)
GRADIENTS = 513  # that integrated gradients may spend; a few prompts ask for more
SHAPLEY, FEWER_SHAPLEY = 96, 24  # rows on prompts of short families, and of longer ones
BANZHAF, FEWER_BANZHAF = 40, 16
MARKED_ONLY = ("long_fact",)  # 200 tokens: erasing there would take as long as the short families
EXACT = 8  # units of which all subsets are run
STEPS = 4  # in which the units of a longer prompt go, where there are more than EXACT
BEGINNING = "Read this: "
REPLACEMENTS = ("mean", "eos", "neighbour")  # of erased units


# --- who is compared ---------------------------------------------------------------------------


def usual_norm(model, question, n_steps=50):
    """The usual integrated gradients: from end-of-text, the norm over the hidden dimension."""
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
    USUAL: usual_norm,
    CAPTUM: captums_default,
    "first token": first_token,
    "last token": last_token,
}


def runs(units: int, short: bool = True) -> dict[str, tuple[str, dict[str, Any]]]:
    """``{name: (method, options)}`` of every method and variant, for a prompt of so many units.

    Where it is not ``short`` a row is dear, and fewer are run.
    """
    rows, drawn = (SHAPLEY, BANZHAF) if short else (FEWER_SHAPLEY, FEWER_BANZHAF)
    orders = -(-(rows - 1) // max(1, units - 1))  # each is units - 1 rows, beside the empty one
    options = {
        IG: {"max_evaluations": GRADIENTS},
        "shapley": {"permutations": max(4, orders + orders % 2)},
        "coalitions": {"rows": max(drawn, 2 * units + 1)},
    }
    return (
        {name: (name, options.get(name, {})) for name in METHODS}
        | {"attention_rollout, no sink": ("attention_rollout", {"sink": False})}
        | RELEVANCE
    )


def refusals(model: Any) -> dict[str, str]:
    """``{name: sentence}`` of the methods and variants that do not fit this model."""
    said = {name: METHODS[method].refusal(model) for name, (method, _) in runs(1).items()}
    if gradients := METHODS[IG].refusal(model):
        said |= dict.fromkeys((USUAL, CAPTUM), gradients)
    return {name: sentence for name, sentence in said.items() if sentence}


def everyone(
    model: Any, question: Any, seed: int, short: bool, out: set[str]
) -> tuple[dict[str, Attribution], list[str]]:
    """``{name: Attribution}`` of all but ``out``, and who refused this very prompt."""
    found, refused = {}, []
    for name, (method, options) in runs(len(question.units), short).items():
        if name in out:
            continue
        seeded = {"seed": seed} if name == "random" else {}
        try:
            found[name] = attribute(model, question, method, **options, **seeded)
        except InputError as error:
            print(f"{name}: {error}", file=sys.stderr)
            refused.append(name)
    for name in (name for name in RIVALS if name not in out):
        result = RIVALS[name](model, question)
        found[name] = replace(result, scores=result.scores.cpu(), method=name)
    return found, refused


# --- one prompt --------------------------------------------------------------------------------


def measure(case: Case, number: int, more: bool) -> tuple[int, int, list[tuple]]:
    """All that is measured on one prompt: ``(tokens, units, rows)``.

    ``number`` is its place in its family, ``more`` whether the costliest methods and the
    experiments beside marks and erasing are run on it, too. A row is ``(method, replacement,
    measure, value)``.
    """
    model, tokenizer = WORKER["model"], WORKER["tokenizer"]
    way = {"units": UNITS.get(case.family)}
    question = ask(model, tokenizer, **case.asked(tokenizer, **way))
    other = ask(model, tokenizer, **case.asked(tokenizer, counterfactual=True, **way))
    short = case.family in FAMILIES
    out = set(refusals(model)) | (set() if more else set(COSTLY))
    erased = () if case.family in MARKED_ONLY else REPLACEMENTS if more else ("mean",)
    limits, given = {}, {}
    if erased and len(question.units) <= EXACT:
        started = time.perf_counter()
        limits = {"mean": erasure_limit(model, question, "mean")}
        seconds = time.perf_counter() - started
        if short:  # the method takes sentences and passages out, and what is erased here stays
            given["shapley"] = exact_shapley(question, limits["mean"], seconds)
        limits |= {name: erasure_limit(model, question, name) for name in erased[1:]}
    results, refused = everyone(model, question, number, short, out | set(given))
    results |= given
    rows = [(name, "", "refused", 1.0) for name in refused]
    rows += [*ground_truth(question, other, results), *costs(results)]
    rows += erasing(model, question, results, erased, limits, None if short else STEPS)
    experiments = []
    if more:
        experiments = [causes(model, question, other, results)]
    if more and number < REPEATED:
        experiments += [
            stability(model, tokenizer, case, question, results),
            notices(model, question, results),
        ]
    for experiment in experiments:
        try:
            rows += list(experiment)
        except InputError as error:  # such as a pair that can hardly be told apart
            print(f"{case.family} {number}: {error}", file=sys.stderr)
    return question.input_ids.shape[1], len(question.units), rows


def ground_truth(question, other, results):
    units = evidence_units(question, other)
    chance = random_reciprocal_rank(len(question.units), len(units))
    for name, result in results.items():
        found = reciprocal_rank(result.scores, units, result.signed)
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


def exact_shapley(question, limit, seconds):
    """Shapley values from the subsets that the best order was searched in."""
    return Attribution(
        limit.shapley(),
        question.units,
        forwards=limit.forwards,
        seconds=seconds,
        method="shapley",
    )


def erasing(model, question, results, replacements, limits, steps):
    """What erasing says of each order, and its share of the best one where units are few."""
    orders = {name: importance_order(result) for name, result in results.items()}
    for replacement in replacements:
        if limit := limits.get(replacement):
            values = [limit.faithfulness(order) for order in orders.values()]
        else:
            every = torch.stack(list(orders.values()))
            curves = erasure_curves(model, question, every, replacement, steps)
            values = erasure_measures(curves)["faithfulness"].tolist()
        for name, value in zip(orders, values, strict=True):
            yield name, replacement, "faithfulness", value
            if limit and replacement == "mean":
                yield name, replacement, "share", limit.share(value)


def causes(model, question, other, results):
    """How the scores agree with what patching finds, over the layers and at the embeddings."""
    patched = patch_positions(model, question, other)
    causal = causal_scores(patched.effects)
    for name, result in results.items():
        scores = result.scores if result.signed else result.scores.abs()
        yield name, "", "causal_rank_correlation", rank_correlation(scores, causal)
        yield name, "", "causal_top1", float(scores.argmax() == causal.argmax())


def shorter(results):
    """``{name: options}`` of the methods that ran, to be run many times: without the costliest."""
    cut = {"shapley": {"permutations": 4}, "coalitions": {"rows": BANZHAF}}
    return {name: cut.get(name, {}) for name in METHODS if name in results and name not in COSTLY}


def stability(model, tokenizer, case, question, results):
    """Rank correlation of the scores with those of a run that differs in what should not matter."""
    ids = {"target_ids": question.target, "foil_ids": question.foil}
    longer = ask(model, tokenizer, BEGINNING + case.prompt, **ids)
    seq = len(question.units)
    same = longer.input_ids[0, -seq:] == question.input_ids[0]  # the first has no space before it
    shared = int(same.flip(0).long().cumprod(0).sum())
    for name, options in shorter(results).items():
        if name == "random":
            continue  # stable or not as its seed is
        scores = attribute(model, question, name, **options).scores
        half = attribute(model, question, name, precision="bfloat16", **options).scores
        yield name, "", "stability_bfloat16", rank_correlation(scores, half)
        if shared >= 3:
            after = attribute(model, longer, name, **options).scores[-shared:]
            yield name, "", "stability_beginning", rank_correlation(scores[-shared:], after)
        if name == "shapley":
            again = attribute(model, question, name, seed=1000, **options).scores
            yield name, "", "stability_seed", rank_correlation(scores, again)


def notices(model, question, results):
    """Rank correlation of the scores with themselves after layers are re-initialised."""
    changed = randomisation(model, question, shorter(results), depths(model))
    for name, found in changed.items():
        for depth, value in zip(depths(model), found, strict=True):
            yield name, "", f"randomised_{depth}", value


def depths(model):
    """How many layers are re-initialised, from the top: one, half of them, all."""
    layers = len(stack_of(model).layers)
    return sorted({1, max(1, layers // 2), layers})


# --- all prompts -------------------------------------------------------------------------------

WORKER: dict[str, Any] = {}


class Job(NamedTuple):
    """One prompt to be measured: ``number`` is its place among those of its family."""

    weights: str  # SHA-256
    split: str
    family: str
    number: int
    case: Case
    more: bool  # the costliest methods and experiments are run on it, too


@dataclass(frozen=True)
class Chosen:
    """The first prompts of a family that the model gets right, of so many that were tried."""

    cases: list[Case]
    tried: int
    fault: str = ""  # why none could be asked


def start_worker(model: str, threads: int) -> None:
    torch.set_num_threads(threads)
    WORKER["model"], WORKER["tokenizer"] = load_model(model)


def chosen(split: str, per_family: int | None = None) -> dict[str, Chosen]:
    """The prompts of each family, whole pairs.

    Raises ``InputError`` where none of the short ones is solved, before the longer ones are tried.
    """
    found: dict[str, Chosen] = {}
    for family in (*FAMILIES, *LONGER):
        if family in LONGER and not any(some.cases for some in found.values()):
            break
        wanted = PROMPTS[family] if per_family is None else per_family + per_family % 2
        candidates = cases(family, split)[: CANDIDATES * max(wanted, 16)]
        right = solved(WORKER["model"], WORKER["tokenizer"], candidates, UNITS.get(family))
        try:
            some = [case for case, *_ in islice(right, wanted)]
        except InputError as error:  # such as a chat without a template
            found[family] = Chosen([], 0, str(error))
            continue
        enough = len(some) == wanted
        tried = candidates.index(some[-1]) + 1 if enough else len(candidates)
        found[family] = Chosen(some if len(some) >= min(FEWEST, wanted) else [], tried)
    if not any(some.cases for some in found.values()):
        tried = sum(some.tried for some in found.values())
        raise InputError(
            f"Of {tried} pairs of short sentences this model gets fewer than {FEWEST} of a kind "
            "right, so no method can be marked on it: take a larger one, or one that knows English."
        )
    return found


def part_of(job: Job) -> Path:
    """The file that keeps what was measured on one prompt; another prompt has another file."""
    methods = [(name, str(inspect.signature(METHODS[name].run))) for name in sorted(METHODS)]
    options = [runs(units, short) for units in (EXACT, 4 * EXACT) for short in (True, False)]
    facts = repr((job, methods, options, UNITS, STEPS, MARKED_ONLY))
    digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
    return KEPT / f"{job.split}-{job.family}-{job.number:03d}-{digest}.parquet"


def run_one(job: Job) -> Path:
    tokens, units, rows = measure(job.case, job.number, job.more)
    frame = pd.DataFrame(rows, columns=["method", "replacement", "measure", "value"])
    where = {"split": job.split, "family": job.family, "case": job.number}
    where |= {"tokens": tokens, "units": units}
    write_whole(frame.assign(value=frame["value"].astype(float), **where), part_of(job))
    return part_of(job)


def write_whole(frame, path):
    """Write beside ``path`` and rename, so that a killed run leaves no half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    frame.to_parquet(name, index=False)
    Path(name).chmod(0o644)
    Path(name).replace(path)


def run_all(jobs: list[Job], model: str, workers: int) -> None:
    """Measure what has not been measured yet; costlier prompts first, so that none ends alone."""
    missing = [job for job in jobs if not part_of(job).exists()]
    missing.sort(key=lambda job: (job.family in FAMILIES and not job.more, job.number))
    print(f"{len(jobs)} prompts, {len(missing)} to do, {workers} at a time.", flush=True)
    if workers == 1:
        for job in tqdm(missing, disable=None):
            run_one(job)
    elif missing:
        WORKER.clear()  # each process loads its own
        threads = max(1, (os.cpu_count() or 1) // workers)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, start_worker, (model, threads)) as pool:
            running = [pool.submit(run_one, job) for job in missing]
            for done in tqdm(as_completed(running), total=len(running), disable=None):
                done.result()


def processes(model: Any) -> int:
    """How many models are run at once: one a core and no more than fit, or one on a GPU."""
    if model.device.type != "cpu":
        return 1
    size = 1.5 * sum(weight.nbytes for weight in model.parameters())  # and what a run takes
    fit = int((free_memory(model.device) + size) / size)  # the one that is loaded goes
    return max(1, min(os.cpu_count() or 1, fit))


def main(
    model: Annotated[str, typer.Option(help="Hub name, folder or .gguf.")] = BUNDLED,
    out: Annotated[
        Path | None, typer.Option(help="Folder; outputs/evidence/<name of the model> by default.")
    ] = None,
    per_family: Annotated[
        int | None, typer.Option(min=2, help="Prompts of each family; 24, 8 or 6 by default.")
    ] = None,
    subset: Annotated[
        int, typer.Option(min=0, help="Prompts of each short family for the costliest methods.")
    ] = SUBSET,
    split: Annotated[str, typer.Option(help="tuning or reporting")] = "reporting",
    section: Annotated[
        bool, typer.Option("--section", help="Keep a section of results.md, too.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; one a core by default.")
    ] = None,
) -> None:
    """Measure what has not been measured yet, then write the table, the verdict and the figure."""
    name = public_name(model)
    weights = weights_digest(model)
    start_worker(model, os.cpu_count() or 1)
    workers = workers or processes(WORKER["model"])
    refused = refusals(WORKER["model"])
    found = chosen(split, per_family)
    jobs = [
        Job(weights, split, family, number, case, family in FAMILIES and number < subset)
        for family, some in found.items()
        for number, case in enumerate(some.cases)
    ]
    run_all(jobs, model, workers)
    rows = table_of(jobs)
    folder = out or OUTPUTS / (name.replace("/", "--") + f"-{split}" * (split != "reporting"))
    write_whole(rows, folder / "evidence.parquet")
    page = verdict(rows, f"{name}, SHA-256 {digest_of(model)}", found, refused)
    (folder / "verdict.md").write_text(page + "\n", encoding="utf-8")
    save(draw(rows), folder / "evidence.png")
    print(f"{page}\n\nIn {folder}: verdict.md, evidence.parquet, evidence.png")
    if section:
        text = f"`{name}`, SHA-256 {digest_of(model)}.\n\n{another(rows)}"
        keep("evidence_of_another", "Which method to believe on another model", text)
    if (model, split, per_family, subset) == (BUNDLED, "reporting", None, SUBSET):
        write_whole(rows, EVIDENCE)
        save(draw(rows), FIGURE)
        text = f"{workers} processes.\n\n{summary(rows)}"
        keep("evidence", "Which method to believe", text)
        between(README, "evidence", readme(rows))


def table_of(jobs):
    """What was measured on all prompts, as it is kept."""
    found = pd.concat([pd.read_parquet(part_of(job)) for job in jobs], ignore_index=True)
    order = ["split", "family", "case", "tokens", "units"]
    order += ["method", "replacement", "measure", "value"]
    found = found[order].sort_values(["family", "case"], kind="stable", ignore_index=True)
    words = ["split", "family", "method", "replacement", "measure"]
    return found.astype(dict.fromkeys(words, "category"))


def save(fig, path):
    fig.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(fig)


# --- what it says ------------------------------------------------------------------------------

MARK = "reciprocal rank of the evidence"
ERASING = "insertion - deletion, nats"
SHARE = "share of the best order"
COLUMNS = {
    MARK: ("reciprocal_rank", ""),
    ERASING: ("faithfulness", "mean"),
    SHARE: ("share", "mean"),
}
MORE_COLUMNS = {
    "insertion - deletion from end-of-text": ("faithfulness", "eos"),
    "the same from the neighbour": ("faithfulness", "neighbour"),
    "names the token that patching finds": ("causal_top1", ""),
    "rank agreement with patching": ("causal_rank_correlation", ""),
}
PASSES = "Who finds it for a pass or two?"
QUESTIONS = {
    "Who finds the word that decides?": (MARK, "mean reciprocal rank"),
    PASSES: (MARK, "mean reciprocal rank"),
    "Who predicts what erasing does?": (ERASING, "insertion minus deletion, nats"),
    "Who comes near the best order?": (SHARE, "share of the best order"),
}


def answers(found: pd.DataFrame) -> dict[str, str]:
    """``{question: sentence}`` of all ``QUESTIONS``."""
    counts = found.pivot_table("value", "method", "measure", "mean", observed=True)
    few = counts.index[(counts["evaluations"] <= 1) & (counts["forwards"] <= 1)]
    only = {PASSES: found[found["method"].isin(few)]}
    return {title: winner(only.get(title, found), *which) for title, which in QUESTIONS.items()}


def winner(found: pd.DataFrame, column: str, unit: str) -> str:
    """A sentence: who wins by its interval, and by how much, or that nobody does."""
    what, replacement = COLUMNS[column]
    some = by_method(found, what, replacement=replacement)
    if some.empty:
        return "This was measured on no prompt."
    best = best_by_interval(found, what, replacement=replacement)
    own = f"`{best.method}`, {with_interval(some.loc[best.method])} {unit}"
    few = best.leads["low"].isna()
    if few.all():
        return f"{own}, is first, but on too few prompts to name a winner."
    if set(best.alike) == set(few.index[few]):
        name = best.leads.index[~few][0]
        left = "".join(f" `{other}` ran on too few prompts to be compared." for other in best.alike)
        return f"{own}, is ahead of every other method, of `{name}` by {_lead(best, name)}.{left}"
    names = "; ".join(f"`{name}` ({_lead(best, name)})" for name in best.alike)
    return f"No winner: {own}, is first, and its lead is not certain over {names}."


def _lead(best, name):
    row = best.leads.loc[name]
    band = "too few prompts" if pd.isna(row["low"]) else f"{row['low']:.2f} to {row['high']:.2f}"
    return f"{row['mean']:.2f}, {band}"


def methods_table(found, columns):
    """A row a method, the best at finding the word first: marks with intervals, and costs."""
    marks = {
        title: by_method(found, what, replacement=erased)
        for title, (what, erased) in columns.items()
    }
    counts = found.pivot_table("value", "method", "measure", "mean", observed=True)
    rows = []
    for name, first in marks[MARK].iterrows():
        row = {"method": name, "prompts": f"{first['prompts']:.0f}"}
        for title, some in marks.items():
            row[title] = with_interval(some.loc[name]) if name in some.index else ""
        row["gradients"] = f"{counts.loc[name, 'evaluations']:.0f}"
        row["forward rows"] = f"{counts.loc[name, 'forwards']:.0f}"
        seconds = counts["seconds"].get(name) if "seconds" in counts else None
        row["seconds"] = "" if pd.isna(seconds) else f"{seconds:.2f}"
        rows.append(row)
    return table(rows)


def about_prompts(found):
    """What the numbers are of."""
    each = found.groupby(["family", "case"], observed=True)[["tokens", "units"]].first()
    searched = found[found["measure"] == "share"].groupby(["family", "case"], observed=True).ngroups
    chance = found[found["measure"] == "chance_reciprocal_rank"]["value"].mean()
    costly = found[found["method"].isin(COSTLY)].groupby(["family", "case"], observed=True).ngroups
    return (
        f"{len(each)} prompts of the {found['split'].iloc[0]} half, {each['tokens'].min()} to "
        f"{each['tokens'].max()} tokens, each with one word that decides between two answers; a "
        "score is a token's, a sentence's (`chat`, `long_fact`) or a passage's (`passages`). Means "
        "with 95 % bootstrap intervals over minimal pairs. A random order has the evidence at a "
        f"reciprocal rank of {chance:.2f} on average, and insertion minus deletion at 0. Erased "
        f"units become the mean embedding, one by one, or in {STEPS} steps where a longer prompt "
        f"has more than {EXACT}; in `{', '.join(MARKED_ONLY)}`, the longest, nothing is erased. "
        f"The best order was searched on the {searched} prompts of at most {EXACT} units. Shapley "
        f"values are of all subsets on short sentences of at most {EXACT} tokens, on others of "
        f"about {SHAPLEY} rows, and on longer texts of {FEWER_SHAPLEY}, or four orders; those of "
        f"`coalitions`, Banzhaf values, of {BANZHAF} and {FEWER_BANZHAF} rows. Integrated "
        f"gradients (to 2 % or {GRADIENTS} gradients), the usual ones and Captum's ran on {costly} "
        "prompts of the short families, the first of each, so their means are not to be compared "
        "with those of others: a lead is over the prompts that both methods ran on."
    )


def verdict(found: pd.DataFrame, about: str, families: dict[str, Chosen], refused: dict) -> str:
    """One page about a model: who wins, by how much, and what to be careful of."""
    rows = []
    for family, some in families.items():
        few = f"fewer than {FEWEST} of {some.tried}: left out"
        told = f"{len(some.cases)} of {some.tried}" if some.cases else some.fault or few
        best = ""
        if some.cases:
            first = best_by_interval(found, "reciprocal_rank", family).method
            row = by_method(found, "reciprocal_rank", family).loc[first]
            best = f"`{first}`, {with_interval(row)}"
        rows.append({"prompts": family, "solved, of so many tried": told, "finds the word": best})
    times = found[found["measure"] == "refused"].groupby("method", observed=True)["value"].count()
    careful = [
        "The deciding word made the difference between two answers. Other words may have been "
        "needed for both; a method that names these has not failed.",
        "Only prompts that this model gets right are marked, and most are short sentences. On "
        "other texts another method may be better.",
        "An erased unit becomes an embedding that no text has there, and much hangs on what it "
        "becomes: see notebooks/10_faithfulness.ipynb.",
        "A winner is ahead of every other method with its interval; five of a hundred such "
        "intervals miss.",
        *(f"`{name}` is left out: {sentence}" for name, sentence in refused.items()),
        *(f"`{name}` refused {number} prompts." for name, number in times.items()),
    ]
    text = [
        f"# Which method to believe: {about}",
        *(f"**{title}** {sentence}" for title, sentence in answers(found).items()),
        about_prompts(found),
        methods_table(found, COLUMNS),
        table(rows),
        "Be careful:",
        "\n".join(f"- {sentence}" for sentence in careful),
    ]
    return "\n\n".join(text)


def summary(found: pd.DataFrame) -> str:
    """The section of results.md."""
    best = by_method(found, "reciprocal_rank").index
    families = [family for family in PROMPTS if family in set(found["family"])]
    ranks = {family: by_method(found, "reciprocal_rank", family) for family in families}
    measures = [
        *(f"randomised_{depth}" for depth in randomised_depths(found)),
        "stability_bfloat16",
        "stability_beginning",
        "stability_seed",
    ]
    changed = {measure: by_method(found, measure) for measure in measures}
    text = [
        about_prompts(found),
        *(f"**{title}** {sentence}" for title, sentence in answers(found).items()),
        methods_table(found, COLUMNS | MORE_COLUMNS),
        "Beware of the rank agreement with patching: in later layers every answer is at the last "
        "position, so knowing nothing but that (last token) agrees well.",
        "Reciprocal rank of the evidence by family:",
        _grid(best, ranks),
        "Rank correlation of scores with themselves: layers re-initialised from the top, and runs "
        "that should not matter (half precision, other words before the prompt, another seed). "
        "Integrated gradients take too long for this; Shapley values have 4 orders here.",
        _grid([name for name in METHODS if name in best], changed),
    ]
    return "\n\n".join(text)


def another(found: pd.DataFrame) -> str:
    """The section of results.md about another model than the bundled one."""
    marks = [by_method(table, "reciprocal_rank")["mean"] for table in (found, evidence_table())]
    shared = marks[0].index.intersection(marks[1].index)
    alike = rank_correlation(*(each[shared] for each in marks))
    return "\n\n".join(
        [
            about_prompts(found),
            *(f"**{title}** {sentence}" for title, sentence in answers(found).items()),
            f"The order of {len(shared)} methods by finding the word agrees with that on the "
            f"bundled model by a rank correlation of {alike:.2f}.",
            methods_table(found, COLUMNS),
        ]
    )


def randomised_depths(found):
    names = [str(what) for what in found["measure"].unique()]
    return sorted(int(name[11:]) for name in names if name.startswith("randomised_"))


def _grid(names, columns):
    return table(
        [
            {"method": name}
            | {
                title: with_interval(some.loc[name]) if name in some.index else ""
                for title, some in columns.items()
            }
            for name in names
        ]
    )


def readme(found: pd.DataFrame) -> str:
    """What README says under its figure: the table, and who wins."""
    return "\n\n".join(
        [
            methods_table(found, COLUMNS),
            *(f"*{title}* {sentence}" for title, sentence in answers(found).items()),
        ]
    )


def between(file: Path, mark: str, text: str) -> None:
    """Put ``text`` between two marks of a file, ``<!-- mark -->`` and ``<!-- end mark -->``."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- end {mark} -->"
    before, rest = file.read_text(encoding="utf-8").split(begin)  # fails where a mark is not there
    _, after = rest.split(end)
    file.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")


# --- the figure --------------------------------------------------------------------------------


def draw(found):
    """Methods by ground truth, by erasing and by cost, in one order, with intervals."""
    ranks = by_method(found, "reciprocal_rank")
    order = ranks.index[::-1]
    size = (9, 2 + 0.45 * len(order))  # readable in a column of a page
    fig, axes = plt.subplots(2, 2, figsize=size, sharey=True)
    axes = axes.flat
    chance = found[found["measure"] == "chance_reciprocal_rank"]["value"].mean()
    dots(axes[0], ranks.loc[order], "o")
    axes[0].axvline(chance, color="0.3", linestyle=":")
    axes[0].set(xlabel="reciprocal rank of the word that decides", xlim=(0, 1.03))
    part = ranks["prompts"] < ranks["prompts"].max()
    labels = [f"{name} *" if part[name] else name for name in order]
    axes[0].set_yticks(range(len(order)), labels)
    for shift, marker, erased in ((0, "o", "mean"), (-0.2, "s", "eos"), (-0.4, "d", "neighbour")):
        some = by_method(found, "faithfulness", replacement=erased).reindex(order)
        if some["mean"].notna().any():
            star = " *" if shift else ""
            dots(axes[1], some, marker, shift, label=f"erased: {erased}{star}")
    axes[1].axvline(0, color="0.3", linestyle=":")
    axes[1].set(xlabel="insertion minus deletion (nats)")
    told = "dotted: chance; dashed: the best order; in italics: rivals and controls;\n"
    told += "*: on the first prompts of each short family alone"
    fig.legend(
        *axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, title=told
    )
    dots(axes[2], by_method(found, "share", replacement="mean").reindex(order), "o")
    axes[2].axvline(0, color="0.3", linestyle=":")
    axes[2].axvline(1, color="0.3", linestyle="--")
    axes[2].set(xlabel=f"prompts of at most {EXACT} units")
    axes[2].xaxis.set_major_locator(MultipleLocator(0.5))
    cost = 2 * by_method(found, "evaluations")["mean"] + by_method(found, "forwards")["mean"]
    axes[3].barh(range(len(order)), cost[order], color="0.6")
    axes[3].set(xscale="log", xlabel="rows run; a gradient counts twice")
    axes[3].xaxis.set_minor_formatter(NullFormatter())
    titles = ("Finds the word", "Erasing bears it out", "Share of the best order", "Cost")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title)
    for ax in (axes[0], axes[2]):
        for label, name in zip(ax.get_yticklabels(), order, strict=True):
            rival = name in RIVALS or name == "random"
            label.set_fontstyle("italic" if rival else "normal")
    return fig


def dots(ax, rows, marker, shift=0.0, label=None):
    spread = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
    places = [place + shift for place in range(len(rows))]
    ax.errorbar(rows["mean"], places, xerr=spread, fmt=marker, capsize=2, label=label)


if __name__ == "__main__":
    command(main)
