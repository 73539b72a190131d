"""A fleet on this machine: a real server on PostgreSQL, S3, workers; and what it survives."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_fleet import LocalFleet, Work, claims_under, commits_of_all, running_fleet, wait_for_work
from recordings import moving_squares, write_video
from seaweed import Seaweed

from storage import upkeep
from storage.reconstruction import ReconstructionStore
from tasks.planned import read_plan
from tasks.summary import progress

pytestmark = pytest.mark.slow

FRAMES = 240
PLAN = {"segment_frames": 24, "chunk_frames": 4}
INFER = {"weights": "untrained", "lanes": 2, "segments_per_task": 8, "frames_per_run": 1}
FUSE = {"voxel_m": 0.1, "frame_step": 4}  # coarse: the mesh is not what is tested
CONFIG = {"plan": PLAN, "infer": INFER, "fuse": FUSE}
COLLECTION, DRIVE = "reconstruct-collection/scheduled", "reconstruct-drive/fleet"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, seaweed: Seaweed) -> Iterator[LocalFleet]:
    """A server with two workers of one thread in the pool gpu, and one in cpu."""
    folder = tmp_path_factory.mktemp("fleet")
    with running_fleet(folder, gpu_slots=2, extra=seaweed.environment) as found:
        found.start_worker("cpu", "cpu")
        for name in ("gpu-a", "gpu-b"):
            found.start_worker("gpu", name, "--limit", "1")
        yield found


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of two drives."""
    folder = tmp_path_factory.mktemp("logs")
    for name in ("first", "second"):
        (folder / name).mkdir()
        write_video(folder / name / "front.mp4", moving_squares(FRAMES))
    return folder


def stored(url: str) -> dict[str, np.ndarray]:
    """The trajectory, and depth and poses of every segment."""
    store = ReconstructionStore.open(url)
    arrays = dict(store.read_trajectory())
    for segment in read_plan(store).segments:
        for name in ("depth", "cam_to_seg"):
            arrays[f"{segment.index}/{name}"] = store.read(
                segment, name, segment.start, segment.stop
            )
    return arrays


def test_lost_node_and_killed_server_cost_nothing_that_was_finished(fleet, logs, seaweed, tmp_path):
    output = f"{seaweed.url}/lost"
    run_id = fleet.run(COLLECTION, {"collection": str(logs), "output": output, "config": CONFIG})
    work = wait_for_work(output)
    lost = fleet.lose_node(work.pid)
    began, kept = time.monotonic(), work.commits()
    fleet.start_worker("gpu", f"{lost} again", "--limit", "1")
    while len(work.commits()) == len(kept):
        assert time.monotonic() - began < 400
        time.sleep(0.5)
    print(f"\nthe lost run was taken up after {time.monotonic() - began:.0f} s")
    fleet.kill_server()
    fleet.start_server()
    at_restart = commits_of_all(output)
    fleet.must_complete(run_id, 900)
    finished = commits_of_all(output)
    assert kept.items() <= work.commits().items()
    assert at_restart.items() <= finished.items()
    for name in ("first", "second"):
        url = f"{output}/{name}.zarr"
        assert progress(url)["stage"] == "done"
        assert upkeep.verify(ReconstructionStore.open(url)) == []
    # Each work was finished by one run; that of the lost node by its second one.
    runs = fleet.flow_runs("infer-segments")
    done = Counter(work_of(run) for run in runs if run["state_type"] == "COMPLETED")
    assert set(done.values()) == {1}
    assert set(done) == {work_of(run) for run in runs}
    assert "No sign of life" in " ".join(run["state"]["message"] or "" for run in runs)
    here = {"location": str(logs / "first"), "output": str(tmp_path), "spread": "here"}
    run_id = fleet.run(DRIVE, {**here, "config": CONFIG})
    fleet.must_complete(run_id, 900)
    ours, theirs = stored(f"{output}/first.zarr"), stored(f"{tmp_path}/first.zarr")
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_second_run_with_nothing_new_starts_no_other(fleet, logs, seaweed):
    output = f"{seaweed.url}/lost"
    before, commits = len(fleet.flow_runs()), commits_of_all(output)
    run_id = fleet.run(COLLECTION, {"collection": str(logs), "output": output, "config": CONFIG})
    fleet.must_complete(run_id, 300)
    assert len(fleet.flow_runs()) == before + 1
    assert commits_of_all(output) == commits


