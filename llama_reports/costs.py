"""What a method takes on a prompt: from token counts, the model's shape and a clock.

Each method's record says how many rows a prompt takes. A row takes its floating point operations at
the rate of this machine's matrix products, the weights read once a pass at the speed of its memory,
a fixed time a layer, and what is computed number by number the time of that. All of it is measured
in about a second; no weights are loaded. What is held is counted from the same rows.
"""

import math
import re
import time
from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import psutil
import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm
from transformers import AutoConfig

from helpers.attribution import BUDGET, METHODS, Price
from helpers.attribution.engine import (
    FULL_PASS,
    LOGITS_AT_ONCE,
    TOKENS_PER_BATCH,
    gradient_bytes,
)
from helpers.attribution.methods import options_of
from helpers.attribution.path import FIRST_ROUND
from helpers.errors import InputError
from helpers.machine import free_memory, linear_for, slow_precision
from helpers.models import (
    BUNDLED,
    public_name,
    resolve_model,
    tensor_shapes,
    tiny_llama,
    weight_files,
)

TOY_LAYERS = 3  # of the toy: two, and about one more in what stands around them
# measured over reports on benchmarks/prompts/tuning.yml with the bundled model
ROUNDS = 6  # of passes, at most, in which a method of many gradients asks for them
EFFICIENCY = 0.85  # of the rate of matrix products, over all that a pass does
READING = 0.5  # of the speed at which one large matrix is read, over the weights of all layers
MAP = 6, 3  # passes over an attention map: in a cache, and beyond
MOVED = 3.4  # and over what ALTI moves, which stays in a cache
IN_CACHE = 2**23  # numbers that the C library keeps for the next tensor; larger ones are new pages
VECTORS = 2**21  # numbers of what ALTI moves that it forms at a time, in three copies
PYTHON = 405_000_000, 1200  # of one that has imported helpers alone, and those a token it knows
PARTS = ("way back", "passing by", "maps", "logits")  # of a method's memory
MARGIN = 1.25  # by which the memory may be wrong, as measured: see benchmarks/planner.py


@dataclass(frozen=True)
class Shape:
    """The sizes of a causal language model, and its numbers as the headers of its files say.

    ``layer_weights`` are those in a layer's matrices that a token goes through: of experts, those
    that it is sent to. ``output_layer`` is 0 where it is the table of embeddings. ``itemsize`` is
    in bytes a number, ``stored`` in bytes.
    """

    layers: int
    width: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    layer_weights: float
    parameters: int
    embeddings: int
    output_layer: int
    stored: int
    itemsize: float = 4

    @property
    def feed_forward(self) -> int:
        """The width of the feed-forward, as if it had three matrices."""
        attention = 2 * self.head_dim * (self.heads + self.key_value_heads)
        return max(1, round((self.layer_weights / self.width - attention) / 3))

    @property
    def weights(self) -> int:
        """Bytes of all weights in memory."""
        return int(self.parameters * self.itemsize)

    @property
    def mapped(self) -> bool:
        """Whether weights are as they are stored, so that processes share the pages of the file."""
        return 0.75 < self.stored / self.weights < 1.5

    @property
    def loading(self) -> int:
        """Bytes that loading takes for a while beside the weights: the file, if it is converted."""
        return 0 if self.mapped else self.stored

    def token(self, kind: str) -> int:
        """Bytes that a token takes in a pass that keeps a ``"gradient"``, or only goes ``"by"``.

        Or as ``"keys"`` and values of all layers.
        """
        if kind == "keys":
            return int(2 * self.layers * self.key_value_heads * self.head_dim * self.itemsize)
        if kind == "by":
            return int(1.25 * self.itemsize * (8 * self.width + 4 * self.feed_forward))
        config = {"hidden_size": self.width, "intermediate_size": self.feed_forward}
        config["num_hidden_layers"] = self.layers
        return gradient_bytes(SimpleNamespace(config=SimpleNamespace(**config)))


