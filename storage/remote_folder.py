"""Folders on S3, the web and whatever else fsspec reaches."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import split_protocol
from zarr.abc.store import Store
from zarr.storage import FsspecStore

from storage.errors import CommitExists
from storage.failures import code_of, explained, explaining, filling
from storage.objects import (
    MOST_DOCUMENT_BYTES,
    MOST_FILE_BYTES,
    Folder,
    ObjectInfo,
    check_size,
    in_parallel,
)
from storage.wording import redacted

# A listing that a connection remembers would hide what other writers add.
REMOTE_OPTIONS: dict[str, Any] = {"use_listings_cache": False}
S3_OPTIONS: dict[str, Any] = {"max_concurrency": 1}  # else s3fs asks for the size before it reads
READ_BYTES = 8 * 2**20  # of a large object at a time
PUT_ATTEMPTS = 4
PUT_PATIENCE = 4  # times the client's read timeout, for each attempt to put an object
SLOWEST_PUT = 100_000  # bytes/s
WORTH_ANOTHER_PUT = ("ConditionalRequestConflict", "NoSuchUpload")
CONFLICT_PAUSE_S = 0.5
READ_TIMEOUT_S = 15.0  # that of s3fs

logger = logging.getLogger(__name__)


class RemoteFolder(Folder):
    """Objects on any fsspec file system whose puts are atomic, such as S3."""

    def __init__(self, url: str) -> None:
        self.url = url
        protocol = split_protocol(url)[0]
        is_s3, self._is_web = protocol in ("s3", "s3a"), protocol in ("http", "https")
        self._options = {**REMOTE_OPTIONS, **(S3_OPTIONS if is_s3 else {})}
        self.filesystem, root = fsspec.core.url_to_fs(url, **self._options)
        self.root = root.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    @explained
    def read(self, name: str, most: int = MOST_DOCUMENT_BYTES) -> bytes | None:
        try:
            data = self._start_of(self._path(name), most + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            if not _is_empty(error):
                raise
            return b""
        check_size(name, len(data), most)
        return data

    def _start_of(self, path: str, count: int) -> bytes:
        """The first bytes of an object, `count` at most."""
        if not self._is_web:
            return bytes(self.filesystem.cat_file(path, start=0, end=count))
        # A server that knows no ranges sends all of it: no more is taken than was asked for.
        headers = {**self.filesystem.kwargs.get("headers", {}), "Range": f"bytes=0-{count - 1}"}
        data = bytearray()
        with self.filesystem.open(path, block_size=0, size=count, headers=headers) as stream:
            while len(data) < count and (part := stream.read(count - len(data))):
                data += part
        return bytes(data)

    def _read_from_web(self, names: Iterable[str]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}

        def read(name: str) -> None:
            data = self.read(name)
            if data is not None:
                found[name] = data

        in_parallel(read, names)
        return found

    @explained
    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        wanted = list(names)
        if not wanted:
            return {}
        if self._is_web:
            return self._read_from_web(wanted)
        paths, stop = [self._path(name) for name in wanted], MOST_DOCUMENT_BYTES + 1
        found = self.filesystem.cat_ranges(paths, 0, stop, on_error="return")
        found = [b"" if _is_empty(content) else content for content in found]
        for content in found:
            if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                raise content
        there = {n: d for n, d in zip(wanted, found, strict=True) if isinstance(d, bytes)}
        for name, data in there.items():
            check_size(name, len(data), MOST_DOCUMENT_BYTES)
        return there

    @explained
    def write(self, name: str, data: bytes) -> None:
        self._put(self.filesystem.pipe_file, len(data), self._path(name), data)

    @explained
    def write_new(self, name: str, data: bytes) -> None:
        try:
            self._put(self.filesystem.pipe_file, len(data), self._path(name), data, mode="create")
        except OSError as error:
            if not _is_lost_race(error):
                raise
            # A put that was retried because its answer got lost meets its own object.
            if self.read(name, MOST_FILE_BYTES) == data:
                return
            raise CommitExists(f"{redacted(self.object_url(name))} exists already") from error

    @explained
    def upload(self, name: str, source: Path) -> None:
        size = source.stat().st_size
        self._put(self.filesystem.put_file, size, str(source), self._path(name))

    def _put(self, put: Callable[..., object], size: int, *arguments: Any, **options: Any) -> None:
        """Put `size` bytes, and again where that takes too long, meets another act or gets lost.

        The limits of the HTTP client only begin when all of the body is sent: a server that
        falls silent before would be waited for without end. AWS answers a conditional put that
        meets another act on the same name with 409, whichever of them counts in the end. A
        multipart upload whose completion was answered in vain may be forgotten when asked again.
        """
        if self.filesystem.async_impl:
            patience = _read_timeout(self.filesystem)
            options["timeout"] = PUT_PATIENCE * patience + size / SLOWEST_PUT
        for _ in range(PUT_ATTEMPTS - 1):
            try:
                put(*arguments, **options)
                return
            except TimeoutError as error:
                where = redacted(self.url)
                logger.warning("%s: a write took too long, once more: %s", where, error)
            except OSError as error:
                if code_of(error) not in WORTH_ANOTHER_PUT:
                    raise
                time.sleep(CONFLICT_PAUSE_S)
        put(*arguments, **options)

    def download(self, name: str, target: Path) -> None:
        with explaining(self.url, FileNotFoundError), filling(target):
            self.filesystem.get_file(self._path(name), str(target))

    @explained
    def sha256(self, name: str) -> str | None:
        digest, path = hashlib.sha256(), self._path(name)
        try:
            with self.filesystem.open(path, block_size=READ_BYTES, cache_type="readahead") as file:
                while part := file.read(READ_BYTES):
                    digest.update(part)
        except FileNotFoundError:
            return None
        return digest.hexdigest()

    @explained
    def delete(self, name: str) -> None:
        try:
            self.filesystem.rm_file(self._path(name))
        except FileNotFoundError:
            return

    @explained
    def delete_tree(self, prefix: str) -> None:
        # By the names of a listing: `rm` of the file system takes "[1]" for a pattern.
        start = len(self.root) + 1
        names = (path[start:] for path in self.filesystem.find(self._path(prefix)))
        in_parallel(self.delete, [name for name in names if name.startswith(f"{prefix}/")])

    @explained
    def sizes(self, prefix: str = "") -> dict[str, int]:
        return {name: int(info["size"]) for name, info in self._find(prefix).items()}

    @explained
    def objects(self) -> dict[str, ObjectInfo]:
        # Without a date an object counts as new: nobody takes it for a leftover.
        return {
            name: ObjectInfo(int(info["size"]), _timestamp(info.get("LastModified")))
            for name, info in self._find("").items()
        }

    def _find(self, prefix: str) -> dict[str, dict[str, Any]]:
        found = self.filesystem.find(self._path(prefix), detail=True)
        start = len(self.root) + 1
        names = {path[start:]: info for path, info in sorted(found.items())}
        return {name: info for name, info in names.items() if name and name[-1] != "/"}

    @explained
    def is_file(self) -> bool:
        return False  # S3 lets an object and a folder share a name

    def zarr_store(self) -> Store:
        return FsspecStore.from_url(self.url, storage_options=dict(self._options))


def _is_empty(found: Any) -> bool:
    """Whether a read failed as there is no first byte to read."""
    return isinstance(found, OSError) and code_of(found) == "InvalidRange"


def _read_timeout(filesystem: fsspec.AbstractFileSystem) -> float:
    """Seconds that the client waits for an answer: `config_kwargs` of FSSPEC_S3."""
    settings = getattr(filesystem, "config_kwargs", {})
    return float(settings.get("read_timeout", READ_TIMEOUT_S))


def _is_lost_race(error: OSError) -> bool:
    """Whether a conditional put was refused as the object exists (errors differ by server)."""
    if isinstance(error, FileExistsError):
        return True
    return code_of(error) == "PreconditionFailed"


def _timestamp(date: datetime | None) -> float:
    return time.time() if date is None else date.timestamp()
