"""Inference of a drive, group by group; segments that cannot be done do not stop the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from prefect import flow
from prefect.exceptions import TerminationSignal

from flows.artifacts import progress_bar
from flows.children import Child, ChildrenLost, Spread, run_children, work_key
from flows.leaving import told_when_left
from flows.telemetry import observed
from storage.credentials import refuse_credentials
from storage.errors import StoreError
from storage.layout import segment_claim
from storage.reconstruction import ReconstructionStore
from storage.records import Plan
from storage.wording import reason_of
from tasks import metrics
from tasks.config import InferConfig
from tasks.infer import infer_stage, resolve_device, unfinished_segments
from tasks.keys import drop_later, require_key
from tasks.planned import aside_commit, read_aside, read_plan
from tasks.retries import DRIVE_ERRORS
from ttt3r.weights import weights_info

DEPLOYMENT = "infer-segments/fleet"

log = logging.getLogger(__name__)


@flow(name="infer-segments", persist_result=False)
def infer_segments(
    url: str,
    indices: list[int],
    config: InferConfig = InferConfig(),  # noqa: B008 (frozen)
    alone: bool = False,
) -> None:
    """Infer one group of segments of a planned drive: the only work that wants a GPU.

    Finished chunks are not computed again. `segments_per_task` at a time; if these fail together,
    each is tried alone, and set aside in the store, with the reason, if it fails even so.

    Args:
        url: the drive's Zarr group.
        indices: segments of its plan.
        config: how the network runs.
        alone: one by one from the start, for segments that failed before.
    """
    for given in (url, config.weights):
        refuse_credentials(given)
    size = 1 if alone else config.segments_per_task
    if config.device == "auto" and resolve_device(config) == "cpu":
        log.warning(
            "no GPU is found here, and this run infers on the CPU; with the device 'cuda' instead "
            "of 'auto' it would fail"
        )
    with told_when_left(), observed():
        for first in range(0, len(indices), size):
            group = indices[first : first + size]
            if alone:
                infer_alone(url, group[0], config)
            else:
                infer_group(url, group, config)


def infer_drive(
    url: str, name: str, groups: list[tuple[int, ...]], config: InferConfig, spread: Spread
) -> None:
    """Infer all segments; set aside, with the reason, those that fail even alone.

    Those that an earlier run set aside are tried again, each alone and after all others.

    Raises:
        Exception: the failure of the last segment tried, if no segment of the drive is finished.
        ChildrenLost: runs elsewhere ended without finishing their groups.
    """
    if spread == "deployments":
        infer_elsewhere(url, name, groups, config)
        return
    earlier, failures = give_up_deadly(url), []
    with progress_bar(f"inference of {name}", len(groups)) as advance:
        for group in groups:
            failures += infer_group(url, group, config)
            if failures and not ReconstructionStore.open(url).commit_names("infer"):
                raise failures[-1]
            advance()
    failures += [e for e in (infer_alone(url, i, config) for i in earlier) if e is not None]
    require_segments(url, failures)


def infer_elsewhere(
    url: str, name: str, groups: Sequence[tuple[int, ...]], config: InferConfig
) -> None:
    """Infer what is not finished of the groups in runs of their own.

    What an earlier run set aside is tried once more, each alone: no other run ends with its
    process. Runs hold the same segments whatever is finished or set aside, so that a parent that
    was run again finds the runs of the one before.
    """
    store = ReconstructionStore.open(url)
    key = [require_key(store, "plan"), config.rule, config.precision]
    key.append(weights_info(config.weights).sha256)

    def child(indices: Sequence[int], alone: bool) -> Child:
        settings = {"config": asdict(config), "alone": alone}
        return Child(
            f"{name}, segments {indices[0]} to {indices[-1]}",
            {"url": url, "indices": list(indices), **settings},
            work_key(url, key, list(indices), alone),
            lambda: progress_of_segments(store, indices),
        )

    earlier = by_attempts(read_aside(store))
    left = set(unfinished_segments(url, [i for group in groups for i in group], config))
    left -= set(earlier)
    runs = bundle(read_plan(store), groups, config.frames_per_run)
    children = [child(run, False) for run in runs if left.intersection(run)]
    children += [child((i,), True) for i in earlier]
    with progress_bar(f"inference of {name}", len(children)) as advance:
        run_children(DEPLOYMENT, url, children, on_end=lambda _: advance())
    give_up_deadly(url)
    lost = [c for c in children if c.error]
    if lost:
        raise ChildrenLost(lost)
    require_segments(url)


def require_segments(url: str, failures: Sequence[Exception] = ()) -> None:
    """Make sure that not all segments of the drive are set aside.

    Raises:
        Exception: the last of `failures`, or else RuntimeError with the last reason.
    """
    store = ReconstructionStore.open(url)
    aside = read_aside(store)
    if any(segment.index not in aside for segment in read_plan(store).segments):
        return
    if failures:
        raise failures[-1]
    last = max(aside)
    raise RuntimeError(
        f"no segment could be inferred; the last one, segment {last}: {aside[last]['reason']}"
    )


def bundle(plan: Plan, groups: Sequence[Sequence[int]], frames: int) -> list[list[int]]:
    """Groups put together to runs of at least `frames` frames, the last one excepted.

    Whole groups, so that lanes hold the same segments wherever these are inferred.
    """
    runs: list[list[int]] = [[]]
    for group in groups:
        if sum(plan.segments[i].frames for i in runs[-1]) >= frames:
            runs.append([])
        runs[-1] += group
    return [run for run in runs if run]


def progress_of_segments(store: ReconstructionStore, indices: Sequence[int]) -> object:
    """What is finished of segments, or given up: whether a lost run got on."""
    wanted = {segment_claim(i) for i in indices} | {aside_commit(i) for i in indices}
    names = store.commit_names("infer") + store.commit_names("aside")
    return [n for n in names if "/".join(n.split("/")[:2]) in wanted]


def give_up_deadly(url: str) -> list[int]:
    """Segments set aside that this run tries again, those with the fewest attempts first.

    One during whose last attempt the process died is left for the run after this one.
    """
    store, retried = ReconstructionStore.open(url), []
    aside = read_aside(store)
    for index in by_attempts(aside):
        record = aside[index]
        if record["is_running"]:
            reason = "the process died while it was computed"
            store.commit(aside_commit(index), {**record, "is_running": False, "reason": reason})
        else:
            retried.append(index)
    return retried


def by_attempts(aside: dict[int, dict[str, Any]]) -> list[int]:
    """Segments that are set aside, those with the fewest attempts first."""
    return sorted(aside, key=lambda index: (aside[index]["attempts"], index))


def infer_group(url: str, indices: Sequence[int], config: InferConfig) -> list[Exception]:
    """Infer segments together or, if that fails, one by one; the failures of these."""
    deadly = set(read_aside(ReconstructionStore.open(url)))
    indices = tuple(i for i in indices if i not in deadly)
    if not indices:
        return []
    try:
        infer_stage(url, indices, config)
    except DRIVE_ERRORS:
        raise
    except Exception as error:
        log.warning("%s: segments %s fail together, %s: each is tried alone", url, indices, error)
        left = unfinished_segments(url, indices, config)
        failures = [infer_alone(url, i, config) for i in left]
        return [failure for failure in failures if failure is not None]
    return []


def infer_alone(url: str, index: int, config: InferConfig) -> Exception | None:
    """Infer one segment; set it aside and return the reason if it fails."""
    store, name = ReconstructionStore.open(url), aside_commit(index)
    before = store.read_commit(name)
    attempts = (before or {}).get("attempts", 0) + 1
    started = {"attempts": attempts, "time": datetime.now(UTC).isoformat(), "reason": "unknown"}
    store.commit(name, {**started, "is_running": True})
    try:
        infer_stage.with_options(retries=0)(url, (index,), config)
    except (*DRIVE_ERRORS, KeyboardInterrupt, TerminationSignal):
        # No fault of the segment: it is as if it had not been tried.
        with suppress(StoreError):  # the first error says more than this one
            if before is None:
                store.drop_commits(name)
            else:
                store.commit(name, before)
        raise
    except Exception as error:
        reason = reason_of(error)
        store.commit(name, {**started, "is_running": False, "reason": reason})
        metrics.segment_set_aside()
        log.warning("%s: segment %d is set aside: %s", url, index, reason)
        return error
    drop_later(store, "infer")  # that was made without it
    store.drop_commits(name)
    return None
