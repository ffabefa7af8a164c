"""Where numbers came from: enough to run them again, and nothing about who ran them."""

import json
import platform
from importlib.metadata import version
from typing import Any

from helpers import PACKAGES
from helpers.model_folders import public_name
from helpers.models import weights_digest
from helpers.questions import Question


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
