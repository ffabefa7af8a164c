"""By what finished work is known again: digests of the model and of the code behind a number."""

import hashlib
from importlib.metadata import version
from pathlib import Path

import helpers
from helpers import PACKAGES

SOURCES = Path(helpers.__file__).resolve().parent
BESIDE_WEIGHTS = (".json", ".jinja", ".model", ".txt")


def model_digest(name: str | Path) -> str:
    """SHA-256 of all of a model that a result depends on, in hexadecimal.

    That is the weights, and the small files beside them: the configuration, the tokenizer and the
    chat template. ``weights_digest`` is of the weights alone.
    """
    from helpers.models import resolve_model, weights_digest  # and torch, which no code needs

    folder = resolve_model(name)
    small = {file.name for file in folder.iterdir() if file.suffix in BESIDE_WEIGHTS}
    # the manifest of the bundled model holds times, which differ from machine to machine
    return _digest([weights_digest(name)], folder, small - {"manifest.json"})


def code_version(sources: Path | None = None) -> str:
    """SHA-256 of the code that a result depends on, in hexadecimal.

    That is every source and table of ``helpers``, and the versions of the packages that do the
    arithmetic. How ``llama_reports`` shows a result is not among it. ``sources`` is the folder of
    another package to be told apart.
    """
    sources = sources or SOURCES
    names = [file.relative_to(sources) for file in sources.rglob("*") if file.is_file()]
    seen = [n for n in names if not any(p.startswith((".", "__pycache__")) for p in n.parts)]
    packages = [f"{name} {version(name)}" for name in PACKAGES[1:]]
    return _digest(packages, sources, [name.as_posix() for name in seen])


def _digest(facts, folder, names):
    """SHA-256 of some facts, and of the names and contents of files in ``folder``."""
    digest = hashlib.sha256("\n".join(facts).encode())
    for name in sorted(names):
        content = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        digest.update(f"\n{name!r} {content}".encode())
    return digest.hexdigest()
