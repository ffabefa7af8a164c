"""Prompts files: what an entry may say, and how a file is read, one entry at a time.

A prompts file is data and may come from a stranger. Nothing in it is run, no part of it is held
longer than an entry, and what it names (a folder, a notebook, a method) is checked against a list
or a pattern.
"""

import csv
import itertools
import json
import math
import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import pyarrow
import pyarrow.parquet
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from yaml.composer import Composer

from helpers.errors import InputError
from helpers.prompts import check_messages, check_text, read_options

LONGEST_LINE = 2**24  # bytes
EARLY = 1000  # entries that are read before anything slow is done
TOLD = 20  # bad entries that are named; the rest is counted
MOST_NODES = 10_000  # of a YAML entry: keys, values and what an alias repeats
_SLUG = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,78}[A-Za-z0-9_-])?")
# what an output folder holds beside reports, and what Windows keeps for its devices
_RESERVED = re.compile(
    r"index\.html|comparison\.html|compared\.html|scores|(scores|plan)\.parquet|evidence|prompts"
    r"|figures"
    r"|(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?"
)
_UNTEXT = re.compile("[\x00\ud800-\udfff]")
MOST_CARRIED = 100  # names of a file that are no keys: each is a column of the results
DEEPEST = 20  # lists and mappings in each other, of what is carried
# a column without a name, as a data frame's index is saved, and as pandas calls it when read again
_UNNAMED = re.compile(r"(unnamed: \d+(\.\d+)*)?")
_LIKE_A_KEY = re.compile(r"(target|foil|answer)[\W_]?(ids?|texts?|tokens?)")  # as others call them


# --- an entry ----------------------------------------------------------------------------------


def _as_text(value):
    """A text, or a number as it was written; ``InputError`` for anything else."""
    if isinstance(value, int | Decimal) and not isinstance(value, bool) and "E" not in str(value):
        value = str(value)  # a Decimal writes 1e5 as 1E+5
    if not isinstance(value, str):
        raise InputError(f"{str(value)[:40]} is no text here: put it in quotes.")
    found = _UNTEXT.search(value)
    if found:
        what = "a NUL character" if found[0] == "\0" else "half of a surrogate pair"
        raise InputError(f"The text has {what} in it: save it as UTF-8 again.")
    return value


def _as_answer(value):
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float | Decimal):  # 12.0 in a data frame's column with gaps, no 1.5
        value = float(value)
        value = int(value) if value.is_integer() else value
        return value if isinstance(value, int) else _as_text(value)
    return _as_text(value)


def _as_list(value):
    """What a list or, in a cell, JSON text of one says."""
    if not isinstance(value, str):
        return value
    try:
        return _json(value)
    except (json.JSONDecodeError, RecursionError):
        raise InputError("It is no list: write one, in a cell as JSON text.") from None


def _as_messages(value):
    messages = check_messages(_as_list(value))
    for message in messages:
        _as_text(message["content"])
    return messages


def _as_names(value):
    return value.replace(",", " ").split() if isinstance(value, str) else value


def _check_method(name):
    from helpers.attribution import METHODS  # torch comes with it, and most files name no method

    METHODS[name]  # which refuses a name that it does not have
    return name


def _check_id(name):
    if not _SLUG.fullmatch(name):
        why = ": use up to 80 letters, digits, '.', '_' and '-', begin with a letter or digit and "
        why += "do not end with '.'."
    elif is_reserved(name):
        why = ", since the name is in use: choose another."
    else:
        return name
    raise InputError(f"The id {name!r} cannot name a folder{why}")


def is_reserved(name: str) -> bool:
    """True for a folder name that a report must not take, whatever its case."""
    return name.startswith(".") or bool(_RESERVED.fullmatch(name.lower()))


Text = Annotated[str, BeforeValidator(_as_text)]
ShortText = Annotated[Text, Field(max_length=1000)]
Method = Annotated[ShortText, AfterValidator(_check_method)]


