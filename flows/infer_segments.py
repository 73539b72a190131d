"""Inference of a drive, group by group; segments that cannot be done do not stop the others."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from flows.artifacts import progress_of
from storage.reconstruction import ReconstructionStore
from tasks.config import InferConfig
from tasks.infer import infer_stage, unfinished_segments
from tasks.plan import aside_commit, read_aside
from tasks.retries import DRIVE_ERRORS

log = logging.getLogger(__name__)


def infer_segments(url: str, name: str, groups: list[tuple[int, ...]], config: InferConfig) -> None:
    """Infer all segments; set aside, with the reason, those that fail even alone.

    Those that an earlier run set aside are tried again, each alone and after all others.

    Raises:
        Exception: the failure of the last segment tried, if none of the drive could be done.
    """
    earlier = give_up_deadly(url)
    with progress_of(f"inference of {name}", len(groups)) as advance:
        for group in groups:
            infer_group(url, tuple(i for i in group if i not in earlier), config)
            advance()
    for index in earlier:
        infer_alone(url, index, config)


def give_up_deadly(url: str) -> list[int]:
    """Segments set aside that this run tries again, those with the fewest attempts first.

    One during whose last attempt the process died is left for the run after this one.
    """
    store, retried = ReconstructionStore.open(url), []
    for index, record in sorted(read_aside(store).items(), key=lambda item: item[1]["attempts"]):
        if record["is_running"]:
            reason = "the process died while it was computed"
            store.commit(aside_commit(index), {**record, "is_running": False, "reason": reason})
        else:
            retried.append(index)
    return retried


def infer_group(url: str, indices: tuple[int, ...], config: InferConfig) -> None:
    """Infer segments together or, if that fails, one by one."""
    deadly = set(read_aside(ReconstructionStore.open(url)))
    indices = tuple(i for i in indices if i not in deadly)
    if not indices:
        return
    try:
        infer_stage(url, indices, config)
    except DRIVE_ERRORS:
        raise
    except Exception as error:
        log.warning("%s: segments %s fail together, %s: each is tried alone", url, indices, error)
        failures = [infer_alone(url, i, config) for i in unfinished_segments(url, indices, config)]
        if failures and not ReconstructionStore.open(url).commit_names("infer"):
            raise failures[-1] or error from None


def infer_alone(url: str, index: int, config: InferConfig) -> Exception | None:
    """Infer one segment; set it aside and return the reason if it fails."""
    store, name = ReconstructionStore.open(url), aside_commit(index)
    attempts = (store.read_commit(name) or {}).get("attempts", 0) + 1
    started = {"attempts": attempts, "time": datetime.now(UTC).isoformat(), "reason": "unknown"}
    store.commit(name, {**started, "is_running": True})
    try:
        infer_stage.with_options(retries=0)(url, (index,), config)
    except DRIVE_ERRORS:
        store.drop_commits(name)
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        store.commit(name, {**started, "is_running": False, "reason": reason})
        log.warning("%s: segment %d is set aside: %s", url, index, reason)
        return error
    store.drop_commits(name)
    return None
