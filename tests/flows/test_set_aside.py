"""A segment that cannot be computed costs itself, not the drive."""

import json
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import httpx
import numpy as np
import pytest
import torch
from prefect.exceptions import TerminationSignal
from recordings import moving_squares, write_video
from seaweed import SeaweedProcess

from flows.infer_segments import infer_alone, infer_segments
from flows.reconstruct_drive import reconstruct_drive, report_stage
from storage import claims, upkeep
from storage.errors import Claimed, DataDamaged, StoreUnavailable
from storage.layout import segment_claim
from storage.reconstruction import ReconstructionStore
from tasks.config import (
    AnotherConfiguration,
    FuseConfig,
    InferConfig,
    PlanConfig,
    ReconstructionConfig,
    UnfitMachine,
)
from tasks.infer import chunk_tensors, infer_stage
from tasks.planned import aside_commit, read_aside, read_plan
from tasks.summary import progress
from ttt3r.config import TINY
from ttt3r.model import Model
from ttt3r.weights import WeightsInfo, save_weights

CONFIG = ReconstructionConfig(
    plan=PlanConfig(segment_frames=12, overlap_frames=4, chunk_frames=4),
    infer=InferConfig(weights="untrained", lanes=2),
    fuse=FuseConfig(voxel_m=0.1),  # coarse: the mesh is not what is tested
)

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_segment_that_fails_is_set_aside_and_tried_again_by_the_next_run(tmp_path):
    video = write_video(tmp_path / "squares.mp4", moving_squares(44))
    url = reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    store = ReconstructionStore.open(url)
    before = store.read_trajectory()
    assert [(s.start, s.stop) for s in read_plan(store).segments][2] == (16, 28)
    # The state that segment 2 resumes from is damaged: it fails however often it is tried.
    store.drop_commits("infer/0002/0001")
    store.drop_commits("infer/0002/0002")
    state = Path(url) / "segments/0002/state/tokens/c.0.0.0"
    state.write_bytes(state.read_bytes()[:100])
    other = replace(CONFIG, infer=replace(CONFIG.infer, segments_per_task=3))
    made: list[Any] = []
    for attempts in (1, 2):
        reconstruct_drive(str(video), str(tmp_path / "out"), other)
        aside = read_aside(store)
        assert list(aside) == [2]
        assert "DataDamaged" in aside[2]["reason"]
        assert aside[2]["attempts"] == attempts
        # What was made without the segment is kept while it is tried, and if it fails again.
        made = made or [store.read_commit(name) for name in ("align", "fuse/merged", "report")]
        assert made == [store.read_commit(name) for name in ("align", "fuse/merged", "report")]
    assert (progress(url)["stage"], progress(url)["set_aside"]) == ("done", [2])
    around = store.read_trajectory()
    lost = np.flatnonzero(around["part"] == -1)
    np.testing.assert_array_equal(lost, np.arange(20, 24))
    assert np.isnan(around["cam_to_world"][lost]).all()
    assert np.isfinite(around["cam_to_world"][around["part"] >= 0]).all()
    assert sorted(set(around["part"].tolist())) == [-1, 0, 1]
    # Scales are balanced over a drive's segments: with fewer of them they are others.
    ours, theirs = around["cam_to_world"][:8], before["cam_to_world"][:8]
    np.testing.assert_allclose(ours[:, :3, :3], theirs[:, :3, :3], atol=1e-12)
    factor = 1.0
    for name in ("scale", "motion_scale"):
        factor *= around[name][0] / before[name][0]
    np.testing.assert_allclose(ours[:, :3, 3], factor * theirs[:, :3, 3], atol=1e-12)
    page = store.get_file("report/report.html").decode()
    assert "Segment 2 (frames 16 to 27) was set aside" in page
    upkeep.repair(store)
    reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    assert read_aside(store) == {}
    after = store.read_trajectory()
    np.testing.assert_allclose(after["cam_to_world"], before["cam_to_world"], atol=1e-3)
    assert upkeep.verify(store) == []


