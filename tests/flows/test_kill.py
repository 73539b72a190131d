"""A killed process costs what it had not committed, and nothing else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from prefect.settings import PREFECT_API_URL
from recordings import moving_squares, write_video

from storage.reconstruction import ReconstructionStore
from tasks.plan import read_plan

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

ARGUMENTS = ("--weights", "untrained", "--segment-frames", "24", "--chunk-frames", "4")


def start(video: Path, output: Path) -> subprocess.Popen[bytes]:
    """`ttt3r reconstruct` in a process of its own, on the tests' Prefect server."""
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
    command = [sys.executable, "-m", "flows.cli", "reconstruct", str(video), "--output"]
    return subprocess.Popen([*command, str(output), *ARGUMENTS], env=environment)


def chunk_commits(url: Path) -> dict[str, str]:
    """Committed chunks and what identifies each commit."""
    if not (url / "zarr.json").exists():
        return {}
    commits = ReconstructionStore.open(url).commits("infer")
    return {name: record["commit_id"] for name, record in commits.items()}


def stored(url: Path) -> dict[str, np.ndarray]:
    store = ReconstructionStore.open(url)
    arrays = dict(store.read_trajectory())
    for segment in read_plan(store).segments:
        for name in ("depth", "confidence", "cam_to_seg"):
            arrays[f"{segment.index}/{name}"] = store.read(
                segment, name, segment.start, segment.stop
            )
    return arrays


@pytest.mark.parametrize("after_chunks", [1, 7, 20])
def test_drive_killed_during_inference_ends_with_the_bytes_of_an_uninterrupted_one(
    tmp_path, after_chunks
):
    video = write_video(tmp_path / "squares.mp4", moving_squares(120))
    url = tmp_path / "killed" / "squares.zarr"
    running = start(video, tmp_path / "killed")
    while len(chunk_commits(url)) < after_chunks and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = chunk_commits(url)
    assert len(kept) >= after_chunks
    assert start(video, tmp_path / "killed").wait() == 0
    resumed = chunk_commits(url)
    # Lanes resume together: all commits that were there stay as they are.
    assert {name: resumed[name] for name in kept} == kept
    assert start(video, tmp_path / "whole").wait() == 0
    ours, theirs = stored(url), stored(tmp_path / "whole" / "squares.zarr")
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
