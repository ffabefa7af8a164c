"""Files and folders that are whole or absent, whenever a reader looks or a process dies."""

import os
import shutil
import tempfile
from pathlib import Path


def move_into_place(folder, final):
    """Replace ``final`` by the finished ``folder``; the old one goes only once the new is there."""
    old = final.with_name(f".old-{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    folder.rename(final)
    folder.mkdir()  # what TemporaryDirectory will remove
    final.chmod(0o755)  # a temporary folder is private
    shutil.rmtree(old, ignore_errors=True)


def write_whole(path, content):
    """Write beside ``path`` and rename, so that a reader finds the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