def work(
    flops: float = 0.0,
    forwards: float = 0.0,
    gradients: float = 0.0,
    near: float = 0.0,
    far: float = 0.0,
) -> np.ndarray:
    """What is asked of a machine: operations, passes through the model, single numbers, [5].

    A gradient is one forward and one backward pass. Numbers are computed one by one, ``near`` in
    tensors that fit a cache, ``far`` in larger ones.
    """
    return np.array([flops, forwards, gradients, near, far], dtype=float)


class Size(NamedTuple):
    """What is known of a prompt: tokens that are read, scores of a method, tokens explained.

    A target and a foil of several tokens are read in ``texts`` of their own.
    """

    tokens: int
    units: int
    outputs: int = 1
    texts: int = 1

    @property
    def length(self) -> int:
        """Tokens of each text that goes through the model."""
        return self.tokens + math.ceil((self.outputs - 1) / self.texts)


@dataclass(frozen=True)
class Machine:
    """Operations a second in matrix products, bytes a second from memory, and seconds a layer.

    ``near`` and ``far`` are numbers a second of a softmax, in a small tensor and in a large one.
    """

    flops: float
    bandwidth: float
    overhead: float
    near: float
    far: float

    def seconds(self, work: np.ndarray, shape: Shape) -> float:
        flops, forwards, gradients, near, far = work.tolist()
        weights = shape.layers * shape.layer_weights + shape.width * shape.vocabulary
        return (
            flops / self.flops / EFFICIENCY
            + (forwards + 2 * gradients) * weights * shape.itemsize / self.bandwidth / READING
            + (forwards + 3 * gradients) * shape.layers * self.overhead
            + near / self.near
            + far / self.far
        )


# --- what a prompt takes -----------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """What one method takes on one prompt.

    ``gradients`` and ``forwards`` are rows, ``seconds`` of one thread's processor or as many as
    were asked for, ``memory`` the bytes of a process that does nothing else, by part; ``least`` is
    the sum of them with one row a pass, which is what it comes down to where memory is short.
    """

    gradients: float
    forwards: float
    seconds: float
    memory: dict[str, int]
    least: int

    @property
    def peak(self) -> int:
        """All parts of the memory."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Needs:
    """What methods take on one prompt of so many tokens: a ``Need`` a method.

    It is ``None`` for a method that the budget leaves out. In bytes, ``before`` is what is held
    before any method runs, by part, ``loading`` the most that is held while the model is loaded,
    and ``free`` what the machine has. ``heading`` and ``text`` are what ``plan`` prints.
    """

    model: str
    size: Size
    dtype: str
    shape: Shape
    machine: Machine
    methods: dict[str, Need | None]
    before: dict[str, int]
    loading: int
    free: int

    @property
    def seconds(self) -> float:
        """Of all methods, one after the other."""
        return sum(need.seconds for need in self.methods.values() if need)

    @property
    def peak(self) -> int:
        """The most that a process holds that loads the model and runs the methods in turn."""
        return max([self.loading, *(need.peak for need in self.methods.values() if need)])

    @property
    def too_large(self) -> list[str]:
        """The methods that what is free has no room for, the planner's own error granted."""
        needs = self.methods.items()
        return [name for name, need in needs if need and need.least > MARGIN * self.free]

    def longest(self, name: str) -> int:
        """The most tokens, up to those asked for, at which a method has room, row by row."""
        base, size = sum(self.before.values()), self.size

        def least(tokens):
            shorter = Size(tokens, min(size.units, tokens), size.outputs)
            return base + most_held(self.shape, [name], shorter, least=True)

        return bisect_right(range(1, size.tokens + 1), self.free, key=least)

    @property
    def heading(self) -> str:
        parts = ", ".join(f"{part} {in_bytes(held)}" for part, held in self.before.items() if held)
        return (
            f"{self.model}: {self.shape.parameters:,} parameters in {self.dtype}.\n"
            f"Memory before a method runs: {in_bytes(sum(self.before.values()))} ({parts}); while "
            f"loading {in_bytes(self.loading)}; {in_bytes(self.free)} are free.\n"
            f"Basis: {rates_in_words(self.machine)}"
        )

    @property
    def text(self) -> str:
        rows = {}
        for name, need in self.methods.items():
            if need is None:
                rows[name] = ["", "", "over budget", *[""] * (len(PARTS) + 1)]
                continue
            counts = (f"{count:,.0f}" for count in (need.gradients, need.forwards))
            parts = (in_bytes(need.memory[part]) for part in PARTS)
            rows[name] = [*counts, f"{need.seconds:,.1f}", *parts, in_bytes(need.peak)]
        columns = ["gradients", "rows", "seconds", *PARTS, "memory in all"]
        table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
        lines = [table.rename_axis(columns=f"{self.size.tokens:,} tokens").to_string()]
        for name in self.too_large:
            lines.append(
                f"No room for {name} in the {in_bytes(self.free)} that are free, not even row by "
                f"row; for prompts of up to {self.longest(name):,} tokens there is."
            )
        return "\n".join(lines)


