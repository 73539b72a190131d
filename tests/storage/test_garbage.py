"""Garbage: what no commit refers to, and never anything else."""

import os
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from small_segment import SEGMENT, SHAPE, chunk_arrays

from storage import upkeep
from storage.errors import Claimed, ClaimLost
from storage.reconstruction import ReconstructionStore
from storage.records import Segment

CHUNKS = SEGMENT.chunks(4)
PLAN = {"segments": [{"index": 0}]}


def put(store: ReconstructionStore, name: str, data: bytes = b"x") -> None:
    """Write an object behind the store's back."""
    with fsspec.open(f"{store.url}/{name}", "wb", auto_mkdir=True) as file:
        file.write(data)


@pytest.fixture
def store(output_url: str) -> ReconstructionStore:
    """Everything that a finished drive has, all of it referred to."""
    made = ReconstructionStore.create(f"{output_url}/drive.zarr", {"plan": PLAN})
    made.create_segment(SEGMENT, 4, **SHAPE)
    for chunk in CHUNKS:
        made.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 1.0))
        made.commit_chunk(SEGMENT, chunk, {"key": "key"})
    made.write_trajectory({"cam_to_world": np.zeros((46, 4, 4))})
    made.commit("align", {"key": "key"})
    files = {n: made.put_file(n, b"mesh") for n in ("fusion/tiles/a.ply", "fusion/mesh.ply")}
    made.commit("fuse/merged", {"key": "key", "files": files})
    put(made, "notes.txt")
    put(made, "segments/0000/of_a_user/c.0")
    put(made, "segments/0000/depth/c.bak")
    return made


def test_finished_store_has_no_garbage(store):
    assert upkeep.list_garbage(store, 0) == {}


def test_only_what_no_commit_refers_to_is_listed_and_removed(store):
    store.drop_commits("infer/0000/0003")
    store.create_segment(Segment(1, 40, 46, 0), 4, **SHAPE)  # a plan before had it
    store.put_file("fusion/tiles/old.ply", b"superseded")
    store.put_file("report/report.html", b"not committed")
    found = upkeep.list_garbage(store, 0)
    dropped = {n for n in found if n.startswith("segments/0000")}
    assert len(dropped) == 9
    assert all("/c.3" in name for name in dropped)
    others = {n for n in found if not n.startswith("segments/")}
    assert others == {"fusion/tiles/old.ply", "report/report.html"}
    assert {n.split("/")[1] for n in found if n.startswith("segments/")} == {"0000", "0001"}
    assert upkeep.delete_garbage(store, 0) == found
    reopened = ReconstructionStore.open(store.url)
    assert upkeep.list_garbage(reopened, 0) == {}
    assert upkeep.verify(reopened) == []
    assert len(reopened.commit_names("infer")) == len(CHUNKS) - 1
    for name in ("notes.txt", "segments/0000/of_a_user/c.0", "segments/0000/depth/c.bak"):
        assert fsspec.open(f"{store.url}/{name}").open().read() == b"x"
    # The dropped chunk can be computed again.
    store.write_chunk(SEGMENT, CHUNKS[3], chunk_arrays(CHUNKS[3], 1.0))
    store.commit_chunk(SEGMENT, CHUNKS[3], {"key": "key"})
    assert store.read(SEGMENT, "depth", 0, 46).shape == (46, 48, 64)


def test_what_an_unfinished_run_just_wrote_is_no_garbage(store):
    store.drop_commits("infer/0000/0003")
    store.write_chunk(SEGMENT, CHUNKS[3], chunk_arrays(CHUNKS[3], 1.0))
    store.put_file("fusion/tiles/new.ply", b"to be committed")
    assert upkeep.list_garbage(store, 3600) == {}
    assert upkeep.delete_garbage(store, 3600) == {}


@pytest.mark.parametrize("name", ["drive", "infer/0000"])
def test_nothing_is_removed_while_a_run_is_at_work(store, name):
    store.put_file("fusion/tiles/old.ply", b"superseded")
    with store.claim(name):
        with pytest.raises(Claimed):
            upkeep.delete_garbage(ReconstructionStore.open(store.url), 0)
        assert "fusion/tiles/old.ply" in upkeep.list_garbage(store, 0)
    assert "fusion/tiles/old.ply" in upkeep.delete_garbage(store, 0)


