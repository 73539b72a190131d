"""A drive's frames as the network takes them: preprocessed, decoded once, in lanes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.reconstruction import ReconstructionStore
from storage.records import Chunk, DriveRecord, Plan, Segment
from storage.video import FrameTable, read_frames
from tasks.plan import read_plan
from ttt3r.config import ModelConfig
from ttt3r.images import fit, preprocess_fast

WINDOW_BYTES = 256 * 2**20  # preprocessed frames that lanes may share


@dataclass(frozen=True)
class DriveInput:
    """What a stage needs to know of a drive: its frames, its plan, its network's sizes."""

    record: DriveRecord
    frames: FrameTable
    plan: Plan
    config: ModelConfig

    @classmethod
    def from_store(cls, store: ReconstructionStore, config: ModelConfig) -> DriveInput:
        """What the store knows of its drive."""
        record = DriveRecord.from_json(store.attributes["drive"])
        return cls(record, FrameTable.from_arrays(store.read_frames()), read_plan(store), config)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the network's input, pixels."""
        shape = fit(
            self.record.width, self.record.height, self.config.image_size, self.config.patch_size
        )
        return shape.height, shape.width

    def read(self, start: int, stop: int) -> Iterator[NDArray[np.uint8]]:
        """Preprocessed RGB frames [h, w, 3] of the drive from `start` to `stop`."""
        for frame in read_frames(self.record, self.frames, start, stop):
            yield preprocess_fast(frame, self.config.image_size, self.config.patch_size)


class FrameWindow:
    """Frames decoded once, in order, for readers that lag behind each other.

    Neighbouring segments run in lock step, each some frames ahead of the one before: one pass
    over the video serves them all. A frame is kept until `forget_before` lets it go.
    """

    def __init__(self, drive: DriveInput, stop: int) -> None:
        self._drive, self._stop = drive, stop
        self._kept: dict[int, NDArray[np.uint8]] = {}
        self._source: Iterator[NDArray[np.uint8]] = iter(())
        self._next: int | None = None  # frame that the source yields next

    def get(self, index: int) -> NDArray[np.uint8]:
        """Frame `index` of the drive."""
        if index in self._kept:
            return self._kept[index]
        if self._next is None or index < self._next:
            self._source, self._next = self._drive.read(index, self._stop), index
        while self._next <= index:
            self._kept[self._next] = next(self._source)
            self._next += 1
        return self._kept[index]

    def forget_before(self, index: int) -> None:
        """Let go of frames that nobody will ask for."""
        for old in [i for i in self._kept if i < index]:
            del self._kept[old]


def read_rounds(
    drive: DriveInput, lanes: Sequence[Segment], rounds: range
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.bool_]]]:
    """Per round of chunks: images [L, T, h, w, 3] and which of them exist [L, T].

    Lanes that end early are padded by black frames that do not exist.
    """
    chunks = [segment.chunks(drive.plan.chunk_frames) for segment in lanes]
    readers = _lane_readers(drive, lanes)
    for number in rounds:
        current = [cs[number] if number < len(cs) else Chunk(number, 0, 0) for cs in chunks]
        counts = [chunk.stop - chunk.start for chunk in current]
        images = np.zeros((len(lanes), max(counts), *drive.size, 3), np.uint8)
        present = np.zeros(images.shape[:2], bool)
        for lane, (reader, chunk) in enumerate(zip(readers, current, strict=True)):
            for t in range(counts[lane]):
                images[lane, t] = reader.get(chunk.start + t)
            present[lane, : counts[lane]] = True
        for reader in set(readers):
            waiting = zip(readers, current, strict=True)
            reader.forget_before(
                min((c.stop for r, c in waiting if r is reader and c.stop), default=0)
            )
        yield images, present


def _lane_readers(drive: DriveInput, lanes: Sequence[Segment]) -> list[FrameWindow]:
    """One window for all lanes where it is small, else a window (and a decoder) for each."""
    start, stop = min(s.start for s in lanes), max(s.stop for s in lanes)
    height, width = drive.size
    if (stop - start) * height * width * 3 <= WINDOW_BYTES:
        return [FrameWindow(drive, stop)] * len(lanes)
    return [FrameWindow(drive, segment.stop) for segment in lanes]