def test_failure_of_every_segment_is_the_failure_of_the_drive(tmp_path):
    video = write_video(tmp_path / "squares.mp4", moving_squares(10))
    url = reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    store = ReconstructionStore.open(url)
    store.drop_commits("infer")
    metadata = Path(url) / "segments/0000/depth/zarr.json"
    metadata.write_text("{}")
    with pytest.raises(DataDamaged, match="segments/0000"):
        reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    assert store.read_commit("failed") is not None


def test_failure_of_every_segment_is_told_though_a_chunk_is_finished(tmp_path):
    video = write_video(tmp_path / "squares.mp4", moving_squares(22))
    url = reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    store = ReconstructionStore.open(url)
    for segment in read_plan(store).segments:
        store.drop_commits(f"infer/{segment.index:04d}/0001")
        store.drop_commits(f"infer/{segment.index:04d}/0002")
        state = Path(url) / f"segments/{segment.index:04d}/state/tokens/c.0.0.0"
        state.write_bytes(state.read_bytes()[:100])
    for _ in range(2):
        with pytest.raises(DataDamaged, match="state"):
            reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
        assert list(read_aside(store)) == [s.index for s in read_plan(store).segments]
        assert "DataDamaged" in store.read_commit("failed")["error"]


def test_second_run_of_a_drive_at_work_is_refused_and_leaves_no_trace(tmp_path):
    video = write_video(tmp_path / "squares.mp4", moving_squares(10))
    url = reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    store = ReconstructionStore.open(url)
    before = store.commits()
    with store.claim("drive"), pytest.raises(Claimed, match="'drive' is being worked on"):
        reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    assert store.commits() == before


@pytest.mark.parametrize(
    "error", [TerminationSignal(signal=15), KeyboardInterrupt(), StoreUnavailable("it is away")]
)
def test_interruption_of_a_segment_tried_alone_is_no_fault_of_it(tmp_path, monkeypatch, error):
    store = ReconstructionStore.create(tmp_path / "drive.zarr", {})
    earlier = {"attempts": 2, "time": "", "reason": "it failed", "is_running": False}
    store.commit("aside/0001", {"key": "k", **earlier})

    class Interrupted:
        def with_options(self, **options):
            return self

        def __call__(self, *arguments):
            raise error

    monkeypatch.setattr("flows.infer_segments.infer_stage", Interrupted())
    for index in (0, 1):
        with pytest.raises(type(error)):
            infer_segments.fn(store.url, [index], CONFIG.infer, alone=True)
    found = read_aside(store)
    assert list(found) == [1]
    assert earlier.items() <= found[1].items()


@pytest.mark.parametrize("alone", [False, True])
def test_run_of_an_earlier_configuration_sets_no_segment_aside(tmp_path, alone):
    video = write_video(tmp_path / "squares.mp4", moving_squares(10))
    url = reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    store = ReconstructionStore.open(url)
    before = store.commits()
    late = replace(CONFIG.infer, rule="cut3r")
    with pytest.raises(AnotherConfiguration):
        infer_segments(url, [0], late, alone=alone)
    assert store.commits() == before


@pytest.fixture
def unseen(tmp_path) -> ReconstructionConfig:
    """With weights that no test before has loaded."""
    weights = tmp_path / "tiny.safetensors"
    info = WeightsInfo("tiny", TINY, "", "Apache-2.0", "random", 12, False)
    save_weights(weights, Model(TINY), info)
    return replace(CONFIG, infer=replace(CONFIG.infer, weights=str(weights), lanes=1))