class Entry(BaseModel):
    """One entry of a prompts file. A plain string stands for ``{prompt: that string}``.

    What the keys mean is said in docs/reports.md. Whether a tokenizer can read them is left to
    ``helpers.questions.read_question``. Two ``options`` are read as target and foil, and an answer
    that stands at the end of ``messages`` as ``answer``.
    """

    model_config = ConfigDict(extra="allow")

    prompt: Text | None = None
    messages: Annotated[list[dict[str, str]], BeforeValidator(_as_messages)] | None = None
    id: Annotated[Text, AfterValidator(_check_id)] | None = None
    target: Text | None = None
    foil: Text | None = None
    answer: Annotated[bool | int | str, PlainValidator(_as_answer)] | None = None
    options: Annotated[list[Text], BeforeValidator(_as_list)] | None = None
    sources: Annotated[list[Text], BeforeValidator(_as_list)] | None = None
    units: ShortText | None = None
    chat: bool = False
    raw: bool = False
    evidence: ShortText | None = None
    methods: Annotated[list[Method], BeforeValidator(_as_names)] | None = None
    notebook: ShortText | None = None

    @model_validator(mode="after")
    def _check_prompt(self):
        if self.prompt is None and self.messages is None:
            raise InputError("The key 'prompt' is missing: write it, or messages.", field="prompt")
        if self.prompt is not None and self.messages is not None:
            raise InputError("It has a prompt and messages: keep one of them.", field="messages")
        if self.prompt is not None:
            check_text(self.prompt, "prompt", "The prompt")
        return self

    @model_validator(mode="after")
    def _read_options(self):
        if self.options is not None:
            found = read_options(self.options, self.target, self.foil, self.answer)
            self.target, self.foil, options = found
            self.options = options or None
        return self

    @model_validator(mode="after")
    def _read_answer(self):
        said, explained = self.messages, (self.target, self.foil, self.answer, self.options)
        if said and said[-1]["role"] == "assistant" and explained == (None,) * 4:
            self.answer = said.pop()["content"]  # as in a file for fine-tuning
        return self

    @property
    def carried(self) -> dict[str, Any]:
        """What is no key of an entry, as JSON can hold it: it is passed on, and asks nothing."""
        return self.model_extra or {}

    @property
    def text(self) -> str:
        """The prompt as people read it: messages as ``role: text``, a line each."""
        if self.prompt is not None:
            return self.prompt
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.messages or ())

    @property
    def title(self) -> str:
        """What a folder is named by: the prompt, or the last that the user says."""
        said = [m["content"] for m in self.messages or () if m["role"] == "user"]
        return said[-1] if said else self.text


def parse_entry(raw: Any, kind: str = "YAML") -> Entry:
    """The entry behind what a file holds, or an ``InputError`` that says what is wrong.

    ``kind`` is the format, for messages. Names are read in any case, and ``None`` and NaN are not
    given. A line of a file for OpenAI's batches is read by its ``custom_id`` and ``body``. What is
    no key is carried, unless it may be the misspelt name of one.
    """
    if isinstance(raw, str):
        raw = {"prompt": raw}
    if not isinstance(raw, dict):
        raise InputError(
            f"An entry is text or a mapping, and {kind} reads this as {type(raw).__name__}: put "
            "the prompt in quotes."
        )
    request = {}
    if isinstance(raw.get("body"), dict):
        raw, request = _of_batch(raw)
    try:
        given = _given(raw, request)
    except InputError:
        raise
    except ValueError:  # of Python, which writes no more than 4,300 digits
        raise InputError("It has a number of too many digits: put it in quotes.") from None
    try:
        return Entry.model_validate(given)
    except ValidationError as error:
        raise _told(error.errors(include_url=False, include_input=False)[0]) from None


def _told(problem):
    """pydantic's first complaint as ours."""
    field, *index = [str(part) for part in problem["loc"]] or [None]
    if problem["type"] == "value_error":
        error = problem["ctx"]["error"]
        said, field = str(error), field or error.field
    else:
        said = f"The value of {field!r} will not do: {problem['msg'].lower()}."
    return InputError(f"Number {index[0]}: {said}" if index else said, field=field)


