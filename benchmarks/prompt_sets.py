"""The prompts of the benchmarks as questions; the split is in prompts/tuning and reporting.yml."""

from pathlib import Path

import yaml

from helpers import ask


def questions(model, tokenizer, split):
    """The questions of ``"tuning"`` or ``"reporting"``, in the order of the file."""
    path = Path(__file__).with_name("prompts") / f"{split}.yml"
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        entry = {"prompt": entry} if isinstance(entry, str) else entry
        options = {key: entry[key] for key in ("target", "foil", "chat") if key in entry}
        yield ask(model, tokenizer, entry["prompt"], **options)
