"""A process that is told to end keeps what it has computed (killed ones: test_campaigns.py)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_URL
from recordings import moving_squares, write_video

from storage.reconstruction import ReconstructionStore
from tasks.plan import read_plan

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

ARGUMENTS = ("--weights", "untrained", "--segment-frames", "24", "--chunk-frames", "4")


def start(video: Path, output: Path, **pipes: int) -> subprocess.Popen[bytes]:
    """`ttt3r reconstruct` in a process of its own, on the tests' Prefect server."""
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
    command = [sys.executable, "-m", "flows.cli", "reconstruct", str(video), "--output"]
    return subprocess.Popen([*command, str(output), *ARGUMENTS], env=environment, **pipes)


def chunk_commits(url: Path) -> dict[str, str]:
    """Committed chunks and what identifies each commit."""
    if not (url / "zarr.json").exists():
        return {}
    commits = ReconstructionStore.open(url).commits("infer")
    return {name: record["commit_id"] for name, record in commits.items()}


def test_sigterm_commits_the_chunk_in_progress_and_the_run_goes_on_from_there(tmp_path):
    video = write_video(tmp_path / "squares.mp4", moving_squares(240))
    url = tmp_path / "out" / "squares.zarr"
    running = start(video, tmp_path / "out", stderr=subprocess.PIPE)
    while len(chunk_commits(url)) < 4 and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate()
    assert running.returncode == 143, said
    assert b"stopped by SIGTERM" in said
    store = ReconstructionStore.open(url)
    kept = chunk_commits(url)
    lanes = {name.split("/")[1] for name in kept}
    rounds = {lane: sum(name.split("/")[1] == lane for name in kept) for lane in lanes}
    assert len(set(rounds.values())) == 1  # of all lanes: no chunk was computed and not kept
    assert len(kept) < sum(len(s.chunks(4)) for s in read_plan(store).segments)
    assert store.verify() == []
    runs = flow_runs(str(video))
    assert [run.state.type.value for run in runs] == ["CRASHED"]
    assert start(video, tmp_path / "out").wait() == 0
    resumed = chunk_commits(url)
    assert {name: resumed[name] for name in kept} == kept


def flow_runs(name: str) -> list[FlowRun]:
    """What the Prefect server knows of the runs of a name."""
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(limit=100, sort=FlowRunSort.START_TIME_DESC)
    return [run for run in runs if run.name == name]
