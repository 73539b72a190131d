"""ReconstructionStore: what one drive became, in one Zarr group on local disk or S3."""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage import layout
from storage.arrays import UNDECODABLE, StoredArrays, digest_of
from storage.claims import Claim, await_free, check_held
from storage.commits import Commits, mapping_in
from storage.damage import Damage
from storage.encoding import empty_segment, group_document, whole_array
from storage.errors import ChunkMissing, CommitExists, DataDamaged, StoreMissing
from storage.failures import explaining
from storage.folders import open_folder
from storage.layout import (
    ArraySpec,
    by_name,
    check_file_name,
    chunk_commit,
    segment_claim,
    segment_name,
)
from storage.objects import MOST_FILE_BYTES, Folder, in_parallel
from storage.records import MOST_FRAMES, Chunk, Segment
from storage.root import new_root, require_root, root_attributes, write_root
from storage.segments import (
    SEGMENT_SPECS,
    STATE_SPECS,
    check_chunk,
    chunk_rows,
    chunk_values,
    is_commit_of,
    layout_in,
    segment_attributes,
)
from storage.wording import how_to_mend, redacted


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

    `storage.upkeep` describes, verifies and repairs a store and removes leftovers. What bypasses
    the promises above is for it alone:

    Attributes:
        folder: all objects of the store.
        damage: what of them is not as its commits and its layout say.
    """

    def __init__(self, folder: Folder) -> None:
        """Use `create` or `open`."""
        self.folder = folder
        self._commits = Commits(folder)
        self._arrays = StoredArrays(folder)
        self.damage = Damage(folder, self._arrays)
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
            found = root_attributes(folder)
            if found is None:
                found = new_root(folder, attributes)
            write_root(folder, found, attributes)
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
            require_root(folder)
            return cls(folder)

    @staticmethod
    def attributes_at(url: str) -> dict[str, Any]:
        """Attributes of the store at `url`, by one read; errors as of `open`."""
        with explaining(url):
            return require_root(open_folder(url.rstrip("/")))

    @property
    def url(self) -> str:
        """Path or URL of the Zarr group."""
        return self.folder.url

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the Zarr group, as they are now."""
        found = root_attributes(self.folder)
        if found is None:
            raise StoreMissing(f"the reconstruction at {redacted(self.url)} is gone")
        return found

    def update_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes by name and keep the others; NaN and infinities become null.

        Raises:
            ValueError: together they are too large to be read again; none is written.
        """
        self._check_drive()
        write_root(self.folder, self.attributes, attributes)

    def stored_bytes(self) -> int:
        """Size of all that is stored, from a listing."""
        return sum(self.folder.sizes().values())

    # ---- commits

    def commit(self, name: str, record: Mapping[str, Any], *, exclusive: bool = False) -> None:
        """Say that `name` ("plan", "align", "infer/0003/0001") is finished; call it last.

        The record should hold `key`; the store adds digests of what this object wrote for it.
        A key `files` {name: digest from `put_file`} lets `upkeep.verify` check those too.

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
        claims = {name: Claim(self.folder, name, done) for name, done in progress.items()}
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
        check_held(self.folder, "drive")

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
        layout.check_names(arrays, known)
        sizes = layout.dimension_sizes([known[name] for name in arrays], arrays)
        encoded = {n: known[n].encode(a, known[n].shape(sizes)) for n, a in arrays.items()}
        self._check_drive()
        self._commits.drop(stage)
        objects = {f"{group}/zarr.json": group_document({})}
        for name, values in encoded.items():
            objects |= whole_array(f"{group}/{name}", known[name], values)
        self.folder.write_many(objects)
        # Not before: a removal that the store carries out late would take what was written since.
        self._remove_others(group, encoded, objects)
        digests = {f"{group}/{name}": digest_of(values) for name, values in encoded.items()}
        self._pending[stage] = {"digests": digests}

    def _remove_others(self, group: str, arrays: Collection[str], objects: Collection[str]) -> None:
        """Remove what else is below a group: other arrays, and other objects of these ones."""
        others = {name: name.split("/")[1] for name in self.folder.sizes(group)}
        for array in sorted({*others.values()} - {*arrays, "zarr.json"}):
            self.folder.delete_tree(f"{group}/{array}")
        for name, array in others.items():
            if array in arrays and name not in objects:
                self.folder.delete(name)

    def _read_whole(
        self, stage: str, group: str, specs: tuple[ArraySpec, ...]
    ) -> dict[str, np.ndarray]:
        record = self._commits.read(stage)
        if record is None:
            raise ChunkMissing(
                f"{group} of {redacted(self.url)} is not finished: no commit {stage!r}; "
                "run `ttt3r reconstruct` again"
            )
        written = {path.rpartition("/")[2] for path in mapping_in(record, "digests")}
        names = [spec.name for spec in specs if spec.name in written]
        with self._vouched({stage: record}, group), self._arrays.damage_named(group):
            return {name: self._arrays.read_whole(f"{group}/{name}") for name in names}

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
            wanted = segment_attributes(segment, chunk_frames, common)
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
            is_there = bool(commits) or self.folder.read(f"{group}/zarr.json") is not None
            self._check_claim(segment)
            if is_there:
                self.remove_segment(segment.index)
            objects |= empty_segment(group, segment, wanted)
            # Commits name the creation that they belong to, so those of a removed one are void.
            attributes = {**wanted, "creation": uuid.uuid4().hex}
            groups[f"{group}/zarr.json"] = group_document(attributes)
        self.folder.write_many(objects)
        if others := self.folder.create_many(groups):
            raise CommitExists(
                f"{redacted(self.url)}: another worker created {', '.join(others)} meanwhile; "
                "its work stands"
            )

    def remove_segment(self, index: int) -> None:
        """Remove a segment that a new plan does not have, its commits first."""
        self._check_drive()
        group = segment_name(index)
        self._commits.drop(segment_claim(index))
        self.folder.delete(f"{group}/zarr.json")
        self.folder.delete_tree(group)

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
        check_chunk(segment, chunk, found["chunk_frames"])
        stored = chunk_values(segment, chunk, arrays, found["sizes"])
        objects: dict[str, bytes] = {}
        for path, values in stored.items():
            objects |= self._arrays.encode_rows(path, chunk_rows(path, segment, chunk), values)
        about = {
            "creation": found["creation"],
            "frames": [chunk.start, chunk.stop],
            "digests": {path: digest_of(values) for path, values in stored.items()},
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
        if others := self.folder.create_many(objects):
            for encoded in chunks:
                self._check_claim(encoded.segment)
                if self._commits.read(encoded.commit) is not None:
                    raise CommitExists(f"{encoded.commit} of {redacted(self.url)} is finished")
            self.folder.write_many({name: objects[name] for name in others})
        self._pending |= {encoded.commit: encoded.about for encoded in chunks}

    def _is_void(self, encoded: EncodedChunk) -> bool:
        """Whether there is a commit of the chunk, of arrays that were replaced since."""
        record = self._commits.read(encoded.commit)
        if record is None:
            return False
        return not is_commit_of(record, encoded.chunk, self._segment_layout(encoded.segment))

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
            is_valid = is_commit_of(other, chunk, self._segment_layout(segment))
            if not is_valid or self.damage.of_commit(name, other):
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
        layouts = {n: layout_in(data) for n, data in self.folder.read_many(groups).items()}
        finished = {}
        for name, record in records.items():
            segment, chunk = chunks[name]
            found = layouts.get(f"{segment_name(segment.index)}/zarr.json")
            if is_commit_of(record, chunk, found):
                finished[segment.index, chunk.index] = str(record.get("key"))
        return finished

    def _chunk_record(
        self, segment: Segment, chunk: Chunk, found: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        record = self._commits.read(chunk_commit(segment.index, chunk.index))
        return record if record is not None and is_commit_of(record, chunk, found) else None

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
        layout.check_names(names, SEGMENT_SPECS)
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
            return self._arrays.read_rows(segment, names, rows)

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
        what = f"{group}, chunk {chunk.index}"
        with self._vouched(records, group), self._arrays.damage_named(what):
            values = {
                n: np.asarray(self._arrays.open(f"{group}/{n}")[chunk.index]) for n in STATE_SPECS
            }
        return {**values, "first": bool(values["first"]), "frame": chunk.stop}

    def _segment_layout(self, segment: Segment) -> dict[str, Any] | None:
        return layout_in(self.folder.read(f"{segment_name(segment.index)}/zarr.json"))

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
            if not is_commit_of(records.get(name, {}), chunk, found):
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
        check_file_name(name)
        self._check_drive()
        if isinstance(data, bytes):
            self.folder.write(name, data)
            return hashlib.sha256(data).hexdigest()
        self.folder.upload(name, data)
        return _file_digest(data)

    def get_file(self, name: str, digest: str | None = None) -> bytes:
        """Content of a stored file; FileNotFoundError where there is none.

        Args:
            name: as for `put_file`.
            digest: SHA-256 that a commit says it has.

        Raises:
            DataDamaged: with `digest`, the file is gone or another.
        """
        data = self.folder.read(check_file_name(name), MOST_FILE_BYTES)
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
        target = Path(folder) / Path(check_file_name(name)).name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.folder.download(name, target)
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
            self.folder.delete(name)

    def file_url(self, name: str) -> str:
        """Path or URL of a stored file."""
        return self.folder.object_url(check_file_name(name))

    def list_files(self, prefix: str = "") -> list[str]:
        """Names of stored files whose names start with `prefix`, in order."""
        folders = [f for f in layout.FILE_FOLDERS if prefix.startswith(f) or f.startswith(prefix)]
        names = [n for folder in folders for n in self.folder.sizes(folder)]
        own = {f"{folder}/zarr.json" for folder in layout.FILE_FOLDERS}
        return sorted(n for n in names if n.startswith(prefix) and n not in own)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
