import io
import json
import logging
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from recordings import moving_squares, write_video

from flows.reconstruct_collection import CollectionIncomplete, reconstruct_collection
from flows.reconstruct_drive import reconstruct_drive
from storage import upkeep
from storage.errors import StoreRefused, StoreUnavailable
from storage.reconstruction import ReconstructionStore
from tasks import fuse, infer
from tasks.config import (
    AlignConfig,
    FuseConfig,
    InferConfig,
    PlanConfig,
    ReconstructionConfig,
)
from tasks.helpers import share
from tasks.planned import read_aside, read_plan
from tasks.probe import AnotherDrive

CONFIG = ReconstructionConfig(
    plan=PlanConfig(segment_frames=12, overlap_frames=4, chunk_frames=5),
    infer=InferConfig(weights="untrained", lanes=2, segments_per_task=3),
    fuse=FuseConfig(voxel_m=0.1),  # coarse: the mesh is not what is tested
)

pytestmark = pytest.mark.usefixtures("prefect_server")


@dataclass(frozen=True)
class Finished:
    """A drive that was reconstructed once for all tests of this file, which leave it as it is."""

    video: Path
    url: str
    requests: str  # that were made of the Prefect server

    def copy(self, folder: Path) -> str:
        """Output of a test's own below `folder`, in which the drive is finished."""
        output = folder / "out"
        shutil.copytree(Path(self.url).parent, output)
        return str(output)


@pytest.fixture(scope="module")
def finished(prefect_server, tmp_path_factory) -> Finished:
    """Thirty small frames, and their drive."""
    folder = tmp_path_factory.mktemp("finished")
    video = write_video(folder / "squares.mp4", moving_squares(30))
    log, said = logging.getLogger("httpx"), io.StringIO()
    handler, level = logging.StreamHandler(said), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        url = reconstruct_drive(str(video), str(folder / "out"), CONFIG)
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
    return Finished(video, url, said.getvalue())


def test_helpers_do_what_the_process_alone_would_have_done(finished, tmp_path, monkeypatch):
    # Four segments in two groups; groups of other sizes would round otherwise.
    config = replace(CONFIG, infer=replace(CONFIG.infer, segments_per_task=4))
    lone = reconstruct_drive(str(finished.video), str(tmp_path / "alone"), config)
    shared = []

    def leave_it_to_the_helper(count, here, there, stop, worth, *memory):
        if count == 1:  # is nothing to share
            return share(count, here, there, stop, worth, *memory)
        shared.append(count)
        return share(count, lambda take: 0, there, stop, 2, *memory)

    for stage in (infer, fuse):
        monkeypatch.setattr(stage, "share", leave_it_to_the_helper)
    url = reconstruct_drive(str(finished.video), str(tmp_path / "helped"), config, processes=2)
    assert shared
    assert_equal_bytes(stored(url), stored(lone))
    meshes = [ReconstructionStore.open(u).get_file("fusion/mesh.ply") for u in (url, lone)]
    assert meshes[0] == meshes[1]
    # What the helper did counts with the attempts of this process.
    store = ReconstructionStore.open(url)
    attempts = store.commits("attempts")
    chunks = [r for name, r in store.commits("infer").items() if "attempt" in r]
    assert chunks
    for record in chunks:
        assert attempts[f"attempts/infer-{record['attempt']}"]["cpu_seconds"] > 0


def test_groups_that_come_out_of_order_give_the_same(finished, tmp_path, monkeypatch):
    """As those do that a helper had taken when it died."""
    config = replace(CONFIG, infer=replace(CONFIG.infer, segments_per_task=4))
    lone = reconstruct_drive(str(finished.video), str(tmp_path / "alone"), config)
    orders = []

    def backwards(count, here, there, stop, *limits):
        orders.append(list(range(count))[::-1])
        return [here(partial(next, iter(orders[-1]), None))]

    monkeypatch.setattr(infer, "share", backwards)
    url = reconstruct_drive(str(finished.video), str(tmp_path / "backwards"), config)
    assert [1, 0] in orders
    assert_equal_bytes(stored(url), stored(lone))


def commit_ids(url: str, stage: str = "") -> dict[str, str]:
    """What identifies every commit; what is done again has another."""
    commits = ReconstructionStore.open(url).commits(stage)
    return {name: record["commit_id"] for name, record in commits.items()}


def stored(url: str) -> dict[str, np.ndarray]:
    """Every array that inference and alignment wrote."""
    store = ReconstructionStore.open(url)
    arrays = dict(store.read_trajectory())
    for segment in read_plan(store).segments:
        for name in ("depth", "confidence", "cam_to_seg", "intrinsics", "descriptor", "gate"):
            arrays[f"{segment.index}/{name}"] = store.read(
                segment, name, segment.start, segment.stop
            )
    return arrays


