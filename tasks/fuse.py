"""Fuse: depth and trajectory into a mesh, tile by tile.

`plan_tiles_stage` cuts space into tiles and tiles into batches, `fuse_tiles_stage` fuses batches,
each in one pass over its frames, `merge_tiles_stage` joins the tiles of each part. None of them
holds more than a batch of tiles in memory, however long the drive.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prefect import task

from storage.errors import GivenUp
from storage.failures import scratch_folder
from storage.reconstruction import ReconstructionStore
from storage.records import Plan
from storage.video import read_frames
from tasks.attempts import attempt_id, counted
from tasks.config import FuseConfig, InferConfig
from tasks.frames import DriveInput
from tasks.fusion import (
    FusionFrame,
    FusionGrid,
    FusionSettings,
    Tile,
    choose_grid,
    distinct_views,
    filter_depth,
    frames_of,
    fuse_tiles,
    group_tiles,
    median_depth,
    plan_tiles,
)
from tasks.helpers import Take, share
from tasks.infer import require_inferred
from tasks.interruption import run_until_stopped
from tasks.keys import drop_later, find_key, require_key, stage_key
from tasks.meshes import Mesh, MeshWriter, read_ply, write_glb, write_ply
from tasks.pipelining import prefetch
from tasks.plan import require_network
from tasks.planned import longest_part, read_placed_plan, read_plan
from tasks.retries import STAGE_OPTIONS
from tasks.terms import Terms, read_terms
from tasks.tile_merge import TileIndex, TileSet, merge_tiles
from ttt3r.images import preprocess_fast
from ttt3r.weights import weights_info

VERSION = 6
MERGE_VERSION = 2
SAMPLED_FRAMES = 50  # of a part, to choose the grid
READ_AHEAD = 4  # frames
SKIPPED_FRAMES = 50  # so many unwanted frames in a row are not decoded
# Viewers give up on larger ones.
LARGEST_GLB_TRIANGLES = 5_000_000
WORTH_BATCHES = 6  # to fuse together: the start of a helper takes as long as some

log = logging.getLogger(__name__)


class DepthSource:
    """Filtered depth of one part, in metres of its world, frame by frame."""

    def __init__(self, store: ReconstructionStore, plan: Plan, part: int, step: int) -> None:
        self._store, self._plan = store, plan
        self._trajectory = store.read_trajectory()
        frames = np.flatnonzero(self._trajectory["part"] == part)
        self.frames = frames[::step]
        self.intrinsics = np.asarray(self._trajectory["intrinsics"], np.float64)
        self.focal_px = float(self.intrinsics[0, 0])

    def take_views(self, change: float, depth_m: float) -> None:
        """Keep only frames that see the scene from elsewhere; see `distinct_views`."""
        poses = self._trajectory["cam_to_world"][self.frames]
        self.frames = self.frames[distinct_views(poses, change, depth_m)]

    def owners(self, frames: NDArray[Any]) -> list[int]:
        """Indices of the segments that frames are read from."""
        return [int(index) for index in np.unique(self._trajectory["segment"][frames])]

    def sample(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Depths and confidences of some frames over the whole part."""
        chosen = self.frames[:: max(1, len(self.frames) // SAMPLED_FRAMES)]
        maps = [self._read(int(frame), int(frame) + 1) for frame in chosen]
        return np.concatenate([m[0] for m in maps]), np.concatenate([m[1] for m in maps])

    def _read(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Depth in metres of the world and confidence; all frames have one owner."""
        index = int(self._trajectory["segment"][start])
        segment = self._plan.segments[index]
        depth = self._store.read(segment, "depth", start, stop).astype(np.float32)
        confidence = self._store.read(segment, "confidence", start, stop).astype(np.float32)
        return depth * np.float32(self._trajectory["scale"][index]), confidence

    def read(self, frames: Sequence[int], grid: FusionGrid) -> Iterator[FusionFrame]:
        """Frames without colour, in the order given; neighbours are read together."""
        owners = self._trajectory["segment"]
        size = self._plan.chunk_frames
        position = 0
        while position < len(frames):
            first = frames[position]
            run = [f for f in frames[position : position + size] if owners[f] == owners[first]]
            run = [f for f in run if f < first + size]
            depth, confidence = self._read(first, run[-1] + 1)
            wanted = [f - first for f in run]
            depth = filter_depth(depth[wanted], confidence[wanted], self.focal_px, grid)
            for row, frame in enumerate(run):
                pose = self._trajectory["cam_to_world"][frame]
                yield FusionFrame(depth[row], self.intrinsics, pose)
            position += len(run)


@task(name="plan-tiles", task_run_name="plan tiles {url}", **STAGE_OPTIONS)
@counted("fuse")
def plan_tiles_stage(url: str, config: FuseConfig) -> int:
    """Choose the voxel grid of every part and cut it into batches of tiles.

    Each batch becomes a commit of its own, "tiles/0003", so that nobody reads all frames of
    all tiles; "tiles", written last, says how many there are.

    Returns:
        The number of batches.
    """
    store = ReconstructionStore.open(url)
    key = tiles_key(store, config)
    commit = store.read_commit("tiles")
    if commit is None or commit["key"] != key or not _is_planned(store, commit):
        store.drop_commits("tiles")
        drop_later(store, "tiles")
        store.delete_files("fusion/")
        commit = {"key": key, "batches": 0}
        for part in range(read_placed_plan(store).parts):
            for batch in _plan_part(store, part, config):
                store.commit(_planned_name(commit["batches"]), {"key": key, **batch})
                commit["batches"] += 1
        store.commit("tiles", {**commit, "attempt": attempt_id()})
    return int(commit["batches"])


def _plan_part(
    store: ReconstructionStore, part: int, config: FuseConfig
) -> Iterator[dict[str, Any]]:
    """One record for each batch of tiles of the part."""
    source = DepthSource(store, read_plan(store), part, config.frame_step)
    depths, confidences = source.sample()
    if not (depths > 0).any():
        log.warning("%s: part %d has no positive depth; it gets no mesh", store.url, part)
        return
    median = median_depth(depths)
    source.take_views(config.view_change, median)
    settings = FusionSettings(
        voxel_m=config.voxel_m,
        depth_limit_m=config.depth_limit_m,
        confidence_quantile=config.confidence_cut,
        min_observations=min(config.min_observations, len(source.frames)),
    )
    grid = choose_grid(settings, depths, source.focal_px, confidences)
    tiles = plan_tiles(source.read(source.frames.tolist(), grid), grid)
    for batch in group_tiles(tiles, grid):
        written = [{**asdict(t), "frames": runs_of(t.frames)} for t in batch]
        yield {"part": part, "depth_m": median, "grid": asdict(grid), "tiles": written}


def tiles_key(store: ReconstructionStore, config: FuseConfig) -> str:
    """Key of the planned tiles: the trajectory and the settings of fusion.

    Raises:
        ValueError: there is no trajectory yet.
    """
    return stage_key("fuse", VERSION, require_key(store, "align"), config)


def _planned_name(batch: int) -> str:
    return f"tiles/{batch:04d}"


def _is_planned(store: ReconstructionStore, commit: dict[str, Any]) -> bool:
    """Whether the record of every batch is there."""
    names = (_planned_name(batch) for batch in range(commit["batches"]))
    return all(store.read_commit(name) is not None for name in names)


def runs_of(numbers: Sequence[int], gap: int = 0) -> list[tuple[int, int]]:
    """Ascending numbers as runs [start, stop) that leave out at least `gap` + 1 numbers each."""
    if not len(numbers):
        return []
    values = np.asarray(numbers, np.int64)
    breaks = np.flatnonzero(np.diff(values) > gap + 1)
    first, last = np.r_[0, breaks + 1], np.r_[breaks, len(values) - 1]
    return [(int(values[a]), int(values[b]) + 1) for a, b in zip(first, last, strict=True)]


def _planned_tiles(record: dict[str, Any]) -> list[Tile]:
    """The tiles in the record of a batch."""
    tiles = []
    for tile in record["tiles"]:
        frames = tuple(n for start, stop in tile["frames"] for n in range(start, stop))
        tiles.append(Tile(tuple(tile["index"]), frames, tile["blocks"]))
    return tiles


def _grid(record: dict[str, Any]) -> FusionGrid:
    settings = FusionSettings(**record["grid"]["settings"])
    return FusionGrid(**{**record["grid"], "settings": settings})


@task(name="fuse-tiles", task_run_name="fuse tiles {url}", **STAGE_OPTIONS)
@counted("fuse")
def fuse_tiles_stage(
    url: str, batches: Sequence[int], config: FuseConfig, infer: InferConfig
) -> None:
    """Fuse some batches of tiles and write their meshes, in several processes if there are any.

    Raises:
        AnotherConfiguration: the drive is planned for another network by now.
        ChunkMissing: depth that a batch needs is of another one.
        Claimed: another worker is at one of the batches.
        ValueError: the tiles are planned for other settings by now, or not at all.
    """
    todo = unfused_batches(url, batches)
    there = partial(fuse_batches, url, todo, config, infer)
    run_until_stopped(
        lambda stop: share(len(todo), partial(there, stop=stop), there, stop, WORTH_BATCHES)
    )


def fuse_batches(
    url: str,
    batches: Sequence[int],
    config: FuseConfig,
    infer: InferConfig,
    take: Take,
    stop: threading.Event,
) -> None:
    """Fuse those of the batches that are taken, one after the other; also in a helper."""
    store = ReconstructionStore.open(url)
    with suppress(GivenUp):
        for position in iter(take, None):
            _fuse_batch(store, batches[position], config, infer, stop)


def _fuse_batch(
    store: ReconstructionStore,
    batch: int,
    config: FuseConfig,
    infer: InferConfig,
    stop: threading.Event,
) -> None:
    name, info = _fused_name(batch), weights_info(infer.weights)
    with store.claims({name: 0}, stop) as claims:
        claim = claims[name]
        require_network(store, infer, info)
        planned = _require_planned(store, batch, config)
        key = _fused_key(planned["key"], batch)
        if find_key(store, name) == key:
            return
        began = time.perf_counter()
        tiles, grid, part = _planned_tiles(planned), _grid(planned), planned["part"]
        drive = DriveInput.from_store(store, info.config)
        source = DepthSource(store, drive.plan, part, config.frame_step)
        source.take_views(config.view_change, planned["depth_m"])
        frames = colored_frames(drive, source, tiles, grid, stop)
        meshes = fuse_tiles(tiles, frames, grid)
        made = {tile_name(part, t.index): write_ply(m) for t, m in zip(tiles, meshes, strict=True)}
        require_inferred(store, source.owners(source.frames[frames_of(tiles)]), infer, info)
        # Tiles of all plans have the same names: those of an earlier one must not come last.
        _require_planned(store, batch, config)
        claim.check()
        files = {n: store.put_file(n, data) for n, data in made.items()}
        seconds = time.perf_counter() - began
        record = {"key": key, "part": part, "files": files, "seconds": seconds}
        claim.check()
        store.commit(name, {**record, "attempt": attempt_id()})


def unfused_batches(url: str, batches: Sequence[int]) -> list[int]:
    """Those of the batches of tiles that are not fused.

    Raises:
        ValueError: the tiles are not planned.
    """
    store = ReconstructionStore.open(url)
    fused = _fused(store, batches)
    return [batch for batch in batches if batch not in fused]


def _fused(store: ReconstructionStore, batches: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Records of those of the batches that are fused, by batch.

    Raises:
        ValueError: the tiles are not planned.
    """
    planned = require_key(store, "tiles")
    records = store.read_commits(_fused_name(batch) for batch in batches)
    found = {batch: records.get(_fused_name(batch), {}) for batch in batches}
    return {b: r for b, r in found.items() if r.get("key") == _fused_key(planned, b)}


def _fused_key(planned: str, batch: int) -> str:
    return stage_key("fuse-tiles", VERSION, planned, batch)


def _read_planned(store: ReconstructionStore, batch: int) -> dict[str, Any]:
    record = store.read_commit(_planned_name(batch))
    if record is None:
        raise ValueError(
            f"batch {batch} of the tiles of {store.url} is not planned; run `ttt3r reconstruct` "
            "again"
        )
    return record


def _require_planned(store: ReconstructionStore, batch: int, config: FuseConfig) -> dict[str, Any]:
    """The record of a batch, as long as it is of these settings."""
    planned = _read_planned(store, batch)
    if planned["key"] != tiles_key(store, config) or find_key(store, "tiles") != planned["key"]:
        raise ValueError(
            f"the tiles of {store.url} are planned for other settings than these; another "
            "run has planned them anew, this one is of no use any more"
        )
    return planned


def _fused_name(batch: int) -> str:
    return f"fuse/{batch:04d}"


def tile_name(part: int, index: TileIndex) -> str:
    """Name of a tile's file in the store."""
    x, y, z = index
    return f"fusion/tiles/part{part:04d}_{x}_{y}_{z}.ply"


def colored_frames(
    drive: DriveInput,
    source: DepthSource,
    tiles: Sequence[Tile],
    grid: FusionGrid,
    given_up: threading.Event,
) -> Iterator[FusionFrame]:
    """The frames that `tiles` need, with their colours, in order.

    Raises:
        GivenUp: `given_up` was set.
    """
    numbers = source.frames[frames_of(tiles)].tolist()
    with closing(prefetch(read_some(drive, numbers, given_up), READ_AHEAD)) as colors:
        for frame, color in zip(source.read(numbers, grid), colors, strict=True):
            yield replace(frame, color=color)


def read_some(
    drive: DriveInput, numbers: Sequence[int], given_up: threading.Event | None = None
) -> Iterator[np.ndarray]:
    """Preprocessed RGB frames [h, w, 3] of the drive, `numbers` ascending.

    Between two of them frames are decoded, as video asks for, and let go; longer gaps are
    sought over.

    Raises:
        GivenUp: `given_up` was set.
    """
    wanted = set(numbers)
    for start, stop in runs_of(numbers, SKIPPED_FRAMES):
        decoded = read_frames(drive.record, drive.frames, start, stop, given_up=given_up)
        for number, frame in zip(range(start, stop), decoded, strict=True):
            if number in wanted:
                yield preprocess_fast(frame, drive.config.image_size, drive.config.patch_size)


@task(name="merge-tiles", task_run_name="merge tiles {url}", **STAGE_OPTIONS)
@counted("fuse")
def merge_tiles_stage(url: str, config: FuseConfig) -> None:
    """Join the tiles of each part into its mesh, and decimate a preview.

    Each part gets mesh.ply and preview.ply, and of what is not empty preview.glb and, up to
    `LARGEST_GLB_TRIANGLES`, mesh.glb. See `merge_tiles` for what is held in memory.
    """
    store = ReconstructionStore.open(url)
    tiles = store.read_commit("tiles")
    if tiles is None:
        raise ValueError(f"the tiles of {url} are not planned; run `ttt3r reconstruct` again")
    terms = read_terms(store)
    key = merge_key(tiles["key"], terms)
    if find_key(store, "fuse/merged") == key:
        return
    began = time.perf_counter()
    planned = [_read_planned(store, batch) for batch in range(tiles["batches"])]
    digests = _require_fused(store, tiles["batches"])
    parts = store.read_trajectory()["part"]
    longest = longest_part(parts)
    meshes: list[dict[str, Any]] = []
    files: dict[str, str] = {}
    for part in range(int(parts.max()) + 1):
        folder = "fusion" if part == longest else f"fusion/part{part:04d}"
        mine = [record for record in planned if record["part"] == part]
        figures, written = merge_part(store, folder, mine, digests, config, terms)
        meshes.append({"part": part, "folder": folder, **figures})
        files |= written
    seconds = time.perf_counter() - began
    record = {"key": key, "meshes": meshes, "files": files, "seconds": seconds}
    store.commit("fuse/merged", {**record, "attempt": attempt_id()})


def merge_key(tiles: str, terms: Terms) -> str:
    """Key of the meshes of planned tiles, by the key of these and what the files say."""
    return stage_key("merge", MERGE_VERSION, tiles, terms)


def _require_fused(store: ReconstructionStore, batches: int) -> dict[str, str]:
    """Digests of all tiles, by name; refuses to make a mesh with holes."""
    fused = _fused(store, range(batches))
    missing = [batch for batch in range(batches) if batch not in fused]
    if missing:
        raise ValueError(
            f"{len(missing)} of {batches} batches of tiles of {store.url} are not fused, the "
            f"first is {missing[0]}; run `ttt3r reconstruct` again"
        )
    return {name: d for record in fused.values() for name, d in record["files"].items()}


def _read_tile(store: ReconstructionStore, name: str, digest: str) -> Mesh:
    return read_ply(store.get_file(name, digest))


def merge_part(
    store: ReconstructionStore,
    folder: str,
    planned: list[dict[str, Any]],
    digests: dict[str, str],
    config: FuseConfig,
    terms: Terms,
) -> tuple[dict[str, int], dict[str, str]]:
    """Write the meshes of one part into `folder`; return their figures and files' digests.

    `digests`: of the tiles' files, by name.

    Raises:
        DataDamaged: a tile is gone, or not what was fused.
    """
    if not planned:
        files = write_mesh(store, f"{folder}/mesh", Mesh.empty(), terms)
        files |= write_mesh(store, f"{folder}/preview", Mesh.empty(), terms)
        return {"vertices": 0, "triangles": 0}, files
    part = planned[0]["part"]
    # In the order in which the drive enters them, so that few borders wait for a neighbour.
    indices = tuple(tuple(tile["index"]) for record in planned for tile in record["tiles"])

    def read(index: TileIndex) -> Mesh:
        name = tile_name(part, index)
        return _read_tile(store, name, digests[name])

    tiles = TileSet(indices, read, _grid(planned[0]))
    with scratch_folder() as scratch:
        whole, preview = merge_tiles(
            tiles, config.smallest_piece, config.preview_triangles, scratch
        )
        files = write_whole(store, f"{folder}/mesh", whole, scratch, terms)
    files |= write_mesh(store, f"{folder}/preview", preview, terms)
    return {"vertices": whole.vertices, "triangles": whole.triangles}, files


def write_whole(
    store: ReconstructionStore, name: str, whole: MeshWriter, scratch: Path, terms: Terms
) -> dict[str, str]:
    """Write a mesh of any size as PLY, and as GLB unless it is empty or too large for that."""
    whole.write_ply(scratch / "mesh.ply", terms)
    files = {f"{name}.ply": store.put_file(f"{name}.ply", scratch / "mesh.ply")}
    if whole.triangles > LARGEST_GLB_TRIANGLES:
        log.info("%s: %s has %d triangles; no GLB of it", store.url, name, whole.triangles)
    elif whole.triangles:
        whole.write_glb(scratch / "mesh.glb", terms)
        files[f"{name}.glb"] = store.put_file(f"{name}.glb", scratch / "mesh.glb")
    return files


def write_mesh(store: ReconstructionStore, name: str, mesh: Mesh, terms: Terms) -> dict[str, str]:
    """Write a mesh as PLY and GLB, an empty one as PLY only, as glTF cannot hold it.

    Returns:
        Digests of the files by name.
    """
    files = {f"{name}.ply": store.put_file(f"{name}.ply", write_ply(mesh, terms))}
    if len(mesh.triangles):
        files[f"{name}.glb"] = store.put_file(f"{name}.glb", write_glb(mesh, terms))
    return files
