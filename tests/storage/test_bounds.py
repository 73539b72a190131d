"""Stores that somebody else wrote: what is none of ours costs one line, not the memory."""

import http.server
import json
import shutil
import threading
import tracemalloc
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from numcodecs.blosc import Blosc
from numcodecs.pcodec import PCodec
from small_segment import SEGMENT, SHAPE, chunk_arrays

from storage import upkeep
from storage.errors import ChunkMissing, DataDamaged, NotAStore, StoreError
from storage.reconstruction import ReconstructionStore
from storage.records import MOST_FRAMES, Plan, Segment

FIRST = SEGMENT.chunks(8)[0]
LARGE = 33 * 2**20
DEPTH = "segments/0000/depth"


@pytest.fixture
def store(tmp_path):
    """A store with one chunk and a table of frames."""
    made = ReconstructionStore.create(tmp_path / "drive.zarr", {})
    made.create_segment(SEGMENT, 8, **SHAPE)
    chunk = SEGMENT.chunks(8)[0]
    made.write_chunk(SEGMENT, chunk, chunk_arrays(chunk, 1.0))
    made.commit_chunk(SEGMENT, chunk, {"key": "k"})
    made.write_frames(*(np.zeros(100, t) for t in ("f8", "i4", "i4", "u1")))
    made.commit("probe", {"key": "k"})
    return made


def path_of(store: ReconstructionStore, name: str) -> Path:
    return Path(store.url, name)


UPRIGHT = {"name": "transpose", "configuration": {"order": [0, 2, 1]}}
OTHER_TURN = {"name": "transpose", "configuration": {"order": [1, 2, 0]}}
PACKED = [{"name": "numcodecs.pcodec", "configuration": {"level": 8}}, {"name": "crc32c"}]
BYTES = [{"name": "bytes"}]


def sharded(*parts: int, inner: Sequence[object] = BYTES, index: Sequence[object] = BYTES) -> Any:
    """Codecs of objects in such parts."""
    codecs = {"chunk_shape": [*parts], "codecs": [*inner], "index_codecs": [*index]}
    return [{"name": "sharding_indexed", "configuration": codecs}]


def grow(path: Path) -> None:
    """Make a file larger than any record; it takes no space on the disk."""
    with path.open("r+b") as file:
        file.truncate(LARGE)


def test_records_of_gigabytes_are_not_read(store):
    grow(path_of(store, "commits/probe.json"))
    with pytest.raises(DataDamaged, match=r"commits/probe.json is larger than 32 MiB"):
        store.read_commit("probe")
    with pytest.raises(DataDamaged, match="larger"):
        store.commits()
    grow(path_of(store, f"{DEPTH}/zarr.json"))
    with pytest.raises(DataDamaged, match="larger"):
        store.read(SEGMENT, "depth", 0, 8)
    grow(path_of(store, "zarr.json"))
    with pytest.raises(DataDamaged, match="larger"):
        ReconstructionStore.open(store.url)


@pytest.mark.parametrize(
    "act",
    [
        upkeep.verify,
        upkeep.describe,
        lambda store: upkeep.list_garbage(store, 0),
        upkeep.repair,
        lambda store: store.commits("large"),
    ],
)
def test_many_large_records_are_not_held_at_once(store, act):
    for number in range(12):
        for name in ("commits/large/{}.json", "segments/0000/{}/zarr.json"):
            path = path_of(store, name.format(number))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            with path.open("r+b") as file:
                file.truncate(32 * 2**20)
    tracemalloc.start()
    try:
        act(store)
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()


class Server(http.server.ThreadingHTTPServer):
    """A web server that knows no ranges."""

    def handle_error(self, *_: object) -> None:
        """Whoever asked may hang up."""


