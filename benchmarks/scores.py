"""Scores of many prompts: in batches against one at a time, and what a million would take.

Blocks of prompts are done in turns, first one at a time by ``ask`` and ``attribute``, then by
``score_part``, tables written and all, in the same process on the same threads; the ratio that is
kept is the median over the blocks. Every score of the one is compared with the other's.

    python benchmarks/scores.py                 everything, a quarter of an hour; writes results.md
    python benchmarks/scores.py --prompts 60    a look; writes nothing
"""

import argparse
import hashlib
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median

import psutil
import pyarrow.parquet as pq
import torch

from helpers import ask, attribute
from helpers.ground_truth import FAMILIES, cases
from helpers.models import BUNDLED
from llama_reports import scores
from llama_reports.run import Job
from llama_reports.scores import DEFAULT_METHODS, chunks, score_part

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts, not a package
from machine import gradient_flops, matrix_rate, measured
from report import keep, table

PROMPTS, BLOCK = 500, 100
SHORT = range(5, 21)  # tokens
OTHERS = ("occlusion", "attention", "attention_rollout")
GRADIENTS = {"saliency": 1, "gradient_x_input": 1, "relevance": 1}
MILLION = 1_000_000


def short_jobs(tokenizer, count):
    """Prompts of the reporting half, the families in turns; every other one names its answers."""
    families = [cases(family, "reporting") for family in FAMILIES]
    jobs = {}
    for case in (case for some in zip_longest(*families) for case in some if case):
        tokens = len(tokenizer(case.prompt)["input_ids"])
        both = [
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (case.target, case.foil)
        ]
        if tokens in SHORT and list(map(len, both)) == [1, 1] and case.prompt not in jobs:
            named = {"target": case.target, "foil": case.foil} if len(jobs) % 2 else {}
            digest = hashlib.sha256(case.prompt.encode()).hexdigest()
            asked = {"prompt": case.prompt, **named}
            jobs[case.prompt] = Job("", case.prompt, Path(), asked, digest, digest, tokens)
        if len(jobs) == count:
            return list(jobs.values())
    raise RuntimeError(f"{len(jobs)} short prompts, and {count} are wanted")


def one_at_a_time(model, tokenizer, jobs, methods):
    """``(results by job, seconds by what they were spent on)``."""
    found, spent = {}, dict.fromkeys(("ask", *methods), 0.0)
    for job in jobs:
        began = time.perf_counter()
        question = ask(model, tokenizer, **job.asked)
        spent["ask"] += time.perf_counter() - began
        for method in methods:
            began = time.perf_counter()
            found[job.identity, method] = attribute(model, question, method)
            spent[method] += time.perf_counter() - began
    return found, spent


def compare(jobs, methods, threads, block=BLOCK):
    """Block by block, both ways: a dict of what was measured, and the difference by method."""
    model, tokenizer, _ = scores._loaded(BUNDLED, "float32")
    blocks, apart = [], dict.fromkeys(methods, 0.0)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as out:
        score_part(jobs[:4], Path(out, "warm"), methods=methods, threads=threads)
        one_at_a_time(model, tokenizer, jobs[:2], methods)
        for number, part in enumerate(chunks(jobs, block, window=len(jobs))):
            print(f"{threads} threads, block {number}: {len(part)} prompts", file=sys.stderr)
            began, worked = time.perf_counter(), time.process_time()
            singles, spent = one_at_a_time(model, tokenizer, part, methods)
            single, single_work = time.perf_counter() - began, time.process_time() - worked
            folder = Path(out, f"block-{number}")
            began, worked = time.perf_counter(), time.process_time()
            with measured() as took:
                facts = score_part(part, folder, methods=methods, threads=threads)
            batched, batched_work = time.perf_counter() - began, time.process_time() - worked
            assert not facts["failed"]
            by_method = compare_tables(folder, singles, apart)
            flops = sum(gradient_flops(model, job.tokens) for job in part)
            blocks.append(
                {
                    "prompts": len(part),
                    "tokens": facts["tokens"],
                    "single": single,
                    "batched": batched,
                    "work": single_work / batched_work,
                    "rate": matrix_rate(),
                    "flops": flops,
                    "spent": spent,
                    "by method": by_method,
                    "shares": facts["seconds"],
                    "memory": took.bytes,
                }
            )
        disk = bytes_in_one_part(Path(out), methods)
    return blocks, apart, disk


