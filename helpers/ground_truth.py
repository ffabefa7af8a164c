"""Prompts of which it is known which word decides: an examination for attribution methods.

A minimal pair is two prompts that differ in one word and whose right answers are swapped. Where a
model gets both right, that word, and by construction no other, made it prefer the one answer to
the other; a method asked "why this answer rather than that?" should put it first. The prompts of
``FAMILIES`` are short sentences; those of ``LONGER`` are long texts with one fact among others,
chats, answers of several tokens, and retrieved passages. The sentences are our own; families of
this kind are used by Linzen et al. 2016, arXiv:1611.01368 (agreement), Warstadt et al. 2020,
arXiv:1912.00582 (BLiMP), and Wang et al. 2022, arXiv:2211.00593 (indirect objects).
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations, permutations, product
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from helpers.errors import InputError
from helpers.progress import bar
from helpers.questions import Question, completed, read_facts, read_question

DATA = Path(__file__).parent / "data" / "ground_truth.yml"
FAMILIES = ("indirect_object", "agreement", "determiner_noun", "anaphor_gender", "capital", "copy")
LONGER = ("long_fact", "chat", "answer", "passages")
CANDIDATES = {"tuning": 200, "reporting": 640}  # cases a family, both directions counted
PARAGRAPH = "\n\n"  # what is between two passages, and before the question
CASES_PER_PASS = 16  # as many as are tokenised and run before the first one is handed out


@dataclass(frozen=True)
class Case:
    """One direction of a minimal pair.

    ``prompt``, a text or messages, leads to ``target``, and ``counterfactual``, which is the prompt
    with only the word ``evidence`` exchanged, leads to ``foil``. Target and foil are texts as they
    go on after the prompt, most with a leading space. A model is asked for the first token of each,
    or, if ``whole``, for all of them. With ``passages`` the paragraphs of the prompt but the last
    are passages, which get a score each. ``family`` is one of ``FAMILIES`` and ``LONGER``,
    ``split`` ``"tuning"`` or ``"reporting"``.
    """

    family: str
    split: str
    prompt: str | list[dict]
    target: str
    foil: str
    evidence: str
    counterfactual: str | list[dict]
    whole: bool = False
    passages: bool = False

    def asked(
        self, tokenizer: Any, *, counterfactual: bool = False, units: str | None = None
    ) -> dict[str, Any]:
        """The arguments of ``ask`` for the prompt, or for the ``counterfactual``.

        Both ask for ``target`` rather than ``foil``. ``units`` is as there; ``None`` is the way of
        the case: its passages if it has some, and else tokens.
        """
        prompt: Any = self.counterfactual if counterfactual else self.prompt
        if self.whole:
            answers: dict[str, Any] = {"target": self.target, "foil": self.foil}
        else:
            target, foil = self.answer_ids(tokenizer)
            answers = {"target_ids": target, "foil_ids": foil}
        if units is None and self.passages:
            *passages, _ = prompt.split(PARAGRAPH)
            return {"prompt": prompt, "sources": passages, **answers}
        return {"prompt": prompt, "units": units or "tokens", **answers}

    def answer_ids(self, tokenizer: Any) -> list[list[int]]:
        """The token ids of target and foil that are asked for."""
        both = tokenizer([self.target, self.foil], add_special_tokens=False)["input_ids"]
        return both if self.whole else [ids[:1] for ids in both]


def cases(family: str, split: str) -> list[Case]:
    """The cases of one family and split, the two directions of a pair one after the other.

    Drawn from the templates and words in ``data/ground_truth.yml`` with a fixed seed, so the list
    is the same everywhere; no prompt is in it twice. Raises ``InputError`` for an unknown family
    or split.
    """
    if family not in FAMILIES + LONGER or split not in CANDIDATES:
        raise InputError(
            f"There are no cases {family!r}, {split!r}: the families are "
            f"{', '.join(FAMILIES + LONGER)}, the splits {' and '.join(CANDIDATES)}."
        )
    half = yaml.safe_load(DATA.read_text(encoding="utf-8"))[family][split]
    groups = [(words, _pairs(words)) for words in half.get("groups", [half])]
    groups = [group for group in groups for _ in group[0]["templates"]]  # templates take turns
    generator = random.Random(f"{family} {split}")
    around = half.get("around")
    among = around and partial(_among, generator, around, [])
    whole, passages = family == "answer", family == "passages"

    def pick(some):  # of this module only random() is promised to stay the same
        return some[int(generator.random() * len(some))]

    found: dict[str, Case] = {}
    for number in range(10 * CANDIDATES[split]):
        if len(found) >= CANDIDATES[split]:
            break
        words, pairs = groups[number % len(groups)]
        (evidence, answer), (other, other_answer) = pick(pairs)
        template = pick(words["templates"])
        filling = {slot: pick(fillers) for slot, fillers in words.get("slots", {}).items()}
        filling |= {"first": evidence, "second": other}
        filling |= {"first_answer": answer, "second_answer": other_answer}
        if among:
            template = among(*template)
        both = [_filled(template, filling | {"evidence": word}) for word in (evidence, other)]
        if not found.keys() & set(map(str, both)):
            prompt, counterfactual = both
            begun = isinstance(prompt, str) or prompt[-1]["role"] == "assistant"
            target, foil = (" " * begun + text for text in (answer, other_answer))
            found[str(prompt)] = Case(
                family, split, prompt, target, foil, evidence, counterfactual, whole, passages
            )
            found[str(counterfactual)] = Case(
                family, split, counterfactual, foil, target, other, prompt, whole, passages
            )
    return list(found.values())


def _filled(template, filling):
    """A text with its slots filled, or messages if the template has roles."""
    if isinstance(template, str):
        return template.format(**filling)
    return [{"role": role, "content": text.format(**filling)} for role, text in template.items()]


def _among(generator, around, places, fact, ending):
    """A template: ``fact`` among other texts, and ``ending`` as the last paragraph.

    ``places`` are those which the next ones take, filled again when it is empty; so each place is
    taken as often as any other.
    """
    if not places:
        places += [(place, count) for count in around["counts"] for place in range(count)]
    place, count = places.pop(int(generator.random() * len(places)))
    texts = sorted(around["texts"], key=lambda _: generator.random())[: count - 1]
    return around["between"].join([*texts[:place], fact, *texts[place:]]) + PARAGRAPH + ending


def _pairs(words):
    """All ``((evidence, answer), (evidence, answer))`` that the words of a family allow."""
    if "names" in words:  # the one who acts does so to the other
        return [((one, two), (two, one)) for one, two in permutations(words["names"], 2)]
    if "evidence" in words:  # any two words with any two answers
        some = product(words["evidence"], words["answers"])
        return [((one, answer), (two, other)) for (one, two), (answer, other) in some]
    if "keys" in words:  # any two with any two values
        both = product(*(permutations(words[kind], 2) for kind in ("keys", "values")))
        return [tuple(zip(keys, values, strict=True)) for keys, values in both]
    answers = words.get("capital_of") or {word: word for word in words["copied"]}
    return list(combinations(answers.items(), 2))


# --- which of them a model can answer ----------------------------------------------------------


def solved(
    model: Any, tokenizer: Any, cases: Sequence[Case], units: str | None = None
) -> Iterator[tuple[Case, Question, Question]]:
    """The cases that count for this model, as ``(case, question, counterfactual_question)``.

    A generator, in the order of ``cases``. A case counts if

    - target and foil do not begin with the same tokens, up to the end of one of them, and the two
      prompts have the same number of tokens and differ in one contiguous run of them;
    - the model prefers the target in the prompt, and the foil in the counterfactual: by the next
      token's logits, or where answers are whole by the log-probability of all their tokens.

    Both questions ask for ``case.target`` rather than ``case.foil``, so the objective of the first
    is above zero and that of the second below. A model that gets only one of the two right need
    not have looked at the evidence. ``units`` is as in ``Case.asked``.
    """
    for start in bar("solved", range(0, len(cases), CASES_PER_PASS), unit="pass"):
        usable: list[Any] = []  # (case, question, counterfactual question)
        for case in cases[start : start + CASES_PER_PASS]:
            answers = case.answer_ids(tokenizer)
            if all(a == b for a, b in zip(*answers, strict=False)):
                continue
            ways = [case.asked(tokenizer, counterfactual=way, units=units) for way in (False, True)]
            both = [read_question(tokenizer, model=model, **way) for way in ways]
            if _one_run(*both):
                usable.append((case, *both))
        found = iter(_run(model, [one for _, *both in usable for one in both]))
        for case, question, other in usable:
            (facts, lead), (other_facts, other_lead) = next(found), next(found)
            if lead > 0 > other_lead:
                yield case, completed(question, facts), completed(other, other_facts)


def _one_run(question, other):
    """Whether two prompts are of equal length and differ, in neighbouring places only."""
    if question.input_ids.shape != other.input_ids.shape:
        return False
    places = evidence_positions(question, other)
    return bool(places) and places[-1] - places[0] == len(places) - 1


def _run(model, questions):
    """``(facts, objective)`` of each question: texts of a length are run together, and each once.

    Two answers of one token need the logits behind the prompt alone, which are one text.
    """
    device = model.get_input_embeddings().weight.device
    texts = []  # of each question two: all that is read to predict an answer, and its tokens
    for one in questions:
        before = one.input_ids[0].tolist()
        texts.append([((*before, *ids[:-1]), len(ids)) for ids in (one.target, one.foil)])
    logits = {}  # [tokens of the answer, vocab] of each text
    for length, count in {(len(text), count) for text, count in chain(*texts)}:
        rows = sorted({row for row in chain(*texts) if (len(row[0]), row[1]) == (length, count)})
        ids = torch.tensor([text for text, _ in rows], device=device)
        with torch.inference_mode():
            output = model(ids, use_cache=False, logits_to_keep=count)
        logits.update(zip(rows, output.logits[:, -count:].float().cpu(), strict=True))
    for question, (text, other) in zip(questions, texts, strict=True):
        facts = read_facts(logits[text], question.target, question.rival)
        lead = _log_probability(logits[text], question.target)
        yield facts, lead - _log_probability(logits[other], question.foil)


def _log_probability(logits, ids):
    """The log-probability of the tokens ``ids``, from their logits [tokens, vocab]."""
    return (logits[range(len(ids)), ids] - logits.logsumexp(dim=-1)).sum()


# --- how well a method did ---------------------------------------------------------------------


def evidence_positions(question: Question, other: Question) -> list[int]:
    """The positions where two prompts of equal length hold different tokens, answers left out.

    Introduced in notebooks/11_ground_truth.ipynb.
    """
    differ = question.input_ids[0] != other.input_ids[0]  # [seq]
    return differ.nonzero()[:, 0].tolist()


def evidence_units(question: Question, other: Question) -> list[int]:
    """The indices of the units of ``question`` that hold a token in which ``other`` differs.

    Where every unit is a token these are the ``evidence_positions``; of passages, usually one.
    """
    places = set(evidence_positions(question, other))
    return [index for index, unit in enumerate(question.units) if places & {*unit.positions}]


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