def assert_equal_bytes(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_drive_becomes_poses_depth_states_and_a_report(finished):
    assert finished.url == str(finished.video.parent / "out" / "squares.zarr")
    # Of the Prefect server no slots are asked: on SQLite that costs 2 s, and it may be away.
    assert "/artifacts/" in finished.requests
    assert "/concurrency_limits/" not in finished.requests
    store = ReconstructionStore.open(finished.url)
    trajectory = store.read_trajectory()
    assert trajectory["cam_to_world"].shape == (30, 4, 4)
    assert np.isfinite(trajectory["cam_to_world"]).all()
    plan = read_plan(store)
    segment = plan.segments[0]
    assert np.isfinite(store.read(segment, "depth", 0, 12)).all()
    state = store.read_state(segment, segment.chunks(plan.chunk_frames)[-1])
    assert state["tokens"].ndim == 2
    page = store.get_file("report/report.html").decode()
    assert "UNTRAINED" in page
    assert 'alt="frame"' in page
    assert "<script src=" not in page  # self-contained
    assert upkeep.verify(store) == []


def test_second_run_of_a_finished_drive_computes_nothing(finished, tmp_path):
    url = reconstruct_drive(str(finished.video), finished.copy(tmp_path), CONFIG)
    assert url == str(tmp_path / "out" / "squares.zarr")
    assert commit_ids(url) == commit_ids(finished.url)


def test_new_calibration_redoes_alignment_and_not_inference(finished, tmp_path):
    calibrated = replace(CONFIG, align=AlignConfig(focal_px=50.0))
    url = reconstruct_drive(str(finished.video), finished.copy(tmp_path), calibrated)
    assert commit_ids(url, "infer") == commit_ids(finished.url, "infer")
    aligned = ReconstructionStore.open(finished.url).read_commit("align")
    assert ReconstructionStore.open(url).read_commit("align")["key"] != aligned["key"]


def test_impossible_calibration_is_refused_and_leaves_what_there_is(finished, tmp_path):
    wrong = replace(CONFIG, align=AlignConfig(focal_px=4.2))
    output = finished.copy(tmp_path)
    with pytest.raises(ValueError, match=r"see 165 degrees; expected 5 to 150"):
        reconstruct_drive(str(finished.video), output, wrong)
    assert commit_ids(f"{output}/squares.zarr") == commit_ids(finished.url)  # no failure of it


def test_interrupted_drive_resumes_and_ends_with_the_same_bytes(finished, tmp_path):
    output = finished.copy(tmp_path)
    url = f"{output}/squares.zarr"
    store = ReconstructionStore.open(url)
    # What a kill in the middle leaves: later chunks of two segments never committed.
    for name in ("infer/0001/0001", "infer/0001/0002", "infer/0002", "align", "fuse", "report"):
        store.drop_commits(name)
    kept = commit_ids(url, "infer")
    reconstruct_drive(str(finished.video), output, CONFIG)
    resumed = commit_ids(url, "infer")
    assert {name: resumed[name] for name in kept} == kept
    assert_equal_bytes(stored(url), stored(finished.url))


def test_lanes_change_the_result_by_rounding_only(finished, tmp_path):
    one = replace(CONFIG, infer=replace(CONFIG.infer, lanes=1))
    alone = reconstruct_drive(str(finished.video), str(tmp_path / "out"), one)
    ours, theirs = stored(finished.url), stored(alone)
    for name in (n for n in ours if n.endswith("cam_to_seg")):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4)


def test_clips_of_a_folder_are_one_drive_with_the_frames_of_the_whole(finished, tmp_path):
    frames = moving_squares(30)
    clips = tmp_path / "clips"
    clips.mkdir()
    for i in range(3):
        write_video(clips / f"clip{i}.mp4", frames[10 * i : 10 * i + 10])
    a = ReconstructionStore.open(finished.url)
    b = ReconstructionStore.open(reconstruct_drive(str(clips), str(tmp_path / "out"), CONFIG))
    assert a.attributes["plan"] == b.attributes["plan"]
    np.testing.assert_allclose(a.read_frames()["timestamp"], b.read_frames()["timestamp"])
    assert b.read_frames()["clip"].tolist() == [0] * 10 + [1] * 10 + [2] * 10


