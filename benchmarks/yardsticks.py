"""Yardsticks of others: every method on prompts that this project did not write.

- Indirect objects of Ferrando et al. 2023, arXiv:2305.12535: data/ioi.csv. Their evidence is the
  name that is the answer, which stands in each prompt once. A second reading of the same scores
  asks for the word that decides as ``helpers/ground_truth.py`` means it: the giver, the second time
  the other name stands there, since who gives says who gets.
- Subject-verb agreement: sentences built anew from the words and constructions of Marvin and Linzen
  2018, arXiv:1808.09031, with one noun of the other number between subject and verb. The evidence
  is the subject.
- Soft normalised comprehensiveness of Zhao and Aletras 2023, arXiv:2305.10496, on both.

Nothing may be tuned here. Keeps a section of results.md for each model.

    python benchmarks/yardsticks.py                      the bundled model, twenty minutes
    python benchmarks/yardsticks.py --model model.gguf --prompts 20
"""

import csv
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
import yaml

from helpers import METHODS, Attribution, InputError, Question, ask, attribute, load_model
from helpers.attribution import asking, embed_prompt, objective
from helpers.faithfulness import by_method
from helpers.ground_truth import random_reciprocal_rank, reciprocal_rank
from helpers.model_folders import public_name
from helpers.models import BUNDLED
from helpers.prompts import read_prompt

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts, not a package
from compared import RELEVANCE
from report import command, digest_of, keep, table, with_interval

DATA = Path(__file__).with_name("data")
# Integrated gradients and Shapley values to a budget: they are most of the time as it is.
OPTIONS = {"integrated_gradients": {"max_evaluations": 33}, "shapley": {"permutations": 8}}
SENTENCES = 1000  # of agreement that are tried, as many as there are of indirect objects
FEWEST = 6  # prompts that are worth an interval
DRAWS = 4  # of elements that are erased, for each prompt and method
IOI, GIVER, AGREEMENT = "indirect object", "its giver", "agreement"
Span = tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """``text`` leads to ``target`` rather than ``foil`` (words).

    ``evidence`` has, for each way to read the key, the characters (begin, end) of the word.
    """

    text: str
    target: str
    foil: str
    evidence: dict[str, Span]


# --- the prompts -------------------------------------------------------------------------------


def places_of(word: str, text: str) -> list[Span]:
    """Where ``word`` stands as a whole word, in characters: a list of (begin, end)."""
    return [found.span() for found in re.finditer(rf"\b{re.escape(word)}\b", text)]


