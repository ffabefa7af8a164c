"""How much each unit of a prompt moved the prediction: one function a method.

All methods explain the numbers that a question asks for: the log-probability of the target, minus
that of the foil where there is one. They return an ``Attribution``, which carries its own evidence:
how far the scores are from adding up (``gap``), whether that was near enough (``closed``), how well
each is known (``errors``) and what they cost (``evaluations``, ``forwards``, ``seconds``).

``attribute`` is for one question, ``attribute_all`` for many; both are views of one engine, in
which a whole answer is a question with several outputs.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from inspect import signature
from itertools import chain, islice
from typing import Any

import torch

from helpers.attribution.engine import (
    Asked,
    asking,
    embed_prompt,
    in_batches,
    objective,
    objective_gradient,
    plain_output_layer,
    rows_per_batch,
    shape_of,
    vocabularies_at_once,
    working_precision,
)
from helpers.attribution.methods import BUDGET, DEFAULT, METHODS, Method, Price, options_of
from helpers.attribution.path import (
    baseline_embeds,
    fixed_step_integrated_gradients,
    halve,
    refine,
    simpson,
)
from helpers.attribution.perturbation import average_gains, interactions
from helpers.attribution.result import Attribution, attribution, attributions, completeness_gap
from helpers.errors import InputError
from helpers.progress import progress
from helpers.questions import OBJECTIVES, Question, ask_of, completed, in_half_precision

__all__ = [
    "BUDGET",
    "METHODS",
    "Asked",
    "Attribution",
    "Method",
    "Price",
    "asking",
    "attribute",
    "attribute_all",
    "attribution",
    "attributions",
    "average_gains",
    "baseline_embeds",
    "completeness_gap",
    "embed_prompt",
    "fixed_step_integrated_gradients",
    "halve",
    "interactions",
    "objective",
    "objective_gradient",
    "refine",
    "rows_per_batch",
    "simpson",
]

HELD = 4096  # questions that are sorted by shape together
NEAR = 0.25  # nats: thrice what a batch moved one token against another in bfloat16, on 278 prompts


def attribute(
    model: Any,
    question: Question,
    method: str = DEFAULT,
    *,
    each: bool = False,
    objective: str | None = None,
    precision: str | None = None,
    budget: int | None = None,
    beside: Iterable[str] = (),
    **options: Any,
) -> Attribution:
    """The attribution of ``question`` by ``method``, a key of ``METHODS``.

    The default finds the word that decides and predicts what erasing does, for a gradient and forty
    rows: see ``find_then_rank``. Its scores order the units; for amounts in nats name another.
    ``each=True`` also gives the scores of every output token by itself. ``objective="logit"``
    explains raw logits in place of log-probabilities. ``precision="bfloat16"`` does the matrix
    products in half precision, which is faster and a little less exact; ``None`` leaves the model's
    own. ``budget``, tokens x gradients, sets the options that cost most as a report does that also
    runs the methods ``beside`` this one, of which some get but a part of the time. ``options`` are
    the method's own, for example ``tolerance`` for ``"integrated_gradients"``. The model is left as
    it was found.

    Raises ``InputError`` for an unknown method, option or precision, a method that this model does
    not support, one that the budget does not allow, and numbers that are not finite.
    """
    if objective is not None:
        if objective not in OBJECTIVES:
            raise InputError(f"There is no objective {objective!r}: use {' or '.join(OBJECTIVES)}.")
        question = replace(question, objective=objective)
    ((_, results),) = attribute_all(
        model,
        [question],
        {method: options},
        each=each,
        precision=precision,
        budget=budget,
        beside=beside,
    )
    if method not in results and budget is None:
        raise InputError(
            "The foil is the model's own next token, so there is nothing to compare: choose "
            "another foil.",
            field="foil",
        )
    if method not in results:
        raise InputError(f"A budget of {budget:,} tokens x gradients is too small for {method}.")
    return results[method]


def attribute_all(
    model: Any,
    questions: Iterable[Question],
    methods: Iterable[str] | Mapping[str, Mapping[str, Any]],
    *,
    each: bool = False,
    precision: str | None = None,
    budget: int | None = None,
    beside: Iterable[str] = (),
) -> Iterator[tuple[Question, dict[str, Attribution]]]:
    """What each of ``methods`` says of each question: ``(question, {method: Attribution})``.

    ``methods`` are keys of ``METHODS``, or a mapping from these to their options. In the order of
    ``questions``, of which some thousand are held at a time and those of one shape run together;
    no padding and no mask is needed, and the scores are those of ``attribute``, to float32's
    rounding. An open question is completed on the way, and is about the token that ``ask`` finds:
    in half precision a pass comes first that decides it, and near ties are run alone. Where its
    foil turns out to be the model's own next token, or that token to be a row of the table that
    stands for none, it comes back open and without results, as there is nothing to compare. With a
    ``budget``, a method that it does not allow for a prompt is left out there; those ``beside`` are
    run in the same report, and not here.

    One of options is about the likeliest of them, which passes of its own find first.

    ``seconds`` is a pass's time shared evenly among its rows, and among the methods that read it.
    What takes longer than two seconds has a bar where somebody sees it: see ``helpers.progress``.

    Raises ``InputError``, before anything is run, for an unknown method or option and for a method
    that does not support this model; and for numbers that are not finite.
    """
    wanted: dict[str, dict[str, Any]] = {name: {} for name in methods}
    if isinstance(methods, Mapping) and methods is not METHODS:
        wanted = {name: dict(options) for name, options in methods.items()}
    for name, options in wanted.items():
        refused = METHODS[name].refusal(model)
        if refused is not None:
            raise InputError(f"The method {name} cannot run. {refused}", field="methods")
        try:
            signature(METHODS[name].run).bind(None, **options)
        except TypeError as error:
            raise InputError(f"The method {name} cannot run: {error}.", field="methods") from error
    beside, stream = list(beside), iter(questions)
    decide = precision is not None or in_half_precision(model)
    while held := list(islice(stream, HELD)):
        held = [ask_of(model, some) if some.undecided else some for some in held]
        held = _decided(model, held) if decide else held
        with working_precision(model, precision):  # never between two questions that come back
            done = _attribute_held(model, held, wanted, each, budget, beside, decide)
        yield from done


def _attribute_held(model, questions, wanted, each, budget, beside=(), decided=False):
    questions = [_settled(model, question) for question in questions]
    found: dict[int, tuple[Question, dict[str, Attribution]]] = {}
    groups: dict[Any, tuple[dict, list[int]]] = {}
    rows = 0.0
    for place, question in enumerate(questions):
        if decided and question.target is None:  # its foil is the model's own next token
            found[place] = question, {}
            continue
        shape = shape_of(question)
        options = _options_of(question, sum(shape.lengths), wanted, budget, beside)
        key = shape, repr(options) if budget else ""
        groups.setdefault(key, (options, []))[1].append(place)
        rows += _rows(len(question.units), sum(shape.lengths), options)
    plain = plain_output_layer(model) is not None
    with progress(", ".join(wanted), rows):
        for (shape, _), (options, places) in groups.items():

            def run(some, options=options):
                return _run(model, [questions[place] for place in some], options, each)

            room = len(shape.lengths) * max(shape.lengths)
            if "relevance" in options and options.keys() & {"saliency", "gradient_x_input"}:
                room *= 2  # two ways back keep most of what two passes would
            # of all the vocabulary's logits, where the output layer is no plain matrix
            most = None if plain else vocabularies_at_once(model, len(shape.places))
            done = chain(*in_batches(model, run, places, room, most))
            found.update(zip(places, done, strict=True))
    return [found[place] for place in range(len(questions))]


def _rows(units, tokens, options):
    """About how many rows the methods run for a question, with a gradient and without."""
    whole = {  # without a budget, what a method needs may not be said
        name: (METHODS[name].options(units, tokens, BUDGET) or {}) | some
        for name, some in options.items()
    }
    prices = [METHODS[name].price(units, tokens, some) for name, some in whole.items()]
    return sum(price.gradients + price.forwards for price in prices)


def _options_of(question, tokens, wanted, budget, beside):
    """The methods that are run for a question, and their options under the budget.

    ``tokens`` are those of all its texts.
    """
    if budget is None:
        return wanted
    together = {name: {} for name in beside} | wanted
    of_prompt, units = len(question.labels), len(question.units)
    found = options_of(together, units, tokens, budget, of_prompt=of_prompt)
    return {name: found[name] for name in wanted if found[name] is not None}


def _settled(model, question):
    """Of a target that begins as its foil does, what they share is no output: it is run alone."""
    both = question.target, question.foil
    if question.probability is None and None not in both and both[0][0] == both[1][0]:
        return ask_of(model, question)
    return question


def _decided(model, questions):
    """``questions``, the open ones completed, before their scores are computed in half precision.

    By the model as it is, whatever ``precision`` the scores are computed in.
    """
    places = [place for place, question in enumerate(questions) if question.target is None]
    done = _attribute_held(model, [questions[place] for place in places], {}, False, None)
    found = dict(zip(places, (question for question, _ in done), strict=True))
    return [found.get(place, question) for place, question in enumerate(questions)]


def _near_tie(model, question, facts):
    """Whether the next prompts in the batch may have decided which token an open target is.

    In half precision a batch rounds another way than one prompt does.
    """
    return question.target is None and facts.lead < NEAR and in_half_precision(model)


def _run(model, questions, options, each):
    """``(question, results)`` for each of ``questions``, which all have one shape."""
    results: list[dict[str, Attribution]] = [{} for _ in questions]
    spent: dict[str, float] = {}
    order = sorted(options, key=lambda name: name != "relevance")  # which leaves the gradient too
    with asking(model, questions, each) as asked:
        asked.found["wanted"] = frozenset(options)
        for name in order:
            began = time.perf_counter()
            found = METHODS[name](asked, **options[name])
            spent[name] = time.perf_counter() - began
            for row, result in zip(results, found, strict=True):
                row[name] = result
        asked.settle()
    shared: dict[str, list[str]] = {}
    for name in options:
        shared.setdefault(METHODS[name].reads or name, []).append(name)
    for names in shared.values():
        mean = sum(spent[name] for name in names) / len(names) / len(questions)
        spent.update(dict.fromkeys(names, mean))
    facts = asked.facts or [None] * len(questions)
    return [
        _finished(model, question, fact, {name: row[name] for name in options}, spent)
        for question, fact, row in zip(questions, facts, results, strict=True)
    ]


def _finished(model, question, facts, results, spent):
    if facts is not None and question.probability is None:
        try:
            alone = _near_tie(model, question, facts)
            question = ask_of(model, question) if alone else completed(question, facts)
        except InputError:  # whose foil is the model's own next token, or that one is no token
            return question, {}
    told = {}
    for name, result in results.items():
        for numbers in (result.scores, result.errors, result.gap, question.probability):
            if numbers is not None and not torch.as_tensor(numbers).isfinite().all():
                raise InputError(
                    f"Numbers of {name} are not finite: they overflow in the model, so try "
                    "float32, or look at its weights.",
                    field="scores",
                )
        notes = question.notes
        if result.closed is False:
            gap = "" if result.gap is None else f" (gap {result.gap:.1%})"
            notes += (f"{name} did not close{gap}: its scores are not yet those of the model.",)
        told[name] = replace(
            result, method=name, seconds=spent[name], notes=notes, units=question.units
        )
    return question, told
