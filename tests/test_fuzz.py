"""A few seconds of the fuzzing that `tests/campaigns/fuzz.py` does for longer by hand."""

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parent / "campaigns" / "fuzz.py"


def test_mutated_input_gives_documented_errors_only():
    # A process of its own: it watches every file that is opened.
    command = [sys.executable, str(FUZZ), "--cases", "8000", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " 0 findings" in done.stdout
