"""ReconstructionStore: what one drive became, in one Zarr group on local disk or S3."""

from __future__ import annotations

import hashlib
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from zarr.core.array import Array
from zarr.storage import StorePath

from storage import layout
from storage.bounds import MOST_METADATA_BYTES, check_array, check_whole, is_array
from storage.claims import Claim, await_free, check_held, claimed_names
from storage.commits import Commits, mapping_in, plain
from storage.encoding import (
    StoredRows,
    VouchedObjects,
    coordinates,
    empty_segment,
    encode_rows,
    group_document,
    whole_array,
)
from storage.errors import (
    ChunkMissing,
    CommitExists,
    DataDamaged,
    NotAStore,
    StoreMissing,
    StoreTooNew,
)
from storage.failures import explaining
from storage.folders import open_folder
from storage.garbage import Referenced, find_garbage
from storage.layout import ArraySpec, by_name, chunk_commit, segment_claim, segment_name
from storage.objects import MOST_DOCUMENT_BYTES, MOST_FILE_BYTES, Folder, check_name, in_parallel
from storage.records import MOST_FRAMES, NOWHERE, Chunk, Segment
from storage.wording import redacted

SEGMENT_SPECS = by_name(layout.SEGMENT_ARRAYS)
STATE_SPECS = by_name(layout.STATE_ARRAYS)
CHUNK_SPECS = SEGMENT_SPECS | {f"state_{name}": spec for name, spec in STATE_SPECS.items()}
UNDECODABLE = (ValueError, TypeError, LookupError, RuntimeError, DataDamaged)


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


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk's data as they will be stored."""

    segment: Segment
    chunk: Chunk
    objects: dict[str, bytes]  # by name in the store
    about: dict[str, Any]  # what its commit will say of them

    @property
    def commit(self) -> str:
        """Name of the commit that will vouch for the chunk."""
        return chunk_commit(self.segment.index, self.chunk.index)


