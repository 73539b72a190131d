"""Videos whose every frame shows its own number, so that a wrong frame is seen."""

import io
from collections.abc import Iterable
from fractions import Fraction
from itertools import count
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, RATE = 128, 64, 25
X264 = {"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=2:open-gop=0"}


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Eight bars, white where the bit of `number` is set; the lower half the other way round."""
    bits = np.array([number >> k & 1 for k in range(8)], np.uint8)
    row = np.repeat(bits, width // 8) * 219 + 18
    grey = np.vstack([np.tile(row, (height // 2, 1)), np.tile(255 - row, (height // 2, 1))])
    return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)


def number_in(frame: np.ndarray) -> int:
    """The number that a picture of `picture` shows."""
    height, width = frame.shape[:2]
    bars = frame[height // 4, width // 16 :: width // 8, 0] > 128
    return int(sum(1 << k for k, is_set in enumerate(bars) if is_set))


def encode(
    path: Path | io.BytesIO,
    numbers: Iterable[int],
    codec: str = "libx264",
    options: dict[str, str] = X264,
    ticks: Iterable[int] | None = None,
    width: int = WIDTH,
    container: str | None = None,
    pixels: str = "yuv420p",
    container_options: dict[str, str] | None = None,
) -> None:
    """Write pictures of `numbers` as a video; `ticks` are their times in 1/RATE s."""
    place = path if isinstance(path, io.BytesIO) else str(path)
    with av.open(place, "w", format=container, options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = width, HEIGHT, pixels
        for number, tick in zip(numbers, count() if ticks is None else ticks, strict=False):
            frame = av.VideoFrame.from_ndarray(picture(number, width), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
