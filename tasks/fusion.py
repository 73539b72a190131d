"""TSDF fusion of depth frames into surface meshes, one spatial tile at a time.

Space is cut into tiles, tiles into blocks, blocks into voxels. Tile (0, 0, 0) is centred on
the origin of the world, the first camera, so that a straight drive runs through the middle
of its tiles. A frame changes blocks near its measured surface, and only those that may hold
a voxel that it measures, in whatever tile they lie. Each tile is fused by itself, with a
halo of one block, and keeps the triangles whose centroid lies inside it. As a block sees the
same frames in the same order in every tile that holds it, neighbouring tiles meet to the
last bit: all tiles joined are the mesh of one large tile.

Order of use: `choose_grid` and `distinct_views` once, `filter_depth` on every depth,
`plan_tiles` over all frames, `group_tiles`, then `fuse_tiles` for each group, in parallel if
wanted.

Open3D needs seconds to import, so functions that use it import it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tasks.memory import return_freed_memory
from tasks.meshes import Mesh, weld

_BYTES_PER_VOXEL = 20  # distance, weight and three colours, float32 each
_CORNERS = np.array(list(itertools.product((-1, 1), repeat=3)))
_OCTANTS = np.array(list(itertools.product((0, 1), repeat=3)))


@dataclass(frozen=True)
class FusionSettings:
    """What a user may choose; None means that `choose_grid` derives it from the scene."""

    voxel_m: float | None = None  # edge of a voxel; None: a pixel at the median depth
    truncation_voxels: int = 5  # half thickness of the fused layer; at most 8
    depth_limit_m: float | None = None  # ignore what is farther; None: 3 x the median depth
    tile_m: float | None = None  # edge of a tile, rounded to whole blocks; None: 256 voxels
    min_observations: int = 2  # views that must agree that a surface is there
    upsampling: int | None = None  # samples a pixel and axis; None: about two a voxel
    confidence_quantile: float = 0.1  # share of what is within the limit to drop
    edge_jump: float = 0.1  # relative kink in inverse depth that marks a depth edge
    max_incidence_deg: float = 86.0  # surfaces seen more obliquely are dropped
    max_volume_bytes: int = 1_000_000_000  # bound on the volume of a tile
    batch_bytes: int = 150_000_000  # volumes of smaller tiles are held together up to this

    def __post_init__(self) -> None:
        for name in ("voxel_m", "depth_limit_m", "tile_m"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise ValueError(f"{name} is {value}; expected metres above 0, or None")
        if not 1 <= self.truncation_voxels <= 8:
            raise ValueError(f"truncation_voxels is {self.truncation_voxels}; expected 1 to 8")
        if self.min_observations < 1 or (self.upsampling is not None and self.upsampling < 1):
            raise ValueError(
                f"min_observations is {self.min_observations} and upsampling "
                f"{self.upsampling}; both must be at least 1"
            )
        if not 0 <= self.confidence_quantile < 1:
            raise ValueError(
                f"confidence_quantile is {self.confidence_quantile}; expected 0 to below 1"
            )
        if not 0 < self.max_incidence_deg < 90 or self.edge_jump <= 0:
            raise ValueError(
                f"max_incidence_deg is {self.max_incidence_deg} and edge_jump {self.edge_jump}; "
                "expected an angle between 0 and 90 and a jump above 0"
            )


@dataclass(frozen=True)
class FusionGrid:
    """Every length and threshold of one fusion, resolved: the same for all tiles of a part."""

    voxel_m: float
    depth_limit_m: float
    min_confidence: float | None  # measurements below are dropped; None keeps all
    tile_blocks: int  # blocks along the edge of a tile
    upsampling: int  # depth is interpolated to this many samples a pixel and axis
    settings: FusionSettings = field(default_factory=FusionSettings)

    def __post_init__(self) -> None:
        if self.tile_blocks < 2:
            raise ValueError(f"tile_blocks is {self.tile_blocks}; expected at least 2")
        if self.tile_bytes > self.settings.max_volume_bytes:
            raise ValueError(
                f"a tile of {self.tile_m:g} m at voxels of {self.voxel_m:g} m may need "
                f"{self.tile_bytes / 1e9:.2g} GB, more than max_volume_bytes "
                f"({self.settings.max_volume_bytes / 1e9:.2g} GB); use smaller tiles"
            )

    @property
    def block_voxels(self) -> int:
        """Voxels along the edge of a block, which is no shorter than the truncation distance."""
        return _block_voxels(self.settings)

    @property
    def block_m(self) -> float:
        """Edge of a block, metres."""
        return self.voxel_m * self.block_voxels

    @property
    def truncation_m(self) -> float:
        """Half thickness of the fused layer, metres."""
        return self.voxel_m * self.settings.truncation_voxels

    @property
    def tile_m(self) -> float:
        """Edge of a tile, metres."""
        return self.block_m * self.tile_blocks

    def first_block(self, index: tuple[int, int, int]) -> np.ndarray:
        """Block at the low corner of a tile, int64 [3]."""
        return np.array(index, np.int64) * self.tile_blocks - self.tile_blocks // 2

    def tile_bounds(self, index: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Low corner, inside, and high corner, outside, of a tile: [3] metres of the world."""
        first = self.first_block(index)
        return first * self.block_m, (first + self.tile_blocks) * self.block_m

    @property
    def tile_bytes(self) -> int:
        """Most memory that the blocks of a tile can take, whatever the frames."""
        return ((self.tile_blocks + 2) * self.block_voxels) ** 3 * _BYTES_PER_VOXEL


