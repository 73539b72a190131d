"""Zarr nodes as objects in memory: what to put, by name, so that one put writes one object."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import TransposeCodec
from zarr.core.array import Array
from zarr.core.array_spec import ArrayConfigParams
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import MemoryStore, WrapperStore

from storage import layout
from storage.commits import plain
from storage.layout import ArraySpec
from storage.records import Segment
from storage.shards import (
    SEPARATORS,
    UPRIGHT,
    ShardReader,
    encode_shard,
    parsed,
    shard_name,
    shard_reader,
)

LARGEST_WHOLE_READ = 4 * 2**20  # bytes before compression; of larger objects a part is read

# zarr forgets this when an array is opened again; without it NaN and False are not written.
WRITE_ALL: ArrayConfigParams = {"write_empty_chunks": True}


def group_document(attributes: Mapping[str, Any]) -> bytes:
    """The zarr.json of a group."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": plain(attributes)}
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


def attributes_in(document: bytes | None) -> dict[str, Any]:
    """Attributes in the zarr.json of a group; none where it is not there or not one."""
    try:
        found = json.loads(document or b"{}")["attributes"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _new_array(
    store: MemoryStore, path: str, spec: ArraySpec, rows: int, sizes: Mapping[str, int]
) -> Array[Any]:
    """An empty array whose shards hold `rows` rows."""
    shape = spec.shape(sizes)
    shard = (rows, *shape[1:])
    inner, filters = (layout.frames_per_read(rows), *shape[1:]), None
    # Of large objects parts are read: each strip would be a read of its own.
    is_read_whole = math.prod(shard) * np.dtype(spec.dtype).itemsize <= LARGEST_WHOLE_READ
    if spec.strips and is_read_whole and (high := layout.strip_rows(shape[1])):
        inner = (inner[0], high, *shape[2:])
        filters = (TransposeCodec(order=tuple(UPRIGHT)),)
    return zarr.create_array(
        store,
        name=path,
        shape=shape,
        dtype=spec.dtype,
        chunks=inner if spec.images else shard,
        shards=shard if spec.images else None,
        filters=filters,
        fill_value=spec.fill_value,
        attributes=spec.attributes(),
        dimension_names=spec.dims,
        # One folder an array: local disks pay for folders as for files.
        chunk_key_encoding={"name": "default", "separator": SEPARATORS[0]},
        config=WRITE_ALL,
        **spec.codecs(),
    )


def whole_array(path: str, spec: ArraySpec, values: np.ndarray) -> dict[str, bytes]:
    """Objects of an array with its values."""
    held: dict[str, Buffer] = {}
    sizes = dict(zip(spec.dims, values.shape, strict=True))
    _new_array(MemoryStore(held), path, spec, _rows_of_whole(len(values)), sizes)[...] = values
    return _contents(held, path)


def empty_segment(group: str, segment: Segment, wanted: Mapping[str, Any]) -> dict[str, bytes]:
    """Objects of a new segment without those of the group itself."""
    chunk_frames = wanted["chunk_frames"]
    documents = _segment_documents(chunk_frames, tuple(sorted(wanted["sizes"].items())))
    objects = {f"{group}/{name}": document for name, document in documents.items()}
    for name, numbers in coordinates(segment.start, segment.stop, chunk_frames).items():
        shards = encode_rows(documents[f"{name}/zarr.json"], slice(0, len(numbers)), numbers)
        objects |= {f"{group}/{name}/{key}": data for key, data in shards.items()}
    return objects


def coordinates(start: int, stop: int, chunk_frames: int) -> dict[str, np.ndarray]:
    """Arrays of a segment whose values are known before it is inferred, by name.

    Args:
        start, stop: frames of the drive, half-open.
        chunk_frames: frames in each chunk but the last.
    """
    each = min(chunk_frames, stop - start)
    stops = np.append(np.arange(start + each, stop, each), stop)
    return {"frame": np.arange(start, stop), "state/frame": stops}


@lru_cache(maxsize=8)
def _segment_documents(chunk_frames: int, sizes: tuple[tuple[str, int], ...]) -> dict[str, bytes]:
    """The zarr.json of all arrays of a segment by path; most segments of a drive are alike."""
    held: dict[str, Buffer] = {}
    store, lengths = MemoryStore(held), dict(sizes)
    frames, chunks = lengths["frame"], lengths["chunk"]
    for spec in layout.SEGMENT_ARRAYS:
        _new_array(store, spec.name, spec, min(chunk_frames, frames), lengths)
    for spec in layout.STATE_ARRAYS:
        _new_array(store, f"state/{spec.name}", spec, 1, lengths)
    _new_array(store, "frame", layout.FRAME_COORDINATE, _rows_of_whole(frames), lengths)
    _new_array(store, "state/frame", layout.STATE_FRAME, _rows_of_whole(chunks), lengths)
    documents = {**_contents(held, ""), "state/zarr.json": group_document({})}
    del documents["zarr.json"]  # Zarr made it for the group itself
    return documents


def _rows_of_whole(rows: int) -> int:
    """Rows of an object of an array that is written as a whole."""
    return max(1, min(rows, layout.ROWS_PER_OBJECT))


def encode_rows(document: bytes, rows: slice, values: np.ndarray) -> dict[str, bytes]:
    """Objects that hold `rows` of the array that `document`, its zarr.json, describes."""
    try:
        return encode_shard(document, rows.start, values)
    except (LookupError, TypeError, ValueError):
        # Of an earlier version, of somebody else, or damaged: Zarr can do it or say what is wrong.
        return _encode_by_zarr(document, rows, values)


@dataclass
class StoredRows:
    """Rows of an array in the objects that hold them; whoever reads fills `objects`."""

    reader: ShardReader
    rows: slice
    names: list[str]  # below the array, in order
    objects: list[bytes | None] = field(default_factory=list)

    @classmethod
    def of_small(cls, document: bytes, rows: slice) -> StoredRows | None:
        """None where Zarr must read them, or does better, as it need not read whole objects."""
        try:
            reader = shard_reader(document)
        except (LookupError, TypeError, ValueError):
            return None
        if reader.size_bytes > LARGEST_WHOLE_READ or rows.start >= rows.stop:
            return None
        numbers = range(rows.start // reader.rows, -(-rows.stop // reader.rows))
        return cls(reader, rows, [shard_name(parsed(document), n) for n in numbers])

    def decode(self) -> np.ndarray:
        """The rows.

        Raises:
            ValueError: an object is missing or damaged.
        """
        each = self.reader.rows
        first = self.rows.start // each
        parts = []
        for number, data in enumerate(self.objects, first):
            if data is None:
                raise ValueError(f"object {self.names[number - first]} is gone")
            start, stop = (
                min(max(r - number * each, 0), each) for r in (self.rows.start, self.rows.stop)
            )
            parts.append(self.reader.decode(data, start, stop))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class VouchedObjects(WrapperStore[Store]):
    """Objects that commits vouch for: one that is not there is an error, not the fill value."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """As Zarr reads; ValueError where an object with rows is missing."""
        found = await super().get(key, prototype, byte_range)
        if found is None and layout.shard_at(key) is not None:
            raise ValueError(f"object {key} is gone")
        return found


def _encode_by_zarr(document: bytes, rows: slice, values: np.ndarray) -> dict[str, bytes]:
    held: dict[str, Buffer] = {"zarr.json": default_buffer_prototype().buffer.from_bytes(document)}
    array = zarr.open_array(MemoryStore(held), mode="r+", zarr_format=3)
    array.with_config(WRITE_ALL)[rows] = values
    del held["zarr.json"]
    return _contents(held, "")


def _contents(held: Mapping[str, Buffer], prefix: str) -> dict[str, bytes]:
    return {n: buffer.to_bytes() for n, buffer in held.items() if n.startswith(prefix)}
