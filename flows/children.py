"""Children: parts of a flow that run as deployments of their own, on whatever machine takes them.

The store decides what is finished, Prefect only what is running. A child's work has a key that is
the same whichever parent asks for it, so that a parent that died and was run again finds the
children that its predecessor started, and starts nothing twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, cast
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelling

from flows.outages import patiently
from storage.errors import Claimed, ClaimLost, StoreError
from tasks.keys import stage_key

FIRST_POLL_S, LONGEST_POLL_S, POLL_GROWTH = 1.0, 15.0, 1.3
MOST_CRASHES = 7  # of one child, one after the other and without getting on
MOST_DOUBLINGS = 6  # of the wait before another run
PAGE = 200  # runs that the server returns at once
CANCELLERS = 8  # threads that ask it to end runs
START_S = 10.0  # from a run's slot to its start on a machine that is there
FROM_ABOVE = "cancelled-from-above"  # tag of runs that nobody cancelled for their own sake
UNFINISHED = [
    StateType.SCHEDULED,
    StateType.PENDING,
    StateType.RUNNING,
    StateType.PAUSED,
]

Spread = Literal["here", "deployments"]
"""Where the parts of a flow run: in its own process, or each as a run of a deployment."""

log = logging.getLogger(__name__)


@dataclass
class Child:
    """Work of one run of a deployment, or of several if its machines are lost."""

    name: str  # of the run, for people
    parameters: dict[str, Any]
    work: str  # key of the work
    progress: Callable[[], object]  # what is done of it, to see whether a lost run got on
    attempt: int = 0
    crashes: int = 0  # in a row, without getting on
    refusals: int = 0  # in a row: another run is at work on it
    reached: object = None  # progress at the last crash
    due: float = 0.0  # when the next run may start, on the monotonic clock
    since: datetime | None = None  # when its first run was asked for
    error: str | None = None  # why it ended without finishing

    @property
    def is_given_up(self) -> bool:
        """Whether its runs were lost so often that there will be no other."""
        return self.crashes >= MOST_CRASHES


class ChildrenLost(RuntimeError):
    """Runs of some children ended without finishing their work; what they did is kept."""

    def __init__(self, lost: Sequence[Child]) -> None:
        shown = "; ".join(f"{child.name}: {child.error}" for child in lost[:3])
        more = f"; and {len(lost) - 3} more" if len(lost) > 3 else ""
        super().__init__(f"{len(lost)} runs did not finish: {shown}{more}")


def family_tag(of: str) -> str:
    """The tag of all runs below one that works for the store or output `of`."""
    return f"of:{of}"


def work_key(*what: Any) -> str:
    """Key of a child's work: what it does, and to what."""
    return stage_key("child", 1, *what)[:32]


def run_children(
    deployment: str,
    family: str,
    children: Sequence[Child],
    at_once: int | None = None,
    on_end: Callable[[Child], None] = lambda child: None,
) -> None:
    """Run each child as a run of `deployment`, wait for all; `error` of each says how it ended.

    A child whose run crashes (its machine is lost) runs again, until it crashes `MOST_CRASHES`
    times in a row without getting on. One that fails does not: its tasks have been retried; but
    if another run holds the claim on its work, it waits as after a crash. So it does if its run
    was cancelled with another parent that had joined it; one that was cancelled by itself has
    ended.

    Args:
        deployment: as "flow/deployment".
        family: what the children work for. If this run is cancelled, so are all children of
            the family and theirs, also those that a run before this one started.
        children: distinct works.
        at_once: runs that are not ended at any time; None: all.
        on_end: called for each child that has ended.

    Raises:
        ValueError: the server has no such deployment.
    """
    try:
        await_children(deployment, family, list(children), at_once, on_end)
    except TerminationSignal:
        # Also what a lost machine's last minutes look like: its children go on then.
        try:
            if is_cancelled():
                cancel_children(family)
        except httpx.HTTPError as error:
            log.warning("not all runs below this one could be cancelled: %s", error)
        raise


