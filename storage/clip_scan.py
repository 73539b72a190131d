"""One decoding pass over one clip: what comes out, what does not, and when."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from zlib import crc32

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from storage.media import (
    ALL_THREADS,
    SINGLE_THREAD,
    Step,
    UnreadableVideo,
    decode_steps,
    is_mirrored,
    open_video,
    quarter_turns,
    upright_size,
)
from storage.scenes import SceneMeter, SceneSeries, Thumbnailer

NO_PTS = -(2**63)
PROGRESS_FRAMES = 50
HIDDEN_PICTURE_CODECS = frozenset({"vp8", "vp9", "av1"})  # packets that show nothing are normal
JUMP_BACK_S = 1.0  # a timestamp that falls by more starts a new clock
# Share of timestamps that may be out of order. AVI has none: those of frames that wait for later
# ones are made up, and a fifth and more of them is.
MOST_DISORDER = 0.1
NO_PICTURE = "the decoder gave no picture for it; frames that it refers to are missing"

Progress = Callable[[int], None]


@dataclass(frozen=True)
class MissingFrames:
    """Frames of one clip that cannot be had."""

    index: int  # position in the clip of the first
    count: int
    reason: str


@dataclass
class ClipScan:
    """What decoding a clip from end to end showed; columns are in the order of decoding."""

    location: str
    size_bytes: int
    container: str = ""
    codec: str = ""
    pixel_format: str = ""
    width: int = 0  # pixels, after rotation
    height: int = 0
    turns: int = 0  # anticlockwise quarter turns applied
    is_mirrored: bool = False  # upside down, before the turns
    time_base: Fraction = Fraction(1)
    nominal_rate: Fraction | None = None  # frames a second by the header
    pixel_aspect: Fraction | None = None
    video_tracks: int = 1
    header_frames: int = 0
    header_s: float = 0.0  # duration by the header; 0 where it does not say
    indexed_frames: int = 0
    pts: array[int] = field(default_factory=lambda: array("q"))  # of frames
    checks: array[int] = field(default_factory=lambda: array("I"))  # CRC of each thumbnail
    damaged: array[int] = field(default_factory=lambda: array("b"))  # 1: patched by the decoder
    packet_pts: array[int] = field(default_factory=lambda: array("q"))
    key_pts: array[int] = field(default_factory=lambda: array("q"))
    groups: array[int] = field(default_factory=lambda: array("q"))  # packets after each key packet
    errors: list[tuple[int, int, str]] = field(default_factory=list)  # packet pts, frames so far
    odd_sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    odd_pts: array[int] = field(default_factory=lambda: array("q"))  # of frames of another size
    interlaced: int = 0
    discarded: int = 0  # packets that an edit list hides
    incomplete: int = 0  # packets whose bytes are missing in part
    leading: int = 0  # pictures shown before the key frame that they follow in the file
    first_bits: int = 8
    series: SceneSeries | None = None
    tail: list[NDArray[np.float32]] = field(default_factory=list)

    @property
    def frames(self) -> int:
        """Frames that decode at the clip's size."""
        return len(self.pts)

    @property
    def has_errors(self) -> bool:
        """Whether decoding met damaged data."""
        return bool(self.errors or self.incomplete or any(self.damaged))


def scan_clip(
    location: str,
    size_bytes: int,
    tail: Sequence[NDArray[np.float32]] = (),
    progress: Progress | None = None,
) -> ClipScan:
    """Decode all of one video file; `tail` is the `ClipScan.tail` of the clip before.

    A damaged file is decoded a second time with one thread, as the order in which threads
    meet an error changes what the decoder can save.

    Raises:
        UnreadableVideo: not a video, or no frame decodes.
    """
    scan = _scan(location, size_bytes, ALL_THREADS, tail, progress)
    if scan.has_errors:
        scan = _scan(location, size_bytes, SINGLE_THREAD, tail, progress)
    if not scan.frames:
        why = scan.errors[0][2] if scan.errors else "its video track is empty"
        raise UnreadableVideo(f"{location}: no frame decodes: {why}")
    return scan


def _scan(
    location: str,
    size_bytes: int,
    threads: str,
    tail: Sequence[NDArray[np.float32]],
    progress: Progress | None,
) -> ClipScan:
    scan = ClipScan(location, size_bytes)
    meter, thumbnailer = SceneMeter(tail), Thumbnailer(location)
    with open_video(location, threads) as (container, stream):
        _note_header(scan, container, stream)
        for step in decode_steps(container, stream):
            _note_packet(scan, step)
            for frame in step.frames:
                _note_frame(scan, frame, meter, thumbnailer)
                if progress and scan.frames % PROGRESS_FRAMES == 0:
                    progress(scan.frames)
        scan.indexed_frames = len(stream.index_entries)
    if progress:
        progress(scan.frames)
    scan.series, scan.tail = meter.finish(), meter.tail
    return scan