@dataclass(frozen=True)
class FusionFrame:
    """One filtered depth image and where it was taken."""

    depth: np.ndarray  # float32 [H,W] z-depth, metres of the world; NaN or <= 0: no measurement
    intrinsics: np.ndarray  # [3,3] pixels; the centre of the top-left pixel is (0, 0)
    T_world_cam: np.ndarray  # [4,4] rigid
    color: np.ndarray | None = None  # uint8 [H,W,3] RGB; planning needs none, without: grey

    def __post_init__(self) -> None:
        if self.depth.ndim != 2 or min(self.depth.shape) < 2:
            raise ValueError(f"depth has shape {self.depth.shape}; expected [H,W], 2 or more each")
        if self.intrinsics.shape != (3, 3) or self.T_world_cam.shape != (4, 4):
            raise ValueError(
                f"intrinsics have shape {self.intrinsics.shape} and T_world_cam "
                f"{self.T_world_cam.shape}; expected [3,3] and [4,4]"
            )
        if self.color is not None and (
            self.color.shape != (*self.depth.shape, 3) or self.color.dtype != np.uint8
        ):
            raise ValueError(
                f"color is {self.color.dtype} {self.color.shape}; "
                f"expected uint8 {(*self.depth.shape, 3)}, one pixel for each of depth"
            )
        _check_rigid(self.T_world_cam)


@dataclass(frozen=True)
class PreparedFrame:
    """A frame with its pixels interpolated and the blocks it measures: ready for any tile."""

    depth: np.ndarray  # float32 [h,w] metres, 0 where nothing was measured
    color: np.ndarray  # float32 [h,w,3] in [0,1]
    intrinsics: np.ndarray  # [3,3]
    T_world_cam: np.ndarray  # [4,4]
    blocks: np.ndarray  # int32 [B,3], distinct


@dataclass(frozen=True)
class Tile:
    """One cube of the world, and the frames that see something in it."""

    index: tuple[int, int, int]  # see `FusionGrid.tile_bounds`
    frames: tuple[int, ...]  # positions in the sequence that was planned, ascending
    blocks: int  # that all frames together touch, halo included