@pytest.fixture
def web(store):
    """URL of a web server that has the store."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=Path(store.url).parent)
    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/drive.zarr"
        server.shutdown()
        thread.join()


def test_web_server_that_knows_no_ranges_is_read_up_to_the_limit(store, web):
    there = ReconstructionStore.open(web)
    np.testing.assert_array_equal(there.read(SEGMENT, "depth", 0, 8), 1.0)
    for name in ("probe", "infer/0000/0000"):
        with path_of(store, f"commits/{name}.json").open("r+b") as file:
            file.truncate(2**28)
    tracemalloc.start()
    try:
        for read in (there.read_frames, lambda: there.read(SEGMENT, "depth", 0, 8)):
            with pytest.raises(DataDamaged, match="is larger than 32 MiB"):
                read()
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()


def test_records_larger_than_memory_together_are_refused(store):
    for number in range(70):
        path = path_of(store, f"commits/{number}.json")
        path.touch()
        grow(path)
    with pytest.raises(DataDamaged, match=r"72 commits have 2310 MiB, more than .* any drive; run"):
        store.commits()
    with pytest.raises(DataDamaged, match="any drive"):
        upkeep.list_garbage(store, 0)


def test_array_with_metadata_of_megabytes_is_refused(store):
    document = path_of(store, f"{DEPTH}/zarr.json")
    node = json.loads(document.read_text())
    document.write_text(json.dumps({**node, "attributes": {"note": "x" * 2**20}}))
    with pytest.raises(DataDamaged, match="its metadata has 1"):
        store.read(SEGMENT, "depth", 0, 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data_type": "float64"}, "float64"),
        ({"data_type": {"name": "numpy.datetime64"}}, "datetime64"),
        ({"shape": [46, 48]}, "shape"),
        ({"shape": [2**40, 48, 64]}, "larger than anything"),
        ({"shape": [46, 2**20, 2**20]}, "larger than anything"),
        ({"shape": [-1, 48, 64]}, "lengths"),
        ({"shape": ["46", 48, 64]}, "lengths"),
        ({"codecs": [{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 1}}]}, "gzip"),
        ({"codecs": "zstd"}, "cannot be understood"),
        *(
            ({"codecs": [{"name": "numcodecs.pcodec", "configuration": settings}]}, "pcodec with")
            for settings in (
                {"id": "zlib", "level": 1},
                {"level": 8, "equal_pages_up_to": 0},
                {"level": 99},
                None,
            )
        ),
        ({"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 48, 64]}}}, "of"),
        ({"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [8, 1, 1]}}}, "of"),
        ({"codecs": sharded(0, 16, 64)}, "in parts of"),
        ({"codecs": sharded(8, 0, 64)}, "in parts of"),
        ({"codecs": sharded(8, 17, 64)}, "objects of"),
        ({"codecs": sharded(8, 17, 64, inner=[UPRIGHT, *PACKED])}, "strips of"),
        ({"codecs": sharded(8, 16, 32, inner=[UPRIGHT, *PACKED])}, "objects of"),
        ({"codecs": sharded(8, 16, 64, inner=[UPRIGHT, UPRIGHT, *PACKED])}, "codecs"),
        ({"codecs": sharded(8, 16, 64, inner=[OTHER_TURN, *PACKED])}, "objects of"),
        ({"codecs": sharded(8, 16, 64, inner=[UPRIGHT, {"name": "bytes"}])}, "codecs"),
        ({"codecs": [UPRIGHT, *sharded(8, 48, 64)]}, "codecs"),
        ({"codecs": sharded(8, 48, 64, index=[UPRIGHT, {"name": "bytes"}])}, "codecs"),
        ({"chunk_grid": None}, "cannot be understood"),
        ({"storage_transformers": [{"name": "other"}]}, "other"),
    ],
)
def test_array_of_another_layout_is_refused(store, change, said):
    document = path_of(store, f"{DEPTH}/zarr.json")
    document.write_text(json.dumps({**json.loads(document.read_text()), **change}))
    with pytest.raises(DataDamaged, match=said):
        store.read(SEGMENT, "depth", 0, 8)
    assert upkeep.verify(store) == [f"{DEPTH} chunk 0", f"{DEPTH}/zarr.json"]


@pytest.mark.parametrize("content", ["", "[1, 2]", "null", "[" * 100_000, '{"shape": {}}', "\x00"])
def test_metadata_that_is_no_metadata_is_refused(store, content):
    path_of(store, f"{DEPTH}/zarr.json").write_text(content)
    with pytest.raises(DataDamaged):
        store.read(SEGMENT, "depth", 0, 8)
    path_of(store, "zarr.json").write_text(content)
    with pytest.raises(NotAStore):
        ReconstructionStore.open(store.url)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ([2**24, 1, 1], "in parts of"),
        ([512, 2**12, 1], "in parts of"),
        ([1, 2**13, 1], "strips of"),
    ],
)
def test_shard_of_too_many_parts_is_refused(store, shape, said):
    document = path_of(store, f"{DEPTH}/zarr.json")
    node = json.loads(document.read_text())
    node["shape"] = node["chunk_grid"]["configuration"]["chunk_shape"] = shape
    node["codecs"][0]["configuration"]["chunk_shape"] = [1, 1, 1]
    document.write_text(json.dumps(node))
    with pytest.raises(DataDamaged, match=said):
        store.read(SEGMENT, "depth", 0, 8)


def test_codecs_in_an_order_that_nobody_can_read_are_damage(store):
    document = path_of(store, f"{DEPTH}/zarr.json")
    codecs = sharded(8, 48, 64, inner=PACKED, index=[{"name": "crc32c"}, {"name": "bytes"}])
    document.write_text(json.dumps({**json.loads(document.read_text()), "codecs": codecs}))
    with pytest.raises(DataDamaged, match="cannot decode"):
        store.read(SEGMENT, "depth", 0, 8)


def test_chunk_that_expands_is_not_decompressed(store):
    expands = Blosc("zstd", 3, Blosc.BITSHUFFLE).encode(np.zeros(2**28, np.uint8))
    (place,) = path_of(store, "frames/timestamp").glob("c.*")
    place.write_bytes(expands + google_crc32c.value(expands).to_bytes(4, "little"))
    assert place.stat().st_size < 2**20
    tracemalloc.start()
    try:
        with pytest.raises(DataDamaged, match="800 bytes"):
            store.read_frames()
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_depth_that_expands_is_not_unpacked(store):
    """By our own reader, and by Zarr's."""
    expands = PCodec(level=8).encode(np.zeros(2**26, np.float16))
    shard = shard_of_strips(expands)
    assert len(shard) < 2**20
    path_of(store, f"{DEPTH}/c.0.0.0").write_bytes(shard)
    tracemalloc.start()
    try:
        with pytest.raises(DataDamaged, match="no packed chunk"):
            store.read(SEGMENT, "depth", 0, 4)
        with pytest.raises(ValueError, match="no packed chunk"):
            zarr.open_array(path_of(store, DEPTH), mode="r")[0:4]
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def shard_of_strips(part: bytes) -> bytes:
    """The same for all three strips, with right checksums."""
    part += google_crc32c.value(part).to_bytes(4, "little")
    index = np.array([0, len(part)] * 3, "<u8").tobytes()
    return part + index + google_crc32c.value(index).to_bytes(4, "little")


