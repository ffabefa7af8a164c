"""Methods that read one gradient at the prompt."""

from torch import Tensor

from helpers.attribution.engine import Asked
from helpers.attribution.result import Attribution, attribution, attributions


def gradient(asked: Asked) -> Tensor:
    """The gradient of each out at the texts: [questions, outs, columns, dim]. Computed once."""
    if "gradient" not in asked.found:
        _, asked.found["gradient"] = asked.reactions(asked.embeds, lambda grad: grad)
    return asked.found["gradient"]


def saliency(asked: Asked) -> list[Attribution]:
    """How strongly the objective reacts to a nudge of each unit: L2 norm of its gradient, >= 0.

    Of several outputs the norm of the summed gradient, which is not the sum of their norms.
    Source: Simonyan et al. 2013, arXiv:1312.6034. notebooks/05_gradients.ipynb takes it apart.
    """
    grad = gradient(asked)
    each, whole = grad.pow(2).sum(dim=-1), grad.sum(dim=1).pow(2).sum(dim=-1)
    return [
        attribution(
            asked,
            row,
            asked.per_unit(each[row], row).sqrt(),
            scores=asked.per_unit(whole[row], row).sqrt(),
            evaluations=1,
            signed=False,
        )
        for row in range(len(asked))
    ]


def gradient_x_input(asked: Asked) -> list[Attribution]:
    """The gradient times the embedding, summed over the hidden dimension: signed, in nats.

    Exact for a model that is linear in its embeddings; a first-order guess for any other.
    Source: Shrikumar et al. 2016, arXiv:1605.01713. notebooks/05_gradients.ipynb takes it apart.
    """
    embeds = asked.embeds[:, :1, : asked.columns]  # [questions, 1, columns, dim]
    return attributions(asked, (gradient(asked) * embeds).sum(dim=-1), evaluations=1)
