"""What the header of a recording promises, without decoding it: enough to plan, not to trust."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import av
from av.video.stream import VideoStream

from storage.drives import drive_files
from storage.images import ASSUMED_HZ
from storage.media import UnreadableVideo, open_video, require


@dataclass(frozen=True)
class Glance:
    """Frames and duration that a drive seems to have."""

    frames: int
    duration_s: float


def glance_at(location: str) -> Glance:
    """What the headers of a drive's files say; clips that have none count nothing.

    Raises:
        UnreadableVideo: nothing is there, or no header gives a number of frames.
    """
    fs, path = require(location)
    videos, images = ([location], []) if fs.isfile(path) else drive_files(location)
    if images and not videos:
        return Glance(len(images), len(images) / ASSUMED_HZ)
    found = [_clip(video) for video in videos]
    total = Glance(sum(g.frames for g in found), sum(g.duration_s for g in found))
    if not total.frames:
        raise UnreadableVideo(
            f"{location}: its header gives no number of frames; `ttt3r probe` decodes it and "
            "says what is wrong"
        )
    return total


def _clip(location: str) -> Glance:
    try:
        with open_video(location) as (container, stream):
            duration = _duration_s(stream, container.duration)
            rate = stream.average_rate or stream.guessed_rate or Fraction(0)
            frames = stream.frames or round(duration * rate)
            return Glance(frames, duration or (float(frames / rate) if rate else 0.0))
    except UnreadableVideo:
        return Glance(0, 0.0)


def _duration_s(stream: VideoStream, container_duration: int | None) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container_duration or 0) / av.time_base