def indirect_objects() -> Iterator[Prompt]:
    """The prompts of data/ioi.csv, in their order."""
    with (DATA / "ioi.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            text, foil = row["one_prefix_prefix"], row["one_prefix_word_bad"]
            (evidence,) = places_of(row["target"], text)
            _, giver = places_of(foil, text)
            yield Prompt(text, row["one_prefix_word_good"], foil, {IOI: evidence, GIVER: giver})


def agreement() -> Iterator[Prompt]:
    """``SENTENCES`` of Marvin and Linzen's kinds, in turn, with subjects of both numbers."""
    words = yaml.safe_load((DATA / "agreement.yml").read_text(encoding="utf-8"))
    generator = random.Random(0)

    def pick(some):  # of this module only random() is promised to stay the same
        return some[int(generator.random() * len(some))]

    for construction in islice(cycle(words["constructions"]), SENTENCES):
        many = generator.random() < 0.5
        subject = pick(words[construction["subject"]]) + "s" * many
        other, verb = pick(words["others"]) + "s" * (not many), pick(words["verbs"]) + "s" * many
        places, makers = pick(words["places"]), pick(words["makers"])
        text = construction["text"].format(
            subject=subject, other=other, verb=verb, places=places, makers=makers
        )
        answers = ("are", "is") if many else ("is", "are")
        yield Prompt(text, *answers, {AGREEMENT: places_of(subject, text)[0]})


def positions_of(tokenizer: Any, text: str, span: Span) -> list[int]:
    """The positions of the tokens that hold a part of ``text[begin:end]``."""
    begin, end = span
    spans = read_prompt(tokenizer, text).spans
    return [place for place, (left, right) in enumerate(spans) if left < end and right > begin]


def answered(
    model: Any, tokenizer: Any, prompts: Iterator[Prompt]
) -> Iterator[tuple[Prompt, Question]]:
    """The prompts that the model gets right: target before foil.

    Of target and foil the first tokens are asked for; where these are one, there is nothing to ask.
    """
    seen = set()
    for prompt in prompts:
        answers = tokenizer([f" {prompt.target}", f" {prompt.foil}"], add_special_tokens=False)
        (target, *_), (foil, *_) = answers["input_ids"]
        if target == foil or prompt.text in seen:
            continue
        seen.add(prompt.text)
        question = ask(model, tokenizer, prompt.text, target_ids=[target], foil_ids=[foil])
        with torch.inference_mode():
            prefers = objective(model, embed_prompt(model, question), question)
        if prefers > 0:
            yield prompt, question


def enough(
    model: Any, tokenizer: Any, prompts: int
) -> tuple[list[list[tuple[Prompt, Question]]], list[str]]:
    """The first ``prompts`` of each kind that the model gets right, and what is to be told.

    A kind of which it gets too few right is left out. Raises ``InputError`` where that is all.
    """
    kinds, few = [], []
    for kind, name in ((indirect_objects, "indirect objects"), (agreement, "agreement")):
        right = list(islice(answered(model, tokenizer, kind()), prompts))
        if len(right) >= min(FEWEST, prompts):
            kinds.append(right)
        else:
            few.append(f"Of {name} this model gets {len(right)} right, too few for an interval.")
    if not kinds:
        raise InputError(" ".join(few) + " Take a larger model, or one that knows English.")
    return kinds, few


# --- what is measured --------------------------------------------------------------------------


def everyone(model: Any, question: Question, seed: int) -> dict[str, Attribution]:
    """Every method and variant; one that the model does not fit is left out, and told."""
    found = {}
    runs = {name: (name, OPTIONS.get(name, {})) for name in METHODS} | RELEVANCE
    for name, (method, options) in runs.items():
        more = {"seed": seed} if method == "random" else {}
        try:
            found[name] = attribute(model, question, method, **options, **more)
        except InputError as error:
            print(f"{name}: {error}", file=sys.stderr)
    return found


def shares(result: Attribution) -> torch.Tensor:
    """How much of each token is erased: its score over the largest, from 0 to 1; [units].

    What pushes the answer away has no share in it.
    """
    scores = result.scores.clamp_min(0) if result.signed else result.scores.abs()
    return scores / scores.max().clamp_min(1e-9)


def soft_comprehensiveness(
    model: Any, question: Question, results: dict[str, Attribution], seed: int
) -> Iterator[tuple[str, str, float]]:
    """Rows ``(method, measure, value)``: what soft erasure takes of the target's probability.

    Each element of a token's embedding is set to zero with the token's share as probability; all
    methods share the draws. ``fall`` is how far the probability of the target, which must be target
    or foil, falls; ``fall of all`` how far with all at zero; both are at least 0. ``erased`` is the
    mean share.
    """
    with asking(model, [question]) as asked, torch.inference_mode():
        embeds = asked.embeds[0]  # [1, seq, dim]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand((DRAWS, *embeds.shape), generator=generator)
        rows = [embeds[None], torch.zeros_like(embeds)[None]]
        for result in results.values():
            kept = drawn >= shares(result)[None, None, :, None]
            rows.append(embeds * kept.to(embeds))

        def run(some):
            return asked.values(some, torch.zeros(len(some), dtype=torch.long))[:, 0]

        values = asked.in_batches(run, torch.cat(rows), embeds.shape[1])
        probabilities = torch.cat(values).sigmoid().cpu()
    whole, nothing, *_ = probabilities.tolist()
    fell = (whole - probabilities[2:].view(len(results), DRAWS)).clamp_min(0).mean(dim=1)
    for (name, result), value in zip(results.items(), fell.tolist(), strict=True):
        yield name, "fall", value
        yield name, "fall of all", max(0.0, whole - nothing)
        yield name, "erased", float(shares(result).mean())


def measured(
    model: Any, tokenizer: Any, prompt: Prompt, question: Question, number: int
) -> Iterator[tuple[str, str, str, float]]:
    """Rows ``(yardstick, method, measure, value)`` of one prompt."""
    results = everyone(model, question, number)
    for yardstick, span in prompt.evidence.items():
        positions = positions_of(tokenizer, prompt.text, span)
        chance = random_reciprocal_rank(len(question.units), len(positions))
        yield yardstick, "chance", "rank", chance
        yield yardstick, "chance", "first", len(positions) / len(question.units)
        for name, result in results.items():
            found = reciprocal_rank(result.scores, positions, result.signed)
            yield yardstick, name, "rank", found
            yield yardstick, name, "first", float(found == 1)
    yardstick = next(iter(prompt.evidence))
    for row in soft_comprehensiveness(model, question, results, number):
        yield yardstick, *row


# --- the table ---------------------------------------------------------------------------------


def summary(found: pd.DataFrame, about: str) -> str:
    """The section of results.md."""
    text = [
        f"{about} Nothing was tuned on these prompts, and only those count that the model gets "
        "right. `indirect object`: the name that is the answer, the evidence of Ferrando et al. "
        "2023 (arXiv:2305.12535), whose prompts these are; `its giver`: the same prompts and "
        "scores, with the second mention of the other name as the word that decides. `agreement`: "
        "the subject, in sentences built anew from the words and constructions of Marvin and "
        "Linzen 2018 (arXiv:1808.09031), with a noun of the other number in between. Integrated "
        f"gradients have {OPTIONS['integrated_gradients']['max_evaluations']} gradients, Shapley "
        f"values {OPTIONS['shapley']['permutations']} orders. 95 % bootstrap intervals over "
        "prompts.",
        *(_ranks(found, yardstick) for yardstick in found["yardstick"].unique()),
        "Soft normalised comprehensiveness (Zhao and Aletras 2023, arXiv:2305.10496): how far the "
        "probability of the target falls when each element of each embedding is erased with the "
        "token's normalised score as probability, over how far it falls when all is erased; means "
        f"over prompts, each with {DRAWS} draws, before the division, since a prompt that loses "
        "nothing has no ratio. Above 1, less is erased than all and more lost: with nothing left "
        "neither answer is preferred, with a part left the foil may be. The measure rewards a "
        "method that spreads its score over many tokens, since more is then erased, whatever these "
        "are; arXiv:2601.03089 finds it confused with how much is kept, and keeps that equal. So "
        "read it beside the share that was erased.",
        _soft(found),
        "Arras et al. 2025 (arXiv:2502.15886) put some of these methods to subject-verb agreement "
        "on Llama-3. Their figures could not be had, so none stands here.",
    ]
    return "\n\n".join(text)


def _ranks(found, yardstick):
    some = found[found["yardstick"] == yardstick]
    ranks, first = by_method(some, "rank"), by_method(some, "first")["mean"]
    rows = [
        {
            f"{yardstick}, {row['prompts']:.0f} prompts": name,
            "reciprocal rank": with_interval(row),
            "in first place": f"{first[name]:.0%}",
        }
        for name, row in ranks.iterrows()
    ]
    return table(rows)


def _soft(found):
    means = found.pivot_table("value", ["method", "yardstick"], "measure", "mean")
    rows = []
    for name in found[found["measure"] == "fall"]["method"].unique():
        row = {"method": name}
        for yardstick in found[found["measure"] == "fall"]["yardstick"].unique():
            some = means.loc[name, yardstick]
            fall = some["fall"] / some["fall of all"] if some["fall of all"] else float("nan")
            row[f"{yardstick}: soft comprehensiveness"] = f"{fall:.2f}"
            row[f"{yardstick}: erased"] = f"{some['erased']:.0%}"
        rows.append(row)
    return table(rows)


def main(
    model: Annotated[str, typer.Option(help="hub name, folder or .gguf")] = BUNDLED,
    prompts: Annotated[int, typer.Option(min=1, help="of each kind that the model answers")] = 60,
) -> None:
    """Measure, and keep the section of this model."""
    loaded, tokenizer = load_model(model)
    kinds, few = enough(loaded, tokenizer, prompts)
    rows = []
    for some in kinds:
        for number, (prompt, question) in enumerate(some):
            case = 2 * number  # by_method takes 2k and 2k + 1 for a pair: none of these is one
            rows += [
                (yardstick, yardstick, case, *row)
                for yardstick, *row in measured(loaded, tokenizer, prompt, question, number)
            ]
            print(number, prompt.text, file=sys.stderr, flush=True)
    columns = ["yardstick", "family", "case", "method", "measure", "value"]
    name = public_name(model)
    about = " ".join([f"{name}, SHA-256 {digest_of(model)}.", *few])
    section = "yardsticks" if model == BUNDLED else f"yardsticks {name}"
    title = f"Yardsticks of others, {name}"
    keep(section, title, summary(pd.DataFrame(rows, columns=columns), about))


if __name__ == "__main__":
    command(main)
