import numpy as np
import pytest
import torch

from ttt3r.config import TINY
from ttt3r.heads import LinearHead, camera_pose, colour, points_and_confidence


@pytest.fixture(scope="module")
def units(golden):
    arrays = np.load(golden / "units.npz")
    return {n: torch.from_numpy(arrays[n]) for n in arrays.files if n.startswith(("post", "pose"))}


@pytest.mark.parametrize(("suffix", "front_only"), [("", False), ("_posz", True)])
def test_points_and_confidence_agree_with_the_reference(units, suffix, front_only):
    raw = units["post_raw"].movedim(1, -1)
    points, confidence = points_and_confidence(raw, front_only=front_only)
    torch.testing.assert_close(points, units[f"post_pts{suffix}"])
    torch.testing.assert_close(confidence, units[f"post_conf{suffix}"])


def test_colour_agrees_with_the_reference(units):
    found = colour(units["post_raw"].movedim(1, -1)[..., :3])
    torch.testing.assert_close(found, units["post_rgb"])


def test_camera_pose_agrees_with_the_reference(units):
    torch.testing.assert_close(camera_pose(units["pose_raw"]), units["pose_enc"])


def test_points_grow_exponentially_with_the_raw_distance():
    raw = torch.tensor([[0.0, 3.0, 4.0, 0.0], [0.0, 0.0, 0.0, -50.0]])
    points, confidence = points_and_confidence(raw)
    length = np.expm1(5.0)
    expected = torch.tensor([[0.0, 0.6 * length, 0.8 * length], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(points, expected.float())
    torch.testing.assert_close(confidence, torch.tensor([2.0, 1.0]))


def test_points_behind_the_camera_are_mirrored_when_front_only():
    points, _ = points_and_confidence(torch.tensor([1.0, -2.0, -2.0, 0.0]), front_only=True)
    expected = torch.tensor([-1.0, 2.0, 2.0]) * np.expm1(3.0) / 3
    torch.testing.assert_close(points, expected.float())


def test_linear_head_lays_each_token_out_as_its_patch():
    head = LinearHead(TINY)
    layer = head.rgb_proj.fc2
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.arange(3.0 * 64) / 100)  # channel c, row i, column j: 64c + 8i + j
        out = head.rgb([torch.zeros(1, 6, 32)], (2, 3))
    assert out.shape == (1, 16, 24, 3)
    expected = colour(torch.tensor([[64 * c + 8 * 5 + 2 for c in range(3)]]) / 100)
    torch.testing.assert_close(out[0, 8 + 5, 16 + 2], expected[0])
