"""Zarr nodes as objects in memory: what to put, by name, so that one put writes one object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from zarr.core.array import Array
from zarr.core.array_spec import ArrayConfigParams
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

from storage import layout
from storage.commits import plain
from storage.layout import ArraySpec
from storage.records import Segment

# zarr forgets this when an array is opened again; without it NaN and False are not written.
WRITE_ALL: ArrayConfigParams = {"write_empty_chunks": True}


def group_document(attributes: Mapping[str, Any]) -> bytes:
    """The zarr.json of a group."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": plain(attributes)}
    return json.dumps(document, indent=1, allow_nan=False).encode()


def _new_array(
    store: MemoryStore, path: str, spec: ArraySpec, rows: int, sizes: Mapping[str, int]
) -> Array[Any]:
    """An empty array whose shards hold `rows` rows."""
    shape = spec.shape(sizes)
    shard = (rows, *shape[1:])
    inner = (layout.frames_per_read(rows), *shape[1:])
    return zarr.create_array(
        store,
        name=path,
        shape=shape,
        dtype=spec.dtype,
        chunks=inner if spec.images else shard,
        shards=shard if spec.images else None,
        compressors=spec.codecs(),
        filters=None,
        fill_value=spec.fill_value,
        attributes=spec.attributes(),
        dimension_names=spec.dims,
        config=WRITE_ALL,
    )


def whole_array(path: str, spec: ArraySpec, values: np.ndarray) -> dict[str, bytes]:
    """Objects of an array with its values."""
    held: dict[str, Buffer] = {}
    rows = max(1, min(len(values), layout.ROWS_PER_OBJECT))
    sizes = dict(zip(spec.dims, values.shape, strict=True))
    _new_array(MemoryStore(held), path, spec, rows, sizes)[...] = values
    return _contents(held, path)


def empty_segment(group: str, segment: Segment, wanted: Mapping[str, Any]) -> dict[str, bytes]:
    """Objects of a new segment without those of the group itself."""
    held: dict[str, Buffer] = {}
    store, chunk_frames, sizes = MemoryStore(held), wanted["chunk_frames"], wanted["sizes"]
    for spec in layout.SEGMENT_ARRAYS:
        _new_array(store, f"{group}/{spec.name}", spec, chunk_frames, sizes)
    for spec in layout.STATE_ARRAYS:
        _new_array(store, f"{group}/state/{spec.name}", spec, 1, sizes)
    frames = np.arange(segment.start, segment.stop)
    stops = np.array([chunk.stop for chunk in segment.chunks(chunk_frames)])
    return {
        **_contents(held, f"{group}/"),
        **whole_array(f"{group}/frame", layout.FRAME_COORDINATE, frames),
        **whole_array(f"{group}/state/frame", layout.STATE_FRAME, stops),
        f"{group}/state/zarr.json": group_document({}),
    }


def encode_rows(document: bytes, rows: slice, values: np.ndarray) -> dict[str, bytes]:
    """Objects that hold `rows` of the array that `document`, its zarr.json, describes."""
    held: dict[str, Buffer] = {"zarr.json": default_buffer_prototype().buffer.from_bytes(document)}
    array = zarr.open_array(MemoryStore(held), mode="r+", zarr_format=3)
    array.with_config(WRITE_ALL)[rows] = values
    del held["zarr.json"]
    return _contents(held, "")


def _contents(held: Mapping[str, Buffer], prefix: str) -> dict[str, bytes]:
    return {n: buffer.to_bytes() for n, buffer in held.items() if n.startswith(prefix)}
