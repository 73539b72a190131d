"""Align: one camera model and one trajectory from the segments of a drive."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from prefect import task

from storage.layout import MOTION_COSTS, chunk_commit
from storage.reconstruction import ReconstructionStore
from storage.records import NOWHERE, DriveRecord, Plan, Segment
from tasks.attempts import attempt_id, counted
from tasks.config import AlignConfig, InferConfig
from tasks.infer import require_inferred, segment_keys
from tasks.keys import drop_later, find_key, stage_key
from tasks.pipelining import prefetch
from tasks.planned import read_aside, read_plan, read_record
from tasks.retries import STAGE_OPTIONS
from ttt3r.alignment import (
    FIELD_OF_VIEW_DEG,
    AlignmentError,
    AlignSettings,
    OverlapFit,
    Sim3,
    align_overlap,
    balance_scales,
    blend_seam,
    chain,
    drive_intrinsics,
)
from ttt3r.config import ModelConfig
from ttt3r.geometry import depth_to_pointmap, principal_point
from ttt3r.images import fit, source_intrinsics
from ttt3r.motion_scale import SCALES, motion_scales
from ttt3r.weights import WeightsInfo, weights_info

VERSION = 6
# A field of view of 60 degrees, where neither the network nor the user knows the focal length.
FALLBACK_FOCAL = 0.866
# Frames of an overlap that are compared at most, evenly over it: bounds memory. Up to two overlaps
# more are read meanwhile.
SEAM_FRAMES = 32
UNTOLD = np.zeros(len(SCALES))  # what pictures say of motions that nobody compared

VIEW_ARRAYS = ("cam_to_seg", "confidence", "gate", "intrinsics")
SEAM_ARRAYS = ("depth", "confidence", "cam_to_seg")

Array = NDArray[np.float64]
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Views:
    """What one segment says of its F frames, images left out."""

    cam_to_seg: Array  # [F, 4, 4]
    confidence: NDArray[np.float32]  # [F] median over the image
    gate: NDArray[np.float32]  # [F] median learning rate
    focal: NDArray[np.float32]  # [F] pixels


@task(name="align", task_run_name="align {url}", **STAGE_OPTIONS)
@counted("align")
def align_stage(url: str, config: AlignConfig, infer: InferConfig) -> None:
    """Place all segments in one world per part and write the trajectory.

    Segments that are set aside are left out: a part ends before and another starts after them.

    Raises:
        ChunkMissing: a segment has not been inferred, or by another network.
    """
    store, info = ReconstructionStore.open(url), weights_info(infer.weights)
    missing = sorted(read_aside(store))
    plan = read_plan(store).without(missing)
    key = align_key(store, plan, config, infer, info)
    if find_key(store, "align") == key:
        return
    began, present = time.perf_counter(), [segment.index for segment in plan.present]
    require_inferred(store, present, infer, info)
    motions = read_motion_scales(store, plan)
    views = read_views(store, plan, motions)
    camera = find_camera(store, views, config, info)
    settings = AlignSettings(scale_prior_sigma=config.scale_prior_sigma)
    fits = fit_seams(store, plan, camera.intrinsics, motions, settings)
    placements = place_segments(plan, views, fits, config.scale_prior_sigma)
    arrays = build_trajectory(store, plan, views, placements, fits, camera, info.config)
    arrays["motion_scale"] = _per_segment(plan, motions)
    drop_later(store, "align")
    store.write_trajectory(arrays)
    record = {
        "attempt": attempt_id(),
        "seconds": time.perf_counter() - began,
        "focal_px_model": float(camera.intrinsics[0, 0]),
        "focal_spread": camera.spread,
        "focal_source": camera.source,
        "focal_estimate_ratio": camera.estimate_ratio,
        "seams": [{"segment": i, **fit.to_json()} for i, fit in sorted(fits.items())],
        "missing": missing,
    }
    require_inferred(store, present, infer, info)  # all that was read was of one network
    store.commit("align", {"key": key, **record})


def align_key(
    store: ReconstructionStore,
    plan: Plan,
    config: AlignConfig,
    infer: InferConfig,
    info: WeightsInfo,
) -> str:
    """Key of the trajectory: all segments that have a part, and the alignment's settings."""
    segments = list(segment_keys(store, plan, plan.present, infer, info).values())
    return stage_key("align", VERSION, segments, config)


