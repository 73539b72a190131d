"""Joining tiles one by one gives what joining all at once gives, in bounded memory."""

import tracemalloc

import numpy as np
import pytest
from mesh_oracles import merge_meshes, remove_small_components

from tasks import tile_merge
from tasks.fusion import FusionGrid
from tasks.meshes import (
    Mesh,
    keep_triangles,
    read_ply,
    weld,
    write_ply,
)
from tasks.tile_merge import PreviewMaterial, TileSet, merge_tiles

VOXEL_M = 0.1
GRID = FusionGrid(VOXEL_M, 50.0, None, tile_blocks=4, upsampling=1)  # tiles of 2 m
SPACING_M = 0.0625  # exact in binary, less than a voxel


def sheet(low, high, height=0.0, spacing=SPACING_M):
    """A wavy surface over the rectangle from `low` to `high` in (x, z); y is its height."""
    x = np.arange(round(low[0] / spacing), round(high[0] / spacing) + 1) * spacing
    z = np.arange(round(low[1] / spacing), round(high[1] / spacing) + 1) * spacing
    gx, gz = np.meshgrid(x, z, indexing="ij")
    vertices = np.stack([gx, height + 0.02 * np.sin(3 * gx + gz), gz], axis=-1)
    row = np.arange(gx.size).reshape(gx.shape)
    a, b, c, d = row[:-1, :-1], row[1:, :-1], row[1:, 1:], row[:-1, 1:]
    triangles = np.concatenate(
        [np.stack(t, axis=-1).reshape(-1, 3) for t in ((a, b, c), (a, c, d))]
    )
    colors = np.stack([gx * 7, gz * 5, gx + gz], axis=-1).astype(np.int64) % 256
    return Mesh(
        vertices.reshape(-1, 3).astype(np.float32),
        triangles.astype(np.int32),
        colors.reshape(-1, 3).astype(np.uint8),
    )


