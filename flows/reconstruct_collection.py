"""A collection of drives: each one is reconstructed, and no one's failure stops the others."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Annotated, Any

import fsspec
from prefect import Flow, flow
from prefect.client.schemas.objects import FlowRun, State
from pydantic import Field

from flows.artifacts import publish_collection
from flows.children import Child, Spread, cancel_children, run_children, work_key
from flows.reconstruct_drive import check_config, reconstruct_drive, store_url
from storage.credentials import refuse_credentials
from storage.reconstruction import ReconstructionStore, StoreMissing
from storage.video import DriveLocation, list_drives
from tasks.config import ReconstructionConfig
from tasks.finished import is_finished
from tasks.plan import read_aside

DEPLOYMENT = "reconstruct-drive/fleet"
LOOKERS = 32  # threads that look which drives are finished

log = logging.getLogger(__name__)


class CollectionIncomplete(RuntimeError):
    """Some drives of a collection failed; the others are finished."""

    def __init__(self, outcomes: list[dict[str, Any]]) -> None:
        failed = [outcome for outcome in outcomes if outcome["error"]]
        reasons = "; ".join(f"{outcome['name']}: {outcome['error']}" for outcome in failed)
        super().__init__(f"{len(failed)} of {len(outcomes)} drives failed: {reasons}")
        self.outcomes = outcomes


def cancel_drives(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Cancel the drives that a cancelled run has going; each cancels its own parts."""
    if flow_run.parameters.get("spread") == "deployments":
        cancel_children(flow_run.parameters["output"])


@flow(
    name="reconstruct-collection",
    flow_run_name="{collection}",
    persist_result=False,
    on_cancellation=[cancel_drives],
)
def reconstruct_collection(
    collection: str,
    output: str,
    config: ReconstructionConfig = ReconstructionConfig(),  # noqa: B008 (frozen)
    spread: Spread = "here",
    drives_at_once: Annotated[int, Field(ge=1)] = 16,
) -> list[dict[str, Any]]:
    """Reconstruct every drive of a collection that is not finished yet.

    Args:
        collection: folder, URL or glob of drives.
        output: folder or URL that takes one `<drive>.zarr` each and `collection.json`.
        config: settings of all stages, the same for all drives.
        spread: here: one drive after the other in this process; deployments: each drive that is
            not finished in a run of `reconstruct-drive/fleet`, which spreads its parts again.
        drives_at_once: such runs that are under way at any time.

    Returns:
        One record a drive: name, location, url, the segments set aside, and the error if it
        failed.

    Raises:
        CollectionIncomplete: after all drives, if any failed.
    """
    for given in (collection, output, config.infer.weights):
        refuse_credentials(given)
    check_config(config, spread)
    drives = list_drives(collection)
    if spread == "deployments":
        outcomes = reconstruct_elsewhere(drives, output, config, drives_at_once)
    else:
        outcomes = [reconstruct_one(drive, output, config) for drive in drives]
    write_summary(output, outcomes)
    publish_collection(outcomes)
    if any(outcome["error"] for outcome in outcomes):
        raise CollectionIncomplete(outcomes)
    return outcomes


def reconstruct_elsewhere(
    drives: Sequence[DriveLocation], output: str, config: ReconstructionConfig, at_once: int
) -> list[dict[str, Any]]:
    """Reconstruct each drive that is not finished in a run of its own."""

    def look(drive: DriveLocation) -> bool:
        return is_finished(drive.location, store_url(output, drive.name), config)

    with ThreadPoolExecutor(LOOKERS) as pool:
        finished = dict(zip(drives, pool.map(look, drives), strict=True))
    children = {d: drive_child(d, output, config) for d in drives if not finished[d]}
    log.info("%d of %d drives are not finished", len(children), len(drives))
    run_children(DEPLOYMENT, output, list(children.values()), at_once)
    return [
        outcome_of(d, output, children[d].error) if d in children else record_of(d, output)
        for d in drives
    ]


def drive_child(drive: DriveLocation, output: str, config: ReconstructionConfig) -> Child:
    """The run of one drive."""
    parameters = {"location": drive.location, "output": output, "name": drive.name}
    settings = asdict(config)
    return Child(
        drive.name,
        {**parameters, "config": settings, "spread": "deployments"},
        work_key(parameters, settings),
        lambda: commits_of(store_url(output, drive.name)),
    )


def commits_of(url: str) -> list[str]:
    """What is finished of a drive: whether a lost run got on."""
    try:
        return ReconstructionStore.open(url).commit_names()
    except StoreMissing:
        return []


def reconstruct_one(
    drive: DriveLocation, output: str, config: ReconstructionConfig
) -> dict[str, Any]:
    """Reconstruct one drive as a flow of its own; its failure becomes a record."""
    state = reconstruct_drive(drive.location, output, config, drive.name, return_state=True)
    error = state.result(raise_on_failure=False) if not state.is_completed() else None
    said = None if error is None else f"{type(error).__name__}: {error}"
    return outcome_of(drive, output, said)


def outcome_of(drive: DriveLocation, output: str, error: str | None) -> dict[str, Any]:
    """The record of a drive whose run has ended."""
    record = record_of(drive, output)
    if error is not None:
        return {**record, "error": error}
    return {**record, "set_aside": sorted(read_aside(ReconstructionStore.open(record["url"])))}


def record_of(drive: DriveLocation, output: str) -> dict[str, Any]:
    """The record of a drive that is finished as a whole."""
    url = store_url(output, drive.name)
    named = {"name": drive.name, "location": drive.location, "url": url}
    return {**named, "set_aside": [], "error": None}


def write_summary(output: str, outcomes: list[dict[str, Any]]) -> None:
    """Write what became of every drive to `<output>/collection.json`."""
    with fsspec.open(f"{output.rstrip('/')}/collection.json", "w") as file:
        json.dump({"drives": outcomes}, file, indent=2)