def await_children(
    deployment: str,
    family: str,
    waiting: list[Child],
    at_once: int | None,
    on_end: Callable[[Child], None],
) -> None:
    """The loop of `run_children`: start what is due, ask for all at once, settle what ended."""
    running: dict[UUID, Child] = {}
    pause = FIRST_POLL_S
    while waiting or running:
        for child in [c for c in waiting if c.due <= time.monotonic()]:
            if at_once is not None and len(running) >= at_once:
                break
            waiting.remove(child)
            running[start(deployment, family, child)] = child
        time.sleep(pause)
        pause = min(pause * POLL_GROWTH, LONGEST_POLL_S)
        found = read_runs(list(running))
        for run_id, child in list(running.items()):
            run = found.get(run_id)
            if run is not None and not is_ended(run):
                continue
            del running[run_id]
            pause = FIRST_POLL_S
            if settle(child, run):
                on_end(child)
            else:
                waiting.append(child)


def start(deployment: str, family: str, child: Child) -> UUID:
    """Start a child, or join the run of it that a parent before this one has started."""
    run = create(deployment, family, child)
    if is_past(run):  # of an earlier time: what it did is in the store, and did not suffice
        latest = latest_run(child)
        child.attempt = attempt_of(latest) + is_past(latest)
        run = create(deployment, family, child)
    return run.id


def create(deployment: str, family: str, child: Child) -> FlowRun:
    """The run of the child's present attempt, made unless it is there.

    A later attempt is scheduled for the time of the first, before the work that waits since then.
    """
    child.since = child.since or datetime.now(UTC)
    try:
        return patiently(
            lambda: cast(
                FlowRun,
                run_deployment(
                    deployment,
                    parameters=child.parameters,
                    scheduled_time=child.since,
                    flow_run_name=child.name,
                    timeout=0,
                    tags=[family_tag(family), *inherited_tags(), work_tag(child)],
                    idempotency_key=f"{child.work}:{child.attempt}",
                ),
            )
        )
    except ObjectNotFound:
        raise ValueError(
            f"the Prefect server has no deployment {deployment!r}; make it with `prefect "
            "--no-prompt deploy --all --prefect-file deploy/prefect.yaml`, or run with "
            "spread=here"
        ) from None


def inherited_tags() -> list[str]:
    """Tags of what the run at hand works for itself: whoever cancels that, cancels its children."""
    return [tag for tag in flow_run.get_tags() if tag.startswith(family_tag(""))]


def work_tag(child: Child) -> str:
    """The tag of all runs of the same work."""
    return f"work:{child.work}"


def attempt_of(run: FlowRun) -> int:
    """Which attempt at its work a run is."""
    return int((run.idempotency_key or ":0").rpartition(":")[2])


def latest_run(child: Child) -> FlowRun:
    """The last run of the child's work."""
    wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[work_tag(child)]))
    runs = query(wanted, FlowRunSort.EXPECTED_START_TIME_DESC)
    return max(runs, key=attempt_of)


def is_ended(run: FlowRun) -> bool:
    """Whether the run will not change any more."""
    return run.state is not None and run.state.is_final()


def is_past(run: FlowRun) -> bool:
    """Whether the run has ended, or was told to and does no more than its claims let it."""
    return is_ended(run) or (run.state is not None and run.state.is_cancelling())


def settle(child: Child, run: FlowRun | None) -> bool:
    """Whether an ended child needs no further run; `None`: the server has forgotten its run."""
    message = said_by(run)
    if run is not None and run.state is not None and not is_worth_another(run):
        child.error = None if run.state.is_completed() else message or run.state.name
        return True
    reached = reached_by(child)
    got_on, child.reached = reached != child.reached, reached
    child.crashes = 1 if got_on else child.crashes + 1
    child.attempt += 1
    log.warning("%s was lost (%s), %d times in a row", child.name, message, child.crashes)
    if child.is_given_up:
        child.error = f"lost {child.crashes} times in a row, the last time: {message}"
        return True
    is_free = run is None or run.state is None or run.state.is_crashed()
    child.refusals = 0 if is_free else child.refusals + 1
    doublings = min(max(child.crashes, child.refusals), MOST_DOUBLINGS)
    waits = min(5.0 * 2**doublings, 300.0)
    child.due = time.monotonic() + (0.0 if got_on and is_free else waits)
    return False


