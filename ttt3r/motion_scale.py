"""How far a camera went, in units of the depth that it saw, told by the pictures.

A recurrent network says depth and motion by different heads, and what it says of motion is off by
a factor of its own in each segment (docs/accuracy.md). Pictures tell it: the points of one frame,
seen from where another frame was taken, have to look as that frame does there.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = tuple(math.exp(0.2 * k) for k in range(-8, 9))  # 0.2 to 5
GAPS = (1, 2, 4)  # frames between those that are compared
_LONG_SIDE = 80  # pixels that pictures are brought to: where they differ by few pixels
_POINTS = 500  # of a frame, evenly over it
_LARGEST_ERROR = 1.5  # of a pixel, in standard deviations of what is around it
_WINDOW = 5  # pixels around one that its brightness is compared with
_FLAT = 0.02  # standard deviation of brightness, of 1, that is noise
_FAR = 3.0  # median depths; what is farther hardly moves
_NEAREST = 0.1  # metres before the camera
_LEAST_SEEN = 0.25  # share of the points that both frames have to see
# What a sum of costs is multiplied by to be a negative log likelihood, and the standard deviations
# of the logarithm of scales: around that of their drive, and of drives around 1. By drives of
# rendered streets with known motion (docs/accuracy.md).
_SHARPNESS = 10.0
_WITHIN_DRIVE = 0.3  # at most
_LEAST_SPREAD = 0.01
_ROUNDS = 30
_OF_DRIVES = 0.5


def motion_costs(images: Tensor, pointmap: Tensor, T_seg_cam: Tensor, intrinsics: Tensor) -> Tensor:
    """Photometric error of a segment's frames, were its motions `SCALES` times as large.

    Brightness without its local mean and contrast, mean absolute difference; after the direct
    methods (Engel, Koltun and Cremers, "Direct sparse odometry", PAMI 2018).

    Args:
        images: [T, H, W, 3] uint8, T consecutive frames.
        pointmap: [T, H, W, 3] in each frame's camera.
        T_seg_cam: [T, 4, 4] camera to segment, in units of the pointmap.
        intrinsics: [T, 3, 3] pinhole matrices, pixels, as each frame sees its own.

    Returns:
        [S] float32, the sum over the pairs that see enough of each other; zeros without a pair.
    """
    height, width = images.shape[1:3]
    shrink = max(1, round(max(height, width) / _LONG_SIDE))
    look = _features(F.avg_pool2d(images.float().mean(dim=-1)[:, None] / 255, shrink))
    stride = max(1, math.ceil(math.sqrt(height * width / _POINTS)))
    at = slice(stride // 2, None, stride)
    points = pointmap[:, at, at].flatten(1, 2).float()  # [T, P, 3]
    points = points.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # behind the nearest: not seen
    # Contiguous: the median of an expanded tensor is what lies in memory by chance (torch 2.13).
    matrix = intrinsics.float().contiguous().median(dim=0).values
    R, centres = T_seg_cam[:, :3, :3].float(), T_seg_cam[:, :3, 3].float()
    scales = torch.tensor(SCALES, device=images.device)
    costs = torch.zeros(len(SCALES), device=images.device)
    for gap in GAPS:
        if gap >= len(images):
            break
        # From the later frame to the earlier one, which sees more if the camera goes ahead.
        R_earlier_seg = R[:-gap].mT
        turned = points[gap:] @ (R_earlier_seg @ R[gap:]).mT
        way = R_earlier_seg @ (centres[gap:] - centres[:-gap])[..., None]  # [N, 3, 1]
        moved = turned[:, None] + (scales * way).mT[:, :, None]  # [N, S, P, 3]
        z = moved[..., 2].clamp(min=_NEAREST)
        x = moved[..., 0] / z * matrix[0, 0] + matrix[0, 2]
        y = moved[..., 1] / z * matrix[1, 1] + matrix[1, 2]
        seen = (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1) & (moved[..., 2] > _NEAREST)
        depth = points[gap:, :, 2]
        near = depth < _FAR * depth.median()
        counted = (seen.all(dim=1) & near).float()  # [N, P]: the same points at all scales
        there = _sample(look[:-gap], x, y, height, width)  # [N, S, P]
        here = _sample(look[gap:], *_own(points[gap:], matrix), height, width)  # [N, 1, P]
        error = ((there - here).abs().clamp(max=_LARGEST_ERROR) * counted[:, None]).sum(dim=-1)
        count = counted.sum(dim=-1)
        enough = count >= _LEAST_SEEN * near.sum(dim=-1).clamp(min=1)
        costs += (error / count.clamp(min=1)[:, None] * enough[:, None]).sum(dim=0)
    return costs


def motion_scales(costs: np.ndarray) -> np.ndarray:
    """What a drive's motions are to be multiplied by, segment by segment: the most probable.

    Where pictures tell little, as of a camera that stands still, it is the drive's; where those of
    all tell little, 1. How much segments differ is taken from what their pictures say beyond their
    noise (expectation maximisation, Dempster, Laird and Rubin 1977): those of a network whose
    motions are right hardly do.

    Args:
        costs: [K, S], of each segment the sum of its `motion_costs`.

    Returns:
        [K] float64.
    """
    scales = np.log(SCALES)
    likelihood = _SHARPNESS * np.asarray(costs, np.float64)
    drive, _ = _lowest(likelihood.sum(axis=0) + scales**2 / (2 * _OF_DRIVES**2))
    found, spread = np.zeros(len(likelihood)), _WITHIN_DRIVE
    for _ in range(_ROUNDS):
        prior = (scales - drive) ** 2 / (2 * spread**2)
        found, variance = np.transpose([_lowest(of_segment + prior) for of_segment in likelihood])
        spread = np.sqrt(np.mean((found - drive) ** 2 + variance))
        spread = float(np.clip(spread, _LEAST_SPREAD, _WITHIN_DRIVE))
    return np.exp(found)


def _lowest(values: np.ndarray) -> tuple[float, float]:
    """Logarithm of the scale where a curve [S] is lowest, by a parabola, and its variance there."""
    scales = np.log(SCALES)
    k = int(np.clip(values.argmin(), 1, len(scales) - 2))
    width = scales[k + 1] - scales[k]
    before, here, after = values[k - 1 : k + 2]
    bend = max(before - 2 * here + after, 1e-12)
    step = float(np.clip(0.5 * (before - after) / bend, -1, 1))
    return float(scales[k] + step * width), float(width**2 / bend)


def _own(points: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Where a frame sees its own points: [N, 1, P] columns and rows."""
    z = points[..., 2].clamp(min=_NEAREST)
    x = points[..., 0] / z * matrix[0, 0] + matrix[0, 2]
    y = points[..., 1] / z * matrix[1, 1] + matrix[1, 2]
    return x[:, None], y[:, None]


def _features(grey: Tensor) -> Tensor:
    """Brightness [N, 1, h, w] without its local mean, in local standard deviations."""
    around = (_WINDOW // 2,) * 4
    detail = grey - F.avg_pool2d(F.pad(grey, around, mode="reflect"), _WINDOW, 1)
    spread = F.avg_pool2d(F.pad(detail * detail, around, mode="reflect"), _WINDOW, 1).sqrt()
    return detail / (spread + _FLAT)


def _sample(look: Tensor, x: Tensor, y: Tensor, height: int, width: int) -> Tensor:
    """Values [N, S, P] of maps [N, 1, h, w] at pixels [N, S, P] of pictures of height x width."""
    places = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    return F.grid_sample(look, places, align_corners=False, padding_mode="border")[:, 0]
