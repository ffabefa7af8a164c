"""The one exception that means: what was asked for cannot be done, and here is what to do."""

import re

_FOLDERS = re.compile(r"(?<![\w:/])/(?:[^\s'\"/]+/)+")  # of this machine, which nobody need see


class InputError(ValueError):
    """Bad input from outside: a prompt, a target, a model, a prompts file, a folder.

    Its message is one or two sentences for the person who typed the input: what was wrong and
    what to do. The command line prints it without a traceback. ``field`` names the part of the
    question or entry that was wrong, such as ``"target"``, where it was one.
    """

    def __init__(self, message, *, field=None):
        super().__init__(message)
        self.field = field


def first_line(error: BaseException) -> str:
    """What another's error says, as the end of a sentence, without folders of this machine."""
    if isinstance(error, KeyError):
        return f"it names {error}, which is not known."
    said = _FOLDERS.sub("", (str(error).strip().splitlines() or [type(error).__name__])[0])
    return said if said.endswith(".") else f"{said}."
