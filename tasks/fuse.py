"""Fuse: depth and trajectory into a mesh, tile by tile.

`plan_tiles_stage` cuts space into tiles and tiles into batches, `fuse_tiles_stage` fuses one
batch in one pass over its frames, `merge_tiles_stage` joins the tiles of each part.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prefect import task

from storage.reconstruction import ReconstructionStore
from storage.records import Plan
from tasks.config import FuseConfig, InferConfig
from tasks.frames import DriveInput
from tasks.fusion import (
    FusionFrame,
    FusionGrid,
    FusionSettings,
    Tile,
    choose_grid,
    filter_depth,
    frames_of,
    fuse_tiles,
    group_tiles,
    plan_tiles,
)
from tasks.keys import drop_later, stage_key
from tasks.meshes import (
    Mesh,
    decimate,
    merge_meshes,
    read_ply,
    remove_small_components,
    write_glb,
    write_ply,
)
from tasks.plan import read_plan, require_key
from tasks.retries import STAGE_OPTIONS
from ttt3r.weights import weights_info

VERSION = 2
SAMPLED_FRAMES = 50  # of a part, to choose the grid

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
def plan_tiles_stage(url: str, config: FuseConfig, infer: InferConfig) -> int:
    """Choose the voxel grid of every part and cut it into batches of tiles.

    Returns:
        The number of batches.
    """
    store = ReconstructionStore.open(url)
    key = stage_key("fuse", VERSION, require_key(store, "align"), config)
    commit = store.read_commit("tiles")
    if commit is None or commit["key"] != key:
        store.drop_commits("tiles")
        drop_later(store, "tiles")
        store.delete_files("fusion/")
        parts = [_plan_part(store, part, config) for part in range(read_plan(store).parts)]
        commit = {"key": key, "parts": parts}
        store.commit("tiles", commit)
    return sum(len(part["batches"]) for part in commit["parts"])


def _plan_part(store: ReconstructionStore, part: int, config: FuseConfig) -> dict[str, Any]:
    source = DepthSource(store, read_plan(store), part, config.frame_step)
    depths, confidences = source.sample()
    if not (depths > 0).any():
        log.warning("%s: part %d has no positive depth; it gets no mesh", store.url, part)
        return {"part": part, "grid": None, "batches": []}
    settings = FusionSettings(
        voxel_m=config.voxel_m,
        depth_limit_m=config.depth_limit_m,
        confidence_quantile=config.confidence_cut,
        min_observations=min(config.min_observations, len(source.frames)),
    )
    grid = choose_grid(settings, depths, source.focal_px, confidences)
    tiles = plan_tiles(source.read(source.frames.tolist(), grid), grid)
    batches = group_tiles(tiles, grid)
    return {
        "part": part,
        "grid": asdict(grid),
        "batches": [[asdict(tile) for tile in batch] for batch in batches],
    }


@task(name="fuse-tiles", task_run_name="fuse tiles {batch} {url}", **STAGE_OPTIONS)
def fuse_tiles_stage(url: str, batch: int, config: FuseConfig, infer: InferConfig) -> None:
    """Fuse one batch of tiles and write their meshes."""
    store = ReconstructionStore.open(url)
    commit = store.read_commit("tiles")
    if commit is None:
        raise ValueError(f"the tiles of {url} are not planned; run `ttt3r reconstruct` again")
    key = stage_key("fuse-tiles", VERSION, commit["key"], batch)
    if (store.read_commit(f"fuse/{batch:04d}") or {}).get("key") == key:
        return
    began = time.perf_counter()
    part, tiles = [(part, tiles) for part in commit["parts"] for tiles in part["batches"]][batch]
    settings = FusionSettings(**part["grid"]["settings"])
    grid = FusionGrid(**{**part["grid"], "settings": settings})
    drive = DriveInput.from_store(store, weights_info(infer.weights).config)
    source = DepthSource(store, drive.plan, part["part"], config.frame_step)
    wanted = [Tile(tuple(t["index"]), tuple(t["frames"]), t["blocks"]) for t in tiles]
    frames = colored_frames(drive, source, wanted, grid)
    names = []
    for tile, mesh in zip(wanted, fuse_tiles(wanted, frames, grid), strict=True):
        names.append(tile_name(part["part"], tile))
        store.put_file(names[-1], write_ply(mesh))
    seconds = time.perf_counter() - began
    record = {"key": key, "tiles": names, "part": part["part"], "seconds": seconds}
    store.commit(f"fuse/{batch:04d}", record)


def tile_name(part: int, tile: Tile) -> str:
    """Name of a tile's file in the store."""
    x, y, z = tile.index
    return f"fusion/tiles/part{part:04d}_{x}_{y}_{z}.ply"


def colored_frames(
    drive: DriveInput, source: DepthSource, tiles: Sequence[Tile], grid: FusionGrid
) -> Iterator[FusionFrame]:
    """The frames that `tiles` need, with their colours, in order."""
    numbers = source.frames[frames_of(tiles)].tolist()
    colors = drive.read(numbers[0], numbers[-1] + 1)
    decoded = range(numbers[0], numbers[-1] + 1)
    wanted = set(numbers)
    needed = (color for number, color in zip(decoded, colors, strict=True) if number in wanted)
    for frame, color in zip(source.read(numbers, grid), needed, strict=True):
        yield replace(frame, color=color)


@task(name="merge-tiles", task_run_name="merge tiles {url}", **STAGE_OPTIONS)
def merge_tiles_stage(url: str, config: FuseConfig) -> None:
    """Join the tiles of each part into its mesh, and decimate a preview."""
    store = ReconstructionStore.open(url)
    commit = store.read_commit("tiles")
    if commit is None:
        raise ValueError(f"the tiles of {url} are not planned; run `ttt3r reconstruct` again")
    key = stage_key("merge", VERSION, commit["key"])
    if (store.read_commit("fuse/merged") or {}).get("key") == key:
        return
    began = time.perf_counter()
    batches = store.commits("fuse")
    parts = store.read_trajectory()["part"]
    longest = int(np.bincount(parts).argmax())
    figures = []
    for part in range(int(parts.max()) + 1):
        names = [n for b in batches.values() if b.get("part") == part for n in b["tiles"]]
        mesh = merge_meshes([read_ply(store.get_file(name)) for name in names])
        mesh = remove_small_components(mesh, config.smallest_piece)
        folder = "fusion" if part == longest else f"fusion/part{part:04d}"
        write_mesh(store, f"{folder}/mesh", mesh)
        write_mesh(store, f"{folder}/preview", decimate(mesh, config.preview_triangles))
        figures.append(
            {
                "part": part,
                "folder": folder,
                "vertices": len(mesh.vertices),
                "triangles": len(mesh.triangles),
            }
        )
    seconds = time.perf_counter() - began
    store.commit("fuse/merged", {"key": key, "meshes": figures, "seconds": seconds})


def write_mesh(store: ReconstructionStore, name: str, mesh: Mesh) -> None:
    """Write a mesh as PLY and GLB; an empty one as PLY only, as glTF cannot hold it."""
    store.put_file(f"{name}.ply", write_ply(mesh))
    if len(mesh.triangles):
        store.put_file(f"{name}.glb", write_glb(mesh))
