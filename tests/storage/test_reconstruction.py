"""ReconstructionStore: the same promises on a local disk and on a real S3 server."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import xarray
import zarr

from storage import encoding, layout, reconstruction, upkeep
from storage.arrays import StoredArrays
from storage.errors import (
    ChunkMissing,
    CommitExists,
    DataDamaged,
    NotAStore,
    StoreMissing,
    StoreTooNew,
    StoreUnavailable,
)
from storage.folders import open_folder
from storage.reconstruction import ReconstructionStore
from storage.records import Chunk, Segment

HEIGHT, WIDTH, EMBED, TOKENS, MEMORY = 6, 8, 5, (3, 4), (2, 6)
CHUNK_FRAMES = 4
SEGMENT = Segment(index=0, start=10, stop=20, part=0)  # chunks 10..14, 14..18, 18..20
CHUNKS = SEGMENT.chunks(CHUNK_FRAMES)


def chunk_arrays(chunk: Chunk) -> dict[str, np.ndarray]:
    """Plausible values that depend on the chunk's frames only."""
    random = np.random.default_rng(chunk.start)
    frames = chunk.stop - chunk.start
    images = (frames, HEIGHT, WIDTH)
    return {
        "depth": random.uniform(0.5, 80, images).astype(np.float32),
        "confidence": random.uniform(1, 30, images).astype(np.float32),
        "cam_to_seg": random.standard_normal((frames, 4, 4)).astype(np.float32),
        "intrinsics": random.standard_normal((frames, 3, 3)).astype(np.float32),
        "descriptor": random.standard_normal((frames, EMBED)).astype(np.float32),
        "gate": random.uniform(0, 1, (frames, 5)).astype(np.float32),
        "state_tokens": random.standard_normal(TOKENS).astype(np.float32),
        "state_pose_memory": random.standard_normal(MEMORY).astype(np.float32),
    }


def create_segment(
    store: ReconstructionStore, segment: Segment = SEGMENT, height: int = HEIGHT
) -> None:
    store.create_segment(segment, CHUNK_FRAMES, height, WIDTH, EMBED, TOKENS, MEMORY)


def finish(store: ReconstructionStore, chunk: Chunk, key: str = "key") -> None:
    store.write_chunk(SEGMENT, chunk, chunk_arrays(chunk))
    store.commit_chunk(SEGMENT, chunk, {"key": key})


def write_object(url: str, data: bytes) -> None:
    """Put an object behind the store's back."""
    with fsspec.open(url, "wb") as file:
        file.write(data)


@pytest.fixture
def store(output_url: str) -> ReconstructionStore:
    """An empty store with one segment."""
    made = ReconstructionStore.create(f"{output_url}/drive.zarr", {"drive": "drive"})
    create_segment(made)
    return made


@pytest.fixture
def finished(store: ReconstructionStore) -> ReconstructionStore:
    """The store with all chunks committed."""
    for chunk in CHUNKS:
        finish(store, chunk)
    return store


# ---- chunks


def test_chunk_reads_back_within_the_stated_error(finished):
    reopened = ReconstructionStore.open(finished.url)
    given = {
        name: np.concatenate([chunk_arrays(chunk)[name] for chunk in CHUNKS])
        for name in ("depth", "confidence", "descriptor", "cam_to_seg", "intrinsics", "gate")
    }
    error = {"depth": 2**-10, "confidence": 2**-3, "descriptor": 2**-11}
    for name, values in given.items():
        read = reopened.read(SEGMENT, name, 10, 20)
        assert read.dtype == np.float32
        np.testing.assert_allclose(read, values, rtol=error.get(name, 0), atol=2**-23)


def test_read_addresses_frames_of_the_drive(finished):
    whole = finished.read(SEGMENT, "depth", 10, 20)
    np.testing.assert_array_equal(finished.read(SEGMENT, "depth", 13, 19), whole[3:9])
    assert finished.read(SEGMENT, "depth", 15, 15).shape == (0, HEIGHT, WIDTH)


def test_state_reads_back_bit_for_bit(store):
    arrays = chunk_arrays(CHUNKS[1])
    arrays["state_tokens"][0] = [-0.0, 1e-45, np.inf, np.nan]
    store.write_chunk(SEGMENT, CHUNKS[1], {**arrays, "state_first": True})
    store.commit_chunk(SEGMENT, CHUNKS[1], {"key": "key"})
    state = ReconstructionStore.open(store.url).read_state(SEGMENT, CHUNKS[1])
    assert state["tokens"].tobytes() == arrays["state_tokens"].tobytes()
    assert state["pose_memory"].tobytes() == arrays["state_pose_memory"].tobytes()
    assert state["first"] is True
    assert state["frame"] == 18


