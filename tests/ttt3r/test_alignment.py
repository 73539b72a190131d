"""Alignment, on segments cut from real trajectories.

What `BOUNDS` promises holds for an overlap of 8 frames whose 30 % outliers are all in one of the
two segments and all too far (1.5 to 4 times), which is the worst case for a median.
"""

import json
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from ttt3r.alignment import (
    AlignmentError,
    AlignSettings,
    OverlapFit,
    Sim3,
    align_overlap,
    balance_scales,
    blend_seam,
    chain,
    drive_intrinsics,
    interpolate,
    umeyama,
)
from ttt3r.metrics import ate, path_lengths, read_tum


@dataclass(frozen=True)
class Noise:
    pixel: float = 0.0  # relative, independent for every pixel
    frame: float = 0.0  # relative, common to a frame
    position: float = 0.0  # metres
    turn_deg: float = 0.0  # about each axis
    outliers: float = 0.0  # share of the pixels of the second segment


@dataclass(frozen=True)
class Bounds:
    scale: float  # relative
    turn_deg: float
    position: float  # of the overlap's middle camera, relative to the median depth


PERFECT = Noise()
NOISY_DEPTH = Noise(pixel=0.05, outliers=0.3)
NOISY = Noise(pixel=0.05, frame=0.02, position=0.02, turn_deg=0.2, outliers=0.3)
BOUNDS = {
    PERFECT: Bounds(1e-9, 1e-9, 1e-9),
    NOISY_DEPTH: Bounds(0.003, 0.02, 0.001),
    NOISY: Bounds(0.035, 0.5, 0.025),
}


@dataclass(frozen=True)
class Recording:
    """Cameras and what they see, the truth."""

    T: np.ndarray  # [N, 4, 4]
    depth: np.ndarray  # [N, H, W], 0 where unknown
    rays: np.ndarray  # [H, W, 3] at depth 1


def pixel_rays(height: int, width: int, focal: float) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([(x - width / 2) / focal, (y - height / 2) / focal, np.ones_like(x)], -1)


@pytest.fixture(scope="module")
def street(shared_data) -> Recording:
    """The poses of KITTI 03; a road 1.65 m below, walls at 8 m on both sides, sky at 80 m."""
    _, T = read_tum(shared_data / "kitti03_head" / "groundtruth_tum.txt")
    rays = pixel_rays(24, 64, 37.0)
    with np.errstate(divide="ignore"):
        road = np.where(rays[..., 1] > 0, 1.65 / rays[..., 1], 80.0)
        depth = np.minimum(np.minimum(road, 8.0 / np.abs(rays[..., 0])), 80.0)
    return Recording(T, np.repeat(depth[None], len(T), 0), rays)


@pytest.fixture(scope="module")
def room(shared_data) -> Recording:
    """Every 40th Kinect frame of 7-Scenes: real poses and real depth, holes included."""
    folder = shared_data / "sevenscenes_1000"
    _, T = read_tum(folder / "groundtruth_tum.txt")
    names = [folder / "depth" / f"{i:06d}.png" for i in range(0, 320, 40)]
    depth = np.stack([np.asarray(Image.open(name))[::10, ::10] / 1000.0 for name in names])
    depth[depth > 60] = 0
    return Recording(T[:320:40], depth, pixel_rays(48, 64, 58.5))


@pytest.fixture(params=["street", "room"])
def recording(request) -> Recording:
    return request.getfixturevalue(request.param)


@dataclass(frozen=True)
class View:
    """What a segment says of its frames."""

    T: np.ndarray
    depth: np.ndarray
    pointmap: np.ndarray
    confidence: np.ndarray

    def __getitem__(self, frames: slice) -> "View":
        return View(
            self.T[frames], self.depth[frames], self.pointmap[frames], self.confidence[frames]
        )


def random_gauge(rng: np.random.Generator) -> Sim3:
    turn = Rotation.from_rotvec(rng.normal(0, 0.5, 3)).as_matrix()
    return Sim3(float(np.exp(rng.normal(0, 0.2))), turn, rng.normal(0, 5, 3))


def lift(T: np.ndarray, depth: np.ndarray, rays: np.ndarray) -> np.ndarray:
    points = depth[..., None] * rays
    return np.einsum("fij,fhwj->fhwi", T[:, :3, :3], points) + T[:, None, None, :3, 3]


def inverse(sim3: Sim3) -> Sim3:
    """Map back."""
    return Sim3(1 / sim3.scale, sim3.R.T, -(sim3.R.T @ sim3.t) / sim3.scale)


