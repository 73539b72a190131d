"""Join the tiles of a part into one mesh, in memory that does not grow with the drive.

Neighbouring tiles share the vertices along their border, equal to the last bit. Tiles are
read one by one, twice: first to see which loose pieces are small once they are followed
through all tiles, then to write what is kept. Held meanwhile are a tile, the borders of
tiles whose neighbours are still to come, a few numbers for each piece at a border, and the
material of the preview.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.fusion import FusionGrid
from tasks.meshes import (
    Mesh,
    MeshWriter,
    decimate,
    is_new_row,
    keep_triangles,
    label_linked,
    label_pieces,
    sorted_triangles,
    weld,
    without_collapsed,
)

# The preview is decimated from at most this many triangles: some 150 MB.
PREVIEW_MATERIAL = 500_000
UNKNOWN = -1

TileIndex = tuple[int, int, int]
_NEIGHBOURS = [offset for offset in itertools.product((-1, 0, 1), repeat=3) if any(offset)]


@dataclass(frozen=True)
class TileSet:
    """The tiles of one part, to be read in order of `indices`, as often as needed."""

    indices: tuple[TileIndex, ...]
    read: Callable[[TileIndex], Mesh]  # welded, as `fuse_tiles` gives it
    grid: FusionGrid

    def border_rows(self, index: TileIndex, mesh: Mesh) -> np.ndarray:
        """Rows of the vertices that another tile may have too, ascending.

        A triangle lies in one voxel and belongs to the tile of its centroid, so a shared
        vertex is less than a voxel inside the border.
        """
        low, high = self.grid.tile_bounds(index)
        margin = 1.5 * self.grid.voxel_m
        inside = (mesh.vertices > low + margin) & (mesh.vertices < high - margin)
        return np.flatnonzero(~inside.all(axis=1))


class Frontier:
    """A number for each border vertex of the tiles met so far, while neighbours need it."""

    def __init__(self, indices: tuple[TileIndex, ...]) -> None:
        known = set(indices)
        self._neighbours = {index: [n for n in _around(index) if n in known] for index in indices}
        self._waiting = {index: len(found) for index, found in self._neighbours.items()}
        self._tables: dict[TileIndex, tuple[np.ndarray, np.ndarray]] = {}

    def find(self, index: TileIndex, positions: np.ndarray) -> np.ndarray:
        """Numbers int64 [N] that neighbours gave to these `positions` [N,3], else UNKNOWN."""
        tables = [self._tables[n] for n in self._neighbours[index] if n in self._tables]
        known = np.concatenate([np.zeros((0, 3), np.float32), *(table[0] for table in tables)])
        rows = _find_rows(known, positions)
        # UNKNOWN is -1: rows that were not found take the last number.
        return np.concatenate([*(table[1] for table in tables), [UNKNOWN]])[rows].astype(np.int64)

    def add(self, index: TileIndex, positions: np.ndarray, numbers: np.ndarray) -> None:
        """Remember the numbers [N] of a tile's border vertices [N,3]; call it for every tile."""
        self._tables[index] = positions, numbers
        for neighbour in self._neighbours[index]:
            self._waiting[neighbour] -= 1
        for done in [index, *self._neighbours[index]]:
            if not self._waiting[done]:
                self._tables.pop(done, None)


def measure_pieces(tiles: TileSet) -> dict[TileIndex, np.ndarray]:
    """Follow through all tiles the pieces that touch a tile's border.

    Returns:
        For each tile the triangles, int64 [P], that those pieces have in all tiles, in the order
        of their numbers in the tile.
    """
    frontier, sizes, links, count = Frontier(tiles.indices), [], [], 0
    for index in tiles.indices:
        mesh = tiles.read(index)
        rows = tiles.border_rows(index, mesh)
        piece, triangles = _pieces_of(mesh)
        touching, part = np.unique(piece[rows], return_inverse=True)
        numbers = count + part.astype(np.int64)
        positions = mesh.vertices[rows]
        found = frontier.find(index, positions)
        pairs = np.stack([found, numbers], axis=1)[found != UNKNOWN]
        links.append(np.unique(pairs, axis=0))
        sizes.append(triangles[touching])
        count += len(touching)
        frontier.add(index, positions, numbers)
    return dict(zip(tiles.indices, _whole_sizes(sizes, links), strict=True))


