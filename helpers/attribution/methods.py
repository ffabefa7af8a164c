"""The methods: each one says all about itself in one record."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any

from helpers.attribution.attention import attention, attention_rollout
from helpers.attribution.control import random
from helpers.attribution.decomposition import alti_logit, refuses_parts
from helpers.attribution.engine import Asked, refuses_attending
from helpers.attribution.find_then_rank import find_then_rank, most_rows
from helpers.attribution.gradients import gradient_x_input, refuses_gradients, saliency
from helpers.attribution.path import FIRST_EVALUATIONS, integrated_gradients
from helpers.attribution.perturbation import (
    coalition_rows,
    coalitions,
    occlusion,
    shapley,
    shapley_rows,
)
from helpers.attribution.relevance import refuses_rules, relevance
from helpers.attribution.result import Attribution
from helpers.errors import InputError

BUDGET = 30_000  # tokens x gradients that a report lets one method spend on one prompt
DEFAULT = "find_then_rank"  # where no method is named: it finds the word and predicts erasure
ENTRY_POINT = "llama_notebooks.methods"
ERASED = 0.85  # of a row is run where some units are erased at random


@dataclass(frozen=True)
class Price:
    """Rows that a method runs: with a gradient, or only forward.

    ``share`` is the part of a forward row that is really run, in the mean: rows share what comes
    before their first change. ``kept`` is what a gradient keeps for its way back, over what a plain
    one does. With ``maps`` a layer's attention maps are formed, [heads, tokens, tokens]. With
    ``vectors`` a row is run by itself, and each layer forms
    what every position moves to every other, [tokens, tokens, width].
    """

    gradients: float = 0
    forwards: float = 0
    share: float = 1.0
    kept: float = 1.0
    maps: bool = False
    vectors: bool = False

    @property
    def rows(self) -> float:
        """All of it in forward rows: through frozen weights, as many products go back."""
        return 2 * self.gradients + self.share * self.forwards


def _no_options(units: int, tokens: int, budget: int) -> dict:
    return {}


@dataclass(frozen=True)
class Method:
    """What there is to know of a method, asked by notebooks, reports, scores and estimates alike.

    ``run(asked, **options)`` returns one ``Attribution`` for each question of an ``Asked``.
    ``signed`` says whether negative scores push the answer away, ``adds_up`` whether scores promise
    a total, ``additive`` whether a unit's score is the sum of its tokens' (else units are taken
    whole). ``refusal(model)`` is a sentence where the model lacks what the method needs, or
    ``None``. ``options(units, tokens, budget)`` are the method's options under a budget of tokens x
    gradients, ``None`` where it cannot be afforded; ``price(units, tokens, options)`` is what a
    prompt takes with them. ``reads`` names a pass that methods share. ``at_most`` is the part of a
    report's rows that it may take where other methods are run too.

    A package adds its own by the entry point group ``llama_notebooks.methods``, which leads to a
    ``Method``; its name is that of the entry point.
    """

    name: str
    run: Callable[..., list[Attribution]]
    price: Callable[[int, int, dict], Price]
    signed: bool = True
    adds_up: bool = False
    additive: bool = True
    refusal: Callable[[Any], str | None] = lambda model: None
    options: Callable[[int, int, int], dict | None] = _no_options
    reads: str = ""
    at_most: float = 1.0

    def __call__(self, asked: Asked, **options: Any) -> list[Attribution]:
        return self.run(asked, **options)


def _one_gradient(units: int, tokens: int, options: dict) -> Price:
    return Price(gradients=1)


def _one_forward(units: int, tokens: int, options: dict) -> Price:
    return Price(forwards=1)


def _relevance_price(units: int, tokens: int, options: dict) -> Price:
    begun = options.get("baseline") != "zero"  # a row that says where the scores are counted from
    return Price(gradients=1, forwards=int(begun), kept=1.15)  # the rules' slopes


def _rollout_price(units: int, tokens: int, options: dict) -> Price:
    return Price(forwards=1, maps=True)


def _alti_price(units: int, tokens: int, options: dict) -> Price:
    return Price(forwards=1, maps=True, vectors=True)


def _path_options(units: int, tokens: int, budget: int) -> dict:
    return {"max_evaluations": max(FIRST_EVALUATIONS, min(2000, budget // tokens))}


def _path_price(units: int, tokens: int, options: dict) -> Price:
    usual = 300  # gradients in the mean over benchmarks/prompts/tuning.yml; a few take 2,000
    return Price(gradients=min(usual, options.get("max_evaluations", 2000)))


def _shapley_options(units: int, tokens: int, budget: int) -> dict | None:
    rows = budget // tokens
    if rows < 4 * units and rows < 2**units:
        return None
    return {"permutations": 2 * max(2, min(10, rows // 8 // max(1, units)))}


def _shapley_price(units: int, tokens: int, options: dict) -> Price:
    rows = shapley_rows(units, options.get("permutations", 20))
    return Price(forwards=rows + 1, share=0.9)


def _coalition_options(units: int, tokens: int, budget: int) -> dict | None:
    rows = min(coalition_rows(units), budget // tokens - 1)
    return {"rows": rows} if rows >= min(4 * units, 2**units - 1) else None


def _coalition_price(units: int, tokens: int, options: dict) -> Price:
    rows = min(2**units - 1, options.get("rows") or coalition_rows(units))
    if options.get("keep") in (0, 1):
        rows = units + (options["keep"] == 0)  # which begins with nothing kept
    return Price(forwards=rows + 1, share=0.9)


def _find_options(units: int, tokens: int, budget: int) -> dict | None:
    return {} if most_rows(units) < budget // tokens else None


def _find_price(units: int, tokens: int, options: dict) -> Price:
    rows = min(2**units - 1, options.get("rows") or most_rows(units))
    return Price(gradients=1, forwards=rows + 2, kept=1.15, share=0.8)


def _occlusion_price(units: int, tokens: int, options: dict) -> Price:
    return Price(forwards=units + 1, share=0.5 + 0.5 / max(1, units))


BUILT_IN = [
    Method(
        "saliency",
        saliency,
        _one_gradient,
        signed=False,
        refusal=refuses_gradients,
        reads="gradient",
    ),
    Method(
        "gradient_x_input",
        gradient_x_input,
        _one_gradient,
        refusal=refuses_gradients,
        reads="gradient",
    ),
    Method("attention", attention, _one_forward, signed=False, refusal=refuses_attending),
    Method(
        "attention_rollout",
        attention_rollout,
        _rollout_price,
        signed=False,
        refusal=refuses_attending,
    ),
    Method("alti_logit", alti_logit, _alti_price, adds_up=True, refusal=refuses_parts),
    Method(
        "relevance",
        relevance,
        _relevance_price,
        adds_up=True,
        refusal=refuses_rules,
        reads="gradient",
    ),
    Method(
        "integrated_gradients",
        integrated_gradients,
        _path_price,
        adds_up=True,
        refusal=refuses_gradients,
        options=_path_options,
        at_most=0.25,  # no better than chance at finding the word that decides: 07
    ),
    Method("occlusion", occlusion, _occlusion_price, additive=False),
    Method(
        "shapley",
        shapley,
        _shapley_price,
        adds_up=True,
        additive=False,
        options=_shapley_options,
    ),
    Method("coalitions", coalitions, _coalition_price, additive=False, options=_coalition_options),
    Method(
        "find_then_rank",
        find_then_rank,
        _find_price,
        additive=False,
        refusal=refuses_rules,
        options=_find_options,
    ),
    Method("random", random, lambda units, tokens, options: Price(), additive=False),
]


class Methods(Mapping[str, Method]):
    """``{name: Method}`` of this package and of others, which are looked for at the first use."""

    @cached_property
    def _found(self) -> dict[str, Method]:
        found = {method.name: method for method in BUILT_IN}
        for point in entry_points(group=ENTRY_POINT):
            try:
                method = point.load()
                fault = "is no Method" if not isinstance(method, Method) else ""
            except Exception as error:  # whatever a stranger's module raises
                fault = f"cannot be loaded ({type(error).__name__}: {error})"
            if point.name in found:
                fault = "is there already"
            if fault:
                package = point.dist.name if point.dist else point.value
                raise InputError(
                    f"The method {point.name!r} of the package {package} {fault}: uninstall the "
                    "package, or ask its authors."
                )
            found[point.name] = method
        return found

    def __getitem__(self, name: str) -> Method:
        if name not in self._found:
            raise InputError(
                f"There is no method {str(name)[:80]!r}: choose from {', '.join(self._found)}.",
                field="methods",
            )
        return self._found[name]

    def __contains__(self, name: object) -> bool:  # that of a mapping would catch a KeyError
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


METHODS = Methods()


def erasure_size(units: int, tokens: int) -> tuple[int, int]:
    """How many random orders a report's test by erasure has, and in how many steps units go."""
    return 20 if tokens <= 12 else 10, min(units, max(2, 330 // tokens))


def erasure_price(units: int, tokens: int, orders: int) -> Price:
    """What a report's test by erasure takes: units go in so many orders, and in random ones.

    ``tokens`` are those of the prompt; notebooks/08_comparison.ipynb runs it.
    """
    chances, steps = erasure_size(units, tokens)
    # half of the random orders are the others from behind, with the same variants
    drawn, there_are = (2 * orders + chances) * (steps - 1) + 3, 2.0 ** min(units, 60)
    variants = -there_are * math.expm1(-drawn / there_are)  # those that are drawn twice run once
    return Price(forwards=variants, share=ERASED)


def options_of(
    wanted: Mapping[str, Mapping[str, Any]],
    units: int,
    tokens: int,
    budget: int,
    *,
    of_prompt: int | None = None,
) -> dict[str, dict | None]:
    """The options of each of ``wanted`` under a budget of tokens x gradients, run in one report.

    ``wanted`` maps names to options that go before those of the budget. A method with a part of its
    own, ``at_most``, has that of what the others and the test by erasure are priced at, if that is
    less than the budget; where there are no others it has the budget. ``None`` where a method
    cannot be afforded. ``tokens`` are those of all texts that are run for one row, and
    ``of_prompt``, where they are fewer, those of the prompt.
    """

    def options(name, budget):
        found = METHODS[name].options(units, tokens, budget)
        return None if found is None else found | wanted[name]

    found = {name: options(name, budget) for name in wanted}
    parts = {name: METHODS[name].at_most for name in wanted if METHODS[name].at_most < 1}
    others = {name: some for name, some in found.items() if some is not None and name not in parts}
    if parts and others:
        prices = [METHODS[name].price(units, tokens, some) for name, some in others.items()]
        prices.append(erasure_price(units, of_prompt or tokens, len(found)))
        gradients = sum(price.rows for price in prices) / Price(gradients=1).rows
        for name, part in parts.items():
            spent = int(tokens * gradients * part / (1 - part))
            found[name] = options(name, min(budget, spent))
    return found
