"""Methods that read one gradient at the prompt."""

import warnings
from typing import Any

import torch
from torch import Tensor

from helpers.attribution.engine import Asked, frozen
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


def refuses_gradients(model: Any) -> str | None:
    """``None`` for a model whose gradient comes back to its tokens, else why it does not.

    Quantised weights may be multiplied by a kernel that has no gradient: on some processors
    bitsandbytes packs 4 bits for one at the first pass that asks for none. What comes back is then
    the residual stream's part alone, a wrong number without a word. So a few tokens are tried,
    where some weights are no floating point numbers: what the last one says must depend on others.
    """
    if all(weight.is_floating_point() for weight in model.parameters()):
        return None
    table = model.get_input_embeddings()
    embeds = table(torch.arange(3, 7, device=table.weight.device))[None].detach()
    with frozen(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a kernel without a gradient: told below
        with torch.no_grad():
            model(inputs_embeds=embeds, use_cache=False)
        with torch.enable_grad():
            embeds.requires_grad_(True)
            said = model(inputs_embeds=embeds, use_cache=False).logits[0, -1].max()
            (grad,) = torch.autograd.grad(said, embeds)
    if grad[0, :-1].any():
        return None
    return (
        f"No gradient comes back through the quantised weights of this {type(model).__name__}: "
        "load it again and call train() on its quantised layers before its first pass, or take "
        "another method, such as occlusion."
    )