class ReconstructionStore:
    """Poses, depth, states and files of one drive, written chunk by chunk in any order.

    A chunk's commit is written last, so a killed task leaves nothing that reads as finished.
    A chunk is a whole Zarr shard: parallel writers of different chunks need no lock. Readers
    get committed data or an error, never the fill value of something missing.

    Writing again drops the commit first. Two things want one writer at a time: the attributes
    of the store, and the creation of one segment. Depth and confidence are rounded within the
    bounds that `storage.layout` states; all else that is float32 or wider is exact.
    """

    def __init__(self, folder: Folder) -> None:
        """Use `create` or `open`."""
        self._folder = folder
        self._commits = Commits(folder)
        self._zarr = VouchedObjects(folder.zarr_store())
        # By commit name, what this object wrote and has not committed yet.
        self._pending: dict[str, dict[str, Any]] = {}
        self._claims: dict[str, Claim] = {}

    # ---- the store as a whole

    @classmethod
    def create(cls, url: str | Path, attributes: Mapping[str, Any]) -> ReconstructionStore:
        """Make a store at `url`, or open the one that is there, and set its attributes.

        Raises:
            ValueError: the attributes are too large to be read again; they are not written.
            NotAStore: something else is there; it is left untouched.
            StoreTooNew: a store of a newer schema is there.
            StoreUnavailable: no credentials, no such bucket, not writable, no answer.
        """
        with explaining(str(url)):
            folder = open_folder(str(url).rstrip("/"))
            found = _root_attributes(folder)
            if found is None:
                found = _new_root(folder, attributes)
            _write_root(folder, found, attributes)
            groups = [f"{group}/zarr.json" for group in layout.GROUPS]
            folder.write_many(dict.fromkeys(groups, group_document({})))
            return cls(folder)

    @classmethod
    def open(cls, url: str | Path) -> ReconstructionStore:
        """The store at `url`; writes nothing.

        Raises:
            StoreMissing: nothing is there.
            NotAStore, StoreTooNew, StoreUnavailable: as for `create`.
        """
        with explaining(str(url)):
            folder = open_folder(str(url).rstrip("/"))
            _require_root(folder)
            return cls(folder)

    @staticmethod
    def attributes_at(url: str) -> dict[str, Any]:
        """Attributes of the store at `url`, by one read; errors as of `open`."""
        with explaining(url):
            return _require_root(open_folder(url.rstrip("/")))

    @property
    def url(self) -> str:
        """Path or URL of the Zarr group."""
        return self._folder.url

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the Zarr group, as they are now."""
        found = _root_attributes(self._folder)
        if found is None:
            raise StoreMissing(f"the reconstruction at {redacted(self.url)} is gone")
        return found

    def update_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes by name and keep the others; NaN and infinities become null.

        Raises:
            ValueError: together they are too large to be read again; none is written.
        """
        self._check_drive()
        _write_root(self._folder, self.attributes, attributes)

    # ---- commits

    def commit(self, name: str, record: Mapping[str, Any], *, exclusive: bool = False) -> None:
        """Say that `name` ("plan", "align", "infer/0003/0001") is finished; call it last.

        The record should hold `key`; the store adds digests of what this object wrote for it.
        A key `files` {name: digest from `put_file`} lets `verify` check those too.

        Raises:
            CommitExists: `exclusive`, and the name is committed already.
        """
        if not exclusive:
            self._check_drive()
        additions = self._pending.get(name, {})
        self._commits.write(name, {**record, **additions}, exclusive=exclusive)
        self._pending.pop(name, None)

    def read_commit(self, name: str) -> dict[str, Any] | None:
        """The record of a finished stage or chunk, else None."""
        return self._commits.read(name)

    def read_commits(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Records of those of the stages or chunks that are finished, by name.

        Each is asked for: a listing may be older than the one before, and miss what is there.
        """
        return self._commits.read_many(names)

    def commits(self, prefix: str = "") -> dict[str, dict[str, Any]]:
        """Records of `prefix` itself and of all below `prefix/`, by name."""
        return self._commits.all(prefix)

    def commit_names(self, prefix: str = "") -> list[str]:
        """Names of `commits`, from a listing: no record is read."""
        return self._commits.names(prefix)

    def drop_commits(self, prefix: str) -> None:
        """Declare `prefix` and all below `prefix/` unfinished; "" drops everything."""
        self._check_drive()
        self._commits.drop(prefix)

    @contextmanager
    def claim(self, name: str, progress: int = 0) -> Iterator[Claim]:
        """Be the only one at work on `name` ("drive", "infer/0003") while the block runs.

        Chunks of a segment whose claim this object holds are written only as long as it does; all
        that is of the whole drive only as long as this process, if it has taken the claim "drive",
        still holds it.

        Args:
            name: what is worked on; claims of different names know nothing of each other.
            progress: what is done of it, to count the holders that died without getting on.

        Raises:
            Claimed: a living worker holds it. One on another machine that shows no sign of
                life is waited for, `storage.claims.LEASE_S` at most, and then replaced.
        """
        with self.claims({name: progress}) as taken:
            yield taken[name]

    @contextmanager
    def claims(
        self, progress: Mapping[str, int], given_up: threading.Event | None = None
    ) -> Iterator[dict[str, Claim]]:
        """`claim` of all names of `progress`: lost machines are waited for together, once.

        Raises:
            Claimed: a living worker holds one of them; none is taken.
            GivenUp: `given_up` was set while one was waited for; none is taken.
        """
        claims = {name: Claim(self._folder, name, done) for name, done in progress.items()}
        await_free(claims.values(), given_up)
        with ExitStack() as stack:
            in_parallel(stack.enter_context, claims.values())
            self._claims |= claims
            try:
                yield claims
            finally:
                for name in claims:
                    del self._claims[name]

    def _check_drive(self) -> None:
        check_held(self._folder, "drive")

    # ---- frames and trajectory: written as a whole

    def write_frames(
        self, timestamp: np.ndarray, clip: np.ndarray, index: np.ndarray, flags: np.ndarray
    ) -> None:
        """Replace the table of the drive's frames; readable once "probe" is committed.

        Args:
            timestamp: [N] seconds from the start.
            clip: [N] position of the source clip in the drive record.
            index: [N] frame number in the clip.
            flags: [N] bits of KEYFRAME, DAMAGED and DUPLICATE of `storage.records`.

        Raises:
            ValueError: more frames than could be read back.
        """
        if len(timestamp) > MOST_FRAMES:
            raise ValueError(
                f"{len(timestamp)} frames; a drive may have {MOST_FRAMES}: divide the recording"
            )
        arrays = {"timestamp": timestamp, "clip": clip, "index": index, "flags": flags}
        self._write_whole("probe", layout.FRAMES, layout.FRAME_ARRAYS, arrays)

    def read_frames(self) -> dict[str, np.ndarray]:
        """The arrays of `write_frames`; ChunkMissing before "probe" is committed."""
        return self._read_whole("probe", layout.FRAMES, layout.FRAME_ARRAYS)

    def write_trajectory(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace the trajectory; readable once "align" is committed.

        Args:
            arrays: any of `storage.layout.TRAJECTORY_ARRAYS` by name.
        """
        self._write_whole("align", layout.TRAJECTORY, layout.TRAJECTORY_ARRAYS, arrays)

    def read_trajectory(self) -> dict[str, np.ndarray]:
        """The arrays last written; ChunkMissing before "align" is committed."""
        return self._read_whole("align", layout.TRAJECTORY, layout.TRAJECTORY_ARRAYS)

    def _write_whole(
        self,
        stage: str,
        group: str,
        specs: tuple[ArraySpec, ...],
        arrays: Mapping[str, np.ndarray],
    ) -> None:
        known = by_name(specs)
        _check_names(arrays, known, set())
        sizes = layout.dimension_sizes([known[name] for name in arrays], arrays)
        encoded = {n: known[n].encode(a, known[n].shape(sizes)) for n, a in arrays.items()}
        self._check_drive()
        self._commits.drop(stage)
        objects = {f"{group}/zarr.json": group_document({})}
        for name, values in encoded.items():
            objects |= whole_array(f"{group}/{name}", known[name], values)
        self._folder.write_many(objects)
        # Not before: a removal that the store carries out late would take what was written since.
        self._remove_others(group, encoded, objects)
        digests = {f"{group}/{name}": _digest(values) for name, values in encoded.items()}
        self._pending[stage] = {"digests": digests}

    def _remove_others(self, group: str, arrays: Collection[str], objects: Collection[str]) -> None:
        """Remove what else is below a group: other arrays, and other objects of these ones."""
        others = {name: name.split("/")[1] for name in self._folder.sizes(group)}
        for array in sorted({*others.values()} - {*arrays, "zarr.json"}):
            self._folder.delete_tree(f"{group}/{array}")
        for name, array in others.items():
            if array in arrays and name not in objects:
                self._folder.delete(name)

    def _read_whole(
        self, stage: str, group: str, specs: tuple[ArraySpec, ...]
    ) -> dict[str, np.ndarray]:
        record = self._commits.read(stage)
        if record is None:
            raise ChunkMissing(
                f"{group} of {redacted(self.url)} is not finished: no commit {stage!r}; run the "
                f"{stage} stage again"
            )
        written = {path.rpartition("/")[2] for path in mapping_in(record, "digests")}
        names = [spec.name for spec in specs if spec.name in written]
        what = f"{group}; {how_to_mend(self.url)}"
        with self._vouched({stage: record}, group), self._damage_named(what):
            return {name: self._whole(f"{group}/{name}") for name in names}

    # ---- segments

    def create_segment(self, segment: Segment, *sizes: Any, **named_sizes: Any) -> None:
        """Size the arrays of one segment; arguments as those of `create_segments`."""
        self.create_segments([segment], *sizes, **named_sizes)

    def create_segments(
        self,
        segments: Sequence[Segment],
        chunk_frames: int,
        height: int,
        width: int,
        embed: int,
        state_tokens: tuple[int, int],
        pose_memory: tuple[int, int],
    ) -> None:
        """Size the arrays of segments; leaves a segment of the same shape as it is.

        A segment of another shape, range or chunking loses its commits first, then its data.

        Args:
            segments: which frames of the drive.
            chunk_frames: frames in each chunk but the last.
            height, width: of the depth, pixels.
            embed: length E of the descriptor.
            state_tokens: (S, D) of the state after each chunk.
            pose_memory: (M, 2D) of the state after each chunk.
        """
        common = {**layout.FIXED_SIZES, "y": height, "x": width, "embed": embed}
        common["quantile"] = len(layout.GATE_QUANTILES)
        common["token"], common["channel"] = state_tokens
        common["slot"], common["pair"] = pose_memory
        missing = []
        for segment in segments:
            wanted = _segment_attributes(segment, chunk_frames, common)
            current = self._segment_layout(segment) or {}
            if {name: current.get(name) for name in wanted} != wanted:
                missing.append((segment, wanted))
        self._make_segments(missing)

    def _make_segments(self, missing: Sequence[tuple[Segment, dict[str, Any]]]) -> None:
        """Make empty arrays in place of what is there; the groups' attributes come last.

        What a creation that failed has left is written over, not removed: the store may carry out
        a removal late, after its answer was given up, and take what was written since.
        """
        objects: dict[str, bytes] = {}
        groups: dict[str, bytes] = {}
        for segment, wanted in missing:
            group = segment_name(segment.index)
            # Looked at before the claim: what another worker makes meanwhile is not removed.
            commits = self._commits.names(segment_claim(segment.index))
            is_there = bool(commits) or self._folder.read(f"{group}/zarr.json") is not None
            self._check_claim(segment)
            if is_there:
                self.remove_segment(segment.index)
            objects |= empty_segment(group, segment, wanted)
            # Commits name the creation that they belong to, so those of a removed one are void.
            attributes = {**wanted, "creation": uuid.uuid4().hex}
            groups[f"{group}/zarr.json"] = group_document(attributes)
        self._folder.write_many(objects)
        if others := self._folder.create_many(groups):
            raise CommitExists(
                f"{redacted(self.url)}: another worker created {', '.join(others)} meanwhile; "
                "its work stands"
            )

    def remove_segment(self, index: int) -> None:
        """Remove a segment that a new plan does not have, its commits first."""
        self._check_drive()
        group = segment_name(index)
        self._commits.drop(segment_claim(index))
        self._folder.delete(f"{group}/zarr.json")
        self._folder.delete_tree(group)

    def write_chunk(self, segment: Segment, chunk: Chunk, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the data of one chunk; they count for nothing before `commit_chunk`.

        Args:
            segment: created with `create_segment`.
            chunk: one of its chunks, of F frames.
            arrays: `depth` [F, H, W], `confidence` [F, H, W], `cam_to_seg` [F, 4, 4],
                `intrinsics` [F, 3, 3], `descriptor` [F, E], `gate` [F, 5], and the state after
                the chunk: `state_tokens` [S, D], `state_pose_memory` [M, 2D] and, unless
                False, `state_first`.

        Raises:
            ClaimLost: another worker may have taken the segment over.
            ValueError: a name, shape or type is not as declared, or the chunk is not one of
                the segment's.
        """
        self.write_encoded([self.encode_chunk(segment, chunk, arrays)])

    def encode_chunk(
        self, segment: Segment, chunk: Chunk, arrays: Mapping[str, np.ndarray]
    ) -> EncodedChunk:
        """What `write_chunk` would write: rounded and compressed; writes nothing."""
        found = self._require_layout(segment)
        _check_chunk(segment, chunk, found["chunk_frames"])
        encoded = _encode_chunk(arrays, chunk, found["sizes"])
        group = segment_name(segment.index)
        stored = {_array_path(group, name): values for name, values in encoded.items()}
        objects: dict[str, bytes] = {}
        for path, values in stored.items():
            objects |= self._encode_rows(segment, chunk, path, values)
        about = {
            "creation": found["creation"],
            "frames": [chunk.start, chunk.stop],
            "digests": {path: _digest(values) for path, values in stored.items()},
        }
        return EncodedChunk(segment, chunk, objects, about)

    def write_encoded(self, chunks: Sequence[EncodedChunk]) -> None:
        """Write the data of chunks, together: one wait for the disk serves them all.

        Raises:
            ClaimLost, CommitExists: another worker has written or finished one of them.
        """
        objects: dict[str, bytes] = {}
        for encoded in chunks:
            self._check_claim(encoded.segment)
            is_claimed = segment_claim(encoded.segment.index) in self._claims
            if not is_claimed or self._is_void(encoded):
                self._commits.drop(encoded.commit)
            objects |= encoded.objects
        # Only what nobody else has written, however long this process stood still after the check.
        if others := self._folder.create_many(objects):
            for encoded in chunks:
                self._check_claim(encoded.segment)
                if self._commits.read(encoded.commit) is not None:
                    raise CommitExists(f"{encoded.commit} of {redacted(self.url)} is finished")
            self._folder.write_many({name: objects[name] for name in others})
        self._pending |= {encoded.commit: encoded.about for encoded in chunks}

    def _is_void(self, encoded: EncodedChunk) -> bool:
        """Whether there is a commit of the chunk, of arrays that were replaced since."""
        record = self._commits.read(encoded.commit)
        if record is None:
            return False
        return not _is_of(record, encoded.chunk, self._segment_layout(encoded.segment))

    def _encode_rows(
        self, segment: Segment, chunk: Chunk, path: str, values: np.ndarray
    ) -> dict[str, bytes]:
        """One whole shard, to be written in one put.

        Zarr would first read what is there and merge: slow, and it trips over a damaged shard.
        """
        document = self._folder.read(f"{path}/zarr.json")
        if document is None:
            raise _gone(path, self.url)
        try:
            check_array(path, document, layout.spec_at(path))
            shard = encode_rows(document, _rows(path, segment, chunk), values)
        except UNDECODABLE as error:
            raise _unusable(error, self.url) from error
        return {f"{path}/{name}": data for name, data in shard.items()}

    def commit_chunk(self, segment: Segment, chunk: Chunk, record: Mapping[str, Any]) -> None:
        """`commit_chunks` of one."""
        self.commit_chunks([(segment, chunk, record)])

    def commit_chunks(self, chunks: Sequence[tuple[Segment, Chunk, Mapping[str, Any]]]) -> None:
        """Say that chunks last written through this object are finished, all with one wait.

        Args:
            chunks: each with its segment and a record: at least `key`, which `is_chunk_done`
                compares; attempt, timings, host and device belong here too. The store adds
                digests of the stored values.

        Raises:
            CommitExists: somebody else finished one of them meanwhile; all others are committed.
                If what is stored is not what he committed, it is nobody's: the chunk is declared
                unfinished.
            ClaimLost: another worker may have taken one of the segments over; none is committed.
        """
        named = {chunk_commit(s.index, c.index): (s, c, record) for s, c, record in chunks}
        for name in named:
            if name not in self._pending:
                raise ValueError(
                    f"{name} has no data to commit; write the chunk through the same store object "
                    "first"
                )
        for segment, _, _ in chunks:
            self._check_claim(segment)
        records = {n: {**record, **self._pending[n]} for n, (_, _, record) in named.items()}
        others = self._commits.create(records)
        for name in named.keys() - set(others):
            del self._pending[name]
        for name in others:
            segment, chunk, _ = named[name]
            other = self._commits.read(name) or {}
            is_valid = _is_of(other, chunk, self._segment_layout(segment))
            if not is_valid or self._damage(name, other):
                self._commits.drop(name)
        if others:
            raise CommitExists(
                f"commits {', '.join(others)} exist already in {redacted(self.url)}; another "
                "worker was first, and its work stands"
            )

    def _check_claim(self, segment: Segment) -> None:
        claim = self._claims.get(segment_claim(segment.index))
        if claim is not None:
            claim.check()

    def is_chunk_done(self, segment: Segment, chunk: Chunk, key: str) -> bool:
        """Whether the chunk is committed under this key, in arrays that are still there."""
        record = self._chunk_record(segment, chunk, self._segment_layout(segment))
        return record is not None and record.get("key") == key

    def finished_chunks(
        self, segments: Sequence[Segment], chunk_frames: int
    ) -> dict[tuple[int, int], str]:
        """Keys of the finished chunks of segments, by numbers of segment and chunk.

        As `is_chunk_done` of each, by one listing and reads that do not wait for each other.
        """
        chunks = {
            chunk_commit(s.index, c.index): (s, c) for s in segments for c in s.chunks(chunk_frames)
        }
        records = self._commits.read_many(n for n in self.commit_names("infer") if n in chunks)
        groups = {f"{segment_name(chunks[n][0].index)}/zarr.json" for n in records}
        layouts = {n: _layout_in(data) for n, data in self._folder.read_many(groups).items()}
        finished = {}
        for name, record in records.items():
            segment, chunk = chunks[name]
            found = layouts.get(f"{segment_name(segment.index)}/zarr.json")
            if _is_of(record, chunk, found):
                finished[segment.index, chunk.index] = str(record.get("key"))
        return finished

    def _chunk_record(
        self, segment: Segment, chunk: Chunk, found: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        record = self._commits.read(chunk_commit(segment.index, chunk.index))
        return record if record is not None and _is_of(record, chunk, found) else None

    def read(self, segment: Segment, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a per-frame array of a segment.

        Args:
            segment: whose view of the frames; neighbours overlap.
            name: one of `storage.layout.SEGMENT_ARRAYS`.
            start, stop: frames of the drive, half-open, inside the segment.

        Returns:
            [stop - start, ...]; float16 arrays come as float32.

        Raises:
            ChunkMissing: some of the frames are not finished.
            DataDamaged: the stored data cannot be decoded.
            ValueError: no such array, or frames outside the segment.
        """
        return self.read_many(segment, [name], start, stop)[name]

    def read_many(
        self, segment: Segment, names: Sequence[str], start: int, stop: int
    ) -> dict[str, np.ndarray]:
        """Rows of several per-frame arrays: what `read` gives for each, looked up together."""
        _check_names(names, SEGMENT_SPECS, set())
        if not segment.start <= start <= stop <= segment.stop:
            raise ValueError(
                f"frames {start}..{stop} are not inside segment {segment.index}, which holds "
                f"{segment.start}..{segment.stop}"
            )
        found = self._require_layout(segment)
        each = found["chunk_frames"]
        numbers = range((start - segment.start) // each, -(-(stop - segment.start) // each))
        chunks = [segment.chunk(number, each) for number in numbers]
        records = self._require_chunks(segment, chunks, found)
        rows = slice(start - segment.start, stop - segment.start)
        with self._vouched(records, segment_name(segment.index)):
            return self._rows_of(segment, names, rows)

    def _rows_of(
        self, segment: Segment, names: Sequence[str], rows: slice
    ) -> dict[str, np.ndarray]:
        """Rows of per-frame arrays, whoever vouches for them."""
        paths = {name: f"{segment_name(segment.index)}/{name}" for name in names}
        shards = self._small_shards(paths.values(), rows)
        frames = f"frames {segment.start + rows.start}..{segment.start + rows.stop}"
        values = {}
        for name, path in paths.items():
            with self._damage_named(f"{path}, {frames}; {how_to_mend(self.url)}"):
                stored = shards.get(path)
                read = self._array(path)[rows] if stored is None else stored.decode()
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
                raise _unusable(error, self.url) from error
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

    def read_state(self, segment: Segment, chunk: Chunk) -> dict[str, Any]:
        """The state after a chunk, exactly as written.

        Returns:
            `tokens` [S, D], `pose_memory` [M, 2D], `first` (bool), and `frame`, the first
            frame of the drive that the state has not seen.

        Raises:
            ChunkMissing, DataDamaged: as for `read`.
        """
        found = self._require_layout(segment)
        records = self._require_chunks(segment, [chunk], found)
        group = f"{segment_name(segment.index)}/state"
        what = f"{group}, chunk {chunk.index}; {how_to_mend(self.url)}"
        with self._vouched(records, group), self._damage_named(what):
            values = {n: np.asarray(self._array(f"{group}/{n}")[chunk.index]) for n in STATE_SPECS}
        return {**values, "first": bool(values["first"]), "frame": chunk.stop}

    def _segment_layout(self, segment: Segment) -> dict[str, Any] | None:
        return _layout_in(self._folder.read(f"{segment_name(segment.index)}/zarr.json"))

    def _require_layout(self, segment: Segment) -> dict[str, Any]:
        found = self._segment_layout(segment)
        if found is None:
            raise ChunkMissing(
                f"segment {segment.index} (frames {segment.start}..{segment.stop}) of "
                f"{redacted(self.url)} does not exist yet; run the infer stage for it"
            )
        if [found["start"], found["stop"]] != [segment.start, segment.stop]:
            raise ChunkMissing(
                f"segment {segment.index} of {redacted(self.url)} holds frames "
                f"{found['start']}..{found['stop']} of an earlier plan, not "
                f"{segment.start}..{segment.stop}; run the infer stage for it"
            )
        return found

    def _require_chunks(
        self, segment: Segment, chunks: Iterable[Chunk], found: dict[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Commits of finished chunks by name.

        Raises:
            ChunkMissing: one of them is not finished.
        """
        wanted = {chunk_commit(segment.index, chunk.index): chunk for chunk in chunks}
        records = self._commits.read_many(wanted)
        for name, chunk in wanted.items():
            if not _is_of(records.get(name, {}), chunk, found):
                raise ChunkMissing(
                    f"segment {segment.index} chunk {chunk.index} (frames {chunk.start}.."
                    f"{chunk.stop}) of {redacted(self.url)} is not finished; run the infer stage "
                    "again, it resumes there"
                )
        return records

    @contextmanager
    def _vouched(self, records: Mapping[str, dict[str, Any]], what: str) -> Iterator[None]:
        """Read what these commits vouch for, from the beginning to the end.

        Raises:
            ChunkMissing: one was dropped or replaced meanwhile; what was read, or could not be,
                counts for nothing.
        """
        failure = None
        try:
            yield
        except UNDECODABLE as error:
            failure = error
        if self._commits.read_many(records) != records:
            where = f"{what} of {redacted(self.url)}"
            raise ChunkMissing(f"{where} changed while being read; retry") from failure
        if failure is not None:
            raise failure

    # ---- files: meshes, pictures, the report

    def put_file(self, name: str, data: bytes | Path) -> str:
        """Store bytes, or the content of a local file, as a whole; return its SHA-256.

        Args:
            name: such as "fusion/mesh.ply", under one of `storage.layout.FILE_FOLDERS`.
        """
        _check_file_name(name)
        self._check_drive()
        if isinstance(data, bytes):
            self._folder.write(name, data)
            return hashlib.sha256(data).hexdigest()
        self._folder.upload(name, data)
        return _file_digest(data)

    def get_file(self, name: str, digest: str | None = None) -> bytes:
        """Content of a stored file; FileNotFoundError where there is none.

        Args:
            name: as for `put_file`.
            digest: SHA-256 that a commit says it has.

        Raises:
            DataDamaged: with `digest`, the file is gone or another.
        """
        data = self._folder.read(_check_file_name(name), MOST_FILE_BYTES)
        if data is None:
            raise self._file_gone(name, digest)
        if digest not in (None, hashlib.sha256(data).hexdigest()):
            raise self._file_damaged(name, "not what was committed")
        return data

    def local_copy(self, name: str, folder: str | Path, digest: str | None = None) -> Path:
        """Copy a stored file of any size into a local folder, made if missing.

        Args:
            name: as for `put_file`.
            folder: where to.
            digest: SHA-256 that a commit says the file has.

        Returns:
            Its path there.

        Raises:
            DataDamaged: with `digest`, the file is gone or another.
            FileNotFoundError: without, there is none.
        """
        target = Path(folder) / Path(_check_file_name(name)).name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._folder.download(name, target)
        except FileNotFoundError as error:
            raise self._file_gone(name, digest) from error
        if digest is not None and _file_digest(target) != digest:
            raise self._file_damaged(name, "not what was committed")
        return target

    def _file_gone(self, name: str, digest: str | None) -> Exception:
        if digest is not None:
            return self._file_damaged(name, "gone")
        return FileNotFoundError(f"no file {name!r} in {redacted(self.url)}")

    def _file_damaged(self, name: str, state: str) -> DataDamaged:
        return DataDamaged(f"{name} of {redacted(self.url)} is {state}; {how_to_mend(self.url)}")

    def delete_files(self, prefix: str) -> None:
        """Remove the stored files whose names start with `prefix`, such as "fusion/"."""
        self._check_drive()
        for name in self.list_files(prefix):
            self._folder.delete(name)

    def file_url(self, name: str) -> str:
        """Path or URL of a stored file."""
        return self._folder.object_url(_check_file_name(name))

    def list_files(self, prefix: str = "") -> list[str]:
        """Names of stored files whose names start with `prefix`, in order."""
        folders = [f for f in layout.FILE_FOLDERS if prefix.startswith(f) or f.startswith(prefix)]
        names = [n for folder in folders for n in self._folder.sizes(folder)]
        own = {f"{folder}/zarr.json" for folder in layout.FILE_FOLDERS}
        return sorted(n for n in names if n.startswith(prefix) and n not in own)

    # ---- inspection

    def stored_bytes(self) -> int:
        """Size of all that is stored, from a listing."""
        return sum(self._folder.sizes().values())

    def describe(self) -> dict[str, Any]:
        """What is there, for people: JSON values only.

        Returns:
            `url`; `bytes`, all that is stored; `arrays` {path: shape, dtype, bytes};
            `segments` {number: frames, chunks_committed, chunks_total}; `commits`, names of
            finished stages other than chunks; `files` {name: bytes}.
        """
        sizes = self._folder.sizes()
        stored: Counter[str] = Counter()
        for name, size in sizes.items():
            shard = layout.shard_at(name)
            stored[shard[0] if shard else name.removesuffix("/zarr.json")] += size
        arrays, segments = self._described_nodes(sizes)
        stages = []
        for name, record in self._commits.each():
            numbers = layout.chunk_numbers(name)
            if numbers is not None and numbers[0] in segments:
                segments[numbers[0]].add(record)
            if record and not _is_of_chunk(name):
                stages.append(name)
        return {
            "url": redacted(self.url),
            "bytes": sum(sizes.values()),
            "arrays": {path: {**about, "bytes": stored[path]} for path, about in arrays.items()},
            "segments": {f"{index:04d}": found.to_json() for index, found in segments.items()},
            "commits": stages,
            "files": {name: sizes[name] for name in self.list_files() if name in sizes},
        }

    def _described_nodes(
        self, sizes: Mapping[str, int]
    ) -> tuple[dict[str, dict[str, Any]], dict[int, SegmentProgress]]:
        """Shapes and types of arrays by path, and the segments by index, nothing finished yet."""
        arrays, segments = {}, {}
        documents = {
            n: s for n, s in sizes.items() if n.endswith("/zarr.json") and s <= MOST_METADATA_BYTES
        }
        for name, document in self._folder.each_record(documents):
            path = name.removesuffix("/zarr.json")
            index = layout.segment_index(path)
            if about := _array_node(document):
                arrays[path] = about
            elif index is not None and path == segment_name(index) and (at := _layout_in(document)):
                frames = (at["start"], at["stop"])
                segments[index] = SegmentProgress(frames, at["sizes"]["chunk"], at["creation"])
        return arrays, segments

    def verify(self) -> list[str]:
        """Read back all that is committed and compare digests; names of what is damaged.

        A commit that is no record of ours is named itself, "commits/align.json", and so are the
        coordinates of a segment, "segments/0000/frame", and the metadata of its arrays,
        "segments/0000/gate/zarr.json", whatever is committed of it. Those of the segment itself,
        "segments/0000/zarr.json", are named where they are not what chunks were committed to.
        """
        commits = self._commits.each()
        damaged = [name for commit, record in commits for name in self._damage(commit, record)]
        broken = [name for names in self._broken_segments().values() for name in names]
        return list(dict.fromkeys(damaged + broken))

    def repair(self) -> list[str]:
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
            claims = {"drive": stack.enter_context(self.claim("drive"))}
            self._claim_others(stack, claims, ())
            broken = {segment_claim(index): index for index in self._broken_segments()}
            records = self._commits.each()
            damaged = {
                name: _claim_for(name) for name, record in records if self._damage(name, record)
            }
            self._claim_others(stack, claims, {*damaged.values(), *broken})
            return [
                *(n for n, claim in damaged.items() if self._drop_damaged(n, claims[claim])),
                *(segment_name(i) for c, i in broken.items() if self._remove_broken(i, claims[c])),
            ]

    def _claim_others(
        self, stack: ExitStack, claims: dict[str, Claim], names: Iterable[str]
    ) -> None:
        """Add to `claims` those on `names` and on all that anybody, dead or alive, has claimed.

        Raises:
            Claimed: somebody is at work.
        """
        others = {*names, *claimed_names(self._folder)} - claims.keys()
        claims |= stack.enter_context(self.claims(dict.fromkeys(sorted(others), 0)))

    def _drop_damaged(self, commit: str, claim: Claim) -> bool:
        """Drop a commit unless what it vouches for was made anew meanwhile; say whether it is."""
        record = self._commits.read_malformed(commit)
        if record is None or not self._damage(commit, record):
            return False
        claim.check()
        self._folder.delete(f"{layout.COMMITS}/{commit}.json")
        return True

    def _remove_broken(self, index: int, claim: Claim) -> bool:
        """Remove a segment unless it was made anew meanwhile; say whether it was removed."""
        if not self._broken_metadata(index):
            return False
        claim.check()
        self.remove_segment(index)
        return True

    def garbage(self, age_s: float) -> dict[str, int]:
        """Names and sizes of what no commit refers to and was written `age_s` seconds ago or more.

        What a run at work has written and not committed yet is younger than a day.
        """
        self._commits.check_sum()
        there = self._segments_there()
        kept = Referenced(_planned(self.attributes, there) & there)
        for name, record in self._commits.each():
            if _is_valid(name, record):
                kept.add(name, record)
        return find_garbage(self._folder, kept, age_s)

    def _segments_there(self) -> set[int]:
        """Indices of the segments whose groups have attributes."""
        listed = self._folder.sizes(layout.SEGMENTS)
        indices = {i for name in listed if (i := layout.segment_index(name)) is not None}
        groups = {n: i for i in indices if (n := f"{segment_name(i)}/zarr.json") in listed}
        documents = self._folder.each_record({name: listed[name] for name in groups})
        return {groups[name] for name, data in documents if _attributes(data)}

    def delete_garbage(self, age_s: float) -> dict[str, int]:
        """Remove what `garbage` gives, as the only one at work on the store.

        Holds the claims on the drive and on every segment that loses something: a worker that
        outlived its parent could otherwise begin, and reuse a shard, just before that is removed.

        Raises:
            Claimed: a run is at work; nothing is removed.
            ClaimLost: this process stood still; nothing more is removed.
        """
        with ExitStack() as stack:
            claims = {"drive": stack.enter_context(self.claim("drive"))}
            began = time.monotonic()
            before = self.garbage(age_s)
            self._claim_others(stack, claims, filter(None, map(_claim_on, before)))
            # Looked at again: what another worker finished before the claims is no garbage now, and
            # what one writes that begins after them was not there, or was older.
            now = self.garbage(age_s + time.monotonic() - began)
            found = {name: size for name, size in now.items() if name in before}
            for name in found:
                claims[_claim_on(name) or "drive"].check()
                self._folder.delete(name)
        return found

    def _damage(self, commit: str, record: dict[str, Any]) -> list[str]:
        """Names of the arrays, chunks and files of one commit that are not as committed."""
        if not _is_record(commit, record):
            return [f"{layout.COMMITS}/{commit}.json"]
        numbers = layout.chunk_numbers(commit)
        if numbers is not None and not self._is_of_segment(record, *numbers):
            return [f"{segment_name(numbers[0])}/zarr.json"]
        chunk = None if numbers is None else numbers[1]
        named = "" if chunk is None else f" chunk {chunk}"
        digests, files = mapping_in(record, "digests"), mapping_in(record, "files")
        arrays = [p for p, d in digests.items() if self._stored_digest(p, record, chunk) != d]
        broken = [name for name, d in files.items() if self._stored_file_digest(name) != d]
        return [f"{path}{named}" for path in arrays] + broken

    def _is_of_segment(self, record: dict[str, Any], index: int, chunk: int) -> bool:
        """Whether a commit is of this chunk of the segment that is there now."""
        found = self._sound_layout(index)
        if found is None:
            return False
        segment = Segment(index, found["start"], found["stop"], NOWHERE)
        return _is_of(record, segment.chunk(chunk, found["chunk_frames"]), found)

    def _sound_layout(self, index: int) -> dict[str, Any] | None:
        """As `_segment_layout`, None also where the document is too large to be one."""
        name = f"{segment_name(index)}/zarr.json"
        return _layout_in(self._folder.read_records([name]).get(name))

    def _broken_segments(self) -> dict[int, list[str]]:
        """Coordinates and metadata of arrays that are not ours, by index of the segment."""
        listed = map(layout.segment_index, self._folder.sizes(layout.SEGMENTS))
        found = {i: self._broken_metadata(i) for i in sorted({i for i in listed if i is not None})}
        return {index: names for index, names in found.items() if names}

    def _broken_metadata(self, index: int) -> list[str]:
        """Of one segment; none while it is being made or removed."""
        found = self._sound_layout(index)
        if found is None:
            return []
        group = segment_name(index)
        paths = [_array_path(group, name) for name in CHUNK_SPECS]
        specs = {f"{path}/zarr.json": layout.spec_at(path) for path in paths}
        sizes = {n: s for n, s in self._folder.sizes(group).items() if n in specs}
        sound = {n for n, data in self._folder.each_record(sizes) if is_array(data, specs[n])}
        wanted = coordinates(found["start"], found["stop"], found["chunk_frames"])
        known = {f"{group}/{name}": _digest(values) for name, values in wanted.items()}
        broken = [name for name in specs if name not in sound]
        broken += [p for p, digest in known.items() if self._stored_digest(p, {}, None) != digest]
        # Looked at again: it is removed before its arrays.
        return broken if broken and self._sound_layout(index) == found else []

    def _stored_file_digest(self, name: str) -> str | None:
        try:
            return self._folder.sha256(name)
        except DataDamaged:
            return None

    def _stored_digest(self, path: str, record: dict[str, Any], chunk: int | None) -> str | None:
        try:
            with explaining(self.url):
                return self._array_digest(path, record, chunk)
        except UNDECODABLE:  # not StoreUnavailable: a lost connection is no damage
            return None

    def _array_digest(self, path: str, record: dict[str, Any], chunk: int | None) -> str:
        if chunk is None:
            return _digest(self._whole(path))
        array = self._array(path)
        if "/state/" in path:
            return _digest(np.asarray(array[chunk : chunk + 1]))
        frames = record["frames"]
        rows = array.shards or array.chunks
        start = chunk * rows[0]
        return _digest(np.asarray(array[start : start + min(frames[1] - frames[0], rows[0])]))

    # ---- zarr

    def _array(self, path: str) -> Array[Any]:
        """An array of the layout, found to be one before anything is allocated for it."""
        document = self._folder.read(f"{path}/zarr.json")
        if document is None:
            raise _gone(path, self.url)
        try:
            check_array(path, document, layout.spec_at(path))
            return Array.from_dict(StorePath(self._zarr, path), json.loads(document))
        except UNDECODABLE as error:
            raise _unusable(error, self.url) from error

    def _whole(self, path: str) -> np.ndarray:
        array = self._array(path)
        check_whole(path, array)
        return np.asarray(array[...])

    @contextmanager
    def _damage_named(self, what: str) -> Iterator[None]:
        """Turn a decoder's error into one that says which data are damaged."""
        try:
            with explaining(self.url):
                yield
        except (ValueError, RuntimeError) as error:
            raise DataDamaged(f"{redacted(self.url)}: cannot decode {what} ({error})") from error


def how_to_mend(url: str) -> str:
    """What to do about damaged data of the store, for the end of a message."""
    return f"run `ttt3r repair {redacted(url)}`, then `ttt3r reconstruct` again"


def _new_root(folder: Folder, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Make the root where nothing is; give the attributes that it has then.

    Of several that do so at the same time one makes it, and the others find it.
    """
    content = ["a file"] if folder.is_file() else list(folder.sizes())
    if not content:
        with suppress(CommitExists):
            folder.write_new("zarr.json", _root_document(_merged({}, attributes)))
    found = _root_attributes(folder)
    if found is None:
        raise NotAStore(
            f"{redacted(folder.url)} exists and is not a reconstruction (found: "
            f"{', '.join(content[:1])}); it is left as it is, choose another location"
        )
    return found


def _write_root(folder: Folder, current: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Merge `changes` into the attributes; no write where nothing changes."""
    merged = _merged(current, changes)
    if merged != current:
        folder.write("zarr.json", _root_document(merged))


def _root_document(attributes: Mapping[str, Any]) -> bytes:
    document = group_document(attributes)
    if len(document) > MOST_DOCUMENT_BYTES:
        raise ValueError(
            f"the record and plan of the drive have {len(document) >> 20} MiB, more than the "
            f"{MOST_DOCUMENT_BYTES >> 20} MiB that are read again; they were not written: choose "
            "longer segments (segment_frames), or cut the recording into several drives"
        )
    return document


def _merged(current: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    schema = {"schema": layout.SCHEMA, "schema_version": layout.SCHEMA_VERSION}
    return {**current, **plain(changes), **schema}


def _root_attributes(folder: Folder) -> dict[str, Any] | None:
    """Attributes of the store; None where nothing is; refuses what is not ours."""
    data = folder.read("zarr.json")
    if data is None:
        return None
    found = _attributes(data)
    if found.get("schema") != layout.SCHEMA:
        raise NotAStore(
            f"{redacted(folder.url)} holds a Zarr node that is not a reconstruction; it is left "
            "as it is, choose another location"
        )
    version = found.get("schema_version")
    if type(version) is not int:
        raise NotAStore(f"{redacted(folder.url)} has no schema version; choose another location")
    if version > layout.SCHEMA_VERSION:
        raise StoreTooNew(
            f"{redacted(folder.url)} has schema version {version}; this software "
            f"knows up to {layout.SCHEMA_VERSION}: update it, or choose another location"
        )
    return found


def _require_root(folder: Folder) -> dict[str, Any]:
    found = _root_attributes(folder)
    if found is None:
        raise StoreMissing(
            f"no reconstruction at {redacted(folder.url)}; check the location, or run "
            "the reconstruction that makes it"
        )
    return found


def _attributes(document: bytes | None) -> dict[str, Any]:
    """Attributes of a group; none where it is not there or not one."""
    try:
        found = json.loads(document or b"{}")["attributes"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _layout_in(data: bytes | None) -> dict[str, Any] | None:
    """What a segment's group says of it; None where it is not there, not finished or malformed."""
    found = _attributes(data)
    sizes = mapping_in(found, "sizes")
    lengths = [sizes.get(dim) for spec in CHUNK_SPECS.values() for dim in spec.dims]
    counts = [*lengths, found.get("start"), found.get("stop"), found.get("chunk_frames")]
    is_whole = all(type(n) is int and n >= 0 for n in counts) and found["chunk_frames"] > 0
    is_whole = is_whole and _is_range([found["start"], found["stop"]])
    return found if is_whole and isinstance(found.get("creation"), str) else None


def _is_of(record: Mapping[str, Any], chunk: Chunk, found: Mapping[str, Any] | None) -> bool:
    """Whether a commit is of this chunk in the arrays that are there now."""
    if found is None or record.get("creation") != found["creation"]:
        return False
    return bool(record.get("frames") == [chunk.start, chunk.stop])


def _segment_attributes(
    segment: Segment, chunk_frames: int, common: Mapping[str, int]
) -> dict[str, Any]:
    """What a segment's group says of it, but for its creation."""
    own = {"frame": segment.frames, "chunk": segment.count_chunks(chunk_frames)}
    return {
        "start": segment.start,
        "stop": segment.stop,
        "chunk_frames": chunk_frames,
        "sizes": {**common, **own},
    }


def _check_names(given: Any, known: Mapping[str, ArraySpec], required: set[str]) -> None:
    unknown, missing = sorted(set(given) - set(known)), sorted(required - set(given))
    if unknown or missing:
        raise ValueError(
            f"arrays unknown: {unknown}, missing: {missing}; expected names are {sorted(known)}"
        )


def _check_chunk(segment: Segment, chunk: Chunk, chunk_frames: int) -> None:
    is_there = 0 <= chunk.index < segment.count_chunks(chunk_frames)
    if not is_there or chunk != segment.chunk(chunk.index, chunk_frames):
        raise ValueError(
            f"{chunk} is not a chunk of {segment} cut every {chunk_frames} frames; writing it "
            "would touch the shard of another chunk"
        )


def _encode_chunk(
    arrays: Mapping[str, np.ndarray], chunk: Chunk, sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Stored values by name in `CHUNK_SPECS`; state arrays get a leading axis of 1."""
    required = {name for name, spec in CHUNK_SPECS.items() if not spec.optional}
    _check_names(arrays, CHUNK_SPECS, required)
    own = {**sizes, "frame": chunk.stop - chunk.start, "chunk": 1}
    encoded = {}
    for name, spec in CHUNK_SPECS.items():
        shape = spec.shape(own)
        if name not in arrays:
            encoded[name] = np.zeros(shape, spec.dtype)
        elif name.startswith("state_"):
            encoded[name] = spec.encode(arrays[name], shape[1:])[np.newaxis]
        else:
            encoded[name] = spec.encode(arrays[name], shape)
    return encoded


def _array_path(group: str, name: str) -> str:
    state = name.removeprefix("state_")
    return f"{group}/{name}" if state == name else f"{group}/state/{state}"


def _rows(path: str, segment: Segment, chunk: Chunk) -> slice:
    if "/state/" in path:
        return slice(chunk.index, chunk.index + 1)
    return slice(chunk.start - segment.start, chunk.stop - segment.start)


def _gone(path: str, url: str) -> DataDamaged:
    return DataDamaged(f"array {path} of {redacted(url)} is gone; {how_to_mend(url)}")


def _unusable(error: Exception, url: str) -> DataDamaged:
    return DataDamaged(f"{redacted(url)}: {error}; {how_to_mend(url)}")


def _widened(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) if values.dtype == np.float16 else values


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _claim_on(name: str) -> str | None:
    """The claim of who may work on an object of a segment; None of all other objects."""
    index = layout.segment_index(name)
    return None if index is None else segment_claim(index)


def _claim_for(commit: str) -> str:
    """The claim of who may make anew what a commit vouches for."""
    numbers = layout.chunk_numbers(commit)
    return commit if numbers is None else segment_claim(numbers[0])


def _check_file_name(name: str) -> str:
    if check_name(name).split("/")[0] not in layout.FILE_FOLDERS or "/" not in name:
        raise ValueError(f"{name!r} is not under one of the folders {layout.FILE_FOLDERS}")
    if name.endswith("zarr.json"):
        raise ValueError(f"{name!r} is a name that Zarr uses; choose another")
    return name


def _is_of_chunk(commit: str) -> bool:
    return commit.startswith("infer/")


def _is_record(commit: str, record: Mapping[str, Any]) -> bool:
    """Whether a commit is one of ours: of a known name, and it names nothing that is elsewhere."""
    digests, files = record.get("digests") or {}, record.get("files") or {}
    if not record or not isinstance(digests, dict) or not isinstance(files, dict):
        return False
    numbers = layout.chunk_numbers(commit)
    if numbers is not None:
        own = {_array_path(segment_name(numbers[0]), name) for name in CHUNK_SPECS}
        return set() < digests.keys() <= own and _is_range(record.get("frames")) and not files
    if _is_of_chunk(commit):
        return False
    return all(map(_is_whole_array, digests)) and all(map(_is_file_name, files))


def _is_range(frames: Any) -> bool:
    """Whether it is [start, stop]."""
    is_pair = isinstance(frames, list) and [type(n) for n in frames] == [int, int]
    return is_pair and 0 <= frames[0] < frames[1] <= MOST_FRAMES


def _is_whole_array(path: str) -> bool:
    """Whether it is an array that is written as a whole."""
    group, _, name = path.rpartition("/")
    specs = {layout.FRAMES: layout.FRAME_ARRAYS, layout.TRAJECTORY: layout.TRAJECTORY_ARRAYS}
    return name in by_name(specs.get(group, ()))


def _is_file_name(name: str) -> bool:
    try:
        return bool(_check_file_name(name))
    except ValueError:
        return False


def _is_valid(name: str, record: Mapping[str, Any]) -> bool:
    """Whether what a commit refers to is kept, though the group of its segment may be damaged."""
    return bool(record) and (not _is_of_chunk(name) or layout.chunk_numbers(name) is not None)


def _planned(attributes: Mapping[str, Any], there: Collection[int]) -> set[int]:
    """Indices of the planned segments; all that are there where the plan cannot be read."""
    plan = attributes.get("plan")
    if plan is None:
        return set()
    try:
        return {segment["index"] for segment in plan["segments"]}
    except (TypeError, LookupError):
        return set(there)


def _array_node(document: bytes) -> dict[str, Any] | None:
    """Shape and type in zarr.json of an array; None where it is none."""
    try:
        node: dict[str, Any] = json.loads(document)
        about = {"shape": node["shape"], "dtype": node["data_type"]}
        return about if node["node_type"] == "array" else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
