"""Evaluate: compare a drive's trajectory, and depth, with ground truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from storage.reconstruction import ReconstructionStore
from tasks.export import choose_part
from tasks.planned import read_plan, read_record
from ttt3r.images import Fit, fit
from ttt3r.metrics import (
    associate,
    depth_metrics,
    evaluate_trajectory,
    read_kitti_indexed,
    read_tum,
)
from ttt3r.weights import WeightsInfo

DEPTH_INVALID = (0, 65535)  # of 16-bit PNG depth
METRES_PER_UNIT = 1e-3

Array = NDArray[np.float64]


def evaluate_store(
    url: str, ground_truth: str, format: str, depth: str | None = None
) -> dict[str, float | int | None]:
    """Errors of the longest part of a drive.

    Args:
        url: the drive's store, aligned.
        ground_truth: camera-to-world poses. tum: paired by time with the frames' timestamps;
            kitti: line i is frame i of the drive.
        format: tum or kitti.
        depth: folder of 16-bit PNG files in millimetres, each named by its frame's number.

    Returns:
        The figures of `ttt3r.metrics.evaluate_trajectory`, `frames_without_truth`, and with
        `depth` also `abs_rel`, `delta_125` (both after the trajectory's scale),
        `abs_rel_median_scaled` and `delta_125_median_scaled`.

    Raises:
        ValueError: the file is malformed, or too few frames can be paired.
    """
    store = ReconstructionStore.open(url)
    trajectory = store.read_trajectory()
    part = choose_part(store, None)
    mine = np.flatnonzero(trajectory["part"] == part)
    frames, truth = paired_truth(store, mine, Path(ground_truth), format)
    if len(frames) < 2:
        raise ValueError(
            f"only {len(frames)} of {len(mine)} frames of {url} have a pose in {ground_truth}; "
            "the file belongs to another drive, or its timestamps have another origin"
        )
    figures = dict(evaluate_trajectory(trajectory["cam_to_world"][frames], truth))
    figures["frames_without_truth"] = len(mine) - len(frames)
    if depth is not None:
        scale = float(figures["scale"] or 1.0)
        figures |= depth_figures(store, trajectory, part, Path(depth), scale)
    return figures


def paired_truth(
    store: ReconstructionStore, mine: NDArray[np.int64], path: Path, format: str
) -> tuple[NDArray[np.int64], Array]:
    """Frames of the drive among `mine` that have a true pose, and these poses [N, 4, 4]."""
    if not path.is_file():
        raise ValueError(f"there is no ground truth file {path}")
    if format == "kitti":
        indices, poses = read_kitti_indexed(path)
        known = dict(zip(indices.tolist(), poses, strict=True))
        frames = np.array([frame for frame in mine.tolist() if frame in known], np.int64)
        return frames, np.array([known[frame] for frame in frames.tolist()]).reshape(-1, 4, 4)
    times, poses = read_tum(path)
    record = read_record(store)
    timestamps = store.read_frames()["timestamp"][mine]
    ours, theirs = associate(timestamps, times, 0.5 / record.fps if record.fps else 0.05)
    return mine[ours], poses[theirs]


def depth_figures(
    store: ReconstructionStore,
    trajectory: dict[str, NDArray[Any]],
    part: int,
    folder: Path,
    scale: float,
) -> dict[str, float | int | None]:
    """Depth errors over all frames of a part that have a depth image.

    Each part has metres of its own. The estimate is multiplied by its segment's scale and by
    `scale` (of the trajectory).
    """
    plan = read_plan(store)
    record = read_record(store)
    config = WeightsInfo.from_json(store.attributes["weights"]).config
    shape = fit(record.width, record.height, config.image_size, config.patch_size)
    found, true = [], []
    for path in sorted(folder.glob("*.png")):
        if not path.stem.isdigit() or int(path.stem) >= record.frames:
            continue
        frame = int(path.stem)
        if trajectory["part"][frame] != part:
            continue
        index = int(trajectory["segment"][frame])
        ours = store.read(plan.segments[index], "depth", frame, frame + 1)[0]
        found.append(ours * trajectory["scale"][index] * scale)
        true.append(read_depth(path, shape, (record.width, record.height)))
    if not found:
        raise ValueError(
            f"no depth image in {folder} is named by a frame of part {part} of the drive (12.png)"
        )
    figures: dict[str, float | int | None] = {"depth_frames": len(found)}
    for ending, align in (("", "none"), ("_median_scaled", "median")):
        one = depth_metrics(np.stack(found), np.stack(true), align=align)  # type: ignore[arg-type]
        figures |= {f"{name}{ending}": one[name] for name in ("abs_rel", "delta_125")}
    return figures


def read_depth(path: Path, shape: Fit, size: tuple[int, int]) -> NDArray[np.float32]:
    """True depth [h, w] in metres at the network's pixels (nearest), NaN where invalid.

    Raises:
        ValueError: it is no PNG file, or of another size than the recording.
    """
    try:  # as PNG only: for other kinds Pillow may start a program (EPS: Ghostscript)
        image = Image.open(path, formats=("PNG",))
    except UnidentifiedImageError:
        raise ValueError(f"{path.name} is no PNG file; expected 16-bit depth") from None
    if image.size != size:
        raise ValueError(
            f"{path.name} is {image.size[0]} x {image.size[1]}; the recording is "
            f"{size[0]} x {size[1]}"
        )
    resized = image.resize((shape.resized_width, shape.resized_height), Image.Resampling.NEAREST)
    values = np.asarray(resized)[shape.top :, shape.left :][: shape.height, : shape.width]
    metres = values.astype(np.float32) * METRES_PER_UNIT
    metres[np.isin(values, DEPTH_INVALID)] = np.nan
    return metres