def test_unfinished_chunk_raises_and_names_what_is_missing(store):
    finish(store, CHUNKS[0])
    store.write_chunk(SEGMENT, CHUNKS[1], chunk_arrays(CHUNKS[1]))  # killed before the commit
    reopened = ReconstructionStore.open(store.url)
    reopened.read(SEGMENT, "depth", 10, 14)
    with pytest.raises(ChunkMissing, match=r"segment 0 chunk 1 \(frames 14\.\.18\).*infer stage"):
        reopened.read(SEGMENT, "depth", 13, 15)
    with pytest.raises(ChunkMissing, match="chunk 1"):
        reopened.read_state(SEGMENT, CHUNKS[1])
    with pytest.raises(ChunkMissing, match="segment 1"):
        reopened.read(Segment(1, 16, 30, 0), "depth", 16, 17)


def test_chunk_is_done_under_its_own_key_only(store):
    assert not store.is_chunk_done(SEGMENT, CHUNKS[0], "key")
    finish(store, CHUNKS[0])
    reopened = ReconstructionStore.open(store.url)
    assert reopened.is_chunk_done(SEGMENT, CHUNKS[0], "key")
    assert not reopened.is_chunk_done(SEGMENT, CHUNKS[0], "other weights")
    assert not reopened.is_chunk_done(SEGMENT, CHUNKS[1], "key")
    both = [SEGMENT, Segment(1, 16, 30, 0)]
    assert reopened.finished_chunks(both, CHUNK_FRAMES) == {(0, 0): "key"}


def test_writing_a_chunk_again_takes_its_commit_away_first(finished):
    finished.write_chunk(SEGMENT, CHUNKS[1], chunk_arrays(CHUNKS[1]))
    reopened = ReconstructionStore.open(finished.url)
    with pytest.raises(ChunkMissing, match="chunk 1"):
        reopened.read(SEGMENT, "depth", 10, 20)
    assert reopened.is_chunk_done(SEGMENT, CHUNKS[0], "key")


def test_chunk_of_fill_values_is_stored_all_the_same(store):
    arrays = {name: np.full_like(a, np.nan) for name, a in chunk_arrays(CHUNKS[0]).items()}
    store.write_chunk(SEGMENT, CHUNKS[0], arrays)
    store.commit_chunk(SEGMENT, CHUNKS[0], {"key": "key"})
    for shard in ("depth/c.0.0.0", "cam_to_seg/c.0.0.0", "state/tokens/c.0.0.0", "state/first/c.0"):
        with fsspec.open(f"{store.url}/segments/0000/{shard}") as file:
            assert file.read(1)
    assert np.isnan(store.read(SEGMENT, "depth", 10, 14)).all()


def test_chunk_can_be_written_over_a_damaged_shard(store):
    write_object(f"{store.url}/segments/0000/depth/c.0.0.0", b"half a sh")
    finish(store, CHUNKS[0])
    np.testing.assert_allclose(
        store.read(SEGMENT, "depth", 10, 14), chunk_arrays(CHUNKS[0])["depth"], rtol=2**-10
    )


def test_commit_of_a_chunk_records_digests_of_what_was_stored(store):
    finish(store, CHUNKS[2])
    record = store.read_commit("infer/0000/0002")
    assert record is not None
    assert record["key"] == "key"
    assert record["frames"] == [18, 20]
    assert len(record["digests"]) == 9
    assert len(record["digests"]["segments/0000/depth"]) == 64


def test_commit_of_a_chunk_needs_its_data(store):
    with pytest.raises(ValueError, match="write the chunk through the same store object"):
        store.commit_chunk(SEGMENT, CHUNKS[0], {"key": "key"})


def test_chunk_with_wrong_arrays_is_refused(store):
    good = chunk_arrays(CHUNKS[0])
    with pytest.raises(ValueError, match=r"'depth' has shape \(4, 6, 7\); expected \(4, 6, 8\)"):
        store.write_chunk(SEGMENT, CHUNKS[0], {**good, "depth": good["depth"][:, :, :-1]})
    with pytest.raises(ValueError, match=r"missing: \['gate'\]"):
        store.write_chunk(SEGMENT, CHUNKS[0], {n: a for n, a in good.items() if n != "gate"})
    with pytest.raises(ValueError, match=r"unknown: \['pose'\]"):
        store.write_chunk(SEGMENT, CHUNKS[0], {**good, "pose": good["gate"]})
    with pytest.raises(ValueError, match="shard of another chunk"):
        store.write_chunk(SEGMENT, Chunk(0, 11, 15), good)
    with pytest.raises(ValueError, match=r"not inside segment 0, which holds 10\.\.20"):
        store.read(SEGMENT, "depth", 9, 12)
    with pytest.raises(ValueError, match=r"unknown: \['normals'\]"):
        store.read(SEGMENT, "normals", 10, 12)


@pytest.mark.parametrize(
    ("height", "width", "rows"),
    [(24, 80, 12), (40, 80, 10), (56, 80, 14), (34, 80, 34), (288, 256, 16), (288, 512, 288)],
)
def test_depth_lies_in_strips_where_objects_are_read_whole(tmp_path, height, width, rows):
    store = ReconstructionStore.create(tmp_path / "drive.zarr", {})
    segment = Segment(0, 0, 20, 0)
    store.create_segment(segment, 16, height, width, 8, (4, 8), (2, 8))
    group = zarr.open_group(store.url, mode="r")["segments/0000"]
    assert group["depth"].chunks == (8, rows, width)
    assert group["confidence"].chunks == (8, height, width)


