"""How good an attribution is, by experiments that anyone can run again.

An attribution claims an order: these tokens mattered more than those. Deletion and insertion test
the order against the model, with random orders beside it; randomisation asks whether the scores
depend on the model at all. What is known from outside, which word must matter, is in
``ground_truth``; what causes the answer inside the model, in ``patching``.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from helpers.architectures import stack_of
from helpers.attribution import Attribution, asking, attribute
from helpers.attribution.engine import working_precision
from helpers.attribution.perturbation import all_subsets, average_gains, coalition_values
from helpers.errors import InputError
from helpers.progress import progress
from helpers.questions import Question

EVIDENCE = Path(__file__).resolve().parent / "data" / "evidence.parquet"


# --- deletion and insertion --------------------------------------------------------------------


@dataclass(frozen=True)
class Curves:
    """What the model answers while tokens go, and while they come, in some orders.

    ``counts``      LongTensor [steps + 1], units taken so far, from 0 to all
    ``deletion``    FloatTensor [orders, steps + 1, 2]: the first units of the order are erased
    ``insertion``   FloatTensor [orders, steps + 1, 2]: all are erased but the first ones
    ``forwards``    rows that were run

    The last dimension holds the objective in nats, and the probability of the target; with a foil
    that is the probability of the target if it must be one of the two.
    """

    counts: torch.Tensor
    deletion: torch.Tensor
    insertion: torch.Tensor
    forwards: int


def erasure_curves(
    model: Any,
    question: Question,
    orders: torch.Tensor,
    replacement: str | torch.Tensor | None = None,
    steps: int | None = None,
    precision: str | None = None,
    among: Sequence[int] | None = None,
) -> Curves:
    """Deletion and insertion curves of some orders of the units, all with the same budget.

    ``orders`` LongTensor [orders, units] names the most important unit first (see
    ``importance_order``). With ``among``, numbers of units, these alone go and come while the
    others stay, and ``orders`` number them from 0 as they stand there. ``replacement`` is what
    stands in for an erased unit: ``"mean"``, ``"eos"``, ``"neighbour"``, ``"zero"``, ``"remove"``
    or a tensor, as in ``occlusion``. ``steps`` limits how many points a curve has beside its start:
    units then go in equal portions. Variants that several orders share are run once.
    ``precision`` is that of ``attribute``.

    Raises ``InputError`` for orders that are not permutations of the units. Source: Petsiuk et
    al. 2018, arXiv:1806.07421.

    notebooks/10_faithfulness.ipynb takes it apart.
    """
    places = list(range(len(question.units)) if among is None else among)
    units = len(places)
    if orders.shape[1:] != (units,) or not orders.sort().values.eq(torch.arange(units)).all():
        raise InputError(f"Each order must name each of the {units} units once.")
    steps = min(units, steps or units)
    counts = torch.linspace(0, units, steps + 1).round().long()
    taken = orders.argsort()[:, None, :] < counts[:, None]  # [orders, steps + 1, units]
    tried, place = torch.stack([~taken, taken]).flatten(0, 2).unique(dim=0, return_inverse=True)
    variants = torch.ones(len(tried), len(question.units), dtype=torch.bool)
    variants[:, places] = tried

    def run(objective):
        some = replace(question, objective=objective)
        with working_precision(model, precision), asking(model, [some]) as asked:
            _, (values,) = coalition_values(asked, [variants], replacement)
        return values[:, 0].cpu()

    objectives = {question.objective, "log_probability"}
    with progress("erasing", len(objectives) * (len(variants) + 1)):
        values = {name: run(name) for name in objectives}
    logs = values["log_probability"]
    probabilities = logs.exp() if question.foil is None else logs.sigmoid()
    both = torch.stack([values[question.objective], probabilities], dim=-1)[place]
    deletion, insertion = both.view(2, *taken.shape[:2], 2)
    return Curves(counts, deletion, insertion, forwards=len(values) * (len(variants) + 1))


def importance_order(result: Attribution) -> torch.Tensor:
    """The units of an ``Attribution``, the most important first: LongTensor [units].

    Scores with a sign are sorted by value, since a negative one says that the token pushed the
    answer away; those without by size. Equal scores keep the order of the prompt.
    """
    return result.scores.argsort(descending=True, stable=True)


def random_orders(units: int, count: int, seed: int = 0) -> torch.Tensor:
    """``count`` random orders of so many units, what any order has to beat: [count, units]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(units, generator=generator) for _ in range(count)])


def area(counts: torch.Tensor, curve: torch.Tensor) -> torch.Tensor:
    """The mean height of curves [..., steps + 1] over the units taken: [...], in their unit.

    Introduced in notebooks/10_faithfulness.ipynb.
    """
    return torch.trapezoid(curve, counts.to(curve), dim=-1) / counts[-1]


