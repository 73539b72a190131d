import numpy as np
import pytest

from storage.errors import ChunkMissing
from storage.reconstruction import ReconstructionStore
from tasks.align import align_stage, build_trajectory
from tasks.config import AlignConfig

STEP_M = 0.15


def align(drive, config=AlignConfig(scale_prior_sigma=100.0)):  # noqa: B008 (frozen)
    align_stage.fn(drive.url, config, drive.config.infer)
    return ReconstructionStore.open(drive.url)


def test_align_joins_segments_of_different_units_into_one_straight_path(corridor_drive):
    corridor_drive.infer_perfectly()
    trajectory = align(corridor_drive).read_trajectory()
    position = trajectory["cam_to_world"][:, :3, 3]
    scale = trajectory["scale"]
    # A weak prior leaves the size of the whole free; what is known is the ratio.
    assert scale[1] / scale[0] == pytest.approx(1.25, rel=2e-3)
    steps = np.diff(position[:, 2]) / scale[0]
    np.testing.assert_allclose(steps, STEP_M, rtol=0.02)
    np.testing.assert_allclose(position[:, :2], 0, atol=2e-3)


def test_align_finds_the_focal_length_of_the_recording(corridor_drive):
    corridor_drive.infer_perfectly()
    store = align(corridor_drive)
    trajectory = store.read_trajectory()
    width = 2 * trajectory["intrinsics"][0, 2]
    assert trajectory["intrinsics"][0, 0] == pytest.approx(0.625 * width)
    assert store.read_commit("align")["focal_source"] == "estimated"


def test_align_takes_a_given_focal_length(corridor_drive):
    corridor_drive.infer_perfectly()
    store = align(corridor_drive, AlignConfig(focal_px=44.0))
    assert store.read_trajectory()["intrinsics"][0, 0] == pytest.approx(44.0)
    assert store.read_commit("align")["focal_source"] == "given"


def test_align_takes_and_gives_focal_lengths_in_pixels_of_the_recording(large_corridor_drive):
    large_corridor_drive.infer_perfectly()
    trajectory = align(large_corridor_drive, AlignConfig(focal_px=88.0)).read_trajectory()
    of_depth = [[44, 0, 40], [0, 44, 28], [0, 0, 1]]  # 80 x 56 pixels
    np.testing.assert_allclose(trajectory["intrinsics"], of_depth)
    # Twice as large: pixel 0 of the depth lies between pixels 0 and 1 of the recording.
    of_recording = [[88, 0, 80.5], [0, 88, 56.5], [0, 0, 1]]
    np.testing.assert_allclose(trajectory["intrinsics_source"], of_recording)


def test_align_refuses_segments_that_are_not_inferred(corridor_drive):
    with pytest.raises(ChunkMissing):
        align(corridor_drive)


def test_align_refuses_segments_of_which_one_is_inferred_otherwise(corridor_drive):
    corridor_drive.infer_perfectly()
    corridor_drive.infer_one_chunk_otherwise()
    with pytest.raises(ChunkMissing, match=r"1 of 6 chunks .* first is chunk 1 of segment 1"):
        align(corridor_drive)
    assert ReconstructionStore.open(corridor_drive.url).read_commit("align") is None


def test_align_is_not_committed_if_a_segment_changes_meanwhile(corridor_drive, monkeypatch):
    corridor_drive.infer_perfectly()

    def build_meanwhile(*arguments):
        corridor_drive.infer_one_chunk_otherwise()
        return build_trajectory(*arguments)

    monkeypatch.setattr("tasks.align.build_trajectory", build_meanwhile)
    with pytest.raises(ChunkMissing, match="not inferred as the drive is configured"):
        align(corridor_drive)
    assert ReconstructionStore.open(corridor_drive.url).read_commit("align") is None


def test_align_does_nothing_the_second_time_and_all_again_with_a_new_calibration(corridor_drive):
    corridor_drive.infer_perfectly()
    first = align(corridor_drive).read_commit("align")
    assert align(corridor_drive).read_commit("align") == first
    assert align(corridor_drive, AlignConfig(focal_px=44.0)).read_commit("align") != first
