"""What must not leave this machine: local paths, and secrets of the environment, however shown."""

import html
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.constants import HF_HOME

from helpers.model_folders import cache_dir, public_name
from llama_reports.files import write_whole

SECRET_LENGTH = 8  # characters: a shorter secret could be a word of any prompt
PATH_LENGTH = 5  # so that "/" or "/or" is never taken for a home folder in a text
BEGINNING = 16  # characters of a long secret by which it is known where a table cuts it short
# names of variables, as people name secrets; and what only looks like one of these
_NAMED = re.compile(
    r"TOKEN(?!I[SZ])|SECRET|PASSW|PASSPHRASE|PASSCODE|CREDENTIAL|CREDS|COOKIE|BEARER|WEBHOOK"
    r"|CONN(ECTION)?_?STR|AUTHORI[SZ]ATION|AUTH$|(?<!COM)(?<!BY)PASS(?![A-Z])|KEYS?(?![A-Z])"
    r"|(?<!^)(?<!^OLD)PWD(?![A-Z])|(?<![A-Z])(PAT|PW|PSWD|PSW|DSN|JWT|SAS|SALT|OTP)(?![A-Z])",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"\w[\w+.-]*://([^\s/?#@:]*):?([^\s/?#]*)@")  # user and password
_SETTING = re.compile(r"([\w.-]+)\s*[=:]\s*(?:Bearer\s+|Basic\s+)?[\"']?([^\s;&\"',]+)")
# A path begins where no other name runs on; after an option (-I), a terminal's colour or an
# escaped line break it begins as well, and in a URL of a file.
_BEFORE = r"(?:(?<![\w.+/])|(?<=//)|(?<=-[A-Za-z])|(?<=[\d;\[]m)|(?<=\\[nrt]))"
_AFTER = r"(?![\w-]|\.\w)"
_USR = Path("/usr")  # the same everywhere, so nobody's
_CODES = ("utf-8", "utf-16-le", "utf-32-le")
ROOT = Path(__file__).resolve().parents[1]
_ENCODERS: list[Callable[[str], str]] = [
    lambda text: json.dumps(text)[1:-1],
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: repr(text)[1:-1],
    lambda text: repr(text.encode("utf-8", "surrogateescape"))[2:-1],
    lambda text: text.replace("\\", "\\\\").replace("'", "\\'"),  # repr beside other quotes
    lambda text: text.replace("/", "\\/"),  # JSON of other writers
    lambda text: text.replace('"', '""'),  # a cell of CSV
    html.escape,
    lambda text: html.escape(text, quote=False),
    lambda text: html.escape(text).replace("&quot;", "&#34;").replace("&#x27;", "&#39;"),
    lambda text: quote(text, errors="replace"),
    lambda text: quote(text, safe="", errors="replace"),
    lambda text: quote_plus(text, errors="replace"),
]