def test_single_frame_needs_few_frames_decoded(finished):
    depth = zarr.open_array(f"{finished.url}/segments/0000/depth", mode="r")
    assert depth.shards == (CHUNK_FRAMES, HEIGHT, WIDTH)
    assert depth.chunks[0] <= 4


# ---- segments


def test_segment_created_again_keeps_what_is_finished(finished):
    create_segment(ReconstructionStore.create(finished.url, {}))
    assert finished.is_chunk_done(SEGMENT, CHUNKS[0], "key")
    assert upkeep.verify(finished) == []


@pytest.mark.parametrize("change", ["shape", "range"])
def test_segment_created_otherwise_loses_its_commits(finished, change):
    segment = SEGMENT if change == "shape" else Segment(0, 11, 21, 0)
    create_segment(finished, segment, height=HEIGHT * 2 if change == "shape" else HEIGHT)
    assert finished.commits("infer") == {}
    with pytest.raises(ChunkMissing):
        finished.read(SEGMENT, "depth", 12, 14)
    with pytest.raises(ChunkMissing):
        finished.read(segment, "depth", 12, 14)


def test_late_commit_into_a_replaced_segment_counts_for_nothing(store):
    late = ReconstructionStore.open(store.url)
    late.write_chunk(SEGMENT, CHUNKS[0], chunk_arrays(CHUNKS[0]))
    create_segment(store, height=HEIGHT * 2)
    create_segment(store)
    try:
        late.commit_chunk(SEGMENT, CHUNKS[0], {"key": "key"})
    except FileNotFoundError:
        assert "://" not in store.url  # a local store notices at once that the data are gone
    assert not store.is_chunk_done(SEGMENT, CHUNKS[0], "key")
    with pytest.raises(ChunkMissing):
        store.read(SEGMENT, "depth", 10, 11)


def test_segment_half_created_is_made_anew(store):
    with fsspec.open(f"{store.url}/segments/0000/zarr.json") as file:
        document = json.load(file)
    document["attributes"] = {}  # as before the last step of its creation
    write_object(f"{store.url}/segments/0000/zarr.json", json.dumps(document).encode())
    with pytest.raises(ChunkMissing, match="does not exist yet"):
        store.read(SEGMENT, "depth", 10, 11)
    create_segment(store)
    finish(store, CHUNKS[0])
    assert store.is_chunk_done(SEGMENT, CHUNKS[0], "key")


def test_what_a_failed_creation_left_is_written_over_and_not_removed(output_url, monkeypatch):
    url = f"{output_url}/drive.zarr"
    folder = open_folder(url)
    monkeypatch.setattr(reconstruction, "open_folder", lambda _: folder)
    store = ReconstructionStore.create(url, {})
    removed: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(folder, "create_many", lambda _: (_ for _ in ()).throw(StoreUnavailable()))
        with pytest.raises(StoreUnavailable):
            create_segment(store, height=HEIGHT * 2)
        patch.undo()
        for name in ("delete", "delete_tree"):
            patch.setattr(folder, name, removed.append)
        create_segment(store)
    assert removed == []
    finish(store, CHUNKS[0])
    assert store.read(SEGMENT, "depth", 10, 14).shape == (4, HEIGHT, WIDTH)
    assert upkeep.verify(store) == []


# ---- commits


def test_commits_are_found_by_whole_parts_of_their_names(store):
    for name in ("plan", "infer/0001/0000", "infer/0001/0001", "infer/00010/0000", "infer/0001x"):
        store.commit(name, {"key": name})
    assert set(store.commits("infer/0001")) == {"infer/0001/0000", "infer/0001/0001"}
    assert store.commits("plan")["plan"]["key"] == "plan"
    store.drop_commits("infer/0001")
    assert set(store.commits()) == {"plan", "infer/00010/0000", "infer/0001x"}
    store.drop_commits("plan")
    assert store.read_commit("plan") is None


def test_commit_keeps_plain_values_and_replaces_the_earlier_one(store):
    store.commit("plan", {"key": "old"})
    store.commit("plan", {"key": "new", "rate": np.float32(0.5), "bad": float("nan"), "n": (1, 2)})
    record = store.read_commit("plan")
    assert record is not None
    assert {name: record[name] for name in ("key", "rate", "bad", "n")} == {
        "key": "new",
        "rate": 0.5,
        "bad": None,
        "n": [1, 2],
    }


def test_exclusive_commit_has_one_winner(store):
    def claim(worker: int) -> int | None:
        try:
            store.commit("lease", {"worker": worker}, exclusive=True)
        except CommitExists:
            return None
        return worker

    with ThreadPoolExecutor(8) as pool:
        winners = [worker for worker in pool.map(claim, range(8)) if worker is not None]
    record = store.read_commit("lease")
    assert record is not None
    assert winners == [record["worker"]]
    with pytest.raises(CommitExists, match="'lease' exists already"):
        store.commit("lease", {"worker": 9}, exclusive=True)


