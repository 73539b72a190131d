import os
import threading
from dataclasses import replace

import fsspec
import numpy as np
import pytest

from storage import upkeep, video
from storage.errors import ChunkMissing, Claimed, DataDamaged, StoreUnavailable
from storage.local_folder import LocalFolder
from storage.reconstruction import ReconstructionStore
from storage.records import DriveRecord
from tasks import fuse
from tasks.align import align_stage
from tasks.config import AlignConfig, AnotherConfiguration, FuseConfig
from tasks.frames import DriveInput
from tasks.fuse import fuse_tiles_stage, merge_tiles_stage, plan_tiles_stage, read_some, runs_of
from tasks.fusion import choose_grid
from tasks.meshes import read_ply, weld, write_ply
from tasks.plan import plan_stage
from tasks.planned import read_plan
from ttt3r.weights import weights_info

VOXEL_M = 0.1
CONFIG = FuseConfig(voxel_m=VOXEL_M, depth_limit_m=6.0, smallest_piece=1)


def fuse_drive(drive) -> ReconstructionStore:
    for batch in range(plan_tiles_stage.fn(drive.url, CONFIG)):
        fuse_tiles_stage.fn(drive.url, [batch], CONFIG, drive.config.infer)
    merge_tiles_stage.fn(drive.url, CONFIG)
    return ReconstructionStore.open(drive.url)


@pytest.fixture(scope="module")
def aligned_once(inferred_corridor, tmp_path_factory):
    """For all tests of this file, which copy it."""
    drive = inferred_corridor.copy(tmp_path_factory.mktemp("aligned"))
    align_stage.fn(drive.url, AlignConfig(scale_prior_sigma=100.0), drive.config.infer)
    return drive


@pytest.fixture(scope="module")
def fused_once(aligned_once, tmp_path_factory):
    """For all tests of this file, which copy it."""
    drive = aligned_once.copy(tmp_path_factory.mktemp("fused"))
    fuse_drive(drive)
    return drive


@pytest.fixture
def aligned(aligned_once, tmp_path):
    return aligned_once.copy(tmp_path)


@pytest.fixture
def fused(fused_once, tmp_path):
    return fused_once.copy(tmp_path)


