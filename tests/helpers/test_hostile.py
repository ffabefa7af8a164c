"""A folder or file of a stranger's ends in one sentence, or in a model that works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import EVERY_CASE

pytestmark = pytest.mark.thorough

SCRIPT = Path(__file__).resolve().parents[1] / "hostile.py"
COUNT = os.environ.get("HOSTILE")  # 10,000 of each: make hostile
COUNTS = {"folder": "300", "gguf": "150"} if EVERY_CASE else {"folder": "100", "gguf": "50"}


@pytest.mark.parametrize(("kind", "count"), COUNTS.items())
def test_what_is_damaged_is_one_sentence_or_a_model_that_works(kind, count):
    seed = os.environ.get("HOSTILE_SEED", "0")
    command = [sys.executable, "-P", str(SCRIPT), seed, COUNT or count, kind]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("{")] == []
    print(done.stdout)
