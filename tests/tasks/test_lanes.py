"""How many lanes run, and what becomes of a drive when they do not fit."""

import os

import numpy as np
import pytest
import torch
from recordings import moving_squares, write_video

from storage.reconstruction import ReconstructionStore
from tasks import lanes as lanes_module
from tasks.config import InferConfig, PlanConfig, ReconstructionConfig
from tasks.frames import DriveInput
from tasks.infer import infer_stage
from tasks.lanes import (
    choose_lanes,
    free_bytes,
    is_out_of_memory,
    left_by_limits,
    settle_for_fewer,
    settled_lanes,
)
from tasks.plan import plan_stage
from tasks.planned import read_plan
from tasks.probe import probe_stage
from ttt3r.stream import Stream
from ttt3r.weights import weights_info

CONFIG = ReconstructionConfig(
    plan=PlanConfig(segment_frames=8, overlap_frames=2, chunk_frames=4),
    infer=InferConfig(weights="untrained"),
)


@pytest.fixture
def planned(tmp_path):
    """Where a planned drive of 44 frames, in seven segments, lies; by the name given."""
    video = write_video(tmp_path / "squares.mp4", moving_squares(44))

    def make(name: str) -> str:
        url = str(tmp_path / f"{name}.zarr")
        probe_stage.fn(str(video), "squares", url)
        plan_stage.fn(url, CONFIG)
        return url

    return make


def test_workers_that_begin_together_take_the_same_lanes(planned, monkeypatch):
    url = planned("drive")
    stores = [ReconstructionStore.open(url) for _ in range(2)]
    info, device = weights_info("untrained"), torch.device("cpu")
    drive = DriveInput.from_store(stores[0], info.config)
    found = {}

    def other_first(*_):
        monkeypatch.setattr(lanes_module, "choose_lanes", lambda *_: 16)
        found["other"] = settled_lanes(stores[1], drive, CONFIG.infer, info, device)
        return 5

    monkeypatch.setattr(lanes_module, "choose_lanes", other_first)
    assert settled_lanes(stores[0], drive, CONFIG.infer, info, device) == found["other"] == 16
    assert settle_for_fewer(stores[0], CONFIG.infer, info, 16) == 8
    assert settle_for_fewer(stores[0], CONFIG.infer, info, 8) == 4
    assert settle_for_fewer(stores[1], CONFIG.infer, info, 16) == 4  # not what was found too many
    assert settled_lanes(stores[1], drive, CONFIG.infer, info, device) == 4


def lanes_of(url: str) -> dict[str, int]:
    commits = ReconstructionStore.open(url).commits("infer")
    return {name: record["lanes"] for name, record in commits.items()}


def stored(url: str) -> dict[str, np.ndarray]:
    store = ReconstructionStore.open(url)
    return {
        f"{segment.index}/{name}": store.read(segment, name, segment.start, segment.stop)
        for segment in read_plan(store).segments
        for name in ("depth", "confidence", "cam_to_seg", "descriptor")
    }


def infer(url: str, config: InferConfig = CONFIG.infer) -> int:
    segments = read_plan(ReconstructionStore.open(url)).segments
    return infer_stage.fn(url, range(len(segments)), config)


@pytest.fixture
def small_memory(monkeypatch):
    """A device that holds so many lanes, and refuses more like the real ones."""
    feed = Stream.feed

    def limit(lanes: int, error: Exception) -> None:
        def limited(self, *arguments, **named):
            if self.lanes > lanes:
                raise error
            return feed(self, *arguments, **named)

        monkeypatch.setattr(Stream, "feed", limited)

    return limit


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_lanes_that_do_not_fit_become_fewer_and_the_drive_is_finished(planned, small_memory, error):
    url = planned("drive")
    small_memory(2, error)
    assert infer(url) == sum(s.frames for s in read_plan(ReconstructionStore.open(url)).segments)
    assert max(lanes_of(url).values()) <= 2
    assert infer(url) == 0


