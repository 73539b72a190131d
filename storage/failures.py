"""What errors of disks, servers and their logins mean, in one line fit for a user."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, ParamSpec, TypeVar

from storage.errors import StoreError, StoreRefused, StoreUnavailable
from storage.wording import redacted

NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")
# Classes by name, as not every file system brings these libraries.
LOST_CONNECTION = ("HTTPClientError", "ClientConnectionError", "ClientPayloadError")
EXPIRED_CODES = ("ExpiredToken", "ExpiredTokenException")
WRONG_CLOCK = "RequestTimeTooSkewed"
GONE_STATUSES, DENIED_STATUSES = (404, 410), (401, 403)  # of a web server
NO_SPACE = "no space is left; make room and run again, what is finished is kept"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_CODES = ("XMinioStorageFull", "InsufficientStorage", "507")
# Of a single file, by the disk or the file system's own checksums; the last is Linux's.
BROKEN = (errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))
NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

T = TypeVar("T")
P = ParamSpec("P")


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


@contextmanager
def filling(target: Path) -> Iterator[None]:
    """Say of a full disk that it is that of the local file, not of the folder copied from."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise StoreUnavailable(f"{target.parent}: {NO_SPACE}") from error


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for temporary files, removed at the end; says of a full disk that it is theirs."""
    try:
        with TemporaryDirectory() as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise StoreUnavailable(
            f"{gettempdir()}: no space is left for temporary files; make room or set TMPDIR to a "
            "folder that has some, and run again, what is finished is kept"
        ) from error


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
    return code_of(error) in EXPIRED_CODES


def is_refused_everything(error: BaseException) -> bool:
    """Whether the server would refuse any request of this process, not only the one for this."""
    return is_expired(error) or code_of(error) == WRONG_CLOCK


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
    if kind in ("EndpointConnectionError", "ConnectTimeoutError"):
        return "the server does not answer; check AWS_ENDPOINT_URL and the network"
    if kind.startswith("ClientConnector"):  # a web server
        return "the server does not answer; check the address and the network"
    if any(base.__name__ in LOST_CONNECTION for base in type(error).__mro__):
        return f"the connection to the server failed ({kind}); check the network, run again"
    if (status := _status(error)) in DENIED_STATUSES:
        return f"access denied (HTTP status {status}); check the permissions, or whether it expired"
    if status is not None:
        return f"the server fails (HTTP status {status}); run again, what is finished is kept"
    if is_expired(error):
        return "the credentials have expired; renew them and run again, what is finished is kept"
    if code_of(error) == WRONG_CLOCK:
        return (
            "this machine's clock differs from the server's by more than 15 minutes; set it (NTP) "
            "and run again, what is finished is kept"
        )
    if _is_full(error):
        return NO_SPACE
    if isinstance(error, PermissionError):
        return "access denied; check the permissions, or the credentials and their rights"
    if isinstance(error, FileNotFoundError):
        return "the bucket or parent does not exist; create it first"
    if isinstance(error, OSError):
        return f"cannot be used: {error.strerror or kind}"
    return None


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return True
    return code_of(error) in FULL_CODES


def code_of(error: BaseException) -> str | None:
    """What an S3 server called the error, as s3fs passes it on."""
    response = getattr(error.__cause__, "response", None) or {}
    code = response.get("Error", {}).get("Code")
    return None if code is None else str(code)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of fsspec's web client is about."""
    is_answer = any(base.__name__ == "ClientResponseError" for base in type(error).__mro__)
    return int(getattr(error, "status", 0)) if is_answer else None
