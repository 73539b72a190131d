"""What a plan learns from the drives under an output."""

from pathlib import Path

import pytest

from storage.reconstruction import ReconstructionStore
from tasks.planner import known_rates
from ttt3r.weights import weights_info


def finish(store: ReconstructionStore, weights: str, kind: str = "cpu") -> None:
    """The ledger of a drive of a hundred frames, each inferred in a second."""
    stages = dict.fromkeys(("probe", "plan", "infer", "align", "fuse", "report"), 100.0)
    record = {
        "drive": store.url.rpartition("/")[2],
        "weights_sha256": weights_info(weights).sha256,
        **dict.fromkeys(("frames", "frames_inferred", "megapixels"), 100),
        "segments": 1,
        "seconds": stages,
        "lost_seconds": {},
        "used": {"stored_bytes": 1000},
        "devices": {kind: {"seconds": 100.0, "lost_seconds": 0.0, "frames_inferred": 100}},
    }
    store.commit("ledger", record)


def begin(output: Path, count: int) -> list[ReconstructionStore]:
    """Stores that are begun."""
    return [ReconstructionStore.create(output / f"{i:03d}.zarr", {}) for i in range(count)]


def test_drives_that_are_finished_are_found_wherever_they_are(tmp_path):
    stores = begin(tmp_path, 101)
    assert known_rates(str(tmp_path), "compact") is None
    for store in stores[:90]:
        finish(store, "untrained")
    for i in (1, 64, 100):
        finish(stores[i], "compact")
    assert known_rates(str(tmp_path), "compact").sources == ("001.zarr", "064.zarr", "100.zarr")


@pytest.mark.parametrize(
    "changes",
    [
        {"weights_sha256": None},
        {"seconds": "x"},
        {"seconds": {"infer": "x"}},
        {"frames": "x"},
        {"frames": None},
        {"megapixels": [1]},
        {"devices": [1]},
        {"devices": {"cpu": {"seconds": 0, "lost_seconds": 1, "frames_inferred": "x"}}},
        {"used": {}},
    ],
)
def test_malformed_ledger_of_a_neighbour_is_passed_over(tmp_path, changes):
    stores = begin(tmp_path, 3)
    for store in stores[:2]:
        finish(store, "compact")
    stores[1].commit("ledger", {**stores[1].read_commit("ledger"), **changes})
    stores[2].commit("ledger", {})
    assert known_rates(str(tmp_path), "compact").sources == ("000.zarr",)


@pytest.mark.parametrize(
    "attempt", [{}, {"device_kind": "cpu"}, {"device_kind": "cpu", "seconds": "x"}]
)
def test_malformed_attempt_of_a_neighbour_is_passed_over(tmp_path, attempt):
    stores = begin(tmp_path, 2)
    finish(stores[0], "compact")
    weights = weights_info("compact").sha256
    stores[1].commit("attempts/infer-0", {**attempt, "weights_sha256": weights})
    assert known_rates(str(tmp_path), "compact").sources == ("000.zarr",)


def test_drives_on_the_device_that_is_asked_for_are_found_among_others(tmp_path):
    stores = begin(tmp_path, 101)
    for store in stores:
        finish(store, "compact", "NVIDIA H100")
    finish(stores[100], "compact")
    assert known_rates(str(tmp_path), "compact", "cpu").sources == ("100.zarr",)
    assert len(known_rates(str(tmp_path), "compact").sources) == 32
