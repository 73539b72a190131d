"""Folders of named objects, local or remote by one interface: whole, atomic, durable writes.

An object is either there as a whole or not there: a reader never sees half of one, whenever
the writer dies. Names are relative, with "/" between parts. Objects whose last part starts
with "." or ends with ".partial" are unfinished writes and never listed.
"""

from __future__ import annotations

import contextvars
import errno
import hashlib
import logging
import os
import re
import reprlib
import shutil
import stat
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial, wraps
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, ParamSpec, TypeVar

import fsspec
from fsspec.core import split_protocol
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, LocalStore

from storage.errors import CommitExists, DataDamaged, StoreError, StoreRefused, StoreUnavailable
from storage.wording import redacted

NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")
# Classes by name, as not every file system brings these libraries.
LOST_CONNECTION = ("HTTPClientError", "ClientConnectionError", "ClientPayloadError")
EXPIRED_CODES = ("ExpiredToken", "ExpiredTokenException", "RequestTimeTooSkewed")
GONE_STATUSES, DENIED_STATUSES = (404, 410), (401, 403)  # of a web server
NO_SPACE = "no space is left; make room and run again, what is finished is kept"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_CODES = ("XMinioStorageFull", "InsufficientStorage", "507")
NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
# A listing that a connection remembers would hide what other writers add.
REMOTE_OPTIONS: dict[str, Any] = {"use_listings_cache": False}
S3_OPTIONS: dict[str, Any] = {"max_concurrency": 1}  # else s3fs asks for the size before it reads
MOST_DOCUMENT_BYTES = 32 * 2**20  # of a JSON object; the plan of a day has up to 24 MiB
MOST_NAME_BYTES, MOST_PART_BYTES = 800, 200  # what S3 and disks take, with room for our own
MOST_FILE_BYTES = 2**32  # of a mesh or picture that is read into memory
READ_BYTES = 8 * 2**20  # of a large object at a time
WRITERS = 4  # objects that are written at the same time
PUT_ATTEMPTS = 4
PUT_PATIENCE = 4  # times the client's read timeout, for each attempt to put an object
SLOWEST_PUT = 100_000  # bytes/s
WORTH_ANOTHER_PUT = ("ConditionalRequestConflict", "NoSuchUpload")
CONFLICT_PAUSE_S = 0.5
READ_TIMEOUT_S = 15.0  # that of s3fs

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")


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


def open_folder(url: str) -> Folder:
    """The folder at a local path or any fsspec URL; touches nothing yet.

    Raises:
        ValueError: the URL chains file systems, or has an empty part.
    """
    if "::" in url:
        raise ValueError(f"{redacted(url)} chains file systems with '::'; expected one plain URL")
    protocol, path = split_protocol(url)
    if protocol in (None, "file", "local"):
        return LocalFolder(Path(fsspec.core.url_to_fs(url)[1]), url)
    if "//" in path.strip("/"):
        single = redacted(url.replace(path, re.sub("/+", "/", path)))
        raise ValueError(
            f"{redacted(url)} has an empty part, which some servers never list; did you mean "
            f"{single}?"
        )
    return RemoteFolder(url)


def explained(act: Callable[P, T]) -> Callable[P, T]:
    """Make a folder's method raise errors of the disk or server as one line of a StoreError."""

    @wraps(act)
    def explained_act(*arguments: P.args, **options: P.kwargs) -> T:
        folder: Any = arguments[0]
        with explaining(folder.url):
            return act(*arguments, **options)

    return explained_act


