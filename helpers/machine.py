"""What this machine has free, and what it is slow at: measured, told, and got around."""

import contextlib
import warnings
from collections.abc import Iterator
from functools import lru_cache
from types import MethodType
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

ROWS = 64  # of the product that is timed: enough for a matrix product to be one
SLOWER = 1.25  # times float32's time, from which on a precision is called slow
LEAST = 0.02  # seconds that each product is timed for


def free_memory(device: torch.device) -> int:
    """Bytes that ``device`` has free."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    free, _ = torch.accelerator.get_memory_info(device)
    held = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return free + held  # torch keeps what it once had and gives it out again


class SlowPrecision(UserWarning):
    """A precision takes longer than float32 on this machine."""


def slow_precision(dtype: torch.dtype, width: int, device: Any = "cpu") -> str | None:
    """How much slower ``dtype`` is than float32, in two sentences; ``None`` if it is not.

    Half precision is fast where a processor has instructions for it, and emulated where it has
    none. So a matrix product of a model's ``width`` is timed in both on ``device``: about 0.1 s,
    and once in a process. A narrow one is timed as one of 512, since it would be the call that is
    timed. On a CPU one thread is timed: several wait for each other where a core has other work,
    longest for the faster product, and what is slow would not be noticed.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    width = min(max(width, 512), 1024)
    ratio = _times_float32(dtype, width, str(device))
    if ratio < SLOWER:
        return None
    return (
        f"{str(dtype).removeprefix('torch.')} takes about {ratio:.2g} times as long as float32 on "
        "this machine, by a matrix product of the model's width. Attributions compute such a "
        "product in float32 and round it; still, float32 is the better choice where its weights "
        "fit in memory."
    )


def slow_precision_of(model: Any) -> str | None:
    """``slow_precision`` for the precision, width and device of a loaded ``model``."""
    table = model.get_input_embeddings().weight
    return slow_precision(model.dtype, table.shape[-1], table.device)


def warn_if_slow(sentence: str | None) -> None:
    """Warn with ``sentence`` if there is one.

    A warning of a category of its own goes to stderr, once in a process, can be turned off by one
    line, and is no part of a notebook's printed results, which must be the same on every machine.
    No path of this machine is in it, as a report would show that.
    """
    if sentence is not None:
        warnings.warn_explicit(sentence, SlowPrecision, "helpers.machine", 0, registry=_warned)


_warned: dict = {}  # what has been said in this process


# --- products of half precision, where they are emulated ---------------------------------------


@contextlib.contextmanager
def products_in_float32(model: Any) -> Iterator[None]:
    """Compute a model's products in float32 and round them while inside, where that is faster.

    Where torch emulates half precision, the way back is slower still than the way forward. The
    numbers are those of a processor with instructions for half precision, which also adds in
    float32 and rounds the sum: only the order of the additions differs. The output layer is left
    alone, since its logits are computed in float32 anyway (``questions.float32_logits``), and so is
    a weight that is offloaded, or asks for a gradient of its own.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    table = model.get_input_embeddings().weight
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if type(module) is not nn.Linear or module is head or "forward" in vars(module):
                continue
            function = linear_for(module.weight.dtype, table.shape[-1], table.device)
            if function is not F.linear and not module.weight.requires_grad:
                stack.callback(delattr, module, "forward")
                module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
        yield


def linear_for(dtype: torch.dtype, width: int, device: Any = "cpu") -> Any:
    """``torch.nn.functional.linear``, or what is faster: by ``slow_precision``, whose these are."""
    return F.linear if slow_precision(dtype, width, device) is None else _linear_in_float32


def _forward(module, rows):
    return _linear_in_float32(rows, module.weight, module.bias)


def _linear_in_float32(rows, weight, bias=None):
    if rows.shape[:-1].numel() == 1 and not rows.requires_grad:  # a step of generation
        return F.linear(rows, weight, bias)  # is not emulated, and reads half as many bytes
    return _InFloat32.apply(rows, weight, bias)


class _InFloat32(torch.autograd.Function):
    """``linear`` in float32, rounded once; for the way back the weight is kept as it is."""

    @staticmethod
    def forward(ctx, rows, weight, bias):
        ctx.save_for_backward(weight)
        bias = None if bias is None else bias.float()
        return F.linear(rows.float(), weight.float(), bias).to(rows.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return (gradient.float() @ weight.float()).to(gradient.dtype), None, None


@lru_cache
def _times_float32(dtype, width, device):
    """The time of a product in ``dtype`` over that in float32."""

    def seconds(kind):
        rows, weight = (torch.ones(n, width, dtype=kind, device=device) for n in (ROWS, width))
        names = {"rows": rows, "weight": weight, "linear": torch.nn.functional.linear}
        timer = Timer("linear(rows, weight)", globals=names, num_threads=1)
        with torch.inference_mode():
            return timer.blocked_autorange(min_run_time=LEAST).median

    return seconds(dtype) / seconds(torch.float32)
