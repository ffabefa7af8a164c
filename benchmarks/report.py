"""Keep each benchmark's table in results.md, beside the machine that made it."""

import csv
import math
import platform
import re
import sys
from datetime import date
from pathlib import Path

import torch
import typer

from helpers.errors import InputError
from helpers.model_folders import sha256_of
from helpers.models import weights_digest

RESULTS = Path(__file__).with_name("results.md")


def command(main):
    """Run ``main`` with the arguments of the command line; what it cannot do is one sentence."""
    try:
        typer.run(main)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def keep(name, title, text):
    """Put ``text`` under ``title`` in results.md, in the place of what ``name`` left there."""
    section = f"<!-- {name} -->\n## {title}\n\n{_machine()}\n\n{text.strip()}\n<!-- end {name} -->"
    found = RESULTS.read_text(encoding="utf-8")
    old = re.compile(rf"<!-- {name} -->.*?<!-- end {name} -->", re.DOTALL)
    if old.search(found):
        found = old.sub(lambda match: section, found)
    else:
        found = found.rstrip() + "\n\n" + section + "\n"
    RESULTS.write_text(found, encoding="utf-8")
    print(f"\n{title}\n\n{text.strip()}\n\nkept in {RESULTS.name}")


def table(rows):
    """A list of dicts as a Markdown table; their keys, in order, are its columns."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row[c]) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_interval(row, prefix=""):
    """The mean of a row of ``by_method`` with its interval; its columns may have a prefix.

    Of a single pair of prompts there is a mean alone.
    """
    mean, low, high = (row[f"{prefix}{part}"] for part in ("mean", "low", "high"))
    return f"{mean:.2f}" + ("" if math.isnan(low) else f" ({low:.2f} to {high:.2f})")


def digest_of(name):
    """What tells the weights of a model: of a .gguf its own SHA-256, else that of safetensors."""
    return sha256_of(name) if str(name).endswith(".gguf") else weights_digest(name)


def _machine():
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    name = model[1] if model else platform.processor()
    return (
        f"Measured {date.today()} on {torch.get_num_threads()} threads of {name}, "
        f"torch {torch.__version__}."
    )


def kept_rows(file):
    """The rows that ``keep_row`` has put into a CSV file, as dicts of texts."""
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def keep_row(file, columns, row):
    """Put one measurement at the end of a CSV file, so that what is interrupted goes on there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    with file.open("a", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        if new:
            writer.writeheader()
        writer.writerow(row)