def test_torn_commit_counts_for_nothing(finished):
    commits = f"{finished.url}/commits/infer/0000"
    write_object(f"{commits}/0001.json", b'{"key": "ke')
    assert finished.read_commit("infer/0000/0001") is None
    with pytest.raises(ChunkMissing, match="chunk 1"):
        finished.read(SEGMENT, "depth", 14, 15)
    assert set(finished.commits("infer")) == {"infer/0000/0000", "infer/0000/0002"}


def test_temporary_file_of_a_killed_writer_is_ignored(tmp_path):
    store = ReconstructionStore.create(tmp_path / "drive.zarr", {})
    torn = tmp_path / "drive.zarr" / "commits" / ".plan.json.123.partial"
    torn.write_text('{"key": "ke')
    assert store.commits() == {}
    assert store.read_commit("plan") is None
    (tmp_path / "drive.zarr" / "fusion" / ".mesh.ply.123.partial").write_bytes(b"pl")
    assert upkeep.describe(store)["commits"] == []
    assert store.list_files() == []


@pytest.mark.parametrize("name", ["", "/plan", "../plan", "a//b", "a\\b", ".hidden", "zarr"])
def test_commit_name_outside_the_store_is_refused(tmp_path, name):
    store = ReconstructionStore.create(tmp_path / "drive.zarr", {})
    with pytest.raises(ValueError, match="name"):
        store.commit(name, {})


# ---- frames and trajectory


def test_frames_read_back_once_the_probe_is_committed(store):
    table = [np.arange(7) / 30, np.repeat([0, 1], [3, 4]), np.arange(7) % 3, np.full(7, 2)]
    store.write_frames(*table[:3], table[3].astype(np.uint8))
    with pytest.raises(ChunkMissing, match="probe"):
        store.read_frames()
    store.commit("probe", {"key": "key"})
    frames = ReconstructionStore.open(store.url).read_frames()
    for name, values in zip(("timestamp", "clip", "index", "flags"), table, strict=True):
        np.testing.assert_array_equal(frames[name], values)


def test_trajectory_is_replaced_as_a_whole(store):
    long = {
        "cam_to_world": np.arange(5 * 16, dtype=float).reshape(5, 4, 4),
        "scale": np.array([1.0, 1.5]),
        "intrinsics": np.eye(3),
        "confidence": np.ones(5, np.float32),
        "segment": np.zeros(5, int),
    }
    store.write_trajectory(long)
    store.commit("align", {"key": "old"})
    short = {"cam_to_world": long["cam_to_world"][:2] + 0.1, "scale": np.array([2.0])}
    store.write_trajectory(short)
    with pytest.raises(ChunkMissing, match="align"):
        store.read_trajectory()
    store.commit("align", {"key": "new"})
    read = ReconstructionStore.open(store.url).read_trajectory()
    assert set(read) == {"cam_to_world", "scale"}
    arrays = upkeep.describe(store)["arrays"]
    assert {"trajectory/scale", "trajectory/confidence"} & arrays.keys() == {"trajectory/scale"}
    np.testing.assert_array_equal(read["cam_to_world"], short["cam_to_world"])
    assert read["cam_to_world"].dtype == np.float64


def test_removals_that_come_late_take_nothing_of_the_new_trajectory(output_url, monkeypatch):
    url = f"{output_url}/drive.zarr"
    folder = open_folder(url)
    monkeypatch.setattr(reconstruction, "open_folder", lambda _: folder)
    store = ReconstructionStore.create(url, {})
    rows = layout.ROWS_PER_OBJECT + 1
    store.write_trajectory({"confidence": np.ones(rows, np.float32), "scale": np.ones(2)})
    store.commit("align", {"key": "old"})
    late = []
    with monkeypatch.context() as patch:
        for name in ("delete", "delete_tree"):
            removal = getattr(folder, name)
            patch.setattr(folder, name, lambda what, do=removal: late.append(partial(do, what)))
        store.write_trajectory({"confidence": np.zeros(3, np.float32)})
    store.commit("align", {"key": "new"})
    commit = store.read_commit("align")
    for removal in late[1:]:  # the first is that of the old commit
        removal()
    assert store.read_commit("align") == commit
    np.testing.assert_array_equal(store.read_trajectory()["confidence"], np.zeros(3))
    left = [name for name in folder.sizes("trajectory") if "/c." in name]
    assert left == ["trajectory/confidence/c.0"]
    assert "trajectory/scale" not in upkeep.describe(store)["arrays"]


def test_trajectory_that_contradicts_itself_is_refused(tmp_path):
    store = ReconstructionStore.create(tmp_path / "drive.zarr", {})
    poses = np.zeros((5, 4, 4))
    with pytest.raises(ValueError, match=r"'confidence' has shape \(4,\).*'frame': 5"):
        store.write_trajectory({"cam_to_world": poses, "confidence": np.zeros(4)})
    with pytest.raises(ValueError, match=r"'cam_to_world' has shape \(5, 3, 4\)"):
        store.write_trajectory({"cam_to_world": poses[:, :3]})
    with pytest.raises(ValueError, match=r"unknown: \['pose'\]"):
        store.write_trajectory({"pose": poses})