def failing(error: Exception) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
    ],
)
@pytest.mark.parametrize("place", ["tasks.infer.load_model", "ttt3r.stream.Stream.feed"])
def test_gpu_that_is_taken_or_broken_sets_no_segment_aside(
    tmp_path, monkeypatch, unseen, error, place
):
    video = write_video(tmp_path / "squares.mp4", moving_squares(22))
    monkeypatch.setattr(place, failing(error))
    monkeypatch.setattr("flows.infer_segments.infer_stage", infer_stage.with_options(retries=0))
    with pytest.raises(type(error)):
        reconstruct_drive(str(video), str(tmp_path / "out"), unseen)
    assert read_aside(ReconstructionStore.open(tmp_path / "out" / "squares.zarr")) == {}


def test_segment_without_a_pose_for_each_frame_fails_by_itself(tmp_path, monkeypatch):
    video = write_video(tmp_path / "squares.mp4", moving_squares(22))
    monkeypatch.setattr("flows.infer_segments.infer_stage", infer_stage.with_options(retries=0))
    right, lost = chunk_tensors, []

    def without_one(*arguments: Any) -> dict[str, torch.Tensor]:
        tensors = right(*arguments)
        seen = tensors["descriptor"][0, 2].clone()
        lost[:] = lost or [seen]  # the first segment's; alone it differs by rounding
        if torch.allclose(seen, lost[0], atol=1e-4):
            tensors["cam_to_seg"][0, 2] = torch.nan
        return tensors

    monkeypatch.setattr("tasks.infer.chunk_tensors", without_one)
    url = reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    aside = read_aside(ReconstructionStore.open(url))
    assert list(aside) == [0]
    assert "no finite camera pose of 1 frames of segment 0, the first is frame 2" in str(aside)


