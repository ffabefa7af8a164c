"""What a model is made of: where the rules and the hooks of a method may go.

Found by looking at a model's parts and by trying them, not by its name, so that a family that
nobody thought of is either understood or refused.
"""

from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from helpers.errors import InputError

T = TypeVar("T")


def once_a_model(look: Callable[[Any], T]) -> Callable[[Any], T]:
    """A function of a model that looks once, and remembers for as long as the model lives."""
    found: WeakKeyDictionary[Any, T] = WeakKeyDictionary()

    @wraps(look)
    def looked(model: Any) -> T:
        if model not in found:
            found[model] = look(model)
        return found[model]

    return looked


class Stack(NamedTuple):
    """The layers of a model, one behind the other, and the norm behind the last one."""

    layers: nn.ModuleList
    norm: nn.Module


@once_a_model
def stack_of(model: Any) -> Stack:
    """Where the layers of ``model`` are, looked for once; ``InputError`` if that cannot be told."""
    decoder = getattr(model, "get_decoder", lambda: model)()
    for holder in (decoder, getattr(model, body_of(model), None)):
        children = [] if holder is None else list(holder.children())
        for place, child in enumerate(children):
            behind = [each for each in children[place + 1 :] if norm_of(each) is not None]
            if isinstance(child, nn.ModuleList) and behind:
                return Stack(child, behind[0])
    raise InputError(f"A {type(model).__name__} has no layers that are known to this method.")


def body_of(model: Any) -> str:
    """The attribute of ``model`` that holds all of it but the output layer."""
    named = dict(model.named_children())
    prefix = getattr(model, "base_model_prefix", "")
    # Llama 4's text model is not where its prefix says
    return prefix if prefix in named else next(iter(named), "")


# --- norms -------------------------------------------------------------------------------------


class Norm(NamedTuple):
    """What a norm does: takes the mean off if ``centred``, divides by the root mean square.

    Then it multiplies by ``gain`` and adds ``bias``, in float32 and of the shape of its weight.
    ``epsilon`` is added to the mean square, so that nothing is divided by zero.
    """

    gain: Tensor
    bias: Tensor
    centred: bool
    epsilon: float

    def centre(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=-1, keepdim=True) if self.centred else x

    def scale(self, x: Tensor) -> Tensor:
        """By what ``x`` [..., dim], which is centred, is scaled: [..., 1] in float32."""
        return (x.float().square().mean(dim=-1, keepdim=True) + self.epsilon).rsqrt()

    def slope(self, x: Tensor) -> Tensor:
        """What each number of ``x`` [..., dim], which is centred, is multiplied by."""
        return self.scale(x) * self.gain.to(x.device)


def norm_of(module: Any) -> Norm | None:
    """What a norm does, by the root mean square or as LayerNorm; ``None`` for another module.

    Some hold the gain, others (Gemma) the gain minus one, others none: the norm itself is asked.
    """
    weights = dict(module.named_parameters())
    if isinstance(module, LINEAR) or not {*weights} <= {"weight", "bias"}:
        return None
    weight = weights.get("weight")
    shape = torch.Size(getattr(module, "normalized_shape", (16,)))
    shape = shape if weight is None else weight.shape
    dtype = torch.float32 if weight is None else weight.dtype
    device = "cpu" if weight is None or weight.is_meta else weight.device
    x = torch.linspace(1, 2, shape.numel(), device=device).view(shape)
    x[..., ::2] *= -1
    x = torch.stack([x, -x, x.abs().square()])[:, None].to(dtype)  # the third has another mean
    out = _tried(module, x)
    if out is None:
        return None
    with align_module_device(module):  # what is offloaded comes for as long
        held = {name: each.detach().float().to(device) for name, each in weights_of(module)}
    for centred in (False, True):
        norm = Norm(torch.ones_like(x[0, 0]).float(), torch.zeros(()), centred, epsilon_of(module))
        plain = norm.centre(x.float())
        plain = plain * norm.slope(plain)
        bias = held.get("bias", torch.zeros((), device=device))
        seen = (out[0] - out[1])[0] / (2 * plain[0, 0])
        known = [held["weight"], 1 + held["weight"]] if "weight" in held else []
        for gain in [*known, seen]:
            if torch.allclose(plain * gain + bias, out, rtol=2e-2, atol=2e-3):
                return norm._replace(gain=gain, bias=bias)
    return None


def epsilon_of(norm: Any) -> float:
    """What a norm adds to the mean square, so that it divides by no zero."""
    names = ("variance_epsilon", "eps", "epsilon")
    return next((getattr(norm, name) for name in names if hasattr(norm, name)), None) or 0.0