def test_chunk_that_says_more_than_is_there_is_not_decompressed(store):
    (place,) = path_of(store, "frames/timestamp").glob("c.*")
    says = bytearray(place.read_bytes()[:-4])
    says[12:16] = (2**30).to_bytes(4, "little")
    place.write_bytes(says + google_crc32c.value(bytes(says)).to_bytes(4, "little"))
    with pytest.raises(DataDamaged, match="no compressed chunk"):
        store.read_frames()
    with pytest.raises(ValueError, match="no compressed chunk"):
        zarr.open_array(path_of(store, "frames/timestamp"), mode="r")[:]


def test_whole_array_larger_than_memory_is_not_read(store):
    document = path_of(store, "frames/timestamp/zarr.json")
    node = json.loads(document.read_text())
    node["shape"] = [2**30]
    document.write_text(json.dumps(node))
    with pytest.raises(DataDamaged, match="larger than anything"):
        store.read_frames()


@pytest.mark.parametrize(
    "plan",
    [
        {"frames": 10, "chunk_frames": 0, "segments": []},
        {"frames": 2**40, "chunk_frames": 1, "segments": []},
        {
            "frames": 2**20,
            "chunk_frames": 1,
            "segments": [{"index": i, "start": 0, "stop": 2**20, "part": 0} for i in range(100)],
        },
        {
            "frames": 10,
            "chunk_frames": 1,
            "segments": [{"index": 0, "start": 0, "stop": 2**40, "part": 0}],
        },
        {
            "frames": 10,
            "chunk_frames": 1,
            "segments": [{"index": 7, "start": 0, "stop": 9, "part": 0}],
        },
    ],
)
def test_plan_that_no_drive_has_is_refused(plan):
    with pytest.raises(ValueError, match="plan"):
        Plan.from_json(plan)