def test_parent_that_was_killed_finds_its_children_and_starts_none_twice(fleet, logs, seaweed):
    output = f"{seaweed.url}/parent"
    run_id = fleet.run(COLLECTION, {"collection": str(logs), "output": output, "config": CONFIG})
    work = wait_for_work(output)
    os.kill(parent_of(work, output), signal.SIGKILL)
    fleet.must_complete(run_id, 900)
    drives = runs_of(fleet, "reconstruct-drive", output)
    assert sorted(r["state_type"] for r in drives) == ["COMPLETED", "COMPLETED", "CRASHED"]
    runs = runs_of(fleet, "infer-segments", output)
    assert len({run["idempotency_key"] for run in runs}) == len(runs)
    assert {run["state_type"] for run in runs} == {"COMPLETED"}


def test_cancelled_collection_cancels_all_below_it_also_what_a_lost_run_had_begun(
    fleet, logs, seaweed
):
    output = f"{seaweed.url}/cancelled"
    # Many small runs: some are left when the lost parent is back.
    config = {**CONFIG, "infer": {**INFER, "segments_per_task": 1}}
    run_id = fleet.run(COLLECTION, {"collection": str(logs), "output": output, "config": config})
    work = wait_for_work(output)
    lost = parent_of(work, output)
    os.kill(lost, signal.SIGKILL)
    while parent_of(work, output) in (lost, None):
        time.sleep(0.5)
    time.sleep(5)  # it has found its children
    fleet.prefect("flow-run", "cancel", run_id)
    assert fleet.wait_for(run_id, 300)["state_type"] == "CANCELLED"
    deadline = time.monotonic() + 400  # Prefect gives up after 300 s on a run that does not hear it
    while time.monotonic() < deadline:
        drives = runs_of(fleet, "reconstruct-drive", output)
        parts = runs_of(fleet, "infer-segments", output)
        if {r["state_type"] for r in drives + parts} <= {"CANCELLED", "COMPLETED", "CRASHED"}:
            break
        time.sleep(1)
    assert sorted(r["state_type"] for r in drives) == ["CANCELLED", "CANCELLED", "CRASHED"]
    assert {r["state_type"] for r in parts} <= {"CANCELLED", "COMPLETED"}
    assert "CANCELLED" in {r["state_type"] for r in parts if r["parameters"]["url"] == work.url}
    while claims_under(output):  # its process is on its way out
        assert time.monotonic() < deadline, claims_under(output)
        time.sleep(1)
    assert progress(work.url)["stage"] == "infer"


def test_wrong_parameters_are_named_in_one_line(fleet, logs, tmp_path):
    for parameters, said in (
        ({"config": {"infer": {"lanes": 0}}}, "lanes"),
        ({"config": {"fuse": {"voxels": 1}}}, "voxels"),
        ({"output": "s3://key:hidden@bucket/out"}, "holds credentials"),
        ({"config": {"infer": {"weights": "none-such"}}}, "none-such"),
    ):
        given = {"collection": str(logs), "output": str(tmp_path), **parameters}
        try:
            ended = fleet.wait_for(fleet.run(COLLECTION, given), 300)
        except RuntimeError as refused:
            message = str(refused)
        else:
            assert ended["state_type"] == "FAILED"
            message = ended["state"]["message"]
        assert said in message
        assert "hidden" not in message


def parent_of(work: Work, output: str) -> int | None:
    """The process that holds the drive of some inference."""
    held = [c for c in claims_under(output) if (c["url"], c["name"]) == (work.url, "drive")]
    return held[0]["pid"] if held else None


def work_of(run: dict[str, Any]) -> str:
    """What a run works at, without the number of the attempt."""
    return str(run["idempotency_key"].partition(":")[0])


def runs_of(fleet: LocalFleet, flow: str, output: str) -> list[dict[str, Any]]:
    """Runs of a flow that work for the drives under `output`."""
    runs = fleet.flow_runs(flow)
    given = ((run, run["parameters"]) for run in runs)
    return [run for run, p in given if p.get("output", p.get("url", "")).startswith(output)]
