"""What a plan will take, before any of it is run: from token counts, the model's shape and a clock.

Each method's record says how many rows a prompt takes. A row takes its floating point operations at
the rate of this machine's matrix products, the weights read once a pass at the speed of its memory,
and a fixed time a layer. The three are measured in about half a second; no weights are loaded.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm
from transformers import AutoConfig

from helpers.attribution import BUDGET, METHODS, Price
from helpers.attribution.engine import FULL_PASS, TOKENS_PER_BATCH, gradient_bytes
from helpers.models import public_name, resolve_model, tensor_shapes, tiny_llama
from llama_reports.files import read_mapping
from llama_reports.jobs import DEFAULT_NOTEBOOK, Job, Plan, finished
from llama_reports.scores import DEFAULT_METHODS, WINDOW

TOY_LAYERS = 3  # of the toy: two, and about one more in what stands around them
SHOWN = 10  # reports that are named
ENOUGH = 3  # finished reports from which on the estimate is corrected by them
LOOKED_AT = 500  # of them
# measured over reports on benchmarks/prompts/tuning.yml with the bundled model
ROUNDS = 6  # of passes in which a method of many gradients asks for them
ERASED = 0.85  # of a row is run where some units are erased at random
EFFICIENCY = 0.85  # of the rate of matrix products, over all that a pass does
READING = 0.5  # of the speed at which one large matrix is read, over the weights of all layers
START = 5.0  # seconds until a worker has imported everything and has the model
FIXED = 2.5, 0.08  # seconds of a report beside the model's, and those a token: figures, pages
DISK = 1_450_000, 75_000  # bytes of a report's folder, and those a token
SCORE = 16  # bytes of a score on disk, and of what stands beside it
PROCESS = 600_000_000  # bytes of a process that has imported everything, without a model


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like model; ``itemsize`` is in bytes a weight."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    itemsize: int = 4

    @property
    def layer_weights(self) -> int:
        """The numbers in a layer's matrices."""
        queries, keys = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        return self.width * (2 * queries + 2 * keys + 3 * self.feed_forward)


def work(flops: float = 0.0, forwards: float = 0.0, gradients: float = 0.0) -> np.ndarray:
    """What is asked of a machine: operations, and passes through the model by their kind, [3].

    A gradient is one forward and one backward pass.
    """
    return np.array([flops, forwards, gradients], dtype=float)


class Size(NamedTuple):
    """What is known of a prompt: tokens that are read, scores of a method, tokens explained."""

    tokens: int
    units: int
    outputs: int = 1

    @property
    def length(self) -> int:
        """Tokens of the text that goes through the model."""
        return self.tokens + self.outputs - 1


@dataclass(frozen=True)
class Machine:
    """Operations a second in matrix products, bytes a second from memory, and seconds a layer."""

    flops: float
    bandwidth: float
    overhead: float

    def seconds(self, work: np.ndarray, shape: Shape) -> float:
        flops, forwards, gradients = work.tolist()
        weights = shape.layers * shape.layer_weights + shape.width * shape.vocabulary
        return (
            flops / self.flops / EFFICIENCY
            + (forwards + 2 * gradients) * weights * shape.itemsize / self.bandwidth / READING
            + (forwards + 3 * gradients) * shape.layers * self.overhead
        )


@dataclass(frozen=True)
class Estimate:
    """What a plan takes. ``seconds`` of a clock on the wall, ``memory`` and ``disk`` in bytes.

    ``memory`` is the most that all processes hold together. ``first`` are the names of the first
    reports to run, ``replaced`` counts those that take the place of another question's, ``basis``
    is in words what all of this rests on, and ``text`` is what ``--dry-run`` prints.
    """

    to_run: int
    finished: int
    replaced: int
    first: list[str]
    seconds: float = 0.0
    memory: int = 0
    disk: int = 0
    basis: str = ""
    workers: int = 1
    unit: str = "report"

    @property
    def text(self) -> str:
        lines = [f"{_count(self.to_run, self.unit)} would run" + (":" if self.first else ".")]
        lines += [f"  {name}" for name in self.first]
        if self.to_run > len(self.first) and self.first:
            lines.append(f"  … and {self.to_run - len(self.first):,} more")
        if self.finished:
            lines.append(f"{self.finished:,} finished before: not run again.")
        if self.replaced:
            lines.append(f"{self.replaced:,} of another question under the same id: replaced.")
        if self.to_run:
            memory, disk = (tqdm.format_sizeof(some, "B") for some in (self.memory, self.disk))
            lines.append(
                f"About {_duration(self.seconds)} with {_count(self.workers, 'worker')}; at most "
                f"{memory} of memory; {disk} of disk."
            )
            lines.append(f"Basis: {self.basis}")
        return "\n".join(lines)


