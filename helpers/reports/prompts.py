"""Prompts files: what an entry may say, and how a file is read."""

import re
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, StrictBool, StrictStr, ValidationError

from helpers.attribution import METHODS
from helpers.errors import InputError

_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


class Entry(BaseModel):
    """One entry of a prompts file. A plain string stands for ``{prompt: that string}``."""

    model_config = ConfigDict(extra="forbid")

    prompt: StrictStr
    id: StrictStr | None = None
    target: StrictStr | None = None
    foil: StrictStr | None = None
    chat: StrictBool = False
    evidence: StrictStr | None = None
    methods: list[StrictStr] | None = None
    notebook: StrictStr | None = None


def read_entries(path):
    """``[(line, number, raw entry)]`` of a YAML list; line and number count from 1.

    Raises ``InputError`` when the file cannot be read or is not a list.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"There is no prompts file {path}: check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}.") from error
    try:
        entries = yaml.safe_load(text)
        nodes = yaml.compose(text, Loader=yaml.SafeLoader)  # the same once more, with line numbers
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(
            f"{path}{where}: this is not YAML ({what}): mind quotes and indentation."
        ) from error
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f"{path} must be a YAML list with at least one prompt, such as:\n"
            '- "The capital city of Latvia is"'
        )
    lines = [node.start_mark.line + 1 for node in nodes.value]
    return list(zip(lines, range(1, len(entries) + 1), entries, strict=True))


def parse_entry(raw):
    """The entry behind one element of the list, or an ``InputError`` that says what is wrong."""
    if isinstance(raw, str):
        raw = {"prompt": raw}
    if not isinstance(raw, dict):
        raise InputError(
            f"An entry is text or a mapping, and YAML reads this as {type(raw).__name__}: put the "
            "prompt in quotes."
        )
    try:
        entry = Entry.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "missing":
            raise InputError(f"The key {key!r} is missing.") from None
        if first["type"] == "extra_forbidden":
            known = ", ".join(Entry.model_fields)
            raise InputError(f"The key {key!r} is unknown: use {known}.") from None
        raise InputError(f"The value of {key!r} will not do: {first['msg'].lower()}.") from None
    for method in entry.methods or []:
        check_method(method)
    if entry.evidence is not None and entry.evidence.strip() not in entry.prompt:
        raise InputError(
            f"The evidence {entry.evidence!r} is not in the prompt: write it as it stands there."
        )
    if entry.id is not None and not _SLUG.fullmatch(entry.id):
        raise InputError(
            f"The id {entry.id!r} cannot name a folder: use up to 80 letters, digits, '.', '_' and "
            "'-', and begin with a letter or digit."
        )
    return entry


def check_method(method):
    if method not in METHODS:
        raise InputError(f"There is no method {method!r}: choose from {', '.join(METHODS)}.")
