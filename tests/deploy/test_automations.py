"""What frees the slots of runs whose machine is lost, and what it leaves alone."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from local_fleet import LocalFleet, running_postgres
from prefect.events.schemas.automations import AutomationCore
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import RelatedResource, Resource

from flows.fuse_tiles import fuse_tiles
from flows.infer_segments import infer_segments
from flows.leaving import LEFT, QUEUED
from flows.reconstruct_collection import reconstruct_collection
from flows.reconstruct_drive import reconstruct_drive

AUTOMATIONS = Path(__file__).resolve().parents[2] / "deploy" / "automations.yaml"


def entries() -> dict[str, dict[str, Any]]:
    found = yaml.safe_load(AUTOMATIONS.read_text())["automations"]
    return {entry["name"]: entry for entry in found}


def test_all_are_taken_by_prefect_and_wait_long_enough():
    waits = {
        name: AutomationCore.model_validate(entry).trigger.within.total_seconds()
        for name, entry in entries().items()
    }
    assert waits["lost-runs"] > 3 * 30  # heartbeats
    assert waits["lost-while-submitted"] >= 600  # a pull of the image, by Docker
    assert waits["lost-before-the-start"] >= 1800  # a node from zero, its driver, the image


def related_flow(name: str) -> dict[str, str]:
    """What an event of a run says of its flow."""
    role = {"prefect.resource.role": "flow", "prefect.resource.name": name}
    return {"prefect.resource.id": f"prefect.flow.{uuid4()}", **role}


@pytest.mark.parametrize(
    "automation", ["lost-runs", "lost-before-the-start", "lost-while-submitted"]
)
def test_runs_of_our_flows_are_watched_and_no_others(automation):
    trigger = EventTrigger.model_validate(entries()[automation]["trigger"])
    run = Resource.model_validate({"prefect.resource.id": f"prefect.flow-run.{uuid4()}"})

    def is_watched(flow_name: str) -> bool:
        related = RelatedResource.model_validate(related_flow(flow_name))
        return trigger.covers_resources(run, [related])

    ours = (reconstruct_collection, reconstruct_drive, infer_segments, fuse_tiles)
    assert all(is_watched(flow.name) for flow in ours)
    assert not is_watched("nightly-report")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A server on PostgreSQL, without workers."""
    with running_postgres() as database, ExitStack() as stack:
        found = LocalFleet(tmp_path_factory.mktemp("fleet"), database, {})
        stack.callback(found.stop)
        found.start_server()
        yield found


@pytest.fixture
def fleet(server: LocalFleet) -> Iterator[LocalFleet]:
    """The server, on which a test has a pool of its own and no automation but its own."""
    yield server
    server.prefect("--no-prompt", "automation", "delete", "--all")


def pool_with_runs(fleet: LocalFleet, pool: str, slots: int, runs: int) -> list[str]:
    """Ids of runs that wait in a new pool."""
    fleet.ask("work_pools/", {"name": pool, "type": "process", "concurrency_limit": slots})
    return runs_of(fleet, pool, "infer-segments", runs)


def runs_of(fleet: LocalFleet, pool: str, flow_name: str, runs: int) -> list[str]:
    """Ids of runs of a flow that wait in a pool."""
    flow = fleet.ask("flows/", {"name": flow_name})["id"]
    asked = {"name": pool, "flow_id": flow, "work_pool_name": pool}
    deployment = fleet.ask("deployments/", asked)["id"]
    scheduled = {"state": {"type": "SCHEDULED"}}
    path = f"deployments/{deployment}/create_flow_run"
    return [fleet.ask(path, scheduled)["id"] for _ in range(runs)]


def set_state(fleet: LocalFleet, run: str, kind: str, name: str) -> None:
    said = fleet.ask(f"flow_runs/{run}/set_state", {"state": {"type": kind, "name": name}})
    assert said["status"] == "ACCEPT"


def give_sign_of_life(
    fleet: LocalFleet,
    run: str,
    flow_name: str = "infer-segments",
    event: str = "prefect.flow-run.heartbeat",
) -> None:
    sign = {
        "occurred": datetime.now(UTC).isoformat(),
        "event": event,
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
        "related": [related_flow(flow_name)],
        "id": str(uuid4()),
    }
    fleet.ask("events", [sign])


def move(fleet: LocalFleet, run: str) -> None:
    """What the server hears of a run whose pod got SIGTERM: a sign of life after its states."""
    set_state(fleet, run, "SCHEDULED", "AwaitingRetry")
    set_state(fleet, run, "PENDING", "Pending")
    set_state(fleet, run, "PENDING", "Submitting")
    give_sign_of_life(fleet, run)
    time.sleep(2)  # the server handles two events at once
    give_sign_of_life(fleet, run, event=LEFT)


def queue(fleet: LocalFleet, run: str) -> None:
    """The same where nobody takes the run yet, as the pool's slots are others'."""
    set_state(fleet, run, "SCHEDULED", "AwaitingRetry")
    give_sign_of_life(fleet, run)
    time.sleep(2)
    give_sign_of_life(fleet, run, event=QUEUED)