def _note_header(scan: ClipScan, container: InputContainer, stream: VideoStream) -> None:
    scan.container = container.format.name
    scan.codec = stream.codec_context.codec.canonical_name
    scan.time_base = Fraction(stream.time_base or 1)
    scan.nominal_rate = stream.average_rate or stream.guessed_rate
    scan.pixel_aspect = stream.sample_aspect_ratio
    scan.video_tracks = len(container.streams.video)
    scan.header_frames = stream.frames
    if stream.duration is not None:
        scan.header_s = float(stream.duration * scan.time_base)
    elif container.duration is not None:
        scan.header_s = container.duration / av.time_base


def _note_packet(scan: ClipScan, step: Step) -> None:
    packet = step.packet
    pts = NO_PTS if packet is None or packet.pts is None else packet.pts
    if step.error:
        scan.errors.append((pts, scan.frames, step.error))
    if packet is None:
        return
    if packet.is_discard:
        scan.discarded += 1
        return
    scan.incomplete += packet.is_corrupt
    if packet.is_corrupt and not step.error:
        scan.errors.append((pts, scan.frames, "its data are incomplete"))
    scan.packet_pts.append(pts)
    _note_group(scan, packet, pts)


def _note_group(scan: ClipScan, packet: Packet, pts: int) -> None:
    """Keep track of the groups of packets that start with a key packet."""
    if packet.is_keyframe:
        scan.key_pts.append(pts)
        scan.groups.append(0)
    if scan.groups:
        scan.groups[-1] += 1
        scan.leading += pts < scan.key_pts[-1]


def _note_frame(
    scan: ClipScan, frame: VideoFrame, meter: SceneMeter, thumbnailer: Thumbnailer
) -> None:
    pts = NO_PTS if frame.pts is None else frame.pts
    size = upright_size(frame)
    if not scan.frames:
        scan.width, scan.height = size
        scan.turns, scan.is_mirrored = quarter_turns(frame), is_mirrored(frame)
        scan.pixel_format = frame.format.name
        scan.first_bits = max(c.bits for c in frame.format.components)
    if size != (scan.width, scan.height):
        scan.odd_sizes[size] += 1
        scan.odd_pts.append(pts)
        return
    thumbnail = thumbnailer.shrink(frame)
    meter.add(thumbnail)
    scan.pts.append(pts)
    scan.checks.append(crc32(thumbnail.tobytes()))
    scan.damaged.append(frame.is_corrupt)
    scan.interlaced += frame.interlaced_frame


def positions(scan: ClipScan) -> tuple[NDArray[np.int32], list[MissingFrames]]:
    """([N] position in the clip of every frame, the positions that are missing).

    Positions count the frames that the recording holds or promises, in presentation order
    where timestamps tell it.
    """
    pts, promised = np.array(scan.pts, np.int64), np.array(scan.packet_pts, np.int64)
    if NO_PTS in pts or NO_PTS in promised:
        missing = _missing_by_error(scan)
        absent = np.array([m.index for m in missing], np.int64)
        order = np.arange(scan.frames, dtype=np.int64)
        shift = np.searchsorted(absent - np.arange(len(absent)), order, side="right")
    else:
        lost = np.setdiff1d(promised, pts)
        if _has_silent_packets(scan):
            lost = np.array(scan.odd_pts, np.int64)
        known = np.union1d(pts, lost)
        reasons = _reasons(scan)
        missing = [
            MissingFrames(int(np.searchsorted(known, p)), 1, reasons.get(int(p), NO_PICTURE))
            for p in lost
        ]
        unlisted = len(np.intersect1d(np.array(scan.odd_pts, np.int64), pts))
        if unlisted:  # their times are taken by frames of the right size
            missing.append(MissingFrames(len(known), unlisted, reasons[scan.odd_pts[0]]))
        shift = np.searchsorted(np.sort(lost), np.maximum.accumulate(pts))
    index = (np.arange(scan.frames) + shift).astype(np.int32)
    return index, [*_runs(missing), *_missing_tail(scan)]


def _has_silent_packets(scan: ClipScan) -> bool:
    """Whether packets that give no picture are no loss: hidden pictures, single fields."""
    is_usual = scan.codec in HIDDEN_PICTURE_CODECS or scan.interlaced > 0
    return is_usual and not scan.has_errors


def _missing_by_error(scan: ClipScan) -> list[MissingFrames]:
    """Without timestamps, each error stands for one frame, where decoding had got to."""
    lost = max(0, len(scan.packet_pts) - scan.frames)
    return [MissingFrames(e[1] + i, 1, e[2]) for i, e in enumerate(scan.errors[:lost])]


