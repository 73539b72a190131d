"""Repair: what is damaged is declared unfinished, and never anything else."""

import errno
import io
import json
import os
from itertools import product
from pathlib import Path

import fsspec
import numpy as np
import pytest
from small_segment import SEGMENT, SHAPE, chunk_arrays

from storage import layout, upkeep
from storage.encoding import whole_array
from storage.errors import Claimed, ClaimLost, NotAStore, StoreRefused, StoreUnavailable
from storage.reconstruction import ReconstructionStore

CHUNKS = SEGMENT.chunks(16)
GATE = "segments/0000/gate"


def finish(store: ReconstructionStore, number: int) -> None:
    store.write_chunk(SEGMENT, CHUNKS[number], chunk_arrays(CHUNKS[number], 1.0))
    store.commit_chunk(SEGMENT, CHUNKS[number], {"key": "key"})


def overwrite(store: ReconstructionStore, name: str) -> None:
    """Damage an object behind the store's back."""
    with fsspec.open(f"{store.url}/{name}", "wb") as file:
        file.write(b"{}")


@pytest.fixture
def store(output_url: str) -> ReconstructionStore:
    """A store of one finished segment and a mesh."""
    made = ReconstructionStore.create(f"{output_url}/drive.zarr", {})
    made.create_segment(SEGMENT, 16, **SHAPE)
    for number in range(len(CHUNKS)):
        finish(made, number)
    files = {"fusion/a.ply": made.put_file("fusion/a.ply", b"mesh")}
    made.commit("fuse/0000", {"key": "key", "files": files})
    return made


@pytest.mark.parametrize("document", [b"", b'{"zarr_format": 3, "attri', b"null"])
def test_torn_root_is_made_anew_and_chunks_stay(store, document):
    store.commit("plan", {"key": "key"})
    store.folder.write("zarr.json", document)
    with pytest.raises(NotAStore, match=r"missing or torn; `ttt3r repair`"):
        ReconstructionStore.create(store.url, {})
    with pytest.raises(Claimed), store.claim("drive"):
        upkeep.restore_root(store.url)
    assert upkeep.restore_root(store.url)
    assert not upkeep.restore_root(store.url)
    mended = ReconstructionStore.open(store.url)
    assert len(mended.commit_names("infer")) == len(CHUNKS)
    assert mended.read_commit("plan") is None
    assert upkeep.verify(mended) == []


def test_folders_of_others_are_no_lost_reconstructions(output_url):
    with fsspec.open(f"{output_url}/other/commits/mine.json", "wb") as file:
        file.write(b"{}")
    assert not upkeep.restore_root(f"{output_url}/other")
    assert not upkeep.restore_root(f"{output_url}/nothing")
    with pytest.raises(NotAStore, match="choose another location"):
        ReconstructionStore.create(f"{output_url}/other", {})


@pytest.mark.parametrize("name", ["drive", "infer/0000", "fuse/0000", "fuse/0001"])
def test_nothing_is_dropped_while_a_run_is_at_work(store, name):
    overwrite(store, f"{GATE}/c.1.0")
    with store.claim(name), pytest.raises(Claimed, match=f"'{name}' is being worked on"):
        upkeep.repair(ReconstructionStore.open(store.url))
    assert len(store.commit_names("infer")) == len(CHUNKS)
    assert upkeep.repair(store) == ["infer/0000/0001"]
    assert store.folder.sizes("claims").keys() == {"claims/zarr.json"}


def meanwhile(store, monkeypatch, act):
    """Let another worker act once `repair` has found the damage of a chunk."""
    find, todo = store.damage.of_commit, [act]

    def find_late(commit, record):
        found = find(commit, record)
        if found and todo:
            todo.pop()(ReconstructionStore.open(store.url))
        return found

    monkeypatch.setattr(store.damage, "of_commit", find_late)


def test_chunk_that_is_computed_again_while_repair_reads_is_kept(store, monkeypatch):
    def compute_again(orphan):
        with orphan.claim("infer/0000"):
            orphan.drop_commits("infer/0000/0001")
            finish(orphan, 1)

    overwrite(store, f"{GATE}/c.1.0")
    meanwhile(store, monkeypatch, compute_again)
    assert upkeep.repair(store) == []
    assert upkeep.verify(store) == []
    assert store.is_chunk_done(SEGMENT, CHUNKS[1], "key")