def cut(mesh):
    """The tiles of a mesh: each triangle in that of its centroid, as fusion cuts them."""
    corners = mesh.vertices[mesh.triangles].astype(np.float64)
    blocks = np.floor(corners.mean(axis=1) / GRID.block_m).astype(int)
    owners = (blocks + GRID.tile_blocks // 2) // GRID.tile_blocks
    tiles = {}
    for index in sorted(set(map(tuple, owners.tolist()))):
        tiles[index] = weld(keep_triangles(mesh, (owners == index).all(axis=1)))
    return tiles


def merged(tiles, folder, min_triangles=1, preview_triangles=10_000_000):
    found = TileSet(tuple(tiles), tiles.__getitem__, GRID)
    whole, preview = merge_tiles(found, min_triangles, preview_triangles, folder)
    whole.write_ply(folder / "mesh.ply")
    return whole, preview, read_ply((folder / "mesh.ply").read_bytes())


@pytest.mark.parametrize("spacing", [SPACING_M, 9 / 128])  # along the borders, and across
def test_tiles_become_one_mesh_without_a_seam(tmp_path, spacing):
    tiles = cut(sheet((-4.5, -3.5), (4.5, 3.5), spacing=spacing))
    assert len(tiles) > 12
    whole, _, mesh = merged(tiles, tmp_path)
    expected = merge_meshes(tiles.values())
    assert (whole.vertices, whole.triangles) == (len(expected.vertices), len(expected.triangles))
    assert write_ply(weld(mesh)) == write_ply(expected)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_tiles_fit_in_whatever_order_they_come(tmp_path, order):
    tiles = cut(sheet((-3, -3), (3, 3)))
    shuffled = np.random.default_rng(order).permutation(len(tiles))
    names = list(tiles)
    _, _, mesh = merged({names[i]: tiles[names[i]] for i in shuffled}, tmp_path)
    assert write_ply(weld(mesh)) == write_ply(merge_meshes(tiles.values()))


def test_same_tiles_give_the_same_bytes(tmp_path):
    tiles = cut(sheet((-3, -3), (3, 3)))
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        merged(tiles, tmp_path / name)
        files.append((tmp_path / name / "mesh.ply").read_bytes())
    assert files[0] == files[1]


def test_small_pieces_go_and_what_continues_in_the_next_tile_stays(tmp_path):
    # Tile borders lie at x = -1 and 1. The shelf has a few triangles in the first tile and a
    # speck sits across a border: only both tiles together tell which is large.
    floor = sheet((-2, -0.5), (3, 0.5))
    shelf = sheet((-1.0625, -0.25), (0.5, 0.25), height=-0.5)
    across = sheet((0.9375, -0.0625), (1.0625, 0.0625), height=0.5)  # 4 + 4 triangles
    inside = sheet((0, 0), (0.0625, 0.0625), height=0.8)
    tiles = cut(merge_meshes([floor, shelf, across, inside]))
    in_first_tile = tiles[(-1, 0, 0)].vertices[:, 1] < -0.4
    assert 0 < in_first_tile.sum() < 30
    _, _, mesh = merged(tiles, tmp_path, min_triangles=40)
    assert write_ply(weld(mesh)) == write_ply(merge_meshes([floor, shelf]))
    _, _, mesh = merged(tiles, tmp_path, min_triangles=8)
    assert write_ply(weld(mesh)) == write_ply(merge_meshes([floor, shelf, across]))


def test_pieces_joined_by_a_later_tile_are_one(tmp_path):
    # Two arms in one tile that meet in another: neither is small.
    arms = [sheet((-1.5, z), (1.5, z + 0.125)) for z in (-0.5, 0.375)]
    bridge = sheet((1.5, -0.5), (1.75, 0.5))
    tiles = cut(merge_meshes([*arms, bridge]))
    whole = merge_meshes(tiles.values())
    for size in (len(whole.triangles), len(whole.triangles) + 1):
        _, _, mesh = merged(tiles, tmp_path, min_triangles=size)
        assert write_ply(weld(mesh)) == write_ply(remove_small_components(whole, size))


def test_tiles_may_be_empty(tmp_path):
    whole, preview, mesh = merged({(0, 0, 0): Mesh.empty(), (1, 0, 0): Mesh.empty()}, tmp_path)
    assert whole.triangles == len(preview.triangles) == len(mesh.triangles) == 0


def test_empty_tile_beside_others_changes_nothing(tmp_path):
    tiles = cut(sheet((-1, -1), (1, 1)))
    _, _, mesh = merged({(0, 0, -1): Mesh.empty(), **tiles, (0, 0, 5): Mesh.empty()}, tmp_path)
    assert write_ply(weld(mesh)) == write_ply(merge_meshes(tiles.values()))


def test_memory_does_not_grow_with_the_drive(tmp_path, monkeypatch):
    monkeypatch.setattr(tile_merge, "PREVIEW_MATERIAL", 4000)

    def read(index):
        z = 2.0 * index[2]
        return weld(sheet((-1, z - 1), (1, z + 1)))

    def peak(count):
        tiles = TileSet(tuple((0, 0, k) for k in range(count)), read, GRID)
        tracemalloc.start()
        whole, preview = merge_tiles(tiles, 1, 1000, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert whole.triangles == count * 2 * 32 * 32
        assert 500 < len(preview.triangles) <= 1000
        return peak

    assert peak(80) < 1.3 * peak(20)


def test_preview_material_is_exact_while_it_is_small():
    tiles = cut(sheet((-3, -3), (3, 3)))
    preview = PreviewMaterial(2 * VOXEL_M, 100)
    for mesh in tiles.values():
        preview.add(mesh)
    assert write_ply(preview.mesh()) == write_ply(merge_meshes(tiles.values()))


def test_coarse_preview_has_no_gaps_between_tiles(monkeypatch):
    monkeypatch.setattr(tile_merge, "PREVIEW_MATERIAL", 6000)
    preview = PreviewMaterial(2 * VOXEL_M, 100)
    for mesh in cut(sheet((-4, -4), (4, 4))).values():
        preview.add(mesh)
    coarse = preview.mesh()
    assert 500 < len(coarse.triangles) <= 6000
    edges = np.sort(coarse.triangles[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    edges, uses = np.unique(edges, axis=0, return_counts=True)
    rim = coarse.vertices[edges[uses == 1]].reshape(-1, 3)
    assert np.abs(rim[:, [0, 2]]).max(axis=1).min() > 3.5
    assert np.abs(coarse.vertices[:, 1]).max() <= 0.02
    area = np.cross(
        *(
            coarse.vertices[coarse.triangles[:, i]] - coarse.vertices[coarse.triangles[:, 0]]
            for i in (1, 2)
        )
    )
    # From above every spot is covered once: the area of the shadow is that of the square.
    assert np.abs(area[:, 1]).sum() / 2 == pytest.approx(64, rel=0.1)
