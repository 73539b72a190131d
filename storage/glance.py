"""What the header of a recording promises, without decoding it: enough to plan, not to trust."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream

from storage.drives import drive_files
from storage.failures import explaining
from storage.images import ASSUMED_HZ, BAD_IMAGE, open_image
from storage.media import UnreadableVideo, is_file, open_video, require
from storage.records import MOST_FRAMES

# A frame takes more, even one that repeats the last. What promises more frames than fit into the
# file has a clock that jumps, or that began elsewhere than at 0.
LEAST_PACKET_BYTES = 16


@dataclass(frozen=True)
class Glance:
    """Frames, duration and size in pixels that a drive seems to have."""

    frames: int
    duration_s: float
    width: int = 0  # of its first clip; 0: not known
    height: int = 0


def glance_at(location: str) -> Glance:
    """What the headers of a drive's files say; clips that have none count nothing.

    Raises:
        UnreadableVideo: nothing is there, or no header gives a number of frames; says why.
        StoreUnavailable: the disk or server that holds them fails.
    """
    with explaining(location, FileNotFoundError):
        fs, path = require(location)
        videos, images = ([location], []) if is_file(fs, path) else drive_files(location)
        if images and not videos:
            return Glance(len(images), len(images) / ASSUMED_HZ, *_image_size(images[0]))
        seen, reasons = [], []
        for video in videos:
            try:
                seen.append(_clip(video))
            except UnreadableVideo as error:
                reasons.append(error)
    found = [glance for glance in seen if glance.frames]
    if not found and reasons:
        raise reasons[0]
    if not found:
        raise UnreadableVideo(
            f"{location}: its header gives no number of frames; `ttt3r probe` decodes it and "
            "says what is wrong"
        )
    frames, duration_s = sum(g.frames for g in found), sum(g.duration_s for g in found)
    return Glance(frames, duration_s, found[0].width, found[0].height)


def _image_size(location: str) -> tuple[int, int]:
    try:
        with open_image(location) as image:
            return image.size
    except BAD_IMAGE:
        return 0, 0


def _clip(location: str) -> Glance:
    with open_video(location) as (container, stream):
        duration = _duration_s(stream, container.duration)
        rate = stream.average_rate or stream.guessed_rate or Fraction(0)
        frames = stream.frames or round(duration * rate)
        if not 0 < frames <= min(MOST_FRAMES, container.size / LEAST_PACKET_BYTES):
            frames, duration = _count_packets(container, stream), 0.0
        duration = duration or (float(frames / rate) if rate else 0.0)
        return Glance(frames, duration, stream.width, stream.height)


def _duration_s(stream: VideoStream, container_duration: int | None) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container_duration or 0) / av.time_base


def _count_packets(container: InputContainer, stream: VideoStream) -> int:
    """Packets of the track, up to where it breaks: reads the file, decodes nothing."""
    count = 0
    try:
        for packet in container.demux(stream):
            count += packet.size > 0
    except FFmpegError:
        pass
    return count