def test_segment_that_is_made_anew_while_repair_reads_is_kept(store, monkeypatch):
    def make_anew(orphan):
        with orphan.claim("infer/0000"):
            orphan.folder.delete_tree("segments/0000")
            orphan.create_segment(SEGMENT, 16, **SHAPE)
            finish(orphan, 0)

    overwrite(store, f"{GATE}/zarr.json")
    meanwhile(store, monkeypatch, make_anew)
    upkeep.repair(store)
    assert upkeep.verify(store) == []
    assert store.is_chunk_done(SEGMENT, CHUNKS[0], "key")


@pytest.mark.parametrize("name", ["infer/0000", "fuse/0001"])
def test_worker_that_begins_while_repair_reads_stops_it(store, monkeypatch, name):
    other = ReconstructionStore.open(store.url)
    claim = other.claim(name)
    overwrite(store, f"{GATE}/c.1.0")
    meanwhile(store, monkeypatch, lambda _: claim.__enter__())
    with pytest.raises(Claimed):
        upkeep.repair(store)
    claim.__exit__(None, None, None)
    assert len(store.commit_names("infer")) == len(CHUNKS)


def test_nothing_more_is_dropped_once_the_claim_is_lost(store, monkeypatch):
    delete = store.folder.delete

    def delete_and_stand_still(name):
        delete(name)
        if name.startswith("commits/"):
            store.folder.delete_tree("claims/infer/0000")

    monkeypatch.setattr(store.folder, "delete", delete_and_stand_still)
    for number in (0, 1):
        overwrite(store, f"{GATE}/c.{number}.0")
    with pytest.raises(ClaimLost):
        upkeep.repair(store)
    assert len(store.commit_names("infer")) == len(CHUNKS) - 1


def change_attributes(store: ReconstructionStore, **changes: object) -> None:
    """Damage what a segment's group says of it."""
    name = f"{store.url}/segments/0000/zarr.json"
    with fsspec.open(name) as file:
        node = json.load(file)
    node["attributes"] |= changes
    with fsspec.open(name, "w") as file:
        json.dump(node, file)


# How an object is damaged is the same on S3; one that is gone is told in another way.
@pytest.mark.parametrize(
    ("output_url", "damage"),
    [
        ("local", lambda store: change_attributes(store, creation="another")),
        ("local", lambda store: change_attributes(store, creation=None)),
        ("local", lambda store: change_attributes(store, start=1)),
        ("local", lambda store: change_attributes(store, stop=10**30)),
        ("local", lambda store: change_attributes(store, chunk_frames=10**30)),
        ("local", lambda store: overwrite(store, "segments/0000/zarr.json")),
        ("local", lambda store: store.folder.delete("segments/0000/zarr.json")),
        ("s3", lambda store: store.folder.delete("segments/0000/zarr.json")),
    ],
    indirect=["output_url"],
)
def test_segment_whose_group_is_damaged_is_named_kept_by_gc_and_made_anew(store, damage):
    damage(store)
    assert upkeep.verify(store)[0] == "segments/0000/zarr.json"
    assert upkeep.list_garbage(store, 0) == {}
    commits = [f"infer/0000/{number:04d}" for number in range(len(CHUNKS))]
    assert upkeep.repair(store)[: len(CHUNKS)] == commits
    assert upkeep.verify(store) == []
    store.create_segment(SEGMENT, 16, **SHAPE)
    for number in range(len(CHUNKS)):
        finish(store, number)
    assert upkeep.verify(store) == []
    assert store.read(SEGMENT, "depth", 0, 46).shape == (46, 48, 64)