def compare_tables(folder, singles, apart):
    """Compare the tables with ``singles``, put the differences into ``apart``; seconds by method.

    A difference is a share of the prompt's largest score.
    """
    seconds = {}
    for place in sorted(folder.glob("scores/method=*")):
        method = place.name.removeprefix("method=")
        found = {}
        for row in pq.read_table(place, columns=["id", "score"], partitioning=None).to_pylist():
            found.setdefault(row["id"], []).append(row["score"])
        for identity, values in found.items():
            expected = singles[identity, method].scores
            largest = (torch.tensor(values) - expected).abs().max() / expected.abs().max()
            apart[method] = max(apart[method], float(largest))
        evidence = pq.read_table(folder / "evidence" / place.name, partitioning=None)
        seconds[method] = sum(evidence["seconds"].to_pylist())
    assert len(seconds) == len({method for _, method in singles}), "a method is missing"
    assert max(apart.values()) <= 1e-4, apart
    return seconds


def bytes_in_one_part(out, methods):
    """Bytes of all that was written, had it been one part; by table."""
    disk = {"prompts": 0, "scores": 0, "evidence": 0}
    folders = [f"{name}/method={method}" for name in ("scores", "evidence") for method in methods]
    with tempfile.TemporaryDirectory() as work:
        for folder in ("prompts", *folders):
            files = sorted(out.glob(f"block-*/{folder}/*.parquet"))
            whole = pq.ParquetDataset(files, partitioning=None).read()
            written = scores._write(Path(work) / folder / "part.parquet", whole)
            disk[folder.split("/")[0]] += written
    return disk


def read_rate():
    """Bytes a second that one pass over a large tensor reads: what memory gives."""
    block = torch.ones(100_000_000)  # 400 MB, no cache holds it
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - began)
    return 4 * len(block) / median(seconds)


def start_worker():
    scores._loaded(BUNDLED, "float32")


def work(part, out):
    """A part in a worker of its own: when it began and ended."""
    began = time.time()
    score_part(part, out, threads=1)
    return began, time.time()


def two_workers(jobs):
    """Prompts a second of two processes of one thread, while both are at work."""
    halves = [sorted(jobs[n::2], key=lambda job: job.tokens) for n in range(2)]
    with (
        ProcessPoolExecutor(2, get_context("spawn"), start_worker) as pool,
        tempfile.TemporaryDirectory() as out,
    ):
        list(pool.map(work, [h[:4] for h in halves], [out, out]))  # both have the model now
        spans = list(pool.map(work, halves, [out, out]))
    return len(jobs) / (max(end for _, end in spans) - min(begin for begin, _ in spans))


# --- the tables --------------------------------------------------------------------------------


def speed_row(blocks, threads):
    prompts, tokens = (sum(block[what] for block in blocks) for what in ("prompts", "tokens"))
    single, batched = (sum(block[what] for block in blocks) for what in ("single", "batched"))
    ratios = [block["single"] / block["batched"] for block in blocks]
    work = [block["work"] for block in blocks]
    shares = {
        "single": [
            2 * b["flops"] / sum(b["spent"][m] for m in ("saliency", "relevance")) / b["rate"]
            for b in blocks
        ],
        # a gradient is half forward, half back, and one way forward serves both ways back
        "batched": [1.5 * b["flops"] / b["shares"]["attributing"] / b["rate"] for b in blocks],
    }
    return {
        "threads": threads,
        "prompts": prompts,
        "times as fast": f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
        "less processor time": f"{median(work):.1f} ({min(work):.1f} to {max(work):.1f})",
        "prompts/s, one at a time": f"{prompts / single:.2f}",
        "in batches": f"{prompts / batched:.2f}",
        "tokens/s in batches": f"{tokens / batched:.0f}",
        "of the matrix rate, a gradient alone": f"{median(shares['single']):.0%}",
        "gradients in batches": f"{median(shares['batched']):.0%}",
    }


def method_rows(blocks, apart):
    rows = []
    prompts = sum(block["prompts"] for block in blocks)
    for method in apart:
        single = sum(block["spent"][method] for block in blocks) / prompts
        batched = sum(block["by method"][method] for block in blocks) / prompts
        rows.append(
            {
                "method": method,
                "prompts": prompts,
                "ms, one at a time": f"{1000 * single:.1f}",
                "ms in batches": f"{1000 * batched:.2f}",
                "times as fast": f"{single / batched:.1f}",
                "largest difference, of the largest score": f"{apart[method]:.0e}",
            }
        )
    return rows


