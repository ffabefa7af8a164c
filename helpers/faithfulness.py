"""How good an attribution is, by experiments that anyone can run again.

An attribution claims an order: these tokens mattered more than those. Deletion and insertion test
the order against the model, with random orders beside it; randomisation asks whether the scores
depend on the model at all. What is known from outside, which word must matter, is in
``ground_truth``; what causes the answer inside the model, in ``patching``.
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from helpers.attribution import (
    attribute,
    embed_prompt,
    replaced_outputs,
)
from helpers.attribution.engine import answer_only, contrast, working_precision
from helpers.errors import InputError

EVIDENCE = Path(__file__).resolve().parent / "data" / "evidence.parquet"
REPLACEMENTS = ("mean", "eos", "neighbour")


# --- deletion and insertion --------------------------------------------------------------------


@dataclass(frozen=True)
class Curves:
    """What the model answers while tokens go, and while they come, in some orders.

    ``counts``      LongTensor [steps + 1], tokens taken so far, from 0 to seq
    ``deletion``    FloatTensor [orders, steps + 1, 2]: the first tokens of the order are replaced
    ``insertion``   FloatTensor [orders, steps + 1, 2]: all are replaced but the first ones
    ``forwards``    rows that were run

    The last dimension holds the objective in logits, and the probability of the target; with a foil
    that is the probability of the target if it must be one of the two.
    """

    counts: torch.Tensor
    deletion: torch.Tensor
    insertion: torch.Tensor
    forwards: int


def erasure_curves(model, question, orders, baseline="mean", steps=None, precision=None):
    """Deletion and insertion curves of some orders of the tokens, all with the same budget.

    ``orders`` LongTensor [orders, seq] names the most important position first (see
    ``importance_order``). A token is erased by putting ``baseline`` in its place: ``"mean"``,
    ``"eos"``, ``"zero"``, ``"neighbour"`` or a tensor (see ``replacement``). ``steps`` limits how
    many points a curve has beside its start: tokens then go in equal portions. Variants that
    several orders share are run once. ``precision`` is that of ``attribute``.

    Raises ``InputError`` for orders that are not permutations of the positions. Source: Petsiuk et
    al. 2018, arXiv:1806.07421.

    notebooks/10_faithfulness.ipynb takes it apart.
    """
    seq = question.input_ids.shape[1]
    if orders.shape[1:] != (seq,) or not orders.sort().values.eq(torch.arange(seq)).all():
        raise InputError(f"Each order must name each of the {seq} positions once.")
    steps = min(seq, steps or seq)
    counts = torch.linspace(0, seq, steps + 1).round().long()
    taken = orders.argsort()[:, None, :] < counts[:, None]  # [orders, steps + 1, seq]
    variants, place = torch.stack([taken, ~taken]).flatten(0, 2).unique(dim=0, return_inverse=True)
    # without a foil the probability needs the logits of the whole vocabulary
    small = answer_only(model, question) if question.foil is not None else None
    with working_precision(model, precision), small or contextlib.nullcontext(question) as answer:
        _, values = replaced_outputs(
            model,
            answer,
            variants,
            lambda logits: _logit_and_probability(logits, answer),
            replacement(model, question, baseline),
        )
    values = values.cpu()[place].view(2, *taken.shape[:2], 2)
    return Curves(counts, values[0], values[1], forwards=len(variants) + 1)


def importance_order(result):
    """The positions of an ``Attribution``, the most important first: LongTensor [seq].

    Scores with a sign are sorted by value, since a negative one says that the token pushed the
    answer away; those without by size. Equal scores keep the order of the prompt.
    """
    return result.scores.argsort(descending=True, stable=True)


def random_orders(seq, count, seed=0):
    """``count`` random orders of ``seq`` positions, what any order has to beat: [count, seq]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(seq, generator=generator) for _ in range(count)])


def replacement(model, question, name):
    """What stands in for an erased token, as ``baseline_embeds`` takes it.

    ``"neighbour"`` is the embedding of the token before it (after it, for the first; a lone token
    is its own): a word of this very prompt, where ``"mean"`` and ``"eos"`` are vectors that no text
    has in that place. Other names and tensors are returned as they are.
    """
    if isinstance(name, str) and name == "neighbour":
        embeds = embed_prompt(model, question)
        seq = embeds.shape[1]
        return embeds[:, [1 % seq, *range(seq - 1)]]
    return name


def _logit_and_probability(logits, question):
    value = contrast(logits, question)
    if question.foil is None:
        return torch.stack([value, (value - logits.logsumexp(dim=-1)).exp()], dim=-1)
    return torch.stack([value, value.sigmoid()], dim=-1)


def area(counts, curve):
    """The mean height of curves [..., steps + 1] over the tokens taken: [...], in their unit.

    Introduced in notebooks/10_faithfulness.ipynb.
    """
    return torch.trapezoid(curve, counts.to(curve), dim=-1) / counts[-1]