def reached_by(child: Child) -> object:
    """The child's progress; while the store cannot tell, what was known before."""
    try:
        return child.progress()
    except StoreError as error:
        log.warning("%s: how far it got cannot be seen: %s", child.name, error)
        return child.reached


def said_by(run: FlowRun | None) -> str:
    """Why a run ended."""
    if run is None or run.state is None:
        return "the server knows it no more"
    return (run.state.message or "").removeprefix("Flow run encountered an exception: ")


def is_worth_another(run: FlowRun) -> bool:
    """Whether the run ended for a reason that is not its own.

    It was lost; or refused, since another one, taken for lost, is still at work; or cancelled
    with another parent than this one.
    """
    state = run.state
    if state is None or state.is_crashed():
        return True
    if state.is_cancelled():
        return FROM_ABOVE in run.tags and not is_cancelled()
    refused = said_by(run).startswith((f"{Claimed.__name__}:", f"{ClaimLost.__name__}:"))
    return state.is_failed() and refused


def read_runs(ids: Sequence[UUID]) -> dict[UUID, FlowRun]:
    """Runs by id, `PAGE` in one request."""
    found: dict[UUID, FlowRun] = {}
    for first in range(0, len(ids), PAGE):
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=list(ids[first : first + PAGE])))
        found |= {run.id: run for run in query(wanted)}
    return found


def query(wanted: FlowRunFilter, sort: FlowRunSort = FlowRunSort.ID_DESC) -> list[FlowRun]:
    """The first `PAGE` runs of a filter."""

    def ask() -> list[FlowRun]:
        with get_client(sync_client=True) as client:
            return client.read_flow_runs(flow_run_filter=wanted, sort=sort, limit=PAGE)

    return patiently(ask)


def is_cancelled() -> bool:
    """Whether somebody cancelled the flow run that this is."""
    own = flow_run.get_id()
    if own is None:
        return False
    state = read_runs([UUID(own)])[UUID(own)].state
    return state is not None and (state.is_cancelling() or state.is_cancelled())


def cancel_children(family: str) -> None:
    """Cancel all runs that work for `family`, at any depth, and have not ended.

    Those of a parent that is between two attempts would not hear of it from that one.
    """
    asked: set[UUID] = set()
    until = time.monotonic() + START_S
    # First those that wait: else one takes the slot of another that has just been cancelled.
    for states in ([StateType.SCHEDULED], UNFINISHED):
        wanted = FlowRunFilter(
            tags=FlowRunFilterTags(all_=[family_tag(family)]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states)),
        )
        while runs := [run for run in query(wanted) if run.id not in asked]:
            ready = [run for run in runs if time.monotonic() > until or not is_starting(run)]
            # Prefect leaves a cancelled parent 30 s for all of them.
            with get_client(sync_client=True) as client, ThreadPoolExecutor(CANCELLERS) as pool:
                list(pool.map(partial(cancel, client), ready))
            asked |= {run.id for run in ready}
            if len(ready) < len(runs):
                time.sleep(FIRST_POLL_S)


def is_starting(run: FlowRun) -> bool:
    """Whether a run has just taken its slot.

    A process worker listens for cancelling from a moment later on. What comes before is not heard:
    the run's process is refused by the server, and the run keeps its slot, Cancelling, until
    Prefect gives up after 5 minutes.
    """
    state = run.state
    if state is None or not state.is_pending():
        return False
    return (datetime.now(UTC) - state.timestamp).total_seconds() < START_S


def cancel(client: SyncPrefectClient, run: FlowRun) -> None:
    """Ask the server to end a run, and say in its tags that the reason is not its own."""
    message = "the run that it works for was cancelled"
    with suppress(ObjectNotFound):
        patiently(lambda: client.update_flow_run(run.id, tags=[*run.tags, FROM_ABOVE]))
        patiently(lambda: client.set_flow_run_state(run.id, Cancelling(message=message)))
