"""A prompts file that has passed its checks, kept as Parquet, so that it is parsed and read once.

``plan.parquet`` in a folder of reports holds an entry a row. Columns: ``number`` and ``line``,
where the entry stands in the file (from 1; no line in a Parquet file), ``entry`` and ``carried``,
its keys and what it carries as JSON, ``tokens``, ``units``, ``outputs``, ``texts`` and ``kind``:
see ``Plan`` in jobs.py. Nothing but the time of a check depends on the file: without it the check
is made again.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llama_reports.files import writing_whole
from llama_reports.prompts import Entry, Row

KEPT = "plan.parquet"
ROWS = 1024  # that are held at a time
ABOUT = b"llama_notebooks.plan"
UNREADABLE = (OSError, pa.ArrowException, KeyError, TypeError, ValueError)  # what is no such file
SIZES = ("tokens", "units", "outputs", "texts", "kind")
SCHEMA = pa.schema(
    [("number", pa.int32()), ("line", pa.int32()), ("entry", pa.string()), ("carried", pa.string())]
    + [(name, pa.uint32()) for name in SIZES]
)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class CheckedWriter:
    """Rows that were found right, written as they come to a file that has no name."""

    def __init__(self) -> None:
        self._stream = tempfile.TemporaryFile()  # noqa: SIM115 (CheckedFile reads on)
        self._writer = pq.ParquetWriter(self._stream, SCHEMA, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def add(self, row: Row, entry: Entry, sizes: tuple[int, ...]) -> None:
        """Add the entry of a row, with the numbers of ``SIZES``."""
        said = entry.model_dump(exclude_defaults=True, include=set(Entry.model_fields))
        written = {"number": row.number, "line": row.line, "entry": json.dumps(said)}
        written |= {"carried": json.dumps(entry.carried)}
        self._rows.append(written | dict(zip(SIZES, sizes, strict=True)))
        if len(self._rows) == ROWS:
            self._flush()

    def finished(
        self, found_by: tuple[str, str], asked: list[tuple[str, list[str]]], carried: list[str]
    ) -> IO[bytes]:
        """The stream of the finished file, with what is known of all rows together."""
        self._flush()
        about = {"file": found_by[0], "found_by": found_by[1], "asked": asked, "carried": carried}
        self._writer.add_key_value_metadata({ABOUT: json.dumps(about).encode()})
        self._writer.close()
        return self._stream

    def _flush(self):
        self._writer.write_table(pa.Table.from_pylist(self._rows, SCHEMA))
        self._rows = []


class CheckedFile:
    """Rows of a prompts file as they were checked, read as they are asked for.

    ``asked`` are the kinds of entries, ``(notebook, methods)`` each, ``carried`` the names that
    entries carry, and ``sizes`` the arrays [rows] of ``SIZES``. ``name`` is the prompts file's,
    and ``stream`` holds Parquet; it stays open. What is read is what was opened, whatever takes
    its place in the folder.
    """

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream, self._name = stream, name
        self._file = pq.ParquetFile(stream)
        about = _about(self._file.metadata)
        self.found_by = about["file"], about["found_by"]
        self.asked = [(notebook, frozenset(methods)) for notebook, methods in about["asked"]]
        self.carried: list[str] = about["carried"]
        table = self._file.read(columns=list(SIZES))
        self.sizes = [np.asarray(table[name], np.uint32) for name in SIZES]

    def __iter__(self) -> Iterator[tuple[Row, Entry, dict[str, Any]]]:
        """Each row, its entry, and what that carries."""
        columns = ["number", "line", "entry", "carried"]
        for batch in self._file.iter_batches(ROWS, columns=columns):
            for row in batch.to_pylist():
                said = json.loads(row["entry"])
                place = Row(self._name, row["number"], row["line"], said)
                yield place, Entry.model_construct(**said), json.loads(row["carried"])

    def keep(self, out: Path) -> None:
        """Write the file to ``out``, a folder that is made where there is none."""
        out.mkdir(parents=True, exist_ok=True)
        self._stream.seek(0)
        with writing_whole(out / KEPT) as stream:
            shutil.copyfileobj(self._stream, stream)


def kept_check(out: str | Path | None, path: Path, found_by: tuple[str, str]) -> CheckedFile | None:
    """The check of ``path`` that ``out`` keeps, if it was ``found_by`` the same digests."""
    kept = _opened(out, path)
    return kept if kept is not None and kept.found_by == found_by else None


def is_kept(out: str | Path, path: str | Path) -> bool:
    """Whether ``out`` keeps a check of this very file, by whatever code and for whatever model."""
    try:
        about = _about(pq.read_metadata(Path(out) / KEPT))
        return Path(path).is_file() and about["file"] == file_digest(path)
    except UNREADABLE:
        return False


def _about(metadata):
    """What is known of all rows together."""
    return json.loads(metadata.metadata[ABOUT])


def _opened(out, path):
    try:
        return CheckedFile((Path(out) / KEPT).open("rb"), path.name) if out is not None else None
    except UNREADABLE:
        return None
