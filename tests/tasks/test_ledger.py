"""Attempts and the ledger made of them, on real stores."""

import ctypes
import os
import time
from pathlib import Path

import pytest

from storage.reconstruction import ReconstructionStore
from tasks import attempts
from tasks.attempts import attempt_id, counted, note
from tasks.ledger import Usage, main_device, observed, spent_on
from tasks.rates import fit_rates


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

    began = time.monotonic()

    @counted("infer")
    def stage(url: str) -> None:
        opened, seen = ReconstructionStore.open(url), []
        while len(seen) < 3:  # it is kept up to date
            found = list(opened.commits("attempts").values())
            if found and found[0] not in seen:
                seen += found
        assert {record["outcome"] for record in seen} == {"running"}
        seconds = [record["seconds"] for record in seen]
        assert 0 < seconds[-1] <= time.monotonic() - began
        assert seconds == sorted(set(seconds))

    stage(store.url)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's allocator only")
def test_memory_that_a_stage_frees_between_blocks_in_use_goes_back_while_it_runs(store):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @counted("fuse")
    def stage(url: str) -> None:
        blocks = [b"x" * 60_000 for _ in range(2_000)]
        full = resident()
        blocks[:] = blocks[::50]
        give_up = time.monotonic() + 60
        while resident() > full - 80_000_000:
            assert time.monotonic() < give_up, f"{full - resident()} bytes of 117 MB went back"
            time.sleep(0.05)

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


def test_batches_of_tiles_that_an_attempt_has_fused_are_not_lost_with_it(store):
    for batch in range(3):
        store.commit(f"fuse/{batch:04d}", {"key": "k", "attempt": "f1", "seconds": 10.0})
    record(store, "fuse", "f1", "interrupted", 35.0)
    assert spent_on(store).lost == {"fuse": pytest.approx(5.0)}


def test_of_what_several_processes_did_at_once_each_second_counts_once(store):
    for chunk in range(10):
        made = {"key": "k", "attempt": "i1", "infer_seconds": 10.0}
        store.commit(f"infer/0000/{chunk:04d}", made)
    record(store, "infer", "i1", "running", 60.0)
    helped = store.read_commit("attempts/infer-i1")
    store.commit("attempts/infer-i1", {**helped, "processes": 2})
    assert spent_on(store).lost == {"infer": pytest.approx(10.0)}


def test_seconds_are_known_by_kind_of_device(store):
    def infer(attempt: str, kind: str | None, outcome: str, seconds: float) -> None:
        own = {} if kind is None else {"device_kind": kind}
        record = {"outcome": outcome, "seconds": seconds, "cpu_seconds": 1.0, **own}
        store.commit(f"attempts/infer-{attempt}", record)

    def chunk(index: int, attempt: str, kind: str) -> None:
        facts = {"attempt": attempt, "device_kind": kind, "frames_inferred": 32}
        store.commit(f"infer/0000/{index:04d}", {"key": "k", "infer_seconds": 4.0, **facts})

    infer("a1", "A10G", "done", 10.0)
    chunk(0, "a1", "A10G")
    infer("b1", "L4", "running", 30.0)  # killed after two chunks
    chunk(1, "b1", "L4")
    chunk(2, "b1", "L4")
    infer("c1", None, "failed", 3.0)  # before it had a device
    infer("d1", "L40S", "failed", 5.0)  # all of it is lost
    spent = spent_on(store)
    assert spent.device_seconds == {"A10G": 10.0, "L4": 33.0, "L40S": 5.0}
    assert spent.device_lost == {"A10G": 0.0, "L4": 25.0, "L40S": 5.0}
    assert spent.device_frames == {"A10G": 32, "L4": 64}
    assert main_device(spent) == "L4"


LEDGER_2 = {  # as it was written before seconds were kept by kind of device
    "drive": "a",
    "device_kind": "NVIDIA A10G, NVIDIA L4",
    "frames": 100,
    "frames_inferred": 125,
    "megapixels": 25.0,
    "segments": 16,
    "seconds": {"probe": 4.0, "infer": 50.0},
    "lost_seconds": {"infer": 10.0},
    "used": {"gpu_hours": 50 / 3600, "cpu_hours": 4 / 3600, "stored_bytes": 1000},
}


def test_rates_learn_from_each_kind_of_device_what_it_did():
    devices = {
        "NVIDIA A10G": {"seconds": 20.0, "lost_seconds": 10.0, "frames_inferred": 25},
        "NVIDIA L4": {"seconds": 30.0, "lost_seconds": 0.0, "frames_inferred": 100},
        "NVIDIA L40S": {"seconds": 7.0, "lost_seconds": 7.0, "frames_inferred": 0},
    }
    a10g, l4 = observed({**LEDGER_2, "device_kind": "NVIDIA L4", "devices": devices})
    assert (a10g.device_kind, a10g.amounts["infer"], a10g.lost_share) == ("NVIDIA A10G", 10.0, 0.5)
    assert (l4.device_kind, l4.amounts["infer"], l4.lost_share) == ("NVIDIA L4", 30.0, 0.0)
    for seen, frames in ((a10g, 25), (l4, 100)):
        assert seen.amounts["probe"] == 4.0
        rates = fit_rates([seen])
        whole = rates.predict(seen.work)
        # The prior says that 5 % of what a kind took are fixed; the rest grows to all frames.
        expected = seen.amounts["infer"] * (0.05 + 0.95 * 125 / frames)
        assert whole["infer"] == pytest.approx(expected)
        assert whole["probe"] == pytest.approx(4.0)


def test_ledgers_of_earlier_versions_are_read():
    (seen,) = observed({**LEDGER_2, "device_kind": "cpu"})
    assert (seen.device_kind, seen.amounts["infer"], seen.lost_share) == ("cpu", 40.0, 0.2)
    kinds = [seen.device_kind for seen in observed(LEDGER_2)]
    assert kinds == ["NVIDIA A10G", "NVIDIA L4"]
    first = {name: LEDGER_2[name] for name in ("drive", "device_kind", "frames", "seconds")}
    assert observed(first) == []


def test_usage_adds_up_and_stays_unknown_where_a_part_is():
    assert Usage(1.0, 2.0, 3.0) + Usage(1.0, 1.0, 1.0) == Usage(2.0, 3.0, 4.0)
    assert Usage(1.0, None, 3.0) + Usage(1.0, 1.0, 1.0) == Usage(2.0, None, 4.0)
    assert Usage(1.0, None, 3.0).per(2.0) == {
        "gpu_hours": 0.5,
        "cpu_hours": None,
        "stored_bytes": 1.5,
    }
    assert Usage(1.0, 2.0, 3.0).per(0.0) is None
