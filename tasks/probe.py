"""Probe: find out what a drive's recording really holds."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import fsspec
from prefect import task

from storage.reconstruction import ReconstructionStore
from storage.video import probe_drive
from tasks.keys import stage_key
from tasks.retries import STAGE_OPTIONS

VERSION = 1

log = logging.getLogger(__name__)


def fingerprint(location: str) -> list[list[Any]]:
    """Name, size and modification mark of every file of a drive, without reading them.

    Raises:
        FileNotFoundError: there is nothing at `location`.
    """
    fs, path = fsspec.core.url_to_fs(location)
    if not fs.exists(path):
        raise FileNotFoundError(f"there is no video or folder at {location}; check the path")
    files = {path: fs.info(path)} if fs.isfile(path) else fs.find(path, detail=True)
    return sorted(
        [name.removeprefix(path), info["size"], _modification_mark(info)]
        for name, info in files.items()
    )


def _modification_mark(info: dict[str, Any]) -> str:
    """An ETag where the store has one, else the time of the last change."""
    marks = (info.get(name) for name in ("ETag", "etag", "mtime", "LastModified"))
    return str(next((mark for mark in marks if mark is not None), ""))


@task(name="probe", task_run_name="probe {location}", **STAGE_OPTIONS)
def probe_stage(location: str, name: str, url: str) -> None:
    """Decode the drive once and write what it holds into the store at `url`.

    Raises:
        UnreadableVideo: no frame of the recording decodes.
    """
    key = stage_key("probe", VERSION, fingerprint(location))
    store = ReconstructionStore.create(url, {})
    if (store.read_commit("probe") or {}).get("key") == key:
        return
    began = time.perf_counter()
    record, frames = probe_drive(location)
    record = replace(record, name=name)
    log.info("%s: %d frames, %d x %d", name, record.frames, record.width, record.height)
    store.update_attributes({"drive": record.to_json()})
    store.write_frames(**frames.to_arrays())
    store.commit("probe", {"key": key, "seconds": time.perf_counter() - began})