def estimate(
    plan: Plan,
    out: str | Path | None = None,
    *,
    workers: int = 1,
    threads: int = 1,
    scores_only: bool = False,
    done: Callable[[Job], bool] | None = None,
    machine: Machine | None = None,
) -> Estimate:
    """What a ``Plan`` takes with ``workers`` processes of ``threads`` threads each.

    ``done(job)`` says if a job needs no more work; by default, if its report is in ``out``. With
    ``scores_only`` jobs are attributed in batches and no notebook is run. ``machine`` is measured
    here unless it is given. Where ``out`` holds reports of the same notebook and model, what they
    took corrects the estimate. Returns an ``Estimate``.
    """
    if done is None and not scores_only and out is not None and Path(out).exists():
        done = partial(finished, out=out)
    left, first = _left(plan, done)
    unit, to_run = "prompt" if scores_only else "report", int(left.sum())
    found = Estimate(to_run, len(plan) - to_run, plan.replaced, first, unit=unit)
    if not to_run:
        return found
    shape = model_shape(plan.model, plan.dtype)
    machine = machine or measure(shape, plan.dtype, threads)
    kinds = np.unique(plan.kinds[left])
    notebooks = sorted({plan.asked[kind][0] for kind in kinds if not scores_only})
    corrections = {name: _correction(plan, shape, machine, name, out) for name in notebooks}
    each = _seconds_of_jobs(plan, shape, machine, left, corrections)
    busy = max(1, min(workers, to_run))
    return replace(
        found,
        seconds=float(max(each.sum() / busy, each.max())) + START,
        memory=_memory(plan, shape, left, scores_only, busy),
        disk=_disk(plan, left, scores_only),
        basis=_basis(machine, corrections),
        workers=busy,
    )


def _left(plan, done):
    """Which jobs are to run, bool [jobs], and the names of the first of them."""
    left, first = np.ones(len(plan), bool), []
    for index, job in enumerate(plan):
        if done is None and len(first) == SHOWN:
            break
        left[index] = done is None or not done(job)
        if left[index] and len(first) < SHOWN:
            first.append(job.slug or job.prompt[:60])
    return left, first


# --- the model and the machine -----------------------------------------------------------------


def model_shape(model: str | Path, dtype: str = "float32") -> Shape:
    """The ``Shape`` of a model, from its configuration alone."""
    config = _config(model)
    heads = config.num_attention_heads
    return Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        feed_forward=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads=heads,
        key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        itemsize=_dtype(config, dtype).itemsize,
    )


def _config(model):
    folder = resolve_model(model)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return config.get_text_config()


def _dtype(config, dtype):
    found = getattr(torch, dtype, None) if dtype != "auto" else getattr(config, "dtype", None)
    return found or torch.float32


