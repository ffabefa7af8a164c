"""Is a plan right: seconds and memory as `needs` predicts them, and as they are measured.

Every measurement is a process of its own on one thread: it loads the model, attributes one short
prompt and then one of the length asked for. Its seconds are the processor's of that second call,
its memory the most that the process ever held. Every finished measurement is kept in
outputs/benchmarks and is not made again by the next run: delete the file to start over.

    python benchmarks/planner.py                    a quarter of an hour on one core
    python benchmarks/planner.py --lengths 6,35     some lengths of all

The second model is the .gguf file that LLAMA_NOTEBOOKS_SECOND_MODEL names; without it the table
says so. The constants of the planner were set on another text than the one that is measured here.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from helpers import ask, attribute, load_model
from helpers.attribution import BUDGET
from helpers.model_folders import public_name
from helpers.models import BUNDLED

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts, not a package
from machine import memory_status
from prompt_sets import question_of
from report import keep, keep_row, kept_rows, table

KEPT = Path(__file__).parents[1] / "outputs" / "benchmarks" / "planner.csv"
SECOND = "LLAMA_NOTEBOOKS_SECOND_MODEL"
LENGTHS = (6, 35, 151, 512, 2048)
METHODS = (
    "saliency",
    "relevance",
    "attention",
    "attention_rollout",
    "alti_logit",
    "occlusion",
    "shapley",
    "integrated_gradients",
)
MOST = 60  # predicted seconds from which on nothing is measured
SECONDS, MEMORY = 1.5, 0.25  # how far a plan may be off: a factor, and a share
COLUMNS = ["model", "tokens", "method", "planned rows", "rows", "planned seconds", "seconds"]
COLUMNS += ["planned bytes", "bytes", "why not"]


def measured(model, method, length):
    """One measurement, as a process of its own: a JSON line."""
    torch.set_num_threads(1)
    loaded, tokenizer = load_model(model)
    short = ask(loaded, tokenizer, "The capital of Peru is")
    question = question_of(loaded, tokenizer, length, objective="log_probability")
    attribute(loaded, short, method, budget=BUDGET, beside=METHODS)
    began = time.process_time()
    result = attribute(loaded, question, method, budget=BUDGET, beside=METHODS)
    return {
        "rows": result.evaluations + result.forwards,
        "seconds": time.process_time() - began,
        # not ru_maxrss, which begins with what the process held that started this one
        "bytes": memory_status("VmHWM"),
    }


def measure_all(model, lengths):
    from llama_reports.costs import measure, model_shape, needs  # not what is measured

    machine = measure(model_shape(model))
    name = public_name(model)
    done = {(row["model"], row["tokens"], row["method"]) for row in kept()}
    for length in lengths:
        planned = needs(model, length, METHODS, machine=machine)
        for method, need in planned.methods.items():
            if (name, str(length), method) in done:
                continue
            row = {"model": name, "tokens": length, "method": method}
            if need is None:
                note(row | {"why not": "over a report's budget"})
                continue
            row |= {"planned rows": round(need.gradients + need.forwards)}
            row |= {"planned seconds": need.seconds}
            row |= {"planned bytes": max(need.peak, planned.loading)}
            if need.seconds > MOST:
                note(row | {"why not": f"more than {MOST} s by the plan"})
                continue
            command = [sys.executable, __file__, "--model", model, "--method", method]
            command += ["--length", str(length)]
            found = subprocess.run(command, check=True, capture_output=True, text=True)
            note(row | json.loads(found.stdout))


def kept():
    return kept_rows(KEPT)


def note(row):
    keep_row(KEPT, COLUMNS, row)
    print(row, file=sys.stderr)


def ratio(row, what):
    return float(row[f"planned {what}"]) / float(row[what])


def section(name, rows):
    """A table of one model, and its worst ratios in words."""
    lines = []
    for row in rows:
        line = {"tokens": row["tokens"], "method": row["method"]}
        line |= {"rows, planned": row["planned rows"], "rows": row["rows"]}
        planned = row["planned seconds"] and float(row["planned seconds"])
        line |= {"seconds, planned": planned and f"{planned:,.2f}"}
        line |= {"seconds": row["why not"], "ratio": ""}
        line |= {"peak MB, planned": "", "peak MB": "", "ratio of peaks": ""}
        if planned:
            line["peak MB, planned"] = f"{float(row['planned bytes']) / 1e6:,.0f}"
        if not row["why not"]:
            line |= {"seconds": f"{float(row['seconds']):,.2f}"}
            line |= {"ratio": f"{ratio(row, 'seconds'):.2f}"}
            line |= {"peak MB": f"{float(row['bytes']) / 1e6:,.0f}"}
            line |= {"ratio of peaks": f"{ratio(row, 'bytes'):.2f}"}
        lines.append(line)
    ran = [row for row in rows if not row["why not"]]
    said = [f"### {name}", table(lines)]
    for what, most in (("seconds", SECONDS), ("bytes", 1 + MEMORY)):
        ratios = {row["method"] + f" at {row['tokens']}": ratio(row, what) for row in ran}
        low, high = (pick(ratios, key=ratios.get) for pick in (min, max))
        outside = [key for key, r in ratios.items() if not 1 / most <= r <= most]
        if what == "bytes":
            outside = [key for key, r in ratios.items() if abs(r - 1) > MEMORY]
        bound = f"a factor of {SECONDS}" if what == "seconds" else f"{MEMORY:.0%}"
        said.append(
            f"Planned over measured {'seconds' if what == 'seconds' else 'peak memory'}: "
            f"{ratios[low]:.2f} ({low}) to {ratios[high]:.2f} ({high}); "
            f"{len(ratios) - len(outside)} of {len(ratios)} within {bound}"
            + (f", and not {', '.join(outside)}." if outside else ".")
        )
    return "\n\n".join(said)


def main(lengths):
    second = os.environ.get(SECOND)
    names = {BUNDLED: BUNDLED}
    measure_all(BUNDLED, lengths)
    if second:
        from helpers.model_folders import sha256_of

        measure_all(second, lengths)
        names[public_name(second)] = f"{public_name(second)}, SHA-256 {sha256_of(second)}"
    text = [
        "What `llama-reports plan` says before anything is loaded, and what a process then takes: "
        "processor time of one thread after a first call, and the most memory from its start to "
        "its end. Each method has a report's budget. Constants were set on another text."
    ]
    for name, shown in names.items():
        text.append(section(shown, [row for row in kept() if row["model"] == name]))
    if not second:
        text.append(f"The second model was skipped: {SECOND} names no file.")
    keep("planner", "What a plan says, and what it takes", "\n\n".join(text))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--model")
    parser.add_argument("--method")
    parser.add_argument("--length", type=int)
    given = parser.parse_args()
    if given.model:
        print(json.dumps(measured(given.model, given.method, given.length)))
    else:
        main([int(length) for length in given.lengths.split(",")])
