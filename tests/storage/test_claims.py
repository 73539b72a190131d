"""Claims: one worker at a time, whoever died before."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from small_segment import SEGMENT, SHAPE, chunk_arrays

from storage import claims, upkeep
from storage.errors import ChunkMissing, Claimed, ClaimLost, CommitExists, DataDamaged, GivenUp
from storage.folders import open_folder
from storage.reconstruction import ReconstructionStore

ROOT = Path(__file__).resolve().parents[2]
PID = str(os.getpid()).encode()
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


NAMES = [f"infer/{number:04d}" for number in range(16)]


def leave_claims(store: ReconstructionStore, names: list[str]) -> dict[str, bytes]:
    """What a machine leaves that is lost: claims that nobody renews."""
    record = b'{"machine": "lost", "none of ours": NaN}'
    left = {f"claims/{name}/000001.json": record for name in names}
    store.folder.write_many(left)
    return left


def all_claims(store: ReconstructionStore) -> None:
    with store.claims(dict.fromkeys(NAMES, 0)) as taken:
        assert list(taken) == NAMES
        for claim in taken.values():
            claim.check()


# All of them wait in the same way, for seconds.
@pytest.mark.parametrize(
    ("output_url", "act"),
    [
        ("local", all_claims),
        ("local", upkeep.repair),
        ("local", lambda store: upkeep.delete_garbage(store, 0.0)),
        ("s3", all_claims),
    ],
    indirect=["output_url"],
)
def test_all_claims_of_a_lost_machine_are_waited_for_at_the_same_time(store, monkeypatch, act):
    monkeypatch.setattr(claims, "LEASE_S", 3.0)
    monkeypatch.setattr(claims, "WATCH_S", 0.1)
    leave_claims(store, NAMES)
    began = time.monotonic()
    act(store)
    assert 3 < time.monotonic() - began < 11  # four at a time: 12
    assert store.folder.sizes("claims").keys() == {"claims/zarr.json"}


def test_none_of_several_claims_is_kept_where_one_is_of_a_living_worker(store):
    other = ReconstructionStore.open(store.url)
    with (
        store.claim(NAMES[7]),
        pytest.raises(Claimed, match=f"'{NAMES[7]}' is being worked on"),
        other.claims(dict.fromkeys(NAMES, 0)),
    ):
        pass
    all_claims(other)


def test_waiting_for_a_lost_machine_can_be_given_up(store):
    left, given_up = leave_claims(store, NAMES[:2]), threading.Event()
    threading.Timer(0.3, given_up.set).start()
    with (
        pytest.raises(GivenUp, match=f"the claims on '{NAMES[0]}', '{NAMES[1]}'"),
        store.claims(dict.fromkeys(NAMES, 0), given_up),
    ):
        pass
    assert store.folder.sizes("claims").keys() == {"claims/zarr.json", *left}


@pytest.mark.parametrize(
    "record",
    [
        b"[" * 100_000,
        b"\xff",
        b"[1]",
        b'{"progress": 0, "deaths": "x"}',
        b'{"progress": 0, "deaths": Infinity}',
        b'{"machine": "here"}',
        b'{"machine": "here", "pid": "../../etc", "started": "1"}',
        b'{"machine": "here", "pid": %d, "started": "", "token": []}',
    ],
)
def test_claim_that_is_none_of_ours_is_taken_over(store, monkeypatch, record):
    monkeypatch.setattr(claims, "LEASE_S", 1.0)
    monkeypatch.setattr(claims, "WATCH_S", 0.1)
    monkeypatch.setattr(claims, "_machine", lambda: "here")
    monkeypatch.setattr(claims, "_start_of", lambda _: "")
    open_folder(store.url).write("claims/drive/000001.json", record.replace(b"%d", PID))
    with store.claim("drive") as claim:
        assert claim.deaths <= 1
    assert upkeep.repair(store) == []


def test_no_worker_is_let_in_unseen_after_the_last_of_all_numbers(store, monkeypatch):
    monkeypatch.setattr(claims, "LEASE_S", 1.0)
    monkeypatch.setattr(claims, "WATCH_S", 0.1)
    folder = open_folder(store.url)
    folder.write("claims/drive/999998.json", b"{}")
    with store.claim("drive"), pytest.raises(Claimed), store.claim("drive"):
        pass
    folder.write("claims/drive/999999.json", b"{}")
    with (
        pytest.raises(DataDamaged, match=r"remove claims/drive/999999\.json"),
        store.claim("drive"),
    ):
        pass
    folder.delete("claims/drive/999999.json")
    with store.claim("drive"):
        pass


@pytest.mark.parametrize("name", ["00000\u00b2.json", "00000\u0663.json", "000001.data"])
def test_object_that_is_not_named_like_a_claim_is_none(store, name):
    open_folder(store.url).write(f"claims/drive/{name}", b"{}")
    with store.claim("drive") as claim:
        assert claim.deaths == 0
    assert upkeep.repair(store) == []


def test_claim_below_another_is_no_claim_on_that(store, monkeypatch):
    monkeypatch.setattr(claims, "WATCH_S", 0.1)
    open_folder(store.url).write("claims/tiles/0000/000007.json", b"{}")
    with store.claim("tiles") as claim:
        assert claim.deaths == 0
        claim.check()
    assert open_folder(store.url).sizes("claims/tiles").keys() == {"claims/tiles/0000/000007.json"}


def test_claim_that_is_listed_and_cannot_be_read_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "LEASE_S", 1.0)
    monkeypatch.setattr(claims, "WATCH_S", 0.1)
    store = ReconstructionStore.create(tmp_path / "drive.zarr", {})
    link = tmp_path / "drive.zarr/claims/drive/000001.json"
    link.parent.mkdir(parents=True)
    link.symlink_to("gone")
    with store.claim("drive"):
        assert not link.is_symlink()


def test_chunk_is_not_written_after_the_claim_on_its_segment_is_lost(store):
    store.create_segment(SEGMENT, 4, **SHAPE)
    chunk = SEGMENT.chunks(4)[0]
    with store.claim("infer/0000"):
        store.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 1.0))
        store.folder.delete_tree("claims/infer/0000")
        with pytest.raises(ClaimLost):
            store.commit_chunk(SEGMENT, chunk, {"key": "key"})
        with pytest.raises(ClaimLost):
            store.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 2.0))
    assert store.commit_names("infer") == []


def test_claim_that_could_not_be_renewed_is_taken_again_unless_another_worker_has(
    store, monkeypatch
):
    monkeypatch.setattr(claims, "WATCH_S", 0.1)
    monkeypatch.setattr(claims, "_machine", lambda: "elsewhere")
    there = ReconstructionStore.open(store.url)
    with there.claim("drive") as claim:
        claim._renewed -= claims.LEASE_S  # the store was away
        claim.check()
        claim._renewed -= claims.LEASE_S
        claim._renew()  # as its thread does when the store is back
        assert there.folder.sizes("claims/drive").keys() == {"claims/drive/000003.json"}
        monkeypatch.setattr(claims, "LEASE_S", 0.5)
        monkeypatch.setattr(claims, "_machine", lambda: "here")
        with store.claim("drive") as other:
            claim._renewed -= claims.LEASE_S
            with pytest.raises(ClaimLost):
                claim.check()
            other.check()


@pytest.fixture
def overtaken(store, monkeypatch):
    """A claim whose holder stood still right after its last check, and was replaced meanwhile."""
    for name, seconds in (("LEASE_S", 0.4), ("RENEW_S", 300.0), ("WATCH_S", 0.05)):
        monkeypatch.setattr(claims, name, seconds)
    monkeypatch.setattr(claims, "_machine", lambda: "elsewhere")
    frozen = ReconstructionStore.open(store.url)
    with frozen.claim("infer/0000") as lost:
        check, stale = lost.check, ["one check that passes"]
        monkeypatch.setattr(lost, "check", lambda: stale.pop() if stale else check())
        monkeypatch.setattr(claims, "_machine", lambda: "here")
        with store.claim("infer/0000"):
            monkeypatch.setattr(claims, "LEASE_S", 300.0)
            yield frozen
        monkeypatch.setattr(claims, "LEASE_S", 0.0)


@pytest.mark.parametrize("left", [False, True])
def test_writer_that_stood_still_does_not_overwrite_the_chunk_of_its_successor(
    store, overtaken, left
):
    store.create_segment(SEGMENT, 4, **SHAPE)
    chunk = SEGMENT.chunks(4)[0]
    if left:  # of an attempt that was killed before it committed
        store.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 3.0))
    store.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 1.0))
    store.commit_chunk(SEGMENT, chunk, {"key": "key"})
    with pytest.raises((ClaimLost, CommitExists)):
        overtaken.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 2.0))
    assert upkeep.verify(store) == []
    assert store.read(SEGMENT, "depth", chunk.start, chunk.stop).max() == 1.0


def test_writer_that_stood_still_does_not_remove_the_segment_of_its_successor(store, overtaken):
    store.create_segment(SEGMENT, 8, **SHAPE)
    chunk = SEGMENT.chunks(8)[0]
    store.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 1.0))
    store.commit_chunk(SEGMENT, chunk, {"key": "key"})
    # Before it stood still there was nothing of the segment.
    overtaken._segment_layout = lambda segment: None
    overtaken.folder.sizes = lambda prefix: {}
    read, group = overtaken.folder.read, "segments/0000/zarr.json"
    overtaken.folder.read = lambda name, *rest: None if name == group else read(name, *rest)
    with pytest.raises(CommitExists, match="another worker created segments/0000"):
        overtaken.create_segment(SEGMENT, 8, **SHAPE)
    assert upkeep.verify(store) == []
    assert store.is_chunk_done(SEGMENT, chunk, "key")


def test_commit_of_another_worker_stands_when_its_data_are_what_is_stored(store):
    store.create_segment(SEGMENT, 4, **SHAPE)
    chunk, other = SEGMENT.chunks(4)[0], ReconstructionStore.open(store.url)
    store.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 1.0))
    other.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 2.0))
    other.commit_chunk(SEGMENT, chunk, {"key": "key"})
    with pytest.raises(CommitExists):
        store.commit_chunk(SEGMENT, chunk, {"key": "key"})
    assert store.read(SEGMENT, "depth", chunk.start, chunk.stop).max() == 2.0


def test_other_commits_of_a_round_stand_where_another_worker_was_first_with_one(store):
    store.create_segment(SEGMENT, 4, **SHAPE)
    chunks, other = SEGMENT.chunks(4), ReconstructionStore.open(store.url)
    for chunk in chunks:
        store.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 1.0))
    other.write_chunk(SEGMENT, chunks[1], chunk_arrays(chunks[1], 2.0))
    other.commit_chunk(SEGMENT, chunks[1], {"key": "other"})
    with pytest.raises(CommitExists, match="infer/0000/0001"):
        store.commit_chunks([(SEGMENT, chunk, {"key": "key"}) for chunk in chunks])
    keys = [record["key"] for record in store.commits("infer").values()]
    assert keys == ["key", "other", *["key"] * (len(chunks) - 2)]
    assert upkeep.verify(store) == []


def test_claim_given_up_and_taken_anew_while_it_was_watched_is_not_taken_from_its_holder(
    store, monkeypatch
):
    third = ReconstructionStore.open(store.url)
    late = ReconstructionStore.open(store.url)
    with store.claim("drive") as first:
        dead = store.folder.read(first._object)
    store.folder.write("claims/drive/000001.json", dead)  # as a killed holder leaves it
    seen = late.folder.write_new
    held = []

    def slow_write(name, data):
        with third.claim("drive"), third.claim("other"):  # takes it over and gives it up
            pass
        held.append(third.claim("drive"))
        held[0].__enter__()
        monkeypatch.undo()
        seen(name, data)

    monkeypatch.setattr(late.folder, "write_new", slow_write)
    with pytest.raises(Claimed), late.claim("drive"):
        pass
    third._claims["drive"].check()
    held[0].__exit__(None, None, None)


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


def test_run_that_lost_its_drive_writes_nothing_of_the_whole_drive_through_any_object(store):
    """As a probe that stood still for long: the store that it opened itself knows no claim."""
    there = ReconstructionStore.open(store.url)
    frames = {n: np.zeros(3, t) for n, t in (("timestamp", float), ("clip", int), ("index", int))}
    frames["flags"] = np.zeros(3, np.uint8)
    with store.claim("drive"):
        there.write_frames(**frames)
        there.commit("probe", {"key": "ours"})
        take_over(store, "drive")
        for write in (
            lambda: there.write_frames(**frames),
            lambda: there.write_trajectory({}),
            lambda: there.commit("plan", {"key": "ours"}),
            lambda: there.drop_commits("probe"),
            lambda: there.update_attributes({"plan": {}}),
            lambda: there.remove_segment(0),
            lambda: there.put_file("report/report.html", b""),
            lambda: there.delete_files("fusion/"),
        ):
            with pytest.raises(ClaimLost):
                write()
    assert there.read_commit("probe")["key"] == "ours"


def take_over(store: ReconstructionStore, name: str) -> None:
    """What a worker on another machine does that found no sign of life."""
    folder = open_folder(store.url)
    (mine,) = [n for n in folder.sizes(f"claims/{name}")]
    folder.write_new(mine.replace("000001", "000002"), b'{"token": "another"}')
    folder.delete(mine)


@pytest.mark.parametrize("other_data", [False, True])
def test_void_commit_of_an_earlier_creation_does_not_stop_the_chunk(store, other_data):
    chunk, late = SEGMENT.chunks(4)[0], ReconstructionStore.open(store.url)
    store.create_segment(SEGMENT, 4, **SHAPE)
    late.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 2.0))
    store.remove_segment(SEGMENT.index)
    store.create_segment(SEGMENT, 4, **SHAPE)
    late.commit("infer/0000/0000", {"key": "key"})  # what stood still arrives
    if other_data:
        store.write_encoded([late.encode_chunk(SEGMENT, chunk, chunk_arrays(chunk, 2.0))])
        late.commit("infer/0000/0000", {"key": "key", "creation": "earlier"})
    with store.claim("infer/0000"):
        assert not store.is_chunk_done(SEGMENT, chunk, "key")
        store.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 1.0))
        store.commit_chunk(SEGMENT, chunk, {"key": "key"})
    assert store.read(SEGMENT, "depth", chunk.start, chunk.stop).max() == 1.0


def test_late_commit_does_not_take_back_that_of_the_segment_made_anew(store):
    chunk, late = SEGMENT.chunks(4)[0], ReconstructionStore.open(store.url)
    store.create_segment(SEGMENT, 4, **SHAPE)
    late.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 2.0))
    store.remove_segment(SEGMENT.index)
    store.create_segment(SEGMENT, 4, **SHAPE)
    store.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 1.0))
    store.commit_chunk(SEGMENT, chunk, {"key": "key"})
    with pytest.raises(CommitExists):
        late.commit_chunk(SEGMENT, chunk, {"key": "key"})
    assert store.is_chunk_done(SEGMENT, chunk, "key")