def test_collection_finishes_every_drive_and_records_the_one_that_fails(tmp_path):
    logs = tmp_path / "logs"
    for name in ("monday", "tuesday"):
        (logs / name).mkdir(parents=True)
        write_video(logs / name / "front.mp4", moving_squares(14))
    (logs / "broken").mkdir()
    (logs / "broken" / "front.mp4").write_text("not a video")
    with pytest.raises(CollectionIncomplete, match="1 of 3 drives failed: broken"):
        reconstruct_collection(str(logs), str(tmp_path / "out"), CONFIG)
    summary = json.loads((tmp_path / "out" / "collection.json").read_text())
    errors = {drive["name"]: drive["error"] for drive in summary["drives"]}
    assert errors["monday"] is None
    assert errors["tuesday"] is None
    assert "not a video" in errors["broken"]
    broken = ReconstructionStore.open(tmp_path / "out" / "broken.zarr")
    assert "UnreadableVideo" in broken.read_commit("failed")["error"]
    monday = ReconstructionStore.open(tmp_path / "out" / "monday.zarr")
    assert monday.read_commit("report") is not None


def test_every_night_has_a_name_though_the_drive_of_the_night_before_has_gone(tmp_path):
    logs, output = tmp_path / "logs", tmp_path / "out"
    for night, name in (("24", "front"), ("25", "25_front"), ("25", "25_front")):
        if not (logs / night).exists():
            shutil.rmtree(logs, ignore_errors=True)
            (logs / night).mkdir(parents=True)
            write_video(logs / night / "front.mp4", moving_squares(12 + int(night) % 2))
        (outcome,) = reconstruct_collection(str(logs / "*" / "*"), str(output), CONFIG)
        assert (outcome["name"], outcome["error"]) == (name, None)
    assert sorted(p.name for p in output.glob("*.zarr")) == ["25_front.zarr", "front.zarr"]


def test_drive_that_cannot_be_read_at_its_end_stops_no_other(tmp_path, monkeypatch):
    logs = tmp_path / "logs"
    for name in ("monday", "tuesday"):
        (logs / name).mkdir(parents=True)
        write_video(logs / name / "front.mp4", moving_squares(14))

    def away(store):
        if "monday" in store.url:
            raise StoreUnavailable("the server does not answer")
        return read_aside(store)

    monkeypatch.setattr("flows.reconstruct_collection.read_aside", away)
    with pytest.raises(CollectionIncomplete, match="monday: StoreUnavailable: the server does not"):
        reconstruct_collection(str(logs), str(tmp_path / "out"), CONFIG)
    tuesday = ReconstructionStore.open(tmp_path / "out" / "tuesday.zarr")
    assert tuesday.read_commit("report") is not None


def test_drive_on_s3_equals_the_drive_on_disk(finished, tmp_path, seaweed):
    remote = reconstruct_drive(str(finished.video), f"{seaweed.url}/{tmp_path.name}", CONFIG)
    assert remote.startswith("s3://")
    assert_equal_bytes(stored(finished.url), stored(remote))
    names = ReconstructionStore.open(finished.url).list_files()
    assert ReconstructionStore.open(remote).list_files() == names


def test_inputs_are_not_touched_and_only_the_output_is_written(video, tmp_path, monkeypatch):
    for name in ("home", "cwd", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)  # as read from TMPDIR once
    monkeypatch.chdir(tmp_path / "cwd")
    before = video.read_bytes()
    reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    assert video.read_bytes() == before
    elsewhere = [p for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "out")]
    found = sorted(str(p.relative_to(tmp_path)) for p in elsewhere)
    assert found == ["cwd", "home", video.name, "tmp"]
    assert sorted(p.name for p in Path(tmp_path / "out").iterdir()) == ["squares.zarr"]


def test_another_drive_of_the_same_name_is_refused_and_leaves_the_first_as_it_is(
    finished, tmp_path
):
    output = finished.copy(tmp_path)
    store = ReconstructionStore.open(f"{output}/squares.zarr")
    before = store.commits()
    other = write_video(tmp_path / "other.mp4", moving_squares(6))
    with pytest.raises(AnotherDrive, match="holds the drive at"):
        reconstruct_drive(str(other), output, CONFIG, "squares")
    wrong = replace(CONFIG, infer=replace(CONFIG.infer, rule="no-such-rule"))
    with pytest.raises(ValueError, match="no-such-rule"):
        reconstruct_drive(str(finished.video), output, wrong)
    assert store.commits() == before


def test_overlap_too_large_for_the_weights_is_said_before_anything_is_decoded(video, tmp_path):
    config = replace(CONFIG, plan=PlanConfig(overlap_frames=1000))
    with pytest.raises(ValueError, match="overlap_frames is 1000 of segments of"):
        reconstruct_drive(str(video), str(tmp_path / "out"), config)
    assert not (tmp_path / "out").exists()


def test_failure_that_cannot_be_recorded_does_not_hide_the_reason(video, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StoreRefused, match="Not a directory"):
        reconstruct_drive(str(video), str(tmp_path / "out" / "there"), CONFIG)
