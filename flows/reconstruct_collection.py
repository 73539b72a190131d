"""A collection of drives: each one is reconstructed, and no one's failure stops the others."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from flows.artifacts import publish_collection
from flows.children import Child, Spread, run_children, work_key
from flows.reconstruct_drive import check_config, reconstruct_drive, record_failure
from flows.telemetry import observed
from storage.credentials import refuse_credentials
from storage.drives import DriveLocation, hold_name, list_drives, require_output, store_url
from storage.errors import Claimed, StoreError, StoreMissing
from storage.folders import open_folder
from storage.reconstruction import ReconstructionStore
from storage.wording import on_one_line, reason_of
from tasks import metrics
from tasks.attempts import ATTEMPTS
from tasks.budget import forget_taken, taken_by_run, within_budget
from tasks.config import BudgetConfig, ReconstructionConfig
from tasks.finished import is_finished
from tasks.helpers import helped
from tasks.infer import device_kind, resolve_device
from tasks.memory import collect_garbage, use_one_arena
from tasks.planned import read_aside
from tasks.probe import may_take_over
from tasks.retries import retried

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


class DriveLost(RuntimeError):
    """The runs of a drive were lost one after the other, before one could say why it failed."""


@flow(name="reconstruct-collection", flow_run_name="{collection}", persist_result=False)
def reconstruct_collection(
    collection: str,
    output: str,
    config: ReconstructionConfig = ReconstructionConfig(),  # noqa: B008 (frozen)
    spread: Spread = "here",
    drives_at_once: Annotated[int, Field(ge=1)] = 16,
    budget: BudgetConfig = BudgetConfig(),  # noqa: B008
    processes: Annotated[int, Field(ge=1)] = 1,
) -> list[dict[str, Any]]:
    """Reconstruct every drive of a collection that is not finished yet.

    Args:
        collection: folder, URL or glob of drives.
        output: folder or URL that takes one `<drive>.zarr` each and `collection.json`.
        config: settings of all stages, the same for all drives.
        spread: here: one drive after the other in this process; deployments: each drive that is
            not finished in a run of `reconstruct-drive/fleet`, which spreads its parts again.
        drives_at_once: such runs that are under way at any time.
        budget: what this run may take; drives that do not fit are refused, or left to the next.
        processes: of this machine that share a drive's work, where `spread` is "here".

    Returns:
        One record a drive: name, location, url, the segments set aside, the error if it
        failed, and whether it is left to the next run.

    Raises:
        CollectionIncomplete: after all drives, if any failed.
        OverBudget: before any drive.
    """
    use_one_arena()
    with observed(), counted(), helped(processes):
        for given in (collection, output, config.infer.weights, budget.prices, budget.rates):
            refuse_credentials(given or "")
        require_output(output)
        check_config(config, spread)
        output = output.rstrip("/")  # or the same work would have other keys, and be done twice
        drives = retried(list_drives)(collection, output, may_take_over)
        if spread == "deployments":
            outcomes = reconstruct_elsewhere(drives, output, config, drives_at_once, budget)
        else:
            outcomes = reconstruct_here(drives, output, config, budget)
        publish_collection(outcomes)
        write_summary(output, outcomes)
        if any(outcome["error"] for outcome in outcomes):
            raise CollectionIncomplete(outcomes)
    return outcomes


@contextmanager
def counted() -> Iterator[None]:
    """Count the run of a collection by how the block ends; one that is stopped has no outcome."""
    try:
        yield
    except CollectionIncomplete:
        metrics.collection_ended("incomplete")
        raise
    except Exception:
        metrics.collection_ended("failed")
        raise
    metrics.collection_ended("finished")


def reconstruct_here(
    drives: Sequence[DriveLocation],
    output: str,
    config: ReconstructionConfig,
    budget: BudgetConfig,
) -> list[dict[str, Any]]:
    """Reconstruct one drive after the other in this process."""
    kind = device_kind(resolve_device(config.infer))
    taken, left = within_budget(drives, output, config, budget, kind)
    hold_names(taken, output)
    return [
        record_of(drive, output, is_left=True)
        if drive in left
        else reconstruct_one(drive, output, config, budget.prices)
        for drive in drives
    ]


def reconstruct_elsewhere(
    drives: Sequence[DriveLocation],
    output: str,
    config: ReconstructionConfig,
    at_once: int,
    budget: BudgetConfig,
) -> list[dict[str, Any]]:
    """Reconstruct each drive that is not finished in a run of its own."""

    def look(drive: DriveLocation) -> bool:
        return is_finished(drive.location, store_url(output, drive.name), config)

    with ThreadPoolExecutor(LOOKERS) as pool:
        finished = dict(zip(drives, pool.map(look, drives), strict=True))
    todo = [d for d in drives if not finished[d]]
    log.info("%d of %d drives are not finished", len(todo), len(drives))
    run = flow_run.id or ""
    taken, left = retried(taken_by_run)(run, todo, output, config, budget)
    hold_names(taken, output)
    children = {d: drive_child(d, output, config, budget.prices) for d in taken}
    urls = {child.work: store_url(output, d.name) for d, child in children.items()}
    with ThreadPoolExecutor(LOOKERS) as pool:

        def on_end(child: Child) -> None:
            if child.is_given_up:
                pool.submit(record_lost, urls[child.work], DriveLost(child.error))

        run_children(DEPLOYMENT, output, list(children.values()), at_once, on_end)
    retried(forget_taken)(run, output)
    return [
        outcome_of(d, output, children[d].error)
        if d in children
        else record_of(d, output, d in left)
        for d in drives
    ]


def record_lost(url: str, error: DriveLost) -> None:
    """Record, as its own run would, that a drive failed; not if some run is at work on it."""
    try:
        with ReconstructionStore.create(url, {}).claim("drive"):
            record_failure(url, error)
    except Claimed:
        log.warning("%s: a run is at work on it all the same: %s", url, error)
    except (StoreError, OSError):
        record_failure(url, error)  # counts it, and says that the store cannot be written


def hold_names(drives: Sequence[DriveLocation], output: str) -> None:
    """Keep the names of drives for all runs to come, whatever drives these find beside them."""

    def hold(drive: DriveLocation) -> None:
        try:
            hold_name(store_url(output, drive.name), drive.location)
        except StoreError as error:  # its run will say so
            log.warning("%s: its name is not held: %s", drive.name, error)

    with ThreadPoolExecutor(LOOKERS) as pool:
        list(pool.map(hold, drives))


def drive_child(
    drive: DriveLocation, output: str, config: ReconstructionConfig, prices: str | None
) -> Child:
    """The run of one drive."""
    parameters = {"location": drive.location, "output": output, "name": drive.name}
    settings = asdict(config)
    return Child(
        drive.name,
        {**parameters, "config": settings, "spread": "deployments", "prices": prices},
        work_key(parameters, settings),
        lambda: commits_of(store_url(output, drive.name)),
    )


def commits_of(url: str) -> list[str]:
    """What is finished of a drive: whether a lost run got on. That it was tried is no progress."""
    try:
        names = ReconstructionStore.open(url).commit_names()
        return [name for name in names if not name.startswith(f"{ATTEMPTS}/")]
    except StoreMissing:
        return []


def reconstruct_one(
    drive: DriveLocation, output: str, config: ReconstructionConfig, prices: str | None
) -> dict[str, Any]:
    """Reconstruct one drive as a flow of its own; its failure becomes a record."""
    given = (drive.location, output, config, drive.name)
    state = reconstruct_drive(*given, prices=prices, return_state=True)
    collect_garbage()
    error = state.result(raise_on_failure=False) if not state.is_completed() else None
    said = None if error is None else f"{type(error).__name__}: {error}"
    return outcome_of(drive, output, said)


def outcome_of(drive: DriveLocation, output: str, error: str | None) -> dict[str, Any]:
    """The record of a drive whose run has ended."""
    record = record_of(drive, output)
    if error is not None:
        return {**record, "error": on_one_line(error)}
    try:
        aside = read_aside(ReconstructionStore.open(record["url"]))
    except StoreError as unread:
        return {**record, "error": reason_of(unread)}
    return {**record, "set_aside": sorted(aside)}


def record_of(drive: DriveLocation, output: str, is_left: bool = False) -> dict[str, Any]:
    """The record of a drive that is finished as a whole, or left to the next run."""
    url = store_url(output, drive.name)
    named = {"name": drive.name, "location": drive.location, "url": url}
    return {**named, "set_aside": [], "error": None, "left": is_left}


def write_summary(output: str, outcomes: list[dict[str, Any]]) -> None:
    """Write what became of every drive to `<output>/collection.json`."""
    summary = json.dumps({"drives": outcomes}, indent=2).encode()
    try:
        open_folder(output).write("collection.json", summary)
    except StoreError as error:
        if not any(outcome["error"] for outcome in outcomes):
            raise
        log.warning("what became of the drives cannot be written: %s", error)  # nor could they
