"""Where numbers came from: enough to run them again, and nothing about who ran them."""

import json
import platform
from importlib.metadata import version

from helpers.models import public_name, weights_digest

PACKAGES = ["llama-notebooks", "torch", "transformers", "captum", "numpy"]


def provenance(model, question, *, model_name, seed=None):
    """What a result depends on, as a dict of plain values: model, weights, versions, settings, ids.

    A model folder is named without the path to it, so no user name gets into a report.
    """
    return {
        "model": public_name(model_name),
        "weights_sha256": weights_digest(model_name),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attention_implementation": model.config._attn_implementation,
        "seed": seed,
        "target_id": question.target,
        "target": question.target_label,
        "foil_id": question.foil,
        "foil": question.foil_label,
        "tokens": question.input_ids.shape[1],
        "python": platform.python_version(),
        **{name.replace("-", "_"): version(name) for name in PACKAGES},
    }


def provenance_text(facts):
    """The dict as indented JSON, as it is printed and saved."""
    return json.dumps(facts, indent=1, ensure_ascii=False)