# --- names and what is carried -----------------------------------------------------------------


def _key(name):
    """A name without the case and the spaces that make no difference."""
    return str(name).strip().casefold()


def _of_batch(raw):
    """``(entry, what its request says beside it)`` of a line for OpenAI's batches."""
    body, asked = raw["body"], ("prompt", "messages")
    about = {name: raw[name] for name in ("method", "url") if name in raw}
    about |= {name: value for name, value in body.items() if name not in asked}
    entry = {name: value for name, value in raw.items() if name not in ("body", "method", "url")}
    if entry.get("id") is None:
        entry["id"] = entry.pop("custom_id", None)
    entry |= {name: body[name] for name in asked if name in body}
    taken = {_key(name) for name in entry} | set(Entry.model_fields)
    return entry, {f"body.{name}" if _key(name) in taken else name: about[name] for name in about}


def _given(raw, request):
    """What is given in ``raw``, by the names of ``Entry``; the rest and ``request`` are carried."""
    _refuse_twice(map(_key, raw))
    _refuse_typos(raw, "key")
    found, first = {}, True
    for name, value in itertools.chain(raw.items(), request.items()):
        key = _key(name)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            first &= bool(_UNNAMED.fullmatch(key))
        elif _UNNAMED.fullmatch(key):
            if not first or not str(value).isdecimal():  # else an index
                raise InputError(
                    f"The column {str(name)!r}, counted from 0, has no name, and "
                    f"{str(value)[:40]!r} is no row's number: name it."
                )
        else:
            first = False
            is_key = key in Entry.model_fields
            found[key if is_key else str(name).strip()] = value if is_key else _carried(name, value)
    return found


def _refuse_typos(names, what):
    """Refuse a name that a key may be meant by: to carry it would drop what the user asked."""
    if len(names) > 2 * MOST_CARRIED:  # before any of them is looked at
        raise InputError(
            f"It has {len(names):,} names, and a file carries at most {MOST_CARRIED} beside the "
            "keys: drop some."
        )
    for name in names:
        meant = _near(_key(name))
        if meant:
            shown = str(name).strip()[:80]
            raise InputError(
                f"The {what} {shown!r} is unknown: write {meant!r} if that is meant, or "
                f"'meta.{shown}' to carry it along."
            )


@lru_cache(maxsize=1000)
def _near(key):
    """The key of an entry that an unknown one resembles, or ``None``."""
    if key in Entry.model_fields or key.startswith("meta.") or len(key) > 40:
        return None
    alike = _LIKE_A_KEY.fullmatch(key)
    if alike:
        return alike[1]
    known = [name for name in Entry.model_fields if name != "id"]  # "idx" is somebody's own
    same = [name for name in known if sorted(name) == sorted(key)]
    near = same or get_close_matches(key, known, n=1, cutoff=0.8 if key.isalpha() else 0.9)
    return near[0] if near else None


def _carried(name, value):
    """A value as JSON can hold it, or an ``InputError`` that names its field."""
    name = str(name).strip()
    try:
        _as_text(name)
        return _plain(value)
    except InputError as error:
        raise InputError(str(error), field=name[:80]) from None


def _plain(value, depth=0):
    if depth > DEEPEST:
        raise InputError(f"It is nested more than {DEEPEST} deep: write it as a text.")
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(float(value)) else str(value)
    if isinstance(value, list | tuple | set):
        return [_plain(each, depth + 1) for each in value]
    if isinstance(value, dict):
        return {_as_text(str(key)): _plain(each, depth + 1) for key, each in value.items()}
    text = _as_text(str(value))
    return value if value is None or isinstance(value, bool | int) else text