@contextmanager
def explaining(url: str, *but: type[Exception]) -> Iterator[None]:
    """Turn errors of a disk, a server or its login, `but` some, into one line of a StoreError."""
    clear: tuple[type[Exception], ...] = (StoreError, *but)
    try:
        yield
    except Exception as error:
        if isinstance(failure := failure_behind(error), clear):
            raise
        told = explain(failure, url)
        if told is None:
            raise
        raise told from None


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

    def read_records(self, names: Iterable[str]) -> dict[str, bytes]:
        """As `read_many`, with nothing in place of what is larger than any record."""
        wanted = list(names)
        try:
            return self.read_many(wanted)
        except DataDamaged:
            found = {name: self._read_record(name) for name in wanted}
        return {name: data for name, data in found.items() if data is not None}

    def each_record(self, sizes: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
        """As `read_records`, one by one, of objects whose sizes in bytes are known by name.

        Held at a time are so many as are together no larger than the largest record.
        """
        for names in in_batches(sizes):
            yield from self.read_records(names).items()

    def _read_record(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except DataDamaged:
            return b""

    def object_url(self, name: str) -> str:
        """Full path or URL of the object."""
        return f"{self.url.rstrip('/')}/{name}"


class LocalFolder(Folder):
    """Objects as files: temporary name, fsync, rename, fsync of the directory."""

    def __init__(self, root: Path, url: str) -> None:
        self.root = root
        self.url = url

    @explained
    def read(self, name: str, most: int = MOST_DOCUMENT_BYTES) -> bytes | None:
        path = _own_file(self.root, name)
        try:
            _check_size(name, path.stat().st_size, most)
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    @explained
    def write(self, name: str, data: bytes) -> None:
        self._put(name, lambda temporary: temporary.write_bytes(data), os.replace)

    @explained
    def write_many(self, objects: Mapping[str, bytes]) -> None:
        self._put_many(objects, os.replace)

    @explained
    def create_many(self, objects: Mapping[str, bytes]) -> list[str]:
        there: list[str] = []

        def create(temporary: Path, target: Path) -> None:
            try:
                _link(temporary, target)
            except FileExistsError:
                there.append(target.relative_to(self.root).as_posix())
            finally:
                temporary.unlink()

        self._put_many(objects, create)
        return sorted(n for n in there if self.read(n, MOST_FILE_BYTES) != objects[n])

    def _put_many(
        self, objects: Mapping[str, bytes], publish: Callable[[Path, Path], object]
    ) -> None:
        """Write all, then wait for the disk: one wait serves many files."""
        self._check_links(objects)
        places = {self.root / name: data for name, data in objects.items()}
        changed = {target.parent for target in places}
        for folder in sorted(changed):
            changed |= _make_missing(folder)
        written = {target: _temporary(target) for target in places}
        try:
            for target, temporary in written.items():
                _begin_to_write(temporary, places[target])
            _fsync_all(written.values())
            while written:
                target, temporary = written.popitem()
                publish(temporary, target)
        finally:
            for temporary in written.values():
                temporary.unlink(missing_ok=True)
        _fsync_all(changed)

    @explained
    def write_new(self, name: str, data: bytes) -> None:
        try:
            self._put(name, lambda temporary: temporary.write_bytes(data), _link)
        except FileExistsError as error:
            raise CommitExists(f"{self.object_url(name)} exists already") from error

    @explained
    def upload(self, name: str, source: Path) -> None:
        self._put(name, lambda temporary: shutil.copyfile(source, temporary), os.replace)

    def _put(
        self,
        name: str,
        fill: Callable[[Path], object],
        publish: Callable[[Path, Path], object],
    ) -> None:
        self._check_links([name])
        target = self.root / name
        _make_folder(target.parent)
        temporary = _temporary(target)
        try:
            fill(temporary)
            _fsync(temporary)
            publish(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _fsync(target.parent)

    def download(self, name: str, target: Path) -> None:
        with explaining(self.url, FileNotFoundError), _filling(target):
            try:
                shutil.copyfile(_own_file(self.root, name), target)
            except (NotADirectoryError, IsADirectoryError, shutil.SpecialFileError) as error:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from error

    @explained
    def sha256(self, name: str) -> str | None:
        try:
            with _own_file(self.root, name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except NO_FILE:
            return None

    @explained
    def delete(self, name: str) -> None:
        self._check_links([name])
        target = self.root / name
        try:
            target.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return
        _fsync(target.parent)

    @explained
    def delete_tree(self, prefix: str) -> None:
        self._check_links([prefix])
        target = self.root / prefix
        if prefix and target.is_symlink():
            target.unlink()
        elif target.is_dir():
            shutil.rmtree(target)
        else:
            return
        _fsync(target.parent)

    @explained
    def sizes(self, prefix: str = "") -> dict[str, int]:
        found = self._walk(prefix)
        return {name: info.size for name, info in found.items() if not is_unfinished(name)}

    @explained
    def objects(self) -> dict[str, ObjectInfo]:
        return self._walk("")

    def _walk(self, prefix: str) -> dict[str, ObjectInfo]:
        self._check_links([f"{prefix}/"] if prefix else [])
        found: dict[str, ObjectInfo | None] = {}
        folders = [f"{prefix}/" if prefix else ""]
        while folders:
            folder = folders.pop()
            # A folder that is gone since it was listed is empty. One that cannot be read is an
            # error: a short listing would make garbage of what it lacks.
            with suppress(*NO_FILE), os.scandir(f"{self.root}/{folder}") as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{folder}{entry.name}/")
                    elif not _leads_to_folder(entry):  # such a link is neither listed nor followed
                        found[folder + entry.name] = _info(entry)
        return {name: info for name, info in sorted(found.items()) if info is not None}

    def _check_links(self, names: Iterable[str]) -> None:
        """Make sure that no folder above one of the objects is a link out of this one.

        Each folder is looked at once, however many objects are in it.
        """
        for folder in sorted(_folders_above(names)):
            path = self.root / folder
            if path.is_symlink() and not _is_inside(self.root, path):
                raise DataDamaged(
                    f"{redacted(self.url)}: {folder!r} is a link that leads out of the store, and "
                    "nothing is listed, written or removed through it; remove the link, and run "
                    "again"
                )

    @explained
    def is_file(self) -> bool:
        return self.root.is_file()

    def zarr_store(self) -> Store:
        return _OwnFiles(self.root)


class _OwnFiles(LocalStore):
    """A folder for zarr, that reads nothing outside of it."""

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """As `LocalStore`; DataDamaged where a link leads out of the folder."""
        _own_file(self.root, key)
        return await super().get(key, prototype, byte_range)


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
        _check_size(name, len(data), most)
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
            _check_size(name, len(data), MOST_DOCUMENT_BYTES)
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
            raise CommitExists(f"{self.object_url(name)} exists already") from error

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
                logger.warning("%s: a write took too long, once more: %s", self.url, error)
            except OSError as error:
                if _code(error) not in WORTH_ANOTHER_PUT:
                    raise
                time.sleep(CONFLICT_PAUSE_S)
        put(*arguments, **options)

    def download(self, name: str, target: Path) -> None:
        with explaining(self.url, FileNotFoundError), _filling(target):
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


@contextmanager
def _filling(target: Path) -> Iterator[None]:
    """Say of a full disk that it is that of the local file, not of the folder copied from."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise StoreUnavailable(f"{target.parent}: {NO_SPACE}") from error


def explain(error: Exception, url: str) -> StoreUnavailable | None:
    """Say in one line, without secrets, why a location cannot be used; None if unknown."""
    reason = _reason(error)
    if reason is None:
        return None
    kind = StoreRefused if _is_refusal(error) else StoreUnavailable
    return kind(f"{redacted(url)}: {reason}")


def failure_behind(error: Exception) -> Exception:
    """What kept a file from being found: fsspec takes any failure of a web server for absence."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    is_absence = isinstance(cause, NO_FILE) or _status(cause) in GONE_STATUSES
    return error if is_absence or _reason(cause) is None else cause


def is_expired(error: BaseException) -> bool:
    """Whether the server refused credentials only for their age: others may come in time."""
    return _code(error) in EXPIRED_CODES


def _link(temporary: Path, target: Path) -> None:
    """Give a finished file its name, unless that is taken.

    Raises:
        FileExistsError: it is.
        StoreRefused: the file system has no hard links.
    """
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        raise StoreRefused(
            f"{target.parent}: the file system has no hard links (FAT, exFAT, some network "
            "shares), which keep two workers from writing the same; choose another output"
        ) from None


def _is_refusal(error: Exception) -> bool:
    """Whether the same attempt would fail again, unlike a lost connection or a full disk."""
    is_final = isinstance(error, (PermissionError, *NO_FILE)) and not is_expired(error)
    is_denied = _status(error) in DENIED_STATUSES
    return is_final or is_denied or type(error).__name__ in NO_CREDENTIALS


def _reason(error: Exception) -> str | None:
    kind = type(error).__name__
    if kind in NO_CREDENTIALS:
        return (
            "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if kind in ("EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError"):
        return "the server does not answer; check AWS_ENDPOINT_URL and the network"
    if any(base.__name__ in LOST_CONNECTION for base in type(error).__mro__):
        return f"the connection to the server failed ({kind}); check the network, run again"
    if (status := _status(error)) in DENIED_STATUSES:
        return f"access denied (HTTP status {status}); check the permissions, or whether it expired"
    if status is not None:
        return f"the server fails (HTTP status {status}); run again, what is finished is kept"
    if is_expired(error):
        return "the credentials have expired; renew them and run again, what is finished is kept"
    if _is_full(error):
        return NO_SPACE
    if isinstance(error, PermissionError):
        return "access denied; check the permissions, or the credentials and their rights"
    if isinstance(error, FileNotFoundError):
        return "the bucket or parent does not exist; create it first"
    if isinstance(error, OSError):
        return f"cannot be used: {error.strerror or kind}"
    return None


def _is_empty(found: Any) -> bool:
    """Whether a read failed as there is no first byte to read."""
    return isinstance(found, OSError) and _code(found) == "InvalidRange"


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return True
    return _code(error) in FULL_CODES


def _code(error: BaseException) -> str | None:
    """What an S3 server called the error, as s3fs passes it on."""
    response = getattr(error.__cause__, "response", None) or {}
    code = response.get("Error", {}).get("Code")
    return None if code is None else str(code)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of fsspec's web client is about."""
    is_answer = any(base.__name__ == "ClientResponseError" for base in type(error).__mro__)
    return int(getattr(error, "status", 0)) if is_answer else None


def _read_timeout(filesystem: fsspec.AbstractFileSystem) -> float:
    """Seconds that the client waits for an answer: `config_kwargs` of FSSPEC_S3."""
    settings = getattr(filesystem, "config_kwargs", {})
    return float(settings.get("read_timeout", READ_TIMEOUT_S))


def _is_lost_race(error: OSError) -> bool:
    """Whether a conditional put was refused as the object exists (errors differ by server)."""
    if isinstance(error, FileExistsError):
        return True
    return _code(error) == "PreconditionFailed"


def _timestamp(date: datetime | None) -> float:
    return time.time() if date is None else date.timestamp()


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    """False too of a link that leads nowhere, or to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _info(entry: os.DirEntry[str]) -> ObjectInfo | None:
    try:
        found = entry.stat(follow_symlinks=False)
    except FileNotFoundError:  # removed since it was listed
        return None
    return ObjectInfo(found.st_size, found.st_mtime)


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


def _own_file(root: Path, name: str) -> Path:
    """Where an object lies; DataDamaged if it is a link to elsewhere, or a device or pipe."""
    path = root / name
    if _is_plain(root, name):
        return path
    if not _is_inside(root, path) or (path.exists() and not (path.is_file() or path.is_dir())):
        raise DataDamaged(f"{name} is no file of this store: a link out of it, a pipe or a device")
    return path


def _is_plain(root: Path, name: str) -> bool:
    """Whether the object is a file, a folder or nothing, reached without a link: by few looks."""
    parts = name.split("/")
    if ".." in parts or not parts[0]:
        return False
    mode = stat.S_IFDIR
    for part in accumulate(parts, "{}/{}".format):
        if not stat.S_ISDIR(mode):
            return False
        try:
            mode = os.lstat(f"{root}/{part}").st_mode
        except FileNotFoundError:
            return True
        except OSError:
            return False
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _is_inside(root: Path, path: Path) -> bool:
    """Whether a path ends in the folder once all links are followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _folders_above(names: Iterable[str]) -> set[str]:
    """Names of the folders that objects are in, at any depth."""
    parents = {name.rpartition("/")[0] for name in names} - {""}
    return {f for parent in parents for f in accumulate(parent.split("/"), "{}/{}".format)}


def _check_size(name: str, size: int, most: int) -> None:
    if size > most:
        raise DataDamaged(f"{name} is larger than {most >> 20} MiB: nothing of ours is")


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")


def _make_folder(path: Path) -> None:
    """Make the folder and its parents so that they survive a loss of power."""
    for changed in _make_missing(path):
        _fsync(changed)


def _make_missing(path: Path) -> set[Path]:
    """Make the folder and its parents; return the folders that have new ones in them."""
    if path.is_dir():
        return set()
    changed = {path.parent}
    try:
        path.mkdir()
    except FileNotFoundError:
        changed |= _make_missing(path.parent)
        path.mkdir(exist_ok=True)
    except FileExistsError as error:
        if not path.is_dir():  # else another writer has made it meanwhile
            told = os.strerror(errno.ENOTDIR)
            raise NotADirectoryError(errno.ENOTDIR, told, str(path)) from error
    return changed


def _begin_to_write(path: Path, data: bytes) -> None:
    """Write a new file; the system begins at once to store it, and `_fsync` waits for that.

    So files that are written together are stored together: what the first one waits for is what
    all wait for. Begun by `_fsync`, each would be stored by itself, one after the other.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        if sys.platform == "linux":  # there the advice begins it
            with suppress(OSError):  # no more than advice
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _fsync_all(paths: Iterable[Path]) -> None:
    """`_fsync` all, a few at a time, without a thread's change for each."""
    waiting = list(paths)

    def wait(share: list[Path]) -> None:
        for path in share:
            _fsync(path)

    in_parallel(wait, (waiting[first::WRITERS] for first in range(min(WRITERS, len(waiting)))))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
