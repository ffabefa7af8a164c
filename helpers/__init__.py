"""Working with Llama models, and attributing their predictions with evidence."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from helpers.errors import InputError

if TYPE_CHECKING:
    from helpers.attribution import METHODS, Attribution, attribute, attribute_all
    from helpers.models import load_model, tiny_llama
    from helpers.prompts import Unit
    from helpers.questions import Question, ask

BUNDLED = "SmolLM2-135M-Instruct"  # the model that needs no network
PACKAGES = ("llama-notebooks", "torch", "transformers", "captum", "numpy")  # that decide a number

__all__ = [
    "METHODS",
    "Attribution",
    "InputError",
    "Question",
    "Unit",
    "ask",
    "attribute",
    "attribute_all",
    "load_model",
    "tiny_llama",
]

_ROOMS = {
    "attribution": ("METHODS", "Attribution", "attribute", "attribute_all"),
    "models": ("load_model", "tiny_llama"),
    "prompts": ("Unit",),
    "questions": ("Question", "ask"),
}


def __getattr__(name: str) -> Any:
    """A name when it is first asked for: torch takes seconds, and a bad prompts file needs none."""
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"helpers.{room}"), name)
    raise AttributeError(f"module 'helpers' has no attribute {name!r}")
