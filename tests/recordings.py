"""Small recordings for tests."""

from pathlib import Path

import av
import numpy as np


def write_video(path: Path, frames: list[np.ndarray], rate: int = 10) -> Path:
    """Encode RGB frames [H, W, 3] as H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "12", "g": "10"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return path


def moving_squares(
    count: int, height: int = 48, width: int = 64, seed: int = 0
) -> list[np.ndarray]:
    """Frames of textured squares that drift to the left: something to look at, without meaning."""
    rng = np.random.default_rng(seed)
    wide = rng.integers(0, 256, (height // 8, width // 8 + count // 4 + 1, 3), np.uint8)
    wide = wide.repeat(8, axis=0).repeat(8, axis=1)
    return [np.ascontiguousarray(wide[:, 2 * i : 2 * i + width]) for i in range(count)]