def _whole_sizes(sizes: list[np.ndarray], links: list[np.ndarray]) -> list[np.ndarray]:
    """The sizes [P] of each tile's parts, with those of all parts that are linked to them."""
    if not sizes:
        return []
    size = np.concatenate(sizes)
    whole = label_linked(np.concatenate(links), len(size))
    # Sums in float64 are exact far beyond any number of triangles.
    total = np.bincount(whole, size).astype(np.int64)
    return np.split(total[whole], np.cumsum([len(s) for s in sizes])[:-1])


def kept_tiles(
    tiles: TileSet, sizes: Mapping[TileIndex, np.ndarray], min_triangles: int
) -> Iterator[Mesh]:
    """Every tile without the pieces that have fewer than `min_triangles` in all tiles."""
    for index in tiles.indices:
        mesh = tiles.read(index)
        piece, triangles = _pieces_of(mesh)
        triangles[np.unique(piece[tiles.border_rows(index, mesh)])] = sizes[index]
        yield keep_triangles(mesh, triangles[piece[mesh.triangles[:, 0]]] >= min_triangles)


def merge_tiles(
    tiles: TileSet, min_triangles: int, preview_triangles: int, folder: Path
) -> tuple[MeshWriter, Mesh]:
    """Join tiles, without pieces of fewer than `min_triangles` triangles.

    The surface is that of all tiles joined at once and cleaned then, to the last bit and without
    a seam; vertices and triangles come tile by tile instead of sorted.

    Args:
        folder: takes temporary files as large as the mesh.

    Returns:
        The mesh, ready to be written, and its preview.
    """
    whole, preview = MeshWriter(folder), PreviewMaterial(2 * tiles.grid.voxel_m, preview_triangles)
    frontier = Frontier(tiles.indices)
    kept = kept_tiles(tiles, measure_pieces(tiles), min_triangles)
    for index, mesh in zip(tiles.indices, kept, strict=True):
        preview.add(mesh)
        rows = tiles.border_rows(index, mesh)
        number = np.full(len(mesh.vertices), UNKNOWN, np.int64)
        number[rows] = frontier.find(index, mesh.vertices[rows])
        is_new = number == UNKNOWN
        number[is_new] = whole.vertices + np.arange(is_new.sum())
        whole.append(mesh.vertices[is_new], mesh.colors[is_new], number[mesh.triangles])
        frontier.add(index, mesh.vertices[rows], number[rows])
    return whole, decimate(preview.mesh(), preview_triangles)


