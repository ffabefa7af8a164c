"""What a plan will take, before any of it is run: from token counts, the model's shape and a clock.

A pass through the model takes its floating point operations at the rate of this machine's matrix
products, the weights read once at the speed of its memory, and a fixed time a layer. The three are
measured in about half a second; no weights are loaded.
"""

import csv
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from helpers.attribution import METHODS
from helpers.attribution.engine import TOKENS_PER_BATCH, gradient_bytes
from helpers.attribution.perturbation import FULL_PASS
from helpers.models import public_name, resolve_model
from llama_reports.jobs import DEFAULT_NOTEBOOK, finished
from llama_reports.scores import DEFAULT_METHODS, WINDOW

TOY_LAYERS = 8  # of the model that a layer's fixed time is measured on
SHOWN = 10  # reports that are named
ENOUGH = 3  # finished reports from which on the estimate is corrected by them
LOOKED_AT = 500  # of them
# measured over reports on benchmarks/prompts/tuning.yml with the bundled model
GRADIENTS = 300  # that integrated gradients take in the mean, where they may: a few take 2,000
ROUNDS = 6  # of passes that they come in
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
    def layer_weights(self):
        """The numbers in a layer's matrices."""
        queries, keys = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        return self.width * (2 * queries + 2 * keys + 3 * self.feed_forward)