@pytest.mark.slow
def test_plan_of_a_day_in_short_segments_can_be_read_again(store):
    frames = 24 * 3600 * 60
    starts = range(0, frames - 4, 12)
    segments = tuple(Segment(i, s, min(s + 16, frames), 0) for i, s in enumerate(starts))
    store.update_attributes({"plan": Plan(frames, 16, segments).to_json()})
    assert path_of(store, "zarr.json").stat().st_size < LARGE * 0.75
    assert len(ReconstructionStore.open(store.url).attributes["plan"]["segments"]) == len(segments)


def test_frames_that_could_not_be_read_again_are_not_written(store):
    many = [np.broadcast_to(np.zeros((), t), MOST_FRAMES + 1) for t in ("f8", "i4", "i4", "u1")]
    with pytest.raises(ValueError, match="16777217 frames; a drive may have 16777216"):
        store.write_frames(*many)
    assert len(store.read_frames()["timestamp"]) == 100


def test_attributes_that_could_not_be_read_again_are_not_written(store, tmp_path):
    store.update_attributes({"drive": "mine"})
    with pytest.raises(ValueError, match=r"have 33 MiB, more than the 32 .* longer segments"):
        store.update_attributes({"plan": "x" * LARGE})
    with pytest.raises(ValueError, match="longer segments"):
        ReconstructionStore.create(store.url, {"plan": "x" * LARGE})
    assert ReconstructionStore.open(store.url).attributes["drive"] == "mine"
    with pytest.raises(ValueError, match="longer segments"):
        ReconstructionStore.create(tmp_path / "new.zarr", {"plan": "x" * LARGE})
    assert not (tmp_path / "new.zarr").exists()


@pytest.fixture
def full(store):
    """The store with a trajectory, a mesh and a plan too."""
    store.write_trajectory({"scale": np.ones(3)})
    store.commit("align", {"key": "k"})
    files = {"fusion/mesh.ply": store.put_file("fusion/mesh.ply", b"mesh")}
    store.commit("fuse/merged", {"key": "k", "files": files})
    store.update_attributes({"plan": {"segments": [{"index": 0}]}})
    assert upkeep.verify(store) == []
    return store


def change(store: ReconstructionStore, name: str, **changes: object) -> None:
    """Set fields of a record, or make it; attributes in the case of a group."""
    path = path_of(store, name)
    record = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**record, **changes}))


@pytest.mark.parametrize(
    ("commit", "changes"),
    [
        ("fuse/merged", {"files": {"../../etc/passwd": "00"}}),
        ("fuse/merged", {"files": {"/etc/passwd": "00"}}),
        ("fuse/merged", {"files": {"fusion/" + "a" * 300: "00"}}),
        ("fuse/merged", {"files": ["fusion/mesh.ply"]}),
        ("align", {"digests": [1]}),
        ("align", {"digests": "x"}),
        ("align", {"digests": {"/tmp/x": "00"}}),
        ("align", {"digests": {"../other.zarr/frames/clip": "00"}}),
        ("infer/0000/0000", {"digests": {"segments/0001/depth": "00"}}),
        ("infer/0000/0000", {"digests": {}}),
        ("infer/0000/0000", {"frames": None}),
        ("infer/0000/0000", {"frames": [0, 10**30]}),
        ("infer/0000/x", {"key": "k"}),
        ("infer/x/0000", {"key": "k"}),
        ("infer/0000", {"key": "k"}),
        ("infer/\u0663/0000", {"key": "k"}),
        ("infer/00000/0000", {"key": "k"}),
    ],
)
def test_malformed_commit_is_named_and_mended(full, commit, changes):
    change(full, f"commits/{commit}.json", **changes)
    upkeep.describe(full)
    upkeep.list_garbage(full, 0)
    assert upkeep.verify(full) == [f"commits/{commit}.json"]
    assert upkeep.repair(full) == [commit]
    assert upkeep.verify(full) == []