# ---- other software reads it


def test_xarray_sees_names_and_units(finished):
    with xarray.open_zarr(finished.url, group="segments/0000", consolidated=False) as data:
        assert data["depth"].dims == ("frame", "y", "x")
        assert data["depth"].attrs["units"] == "m"
        assert data["depth"].attrs["maximum_relative_error"] == 2**-10
        assert data["cam_to_seg"].attrs["units"] == "m"
        assert all(variable.attrs["long_name"] for variable in data.variables.values())
        assert data["frame"].values.tolist() == list(range(10, 20))
        expected = finished.read(SEGMENT, "depth", 15, 16)[0]
        np.testing.assert_array_equal(data["depth"].sel(frame=15), expected)


def test_zarr_alone_reads_depth(tmp_path):
    """Without our own reader: zarr and pcodec are all it takes."""
    store = ReconstructionStore.create(tmp_path / "drive.zarr", {})
    create_segment(store)
    for chunk in CHUNKS:
        finish(store, chunk)
    script = "import sys, numpy, zarr; numpy.save(sys.argv[2], zarr.open_array(sys.argv[1])[:])"
    depth, copy = f"{store.url}/segments/0000/depth", str(tmp_path / "depth.npy")
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, depth, copy], check=True)
    np.testing.assert_array_equal(np.load(copy), store.read(SEGMENT, "depth", 10, 20))


BLOSC = {"typesize": 2, "cname": "zstd", "clevel": 3, "shuffle": "bitshuffle", "blocksize": 0}
FORMER_CODECS = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "blosc", "configuration": BLOSC},
    {"name": "crc32c"},
]


def test_segment_begun_with_former_codecs_is_finished_with_them(store):
    """Images were compressed by Blosc, two frames together here; what was half done goes on so."""
    folder = open_folder(store.url)
    former = {}
    for name in (f"segments/0000/{image}/zarr.json" for image in ("depth", "confidence")):
        former[name] = json.loads(folder.read(name))
        sharding = former[name]["codecs"][0]["configuration"]
        assert sharding["codecs"] != FORMER_CODECS
        sharding |= {"codecs": FORMER_CODECS, "chunk_shape": [2, HEIGHT, WIDTH]}
        folder.write(name, json.dumps(former[name]).encode())
    create_segment(store)
    for chunk in CHUNKS:
        finish(store, chunk)
    reopened = ReconstructionStore.open(store.url)
    assert {name: json.loads(folder.read(name)) for name in former} == former
    for image, error in (("depth", 2**-10), ("confidence", 2**-3)):
        expected = np.concatenate([chunk_arrays(chunk)[image] for chunk in CHUNKS])
        np.testing.assert_allclose(reopened.read(SEGMENT, image, 10, 20), expected, rtol=error)
    assert upkeep.verify(reopened) == []


def test_segment_whose_objects_lie_in_folders_of_their_own_is_read_mended_and_finished(
    finished, monkeypatch
):
    """So they did before version 3."""
    folder = open_folder(finished.url)
    for name in folder.sizes("segments"):
        data, shard = folder.read(name) or b"", layout.shard_at(name)
        if shard is not None:
            array, inside = shard[0], name.removeprefix(f"{shard[0]}/")
            folder.write(f"{array}/{inside.replace('.', '/')}", data)
            folder.delete(name)
        elif "chunk_key_encoding" in (node := json.loads(data)):
            node["chunk_key_encoding"]["configuration"] = {"separator": "/"}
            folder.write(name, json.dumps(node).encode())
    reopened = ReconstructionStore.open(finished.url)
    assert upkeep.verify(reopened) == []
    assert upkeep.list_garbage(reopened, 0) == {}
    assert upkeep.describe(reopened)["arrays"]["segments/0000/depth"]["bytes"] > 3 * HEIGHT * WIDTH
    folder.delete("segments/0000/depth/c/1/0/0")
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "LARGEST_WHOLE_READ", 0)  # by Zarr
        with pytest.raises(DataDamaged, match="c/1/0/0 is gone"):
            reopened.read(SEGMENT, "depth", 10, 20)
    assert upkeep.repair(reopened) == ["infer/0000/0001"]
    assert {name.split("/c/")[1][0] for name in upkeep.delete_garbage(reopened, 0)} == {"1"}
    finish(reopened, CHUNKS[1])
    expected = np.concatenate([chunk_arrays(chunk)["depth"] for chunk in CHUNKS])
    np.testing.assert_allclose(reopened.read(SEGMENT, "depth", 10, 20), expected, rtol=2**-10)
    assert "segments/0000/depth/c/1/0/0" in folder.sizes("segments")
    assert not [name for name in folder.sizes("segments") if "/c." in name]


