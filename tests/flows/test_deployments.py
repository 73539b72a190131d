"""What `deploy/` promises to Prefect is what the flows are."""

from pathlib import Path

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint

from flows import fuse_tiles, infer_segments, reconstruct_collection
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
