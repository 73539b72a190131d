"""Arrays of a store, read and encoded: refused where they are not laid out as ours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from zarr.core.array import Array
from zarr.storage import StorePath

from storage import layout
from storage.bounds import check_array, check_whole
from storage.encoding import StoredRows, VouchedObjects, encode_rows
from storage.errors import DataDamaged
from storage.failures import explaining
from storage.layout import segment_name
from storage.objects import Folder
from storage.records import Segment
from storage.wording import how_to_mend, redacted

# What decoders raise at objects or metadata that are damaged.
UNDECODABLE = (ValueError, TypeError, LookupError, RuntimeError, DataDamaged)


class StoredArrays:
    """The arrays of one store by path, such as "segments/0003/depth"; no commit is asked for."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._zarr = VouchedObjects(folder.zarr_store())

    def open(self, path: str) -> Array[Any]:
        """An array of the layout, found to be one before anything is allocated for it.

        Raises:
            DataDamaged: it is gone, or none of ours.
        """
        with self._metadata(path) as document:
            return Array.from_dict(StorePath(self._zarr, path), json.loads(document))

    def read_whole(self, path: str) -> np.ndarray:
        """All rows of an array that is small enough; errors as of `open` and of decoders."""
        array = self.open(path)
        check_whole(path, array)
        return np.asarray(array[...])

    def read_rows(
        self, segment: Segment, names: Sequence[str], rows: slice
    ) -> dict[str, np.ndarray]:
        """Rows of per-frame arrays of a segment, by name; float16 comes as float32.

        Raises:
            DataDamaged: they cannot be decoded.
        """
        paths = {name: f"{segment_name(segment.index)}/{name}" for name in names}
        shards = self._small_shards(paths.values(), rows)
        frames = f"frames {segment.start + rows.start}..{segment.start + rows.stop}"
        values = {}
        for name, path in paths.items():
            with self.damage_named(f"{path}, {frames}"):
                stored = shards.get(path)
                read = self.open(path)[rows] if stored is None else stored.decode()
            values[name] = _widened(np.asarray(read))
        return values

    def _small_shards(self, paths: Iterable[str], rows: slice) -> dict[str, StoredRows]:
        """Of those arrays whose objects are small, the objects that hold `rows`.

        Read whole and decoded here they cost a tenth of what Zarr takes to find its way.
        """
        documents = self._folder.read_many([f"{path}/zarr.json" for path in paths])
        for name, document in documents.items():
            path = name.removesuffix("/zarr.json")
            try:
                check_array(path, document, layout.spec_at(path))
            except DataDamaged as error:
                raise self._unusable(error) from error
        found = {
            name.removesuffix("/zarr.json"): small
            for name, document in documents.items()
            if (small := StoredRows.of_small(document, rows)) is not None
        }
        names = [f"{path}/{name}" for path, stored in found.items() for name in stored.names]
        contents = self._folder.read_many(names)
        for path, stored in found.items():
            stored.objects = [contents.get(f"{path}/{name}") for name in stored.names]
        return found

    def encode_rows(self, path: str, rows: slice, values: np.ndarray) -> dict[str, bytes]:
        """One whole shard of an array, by name, to be written in one put.

        Zarr would first read what is there and merge: slow, and it trips over a damaged shard.

        Raises:
            DataDamaged: as of `open`.
        """
        with self._metadata(path) as document:
            shard = encode_rows(document, rows, values)
        return {f"{path}/{name}": data for name, data in shard.items()}

    @contextmanager
    def damage_named(self, what: str) -> Iterator[None]:
        """Turn a decoder's error into one that says which data are damaged."""
        url = self._folder.url
        try:
            with explaining(url):
                yield
        except (ValueError, TypeError, RuntimeError) as error:
            raise DataDamaged(
                f"{redacted(url)}: cannot decode {what}; {how_to_mend(url)} ({error})"
            ) from error

    @contextmanager
    def _metadata(self, path: str) -> Iterator[bytes]:
        """zarr.json of an array of the layout; an error at its use says what to do."""
        document = self._folder.read(f"{path}/zarr.json")
        if document is None:
            url = self._folder.url
            raise DataDamaged(f"array {path} of {redacted(url)} is gone; {how_to_mend(url)}")
        try:
            check_array(path, document, layout.spec_at(path))
            yield document
        except UNDECODABLE as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> DataDamaged:
        url = self._folder.url
        return DataDamaged(f"{redacted(url)}: {error}; {how_to_mend(url)}")


def digest_of(values: np.ndarray) -> str:
    """SHA-256 of the values, as commits hold it."""
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def _widened(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) if values.dtype == np.float16 else values
