"""Probe: find out what a drive's recording really holds."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import fsspec
from prefect import task

from storage.drives import absolute, drive_files
from storage.errors import GivenUp, StoreError, StoreUnavailable
from storage.failures import explaining
from storage.media import file_name, is_file, is_there
from storage.probe import probe_drive
from storage.reconstruction import ReconstructionStore
from storage.records import DriveRecord, FrameTable
from storage.wording import redacted
from tasks.attempts import attempt_id, counted
from tasks.interruption import run_until_stopped
from tasks.keys import drop_later, find_key, stage_key
from tasks.retries import STAGE_OPTIONS

VERSION = 3
COMPARED_FILES = 16  # of two drives that look alike
COMPARED_BYTES = 2**16  # at both ends

log = logging.getLogger(__name__)


class AnotherDrive(ValueError):
    """The store holds the result of another recording, which would be lost."""


def fingerprint(location: str) -> list[list[Any]]:
    """Name, size and modification mark of every file of a drive, without reading them.

    Of a folder only the videos count, or the images if there are none: what else lies in it, the
    output of this pipeline included, changes nothing.

    Raises:
        ValueError: there is nothing at `location`.
        StoreUnavailable: it cannot be read.
    """
    with explaining(location):
        fs, path = fsspec.core.url_to_fs(location)
        if not is_there(fs, path):
            raise ValueError(f"there is no video or folder at {location}; check the path")
        found = {file: fs.info(file) for file in _files(fs, path, location)}
    return [
        [file_name(name) if name != location else "", info["size"], _modification_mark(info)]
        for name, info in found.items()
    ]


def _files(fs: Any, path: str, location: str) -> list[str]:
    """What of a drive counts, in order: the file itself, the videos of a folder, or its images."""
    videos, images = ([location], []) if is_file(fs, path) else drive_files(location)
    return videos or images


def recording_key(location: str) -> str:
    """Key of a drive's files; another one when any of them is replaced."""
    return fingerprint_key(fingerprint(location))


def fingerprint_key(files: list[list[Any]]) -> str:
    """Key of a drive whose files have this fingerprint: that of its commit `probe`."""
    return stage_key("probe", VERSION, files)


def _modification_mark(info: dict[str, Any]) -> str:
    """An ETag where the store has one, else the time of the last change."""
    names = ("ETag", "etag", "mtime", "LastModified", "Last-Modified")
    marks = (info.get(name) for name in names)
    return str(next((mark for mark in marks if mark is not None), ""))


def may_take_over(url: str, location: str) -> bool:
    """Whether the store at `url`, made for another location, may become that of a recording.

    It may if it holds that recording, which was moved, or nothing yet of one that is gone.

    Raises:
        StoreUnavailable: the store or the recording cannot be read.
    """
    try:
        store = ReconstructionStore.open(url)
        known = store.attributes
        if "drive" not in known:
            return _is_gone(known.get("location"), absolute(location))
        if find_key(store, "probe") != recording_key(absolute(location)):
            return False
        return not _is_another(known["drive"]["location"], absolute(location))
    except StoreUnavailable:
        raise
    except (ValueError, OSError, StoreError):  # nothing that can be looked at
        return False


def _is_another(recorded: Any, location: str) -> bool:
    """Whether another drive of the same names, sizes and times is still at a recorded location.

    Cameras that start together, with clips of a fixed size on cards that know two seconds, make
    such. A copy of the recording is none: where both are there, the ends of their files tell.
    """
    if recorded == location or not _is_beside(recorded, location):
        return False
    try:
        ends = _ends(recorded)
    except (ValueError, OSError, ImportError, StoreError):
        return False  # gone, or nothing that can be seen
    return ends != _ends(location)


def _ends(location: str) -> list[tuple[bytes, bytes]]:
    """First and last bytes of files of a drive, evenly over it."""
    with explaining(location, FileNotFoundError):
        fs, path = fsspec.core.url_to_fs(location)
        files = _files(fs, path, location)
        found = []
        for name in files[:: max(1, len(files) // COMPARED_FILES)]:
            with fs.open(name, "rb") as file:
                head = file.read(COMPARED_BYTES)
                file.seek(max(0, file.seek(0, os.SEEK_END) - COMPARED_BYTES))
                found.append((head, file.read(COMPARED_BYTES)))
    return found


def _is_beside(recorded: Any, location: str) -> bool:
    """Whether a recorded location is to be looked at: on this machine or server, as `location`.

    A store of somebody else may name any other.
    """
    if not isinstance(recorded, str) or "::" in recorded:
        return False
    return urlsplit(recorded)[:2] == urlsplit(location)[:2]


def _is_gone(recorded: Any, location: str) -> bool:
    """Whether nothing is at a recorded location any more; not where that cannot be seen."""
    if not _is_beside(recorded, location):
        return False
    try:
        with explaining(recorded):
            return not is_there(*fsspec.core.url_to_fs(recorded))
    except (ValueError, OSError, ImportError, StoreError):
        return False


def relocated(record: DriveRecord, location: str) -> DriveRecord:
    """The record of a drive that was moved, or that is reached by another path now."""
    if location == record.location:
        return record
    clips = [
        replace(clip, location=location + clip.location.removeprefix(record.location))
        for clip in record.clips
    ]
    return replace(record, location=location, clips=tuple(clips))


def probe_until_stopped(location: str) -> tuple[DriveRecord, FrameTable]:
    """`probe_drive` beside the main thread, which an interruption ends."""

    def probe(stop: threading.Event) -> tuple[DriveRecord, FrameTable]:
        def leave(_: int) -> None:
            if stop.is_set():
                raise GivenUp(f"the probe of {redacted(location)} was interrupted")

        return probe_drive(location, leave)

    return run_until_stopped(probe)


@task(name="probe", task_run_name="probe {location}", **STAGE_OPTIONS)
@counted("probe")
def probe_stage(location: str, name: str, url: str) -> None:
    """Decode the drive once and write what it holds into the store at `url`.

    Raises:
        AnotherDrive: the store is that of another recording; it is left as it is.
        UnreadableVideo: no frame of the recording decodes.
    """
    location = absolute(location)
    key = recording_key(location)
    store = ReconstructionStore.create(url, {})
    known = store.attributes.get("drive")
    is_probed = find_key(store, "probe") == key
    if known is not None and is_probed and not _is_another(known["location"], location):
        moved = relocated(DriveRecord.from_json(known), location)
        store.update_attributes({"drive": moved.to_json()})
        return
    if known is not None and known["location"] != location:
        raise AnotherDrive(
            f"{url} holds the drive at {known['location']}, not that at {location}; choose another "
            "--output, or remove it"
        )
    began = time.perf_counter()
    record, frames = probe_until_stopped(location)
    record = replace(record, name=name)
    log.info("%s: %d frames, %d x %d", name, record.frames, record.width, record.height)
    drop_later(store, "probe")
    store.drop_commits("probe")  # of the old table: it must not vouch for the new record
    store.update_attributes({"drive": record.to_json()})
    store.write_frames(**frames.to_arrays())
    seconds = time.perf_counter() - began
    store.commit("probe", {"key": key, "attempt": attempt_id(), "seconds": seconds})
