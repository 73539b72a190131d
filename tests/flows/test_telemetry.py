"""What a real run counts and logs, compared with what it has stored."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from otlp import Received, receiver
from prefect import flow, get_client
from prefect.flow_engine import run_flow
from prefect.states import Scheduled
from recordings import moving_squares, write_video

from flows.telemetry import queued_s, start_export
from storage.reconstruction import ReconstructionStore

LOGGING = Path(__file__).resolve().parents[2] / "deploy" / "logging.yaml"
CANARY = "canary-secret-4711"


@dataclass
class Run:
    """A finished run of the command line."""

    store: ReconstructionStore
    code: int
    lines: list[str]  # of its log

    @property
    def commits(self) -> dict[str, dict[str, Any]]:
        return self.store.commits()

    @property
    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines if line.startswith("{")]


def environment(folder: Path, endpoint: str) -> dict[str, str]:
    """That of a process with logs as JSON and metrics sent to `endpoint`."""
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "OTEL_"))},
        "HOME": str(folder / "home"),
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
        "PREFECT_LOGGING_SETTINGS_PATH": str(LOGGING),
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_METRICS_HEADERS": f"authorization=Bearer%20{CANARY}",
        "AWS_SECRET_ACCESS_KEY": CANARY,
    }


def reconstruct(folder: Path, endpoint: str) -> Run:
    """Reconstruct a small drive with logs as JSON and metrics sent to `endpoint`."""
    video = write_video(folder / "squares.mp4", moving_squares(20))
    command = [sys.executable, "-m", "flows.cli", "reconstruct", str(video)]
    settings = ["--weights", "untrained", "--segment-frames", "8", "--chunk-frames", "4"]
    done = subprocess.run(
        [*command, "--output", str(folder / "out"), *settings],
        env=environment(folder, endpoint),
        capture_output=True,
        text=True,
        timeout=900,
    )
    store = ReconstructionStore.open(str(folder / "out" / "squares.zarr"))
    return Run(store, done.returncode, (done.stdout + done.stderr).splitlines())


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Received]:
    """A run, and what a receiver of metrics got from it."""
    with receiver() as received:
        run = reconstruct(tmp_path_factory.mktemp("observed"), received.url)
    assert run.code == 0, run.lines[-20:]
    return run, received


@pytest.mark.slow
def test_metrics_equal_the_commit_records(observed):
    run, received = observed
    chunks = [r for name, r in run.commits.items() if name.startswith("infer/")]
    ledger = run.commits["ledger"]
    assert received.values("ttt3r.inference.frames") == {
        "": sum(c["frames_inferred"] for c in chunks)
    }
    assert received.values("ttt3r.inference.chunks") == {"": len(chunks)}
    assert received.values("ttt3r.segments", "outcome") == {
        "done": ledger["segments"],
        "set_aside": 0,
    }
    assert received.values("ttt3r.drives", "outcome") == {
        "finished": 1,
        "failed": 0,
        "still_unreadable": 0,
    }
    assert received.values("ttt3r.stored") == {"": ledger["used"]["stored_bytes"]}
    assert received.values("ttt3r.stage", "stage") == pytest.approx(ledger["seconds"], abs=0.5)
    parts = {n.removesuffix("_seconds") for c in chunks for n in c if n.endswith("_seconds")}
    busy = {part: sum(c.get(f"{part}_seconds", 0) for c in chunks) for part in parts}
    assert {"decode", "wait", "infer", "encode", "write", "stall"} <= parts
    assert received.values("ttt3r.inference.busy", "part") == pytest.approx(busy)


@pytest.mark.slow
def test_series_begin_at_zero_and_no_run_stays_active(observed):
    _, received = observed
    assert set(received.first_values("ttt3r.inference.frames")) == {0}
    assert received.values("ttt3r.runs.active", "flow") == {"reconstruct-drive": 0}
    assert received.count("ttt3r.run.queued") == 1


@pytest.mark.slow
def test_a_night_that_cannot_begin_is_told_before_its_process_ends(tmp_path):
    night = (
        "from flows.reconstruct_collection import reconstruct_collection\n"
        f"reconstruct_collection({str(tmp_path / 'nowhere')!r}, {str(tmp_path / 'out')!r})"
    )
    with receiver() as received:
        done = subprocess.run(
            [sys.executable, "-c", night],
            env=environment(tmp_path, received.url),
            capture_output=True,
            text=True,
            timeout=900,
        )
    assert "there is no such file or folder" in done.stderr, done.stderr[-2000:]
    assert received.values("ttt3r.collections", "outcome") == {"failed": 1}
    assert received.values("ttt3r.runs.active", "flow") == {"reconstruct-collection": 0}


@pytest.mark.slow
def test_every_line_is_json_and_chunks_say_whose_they_are(observed):
    run, _ = observed
    stored = [line for line in run.logged if line["message"].endswith("stored")]
    chunks = [name for name in run.commits if name.startswith("infer/")]
    named = {f"infer/{line['segment']:04d}/{line['chunk']:04d}" for line in stored}
    assert named == set(chunks)
    assert {line["drive"] for line in stored} == {run.store.url}
    assert all(len(line["flow_run_id"]) == 36 for line in stored)
    assert all(line["infer_seconds"] > 0 for line in stored)


@pytest.mark.slow
def test_neither_metrics_nor_logs_hold_credentials(observed):
    run, received = observed
    assert any(CANARY in " ".join(h.values()) for h in received.headers)  # it was in use
    assert all(CANARY.encode() not in body for body in received.bodies)
    assert all(CANARY not in line for line in run.lines)


@pytest.mark.slow
def test_a_receiver_that_is_away_costs_no_run(tmp_path):
    run = reconstruct(tmp_path, "http://127.0.0.1:1/v1/metrics")
    assert run.code == 0
    assert run.commits["ledger"]["segments"] > 0
    assert all(CANARY not in line for line in run.lines)


def test_nothing_is_started_where_no_receiver_is_named(monkeypatch):
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    assert start_export() is None


@flow
def waited() -> float | None:
    """How long its run had waited."""
    return queued_s()


def test_work_of_earlier_attempts_is_no_wait(prefect_server):
    hours_ago = Scheduled(scheduled_time=datetime.now(UTC) - timedelta(hours=2))
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(waited, state=hours_ago)  # replaces one that was due then
        time.sleep(1)
        assert 1 <= run_flow(waited, flow_run=run) < 600
        client.set_flow_run_state(run.id, hours_ago, force=True)  # as a pod that gets SIGTERM
        again = client.read_flow_run(run.id)
        assert run_flow(waited, flow_run=again) is None
    assert queued_s() is None