class Private:
    """Texts that are replaced wherever they stand, in every encoding that a report may hold.

    ``paths`` maps a local path to what is shown in its place; a path is replaced where it is the
    beginning of a whole path, and only if it has 5 characters or more. ``secrets`` are shown as
    ``…``; those of fewer than 8 characters are left, since they could be words of a prompt.
    """

    def __init__(self, paths: dict[str, str], secrets: Iterable[str] = ()) -> None:
        # the text to look for: the pattern that replaces it, and what is shown
        self._hidden: dict[str, tuple[str, str]] = {}
        for secret in secrets:
            if len(secret) < SECRET_LENGTH:
                continue
            for text in _encodings(secret):
                self._hidden[text] = (re.escape(text), "…")
                if len(text) > BEGINNING and "://" not in text:  # a table shows "abcd…"
                    start = text[:BEGINNING]
                    self._hidden.setdefault(start, (re.escape(start) + r"[\w+/=.-]*", "…"))
        for path, shown in paths.items():
            if len(path) < PATH_LENGTH or not Path(path).is_absolute():
                continue
            for text in _encodings(path):
                self._hidden.setdefault(text, (_BEFORE + re.escape(text) + _AFTER, shown))

    def without(self, value: Any) -> Any:
        """``value``, texts in lists and dicts and their keys, with what is private replaced."""
        if isinstance(value, str):
            return self._struck(value)
        if isinstance(value, list):
            return [self.without(item) for item in value]
        if isinstance(value, dict):
            return {self.without(key): self.without(item) for key, item in value.items()}
        return value

    def _struck(self, text):
        found = sorted((hidden for hidden in self._hidden if hidden in text), key=len, reverse=True)
        if not found:
            return text
        pattern = "|".join(self._hidden[hidden][0] for hidden in found)
        return re.sub(pattern, lambda match: self._shown(match[0]), text)

    def _shown(self, text):
        return self._hidden[text][1] if text in self._hidden else "…"

    def clean(self, folder: Path) -> None:
        """Replace what is private in all files of ``folder``, text and Parquet, and in their names.

        A file of another kind that holds something private is removed.
        """
        for path in sorted(folder.rglob("*"), reverse=True):  # a folder after what is in it
            if path.is_file():
                self._clean_file(path)
            name = self._struck(path.name)
            if name != path.name and path.exists():
                path.rename(path.with_name(name))

    def _clean_file(self, path):
        if path.suffix == ".parquet":
            self._clean_parquet(path)
            return
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            if any(t.encode(code, "replace") in content for t in self._hidden for code in _CODES):
                path.unlink()
            return
        struck = self._struck(text)
        if struck != text:
            write_whole(path, struck.encode("utf-8"))

    def _clean_parquet(self, path):
        try:
            table = pq.read_table(path, partitioning=None)
        except (pa.ArrowException, OSError):  # what cannot be read cannot be vouched for
            path.unlink()
            return
        about = [
            [_readable(text) for text in pair] for pair in (table.schema.metadata or {}).items()
        ]
        found = table.to_pydict()
        if self.without([found, about]) == [found, about]:
            return
        columns = [pa.array(self.without(found[field.name]), field.type) for field in table.schema]
        clean = pa.table(columns, names=self.without(table.column_names))
        clean = clean.replace_schema_metadata(dict(self.without(about)))
        file = io.BytesIO()
        pq.write_table(clean, file)
        write_whole(path, file.getvalue())


def private(model: str | Path | None, folders: dict[Path, str] | None = None) -> Private:
    """What a report on ``model`` must not show; ``folders`` adds paths and what is shown for them.

    That is the home folder, this collection, this Python, the caches and the model's folder, which
    is shown by its public name, under each name that the system knows them by; and the secrets of
    this process's environment.
    """
    known = [(Path.home(), "~"), (ROOT, "…"), (cache_dir(), "…"), (Path(HF_HOME), "…")]
    known += [] if _USR in Path(sys.prefix).parents else [(Path(sys.prefix), "…")]
    known += (folders or {}).items()
    if model is not None and Path(model).expanduser().exists():
        known.append((Path(model).expanduser(), public_name(model)))
    paths: dict[str, str] = {}
    for path, shown in known:
        paths |= {str(path.absolute()): shown, str(path.resolve()): shown}
    return Private(paths, secrets())


def secrets() -> set[str]:
    """The secrets in this process's environment, and the token for the Hugging Face hub.

    A variable is secret as a whole if its name is one that people give to secrets. In any other
    the credentials of a URL are, and what follows such a name inside it.
    """
    found = {text for name, value in os.environ.items() for text in _secrets(name, value)}
    return found | {huggingface_hub.get_token() or ""}


def _secrets(name: str, value: str) -> Iterator[str]:
    if _NAMED.search(name):
        # a key of several lines may be shown line by line; its first and last line are no secret
        yield from (value.strip(), *(s for s in value.split() if not s.startswith("-----")))
    for match in _IN_URL.finditer(value):
        user, password = match.groups()
        shown = password or user
        yield from (match[0], shown, unquote(shown))
    for setting, text in _SETTING.findall(value):
        if _NAMED.search(setting):
            yield text
    for inner, text in _texts(_parsed(value)):
        yield from _secrets(inner, text)


def _parsed(value):
    """What a text holds as JSON, as service accounts are given; None if it is none."""
    try:
        return json.loads(value) if value.lstrip()[:1] in ("{", "[") else None
    except (ValueError, RecursionError):
        return None


def _texts(value, name=""):
    """``(key, text)`` of all texts in parsed JSON."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, name)


def _encodings(text):
    """``text`` in each encoding, and in two of them one after the other."""
    once = {text} | {encode(text) for encode in _ENCODERS}
    return once | {encode(inner) for inner in once for encode in _ENCODERS}


def _readable(text):
    return text.decode("utf-8", "surrogateescape")
