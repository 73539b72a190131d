"""Find out, by decoding all of it, what a recording really holds and how to read it exactly.

A drive is one video, a folder of consecutive clips in natural name order, or a folder of
images. Clips follow each other in time: a clip starts one frame period after the last frame
of the one before. Clips that cannot be read, or whose picture has another size than that of
most frames, are listed as unreadable and the others are used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from storage.backend import clip_record, frame_flags
from storage.clip_scan import (
    ClipScan,
    Progress,
    clip_times,
    positions,
    scan_clip,
)
from storage.drives import drive_files, drive_name
from storage.failures import explaining
from storage.findings import describe_clip, describe_scenes
from storage.images import ASSUMED_HZ, scan_images
from storage.media import (
    UnreadableVideo,
    file_name,
    is_file,
    require,
    size_of,
)
from storage.records import (
    DUPLICATE,
    KEYFRAME,
    MOST_FRAMES,
    Clip,
    DriveRecord,
    FrameTable,
    UnreadableFrame,
)
from storage.scenes import SceneSeries, hard_cuts

MOST_UNREADABLE = 10_000  # places that a record lists; a drive's record stays some MB


@dataclass
class _ClipResult:
    """One clip of a drive: its scan, or why there is none."""

    location: str
    size_bytes: int
    scan: ClipScan | None = None
    error: str = ""


class _TooManyFrames(UnreadableVideo):
    """A drive has more frames than its store could hold."""


def probe_video(location: str, progress: Progress | None = None) -> tuple[DriveRecord, FrameTable]:
    """What one video file holds, as a drive of a single clip.

    Args:
        location: path or fsspec URL of a file.
        progress: called with the number of frames decoded so far.

    Raises:
        UnreadableVideo: missing, not a video, no frame decodes, or more than a drive may have.
        StoreUnavailable: the disk or server that holds it fails.
    """
    with explaining(location, FileNotFoundError):
        return _probe_clips(location, [location], progress)


def probe_drive(location: str, progress: Progress | None = None) -> tuple[DriveRecord, FrameTable]:
    """What a drive holds: a video file, a folder of clips, or a folder of images.

    Args:
        location: path or fsspec URL.
        progress: called with the number of frames decoded so far, over all clips. A damaged
            clip is decoded twice, so the number may fall.

    Raises:
        UnreadableVideo: nothing there, nothing that decodes, or more than a drive may have.
        StoreUnavailable: the disk or server that holds it fails.
    """
    with explaining(location, FileNotFoundError):
        fs, path = require(location)
        if is_file(fs, path):
            return probe_video(location, progress)
        videos, images = drive_files(location)
        if videos:
            return _probe_clips(location, videos, progress)
        if len(images) > MOST_FRAMES:
            raise _too_many(location, len(images))
        if images:
            return _probe_images(location, progress)
    raise UnreadableVideo(
        f"{location}: this folder holds no videos or images itself; if its subfolders do, give "
        "it as a collection"
    )


def _probe_clips(
    location: str, files: Sequence[str], progress: Progress | None
) -> tuple[DriveRecord, FrameTable]:
    results = _scan_clips(files, progress)
    scans = [r.scan for r in results if r.scan]
    if not scans:
        why = "; ".join(r.error for r in results[:3])
        raise UnreadableVideo(why if len(files) == 1 else f"{location}: no clip decodes: {why}")
    _refuse_other_sizes(results)
    return _Assembly(location, results).finish()


def _scan_clips(files: Sequence[str], progress: Progress | None) -> list[_ClipResult]:
    results: list[_ClipResult] = []
    tail: list[NDArray[np.float32]] = []
    done = 0
    for file in files:
        result = _ClipResult(file, 0)
        report = _bounded_progress(file, done, progress)
        try:
            result.size_bytes = size_of(file)
            result.scan = scan_clip(file, result.size_bytes, tail, report)
            tail, done = result.scan.tail, done + result.scan.frames
        except _TooManyFrames:
            raise
        except UnreadableVideo as error:
            result.error = str(error)
        results.append(result)
    return results


def _bounded_progress(file: str, done: int, progress: Progress | None) -> Progress:
    """Tells of the frames of a clip that follows `done` others; ends it where they are too many."""

    def report(frames: int) -> None:
        if done + frames > MOST_FRAMES:
            raise _too_many(file, done + frames)
        if progress:
            progress(done + frames)

    return report


def _too_many(location: str, frames: int) -> _TooManyFrames:
    return _TooManyFrames(
        f"{location}: with it the drive has {frames} frames or more, and at most {MOST_FRAMES} "
        "are read; cut the drive into several, each a folder of fewer files or a shorter video"
    )


def _refuse_other_sizes(results: Sequence[_ClipResult]) -> None:
    """Set aside clips whose size is not that of most frames; of equally many, of the largest."""
    frames: Counter[tuple[int, int]] = Counter()
    for result in results:
        if result.scan:
            frames[result.scan.width, result.scan.height] += result.scan.frames
    width, height = max(frames, key=lambda size: (frames[size], size[0] * size[1]))
    for result in results:
        scan = result.scan
        if scan and (scan.width, scan.height) != (width, height):
            result.error = (
                f"{result.location}: its picture is {scan.width} x {scan.height} pixels, the "
                f"drive's is {width} x {height}"
            )


class _Assembly:
    """Puts scanned clips one behind the other."""

    def __init__(self, location: str, results: Sequence[_ClipResult]) -> None:
        self._location, self._results = location, results
        self._has_many = len(results) > 1
        self._clips: list[Clip] = []
        self._columns: list[tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.uint8]]] = []
        self._series: list[SceneSeries] = []
        self._breaks: list[int] = []  # frames after a clip that is missing
        self._unreadable: list[UnreadableFrame] = []
        self._problems: list[str] = []
        self._next_s = 0.0  # where the next clip begins
        self._periods: list[float] = []

    def finish(self) -> tuple[DriveRecord, FrameTable]:
        """The record and the frame table of the whole drive."""
        for number, result in enumerate(self._results):
            if result.scan is None or result.error:
                self._add_lost(number, result)
            else:
                self._add_clip(number, result.scan)
        table = self._table()
        series = SceneSeries.join(self._series)
        first = next(r.scan for r in self._results if r.scan and not r.error)
        cuts = sorted({*hard_cuts(series), *self._breaks} - {0, len(table)})
        record = DriveRecord(
            name=drive_name(self._location),
            location=self._location,
            clips=tuple(self._clips),
            frames=len(table),
            width=first.width,
            height=first.height,
            fps=1 / float(np.median(self._periods)),
            duration_s=float(table.timestamp[-1]) + self._periods[-1],
            codec=first.codec,
            rotation=(-90 * first.turns) % 360,
            cuts=tuple(cuts),
            unreadable=_bounded(self._unreadable),
            problems=(*self._problems, *describe_scenes(series, table, cuts)),
        )
        return record, table

    def _add_lost(self, number: int, result: _ClipResult) -> None:
        count, after = 0, ""
        if result.scan:
            times = clip_times(result.scan)
            index, missing = positions(result.scan)
            count = len(index) + sum(m.count for m in missing)
            if self._columns:  # else frames after it are the first, and times count from these
                self._next_s += float(times.seconds[-1]) + times.period_s
        elif self._columns and number < len(self._results) - 1:
            after = "; as nobody knows how long it is, times after it are too early"
        reason = result.error.removeprefix(f"{result.location}: ")
        self._clips.append(Clip(result.location, 0, result.size_bytes, "none", reason))
        self._unreadable.append(UnreadableFrame(number, 0, reason, count))
        self._tell(number, f"the clip is left out: {reason}{after}")
        self._breaks.append(self._frames)

    def _add_clip(self, number: int, scan: ClipScan) -> None:
        times = clip_times(scan)
        index, missing = positions(scan)
        self._clips.append(clip_record(scan, times))
        self._columns.append((self._next_s + times.seconds, index, frame_flags(scan)))
        self._next_s += float(times.seconds[-1]) + times.period_s
        self._periods.append(times.period_s)
        assert scan.series is not None  # set by scan_clip
        self._series.append(scan.series)
        self._unreadable += [UnreadableFrame(number, m.index, m.reason, m.count) for m in missing]
        for problem in describe_clip(scan, times, missing):
            self._tell(number, problem)

    @property
    def _frames(self) -> int:
        return sum(clip.frames for clip in self._clips)

    def _tell(self, number: int, problem: str) -> None:
        name = file_name(self._results[number].location)
        self._problems.append(f"{name}: {problem}" if self._has_many else problem)

    def _table(self) -> FrameTable:
        seconds, index, flags = (
            np.concatenate(column) for column in zip(*self._columns, strict=True)
        )
        clip = np.repeat(np.arange(len(self._clips)), [c.frames for c in self._clips])
        is_duplicate = SceneSeries.join(self._series).duplicate
        flags = flags + is_duplicate.astype(np.uint8) * DUPLICATE
        return FrameTable(seconds, clip.astype(np.int32), index, flags.astype(np.uint8))


def _bounded(lost: Sequence[UnreadableFrame]) -> tuple[UnreadableFrame, ...]:
    """The first `MOST_UNREADABLE`, and one for each clip that stands for all that follow."""
    following = groupby(lost[MOST_UNREADABLE:], key=lambda frame: frame.clip)
    rest = [list(frames) for _, frames in following]
    return (*lost[:MOST_UNREADABLE], *map(_together, rest))


def _together(frames: Sequence[UnreadableFrame]) -> UnreadableFrame:
    first, count = frames[0], sum(frame.count for frame in frames)
    reason = first.reason if len(frames) == 1 else f"{first.reason}; more follow, not in one row"
    return replace(first, reason=reason, count=count)


def _probe_images(location: str, progress: Progress | None) -> tuple[DriveRecord, FrameTable]:
    scan = scan_images(location, progress)
    frames = len(scan.index)
    seconds = (scan.index - scan.index[0]) / ASSUMED_HZ
    is_duplicate = np.where(scan.series.duplicate, DUPLICATE, 0)
    flags = (is_duplicate + KEYFRAME).astype(np.uint8)
    table = FrameTable(seconds, np.zeros(frames, np.int32), scan.index, flags)
    cuts = hard_cuts(scan.series)
    problems = [f"images carry no times: {ASSUMED_HZ:g} frames a second are assumed"]
    if scan.lost:
        names = ", ".join(file_name(scan.images[i]) for i in list(scan.lost)[:5])
        problems.append(f"{len(scan.lost)} of {len(scan.images)} images cannot be used ({names})")
    clip = Clip(location, frames, scan.size_bytes, "images", "a folder of images", True)
    return DriveRecord(
        name=drive_name(location),
        location=location,
        clips=(clip,),
        frames=frames,
        width=scan.width,
        height=scan.height,
        fps=ASSUMED_HZ,
        duration_s=float(seconds[-1]) + 1 / ASSUMED_HZ,
        codec=scan.codec,
        rotation=scan.rotation,
        cuts=tuple(cuts),
        unreadable=_bounded([UnreadableFrame(0, i, why) for i, why in scan.lost.items()]),
        problems=(*problems, *describe_scenes(scan.series, table, cuts)),
    ), table
