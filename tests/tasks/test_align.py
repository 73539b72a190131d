from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from storage.errors import ChunkMissing
from storage.reconstruction import ReconstructionStore
from tasks.align import (
    align_stage,
    blend_poses,
    build_trajectory,
    find_camera,
    fit_seams,
    place_segments,
    read_views,
)
from tasks.config import AlignConfig
from tasks.planned import read_plan
from ttt3r.alignment import AlignSettings
from ttt3r.images import fit, source_intrinsics
from ttt3r.weights import weights_info

STEP_M = 0.15
NO_CHANGE = {0: 1.0, 1: 1.0}  # of the motions of the two segments


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


def test_align_makes_motions_as_large_as_the_pictures_say(corridor_drive):
    corridor_drive.infer_perfectly(said_motion=(0.6, 1.4))
    trajectory = align(corridor_drive).read_trajectory()
    np.testing.assert_allclose(trajectory["motion_scale"], [1 / 0.6, 1 / 1.4], rtol=0.1)
    steps = np.diff(trajectory["cam_to_world"][:, 2, 3]) / trajectory["scale"][0]
    np.testing.assert_allclose(steps, STEP_M, rtol=0.15)


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


@pytest.mark.parametrize("focal_px", [4.2, 2000.0])
def test_align_refuses_focal_lengths_that_no_camera_has(corridor_drive, focal_px):
    corridor_drive.infer_perfectly()
    with pytest.raises(ValueError, match=r"pixels of the recording, not in millimetres"):
        align(corridor_drive, AlignConfig(focal_px=focal_px))


def test_given_focal_length_holds_for_both_axes_of_the_recording(corridor_drive):
    corridor_drive.infer_perfectly()
    store = ReconstructionStore.open(corridor_drive.url)
    store.update_attributes({"drive": {**store.attributes["drive"], "width": 848, "height": 480}})
    views = read_views(store, read_plan(store), NO_CHANGE)
    info = weights_info("untrained")
    camera = find_camera(store, views, AlignConfig(focal_px=500.0), info)
    # To 80 x 45, cut to 80 x 40.
    np.testing.assert_allclose(np.diag(camera.intrinsics), [500 * 80 / 848, 500 * 45 / 480, 1])
    assert camera.estimate_ratio == pytest.approx(50 / (500 * 80 / 848))
    shape = fit(848, 480, info.config.image_size, info.config.patch_size)
    assert (shape.resized_width, shape.resized_height) == (80, 45)
    source = source_intrinsics(camera.intrinsics, shape, 848, 480)
    np.testing.assert_allclose(np.diag(source), [500, 500, 1])


def test_principal_point_is_where_the_network_was_trained_to_have_it(corridor_drive):
    corridor_drive.infer_perfectly()
    store = ReconstructionStore.open(corridor_drive.url)
    views = read_views(store, read_plan(store), NO_CHANGE)
    found = []
    for offset in (0.0, weights_info("compact").principal_offset):
        info = replace(weights_info("untrained"), principal_offset=offset)
        found.append(find_camera(store, views, AlignConfig(), info).intrinsics[:2, 2].tolist())
    assert found == [[40.0, 28.0], [39.5, 27.5]]  # of 80 x 56 pixels


def test_world_is_the_first_camera_of_its_part(corridor_drive):
    corridor_drive.infer_perfectly()
    store = ReconstructionStore.open(corridor_drive.url)
    plan = read_plan(store)
    views, moved = read_views(store, plan, NO_CHANGE), np.eye(4)
    moved[:3, :3] = Rotation.from_euler("xyz", [1, -2, 3], degrees=True).as_matrix()
    moved[:3, 3] = 0.1, -0.2, 0.3
    views[0] = replace(views[0], cam_to_seg=moved @ views[0].cam_to_seg)
    fits = fit_seams(
        store,
        plan,
        find_camera(store, views, AlignConfig(), weights_info("untrained")).intrinsics,
        NO_CHANGE,
        AlignSettings(),
    )
    placements = place_segments(plan, views, fits, 100.0)
    np.testing.assert_allclose(blend_poses(plan, views, placements)[0], np.eye(4), atol=1e-9)


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
