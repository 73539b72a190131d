"""What frees the slots of runs whose machine is lost, and what it leaves alone."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from local_fleet import LocalFleet
from prefect.events.schemas.automations import AutomationCore

AUTOMATIONS = Path(__file__).resolve().parents[2] / "deploy" / "automations.yaml"


def entries() -> dict[str, dict[str, Any]]:
    found = yaml.safe_load(AUTOMATIONS.read_text())["automations"]
    return {entry["name"]: entry for entry in found}


def test_both_are_taken_by_prefect_and_wait_long_enough():
    waits = {
        name: AutomationCore.model_validate(entry).trigger.within.total_seconds()
        for name, entry in entries().items()
    }
    assert waits["lost-runs"] > 3 * 30  # heartbeats
    assert waits["lost-before-the-start"] >= 1800  # a node from zero, its driver, the image


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    """A server on SQLite, without workers."""
    found = LocalFleet(tmp_path, f"sqlite+aiosqlite:///{tmp_path}/prefect.db", {})
    try:
        found.start_server()
        yield found
    finally:
        found.stop()


def pool_with_runs(fleet: LocalFleet, slots: int, runs: int) -> list[str]:
    """Ids of runs that wait in the pool `gpu`."""
    fleet.ask("work_pools/", {"name": "gpu", "type": "process", "concurrency_limit": slots})
    flow = fleet.ask("flows/", {"name": "infer-segments"})["id"]
    asked = {"name": "fleet", "flow_id": flow, "work_pool_name": "gpu"}
    deployment = fleet.ask("deployments/", asked)["id"]
    scheduled = {"state": {"type": "SCHEDULED"}}
    path = f"deployments/{deployment}/create_flow_run"
    return [fleet.ask(path, scheduled)["id"] for _ in range(runs)]


def set_state(fleet: LocalFleet, run: str, kind: str, name: str) -> None:
    said = fleet.ask(f"flow_runs/{run}/set_state", {"state": {"type": kind, "name": name}})
    assert said["status"] == "ACCEPT"


def give_sign_of_life(fleet: LocalFleet, run: str) -> None:
    event = {
        "occurred": datetime.now(UTC).isoformat(),
        "event": "prefect.flow-run.heartbeat",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
        "id": str(uuid4()),
    }
    fleet.ask("events", [event])


def handed_out(fleet: LocalFleet) -> list[str]:
    """Runs that a worker of the pool would get now."""
    found = fleet.ask("work_pools/gpu/get_scheduled_flow_runs", {})
    return [entry["flow_run"]["id"] for entry in found]


@pytest.mark.slow
def test_a_run_that_is_lost_before_its_first_heartbeat_gives_its_slot_back(fleet, tmp_path):
    entry = entries()["lost-before-the-start"]
    entry["trigger"]["within"] = 10  # the least that Prefect takes
    shortened = tmp_path / "automations.yaml"
    shortened.write_text(yaml.safe_dump({"automations": [entry]}))
    fleet.prefect("automation", "create", "--from-file", str(shortened))
    time.sleep(5)  # until the server heeds it
    *started, waiting = pool_with_runs(fleet, slots=5, runs=6)
    for run in started:
        set_state(fleet, run, "PENDING", "Pending")
    _, handed_over, on_kubernetes, silent, alive = started
    set_state(fleet, handed_over, "PENDING", "Submitting")  # as workers do
    set_state(fleet, on_kubernetes, "PENDING", "InfrastructurePending")
    for run in (silent, alive):
        set_state(fleet, run, "RUNNING", "Running")
    assert handed_out(fleet) == []
    lost = set(started) - {alive}
    ended: set[str] = set()
    until = time.monotonic() + 180
    while time.monotonic() < until:
        give_sign_of_life(fleet, alive)
        crashed = {r["id"] for r in fleet.flow_runs() if r["state_type"] == "CRASHED"}
        if crashed >= lost and not ended >= lost:
            until = time.monotonic() + 15  # the one that lives has its time, too
            assert handed_out(fleet) == [waiting]
        ended = crashed
        time.sleep(1)
    assert ended == lost
