"""What every method returns: the scores, and the evidence that comes with them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Attribution:
    """Scores with the evidence that goes with them.

    ``scores``       FloatTensor [seq] on the CPU; in logits where the method has a sign
    ``gap``          |sum(scores) - moved| / max(|moved|, 1 logit), where ``moved`` is how much the
                     objective changes from the baseline to the prompt (from nothing, so the
                     objective itself, for methods without a baseline); ``None`` where the method
                     does not promise that its scores add up
    ``closed``       whether the gap came down to the tolerance that was asked for; ``None`` where
                     none was. Scores that did not close are not yet those of the model
    ``errors``       FloatTensor [seq], the estimated error of each score, in the scores' unit;
                     ``None`` where the method makes no estimate
    ``evaluations``  rows of which a gradient was computed
    ``forwards``     rows that were only run forward
    ``signed``       whether a negative score means "pushed the answer away"
    ``method``, ``seconds``  filled in by ``attribute``
    """

    scores: torch.Tensor
    gap: float | None = None
    evaluations: int = 0
    forwards: int = 0
    signed: bool = True
    method: str = ""
    seconds: float = 0.0
    closed: bool | None = None
    errors: torch.Tensor | None = None
