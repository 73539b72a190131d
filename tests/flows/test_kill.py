"""A process that is told to end keeps what it has computed (killed: campaigns/test_kills.py)."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.events.filters import EventFilter, EventResourceFilter
from prefect.settings import PREFECT_API_URL
from recordings import moving_squares, write_video

from flows.infer_segments import infer_segments
from flows.leaving import QUEUED
from storage import upkeep
from storage.reconstruction import ReconstructionStore
from tasks.config import InferConfig, PlanConfig, ReconstructionConfig
from tasks.plan import plan_stage
from tasks.planned import read_plan
from tasks.probe import probe_stage

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

ARGUMENTS = ("--weights", "untrained", "--segment-frames", "96", "--chunk-frames", "4")
ARGUMENTS += ("--voxel-m", "0.1")


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
    video = write_video(tmp_path / "squares.mp4", moving_squares(960))
    url = tmp_path / "out" / "squares.zarr"
    running = start(video, tmp_path / "out", stderr=subprocess.PIPE)
    while len(list((url / "commits" / "infer").glob("*/*.json"))) < 4 and running.poll() is None:
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
    assert upkeep.verify(store) == []
    runs = flow_runs(str(video))
    assert [run.state.type.value for run in runs] == ["CRASHED"]
    assert start(video, tmp_path / "out").wait() == 0
    resumed = chunk_commits(url)
    assert {name: resumed[name] for name in kept} == kept


def test_ctrl_c_in_a_terminal_ends_in_order_and_leaves_no_server(tmp_path):
    video = write_video(tmp_path / "squares.mp4", moving_squares(480))
    url = tmp_path / "out" / "squares.zarr"
    environment = {n: v for n, v in os.environ.items() if n != "PREFECT_API_URL"}
    environment["PREFECT_HOME"] = str(tmp_path / "home")
    command = [sys.executable, "-m", "flows.cli", "reconstruct", str(video), "--output"]
    # What is started in the background ignores Ctrl-C, and so would the run.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    running = subprocess.Popen(
        [*command, str(tmp_path / "out"), *ARGUMENTS],
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, before)
    try:
        while len(chunk_commits(url)) < 4 and running.poll() is None:
            time.sleep(0.01)
        os.killpg(running.pid, signal.SIGINT)
        _, said = running.communicate(timeout=45)  # 72 s where the server is gone at once
    finally:
        running.kill()
    assert running.returncode == 130, said
    assert b"interrupted; run the same command again" in said
    assert sessions().count(running.pid) == 0


def sessions() -> list[int]:
    """Sessions that all processes belong to."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            found.append(int(stat.read_text().rpartition(")")[2].split()[3]))
    return found


def test_sigterm_to_a_pod_commits_the_chunk_in_progress_and_schedules_the_run_again(tmp_path):
    video = write_video(tmp_path / "squares.mp4", moving_squares(480))
    url = str(tmp_path / "squares.zarr")
    infer = InferConfig(weights="untrained", lanes=2)
    probe_stage.fn(str(video), "squares", url)
    groups = plan_stage.fn(url, ReconstructionConfig(PlanConfig(24, 6, 4), infer))
    indices = [i for group in groups for i in group]
    deploy()
    parameters = {"url": url, "indices": indices, "config": asdict(infer)}
    run = run_deployment("infer-segments/pod", parameters=parameters, timeout=0)
    home = tmp_path / "cache"
    home.mkdir()
    os.mkfifo(home / "cannot be copied")  # runs take no copy of the folder that they start in
    pod = execute(run, home)
    while len(chunk_commits(Path(url))) < 4 and pod.poll() is None:
        time.sleep(0.01)
    pod.send_signal(signal.SIGTERM)
    pod.wait()
    kept = chunk_commits(Path(url))
    assert 4 <= len(kept) < sum(len(s.chunks(4)) for s in read_plan(store_at(url)).segments)
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run.id).state.type.value == "SCHEDULED"
        assert told(run)[-1] == QUEUED  # after the last sign of life
        assert execute(run, home).wait() == 0
        assert client.read_flow_run(run.id).state.type.value == "COMPLETED"
    resumed = chunk_commits(Path(url))
    assert {name: resumed[name] for name in kept} == kept
    assert len(resumed) == sum(len(s.chunks(4)) for s in read_plan(store_at(url)).segments)
    assert upkeep.verify(store_at(url)) == []


def deploy() -> None:
    """Deploy the flow as `deploy/prefect.yaml` does, in no pool."""
    deployments = Path(__file__).resolve().parents[2] / "deploy" / "prefect.yaml"
    fleet = yaml.safe_load(deployments.read_text())
    entrypoints = {d["entrypoint"] for d in fleet["deployments"]}
    (entrypoint,) = (e for e in entrypoints if e.endswith(".infer_segments"))
    with get_client(sync_client=True) as client:
        flow = client.create_flow(infer_segments)
        client.create_deployment(flow, "pod", entrypoint=entrypoint, pull_steps=fleet["pull"])


def execute(run: FlowRun, home: Path) -> subprocess.Popen[bytes]:
    """What a container of the pool does in its home, with variables that pools of `deploy/` set."""
    environment = {
        **os.environ,
        "TMPDIR": str(home),
        "PREFECT_API_URL": PREFECT_API_URL.value(),
        "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "reschedule",
    }
    command = [sys.executable, "-m", "prefect", "flow-run", "execute", str(run.id)]
    return subprocess.Popen(command, env=environment, cwd=home)


def told(run: FlowRun) -> list[str]:
    """Names of the run's events, in the order of their times, once the server has written them."""
    wanted = EventFilter(resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]))
    body = {"filter": wanted.model_dump(mode="json"), "limit": 50}
    names: list[str] = []
    until = time.monotonic() + 20
    while QUEUED not in names and time.monotonic() < until:
        time.sleep(1)
        answer = httpx.post(f"{PREFECT_API_URL.value()}/events/filter", json=body)
        found = sorted(answer.raise_for_status().json()["events"], key=lambda e: e["occurred"])
        names = [event["event"] for event in found]
    return names


def store_at(url: str) -> ReconstructionStore:
    return ReconstructionStore.open(url)


def flow_runs(name: str) -> list[FlowRun]:
    """What the Prefect server knows of the runs of a name."""
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(limit=100, sort=FlowRunSort.START_TIME_DESC)
    return [run for run in runs if run.name == name]
