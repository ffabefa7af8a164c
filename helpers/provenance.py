"""Where numbers came from: enough to run them again, and nothing about who ran them."""

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from helpers.models import public_name, resolve_model, weights_digest
from helpers.questions import Question

PACKAGES = ["llama-notebooks", "torch", "transformers", "captum", "numpy"]
SOURCES = Path(__file__).resolve().parent


def provenance(
    model: Any, question: Question, *, model_name: str, seed: int | None = None
) -> dict[str, Any]:
    """What a result depends on, as a dict of plain values: model, weights, versions, settings, ids.

    It also holds what was found of the question before any method: the answer, the target's
    probability, and the notes on what makes the question a weak one. A model folder is named
    without the path to it, so no user name gets into a report.
    """
    return {
        "model": public_name(model_name),
        "weights_sha256": weights_digest(model_name),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attention_implementation": model.config._attn_implementation,
        "seed": seed,
        "target_ids": None if question.target is None else list(question.target),
        "target": question.target_label,
        "foil_ids": None if question.foil is None else list(question.foil),
        "foil": question.foil_label,
        "answer": question.answer,
        "probability": question.probability,
        "notes": list(question.notes),
        "objective": question.objective,
        "tokens": question.input_ids.shape[1],
        "units": question.grouping,
        "python": platform.python_version(),
        **{name.replace("-", "_"): version(name) for name in PACKAGES},
    }


def provenance_text(facts: dict[str, Any]) -> str:
    """The dict as indented JSON, as it is printed and saved."""
    return json.dumps(facts, indent=1, ensure_ascii=False)


def model_digest(name: str | Path) -> str:
    """SHA-256 of all of a model that a result depends on, in hexadecimal.

    That is the weights, and the small files beside them: the configuration, the tokenizer and the
    chat template. ``weights_digest`` is of the weights alone.
    """
    digest = hashlib.sha256(weights_digest(name).encode())
    for file in sorted(resolve_model(name).iterdir()):
        # the manifest of the bundled model holds times, which differ from machine to machine
        if file.suffix in (".json", ".jinja", ".model", ".txt") and file.name != "manifest.json":
            _add(digest, file.name, file)
    return digest.hexdigest()


def code_version(sources: Path | None = None) -> str:
    """SHA-256 of the code that a result depends on, in hexadecimal.

    That is every source and table of ``helpers``, and the versions of the packages that do the
    arithmetic. How ``llama_reports`` shows a result is not among it. ``sources`` is the folder of
    another package to be told apart.
    """
    sources = sources or SOURCES
    digest = hashlib.sha256()
    for name in PACKAGES[1:]:
        digest.update(f"{name} {version(name)}\n".encode())
    for file in sorted(sources.rglob("*")):
        inside = file.relative_to(sources)
        hidden = any(part.startswith((".", "__pycache__")) for part in inside.parts)
        if file.is_file() and not hidden:
            _add(digest, inside.as_posix(), file)
    return digest.hexdigest()


def _add(digest, name, file):
    """Add a file's name and content, each with its length, so that no two sets read the same."""
    content = file.read_bytes()
    name = name.encode("utf-8", "surrogateescape")
    digest.update(b"%d %b %d " % (len(name), name, len(content)))
    digest.update(content)