@pytest.mark.parametrize(
    ("output_url", "name", "content"),
    [
        *product(["local"], ["frame", "state/frame"], ["zeros", "damaged", "gone"]),
        ("s3", "state/frame", "gone"),
    ],
    indirect=["output_url"],
)
def test_segment_whose_coordinates_are_damaged_is_named_and_removed(store, name, content):
    path = f"segments/0000/{name}"
    if content == "zeros":
        rows = len(CHUNKS) if name == "state/frame" else SEGMENT.frames
        spec = layout.spec_at(path)
        for part, data in whole_array(path, spec, np.zeros(rows, np.int64)).items():
            store.folder.write(part, data)
    elif content == "damaged":
        overwrite(store, f"{path}/c.0")
    else:
        store.folder.delete(f"{path}/c.0")
    assert upkeep.verify(store) == [path]
    assert upkeep.repair(store) == ["segments/0000"]
    assert upkeep.verify(store) == []
    assert store.commit_names("infer") == []


@pytest.fixture
def failing_disk(monkeypatch) -> dict[str, int]:
    """Error numbers of files whose paths end so, as the system gives them on opening."""
    failing: dict[str, int] = {}
    opened = io.open

    def open_unless_failing(file, *arguments, **options):
        for ending, number in failing.items():
            if isinstance(file, (str, Path)) and str(file).endswith(ending):
                raise OSError(number, os.strerror(number), str(file))
        return opened(file, *arguments, **options)

    monkeypatch.setattr(io, "open", open_unless_failing)
    monkeypatch.setattr("builtins.open", open_unless_failing)
    return failing


@pytest.mark.parametrize("output_url", ["local"], indirect=True)
@pytest.mark.parametrize("number", [errno.EIO, errno.EBADMSG, errno.EUCLEAN])
@pytest.mark.parametrize(
    ("name", "damaged", "dropped"),
    [
        (f"{GATE}/c.1.0", [f"{GATE} chunk 1"], ["infer/0000/0001"]),
        ("fusion/a.ply", ["fusion/a.ply"], ["fuse/0000"]),
        ("commits/infer/0000/0001.json", None, ["infer/0000/0001"]),
        (f"{GATE}/zarr.json", None, None),
    ],
)
def test_object_that_the_disk_cannot_read_is_damaged(
    store, tmp_path, failing_disk, name, damaged, dropped, number
):
    overwrite(store, f"{GATE}/c.0.0")
    failing_disk[name] = number
    found = upkeep.verify(store)
    assert set(damaged or [name]) < set(found)
    assert f"{GATE} chunk 0" in found or name.startswith(GATE)
    for read in (store.folder.read, lambda name: store.folder.download(name, tmp_path / "copy")):
        with pytest.raises(StoreUnavailable, match=f"^{store.url}/{name} cannot be read"):
            read(name)
    assert set(dropped or ["segments/0000"]) < set(upkeep.repair(store))
    assert upkeep.verify(store) == []


@pytest.mark.parametrize("output_url", ["local"], indirect=True)
def test_object_that_may_not_be_read_is_named_and_no_damage(store, failing_disk):
    name = f"{GATE}/c.1.0"
    failing_disk[name] = errno.EACCES
    for act in (upkeep.verify, upkeep.repair):
        with pytest.raises(StoreRefused, match=f"{store.url}/{name}: access denied"):
            act(store)
    assert len(store.commit_names("infer")) == len(CHUNKS)


@pytest.mark.parametrize("output_url", ["local"], indirect=True)
def test_disk_that_reads_nothing_has_no_damage(store, failing_disk):
    failing_disk[".json"] = errno.EIO
    for act in (upkeep.verify, upkeep.repair, lambda store: upkeep.list_garbage(store, 0)):
        with pytest.raises(StoreUnavailable, match="cannot be read"):
            act(store)
    failing_disk.clear()
    assert upkeep.verify(store) == []
    assert len(store.commit_names()) == len(CHUNKS) + 1


@pytest.mark.parametrize("output_url", ["local"], indirect=True)
def test_commit_that_the_disk_cannot_read_makes_no_garbage(store, failing_disk):
    failing_disk["commits/fuse/0000.json"] = errno.EIO
    with pytest.raises(StoreUnavailable, match=r"commits/fuse/0000.json cannot be read"):
        upkeep.list_garbage(store, 0)
