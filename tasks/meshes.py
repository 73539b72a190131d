"""Coloured triangle meshes: weld, clean, decimate, write and read.

Mesh files are reproducible: `weld` puts vertices and triangles into one order, whatever
order the threads of the extraction produced them in.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.decimation import collapse
from tasks.terms import Terms

# Rotates OpenCV axes (right, down, forward) into those of glTF (right, up, backward).
GLTF_FROM_OPENCV = np.diag([1.0, -1.0, -1.0])

_PLY_VERTEX = np.dtype([("position", "<f4", 3), ("color", "u1", 3)])
_PLY_TRIANGLE = np.dtype([("count", "u1"), ("vertices", "<i4", 3)])
_PLY_COMMENT = re.compile(rb"^comment [^\n]*\n", re.MULTILINE)
_PLY_END = b"\nend_header\n"
_LONGEST_PLY_HEADER = 4096  # of files that `write_ply` made
_ROWS_AT_ONCE = 100_000  # of a file


@dataclass(frozen=True)
class Mesh:
    """Triangles with a colour at each vertex; the front of a triangle is counter-clockwise."""

    vertices: np.ndarray  # float32 [V,3] metres, world
    triangles: np.ndarray  # int32 [F,3] rows of `vertices`
    colors: np.ndarray  # uint8 [V,3] sRGB

    def __post_init__(self) -> None:
        if self.vertices.ndim != 2 or self.vertices.shape[1] != 3:
            raise ValueError(f"vertices have shape {self.vertices.shape}; expected [V,3]")
        if self.triangles.ndim != 2 or self.triangles.shape[1] != 3:
            raise ValueError(f"triangles have shape {self.triangles.shape}; expected [F,3]")
        if self.colors.shape != self.vertices.shape or self.colors.dtype != np.uint8:
            raise ValueError(
                f"colors are {self.colors.dtype} {self.colors.shape}; "
                f"expected uint8 {self.vertices.shape}, one colour a vertex"
            )

    @classmethod
    def empty(cls) -> Mesh:
        """No vertices, no triangles."""
        return cls(
            np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32), np.zeros((0, 3), np.uint8)
        )


def weld(mesh: Mesh) -> Mesh:
    """Join vertices at exactly the same place and put the mesh into its one canonical order.

    Triangles that lose an edge and vertices without a triangle are dropped. Vertices come
    out sorted by position, triangles start at their lowest vertex and are sorted, so equal
    surfaces give equal bytes.
    """
    if not len(mesh.triangles):
        return Mesh.empty()
    vertices = mesh.vertices.astype(np.float32) + np.float32(0)  # -0 becomes 0
    # Colours break ties, so that the colour that is kept does not depend on the input order.
    order = np.lexsort((*mesh.colors.T[::-1], *vertices.T[::-1]))
    ranked = vertices[order]
    is_new = is_new_row(ranked)
    target = np.empty(len(order), np.int32)
    target[order] = np.cumsum(is_new) - 1
    triangles = sorted_triangles(without_collapsed(target[mesh.triangles]))
    return _without_unused(Mesh(ranked[is_new], triangles, mesh.colors[order][is_new]))


def is_new_row(rows: np.ndarray) -> np.ndarray:
    """Whether each of sorted rows [N,3] differs from the one before it, bool [N]."""
    is_new = np.ones(len(rows), bool)
    is_new[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    return is_new


def without_collapsed(triangles: np.ndarray) -> np.ndarray:
    """Those of triangles [F,3] that have three different corners."""
    a, b, c = triangles.T
    return triangles[(a != b) & (b != c) & (c != a)]


def sorted_triangles(triangles: np.ndarray) -> np.ndarray:
    """Rotate each triangle to start at its lowest vertex, which keeps its front, and sort."""
    start = triangles.argmin(axis=1)[:, None]
    rotated = np.take_along_axis(triangles, (start + np.arange(3)) % 3, axis=1)
    return rotated[np.lexsort(rotated.T[::-1])]


def label_pieces(mesh: Mesh) -> np.ndarray:
    """Number of the connected piece that each vertex belongs to, int32 [V], from 0."""
    a, b, c = mesh.triangles.T
    links = np.stack([np.concatenate([a, b]), np.concatenate([b, c])], axis=1)
    return label_linked(links, len(mesh.vertices))


def label_linked(links: np.ndarray, count: int) -> np.ndarray:
    """Number of the group that each of `count` things is in, int32 [count], from 0.

    Args:
        links: [N,2] pairs of things, by number, that are in one group.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not count:
        return np.zeros(0, np.int32)
    graph = coo_array((np.ones(len(links), bool), tuple(links.T)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int32)


def keep_triangles(mesh: Mesh, is_kept: np.ndarray) -> Mesh:
    """The triangles with True in `is_kept` [F], and the vertices that they use."""
    return _without_unused(Mesh(mesh.vertices, mesh.triangles[is_kept], mesh.colors))


def decimate(mesh: Mesh, target_triangles: int) -> Mesh:
    """Simplify to about `target_triangles` triangles by quadric edge collapse.

    A vertex takes the mean colour of the vertices that were collapsed into it. A mesh that
    is small enough already comes back as it is.
    """
    if target_triangles < 1:
        raise ValueError(f"target_triangles is {target_triangles}; expected at least 1")
    if len(mesh.triangles) <= target_triangles:
        return mesh
    points, triangles = mesh.vertices.astype(np.float64), mesh.triangles.astype(np.int32)
    points, triangles, target = collapse(points, triangles, target_triangles)
    colors = _mean_colors(mesh.colors, target, len(points))
    return weld(Mesh(points.astype(np.float32), triangles.astype(np.int32), colors))


def write_ply(mesh: Mesh, terms: Terms | None = None) -> bytes:
    """Binary PLY in world axes (OpenCV: x right, y down, z forward), metres, sRGB colours.

    `terms` are comments; tiles, which nobody takes out of a store, go without.
    """
    header = _ply_header(len(mesh.vertices), len(mesh.triangles), terms)
    vertices = _ply_vertices(mesh.vertices, mesh.colors)
    return header + vertices.tobytes() + _ply_triangles(mesh.triangles).tobytes()


class MeshWriter:
    """A mesh that grows piece by piece, for files larger than memory.

    Files of meshes hold all vertices before all triangles, so both go to files of their own in
    `folder` until they are joined.
    """

    def __init__(self, folder: Path) -> None:
        self.vertices = self.triangles = 0
        self._paths = folder / "vertices.bin", folder / "triangles.bin"
        for path in self._paths:
            path.write_bytes(b"")

    def append(self, vertices: np.ndarray, colors: np.ndarray, triangles: np.ndarray) -> None:
        """Add vertices [V,3] with colours [V,3] and triangles [F,3], rows of all vertices so far.

        Raises:
            ValueError: more vertices than PLY's 32-bit indices can count.
        """
        if self.vertices + len(vertices) >= 2**31:
            raise ValueError("the mesh has more than 2^31 vertices; use larger voxels (--voxel-m)")
        self.vertices += len(vertices)
        self.triangles += len(triangles)
        rows = _ply_vertices(vertices, colors), _ply_triangles(triangles)
        for path, values in zip(self._paths, rows, strict=True):
            with path.open("ab") as file:
                file.write(values.tobytes())

    def write_ply(self, target: Path, terms: Terms | None = None) -> None:
        """Write the mesh to `target`, to the byte as the function `write_ply` makes it."""
        with target.open("wb") as whole:
            whole.write(_ply_header(self.vertices, self.triangles, terms))
            for path in self._paths:
                with path.open("rb") as part:
                    shutil.copyfileobj(part, whole, 2**20)

    def write_glb(self, target: Path, terms: Terms | None = None) -> None:
        """Write the mesh to `target`, to the byte as the function `write_glb` makes it."""
        low, high = np.full(3, np.inf), np.full(3, -np.inf)
        for rows in self._rows(0, _PLY_VERTEX):
            positions = _gltf_positions(rows["position"])
            low = np.minimum(low, positions.min(axis=0))
            high = np.maximum(high, positions.max(axis=0))
        with target.open("wb") as whole:
            whole.write(_glb_header(self.vertices, self.triangles, low, high, terms))
            for rows in self._rows(0, _PLY_VERTEX):
                whole.write(_gltf_positions(rows["position"]).tobytes())
            for rows in self._rows(0, _PLY_VERTEX):
                whole.write(_gltf_colors(rows["color"]).tobytes())
            for rows in self._rows(1, _PLY_TRIANGLE):
                whole.write(rows["vertices"].astype("<u4").tobytes())

    def _rows(self, which: int, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
        """Vertices (0) or triangles (1) again, some at a time."""
        with self._paths[which].open("rb") as file:
            while len(rows := np.fromfile(file, dtype, _ROWS_AT_ONCE)):
                yield rows


def _ply_header(vertices: int, triangles: int, terms: Terms | None = None) -> bytes:
    comments = "".join(f"comment {line}\n" for line in (terms.lines if terms else ()))
    return (
        "ply\nformat binary_little_endian 1.0\n"
        "comment metres, axes of the first camera: x right, y down, z forward\n"
        f"{comments}"
        f"element vertex {vertices}\n"
        "property float x\nproperty float y\nproperty float z\n"
        "property uchar red\nproperty uchar green\nproperty uchar blue\n"
        f"element face {triangles}\n"
        "property list uchar int vertex_indices\nend_header\n"
    ).encode()


def _ply_vertices(vertices: np.ndarray, colors: np.ndarray) -> np.ndarray:
    rows = np.empty(len(vertices), _PLY_VERTEX)
    rows["position"], rows["color"] = vertices, colors
    return rows


def _ply_triangles(triangles: np.ndarray) -> np.ndarray:
    rows = np.empty(len(triangles), _PLY_TRIANGLE)
    rows["count"], rows["vertices"] = 3, triangles
    return rows


def read_ply(data: bytes) -> Mesh:
    """Inverse of `write_ply`, for PLY files of any writer that hold coloured triangles."""
    if not data.startswith(b"ply"):
        raise ValueError(f"not a PLY file: it starts with {data[:8]!r}")
    if b"\nelement face 0\n" in data[:_LONGEST_PLY_HEADER].partition(_PLY_END)[0]:
        return Mesh.empty()
    if (own := _read_own_ply(data)) is not None:
        return own
    import trimesh

    loaded: Any = trimesh.load_mesh(io.BytesIO(data), file_type="ply", process=False)
    return Mesh(
        np.asarray(loaded.vertices, np.float32),
        np.asarray(loaded.faces, np.int32),
        np.array(loaded.visual.vertex_colors[:, :3], np.uint8),
    )


def _read_own_ply(data: bytes) -> Mesh | None:
    """The mesh of a file as `write_ply` lays it out, with any comments; None if it is another."""
    start = data.find(_PLY_END, 0, _LONGEST_PLY_HEADER) + len(_PLY_END)
    header = data[:start]
    counts = [int(n) for n in re.findall(rb"\nelement (?:vertex|face) (\d+)(?=\n)", header)]
    if len(counts) != 2 or _uncommented(header) != _uncommented(_ply_header(counts[0], counts[1])):
        return None
    vertices, triangles = counts
    first = start + vertices * _PLY_VERTEX.itemsize
    if len(data) != first + triangles * _PLY_TRIANGLE.itemsize:
        return None
    points = np.frombuffer(data, _PLY_VERTEX, vertices, start)
    rows = np.frombuffer(data, _PLY_TRIANGLE, triangles, first)
    if (rows["count"] != 3).any():
        return None
    return Mesh(*map(np.array, (points["position"], rows["vertices"], points["color"])))


def _uncommented(header: bytes) -> bytes:
    return _PLY_COMMENT.sub(b"", header)


def write_glb(mesh: Mesh, terms: Terms | None = None) -> bytes:
    """Binary glTF 2.0, upright in any viewer: x right, y up, z backward.

    World axes are OpenCV's, so y and z change sign; handedness stays. Colours are linear, as
    glTF asks for, in 16 bits so that dark tones survive; the material is unlit, as the
    light of the scene is in the colours already.
    """
    if not len(mesh.triangles):
        raise ValueError("the mesh has no triangles; glTF cannot hold an empty mesh")
    positions = _gltf_positions(mesh.vertices)
    low, high = positions.min(axis=0), positions.max(axis=0)
    header = _glb_header(len(mesh.vertices), len(mesh.triangles), low, high, terms)
    arrays = positions, _gltf_colors(mesh.colors), mesh.triangles.astype("<u4")
    return b"".join([header, *(array.tobytes() for array in arrays)])


def _gltf_positions(vertices: np.ndarray) -> np.ndarray:
    """[V,3] in the axes of glTF."""
    return (vertices @ GLTF_FROM_OPENCV).astype("<f4")


def _gltf_colors(colors: np.ndarray) -> np.ndarray:
    """[V,4] linear and opaque."""
    linear = np.round(_linear_from_srgb(np.arange(256)) * 65535).astype("<u2")
    opaque = np.full((len(colors), 4), 65535, "<u2")
    opaque[:, :3] = linear[colors]
    return opaque


def _glb_header(
    vertices: int, triangles: int, low: np.ndarray, high: np.ndarray, terms: Terms | None
) -> bytes:
    """What comes before the arrays: positions, colours and triangles, one after the other.

    `low` and `high` [3] are corners of the box around the positions.
    """
    sizes = 12 * vertices, 8 * vertices, 12 * triangles
    parts = _gltf_description(vertices, triangles, sizes, low, high)
    if terms:
        said = {"copyright": f"{terms.weights}; {terms.licence}", "extras": {"scale": terms.scale}}
        parts["asset"] |= said
    description = json.dumps(parts, separators=(",", ":")).encode()
    description += b" " * (-len(description) % 4)
    return b"".join(
        [
            struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(description) + 8 + sum(sizes)),
            struct.pack("<I4s", len(description), b"JSON"),
            description,
            struct.pack("<I4s", sum(sizes), b"BIN\0"),
        ]
    )


def _gltf_description(
    vertices: int, triangles: int, sizes: tuple[int, ...], low: np.ndarray, high: np.ndarray
) -> dict[str, Any]:
    offsets = np.cumsum([0, *sizes]).tolist()
    unlit = "KHR_materials_unlit"
    primitive = {"attributes": {"POSITION": 0, "COLOR_0": 1}, "indices": 2, "material": 0}
    views = [
        {"buffer": 0, "byteOffset": offset, "byteLength": size, "target": target}
        for offset, size, target in zip(offsets, sizes, (34962, 34962, 34963), strict=False)
    ]
    accessors = [
        {
            "bufferView": 0,
            "componentType": 5126,
            "count": vertices,
            "type": "VEC3",
            "min": low.tolist(),
            "max": high.tolist(),
        },
        {
            "bufferView": 1,
            "componentType": 5123,
            "normalized": True,
            "count": vertices,
            "type": "VEC4",
        },
        {"bufferView": 2, "componentType": 5125, "count": 3 * triangles, "type": "SCALAR"},
    ]
    return {
        "asset": {"version": "2.0", "generator": "ttt3r-pipeline"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "materials": [{"extensions": {unlit: {}}, "doubleSided": True}],
        "extensionsUsed": [unlit],
        "buffers": [{"byteLength": offsets[-1]}],
        "bufferViews": views,
        "accessors": accessors,
    }


def _linear_from_srgb(colors: np.ndarray) -> np.ndarray:
    """Linear light in [0,1] of sRGB values 0 to 255 (IEC 61966-2-1)."""
    c = colors.astype(np.float64) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def _mean_colors(colors: np.ndarray, target: np.ndarray, count: int) -> np.ndarray:
    """Mean of the colours that share a target; targets outside 0 .. count-1 are ignored."""
    is_valid = (target >= 0) & (target < count)
    rows = target[is_valid]
    weights = np.maximum(np.bincount(rows, minlength=count), 1)
    sums = [np.bincount(rows, colors[is_valid, i], minlength=count) for i in range(3)]
    return np.round(np.stack(sums, axis=1) / weights[:, None]).astype(np.uint8)


def _without_unused(mesh: Mesh) -> Mesh:
    is_used = np.zeros(len(mesh.vertices), bool)
    is_used[mesh.triangles] = True
    row = (np.cumsum(is_used) - 1).astype(np.int32)
    return Mesh(mesh.vertices[is_used], row[mesh.triangles], mesh.colors[is_used])