def needs(
    model: str | Path = BUNDLED,
    tokens: int = 100,
    methods: Iterable[str] | None = None,
    *,
    units: int | None = None,
    outputs: int = 1,
    dtype: str = "float32",
    threads: int = 1,
    machine: Machine | None = None,
) -> Needs:
    """What ``methods`` (all by default) take on a prompt of ``tokens``; no weights are loaded.

    ``units`` is the number of scores, that of tokens by default, and ``outputs`` that of tokens
    explained. Each method has the options that a report of ``methods`` gives it. ``machine`` is
    measured here, in about a second, unless it is given. Time is after a first call, without
    loading. Returns ``Needs``. Raises ``InputError`` for no tokens, or more than the model reads.
    """
    context = getattr(_config(model), "max_position_embeddings", None) or math.inf
    if not 1 <= tokens <= context:
        raise InputError(f"{public_name(model)} reads 1 to {context:,} tokens, not {tokens:,}.")
    shape = model_shape(model, dtype)
    machine = machine or measure(shape, dtype, threads)
    size = Size(tokens, min(units or tokens, tokens), outputs)
    before = {
        "layers": shape.weights - int((shape.embeddings + shape.output_layer) * shape.itemsize),
        "embeddings": int(shape.embeddings * shape.itemsize),
        "output layer": int(shape.output_layer * shape.itemsize),
        "Python": PYTHON[0] + PYTHON[1] * shape.vocabulary,
    }
    base = sum(before.values())
    found: dict[str, Need | None] = {}
    for name, options in _options(methods or METHODS, size).items():
        found[name] = None
        if options is not None:
            price = METHODS[name].price(size.units, size.length, options)
            found[name] = Need(
                price.gradients,
                price.forwards,
                machine.seconds(priced(shape, price, size), shape),
                before | memory(shape, price, size),
                base + sum(memory(shape, price, size, least=True).values()),
            )
    loading = base + shape.loading
    return Needs(public_name(model), size, dtype, shape, machine, found, before, loading, free())


def free() -> int:
    """Bytes that a run may take on the accelerator, or where there is none, of this machine.

    A control group may allow a process less than the machine has; psutil does not look there.
    """
    device = device_of_runs()
    if device.type != "cpu":
        return free_memory(device)
    from distributed.system import memory_limit  # takes a while to import

    held = psutil.Process().memory_info().rss
    return max(0, min(free_memory(device), memory_limit() - held))


# --- the model and the machine -----------------------------------------------------------------


def model_shape(model: str | Path, dtype: str = "float32") -> Shape:
    """The ``Shape`` of a model, from its configuration and the headers of its files alone.

    Of a checkpoint whose numbers are packed the headers count what they are packed in.
    """
    config, tensors = _config(model), tensor_shapes(model)
    heads = getattr(config, "num_attention_heads", None) or 1  # some have no attention
    vocabulary = config.vocab_size
    numbers = {name: math.prod(shape) for name, shape in tensors.items() if len(shape) < 4}
    tables = [  # of a vocabulary: the embeddings, and the output layer where it is another
        numbers[name]
        for name, shape in tensors.items()
        if len(shape) == 2 and shape[0] == vocabulary and not _LAYER.search(name)
    ]
    tied = getattr(config, "tie_word_embeddings", False)
    parameters = sum(numbers.values()) - (sum(tables[1:]) if tied else 0)
    stored = sum(file.stat().st_size for file in weight_files(resolve_model(model)))
    packed = getattr(config, "quantization_config", None)
    active = sum(
        numbers[name] * _share(config, name)
        for name, shape in tensors.items()
        if len(shape) in (2, 3) and _LAYER.search(name) and not name.endswith("bias")
    )
    return Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=heads,
        key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=vocabulary,
        layer_weights=active / config.num_hidden_layers,
        parameters=parameters,
        embeddings=sum(tables[:1]),
        output_layer=0 if tied else sum(tables[1:]),
        stored=stored,
        itemsize=stored / parameters if packed else _dtype(config, dtype).itemsize,
    )


