"""The root of a store: its attributes say that it is one, and of what drive and plan."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from storage import layout
from storage.commits import Commits, plain
from storage.encoding import attributes_in, group_document
from storage.errors import CommitExists, NotAStore, StoreMissing, StoreTooNew
from storage.objects import MOST_DOCUMENT_BYTES, Folder
from storage.wording import redacted


def new_root(folder: Folder, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Make the root where nothing is; give the attributes that it has then.

    Of several that do so at the same time one makes it, and the others find it.

    Raises:
        NotAStore: something is there.
    """
    content = ["a file"] if folder.is_file() else list(folder.sizes())
    if not content:
        with suppress(CommitExists):
            folder.write_new("zarr.json", _document(_merged({}, attributes)))
    found = root_attributes(folder)
    if found is None:
        _refuse_lost(folder)
        raise NotAStore(
            f"{redacted(folder.url)} exists and is not a reconstruction (found: "
            f"{', '.join(content[:1])}); it is left as it is, choose another location"
        )
    return found


def write_root(folder: Folder, current: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Merge `changes` into the attributes; no write where nothing changes.

    Raises:
        ValueError: together they are too large to be read again.
    """
    merged = _merged(current, changes)
    if merged != current:
        folder.write("zarr.json", _document(merged))


def root_attributes(folder: Folder) -> dict[str, Any] | None:
    """Attributes of the store; None where nothing is.

    Raises:
        NotAStore, StoreTooNew: it is not ours.
    """
    data = folder.read("zarr.json")
    if data is None:
        return None
    found = attributes_in(data)
    if found.get("schema") != layout.SCHEMA:
        _refuse_lost(folder)
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


def require_root(folder: Folder) -> dict[str, Any]:
    """As `root_attributes`; StoreMissing where nothing is."""
    found = root_attributes(folder)
    if found is None:
        _refuse_lost(folder)
        raise StoreMissing(
            f"no reconstruction at {redacted(folder.url)}; check the location, or run "
            "the reconstruction that makes it"
        )
    return found


def is_lost(folder: Folder) -> bool:
    """Whether a reconstruction is there whose root is missing or torn: its commits are found."""
    if attributes_in(folder.read("zarr.json")):
        return False
    return any(stage in ("probe", "plan", "infer") for stage in _stages_committed(folder))


def _stages_committed(folder: Folder) -> set[str]:
    return {name.split("/")[0] for name in Commits(folder).names()}


def _refuse_lost(folder: Folder) -> None:
    if is_lost(folder):
        raise NotAStore(
            f"{redacted(folder.url)} is a reconstruction whose zarr.json is missing or torn; "
            "`ttt3r repair` makes it anew, and the next run keeps what is inferred"
        )


def _document(attributes: Mapping[str, Any]) -> bytes:
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
