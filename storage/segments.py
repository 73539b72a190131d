"""Segments as they are stored: what a group says of its segment, and where its chunks lie in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from storage import layout
from storage.bounds import is_range
from storage.commits import mapping_in
from storage.encoding import attributes_in
from storage.layout import by_name, segment_name
from storage.records import Chunk, Segment

SEGMENT_SPECS = by_name(layout.SEGMENT_ARRAYS)
STATE_SPECS = by_name(layout.STATE_ARRAYS)
CHUNK_SPECS = SEGMENT_SPECS | {f"state_{name}": spec for name, spec in STATE_SPECS.items()}


def segment_attributes(
    segment: Segment, chunk_frames: int, common: Mapping[str, int]
) -> dict[str, Any]:
    """What a segment's group says of it, but for its creation.

    Args:
        segment: which frames of the drive.
        chunk_frames: frames in each chunk but the last.
        common: lengths, by name, of the dimensions that all segments of a drive share.
    """
    own = {"frame": segment.frames, "chunk": segment.count_chunks(chunk_frames)}
    return {
        "start": segment.start,
        "stop": segment.stop,
        "chunk_frames": chunk_frames,
        "sizes": {**common, **own},
    }


def layout_in(document: bytes | None) -> dict[str, Any] | None:
    """What a segment's group says of it; None where it is not there, not finished or malformed."""
    found = attributes_in(document)
    sizes = mapping_in(found, "sizes")
    lengths = [sizes.get(dim) for spec in CHUNK_SPECS.values() for dim in spec.dims]
    counts = [*lengths, found.get("start"), found.get("stop"), found.get("chunk_frames")]
    is_whole = all(type(n) is int and n >= 0 for n in counts) and found["chunk_frames"] > 0
    is_whole = is_whole and is_range([found["start"], found["stop"]])
    return found if is_whole and isinstance(found.get("creation"), str) else None


def is_commit_of(record: Mapping[str, Any], chunk: Chunk, found: Mapping[str, Any] | None) -> bool:
    """Whether a commit is of this chunk in the arrays that are there now.

    Args:
        record: of the commit.
        chunk: of the segment.
        found: what `layout_in` gives for the segment.
    """
    if found is None or record.get("creation") != found["creation"]:
        return False
    return bool(record.get("frames") == [chunk.start, chunk.stop])


def check_chunk(segment: Segment, chunk: Chunk, chunk_frames: int) -> None:
    """Raise ValueError unless the chunk is one of the segment's."""
    is_there = 0 <= chunk.index < segment.count_chunks(chunk_frames)
    if not is_there or chunk != segment.chunk(chunk.index, chunk_frames):
        raise ValueError(
            f"{chunk} is not a chunk of {segment} cut every {chunk_frames} frames; writing it "
            "would touch the shard of another chunk"
        )


def chunk_values(
    segment: Segment, chunk: Chunk, arrays: Mapping[str, np.ndarray], sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Values of a chunk as they will be stored, by path; those of the state get a leading axis.

    Args:
        segment: whose chunk it is.
        chunk: of F frames.
        arrays: as for `ReconstructionStore.write_chunk`.
        sizes: lengths of the dimensions by name.
    """
    required = {name for name, spec in CHUNK_SPECS.items() if not spec.optional}
    layout.check_names(arrays, CHUNK_SPECS, required)
    own = {**sizes, "frame": chunk.stop - chunk.start, "chunk": 1}
    stored = {}
    for name, spec in CHUNK_SPECS.items():
        path, shape = _path(segment.index, name), spec.shape(own)
        if name not in arrays:
            stored[path] = np.zeros(shape, spec.dtype)
        elif name.startswith("state_"):
            stored[path] = spec.encode(arrays[name], shape[1:])[np.newaxis]
        else:
            stored[path] = spec.encode(arrays[name], shape)
    return stored


def chunk_paths(index: int) -> list[str]:
    """Paths of the arrays of a segment that its chunks are stored in."""
    return [_path(index, name) for name in CHUNK_SPECS]


def chunk_rows(path: str, segment: Segment, chunk: Chunk) -> slice:
    """Rows of such an array that are of a chunk."""
    if "/state/" in path:
        return slice(chunk.index, chunk.index + 1)
    return slice(chunk.start - segment.start, chunk.stop - segment.start)


def _path(index: int, name: str) -> str:
    group, state = segment_name(index), name.removeprefix("state_")
    return f"{group}/{name}" if state == name else f"{group}/state/{state}"
