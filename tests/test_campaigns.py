"""Short forms of the campaigns that `tests/campaigns` runs for longer by hand."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAMPAIGNS = Path(__file__).parent / "campaigns"

pytestmark = pytest.mark.slow


def run(script: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Figures of a campaign in which everything was as it must be."""
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(CAMPAIGNS / script), *arguments, "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return json.loads(figures.read_text())


def test_runs_killed_at_random_moments_end_with_the_bytes_of_an_uninterrupted_one(tmp_path):
    found = run("kills.py", tmp_path, "--runs", "20", "--s3", "2", "--seed", "1")
    assert found["drives_killed"] >= 17
    assert found["finished_chunks_kept"] > 66


def test_two_workers_on_one_drive_never_mix_their_results(tmp_path):
    found = run("races.py", tmp_path, "--races", "4", "--s3", "1", "--seed", "7")
    assert found["races"] == 4
    assert any(kind.startswith("no claims") for kind in found["kinds"])


def test_drive_on_s3_whose_requests_are_broken_ends_with_the_bytes_of_an_unbroken_one(tmp_path):
    found = run("s3_faults.py", tmp_path, "--faults", "100", "--rate", "0.1", "--seed", "3")
    assert found["faults"] >= 100
    assert len(found["by_kind"]) >= 8
    assert found["chunks_seen_committed"] >= 10
    assert found["wrong"] == 0
