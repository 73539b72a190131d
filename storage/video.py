"""Exact frames out of recordings: any range, any format, memory that does not grow.

Frames are addressed by presentation timestamp: reading starts at the key frame before the
first wanted frame and matches timestamps to those that probing found. Files in which that
does not lead to the same pictures are decoded from their beginning. Decord decodes what
probing shows it right for (`Clip.backend`), PyAV all else; their pictures are the same.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from storage.decord_windows import DecordFailure, decode_window, read_windows, window_target
from storage.errors import GivenUp
from storage.failures import explaining
from storage.images import read_images
from storage.media import (
    ALL_THREADS,
    SINGLE_THREAD,
    RgbConverter,
    SeekMissed,
    UnreadableVideo,
    decode_steps,
    open_video,
    upright_size,
)
from storage.records import DUPLICATE, KEYFRAME, DriveRecord, FrameTable

log = logging.getLogger(__name__)

Frame = NDArray[np.uint8]
T = TypeVar("T")


def read_frames(
    record: DriveRecord,
    table: FrameTable,
    start: int,
    stop: int,
    step: int = 1,
    size: tuple[int, int] | None = None,
    given_up: threading.Event | None = None,
) -> Iterator[Frame]:
    """Frames `start`, `start + step`, ... below `stop` of a drive, in order, across its clips.

    Args:
        record: what `probe_drive` found.
        table: the frame table that came with it.
        start: first frame of the drive.
        stop: end of the range, not included.
        step: distance between the frames that are wanted.
        size: (width, height) in pixels to resample to; None keeps the recording's.
        given_up: ends the reading once it is set, also on the way to a frame far behind `start`.

    Yields:
        uint8 RGB [H, W, 3], upright.

    Raises:
        ValueError: the range is not inside the drive, or the table is not the record's.
        UnreadableVideo: a frame that decoded when probed does not any more.
        StoreUnavailable: the disk or server that holds the recording fails.
        GivenUp: `given_up` was set.
    """
    if not 0 <= start <= stop <= record.frames or step < 1:
        raise ValueError(
            f"frames {start} to {stop} in steps of {step} are asked for; {record.name} has "
            f"frames 0 to {record.frames}, and a step is at least 1"
        )
    if len(table) != record.frames:
        raise ValueError(
            f"the frame table has {len(table)} rows, {record.name} has {record.frames} frames; "
            "take the table that probing returned with the record"
        )
    frames = _read(record, table, range(start, stop, step), given_up or threading.Event())
    return frames if size is None else (_resized(frame, size) for frame in frames)


def _read(
    record: DriveRecord, table: FrameTable, wanted: range, given_up: threading.Event
) -> Iterator[Frame]:
    for number in range(len(record.clips)):
        rows = table.rows_of(number)
        inside = _inside(wanted, rows)
        if inside:
            reader = _ClipReader(record, table, number, given_up)
            with explaining(record.clips[number].location, FileNotFoundError):
                yield from _until(given_up, reader.read(_shifted(inside, -rows.start)))


def _until(given_up: threading.Event, items: Iterable[T]) -> Iterator[T]:
    """`items`, as long as they are wanted."""
    for item in items:
        if given_up.is_set():
            raise GivenUp("nobody waits any more for the frames that are read")
        yield item


def _inside(wanted: range, rows: range) -> range:
    """The part of `wanted` within `rows`."""
    skipped = max(0, -((wanted.start - rows.start) // wanted.step))
    return range(wanted.start + skipped * wanted.step, min(wanted.stop, rows.stop), wanted.step)


def _shifted(rows: range, by: int) -> range:
    return range(rows.start + by, rows.stop + by, rows.step)


def _resized(frame: Frame, size: tuple[int, int]) -> Frame:
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


class _ClipReader:
    """Reads frames of one clip by their row: 0 is the first frame of the clip that decodes."""

    def __init__(
        self, record: DriveRecord, table: FrameTable, number: int, given_up: threading.Event
    ) -> None:
        rows = table.rows_of(number)
        mine = slice(rows.start, rows.stop)
        self._clip, self._given_up = record.clips[number], given_up
        self._threads = SINGLE_THREAD if self._clip.is_damaged else ALL_THREADS
        self._size = (record.width, record.height)
        self._seconds = table.timestamp[mine]
        self._index = table.index[mine]
        self._keys = np.flatnonzero(table.flags[mine] & KEYFRAME)
        self._repeats = (table.flags[mine] & DUPLICATE) > 0
        self._lost = sum(u.count for u in record.unreadable if u.clip == number)
        if self._clip.time_base:
            ticks = (self._seconds - self._seconds[0]) / float(Fraction(self._clip.time_base))
            self._pts = self._clip.first_pts + np.rint(ticks).astype(np.int64)

    def read(self, wanted: range) -> Iterator[Frame]:
        """Rows `wanted`, in order; at least one."""
        if self._clip.backend == "images":
            count = self._clip.frames + self._lost
            return read_images(self._clip, self._index, count, self._size, wanted)
        if not self._clip.is_seekable:
            return self._read_in_order(wanted)
        if self._clip.backend == "decord":
            return self._read_by_decord(wanted)
        return self._read_by_time(wanted)

    def _read_in_order(self, wanted: range) -> Iterator[Frame]:
        """Count frames from the beginning, as probing did."""
        converter, row = RgbConverter(self._clip.location), 0
        with open_video(self._clip.location, self._threads) as (container, stream):
            steps = _until(self._given_up, decode_steps(container, stream))
            for frame in (f for step in steps for f in step.frames):
                if upright_size(frame) != self._size:
                    continue
                if row in wanted:
                    yield converter.convert(frame)
                if row == wanted[-1]:
                    return
                row += 1
        raise self._gone(row)

    def _read_by_time(self, wanted: range) -> Iterator[Frame]:
        """Decode from the key frame before the first wanted row, and match timestamps."""
        try:
            yield from self._match_times(wanted, self._key_before(wanted[0]))
        except SeekMissed as error:  # it comes before the first frame
            log.warning("%s: %s; decoding from the beginning", self._clip.location, error)
            yield from self._match_times(wanted, None)

    def _match_times(self, wanted: range, key_pts: int | None) -> Iterator[Frame]:
        converter, rows = RgbConverter(self._clip.location), iter(wanted)
        row = next(rows)
        with open_video(self._clip.location, self._threads) as (container, stream):
            steps = _until(self._given_up, decode_steps(container, stream, key_pts))
            for frame in (f for step in steps for f in step.frames):
                if frame.pts is None or frame.pts < self._pts[row]:
                    continue
                if frame.pts > self._pts[row] or upright_size(frame) != self._size:
                    break
                yield converter.convert(frame)
                if row == wanted[-1]:
                    return
                row = next(rows)
        raise self._gone(row)

    def _read_by_decord(self, wanted: range) -> Iterator[Frame]:
        """Decode by decord; from where it fails on, by PyAV."""
        done = 0
        try:
            for frame in self._decord_frames(wanted):
                yield frame
                done += 1
        except (DecordFailure, SeekMissed) as error:
            log.warning("%s: %s; PyAV reads the rest", self._clip.location, error)
        if done < len(wanted):
            yield from self._read_by_time(wanted[done:])

    def _decord_frames(self, wanted: range) -> Iterator[Frame]:
        key_pts = self._key_before(wanted[0])
        last_pts = int(self._pts[wanted[-1]])
        least = window_target(*self._size)
        for window in read_windows(self._clip.location, key_pts, last_pts, least):
            first = int(np.searchsorted(self._pts, window.pts[0]))
            rows = range(first, first + len(window.pts))
            if not np.array_equal(window.pts, self._pts[rows.start : rows.stop]):
                raise DecordFailure(f"the packets from frame {first} on are not those probed")
            inside = _inside(wanted, rows)
            if inside:
                repeats = self._repeats[rows.start : rows.stop]
                yield from decode_window(window, self._size, _shifted(inside, -first), repeats)

    def _key_before(self, row: int) -> int | None:
        """Timestamp of the last key frame up to `row`; None where decoding must start at 0."""
        before = self._keys[self._keys <= row]
        return int(self._pts[before[-1]]) if len(before) and before[-1] > 0 else None

    def _gone(self, row: int) -> UnreadableVideo:
        return UnreadableVideo(
            f"{self._clip.location}: frame {row}, at {self._seconds[row] - self._seconds[0]:.2f} "
            "s of the clip, decoded when it was probed and does not now; the file has changed "
            "or its storage fails: probe it again"
        )