def _reasons(scan: ClipScan) -> dict[int, str]:
    reasons = {pts: error for pts, _, error in scan.errors}
    other = ", ".join(f"{w} x {h}" for w, h in scan.odd_sizes)
    why = f"its size is {other} instead of {scan.width} x {scan.height} pixels"
    return reasons | dict.fromkeys(scan.odd_pts, why)


def _runs(missing: Sequence[MissingFrames]) -> list[MissingFrames]:
    """Neighbours with one reason become one entry."""
    runs: list[MissingFrames] = []
    for one in missing:
        last = runs[-1] if runs else None
        if last and last.reason == one.reason and last.index + last.count == one.index:
            runs[-1] = MissingFrames(last.index, last.count + one.count, last.reason)
        else:
            runs.append(one)
    return runs


def promised_frames(scan: ClipScan) -> int:
    """Frames that the index lists, or the header where there is no index; 0 where neither."""
    if "mov" in scan.container and 0 < scan.indexed_frames < scan.header_frames:
        return scan.indexed_frames  # an edit list hides frames, or the header is false
    return scan.header_frames


def _missing_tail(scan: ClipScan) -> list[MissingFrames]:
    read = len(scan.packet_pts) + scan.discarded
    lost = promised_frames(scan) - read
    if lost <= 0:
        return []
    return [MissingFrames(len(scan.packet_pts), lost, "the file ends before it")]


@dataclass(frozen=True)
class ClipTimes:
    """When the frames of one clip are shown."""

    seconds: NDArray[np.float64]  # [N] from the clip's first frame, non-decreasing
    period_s: float  # usual time between frames
    is_exact: bool  # every frame has its own timestamp, in order, as the file gives it
    problems: tuple[str, ...]


def clip_times(scan: ClipScan) -> ClipTimes:
    """Seconds of every frame, repaired where the recording's clock is broken."""
    pts = np.array(scan.pts, np.int64)
    known = pts != NO_PTS
    tick = float(scan.time_base)
    if not known.any():
        return _by_number(scan, "no frame has a timestamp")
    values = pts[known]
    steps = np.diff(values)
    period = _usual_period(steps[steps > 0] * tick, scan.nominal_rate)
    rebased, problems = _restart_clocks(values, steps, round(period / tick), tick)
    in_order = np.r_[True, rebased[1:] > np.maximum.accumulate(rebased)[:-1]]
    if scan.nominal_rate and np.count_nonzero(~in_order) > MOST_DISORDER * len(values):
        return _by_number(scan, "timestamps are not in the order of the frames")
    good = np.flatnonzero(known)[in_order]
    seconds = (rebased[in_order] - rebased[0]).astype(np.float64) * tick
    if len(good) < len(pts):
        problems.append(
            f"{len(pts) - len(good)} frames have no timestamp, or one out of order: theirs are "
            "put between their neighbours'"
        )
        seconds = _fill(good, seconds, len(pts), period)
    return ClipTimes(seconds, period, not problems, tuple(problems))


def _by_number(scan: ClipScan, why: str) -> ClipTimes:
    """Times of frames at one rate, in their order."""
    period = 1 / float(scan.nominal_rate or 10)
    seconds = np.arange(len(scan.pts), dtype=np.float64) * period
    words = f"{why}: {1 / period:.4g} frames a second are assumed"
    return ClipTimes(seconds, period, False, (words,))


def _usual_period(intervals: NDArray[np.float64], nominal: Fraction | None) -> float:
    """Mean of the intervals near the median: files may round timestamps to milliseconds."""
    if not len(intervals):
        return 1 / float(nominal or 10)
    median = float(np.quantile(intervals, 0.5, method="lower"))  # one of them
    near = np.abs(intervals - median) <= max(0.1 * median, 0.0011)
    return float(intervals[near].mean())


def _restart_clocks(
    values: NDArray[np.int64], steps: NDArray[np.int64], period: int, tick: float
) -> tuple[NDArray[np.int64], list[str]]:
    """Continue after each fall of the clock as if one frame period had passed."""
    falls = steps * tick < -JUMP_BACK_S
    if not falls.any():
        return values, []
    offsets = np.r_[0, np.cumsum(np.where(falls, period - steps, 0))]
    where = ", ".join(str(i + 1) for i in np.flatnonzero(falls)[:5])
    words = f"the clock jumps back {int(falls.sum())} times (at frame {where}): time is continued"
    return values + offsets, [words]


def _fill(
    good: NDArray[np.int64], seconds: NDArray[np.float64], count: int, period: float
) -> NDArray[np.float64]:
    before, after = int(good[0]), count - 1 - int(good[-1])
    places = np.r_[0, good, count - 1]
    times = np.r_[-before * period, seconds, seconds[-1] + after * period]
    filled = np.interp(np.arange(count), places, times)
    return np.asarray(filled - filled[0])


def largest_group(scan: ClipScan) -> int:
    """Packets between neighbouring key packets, at most."""
    return max(scan.groups, default=len(scan.packet_pts))
