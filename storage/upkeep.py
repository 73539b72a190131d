"""Upkeep of a store: say what is there, find and take back what is damaged, remove leftovers."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from storage import layout
from storage.bounds import MOST_METADATA_BYTES
from storage.claims import Claim, claimed_names
from storage.commits import Commits
from storage.encoding import attributes_in
from storage.errors import UNREADABLE
from storage.failures import explaining
from storage.folders import open_folder
from storage.garbage import Referenced, find_garbage
from storage.layout import segment_claim, segment_name
from storage.objects import Folder
from storage.reconstruction import ReconstructionStore
from storage.root import is_lost, write_root
from storage.segments import layout_in
from storage.wording import redacted

# ---- what is there


@dataclass
class SegmentProgress:
    """How far a segment is."""

    frames: tuple[int, int]
    chunks: int
    creation: str
    committed: int = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Count the commit of one of its chunks, unless it is of an earlier creation."""
        self.committed += record.get("creation") == self.creation

    def to_json(self) -> dict[str, Any]:
        """For people."""
        return {
            "frames": list(self.frames),
            "chunks_committed": self.committed,
            "chunks_total": self.chunks,
        }


def describe(store: ReconstructionStore) -> dict[str, Any]:
    """What is there, for people: JSON values only.

    Returns:
        `url`; `bytes`, all that is stored; `arrays` {path: shape, dtype, bytes};
        `segments` {number: frames, chunks_committed, chunks_total}; `commits`, names of
        finished stages other than chunks; `files` {name: bytes}.
    """
    sizes = store.folder.sizes()
    stored: Counter[str] = Counter()
    for name, size in sizes.items():
        shard = layout.shard_at(name)
        stored[shard[0] if shard else name.removesuffix("/zarr.json")] += size
    arrays, segments = _described_nodes(store.folder, sizes)
    stages = []
    for name, record in Commits(store.folder).each():
        numbers = layout.chunk_numbers(name)
        if numbers is not None and numbers[0] in segments:
            segments[numbers[0]].add(record)
        if record and not layout.is_chunk_commit(name):
            stages.append(name)
    return {
        "url": redacted(store.url),
        "bytes": sum(sizes.values()),
        "arrays": {path: {**about, "bytes": stored[path]} for path, about in arrays.items()},
        "segments": {f"{index:04d}": found.to_json() for index, found in segments.items()},
        "commits": stages,
        "files": {name: sizes[name] for name in store.list_files() if name in sizes},
    }


def _described_nodes(
    folder: Folder, sizes: Mapping[str, int]
) -> tuple[dict[str, dict[str, Any]], dict[int, SegmentProgress]]:
    """Shapes and types of arrays by path, and the segments by index, nothing finished yet."""
    arrays, segments = {}, {}
    documents = {
        n: s for n, s in sizes.items() if n.endswith("/zarr.json") and s <= MOST_METADATA_BYTES
    }
    for name, document in folder.each_record(documents):
        path = name.removesuffix("/zarr.json")
        index = layout.segment_index(path)
        if about := _array_node(document):
            arrays[path] = about
        elif index is not None and path == segment_name(index) and (at := layout_in(document)):
            frames = (at["start"], at["stop"])
            segments[index] = SegmentProgress(frames, at["sizes"]["chunk"], at["creation"])
    return arrays, segments


def _array_node(document: bytes) -> dict[str, Any] | None:
    """Shape and type in zarr.json of an array; None where it is none."""
    try:
        node: dict[str, Any] = json.loads(document)
        about = {"shape": node["shape"], "dtype": node["data_type"]}
        return about if node["node_type"] == "array" else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


# ---- damage


def verify(store: ReconstructionStore) -> list[str]:
    """Read back all that is committed and compare digests; names of what is damaged.

    A commit that is no record of ours is named itself, "commits/align.json", and so are the
    coordinates of a segment, "segments/0000/frame", and the metadata of its arrays,
    "segments/0000/gate/zarr.json", whatever is committed of it. Those of the segment itself,
    "segments/0000/zarr.json", are named where they are not what chunks were committed to.
    What a disk cannot read any more, while it reads others, is damaged too.
    """
    commits = Commits(store.folder).each(UNREADABLE)
    damaged = [n for commit, record in commits for n in store.damage.of_commit(commit, record)]
    broken = [name for names in store.damage.of_segments().values() for name in names]
    return list(dict.fromkeys(damaged + broken))


def restore_root(url: str) -> bool:
    """Write the root of the reconstruction at `url` where it is missing or torn; say whether it is.

    What it said of the drive and the plan is found out again by the next run, for which their
    commits are dropped; chunks stay.

    Raises:
        Claimed: a run is at work; nothing is changed.
        StoreUnavailable: the store cannot be read or written.
    """
    with explaining(url):
        folder = open_folder(url.rstrip("/"))
        if not is_lost(folder):
            return False
        store = ReconstructionStore(folder)
        with store.claim("drive"):
            if not is_lost(folder):
                return False
            for stage in ("plan", "probe"):
                store.drop_commits(stage)
            write_root(folder, {}, {})
    return True