# --- a file ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One entry as a file has it, and where it stands; numbers count from 1.

    ``raw`` is what ``parse_entry`` takes, and ``entry`` what it gives. ``problem`` is an
    ``InputError`` where there is no entry. ``line`` is ``None`` in a Parquet file, which has no
    lines.
    """

    file: str
    number: int
    line: int | None
    raw: object = None
    entry: Entry | None = None
    problem: InputError | None = None

    @property
    def kind(self) -> str:
        return FORMATS[Path(self.file).suffix.lower()][0]

    @property
    def unit(self) -> str:
        return "row" if self.line is None else "line"

    @property
    def at(self) -> int:
        """The line, or the row of a Parquet file."""
        return self.line or self.number

    def place(self, field: str | None = None) -> str:
        """Where it stands in words: ``prompts.csv, line 4, row 3, column 'target'``."""
        parts = [self.file, f"{self.unit} {self.at}"]
        if self.kind == "CSV":
            parts.append(f"row {self.number}")
        if self.kind == "YAML":
            raw = self.raw
            shown = (raw.get("id") or raw.get("prompt")) if isinstance(raw, dict) else raw
            shown = f" ({str(shown)[:40]!r})" if isinstance(shown, str | int | float) else ""
            parts.append(f"entry {self.number}{shown}")
        if field is not None:
            parts.append(f"{'column' if self.kind in ('CSV', 'Parquet') else 'key'} {field!r}")
        return ", ".join(parts)


class Complaints:
    """What is wrong with entries of a file: the first 20 in full, the others counted."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.told, self.count = path, list[str](), 0

    def add(self, row: Row, error: InputError) -> None:
        self.count += 1
        if len(self.told) < TOLD:
            self.told.append(f"  {row.place(error.field)}: {str(error)[:1000]}")

    def refuse(self, entries: int) -> None:
        """Raise one ``InputError`` with all complaints about so many entries, if there are any."""
        if self.count:
            more = self.count - len(self.told)
            raise InputError(
                f"{self.path}: {self.count:,} of {entries:,} entries cannot run, so none was "
                "started.\n" + "\n".join(self.told + ([f"  … and {more:,} more."] if more else []))
            )


def open_entries(path: str | Path) -> Iterator[Row]:
    """``read_entries`` of a file whose first 1,000 entries are right, each by itself.

    Raises ``InputError``, at once, for all that is wrong in the file where one of these is not.
    No model and no tokenizer is needed for that.
    """
    rows = read_entries(path)
    first = list(itertools.islice(rows, EARLY))
    if any(row.problem for row in first):
        bad, count = Complaints(path), 0
        for row in itertools.chain(first, rows):
            count += 1
            if row.problem:
                bad.add(row, row.problem)
        bad.refuse(count)
    return itertools.chain(first, rows)


