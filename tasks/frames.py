"""A drive's frames as the network takes them: preprocessed, decoded once, in lanes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from storage.reconstruction import ReconstructionStore
from storage.records import Chunk, DriveRecord, FrameTable, Plan, Segment
from storage.video import read_frames
from tasks.pipelining import Clock, timed
from tasks.planned import read_plan, read_record
from tasks.transfer import to_device
from ttt3r.config import ModelConfig
from ttt3r.images import fit, preprocess_fast, preprocess_on_device

WINDOW_BYTES = 256 * 2**20  # preprocessed frames that lanes may share
DEVICE_FRAMES = 8  # that a GPU resizes at once
LONGEST_GAP = 50  # frames that nobody wants are decoded up to here; beyond, sought over

Image = NDArray[np.uint8]  # [h, w, 3] RGB


@dataclass(frozen=True)
class DriveInput:
    """What a stage needs to know of a drive: its frames, its plan, its network's sizes."""

    record: DriveRecord
    frames: FrameTable
    plan: Plan
    config: ModelConfig
    device: torch.device | None = None  # that resizes frames; None: the CPU, one by one

    @classmethod
    def from_store(
        cls, store: ReconstructionStore, config: ModelConfig, device: torch.device | None = None
    ) -> DriveInput:
        """What the store knows of its drive."""
        record = read_record(store)
        frames = FrameTable.from_arrays(store.read_frames())
        return cls(record, frames, read_plan(store), config, device)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the network's input, pixels."""
        shape = fit(
            self.record.width, self.record.height, self.config.image_size, self.config.patch_size
        )
        return shape.height, shape.width

    def read(
        self,
        start: int,
        stop: int,
        clock: Clock | None = None,
        given_up: threading.Event | None = None,
    ) -> Iterator[Image]:
        """Preprocessed RGB frames [h, w, 3] of the drive from `start` to `stop`.

        Raises:
            GivenUp: `given_up` was set.
        """
        clock = Clock() if clock is None else clock
        decoded = read_frames(self.record, self.frames, start, stop, given_up=given_up)
        decoded = timed(decoded, clock, "decode")
        if self.device is not None:
            yield from self._resized_on_device(decoded, clock)
            return
        for frame in decoded:
            with clock.measure("preprocess"):
                image = preprocess_fast(frame, self.config.image_size, self.config.patch_size)
            yield image

    def _resized_on_device(self, frames: Iterator[Image], clock: Clock) -> Iterator[Image]:
        """Some frames at a time, in a stream of the device's work of their own."""
        assert self.device is not None
        with ExitStack() as beside:
            if self.device.type == "cuda":  # not behind what the network has queued
                beside.enter_context(torch.cuda.stream(torch.cuda.Stream(self.device)))
            while batch := list(islice(frames, DEVICE_FRAMES)):
                with clock.measure("preprocess"):
                    sent = to_device(np.stack(batch), self.device)
                    size, patch = self.config.image_size, self.config.patch_size
                    images = preprocess_on_device(sent, size, patch).cpu().numpy()
                yield from images


class FrameWindow:
    """Frames decoded once, in order, for readers that lag behind each other.

    Neighbouring segments run in lock step, each some frames ahead of the one before: one pass
    over the video serves them all. A frame is kept until `forget_before` lets it go.
    """

    def __init__(
        self, drive: DriveInput, stop: int, clock: Clock, given_up: threading.Event | None
    ) -> None:
        self._drive, self._stop, self._clock, self._given_up = drive, stop, clock, given_up
        self._kept: dict[int, Image] = {}
        self._source: Iterator[Image] = iter(())
        self._next: int | None = None  # frame that the source yields next

    def get(self, index: int) -> Image:
        """Frame `index` of the drive."""
        if index in self._kept:
            return self._kept[index]
        if self._next is None or not self._next <= index <= self._next + LONGEST_GAP:
            self._source = self._drive.read(index, self._stop, self._clock, self._given_up)
            self._next = index
        while self._next <= index:
            self._kept[self._next] = next(self._source)
            self._next += 1
        return self._kept[index]

    def forget_before(self, index: int) -> None:
        """Let go of frames that nobody will ask for."""
        for old in [i for i in self._kept if i < index]:
            del self._kept[old]


