import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from ttt3r.geometry import (
    camera_pose_to_matrix,
    depth_to_pointmap,
    estimate_focal,
    intrinsics_from_focal,
    quaternion_to_matrix,
    stitch_resets,
)


@pytest.fixture(scope="module")
def units(golden):
    arrays = np.load(golden / "units.npz")
    return {n: torch.from_numpy(arrays[n]) for n in arrays.files if n.startswith(("pose", "focal"))}


def test_camera_pose_to_matrix_agrees_with_the_reference(units):
    torch.testing.assert_close(camera_pose_to_matrix(units["pose_enc"]), units["pose_c2w"])


def test_quaternion_of_a_quarter_turn_about_z_takes_right_to_down():
    half = math.sqrt(0.5)
    rotation = quaternion_to_matrix(torch.tensor([half, 0.0, 0.0, half]))
    torch.testing.assert_close(rotation @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]))


def test_quaternion_need_not_have_unit_length():
    quaternion = torch.tensor([1.0, 2.0, -3.0, 0.5])
    found, expected = quaternion_to_matrix(3 * quaternion), quaternion_to_matrix(quaternion)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found @ found.T, torch.eye(3))


def test_quaternion_to_matrix_agrees_with_scipy_even_at_half_turns():
    torch.manual_seed(0)
    half_turns = torch.eye(4)[1:]  # about x, y, z: w is 0
    quaternions = torch.cat((torch.randn(50, 4), half_turns, torch.eye(4)[:1])).double()
    expected = Rotation.from_quat(quaternions.numpy(), scalar_first=True).as_matrix()
    torch.testing.assert_close(quaternion_to_matrix(quaternions), torch.from_numpy(expected))


def test_estimate_focal_agrees_with_the_reference(units):
    torch.testing.assert_close(estimate_focal(units["focal_pts"]), units["focal"])


def test_estimate_focal_finds_the_focal_length_behind_outliers():
    depth = torch.rand(2, 24, 32) + 1
    intrinsics = intrinsics_from_focal(torch.tensor([30.0, 55.0]), 24, 32)
    points = depth_to_pointmap(depth, intrinsics)
    points[:, ::6, ::5] = torch.tensor([0.2, -0.3, 1.0])  # one in 28 points elsewhere
    points[:, 1, 1] = 0.0  # no direction at all
    found = estimate_focal(points[None])
    assert found.shape == (1, 2)
    torch.testing.assert_close(found[0], torch.tensor([30.0, 55.0]), rtol=0.02, atol=0)


def test_estimate_focal_is_zero_where_nothing_tells_it():
    assert estimate_focal(torch.zeros(4, 6, 3)).item() == 0.0


def test_intrinsics_put_the_principal_point_at_the_halved_size():
    expected = torch.tensor([[50.0, 0.0, 32.0], [0.0, 50.0, 24.0], [0.0, 0.0, 1.0]])
    assert torch.equal(intrinsics_from_focal(torch.tensor(50.0), 49, 64), expected)


def test_focal_length_is_that_about_the_principal_point_of_the_training():
    intrinsics = intrinsics_from_focal(torch.tensor([30.0]), 24, 32, -0.5)
    assert intrinsics[0, :2, 2].tolist() == [15.5, 11.5]
    points = depth_to_pointmap(torch.rand(1, 24, 32) + 1, intrinsics)
    torch.testing.assert_close(estimate_focal(points, -0.5), torch.tensor([30.0]))


def test_depth_to_pointmap_puts_x_right_y_down_z_forward():
    intrinsics = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 4.0, 1.0], [0.0, 0.0, 1.0]]])
    pointmap = depth_to_pointmap(torch.full((1, 3, 3), 4.0), intrinsics)
    torch.testing.assert_close(pointmap[0, 2, 2], torch.tensor([2.0, 1.0, 4.0]))
    torch.testing.assert_close(pointmap[0, 1, 0], torch.tensor([-2.0, 0.0, 4.0]))


def test_depth_to_pointmap_refuses_intrinsics_of_other_frames():
    with pytest.raises(ValueError, match=r"intrinsics \(3, 3\)"):
        depth_to_pointmap(torch.ones(2, 3, 3), torch.eye(3))


def step(x):
    """One camera, `x` metres to the right."""
    T = torch.eye(4)
    T[0, 3] = x
    return T


def test_stitch_resets_places_a_segment_where_the_last_one_saw_its_first_frame():
    turn = torch.tensor([0.0, 0.0, 0.0, math.sqrt(0.5), 0.0, math.sqrt(0.5), 0.0])
    left = camera_pose_to_matrix(turn) @ step(0.0)  # quarter turn about y: x becomes -z
    poses = torch.stack((step(0.0), step(1.0) @ left, step(2.0), step(3.0)))
    found = stitch_resets(poses, torch.tensor([False, True, False, False]))
    expected = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [1.0, 0, -2.0], [1.0, 0, -3.0]])
    torch.testing.assert_close(found[:, :3, 3], expected)


def test_stitch_resets_refuses_flags_of_other_frames():
    with pytest.raises(ValueError, match=r"reset \(2,\)"):
        stitch_resets(torch.eye(4)[None], torch.zeros(2, dtype=torch.bool))