def choose_grid(
    settings: FusionSettings,
    depths: np.ndarray,
    focal_px: float,
    confidences: np.ndarray | None = None,
) -> FusionGrid:
    """Resolve the settings that depend on the scene, once for a whole part of a drive.

    The voxel is what one pixel covers at the median depth, kept between 1/250 and 1/40 of
    that depth: finer than a network's depth is precise makes noise, not detail.

    Args:
        depths: any shape, metres of the world: a sample of the depths to fuse.
        focal_px: in pixels of these depth images.
        confidences: same shape as `depths`, for `confidence_quantile`.
    """
    if not 0 < focal_px < np.inf:
        raise ValueError(f"focal_px is {focal_px}; expected pixels above 0")
    median = median_depth(depths)
    voxel = settings.voxel_m or float(np.clip(median / focal_px, median / 250, median / 40))
    block = voxel * _block_voxels(settings)
    limit = settings.depth_limit_m or 3 * median
    threshold = None
    if confidences is not None and settings.confidence_quantile > 0:
        # Sky, which is beyond the limit, is seen without confidence: it would be all that is cut.
        known = confidences[_measured(depths) & (depths <= limit) & np.isfinite(confidences)]
        threshold = _nearest_cut(known, settings.confidence_quantile)
    return FusionGrid(
        voxel_m=voxel,
        depth_limit_m=limit,
        min_confidence=threshold,
        tile_blocks=max(2, round((settings.tile_m or 256 * voxel) / block)),
        upsampling=settings.upsampling or int(np.clip(round(2 * median / focal_px / voxel), 1, 3)),
        settings=settings,
    )


def _nearest_cut(values: np.ndarray, share: float) -> float | None:
    """The value below which lies the share of `values` nearest to `share`; None without values.

    Stored confidence has few values, so that a quantile may have a third of all on its one side.
    """
    if not len(values):
        return None
    levels, counts = np.unique(values, return_counts=True)
    below = (np.cumsum(counts) - counts) / len(values)
    return float(levels[np.abs(below - share).argmin()])


def median_depth(depths: np.ndarray) -> float:
    """Median of the measured depths, any shape; ValueError where there is none."""
    is_measured = _measured(depths)
    if not is_measured.any():
        raise ValueError(f"none of {depths.size} depth samples is positive: nothing to fuse")
    return float(np.median(depths[is_measured]))


def distinct_views(cam_to_world: np.ndarray, change: float, depth_m: float) -> np.ndarray:
    """Positions of the frames that see the scene from elsewhere than the one taken before.

    From the first on, each that has moved by `change` times the depth, or turned by `change`
    radians, since the last one taken. A network errs alike in frames alike, so what they agree
    on need not be there (`FusionSettings.min_observations`), and a car that waits would add the
    same picture to a mesh a thousand times.

    Args:
        cam_to_world: poses [N,4,4], rigid, metres.
        change: share of the depth, and radians; 0 takes every frame.
        depth_m: of the scene.

    Returns:
        int64 [V], ascending.
    """
    taken: list[int] = []
    # The trace of a rotation between two frames by an angle is 1 + 2 cos(angle).
    most_alike = 1 + 2 * np.cos(change)
    for number, pose in enumerate(cam_to_world):
        if taken:
            last = cam_to_world[taken[-1]]
            has_moved = np.linalg.norm(pose[:3, 3] - last[:3, 3]) >= change * depth_m
            has_turned = (pose[:3, :3] * last[:3, :3]).sum() <= most_alike
            if not (has_moved or has_turned):
                continue
        taken.append(number)
    return np.array(taken, np.int64)


