"""Decord on short stretches of a recording: bounded memory, counted frames.

Given a whole file, decord decodes ahead without bound whenever its caller pauses (one frame
read, then idle: 73 to 1380 MB within 6 s for a 50 MB file), reads remote files into memory as
a whole and takes another track than the first where there are several. Given a window, the
packets of a few whole groups of frames copied into a small file in memory, it can hold no
more than the window's frames, and every window's count is checked.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import decord
import numpy as np
from av.error import FFmpegError
from av.packet import Packet
from av.video.stream import VideoStream
from decord._ffi.base import DECORDError
from numpy.typing import NDArray

from storage.media import open_video, packets_from

WINDOW_BYTES = 512 * 2**20  # RGB frames that decord may hold at once
WINDOW_FRAMES = 32  # groups of packets are read together up to this many frames
THREADS = 4
FRAME_PERIOD = Fraction(1, 25)  # of a window's file, whatever the recording's times are
ONE_TICK = {"video_track_timescale": str(1 / FRAME_PERIOD)}  # is a frame period

decord.logging.set_level(decord.logging.QUIET)


class DecordFailure(Exception):
    """Decord does not give the frames that a window holds."""


@dataclass(frozen=True)
class Window:
    """Whole groups of packets as an MP4 file of their own, in which frames follow evenly."""

    data: bytes
    pts: NDArray[np.int64]  # [n] timestamps of its frames in the recording, ascending


def window_target(width: int, height: int) -> int:
    """Frames that a window holds at least, unless the recording ends."""
    return max(1, min(WINDOW_FRAMES, WINDOW_BYTES // (width * height * 3)))


def read_windows(
    location: str, key_pts: int | None, last_pts: int, least_frames: int
) -> Iterator[Window]:
    """Windows from the key frame at `key_pts` (None: the first) to that which holds `last_pts`.

    Raises:
        SeekMissed: the key frame is not found; before the first window.
        DecordFailure: no window can be made of the packets.
    """
    with open_video(location) as (container, stream):
        held: list[Packet] = []
        for packet in packets_from(container, stream, key_pts):
            is_past = packet.pts is not None and packet.pts > last_pts
            if packet.is_keyframe and held and (is_past or len(held) >= least_frames):
                yield _window(held, stream)
                held = []
                if is_past:
                    return
            held.append(packet)
        if held:
            yield _window(held, stream)


def decode_window(
    window: Window, size: tuple[int, int], wanted: Sequence[int], repeats: NDArray[np.bool_]
) -> Iterator[NDArray[np.uint8]]:
    """RGB frames [H, W, 3] at the ascending positions `wanted` of a window.

    Args:
        window: as `read_windows` yields it.
        size: (width, height) in pixels that its frames must have.
        wanted: positions in the window.
        repeats: of each of its frames, whether it may equal the one before.

    Raises:
        DecordFailure: decord fails, its frames are not as many or as large as they should be, or
            it gives a neighbour, without a word, in place of one that it cannot decode.
    """
    before = None
    try:
        reader = decord.VideoReader(io.BytesIO(window.data), num_threads=THREADS)
        if len(reader) != len(window.pts):
            raise DecordFailure(f"decord counts {len(reader)} frames of {len(window.pts)}")
        for position in range(wanted[-1] + 1):
            frame = reader.next().asnumpy()
            if frame.shape != (size[1], size[0], 3):
                raise DecordFailure(f"decord gives a frame of shape {frame.shape}")
            if not repeats[position] and _are_equal(frame, before):
                raise DecordFailure(f"decord repeats frame {position - 1} of a window")
            if position in wanted:
                yield frame
            before = frame
    except (DECORDError, StopIteration) as error:
        reason = (str(error).splitlines() or ["no more frames"])[0]
        raise DecordFailure(f"decord fails: {reason}") from error


def _are_equal(frame: NDArray[np.uint8], before: NDArray[np.uint8] | None) -> bool:
    if before is None or not np.array_equal(frame[::16, ::16], before[::16, ::16]):
        return False
    return np.array_equal(frame, before)


def _window(held: Sequence[Packet], stream: VideoStream) -> Window:
    pts = np.array([packet.pts for packet in held], np.int64)
    # Timed by rank: decord's FFmpeg orders frames wrong where timestamps lie 2^28 ticks apart.
    rank = np.argsort(np.argsort(pts, kind="stable"), kind="stable")
    places = np.arange(len(held))
    shown = rank + np.max(places - rank)  # none before it is decoded
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4", options=ONE_TICK) as output:
            track = output.add_stream_from_template(stream)
            for packet, dts, at in zip(held, places.tolist(), shown.tolist(), strict=True):
                packet.stream, packet.time_base = track, FRAME_PERIOD
                packet.pts, packet.dts, packet.duration = at, dts, 1
                output.mux(packet)
    except FFmpegError as error:
        raise DecordFailure(f"its packets do not fit into an MP4 file: {error.strerror}") from error
    return Window(buffer.getvalue(), np.sort(pts))