def read_entries(path: str | Path) -> Iterator[Row]:
    """Every ``Row`` of a YAML, CSV, JSON Lines or Parquet file, read as it is asked for.

    An entry that cannot be read is a row with a ``problem``, and the next one follows. Raises
    ``InputError``, at once or on the way, when the file as a whole cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"There is no prompts file {path}: check the path.")
    if path.is_dir():
        raise InputError(f"{path} is a folder: name one prompts file in it.")
    if not path.is_file():
        raise InputError(f"{path} is read twice, so it must be a file: save it as one first.")
    suffix = path.suffix.lower()
    if suffix in (".gz", ".bz2", ".xz", ".zst", ".zip"):
        raise InputError(f"{path} is compressed: unpack it first.")
    if suffix not in FORMATS:
        raise InputError(
            f"{path} is of no kind that is known: prompts are YAML (.yml, .yaml), CSV (.csv), "
            "JSON Lines (.jsonl, .ndjson) or Parquet (.parquet)."
        )
    rows = _rows(path, FORMATS[suffix][1])
    first = next(rows, None)  # so that a file that is none of these is refused at once
    if first is None:
        raise InputError(f"{path} holds no prompt: write at least one.")
    return itertools.chain([first], rows)


def _rows(path, read):
    number = 0
    try:
        for number, (line, *found) in enumerate(read(path), start=1):
            yield _row(path, number, line, *found)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}{_unreadable(path, error)}") from error
    except pyarrow.ArrowException as error:
        after = f" after row {number}" if number else ""
        why = str(error).splitlines()[0]
        raise InputError(f"{path} is not whole Parquet{after} ({why}): write it again.") from error


def _unreadable(path, error):
    """Why a file cannot be read on, as a sentence that its path begins."""
    if isinstance(error, OSError):
        return f" cannot be read: {error.strerror or error}."
    if isinstance(error, RecursionError):
        return " is nested too deeply: write a list of prompts."
    if isinstance(error, UnicodeDecodeError):
        line = _first_line(path, lambda line: line.decode("utf-8", "ignore").encode() != line)
        return f", line {line}: this is not UTF-8: save it as UTF-8."
    if isinstance(error, yaml.reader.ReaderError):  # it knows no line
        bad = chr(error.character)
        line = _first_line(path, lambda line: bad.encode("utf-8", "surrogatepass") in line)
        why = f"the character {bad!r} cannot be in YAML: save the file as UTF-8 text."
        return f", line {line}: {why}"
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark else ""
    return f"{where}: this is not YAML ({_yaml_problem(error)}): mind quotes and indentation."


def _first_line(path, is_bad):
    """The number of the first line, as bytes, that ``is_bad``."""
    with path.open("rb") as stream:
        return next((number for number, line in enumerate(stream, 1) if is_bad(line)), 1)


def _row(path, number, line, problem, parse, *given):
    """The ``Row`` of what ``parse(*given)`` gives, or of what was wrong there or before."""
    raw = None
    try:
        if problem is None:
            raw = parse(*given)
            kind = FORMATS[path.suffix.lower()][0]
            return Row(path.name, number, line, raw, parse_entry(raw, kind))
    except InputError as error:
        problem = error
    except yaml.YAMLError as error:
        problem = InputError(f"This is not YAML ({_yaml_problem(error)}).")
    except json.JSONDecodeError as error:
        problem = InputError(f"This is not JSON ({error.msg}, character {error.colno}).")
    except UnicodeDecodeError:
        problem = InputError("A text is not UTF-8: save it as UTF-8.")
    except (ValueError, OverflowError, RecursionError):
        problem = InputError("This is no text or object: an entry is one of them.")
    return Row(path.name, number, line, raw, problem=problem)


# --- YAML --------------------------------------------------------------------------------------

_TEXTS = set(Entry.model_fields) - {"answer"}  # keys of which a number is a text
_NUMBERS = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")}
_Fastest: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Fastest, Composer):
    """libyaml's parser, ten times as fast, under the composer that goes node by node.

    It counts the nodes that are composed, so that one entry cannot fill the memory.
    """

    composed = 0

    def __init__(self, stream):
        super().__init__(stream)
        Composer.__init__(self)

    def compose_node(self, parent, index):
        self.composed += 1
        if self.composed > MOST_NODES:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(
                problem=f"an entry of more than {MOST_NODES:,} parts", problem_mark=mark
            )
        return Composer.compose_node(self, parent, index)


def _yaml_problem(error):
    return getattr(error, "problem", None) or str(error).splitlines()[0]


def _read_yaml(path):
    with path.open(encoding="utf-8-sig") as stream:
        loader = _Loader(stream)
        loader.get_event()  # the stream's start
        empty = loader.check_event(yaml.StreamEndEvent)
        if not empty:
            loader.get_event()  # the document's
        if empty or not loader.check_event(yaml.SequenceStartEvent):
            raise InputError(
                f"{path} must be a YAML list with at least one prompt, such as:\n"
                '- "The capital city of Latvia is"'
            )
        loader.get_event()
        while not loader.check_event(yaml.SequenceEndEvent):
            line = loader.peek_event().start_mark.line + 1
            loader.composed = 0
            yield line, None, _yaml_entry, loader, loader.compose_node(None, None)
        loader.get_event()
        loader.get_event()  # the document's end
        if not loader.check_event(yaml.StreamEndEvent):
            line = loader.peek_event().start_mark.line + 1
            raise InputError(f"{path}, line {line}: a second document begins: keep one list.")


def _yaml_entry(loader, node):
    if _is_large(node):  # a few aliases of aliases can stand for more than memory holds
        raise InputError(f"It has more than {MOST_NODES:,} parts: an entry is one prompt.")
    if isinstance(node, yaml.MappingNode):
        _refuse_twice(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, value in node.value:
            is_text = isinstance(key, yaml.ScalarNode) and _key(key.value) in _TEXTS
            values = value.value if is_text and value.id == "sequence" else [value]
            for some in values if is_text else ():
                if some.tag in _NUMBERS and str(some.value).lower() != ".nan":
                    some.tag = "tag:yaml.org,2002:str"  # 0x10 and 1_000 as they are written
    try:
        return loader.construct_document(node)
    except (ValueError, RecursionError):  # the 45th of May, a number of 5,000 digits
        raise InputError("This is no date or number: put the text in quotes.") from None


def _is_large(node):
    left, seen = [node], 0
    while left and seen <= MOST_NODES:
        node = left.pop()
        seen += 1
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        elif isinstance(node, yaml.MappingNode):
            left += itertools.chain.from_iterable(node.value)
    return seen > MOST_NODES


def _refuse_twice(keys):
    twice = [key for key, times in Counter(keys).items() if times > 1]
    if twice:
        raise InputError(f"The key {str(twice[0])[:80]!r} is there twice: remove one.")


# --- CSV and JSON Lines ------------------------------------------------------------------------


def _lines(stream, problems):
    """The lines of a binary stream as text; what is wrong with one is left in ``problems``.

    What is not UTF-8 is replaced, so that a reader can go on to the next line.
    """
    for number, line in enumerate(iter(partial(stream.readline, LONGEST_LINE), b""), 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            problems.append(InputError(f"The line is longer than {LONGEST_LINE:,} bytes."))
            while line and not line.endswith(b"\n"):
                line = stream.readline(LONGEST_LINE)
            line = b"\n"
        if b"\0" in line:
            problems.append(InputError("There is a NUL byte: save the file as UTF-8 text."))
            line = line.replace(b"\0", b"").decode("utf-8", "replace").encode()
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = f"Line {number} is not UTF-8 (byte {line[error.start]:#04x})"
            problems.append(InputError(f"{byte}: save the file as UTF-8."))
            yield line.decode("utf-8", "replace")


def _read_csv(path):
    with path.open("rb") as stream:
        header, problems = None, deque[InputError](maxlen=1)  # of a row's lines the last one's
        lines = _lines(stream, problems)
        before, delimiter = _begin(lines, "\t;," if path.suffix.lower() == ".tsv" else ",;\t")
        reader = csv.reader(itertools.chain(before, lines), delimiter=delimiter, strict=True)
        try:
            header = next((cells for cells in reader if any(cells)), None)
        except csv.Error as error:
            if not problems:
                problems.append(InputError(f"This is not CSV ({error})."))
        if problems:
            raise InputError(f"{path}, line {reader.line_num or 1}: {problems[0]}")
        if header is None:
            return
        for at, name in enumerate(header):  # an index saved twice would be a column twice
            header[at] = f"Unnamed: {at}" if _UNNAMED.fullmatch(_key(name)) else name.strip()
        _check_header(f"{path}, line {reader.line_num}", header)
        cells = header
        while cells is not None:
            line, problem = reader.line_num + 1, None
            try:
                cells = next(reader, None)
            except csv.Error as error:
                problem = InputError(f"This is not CSV ({error}): mind the quotes.")
            problem = problems.pop() if problems else problem
            if (cells and any(cells)) or problem:  # else a line of empty cells, or the end
                yield line, problem, _from_cells, header, delimiter, cells


def _begin(lines, delimiters):
    """The lines up to the header's first, and the character between its cells."""
    before = []
    for line in lines:
        told = re.fullmatch(r"sep=([,;\t])", line.strip("\r\n"))  # as Excel is told
        before.append("\n" if told else line)
        if told or line.strip():
            return before, told[1] if told else max(delimiters, key=partial(_parted, line))
    return before, ","


