"""Sim(3) between neighbouring segments from the frames they share, and poses across seams.

Both segments saw the same images, so pixel (f, y, x) of one is exactly pixel (f, y, x) of the
other: correspondences are known and only the geometry is noisy. What each unknown is taken from:

scale
    log(depth_a / depth_b) of the same pixels. It needs no parallax, no pose and no rotation, and
    it is symmetric: the factor from a to b is exactly one over the factor from b to a. The scale
    of a least-squares 3D fit is neither: noise in the source pulls it below the truth at every
    seam, always in the same direction, and a chain of seams multiplies that up.
rotation and translation
    the scale held fixed, one weighted Procrustes problem over the pointmaps and, where camera
    poses are given, over six virtual points around every camera. Where pointmaps are depth lifted
    by those same poses, depth errors enter the points but not the cameras; where pointmaps are
    predicted directly, they hold what the pose head does not know. Both count equally.

Every step is a robust fit: errors grow with depth, so residuals and weights are relative to
depth; Huber weights first, then points beyond a few robust standard deviations do not count.

Everything is float64 NumPy, deterministic and bounded by `AlignSettings.max_points`.
`T_x_y` maps y coordinates to x; a `Sim3` from b to a is x_a = scale * R @ x_b + t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solveh_banded
from scipy.spatial.transform import Rotation

Array = NDArray[np.float64]

# Standard deviation of a normal distribution over its median absolute deviation.
MAD_TO_SIGMA = 1.4826
# Where the first of two robust fits may stop, as `AlignSettings.settled`.
ROUGHLY = 1e-3
# Fields of view outside of this are a failed focal estimate, not a camera.
FIELD_OF_VIEW_DEG = (5.0, 150.0)
LEAST_SPREAD = 1e-3  # of the log scales of segments


class AlignmentError(ValueError):
    """The data do not determine the transformation."""


@dataclass(frozen=True, eq=False)
class Sim3:
    """Similarity transformation x -> scale * R @ x + t.

    Attributes:
        scale: factor, finite and positive.
        R: [3, 3] rotation.
        t: [3] translation, in units of the target frame.
    """

    scale: float
    R: Array
    t: Array

    def __post_init__(self) -> None:
        R, t = np.array(self.R, np.float64), np.array(self.t, np.float64)
        if R.shape != (3, 3) or t.shape != (3,):
            raise ValueError(f"R has shape {R.shape} and t {t.shape}; expected (3, 3) and (3,)")
        if not (np.isfinite(self.scale) and self.scale > 0 and np.isfinite(t).all()):
            raise ValueError(f"scale {self.scale}, t {t}: expected a positive scale, finite t")
        # Written so that NaN fails too.
        if not (np.abs(R @ R.T - np.eye(3)).max() < 1e-5 and np.linalg.det(R) > 0):
            raise ValueError(f"R is not a rotation, it may contain a scale or a reflection: {R}")
        for name, value in (("scale", float(self.scale)), ("R", R), ("t", t)):
            object.__setattr__(self, name, value)

    def apply(self, points: ArrayLike) -> Array:
        """Map points [..., 3]."""
        return self.scale * np.asarray(points, np.float64) @ self.R.T + self.t

    def apply_pose(self, T: ArrayLike) -> Array:
        """Map camera-to-frame poses [..., 4, 4]; their rotations stay orthonormal.

        Depths seen by these cameras have to be multiplied by `scale`.
        """
        poses = _poses("T", T)
        out = np.zeros_like(poses)
        out[..., :3, :3] = self.R @ poses[..., :3, :3]
        out[..., :3, 3] = self.apply(poses[..., :3, 3])
        out[..., 3, 3] = 1.0
        return out

    def matrix(self) -> Array:
        """[4, 4] homogeneous matrix; its upper left block is scale * R."""
        out = np.eye(4)
        out[:3, :3], out[:3, 3] = self.scale * self.R, self.t
        return out

    def compose(self, other: Sim3) -> Sim3:
        """`self` after `other`: T_a_b.compose(T_b_c) is T_a_c."""
        return Sim3(self.scale * other.scale, _orthonormal(self.R @ other.R), self.apply(other.t))


@dataclass(frozen=True)
class AlignSettings:
    """How overlaps are aligned; lengths are relative to depth.

    Attributes:
        max_points: points used at most, spread evenly over frames and pixels.
        min_points: fewer valid points than this do not count as an overlap of pointmaps.
        iterations: re-weighted fits at most.
        huber_sigmas: residuals above this many robust standard deviations weigh less.
        settled: fits are repeated until they move by less: radians, log scale, share of depth.
        cutoff_sigmas: in the last fits, residuals above this many do not count.
        noise_floor: residuals below this are never outliers.
        confidence_cap: a confidence counts at most this many times the median one.
        pose_share: share of the cameras in the rotation and translation, in [0, 1).
        scale_prior_sigma: standard deviation of the log of one segment's scale around metric, at
            most: where seams say that segments differ less, they do (see `balance_scales`).
    """

    max_points: int = 8_000
    min_points: int = 100
    iterations: int = 30
    settled: float = 1e-5
    huber_sigmas: float = 1.345
    cutoff_sigmas: float = 4.0
    noise_floor: float = 1e-3
    confidence_cap: float = 5.0
    pose_share: float = 0.5
    scale_prior_sigma: float = 0.3

    def __post_init__(self) -> None:
        positive = ("max_points", "min_points", "iterations", "huber_sigmas", "cutoff_sigmas")
        for name in (*positive, "settled", "noise_floor", "confidence_cap", "scale_prior_sigma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        if not 0 <= self.pose_share < 1:
            raise ValueError(f"pose_share is {self.pose_share}; expected 0 <= pose_share < 1")
        if self.min_points > self.max_points:
            raise ValueError(f"min_points {self.min_points} exceeds max_points {self.max_points}")


@dataclass(frozen=True, eq=False)
class OverlapFit:
    """How segment b lies in the frame of segment a, and how well that is known.

    Attributes:
        sim3: T_a_b with scale.
        scale_sigma: standard error of log(scale); that of the prior where nothing measured it.
        residual: median distance of the points after the fit, relative to depth; None without
            points.
        inlier_share: share of the points that count in the end, 0..1; None without points.
        points: points used.
        frames: frames that contributed.
        method: "points", or "poses" where there were too few valid points and the camera poses
            alone placed the segment (scale taken from the prior, that is 1).
        pivot: [3] middle of the overlap's cameras (of its points, where no poses were given), in
            the frame of b: what stays in place when the scale is changed later.
    """

    sim3: Sim3
    scale_sigma: float
    residual: float | None
    inlier_share: float | None
    points: int
    frames: int
    method: Literal["points", "poses"]
    pivot: Array

    @property
    def scale(self) -> float:
        """Factor from units of b to units of a."""
        return self.sim3.scale

    def rescaled(self, scale: float) -> Sim3:
        """The same transformation with another scale, the overlap kept in place."""
        R, fixed = self.sim3.R, self.sim3.apply(self.pivot)
        return Sim3(scale, R, fixed - scale * R @ self.pivot)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for a commit record or a report."""
        return {
            "scale": self.scale,
            "rotation_quaternion_wxyz": _quaternion_wxyz(self.sim3.R),
            "translation": self.sim3.t.tolist(),
            "scale_sigma": self.scale_sigma,
            "residual": self.residual,
            "inlier_share": self.inlier_share,
            "points": self.points,
            "frames": self.frames,
            "method": self.method,
        }


