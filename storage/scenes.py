"""Hard cuts, black and frozen stretches, from a tiny grey picture of every frame.

Memory is five small numbers a frame. A cut is a frame that resembles neither the one before
it nor the rhythm of change around it; motion, however fast, changes neighbouring frames too.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from storage.media import reformat

THUMBNAIL = (36, 64)  # rows, columns

# Measured on the sample recordings: the three real cuts have correlations of 0.13 to 0.45 and
# 10 to 90 times the change around them; the fastest turns 0.74 and 1.2 times.
CUT_CORRELATION = 0.65  # at or above it, two frames show the same scene
CUT_RATIO = 2.5  # times the second largest change nearby
CUT_CHANGE = 4.0  # grey levels; below it nothing happens
CUT_NEIGHBOURS = 4  # frames each side, of those that show a change
CUT_REACH = 30  # frames each side among which they are looked for
REPEATED_CHANGE = 0.1  # grey levels; repeats differ by less, frames of still cameras by 0.4
SAME_PICTURE = 0.85  # correlation across a single odd frame: a glitch, not two cuts

DUPLICATE_CHANGE = 0.02  # grey levels of 255: no visible change
FROZEN_S = 2.0
BLACK_LEVEL = 24.0  # mean grey level; video black is 16 of 255
BLACK_SPREAD = 6.0  # standard deviation, grey levels
BLACK_S = 0.5


class Thumbnailer:
    """Shrinks decoded frames to grey pictures of THUMBNAIL size."""

    def __init__(self, location: str) -> None:
        self._location, self._reformatter = location, VideoReformatter()

    def shrink(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """uint8 [36, 64]; the picture as coded, not rotated."""
        rows, columns = THUMBNAIL
        size = {"width": columns * 2, "height": rows * 2, "interpolation": "FAST_BILINEAR"}
        grey = reformat(self._location, self._reformatter, frame, format="gray", **size)
        blocks = grey.to_ndarray().reshape(rows, 2, columns, 2).astype(np.uint16)
        return ((blocks.sum((1, 3)) + 2) // 4).astype(np.uint8)


@dataclass(frozen=True)
class SceneSeries:
    """How each frame differs from those before it; all arrays [N] float32."""

    change: NDArray[np.float32]  # mean absolute change from the frame before, grey levels
    correlation: NDArray[np.float32]  # with the frame before, -1 to 1
    correlation_two_back: NDArray[np.float32]  # with the frame before that
    level: NDArray[np.float32]  # mean grey level
    spread: NDArray[np.float32]  # standard deviation, grey levels

    @property
    def duplicate(self) -> NDArray[np.bool_]:
        """[N] frames that show no visible change."""
        return np.asarray(self.change < DUPLICATE_CHANGE)

    @classmethod
    def join(cls, parts: Sequence[SceneSeries]) -> SceneSeries:
        """One series after the other."""
        names = cls.__dataclass_fields__
        return cls(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})


class SceneMeter:
    """Measures frames one by one; `tail` lets the next clip's meter go on from here."""

    def __init__(self, tail: Sequence[NDArray[np.float32]] = ()) -> None:
        self.tail = list(tail)  # the last two thumbnails, oldest first
        self._columns = [array("f") for _ in range(5)]

    def add(self, thumbnail: NDArray[np.uint8]) -> None:
        """Measure the next frame."""
        picture = thumbnail.astype(np.float32)
        before = self.tail[-1] if self.tail else None
        row = (
            float(np.abs(picture - before).mean()) if before is not None else np.nan,
            _correlation(picture, before),
            _correlation(picture, self.tail[-2] if len(self.tail) > 1 else None),
            float(picture.mean()),
            float(picture.std()),
        )
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)
        self.tail = [*self.tail[-1:], picture]

    def finish(self) -> SceneSeries:
        """What was measured."""
        return SceneSeries(*(np.array(column, np.float32) for column in self._columns))


def hard_cuts(series: SceneSeries) -> list[int]:
    """Frames that start a new scene, ascending; never the first."""
    different = (series.correlation < CUT_CORRELATION) & (series.change > CUT_CHANGE)
    sudden = [i for i in np.flatnonzero(different) if _is_sudden(series.change, int(i))]
    is_sudden = set(sudden)
    glitches = {
        i for i in sudden if i - 1 in is_sudden and series.correlation_two_back[i] > SAME_PICTURE
    }
    return [int(i) for i in sudden if i not in glitches and i + 1 not in glitches]


def still_stretches(series: SceneSeries, timestamps: NDArray[np.float64]) -> list[str]:
    """Black and frozen stretches in plain words."""
    black = (series.level < BLACK_LEVEL) & (series.spread < BLACK_SPREAD)
    frozen = series.duplicate & ~black
    return [
        *_describe(black, timestamps, BLACK_S, "the picture is black"),
        *_describe(frozen, timestamps, FROZEN_S, "the picture does not change (frozen, or still)"),
    ]


def _correlation(a: NDArray[np.float32], b: NDArray[np.float32] | None) -> float:
    if b is None:
        return float("nan")
    flat = float(a.std()) < 1.0, float(b.std()) < 1.0  # grey levels: no picture to compare
    if any(flat):
        return 1.0 if all(flat) else 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(np.vdot(a, b) / np.sqrt(np.vdot(a, a) * np.vdot(b, b)))


def _is_sudden(change: NDArray[np.float32], frame: int) -> bool:
    """Whether the change at `frame` stands out; one more cut nearby does not hide it.

    Where a video repeats frames, those that show a change are the rhythm.
    """
    before, after = change[max(0, frame - CUT_REACH) : frame], change[frame + 1 :][:CUT_REACH]
    before, after = before[np.isfinite(before)], after[np.isfinite(after)]
    if len(before) + len(after) < 2:
        return False  # nothing to stand out from
    changed = before > REPEATED_CHANGE, after > REPEATED_CHANGE
    nearby = np.sort(
        np.r_[before[changed[0]][-CUT_NEIGHBOURS:], after[changed[1]][:CUT_NEIGHBOURS]]
    )
    usual = nearby[-2] if len(nearby) > 1 else 0.0
    return bool(change[frame] > CUT_RATIO * usual)


def _describe(
    mask: NDArray[np.bool_], timestamps: NDArray[np.float64], least_s: float, what: str
) -> list[str]:
    edges = np.flatnonzero(np.diff(np.r_[False, mask, False]))
    runs = [(int(a), int(b) - 1) for a, b in pairwise(edges)][::2]
    long = [(a, b) for a, b in runs if timestamps[b] - timestamps[a] >= least_s]
    words = [f"{what} from {timestamps[a]:.2f} s to {timestamps[b]:.2f} s" for a, b in long[:10]]
    if len(long) > 10:
        words.append(f"{what} in {len(long) - 10} more stretches")
    return words
