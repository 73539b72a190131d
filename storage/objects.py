"""Folders of named objects, local or remote by one interface: whole, atomic, durable writes.

An object is either there as a whole or not there: a reader never sees half of one, whenever
the writer dies. Names are relative, with "/" between parts. Objects whose last part starts
with "." or ends with ".partial" are unfinished writes of a local folder: its `sizes` leaves
them out, `objects` lists them.
"""

from __future__ import annotations

import contextvars
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from zarr.abc.store import Store

from storage.errors import CommitExists, DataDamaged, StoreError

MOST_DOCUMENT_BYTES = 32 * 2**20  # of a JSON object; the plan of a day has up to 24 MiB
MOST_NAME_BYTES, MOST_PART_BYTES = 800, 200  # what S3 and disks take, with room for our own
MOST_FILE_BYTES = 2**32  # of a mesh or picture that is read into memory
WRITERS = 4  # objects that are written at the same time

T = TypeVar("T")
Damage = tuple[type[StoreError], ...]
NO_RECORD: Damage = (DataDamaged,)  # by its size


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing says of an object."""

    size: int  # bytes
    modified: float  # seconds since 1970


def check_name(name: str) -> str:
    """Return `name` if it is a safe relative object name, else raise ValueError."""
    parts = name.split("/")
    bad = any(not p or p.startswith(".") or "\\" in p or not p.isprintable() for p in parts)
    if bad or _bytes(name) > MOST_NAME_BYTES or max(map(_bytes, parts)) > MOST_PART_BYTES:
        raise ValueError(
            f"{reprlib.repr(name)} is not a name inside the store; expected parts joined by '/', "
            "none of them empty, long or starting with '.', no leading '/', no backslash"
        )
    return name


def is_name(name: str) -> bool:
    """Whether `check_name` takes it."""
    try:
        return bool(check_name(name))
    except ValueError:
        return False


def _bytes(name: str) -> int:
    return len(name.encode(errors="replace"))


def is_unfinished(name: str) -> bool:
    """Whether the object is what a killed writer left of a temporary file."""
    last = PurePosixPath(name).name
    return last.startswith(".") or last.endswith(".partial")


class Folder(ABC):
    """Objects by name below one location.

    Methods raise StoreUnavailable where the disk or server fails, StoreRefused where it would
    fail again.
    """

    url: str

    @abstractmethod
    def read(self, name: str, most: int = MOST_DOCUMENT_BYTES) -> bytes | None:
        """Content of the object, or None where there is none.

        Raises:
            DataDamaged: it has more than `most` bytes.
        """

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Create or replace the object; once this returns it survives a loss of power."""

    def write_many(self, objects: Mapping[str, bytes]) -> None:
        """Write all objects, in any order; all survive a loss of power once this returns."""
        in_parallel(lambda name: self.write(name, objects[name]), objects)

    @abstractmethod
    def write_new(self, name: str, data: bytes) -> None:
        """Create the object; of several writers with different data exactly one succeeds.

        Raises:
            CommitExists: the object is there already.
        """

    def create_many(self, objects: Mapping[str, bytes]) -> list[str]:
        """Create all objects that are not there; all survive a loss of power once this returns.

        Returns:
            Names of those that are there with other content; they are left as they are.
        """
        others: list[str] = []

        def create(name: str) -> None:
            try:
                self.write_new(name, objects[name])
            except CommitExists:
                others.append(name)

        in_parallel(create, objects)
        return sorted(others)

    @abstractmethod
    def upload(self, name: str, source: Path) -> None:
        """Create or replace the object with the content of a local file."""

    @abstractmethod
    def download(self, name: str, target: Path) -> None:
        """Copy the object to a local file; FileNotFoundError where there is none."""

    @abstractmethod
    def sha256(self, name: str) -> str | None:
        """Digest of an object of any size, in hexadecimal; None where there is none."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove the object if it is there."""

    @abstractmethod
    def delete_tree(self, prefix: str) -> None:
        """Remove all objects below `prefix/`."""

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Names and sizes in bytes of all finished objects below `prefix/`, in name order."""

    @abstractmethod
    def objects(self) -> dict[str, ObjectInfo]:
        """All objects of the folder by name, unfinished writes included."""

    @abstractmethod
    def is_file(self) -> bool:
        """Whether the location is one file instead of a folder."""

    @abstractmethod
    def zarr_store(self) -> Store:
        """The same folder for zarr."""

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """Contents of those of the objects that are there; as `read`."""
        found = {name: self.read(name) for name in names}
        return {name: data for name, data in found.items() if data is not None}

    def read_records(self, names: Iterable[str], damage: Damage = NO_RECORD) -> dict[str, bytes]:
        """As `read_many`, with nothing in place of what is larger than any record.

        `damage`: errors of a single object that count as such.
        """
        wanted = list(names)
        try:
            return self.read_many(wanted)
        except damage:
            found = {name: self._read_record(name, damage) for name in wanted}
        return {name: data for name, data in found.items() if data is not None}

    def each_record(
        self, sizes: Mapping[str, int], damage: Damage = NO_RECORD
    ) -> Iterator[tuple[str, bytes]]:
        """As `read_records`, one by one, of objects whose sizes in bytes are known by name.

        Held at a time are so many as are together no larger than the largest record.
        """
        for names in in_batches(sizes):
            yield from self.read_records(names, damage).items()

    def _read_record(self, name: str, damage: Damage) -> bytes | None:
        try:
            return self.read(name)
        except damage:
            return b""

    def object_url(self, name: str) -> str:
        """Full path or URL of the object."""
        return f"{self.url.rstrip('/')}/{name}"


def in_parallel(act: Callable[[T], object], items: Iterable[T]) -> None:
    """Do `act` to all items, a few at a time; raises what an act raised.

    Each act sees the context variables of the caller: logs and commits say which run they are of.
    """
    given = list(items)
    if len(given) == 1:  # no thread is started for it
        contextvars.copy_context().run(act, given[0])
        return
    work = [partial(contextvars.copy_context().run, act, item) for item in given]
    with ThreadPoolExecutor(WRITERS) as pool:
        for _ in pool.map(lambda do: do(), work):
            pass


def in_batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in their order, cut so that objects of these sizes fit into the largest document."""
    batch: list[str] = []
    held = 0
    for name, size in sizes.items():
        if batch and held + size > MOST_DOCUMENT_BYTES:
            yield batch
            batch, held = [], 0
        batch.append(name)
        held += size
    if batch:
        yield batch


def check_size(name: str, size: int, most: int) -> None:
    if size > most:
        raise DataDamaged(f"{name} is larger than {most >> 20} MiB: nothing of ours is")