def umeyama(
    src: ArrayLike,
    dst: ArrayLike,
    weights: ArrayLike | None = None,
    with_scale: bool = True,
    *,
    unique: bool = True,
) -> Sim3:
    """Least-squares similarity from `src` to `dst`.

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns",
    PAMI 1991, equations 34 to 43, with weights.

    Args:
        src: [N, 3] points.
        dst: [N, 3] the same points in the target frame.
        weights: [N] non-negative; equal if None.
        with_scale: estimate the scale; otherwise it is 1.
        unique: refuse points that leave a rotation open; otherwise any of the best ones is
            returned, which is all that distances between the points need.

    Raises:
        AlignmentError: `unique` and all points are on one line or in one place; or `with_scale`
            and the points of one side are in one place.
        ValueError: shapes differ, or values are not finite.
    """
    x, y, w = _checked_points(src, dst, weights)
    mean_x, mean_y, covariance = _moments(x, y, w)
    R, d, signs = _rotation(covariance, len(x), unique=unique)
    spread_x = float(w @ ((x - mean_x) ** 2).sum(axis=-1))
    scale = 1.0
    if with_scale:
        if not (d @ signs > 0 and spread_x > 0):
            raise AlignmentError(f"{len(x)} points do not spread; a scale needs two places")
        scale = float(d @ signs / spread_x)
    return Sim3(scale, R, mean_y - scale * R @ mean_x)


