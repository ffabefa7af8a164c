"""A question's attributions as tables: one row a score, and one row a method."""

from collections.abc import Mapping

import pandas as pd

from helpers.attribution import Attribution
from helpers.faithfulness import importance_order
from helpers.prompts import shortened
from helpers.questions import Question

NOT_WRITTEN = ("template", "answer")  # parts of units that nobody who asked has written


def ranked_units(question: Question) -> list[int]:
    """The units that somebody wrote, by number: those that a report ranks and takes out.

    Where sources were named, these alone: the words of the question itself matter to any answer.
    """
    ranked = [unit.part not in NOT_WRITTEN for unit in question.units]
    labels = [unit.label.strip() for unit in question.units]
    # a source is whole tokens, so its label may have a character more or less than the text given
    named = [
        any(label and (label in source or source in label) for source in question.sources)
        for label in labels
    ]
    if any(named):
        ranked = named
    return [unit for unit, is_ranked in enumerate(ranked) if is_ranked]


def written_first(question: Question, result: Attribution) -> list[int]:
    """The ``ranked_units``, the most important first."""
    ranked = set(ranked_units(question))
    return [unit for unit in importance_order(result).tolist() if unit in ranked]


def score_table(question: Question, results: Mapping[str, Attribution]) -> pd.DataFrame:
    """One row a score: a DataFrame of all ``results`` ``{method: Attribution}``.

    Columns: ``method``, ``output`` (the number of the token that is explained by itself; empty: of
    all together), ``unit``, its ``part``, its tokens from ``start`` to before ``end``, its
    ``label``, ``score``, and the method's own ``error`` where it has one. A label of more than
    2,000 characters is cut, and says so.
    """
    units = pd.DataFrame(
        {
            "unit": range(len(question.units)),
            "part": [unit.part for unit in question.units],
            "start": [min(unit.positions) for unit in question.units],
            "end": [max(unit.positions) + 1 for unit in question.units],
            "label": [shortened(unit.label) for unit in question.units],
        }
    )
    tables = []
    for name, result in results.items():
        error = None if result.errors is None else result.errors.numpy()
        rows = units.assign(method=name)
        tables.append(rows.assign(output="", score=result.scores.numpy(), error=error))
        if result.each is not None and len(result.outputs) > 1:
            for output, scores in enumerate(result.each.numpy()):
                tables.append(rows.assign(output=str(output), score=scores, error=None))
    columns = ["method", "output", *units.columns, "score", "error"]
    return pd.concat([table.astype({"error": float}) for table in tables])[columns]


def method_table(
    question: Question,
    results: Mapping[str, Attribution],
    tested: pd.DataFrame,
    evidence: str = "",
) -> pd.DataFrame:
    """One row a method, with what speaks for it: a DataFrame.

    ``tested`` is what ``against_random`` says of ``results``. ``evidence_rank`` is the first place,
    in the method's order, of a unit with the words of ``evidence``: empty where none are known.
    """
    positions = {position for place in question.places(evidence) for position in place}
    must = {i for i, unit in enumerate(question.units) if positions & set(unit.positions)}
    rows = []
    for name, result in results.items():
        order = importance_order(result).tolist()
        first = next(iter(written_first(question, result)), None)
        row = {
            "method": name,
            "strongest unit": "" if first is None else shortened(question.units[first].label),
            "gap": result.gap,
            "closed": {True: "yes", False: "NO", None: "-"}[result.closed],
            "evaluations": result.evaluations,
            "forwards": result.forwards,
            "seconds": result.seconds,
            "evidence_rank": 1 + min(map(order.index, must)) if must else None,
        }
        rows.append(row)
    measures = ["faithfulness", "random_faithfulness", "beats_random"]
    table = pd.DataFrame(rows).astype({"gap": float, "evidence_rank": float})
    return table.join(tested[measures], on="method")
