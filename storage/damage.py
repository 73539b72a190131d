"""What of a store is not as its commits and its layout say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from storage import layout
from storage.arrays import UNDECODABLE, StoredArrays, digest_of
from storage.bounds import is_array, is_range
from storage.commits import mapping_in
from storage.encoding import coordinates
from storage.errors import UNREADABLE, ObjectUnreadable
from storage.failures import explaining
from storage.layout import by_name, segment_name
from storage.objects import Folder
from storage.records import NOWHERE, Segment
from storage.segments import chunk_paths, is_commit_of, layout_in


class Damage:
    """Names of what is damaged in one store, by looking at it now; changes nothing."""

    def __init__(self, folder: Folder, arrays: StoredArrays) -> None:
        """`arrays`: those of the store in `folder`."""
        self._folder = folder
        self._arrays = arrays

    def of_commit(self, commit: str, record: dict[str, Any]) -> list[str]:
        """Names of the arrays, chunks and files of one commit that are not as committed."""
        if not _is_record(commit, record):
            self._check_disk()
            return [f"{layout.COMMITS}/{commit}.json"]
        numbers = layout.chunk_numbers(commit)
        if numbers is not None and not self._is_of_segment(record, *numbers):
            return [f"{segment_name(numbers[0])}/zarr.json"]
        chunk = None if numbers is None else numbers[1]
        named = "" if chunk is None else f" chunk {chunk}"
        digests, files = mapping_in(record, "digests"), mapping_in(record, "files")
        arrays = [p for p, d in digests.items() if self._array_digest(p, record, chunk) != d]
        broken = [name for name, d in files.items() if self._file_digest(name) != d]
        return [f"{path}{named}" for path in arrays] + broken

    def of_segments(self) -> dict[int, list[str]]:
        """Coordinates and metadata of arrays that are not ours, by index of the segment."""
        listed = map(layout.segment_index, self._folder.sizes(layout.SEGMENTS))
        found = {i: self.of_segment(i) for i in sorted({i for i in listed if i is not None})}
        return {index: names for index, names in found.items() if names}

    def of_segment(self, index: int) -> list[str]:
        """`of_segments` of one; none while it is being made or removed."""
        found = self._layout(index)
        if found is None:
            return []
        group = segment_name(index)
        specs = {f"{path}/zarr.json": layout.spec_at(path) for path in chunk_paths(index)}
        sizes = {n: s for n, s in self._folder.sizes(group).items() if n in specs}
        sound = {
            n for n, data in self._folder.each_record(sizes, UNREADABLE) if is_array(data, specs[n])
        }
        wanted = coordinates(found["start"], found["stop"], found["chunk_frames"])
        known = {f"{group}/{name}": digest_of(values) for name, values in wanted.items()}
        broken = [name for name in specs if name not in sound]
        broken += [p for p, digest in known.items() if self._array_digest(p, {}, None) != digest]
        # Looked at again: it is removed before its arrays.
        return broken if broken and self._layout(index) == found else []

    def _is_of_segment(self, record: dict[str, Any], index: int, chunk: int) -> bool:
        """Whether a commit is of this chunk of the segment that is there now."""
        found = self._layout(index)
        if found is None:
            return False
        segment = Segment(index, found["start"], found["stop"], NOWHERE)
        return is_commit_of(record, segment.chunk(chunk, found["chunk_frames"]), found)

    def _layout(self, index: int) -> dict[str, Any] | None:
        """What a segment's group says, None also where it is too large to be one."""
        name = f"{segment_name(index)}/zarr.json"
        return layout_in(self._folder.read_records([name], UNREADABLE).get(name))

    def _file_digest(self, name: str) -> str | None:
        try:
            return self._folder.sha256(name)
        except UNREADABLE:
            self._check_disk()
            return None

    def _array_digest(self, path: str, record: dict[str, Any], chunk: int | None) -> str | None:
        try:
            with explaining(self._folder.url):
                return digest_of(self._committed(path, record, chunk))
        except (*UNDECODABLE, ObjectUnreadable):  # other StoreUnavailable: a lost connection
            self._check_disk()
            return None

    def _check_disk(self) -> None:
        """Make sure that it is not the whole disk that cannot be read: nothing is damaged then."""
        self._folder.read("zarr.json")

    def _committed(self, path: str, record: dict[str, Any], chunk: int | None) -> np.ndarray:
        """The rows that a commit vouches for."""
        if chunk is None:
            return self._arrays.read_whole(path)
        array = self._arrays.open(path)
        if "/state/" in path:
            return np.asarray(array[chunk : chunk + 1])
        frames = record["frames"]
        rows = array.shards or array.chunks
        start = chunk * rows[0]
        return np.asarray(array[start : start + min(frames[1] - frames[0], rows[0])])


def _is_record(commit: str, record: Mapping[str, Any]) -> bool:
    """Whether a commit is one of ours: of a known name, and it names nothing that is elsewhere."""
    digests, files = record.get("digests") or {}, record.get("files") or {}
    if not record or not isinstance(digests, dict) or not isinstance(files, dict):
        return False
    numbers = layout.chunk_numbers(commit)
    if numbers is not None:
        own = set(chunk_paths(numbers[0]))
        return set() < digests.keys() <= own and is_range(record.get("frames")) and not files
    if layout.is_chunk_commit(commit):
        return False
    return all(map(_is_whole_array, digests)) and all(map(layout.is_file_name, files))


def _is_whole_array(path: str) -> bool:
    """Whether it is an array that is written as a whole."""
    group, _, name = path.rpartition("/")
    specs = {layout.FRAMES: layout.FRAME_ARRAYS, layout.TRAJECTORY: layout.TRAJECTORY_ARRAYS}
    return name in by_name(specs.get(group, ()))