def align_overlap(
    pointmap_a: ArrayLike,
    pointmap_b: ArrayLike,
    depth_a: ArrayLike,
    confidence_a: ArrayLike,
    confidence_b: ArrayLike,
    settings: AlignSettings | None = None,
    *,
    depth_b: ArrayLike | None = None,
    T_a_cam: ArrayLike | None = None,
    T_b_cam: ArrayLike | None = None,
) -> OverlapFit:
    """Place segment b in the frame of segment a, from the frames that both contain.

    A pixel counts where both points, both depths and both confidences are finite and the depths
    and confidences are positive. Where fewer than `min_points` do, the camera poses alone decide.

    Args:
        pointmap_a, pointmap_b: [F, H, W, 3] the same frames, each in its own segment's frame.
        depth_a, depth_b: [F, H, W] z-depth, in units of their own segments; without `depth_b` it
            is taken from `pointmap_b` and `T_b_cam`.
        confidence_a, confidence_b: [F, H, W], inversely proportional to the expected error.
        settings: defaults if None.
        T_a_cam, T_b_cam: [F, 4, 4] camera to segment; both or neither.

    Raises:
        AlignmentError: no frames, or too few valid points and no poses to fall back on, or points
            that do not determine the rotation.
        ValueError: shapes do not fit together, or neither `depth_b` nor poses are given.
    """
    settings = settings or AlignSettings()
    poses_a, poses_b = _pose_pair(T_a_cam, T_b_cam)
    maps = [np.asarray(pointmap_a), np.asarray(pointmap_b)]
    z_b = _camera_depth(maps[1], poses_b) if depth_b is None else np.asarray(depth_b)
    planes = [np.asarray(depth_a), z_b, np.asarray(confidence_a), np.asarray(confidence_b)]
    _check_shapes(maps, planes, poses_a)
    pixels = _pick_pixels(maps, planes, settings)
    if len(pixels.frame) < settings.min_points:
        return _align_by_poses(poses_a, poses_b, len(pixels.frame), settings)
    log_scale, scale_sigma = _log_scale(pixels, settings)
    return _align_rigidly(pixels, poses_a, poses_b, np.exp(log_scale), scale_sigma, settings)


def chain(relative: Sequence[Sim3], first_scale: float = 1.0) -> list[Sim3]:
    """Segment-to-world transformations from those between neighbours.

    Args:
        relative: n - 1 of them; number i maps segment i + 1 to segment i.
        first_scale: scale of the first segment in the world (see `balance_scales`).

    Returns:
        n: the world is the frame of the first segment, times `first_scale`.
    """
    chained = [Sim3(first_scale, np.eye(3), np.zeros(3))]
    for step in relative:
        chained.append(chained[-1].compose(step))
    return chained


