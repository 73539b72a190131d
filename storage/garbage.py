"""What no commit refers to: leftovers of killed runs, dropped chunks and superseded files."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from storage import layout
from storage.commits import mapping_in
from storage.objects import Folder, is_unfinished

OWN = {
    layout.FRAMES: {spec.name for spec in layout.FRAME_ARRAYS},
    layout.TRAJECTORY: {spec.name for spec in layout.TRAJECTORY_ARRAYS},
    "segment": {"frame", "state"} | {spec.name for spec in layout.SEGMENT_ARRAYS},
}


def find_garbage(folder: Folder, kept: Referenced, age_s: float) -> dict[str, int]:
    """Names and sizes of what nothing refers to, of objects written at least `age_s` ago."""
    latest = time.time() - age_s
    return {
        name: info.size
        for name, info in folder.objects().items()
        if info.modified <= latest and (is_unfinished(name) or kept.is_garbage(name))
    }


class Referenced:
    """What the plan and the commits refer to."""

    def __init__(self, segments: Iterable[int]) -> None:
        """`segments`: indices of those that the plan has."""
        self._segments = {layout.segment_name(index) for index in segments}
        self._arrays: set[str] = set()  # that are written as a whole
        self._shards: set[tuple[str, str]] = set()  # arrays and numbers: ("segments/0/depth", "3")
        self._files: set[str] = set()
        self._kept_folders: set[str] = set()  # of commits that do not say what their files are

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        """Keep what a valid commit refers to."""
        chunk = layout.chunk_numbers(name)
        if chunk is not None:
            self._segments.add(layout.segment_name(chunk[0]))
        for path in mapping_in(record, "digests"):
            if chunk is not None:
                self._shards.add((path, str(chunk[1])))
            else:
                self._arrays.add(path)
        self._files |= mapping_in(record, "files").keys()
        is_older = not isinstance(record.get("files"), dict)  # a version that did not list files
        if is_older and name.startswith("fuse/"):
            self._kept_folders.add("fusion")
        if is_older and name == "report":
            self._kept_folders.add("report")

    def is_garbage(self, name: str) -> bool:
        """Whether the object is of a kind that commits refer to, and none refers to it."""
        folder, _, rest = name.partition("/")
        if not rest or rest == "zarr.json":
            return False
        if folder in (layout.FRAMES, layout.TRAJECTORY):
            array = rest.partition("/")[0]
            return array in OWN[folder] and f"{folder}/{array}" not in self._arrays
        if folder == layout.SEGMENTS:
            return self._is_garbage_of_segment(name)
        if folder in layout.FILE_FOLDERS:
            return folder not in self._kept_folders and name not in self._files
        return False

    def _is_garbage_of_segment(self, name: str) -> bool:
        parts = name.split("/")
        group, inside = "/".join(parts[:2]), parts[2:]
        if layout.segment_index(name) is None or not inside:
            return False
        if inside[0] != "zarr.json" and inside[0] not in OWN["segment"]:
            return False
        if group not in self._segments:
            return True
        shard = layout.shard_at(name)
        if shard is None or shard[0].endswith("/frame"):
            return False  # metadata and coordinates, written when the segment is created
        return shard not in self._shards
