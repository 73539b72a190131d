"""What a day in miniature counts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from campaigns.day import Day, Drive, judge
from campaigns.small_runs import stored_objects

from storage.reconstruction import ReconstructionStore
from storage.records import Plan, Segment

STAGES = ("probe", "plan", "infer/0000/0000", "align", "fuse/merged", "report")


def finish(url: Path, mesh: bytes) -> None:
    """Leave what a finished drive leaves, as far as it is judged."""
    plan = Plan(8, 8, (Segment(0, 0, 8, 0),))
    store = ReconstructionStore.create(url, {"plan": plan.to_json()})
    store.put_file("fusion/mesh.ply", mesh)
    for stage in STAGES:
        store.commit(stage, {"key": "k"})


def test_finished_counts_only_drives_that_were_compared(tmp_path):
    finish(tmp_path / "undisturbed.zarr", b"mesh")
    expected = {"good 0": stored_objects(str(tmp_path / "undisturbed.zarr"))}
    meshes = {"same": b"mesh", "other": b"another mesh", "broken": b"any mesh"}
    kinds = {"same": "good 0", "other": "good 0", "broken": "damaged", "gone": "empty"}
    for name, mesh in meshes.items():
        finish(tmp_path / f"{name}.zarr", mesh)
    ReconstructionStore.create(tmp_path / "gone.zarr", {}).commit("failed", {"error": "no frame"})
    day = Day("here")
    judge(day, [Drive(name, 0, kind) for name, kind in kinds.items()], str(tmp_path), expected)
    assert (day.finished, day.finished_damaged, day.failed) == (2, 1, {"empty": 1})
    assert day.wrong == ["other (good 0) differs from an undisturbed run"]