def erasure_measures(curves: Curves) -> dict[str, torch.Tensor]:
    """The usual summaries of ``Curves``: ``{name: FloatTensor [orders]}``.

    ``deletion`` (lower is better) and ``insertion`` (higher) are areas under the curves in nats,
    ``faithfulness`` the second minus the first, and ``faithfulness_probability`` the same of
    probabilities. ``comprehensiveness`` (higher) is how far the objective falls without the first
    units, ``sufficiency`` (lower) how far it falls with only them, averaged over the budgets of at
    most half of the units. Source of the last two: DeYoung et al. 2020, arXiv:1911.03429, who
    measure probabilities; here they are nats.
    """
    counts = curves.counts
    deletion, insertion = area(counts, curves.deletion.mT), area(counts, curves.insertion.mT)
    few = (counts > 0) & (2 * counts <= counts[-1])
    few[1] |= not few.any()  # a prompt of one unit
    whole = curves.deletion[:, :1, 0]
    return {
        "deletion": deletion[:, 0],
        "insertion": insertion[:, 0],
        "faithfulness": insertion[:, 0] - deletion[:, 0],
        "faithfulness_probability": insertion[:, 1] - deletion[:, 1],
        "comprehensiveness": (whole - curves.deletion[:, few, 0]).mean(dim=1),
        "sufficiency": (whole - curves.insertion[:, few, 0]).mean(dim=1),
    }


