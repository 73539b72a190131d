"""One small segment, and chunks of one value for it."""

import numpy as np

from storage.records import Chunk, Segment

SEGMENT = Segment(index=0, start=0, stop=46, part=0)
SHAPE = {"height": 48, "width": 64, "embed": 8, "state_tokens": (96, 64), "pose_memory": (16, 128)}


def chunk_arrays(chunk: Chunk, value: float) -> dict[str, np.ndarray]:
    """All arrays of a chunk of `SEGMENT`, every element `value`."""
    frames = chunk.stop - chunk.start
    shapes = {
        "depth": (frames, 48, 64),
        "confidence": (frames, 48, 64),
        "cam_to_seg": (frames, 4, 4),
        "intrinsics": (frames, 3, 3),
        "descriptor": (frames, 8),
        "gate": (frames, 5),
        "state_tokens": (96, 64),
        "state_pose_memory": (16, 128),
    }
    return {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}
