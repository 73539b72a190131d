"""How far a trajectory or a depth map is from the truth, and the files trajectories come in.

Trajectory errors follow evo (APE and RPE) and the KITTI odometry development kit (t_rel, r_rel),
which evo lacks. evo is the reference that the tests compare against, to 1e-9, rather than the
code that runs: it refuses trajectories on a straight line or without motion, which drives have,
and its licence (GPL-3.0) is not the one of this package.

Poses are camera to world, [N, 4, 4] or T_world_cam, axes right-down-forward, metres.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from ttt3r.alignment import AlignmentError, Sim3, umeyama

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

KITTI_LENGTHS_M = (100.0, 200.0, 300.0, 400.0, 500.0, 600.0, 700.0, 800.0)
# The development kit starts a segment at every tenth frame: once a second.
KITTI_STEP_FRAMES = 10
# Files beyond these are not trajectories of drives (a day at 30 Hz is 2.6 million poses).
MAX_POSES = 5_000_000
MAX_LINE_BYTES = 4096


# --- trajectories -------------------------------------------------------------------------------


def evaluate_trajectory(T_est: ArrayLike, T_gt: ArrayLike) -> dict[str, float | int | None]:
    """Errors of an estimated trajectory against the true one, pose by pose.

    Args:
        T_est: [N, 4, 4] estimated camera to world; its world and scale are free.
        T_gt: [N, 4, 4] true camera to world, metres, the same frames.

    Returns:
        ate_none_m, ate_se3_m, ate_sim3_m: root mean square distance of the positions as they
            are, after the best rigid motion, after the best similarity (Umeyama).
        rpe_trans_m, rpe_rot_deg: root mean square error of the motion from each frame to the
            next, after scaling; None for a single pose.
        kitti_t_rel_percent, kitti_r_rel_deg_per_100m: mean drift over all stretches of 100 to
            800 m, after scaling; None for a drive without any stretch of 100 m.
        scale: Umeyama factor that the estimate is multiplied by; None where there is none: fewer
            than 3 poses, or one of the two does not move. ate_sim3_m is then ate_se3_m, and
            the figures above that need a scale take 1.
        distance_m: length of the true path. frames: N.

    Raises:
        ValueError: shapes differ, no poses, or values that are not finite.
    """
    est, gt = _pose_pair(T_est, T_gt)
    similarity = _similarity(est[:, :3, 3], gt[:, :3, 3])
    scale = 1.0 if similarity is None else similarity.scale
    ate_se3 = ate(est, gt, "se3")
    scaled = scale_poses(est, scale)
    trans, rot = relative_pose_errors(scaled, gt)
    t_rel, r_rel = kitti_drift(scaled, gt)
    return {
        "ate_none_m": ate(est, gt, "none"),
        "ate_se3_m": ate_se3,
        "ate_sim3_m": ate_se3 if similarity is None else ate(est, gt, "sim3"),
        "rpe_trans_m": _rms(trans) if len(trans) else None,
        "rpe_rot_deg": _rms(rot) if len(rot) else None,
        "kitti_t_rel_percent": t_rel,
        "kitti_r_rel_deg_per_100m": r_rel,
        "scale": None if similarity is None else scale,
        "distance_m": float(path_lengths(gt)[-1]),
        "frames": len(gt),
    }


def ate(
    T_est: ArrayLike, T_gt: ArrayLike, alignment: Literal["none", "se3", "sim3"] = "sim3"
) -> float:
    """Absolute trajectory error: root mean square distance of the positions, metres.

    Raises:
        AlignmentError: `alignment` is "sim3" and there is no scale (see `evaluate_trajectory`).
    """
    est, gt = (T[:, :3, 3] for T in _pose_pair(T_est, T_gt))
    if alignment == "sim3":
        similarity = _similarity(est, gt)
        if similarity is None:
            raise AlignmentError(
                f"{len(est)} poses give no scale: three are needed, and both trajectories must move"
            )
        est = similarity.apply(est)
    elif alignment == "se3":
        # On a line or in one place the rotation is open, the distances are not.
        est = umeyama(est, gt, with_scale=False, unique=False).apply(est)
    elif alignment != "none":
        raise ValueError(f"alignment is {alignment!r}; expected 'none', 'se3' or 'sim3'")
    return _rms(np.linalg.norm(est - gt, axis=-1))


def relative_pose_errors(T_est: ArrayLike, T_gt: ArrayLike, delta: int = 1) -> tuple[Array, Array]:
    """Error of the motion over `delta` frames, from every frame (evo's RPE with all pairs).

    Returns:
        (translation [N - delta] metres, rotation [N - delta] degrees) of
        (Q_i^-1 Q_j)^-1 (P_i^-1 P_j), Q true and P estimated, j = i + delta. Scale the estimate
        first (`scale_poses`).
    """
    est, gt = _pose_pair(T_est, T_gt)
    if delta < 1:
        raise ValueError(f"delta is {delta} frames; expected 1 or more")
    i, j = np.arange(len(gt) - delta), np.arange(delta, len(gt))
    error = _motion_errors(est, gt, i, j)
    return np.linalg.norm(error[:, :3, 3], axis=-1), np.degrees(_angle(error[:, :3, :3]))


def kitti_drift(
    T_est: ArrayLike,
    T_gt: ArrayLike,
    lengths_m: tuple[float, ...] = KITTI_LENGTHS_M,
    step: int = KITTI_STEP_FRAMES,
) -> tuple[float | None, float | None]:
    """Translation and rotation drift as the KITTI odometry development kit computes them.

    A stretch starts at every `step`-th frame and ends at the first frame that is more than its
    length further along the true path; the error of its motion is divided by its length, and the
    mean is over all stretches of all lengths. Only the scale of the estimate matters.

    Args:
        lengths_m: lengths of the stretches. For drives under 100 m give shorter ones, say
            (10, 20, 50), and name them with the figures: they are not comparable to KITTI's.

    Returns:
        (percent, degrees per 100 m); (None, None) if the drive has no stretch of any length.
    """
    est, gt = _pose_pair(T_est, T_gt)
    distance = path_lengths(gt)
    starts = np.arange(0, len(gt), step)
    trans, rot = [], []
    for length in lengths_m:
        ends = np.searchsorted(distance, distance[starts] + length, side="right")
        fits = ends < len(gt)
        error = _motion_errors(est, gt, starts[fits], ends[fits])
        trans.append(np.linalg.norm(error[:, :3, 3], axis=-1) / length)
        rot.append(np.degrees(_trace_angle(error[:, :3, :3])) / length)
    t, r = np.concatenate(trans), np.concatenate(rot)
    return (100 * float(t.mean()), 100 * float(r.mean())) if len(t) else (None, None)


def path_lengths(T: ArrayLike) -> Array:
    """[N] metres travelled up to each pose; the first is 0."""
    steps = np.linalg.norm(np.diff(_poses("T", T)[:, :3, 3], axis=0), axis=-1)
    return np.concatenate([[0.0], np.cumsum(steps)])


def scale_poses(T: ArrayLike, scale: float) -> Array:
    """[N, 4, 4] with the positions multiplied by `scale`."""
    scaled = _poses("T", T).copy()
    scaled[:, :3, 3] *= scale
    return scaled


def associate(
    timestamps_est: ArrayLike, timestamps_gt: ArrayLike, max_difference_s: float = 0.01
) -> tuple[Indices, Indices]:
    """Pair the poses of two trajectories that were taken at nearly the same time.

    Every timestamp of the shorter list takes the nearest one of the longer (evo does the same);
    where two take the same one, the closer keeps it.

    Args:
        timestamps_est: [N] seconds, not decreasing.
        timestamps_gt: [M] seconds, not decreasing.
        max_difference_s: of a pair, at most.

    Returns:
        (indices into est, indices into gt), of equal length, ascending.

    Raises:
        ValueError: not sorted, not finite, or nothing matches.
    """
    est, gt = _timestamps("est", timestamps_est), _timestamps("gt", timestamps_gt)
    if len(est) > len(gt):
        theirs, ours = associate(gt, est, max_difference_s)
        return ours, theirs
    nearest = _nearest(est, gt)
    apart = np.abs(gt[nearest] - est)
    mine = np.flatnonzero(apart <= max_difference_s)
    # Closest first within each taken timestamp, then the first of each.
    mine = mine[np.lexsort((apart[mine], nearest[mine]))]
    mine = np.sort(mine[np.unique(nearest[mine], return_index=True)[1]])
    if not len(mine):
        raise ValueError(
            f"no timestamps within {max_difference_s} s of each other: one list covers "
            f"{est[0]:.3f}..{est[-1]:.3f} s, the other {gt[0]:.3f}..{gt[-1]:.3f} s, the closest "
            f"are {apart.min():.3f} s apart; shift one of them or allow a larger difference"
        )
    return mine, nearest[mine]


# --- depth --------------------------------------------------------------------------------------


def depth_metrics(
    depth: ArrayLike,
    depth_gt: ArrayLike,
    align: Literal["median", "none"] = "median",
) -> dict[str, float | int | None]:
    """Errors of depth against the truth, over all valid pixels together.

    Args:
        depth: any shape; where the truth is valid but this is not finite and positive, the pixel
            counts as wrong in delta_125 and is left out of abs_rel.
        depth_gt: the same shape, metres; valid where finite and positive.
        align: "median" multiplies `depth` by median(depth_gt) / median(depth) first (one factor
            for everything given: call frame by frame for a factor per frame); "none" does not.

    Returns:
        abs_rel: mean of |depth - depth_gt| / depth_gt.
        delta_125: share of pixels, 0..1, where the two differ by less than a factor of 1.25.
        scale: the factor applied. pixels: evaluated, those without an estimate included.
        abs_rel and scale are None where no pixel has an estimate.

    Raises:
        ValueError: shapes differ, or the truth is valid nowhere.
    """
    if align not in ("median", "none"):
        raise ValueError(f"align is {align!r}; expected 'median' or 'none'")
    d, gt = np.asarray(depth, np.float64), np.asarray(depth_gt, np.float64)
    if d.shape != gt.shape:
        raise ValueError(f"shapes differ: depth {d.shape}, truth {gt.shape}")
    keep = np.isfinite(gt) & (gt > 0)
    if not keep.any():
        raise ValueError(f"none of {gt.size} pixels has a valid true depth")
    d, gt, pixels = d[keep], gt[keep], int(keep.sum())
    known = np.isfinite(d) & (d > 0)
    d, gt = d[known], gt[known]
    if not len(d):
        return {"abs_rel": None, "delta_125": 0.0, "scale": None, "pixels": pixels}
    scale = float(np.median(gt) / np.median(d)) if align == "median" else 1.0
    d = d * scale
    close = np.maximum(d / gt, gt / d) < 1.25
    return {
        "abs_rel": float(np.mean(np.abs(d - gt) / gt)),
        "delta_125": float(close.sum() / pixels),
        "scale": scale,
        "pixels": pixels,
    }


# --- files --------------------------------------------------------------------------------------


def read_tum(path: str | Path) -> tuple[Array, Array]:
    """Read a TUM trajectory: lines of `timestamp tx ty tz qx qy qz qw`; `#` starts a comment.

    Returns:
        (timestamps [N] seconds, T_world_cam [N, 4, 4]), in the order of the file. Quaternions
        are normalised.

    Raises:
        ValueError: naming the file, the line and what it holds.
    """
    rows, lines = _read_rows(Path(path), "timestamp tx ty tz qx qy qz qw", (8,))
    norms = np.linalg.norm(rows[:, 4:], axis=-1)
    if (wrong := np.flatnonzero(np.abs(norms - 1) > 0.01)).size:
        raise ValueError(
            f"{path}, line {lines[wrong[0]]}: the quaternion has length {norms[wrong[0]]:.4g}; "
            "expected 1 (order qx qy qz qw)"
        )
    T = np.tile(np.eye(4), (len(rows), 1, 1))
    T[:, :3, 3] = rows[:, 1:4]
    T[:, :3, :3] = Rotation.from_quat(rows[:, 4:]).as_matrix()
    return rows[:, 0], T


def read_kitti_indexed(path: str | Path) -> tuple[Indices, Array]:
    """Read KITTI poses: lines of 12 numbers, a 3x4 matrix by rows, or 13, the frame number first.

    Returns:
        (frames [N]: 0..N-1 where the file has no numbers, T_world_cam [N, 4, 4] as written).

    Raises:
        ValueError: naming the file, the line and what it holds.
    """
    rows, lines = _read_rows(Path(path), "r11 r12 r13 tx r21 .. tz", (12, 13))
    T = np.tile(np.eye(4), (len(rows), 1, 1))
    T[:, :3] = rows[:, -12:].reshape(-1, 3, 4)
    R = T[:, :3, :3]
    off = np.abs(R @ R.swapaxes(1, 2) - np.eye(3)).max(axis=(1, 2))
    if (wrong := np.flatnonzero((off > 0.01) | (np.linalg.det(R) < 0))).size:
        raise ValueError(
            f"{path}, line {lines[wrong[0]]}: the 3x3 part is not a rotation; expected "
            "r11 r12 r13 tx r21 r22 r23 ty r31 r32 r33 tz"
        )
    if rows.shape[1] == 12:
        return np.arange(len(rows)), T
    if (wrong := np.flatnonzero((rows[:, 0] % 1 != 0) | (rows[:, 0] < 0))).size:
        raise ValueError(
            f"{path}, line {lines[wrong[0]]}: the frame number is {rows[wrong[0], 0]:g}; expected "
            "a whole number from 0"
        )
    return rows[:, 0].astype(np.int64), T


def tum_text(timestamps: ArrayLike, T_world_cam: ArrayLike) -> str:
    """The text of a TUM file: seconds and metres to 1e-9, quaternion qx qy qz qw, qw >= 0."""
    times, T = np.asarray(timestamps, np.float64), _poses("T_world_cam", T_world_cam)
    if times.shape != (len(T),) or not np.isfinite(times).all():
        raise ValueError(f"timestamps are {times.shape}; expected {len(T)} finite seconds")
    quaternions = Rotation.from_matrix(T[:, :3, :3]).as_quat(canonical=True)
    rows = np.column_stack([times, T[:, :3, 3], quaternions])
    form = " ".join(["%.9f"] * 4 + ["%.12f"] * 4)
    return "".join(form % tuple(row) + "\n" for row in rows.tolist())


def kitti_text(T_world_cam: ArrayLike, frames: ArrayLike | None = None) -> str:
    """The text of a KITTI file: one 3x4 matrix a line, by rows; `frames` [N] are numbers before."""
    T = _poses("T_world_cam", T_world_cam)[:, :3].reshape(-1, 12)
    form = " ".join(["%.12e"] * 12)
    lines = [form % tuple(row) for row in T.tolist()]
    if frames is not None:
        lines = [f"{n} {line}" for n, line in zip(np.asarray(frames).tolist(), lines, strict=True)]
    return "".join(f"{line}\n" for line in lines)


def _read_rows(path: Path, form: str, widths: tuple[int, ...]) -> tuple[Array, list[int]]:
    """The numbers of a trajectory file, all lines equally long, and the lines they stand on."""
    rows: list[list[float]] = []
    lines: list[int] = []
    for number, words in _data_lines(path):
        expected = (len(rows[0]),) if rows else widths
        if len(words) not in expected:
            raise ValueError(
                f"{path}, line {number}: {len(words)} numbers; expected "
                f"{' or '.join(map(str, expected))} separated by blanks ({form})"
            )
        rows.append(_finite(path, number, words))
        lines.append(number)
        if len(rows) > MAX_POSES:
            raise ValueError(f"{path} holds more than {MAX_POSES} poses; expected one drive")
    if not rows:
        raise ValueError(f"{path} holds no poses; expected lines of: {form}")
    return np.array(rows), lines


def _data_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and words of the lines that are neither empty nor comments."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes; this is not a "
                    "text file of poses"
                )
            # Bytes that are no text fail as numbers, with their line.
            words = line.decode("utf-8-sig", "backslashreplace").partition("#")[0].split()
            if words:
                yield number, words


def _finite(path: Path, number: int, words: list[str]) -> list[float]:
    values = []
    for word in words:
        try:
            values.append(float(word))
        except ValueError:
            raise ValueError(f"{path}, line {number}: {word[:40]!r} is not a number") from None
        if not np.isfinite(values[-1]):
            raise ValueError(
                f"{path}, line {number}: {word!r}; poses must be finite, leave lost frames out"
            )
    return values


# --- small numerics -----------------------------------------------------------------------------


def _similarity(est: Array, gt: Array) -> Sim3 | None:
    """From estimated to true positions; None where no scale is determined."""
    if len(est) < 3 or not (_moves(est) and _moves(gt)):
        return None
    try:
        return umeyama(est, gt, unique=False)
    except AlignmentError:
        return None


def _moves(positions: Array) -> bool:
    """Whether the spread is more than rounding."""
    spread = np.abs(positions - positions.mean(axis=0)).max()
    return bool(spread > 1e-9 * max(1.0, np.abs(positions).max()))


def _motion_errors(est: Array, gt: Array, i: Indices, j: Indices) -> Array:
    """[M, 4, 4] (Q_i^-1 Q_j)^-1 (P_i^-1 P_j): the identity where the motions agree."""
    return _inverse(_motions(gt, i, j)) @ _motions(est, i, j)


def _trace_angle(R: Array) -> Array:
    """Radians, the development kit's way; reads rounded matrices less well than `_angle`."""
    return np.arccos(np.clip((np.trace(R, axis1=-2, axis2=-1) - 1) / 2, -1, 1))


def _angle(R: Array) -> Array:
    """Radians, by the rotation nearest to R: exact for small angles, as in evo."""
    return np.asarray(Rotation.from_matrix(R).magnitude()) if len(R) else np.zeros(0)


def _motions(T: Array, i: Indices, j: Indices) -> Array:
    return _inverse(T[i]) @ T[j]


def _inverse(T: Array) -> Array:
    """Of rigid poses [M, 4, 4], by the transpose as in evo: files round rotations to six digits."""
    out = np.zeros_like(T)
    out[:, :3, :3] = T[:, :3, :3].swapaxes(1, 2)
    out[:, :3, 3] = -np.einsum("mji,mj->mi", T[:, :3, :3], T[:, :3, 3])
    out[:, 3, 3] = 1.0
    return out


def _nearest(times: Array, of: Array) -> Indices:
    """Index into `of` nearest to each of `times`; the earlier one of a tie."""
    right = np.searchsorted(of, times, side="right").clip(1, max(len(of) - 1, 1))
    left = right - 1
    if len(of) == 1:
        return np.zeros(len(times), np.int64)
    return np.where(of[right] - times < times - of[left], right, left)


def _timestamps(name: str, values: ArrayLike) -> Array:
    times = np.asarray(values, np.float64)
    if times.ndim != 1 or not len(times) or not np.isfinite(times).all():
        raise ValueError(f"timestamps_{name} {times.shape}: expected [N] finite seconds, N > 0")
    if (back := np.flatnonzero(np.diff(times) < 0)).size:
        k = back[0] + 1
        raise ValueError(
            f"timestamps_{name} go back from {times[k - 1]} to {times[k]} s at index {k}; sort "
            "the trajectory by time first"
        )
    return times


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _poses(name: str, T: ArrayLike) -> Array:
    poses = np.asarray(T, np.float64)
    if poses.ndim != 3 or poses.shape[1:] != (4, 4) or not len(poses):
        raise ValueError(f"{name} has shape {poses.shape}; expected [N, 4, 4] with N > 0")
    if not np.isfinite(poses).all():
        frame = int(np.flatnonzero(~np.isfinite(poses).all(axis=(1, 2)))[0])
        raise ValueError(f"{name} is not finite at pose {frame}; leave such frames out")
    return poses


def _pose_pair(T_est: ArrayLike, T_gt: ArrayLike) -> tuple[Array, Array]:
    est, gt = _poses("T_est", T_est), _poses("T_gt", T_gt)
    if est.shape != gt.shape:
        raise ValueError(
            f"{len(est)} estimated and {len(gt)} true poses; pair them first (`associate`)"
        )
    return est, gt