def test_store_of_the_version_before_becomes_one_of_this_version(store):
    """So that software that does not know what is written now refuses it, and mends nothing."""
    folder = open_folder(store.url)
    root = json.loads(folder.read("zarr.json"))
    root["attributes"]["schema_version"] = layout.SCHEMA_VERSION - 1
    folder.write("zarr.json", json.dumps(root).encode())
    ReconstructionStore.create(store.url, {"drive": "drive"})
    found = json.loads(folder.read("zarr.json"))["attributes"]
    assert found["schema_version"] == layout.SCHEMA_VERSION
    assert found["drive"] == "drive"


def test_zarr_lists_the_store_without_warnings(finished):
    group = zarr.open_group(finished.url, mode="r")
    assert {name for name, _ in group.members()} >= {"frames", "segments", "trajectory"}
    assert group.attrs["drive"] == "drive"


# ---- files


def test_files_go_in_and_out(store, tmp_path):
    source = tmp_path / "mesh.ply"
    source.write_bytes(b"ply" * 1000)
    digest = store.put_file("fusion/parts/0/mesh.ply", source)
    store.put_file("report/report.html", b"<html>")
    assert len(digest) == 64
    assert store.get_file("report/report.html") == b"<html>"
    assert store.list_files() == ["fusion/parts/0/mesh.ply", "report/report.html"]
    assert store.list_files("fusion/parts") == ["fusion/parts/0/mesh.ply"]
    copy = store.local_copy("fusion/parts/0/mesh.ply", tmp_path / "elsewhere")
    assert copy == tmp_path / "elsewhere" / "mesh.ply"
    assert copy.read_bytes() == source.read_bytes()
    assert store.file_url("report/report.html") == f"{store.url}/report/report.html"
    with pytest.raises(FileNotFoundError, match="no file 'report/figure"):
        store.get_file("report/figure.png")
    with pytest.raises(FileNotFoundError, match="no file 'report/figure"):
        store.local_copy("report/figure.png", tmp_path)


def test_files_are_removed_by_the_start_of_their_name(store):
    for name in ("fusion/mesh.ply", "fusion/tiles/a.ply", "report/report.html"):
        store.put_file(name, b"x")
    store.delete_files("fusion/")
    assert store.list_files() == ["report/report.html"]


def test_segment_of_an_earlier_plan_is_removed_with_its_commits(finished):
    finished.remove_segment(SEGMENT.index)
    assert finished.commit_names("infer") == []
    assert upkeep.describe(finished)["segments"] == {}
    with pytest.raises(ChunkMissing, match="does not exist yet"):
        finished.read(SEGMENT, "depth", 10, 12)


@pytest.mark.parametrize(
    "name", ["/etc/x", "fusion/../x", "fusion//x", "commits/plan.json", "x", "fusion/zarr.json", ""]
)
def test_file_name_outside_its_folders_is_refused(tmp_path, name):
    store = ReconstructionStore.create(tmp_path / "drive.zarr", {})
    with pytest.raises(ValueError, match=r"name|folders"):
        store.put_file(name, b"")


# ---- the store as a whole


def test_create_opens_what_is_there_and_keeps_other_attributes(finished):
    again = ReconstructionStore.create(finished.url, {"plan": {"frames": 10, "fps": float("nan")}})
    assert again.attributes["drive"] == "drive"
    assert again.attributes["plan"] == {"frames": 10, "fps": None}
    assert again.is_chunk_done(SEGMENT, CHUNKS[0], "key")


def test_open_says_when_nothing_is_there(output_url):
    with pytest.raises(StoreMissing, match="no reconstruction at"):
        ReconstructionStore.open(f"{output_url}/nothing.zarr")


def test_other_content_is_refused_and_left_alone(output_url):
    write_object(f"{output_url}/photos/cat.jpg", b"cat") if "://" in output_url else None
    if "://" not in output_url:
        Path(output_url, "photos").mkdir(parents=True)
        Path(output_url, "photos", "cat.jpg").write_bytes(b"cat")
    with pytest.raises(NotAStore, match=r"photos.*cat\.jpg"):
        ReconstructionStore.create(f"{output_url}/photos", {})
    with fsspec.open(f"{output_url}/photos/cat.jpg") as file:
        assert file.read() == b"cat"
    zarr.create_group(f"{output_url}/other.zarr", attributes={"title": "other"})
    with pytest.raises(NotAStore, match="not a reconstruction"):
        ReconstructionStore.create(f"{output_url}/other.zarr", {})
    with pytest.raises(NotAStore, match="not a reconstruction"):
        ReconstructionStore.open(f"{output_url}/other.zarr")


def test_store_of_a_newer_schema_is_refused(store):
    with fsspec.open(f"{store.url}/zarr.json") as file:
        document = json.load(file)
    document["attributes"]["schema_version"] += 1
    write_object(f"{store.url}/zarr.json", json.dumps(document).encode())
    with pytest.raises(StoreTooNew, match=r"schema version 5.*up to 4"):
        ReconstructionStore.open(store.url)