def measure(shape: Shape, dtype: str = "float32", threads: int = 1) -> Machine:
    """The ``Machine`` that this one is, for matrices of ``shape``; takes about half a second."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    kind = _dtype(None, "float32" if dtype == "auto" else dtype)
    inner, outer = min(shape.width, 1024), min(shape.feed_forward, 4096)
    rows, weight = (torch.ones(n, inner, dtype=kind, device=device) for n in (512, outer))
    large = torch.ones(4096, 4096, dtype=kind, device=device)  # larger than a cache
    toy = tiny_llama()[0].to(device)  # so small that nothing of its time is arithmetic
    token = torch.zeros(1, 1, dtype=torch.long, device=device)

    def seconds(code):
        names = {"rows": rows, "weight": weight, "large": large, "toy": toy, "token": token}
        names["linear"] = torch.nn.functional.linear
        timer = Timer(code, globals=names, num_threads=threads)
        with torch.inference_mode():
            return timer.blocked_autorange(min_run_time=0.1).median

    return Machine(
        flops=2 * rows.numel() * outer / seconds("linear(rows, weight)"),
        bandwidth=large.nbytes / seconds("linear(large[:1], large)"),
        overhead=seconds("toy(token, use_cache=False)") / TOY_LAYERS,
    )


# --- what methods ask of it --------------------------------------------------------------------


def forward(
    shape: Shape,
    rows: float,
    seq: int,
    first: float = 0,
    at_once: int = TOKENS_PER_BATCH["cpu"],
    outputs: int = 1,
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


def gradient(shape: Shape, rows: float, seq: int, outputs: int = 1) -> np.ndarray:
    """``rows`` forward and backward passes through frozen weights.

    As many products go back, and of attention twice as many.
    """
    flops, passes, _ = forward(shape, rows, seq, outputs=outputs)
    attention = rows * shape.layers * 4 * shape.heads * shape.head_dim * seq * (seq + 1) / 2
    return work(2 * flops + attention, gradients=passes)


def priced(shape: Shape, price: Price, size: Size, rows: int = 1) -> np.ndarray:
    """The ``work`` that a method's ``Price`` stands for, over ``rows`` prompts together."""
    found, seq = work(), size.length
    if price.gradients:
        found += gradient(shape, rows * price.gradients, seq, size.outputs)
        found += work(gradients=ROUNDS * (price.gradients > 1))
    if price.forwards:  # variants that share a beginning go through in smaller passes
        at_once = TOKENS_PER_BATCH["cpu"] if price.share == 1 else FULL_PASS
        first = seq * (1 - price.share)
        found += forward(shape, rows * price.forwards, seq, first, at_once, size.outputs)
    return found


def methods_work(shape: Shape, size: Size, methods: Iterable[str], rows: int = 1) -> np.ndarray:
    """The ``work`` of some methods on ``rows`` prompts of one size, as the methods' records say.

    A method that the budget leaves out takes nothing.
    """
    readers: dict[str, list[str]] = {}
    for name in sorted(methods):
        readers.setdefault(METHODS[name].reads or name, []).append(name)
    found = work()
    for names in readers.values():  # those who read one pass; relevance goes back by itself
        record = METHODS[names[0]]
        options = record.options(size.units, size.length, BUDGET)
        if options is not None:
            times = 1.5 if "relevance" in names and len(names) > 1 else 1.0
            price = record.price(size.units, size.length, options)
            found += times * priced(shape, price, size, rows)
    return found


