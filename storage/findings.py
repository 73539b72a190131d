"""What is odd about a recording, in plain words for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from storage.clip_scan import NO_PTS, ClipScan, ClipTimes, MissingFrames, promised_frames
from storage.records import FrameTable
from storage.scenes import SceneSeries, still_stretches

TELLING_CONTAINERS = ("mov", "matroska")  # their headers state a duration, others' is a guess
SHORT_S = 1.0


def describe_clip(scan: ClipScan, times: ClipTimes, missing: Sequence[MissingFrames]) -> list[str]:
    """Everything about one clip that a user should know."""
    words = [*_describe_count(scan, times), *_describe_errors(scan, times), *times.problems]
    if not (missing and scan.has_errors):  # else the gaps are those of the missing frames
        words += _describe_rate(times)
    damaged, resized = sum(scan.damaged), sum(scan.odd_sizes.values())
    first_s = 0.0 if scan.pts[0] == NO_PTS else scan.pts[0] * float(scan.time_base)
    aspect = float(scan.pixel_aspect or 1)
    checks = [
        (
            abs(first_s) > times.period_s / 2,
            f"first timestamp is {first_s:.3g} s: times here count from the first frame",
        ),
        (damaged, f"{_many(damaged, 'picture')} patched up by the decoder"),
        (scan.interlaced, "interlaced: edges that move are combed"),
        (
            abs(aspect - 1) > 0.01,
            f"pixels are not square ({scan.pixel_aspect}): the picture is used as stored",
        ),
        (scan.video_tracks > 1, f"{scan.video_tracks} video tracks: the first is used"),
        (scan.discarded, f"an edit list hides {_many(scan.discarded, 'frame')}"),
        (resized, f"{_many(resized, 'frame')} of another size left out"),
    ]
    return words + [text for holds, text in checks if holds]


def describe_scenes(series: SceneSeries, table: FrameTable, cuts: Sequence[int]) -> list[str]:
    """Black and frozen stretches and hard cuts of a whole drive."""
    words = still_stretches(series, table.timestamp)
    if cuts:
        at = ", ".join(f"{table.timestamp[c]:.2f} s" for c in cuts[:10])
        more = ", ..." if len(cuts) > 10 else ""
        words.append(
            f"{_many(len(cuts), 'hard cut')} (at {at}{more}): the picture jumps to another scene"
        )
    return words


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _describe_count(scan: ClipScan, times: ClipTimes) -> list[str]:
    """How the frames that decode compare with those promised."""
    read, promised = len(scan.packet_pts), scan.header_frames - scan.discarded
    end_s = float(times.seconds[-1]) + times.period_s
    if promised > read:
        is_cut_off = promised_frames(scan) - scan.discarded > read
        cause = (
            f"the file is cut off after {end_s:.1f} s"
            if is_cut_off
            else "its index does not list the others (hidden by an edit list, or a false header)"
        )
        return [f"the header promises {promised} frames, {scan.frames} decode: {cause}"]
    if scan.has_errors and scan.frames + sum(scan.odd_sizes.values()) < read:
        return [f"the file holds {read} frames, {scan.frames} decode"]
    if scan.container.startswith(TELLING_CONTAINERS) and scan.header_s - end_s > SHORT_S:
        return [f"the header promises {scan.header_s:.1f} s, the pictures end after {end_s:.1f} s"]
    return []


def _describe_errors(scan: ClipScan, times: ClipTimes) -> list[str]:
    words = []
    reasons = Counter(reason for _, _, reason in scan.errors)
    for reason, count in reasons.most_common(3):
        first = next(frames for _, frames, why in scan.errors if why == reason)
        at_s = times.seconds[min(first, scan.frames - 1)]
        words.append(
            f"{_many(count, 'error')} while decoding, the first near {at_s:.1f} s: {reason}; "
            "pictures up to the next key frame may be damaged"
        )
    return words


def _describe_rate(times: ClipTimes) -> list[str]:
    """Variable frame rate and gaps."""
    intervals, period = np.diff(times.seconds), times.period_s
    is_uneven = np.abs(intervals - period) > max(0.1 * period, 0.002)
    is_gap = intervals > 1.5 * period
    words = []
    if is_uneven.any():
        words.append(
            f"variable frame rate: {intervals.min() * 1e3:.0f} to {intervals.max() * 1e3:.0f} ms "
            f"between frames, usually {period * 1e3:.1f} ms"
        )
    if is_gap.any():
        at = ", ".join(f"{t:.2f} s" for t in times.seconds[:-1][is_gap][:5])
        gaps = int(is_gap.sum())
        words.append(f"{_many(gaps, 'gap')} where frames were dropped (after {at})")
    return words