def filter_depth(
    depth: np.ndarray, confidence: np.ndarray | None, focal_px: float, grid: FusionGrid
) -> np.ndarray:
    """Set to NaN what should not be fused: far, doubtful, oblique, and at depth edges.

    On a plane, inverse depth is a linear function of the pixel. So a kink in inverse depth
    marks an edge or a flying pixel even on a road at a flat angle, where depth itself jumps
    from row to row; its slope tells the angle of incidence.

    Args:
        depth: [...,H,W] metres of the world.
        confidence: [...,H,W] or None.
        focal_px: in pixels of these images.

    Returns:
        float32 [...,H,W], a copy.
    """
    if confidence is not None and confidence.shape != depth.shape:
        raise ValueError(
            f"confidence has shape {confidence.shape}, depth {depth.shape}; expected the same"
        )
    depth = np.array(depth, np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        depth[~_measured(depth)] = np.nan
        inverse = 1 / depth
        max_slope = np.tan(np.radians(grid.settings.max_incidence_deg)) / focal_px
        is_edge = _is_edge(inverse, -1, max_slope, grid.settings.edge_jump)
        is_edge |= _is_edge(inverse, -2, max_slope, grid.settings.edge_jump)
        depth[is_edge | (depth > grid.depth_limit_m)] = np.nan
    if confidence is not None and grid.min_confidence is not None:
        depth[~(confidence >= grid.min_confidence)] = np.nan
    return depth


def prepare(frame: FusionFrame, grid: FusionGrid) -> PreparedFrame:
    """Interpolate depth and colour and find the blocks that the frame measures."""
    depth, intrinsics = _dense_depth(frame, grid)
    blocks = measured_blocks(depth, intrinsics, frame.T_world_cam, grid)
    if frame.color is None:
        color = np.full((*depth.shape, 3), 0.5, np.float32)
    else:
        # As large as the depth: from another size Open3D takes half of the colours from the
        # pixel beside.
        dense = frame.color.repeat(grid.upsampling, axis=0).repeat(grid.upsampling, axis=1)
        color = dense.astype(np.float32) / 255
    return PreparedFrame(depth, color, intrinsics, frame.T_world_cam, blocks.astype(np.int32))


def upsample_depth(
    depth: np.ndarray, intrinsics: np.ndarray, factor: int
) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate depth to `factor` samples a pixel along each axis; planes stay planes.

    Interpolates inverse depth, which is linear on planes. Next to a pixel without a
    measurement the nearest pixel is repeated instead.

    Returns:
        float32 [factor*H,factor*W], NaN where nothing was measured, and its [3,3] intrinsics.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        inverse = np.where(depth > 0, np.float32(1) / depth, np.float32(np.nan))
        for axis in (0, 1) if factor > 1 else ():
            inverse = _interpolate(inverse, axis, factor)
        dense = np.where(inverse > 0, np.float32(1) / inverse, np.float32(np.nan))
    return dense, _scale_intrinsics(intrinsics, factor)


def touched_blocks(
    depth: np.ndarray, intrinsics: np.ndarray, T_world_cam: np.ndarray, grid: FusionGrid
) -> np.ndarray:
    """Blocks within one block of the measured surface, in cubes of 2 x 2 x 2: int64 [B,3].

    A block is at least the truncation distance.
    """
    points = _world_points(depth, intrinsics, T_world_cam)
    # A block grown by one block each way meets 2 x 2 x 2 cubes.
    blocks = _distinct(np.floor(points / grid.block_m).astype(np.int64))
    cubes = _distinct(((blocks[:, None] + _CORNERS) >> 1).reshape(-1, 3))
    return (cubes[:, None] * 2 + _OCTANTS).reshape(-1, 3)


def measured_blocks(
    depth: np.ndarray, intrinsics: np.ndarray, T_world_cam: np.ndarray, grid: FusionGrid
) -> np.ndarray:
    """Those of `touched_blocks` that may hold a measured voxel: int64 [B,3].

    A voxel is measured if the depth at its pixel is not more than the truncation distance
    before it. Most blocks near a surface hold none: they lie behind it, or beside the image or
    what was measured of it.
    """
    blocks = touched_blocks(depth, intrinsics, T_world_cam, grid)
    u, v, z = _corner_pixels(blocks, intrinsics, T_world_cam, grid)
    # A border of pixels without measurement takes what is projected beside the image.
    height, width = np.add(depth.shape, 2)
    framed = np.zeros((height, width), np.float32)
    framed[1:-1, 1:-1] = depth
    left, right = _whole(u.min(axis=0) + 1, width), _whole(u.max(axis=0) + 1, width)
    top, bottom = _whole(v.min(axis=0) + 1, height), _whole(v.max(axis=0) + 1, height)
    farthest = _largest(framed, top, bottom, left, right)
    is_measured = (farthest > 0) & (farthest + grid.truncation_m >= z.min(axis=0))
    return blocks[is_measured | np.isinf(z).any(axis=0)]


def plan_tiles(frames: Iterable[FusionFrame], grid: FusionGrid) -> list[Tile]:
    """Tiles that hold measured surface, in order of their index.

    Frames are read once and not kept; they need no colour. Give `fuse_tiles` the same depths.
    """
    seen: dict[tuple[int, int, int], np.ndarray] = {}  # a bit for each block
    has_surface: set[tuple[int, int, int]] = set()
    frames_of: dict[tuple[int, int, int], list[int]] = {}
    side = grid.tile_blocks + 2
    for number, frame in enumerate(frames):
        depth, intrinsics = _dense_depth(frame, grid)
        blocks = measured_blocks(depth, intrinsics, frame.T_world_cam, grid)
        for index in _tiles_of(blocks, grid):
            local = _local_blocks(blocks, index, grid)
            bits = seen.setdefault(index, np.zeros(side**3 // 8 + 1, np.uint8))
            position = np.ravel_multi_index(tuple(local.T), (side, side, side))
            np.bitwise_or.at(bits, position >> 3, np.left_shift(1, position & 7).astype(np.uint8))
            if ((local > 0) & (local <= grid.tile_blocks)).all(axis=1).any():
                has_surface.add(index)
            frames_of.setdefault(index, []).append(number)
    return [
        Tile(index, tuple(frames_of[index]), int(np.bitwise_count(seen[index]).sum()))
        for index in sorted(has_surface)
        if len(frames_of[index]) >= grid.settings.min_observations
    ]


def _corner_pixels(
    blocks: np.ndarray, intrinsics: np.ndarray, T_world_cam: np.ndarray, grid: FusionGrid
) -> np.ndarray:
    """Column, row and depth, float32 [3,8,B], of the voxels in the corners of `blocks` [B,3].

    The top-left pixel spans (0, 0) to (1, 1). Voxels behind the camera have infinite depth.
    """
    project = _open3d_intrinsics(intrinsics) @ np.linalg.inv(T_world_cam.astype(np.float64))[:3]
    rotation, side = project[:, :3] * grid.voxel_m, grid.block_voxels
    first = (rotation @ (blocks * side).T + project[:, 3:]).astype(np.float32)
    further = (rotation @ _OCTANTS.T * (side - 1)).astype(np.float32)
    pixels = further[:, :, None] + first[:, None]
    z = pixels[2]
    z[z <= 0] = np.inf
    pixels[:2] /= z
    return pixels


def _whole(values: np.ndarray, stop: int) -> np.ndarray:
    """Pixels that coordinates fall into, clipped to 0 .. stop - 1."""
    return np.clip(values, 0, stop - 1).astype(np.int64)


def _largest(
    image: np.ndarray, top: np.ndarray, bottom: np.ndarray, left: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """Upper bounds [N] of the largest values in N rectangles of pixels, borders included.

    That of the square around each rectangle: four windows, whose side is a power of two, one
    in each corner, cover it.
    """
    level = np.frexp(np.maximum(right - left, bottom - top) + 1)[1] - 1
    maxima = _window_maxima(image, int(level.max(initial=0)))
    window = 1 << level
    right, bottom = np.maximum(right + 1 - window, 0), np.maximum(bottom + 1 - window, 0)
    above = np.maximum(maxima[level, top, left], maxima[level, top, right])
    below = np.maximum(maxima[level, bottom, left], maxima[level, bottom, right])
    return np.maximum(above, below)


def _window_maxima(image: np.ndarray, levels: int) -> np.ndarray:
    """At [n, row, column] the largest of the 2^n x 2^n pixels from there on: [levels + 1,H,W]."""
    maxima = np.empty((levels + 1, *image.shape), image.dtype)
    maxima[0] = image
    for level, half in enumerate(maxima[:-1]):
        step = 1 << level
        wider = half.copy()
        np.maximum(half[:, :-step], half[:, step:], out=wider[:, :-step])
        maxima[level + 1] = wider
        np.maximum(wider[:-step], wider[step:], out=maxima[level + 1, :-step])
    return maxima


class TileVolume:
    """The truncated signed distances of one tile and its halo; frames in, mesh out.

    Memory is bounded by `grid.tile_bytes` and an eighth, whatever the number of frames. Integrate
    the frames of `tile.frames` in that order: neighbouring tiles fit only if they saw the same.
    """

    def __init__(self, tile: Tile, grid: FusionGrid) -> None:
        self.tile = tile
        self.grid = grid
        side = grid.tile_blocks + 2
        self._seen = np.zeros((side, side, side), bool)
        self._spare = _spare_blocks(tile)
        self._volume = _new_volume(tile.blocks + self._spare, grid)

    def integrate(self, frame: PreparedFrame) -> None:
        """Add one frame; a frame that touches no block of the tile changes nothing."""
        local = _local_blocks(frame.blocks, self.tile.index, self.grid)
        self._seen[tuple(local.T)] = True
        blocks = (local + self.grid.first_block(self.tile.index) - 1).astype(np.int32)
        for first in range(0, len(blocks), self._spare):  # Open3D raises on an empty list
            _integrate(self._volume, blocks[first : first + self._spare], frame, self.grid)

    def mesh(self) -> Mesh:
        """The surface inside the tile, welded and in canonical order."""
        stored, expected = self._volume.hashmap().size(), int(self._seen.sum())
        if stored != expected:
            raise RuntimeError(
                f"tile {self.tile.index} holds {stored} blocks of the {expected} that its "
                "frames touch: the volume dropped blocks, so its mesh would have holes"
            )
        if not expected:
            return Mesh.empty()
        # Open3D keeps voxels whose weight is strictly above the threshold.
        threshold = self.grid.settings.min_observations - 0.5
        extracted = self._volume.extract_triangle_mesh(threshold)
        return weld(_clip(_mesh_from_open3d(extracted), self.tile, self.grid))


def _spare_blocks(tile: Tile) -> int:
    """Room that a volume has beside the blocks of its tile.

    Open3D doubles a volume when the blocks that it is given would not fit beside those that it
    holds, though it holds them already: so it is given no more at once than are to spare.
    """
    return tile.blocks // 8 + 64


def group_tiles(tiles: list[Tile], grid: FusionGrid) -> list[list[Tile]]:
    """Cut tiles, in the order in which the drive enters them, into groups for `fuse_tiles`.

    A group of several tiles fits into `batch_bytes`, so that a long drive takes no more memory
    than a short one. Fewer groups read fewer frames twice.
    """
    groups: list[list[Tile]] = []
    room = 0
    for tile in sorted(tiles, key=lambda tile: (tile.frames[0], tile.index)):
        size = (tile.blocks + _spare_blocks(tile)) * grid.block_voxels**3 * _BYTES_PER_VOXEL
        if not groups or size > room:
            groups.append([])
            room = min(grid.settings.max_volume_bytes, grid.settings.batch_bytes)
        groups[-1].append(tile)
        room -= size
    return groups


def frames_of(tiles: Iterable[Tile]) -> list[int]:
    """Frames that any of the tiles needs, ascending."""
    return sorted({number for tile in tiles for number in tile.frames})


def fuse_tiles(tiles: list[Tile], frames: Iterable[FusionFrame], grid: FusionGrid) -> list[Mesh]:
    """Surfaces inside some tiles, one mesh a tile, from one pass over their frames.

    Args:
        frames: those of `frames_of(tiles)`, in that order; read one by one and not kept.

    Raises:
        ValueError: there are more or fewer frames.
    """
    volumes = _filled_volumes(tiles, frames, grid)
    # A mesh takes half as much again as its volume while it is made. So each volume is let go of
    # before the next one's turn, and the largest, made last, is alone.
    meshes: dict[tuple[int, int, int], Mesh] = {}
    volumes.sort(key=lambda volume: volume.tile.blocks, reverse=True)
    while volumes:
        volume = volumes.pop()
        meshes[volume.tile.index] = volume.mesh()
        del volume
        return_freed_memory()
    return [meshes[tile.index] for tile in tiles]


def _filled_volumes(
    tiles: list[Tile], frames: Iterable[FusionFrame], grid: FusionGrid
) -> list[TileVolume]:
    """The volumes of tiles, each with the frames that touch it."""
    volumes = [TileVolume(tile, grid) for tile in tiles]
    touched: dict[int, list[TileVolume]] = {number: [] for number in frames_of(tiles)}
    for volume in volumes:
        for number in volume.tile.frames:
            touched[number].append(volume)
    numbers = iter(touched)
    for frame in frames:
        if (own := next(numbers, None)) is None:
            raise ValueError(f"more than {len(touched)} frames; expected those of the tiles only")
        prepared = prepare(frame, grid)
        for volume in touched[own]:
            volume.integrate(prepared)
    if missing := len(list(numbers)):
        raise ValueError(f"{missing} of {len(touched)} frames are missing; there would be holes")
    return volumes


def _block_voxels(settings: FusionSettings) -> int:
    return max(4, settings.truncation_voxels)


def _measured(depths: np.ndarray) -> np.ndarray:
    return np.isfinite(depths) & (depths > 0)


def _check_rigid(T_world_cam: np.ndarray) -> None:
    rotation = T_world_cam[:3, :3]
    if not np.isfinite(T_world_cam).all():
        raise ValueError("T_world_cam is not finite; leave frames without a pose out")
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0:
        raise ValueError(
            f"T_world_cam is not rigid (determinant {np.linalg.det(rotation):.4g}); "
            "multiply depth by the scale of the segment instead of scaling the rotation"
        )


def _is_edge(inverse: np.ndarray, axis: int, max_slope: float, edge_jump: float) -> np.ndarray:
    """Pixels of [...,H,W] at a kink or a steep slope along one axis; NaN is no neighbour."""
    w = np.moveaxis(inverse, axis, -1)
    is_edge = np.zeros(w.shape, bool)
    kink = np.abs(w[..., :-2] - 2 * w[..., 1:-1] + w[..., 2:])
    is_edge[..., 1:-1] = kink > edge_jump * w[..., 1:-1]
    is_steep = np.abs(np.diff(w, axis=-1)) > max_slope * np.maximum(w[..., 1:], w[..., :-1])
    is_edge[..., 1:] |= is_steep
    is_edge[..., :-1] |= is_steep
    return np.moveaxis(is_edge, -1, axis)


def _interpolate(values: np.ndarray, axis: int, factor: int) -> np.ndarray:
    """Linear interpolation of [H,W] along one axis, `factor` samples a pixel, NaN aware."""
    length = values.shape[axis]
    position = (np.arange(length * factor) + 0.5) / factor - 0.5
    lower = np.clip(np.floor(position).astype(int), 0, length - 2)
    step = (position - lower).astype(np.float32)
    step = step[:, None] if axis == 0 else step[None, :]
    first, second = values.take(lower, axis), values.take(lower + 1, axis)
    nearest = np.where(step < 0.5, first, second)
    blended = first + step * (second - first)
    return np.where(blended > 0, blended, nearest)


def _scale_intrinsics(intrinsics: np.ndarray, factor: int) -> np.ndarray:
    """Intrinsics after each pixel is cut into factor x factor; pixel centres are integers."""
    scaled = np.array(intrinsics, np.float64)
    scaled[:2, :2] *= factor
    scaled[:2, 2] = (scaled[:2, 2] + 0.5) * factor - 0.5
    return scaled


def _dense_depth(frame: FusionFrame, grid: FusionGrid) -> tuple[np.ndarray, np.ndarray]:
    """Interpolated depth [h,w], 0 where there is nothing to fuse, and its intrinsics [3,3]."""
    depth, intrinsics = upsample_depth(frame.depth, frame.intrinsics, grid.upsampling)
    depth[~((depth > 0) & (depth <= grid.depth_limit_m))] = 0
    return depth, intrinsics


def _world_points(depth: np.ndarray, intrinsics: np.ndarray, T_world_cam: np.ndarray) -> np.ndarray:
    """[P,3] world points of the pixels with a measurement."""
    rows, columns = np.nonzero(depth > 0)
    z = depth[rows, columns].astype(np.float64)
    (fx, skew, cx), (_, fy, cy), _ = np.asarray(intrinsics, np.float64)
    y = (rows - cy) / fy
    x = (columns - cx - skew * y) / fx
    camera = np.stack([x * z, y * z, z], axis=1)
    return camera @ T_world_cam[:3, :3].T + T_world_cam[:3, 3]


def _distinct(cells: np.ndarray) -> np.ndarray:
    """Distinct rows of int64 [N,3], sorted; each number must fit into 21 bits."""
    if not len(cells):
        return cells.reshape(0, 3)
    offset, bits = 1 << 20, 21
    if max(cells.max(), -cells.min()) >= offset:
        raise ValueError(
            f"a point lies {np.abs(cells).max()} cells from the origin; at most {offset} are "
            "possible: the poses run away, or voxel_m is far too small"
        )
    x, y, z = cells.T
    codes = ((x + offset) << 2 * bits) + ((y + offset) << bits) + (z + offset)
    codes = _without_repeats(np.sort(_without_repeats(codes)))  # np.unique is slower
    mask = (1 << bits) - 1
    return np.stack([codes >> 2 * bits, (codes >> bits) & mask, codes & mask], axis=1) - offset


def _without_repeats(values: np.ndarray) -> np.ndarray:
    """Leaves out what equals the value before it."""
    is_new = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=is_new[1:])
    return values[is_new]


def _local_blocks(blocks: np.ndarray, index: tuple[int, int, int], grid: FusionGrid) -> np.ndarray:
    """Those of `blocks` that lie in the tile or its halo, counted from the halo's corner."""
    local = blocks - (grid.first_block(index) - 1)
    x, y, z = ((local >= 0) & (local < grid.tile_blocks + 2)).T
    return local[x & y & z]  # `all(axis=1)` takes four times as long


def _tiles_of(blocks: np.ndarray, grid: FusionGrid) -> list[tuple[int, int, int]]:
    """Tiles that hold one of `blocks`, in the tile or in its halo."""
    corners = blocks[:, None].astype(np.int64) + _CORNERS
    tiles = (corners + grid.tile_blocks // 2) // grid.tile_blocks
    return [(x, y, z) for x, y, z in _distinct(tiles.reshape(-1, 3)).tolist()]


def _open3d() -> Any:
    """The module, imported late: it takes seconds."""
    try:
        import open3d
    except ImportError as error:
        raise ImportError(
            "fusion needs Open3D; install this package with the extra open3d or open3d-cpu"
        ) from error
    return open3d


def _new_volume(block_count: int, grid: FusionGrid) -> Any:
    o3d = _open3d()
    return o3d.t.geometry.VoxelBlockGrid(
        ("tsdf", "weight", "color"),
        (o3d.core.float32,) * 3,
        (1, 1, 3),
        grid.voxel_m,
        grid.block_voxels,
        block_count,
        o3d.core.Device("CPU:0"),
    )


def _integrate(volume: Any, blocks: np.ndarray, frame: PreparedFrame, grid: FusionGrid) -> None:
    o3d = _open3d()
    intrinsics = o3d.core.Tensor(_open3d_intrinsics(frame.intrinsics))
    volume.integrate(
        o3d.core.Tensor(blocks),
        o3d.t.geometry.Image(o3d.core.Tensor(frame.depth[..., None])),
        o3d.t.geometry.Image(o3d.core.Tensor(frame.color)),
        intrinsics,
        intrinsics,
        o3d.core.Tensor(np.linalg.inv(frame.T_world_cam.astype(np.float64))),
        1.0,
        float(grid.depth_limit_m),
        float(grid.settings.truncation_voxels),
    )


def _open3d_intrinsics(intrinsics: np.ndarray) -> np.ndarray:
    """Open3D cuts pixel coordinates off to integers: its top-left pixel spans (0,0) to (1,1)."""
    shifted = np.array(intrinsics, np.float64)
    shifted[:2, 2] += 0.5
    return shifted


def _mesh_from_open3d(extracted: Any) -> Mesh:
    if "indices" not in extracted.triangle or not len(extracted.triangle.indices):
        return Mesh.empty()
    colors = np.clip(extracted.vertex.colors.numpy() * 255, 0, 255)
    return Mesh(
        extracted.vertex.positions.numpy().astype(np.float32),
        extracted.triangle.indices.numpy().astype(np.int32),
        np.round(colors).astype(np.uint8),
    )


def _clip(mesh: Mesh, tile: Tile, grid: FusionGrid) -> Mesh:
    """Keep triangles whose centroid is in the half-open tile: each belongs to one tile."""
    corners = mesh.vertices[mesh.triangles].astype(np.float64)
    centroids = corners.sum(axis=1) / 3
    low, high = grid.tile_bounds(tile.index)
    is_inside = ((centroids >= low) & (centroids < high)).all(axis=1)
    return Mesh(mesh.vertices, mesh.triangles[is_inside], mesh.colors)
