"""Files and folders that are whole or absent, whenever a reader looks or a process dies."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from helpers.errors import InputError

UNFINISHED = ".making-"  # how the names of folders begin that are not whole yet
REPLACED = ".old-"


def move_into_place(folder: Path, final: Path) -> None:
    """Replace ``final`` by the finished ``folder``; the old one goes only once the new is there."""
    old = final.with_name(f"{REPLACED}{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    folder.rename(final)
    folder.mkdir()  # what TemporaryDirectory will remove
    final.chmod(0o755)  # a temporary folder is private
    shutil.rmtree(old, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it; what is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing_whole(path: Path) -> Iterator[IO[bytes]]:
    """A stream beside ``path`` that becomes it in the end: a reader finds the old file or all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old one or the new one."""
    with writing_whole(path) as stream:
        stream.write(content)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; an empty one if there is none, whole and readable, there."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Keep ``out`` to one run at a time, and clear away what was left unfinished there.

    Raises ``InputError`` if another run is writing there. The lock is the system's, so it ends
    with the process that holds it, however that comes about.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(out / ".lock", timeout=0).acquire()
    except Timeout:
        raise InputError(
            f"Another run is writing to {out}: wait for it, or choose another --out."
        ) from None
    with lock:
        _clear(out)  # what a run left that was killed
        yield
        _clear(out)  # and what its workers left that died


def _clear(out):
    for leftover in [*out.glob(f"{UNFINISHED}*"), *out.glob(f"{REPLACED}*")]:
        shutil.rmtree(leftover, ignore_errors=True)