def _parted(header, delimiter):
    """How well a character parts the cells of a header: the keys it finds, and then the cells."""
    try:
        names = next(csv.reader([header], delimiter=delimiter), [])
    except csv.Error:  # which is told when the header is read
        names = []
    return sum(_key(name) in Entry.model_fields for name in names), len(names)


def _check_header(where, names):
    keys = [_key(name) for name in names]
    if len(set(keys)) < len(keys):
        raise InputError(f"{where}: a column is there twice: {', '.join(names)[:200]}.")
    try:
        _refuse_typos(names, "column")
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if not {"prompt", "messages"} & set(keys):
        raise InputError(
            f"{where}: the column 'prompt' is missing: the first line names the columns, parted by "
            f"commas, semicolons or tabs, and here they are {', '.join(names)[:200]}."
        )


_NOTHING = ("nan", "<na>", "null", "#n/a")  # what tools write in a cell that holds no value
_DOUBTFUL = ("na", "n/a", "none")  # what some of them write there, and what may be a text


def _from_cells(header, delimiter, cells):
    """What the cells of a CSV row, which are all text, mean; an empty one means not given."""
    if len(cells) != len(header):
        parts = {",": "commas", ";": "semicolons", "\t": "tabs"}[delimiter]
        raise InputError(
            f"It has {len(cells)} cells and the header {len(header)}: put a text with {parts} in "
            "quotes."
        )
    return {name: _cell(_key(name), cell) for name, cell in zip(header, cells, strict=True)}