def balance_scales(
    fits: Sequence[OverlapFit], prior_sigma: float | None = None
) -> tuple[list[Sim3], float]:
    """Weigh the measured scale of every seam against all segments being metric by themselves.

    Chained scales do a random walk, and drift where seams err alike; the model's own metric scale
    is worse in one segment but does not drift. The most probable log scales x of the segments
    minimise sum ((x[i+1] - x[i] - log scale[i]) / scale_sigma[i])^2 + sum (x[i] / sigma)^2.
    What all segments share shows at no seam; sigma is how much they differ, as the seams say:
    between segments that differ independently, log scales have sqrt(2) sigma. The seams' own errors
    are in that, so that it is rather too large.

    Args:
        fits: of neighbouring segments, in order.
        prior_sigma: the most that sigma is; `AlignSettings.scale_prior_sigma` if None.

    Returns:
        The transformations with balanced scales and the scale of the first segment: what `chain`
        takes.
    """
    if not fits:
        return [], 1.0
    measured = np.log([fit.scale for fit in fits])
    prior_sigma = min(prior_sigma or AlignSettings().scale_prior_sigma, _spread(fits))
    # A seam is never known better than this; it also keeps the system well conditioned.
    precision = 1.0 / np.maximum([fit.scale_sigma for fit in fits], 1e-4) ** 2
    pulls = precision * measured
    diagonal = np.append(precision, 0.0) + np.append(0.0, precision) + prior_sigma**-2
    right = np.append(0.0, pulls) - np.append(pulls, 0.0)
    x = solveh_banded(np.stack([np.append(0.0, -precision), diagonal]), right)
    return [f.rescaled(float(s)) for f, s in zip(fits, np.exp(np.diff(x)), strict=True)], float(
        np.exp(x[0])
    )


def _spread(fits: Sequence[OverlapFit]) -> float:
    """Standard deviation of the log scales of segments; infinite where no seam measured any."""
    measured = [np.log(fit.scale) for fit in fits if fit.method == "points"]
    if not measured:
        return np.inf
    return max(float(np.sqrt(np.mean(np.square(measured)) / 2.0)), LEAST_SPREAD)


def blend_seam(T_a: ArrayLike, T_b: ArrayLike) -> Array:
    """Poses of the overlap frames, going over from segment a to segment b without a jump.

    Args:
        T_a, T_b: [F, 4, 4] the same cameras according to a and b, both in one common frame.

    Returns:
        [F, 4, 4]: a at the first frame, b at the last (half and half if there is only one).
    """
    a, b = _poses("T_a", T_a), _poses("T_b", T_b)
    if a.ndim != 3 or a.shape != b.shape:
        raise ValueError(f"T_a is {a.shape}, T_b {b.shape}; expected [F, 4, 4] of one length")
    position = np.linspace(0.0, 1.0, len(a)) if len(a) != 1 else np.array([0.5])
    # Smoothstep: the velocity is continuous too.
    return interpolate(a, b, position**2 * (3.0 - 2.0 * position))


def interpolate(T_a: ArrayLike, T_b: ArrayLike, weight: ArrayLike) -> Array:
    """Poses between `T_a` (weight 0) and `T_b` (weight 1), along the shorter rotation.

    Args:
        T_a, T_b: [F, 4, 4].
        weight: [F] in [0, 1].

    Returns:
        [F, 4, 4] valid rigid poses: straight in translation, slerp in rotation.
    """
    a, b = _poses("T_a", T_a), _poses("T_b", T_b)
    w = np.broadcast_to(np.asarray(weight, np.float64), a.shape[:-2])[..., None]
    if not ((w >= 0) & (w <= 1)).all():
        raise ValueError(f"weights range over {w.min()}..{w.max()}; expected them within 0..1")
    out = np.zeros_like(a)
    out[..., 3, 3] = 1.0
    if len(a):
        start = Rotation.from_matrix(a[..., :3, :3])
        # The rotation vector is at most half a turn long, whatever the sign of a quaternion.
        turn = (start.inv() * Rotation.from_matrix(b[..., :3, :3])).as_rotvec()
        out[..., :3, :3] = (start * Rotation.from_rotvec(w * turn)).as_matrix()
        out[..., :3, 3] = (1.0 - w) * a[..., :3, 3] + w * b[..., :3, 3]
    return out