def weights_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The weights that a module holds itself, by name."""
    return list(module.named_parameters(recurse=False))


def _tried(module, x):
    """What a module makes of x, in float32; ``None`` if it is no tensor of that shape."""
    try:
        with torch.no_grad():
            out = module.forward(x)  # past hooks that watch it
        return out.float() if out.shape == x.shape else None
    except Exception:  # whatever a module says that takes something else
        return None


# --- feed-forwards -----------------------------------------------------------------------------

LINEAR = (nn.Linear, Conv1D)


class Places(NamedTuple):
    """Where relevance needs a rule.

    At ``norms``, ``activations``, what reads the ``products`` of gate and up, ``experts`` whose
    product is inside of them, and ``routers`` that weigh experts. ``stranger`` names the kind of a
    part that has weights and for which there is no rule.
    """

    norms: dict[nn.Module, Norm]
    activations: list[nn.Module]
    products: list[nn.Module]
    experts: list[nn.Module]
    routers: list[nn.Module]
    stranger: str | None


@once_a_model
def places_of(model: Any) -> Places:
    """The ``Places`` of ``model``, looked for once; ``InputError`` as of ``stack_of``."""
    with torch.inference_mode(False):  # what is kept may come into a backward pass later
        return _places_of(stack_of(model))


def _places_of(stack):
    found, strangers = Places({}, [], [], [], [], None), []
    for module in chain(stack.layers.modules(), [stack.norm]):
        children = list(module.children())
        if (gated := gated_parts(module)) is not None:
            found.products.append(gated[1])
        if any(are_experts(child) for child in children):
            found.routers.extend(
                child for child in children if gated_parts(child) is None and not are_experts(child)
            )
        if are_experts(module):
            found.experts.append(module)
        elif children or isinstance(module, LINEAR) or module in found.routers:
            continue
        elif (norm := norm_of(module)) is not None:
            found.norms[module] = norm
        elif is_activation(module):
            found.activations.append(module)
        elif weights_of(module):
            strangers.append((sum(each.numel() for _, each in weights_of(module)), module))
    if not strangers:
        return found
    _, largest = max(strangers, key=lambda each: each[0])
    return found._replace(stranger=type(largest).__name__)


def gated_parts(module: Any) -> tuple[nn.Module, nn.Module] | None:
    """Of a feed-forward whose activation gates a product: the activation, and what reads it."""
    parts = dict(module.named_children())
    activation = parts.get("act_fn") or parts.get("activation_fn")
    gate = parts.get("gate_up_proj") or (parts.get("gate_proj") and parts.get("up_proj"))
    if activation is None or gate is None or "down_proj" not in parts:
        return None
    return activation, parts["down_proj"]


def are_experts(module: Any) -> bool:
    """Whether a module is many gated feed-forwards, their weights stacked in three dimensions."""
    stacked = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    three = all(isinstance(each, nn.Parameter) and each.dim() == 3 for each in stacked)
    return three and isinstance(getattr(module, "act_fn", None), nn.Module)


def is_activation(module: Any) -> bool:
    """Whether a module changes each number by itself, and leaves 0 as it is."""
    if weights_of(module):
        return False
    x = torch.arange(-7.0, 8.0).view(3, 5) / 2  # with a 0 in it
    out, some = _tried(module, x), _tried(module, x[:, :3])
    if out is None or some is None or torch.equal(out, x):
        return False
    return torch.allclose(out[:, :3], some, rtol=1e-3) and bool((out[x == 0] == 0).all())


# --- attention ---------------------------------------------------------------------------------


def output_projection(attention: Any) -> nn.Module | None:
    """What reads the heads of an attention, if it is a plain matrix."""
    names = ("o_proj", "out_proj", "c_proj", "dense")
    found: Any = next(
        (getattr(attention, name, None) for name in names if hasattr(attention, name)), None
    )
    plain = type(found) in LINEAR and found.weight.is_floating_point()
    return found if plain else None


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


# --- all of it in words ------------------------------------------------------------------------


def anatomy(model: Any) -> dict[str, str]:
    """What a model is made of, by part and in words, as far as it is known.

    Found by structure; windows and caps inside of attention are only said by its configuration.
    """
    stack, places = stack_of(model), places_of(model)
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    parts = list(stack.layers.modules())
    attentions = [each for each in parts if type(each).__name__.endswith("Attention")]
    inside = {each for attention in attentions for each in attention.modules()}
    linears = [each for each in inside if isinstance(each, LINEAR)]
    kinds = {"LayerNorm" if norm.centred else "root mean square" for norm in places.norms.values()}
    windows = getattr(config, "layer_types", None) or [getattr(config, "sliding_window", None)]
    attention = {
        "biases": any(each.bias is not None for each in linears),
        "norms of queries and keys": any(each in places.norms for each in inside),
        "sinks": any(name == "sinks" for each in inside for name, _ in weights_of(each)),
        "capped logits": getattr(config, "attn_logit_softcapping", None) is not None,
        "windows": any(kind not in (None, "full_attention") for kind in windows),
    }
    feed_forward = {
        "gated": places.products,
        "experts": any(
            name.endswith("down_proj") and weight.dim() == 3
            for name, weight in stack.layers.named_parameters()
        ),
    }
    return {
        "layers": str(len(stack.layers)),
        "norms": " and ".join(sorted(kinds)),
        "feed-forward": " and ".join(name for name, there in feed_forward.items() if there)
        or "plain",
        "attention": ", ".join(name for name, there in attention.items() if there) or "plain",
        "embeddings": _embeddings_in_words(model),
        "output layer": _output_in_words(model, config),
    }


def _embeddings_in_words(model):
    table = model.get_input_embeddings()
    row = table.weight[3].detach()
    scale = float(table(torch.tensor(3, device=row.device)).norm() / row.norm())
    tables = [each for each in model.modules() if isinstance(each, nn.Embedding)]
    told = [] if abs(scale - 1) < 1e-2 else ["scaled"]
    told += ["and learned positions"] if len(tables) > 1 else []
    return " ".join(told) or "as they are"


def _output_in_words(model, config):
    head = model.get_output_embeddings()
    tied = head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    told = ["tied" if tied else "its own"]
    told += ["with a bias"] if getattr(head, "bias", None) is not None else []
    told += ["capped"] if getattr(config, "final_logit_softcapping", None) is not None else []
    scales = [getattr(config, name, None) for name in ("logits_scaling", "logit_scale")]
    told += ["scaled"] if any(scale not in (None, 1) for scale in scales) else []
    return ", ".join(told)