def read_motion_scales(store: ReconstructionStore, plan: Plan) -> dict[int, float]:
    """What the motions of each segment that has a part are to be multiplied by, as pictures say."""
    records, costs = store.commits("infer"), []
    for segment in plan.present:
        names = [chunk_commit(segment.index, c.index) for c in segment.chunks(plan.chunk_frames)]
        # A listing may be older than what is there.
        chunks = [records.get(name) or store.read_commit(name) or {} for name in names]
        costs.append(sum(np.asarray(c.get(MOTION_COSTS, UNTOLD)) for c in chunks))
    scales = motion_scales(np.stack(costs)).tolist()
    return {segment.index: scale for segment, scale in zip(plan.present, scales, strict=True)}


def read_views(
    store: ReconstructionStore, plan: Plan, motions: Mapping[int, float]
) -> dict[int, Views]:
    """What the segments that have a part say of their frames, by segment."""
    return {s.index: _read_views(store, plan, s, motions[s.index]) for s in plan.present}


def _read_views(store: ReconstructionStore, plan: Plan, segment: Segment, motion: float) -> Views:
    parts = []
    for chunk in segment.chunks(plan.chunk_frames):  # a segment may be as long as the drive
        read = store.read_many(segment, VIEW_ARRAYS, chunk.start, chunk.stop)
        parts.append(
            (
                with_motion(read["cam_to_seg"], motion),
                np.median(read["confidence"], axis=(1, 2)),
                read["gate"][:, 2],
                read["intrinsics"][:, 0, 0],
            )
        )
    return Views(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def with_motion(cam_to_seg: NDArray[Any], scale: float) -> Array:
    """Poses [F, 4, 4] whose translations are multiplied by `scale`."""
    scaled = cam_to_seg.astype(np.float64)
    scaled[:, :3, 3] *= scale
    return scaled


@dataclass(frozen=True, eq=False)
class Camera:
    """The camera of a drive, at the network's resolution."""

    intrinsics: Array  # [3, 3] pixels
    spread: float  # relative, of the estimates of the focal length; 0 where it is no estimate
    source: str  # of the focal length: given, estimated or assumed
    estimate_ratio: float | None = None  # of a given focal length: the network's estimate over it


def find_camera(
    store: ReconstructionStore, views: Mapping[int, Views], config: AlignConfig, info: WeightsInfo
) -> Camera:
    """The camera that the user gives, or the network sees.

    Raises:
        ImpossibleFocal: see `require_possible_focal`.
    """
    record, model = read_record(store), info.config
    shape = fit(record.width, record.height, model.image_size, model.patch_size)
    intrinsics = np.eye(3)
    intrinsics[:2, 2] = principal_point(shape.height, shape.width, info.principal_offset)
    focals = np.concatenate([view.focal for view in views.values()])
    try:
        focal, spread = drive_intrinsics(focals, shape.height, shape.width)
    except AlignmentError as error:
        focal = spread = 0.0
        if config.focal_px is None:
            log.info("%s: %s; a field of view of 60 degrees is assumed", store.url, error)
    if config.focal_px is None:
        source = "estimated" if focal else "assumed"
        focal = focal or FALLBACK_FOCAL * max(shape.height, shape.width)
        intrinsics[[0, 1], [0, 1]] = focal
        return Camera(intrinsics, spread, source)
    require_possible_focal(record, config)
    scales = np.array([shape.resized_width / record.width, shape.resized_height / record.height])
    intrinsics[[0, 1], [0, 1]] = config.focal_px * scales
    return Camera(intrinsics, 0.0, "given", focal / intrinsics[0, 0] if focal else None)


class ImpossibleFocal(ValueError):
    """No camera has the focal length that is given: a mistake of the call, not of the drive."""


def require_possible_focal(record: DriveRecord, config: AlignConfig) -> None:
    """Refuse a focal length that no camera of this recording can have.

    Raises:
        ImpossibleFocal: the field of view over the longer side is outside of `FIELD_OF_VIEW_DEG`.
    """
    if config.focal_px is None:
        return
    side = max(record.width, record.height)
    view = math.degrees(2 * math.atan(side / 2 / config.focal_px))
    narrowest, widest = FIELD_OF_VIEW_DEG
    if not narrowest <= view <= widest:
        raise ImpossibleFocal(
            f"a focal length of {config.focal_px:g} pixels means that the {side} pixels of the "
            f"picture's longer side see {view:.3g} degrees; expected {narrowest:g} to {widest:g}: "
            "give it in pixels of the recording, not in millimetres"
        )


def fit_seams(
    store: ReconstructionStore,
    plan: Plan,
    intrinsics: Array,
    motions: Mapping[int, float],
    settings: AlignSettings,
) -> dict[int, OverlapFit]:
    """For each segment that overlaps the one before it: how it lies in that one's frame."""
    fits = {}
    with closing(prefetch(_read_seams(store, plan), 1)) as seams:
        for index, (a, b) in seams:
            poses_a = with_motion(a["cam_to_seg"], motions[index - 1])
            poses_b = with_motion(b["cam_to_seg"], motions[index])
            fits[index] = align_overlap(
                lift(a["depth"], intrinsics, poses_a),
                lift(b["depth"], intrinsics, poses_b),
                a["depth"],
                a["confidence"],
                b["confidence"],
                settings,
                depth_b=b["depth"],
                T_a_cam=poses_a,
                T_b_cam=poses_b,
            )
    return fits


def _read_seams(
    store: ReconstructionStore, plan: Plan
) -> Iterator[tuple[int, list[dict[str, NDArray[np.float32]]]]]:
    """Index of each segment that overlaps the one before it; what that one and it say there."""
    for segment in plan.segments:
        shared = plan.overlap(segment)
        if not shared:
            continue
        even = np.linspace(shared.start, shared.stop - 1, SEAM_FRAMES).round().astype(int)
        frames, before = np.unique(even).tolist(), plan.segments[segment.index - 1]
        yield segment.index, [_read_seam(store, s, shared, frames) for s in (before, segment)]


def _read_seam(
    store: ReconstructionStore, segment: Segment, shared: range, frames: list[int]
) -> dict[str, NDArray[np.float32]]:
    """What a segment says of `frames`, all or some of those that it shares."""
    spans = [(f, f + 1) for f in frames]
    if len(frames) == len(shared):
        spans = [(shared.start, shared.stop)]
    parts = [store.read_many(segment, SEAM_ARRAYS, *span) for span in spans]
    return {name: np.concatenate([part[name] for part in parts]) for name in SEAM_ARRAYS}


def lift(depth: NDArray[Any], intrinsics: Array, T_x_cam: NDArray[Any]) -> Array:
    """Points [F, H, W, 3] in frame x of depth [F, H, W], by one pinhole matrix [3, 3]."""
    cameras = torch.from_numpy(intrinsics).expand(len(depth), 3, 3)
    points = depth_to_pointmap(torch.from_numpy(depth).double(), cameras).numpy()
    rotated = np.einsum("fij,fhwj->fhwi", T_x_cam[:, :3, :3], points)
    return rotated + T_x_cam[:, None, None, :3, 3]


def place_segments(
    plan: Plan, views: Mapping[int, Views], fits: dict[int, OverlapFit], prior_sigma: float
) -> dict[int, Sim3]:
    """Segment-to-world by segment; the world of a part is its first camera's frame."""
    placements: dict[int, Sim3] = {}
    owned = plan.owner_ranges()
    for part in range(plan.parts):
        members = [s for s in plan.segments if s.part == part]
        placed = chain(*balance_scales([fits[s.index] for s in members[1:]], prior_sigma))
        first = members[0]
        seen = views[first.index].cam_to_seg[owned[first.index].start - first.start]
        camera = placed[0].apply_pose(seen)
        back = camera[:3, :3].T
        to_camera = Sim3(1.0, back, -back @ camera[:3, 3])
        placements |= {s.index: to_camera.compose(p) for s, p in zip(members, placed, strict=True)}
    return placements


def build_trajectory(
    store: ReconstructionStore,
    plan: Plan,
    views: Mapping[int, Views],
    placements: dict[int, Sim3],
    fits: dict[int, OverlapFit],
    camera: Camera,
    model: ModelConfig,
) -> dict[str, NDArray[Any]]:
    """The arrays of `trajectory/`: poses blended across the seams, placements, cameras, owners."""
    record = read_record(store)
    shape = fit(record.width, record.height, model.image_size, model.patch_size)
    in_source = source_intrinsics(camera.intrinsics, shape, record.width, record.height)
    return {
        "cam_to_world": blend_poses(plan, views, placements),
        "seg_to_world": _per_segment(plan, {i: p.matrix() for i, p in placements.items()}, (4, 4)),
        "scale": _per_segment(plan, {i: p.scale for i, p in placements.items()}),
        "seam_residual": _per_segment(plan, {i: fit.residual for i, fit in fits.items()}),
        "seam_inlier_share": _per_segment(plan, {i: fit.inlier_share for i, fit in fits.items()}),
        "intrinsics": camera.intrinsics,
        "intrinsics_source": in_source,
        **frame_figures(plan, views),
    }


def _per_segment(plan: Plan, values: Mapping[int, Any], shape: tuple[int, ...] = ()) -> Array:
    """[K, *shape] values of the segments that have one, NaN for the others."""
    array = np.full((len(plan.segments), *shape), np.nan)
    for index, value in values.items():
        array[index] = np.nan if value is None else value
    return array


def blend_poses(plan: Plan, views: Mapping[int, Views], placements: Mapping[int, Sim3]) -> Array:
    """Camera-to-world [N, 4, 4], going over from segment to segment smoothly.

    NaN for frames that no placed segment holds.
    """
    cam_to_world = np.full((plan.frames, 4, 4), np.nan)
    for segment, own in zip(plan.segments, plan.owner_ranges(), strict=True):
        if segment.index not in placements:
            continue
        poses = placements[segment.index].apply_pose(views[segment.index].cam_to_seg)
        shared = len(plan.overlap(segment))
        seam = cam_to_world[segment.start : segment.start + shared]
        blended = np.concatenate([blend_seam(seam, poses[:shared]), poses[shared:]])
        # Rounding may let the first segment of a part reach into the part before.
        first = segment.start if shared else own.start
        cam_to_world[first : segment.stop] = blended[first - segment.start :]
    return cam_to_world


def frame_figures(plan: Plan, views: Mapping[int, Views]) -> dict[str, NDArray[Any]]:
    """Per frame [N]: owning segment, part, median confidence, learning rate and focal length.

    NOWHERE and NaN for frames that no segment owns.
    """
    of_frame = {name: np.full(plan.frames, NOWHERE, np.int32) for name in ("segment", "part")} | {
        name: np.full(plan.frames, np.nan, np.float32) for name in ("confidence", "gate", "focal")
    }
    for segment, own in zip(plan.segments, plan.owner_ranges(), strict=True):
        of_frame["segment"][own.start : own.stop] = segment.index
        of_frame["part"][own.start : own.stop] = segment.part
        if own:
            rows = slice(own.start - segment.start, own.stop - segment.start)
            for name in ("confidence", "gate", "focal"):
                values = getattr(views[segment.index], name)
                of_frame[name][own.start : own.stop] = values[rows]
    return of_frame