def drive_intrinsics(focals: ArrayLike, height: int, width: int) -> tuple[float, float]:
    """One focal length for a whole drive: the camera does not change, the estimates do.

    Args:
        focals: [N] pixels; values that are not finite, or mean a field of view over the longer
            side outside of 5 to 150 degrees, are left out.
        height, width: pixels of the image that the focal lengths are for.

    Returns:
        (focal_px, spread): the median in the log, and the robust standard deviation of
        the estimates around it, relative (0.05 is five percent).

    Raises:
        AlignmentError: no plausible focal length.
    """
    f = np.asarray(focals, np.float64).ravel()
    widest, narrowest = (
        0.5 * max(height, width) / np.tan(np.radians(angle) / 2)
        for angle in reversed(FIELD_OF_VIEW_DEG)
    )
    kept = f[(f >= widest) & (f <= narrowest)]
    if not len(kept):
        raise AlignmentError(
            f"none of {len(f)} focal lengths is between {widest:.0f} and {narrowest:.0f} px "
            f"(image {width}x{height}); give the camera's intrinsics instead"
        )
    centre, sigma = _median_and_sigma(np.log(kept), np.ones_like(kept))
    return float(np.exp(centre)), float(sigma)


# --- points -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Pixels:
    """The chosen pixels of an overlap: one row each."""

    frame: NDArray[np.int64]  # [N]
    a: Array  # [N, 3]
    b: Array  # [N, 3]
    depth_a: Array  # [N]
    depth_b: Array  # [N]
    confidence: Array  # [N] weight, without depth


def _camera_depth(pointmap: NDArray[Any], T_seg_cam: Array | None) -> Array:
    """[F, H, W] distance of points in a segment's frame along the optical axes of its cameras."""
    if T_seg_cam is None:
        raise ValueError(
            "neither depth_b nor camera poses are given; the scale is measured as depth_a / depth_b"
        )
    if pointmap.ndim != 4 or len(pointmap) != len(T_seg_cam):
        raise ValueError(f"pointmap_b is {pointmap.shape} for {len(T_seg_cam)} camera poses")
    centred = pointmap.astype(np.float64) - T_seg_cam[:, None, None, :3, 3]
    with np.errstate(invalid="ignore"):  # inf - inf; left out as invalid later
        return np.einsum("fhwi,fi->fhw", centred, T_seg_cam[:, :3, 2])