@dataclass(frozen=True)
class Work:
    """What is asked of a machine: operations, bytes beside the weights, and passes by their kind.

    A gradient is one forward and one backward pass.
    """

    flops: float = 0.0
    bytes: float = 0.0
    forwards: float = 0.0
    gradients: float = 0.0

    def __add__(self, other):
        return Work(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    def __mul__(self, times):
        return Work(*(part * times for part in self.parts))

    @property
    def parts(self):
        return self.flops, self.bytes, self.forwards, self.gradients


@dataclass(frozen=True)
class Machine:
    """Operations a second in matrix products, bytes a second from memory, and seconds a layer."""

    flops: float
    bandwidth: float
    overhead: float

    def seconds(self, work, shape):
        read = work.forwards + 2 * work.gradients
        layers = work.forwards + 3 * work.gradients
        weights = shape.layers * shape.layer_weights * shape.itemsize
        return (
            work.flops / self.flops / EFFICIENCY
            + (work.bytes + read * weights) / self.bandwidth / READING
            + layers * shape.layers * self.overhead
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
    seconds: float
    memory: int
    disk: int
    first: list[str]
    basis: str
    workers: int
    unit: str = "report"

    @property
    def text(self):
        lines = [f"{_count(self.to_run, self.unit)} would run" + (":" if self.first else ".")]
        lines += [f"  {name}" for name in self.first]
        if self.to_run > len(self.first) and self.first:
            lines.append(f"  … and {self.to_run - len(self.first):,} more")
        if self.finished:
            lines.append(f"{self.finished:,} finished before: not run again.")
        if self.replaced:
            lines.append(f"{self.replaced:,} of another question under the same id: replaced.")
        if self.to_run:
            lines.append(
                f"About {_duration(self.seconds)} with {_count(self.workers, 'worker')}; at most "
                f"{_size(self.memory)} of memory; {_size(self.disk)} of disk."
            )
            lines.append(f"Basis: {self.basis}")
        return "\n".join(lines)


def estimate(plan, out=None, *, workers=1, threads=1, scores_only=False, done=None, machine=None):
    """What a ``Plan`` takes with ``workers`` processes of ``threads`` threads each.

    ``done(job)`` says if a job needs no more work; by default, if its report is in ``out``. With
    ``scores_only`` jobs are attributed in batches and no notebook is run. ``machine`` is measured
    here unless it is given. Where ``out`` holds reports of the same notebook and model, what they
    took corrects the estimate. Returns an ``Estimate``.
    """
    shape = model_shape(plan.model, plan.dtype)
    left, first = _left(plan, out, done, scores_only)
    tokens, kinds = plan.tokens[left], plan.kinds[left]
    if machine is None and len(tokens):
        machine = measure(shape, plan.dtype, threads)
    if scores_only:
        each, basis = _seconds_of_scores(plan, shape, machine, tokens, kinds)
    else:
        each, basis = _seconds_of_reports(plan, shape, machine, tokens, kinds, out)
    busy = max(1, min(workers, len(each)))
    together = max(each.sum() / busy, each.max(initial=0.0)) + (START if len(each) else 0.0)
    return Estimate(
        to_run=len(tokens),
        finished=len(plan) - len(tokens),
        replaced=plan.replaced,
        seconds=float(together),
        memory=_memory(plan, shape, tokens, kinds, scores_only, busy) if len(tokens) else 0,
        disk=_disk(plan, tokens, kinds, scores_only),
        first=first,
        basis=basis,
        workers=busy,
        unit="prompt" if scores_only else "report",
    )


def _left(plan, out, done, scores_only):
    """Which jobs are to run, bool [jobs], and the names of the first of them."""
    if done is None and not scores_only and out is not None and Path(out).exists():

        def done(job):
            return finished(job, out)

    if done is None:
        first = [job.slug or job.prompt[:60] for job in islice(plan, SHOWN)]
        return np.ones(len(plan), bool), first
    left, first = np.ones(len(plan), bool), []
    for index, job in enumerate(plan):
        left[index] = not done(job)
        if left[index] and len(first) < SHOWN:
            first.append(job.slug or job.prompt[:60])
    return left, first


# --- the model and the machine -----------------------------------------------------------------


def model_shape(model, dtype="float32"):
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


def measure(shape, dtype="float32", threads=1):
    """The ``Machine`` that this one is, for matrices of ``shape``; takes about half a second."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    dtype = _dtype(None, "float32" if dtype == "auto" else dtype)
    found = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inner, outer = min(shape.width, 1024), min(shape.feed_forward, 4096)
        rows, weight = (torch.ones(n, inner, dtype=dtype, device=device) for n in (512, outer))
        large = torch.ones(4096, 4096, dtype=dtype, device=device)  # larger than a cache
        linear, run_toy = torch.nn.functional.linear, _toy(device)
        return Machine(
            flops=2 * rows.numel() * outer / _seconds(lambda: linear(rows, weight), device),
            bandwidth=large.nbytes / _seconds(lambda: linear(large[:1], large), device),
            overhead=_seconds(run_toy, device) / TOY_LAYERS,
        )
    finally:
        torch.set_num_threads(found)


def _toy(device):
    """A pass through a model so small that nothing of its time is arithmetic."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=TOY_LAYERS,
        num_attention_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config).eval().to(device)
    embeds = torch.zeros(1, 1, 32, device=device)

    def run():
        with torch.inference_mode():
            model(inputs_embeds=embeds, use_cache=False)

    return run


def _seconds(function, device, times=9):
    """The median time of a call, after one that does not count."""
    taken = []
    for _ in range(times + 1):
        began = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - began)
    return sorted(taken[1:])[times // 2]


# --- what methods ask of it --------------------------------------------------------------------


def forward(shape, rows, seq, first=0, at_once=TOKENS_PER_BATCH["cpu"]):
    """``rows`` forward passes over positions ``first`` to ``seq``, ``at_once`` tokens together.

    The matrix products of all layers: two operations a weight and token, and attention's two
    products with each position at or before one's own. The output layer is ``answer``.
    """
    new = seq - first
    seen = new * (first + seq + 1) / 2  # pairs of a position and one that it sees
    linear = 2 * shape.layer_weights * new
    attention = 4 * shape.heads * shape.head_dim * seen
    flops = rows * shape.layers * (linear + attention)
    return Work(flops, forwards=_passes(rows, new, at_once))


def gradient(shape, rows, seq, at_once=TOKENS_PER_BATCH["cpu"]):
    """``rows`` forward and backward passes through frozen weights."""
    linear = 2 * shape.layer_weights * seq
    attention = 4 * shape.heads * shape.head_dim * seq * (seq + 1) / 2
    flops = rows * shape.layers * (2 * linear + 3 * attention)
    return Work(flops, gradients=_passes(rows, seq, at_once))


def answer(shape, rows, passes=1):
    """The logits of the whole vocabulary, after the last position of each row."""
    weights = shape.width * shape.vocabulary
    return Work(2 * rows * weights, bytes=passes * weights * shape.itemsize)


def _passes(rows, tokens, at_once):
    return math.ceil(rows / max(1, at_once // tokens))


def _replaced(shape, seq, sizes, whole_vocabulary=False):
    """Rows with some tokens replaced: ``sizes`` ``{tokens replaced: rows}``.

    Up to its first replaced position a row is the prompt itself, and is not run; with ``k`` of
    ``n`` positions drawn at random, ``(n - k) / (k + 1)`` come before the first of them.
    """
    work = forward(shape, 1, seq) + answer(shape, 1)
    for size, rows in sizes.items():
        first = (seq - size) / (size + 1) if size else seq - 1
        some = forward(shape, rows, seq, first)
        full = rows * (seq - first) / FULL_PASS  # the passes are shared by all sizes
        some = Work(some.flops, forwards=full)
        work += some + (answer(shape, rows, full) if whole_vocabulary else Work())
    return work


def _distinct(seq, size, drawn):
    """How many different subsets of ``size`` positions there are among so many that are drawn."""
    there_are = math.comb(seq, size)
    if there_are > 1e9:
        return drawn
    return there_are * -math.expm1(drawn * math.log1p(-1 / there_are)) if there_are > 1 else 1


def affordable(seq):
    """Gradients that 08_comparison lets a prompt of ``seq`` tokens have on a CPU; see there."""
    return 30_000 // seq


def method_work(shape, seq, method):
    """The ``Work`` of one method on a prompt of ``seq`` tokens, as 08_comparison asks for it."""
    if method in ("saliency", "gradient_x_input", "relevance"):
        return gradient(shape, 1, seq)
    if method in ("attention", "attention_rollout"):
        return forward(shape, 1, seq)
    if method == "alti_logit":
        vectors = shape.layers * seq * seq * shape.width  # one from each position to each
        mixing = Work(2 * shape.heads * vectors, bytes=6 * 4 * vectors)
        return forward(shape, 1, seq) + mixing
    if method == "integrated_gradients":
        rows = min(GRADIENTS, max(33, min(2000, affordable(seq))))
        work = gradient(shape, rows, seq)
        return Work(work.flops, gradients=work.gradients + ROUNDS)
    if method == "occlusion":
        rows = [forward(shape, 1, seq, first) for first in range(seq)]
        flops = sum(row.flops for row in rows)
        passes = math.ceil(seq * (seq + 1) / 2 / FULL_PASS)
        return forward(shape, 1, seq) + Work(flops, forwards=passes)
    if method == "shapley":
        orders = 2 * max(2, min(10, affordable(seq) // 8 // seq))
        if 2**seq <= orders * (seq - 1) + 2:
            sizes = {size: math.comb(seq, size) for size in range(seq + 1)}
        else:
            sizes = {size: _distinct(seq, size, orders) for size in range(seq + 1)}
        return _replaced(shape, seq, sizes)
    return Work()


def report_work(shape, seq, methods=()):
    """The ``Work`` of 08_comparison on a prompt of ``seq`` tokens; no methods are all of them."""
    chosen = methods or {
        name for name in METHODS if name != "shapley" or affordable(seq) >= 4 * seq
    }
    work = (forward(shape, 1, seq) + answer(shape, 1)) * 4  # the question, and what is shown of it
    work += forward(shape, seq, seq) + answer(shape, seq)  # occlusion by hand
    for method in sorted(chosen):
        work += method_work(shape, seq, method)
    return work + _erasure(shape, seq, len(chosen))


def _erasure(shape, seq, methods):
    """Deletion and insertion, in the order of each method and in random ones."""
    orders = methods + (20 if seq <= 12 else 10)
    steps = min(seq, max(2, 330 // seq))
    counts = np.linspace(0, seq, steps + 1).round().astype(int).tolist()
    drawn = Counter(counts) + Counter(seq - count for count in counts)
    sizes = {size: _distinct(seq, size, times * orders) for size, times in drawn.items()}
    return _replaced(shape, seq, sizes, whole_vocabulary=True)


# --- time --------------------------------------------------------------------------------------


def _seconds_of_reports(plan, shape, machine, tokens, kinds, out):
    """Seconds of each report [jobs], and what they rest on."""
    known = {}
    each = np.zeros(len(tokens))
    pairs, place = np.unique(np.stack([kinds, tokens], axis=1), axis=0, return_inverse=True)
    for index, (kind, seq) in enumerate(pairs.tolist()):
        notebook, methods = plan.asked[kind]
        planned = _report_seconds(shape, machine, seq, methods)
        if notebook not in known:
            known[notebook] = _correction(plan, shape, machine, notebook, out)
        each[place.ravel() == index] = planned * known[notebook][0]
    if not len(tokens):
        return each, ""
    basis = [_machine_in_words(machine)]
    for notebook, (factor, reports) in sorted(known.items()):
        if reports:
            basis.append(
                f"Times {factor:.2f} for {notebook}, by what {_count(reports, 'report')} of it "
                "took."
            )
        elif notebook != DEFAULT_NOTEBOOK:
            basis.append(
                f"{notebook} is counted as {DEFAULT_NOTEBOOK}, until {ENOUGH} of its reports are "
                "finished."
            )
    return each, " ".join(basis)


def _report_seconds(shape, machine, seq, methods):
    return FIXED[0] + FIXED[1] * seq + machine.seconds(report_work(shape, seq, methods), shape)


def _correction(plan, shape, machine, notebook, out):
    """``(factor, reports)``: measured seconds over planned ones, of the reports in ``out``."""
    took, planned, count = 0.0, 0.0, 0
    folders = Path(out).glob("*/report.json") if out is not None else ()
    for file in islice(folders, LOOKED_AT):
        try:
            facts = json.loads(file.read_bytes())
            alike = facts["notebook"] == notebook and facts["model"] == public_name(plan.model)
            if not alike or facts["error"] is not None:
                continue
            seq, seconds = int(facts["tokens"]), float(facts["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        took, count = took + seconds, count + 1
        planned += _report_seconds(shape, machine, seq, _methods_of(file.parent))
    return (took / planned, count) if count >= ENOUGH else (1.0, 0)


def _methods_of(folder):
    """The methods that a report has evidence of; none where it is another notebook's."""
    try:
        with (folder / "evidence.csv").open(encoding="utf-8", newline="") as stream:
            return frozenset(row["method"] for row in csv.DictReader(stream))
    except (OSError, KeyError, ValueError, csv.Error):
        return frozenset()


def _seconds_of_scores(plan, shape, machine, tokens, kinds):
    """Seconds of each prompt [jobs] when prompts of one length go through the model together."""
    each = np.zeros(len(tokens))
    for start in range(0, len(tokens), WINDOW):
        some = np.stack([kinds[start : start + WINDOW], tokens[start : start + WINDOW]], axis=1)
        pairs, place, counts = np.unique(some, axis=0, return_inverse=True, return_counts=True)
        for index, (kind, seq) in enumerate(pairs.tolist()):
            methods = plan.asked[kind][1] or frozenset(DEFAULT_METHODS)
            rows = int(counts[index])
            seconds = machine.seconds(scores_work(shape, rows, seq, methods), shape) / rows
            each[start : start + WINDOW][place.ravel() == index] = seconds
    return each, _machine_in_words(machine) if len(tokens) else ""


def scores_work(shape, rows, seq, methods):
    """The ``Work`` of attributing ``rows`` prompts of ``seq`` tokens together."""
    methods, work = set(methods), Work()
    if methods >= {"saliency", "gradient_x_input"}:
        methods.remove("saliency")  # they read the same gradient
    if "relevance" in methods and methods & {"saliency", "gradient_x_input"}:
        methods.remove("relevance")
        work += gradient(shape, rows, seq) * 0.5  # one more way back through the same pass
    for method in sorted(methods):
        if method in ("saliency", "gradient_x_input", "relevance"):
            work += gradient(shape, rows, seq)
        elif method in ("attention", "attention_rollout"):
            work += forward(shape, rows, seq)
        elif method == "occlusion":
            work += forward(shape, rows, seq)
            for first in range(seq):
                work += forward(shape, rows, seq, first)
        else:
            work += method_work(shape, seq, method) * rows
    passes = max(1, work.forwards + work.gradients)
    return work + answer(shape, rows, min(passes, _passes(rows, seq, TOKENS_PER_BATCH["cpu"])))


def _machine_in_words(machine):
    return (
        f"the methods' rows by token counts, and this machine's {machine.flops / 1e9:,.0f} GFLOP/s "
        f"and {machine.bandwidth / 1e9:,.1f} GB/s a worker, measured now."
    )


# --- memory and disk ---------------------------------------------------------------------------


def _memory(plan, shape, tokens, kinds, scores_only, workers):
    """Bytes that this process and its workers hold at most: weights, one full pass, and Python."""
    per_token = gradient_bytes(SimpleNamespace(config=_config(plan.model)))
    most = 0
    for kind, (_, methods) in enumerate(plan.asked):
        seqs = tokens[kinds == kind]
        if not len(seqs):
            continue
        seqs = np.unique(seqs).astype(np.int64)
        full = scores_only or not methods or "integrated_gradients" in methods
        rows = np.maximum(1, TOKENS_PER_BATCH["cpu"] // seqs) if full else 1
        most = max(most, int((rows * seqs).max()))
    weights = _parameters(plan.model) * shape.itemsize
    return PROCESS + workers * (PROCESS + weights + most * per_token)


def _disk(plan, tokens, kinds, scores_only):
    tokens = tokens.astype(float)
    if not scores_only:
        return int((DISK[0] + DISK[1] * tokens).sum())
    methods = np.array([len(methods or DEFAULT_METHODS) for _, methods in plan.asked])
    return int(SCORE * (tokens * methods[kinds]).sum())


def _parameters(model):
    """The numbers in a model's weights, read off the headers of its files."""
    count = 0
    for file in sorted(resolve_model(model).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                count += math.prod(tensors.get_slice(name).get_shape())
    return count


# --- in words ----------------------------------------------------------------------------------


def _count(number, noun):
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _duration(seconds):
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _size(number):
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e6:,.0f} MB"