def handed_out(fleet: LocalFleet, pool: str) -> list[str]:
    """Runs that a worker of the pool would get now."""
    found = fleet.ask(f"work_pools/{pool}/get_scheduled_flow_runs", {})
    return [entry["flow_run"]["id"] for entry in found]


def automate(fleet: LocalFleet, folder: Path, name: str, within_s: float = 10) -> None:
    """Create one of the automations, by default one that waits as shortly as Prefect lets it."""
    entry = entries()[name]
    entry["trigger"]["within"] = within_s
    shortened = folder / "automations.yaml"
    shortened.write_text(yaml.safe_dump({"automations": [entry]}))
    fleet.prefect("automation", "create", "--from-file", str(shortened))
    time.sleep(5)  # until the server heeds it


def crashed_runs(fleet: LocalFleet, pool: str) -> set[str]:
    """Runs of the pool that count as crashed."""
    found = fleet.ask("flow_runs/filter", {"work_pools": {"name": {"any_": [pool]}}})
    return {run["id"] for run in found if run["state_type"] == "CRASHED"}


@pytest.mark.slow
def test_a_run_that_falls_silent_is_lost_and_one_that_moves_or_of_another_flow_is_not(
    fleet, tmp_path
):
    automate(fleet, tmp_path, "lost-runs")
    ours, moved, queued, killed_at_once = pool_with_runs(fleet, "silent", slots=5, runs=4)
    (other,) = runs_of(fleet, "silent", "nightly-report", 1)
    for run, leave in ((moved, move), (queued, queue)):
        set_state(fleet, run, "RUNNING", "Running")
        leave(fleet, run)
    for run, flow_name in ((other, "nightly-report"), (ours, "infer-segments")):
        set_state(fleet, run, "RUNNING", "Running")
        give_sign_of_life(fleet, run, flow_name)
    set_state(fleet, killed_at_once, "RUNNING", "Running")
    until = time.monotonic() + 120
    while not crashed_runs(fleet, "silent") >= {ours, killed_at_once} and time.monotonic() < until:
        time.sleep(1)
    time.sleep(5)  # the others' time began and ended first
    assert crashed_runs(fleet, "silent") == {ours, killed_at_once}


@pytest.mark.slow
def test_a_run_that_is_lost_before_its_first_heartbeat_gives_its_slot_back(fleet, tmp_path):
    automate(fleet, tmp_path, "lost-before-the-start")
    *started, queued, waiting = pool_with_runs(fleet, "before", slots=6, runs=7)
    others = runs_of(fleet, "before", "nightly-report", 1)
    for run in (*started, *others):
        set_state(fleet, run, "PENDING", "Pending")
    _, handed_over, on_kubernetes, moved, alive = started
    set_state(fleet, handed_over, "PENDING", "Submitting")  # as workers do
    set_state(fleet, on_kubernetes, "PENDING", "InfrastructurePending")
    for run in (moved, alive):
        set_state(fleet, run, "RUNNING", "Running")
    set_state(fleet, queued, "RUNNING", "Running")
    move(fleet, moved)
    queue(fleet, queued)
    assert handed_out(fleet, "before") == []
    lost = set(started) - {alive}
    ended: set[str] = set()
    until = time.monotonic() + 180
    while time.monotonic() < until:
        give_sign_of_life(fleet, alive)
        crashed = crashed_runs(fleet, "before")
        if crashed >= lost and not ended >= lost:
            until = time.monotonic() + 15  # the one that lives has its time, too
            assert set(handed_out(fleet, "before")) == {queued, waiting}
        ended = crashed
        time.sleep(1)
    assert ended == lost


@pytest.mark.slow
def test_a_run_whose_worker_is_lost_while_it_hands_it_over_gives_its_slot_back(fleet, tmp_path):
    automate(fleet, tmp_path, "lost-while-submitted", within_s=40)  # the others must get on in it
    taken, handed_over, on_kubernetes, running, waiting = pool_with_runs(
        fleet, "submitted", slots=4, runs=5
    )
    for run in (taken, handed_over, on_kubernetes, running):
        set_state(fleet, run, "PENDING", "Pending")
    time.sleep(2)  # the server handles two events at once
    for run in (handed_over, on_kubernetes, running):
        set_state(fleet, run, "PENDING", "Submitting")
    time.sleep(2)
    set_state(fleet, on_kubernetes, "PENDING", "InfrastructurePending")
    set_state(fleet, running, "RUNNING", "Running")
    until = time.monotonic() + 240
    while crashed_runs(fleet, "submitted") != {taken, handed_over} and time.monotonic() < until:
        time.sleep(1)
    time.sleep(30)  # the others have had as long
    assert crashed_runs(fleet, "submitted") == {taken, handed_over}
    assert handed_out(fleet, "submitted") == [waiting]
