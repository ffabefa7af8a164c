"""Prompts of which it is known which word decides: an examination for attribution methods.

A minimal pair is two prompts that differ in one word and whose right answers are swapped. Where a
model gets both right, that word, and by construction no other, made it prefer the one answer to
the other; a method asked "why this answer rather than that?" should put it first. The sentences
are our own; families of this kind are used by Linzen et al. 2016, arXiv:1611.01368 (agreement),
Warstadt et al. 2020, arXiv:1912.00582 (BLiMP), and Wang et al. 2022, arXiv:2211.00593 (indirect
objects).
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from helpers.errors import InputError
from helpers.questions import Question, completed, read_facts, read_question

DATA = Path(__file__).parent / "data" / "ground_truth.yml"
FAMILIES = ("indirect_object", "agreement", "determiner_noun", "anaphor_gender", "capital", "copy")
CANDIDATES = {"tuning": 200, "reporting": 640}  # cases a family, both directions counted
CASES_PER_PASS = 16  # as many as are tokenised and run before the first one is handed out


@dataclass(frozen=True)
class Case:
    """One direction of a minimal pair.

    ``prompt`` leads to ``target``, and ``counterfactual``, which is the prompt with only the word
    ``evidence`` exchanged, leads to ``foil``. Target and foil are words with their leading space,
    of which a model is asked for the first token. ``family`` is one of ``FAMILIES``, ``split``
    ``"tuning"`` or ``"reporting"``.
    """

    family: str
    split: str
    prompt: str
    target: str
    foil: str
    evidence: str
    counterfactual: str


def cases(family: str, split: str) -> list[Case]:
    """The cases of one family and split, the two directions of a pair one after the other.

    Drawn from the templates and words in ``data/ground_truth.yml`` with a fixed seed, so the list
    is the same everywhere; no prompt is in it twice. Raises ``InputError`` for an unknown family
    or split.
    """
    if family not in FAMILIES or split not in CANDIDATES:
        raise InputError(
            f"There are no cases {family!r}, {split!r}: the families are {', '.join(FAMILIES)}, "
            f"the splits {' and '.join(CANDIDATES)}."
        )
    words = yaml.safe_load(DATA.read_text(encoding="utf-8"))[family][split]
    pairs = _pairs(words)
    generator = random.Random(f"{family} {split}")

    def pick(some):  # of this module only random() is promised to stay the same
        return some[int(generator.random() * len(some))]

    found: dict[str, Case] = {}
    for _ in range(10 * CANDIDATES[split]):
        (evidence, answer), (other, other_answer) = pick(pairs)
        template = pick(words["templates"])
        filling = {slot: pick(fillers) for slot, fillers in words["slots"].items()}
        filling |= {"first": evidence, "second": other}
        prompt = template.format(**filling, evidence=evidence)
        counterfactual = template.format(**filling, evidence=other)
        if len(found) < CANDIDATES[split] and not found.keys() & {prompt, counterfactual}:
            answers = f" {answer}", f" {other_answer}"
            found[prompt] = Case(family, split, prompt, *answers, evidence, counterfactual)
            found[counterfactual] = Case(
                family, split, counterfactual, *answers[::-1], other, prompt
            )
    return list(found.values())


def _pairs(words):
    """All ``((evidence, answer), (evidence, answer))`` that the words of a family allow."""
    if "names" in words:  # the one who acts does so to the other
        return [((one, two), (two, one)) for one, two in permutations(words["names"], 2)]
    if "evidence" in words:  # any two words with any two answers
        some = product(words["evidence"], words["answers"])
        return [((one, answer), (two, other)) for (one, two), (answer, other) in some]
    answers = words.get("capital_of") or {word: word for word in words["copied"]}
    return list(combinations(answers.items(), 2))


# --- which of them a model can answer ----------------------------------------------------------


def solved(
    model: Any, tokenizer: Any, cases: Sequence[Case]
) -> Iterator[tuple[Case, Question, Question]]:
    """The cases that count for this model, as ``(case, question, counterfactual_question)``.

    A generator, in the order of ``cases``. A case counts if

    - the first tokens of target and foil differ, and the two prompts have the same number of
      tokens and differ in one contiguous run of them;
    - the model prefers the target in the prompt, and the foil in the counterfactual.

    Both questions ask for ``case.target`` rather than ``case.foil``, so the objective of the first
    is above zero and that of the second below. A model that gets only one of the two right need
    not have looked at the evidence.
    """
    for start in range(0, len(cases), CASES_PER_PASS):
        usable: list[Any] = []  # (case, question, counterfactual question)
        for case in cases[start : start + CASES_PER_PASS]:
            answers = tokenizer([case.target, case.foil], add_special_tokens=False)["input_ids"]
            (target, *_), (foil, *_) = answers
            if target == foil:
                continue
            named: Any = {"target_ids": [target], "foil_ids": [foil], "model": model}
            texts = case.prompt, case.counterfactual
            both = [read_question(tokenizer, text, **named) for text in texts]
            if _one_run(*both):
                usable.append((case, *both))
        logits = _next_logits(model, [one for _, *both in usable for one in both])
        for (case, *both), first, second in zip(usable, logits[::2], logits[1::2], strict=True):
            (target,), (foil,) = both[0].target, both[0].foil
            if first[target] > first[foil] and second[target] < second[foil]:
                facts = [read_facts(row[None], [target]) for row in (first, second)]
                yield case, *map(completed, both, facts)


def _one_run(question, other):
    """Whether two prompts are of equal length and differ, in neighbouring places only."""
    if question.input_ids.shape != other.input_ids.shape:
        return False
    places = evidence_positions(question, other)
    return bool(places) and places[-1] - places[0] == len(places) - 1


def _next_logits(model, questions):
    """The next-token logits [vocab] of each question: prompts of a length are run together."""
    device = model.get_input_embeddings().weight.device
    prompts = [tuple(question.input_ids[0].tolist()) for question in questions]
    found = {}
    for length in set(map(len, prompts)):
        rows = sorted({prompt for prompt in prompts if len(prompt) == length})
        with torch.inference_mode():
            output = model(torch.tensor(rows, device=device), use_cache=False, logits_to_keep=1)
        found.update(zip(rows, output.logits[:, -1].float().cpu(), strict=True))
    return [found[prompt] for prompt in prompts]


# --- how well a method did ---------------------------------------------------------------------


def evidence_positions(question: Question, other: Question) -> list[int]:
    """The positions where two questions of equal length hold different tokens.

    Introduced in notebooks/11_ground_truth.ipynb.
    """
    differ = question.input_ids[0] != other.input_ids[0]  # [seq]
    return differ.nonzero()[:, 0].tolist()


def reciprocal_rank(scores: Any, positions: Sequence[int], signed: bool) -> float:
    """1 / rank of the best placed of ``positions``, the largest score having rank 1.

    ``scores`` [seq] are sorted by value if ``signed``, since the evidence has to push *towards*
    the target, and by size if not. Tied tokens share the mean of their ranks, so scores that are
    all alike gain nothing. Source: Voorhees 1999, the TREC-8 question answering track.

    Introduced in notebooks/11_ground_truth.ipynb.
    """
    scores = np.asarray(scores, dtype=float)
    if not signed:
        scores = np.abs(scores)
    best = scores[positions].max()
    above, tied = (scores > best).sum(), (scores == best).sum()
    return float(1 / (above + (tied + 1) / 2))


def random_reciprocal_rank(seq: int, count: int) -> float:
    """What a random order of ``seq`` tokens gets on average if ``count`` of them are evidence.

    The best placed one has rank r in C(seq - r, count - 1) of the C(seq, count) ways to place the
    evidence. For one evidence token this is (1 + 1/2 + ... + 1/seq) / seq.

    Introduced in notebooks/11_ground_truth.ipynb.
    """
    ways = [comb(seq - rank, count - 1) for rank in range(1, seq + 1)]
    return sum(way / rank for rank, way in enumerate(ways, start=1)) / comb(seq, count)
