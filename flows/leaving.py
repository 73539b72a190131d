"""What the server is told when a run leaves a machine that is taken away, to go on elsewhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events import emit_event
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run

SIGTERM_BEHAVIOR = "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"
LEFT = "ttt3r.flow-run.left"  # it has a slot already where it goes on
QUEUED = "ttt3r.flow-run.queued"  # it waits for one
EVENTS = {StateType.PENDING: LEFT, StateType.SCHEDULED: QUEUED}

log = logging.getLogger(__name__)


@contextmanager
def told_when_left() -> Iterator[None]:
    """If SIGTERM ends the block and the run is scheduled again, say so as the last sign of life.

    Signs of life go on while chunks are committed, also after the states that the run takes then.
    Without a last word the automations would wait for the next sign while a machine is started,
    and mark the run Crashed.
    """
    try:
        yield
    except TerminationSignal:
        if os.environ.get(SIGTERM_BEHAVIOR) == "reschedule" and flow_run.id:
            try:
                tell_if_scheduled_again(UUID(flow_run.id))
            except httpx.HTTPError as error:
                log.warning("the server cannot be told that the run has left: %s", error)
        raise


def tell_if_scheduled_again(run_id: UUID) -> None:
    """Send LEFT or QUEUED, unless the run was cancelled or goes on elsewhere already."""
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(run_id)
    event = EVENTS.get(run.state.type) if run.state is not None else None
    if event is not None:
        resource = {"prefect.resource.id": f"prefect.flow-run.{run_id}"}
        emit_event(event, resource, related=[flow_of(run)])


def flow_of(run: FlowRun) -> dict[str, str]:
    """The run's flow, as signs of life name it: automations look at no others."""
    role = {"prefect.resource.role": "flow", "prefect.resource.name": flow_run.flow_name or ""}
    return {"prefect.resource.id": f"prefect.flow.{run.flow_id}", **role}