@pytest.mark.parametrize("content", ["", "[]", "null", "[" * 100_000, "{}", "large"])
def test_commit_that_is_no_record_is_named_and_mended(full, content):
    path_of(full, "commits/align.json").write_text(content)
    if content == "large":
        grow(path_of(full, "commits/align.json"))
    upkeep.describe(full)
    upkeep.list_garbage(full, 0)
    assert upkeep.verify(full) == ["commits/align.json"]
    assert upkeep.repair(full) == ["align"]


def test_file_that_is_a_folder_or_below_a_file_is_named(full):
    names = ("fusion", "fusion/mesh.ply/a.ply")
    change(full, "commits/fuse/merged.json", files={n: "00" for n in names[1:]})
    assert upkeep.verify(full) == ["fusion/mesh.ply/a.ply"]
    path_of(full, "fusion/tiles").mkdir()
    change(full, "commits/fuse/merged.json", files={"fusion/tiles": "00"})
    assert upkeep.verify(full) == ["fusion/tiles"]


def test_names_that_are_none_of_ours_count_for_nothing(full):
    for name in ("commits/a\nb.json", "commits/infer/a\\b.json", "claims/a\nb/000001.json"):
        change(full, name, key="k")
    assert upkeep.verify(full) == upkeep.repair(full) == []
    assert upkeep.list_garbage(full, 0) == upkeep.delete_garbage(full, 0) == {}
    upkeep.describe(full)


@pytest.mark.parametrize("content", ["{}", "[]", "", "nonsense", "large"])
@pytest.mark.parametrize("group", ["segments/0000", "trajectory", "segments/0000/gate", "fusion"])
def test_malformed_metadata_do_not_stop_the_four_commands(full, group, content):
    path_of(full, f"{group}/zarr.json").write_text(content)
    if content == "large":
        grow(path_of(full, f"{group}/zarr.json"))
    upkeep.describe(full)
    upkeep.list_garbage(full, 0)
    upkeep.repair(full)
    assert upkeep.verify(full) == []


@pytest.mark.parametrize("attributes", [{"start": "x"}, {"sizes": [1]}, {"chunk_frames": 0}])
def test_segment_with_malformed_attributes_does_not_exist(full, attributes):
    path = path_of(full, "segments/0000/zarr.json")
    node = json.loads(path.read_text())
    path.write_text(json.dumps({**node, "attributes": {**node["attributes"], **attributes}}))
    assert upkeep.describe(full)["segments"] == {}
    with pytest.raises(ChunkMissing, match="does not exist yet"):
        full.read(SEGMENT, "depth", 0, 8)


@pytest.mark.parametrize("plan", ["x", [1], {"segments": 1}, {"segments": [{"index": []}]}])
def test_segments_are_kept_where_the_plan_cannot_be_read(full, plan):
    full.create_segment(Segment(1, 40, 46, 0), 8, **SHAPE)
    full.update_attributes({"plan": plan})
    assert upkeep.list_garbage(full, 0) == {}


def test_root_without_a_version_is_refused(full):
    node = json.loads(path_of(full, "zarr.json").read_text())
    del node["attributes"]["schema_version"]
    path_of(full, "zarr.json").write_text(json.dumps(node))
    with pytest.raises(NotAStore, match="version"):
        ReconstructionStore.open(full.url)


