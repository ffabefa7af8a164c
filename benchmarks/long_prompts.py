"""Long prompts: does a report find the passage that holds the answer, and how long does it take?

Ten prompts of about 1,700 tokens: twelve passages about twelve towns, then a question about one of
them, whose answer stands in its passage alone; three other passages say the same of their own
towns, in the same words. The passages are the sources. Only prompts that the model answers right
count: of twelve alike passages the bundled one seldom finds the right one. Every prompt is a
report as the command makes it, with all threads.

    python benchmarks/long_prompts.py             keeps a section of results.md
    python benchmarks/long_prompts.py --count 2   fewer, for a look; writes nothing
"""

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
import yaml

from helpers import ask, load_model
from llama_reports.jobs import plan
from llama_reports.run import run_report

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts, not a package
from report import command, keep, table

COUNT = 10
ALIKE = 4  # passages that answer the question of some town
WORDS = yaml.safe_load((Path(__file__).parent / "data" / "long_prompts.yml").read_text("utf-8"))


def passage(town: str, colour: str, pick: random.Random) -> str:
    """About 160 tokens on one town; with a ``colour`` one sentence says that of its flag."""
    facts = [
        f"{town} is a small town on a river, and {pick.choice(WORDS['names'])} is its mayor.",
        f"It has two schools and a market that is held on every {pick.choice(WORDS['days'])}.",
        f"The old bridge was built in {pick.randrange(1700, 1900)} and rebuilt after a flood.",
        f"Most people work in a factory that makes {pick.choice(WORDS['goods'])} for export.",
        f"The train to the coast leaves at {pick.randrange(6, 11)} and takes about an hour.",
        "In summer there is a festival with music, and visitors come from far away to hear it.",
        f"{pick.choice(WORDS['names'])} wrote a book about the history of the place and its river.",
        f"In {pick.randrange(1900, 2000)} a new library was opened next to the railway station.",
        f"The colour of the flag of {town} is {colour}."
        if colour
        else "The town hall stands on a square with old trees.",
    ]
    pick.shuffle(facts)
    return " ".join(facts)


def entries(count: int) -> Iterator[tuple[dict, int]]:
    """``count`` entries of a prompts file, each with the number of the passage that answers it."""
    for seed in range(count):
        pick = random.Random(seed)
        towns, colours = (pick.sample(WORDS[name], 12) for name in ("towns", "colours"))
        place, *others = pick.sample(range(12), ALIKE)
        told = [colour if i in (place, *others) else "" for i, colour in enumerate(colours)]
        sources = [passage(*pair, pick) for pair in zip(towns, told, strict=True)]
        end = f"Question: What is the colour of the flag of {towns[place]}?\nAnswer: "
        end += f"The colour of the flag of {towns[place]} is"
        entry = {"id": f"long-{seed}", "prompt": "\n\n".join([*sources, end])}
        yield entry | {"target": f" {colours[place]}", "sources": sources}, place


def main(count: Annotated[int, typer.Option(min=1)] = COUNT) -> None:
    """Make the reports, one after the other, and look where the passage stands."""
    model, tokenizer = load_model()
    chosen: list[tuple[dict, int]] = []
    for entry, place in entries(4 * count):
        question = ask(model, tokenizer, entry["prompt"], target=entry["target"])
        print(entry["id"], len(question.labels), question.own, flush=True)
        chosen += [(entry, place)] if question.own else []
        if len(chosen) == count:
            break
    threads = os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as work:
        file, out = Path(work) / "prompts.jsonl", Path(work) / "out"
        file.write_text("\n".join(json.dumps(entry) for entry, _ in chosen), encoding="utf-8")
        rows = [
            measured(job, out, entry["sources"], place)
            for job, (entry, place) in zip(plan(file, out=out), chosen, strict=True)
        ]
    first = sum(row["its passage is"] == "number 1" for row in rows)
    slowest = max(int(row["seconds"]) for row in rows)
    text = (
        f"{table(rows)}\n\nThe passage that holds the answer is first in {first} of {len(rows)}. "
        f"The slowest report took {slowest} s on {threads} threads."
    )
    if count == COUNT:
        keep("long_prompts", "Long prompts", text)
    else:
        print(text)


def measured(job, out, sources, place):
    """A row of the table: a report is made, and its strongest source looked up."""
    began = time.perf_counter()
    facts = run_report(job, out)
    seconds = time.perf_counter() - began
    top = facts.get("top_units", {}).get(facts.get("method"), [])
    order = [sources.index(label.strip()) for label in top]
    found = f"number {order.index(place) + 1}" if place in order else "not among three"
    row = {
        "prompt": job.slug,
        "tokens": f"{job.tokens:,}",
        "seconds": f"{seconds:.0f}",
        "coloured by": facts.get("method"),
        "its passage is": found,
        "borne out": facts.get("trust", {}).get("borne_out"),
        "error": facts["error"] or "",
    }
    print(row, flush=True)
    return row


if __name__ == "__main__":
    command(main)
