"""What this machine can do, and what one call took of it."""

import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch


def matrix_rate(dtype=torch.float32, tokens=2048, width=576, inner=1536, device="cpu"):
    """FLOP/s of this machine's matrix products, of the shape that a layer of the model makes.

    The median of twenty: the rate that a long run of products sees, not the best of them.
    """
    a = torch.randn(tokens, width, dtype=dtype, device=device)
    b = torch.randn(inner, width, dtype=dtype, device=device)
    seconds = []
    for _ in range(25):
        began = time.perf_counter()
        torch.nn.functional.linear(a, b)
        if device != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * tokens * width * inner / sorted(seconds[5:])[10]


def gradient_flops(model, length):
    """FLOPs of the matrix products of one forward and one backward pass over ``length`` tokens.

    Two per weight and token forward, two back; weights are frozen, so none for their gradients.
    Attention: products of queries with keys and of weights with values, below the diagonal, once
    forward and twice back. The output layer, of which one or two rows are used, is left out.
    """
    layers, config = model.model.layers, model.config
    weights = sum(w.numel() for w in layers.parameters() if w.dim() == 2)
    width = config.num_attention_heads * config.head_dim
    return 4 * weights * length + 3 * 2 * length**2 * width * len(layers)


@contextmanager
def measured(device="cpu"):
    """Seconds, and bytes of memory above what was held before, of what runs inside."""
    result = SimpleNamespace()
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = memory_status("VmRSS")
    else:
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
    began = time.perf_counter()
    yield result
    if device != "cpu":
        torch.accelerator.synchronize()
    result.seconds = time.perf_counter() - began
    peak = memory_status("VmHWM") if device == "cpu" else torch.accelerator.max_memory_allocated()
    result.bytes = max(0, peak - before)


def memory_status(field):
    """Bytes that /proc says of this process, such as VmHWM: the most that it has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux.")
