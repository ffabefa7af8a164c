"""Working with Llama models, and attributing their predictions with evidence."""

from helpers.attribution import METHODS, Attribution, attribute, attribute_all
from helpers.errors import InputError
from helpers.models import load_model, tiny_llama
from helpers.prompts import Unit
from helpers.questions import Question, ask

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
