"""The main job on the real recordings beside the project; skipped loudly where they are missing."""

from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from flows.reconstruct_collection import reconstruct_collection
from flows.reconstruct_drive import reconstruct_drive
from storage.reconstruction import ReconstructionStore
from tasks.config import FuseConfig, InferConfig, PlanConfig, ReconstructionConfig
from tasks.planned import read_plan

# Long segments and few fused frames: what is tested is the pipeline, not the network.
CONFIG = ReconstructionConfig(
    plan=PlanConfig(segment_frames=64, overlap_frames=8),
    infer=InferConfig(weights="untrained"),
    fuse=FuseConfig(frame_step=10),
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]


def split_at(video: Path, starts: list[int], folder: Path) -> None:
    """Cut a video at key frames into clips, packet by packet: no picture is encoded again."""
    folder.mkdir()
    with av.open(str(video)) as source:
        track = source.streams.video[0]
        packets = [packet for packet in source.demux(track) if packet.size]
        period = packets[0].duration
        bounds = [*starts, len(packets)]
        for number, (start, stop) in enumerate(pairwise(bounds)):
            assert packets[start].is_keyframe
            with av.open(str(folder / f"clip_{number}.mp4"), "w") as target:
                copy = target.add_stream_from_template(track)
                for packet in packets[start:stop]:
                    packet.pts -= start * period
                    packet.dts -= start * period
                    packet.stream = copy
                    target.mux(packet)


def frame_depths(url: str) -> np.ndarray:
    """Depth [N, H, W] of every frame, from the segment that owns it."""
    store = ReconstructionStore.open(url)
    plan = read_plan(store)
    return np.concatenate(
        [
            store.read(segment, "depth", own.start, own.stop)
            for segment, own in zip(plan.segments, plan.owner_ranges(), strict=True)
        ]
    )


def test_three_clips_of_a_drive_give_the_frames_and_the_trajectory_of_the_whole(
    shared_data, tmp_path
):
    video = shared_data / "kitti03_head" / "video.mp4"
    split_at(video, [0, 160, 340], tmp_path / "clips")
    whole = reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG, "whole")
    clips = reconstruct_drive(str(tmp_path / "clips"), str(tmp_path / "out"), CONFIG)
    a, b = ReconstructionStore.open(whole), ReconstructionStore.open(clips)
    assert b.attributes["drive"]["frames"] == 500
    np.testing.assert_allclose(a.read_frames()["timestamp"], b.read_frames()["timestamp"])
    np.testing.assert_array_equal(frame_depths(whole), frame_depths(clips))
    np.testing.assert_array_equal(
        a.read_trajectory()["cam_to_world"], b.read_trajectory()["cam_to_world"]
    )


def test_collection_of_real_drives_ends_and_a_second_run_infers_nothing(shared_data, tmp_path):
    outcomes = reconstruct_collection(str(shared_data / "drives"), str(tmp_path), CONFIG)
    assert len(outcomes) == 7
    stores = {o["name"]: ReconstructionStore.open(o["url"]) for o in outcomes}
    frames = {name: store.attributes["drive"]["frames"] for name, store in stores.items()}
    assert frames["drive_20240315_235912"] == 165  # the recording that was cut off
    parts = stores["drive_20240313_120730"].read_trajectory()["part"]
    assert np.flatnonzero(np.diff(parts)).tolist() == [362, 433]  # the hard cuts
    before = {n: {c: r["commit_id"] for c, r in s.commits().items()} for n, s in stores.items()}
    assert sum(c.startswith("infer/") for commits in before.values() for c in commits) > 40
    reconstruct_collection(str(shared_data / "drives"), str(tmp_path), CONFIG)
    after = {n: {c: r["commit_id"] for c, r in s.commits().items()} for n, s in stores.items()}
    assert after == before