_LAYER = re.compile(r"(^|\.)\d+\.")  # in a tensor's name: the number of its layer


def _share(config, name):
    """Which part of a tensor a token goes through: of experts, as many as it is sent to."""
    if not re.search(r"(^|\.)experts\.", name):
        return 1.0
    counts = ("num_local_experts", "num_experts", "n_routed_experts")
    there = next((n for n in (getattr(config, count, None) for count in counts) if n), 1)
    return min(1.0, getattr(config, "num_experts_per_tok", there) / there)


def _config(model):
    folder = resolve_model(model)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return config.get_text_config()


def _dtype(config, dtype):
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"dtype {dtype!r} is unknown: use float32, bfloat16, float16 or auto.")
    found = getattr(torch, dtype) if dtype != "auto" else getattr(config, "dtype", None)
    return found or torch.float32


def slow_dtype(model: str | Path, dtype: str) -> str | None:
    """What ``slow_precision`` says of ``dtype`` on this machine, for this model's width."""
    config = _config(model)
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return slow_precision(_dtype(config, dtype), config.hidden_size, device)


def measure(
    shape: Shape,
    dtype: str = "float32",
    threads: int = 1,
    workers: int = 1,
    wall: bool = False,
) -> Machine:
    """The ``Machine`` that this one is, for matrices of ``shape``; takes about a second.

    Its rates are those that each of ``workers`` with so many ``threads`` has while all compute.
    They share caches and memory as processes do: torch lets go of Python's lock while it computes.
    Of one thread it is the processor's time, or with ``wall``, as of several, that of the clock:
    what else runs on the machine slows all down alike where numbers of threads are compared.
    """
    device = device_of_runs()
    kind = _dtype(None, "float32" if dtype == "auto" else dtype)
    inner, outer = min(shape.width, 1024), min(shape.feed_forward, 4096)
    numbers = torch.ones(4096, 4096, device=device)
    toy = tiny_llama()[0].to(device)  # so small that nothing of its time is arithmetic
    names = {"numbers": numbers, "toy": toy}
    names["token"] = torch.zeros(1, 1, dtype=torch.long, device=device)
    names["linear"] = linear_for(kind, shape.width, device)

    def ones(*sizes):
        return torch.ones(*sizes, dtype=kind, device=device)

    own = [  # the large one, and all of them together, are larger than a cache
        names
        | {"rows": ones(512, inner), "weight": ones(outer, inner)}
        | {"large": ones(4096 // min(workers, 4), 4096)}
        for _ in range(workers)
    ]

    def one(names, code):
        # of one thread its processor's time, which others on the machine hardly change
        own = threads == 1 and device.type == "cpu" and not wall
        clock = {"timer": time.thread_time} if own else {}
        timer = Timer(code, globals=names, num_threads=threads, **clock)
        with torch.inference_mode():
            return timer.blocked_autorange(min_run_time=0.1).median

    def seconds(code, sets=own):
        return sum(pool.map(one, sets, [code] * len(sets))) / len(sets)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # else each of several timers would put back another's number
    try:
        with ThreadPoolExecutor(workers) as pool:
            return Machine(
                flops=2 * 512 * inner * outer / seconds("linear(rows, weight)"),
                bandwidth=own[0]["large"].nbytes / seconds("linear(large[:1], large)"),
                # all of it is Python's, of which a process has its own
                overhead=seconds("toy(token, use_cache=False)", own[:1]) / TOY_LAYERS,
                near=numbers[:256].numel() / seconds("numbers[:256].softmax(dim=-1)"),
                far=numbers.numel() / seconds("numbers.softmax(dim=-1)"),
            )
    finally:
        torch.set_num_threads(before)


def device_of_runs() -> torch.device:
    """The accelerator where there is one, else the processor."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


# --- what methods ask of it --------------------------------------------------------------------


def forward(
    shape: Shape,
    rows: float,
    seq: int,
    first: float = 0,
    at_once: int = TOKENS_PER_BATCH["cpu"],
    outputs: float = 1,
) -> np.ndarray:
    """``rows`` forward passes over positions ``first`` to ``seq``, ``at_once`` tokens together.

    The matrix products of all layers: two operations a weight and token, and attention's two
    products with each position at or before one's own; then the logits of the ``outputs``.
    """
    new = seq - first
    seen = new * (first + seq + 1) / 2  # pairs of a position and one that it sees
    linear = 2 * shape.layer_weights * new
    attention = 4 * shape.heads * shape.head_dim * seen
    head = 2 * shape.width * shape.vocabulary * outputs
    flops = rows * (shape.layers * (linear + attention) + head)
    return work(flops, forwards=math.ceil(rows / max(1, at_once // new)))


def gradient(shape: Shape, rows: float, seq: int, outputs: float = 1) -> np.ndarray:
    """``rows`` forward and backward passes through frozen weights.

    As many products go back, and of attention twice as many.
    """
    flops, passes, *_ = forward(shape, rows, seq, outputs=outputs)
    attention = rows * shape.layers * 4 * shape.heads * shape.head_dim * seq * (seq + 1) / 2
    return work(2 * flops + attention, gradients=passes)


def _rounds(price):
    """In how many rounds the gradients are asked for, of which the first has ``FIRST_ROUND``."""
    return min(ROUNDS, math.ceil(price.gradients / FIRST_ROUND))


def priced(shape: Shape, price: Price, size: Size, rows: int = 1) -> np.ndarray:
    """The ``work`` that a method's ``Price`` stands for, over ``rows`` prompts together."""
    found, seq, rows = work(), size.length, rows * size.texts
    read = size.outputs / size.texts
    if price.gradients:
        found += gradient(shape, rows * price.gradients, seq, read)
        found += work(gradients=_rounds(price) if price.gradients > 1 else 0)
    if price.forwards and price.share < 1:  # variants that share a beginning, in smaller passes
        together = FULL_PASS // seq  # rows that begin where the first of them does
        shared = (1 - price.share) * (1 - min(1, together / (rows * price.forwards)))
        found += forward(shape, rows * price.forwards, seq, seq * shared, FULL_PASS, read)
        found += work(forwards=1)
    elif price.forwards:
        at_once = seq if price.vectors else TOKENS_PER_BATCH["cpu"]
        found += forward(shape, rows * price.forwards, seq, 0, at_once, read)
    layers = rows * shape.layers
    if price.maps:  # queries by keys, and the map by what flowed in before
        operations = 2 * shape.heads * shape.head_dim * seq**2 + 2 * seq**3
        found += work(layers * operations) + _one_by_one(layers, shape.heads * seq**2)
    if price.vectors:  # each position by those at or before it
        operations = shape.heads * shape.width * seq**2
        found += work(layers * operations, near=layers * shape.width * seq**2 / 2 * MOVED)
    return found


def _options(methods, size):
    """The options of each of ``methods`` in a report of all of them, ``None`` over its budget."""
    wanted = {name: {} for name in methods}
    read = size.texts * size.length
    return options_of(wanted, size.units, read, BUDGET, of_prompt=size.tokens)


def _one_by_one(times, numbers):
    """The ``work`` of tensors of so many numbers that are computed one by one."""
    near = numbers <= IN_CACHE
    return work(**{"near" if near else "far": times * numbers * MAP[0 if near else 1]})


def methods_work(shape: Shape, size: Size, methods: Iterable[str], rows: int = 1) -> np.ndarray:
    """The ``work`` of some methods on ``rows`` prompts of one size, as the methods' records say.

    A method that the budget leaves out takes nothing.
    """
    readers: dict[str, list[str]] = {}
    given = _options(methods, size)
    for name in sorted(methods):
        readers.setdefault(METHODS[name].reads or name, []).append(name)
    found = work()
    for names in readers.values():  # those who read one pass; relevance goes back by itself
        record = METHODS[names[0]]
        options = given[names[0]]
        if options is not None:
            times = 1.5 if "relevance" in names and len(names) > 1 else 1.0
            price = record.price(size.units, size.length, options)
            found += times * priced(shape, price, size, rows)
    return found


def memory(
    shape: Shape, price: Price, size: Size, rows: int = 1, *, least: bool = False
) -> dict[str, int]:
    """Bytes that a method with this ``Price`` holds at most, beside weights and Python, by part.

    That is for ``rows`` prompts together. ``"way back"`` is what a pass keeps until its gradient
    is there, ``"passing by"`` what a pass forward holds, keys and values with it.
    ``least`` counts one row a pass, to which the engine comes down where memory is short.
    """
    seq, numbers = size.length, shape.heads * size.length**2
    most, one = TOKENS_PER_BATCH["cpu"], size.texts
    rows = one if least else rows * one
    kept = by = maps = 0.0
    if price.gradients:
        points = price.gradients / _rounds(price)
        at_once = one if least else max(one, min(rows * math.ceil(points), most // seq))
        kept = at_once * seq * price.kept * shape.token("gradient")
    if price.forwards and price.share < 1:
        variants = one * math.ceil(price.forwards)
        at_once = one if least else max(one, min(FULL_PASS // seq, variants))
        # the fewer tokens are left to a variant, the more variants share one copy of a text each
        copies = 1 if least else min(math.isqrt(FULL_PASS), math.ceil(price.forwards), seq)
        by = at_once * seq * shape.token("by") + (rows + copies) * seq * shape.token("keys")
    elif price.forwards:
        at_once = 1 if price.vectors else max(one, min(rows, most // seq))
        by = at_once * seq * shape.token("by")
    if price.maps:
        maps += numbers * 4 * 3  # of one text: queries by keys, without what is not seen, softmax
        maps += (rows * 3 + 1) * seq**2 * 4
    if price.vectors:  # of every layer what each position was made of, and the values
        maps += 4 * shape.layers * seq * (seq + shape.key_value_heads * shape.head_dim)
        maps += 3 * 4 * max(min(VECTORS, seq**2 * shape.width), seq * shape.width)
        maps += 4 * shape.heads * seq * shape.width
    logits = 2 * min(LOGITS_AT_ONCE["cpu"], rows * size.outputs // one * shape.vocabulary) * 4
    held = kept, by, maps, logits
    return {part: int(bytes_) for part, bytes_ in zip(PARTS, held, strict=True)}


def most_held(
    shape: Shape, methods: Iterable[str], size: Size, rows: int = 1, least: bool = False
) -> int:
    """Bytes that the most demanding of some methods holds on prompts of one size."""
    found = 0
    for name, options in _options(methods, size).items():
        if options is not None:
            price = METHODS[name].price(size.units, size.length, options)
            found = max(found, sum(memory(shape, price, size, rows, least=least).values()))
    if "relevance" in methods and {"saliency", "gradient_x_input"} & {*methods} and least:
        found += size.length * shape.token("gradient")  # two ways back from one pass
    return found


# --- in words ----------------------------------------------------------------------------------


def rates_in_words(machine: Machine) -> str:
    """What a time rests on."""
    return (
        f"the methods' rows by token counts, and this machine's {machine.flops / 1e9:,.0f} GFLOP/s "
        f"and {machine.bandwidth / 1e9:,.1f} GB/s a worker, measured now."
    )


def in_bytes(number: float) -> str:
    """A number of bytes, with its unit."""
    return tqdm.format_sizeof(number, "B")


def counted(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def in_time(seconds: float) -> str:
    """A time, in the largest unit that it has two of."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