def plan_text(blocks, disk, both, reads, weight_bytes, held):
    """What a million prompts would take, from what these took."""
    prompts, tokens = (sum(block[what] for block in blocks) for what in ("prompts", "tokens"))
    seconds = sum(block["batched"] for block in blocks)
    spent = {what: sum(b["shares"][what] for b in blocks) for what in blocks[0]["shares"]}
    gradient = mean(sum(b["spent"][m] for b in blocks) / prompts for m in ("saliency", "relevance"))
    alone, pair = MILLION / prompts * seconds / 3600, MILLION / both / 3600
    with measured() as ids:
        known = {f"{number:064x}" for number in range(MILLION)}
    rows = {
        "hours, one worker of one thread": f"{alone:.0f}",
        "hours, this machine: two such workers": f"{pair:.0f} ({both:.1f} prompts/s)",
        "hours on N such cores": f"{2 * pair:.0f} / N",
        "disk": f"{sum(disk.values()) / prompts * MILLION / 1e9:.2f} GB",
        "files": f"{-(-MILLION // scores.PART) * (2 * len(DEFAULT_METHODS) + 1):,}",
        "memory a worker": f"{(held + max(b['memory'] for b in blocks)) / 1e9:.1f} GB",
        f"memory for the ids of {len(known):,} that are done": f"{ids.bytes / 1e9:.2f} GB",
    }
    shares = ", ".join(
        f"{name} {spent[what] / seconds:.1%}"
        for what, name in {
            "asking": "tokenizing and labels",
            "attributing": "passes through the model",
            "writing": "tables and Parquet",
        }.items()
    )
    by_table = ", ".join(f"{name} {size / prompts:.0f}" for name, size in sorted(disk.items()))
    alone_rate = 2 * weight_bytes / gradient
    return (
        f"In batches the time goes to: {shares}. One at a time, a gradient of "
        f"{tokens / prompts:.1f} tokens reads all weights twice, {2 * weight_bytes / 1e6:.0f} MB, "
        f"in {1000 * gradient:.0f} ms: {alone_rate / 1e9:.1f} GB/s, where a sum over a large "
        f"tensor reads {reads / 1e9:.1f} GB/s. Bytes on disk a prompt: {by_table}.\n\n"
        f"A million such prompts, by these methods, planned on paper:\n\n"
        f"{table([{'what': what, 'planned': planned} for what, planned in rows.items()])}\n\n"
        f"The bottleneck is matrix products: {spent['attributing'] / seconds:.0%} of the time is "
        f"passes through the model. Workers share nothing but the folder."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    count = parser.parse_args().prompts
    began, load = time.time(), os.getloadavg()
    model, tokenizer, _ = scores._loaded(BUNDLED, "float32")
    jobs = short_jobs(tokenizer, count)
    few = jobs[: max(20, count // 5)]
    held = psutil.Process().memory_info().rss
    one, apart, disk = compare(jobs, DEFAULT_METHODS, 1, max(10, count // 5))
    others, apart_others, _ = compare(few, OTHERS, 1, len(few))
    two, _, _ = compare(few, DEFAULT_METHODS, 2, len(few) // 2)
    both = two_workers(few)
    torch.set_num_threads(1)
    weights = sum(w.numel() * 4 for w in model.model.layers.parameters() if w.dim() == 2)
    text = (
        f"{count} prompts of {SHORT[0]} to {SHORT[-1]} tokens from the reporting half, every other "
        f"one with its target and foil, by {', '.join(DEFAULT_METHODS)}; load average "
        f"{load[0]:.1f} before and {os.getloadavg()[0]:.1f} after, so seconds are those of a "
        f"shared machine, and ratios, above all of processor time, are what counts.\n\n"
        f"{table([speed_row(one, 1), speed_row(two, 2)])}\n\n"
        f"Brackets: least and most over blocks of {len(jobs) // 5} prompts (two threads: "
        f"{len(few) // 2}).\n\n"
        f"{table(method_rows(one, apart) + method_rows(others, apart_others))}\n\n"
        f"One at a time, `ask` comes on top: "
        f"{1000 * sum(b['spent']['ask'] for b in one) / count:.0f} ms a prompt. In batches the "
        f"model's own next token is read off a pass that is needed anyway, and the three "
        f"gradient methods share a forward pass.\n\n"
        f"{plan_text(one, disk, both, read_rate(), weights, held)}"
    )
    title = "Scores of many prompts, in batches"
    if count == PROMPTS:
        keep("scores", title, text)
    else:
        print(text)
    print(f"{time.time() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
