"""What `deploy/` and `ttt3r serve` promise to Prefect is what the flows are."""

import os
import sys
from pathlib import Path

import prefect
import pytest
import yaml
from prefect import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.responses import DeploymentResponse
from prefect.flows import load_flow_from_entrypoint
from recordings import moving_squares, write_video

from flows import fuse_tiles, infer_segments, reconstruct_collection
from flows.cli import main
from flows.commands.serve import local_deployments
from storage.records import Plan, Segment

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def test_deployments_are_those_that_the_flows_call_and_take_their_parameters():
    found = {}
    for entry in yaml.safe_load((DEPLOY / "prefect.yaml").read_text())["deployments"]:
        flow = load_flow_from_entrypoint(entry["entrypoint"])
        found[f"{flow.name}/{entry['name']}"] = entry["work_pool"]["name"]
        assert set(entry.get("parameters", {})) <= set(flow.parameters.properties)
    assert found == {
        "reconstruct-collection/scheduled": "cpu",
        reconstruct_collection.DEPLOYMENT: "cpu",
        infer_segments.DEPLOYMENT: "gpu",
        fuse_tiles.DEPLOYMENT: "cpu",
    }


@pytest.mark.parametrize(
    ("frames", "runs"),
    [(1, [[0, 1], [2, 3], [4]]), (17, [[0, 1, 2, 3], [4]]), (99, [[0, 1, 2, 3, 4]])],
)
def test_runs_are_whole_groups_of_so_many_frames_at_least(frames, runs):
    plan = Plan(40, 4, tuple(Segment(i, 8 * i, 8 * i + 8, 0) for i in range(5)))
    groups = [(0, 1), (2, 3), (4,)]
    assert infer_segments.bundle(plan, groups, frames) == runs


def test_a_slash_at_the_end_of_the_output_makes_no_other_work(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", moving_squares(4))
    asked = []

    def ask(deployment, family, children, *rest):
        asked.append((family, [(child.work, child.parameters) for child in children]))
        raise InterruptedError

    monkeypatch.setattr(reconstruct_collection, "run_children", ask)
    for output in (f"{tmp_path}/out", f"{tmp_path}/out/"):
        with pytest.raises(InterruptedError):
            reconstruct_collection.reconstruct_collection.fn(
                f"{tmp_path}/*.mp4", output, spread="deployments"
            )
    without, with_slash = asked
    assert with_slash == without


def test_drives_of_an_earlier_night_stay_the_same_work_when_the_collection_grows(
    tmp_path, monkeypatch
):
    asked = []

    def ask(deployment, family, children, *rest):
        asked.append({child.work: child.name for child in children})
        raise InterruptedError  # the night is lost before any of its drives has begun

    monkeypatch.setattr(reconstruct_collection, "run_children", ask)
    for drive in ("24/drive1", "24/drive2", "25/drive1"):
        (tmp_path / "logs" / drive).mkdir(parents=True)
        write_video(tmp_path / "logs" / drive / "front.mp4", moving_squares(4))
        with pytest.raises(InterruptedError):
            reconstruct_collection.reconstruct_collection.fn(
                f"{tmp_path}/logs/*/*", f"{tmp_path}/out", spread="deployments"
            )
    first, second, third = asked
    assert first.items() <= second.items() <= third.items()
    assert sorted(third.values()) == ["25_drive1", "drive1", "drive2"]


@pytest.fixture
def nightly(prefect_server, tmp_path, monkeypatch) -> DeploymentResponse:
    """What the server has of the collections' deployment, as `ttt3r serve` offers it."""
    monkeypatch.chdir(tmp_path)
    offered = local_deployments("logs/", "s3://results/nightly", "0 3 * * *")
    for deployment in offered:
        deployment.apply()
    with get_client(sync_client=True) as client:
        return client.read_deployment_by_name("reconstruct-collection/local")


def test_serve_offers_a_schedule_whose_runs_know_collection_and_output(nightly, tmp_path):
    wanted = {"collection": str(tmp_path / "logs"), "output": "s3://results/nightly"}
    assert nightly.parameters == wanted
    assert [(s.schedule.cron, s.active) for s in nightly.schedules] == [("0 3 * * *", True)]
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(nightly.id)
        client.delete_flow_run(run.id)
    assert run.parameters == wanted
    with get_client(sync_client=True) as client:
        single = client.read_deployment_by_name("reconstruct-drive/local")
    assert single.parameters == {"output": wanted["output"]}


def test_the_server_schedules_runs(nightly):
    with get_client(sync_client=True) as client:
        client.request("POST", "/deployments/{id}/schedule", path_params={"id": nightly.id})
        own = DeploymentFilter(id=DeploymentFilterId(any_=[nightly.id]))
        runs = client.read_flow_runs(deployment_filter=own)
    assert runs
    assert all(run.parameters == nightly.parameters for run in runs)


@pytest.mark.parametrize(("given", "wanted"), [(None, "30"), ("60", "60")])
def test_runs_of_serve_give_a_heartbeat_before_automations_miss_it(monkeypatch, given, wanted):
    found = []
    for name in ("PREFECT_API_URL", "PREFECT_LOGGING_LEVEL", "PREFECT_LOGGING_EXTRA_LOGGERS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # restored after the test
    heartbeat = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
    monkeypatch.setenv(heartbeat, given or "")
    if given is None:
        monkeypatch.delenv(heartbeat)
    monkeypatch.setattr(prefect, "serve", lambda *offered: found.append(os.environ.get(heartbeat)))
    monkeypatch.setattr(sys, "argv", ["ttt3r", "serve"])
    with pytest.raises(SystemExit):
        main()
    assert found == [wanted]
