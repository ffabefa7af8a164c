"""How much each token of a prompt moved the prediction: one function a method.

All methods explain one number, the objective: the logit of the target, less the logit of the foil
where there is one. They return an ``Attribution``, which carries its own evidence: how far the
scores are from adding up (``gap``), whether that was near enough (``closed``), how well each is
known (``errors``) and what they cost (``evaluations``, ``forwards``, ``seconds``).

A method is a function ``(model, question, ...) -> Attribution``. To add one, write it in the module
it belongs to and name it in ``METHODS``; comparison, reports and benchmarks pick it up from there.
"""

import time
from dataclasses import replace

from helpers.attribution.attention import attention, attention_rollout, last_attention_rows
from helpers.attribution.control import random
from helpers.attribution.decomposition import alti_logit
from helpers.attribution.engine import (
    answer_only,
    embed_prompt,
    frozen,
    objective,
    objective_gradient,
    rows_per_batch,
    working_precision,
)
from helpers.attribution.gradients import gradient_x_input, saliency
from helpers.attribution.path import (
    baseline_embeds,
    completeness_gap,
    fixed_step_integrated_gradients,
    halve,
    integrated_gradients,
    path_slopes,
    refine,
    simpson,
)
from helpers.attribution.perturbation import (
    occlusion,
    replaced_outputs,
    replaced_values,
    shapley,
)
from helpers.attribution.relevance import relevance
from helpers.attribution.result import Attribution
from helpers.errors import InputError

__all__ = [
    "METHODS",
    "Attribution",
    "attribute",
    "baseline_embeds",
    "completeness_gap",
    "embed_prompt",
    "fixed_step_integrated_gradients",
    "halve",
    "last_attention_rows",
    "objective",
    "objective_gradient",
    "path_slopes",
    "refine",
    "replaced_outputs",
    "replaced_values",
    "rows_per_batch",
    "simpson",
]

METHODS = {
    "saliency": saliency,
    "gradient_x_input": gradient_x_input,
    "attention": attention,
    "attention_rollout": attention_rollout,
    "alti_logit": alti_logit,
    "relevance": relevance,
    "integrated_gradients": integrated_gradients,
    "occlusion": occlusion,
    "shapley": shapley,
    "random": random,
}


def attribute(model, question, method, *, precision=None, **options):
    """The attribution of ``question`` by ``method``, a key of ``METHODS``.

    ``precision="bfloat16"`` does the matrix products in half precision, which is faster and a
    little less exact; ``None`` leaves the model's own. ``options`` are the method's own, for
    example ``tolerance`` for ``"integrated_gradients"``. The model is left as it was found.

    Raises ``InputError`` for an unknown method or precision.
    """
    if method not in METHODS:
        raise InputError(f"There is no method {method!r}: choose from {', '.join(METHODS)}.")
    started = time.perf_counter()
    with frozen(model), working_precision(model, precision), answer_only(model, question) as answer:
        result = METHODS[method](model, answer, **options)
    return replace(
        result,
        method=method,
        scores=_plain(result.scores),
        errors=None if result.errors is None else _plain(result.errors),
        seconds=time.perf_counter() - started,
    )


def _plain(scores):
    return scores.detach().float().cpu()
