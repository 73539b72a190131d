"""Download one large file: resumable, over broken connections, atomic.

A partial file lies beside its destination with a note of the size and version (ETag) it belongs
to, so that a later attempt, in this process or another, continues it or knows that it must not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit, urlunsplit

import fsspec

logger = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all if known
BLOCK_BYTES = 2**20
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
LASTING_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES})


class DownloadFailed(ValueError):
    """The file could not be had; what there is of it stays for the next attempt."""


@dataclass(frozen=True)
class Retry:
    """How long to insist; attempts are counted from the last one that got further."""

    attempts: int = 6
    first_wait_s: float = 1.0  # doubled after every failure
    longest_wait_s: float = 60.0
    timeout_s: float = 60.0  # for one silent connection


@dataclass(frozen=True)
class _Version:
    """Which bytes these are; bytes of different versions are never joined."""

    size: int | None = None
    tag: str | None = None  # ETag, or what the file system has like it


@dataclass(frozen=True)
class _Part:
    stream: BinaryIO
    start: int  # byte of the file at which the stream begins
    version: _Version

    def close(self) -> None:
        self.stream.close()


def download(
    url: str,
    destination: Path,
    *,
    expected_size: int | None = None,
    progress: Progress | None = None,
    retry: Retry | None = None,
) -> Path:
    """Get `url` (http, https or any fsspec URL) as `destination`, unless that already exists.

    A connection that breaks is resumed with a Range request; a server that ignores Range, or a
    file that changed meanwhile, starts again from the first byte. Processes that may want the
    same destination hold `locked(destination)`.

    Raises:
        DownloadFailed: it is not there, not permitted, not of `expected_size`, does not fit on
            the disk, or broke off too often in a row.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    if not destination.exists():
        _Download(url, destination, expected_size, progress, retry or Retry()).run()
    return destination


@contextlib.contextmanager
def locked(destination: Path) -> Iterator[None]:
    """Let one process at a time make `destination`; the lock ends with the process."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with destination.with_name(f".{destination.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Download:
    def __init__(
        self,
        url: str,
        destination: Path,
        expected_size: int | None,
        progress: Progress | None,
        retry: Retry,
    ) -> None:
        self.url, self.shown, self.destination = url, without_secrets(url), destination
        self.expected_size, self.progress, self.retry = expected_size, progress, retry
        self.partial = destination.with_name(destination.name + ".partial")
        self.note = destination.with_name(destination.name + ".partial.json")

    def run(self) -> None:
        failures, most = 0, self._received()
        while True:
            try:
                self._attempt()
                break
            except (OSError, http.client.HTTPException) as error:
                failures = 1 if self._received() > most else failures + 1
                most = max(most, self._received())
                self._give_up_or_wait(error, failures)
        os.replace(self.partial, self.destination)
        self.note.unlink(missing_ok=True)

    def _give_up_or_wait(self, error: Exception, failures: int) -> None:
        if not _is_transient(error) or failures >= self.retry.attempts:
            raise DownloadFailed(
                f"{self.shown} could not be downloaded: {_describe(error)} (attempt {failures} "
                f"without progress); {self._received()} bytes are kept for the next time"
            ) from error
        wait = min(self.retry.first_wait_s * 2 ** (failures - 1), self.retry.longest_wait_s)
        logger.warning("%s: %s; trying again in %g s", self.shown, _describe(error), wait)
        time.sleep(wait)

    def _attempt(self) -> None:
        """Bring the partial file to its full size, or raise."""
        version, offset = self._resumable()
        if offset and offset == version.size:
            return
        with contextlib.closing(_open(self.url, version, offset, self.retry.timeout_s)) as part:
            self._check_size(part.version)
            self._receive(part)
        received = self._received()
        if part.version.size is not None and received != part.version.size:
            raise ConnectionError(f"ended after {received} of {part.version.size} bytes")

    def _receive(self, part: _Part) -> None:
        with self.partial.open("rb+" if part.start else "wb") as file:
            done = file.seek(part.start)
            self._write_note(part.version)  # after the bytes of another version are gone
            while block := part.stream.read(BLOCK_BYTES):
                done += file.write(block)
                self._check_received(done, part.version)
                if self.progress is not None:
                    self.progress(done, part.version.size)
            file.flush()
            os.fsync(file.fileno())

    def _received(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0

    def _resumable(self) -> tuple[_Version, int]:
        """What the partial file is a part of, and from which byte to continue; else byte 0."""
        try:
            note = json.loads(self.note.read_text())
            version = _Version(note["size"], note["tag"])
        except (OSError, ValueError, TypeError, KeyError):
            return _Version(), 0
        received = self._received()
        if note.get("url") != _digest(self.url) or version.size is None or not version.tag:
            return _Version(), 0
        return (version, received) if received <= version.size else (_Version(), 0)

    def _write_note(self, version: _Version) -> None:
        # A URL can hold a signature or a password: its digest is enough to recognise it.
        self.note.write_text(json.dumps({"url": _digest(self.url), **asdict(version)}))

    def _check_size(self, version: _Version) -> None:
        size = version.size
        if self.expected_size is not None and size not in (None, self.expected_size):
            raise DownloadFailed(
                f"{self.shown} has {size} bytes; the published file has {self.expected_size}, so "
                "this is another file"
            )
        free = shutil.disk_usage(self.partial.parent).free + self._received()
        if size is not None and size > free:
            raise DownloadFailed(
                f"{self.shown} has {size} bytes but {self.partial.parent} has room for {free}"
            )

    def _check_received(self, received: int, version: _Version) -> None:
        size = version.size or self.expected_size
        if size is not None and received > size:
            raise DownloadFailed(f"{self.shown} sends more than the {size} bytes that it announced")


def without_secrets(url: str) -> str:
    """`url` without what may be a password or a signature: to print and to record."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()


