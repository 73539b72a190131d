"""A collection of drives: each one is reconstructed, and no one's failure stops the others."""

from __future__ import annotations

import json
import logging
from typing import Any

import fsspec
from prefect import flow

from flows.artifacts import publish_collection
from flows.reconstruct_drive import reconstruct_drive, store_url
from storage.reconstruction import ReconstructionStore
from storage.video import DriveLocation, list_drives
from tasks.config import ReconstructionConfig
from tasks.plan import read_aside

log = logging.getLogger(__name__)


class CollectionIncomplete(RuntimeError):
    """Some drives of a collection failed; the others are finished."""

    def __init__(self, outcomes: list[dict[str, Any]]) -> None:
        failed = [outcome for outcome in outcomes if outcome["error"]]
        reasons = "; ".join(f"{outcome['name']}: {outcome['error']}" for outcome in failed)
        super().__init__(f"{len(failed)} of {len(outcomes)} drives failed: {reasons}")
        self.outcomes = outcomes


@flow(name="reconstruct-collection", flow_run_name="{collection}", persist_result=False)
def reconstruct_collection(
    collection: str,
    output: str,
    config: ReconstructionConfig = ReconstructionConfig(),  # noqa: B008 (frozen)
) -> list[dict[str, Any]]:
    """Reconstruct every drive of a collection that is not finished yet.

    Args:
        collection: folder, URL or glob of drives.
        output: folder or URL that takes one `<drive>.zarr` each and `collection.json`.
        config: settings of all stages, the same for all drives.

    Returns:
        One record a drive: name, location, url, the segments set aside, and the error if it
        failed.

    Raises:
        CollectionIncomplete: after all drives, if any failed.
    """
    outcomes = [reconstruct_one(drive, output, config) for drive in list_drives(collection)]
    write_summary(output, outcomes)
    publish_collection(outcomes)
    if any(outcome["error"] for outcome in outcomes):
        raise CollectionIncomplete(outcomes)
    return outcomes


def reconstruct_one(
    drive: DriveLocation, output: str, config: ReconstructionConfig
) -> dict[str, Any]:
    """Reconstruct one drive as a flow of its own; its failure becomes a record."""
    state = reconstruct_drive(drive.location, output, config, drive.name, return_state=True)
    error = state.result(raise_on_failure=False) if not state.is_completed() else None
    url = store_url(output, drive.name)
    return {
        "name": drive.name,
        "location": drive.location,
        "url": url,
        "set_aside": [] if error is not None else sorted(read_aside(ReconstructionStore.open(url))),
        "error": None if error is None else f"{type(error).__name__}: {error}",
    }


def write_summary(output: str, outcomes: list[dict[str, Any]]) -> None:
    """Write what became of every drive to `<output>/collection.json`."""
    with fsspec.open(f"{output.rstrip('/')}/collection.json", "w") as file:
        json.dump({"drives": outcomes}, file, indent=2)
