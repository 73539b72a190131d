"""Evaluate: compare a drive's trajectory, and depth, with ground truth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from storage.reconstruction import ReconstructionStore
from tasks.export import choose_part
from tasks.planned import frame_numbers, read_plan, read_record
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
MOST_PIXELS = 2**22  # that depth is compared at: more would only take memory

Array = NDArray[np.float64]


def evaluate_store(
    url: str,
    ground_truth: str,
    format: str,
    depth: str | None = None,
    time_offset_s: float = 0.0,
) -> dict[str, float | int | None]:
    """Errors of the longest part of a drive.

    Args:
        url: the drive's store, aligned.
        ground_truth: camera-to-world poses. tum: paired by time with the frames' timestamps;
            kitti: line i is frame i of the recording, frames that do not decode counted. Images
            have no times: where the file has a line for each, line i is image i.
        format: tum or kitti.
        depth: folder of 16-bit PNG files in millimetres, each named by its frame's number in the
            recording.
        time_offset_s: what a tum file's clock shows at the recording's first frame.

    Returns:
        The figures of `ttt3r.metrics.evaluate_trajectory`, `frames_without_truth`,
        `frames_elsewhere` (of the drive, in other parts or in none: not evaluated), and with
        `depth` also `abs_rel`, `delta_125` (both after the trajectory's scale),
        `abs_rel_median_scaled` and `delta_125_median_scaled`.

    Raises:
        ValueError: the file is malformed, or too few frames can be paired.
    """
    store = ReconstructionStore.open(url)
    trajectory = store.read_trajectory()
    part = choose_part(store, None)
    mine = np.flatnonzero(trajectory["part"] == part)
    frames, truth = paired_truth(store, mine, Path(ground_truth), format, time_offset_s)
    if len(frames) < 2:
        raise ValueError(
            f"only {len(frames)} of {len(mine)} frames of {url} have a pose in {ground_truth}; "
            "the file belongs to another drive, or its timestamps have another origin"
        )
    figures = dict(evaluate_trajectory(trajectory["cam_to_world"][frames], truth))
    figures["frames_without_truth"] = len(mine) - len(frames)
    figures["frames_elsewhere"] = len(trajectory["part"]) - len(mine)
    if depth is not None:
        scale = float(figures["scale"] or 1.0)
        figures |= depth_figures(store, trajectory, part, Path(depth), scale)
    return figures


def paired_truth(
    store: ReconstructionStore,
    mine: NDArray[np.int64],
    path: Path,
    format: str,
    time_offset_s: float = 0.0,
) -> tuple[NDArray[np.int64], Array]:
    """Frames of the drive among `mine` that have a true pose, and these poses [N, 4, 4]."""
    if not path.is_file():
        raise ValueError(f"there is no ground truth file {path}; expected a local file")
    if format == "kitti":
        return _paired_by_number(store, mine, *read_kitti_indexed(path))
    times, poses = read_tum(path)
    record = read_record(store)
    has_times = record.clips[0].backend != "images"
    images = record.frames + sum(lost.count for lost in record.unreadable)
    if not has_times and len(times) == images:
        return _paired_by_number(store, mine, np.arange(images), poses)
    timestamps = store.read_frames()["timestamp"][mine] + time_offset_s
    try:
        ours, theirs = associate(timestamps, times, 0.5 / record.fps if record.fps else 0.05)
    except ValueError as error:
        if timestamps[0] <= times[-1] and times[0] <= timestamps[-1]:
            raise
        raise ValueError(
            f"{error}; if the file has a clock of its own, give what it shows at the recording's "
            f"first frame as --time-offset (its first pose is at {times[0]:.6f} s)"
        ) from None
    if not has_times and len(ours) < len(mine) / 2:
        raise ValueError(
            f"images have no times, and {path} has {len(times)} poses for {images} images, so that "
            "they cannot be paired by order either; give a file with one pose an image"
        )
    return mine[ours], poses[theirs]


def _paired_by_number(
    store: ReconstructionStore,
    mine: NDArray[np.int64],
    numbers: NDArray[np.int64],
    poses: Array,
) -> tuple[NDArray[np.int64], Array]:
    known = dict(zip(numbers.tolist(), poses, strict=True))
    found = zip(mine.tolist(), frame_numbers(store)[mine].tolist(), strict=True)
    pairs = [(frame, known[number]) for frame, number in found if number in known]
    frames = np.array([frame for frame, _ in pairs], np.int64)
    return frames, np.array([pose for _, pose in pairs]).reshape(-1, 4, 4)


def depth_figures(
    store: ReconstructionStore,
    trajectory: dict[str, NDArray[Any]],
    part: int,
    folder: Path,
    scale: float,
) -> dict[str, float | int | None]:
    """Depth errors over all frames of a part that have a depth image.

    Each part has metres of its own. The estimate is multiplied by its segment's scale and by
    `scale` (of the trajectory). Of more than `MOST_PIXELS` every so many are compared.
    """
    plan = read_plan(store)
    record = read_record(store)
    config = WeightsInfo.from_json(store.attributes["weights"]).config
    shape = fit(record.width, record.height, config.image_size, config.patch_size)
    of_number = {number: frame for frame, number in enumerate(frame_numbers(store).tolist())}
    images = {
        of_number[int(path.stem)]: path
        for path in sorted(folder.glob("*.png"))
        if path.stem.isdigit() and int(path.stem) in of_number
    }
    images = {f: path for f, path in images.items() if trajectory["part"][f] == part}
    every = math.ceil(len(images) * shape.height * shape.width / MOST_PIXELS)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} of depth images; expected a local one")
    found, true = [], []
    for frame, path in images.items():
        index = int(trajectory["segment"][frame])
        ours = store.read(plan.segments[index], "depth", frame, frame + 1)[0]
        ours = ours * np.float32(trajectory["scale"][index] * scale)
        truth = read_depth(path, shape, (record.width, record.height))
        found.append(ours.ravel()[::every])
        true.append(truth.ravel()[::every])
    if not found:
        raise ValueError(
            f"no depth image in {folder} is named by a frame of part {part} of the drive (12.png)"
        )
    figures: dict[str, float | int | None] = {"depth_frames": len(found)}
    ways: dict[str, Literal["none", "median"]] = {"": "none", "_median_scaled": "median"}
    for ending, align in ways.items():
        one = depth_metrics(np.concatenate(found), np.concatenate(true), align=align)
        figures |= {f"{name}{ending}": one[name] for name in ("abs_rel", "delta_125")}
    return figures


def read_depth(path: Path, shape: Fit, size: tuple[int, int]) -> NDArray[np.float32]:
    """True depth [h, w] in metres at the network's pixels (nearest), NaN where invalid.

    Raises:
        ValueError: it is no 16-bit PNG file, or of another size than the recording.
    """
    try:  # as PNG only: for other kinds Pillow may start a program (EPS: Ghostscript)
        opened = Image.open(path, formats=("PNG",))
    except UnidentifiedImageError:
        raise ValueError(f"{path.name} is no PNG file; expected 16-bit depth") from None
    with opened as image:
        if not image.mode.startswith("I"):
            raise ValueError(
                f"{path.name} is a PNG file of mode {image.mode}; expected 16-bit grey: millimetres"
            )
        if image.size != size:
            raise ValueError(
                f"{path.name} is {image.size[0]} x {image.size[1]}; the recording is "
                f"{size[0]} x {size[1]}"
            )
        resized = image.resize(
            (shape.resized_width, shape.resized_height), Image.Resampling.NEAREST
        )
    values = np.asarray(resized)[shape.top :, shape.left :][: shape.height, : shape.width]
    metres = values.astype(np.float32) * METRES_PER_UNIT
    metres[np.isin(values, DEPTH_INVALID)] = np.nan
    return metres