def erasure_measures(curves):
    """The usual summaries of ``Curves``: ``{name: FloatTensor [orders]}``.

    ``deletion`` (lower is better) and ``insertion`` (higher) are areas under the curves in logits,
    ``faithfulness`` the second less the first, and ``faithfulness_probability`` the same of
    probabilities. ``comprehensiveness`` (higher) is how far the objective falls without the first
    tokens, ``sufficiency`` (lower) how far it falls with only them, averaged over the budgets of at
    most half of the tokens. Source of the last two: DeYoung et al. 2020, arXiv:1911.03429, who
    measure probabilities; here they are logits.
    """
    counts = curves.counts
    deletion, insertion = area(counts, curves.deletion.mT), area(counts, curves.insertion.mT)
    few = (counts > 0) & (2 * counts <= counts[-1])
    few[1] |= not few.any()  # a prompt of one token
    whole = curves.deletion[:, :1, 0]
    return {
        "deletion": deletion[:, 0],
        "insertion": insertion[:, 0],
        "faithfulness": insertion[:, 0] - deletion[:, 0],
        "faithfulness_probability": insertion[:, 1] - deletion[:, 1],
        "comprehensiveness": (whole - curves.deletion[:, few, 0]).mean(dim=1),
        "sufficiency": (whole - curves.insertion[:, few, 0]).mean(dim=1),
    }


def against_random(model, question, results, *, count=20, seed=0, **options):
    """How each of ``results`` ``{name: Attribution}`` does against ``count`` random orders.

    Returns a DataFrame, one row a method: the measures of ``erasure_measures``,
    ``random_faithfulness``, the mean of the random orders, and ``beats_random``, the share of them
    that the method's ``faithfulness`` exceeds. ``options`` are those of ``erasure_curves``.
    """
    seq = question.input_ids.shape[1]
    orders = [importance_order(result) for result in results.values()]
    orders = torch.cat([torch.stack(orders), random_orders(seq, count, seed)])
    curves = erasure_curves(model, question, orders, **options)
    measures = pd.DataFrame({k: v.numpy() for k, v in erasure_measures(curves).items()})
    methods, chance = measures[: len(results)], measures["faithfulness"][len(results) :]
    beaten = methods["faithfulness"].map(lambda value: (chance < value - 1e-4).mean())
    return methods.assign(
        random_faithfulness=chance.mean(), beats_random=beaten, method=list(results)
    ).set_index("method")


# --- does the method notice that the model has changed? ----------------------------------------


@contextlib.contextmanager
def randomised(model, layers, seed=0):
    """The model with its top ``layers`` layers re-initialised while inside, and restored after.

    Each weight matrix is drawn anew from a normal distribution with its own mean and deviation, so
    that activations keep their size; norms' gains stay. Raises ``InputError`` for more layers than
    there are. Source: Adebayo et al. 2018, arXiv:1810.03292.

    notebooks/10_faithfulness.ipynb takes it apart.
    """
    if not 0 <= layers <= len(model.model.layers):
        raise InputError(
            f"There are {len(model.model.layers)} layers to re-initialise, not {layers}."
        )
    generator = torch.Generator().manual_seed(seed)
    top = model.model.layers[len(model.model.layers) - layers :]
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


def randomisation(model, question, method, depths, seed=0, **options):
    """Rank correlation of a method's scores with themselves after layers are re-initialised.

    For each number of layers in ``depths``, counted from the top: a float near 1 says that the
    method did not notice. ``options`` are the method's. A list of floats, in the order of
    ``depths``.
    """
    before = attribute(model, question, method, **options).scores.abs()
    after = []
    for layers in depths:
        with randomised(model, layers, seed):
            scores = attribute(model, question, method, **options).scores.abs()
        after.append(rank_correlation(before, scores))
    return after


# --- numbers over many prompts -----------------------------------------------------------------


def rank_correlation(first, second):
    """Spearman's: +1 for the same order, -1 for the reverse, nan for fewer than three tokens.

    Introduced in notebooks/10_faithfulness.ipynb.
    """
    if len(first) < 3:
        return math.nan
    ranks = [pd.Series(values.tolist()).rank() for values in (first, second)]
    return float(ranks[0].corr(ranks[1]))


def bootstrap_interval(values, resamples=2000, seed=0):
    """The mean of ``values`` and its 95 % interval: ``(mean, low, high)``.

    The interval is the percentile bootstrap's: the prompts are drawn again, with replacement, and
    the middle 95 % of the means are kept. Source: Efron 1979, doi:10.1214/aos/1176344552.

    Introduced in notebooks/10_faithfulness.ipynb.
    """
    values = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(seed).choice(values, (resamples, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def evidence_table(path=EVIDENCE):
    """What ``make evidence`` measured with the bundled model, one number a row: a DataFrame.

    Columns: ``split``, ``family`` and ``case`` (of ``ground_truth``), ``tokens``, ``method``,
    ``replacement`` (of the erased tokens, where tokens were erased), ``measure``, ``value``.
    """
    return pd.read_parquet(path)


def by_method(table, measure, family=None, **only):
    """Mean and 95 % interval of one measure for each method, over prompts: a DataFrame.

    Cases 2k and 2k + 1 of a family are one minimal pair, asked in both directions, and not
    independent of each other: the interval is over pairs, each with the mean of its two. ``only``
    keeps the rows whose columns have these values, such as ``replacement="mean"``. Columns
    ``mean``, ``low``, ``high``, ``prompts``; sorted, the largest mean first.
    """
    some = table[table["measure"] == measure].dropna(subset=["value"])
    if family is not None:
        some = some[some["family"] == family]
    for column, value in only.items():
        some = some[some[column] == value]
    rows = {}
    for method, found in some.groupby("method", observed=True):
        pairs = found.groupby([found["family"], found["case"] // 2], observed=True)["value"].mean()
        rows[method] = (*bootstrap_interval(pairs), len(found))
    frame = pd.DataFrame.from_dict(rows, "index", columns=["mean", "low", "high", "prompts"])
    return frame.sort_values("mean", ascending=False)
