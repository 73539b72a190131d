"""Figures of a store cost what is in it, not what its plan promises."""

import tracemalloc

import pytest

from storage.reconstruction import ReconstructionStore
from storage.records import MOST_FRAMES, Plan, Segment
from tasks.summary import progress


@pytest.fixture
def store(tmp_path) -> ReconstructionStore:
    """A plan of two segments, the first of 2^24 - 4 chunks."""
    first = Segment(0, 0, MOST_FRAMES - 4, 0)
    segments = (first, Segment(1, MOST_FRAMES - 4, MOST_FRAMES, 1))
    plan = Plan(MOST_FRAMES, 1, segments).to_json()
    return ReconstructionStore.create(tmp_path / "drive.zarr", {"plan": plan})


def test_progress_of_a_plan_of_millions_of_chunks_takes_no_memory(store):
    for name in ("infer/0000/0007", "infer/0001/0003", "infer/0001/0004", "infer/0002/0000"):
        store.commit(name, {"key": "key"})
    store.commit("infer/0000/7", {"key": "named otherwise"})
    tracemalloc.start()
    try:
        found = progress(store.url)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert (found["chunks"], found["chunks_done"]) == (MOST_FRAMES, 2)


def test_segments_that_are_set_aside_are_listed_and_not_counted(store):
    store.commit("aside/0000", {"reason": "x" * 2**20, "attempts": 1})
    store.commit("aside/x", {"reason": "none of ours"})
    found = progress(store.url)
    assert (found["chunks"], found["set_aside"]) == (4, [0])
