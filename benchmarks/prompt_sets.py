"""The prompts of the benchmarks as questions; the split is in prompts/tuning and reporting.yml."""

from pathlib import Path

import yaml

from helpers import ask

TEXT = Path(__file__).parents[1] / "LICENSE"  # long enough, and everybody has it


def questions(model, tokenizer, split):
    """The questions of ``"tuning"`` or ``"reporting"``, in the order of the file."""
    path = Path(__file__).with_name("prompts") / f"{split}.yml"
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        entry = {"prompt": entry} if isinstance(entry, str) else entry
        options = {key: entry[key] for key in ("target", "foil", "chat") if key in entry}
        yield ask(model, tokenizer, entry["prompt"], **options)


def question_of(model, tokenizer, length, objective="logit"):
    """A question whose prompt is exactly ``length`` tokens: a stretch of the licence.

    By default the raw logit is explained, as all peers do.
    """
    ids = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    for start in range(20, 200):
        prompt = tokenizer.decode(ids[start : start + length])
        if tokenizer(prompt)["input_ids"] == ids[start : start + length]:
            return ask(model, tokenizer, prompt, objective=objective)
    raise RuntimeError(f"no stretch of {length} tokens that decodes and encodes to itself")