def view(
    rec: Recording, frames: slice, world_seg: Sim3, noise: Noise, rng: np.random.Generator
) -> View:
    """Predict some frames in a segment of its own place, turn and scale, with errors."""
    T, true = inverse(world_seg).apply_pose(rec.T[frames]), rec.depth[frames]
    n = len(T)
    T[:, :3, 3] += rng.normal(0, noise.position / world_seg.scale, (n, 3))
    turns = rng.normal(0, np.radians(noise.turn_deg), (n, 3))
    T[:, :3, :3] @= Rotation.from_rotvec(turns).as_matrix()
    log_error = rng.normal(0, noise.pixel, true.shape) + rng.normal(0, noise.frame, (n, 1, 1))
    factor = np.where(
        rng.random(true.shape) < noise.outliers,
        rng.uniform(1.5, 4.0, true.shape),
        np.exp(log_error),
    )
    depth = np.where(true > 0, true * factor / world_seg.scale, np.nan)
    return View(T, depth, lift(T, depth, rec.rays), np.full(true.shape, 2.0))


def fit(a: View, b: View, settings: AlignSettings | None = None, poses: bool = True) -> OverlapFit:
    cameras = {"T_a_cam": a.T, "T_b_cam": b.T} if poses else {}
    return align_overlap(
        a.pointmap,
        b.pointmap,
        a.depth,
        a.confidence,
        b.confidence,
        settings,
        depth_b=b.depth,
        **cameras,
    )


def seam(
    rec: Recording, noise: Noise, seed: int, frames: slice = slice(0, 8)
) -> tuple[View, View, Sim3]:
    """Two predictions of the same frames, and the true transformation between them."""
    rng = np.random.default_rng(seed)
    world_a, world_b = random_gauge(rng), random_gauge(rng)
    a = view(rec, frames, world_a, replace(noise, outliers=0.0), rng)
    b = view(rec, frames, world_b, noise, rng)
    return a, b, inverse(world_a).compose(world_b)


def errors(got: Sim3, true: Sim3, a: View) -> Bounds:
    """Relative scale, degrees, and distance at the middle camera relative to the median depth."""
    error = got.compose(inverse(true))
    middle = a.T[:, :3, 3].mean(axis=0)
    return Bounds(
        abs(error.scale - 1),
        float(np.degrees(Rotation.from_matrix(error.R).magnitude())),
        float(np.linalg.norm(error.apply(middle) - middle) / np.nanmedian(a.depth)),
    )


def assert_within(error: Bounds, bounds: Bounds) -> None:
    assert error.scale <= bounds.scale, error
    assert error.turn_deg <= bounds.turn_deg, error
    assert error.position <= bounds.position, error


def turn_about(axis: str, degrees: float) -> np.ndarray:
    T = np.eye(4)
    T[:3, :3] = Rotation.from_euler(axis, degrees, degrees=True).as_matrix()
    return T


# --- Sim3 and umeyama -----------------------------------------------------------------------------


def test_sim3_composes_and_equals_its_matrix():
    rng = np.random.default_rng(0)
    a, b = random_gauge(rng), random_gauge(rng)
    points = rng.normal(size=(5, 3))
    np.testing.assert_allclose(a.compose(b).apply(points), a.apply(b.apply(points)), atol=1e-12)
    np.testing.assert_allclose(a.compose(b).matrix(), a.matrix() @ b.matrix(), atol=1e-12)


def test_sim3_moves_a_camera_with_the_points_it_sees():
    rng = np.random.default_rng(1)
    sim3, T = random_gauge(rng), turn_about("y", 40)
    T[:3, 3] = [1.0, 2.0, 3.0]
    moved = sim3.apply_pose(T[None])[0]
    np.testing.assert_allclose(moved[:3, :3] @ moved[:3, :3].T, np.eye(3), atol=1e-12)
    in_camera = np.array([0.5, -1.0, 4.0])
    expected = sim3.apply(T[:3, :3] @ in_camera + T[:3, 3])
    # Seen from the moved camera the point is `scale` times as far.
    got = moved[:3, :3] @ (sim3.scale * in_camera) + moved[:3, 3]
    np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("scale", "R", "t"),
    [
        (np.nan, np.eye(3), np.zeros(3)),
        (0.0, np.eye(3), np.zeros(3)),
        (1.0, np.diag([1.0, 1.0, -1.0]), np.zeros(3)),
        (1.0, 2 * np.eye(3), np.zeros(3)),
        (1.0, np.full((3, 3), np.nan), np.zeros(3)),
        (1.0, np.eye(3), np.array([0, np.inf, 0])),
        (1.0, np.eye(4), np.zeros(3)),
    ],
)
def test_sim3_refuses_what_is_no_similarity(scale, R, t):
    with pytest.raises(ValueError, match=r"expected|not a rotation"):
        Sim3(scale, R, t)