def test_nothing_outside_the_location_is_written(tmp_path):
    store = ReconstructionStore.create(tmp_path / "drive.zarr", {})
    create_segment(store)
    for chunk in CHUNKS:
        finish(store, chunk)
    assert [path.name for path in tmp_path.iterdir()] == ["drive.zarr"]


def test_describe_counts_chunks_bytes_and_stages(store):
    finish(store, CHUNKS[0])
    store.commit("plan", {"key": "key"})
    store.put_file("report/report.html", b"12345")
    found = upkeep.describe(store)
    assert found["segments"] == {
        "0000": {"frames": [10, 20], "chunks_committed": 1, "chunks_total": 3}
    }
    assert found["commits"] == ["plan"]
    assert found["files"] == {"report/report.html": 5}
    depth = found["arrays"]["segments/0000/depth"]
    assert (depth["shape"], depth["dtype"]) == ([10, HEIGHT, WIDTH], "float16")
    assert 0 < depth["bytes"] < found["bytes"]
    json.dumps(found)


def test_verify_names_what_is_damaged(finished):
    digest = finished.put_file("fusion/mesh.ply", b"mesh")
    finished.commit("fuse", {"key": "key", "files": {"fusion/mesh.ply": digest}})
    finished.write_trajectory({"scale": np.ones(3)})
    finished.commit("align", {"key": "key"})
    assert upkeep.verify(finished) == []
    for name in ("segments/0000/depth/c.1.0.0", "segments/0000/state/tokens/c.2.0.0"):
        with fsspec.open(f"{finished.url}/{name}") as file:
            content = bytearray(file.read())
        content[100 if len(content) > 200 else 5] ^= 0x01
        write_object(f"{finished.url}/{name}", bytes(content))
    write_object(f"{finished.url}/fusion/mesh.ply", b"mess")
    expected = ["fusion/mesh.ply", "segments/0000/depth chunk 1"]
    assert sorted(upkeep.verify(finished)) == [*expected, "segments/0000/state/tokens chunk 2"]
    with pytest.raises(DataDamaged, match=r"depth, frames 14\.\.15; run `ttt3r repair .*`"):
        finished.read(SEGMENT, "depth", 14, 15)
    with pytest.raises(DataDamaged, match="chunk 2"):
        finished.read_state(SEGMENT, CHUNKS[2])


def test_verify_notices_a_shard_that_is_gone(finished):
    filesystem, path = fsspec.core.url_to_fs(finished.url)
    filesystem.rm_file(f"{path}/segments/0000/gate/c.0.0")
    assert upkeep.verify(finished) == ["segments/0000/gate chunk 0"]


def flip_bit(url: str, position: int) -> None:
    with fsspec.open(url) as file:
        content = bytearray(file.read())
    content[position] ^= 0x01
    write_object(url, bytes(content))


def test_repair_declares_only_the_damaged_unfinished(finished):
    finished.write_trajectory({"scale": np.ones(3)})
    finished.commit("align", {"key": "key"})
    for batch in ("a", "b"):
        digest = finished.put_file(f"fusion/tiles/{batch}.ply", b"mesh")
        record = {"key": "key", "files": {f"fusion/tiles/{batch}.ply": digest}}
        finished.commit(f"fuse/{batch}", record)
    finished.commit("fuse", {"key": "key"})
    assert upkeep.repair(finished) == []
    before = set(finished.commit_names())
    flip_bit(f"{finished.url}/segments/0000/depth/c.1.0.0", 100)
    flip_bit(f"{finished.url}/fusion/tiles/a.ply", 2)
    assert upkeep.repair(finished) == ["fuse/a", "infer/0000/0001"]
    assert before - set(finished.commit_names()) == {"fuse/a", "infer/0000/0001"}
    done = [finished.is_chunk_done(SEGMENT, chunk, "key") for chunk in CHUNKS]
    assert done == [True, False, True]
    assert upkeep.verify(finished) == []
    finish(finished, CHUNKS[1])
    np.testing.assert_allclose(
        finished.read(SEGMENT, "depth", 14, 18), chunk_arrays(CHUNKS[1])["depth"], rtol=1e-3
    )


def break_metadata(store: ReconstructionStore, document: bytes | None) -> None:
    """Replace or remove zarr.json of an array."""
    path = f"{store.url}/segments/0000/gate/zarr.json"
    if document is not None:
        write_object(path, document)
        return
    filesystem, local = fsspec.core.url_to_fs(path)
    filesystem.rm_file(local)


@pytest.mark.parametrize("document", [None, b"{}", b"nonsense"])
@pytest.mark.parametrize("is_committed", [True, False])
def test_repair_makes_a_segment_with_broken_metadata_writable_again(
    finished, document, is_committed
):
    if not is_committed:  # as where another rule was asked for, or a repair was killed
        finished.drop_commits("infer")
    break_metadata(finished, document)
    create_segment(finished)  # is there already
    with pytest.raises(DataDamaged, match=r"segments/0000/gate .*run `ttt3r repair .*drive\.zarr`"):
        finish(finished, CHUNKS[0])
    assert upkeep.verify(finished)[-1] == "segments/0000/gate/zarr.json"
    assert upkeep.repair(finished)[-1] == "segments/0000"
    assert upkeep.verify(finished) == finished.commit_names("infer") == []
    create_segment(finished)
    for chunk in CHUNKS:
        finish(finished, chunk)
    assert upkeep.verify(finished) == []