def _pick_pixels(
    maps: list[NDArray[Any]], planes: list[NDArray[Any]], settings: AlignSettings
) -> _Pixels:
    """Pixels that are valid everywhere, evenly over frames, at most `max_points`."""
    frames = len(planes[0])
    rows = [_even_rows(maps, planes, f, settings.max_points // frames) for f in range(frames)]
    index = np.repeat(np.arange(frames), [len(r) for r in rows])
    pixel = np.concatenate(rows)

    def pick(values: NDArray[Any]) -> Array:
        flat = values.reshape(frames, -1, *values.shape[3:])
        return flat[index, pixel].astype(np.float64)

    z_a, z_b, c_a, c_b = (pick(v) for v in planes)
    weight = _confidence_weight(c_a, c_b, settings.confidence_cap)
    return _Pixels(index, pick(maps[0]), pick(maps[1]), z_a, z_b, weight)


def _check_shapes(
    maps: list[NDArray[Any]], planes: list[NDArray[Any]], poses: Array | None
) -> None:
    shape = planes[0].shape
    if len(shape) != 3 or any(p.shape != shape for p in planes):
        raise ValueError(
            f"depths and confidences have shapes {[p.shape for p in planes]}; expected the same "
            "[F, H, W] for all"
        )
    if any(m.shape != (*shape, 3) for m in maps):
        raise ValueError(f"pointmaps are {[m.shape for m in maps]}; expected {(*shape, 3)}")
    if poses is not None and len(poses) != len(planes[0]):
        raise ValueError(f"{len(poses)} camera poses for {len(planes[0])} overlap frames")
    if shape[0] == 0:
        raise AlignmentError("the segments share no frames; there is nothing to align them by")


def _even_rows(
    maps: list[NDArray[Any]], planes: list[NDArray[Any]], frame: int, most: int
) -> NDArray[np.int64]:
    """At most `most` valid pixels of a frame, evenly over the valid ones: no randomness."""
    valid = np.ones(planes[0].shape[1:], bool)
    for plane in planes:
        valid &= np.isfinite(plane[frame]) & (plane[frame] > 0)
    for pointmap in maps:
        valid &= np.isfinite(pointmap[frame]).all(-1)
    rows = np.flatnonzero(valid)
    most = max(most, 1)
    if len(rows) <= most:
        return rows
    return rows[((np.arange(most) + 0.5) * (len(rows) / most)).astype(np.int64)]


def _confidence_weight(c_a: Array, c_b: Array, cap: float) -> Array:
    """Inverse variance of the difference of two points, up to a factor.

    The confidence loss c * error - alpha * log(c) is least at c = alpha / error, so the variances
    are c_a^-2 and c_b^-2. An exponential activation has a long tail: the cap keeps a few pixels
    from being the whole fit.
    """
    if not len(c_a):
        return c_a
    c = 1.0 / np.hypot(1.0 / c_a, 1.0 / c_b)
    return np.minimum(c / np.median(c), cap) ** 2


# --- scale --------------------------------------------------------------------------------------


def _log_scale(pixels: _Pixels, settings: AlignSettings) -> tuple[float, float]:
    """log(units of a per unit of b) and its standard error.

    All frames of an overlap lie at the end of one segment and at the start of the other, so that
    pixels and frames err together and their number says little. Measured on rendered streets, the
    error of a seam is as large as the scatter of its pixels, for seams of small and of large
    scatter alike (docs/accuracy.md). Frames that scatter more than their pixels count, too.
    """
    ratios = np.log(pixels.depth_a / pixels.depth_b)
    centre, scatter = _robust_mean(ratios, pixels.confidence, settings)
    rows = [pixels.frame == frame for frame in np.unique(pixels.frame)]
    medians = np.array([_weighted_median(ratios[m], pixels.confidence[m]) for m in rows])
    return centre, max(scatter, _median_and_sigma(medians, np.ones(len(medians)))[1])


def _robust_mean(values: Array, weights: Array, settings: AlignSettings) -> tuple[float, float]:
    """Weighted biweight location and robust standard deviation, symmetric in sign.

    The median alone moves by half a standard deviation when 30 % of the values are wrong in the
    same direction; the biweight forgets values that lie far out.
    """
    centre, sigma = _median_and_sigma(values, weights)
    for _ in range(settings.iterations):
        far = np.abs(values - centre) / max(settings.cutoff_sigmas * sigma, 1e-12)
        w = weights * np.maximum(1.0 - far**2, 0.0) ** 2
        moved = float(w @ values / w.sum())
        sigma = _median_and_sigma(values, (far < 1) * weights, moved)[1]
        settled = abs(moved - centre) <= settings.settled
        centre = moved
        if settled:
            break
    return centre, sigma


# --- rotation and translation -------------------------------------------------------------------


def _align_rigidly(
    pixels: _Pixels,
    T_a_cam: Array | None,
    T_b_cam: Array | None,
    scale: float,
    scale_sigma: float,
    settings: AlignSettings,
) -> OverlapFit:
    # The geometric mean, so that noise in one depth favours neither of the two.
    depth = np.sqrt(pixels.depth_a * scale * pixels.depth_b)
    share = settings.pose_share if T_a_cam is not None else 0.0
    groups = [_Group(scale * pixels.b, pixels.a, depth, pixels.confidence, 1.0 - share)]
    if T_a_cam is not None and T_b_cam is not None:
        groups.append(_camera_group(T_a_cam, T_b_cam, scale, float(np.median(depth)), share))
        pivot = T_b_cam[:, :3, 3].mean(axis=0)
    rigid, inliers = _fit_groups(groups, settings)
    sim3 = Sim3(scale, rigid.R, rigid.t)
    if T_b_cam is None:
        pivot = np.average(pixels.b, axis=0, weights=inliers * groups[0].precision)
    return OverlapFit(
        sim3=sim3,
        scale_sigma=scale_sigma,
        residual=float(np.median(groups[0].residuals(rigid.R, rigid.t))),
        inlier_share=float(inliers.mean()),
        points=len(inliers),
        frames=len(np.unique(pixels.frame)),
        method="points",
        pivot=pivot,
    )


@dataclass(frozen=True, eq=False)
class _Group:
    """Correspondences with a common noise level and a fixed share of the fit."""

    src: Array  # [N, 3] scaled to units of dst
    dst: Array  # [N, 3]
    depth: Array  # [N] that errors are proportional to
    confidence: Array  # [N]
    share: float

    @property
    def precision(self) -> Array:
        return self.confidence / self.depth**2

    def residuals(self, R: Array, t: Array) -> Array:
        off = self.src @ R.T + (t - self.dst)
        return np.sqrt(np.einsum("ni,ni->n", off, off)) / self.depth


def _camera_group(
    T_a_cam: Array, T_b_cam: Array, scale: float, depth: float, share: float
) -> _Group:
    """Six points around each camera, at the scene's depth: position and orientation as points."""
    offsets = depth * np.concatenate([np.eye(3), -np.eye(3)])
    dst = offsets @ T_a_cam[:, :3, :3].swapaxes(1, 2) + T_a_cam[:, None, :3, 3]
    src = offsets @ T_b_cam[:, :3, :3].swapaxes(1, 2) + scale * T_b_cam[:, None, :3, 3]
    count = 6 * len(T_a_cam)
    return _Group(
        src.reshape(-1, 3), dst.reshape(-1, 3), np.full(count, depth), np.ones(count), share
    )


def _fit_groups(groups: list[_Group], settings: AlignSettings) -> tuple[Sim3, Array]:
    """Re-weighted rigid fits until nothing moves; also which points of group 0 count (0 or 1).

    Huber's weights alone first, which find the optimum from anywhere; then what is far off from
    there is left out.
    """
    src, dst = (np.concatenate([getattr(g, name) for g in groups]) for name in ("src", "dst"))
    _checked_points(src, dst, None)
    nearest = min(float(np.min(group.depth)) for group in groups)
    factors = [np.ones(len(g.src)) for g in groups]
    R, t = _rigid(src, dst, _shared_weights(groups, factors))
    for cutoff, settled in ((np.inf, ROUGHLY), (settings.cutoff_sigmas, settings.settled)):
        for _ in range(settings.iterations // 2 + 1):
            before = R, t
            factors = [
                _robust_factors(g.residuals(R, t), g.confidence, cutoff, settings) for g in groups
            ]
            R, t = _rigid(src, dst, _shared_weights(groups, factors))
            turned, moved = np.abs(R - before[0]).max(), np.abs(t - before[1]).max()
            if turned <= settled and moved <= settled * nearest:
                break
    return Sim3(1.0, R, t), (factors[0] > 0).astype(np.float64)


def _shared_weights(groups: list[_Group], factors: list[Array]) -> Array:
    """Each group's weights add up to its share."""
    weights = [g.precision * f for g, f in zip(groups, factors, strict=True)]
    return np.concatenate([g.share * w / w.sum() for g, w in zip(groups, weights, strict=True)])


def _robust_factors(
    residuals: Array, confidence: Array, cutoff_sigmas: float, settings: AlignSettings
) -> Array:
    """Huber's weights [N] of residuals; 0 beyond the cutoff."""
    # The length of a 3D normal error has its median at 1.538 standard deviations.
    sigma = max(_weighted_median(residuals, confidence) / 1.538, settings.noise_floor)
    huber = settings.huber_sigmas * sigma / np.maximum(residuals, settings.huber_sigmas * sigma)
    return huber * (residuals <= cutoff_sigmas * sigma)


def _align_by_poses(
    T_a_cam: Array | None, T_b_cam: Array | None, points: int, settings: AlignSettings
) -> OverlapFit:
    """Without usable points: the scale stays as the model gave it, cameras are put on cameras."""
    if T_a_cam is None or T_b_cam is None:
        raise AlignmentError(
            f"the overlap has {points} pixels that are valid in both segments, needed are "
            f"{settings.min_points}; without camera poses nothing else places the segment"
        )
    depth = max(float(np.ptp(T_a_cam[:, :3, 3], axis=0).max()), 1.0)
    rigid, _ = _fit_groups([_camera_group(T_a_cam, T_b_cam, 1.0, depth, 1.0)], settings)
    sigma = float(np.sqrt(2.0) * settings.scale_prior_sigma)
    pivot = T_b_cam[:, :3, 3].mean(axis=0)
    return OverlapFit(rigid, sigma, None, None, 0, len(T_a_cam), "poses", pivot)


# --- small numerics -----------------------------------------------------------------------------


def _checked_points(
    src: ArrayLike, dst: ArrayLike, weights: ArrayLike | None
) -> tuple[Array, Array, Array]:
    x, y = np.asarray(src, np.float64), np.asarray(dst, np.float64)
    if x.ndim != 2 or x.shape[1:] != (3,) or x.shape != y.shape:
        raise ValueError(f"src is {x.shape}, dst {y.shape}; expected the same [N, 3]")
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    if w.shape != (len(x),):
        raise ValueError(f"weights are {w.shape}; expected ({len(x)},)")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(w).all()):
        raise ValueError("points or weights are not finite; leave such points out")
    if not ((w >= 0).all() and w.sum() > 0):
        raise AlignmentError(f"weights of {len(w)} points: expected non-negative, some positive")
    return x, y, w / w.sum()


def _moments(x: Array, y: Array, w: Array) -> tuple[Array, Array, Array]:
    """Weighted means, and covariance of y with x (Umeyama 34 to 38)."""
    mean_x, mean_y = w @ x, w @ y
    return mean_x, mean_y, (w[:, None] * (y - mean_y)).T @ (x - mean_x)


def _rotation(covariance: Array, points: int, *, unique: bool = True) -> tuple[Array, Array, Array]:
    """The best rotation (Umeyama 39 to 43), the singular values and their signs."""
    U, d, Vt = np.linalg.svd(covariance)
    if unique and not d[1] > 1e-12 * max(d[0], np.finfo(float).tiny):
        raise AlignmentError(
            f"{points} points lie on one line or in one place (singular values {d}); a rotation "
            "needs three points that do not"
        )
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(U @ Vt))])
    return U @ (signs[:, None] * Vt), d, signs


