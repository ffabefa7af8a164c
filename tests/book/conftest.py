"""A built book, for the tests that look at it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder of the book: the one that ``BOOK`` names, or one built as ``make book`` does."""
    if "BOOK" in os.environ:
        return Path(os.environ["BOOK"]).resolve()
    for needed in ("furo", "myst_nb"):
        pytest.importorskip(needed, reason=f"{needed} builds the book and is not installed")
    work = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", ROOT / "docs"]
    command += ["-d", work / "doctrees", ROOT, work / "html"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (done.stdout + done.stderr).strip()
    return work / "html"