class PreviewMaterial:
    """A mesh that coarsens as it grows, so that it stays below a number of triangles.

    Exact while it is small. Then vertices in one cell of a grid become their mean (vertex
    clustering, Rossignac and Borrel 1993), and the cells double whenever there are too many:
    as cells do not follow tiles, no seam opens.
    """

    def __init__(self, cell_m: float, preview_triangles: int) -> None:
        self._cell_m = cell_m
        self._level = 0  # 0: exact; n: cells of cell_m * 2^(n - 1)
        self._limit = max(PREVIEW_MATERIAL, 4 * preview_triangles)
        self._parts: list[_Cells] = []

    def add(self, mesh: Mesh) -> None:
        """Add the mesh of a tile."""
        if not len(mesh.triangles):
            return
        values = np.concatenate([mesh.vertices, mesh.colors], axis=1).astype(np.float64)
        counts = np.ones(len(values), np.int64)
        keys = self._keys(mesh.vertices)
        self._parts.append(_join_cells([_Cells(keys, values, counts, mesh.triangles)]))
        if sum(len(part.triangles) for part in self._parts) > self._limit:
            self._compact()

    def _keys(self, positions: np.ndarray) -> np.ndarray:
        """The cell of each position, int64 [N,3]."""
        if not self._level:
            exact = positions.astype(np.float32) + np.float32(0)  # -0 becomes 0
            return exact.view(np.int32).astype(np.int64)
        size = self._cell_m * 2 ** (self._level - 1)
        return np.floor(positions.astype(np.float64) / size).astype(np.int64)

    def _compact(self) -> None:
        """Join, and coarsen until half of the room is free."""
        cells = _join_cells(self._parts)
        while len(cells.triangles) > self._limit // 2:
            self._level += 1
            keys = cells.keys >> 1
            if self._level == 1:
                keys = self._keys(cells.sums[:, :3] / cells.counts[:, None])
            cells = _join_cells([_Cells(keys, cells.sums, cells.counts, cells.triangles)])
        self._parts = [cells]

    def mesh(self) -> Mesh:
        """What was added, as exact as it is kept."""
        if not self._parts:
            return Mesh.empty()
        cells = _join_cells(self._parts)
        means = cells.sums / cells.counts[:, None]
        colors = np.round(means[:, 3:]).astype(np.uint8)
        return weld(Mesh(means[:, :3].astype(np.float32), cells.triangles, colors))


@dataclass(frozen=True)
class _Cells:
    """Vertices by the cell that holds them."""

    keys: np.ndarray  # int64 [K,3]
    sums: np.ndarray  # float64 [K,6] of the positions and colours
    counts: np.ndarray  # int64 [K] vertices in the cell
    triangles: np.ndarray  # int32 [F,3] rows of the cells


def _join_cells(parts: list[_Cells]) -> _Cells:
    """One row for each cell, and each triangle once; triangles within a cell or two vanish."""
    keys = np.concatenate([part.keys for part in parts])
    order, is_new = _group(keys)
    row = np.empty(len(keys), np.int32)
    row[order] = np.cumsum(is_new) - 1
    starts = np.flatnonzero(is_new)
    offsets = np.cumsum([0] + [len(part.keys) for part in parts])
    triangles = [row[p.triangles + first] for p, first in zip(parts, offsets, strict=False)]
    return _Cells(
        keys[order][starts],
        np.add.reduceat(np.concatenate([part.sums for part in parts])[order], starts),
        np.add.reduceat(np.concatenate([part.counts for part in parts])[order], starts),
        _distinct_triangles(np.concatenate(triangles)),
    )


def _distinct_triangles(triangles: np.ndarray) -> np.ndarray:
    """Triangles with three corners, each once, that start at their lowest corner."""
    found = sorted_triangles(without_collapsed(triangles))
    return found[is_new_row(found)]


def _group(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order [N] that sorts `rows` [N,3], equal rows as given, and where it meets new ones [N]."""
    order = np.lexsort(rows.T[::-1])
    return order, is_new_row(rows[order])


def _find_rows(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each of `wanted` [N,3] a row of `known` [K,3] that equals it, else UNKNOWN."""
    order, is_new = _group(np.concatenate([known, wanted]))
    group = np.empty(len(order), np.int64)
    group[order] = np.cumsum(is_new) - 1
    # Equal rows stay as given, so that a known one leads its group.
    row = order[is_new][group[len(known) :]]
    return np.where(row < len(known), row, UNKNOWN)


def _pieces_of(mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Piece of each vertex [V], and triangles of each piece: int64 [P]."""
    if not len(mesh.triangles):
        return np.zeros(0, np.int32), np.zeros(0, np.int64)
    piece = label_pieces(mesh)
    return piece, np.bincount(piece[mesh.triangles[:, 0]])


def _around(index: TileIndex) -> list[TileIndex]:
    x, y, z = index
    return [(x + i, y + j, z + k) for i, j, k in _NEIGHBOURS]
