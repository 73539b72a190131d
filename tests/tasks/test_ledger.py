"""Attempts and the ledger made of them, on real stores."""

import time

import pytest

from storage.reconstruction import ReconstructionStore
from tasks import attempts
from tasks.attempts import attempt_id, counted, note
from tasks.ledger import Usage, spent_on


@pytest.fixture
def store(tmp_path):
    return ReconstructionStore.create(tmp_path / "a.zarr", {})


def record(store, stage: str, name: str, outcome: str, seconds: float) -> None:
    times = {"outcome": outcome, "seconds": seconds, "cpu_seconds": 2 * seconds}
    store.commit(f"attempts/{stage}-{name}", times)


def test_a_stage_records_what_it_took_and_what_it_noted(store):
    @counted("align")
    def stage(url: str) -> int:
        note(device_kind="cpu")
        time.sleep(0.05)
        ReconstructionStore.open(url).commit("align", {"key": "k", "attempt": attempt_id()})
        return 7

    assert stage(store.url) == 7
    (name,) = store.commit_names("attempts")
    found = store.read_commit(name)
    assert name == f"attempts/align-{store.read_commit('align')['attempt']}"
    assert (found["outcome"], found["device_kind"]) == ("done", "cpu")
    assert found["seconds"] >= 0.05
    assert spent_on(store).seconds["align"] == found["seconds"]
    assert attempt_id() is None


def test_a_stage_that_finds_nothing_to_do_records_nothing(store):
    counted("align")(lambda url: None)(store.url)
    assert store.commit_names("attempts") == []


def test_failures_and_interruptions_are_recorded_unless_they_came_at_once(store, monkeypatch):
    @counted("infer")
    def stage(url: str, error: BaseException) -> None:
        raise error

    with pytest.raises(ValueError, match="at once"):
        stage(store.url, ValueError("at once"))
    assert store.commit_names("attempts") == []
    monkeypatch.setattr(attempts, "SHORTEST_FAILURE_S", 0.0)
    with pytest.raises(ValueError, match="late"):
        stage(store.url, ValueError("late"))
    with pytest.raises(KeyboardInterrupt):
        stage(store.url, KeyboardInterrupt())
    outcomes = [found["outcome"] for found in store.commits("attempts").values()]
    assert sorted(outcomes) == ["failed", "interrupted"]


def test_a_killed_attempt_is_known_to_its_last_heartbeat(store, monkeypatch):
    monkeypatch.setattr(attempts, "HEARTBEAT_S", 0.02)

    @counted("infer")
    def stage(url: str) -> None:
        time.sleep(0.5)
        (found,) = ReconstructionStore.open(url).commits("attempts").values()
        assert found["outcome"] == "running"
        assert 0 < found["seconds"] < 0.6

    stage(store.url)


def test_lost_is_what_no_commit_accounts_for_and_replaced_what_none_refers_to(store):
    store.commit("probe", {"key": "k", "attempt": "p2"})
    record(store, "probe", "p1", "done", 5.0)  # of a recording that was changed
    record(store, "probe", "p2", "done", 6.0)
    seconds = {"infer_seconds": 2.0, "wait_seconds": 0.5, "stall_seconds": 0.5}
    for chunk in range(2):
        store.commit(f"infer/0000/{chunk:04d}", {"key": "k", "attempt": "i1", **seconds})
    store.commit("infer/0000/0002", {"key": "k", "attempt": "i3", **seconds})
    record(store, "infer", "i1", "running", 20.0)  # killed after two chunks
    record(store, "infer", "i2", "failed", 4.0)
    record(store, "infer", "i3", "done", 9.0)
    spent = spent_on(store)
    assert spent.seconds == {"probe": 6.0, "infer": 33.0}
    assert spent.cpu_seconds == {"probe": 12.0, "infer": 66.0}
    assert spent.lost == {"infer": pytest.approx(20.0 - 6.0 + 4.0)}
    assert spent.replaced == {"probe": 5.0}


def test_usage_adds_up_and_stays_unknown_where_a_part_is():
    assert Usage(1.0, 2.0, 3.0) + Usage(1.0, 1.0, 1.0) == Usage(2.0, 3.0, 4.0)
    assert Usage(1.0, None, 3.0) + Usage(1.0, 1.0, 1.0) == Usage(2.0, None, 4.0)
    assert Usage(1.0, None, 3.0).per(2.0) == {
        "gpu_hours": 0.5,
        "cpu_hours": None,
        "stored_bytes": 1.5,
    }
    assert Usage(1.0, 2.0, 3.0).per(0.0) is None