def against_random(
    model: Any,
    question: Question,
    results: dict[str, Attribution],
    *,
    count: int = 20,
    seed: int = 0,
    among: Sequence[int] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """How each of ``results`` ``{name: Attribution}`` does against ``count`` random orders.

    Returns a DataFrame, one row a method: the measures of ``erasure_measures``,
    ``random_faithfulness``, the mean of the random orders, and ``beats_random``, the share of them
    that the method's ``faithfulness`` exceeds. The second half of the random orders are the first
    half from behind: that takes no more rows, as what one erases first the other inserts last, and
    the mean of chance comes out as the 0 that it is. ``among`` and ``options`` are those of
    ``erasure_curves``: with ``among`` the methods' orders are those of these units alone.
    """
    places = torch.arange(len(question.units)) if among is None else torch.tensor(among)
    own = torch.stack([importance_order(result) for result in results.values()])
    own = torch.stack([order[torch.isin(order, places)] for order in own])
    chance = random_orders(len(places), (count + 1) // 2, seed)
    chance = torch.cat([chance, chance.flip(1)])[:count]
    orders = torch.cat([torch.searchsorted(places, own), chance])
    curves = erasure_curves(model, question, orders, among=places.tolist(), **options)
    measures = pd.DataFrame({k: v.numpy() for k, v in erasure_measures(curves).items()})
    methods, by_chance = measures[: len(results)], measures["faithfulness"][len(results) :]
    beaten = methods["faithfulness"].map(lambda value: (by_chance < value - 1e-4).mean())
    return methods.assign(
        random_faithfulness=by_chance.mean(), beats_random=beaten, method=list(results)
    ).set_index("method")


# --- how good an order can be at best ----------------------------------------------------------

EXHAUSTIVE = 12  # units of which all subsets are run: 4,096 rows


@dataclass(frozen=True)
class Limit:
    """What an order of the units of one prompt can reach under erasing, by exhaustive search.

    ``order``     LongTensor [units], the best there is; among equals, any
    ``best``      its ``faithfulness`` (insertion minus deletion, see ``erasure_measures``), in nats
    ``forwards``  rows that were run
    ``gains``     FloatTensor [2**units], what each subset of the units has more than the rest of
                  them, in nats; unit k is in subset s where bit k of s is set
    """

    order: torch.Tensor
    best: float
    forwards: int
    gains: torch.Tensor

    def faithfulness(self, order: torch.Tensor) -> float:
        """That of any ``order`` [units], in nats, without another row."""
        taken = torch.cat([torch.zeros(1, dtype=torch.long), (1 << order).cumsum(0)])
        return float(torch.trapezoid(self.gains[taken])) / len(order)

    def share(self, faithfulness: float) -> float:
        """Where a ``faithfulness`` lies between chance, 0, and the best order, 1.

        Chance is exactly 0 nats, as an order and its reverse have opposite numbers. Below zero is
        worse than chance; nan where no order is better than another.
        """
        return faithfulness / self.best if self.best > 1e-6 else math.nan

    def shapley(self) -> torch.Tensor:
        """The units' Shapley values [units] in nats, exact, without another row.

        A subset and the rest of the units count alike in them, with opposite signs: so half of
        ``gains`` has the Shapley values of the objective.
        """
        half = self.gains[:, None] / 2
        scores, _ = average_gains(all_subsets(len(self.order))[:-1], half[:-1], half[-1])
        return scores[0].float()


def erasure_limit(
    model: Any, question: Question, replacement: str | torch.Tensor | None = None
) -> Limit:
    """The best order of the units under insertion minus deletion, of all that there are.

    All 2**units subsets are run. What an order gains at a step depends on which units were taken
    and not on their order, so the best way to each subset is the best way to one that lacks a unit,
    and that step: 2**units * units steps stand for all units! orders (Held and Karp 1962,
    doi:10.1137/0110015). ``replacement`` is that of ``erasure_curves``.

    Raises ``InputError`` for more than ``EXHAUSTIVE`` units.
    """
    units = len(question.units)
    if units > EXHAUSTIVE:
        raise InputError(
            f"The best order of {units} units cannot be searched, only of {EXHAUSTIVE} at most: "
            "group them, for example by units='words'."
        )
    kept = all_subsets(units)  # [2**units, units]
    with progress("erasing", len(kept) + 1), asking(model, [question]) as asked:
        _, (values,) = coalition_values(asked, [kept], replacement)
    gain = (values[:, 0] - values[:, 0].flip(0)).double().cpu().numpy()  # only these, minus without
    size = kept.sum(dim=1).numpy()
    share = np.where((size == 0) | (size == units), 0.5, 1.0) / units  # of the area: trapezoids
    best, last = np.full(2**units, -np.inf), np.zeros(2**units, dtype=int)
    best[0] = share[0] * gain[0]
    for taken in range(1, 2**units):
        before = {taken ^ (1 << unit): unit for unit in range(units) if taken >> unit & 1}
        via = max(before, key=best.__getitem__)
        best[taken], last[taken] = best[via] + share[taken] * gain[taken], before[via]
    order, taken = [], 2**units - 1
    while taken:
        order.append(last[taken])
        taken ^= 1 << last[taken]
    found = torch.tensor(order[::-1])
    return Limit(found, float(best[-1]), len(kept) + 1, torch.from_numpy(gain))


# --- does the method notice that the model has changed? ----------------------------------------


@contextlib.contextmanager
def randomised(model: Any, layers: int, seed: int = 0) -> Iterator[Any]:
    """The model with its top ``layers`` layers re-initialised while inside, and restored after.

    Each weight matrix is drawn anew from a normal distribution with its own mean and deviation, so
    that activations keep their size; norms' gains stay. Raises ``InputError`` for more layers than
    there are. Source: Adebayo et al. 2018, arXiv:1810.03292.

    notebooks/10_faithfulness.ipynb takes it apart.
    """
    stack = stack_of(model).layers
    if not 0 <= layers <= len(stack):
        raise InputError(f"There are {len(stack)} layers to re-initialise, not {layers}.")
    generator = torch.Generator().manual_seed(seed)
    top = stack[len(stack) - layers :]
    matrices = [weight for layer in top for weight in layer.parameters() if weight.dim() == 2]
    kept = [weight.data for weight in matrices]
    try:
        for weight in matrices:
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.data = noise * weight.data.float().std().to(weight) + weight.data.mean()
        yield model
    finally:
        for weight, data in zip(matrices, kept, strict=True):
            weight.data = data


def randomisation(
    model: Any,
    question: Question,
    methods: Mapping[str, Mapping[str, Any]],
    depths: Sequence[int],
    seed: int = 0,
) -> dict[str, list[float]]:
    """Rank correlation of methods' scores with themselves after layers are re-initialised.

    ``methods`` is ``{name: options}``. For each number of layers in ``depths``, counted from the
    top: a float near 1 says that the method did not notice. ``{name: floats}``, in the order of
    ``depths``.
    """

    def sizes():
        return {
            name: attribute(model, question, name, **options).scores.abs()
            for name, options in methods.items()
        }

    before = sizes()
    after: dict[str, list[float]] = {name: [] for name in methods}
    for layers in depths:
        with randomised(model, layers, seed):
            for name, scores in sizes().items():
                after[name].append(rank_correlation(before[name], scores))
    return after


# --- numbers over many prompts -----------------------------------------------------------------


def rank_correlation(first: Any, second: Any) -> float:
    """Spearman's: +1 for the same order, -1 for the reverse, nan for fewer than three.

    Introduced in notebooks/10_faithfulness.ipynb.
    """
    if len(first) < 3:
        return math.nan
    ranks = [pd.Series(values.tolist()).rank() for values in (first, second)]
    return float(ranks[0].corr(ranks[1]))


def bootstrap_interval(
    values: Any, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of ``values`` and its 95 % interval: ``(mean, low, high)``.

    The interval is the percentile bootstrap's: the prompts are drawn again, with replacement, and
    the middle 95 % of the means are kept. Source: Efron 1979, doi:10.1214/aos/1176344552.

    Introduced in notebooks/10_faithfulness.ipynb.
    """
    values = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(seed).choice(values, (resamples, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def evidence_table(path: Path = EVIDENCE) -> pd.DataFrame:
    """What ``make evidence`` measured with the bundled model, one number a row: a DataFrame.

    Columns: ``split``, ``family`` and ``case`` (of ``ground_truth``), ``tokens`` and ``units`` of
    the prompt, ``method``, ``replacement`` (of the erased units, where some were erased),
    ``measure``, ``value``. Not every method ran on every prompt: see ``best_by_interval``.
    """
    return pd.read_parquet(path)


def by_method(
    table: pd.DataFrame, measure: str, family: str | None = None, **only: Any
) -> pd.DataFrame:
    """Mean and 95 % interval of one measure for each method, over prompts: a DataFrame.

    Cases 2k and 2k + 1 of a family are one minimal pair, asked in both directions, and not
    independent of each other: the interval is over pairs, each with the mean of its two. ``only``
    keeps the rows whose columns have these values, such as ``replacement="mean"``. Columns
    ``mean``, ``low``, ``high``, ``prompts``; sorted, the largest mean first. A single pair has no
    interval: ``low`` and ``high`` are then nan.
    """
    some = _rows_of(table, measure, family, only)
    rows = {}
    for method, found in some.groupby("method", observed=True):
        pairs = found.groupby([found["family"], found["case"] // 2], observed=True)["value"].mean()
        mean, low, high = bootstrap_interval(pairs)
        band = (low, high) if len(pairs) > 1 else (math.nan, math.nan)
        rows[method] = (mean, *band, len(found))
    frame = pd.DataFrame.from_dict(rows, "index", columns=["mean", "low", "high", "prompts"])
    return frame.sort_values("mean", ascending=False)


FEWEST_PAIRS = 6  # five that all point one way do so once in 16 times between equals


@dataclass(frozen=True)
class Best:
    """The method with the largest mean, and how far it leads.

    ``method``  its name
    ``leads``   DataFrame, a row for each other method, the smallest lead first: ``mean``, ``low``
                and ``high`` of what the method has more than the other on prompts that both ran on,
                and how many ``pairs`` these are; of fewer than ``FEWEST_PAIRS`` pairs the interval
                is nan
    """

    method: str
    leads: pd.DataFrame

    @property
    def alike(self) -> list[str]:
        """The methods that it cannot be told from: a lead of zero is in the interval, or above."""
        return list(self.leads.index[~(self.leads["low"] > 0)])

    @property
    def wins(self) -> bool:
        """Whether every lead's interval is above zero."""
        return not self.alike


def best_by_interval(
    table: pd.DataFrame, measure: str, family: str | None = None, **only: Any
) -> Best:
    """The best method by one measure, and by how much it is better than each other one.

    The arguments are those of ``by_method``. The best has the largest mean of the methods that ran
    on the most prompts: a mean over fewer may only be that of easier prompts. A lead is the
    mean difference over the pairs that both methods ran on, and its 95 % interval the bootstrap's
    over these pairs; so prompts that are hard for both do not widen it.

    Raises ``InputError`` where the table has no such number.
    """
    some = _rows_of(table, measure, family, only)
    if some.empty:
        raise InputError(f"The table has no {measure}: there is no best method to be named.")
    wide = some.pivot_table("value", ["family", "case"], "method", observed=True)
    count = wide.notna().sum()
    best = _pair_means(wide.loc[:, count == count.max()]).mean().idxmax()
    rows = {}
    for other in wide.columns.drop(best):
        ahead = _pair_means((wide[best] - wide[other]).dropna())
        mean, low, high = bootstrap_interval(ahead) if len(ahead) else [math.nan] * 3
        told = len(ahead) >= FEWEST_PAIRS
        rows[other] = (mean, *((low, high) if told else [math.nan] * 2), len(ahead))
    leads = pd.DataFrame.from_dict(rows, "index", columns=["mean", "low", "high", "pairs"])
    return Best(str(best), leads.sort_values("mean"))


def _rows_of(table, measure, family, only):
    """The rows of a table that hold a number of ``measure``."""
    some = table[table["measure"] == measure].dropna(subset=["value"])
    if family is not None:
        some = some[some["family"] == family]
    for column, value in only.items():
        some = some[some[column] == value]
    return some


def _pair_means(some):
    """What is indexed by family and case, with the mean of both directions of a minimal pair."""
    family, case = (some.index.get_level_values(level) for level in (0, 1))
    return some.groupby([family, case // 2], observed=True).mean()