def test_umeyama_solves_by_hand():
    src = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    # A quarter turn about z, twice the size, moved by (1, 2, 3).
    got = umeyama(src, np.array([[1.0, 2, 3], [1, 4, 3], [-1, 2, 3]]))
    assert got.scale == pytest.approx(2)
    np.testing.assert_allclose(got.R, [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-12)
    np.testing.assert_allclose(got.t, [1, 2, 3], atol=1e-12)


def test_umeyama_weights_count_points_as_often():
    rng = np.random.default_rng(2)
    src, dst = rng.normal(size=(2, 6, 3))
    weights = np.array([1, 2, 3, 0, 1, 1])
    got = umeyama(src, dst, weights)
    expected = umeyama(src.repeat(weights, 0), dst.repeat(weights, 0))
    np.testing.assert_allclose(got.matrix(), expected.matrix(), atol=1e-12)


def test_umeyama_never_mirrors():
    src = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    got = umeyama(src, src * [1, 1, -1])
    assert np.linalg.det(got.R) == pytest.approx(1)


def test_umeyama_refuses_what_leaves_the_rotation_open():
    line = np.outer(np.arange(5.0), [1, 2, 3])
    with pytest.raises(AlignmentError, match="on one line or in one place"):
        umeyama(line, line)
    with pytest.raises(AlignmentError, match="on one line or in one place"):
        umeyama(np.ones((4, 3)), np.ones((4, 3)))
    np.testing.assert_allclose(
        umeyama(line, 2 * line, unique=False).apply(line), 2 * line, atol=1e-12
    )
    with pytest.raises(ValueError, match="not finite"):
        umeyama(np.full((4, 3), np.nan), np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"expected the same \[N, 3\]"):
        umeyama(np.ones((4, 3)), np.ones((5, 3)))


# --- one seam -------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", BOUNDS, ids=["perfect", "noisy depth", "noisy"])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_overlap_comes_back_within_the_stated_bounds(recording, noise, seed):
    a, b, true = seam(recording, noise, seed)
    got = fit(a, b)
    assert got.method == "points"
    assert_within(errors(got.sim3, true, a), BOUNDS[noise])


def test_overlap_reports_what_it_found(recording):
    a, b, _ = seam(recording, NOISY, 5)
    got = fit(a, b)
    # Errors of 5 % in each of two depths, and a camera's share.
    assert 0.04 < got.residual < 0.15
    assert got.inlier_share == pytest.approx(0.7, abs=0.04)
    assert got.frames == 8
    # Pixels off by 5 % and frames by 2 %, in both segments: 7.6 %.
    assert got.scale_sigma == pytest.approx(0.076, abs=0.01)
    report = got.to_json()
    assert json.loads(json.dumps(report)) == report
    assert report["scale"] == got.sim3.scale


def test_perfect_overlap_reports_no_error(recording):
    a, b, _ = seam(recording, PERFECT, 6)
    got = fit(a, b)
    assert (got.inlier_share, got.points) == (1, min(np.isfinite(a.depth).sum(), 8_000))
    assert got.residual < 1e-12
    assert got.scale_sigma < 1e-12


def test_depth_of_b_is_taken_from_its_cameras_if_not_given(recording):
    a, b, _ = seam(recording, NOISY, 7)
    without = align_overlap(
        a.pointmap, b.pointmap, a.depth, a.confidence, b.confidence, T_a_cam=a.T, T_b_cam=b.T
    )
    np.testing.assert_allclose(without.sim3.matrix(), fit(a, b).sim3.matrix(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_pointmaps_alone_are_enough_without_camera_poses(recording, seed):
    a, b, true = seam(recording, NOISY_DEPTH, seed)
    assert_within(errors(fit(a, b, poses=False).sim3, true, a), Bounds(0.002, 0.2, 0.003))
    a, b, true = seam(recording, PERFECT, seed)
    assert_within(errors(fit(a, b, poses=False).sim3, true, a), BOUNDS[PERFECT])


@pytest.mark.parametrize("noise", [PERFECT, NOISY], ids=["perfect", "noisy"])
def test_single_frame_is_enough(recording, noise):
    a, b, true = seam(recording, noise, 8, slice(3, 4))
    # Nothing averages: three to four times the bounds of eight frames.
    bounds = BOUNDS[noise]
    wider = Bounds(3 * bounds.scale, 3 * bounds.turn_deg, 4 * bounds.position)
    assert_within(errors(fit(a, b).sim3, true, a), wider)


def test_scale_is_the_same_in_both_directions_and_not_pulled_down(street):
    noise, logs, least_squares = Noise(pixel=0.15), [], []
    for seed in range(8):
        a, b, true = seam(street, noise, seed)
        there, back = fit(a, b).sim3, fit(b, a).sim3
        assert there.scale * back.scale == pytest.approx(1, rel=1e-9)
        logs.append(np.log(there.scale / true.scale))
        naive = umeyama(b.pointmap.reshape(-1, 3), a.pointmap.reshape(-1, 3))
        least_squares.append(np.log(naive.scale / true.scale))
    assert abs(np.mean(logs)) < 0.002
    # The reason not to take the scale from a 3D fit: hundreds of seams would multiply this.
    assert np.mean(least_squares) < -0.01


def test_noise_in_depth_moves_the_segment_neither_forward_nor_back(street):
    along = []
    for seed in range(8):
        a, b, true = seam(street, Noise(pixel=0.15), seed)
        error = fit(a, b, poses=False).sim3.compose(inverse(true))
        axis, middle = a.T[0, :3, 2], a.T[:, :3, 3].mean(axis=0)
        along.append((error.apply(middle) - middle) @ axis / np.nanmedian(a.depth))
    # Weighing by the depth of one of the two alone gives -0.0026.
    assert abs(np.mean(along)) < 0.0013


def test_two_wrong_cameras_of_eight_do_not_matter(recording):
    a, b, true = seam(recording, Noise(pixel=0.05), 9)
    T = b.T.copy()
    T[2:4, :3, 3] += [0.5, -0.3, 0.4]
    T[2:4] = T[2:4] @ turn_about("y", 12)
    broken = replace(b, T=T, pointmap=lift(T, b.depth, recording.rays))
    assert_within(errors(fit(a, broken).sim3, true, a), Bounds(0.002, 0.1, 0.005))


def test_low_confidence_counts_little(street):
    a, b, true = seam(street, PERFECT, 10)
    # More than half of the picture is wrong in the same way, and the network knows it.
    depth, confidence = b.depth.copy(), b.confidence.copy()
    depth[:, :, :36] *= 1.3
    confidence[:, :, :36], confidence[:, :, 36:] = 1.0, 20.0
    unsure = replace(b, depth=depth, confidence=confidence, pointmap=lift(b.T, depth, street.rays))
    assert_within(errors(fit(a, unsure).sim3, true, a), Bounds(1e-6, 1e-4, 1e-6))
    sure = replace(unsure, confidence=b.confidence)
    assert errors(fit(a, sure).sim3, true, a).scale > 0.01


def test_scale_listens_to_confidence_where_errors_are_within_the_noise(street):
    a, b, true = seam(street, Noise(pixel=0.05), 10)
    b.depth[:, :, :32] *= 1.04
    b.confidence[:, :, :32], b.confidence[:, :, 32:] = 1.0, 20.0
    a.confidence[:] = 20.0
    shifted = replace(b, pointmap=lift(b.T, b.depth, street.rays))
    assert errors(fit(a, shifted).sim3, true, a).scale < 0.005


def test_one_pixel_of_enormous_confidence_is_not_the_whole_fit(street):
    a, b, true = seam(street, NOISY_DEPTH, 11)
    a.confidence[0, 5, 5], b.confidence[0, 5, 5] = 1e6, 1e6
    b.pointmap[0, 5, 5] *= 1.5
    assert_within(errors(fit(a, b).sim3, true, a), BOUNDS[NOISY_DEPTH])


def test_far_points_do_not_decide(street):
    a, b, true = seam(street, PERFECT, 12)
    # The sky is 80 m off; shift it by 3 m, which is little of its depth and much of the road's.
    pointmap = a.pointmap.copy()
    pointmap[a.depth * 1.0001 > a.depth.max()] += [3.0, 0.0, 0.0]
    got = fit(replace(a, pointmap=pointmap), b, poses=False)
    assert_within(errors(got.sim3, true, a), Bounds(1e-9, 0.2, 0.02))


def test_invalid_pixels_are_left_out(recording):
    a, b, true = seam(recording, PERFECT, 13)
    a.depth[0, :5], a.depth[1, :5], a.depth[2, :5] = np.nan, 0, -1
    b.pointmap[3, :5], b.confidence[4, :5], a.confidence[5, :5] = np.inf, np.nan, 0
    b.depth[6] = np.nan
    got = fit(a, b)
    assert got.frames == 7
    assert_within(errors(got.sim3, true, a), BOUNDS[PERFECT])


def test_half_precision_input_is_enough(street):
    a, b, true = seam(street, PERFECT, 14)
    half = [v.astype(np.float16) for v in (a.pointmap, b.pointmap, a.depth, a.confidence)]
    got = align_overlap(
        *half, b.confidence, depth_b=b.depth.astype(np.float16), T_a_cam=a.T, T_b_cam=b.T
    )
    assert_within(errors(got.sim3, true, a), Bounds(1e-4, 0.01, 1e-3))


def test_points_are_bounded_and_the_result_repeats(recording):
    a, b, true = seam(recording, NOISY_DEPTH, 15)
    settings = AlignSettings(max_points=2000)
    got = fit(a, b, settings)
    assert 1500 < got.points <= 2000
    assert got.frames == 8
    np.testing.assert_array_equal(got.sim3.matrix(), fit(a, b, settings).sim3.matrix())
    assert_within(errors(got.sim3, true, a), Bounds(0.01, 0.06, 0.003))


# --- what cannot be aligned -----------------------------------------------------------------------


def test_without_valid_points_the_cameras_place_the_segment(street):
    rng = np.random.default_rng(17)
    world_a = replace(random_gauge(rng), scale=1.0)
    world_b = replace(random_gauge(rng), scale=1.0)
    a = view(street, slice(0, 6), world_a, PERFECT, rng)
    b = view(street, slice(0, 6), world_b, PERFECT, rng)
    b.depth[:] = np.nan
    got = fit(a, b)
    assert got.method == "poses"
    assert (got.points, got.residual, got.inlier_share) == (0, None, None)
    assert got.scale_sigma == pytest.approx(0.3 * np.sqrt(2))
    assert_within(errors(got.sim3, inverse(world_a).compose(world_b), a), BOUNDS[PERFECT])
    assert json.loads(json.dumps(got.to_json()))["method"] == "poses"


def test_without_points_and_cameras_it_says_so(street):
    a, b, _ = seam(street, PERFECT, 18)
    b.depth[:] = np.nan
    with pytest.raises(
        AlignmentError, match=r"0 pixels that are valid in both.*without camera poses"
    ):
        fit(a, b, poses=False)


def test_without_common_frames_it_says_so(street):
    a, b, _ = seam(street, PERFECT, 19)
    with pytest.raises(AlignmentError, match="share no frames"):
        fit(a[:0], b[:0])


def test_points_on_one_line_need_cameras():
    depth = np.ones((1, 1, 200))
    pointmap = np.zeros((1, 1, 200, 3))
    pointmap[..., 0] = np.arange(200)
    with pytest.raises(AlignmentError, match="on one line"):
        align_overlap(pointmap, pointmap, depth, depth, depth, depth_b=depth)
    T = np.eye(4)[None]
    got = align_overlap(
        pointmap, pointmap, depth, depth, depth, depth_b=depth, T_a_cam=T, T_b_cam=T
    )
    np.testing.assert_allclose(got.sim3.matrix(), np.eye(4), atol=1e-12)


def test_shapes_that_do_not_fit_are_refused(street):
    a, b, _ = seam(street, PERFECT, 20)
    with pytest.raises(ValueError, match=r"expected the same \[F, H, W\] for all"):
        fit(a, replace(b, depth=b.depth[:, :-1]))
    with pytest.raises(ValueError, match="pointmaps are"):
        fit(a, replace(b, pointmap=b.pointmap[:5]))
    with pytest.raises(ValueError, match="5 camera poses for 8 overlap frames"):
        fit(replace(a, T=a.T[:5]), replace(b, T=b.T[:5]))
    with pytest.raises(ValueError, match="give both or neither"):
        align_overlap(a.pointmap, b.pointmap, a.depth, a.confidence, b.confidence, T_a_cam=a.T)
    with pytest.raises(ValueError, match="neither depth_b nor camera poses"):
        align_overlap(a.pointmap, b.pointmap, a.depth, a.confidence, b.confidence)
    with pytest.raises(ValueError, match="T_b_cam has values that are not finite"):
        fit(a, replace(b, T=b.T * np.nan))


@pytest.mark.parametrize(
    "wrong", [{"max_points": 0}, {"pose_share": 1.0}, {"min_points": 10**6}, {"noise_floor": -1.0}]
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AlignSettings(**wrong)


# --- many seams -----------------------------------------------------------------------------------

SEGMENT, OVERLAP = 60, 10


def cut(rec: Recording, noise: Noise, seed: int) -> tuple[list[View], list[slice], Sim3]:
    """Segments of 60 frames that share 10 with the next; the first one's place in the world."""
    rng = np.random.default_rng(seed)
    starts = range(0, len(rec.T) - OVERLAP, SEGMENT - OVERLAP)
    ranges = [slice(s, min(s + SEGMENT, len(rec.T))) for s in starts]
    gauges = [random_gauge(rng) for _ in ranges]
    views = [view(rec, r, g, noise, rng) for r, g in zip(ranges, gauges, strict=True)]
    return views, ranges, gauges[0]


def join(views: list[View], ranges: list[slice], world_seg: list[Sim3]) -> np.ndarray:
    """One trajectory: each overlap blended from the segment before to the one after."""
    T = world_seg[0].apply_pose(views[0].T)
    for v, r, sim3 in zip(views[1:], ranges[1:], world_seg[1:], strict=True):
        mine = sim3.apply_pose(v.T)
        shared = len(T) - r.start
        T = np.concatenate([T[: r.start], blend_seam(T[r.start :], mine[:shared]), mine[shared:]])
    return T


def overlap_fits(views: list[View]) -> list[OverlapFit]:
    return [fit(a[-OVERLAP:], b[:OVERLAP]) for a, b in pairwise(views)]


def test_perfect_segments_chain_into_the_true_drive(street):
    views, ranges, world_first = cut(street, PERFECT, 21)
    assert len(views) == 10
    world_seg = chain([f.sim3 for f in overlap_fits(views)])
    T = join(views, ranges, world_seg)
    np.testing.assert_allclose(T, inverse(world_first).apply_pose(street.T), atol=1e-9)


@pytest.mark.parametrize("seed", [22, 23])
def test_noisy_segments_chain_within_the_stated_bounds(street, seed):
    views, ranges, _ = cut(street, NOISY, seed)
    T = join(views, ranges, chain([f.sim3 for f in overlap_fits(views)]))
    assert T.shape == street.T.shape
    length = path_lengths(street.T)[-1]
    assert length == pytest.approx(371.8, abs=0.1)
    # Nine seams on 372 m: one percent of the way.
    assert ate(T, street.T, "sim3") < 0.01 * length


# --- scales over many segments --------------------------------------------------------------------


def known_fit(log_scale: float, sigma: float, pivot: np.ndarray | None = None) -> OverlapFit:
    sim3 = Sim3(np.exp(log_scale), turn_about("y", 20)[:3, :3], np.array([1.0, 2.0, 3.0]))
    return OverlapFit(
        sim3, sigma, 0.0, 1.0, 100, 4, "points", np.zeros(3) if pivot is None else pivot
    )


def test_balanced_scale_of_one_seam_by_hand():
    # Least (d - m)^2 / s^2 + 2 (d / 2)^2 / p^2 is at d = m / (1 + s^2 / (2 p^2)).
    relative, first = balance_scales([known_fit(0.2, 0.1)], prior_sigma=0.1)
    assert np.log(relative[0].scale) == pytest.approx(0.2 / 1.5)
    assert np.log(first) == pytest.approx(-0.1 / 1.5)


def test_balancing_leaves_well_known_scales_alone():
    fits = [known_fit(s, 1e-6) for s in (0.1, -0.2, 0.3)]
    relative, _ = balance_scales(fits)
    np.testing.assert_allclose(np.log([r.scale for r in relative]), [0.1, -0.2, 0.3], atol=1e-6)
    assert balance_scales([]) == ([], 1.0)


def test_balancing_stops_the_drift_of_scale_over_many_segments():
    rng = np.random.default_rng(24)
    n, prior, sigma = 400, 0.1, 0.03
    metric = rng.normal(0, prior, n)  # log scale that takes each segment to metres
    fits = [known_fit(d + rng.normal(0, sigma), sigma) for d in np.diff(metric)]
    drifting = np.cumsum([0.0] + [np.log(f.scale) for f in fits]) - metric
    world_seg = chain(*balance_scales(fits, prior))
    balanced = np.log([s.scale for s in world_seg]) - metric
    assert np.std(drifting) > 0.1
    # What remains is sqrt(sigma * prior / 2) = 0.039, however many segments there are.
    assert np.std(balanced) < 0.05
    assert np.abs(balanced).max() < 0.2


def test_seams_that_all_err_alike_do_not_let_scale_drift():
    # Each says that the next segment is 1 % larger, and that segments hardly differ otherwise.
    rng = np.random.default_rng(27)
    fits = [known_fit(0.01 + rng.normal(0, 0.005), 0.01) for _ in range(80)]
    world_seg = chain(*balance_scales(fits))
    assert np.ptp(np.log([s.scale for s in chain([f.sim3 for f in fits])])) > 0.7
    assert np.ptp(np.log([s.scale for s in world_seg])) < 0.1


def test_spread_of_segments_is_that_of_their_seams_over_the_root_of_two():
    # By hand, of two seams: the middle segment differs from both others alike, so that x is
    # (-d, 2 d, -d) / 3 and 2 (d - m)^2 / s^2 + (6 / 9) d^2 / p^2 is least at m / (1 + s^2 / 3 p^2).
    m, s = 0.1, 0.1
    relative, first = balance_scales([known_fit(m, s), known_fit(-m, s)])
    d = m / (1 + s**2 / (3 * m**2 / 2))
    np.testing.assert_allclose(np.log([r.scale for r in relative]), [d, -d])
    assert np.log(first) == pytest.approx(-d / 3)
    alike, first = balance_scales([known_fit(0.0, 1e-9)] * 3)
    assert ([r.scale for r in alike], first) == ([1.0] * 3, 1.0)


def test_seams_without_points_say_nothing_of_how_much_segments_differ():
    measured = [known_fit(s, 0.1) for s in (0.2, -0.2)]
    by_poses = [replace(known_fit(0.0, 1e3), method="poses") for _ in range(200)]
    relative, _ = balance_scales([*measured, *by_poses])
    alone, _ = balance_scales(measured)
    np.testing.assert_allclose([r.scale for r in relative[:2]], [r.scale for r in alone], rtol=1e-4)
    (alone,), first = balance_scales(by_poses[:1])
    assert (alone.scale, first) == (1.0, 1.0)


@pytest.mark.parametrize(("scatter", "kept"), [(0.002, (0.999, 1.0)), (0.5, (0.02, 0.3))])
def test_prior_decides_only_where_depth_says_little(street, scatter, kept):
    a, b, true = seam(street, Noise(pixel=scatter), 16)
    measured = fit(a, b)
    assert measured.scale == pytest.approx(true.scale, rel=0.05)
    (balanced,), _ = balance_scales([measured], 0.3)
    share = np.log(balanced.scale) / np.log(measured.scale)
    assert kept[0] < share < kept[1]


def test_frames_that_disagree_are_no_precise_seam(street):
    a, b, _ = seam(street, Noise(pixel=0.01), 26, slice(0, 2))
    surer = np.stack([np.full(a.depth.shape[1:], c) for c in (3.0, 2.0)])
    other = b.depth * np.exp([0.0, 0.2])[:, None, None]
    b = View(b.T, other, lift(b.T, other, street.rays), surer)
    assert fit(replace(a, confidence=surer), b).scale_sigma > 0.1


def test_depth_that_shrinks_within_each_segment_does_not_shrink_the_drive(street):
    # The overlaps all say the same: the next segment is smaller. Together they are wrong.
    rng = np.random.default_rng(25)
    ramp = np.exp(np.linspace(0.0, -0.05, 12))[:, None, None]
    views = []
    for start in range(0, len(street.T) - 12, 8):
        world_seg = Sim3(1.0, street.T[start, :3, :3], street.T[start, :3, 3])
        right = view(street, slice(start, start + 12), world_seg, Noise(pixel=0.05), rng)
        depth = right.depth * ramp
        views.append(View(right.T, depth, lift(right.T, depth, street.rays), right.confidence))
    fits = [fit(a[8:], b[:4]) for a, b in pairwise(views)]
    drifted = np.log([s.scale for s in chain([f.sim3 for f in fits])])
    balanced = np.log([s.scale for s in chain(*balance_scales(fits))])
    assert np.ptp(drifted) > 1.5
    assert np.ptp(balanced) < 0.3


def test_changing_a_scale_keeps_the_overlap_in_place():
    pivot = np.array([4.0, -1.0, 7.0])
    known = known_fit(0.1, 0.1, pivot)
    other = known.rescaled(2.0)
    assert other.scale == 2
    np.testing.assert_allclose(other.apply(pivot), known.sim3.apply(pivot), atol=1e-12)


def test_chain_of_thousands_stays_a_rotation():
    step = Sim3(1.0, turn_about("z", 0.1)[:3, :3], np.array([1.0, 0, 0]))
    last = chain([step] * 3600)[-1]
    np.testing.assert_allclose(last.R, np.eye(3), atol=1e-9)
    np.testing.assert_allclose(last.t, 0, atol=1e-6)


# --- blending -------------------------------------------------------------------------------------


def test_blending_goes_from_a_to_b_without_a_jump(street):
    frames = 20
    T_a = street.T[:frames]
    # b disagrees by 2 m and 6 degrees.
    T_b = T_a @ turn_about("y", 6)
    T_b[:, 0, 3] += 2.0
    T = blend_seam(T_a, T_b)
    np.testing.assert_allclose(T[0], T_a[0], atol=1e-12)
    np.testing.assert_allclose(T[-1], T_b[-1], atol=1e-12)
    np.testing.assert_allclose(
        T[:, :3, :3] @ T[:, :3, :3].swapaxes(1, 2), np.tile(np.eye(3), (frames, 1, 1)), atol=1e-12
    )
    assert (T[:, 3] == [0, 0, 0, 1]).all()
    # The steepest step of a smoothstep is 1.5 times the even one.
    off = T[:, 0, 3] - T_a[:, 0, 3]
    assert np.diff(off).max() < 1.51 * 2.0 / (frames - 1)
    assert np.diff(off).min() > 0
    assert off[1] - off[0] < 0.2 * 2.0 / (frames - 1)
    turned = np.degrees(
        Rotation.from_matrix(T_a[:, :3, :3].swapaxes(1, 2) @ T[:, :3, :3]).magnitude()
    )
    assert np.diff(turned).max() < 1.51 * 6.0 / (frames - 1)


def test_blending_takes_the_short_way_round():
    got = interpolate(turn_about("z", 179)[None], turn_about("z", -179)[None], [0.5])
    np.testing.assert_allclose(got[0], turn_about("z", 180), atol=1e-12)


def test_blending_of_one_frame_is_half_and_half_and_of_none_is_none():
    T_b = turn_about("z", 10)
    T_b[0, 3] = 4.0
    got = blend_seam(np.eye(4)[None], T_b[None])[0]
    assert got[0, 3] == pytest.approx(2)
    np.testing.assert_allclose(got[:3, :3], turn_about("z", 5)[:3, :3], atol=1e-12)
    assert blend_seam(np.zeros((0, 4, 4)), np.zeros((0, 4, 4))).shape == (0, 4, 4)


def test_blending_refuses_what_does_not_belong_together():
    with pytest.raises(ValueError, match="of one length"):
        blend_seam(np.tile(np.eye(4), (3, 1, 1)), np.tile(np.eye(4), (2, 1, 1)))
    with pytest.raises(ValueError, match=r"within 0\.\.1"):
        interpolate(np.eye(4)[None], np.eye(4)[None], [1.5])
    with pytest.raises(ValueError, match="not finite"):
        blend_seam(np.full((1, 4, 4), np.nan), np.eye(4)[None])


# --- focal length ---------------------------------------------------------------------------------


def test_drive_focal_is_the_median_in_the_log():
    assert drive_intrinsics([400.0, 900.0], 480, 640)[0] == pytest.approx(600)
    assert drive_intrinsics([400.0, 500.0, 900.0], 480, 640)[0] == pytest.approx(500)


def test_drive_focal_survives_broken_estimates_and_says_the_spread():
    rng = np.random.default_rng(25)
    focals = 500 * np.exp(rng.normal(0, 0.04, 2000))
    focals[:500], focals[500:600] = 0.0, np.nan
    focals[600:700] = 1e6
    focal, spread = drive_intrinsics(focals, 480, 640)
    assert focal == pytest.approx(500, rel=0.005)
    assert spread == pytest.approx(0.04, rel=0.1)


def test_drive_focal_says_when_there_is_none():
    with pytest.raises(AlignmentError, match="none of 3 focal lengths is between 86 and"):
        drive_intrinsics([0.0, np.nan, 1e9], 480, 640)
    with pytest.raises(AlignmentError, match="none of 0"):
        drive_intrinsics([], 480, 640)
