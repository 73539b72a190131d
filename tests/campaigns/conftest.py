"""Short forms of the campaigns of this folder, which run for longer by hand."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def campaign(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a script of this folder; gives its figures if everything was as it must be."""

    def run(script: str, *arguments: str) -> dict[str, Any]:
        figures = tmp_path / "figures.json"
        command = [sys.executable, str(Path(__file__).parent / script), *arguments]
        command += ["--json", str(figures)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1100)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        return json.loads(figures.read_text())

    return run
