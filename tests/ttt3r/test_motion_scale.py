import numpy as np
import pytest
import torch

from ttt3r.geometry import depth_to_pointmap
from ttt3r.motion_scale import SCALES, motion_costs, motion_scales
from ttt3r.synthetic import HELD_OUT_SEED, render

FRAMES = 8


def seen(world, seed=0):
    """Images, pointmap, poses and intrinsics of a rendered sequence, exact."""
    made = render(world, [HELD_OUT_SEED + seed], FRAMES, 40, 80, supersample=2)
    depth = torch.where(made.valid, made.depth, 500.0)[0]
    matrices = made.intrinsics.expand(FRAMES, 3, 3)
    return made.images[0], depth_to_pointmap(depth, matrices), made.T_world_cam[0], matrices


def moving(T_seg_cam, factor):
    """The same poses, moved `factor` times as far."""
    scaled = T_seg_cam.clone()
    scaled[:, :3, 3] *= factor
    return scaled


@pytest.mark.parametrize("world", ["streets", "rooms"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_motion_that_is_said_too_long_or_too_short_is_found_out(world, factor):
    images, points, T, matrices = seen(world)
    costs = [motion_costs(images, points, moving(T, factor), matrices).numpy()]
    assert motion_scales(np.array(costs))[0] == pytest.approx(1 / factor, rel=0.12)


def test_each_segment_has_a_scale_of_its_own():
    factors = (0.6, 1.0, 1.4)
    costs = []
    for seed, factor in zip((0, 1, 0), factors, strict=True):
        images, points, T, matrices = seen("streets", seed)
        costs.append(motion_costs(images, points, moving(T, factor), matrices).numpy())
    np.testing.assert_allclose(motion_scales(np.array(costs)) * factors, 1, rtol=0.15)


def test_segments_of_a_network_that_is_right_hardly_differ():
    costs = [motion_costs(*seen("streets", seed)).numpy() for seed in range(20, 30)]
    scales = motion_scales(np.array(costs))
    assert np.log(scales).std() < 0.01
    assert scales.mean() == pytest.approx(1, abs=0.08)


def test_metres_of_depth_do_not_matter_only_those_of_motion_against_them():
    images, points, T, matrices = seen("streets")
    one = motion_costs(images, points, T, matrices)
    other = motion_costs(images, 3 * points, moving(T, 3), matrices)
    np.testing.assert_allclose(one, other, rtol=0.02)


def test_a_camera_that_stands_still_takes_the_scale_of_its_drive_and_alone_none():
    images, points, T, matrices = seen("streets")
    driving = motion_costs(images, points, moving(T, 0.5), matrices).numpy()
    still = motion_costs(
        images[:1].expand(FRAMES, -1, -1, -1),
        points[:1].expand(FRAMES, -1, -1, -1),
        T[:1].expand(FRAMES, -1, -1),
        matrices,
    ).numpy()
    assert np.ptp(still) < 0.05 * np.ptp(driving)
    assert motion_scales(np.array([still]))[0] == pytest.approx(1, abs=0.02)
    of_drive = motion_scales(np.array([driving, still]))
    assert of_drive[1] == pytest.approx(of_drive[0], rel=0.05)


def test_a_single_frame_and_points_that_are_not_finite_tell_nothing():
    images, points, T, matrices = seen("streets")
    assert not motion_costs(images[:1], points[:1], T[:1], matrices[:1]).any()
    holes = points.clone()
    holes[:, ::2] = float("nan")
    costs = motion_costs(images, holes, moving(T, 0.6), matrices).numpy()
    assert motion_scales(np.array([costs]))[0] == pytest.approx(1 / 0.6, rel=0.12)
    nothing = motion_costs(images, torch.full_like(points, float("nan")), T, matrices)
    assert not nothing.any()


def test_larger_pictures_tell_the_same():
    small = motion_costs(*seen("streets"))
    made = render("streets", [HELD_OUT_SEED], FRAMES, 120, 240, supersample=1)
    depth = torch.where(made.valid, made.depth, 500.0)[0]
    matrices = made.intrinsics.expand(FRAMES, 3, 3)
    given = made.images[0], depth_to_pointmap(depth, matrices), made.T_world_cam[0], matrices
    large = motion_costs(*given)
    found = motion_scales(np.array([small.numpy()])), motion_scales(np.array([large.numpy()]))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.1)
    assert len(SCALES) == len(large)