@pytest.mark.parametrize(
    "change",
    [
        {"codecs": [{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 1}}]},
        {"fill_value": "nothing"},
        {"fill_value": 10**400},
        {"zarr_format": 2},
    ],
)
def test_chunk_is_not_written_to_an_array_that_could_not_be_read(store, change):
    with fsspec.open(f"{store.url}/segments/0000/gate/zarr.json") as file:
        node = json.load(file)
    break_metadata(store, json.dumps({**node, **change}).encode())
    with pytest.raises(DataDamaged, match="segments/0000/gate is none of this software's"):
        finish(store, CHUNKS[0])
    assert store.commit_names("infer") == []


def test_segment_that_is_being_made_is_not_damaged(store):
    remove_object(store, "segments/0000/zarr.json")
    break_metadata(store, None)
    assert upkeep.verify(store) == upkeep.repair(store) == []


def test_damaged_commit_of_a_stage_does_not_take_those_below_it(finished):
    digest = finished.put_file("report/report.html", b"page")
    finished.commit("tiles", {"key": "key", "files": {"report/report.html": digest}})
    finished.commit("tiles/0000", {"key": "key"})
    write_object(f"{finished.url}/report/report.html", b"edit")
    assert upkeep.repair(finished) == ["tiles"]
    assert "tiles/0000" in finished.commit_names()


def remove_object(store: ReconstructionStore, name: str) -> None:
    """Remove an object behind the store's back."""
    filesystem, path = fsspec.core.url_to_fs(store.url)
    filesystem.rm_file(f"{path}/{name}")


def test_committed_object_that_is_gone_raises_instead_of_reading_as_fill_values(
    finished, monkeypatch
):
    monkeypatch.setattr(encoding, "LARGEST_WHOLE_READ", 0)  # as for frames of usual size
    finished.write_trajectory({"scale": np.ones(3)})
    finished.commit("align", {"key": "key"})
    for name in ("depth/c.1.0.0", "gate/c.1.0", "state/tokens/c.1.0.0"):
        remove_object(finished, f"segments/0000/{name}")
    remove_object(finished, "trajectory/scale/c.0")
    reopened = ReconstructionStore.open(finished.url)
    for name in ("depth", "gate"):
        with pytest.raises(DataDamaged, match=rf"{name}, frames 12\.\.20; run.*c\.1\.0.*is gone"):
            reopened.read(SEGMENT, name, 12, 20)
        assert np.isfinite(reopened.read(SEGMENT, name, 10, 14)).all()
    with pytest.raises(DataDamaged, match=r"chunk 1; run `ttt3r repair .*`.*is gone"):
        reopened.read_state(SEGMENT, CHUNKS[1])
    with pytest.raises(DataDamaged, match=r"trajectory; run `ttt3r repair .*`"):
        reopened.read_trajectory()
    expected = ["segments/0000/depth", "segments/0000/gate", "segments/0000/state/tokens"]
    assert sorted(upkeep.verify(reopened)) == [
        *(f"{n} chunk 1" for n in expected),
        "trajectory/scale",
    ]


@pytest.mark.parametrize("renewed", [False, True])
def test_reader_of_a_segment_that_is_made_anew_meanwhile_is_told(finished, monkeypatch, renewed):
    reader = ReconstructionStore.open(finished.url)
    read_rows = StoredArrays.read_rows

    def read_rows_late(*arguments):
        finished.remove_segment(SEGMENT.index)
        if renewed:
            create_segment(finished)
            for chunk in CHUNKS:
                finish(finished, chunk, "other weights")
        return read_rows(*arguments)

    monkeypatch.setattr(StoredArrays, "read_rows", read_rows_late)
    with pytest.raises(ChunkMissing, match=r"segments/0000 .*changed while being read"):
        reader.read(SEGMENT, "depth", 10, 20)


@pytest.mark.parametrize("step", ["read", "sizes"])
def test_creator_that_another_overtakes_opens_what_the_other_made(output_url, monkeypatch, step):
    url = f"{output_url}/drive.zarr"
    slow = open_folder(url)
    folders, act = [slow], getattr(slow, step)
    monkeypatch.setattr(
        reconstruction, "open_folder", lambda url: folders.pop() if folders else open_folder(url)
    )

    def act_and_stand_still(*arguments):
        found = act(*arguments)
        monkeypatch.setattr(slow, step, act)
        other = ReconstructionStore.create(url, {"drive": "drive"})
        other.update_attributes({"plan": {"frames": 10}})
        return found

    monkeypatch.setattr(slow, step, act_and_stand_still)
    store = ReconstructionStore.create(url, {"more": 1})
    assert {n: store.attributes[n] for n in ("drive", "plan", "more")} == {
        "drive": "drive",
        "plan": {"frames": 10},
        "more": 1,
    }
