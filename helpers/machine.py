"""What this machine has free, and what it is slow at: measured on the spot, told in time."""

import warnings
from functools import lru_cache
from typing import Any

import psutil
import torch
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
    """A sentence that says how much slower ``dtype`` is than float32, or ``None`` if it is not.

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
        "this machine, by a matrix product of the model's width: float32 is the better choice "
        "where its weights fit in memory."
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
