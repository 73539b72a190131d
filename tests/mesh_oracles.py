"""Meshes joined and cleaned as a whole, to compare with what is done tile by tile."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tasks.meshes import Mesh, keep_triangles, label_pieces, weld


def merge_meshes(meshes: Iterable[Mesh]) -> Mesh:
    """One welded mesh of many, such as the tiles of a drive, which meet to the last bit."""
    parts = [mesh for mesh in meshes if len(mesh.triangles)]
    if not parts:
        return Mesh.empty()
    counts = np.cumsum([0] + [len(mesh.vertices) for mesh in parts])
    triangles = [m.triangles + np.int32(first) for m, first in zip(parts, counts, strict=False)]
    return weld(
        Mesh(
            np.concatenate([mesh.vertices for mesh in parts]),
            np.concatenate(triangles),
            np.concatenate([mesh.colors for mesh in parts]),
        )
    )


def remove_small_components(mesh: Mesh, min_triangles: int) -> Mesh:
    """Drop connected pieces of fewer than `min_triangles` triangles."""
    if not len(mesh.triangles):
        return Mesh.empty()
    piece = label_pieces(mesh)[mesh.triangles[:, 0]]
    return keep_triangles(mesh, np.bincount(piece)[piece] >= min_triangles)
