"""What is known of a drive and how it is cut: the records that every stage shares.

Frames are numbered over the whole drive, 0 .. N-1, in presentation order over all clips;
only frames that decode have a number. Ranges are half-open.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.wording import redacted

KEYFRAME = 1  # FrameTable.flags: decoding can start at this frame
DAMAGED = 2  # FrameTable.flags: decodes, but the decoder had to patch the picture
DUPLICATE = 4  # FrameTable.flags: no visible change from the frame before
MOST_FRAMES = 2**24  # of a drive: a day at 190 frames a second
MOST_COVERS = 3  # segments that hold a frame; plans have at most two, but for roundings
NOWHERE = -1  # part of a segment, and part and segment of a frame, that has no result


@dataclass(frozen=True)
class Clip:
    """One video file, or one folder of images, of a drive."""

    location: str  # path or fsspec URL
    frames: int  # frames that decode
    size_bytes: int
    backend: str  # "decord", "pyav", "images", or "none" where no frame decodes
    reason: str = ""  # why this backend
    is_seekable: bool = False  # frames can be found by timestamp; else decode from the beginning
    is_damaged: bool = False  # decoding it meets errors: decode with one thread, so that
    # the pictures patched up by the decoder are the same each time
    time_base: str = ""  # seconds a tick, as a fraction such as "1/30000"
    first_pts: int = 0  # ticks: presentation timestamp of the first frame


@dataclass(frozen=True)
class UnreadableFrame:
    """A frame that the recording promises and that cannot be decoded.

    Of very many the last of a clip stands for all that follow, wherever they are.
    """

    clip: int  # index into DriveRecord.clips
    index: int  # position in the clip, in presentation order where known
    reason: str
    count: int = 1  # frames from `index` on that share this reason; 0 where unknown


@dataclass(frozen=True)
class DriveRecord:
    """What a recording really holds, as found by decoding all of it."""

    name: str
    location: str
    clips: tuple[Clip, ...]
    frames: int  # frames that decode, over all clips
    width: int  # pixels, after rotation
    height: int  # pixels, after rotation
    fps: float  # median rate of the frame timestamps
    duration_s: float
    codec: str
    rotation: int  # degrees clockwise that were applied: 0, 90, 180 or 270
    cuts: tuple[int, ...] = ()  # frames that start a new scene (hard cuts), ascending, never 0
    unreadable: tuple[UnreadableFrame, ...] = ()
    problems: tuple[str, ...] = ()  # plain words, for people

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DriveRecord:
        """Inverse of `to_json`."""
        return cls(
            **{
                **data,
                "clips": tuple(Clip(**clip) for clip in data["clips"]),
                "unreadable": tuple(UnreadableFrame(**u) for u in data["unreadable"]),
                "cuts": tuple(data["cuts"]),
                "problems": tuple(data["problems"]),
            }
        )


@dataclass(frozen=True)
class FrameTable:
    """When and where each frame of a drive is; row n is frame n of the drive.

    Shapes are checked at creation: a mismatch raises ValueError.
    """

    timestamp: NDArray[np.float64]  # [N] seconds from the first frame, non-decreasing
    clip: NDArray[np.int32]  # [N] index into DriveRecord.clips
    index: NDArray[np.int32]  # [N] position in the clip, unreadable frames counted
    flags: NDArray[np.uint8]  # [N] sum of KEYFRAME, DAMAGED, DUPLICATE

    def __post_init__(self) -> None:
        shapes = {name: np.shape(array) for name, array in self.to_arrays().items()}
        if len(set(shapes.values())) != 1 or self.timestamp.ndim != 1:
            raise ValueError(f"a frame table needs four arrays of one length [N], got {shapes}")

    def __len__(self) -> int:
        return len(self.timestamp)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The columns by name, ready to be stored."""
        return {
            "timestamp": self.timestamp,
            "clip": self.clip,
            "index": self.index,
            "flags": self.flags,
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> FrameTable:
        """Inverse of `to_arrays`; without `flags`, every clip is read from its beginning."""
        timestamp = np.asarray(arrays["timestamp"], np.float64)
        return cls(
            timestamp,
            np.asarray(arrays["clip"], np.int32),
            np.asarray(arrays["index"], np.int32),
            np.asarray(arrays.get("flags", np.zeros(timestamp.shape)), np.uint8),
        )

    def rows_of(self, clip: int) -> range:
        """Frames of the drive that clip number `clip` holds."""
        first, stop = np.searchsorted(self.clip, [clip, clip + 1])
        return range(int(first), int(stop))

    def numbers(self, record: DriveRecord) -> NDArray[np.int64]:
        """[N] place of every frame among all of the recording, from 0, one clip behind the other.

        Frames that cannot be decoded count, so that a file with a line, or an image, for every
        frame that was recorded can be paired with those of the drive.

        Raises:
            ValueError: nobody knows how many frames a clip has that others follow.
        """
        before = np.zeros(len(record.clips) + 1, np.int64)
        for number, clip in enumerate(record.clips):
            counts = [lost.count for lost in record.unreadable if lost.clip == number]
            if not all(counts) and (self.clip > number).any():
                raise ValueError(
                    f"{redacted(clip.location)} holds frames that nobody can count, so that the "
                    "numbers of those after it are unknown; use a format with times (tum)"
                )
            before[number + 1] = before[number] + clip.frames + sum(counts)
        return before[self.clip] + self.index


@dataclass(frozen=True)
class Chunk:
    """Frames written together: one Zarr shard in time, one unit of commit and of resume."""

    index: int  # within the segment
    start: int  # frame of the drive
    stop: int


@dataclass(frozen=True)
class Segment:
    """Frames of one recurrent stream: sequential inside, independent of all others."""

    index: int
    start: int  # first frame of the drive that the stream sees
    stop: int
    part: int  # trajectory part: segments of one part overlap, parts are never aligned;
    # NOWHERE in plans `without` the segment

    @property
    def frames(self) -> int:
        """Number of frames."""
        return self.stop - self.start

    def count_chunks(self, chunk_frames: int) -> int:
        """Number of chunks of `chunk_frames`."""
        return -(-self.frames // chunk_frames)

    def chunk(self, index: int, chunk_frames: int) -> Chunk:
        """One of the chunks of `chunk_frames`; the last one may be shorter."""
        start = self.start + index * chunk_frames
        return Chunk(index, start, min(start + chunk_frames, self.stop))

    def chunks(self, chunk_frames: int) -> list[Chunk]:
        """Cut into chunks of `chunk_frames`; the last one may be shorter."""
        return [self.chunk(i, chunk_frames) for i in range(self.count_chunks(chunk_frames))]


@dataclass(frozen=True)
class Plan:
    """How a drive is cut into segments and chunks."""

    frames: int
    chunk_frames: int
    segments: tuple[Segment, ...]

    @property
    def parts(self) -> int:
        """Number of trajectory parts."""
        return 1 + max((s.part for s in self.segments), default=-1)

    @property
    def present(self) -> tuple[Segment, ...]:
        """Segments that have a part, in order."""
        return tuple(s for s in self.segments if s.part != NOWHERE)

    def without(self, missing: Collection[int]) -> Plan:
        """The plan with the segments `missing` in no part; a part ends where one is missing."""
        part, before, segments = NOWHERE, None, []
        for segment in self.segments:
            if segment.index in missing:
                segments.append(replace(segment, part=NOWHERE))
                before = None
                continue
            if before is None or before.part != segment.part:
                part += 1
            segments.append(replace(segment, part=part))
            before = segment
        return replace(self, segments=tuple(segments))

    def overlap(self, segment: Segment) -> range:
        """Frames shared with the segment before it; none for the first segment of a part."""
        if segment.index == 0 or segment.part == NOWHERE:
            return range(0)
        before = self.segments[segment.index - 1]
        if before.part != segment.part:
            return range(0)
        return range(segment.start, before.stop)

    def owner_ranges(self) -> list[range]:
        """For each segment, the frames it owns: a seam splits an overlap in the middle.

        Together they are all frames of the drive but those that only missing segments hold.
        """
        ranges, free = [], 0  # `free`: first frame without an owner
        for segment in self.segments:
            if segment.part == NOWHERE:
                ranges.append(range(free, free))
                continue
            follower = self.segments[segment.index + 1 : segment.index + 2]
            shared = self.overlap(*follower) if follower else range(0)
            stop = shared.start + len(shared) // 2 if shared else segment.stop
            ranges.append(range(max(segment.start, free), stop))
            free = stop
        return ranges

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Inverse of `to_json`.

        Raises:
            ValueError: no drive has such a plan; it would fill the memory, or lead nowhere.
        """
        segments = tuple(Segment(**segment) for segment in data["segments"])
        plan = cls(data["frames"], data["chunk_frames"], segments)
        if not plan._is_possible():
            raise ValueError(
                f"the plan of {plan.frames} frames in {len(segments)} segments and chunks of "
                f"{plan.chunk_frames} frames is that of no drive"
            )
        return plan

    def _is_possible(self) -> bool:
        if not 0 <= self.frames <= MOST_FRAMES or self.chunk_frames < 1:
            return False
        for index, segment in enumerate(self.segments):
            if segment.index != index or not 0 <= segment.start < segment.stop <= self.frames:
                return False
        return sum(s.frames for s in self.segments) <= MOST_COVERS * self.frames