def mesh_and_unit(drive):
    """The mesh of the corridor and the metres of its world per metre."""
    store = ReconstructionStore.open(drive.url)
    return read_ply(store.get_file("fusion/mesh.ply")), store.read_trajectory()["scale"][0]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of three metres and little memory, so that even a corridor has several batches."""

    def choose(settings, *rest):
        return choose_grid(replace(settings, tile_m=3.0, max_volume_bytes=3_000_000), *rest)

    monkeypatch.setattr(fuse, "choose_grid", choose)


def test_batch_of_an_earlier_plan_writes_nothing_over_the_new_one_s(
    aligned, small_tiles, monkeypatch
):
    infer, store = aligned.config.infer, ReconstructionStore.open(aligned.url)
    coarser, begun = replace(CONFIG, voxel_m=0.15), []
    plan_tiles_stage.fn(aligned.url, CONFIG)
    right = fuse.require_inferred

    def meanwhile(*arguments):
        if not begun:
            begun.append(1)
            for batch in range(plan_tiles_stage.fn(aligned.url, coarser)):
                if batch != 4:  # which this run claims
                    fuse_tiles_stage.fn(aligned.url, [batch], coarser, infer)
        return right(*arguments)

    monkeypatch.setattr(fuse, "require_inferred", meanwhile)
    with pytest.raises(ValueError, match="planned for other settings than these"):
        fuse_tiles_stage.fn(aligned.url, [4], CONFIG, infer)
    batches = plan_tiles_stage.fn(aligned.url, coarser)
    assert batches > 5
    fuse_tiles_stage.fn(aligned.url, range(batches), coarser, infer)
    assert upkeep.verify(store) == []
    merge_tiles_stage.fn(aligned.url, coarser)


def test_fusion_that_is_stopped_waits_for_no_frame(aligned, small_tiles, monkeypatch):
    store = ReconstructionStore.open(aligned.url)
    record = DriveRecord.from_json(store.attributes["drive"])
    clips = tuple(replace(clip, is_seekable=False) for clip in record.clips)
    store.update_attributes({"drive": replace(record, clips=clips).to_json()})
    batches = plan_tiles_stage.fn(aligned.url, CONFIG)
    stop, decoded, right = threading.Event(), [], video.decode_steps

    def stopped_on_the_way(*arguments, **named):
        for step in right(*arguments, **named):
            decoded.append(step)
            if len(decoded) == 3:
                stop.set()
            yield step

    monkeypatch.setattr(video, "decode_steps", stopped_on_the_way)
    numbers = iter([batches - 1])  # the last tiles, of the last frames, from the first on
    infer = aligned.config.infer
    fuse.fuse_batches(aligned.url, range(batches), CONFIG, infer, lambda: next(numbers, None), stop)
    assert 3 <= len(decoded) < 8
    assert store.commit_names("fuse") == []
    fuse_tiles_stage.fn(aligned.url, [batches - 1], CONFIG, infer)  # not claimed any more
    assert len(decoded) > 20


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"confidence_cut": 0.0}, lambda grid, _: grid["min_confidence"]),
        ({"min_observations": 3}, lambda grid, _: grid["settings"]["min_observations"]),
        ({"frame_step": 2}, lambda _, frames: frames),
        ({"view_change": 0.5}, lambda _, frames: frames),
        ({"depth_limit_m": 4.0}, lambda grid, _: grid["depth_limit_m"]),
    ],
)
def test_settings_reach_the_plan_of_tiles(aligned, change, what):
    store, found = ReconstructionStore.open(aligned.url), []
    for config in (CONFIG, replace(CONFIG, **change)):
        batches = plan_tiles_stage.fn(aligned.url, config)
        records = [store.read_commit(f"tiles/{batch:04d}") for batch in range(batches)]
        runs = [run for r in records for tile in r["tiles"] for run in tile["frames"]]
        frames = {frame for start, stop in runs for frame in range(start, stop)}
        found.append(what(records[0]["grid"], len(frames)))
    assert found[0] != found[1]


def test_preview_has_no_more_triangles_than_it_should(aligned):
    config = replace(CONFIG, preview_triangles=150)
    fuse_tiles_stage.fn(
        aligned.url, range(plan_tiles_stage.fn(aligned.url, config)), config, aligned.config.infer
    )
    merge_tiles_stage.fn(aligned.url, config)
    preview = read_ply(ReconstructionStore.open(aligned.url).get_file("fusion/preview.ply"))
    assert 0 < len(preview.triangles) <= 150


def test_parts_get_meshes_of_their_own_and_the_longest_the_drive_s(corridor_drive):
    drive, store = corridor_drive, ReconstructionStore.open(corridor_drive.url)
    record = DriveRecord.from_json(store.attributes["drive"])
    store.update_attributes({"drive": replace(record, cuts=(14,)).to_json()})
    plan_stage.fn(drive.url, drive.config)
    plan = read_plan(store)
    assert [s.part for s in plan.segments] == [0, 1, 1]
    drive = replace(drive, scales=(1.0, 1.25, 1.25))
    drive.infer_perfectly()
    align_stage.fn(drive.url, AlignConfig(scale_prior_sigma=100.0), drive.config.infer)
    fuse_drive(drive)
    merged = store.read_commit("fuse/merged")
    assert [m["folder"] for m in merged["meshes"]] == ["fusion/part0000", "fusion"]
    for mesh, frame in zip(merged["meshes"], (13, 39), strict=True):
        # Fused up to some six metres before the last camera, in metres of the part's own world.
        far = read_ply(store.get_file(f"{mesh['folder']}/mesh.ply")).vertices[:, 2].max()
        last = store.read_trajectory()["cam_to_world"][frame, 2, 3]
        assert far == pytest.approx(last + 6, abs=0.6)
    assert upkeep.verify(store) == []


def test_fuse_puts_the_walls_where_they_are_without_a_step_at_the_seam(fused):
    mesh, unit = mesh_and_unit(fused)
    x, y, z = (mesh.vertices / unit).T
    to_wall = np.minimum(abs(abs(x) - 2.0), abs(abs(y) - 1.5))
    assert np.quantile(to_wall, 0.95) < VOXEL_M
    left = (x < -1.8) & (abs(y) < 1.2)
    # Frames 16 to 23 are seen by both segments, frame 20 is the seam: at z = 3 m.
    before, after = x[left & (z > 3.5) & (z < 4.5)], x[left & (z > 5.5) & (z < 6.5)]
    assert min(len(before), len(after)) > 50
    assert abs(before.mean() - after.mean()) < 0.1 * VOXEL_M


def test_meshes_say_the_licence_of_the_weights_and_follow_it(fused):
    store = ReconstructionStore.open(fused.url)
    names = [f"fusion/{name}" for name in ("mesh.ply", "mesh.glb", "preview.ply", "preview.glb")]
    for name in names:
        head = store.get_file(name)[:3000]
        assert b"licence of the weights: Apache-2.0" in head
        assert b"metres are the network's estimate" in head
    store.update_attributes({"weights": {**store.attributes["weights"], "licence": "CC BY-NC"}})
    tiles = store.commits("fuse/0000")
    merge_tiles_stage.fn(fused.url, CONFIG)
    assert all(b"licence of the weights: CC BY-NC" in store.get_file(n)[:3000] for n in names)
    assert store.commits("fuse/0000") == tiles
    assert upkeep.verify(store) == []


def test_fuse_keeps_the_colours_of_the_walls(fused):
    mesh, unit = mesh_and_unit(fused)
    x, y, _ = (mesh.vertices / unit).T
    left = mesh.colors[(x < -1.9) & (abs(y) < 1.0)].astype(float).mean(axis=0)
    right = mesh.colors[(x > 1.9) & (abs(y) < 1.0)].astype(float).mean(axis=0)
    assert left[0] > 150 > 100 > left[1]
    assert right[1] > 120 > 100 > right[0]


def test_fuse_commits_and_is_not_done_again(fused):
    before = ReconstructionStore.open(fused.url).commits("fuse")
    assert before.keys() == {"fuse/0000", "fuse/merged"}
    assert fuse_drive(fused).commits("fuse") == before


def test_many_tiles_give_the_mesh_of_one(fused, small_tiles):
    one, _ = mesh_and_unit(fused)
    store = ReconstructionStore.open(fused.url)
    store.drop_commits("tiles")
    store = fuse_drive(fused)
    assert store.read_commit("tiles")["batches"] > 3
    many = read_ply(store.get_file("fusion/mesh.ply"))
    assert write_ply(weld(many)) == write_ply(weld(one))


def test_batch_needs_only_its_own_plan_and_frames_as_runs(aligned, small_tiles):
    batches = plan_tiles_stage.fn(aligned.url, CONFIG)
    store = ReconstructionStore.open(aligned.url)
    assert batches > 3
    plans = [store.read_commit(f"tiles/{batch:04d}") for batch in range(batches)]
    # Forty frames on a straight road pass each tile once or twice.
    assert max(len(tile["frames"]) for plan in plans for tile in plan["tiles"]) <= 3
    for other in range(1, batches):
        store.drop_commits(f"tiles/{other:04d}")
    fuse_tiles_stage.fn(aligned.url, [0], CONFIG, aligned.config.infer)
    assert store.read_commit("fuse/0000")["files"].keys() == set(store.list_files("fusion/"))
    with pytest.raises(ValueError, match=r"batch 1 of the tiles .* is not planned"):
        fuse_tiles_stage.fn(aligned.url, [1], CONFIG, aligned.config.infer)
    assert plan_tiles_stage.fn(aligned.url, CONFIG) == batches
    assert [store.read_commit(f"tiles/{b:04d}")["tiles"] for b in range(batches)] == [
        plan["tiles"] for plan in plans
    ]


def frames_fused(store: ReconstructionStore) -> int:
    tiles = [t for record in store.commits("tiles").values() for t in record.get("tiles", ())]
    return max(stop for tile in tiles for _, stop in tile["frames"])


def test_frames_from_where_the_one_before_was_are_not_fused(fused):
    store = ReconstructionStore.open(fused.url)
    every = replace(CONFIG, view_change=0.0)
    plan_tiles_stage.fn(fused.url, every)
    assert frames_fused(store) == 40
    # Half of the median depth is many times the 0.15 m from frame to frame.
    seldom = replace(CONFIG, view_change=0.5)
    assert plan_tiles_stage.fn(fused.url, seldom) == 1
    assert 3 <= frames_fused(store) <= 6
    fuse_tiles_stage.fn(fused.url, [0], seldom, fused.config.infer)
    merge_tiles_stage.fn(fused.url, seldom)
    assert len(read_ply(store.get_file("fusion/mesh.ply")).triangles) > 1000


def test_merge_refuses_to_leave_a_batch_out(aligned, small_tiles):
    store = fuse_drive(aligned)
    store.drop_commits("fuse/merged")
    store.drop_commits("fuse/0001")
    with pytest.raises(ValueError, match="are not fused, the first is 1"):
        merge_tiles_stage.fn(aligned.url, CONFIG)


def test_listing_older_than_the_one_before_hides_no_tile(aligned, small_tiles, monkeypatch):
    store = fuse_drive(aligned)
    before = {name: store.read_commit(name) for name in ("tiles", "tiles/0000", "fuse/0000")}
    store.drop_commits("fuse/merged")
    listed = LocalFolder.sizes

    def sizes(folder, prefix=""):
        made_since = ("commits/tiles/", "commits/fuse/")
        return {n: s for n, s in listed(folder, prefix).items() if not n.startswith(made_since)}

    monkeypatch.setattr(LocalFolder, "sizes", sizes)
    assert {name: fuse_drive(aligned).read_commit(name) for name in before} == before


def test_merge_takes_no_tile_of_another_plan_and_none_that_is_not_what_was_fused(
    aligned, small_tiles
):
    store = fuse_drive(aligned)
    store.drop_commits("fuse/merged")
    fused = store.read_commit("fuse/0001")
    store.commit("fuse/0001", {**fused, "key": "that of another plan"})
    with pytest.raises(ValueError, match="are not fused, the first is 1"):
        merge_tiles_stage.fn(aligned.url, CONFIG)
    store.commit("fuse/0001", fused)
    tile = next(iter(fused["files"]))
    store.put_file(tile, b"what a worker wrote that was taken for dead")
    with pytest.raises(DataDamaged, match=f"{tile} of .* is not what was committed; run `ttt3r re"):
        merge_tiles_stage.fn(aligned.url, CONFIG)
    store.delete_files(tile)
    with pytest.raises(DataDamaged, match=f"{tile} of .* is gone; run `ttt3r repair {store.url}`"):
        merge_tiles_stage.fn(aligned.url, CONFIG)
    assert upkeep.repair(store) == ["fuse/0001"]
    fuse_drive(aligned)
    assert upkeep.verify(store) == []


def test_batch_is_fused_by_one_worker_and_for_the_settings_that_it_is_planned_for(aligned):
    plan_tiles_stage.fn(aligned.url, CONFIG)
    store, infer = ReconstructionStore.open(aligned.url), aligned.config.infer
    with store.claim("fuse/0000"), pytest.raises(Claimed):
        fuse_tiles_stage.fn(aligned.url, [0], CONFIG, infer)
    with pytest.raises(ValueError, match="planned for other settings than these"):
        fuse_tiles_stage.fn(aligned.url, [0], replace(CONFIG, frame_step=2), infer)
    assert store.commit_names("fuse") == []
    fuse_tiles_stage.fn(aligned.url, [0], CONFIG, infer)
    with store.claim("fuse/0000"):
        fuse_tiles_stage.fn(aligned.url, [0], CONFIG, infer)  # is finished: nobody is needed


def test_batch_is_fused_of_depth_of_one_network_only(aligned):
    plan_tiles_stage.fn(aligned.url, CONFIG)
    store, infer = ReconstructionStore.open(aligned.url), aligned.config.infer
    with pytest.raises(AnotherConfiguration, match="rule 'ttt3r', not 'cut3r'"):
        fuse_tiles_stage.fn(aligned.url, [0], CONFIG, replace(infer, rule="cut3r"))
    aligned.infer_one_chunk_otherwise()
    with pytest.raises(ChunkMissing, match="first is chunk 1 of segment 1"):
        fuse_tiles_stage.fn(aligned.url, [0], CONFIG, infer)
    assert store.commit_names("fuse") == []


@pytest.mark.parametrize(
    ("name", "commit"), [("mesh.ply", "fuse/merged"), ("preview.glb", "fuse/merged"), ("", "0000")]
)
def test_damaged_mesh_is_named_and_made_anew(fused, name, commit):
    store = ReconstructionStore.open(fused.url)
    assert upkeep.verify(store) == []
    name = f"fusion/{name}" if name else store.list_files("fusion/tiles")[0]
    sound = store.get_file(name)
    broken = bytearray(sound)
    broken[len(broken) // 2] ^= 1
    with fsspec.open(store.file_url(name), "wb") as file:
        file.write(bytes(broken))
    assert upkeep.verify(store) == [name]
    assert [dropped.rpartition(commit)[2] for dropped in upkeep.repair(store)] == [""]
    fuse_drive(fused)
    assert upkeep.verify(store) == []
    assert store.get_file(name) == sound


def test_full_temporary_folder_is_named_by_the_merge(fused, small_disk, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(small_disk.path))
    room = os.statvfs(small_disk.path)
    (small_disk.path / "other").write_bytes(bytes(room.f_bavail * room.f_frsize))
    store = ReconstructionStore.open(fused.url)
    store.drop_commits("fuse/merged")
    with pytest.raises(StoreUnavailable, match=rf"^{small_disk.path}: no space .* set TMPDIR"):
        merge_tiles_stage.fn(fused.url, CONFIG)
    (small_disk.path / "other").unlink()
    small_disk.resize(100)
    merge_tiles_stage.fn(fused.url, CONFIG)
    assert upkeep.verify(store) == []


def test_mesh_too_large_for_viewers_gets_no_glb(fused, monkeypatch):
    mesh, _ = mesh_and_unit(fused)
    store = ReconstructionStore.open(fused.url)
    ply = store.get_file("fusion/mesh.ply")
    store.drop_commits("tiles")
    monkeypatch.setattr(fuse, "LARGEST_GLB_TRIANGLES", len(mesh.triangles) - 1)
    fuse_drive(fused)
    written = [name for name in store.list_files("fusion/") if "/tiles/" not in name]
    assert written == ["fusion/mesh.ply", "fusion/preview.glb", "fusion/preview.ply"]
    assert store.get_file("fusion/mesh.ply") == ply
    assert upkeep.verify(store) == []


@pytest.mark.parametrize(
    ("numbers", "gap", "runs"),
    [
        ([], 0, []),
        ([4], 0, [(4, 5)]),
        ([0, 1, 2, 5, 6, 9], 0, [(0, 3), (5, 7), (9, 10)]),
        ([0, 1, 2, 5, 6, 9], 2, [(0, 10)]),
        ([0, 3, 7], 2, [(0, 4), (7, 8)]),
    ],
)
def test_runs_leave_out_gaps(numbers, gap, runs):
    assert runs_of(numbers, gap) == runs


def test_only_wanted_frames_are_prepared_and_long_gaps_are_not_decoded(corridor_drive, monkeypatch):
    decoded, prepared = [], []
    read, prepare = fuse.read_frames, fuse.preprocess_fast

    def spy_read(record, table, start, stop, **named):
        for number, frame in enumerate(read(record, table, start, stop, **named), start):
            decoded.append(number)
            yield frame

    def spy_prepare(frame, *rest):
        prepared.append(decoded[-1])
        return prepare(frame, *rest)

    monkeypatch.setattr(fuse, "read_frames", spy_read)
    monkeypatch.setattr(fuse, "preprocess_fast", spy_prepare)
    monkeypatch.setattr(fuse, "SKIPPED_FRAMES", 5)
    store = ReconstructionStore.open(corridor_drive.url)
    drive = DriveInput.from_store(store, weights_info("untrained").config)
    wanted = [2, 3, 8, 20, 39]
    got = list(read_some(drive, wanted))
    assert prepared == wanted
    assert decoded == [2, 3, 4, 5, 6, 7, 8, 20, 39]
    whole = list(drive.read(0, 40))
    for number, frame in zip(wanted, got, strict=True):
        np.testing.assert_array_equal(frame, whole[number])