@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "/etc"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("zarr.json", lambda store: store.attributes),
        ("commits/infer/0000/0000.json", lambda store: store.read_commit("infer/0000/0000")),
        ("segments/0000/state/tokens/c.0.0.0", lambda store: store.read_state(SEGMENT, FIRST)),
        ("segments/0000/depth/c.0.0.0", lambda store: store.read(SEGMENT, "depth", 0, 8)),
        ("segments/0000/cam_to_seg/c.0.0.0", lambda s: s.read(SEGMENT, "cam_to_seg", 0, 8)),
        ("report/report.html", lambda store: store.get_file("report/report.html")),
        ("report/report.html", lambda store: store.local_copy("report/report.html", store.url)),
    ],
)
def test_link_out_of_a_store_is_not_followed(store, name, read, target):
    store.put_file("report/report.html", b"<html>")
    path = path_of(store, name)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    with pytest.raises((StoreError, FileNotFoundError)) as refused:
        read(store)
    assert "root:" not in str(refused.value)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def move_behind_link(path: Path, place: Path) -> None:
    """Move a folder, or make one, and leave a link to it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.rename(place)
    else:
        place.mkdir()
    path.symlink_to(place)


OTHER_FRAMES = [np.zeros(9, t) for t in ("f8", "i4", "i4", "u1")]


@pytest.mark.parametrize(
    ("link", "act"),
    [
        ("report", lambda s: s.put_file("report/report.html", b"<html>")),
        ("report", lambda s: s.put_file("report/report.html", Path(__file__))),
        ("fusion/tiles", lambda s: s.put_file("fusion/tiles/a/b.ply", b"mesh")),
        ("fusion", lambda s: s.delete_files("fusion/")),
        ("commits", lambda s: s.commit("plan", {"key": "k"})),
        ("commits", lambda s: s.commit("plan", {"key": "k"}, exclusive=True)),
        ("commits", lambda s: s.drop_commits("")),
        ("commits", upkeep.repair),
        ("commits", lambda s: upkeep.delete_garbage(s, 0)),
        ("commits/infer", lambda s: s.drop_commits("infer")),
        ("claims", lambda s: s.claim("drive").__enter__()),
        ("claims", lambda s: upkeep.delete_garbage(s, 0)),
        ("segments", lambda s: s.remove_segment(0)),
        ("segments", lambda s: upkeep.delete_garbage(s, 0)),
        ("segments/0000", lambda s: s.remove_segment(0)),
        ("segments", lambda s: s.create_segment(Segment(1, 40, 46, 0), 8, **SHAPE)),
        ("frames/clip", lambda s: s.write_frames(*OTHER_FRAMES)),
        ("frames", lambda s: s.write_frames(*OTHER_FRAMES)),
        ("trajectory", lambda s: s.write_trajectory({"scale": np.ones(2)})),
        ("fusion", lambda s: upkeep.delete_garbage(s, 0)),
        ("fusion", upkeep.repair),
        ("segments/0000", upkeep.repair),
    ],
)
def test_nothing_is_written_or_removed_through_a_link_out_of_a_store(full, tmp_path, link, act):
    victim = tmp_path / "victim"
    move_behind_link(path_of(full, link), victim)
    (victim / "notes.json").write_text("{}")
    before = contents(victim)
    with suppress(DataDamaged):
        act(full)
    assert contents(victim) == before


@pytest.mark.parametrize(
    ("link", "look"),
    [
        ("fusion", lambda s: s.list_files("fusion/")),
        ("commits", lambda s: s.commit_names()),
        ("commits", upkeep.verify),
    ],
)
def test_nothing_is_listed_through_a_link_out_of_a_store(full, tmp_path, link, look):
    victim = tmp_path / "victim"
    move_behind_link(path_of(full, link), victim)
    (victim / "notes.json").write_text("{}")
    try:
        seen = str(look(full))
    except DataDamaged as refused:
        seen = str(refused)
    assert "notes" not in seen


def test_chunk_is_not_written_through_a_link_that_came_after_it_was_encoded(full, tmp_path):
    encoded = full.encode_chunk(SEGMENT, FIRST, chunk_arrays(FIRST, 2))
    victim = tmp_path / "victim"
    move_behind_link(path_of(full, "segments/0000/depth"), victim)
    before = contents(victim)
    with pytest.raises(DataDamaged, match="is a link that leads out of the store"):
        full.write_encoded([encoded])
    assert contents(victim) == before


@pytest.mark.parametrize(
    ("link", "act"),
    [
        ("report", lambda store: store.put_file("report/report.html", b"<html>")),
        ("fusion", lambda store: store.list_files("fusion/")),
        ("commits", upkeep.repair),
        ("segments/0000", lambda store: store.remove_segment(0)),
    ],
)
def test_link_out_of_a_store_is_named_in_one_line(full, tmp_path, link, act):
    move_behind_link(path_of(full, link), tmp_path / "victim")
    with pytest.raises(DataDamaged, match=rf"'{link}' is a link .* out of .*; remove the link"):
        act(full)


@pytest.mark.parametrize("link", ["commits", "fusion", "segments/0000", "trajectory"])
def test_links_to_a_store_and_inside_of_it_are_followed(full, tmp_path, link):
    moved = tmp_path / "elsewhere" / "drive.zarr"
    move_behind_link(Path(full.url), moved)
    move_behind_link(moved / link, moved / "large" / "place")
    (tmp_path / "parent").symlink_to(tmp_path)
    store = ReconstructionStore.open(tmp_path / "parent" / "drive.zarr")
    assert upkeep.verify(store) == []
    second = SEGMENT.chunks(8)[1]
    store.write_chunk(SEGMENT, second, chunk_arrays(second, 2.0))
    store.commit_chunk(SEGMENT, second, {"key": "k"})
    store.write_trajectory({"scale": np.full(2, 3.0)})
    store.commit("align", {"key": "k"})
    store.delete_files("fusion/")
    assert store.list_files() == []
    assert store.read(SEGMENT, "depth", 8, 16).max() == 2.0
    assert store.read_trajectory()["scale"].tolist() == [3.0, 3.0]
    assert upkeep.repair(store) == ["fuse/merged"]


def test_committed_file_that_became_a_link_out_of_a_store_is_named_and_mended(full, tmp_path):
    path_of(full, "fusion/mesh.ply").rename(tmp_path / "mesh.ply")
    path_of(full, "fusion/mesh.ply").symlink_to(tmp_path / "mesh.ply")
    assert upkeep.verify(full) == ["fusion/mesh.ply"]
    assert upkeep.repair(full) == ["fuse/merged"]
    full.put_file("fusion/mesh.ply", b"new")
    assert (tmp_path / "mesh.ply").read_bytes() == b"mesh"


def test_links_that_lead_nowhere_hide_nothing_beside_them(full, tmp_path):
    """A listing that is cut short would make garbage of all that it lacks."""
    commits, garbage = full.commit_names(), upkeep.list_garbage(full, 0)
    assert commits
    (tmp_path / "file").write_bytes(b"")
    ends = {"loop": "{0}", "lost": "nothing", "below": f"{tmp_path}/file/below"}
    links = [f"{name}-{number}" for name in ends for number in range(4)]
    for folder in ("commits/infer/0000", "segments/0000/depth"):
        for link in links:
            path_of(full, f"{folder}/{link}").symlink_to(ends[link.split("-")[0]].format(link))
    assert set(full.commit_names()) >= set(commits)
    added = upkeep.list_garbage(full, 0).keys() - garbage.keys()
    assert {name.rpartition("/")[2] for name in added} <= set(links)


def test_link_that_leads_to_itself_is_one_line(full):
    shutil.rmtree(path_of(full, "fusion"))
    path_of(full, "fusion").symlink_to("fusion")
    with pytest.raises(StoreError):
        full.put_file("fusion/mesh.ply", b"mesh")
    with pytest.raises((StoreError, FileNotFoundError)):
        full.get_file("fusion/mesh.ply")
