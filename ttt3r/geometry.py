"""Camera poses, intrinsics and pointmaps.

Axes are right-down-forward, quaternions wxyz, pixel coordinates whole numbers at pixel centres.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WEISZFELD_STEPS = 10
_PIXELS_AT_ONCE = 1 << 22  # bounds the memory of the focal estimate


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of quaternions wxyz [..., 4] of any length but 0."""
    w, x, y, z = quaternion.unbind(-1)
    s = 2 / quaternion.square().sum(-1)
    rows = (
        1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w),
        s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w),
        s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def camera_pose_to_matrix(camera_pose: Tensor) -> Tensor:
    """Camera poses [..., 7] (translation, quaternion wxyz) as matrices [..., 4, 4].

    Camera to segment: x_seg = T_seg_cam @ x_cam; metres.
    """
    matrix = camera_pose.new_zeros(*camera_pose.shape[:-1], 4, 4)
    matrix[..., :3, :3] = quaternion_to_matrix(camera_pose[..., 3:])
    matrix[..., :3, 3] = camera_pose[..., :3]
    matrix[..., 3, 3] = 1
    return matrix


def principal_point(height: int, width: int, offset: float = 0.0) -> tuple[float, float]:
    """(column, row) of the principal point: (width // 2, height // 2), specification 8.5.

    Args:
        height: pixels, of the network's input.
        width: pixels.
        offset: pixels in either direction from there, as the network was trained
            (`WeightsInfo.principal_offset`).
    """
    return width // 2 + offset, height // 2 + offset


def estimate_focal(pointmap: Tensor, principal_offset: float = 0.0) -> Tensor:
    """Focal length that best explains where points [..., H, W, 3] appear, in pixels [...].

    Robust (Weiszfeld) fit of f in pixel - centre = f · (x/z, y/z), fx = fy (specification 8.5),
    the centre being `principal_point`. Points without a finite x/z and y/z count as (0, 0).
    0 where no point tells the focal length.
    """
    if pointmap.ndim < 3 or pointmap.shape[-1] != 3:
        raise ValueError(f"the pointmap is {tuple(pointmap.shape)}; expected [..., H, W, 3]")
    height, width = pointmap.shape[-3:-1]
    frames = pointmap.reshape(-1, height * width, 3)
    centre = pointmap.new_tensor(principal_point(height, width, principal_offset))
    offsets = _pixel_grid(height, width, pointmap) - centre
    at_once = max(1, _PIXELS_AT_ONCE // (height * width))
    focals = [_weiszfeld(part, offsets.flatten(0, 1)) for part in frames.split(at_once)]
    return torch.cat(focals).reshape(pointmap.shape[:-3]) if focals else frames.new_zeros(0)


def _weiszfeld(points: Tensor, offsets: Tensor) -> Tensor:
    """Focal lengths [N] of points [N, P, 3] seen at `offsets` [P, 2] from the centre."""
    rays = (points[..., :2] / points[..., 2:]).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    along, squared = (rays * offsets).sum(-1), (rays * rays).sum(-1)
    focal = _ratio(along.mean(-1), squared.mean(-1))
    for _ in range(_WEISZFELD_STEPS):
        errors = torch.linalg.vector_norm(offsets - focal[:, None, None] * rays, dim=-1)
        weight = 1 / errors.clamp_min(1e-8)
        focal = _ratio((weight * along).mean(-1), (weight * squared).mean(-1))
    return focal.clamp_min(0)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0."""
    return torch.where(b > 0, a / b.clamp_min(torch.finfo(b.dtype).tiny), torch.zeros_like(a))


def _pixel_grid(height: int, width: int, like: Tensor) -> Tensor:
    """Pixel coordinates (column, row) [H, W, 2]."""
    rows = torch.arange(height, device=like.device, dtype=like.dtype)
    columns = torch.arange(width, device=like.device, dtype=like.dtype)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((x, y), dim=-1)


def intrinsics_from_focal(
    focal: Tensor, height: int, width: int, principal_offset: float = 0.0
) -> Tensor:
    """Pinhole matrices [..., 3, 3] of focal lengths [...], all in pixels (`principal_point`)."""
    matrix = focal.new_zeros(*focal.shape, 3, 3)
    matrix[..., 0, 0] = focal
    matrix[..., 1, 1] = focal
    matrix[..., 0, 2], matrix[..., 1, 2] = principal_point(height, width, principal_offset)
    matrix[..., 2, 2] = 1
    return matrix


def depth_to_pointmap(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """Lift z-depth to 3D points in the camera frame.

    Args:
        depth: [N, H, W] distance along the optical axis, metres.
        intrinsics: [N, 3, 3] pinhole matrix, pixels.

    Returns:
        [N, H, W, 3] points, metres.
    """
    if depth.ndim != 3 or intrinsics.shape != (len(depth), 3, 3):
        raise ValueError(
            f"depth is {tuple(depth.shape)} and intrinsics {tuple(intrinsics.shape)}; expected "
            "[N, H, W] and [N, 3, 3]"
        )
    pixels = _pixel_grid(depth.shape[1], depth.shape[2], depth)
    centre = intrinsics[:, None, None, :2, 2]
    focal = torch.stack((intrinsics[:, 0, 0], intrinsics[:, 1, 1]), dim=-1)[:, None, None]
    rays = (pixels - centre) / focal  # [N, H, W, 2]
    return torch.cat((rays * depth[..., None], depth[..., None]), dim=-1)


def stitch_resets(T_seg_cam: Tensor, reset: Tensor) -> Tensor:
    """Chain the segments of a stream with resets into one trajectory (section 9).

    A reset frame was fed twice, and the second view starts the next segment: that segment is
    placed where the old one saw the reset frame. Scale is taken to be unchanged.

    Args:
        T_seg_cam: [T, 4, 4] camera to segment of the views kept, one a frame
            (`stream.OverlapViews.kept`).
        reset: [T] bool, the stream was reset after this frame.

    Returns:
        [T, 4, 4] camera to first segment.
    """
    if T_seg_cam.shape != (len(reset), 4, 4):
        raise ValueError(
            f"poses are {tuple(T_seg_cam.shape)} and reset {tuple(reset.shape)}; expected "
            "[T, 4, 4] and [T]"
        )
    base = torch.eye(4, dtype=torch.float64, device=T_seg_cam.device)
    stitched = []
    for local, resets in zip(T_seg_cam.double(), reset.tolist(), strict=True):
        stitched.append(base @ local)
        if resets:
            base = stitched[-1]
    return torch.stack(stitched).to(T_seg_cam.dtype)