def _cell(key, cell):
    """What a cell says, or ``None`` for no value. A prompt is a text, whatever it says."""
    said = cell.casefold()
    if not cell or (key != "prompt" and said in _NOTHING):
        return None
    if key in Entry.model_fields and key not in ("prompt", "id") and said in _DOUBTFUL:
        raise InputError(
            f"{cell!r} may be a text or no value: leave the cell empty, or write the text in JSON "
            "Lines.",
            field=key,
        )
    if key == "answer" and said in ("true", "false"):
        return said == "true"
    if key == "answer" and re.fullmatch(r"\d{1,9}(\.0)?", said):  # a frame's column with gaps: 12.0
        return int(said.removesuffix(".0"))
    return cell


def _read_jsonl(path):
    with path.open("rb") as stream:
        problems = deque[InputError](maxlen=1)
        for line, text in enumerate(_lines(stream, problems), start=1):
            problem = problems.pop() if problems else None
            if text.strip() or problem:
                yield line, problem, _json, text


def _json(text):
    return json.loads(text, object_pairs_hook=_object, parse_float=Decimal)


def _object(pairs):
    _refuse_twice(key for key, _ in pairs)
    return dict(pairs)


# --- Parquet -----------------------------------------------------------------------------------


def _read_parquet(path):
    with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
        # a data frame's index that has no name; one that has is carried
        index = re.compile(r"__index_level_\d+__")
        names = [name for name in file.schema_arrow.names if not index.fullmatch(name)]
        _check_header(str(path), names)
        for batch in file.iter_batches(batch_size=256):
            for row in range(len(batch)):
                yield None, None, _parquet_entry, names, batch.slice(row, 1)


def _parquet_entry(names, row):
    (cells,) = row.to_pylist()
    return {name: cells[name] for name in names}


# how each is called, and what reads it: (line, problem, function, what it parses) an entry
FORMATS = {suffix: ("YAML", _read_yaml) for suffix in (".yml", ".yaml")}
FORMATS |= {suffix: ("JSON", _read_jsonl) for suffix in (".jsonl", ".ndjson")}
FORMATS |= {suffix: ("CSV", _read_csv) for suffix in (".csv", ".tsv")}
FORMATS |= {".parquet": ("Parquet", _read_parquet)}
