"""Claims: one worker at a time, whoever died before."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_segment import SEGMENT, SHAPE, chunk_arrays

from storage import claims
from storage.errors import ChunkMissing, Claimed, ClaimLost, CommitExists
from storage.reconstruction import ReconstructionStore

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from storage.reconstruction import ReconstructionStore
with ReconstructionStore.open(sys.argv[1]).claim("drive", 3):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def store(output_url: str) -> ReconstructionStore:
    return ReconstructionStore.create(f"{output_url}/drive.zarr", {})


def start_holder(store: ReconstructionStore) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLDER, store.url]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_claim_of_a_living_worker_is_refused_and_of_another_name_is_not(store):
    other = ReconstructionStore.open(store.url)
    with store.claim("infer/0000"):
        with (
            pytest.raises(
                Claimed, match=f"'infer/0000' is being worked on by process {os.getpid()}"
            ),
            other.claim("infer/0000"),
        ):
            pass
        with other.claim("infer/0001"):
            pass
    with other.claim("infer/0000") as claim:
        assert claim.deaths == 0


def test_claim_of_a_killed_process_is_taken_over_at_once_and_its_deaths_are_counted(tmp_path):
    store = ReconstructionStore.create(tmp_path / "drive.zarr", {})
    for _ in range(2):
        holder = start_holder(store)
        with pytest.raises(Claimed, match=f"process {holder.pid}"), store.claim("drive", 3):
            pass
        kill(holder)
    with store.claim("drive", 3) as claim:
        assert claim.deaths == 2
    kill(start_holder(store))
    with store.claim("drive", 4) as claim:  # it got on
        assert claim.deaths == 0


def kill(holder: "subprocess.Popen[str]") -> None:
    holder.kill()
    holder.communicate()


def test_claim_of_another_machine_is_taken_over_when_it_is_not_renewed(store, monkeypatch):
    monkeypatch.setattr(claims, "LEASE_S", 1.0)
    monkeypatch.setattr(claims, "RENEW_S", 0.2)
    monkeypatch.setattr(claims, "WATCH_S", 0.1)
    monkeypatch.setattr(claims, "_machine", lambda: "elsewhere")
    there = ReconstructionStore.open(store.url)
    with there.claim("drive") as lost:
        monkeypatch.setattr(claims, "_machine", lambda: "here")
        with pytest.raises(Claimed), store.claim("drive"):
            pass  # it renews
        lost._stop.set()  # as if the machine stood still
        with store.claim("drive") as mine:
            assert mine.deaths == 1
            mine.check()
            with pytest.raises(ClaimLost, match="'drive' was lost"):
                lost.check()
    with store.claim("drive"):
        pass  # the loser left the winner's claim alone, and the winner gave it up


def test_chunk_is_not_written_after_the_claim_on_its_segment_is_lost(store, monkeypatch):
    store.create_segment(SEGMENT, 4, **SHAPE)
    chunk = SEGMENT.chunks(4)[0]
    with store.claim("infer/0000"):
        store.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 1.0))
        monkeypatch.setattr(claims, "LEASE_S", 0.02)
        time.sleep(0.05)
        with pytest.raises(ClaimLost):
            store.commit_chunk(SEGMENT, chunk, {"key": "key"})
        with pytest.raises(ClaimLost):
            store.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 2.0))
    assert store.commit_names("infer") == []


def test_two_writers_of_one_chunk_without_claims_leave_it_unfinished_rather_than_mixed(store):
    store.create_segment(SEGMENT, 4, **SHAPE)
    chunk, other = SEGMENT.chunks(4)[0], ReconstructionStore.open(store.url)
    store.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 1.0))
    other.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 2.0))
    store.commit_chunk(SEGMENT, chunk, {"key": "key"})  # vouches for the bytes of the other
    with pytest.raises(CommitExists):
        other.commit_chunk(SEGMENT, chunk, {"key": "key"})
    with pytest.raises(ChunkMissing):
        store.read(SEGMENT, "depth", chunk.start, chunk.stop)
