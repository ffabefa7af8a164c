"""Methods that read one gradient at the prompt."""

from helpers.attribution.engine import embed_prompt, objective_gradient
from helpers.attribution.result import Attribution


def saliency(model, question):
    """How strongly the objective reacts to a nudge of each token: L2 norm of its gradient, >= 0.

    Source: Simonyan et al. 2013, arXiv:1312.6034. Introduced in notebooks/05_gradients.ipynb.
    """
    grad = objective_gradient(model, embed_prompt(model, question), question)  # [1, seq, dim]
    return Attribution(grad.norm(dim=-1)[0], evaluations=1, signed=False)


def gradient_x_input(model, question):
    """The gradient times the embedding, summed over the hidden dimension: signed, in logits.

    Exact for a model that is linear in its embeddings; a first-order guess for any other.
    Source: Shrikumar et al. 2016, arXiv:1605.01713. Introduced in notebooks/05_gradients.ipynb.
    """
    embeds = embed_prompt(model, question)
    grad = objective_gradient(model, embeds, question)  # [1, seq, dim]
    return Attribution((grad * embeds).sum(dim=-1)[0], evaluations=1)