def report_work(shape: Shape, size: Size, methods: Iterable[str] = ()) -> np.ndarray:
    """The ``work`` of 08_comparison on a prompt; no methods are all of them.

    Its own part: the question and what is shown of it, occlusion before all methods, of the target
    alone too, and the erasure of units in the order of each method and in random ones.
    """
    methods, units = list(methods or METHODS), size.units
    orders = len(methods) + (20 if units <= 12 else 10)
    steps = min(units, max(2, 330 // size.tokens))
    drawn, there_are = 2 * orders * (steps - 1) + 3, 2.0 ** min(units, 60)
    variants = -there_are * math.expm1(-drawn / there_are)  # those that are drawn twice run once
    own = priced(shape, Price(forwards=6), size) + 2 * methods_work(shape, size, ["occlusion"])
    own += priced(shape, Price(forwards=variants, share=ERASED), size)
    return own + methods_work(shape, size, methods)


# --- time --------------------------------------------------------------------------------------


def _seconds_of_jobs(plan, shape, machine, left, corrections):
    """Seconds of the jobs that are left, in no order: of a report, or a share of a batch alike."""

    @cache
    def of(kind, size, count):
        notebook, methods = plan.asked[kind]
        if notebook in corrections:
            return _report_seconds(shape, machine, size, methods) * corrections[notebook][0]
        together = methods_work(shape, size, methods or DEFAULT_METHODS, count)
        return machine.seconds(together, shape) / count

    windows = np.arange(left.sum()) // WINDOW  # as many as are sorted by length together
    facts = [known[left] for known in (plan.kinds, plan.tokens, plan.units, plan.outputs)]
    alike, counts = np.unique([windows, *facts], axis=1, return_counts=True)
    columns = zip(alike.T.tolist(), counts.tolist(), strict=True)
    taken = [of(kind, Size(*size), count) for (_, kind, *size), count in columns]
    return np.repeat(taken, counts)


def _basis(machine, corrections):
    """What the seconds rest on, in words."""
    basis = [
        f"the methods' rows by token counts, and this machine's {machine.flops / 1e9:,.0f} GFLOP/s "
        f"and {machine.bandwidth / 1e9:,.1f} GB/s a worker, measured now."
    ]
    for notebook, (factor, reports) in corrections.items():
        if reports:
            took = f"by what {_count(reports, 'report')} of it took"
            basis.append(f"Times {factor:.2f} for {notebook}, {took}.")
        elif notebook != DEFAULT_NOTEBOOK:
            until = f"until {ENOUGH} of its reports are finished"
            basis.append(f"{notebook} is counted as {DEFAULT_NOTEBOOK}, {until}.")
    return " ".join(basis)


def _report_seconds(shape, machine, size, methods):
    took = machine.seconds(report_work(shape, size, methods), shape)
    return FIXED[0] + FIXED[1] * size.units + took


def _correction(plan, shape, machine, notebook, out):
    """``(factor, reports)``: measured seconds over planned ones, of the reports in ``out``."""
    took, planned, count = 0.0, 0.0, 0
    alike = [notebook, public_name(plan.model), None]
    folders = Path(out).glob("*/report.json") if out is not None else ()
    for file in islice(folders, LOOKED_AT):
        facts = read_mapping(file)
        try:
            if [facts[name] for name in ("notebook", "model", "error")] != alike:
                continue
            tokens, seconds = int(facts["tokens"]), float(facts["seconds"])
        except (ValueError, KeyError, TypeError):
            continue
        took, count = took + seconds, count + 1
        size = Size(tokens, tokens)
        planned += _report_seconds(shape, machine, size, _methods_of(file.parent))
    return (took / planned, count) if count >= ENOUGH else (1.0, 0)


def _methods_of(folder):
    """The methods that a report has evidence of; none where it is another notebook's."""
    try:
        return {*pd.read_csv(folder / "evidence.csv", usecols=["method"])["method"]} & {*METHODS}
    except (OSError, ValueError):  # what pandas raises is one of these
        return set()


# --- memory and disk ---------------------------------------------------------------------------


def _memory(plan, shape, left, scores_only, workers):
    """Bytes that this process and its workers hold at most: weights, one full pass, and Python."""
    per_token = gradient_bytes(SimpleNamespace(config=_config(plan.model)))
    most = 0
    for kind, (_, methods) in enumerate(plan.asked):
        seqs = np.unique(plan.tokens[left & (plan.kinds == kind)]).astype(np.int64)
        many = scores_only or not methods or any(_many_gradients(name) for name in methods)
        rows = np.maximum(1, TOKENS_PER_BATCH["cpu"] // seqs) if many else 1
        most = max(most, int((rows * seqs).max(initial=0)))
    weights = _parameters(plan.model) * shape.itemsize
    return PROCESS + workers * (PROCESS + weights + most * per_token)


def _many_gradients(name):
    """Whether a method asks for the gradients of many rows together."""
    options = METHODS[name].options(8, 8, BUDGET)
    return options is not None and METHODS[name].price(8, 8, options).gradients > 1


def _disk(plan, left, scores_only):
    units = plan.units[left].astype(float)
    if not scores_only:
        return int((DISK[0] + DISK[1] * units).sum())
    methods = np.array([len(methods or DEFAULT_METHODS) for _, methods in plan.asked])
    return int(SCORE * (units * methods[plan.kinds[left]]).sum())


def _parameters(model):
    """The numbers in a model's weights, read off the headers of its files."""
    return sum(math.prod(shape) for shape in tensor_shapes(model).values())


# --- in words ----------------------------------------------------------------------------------


def _count(number, noun):
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _duration(seconds):
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
