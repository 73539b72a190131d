"""What a day in miniature counts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from campaigns.day import (
    LARGEST_GROWTH,
    LEAST_DRIVES,
    Day,
    Drive,
    growth_in_words,
    judge,
    judge_memory,
)
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


def sampled(drives: int, growth: float) -> Day:
    """A day whose flow process grew so many MiB for 100 drives."""
    return Day("here", drives, memory={"flow process": [(n, n * growth / 100) for n in range(99)]})


def test_memory_that_grows_is_wrong_in_a_day_that_is_judged():
    long, short, steady = (
        sampled(LEAST_DRIVES, 2 * LARGEST_GROWTH),
        sampled(LEAST_DRIVES - 1, 2 * LARGEST_GROWTH),
        sampled(LEAST_DRIVES, LARGEST_GROWTH / 2),
    )
    for day in (long, short, steady):
        judge_memory(day, ["flow process"])
    assert long.wrong == ["memory of the flow process grows by 30.0 MiB for 100 drives"]
    assert (short.wrong, steady.wrong) == ([], [])
    assert "+30.0 (not judged" in growth_in_words(short)
    assert "+7.5 (judged)" in growth_in_words(steady)


def test_memory_that_was_not_sampled_is_wrong_in_a_day_that_is_judged():
    day = sampled(LEAST_DRIVES, 0.0)
    judge_memory(day, ["flow process", "Prefect server"])
    assert day.wrong == ["memory of the Prefect server was not sampled"]
    assert day.growth["Prefect server"] is None