def leave_claim_of_the_dead(store: ReconstructionStore, index: int, deaths: int) -> None:
    """What a process leaves that was killed at a segment after `deaths` others were."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    record = {"machine": claims._machine(), "pid": process.pid, "started": "1", "progress": 0}
    name = f"claims/{segment_claim(index)}/000001.json"
    store.folder.write(name, json.dumps({**record, "deaths": deaths}).encode())


def test_segment_that_kills_its_process_again_and_again_is_set_aside(tmp_path, monkeypatch):
    video = write_video(tmp_path / "squares.mp4", moving_squares(22))
    url = reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    store = ReconstructionStore.open(url)
    monkeypatch.setattr("flows.infer_segments.infer_stage", infer_stage.with_options(retries=0))
    right, tried = infer_alone, []

    def alone(url: str, index: int, config: InferConfig) -> Exception | None:
        tried.append(index)
        if index == 1:  # what the segment left when it was tried together is taken over by now
            leave_claim_of_the_dead(store, 1, deaths=4)
        return right(url, index, config)

    monkeypatch.setattr("flows.infer_segments.infer_alone", alone)
    for deaths, expected in ((3, []), (4, [1])):
        for name in ("infer/0000", "infer/0001"):
            store.drop_commits(name)
        leave_claim_of_the_dead(store, 1, deaths)
        reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
        assert list(read_aside(store)) == expected
    assert "died 5 times in a row at chunk 0" in read_aside(store)[1]["reason"]


def test_segment_at_which_the_process_died_alone_waits_for_the_run_after_the_next(tmp_path):
    video = write_video(tmp_path / "squares.mp4", moving_squares(22))
    url = reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    store = ReconstructionStore.open(url)
    store.drop_commits("infer/0001")
    began = {"attempts": 1, "time": "", "reason": "unknown", "is_running": True}
    store.commit(aside_commit(1), began)
    reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    assert read_aside(store)[1]["reason"] == "the process died while it was computed"
    reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    assert read_aside(store) == {}


def test_weights_that_cannot_be_loaded_set_no_segment_aside(tmp_path, monkeypatch, unseen):
    video = write_video(tmp_path / "squares.mp4", moving_squares(22))
    monkeypatch.setattr("tasks.infer.load_model", failing(RuntimeError("CUDA error: no kernel")))
    with pytest.raises(UnfitMachine, match=r"tiny\.safetensors' cannot be loaded: CUDA"):
        reconstruct_drive(str(video), str(tmp_path / "out"), unseen)
    assert read_aside(ReconstructionStore.open(tmp_path / "out" / "squares.zarr")) == {}


def test_worker_without_the_gpu_that_is_asked_for_sets_no_segment_aside(tmp_path):
    video = write_video(tmp_path / "squares.mp4", moving_squares(22))
    url = reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    store = ReconstructionStore.open(url)
    store.drop_commits("infer")
    with pytest.raises(UnfitMachine, match="device is 'cuda:99' and torch sees"):
        infer_segments(url, [0, 1], replace(CONFIG.infer, device="cuda:99"))
    assert read_aside(store) == {}


def test_prefect_server_in_trouble_is_no_fault_of_a_segment(tmp_path, monkeypatch):
    video = write_video(tmp_path / "squares.mp4", moving_squares(10))
    url = reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    store = ReconstructionStore.open(url)
    store.drop_commits("infer")
    error = httpx.ConnectError("All connection attempts failed")

    def no_server(*arguments, **options):
        raise error

    monkeypatch.setattr("flows.infer_segments.infer_stage", no_server)
    with pytest.raises(httpx.ConnectError):
        reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    assert read_aside(store) == {}


@pytest.mark.slow
def test_outage_of_the_recordings_server_sets_no_segment_aside(
    tmp_path, mortal_seaweed: SeaweedProcess, monkeypatch
):
    location, output = f"{mortal_seaweed.access.url}/trip", str(tmp_path / "out")
    fs, path = fsspec.core.url_to_fs(location)
    for name in ("1.mp4", "2.mp4"):
        video = write_video(tmp_path / name, moving_squares(22))
        fs.pipe_file(f"{path}/{name}", video.read_bytes())
    url = reconstruct_drive(location, output, CONFIG)
    store = ReconstructionStore.open(url)
    before = store.read_trajectory()
    indices = [segment.index for segment in read_plan(store).segments]
    for index in indices[1:]:
        for name in store.commit_names(f"infer/{index:04d}"):
            store.drop_commits(name)
    kept = store.commit_names("infer")
    monkeypatch.setattr("flows.infer_segments.infer_stage", infer_stage.with_options(retries=0))
    mortal_seaweed.kill()
    line = rf"^{location}/\d.mp4: the server does not answer; check AWS_ENDPOINT_URL"
    with pytest.raises(StoreUnavailable, match=line):
        infer_segments(url, indices, CONFIG.infer)
    assert read_aside(store) == {}
    assert store.commit_names("infer") == kept != []
    mortal_seaweed.start()
    reconstruct_drive(location, output, CONFIG)
    assert read_aside(store) == {}
    np.testing.assert_array_equal(store.read_trajectory()["cam_to_world"], before["cam_to_world"])


@pytest.mark.slow
def test_outage_of_the_store_between_two_stages_is_waited_for_as_within_one(
    tmp_path, mortal_seaweed: SeaweedProcess, monkeypatch
):
    video = write_video(tmp_path / "squares.mp4", moving_squares(10))
    back = threading.Timer(3, mortal_seaweed.start)  # s3fs gives up after 2 s

    def report_before_an_outage(url: str, location: str) -> None:
        report_stage(url, location)
        mortal_seaweed.kill()
        back.start()

    monkeypatch.setattr("flows.reconstruct_drive.report_stage", report_before_an_outage)
    monkeypatch.setattr("tasks.retries.RETRY_DELAYS_S", [15, 20, 60])
    try:
        url = reconstruct_drive(str(video), f"{mortal_seaweed.access.url}/out", CONFIG)
    finally:
        if back.ident is not None:
            back.join()
    store = ReconstructionStore.open(url)
    assert store.read_commit("finished") is not None
    assert store.read_commit("failed") is None
