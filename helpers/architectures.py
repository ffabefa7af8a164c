"""What a model is made of: where the rules and the hooks of a method may go.

Found by looking at a model's parts and by trying them, not by its name, so that a family that
nobody thought of is either understood or refused.
"""

from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from helpers.errors import InputError


class Stack(NamedTuple):
    """The layers of a model, one behind the other, and the norm behind the last one."""

    layers: nn.ModuleList
    norm: nn.Module


def stack_of(model: Any) -> Stack:
    """Where the layers of ``model`` are; ``InputError`` if that cannot be told."""
    children = list(getattr(model, "base_model", model).children())
    for place, child in enumerate(children):
        behind = [each for each in children[place + 1 :] if _is_vector(each)]
        if isinstance(child, nn.ModuleList) and behind:
            return Stack(child, behind[0])
    raise InputError(f"A {type(model).__name__} has no layers that are known to this method.")


def _is_vector(module):
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


class Places(NamedTuple):
    """Where relevance needs a rule: ``norms``, ``activations``, and what takes ``products``.

    ``stranger`` names the kind of a part that has weights and for which there is no rule.
    """

    norms: list[nn.Module]
    activations: list[nn.Module]
    products: list[nn.Module]
    stranger: str | None


_places: WeakKeyDictionary[Any, Places] = WeakKeyDictionary()


def places_of(model: Any) -> Places:
    """The ``Places`` of ``model``, looked for once; ``InputError`` as of ``stack_of``."""
    if model not in _places:
        stack = stack_of(model)
        norms, activations, products, stranger = [], [], [], None
        for module in chain(stack.layers.modules(), [stack.norm]):
            gated = gated_parts(module)
            if gated is not None:
                activations.append(gated[0])
                products.append(gated[1])
            elif gain_of(module) is not None:
                norms.append(module)
            elif not isinstance(module, nn.Linear) and list(module.parameters(recurse=False)):
                stranger = stranger or type(module).__name__
        _places[model] = Places(norms, activations, products, stranger)
    return _places[model]


def gated_parts(module: Any) -> tuple[nn.Module, nn.Module] | None:
    """Of a feed-forward whose activation gates a product: the activation, and what reads it."""
    parts = dict(module.named_children())
    activation = parts.get("act_fn") or parts.get("activation_fn")
    gate = parts.get("gate_up_proj") or (parts.get("gate_proj") and parts.get("up_proj"))
    if activation is None or gate is None or "down_proj" not in parts:
        return None
    return activation, parts["down_proj"]


def gain_of(module: Any) -> Tensor | None:
    """What a root-mean-square norm multiplies each number by, [dim] in float32; else ``None``.

    Some hold the gain, others (Gemma) the gain minus one: the norm itself is asked.
    """
    if not _is_vector(module) or getattr(module, "bias", None) is not None:
        return None
    weight = module.weight.detach()
    device = "cpu" if weight.is_meta else weight.device  # what is offloaded comes when it is used
    x = torch.linspace(1, 2, len(weight), device=device)
    x = torch.stack([x, x.flip(0)])  # a norm that takes a mean off would treat them otherwise
    with torch.inference_mode():
        out = module.forward(x.to(weight.dtype)).to(x)
    scale = (x.square().mean(dim=1, keepdim=True) + epsilon_of(module)).rsqrt()
    found, other = out / (x * scale)
    if not torch.allclose(found, other, rtol=2e-2, atol=1e-3):
        return None
    exact = [] if weight.is_meta else [weight.float(), 1 + weight.float()]
    return next(
        (each for each in exact if torch.allclose(each, found, rtol=2e-2, atol=1e-3)), found
    )


def epsilon_of(norm: Any) -> float:
    """What a root-mean-square norm adds to the mean square, so that it divides by no zero."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))


def pointwise_after_last_attention(model: Any) -> list[nn.Module]:
    """Modules of the last layer that treat each position by itself, behind its attention.

    None where they are not known.
    """
    try:
        last = stack_of(model).layers[-1]
    except InputError:
        return []
    output = getattr(getattr(last, "self_attn", None), "o_proj", None)
    mlp = getattr(last, "mlp", None)
    if not isinstance(output, nn.Linear) or mlp is None or gated_parts(mlp) is None:
        return []
    return [output, mlp]