def _rigid(x: Array, y: Array, w: Array) -> tuple[Array, Array]:
    """Rotation and translation from x to y [N, 3], finite and weighted by w [N]: `umeyama`."""
    w = w / w.sum()
    mean_x, mean_y, covariance = _moments(x, y, w)
    R, _, _ = _rotation(covariance, len(x))
    return R, mean_y - R @ mean_x


def _weighted_median(values: Array, weights: Array) -> float:
    """The value with half of the weight on either side; the mean of two where that is a tie."""
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    low = np.searchsorted(total, 0.5 * total[-1] * (1 - 1e-12))
    high = np.searchsorted(total, 0.5 * total[-1] * (1 + 1e-12), side="right")
    return float(0.5 * (values[order[low]] + values[order[min(high, len(order) - 1)]]))


def _median_and_sigma(
    values: Array, weights: Array, centre: float | None = None
) -> tuple[float, float]:
    centre = _weighted_median(values, weights) if centre is None else centre
    return centre, MAD_TO_SIGMA * _weighted_median(np.abs(values - centre), weights)


def _orthonormal(R: Array) -> Array:
    """The rotation nearest to R, which is one up to rounding: keeps long chains exact."""
    U, _, Vt = np.linalg.svd(R)
    return U @ Vt


def _quaternion_wxyz(R: Array) -> list[float]:
    x, y, z, w = Rotation.from_matrix(R).as_quat(canonical=True)
    return [float(w), float(x), float(y), float(z)]


def _poses(name: str, T: ArrayLike) -> Array:
    poses = np.asarray(T, np.float64)
    if poses.shape[-2:] != (4, 4):
        raise ValueError(f"{name} has shape {poses.shape}; expected [..., 4, 4]")
    if not np.isfinite(poses).all():
        raise ValueError(f"{name} has values that are not finite; leave such frames out")
    return poses


def _pose_pair(
    T_a_cam: ArrayLike | None, T_b_cam: ArrayLike | None
) -> tuple[Array | None, Array | None]:
    if T_a_cam is None or T_b_cam is None:
        if T_a_cam is not T_b_cam:
            raise ValueError("camera poses are given for one segment only; give both or neither")
        return None, None
    a, b = _poses("T_a_cam", T_a_cam), _poses("T_b_cam", T_b_cam)
    if a.ndim != 3 or a.shape != b.shape:
        raise ValueError(f"T_a_cam is {a.shape}, T_b_cam {b.shape}; expected the same [F, 4, 4]")
    return a, b
