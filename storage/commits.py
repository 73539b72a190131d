"""Commit records: small JSON objects, written last, that say what is finished."""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from storage.bounds import MOST_RECORDS_BYTES
from storage.errors import UNREADABLE, CommitExists, DataDamaged
from storage.layout import COMMITS
from storage.objects import NO_RECORD, Damage, Folder, check_name, in_batches, is_name
from storage.wording import redacted

logger = logging.getLogger(__name__)

SUFFIX = ".json"
ZARR_OBJECT = f"{COMMITS}/zarr.json"  # marks the folder as a group for Zarr's listings


class Commits:
    """The commit records of one store, by names such as "plan" or "infer/0003/0001"."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def write(self, name: str, record: Mapping[str, Any], *, exclusive: bool = False) -> None:
        """Put the record, whole and durable; `exclusive` raises CommitExists for the loser."""
        data = _document(record)
        if not exclusive:
            self._folder.write(_object(name), data)
            return
        try:
            self._folder.write_new(_object(name), data)
        except CommitExists as error:
            raise CommitExists(
                f"commit {name!r} exists already in {redacted(self._folder.url)}; another "
                "worker was first, and its work stands"
            ) from error

    def create(self, records: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Put those of the records that are not there, whole and durable: one wait serves them all.

        Returns:
            Names of those that are there, by somebody else; they are left as they are.
        """
        objects = {_object(name): _document(record) for name, record in records.items()}
        return [_name(name) for name in self._folder.create_many(objects)]

    def read(self, name: str) -> dict[str, Any] | None:
        """The record, or None if it was never committed or is unreadable."""
        return _parsed(name, self._folder.read(_object(name)))

    def names(self, prefix: str = "") -> list[str]:
        """Names equal to `prefix` or below `prefix/`; all without one.

        What `check_name` refuses is none of ours, and counts for nothing.
        """
        return sorted(self._sizes(prefix))

    def _sizes(self, prefix: str = "") -> dict[str, int]:
        """Sizes in bytes of the records that `names` gives."""
        if prefix:
            check_name(prefix)
        below = self._folder.sizes(f"{COMMITS}/{prefix}".rstrip("/")).items()
        found = {n: s for n, s in below if n.endswith(SUFFIX) and n != ZARR_OBJECT and is_name(n)}
        sizes = {_name(name): size for name, size in found.items()}
        if prefix and (data := self._folder.read(_object(prefix))) is not None:
            sizes[prefix] = len(data)
        return sizes

    def all(self, prefix: str = "") -> dict[str, dict[str, Any]]:
        """Records by name, in name order, as `names`.

        Raises:
            DataDamaged: one, or all together, would fill the memory; nothing of ours does.
        """
        sizes = self._sizes(prefix)
        self._check_sum(sizes)
        batches = map(self.read_many, in_batches(dict(sorted(sizes.items()))))
        return {name: record for records in batches for name, record in records.items()}

    def each(self, damage: Damage = NO_RECORD) -> Iterator[tuple[str, dict[str, Any]]]:
        """All records with their names, in name order; empty where an object is none.

        `damage`: errors of a single object that mean that it is none.
        A few are held at a time, so that any number of them can be read, large or torn ones too.
        """
        sizes = {_object(name): size for name, size in sorted(self._sizes().items())}
        for name, data in self._folder.each_record(sizes, damage):
            yield _name(name), _parsed(_name(name), data) or {}

    def read_malformed(self, name: str) -> dict[str, Any] | None:
        """The record, empty where the object is none or unreadable; None where there is none."""
        for data in self._folder.read_records([_object(name)], UNREADABLE).values():
            return _parsed(name, data) or {}
        return None

    def check_sum(self) -> None:
        """Make sure, before something of each record is kept, that it will fit into memory.

        Raises:
            DataDamaged: it may not.
        """
        self._check_sum(self._sizes())

    def _check_sum(self, sizes: Mapping[str, int]) -> None:
        size = sum(sizes.values())
        if size > MOST_RECORDS_BYTES:
            url = redacted(self._folder.url)
            raise DataDamaged(
                f"{url}: {len(sizes)} commits have {size >> 20} MiB, more than the "
                f"{MOST_RECORDS_BYTES >> 20} MiB of any drive; run `ttt3r repair {url}`, which "
                "drops those that are none of this software's"
            )

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


def _document(record: Mapping[str, Any]) -> bytes:
    """What is stored; no two are equal, so that whoever made one knows it."""
    document = {**plain(record), "commit_id": uuid.uuid4().hex}
    return json.dumps(document, indent=1, allow_nan=False).encode()


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
