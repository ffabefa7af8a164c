"""A folder of a stranger's ends in one sentence, or in a model that works."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "hostile.py"
COUNT = os.environ.get("HOSTILE", "300")  # 10,000 take ten minutes


def test_a_damaged_folder_is_one_sentence_or_a_model_that_works():
    command = [sys.executable, "-P", str(SCRIPT), os.environ.get("HOSTILE_SEED", "0"), COUNT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("{")] == []
