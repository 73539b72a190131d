"""Bits that a pixel's depth and confidence take in the store, and the error of storing them.

The first frames of recordings go through the network in segments, as inference cuts them, and
each chunk is encoded as it would be written. 8 bits are an eighth of the float32 arrays of both.

    python tests/benchmarks/stored_bytes.py VIDEO_OR_FOLDER ... --frames 64 --json stored.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.probe import probe_drive
from storage.reconstruction import ReconstructionStore
from storage.records import Segment
from storage.video import read_frames
from tasks.infer import chunk_tensors
from ttt3r.images import preprocess
from ttt3r.model import Model
from ttt3r.stream import Stream
from ttt3r.weights import load_model

ARRAYS = ("depth", "confidence")
FLOAT_BITS = 32


def measure(recording: str, model: Model, frames: int, segment_frames: int) -> dict[str, Any]:
    """Bits a pixel of each array, and the largest relative errors."""
    images = first_images(recording, model, frames, segment_frames)
    stream = Stream(model, len(images), "ttt3r", frozenset({"cam"}))
    tensors = chunk_tensors(stream.feed(images), stream.state)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        bits, errors = stored(Path(folder), arrays)
    return {
        "recording": recording,
        "frames": images.shape[0] * images.shape[1],
        "size": [images.shape[3], images.shape[2]],
        "bits_per_pixel": bits,
        "share_of_float32": sum(bits.values()) / (len(ARRAYS) * FLOAT_BITS),
        "largest_relative_error": errors,
    }


def first_images(
    recording: str, model: Model, frames: int, segment_frames: int
) -> NDArray[np.uint8]:
    """[segments, frames, height, width, 3] of the first frames, without those of half a segment."""
    record, table = probe_drive(recording)
    count = min(frames, len(table.timestamp)) // segment_frames * segment_frames
    if count == 0:
        raise ValueError(
            f"{recording} has {len(table.timestamp)} frames; expected at least {segment_frames}"
        )
    size, patch = model.config.image_size, model.config.patch_size
    images = [preprocess(frame, size, patch) for frame in read_frames(record, table, 0, count)]
    return np.stack(images).reshape(-1, segment_frames, *images[0].shape)


def stored(
    folder: Path, arrays: dict[str, NDArray[Any]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Write each lane as a segment of one chunk; its bits a pixel, and what storing changes."""
    lanes, frames, height, width = arrays["depth"].shape
    store = ReconstructionStore.create(folder / "drive.zarr", {})
    segments = [Segment(i, i * frames, (i + 1) * frames, 0) for i in range(lanes)]
    embed, tokens, memory = (
        arrays[name].shape for name in ("descriptor", "state_tokens", "state_pose_memory")
    )
    store.create_segments(segments, frames, height, width, embed[-1], tokens[1:], memory[1:])
    sizes, errors = dict.fromkeys(ARRAYS, 0), dict.fromkeys(ARRAYS, 0.0)
    for lane, segment in enumerate(segments):
        (chunk,) = segment.chunks(frames)
        own = {name: array[lane] for name, array in arrays.items()}
        encoded = store.encode_chunk(segment, chunk, own)
        store.write_encoded([encoded])
        store.commit_chunk(segment, chunk, {"key": "measured"})
        for name in ARRAYS:
            objects = encoded.objects.items()
            sizes[name] += sum(len(data) for path, data in objects if f"/{name}/c." in path)
            read = store.read(segment, name, segment.start, segment.stop)
            error = float(np.max(np.abs(read - own[name]) / own[name]))
            errors[name] = max(errors[name], error)
    pixels = lanes * frames * height * width
    return {name: 8 * size / pixels for name, size in sizes.items()}, errors


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| recording | depth | confidence | both | of float32 | error of depth |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        bits, errors = row["bits_per_pixel"], row["largest_relative_error"]
        lines.append(
            f"| {row['recording']} | {bits['depth']:.2f} | {bits['confidence']:.2f} | "
            f"{sum(bits.values()):.2f} | 1/{1 / row['share_of_float32']:.1f} | "
            f"{errors['depth']:.3%} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recordings", nargs="+", metavar="RECORDING", help="video or image folder")
    parser.add_argument("--weights", default="compact")
    parser.add_argument("--frames", type=int, default=64, help="of each recording [default: 64]")
    parser.add_argument("--segment-frames", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    model, _ = load_model(options.weights)
    rows = [measure(r, model, options.frames, options.segment_frames) for r in options.recordings]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"results": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