def test_temporary_files_of_killed_writers_are_garbage_once_they_are_old(tmp_path: Path):
    store = ReconstructionStore.create(tmp_path / "drive.zarr", {"plan": PLAN})
    left = tmp_path / "drive.zarr" / "commits" / ".plan.json.0123.partial"
    left.write_bytes(b"half")
    assert upkeep.list_garbage(store, 60) == {}
    os.utime(left, (time.time() - 120,) * 2)
    assert upkeep.delete_garbage(store, 60) == {"commits/.plan.json.0123.partial": 4}
    assert not left.exists()


def test_files_of_commits_that_do_not_list_them_are_kept(tmp_path: Path):
    store = ReconstructionStore.create(tmp_path / "drive.zarr", {"plan": PLAN})
    store.put_file("fusion/mesh.ply", b"mesh")
    store.commit("fuse/merged", {"key": "of an earlier version"})
    assert upkeep.list_garbage(store, 0) == {}


def test_segment_that_loses_garbage_is_claimed_meanwhile(store, monkeypatch):
    store.drop_commits("infer/0000/0003")
    delete, refused = store.folder.delete, []

    def delete_while_an_orphan_starts(name):
        if name.startswith("segments/"):
            with pytest.raises(Claimed), ReconstructionStore.open(store.url).claim("infer/0000"):
                pass
            refused.append(name)
        delete(name)

    monkeypatch.setattr(store.folder, "delete", delete_while_an_orphan_starts)
    assert list(upkeep.delete_garbage(store, 0)) == refused
    assert len(refused) == 9


def test_chunk_that_an_orphan_finishes_before_its_segment_is_claimed_is_kept(store, monkeypatch):
    store.drop_commits("infer/0000/0003")
    claims = store.claims

    def claim_late(progress):
        if "infer/0000" in progress:
            orphan = ReconstructionStore.open(store.url)
            with orphan.claim("infer/0000"):
                orphan.write_chunk(SEGMENT, CHUNKS[3], chunk_arrays(CHUNKS[3], 1.0))
                orphan.commit_chunk(SEGMENT, CHUNKS[3], {"key": "key"})
        return claims(progress)

    monkeypatch.setattr(store, "claims", claim_late)
    assert upkeep.delete_garbage(store, 0) == {}
    assert upkeep.verify(store) == []


def test_files_of_a_batch_that_begins_after_the_claims_are_kept(store, monkeypatch):
    orphan, listing = ReconstructionStore.open(store.url), upkeep.claimed_names
    for name in ("a", "b"):
        store.put_file(f"fusion/tiles/left_{name}.ply", b"of a killed run")
    batch = orphan.claim("fuse/0000")

    def list_and_begin(folder):
        found = listing(folder)
        batch.__enter__()
        time.sleep(1.1)  # S3 says when an object was written in whole seconds
        for name in ("left_b", "new"):
            orphan.put_file(f"fusion/tiles/{name}.ply", b"to be committed")
        return found

    monkeypatch.setattr(upkeep, "claimed_names", list_and_begin)
    assert list(upkeep.delete_garbage(store, 0)) == ["fusion/tiles/left_a.ply"]
    batch.__exit__(None, None, None)
    assert {"fusion/tiles/left_b.ply", "fusion/tiles/new.ply"} < set(store.list_files("fusion/"))


def test_nothing_more_is_removed_once_the_claim_is_lost(store, monkeypatch):
    store.drop_commits("infer/0000/0003")
    before, delete = upkeep.list_garbage(store, 0), store.folder.delete

    def delete_and_stand_still(name):
        delete(name)
        if name.startswith("segments/"):
            store.folder.delete_tree("claims/infer/0000")

    monkeypatch.setattr(store.folder, "delete", delete_and_stand_still)
    with pytest.raises(ClaimLost):
        upkeep.delete_garbage(store, 0)
    assert len(upkeep.list_garbage(store, 0)) == len(before) - 1