def repair(store: ReconstructionStore) -> list[str]:
    """Declare what `verify` finds damaged unfinished, so that the next run makes it anew.

    Only the commits whose own data or files are damaged are dropped. A segment whose
    coordinates or array metadata are damaged is removed: the latter let no chunk be read.

    Holds the claim on the drive while it reads and, before it drops anything, those on all
    that it drops: it could take back what a run has made anew meanwhile.

    Returns:
        Names of the dropped commits, such as "infer/0000/0001", and of the removed segments,
        such as "segments/0000".

    Raises:
        Claimed: a run is at work; nothing is dropped.
        ClaimLost: this process stood still; nothing more is dropped.
    """
    with ExitStack() as stack:
        claims = {"drive": stack.enter_context(store.claim("drive"))}
        _claim_others(store, stack, claims, ())
        broken = {segment_claim(index): index for index in store.damage.of_segments()}
        damaged = {
            name: _claim_for(name)
            for name, record in Commits(store.folder).each(UNREADABLE)
            if store.damage.of_commit(name, record)
        }
        _claim_others(store, stack, claims, {*damaged.values(), *broken})
        return [
            *(n for n, claim in damaged.items() if _drop_damaged(store, n, claims[claim])),
            *(segment_name(i) for c, i in broken.items() if _remove_broken(store, i, claims[c])),
        ]


def _claim_others(
    store: ReconstructionStore, stack: ExitStack, claims: dict[str, Claim], names: Iterable[str]
) -> None:
    """Add to `claims` those on `names` and on all that anybody, dead or alive, has claimed.

    Raises:
        Claimed: somebody is at work.
    """
    others = {*names, *claimed_names(store.folder)} - claims.keys()
    claims |= stack.enter_context(store.claims(dict.fromkeys(sorted(others), 0)))


def _claim_for(commit: str) -> str:
    """The claim of who may make anew what a commit vouches for."""
    numbers = layout.chunk_numbers(commit)
    return commit if numbers is None else segment_claim(numbers[0])


def _drop_damaged(store: ReconstructionStore, commit: str, claim: Claim) -> bool:
    """Drop a commit unless what it vouches for was made anew meanwhile; say whether it is."""
    record = Commits(store.folder).read_malformed(commit)
    if record is None or not store.damage.of_commit(commit, record):
        return False
    claim.check()
    store.folder.delete(f"{layout.COMMITS}/{commit}.json")
    return True


def _remove_broken(store: ReconstructionStore, index: int, claim: Claim) -> bool:
    """Remove a segment unless it was made anew meanwhile; say whether it was removed."""
    if not store.damage.of_segment(index):
        return False
    claim.check()
    store.remove_segment(index)
    return True


# ---- garbage


def list_garbage(store: ReconstructionStore, age_s: float) -> dict[str, int]:
    """Names and sizes of what no commit refers to and was written `age_s` seconds ago or more.

    What a run at work has written and not committed yet is younger than a day.
    """
    commits = Commits(store.folder)
    commits.check_sum()
    there = _segments_there(store.folder)
    kept = Referenced(_planned(store.attributes, there) & there)
    for name, record in commits.each():
        if _is_valid(name, record):
            kept.add(name, record)
    return find_garbage(store.folder, kept, age_s)


def delete_garbage(store: ReconstructionStore, age_s: float) -> dict[str, int]:
    """Remove what `list_garbage` gives, as the only one at work on the store.

    Holds the claims on the drive and on every segment that loses something: a worker that
    outlived its parent could otherwise begin, and reuse a shard, just before that is removed.

    Raises:
        Claimed: a run is at work; nothing is removed.
        ClaimLost: this process stood still; nothing more is removed.
    """
    with ExitStack() as stack:
        claims = {"drive": stack.enter_context(store.claim("drive"))}
        began = time.monotonic()
        before = list_garbage(store, age_s)
        _claim_others(store, stack, claims, filter(None, map(_claim_on, before)))
        # Looked at again: what another worker finished before the claims is no garbage now, and
        # what one writes that begins after them was not there, or was older.
        now = list_garbage(store, age_s + time.monotonic() - began)
        found = {name: size for name, size in now.items() if name in before}
        for name in found:
            claims[_claim_on(name) or "drive"].check()
            store.folder.delete(name)
    return found


def _segments_there(folder: Folder) -> set[int]:
    """Indices of the segments whose groups have attributes."""
    listed = folder.sizes(layout.SEGMENTS)
    indices = {i for name in listed if (i := layout.segment_index(name)) is not None}
    groups = {n: i for i in indices if (n := f"{segment_name(i)}/zarr.json") in listed}
    documents = folder.each_record({name: listed[name] for name in groups})
    return {groups[name] for name, data in documents if attributes_in(data)}


def _planned(attributes: Mapping[str, Any], there: Collection[int]) -> set[int]:
    """Indices of the planned segments; all that are there where the plan cannot be read."""
    plan = attributes.get("plan")
    if plan is None:
        return set()
    try:
        return {segment["index"] for segment in plan["segments"]}
    except (TypeError, LookupError):
        return set(there)


def _is_valid(name: str, record: Mapping[str, Any]) -> bool:
    """Whether what a commit refers to is kept, though the group of its segment may be damaged."""
    is_of_chunk = layout.is_chunk_commit(name)
    return bool(record) and (not is_of_chunk or layout.chunk_numbers(name) is not None)


def _claim_on(name: str) -> str | None:
    """The claim of who may work on an object of a segment; None of all other objects."""
    index = layout.segment_index(name)
    return None if index is None else segment_claim(index)