def _open(url: str, version: _Version, offset: int, timeout_s: float) -> _Part:
    """The file from byte `offset` if it still is `version`, else from its first byte."""
    if url.startswith(("http://", "https://")):
        return _open_http(url, version, offset, timeout_s)
    return _open_fsspec(url, version, offset)


def _open_http(url: str, version: _Version, offset: int, timeout_s: float) -> _Part:
    request = urllib.request.Request(url, headers=_headers(version, offset))
    try:
        response = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and offset:
            return _open_http(url, _Version(), 0, timeout_s)
        raise
    start, size = _extent(response)
    found = _Version(size, _tag(response))
    if start and (start != offset or found != version):
        logger.warning("%s changed meanwhile: starting again", without_secrets(url))
        response.close()
        return _open_http(url, _Version(), 0, timeout_s)
    return _Part(response, start, found)


def _headers(version: _Version, offset: int) -> dict[str, str]:
    headers = {"Accept-Encoding": "identity", "User-Agent": "ttt3r-pipeline"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if version.tag:
            headers["If-Range"] = version.tag
    return headers


def _tag(response: http.client.HTTPResponse) -> str | None:
    etag = response.headers.get("ETag")
    # A weak tag names equivalent files, whose bytes may differ.
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _extent(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """First byte of the body and size of the whole file, as the server says."""
    if response.status == http.client.PARTIAL_CONTENT:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if found is None:
            response.close()
            raise ConnectionError("the server sent a part without saying which")
        return int(found[1]), int(found[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _open_fsspec(url: str, version: _Version, offset: int) -> _Part:
    filesystem, path = fsspec.core.url_to_fs(url)
    info = filesystem.info(path)
    tags = (info.get(key) for key in ("ETag", "etag", "LastModified", "mtime", "created"))
    found = _Version(info["size"], next((str(tag) for tag in tags if tag), None))
    stream = filesystem.open(path, "rb")
    start = offset if found == version else 0
    stream.seek(start)
    return _Part(stream, start, found)


def _is_transient(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in TRANSIENT_STATUS
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, ssl.SSLError):
        return not isinstance(error.reason, ssl.SSLCertVerificationError)
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
        return False
    return not (isinstance(error, OSError) and error.errno in LASTING_ERRORS)


def _describe(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code} {error.reason}"
    return f"{type(error).__name__}: {error}"
