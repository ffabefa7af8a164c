"""Working with Llama models, and attributing their predictions with evidence."""

from helpers.attribution import METHODS, Attribution, attribute
from helpers.errors import InputError
from helpers.models import load_model, tiny_llama
from helpers.questions import Question, ask

__all__ = [
    "METHODS",
    "Attribution",
    "InputError",
    "Question",
    "ask",
    "attribute",
    "load_model",
    "tiny_llama",
]