@dataclass(frozen=True)
class Lanes:
    """Segments that run in lock step, and the rounds of chunks that are to be computed."""

    segments: tuple[Segment, ...]
    rounds: range

    def chunks(self, number: int, chunk_frames: int) -> list[Chunk]:
        """The chunk of every lane in a round; an empty one of a lane that has ended."""
        cut = [segment.chunks(chunk_frames) for segment in self.segments]
        return [cs[number] if number < len(cs) else Chunk(number, 0, 0) for cs in cut]

    @property
    def span(self) -> int:
        """Frames from the first that a lane sees to the last."""
        return max(s.stop for s in self.segments) - min(s.start for s in self.segments)


@dataclass(frozen=True)
class Round:
    """What all lanes see of one chunk each."""

    group: int  # position among the groups that are read
    number: int
    images: NDArray[np.uint8]  # [L, T, h, w, 3]
    present: NDArray[np.bool_]  # [L, T]; lanes that end early are padded by black frames
    seconds: dict[str, float]  # that reading it took, by stage


def read_rounds(
    drive: DriveInput,
    groups: Sequence[Sequence[Segment]],
    order: Iterable[int],
    open_group: Callable[[int], Lanes],
    given_up: threading.Event | None = None,
) -> Iterator[Round]:
    """The rounds of some groups, one after the other; neighbouring groups share a decoder.

    Args:
        drive: what is read.
        groups: segments that run in lock step.
        order: positions of the groups that are read, asked for one by one; frames of a group before
            the last one are decoded again.
        open_group: says, just before the group at a position is read, which of its rounds are
            wanted.
        given_up: ends the reading once it is set.

    Raises:
        GivenUp: `given_up` was set.
    """
    clock, frames = Clock(), drive.plan.chunk_frames
    longest = max((Lanes(tuple(g), range(0)).span for g in groups), default=0)
    shared = FrameWindow(drive, drive.plan.frames, clock, given_up)
    one_window = longest * _frame_bytes(drive) <= WINDOW_BYTES
    for position in order:
        segments = groups[position]
        after = min((s.start for g in groups[position + 1 :] for s in g), default=None)
        windows = [
            shared if one_window else FrameWindow(drive, s.stop, clock, given_up) for s in segments
        ]
        with clock.measure("prepare"):
            lanes = open_group(position)
        for number in lanes.rounds:
            chunks = lanes.chunks(number, frames)
            images, present = _stack(drive, windows, chunks)
            _forget(windows, chunks, after)
            yield Round(position, number, images, present, clock.take())


def _frame_bytes(drive: DriveInput) -> int:
    height, width = drive.size
    return height * width * 3


def _stack(
    drive: DriveInput, windows: Sequence[FrameWindow], chunks: Sequence[Chunk]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Images of all lanes, and which of them there are."""
    counts = [chunk.stop - chunk.start for chunk in chunks]
    images = np.zeros((len(chunks), max(counts), *drive.size, 3), np.uint8)
    for lane, (window, chunk) in enumerate(zip(windows, chunks, strict=True)):
        for t in range(counts[lane]):
            images[lane, t] = window.get(chunk.start + t)
    return images, np.arange(max(counts)) < np.array(counts)[:, None]


def _forget(windows: Sequence[FrameWindow], chunks: Sequence[Chunk], after: int | None) -> None:
    """Let go of frames that neither a lane of this group nor a later group will want."""
    for window in set(windows):
        lanes = zip(windows, chunks, strict=True)
        wanted = [c.stop for w, c in lanes if w is window and c.stop]
        wanted += [] if after is None else [after]
        window.forget_before(min(wanted, default=0))
