"""Commit records: small JSON objects, written last, that say what is finished."""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from storage.errors import CommitExists
from storage.layout import COMMITS
from storage.objects import Folder, check_name, is_name

logger = logging.getLogger(__name__)

SUFFIX = ".json"
ZARR_OBJECT = f"{COMMITS}/zarr.json"  # marks the folder as a group for Zarr's listings


class Commits:
    """The commit records of one store, by names such as "plan" or "infer/0003/0001"."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def write(self, name: str, record: Mapping[str, Any], *, exclusive: bool = False) -> None:
        """Put the record, whole and durable; `exclusive` raises CommitExists for the loser."""
        document = {**plain(record), "commit_id": uuid.uuid4().hex}
        data = json.dumps(document, indent=1, allow_nan=False).encode()
        if not exclusive:
            self._folder.write(_object(name), data)
            return
        try:
            self._folder.write_new(_object(name), data)
        except CommitExists as error:
            raise CommitExists(
                f"commit {name!r} exists already in {self._folder.url}; another worker was "
                "first, and its work stands"
            ) from error

    def read(self, name: str) -> dict[str, Any] | None:
        """The record, or None if it was never committed or is unreadable."""
        return _parsed(name, self._folder.read(_object(name)))

    def names(self, prefix: str = "") -> list[str]:
        """Names equal to `prefix` or below `prefix/`; all without one.

        What `check_name` refuses is none of ours, and counts for nothing.
        """
        if prefix:
            check_name(prefix)
        below = self._folder.sizes(f"{COMMITS}/{prefix}".rstrip("/"))
        found = [n for n in below if n.endswith(SUFFIX) and n != ZARR_OBJECT and is_name(n)]
        names = [_name(n) for n in found]
        if prefix and self._folder.read(_object(prefix)) is not None:
            names.append(prefix)
        return sorted(names)

    def all(self, prefix: str = "") -> dict[str, dict[str, Any]]:
        """Records by name, in name order, as `names`."""
        return self.read_many(self.names(prefix))

    def with_malformed(self, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
        """All records, or those of `names`; empty where an object is none: torn or too large."""
        wanted = self.names() if names is None else names
        contents = self._folder.read_records(_object(name) for name in wanted)
        return {_name(n): _parsed(_name(n), data) or {} for n, data in sorted(contents.items())}

    def read_many(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Those of the records that are there, by name, in name order."""
        contents = self._folder.read_many([_object(name) for name in names])
        parsed = {_name(n): _parsed(_name(n), data) for n, data in sorted(contents.items())}
        return {name: record for name, record in parsed.items() if record is not None}

    def drop(self, prefix: str) -> None:
        """Remove the records that `names` gives: their data are no longer finished."""
        for name in self.names(prefix):
            self._folder.delete(_object(name))


def mapping_in(record: Mapping[str, Any], field: str) -> dict[str, Any]:
    """A field of a record that maps names; empty where it is missing or malformed."""
    found = record.get(field)
    return found if isinstance(found, dict) else {}


def plain(value: Any) -> Any:
    """JSON values only: numpy numbers and arrays become Python's, NaN and infinities None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _object(name: str) -> str:
    found = f"{COMMITS}/{check_name(name)}{SUFFIX}"
    if found == ZARR_OBJECT:
        raise ValueError(f"a commit cannot be named {name!r}: Zarr uses that name")
    return found


def _name(object_name: str) -> str:
    return object_name.removeprefix(f"{COMMITS}/").removesuffix(SUFFIX)


def _parsed(name: str, data: bytes | None) -> dict[str, Any] | None:
    if data is None:
        return None
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        logger.warning("commit %r is not a JSON object; taken for missing, redo its stage", name)
        return None
    return record
