"""Which decoder reads a clip right, and whether frames can be found in it by seeking.

Decided by what the scan of the whole clip showed and by trial, never by the file's name.
"""

from __future__ import annotations

from itertools import islice
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from storage.clip_scan import NO_PTS, ClipScan, ClipTimes, largest_group
from storage.decord_windows import WINDOW_BYTES, window_target
from storage.media import (
    ALL_THREADS,
    SINGLE_THREAD,
    SeekMissed,
    decode_steps,
    open_video,
    upright_size,
)
from storage.records import DAMAGED, KEYFRAME, Clip
from storage.scenes import Thumbnailer

# What decord 0.6 was measured to read right: pictures equal PyAV's to the last bit.
DECORD_CONTAINERS = frozenset({"mov", "matroska", "avi"})
DECORD_CODECS = frozenset({"h264", "hevc", "mpeg4", "mjpeg", "vp9"})
DECORD_PIXELS = frozenset({"yuv420p", "yuvj420p"})

SEEK_TRIALS = 3
SEEK_FRAMES = 3  # frames compared after each trial


def clip_record(scan: ClipScan, times: ClipTimes) -> Clip:
    """The clip with the decoder that reads it right, and why."""
    obstacle = _obstacle_to_seeking(scan, times)
    against = (
        (["it is damaged"] if scan.has_errors else [])
        + ([obstacle] if obstacle else [])
        + _against_decord(scan)
    )
    container = scan.container.split(",")[0]
    return Clip(
        location=scan.location,
        frames=scan.frames,
        size_bytes=scan.size_bytes,
        backend="pyav" if against else "decord",
        reason="; ".join(against) or f"{scan.codec} in {container}: groups closed, counts agree",
        is_seekable=obstacle is None,
        is_damaged=scan.has_errors,
        time_base=str(scan.time_base),
        first_pts=scan.pts[0],
    )


def frame_flags(scan: ClipScan) -> NDArray[np.uint8]:
    """[N] KEYFRAME and DAMAGED flags of a clip's frames.

    Where a group of frames is damaged, what the decoder makes of it depends on what came
    before, so decoding may start neither there nor at the group after it.
    """
    pts, keys = np.array(scan.pts, np.int64), np.sort(np.array(scan.key_pts, np.int64))
    hurt = np.searchsorted(keys, _hurt_pts(scan), side="right") - 1
    clean = keys[~np.isin(np.arange(len(keys)), np.r_[hurt, hurt + 1])]
    is_damaged = np.array(scan.damaged, bool)
    return (np.isin(pts, clean) * KEYFRAME + is_damaged * DAMAGED).astype(np.uint8)


def _hurt_pts(scan: ClipScan) -> NDArray[np.int64]:
    """Timestamps where something went wrong."""
    pts = np.array(scan.pts, np.int64)
    last = len(pts) - 1
    errors = [at if at != NO_PTS else int(pts[min(row, last)]) for at, row, _ in scan.errors]
    patched = pts[np.array(scan.damaged, bool)]
    if not scan.has_errors:
        return patched
    lost = np.setdiff1d(np.array(scan.packet_pts, np.int64), pts)
    return np.concatenate([np.array(errors, np.int64), lost, patched])


def _obstacle_to_seeking(scan: ClipScan, times: ClipTimes) -> str | None:
    """Why frames cannot be found by timestamp; None where they can."""
    if not times.is_exact:
        return "its timestamps are missing or out of order"
    ticks = np.rint(times.seconds / float(scan.time_base)).astype(np.int64)
    if not np.array_equal(ticks + scan.pts[0], np.array(scan.pts, np.int64)):
        return "its timestamps are too fine"
    if not _seeks_right(scan):
        return "seeking in it leads to other pictures"
    return None


def _seeks_right(scan: ClipScan) -> bool:
    """Whether decoding from some key frames gives the same pictures as from the start."""
    rows = np.flatnonzero(frame_flags(scan) & KEYFRAME)[1:]
    trials = rows[np.linspace(0, len(rows) - 1, min(SEEK_TRIALS, len(rows))).astype(int)]
    return all(_gives_same(scan, int(row)) for row in trials)


def _gives_same(scan: ClipScan, row: int) -> bool:
    """Whether the first frames from the key frame `row` on are those that the scan saw."""
    thumbnailer = Thumbnailer(scan.location)
    key_pts, stop = scan.pts[row], row + SEEK_FRAMES
    wanted = list(zip(scan.pts[row:stop], scan.checks[row:stop], strict=True))
    threads = SINGLE_THREAD if scan.has_errors else ALL_THREADS
    with open_video(scan.location, threads) as (container, stream):
        steps = decode_steps(container, stream, key_pts)
        frames = (f for step in steps for f in step.frames if f.pts is not None)
        right = (f for f in frames if f.pts is not None and f.pts >= key_pts)
        try:
            got = [
                (f.pts, crc32(thumbnailer.shrink(f).tobytes()))
                for f in islice(right, len(wanted))
                if upright_size(f) == (scan.width, scan.height)
            ]
        except SeekMissed:
            return False
    return got == wanted


def _against_decord(scan: ClipScan) -> list[str]:
    """Everything that speaks against decord; where in doubt, something does."""
    window = largest_group(scan) + window_target(scan.width, scan.height) - 1
    window_bytes = window * scan.width * scan.height * 3
    container = scan.container.split(",")[0]
    starts_right = bool(scan.key_pts) and scan.key_pts[0] == scan.packet_pts[0]
    checks = [
        (container not in DECORD_CONTAINERS, f"decord is not trusted with {container}"),
        (scan.codec not in DECORD_CODECS, f"decord is not trusted with {scan.codec}"),
        (scan.pixel_format not in DECORD_PIXELS, f"decord differs for {scan.pixel_format}"),
        (scan.turns, "it is rotated"),
        (scan.is_mirrored, "it is mirrored"),
        (scan.interlaced, "it is interlaced"),
        (scan.width % 2 or scan.height % 2, "its size is odd"),
        (scan.odd_sizes, "its size changes"),
        (scan.discarded, "an edit list hides frames"),
        (scan.header_frames not in (0, scan.frames), "the header's count is not what decodes"),
        (scan.leading, "groups of frames are open"),
        (not np.array_equal(np.sort(scan.packet_pts), scan.pts), "packets and frames differ"),
        (not starts_right, "it does not start with a key frame"),
        (
            window_bytes > WINDOW_BYTES,
            f"its key frames are far apart: decord would need {window_bytes >> 20} MiB",
        ),
    ]
    return [reason for speaks_against, reason in checks if speaks_against]