def test_one_lane_that_does_not_fit_is_an_error(planned, small_memory):
    small_memory(0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        infer(planned("drive"))


def test_other_errors_are_not_taken_for_lack_of_memory(planned, small_memory):
    small_memory(0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        infer(planned("drive"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_resumed_drive_takes_the_lanes_of_the_first_run(planned, monkeypatch):
    whole, cut = planned("whole"), planned("cut")
    monkeypatch.setitem(lanes_module.MOST_LANES, "cpu", 3)
    infer(whole)
    infer(cut)
    store = ReconstructionStore.open(cut)
    # What a kill leaves; meanwhile other work takes the memory that the first run found.
    for name in ("infer/0001/0001", "infer/0004", "infer/0005"):
        store.drop_commits(name)
    monkeypatch.setitem(lanes_module.MOST_LANES, "cpu", 1)
    infer(cut)
    assert set(lanes_of(cut).values()) == set(lanes_of(whole).values()) == {3, 1}
    ours, theirs = stored(cut), stored(whole)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_lanes_are_as_many_as_set(planned):
    url = planned("drive")
    infer(url, InferConfig(weights="untrained", lanes=7))
    assert set(lanes_of(url).values()) == {7}


def test_lanes_follow_free_memory(planned, monkeypatch):
    store = ReconstructionStore.open(planned("drive"))
    drive = DriveInput.from_store(store, weights_info("untrained").config)
    host = torch.device("cpu")
    monkeypatch.setitem(lanes_module.MEMORY_SHARE, "cpu", 0.25)
    free = 0.0
    monkeypatch.setattr(lanes_module, "free_bytes", lambda device: int(free))
    assert choose_lanes(drive, host) == 1
    # 4 frames of 80 x 56 pixels are kept on the host; one, of 70 tokens, is in the network.
    lane = 4 * 80 * 56 * 48 + 4 * (70 * 32 * 96 + 80 * 56 * 512)
    for lanes, chosen in ((3.5, 3), (7.0 + 1e-6, 7), (1000, 16)):
        free = lanes * lane / 0.25
        assert choose_lanes(drive, host) == chosen


def test_free_memory_of_the_host_is_what_is_available_within_its_limits(tmp_path, monkeypatch):
    """What the system reports changes while it is read; limits below it are exact."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_bytes(torch.device("cpu")) <= available
    for left in (12345, 67890):
        monkeypatch.setattr(lanes_module, "left_by_limits", lambda mount, own, left=left: [left])
        assert free_bytes(torch.device("cpu")) == left


def test_every_chunk_says_how_long_each_stage_was_busy(planned):
    url = planned("drive")
    infer(url)
    stages = ("decode", "preprocess", "wait", "infer", "stall", "download", "encode", "write")
    for record in ReconstructionStore.open(url).commits("infer").values():
        seconds = {stage: record[f"{stage}_seconds"] for stage in stages}
        assert all(value >= 0 for value in seconds.values())
        assert min(seconds[stage] for stage in ("infer", "encode", "write")) > 0


@pytest.mark.parametrize(
    ("group", "left"), [("", [700]), ("job/pod", [700, 70]), ("job", [700]), ("..", [700])]
)
def test_memory_that_limits_of_control_groups_leave(tmp_path, group, left):
    """A service has its limit below the root, a container at it; cached files can go."""
    mount, own = tmp_path / "cgroup", tmp_path / "own"
    limits = {"": ("1000", "500", "200"), "job": ("max", "90", "0"), "job/pod": ("100", "60", "30")}
    for name, (allowed, used, cached) in limits.items():
        folder = mount / name
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text(f"{allowed}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 9\ninactive_file {cached}\n")
    own.write_text(f"4:memory:/other\n0::/{group}\n")
    assert sorted(left_by_limits(mount, own), reverse=True) == left
    assert left_by_limits(mount / "nothing", own) == []
