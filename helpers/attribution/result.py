"""What every method returns: the scores, and the evidence that comes with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helpers.prompts import Unit, token_labels


@dataclass(frozen=True)
class Attribution:
    """Scores with the evidence that goes with them.

    ``scores``       FloatTensor [units] on the CPU; in nats where the method has a sign, but for
                     ``find_then_rank`` and the control, whose scores have no unit
    ``units``        what each score is of; see ``Question``
    ``each``         FloatTensor [outputs, units]: the scores of each output by itself, where
                     ``each=True`` asked for them. ``outputs`` names them: the tokens of the target,
                     then those of a longer foil, counted against
    ``tokens``       FloatTensor [columns]: the scores of single tokens, of which those of units are
                     sums; ``None`` where a method asks about whole units
    ``gap``          |sum(scores) - moved| / max(|moved|, 1 nat), where ``moved`` is how much the
                     objective changes from the baseline to the prompt (from nothing, for methods
                     without a baseline); ``None`` where the method does not promise that its
                     scores add up. What falls on tokens of target and foil that are no unit, since
                     each is read in its own branch, is counted in the sum. ``gaps`` FloatTensor
                     [outputs] is the same of each output
    ``closed``       whether the gap came down to the tolerance that was asked for; ``None`` where
                     none was. Scores that did not close are not yet those of the model
    ``errors``       FloatTensor [units], the estimated error of each score, in the scores' unit;
                     ``None`` where the method makes no estimate
    ``evaluations``  rows of which a gradient was computed: variants of what is read, each of which
                     is one text, or two where target and foil go on in texts of their own
    ``forwards``     rows that were only run forward
    ``signed``       whether a negative score means "pushed the answer away"
    ``notes``        sentences: what is weak about the question or the scores
    ``method``, ``seconds``  filled in by ``attribute``
    """

    scores: Tensor
    units: list[Unit]
    each: Tensor | None = None
    outputs: tuple[str, ...] = ()
    tokens: Tensor | None = None
    gap: float | None = None
    gaps: Tensor | None = None
    closed: bool | None = None
    errors: Tensor | None = None
    evaluations: int = 0
    forwards: int = 0
    signed: bool = True
    notes: tuple[str, ...] = ()
    method: str = ""
    seconds: float = 0.0


def completeness_gap(scores: Any, moved: Any) -> float:
    """|sum(scores) - moved| / max(|moved|, 1 nat): 0 when the scores account for all of it.

    The denominator is never below one: where the objective hardly moved, a ratio to nothing would
    say nothing.

    Introduced in notebooks/07_integrated_gradients.ipynb.
    """
    return float(abs(scores.sum() - moved)) / max(abs(float(moved)), 1.0)


def attribution(
    asked: Any,
    row: int,
    each: Tensor,
    *,
    scores: Tensor | None = None,
    moved: Tensor | None = None,
    totals: Tensor | None = None,
    errors: Tensor | None = None,
    **evidence: Any,
) -> Attribution:
    """The ``Attribution`` of one question of ``asked``, from scores [outs, units].

    ``scores`` [units] are the sum over the outs unless given. ``moved`` [outs] is what the scores
    have to add up to, and ``totals`` [outs] what they do add up to, with what fell on tokens that
    are no part of a unit. ``errors`` is [outs, units].
    """
    question = asked.questions[row]
    totals = each.sum(dim=-1) if totals is None else totals
    gap = gaps = None
    if moved is not None:
        gap = completeness_gap(totals, moved.sum())
        gaps = torch.tensor(
            [completeness_gap(some, all_) for some, all_ in zip(totals, moved, strict=True)]
        )
    return Attribution(
        scores=_plain(each.sum(dim=0) if scores is None else scores),
        units=question.units,
        each=_plain(each) if asked.each else None,
        outputs=_output_labels(asked, row) if asked.each else (),
        gap=gap,
        gaps=gaps if asked.each else None,
        errors=None if errors is None else _plain(errors.sum(dim=0)),
        **evidence,
    )


def attributions(asked: Any, scores: Tensor, **evidence: Any) -> list[Attribution]:
    """One ``Attribution`` a question, from scores of tokens [questions, outs, columns].

    ``moved`` and ``totals``, where given, are [questions, outs].
    """
    of_rows: dict[str, Sequence[Any]] = {
        name: evidence.pop(name) for name in ("moved", "totals") if name in evidence
    }
    return [
        attribution(
            asked,
            row,
            asked.per_unit(scores[row], row),
            tokens=_plain(scores[row].sum(dim=0)),
            **{name: values[row] for name, values in of_rows.items()},
            **evidence,
        )
        for row in range(len(asked))
    ]


def _output_labels(asked, row):
    question, ids = asked.questions[row], asked.targets[row].tolist()
    if question.tokenizer is None:
        return tuple(map(str, ids))
    return tuple(token_labels(question.tokenizer, ids, question.input_ids[0].tolist()))


def _plain(scores):
    return scores.detach().float().cpu()
