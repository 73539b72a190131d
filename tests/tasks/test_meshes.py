"""Welding, cleaning, decimating and writing of meshes."""

import io
import json
import struct
import subprocess
import sys
import tempfile

import fast_simplification
import numpy as np
import pytest
import trimesh
from mesh_oracles import merge_meshes, remove_small_components

from storage.errors import StoreUnavailable
from tasks import meshes
from tasks.meshes import (
    Mesh,
    MeshWriter,
    decimate,
    read_ply,
    weld,
    write_glb,
    write_ply,
)
from tasks.terms import Terms

EVIL = "CC BY-NC\nend_header\nelement face 0\n\u2028\xa9\x00" + 9999 * "x"
TERMS = Terms.of_weights({"name": "strict", "source": "its makers", "licence": EVIL})


def mesh(vertices, triangles, colors=None):
    vertices = np.array(vertices, np.float32).reshape(-1, 3)
    if colors is None:
        colors = np.full(vertices.shape, 100)
    return Mesh(vertices, np.array(triangles, np.int32), np.array(colors, np.uint8))


def square(x, color=(100, 100, 100)):
    """The unit square whose left edge is at x, in the plane z = 2."""
    corners = [[x, 0, 2], [x + 1, 0, 2], [x + 1, 1, 2], [x, 1, 2]]
    return mesh(corners, [[0, 1, 2], [0, 2, 3]], [color] * 4)


def sphere(subdivisions=4):
    ball = trimesh.creation.icosphere(subdivisions)
    colors = np.where(ball.vertices[:, :1] > 0, [[200, 0, 0]], [[0, 0, 200]])
    return mesh(ball.vertices, ball.faces, colors)


@pytest.mark.parametrize("taken", [1_000_000, 300_000])  # that of the process too
def test_full_temporary_folder_is_named_by_decimation(small_disk, monkeypatch, taken):
    monkeypatch.setenv("TMPDIR", str(small_disk.path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # as read from TMPDIR once
    assert tempfile.gettempdir() == str(small_disk.path)
    (small_disk.path / "other").write_bytes(bytes(taken))
    with pytest.raises(StoreUnavailable, match=rf"^{small_disk.path}: no space .* set TMPDIR"):
        decimate(sphere(5), 18_000)
    (small_disk.path / "other").unlink()
    small_disk.resize(10)
    assert len(decimate(sphere(5), 18_000).triangles) <= 18_000


def test_merge_meshes_joins_tiles_along_their_common_edge():
    merged = merge_meshes([square(0), square(1)])
    assert len(merged.vertices) == 6
    assert len(merged.triangles) == 4
    # The outline of a 2 x 1 rectangle of two squares has six edges; the seam is inside.
    assert boundary_edges(merged) == 6


def test_merge_meshes_does_not_depend_on_the_order_of_the_tiles():
    tiles = [square(0, (10, 0, 0)), square(1, (20, 0, 0)), square(2, (30, 0, 0))]
    forward, backward = merge_meshes(tiles), merge_meshes(tiles[::-1])
    assert write_ply(forward) == write_ply(backward)


def test_merge_meshes_of_nothing_is_empty():
    assert len(merge_meshes([]).triangles) == 0
    assert len(merge_meshes([Mesh.empty(), Mesh.empty()]).vertices) == 0


def test_weld_gives_the_same_bytes_whatever_the_order_of_vertices_and_triangles():
    ball = sphere(2)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(ball.vertices))
    triangles = np.argsort(order)[ball.triangles]
    triangles = np.roll(triangles, 1, axis=1)[rng.permutation(len(triangles))]
    shuffled = mesh(ball.vertices[order], triangles, ball.colors[order])
    assert write_ply(weld(shuffled)) == write_ply(weld(ball))


def test_weld_keeps_the_front_of_triangles():
    ball = weld(sphere(2))
    assert trimesh.Trimesh(ball.vertices, ball.triangles, process=False).volume > 0


def test_weld_drops_collapsed_triangles_and_unused_vertices():
    corners = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0], [9, 9, 9]]
    welded = weld(mesh(corners, [[0, 1, 2], [1, 3, 2]]))
    np.testing.assert_array_equal(welded.vertices, [[0, 0, 0], [0, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(welded.triangles, [[0, 2, 1]])


def test_remove_small_components_drops_specks_only():
    speck = mesh([[5, 5, 5], [6, 5, 5], [5, 6, 5]], [[0, 1, 2]])
    kept = remove_small_components(merge_meshes([square(0), square(1), speck]), 4)
    assert len(kept.triangles) == 4
    assert kept.vertices.max() <= 2


def test_decimate_keeps_shape_and_colours():
    ball = sphere(5)
    small = decimate(ball, 1000)
    assert 900 <= len(small.triangles) <= 1000
    np.testing.assert_allclose(np.linalg.norm(small.vertices, axis=1), 1, atol=0.01)
    right, left = small.vertices[:, 0] > 0.2, small.vertices[:, 0] < -0.2
    np.testing.assert_array_equal(np.unique(small.colors[right], axis=0), [[200, 0, 0]])
    np.testing.assert_array_equal(np.unique(small.colors[left], axis=0), [[0, 0, 200]])


def test_decimate_gives_what_the_library_gives_and_loads_it_in_another_process():
    code = (
        "import sys; from tasks.decimation import collapse; import numpy as np; "
        "made = collapse(*(np.load(f) for f in sys.argv[1:3]), 1000); "
        "assert 'fast_simplification' not in sys.modules; np.savez(sys.argv[3], *made)"
    )
    ball = sphere(5)
    points, triangles = ball.vertices.astype(np.float64), ball.triangles.astype(np.int32)
    _, _, collapses = fast_simplification.simplify(
        points, triangles, target_count=1000, return_collapses=True
    )
    expected = fast_simplification.replay_simplification(points, triangles, collapses)
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{folder}/{name}" for name in ("points.npy", "triangles.npy", "made.npz")]
        np.save(names[0], points)
        np.save(names[1], triangles)
        subprocess.run([sys.executable, "-c", code, *names], check=True)
        with np.load(names[2]) as made:
            for one, other in zip(made.values(), expected, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("script", "error", "says"),
    [("kill -9 $$", MemoryError, "signal 9"), ("echo no way >&2; exit 1", RuntimeError, "no way")],
)
def test_decimation_whose_process_fails_says_how(script, error, says, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(error, match=says):
        decimate(sphere(5), 1000)


def test_decimate_leaves_a_small_mesh_alone():
    assert len(decimate(square(0), 2).triangles) == 2


def test_decimate_refuses_a_target_of_nothing():
    with pytest.raises(ValueError, match="target_triangles is 0"):
        decimate(square(0), 0)


def test_ply_reads_back_exactly():
    ball = sphere(2)
    again = read_ply(write_ply(ball))
    np.testing.assert_array_equal(again.vertices, ball.vertices)
    np.testing.assert_array_equal(again.triangles, ball.triangles)
    np.testing.assert_array_equal(again.colors, ball.colors)


def test_terms_are_comments_that_no_licence_can_break_out_of(monkeypatch):
    ball = sphere(2)
    for data, count in ((write_ply(ball, TERMS), len(ball.triangles)), (write_ply(ball), 320)):
        assert len(trimesh.load_mesh(io.BytesIO(data), file_type="ply").faces) == count
    header = write_ply(ball, TERMS).partition(b"\nend_header\n")[0].decode("ascii").split("\n")
    assert "comment made with the weights strict (its makers)" in header
    assert sum(
        line.startswith("comment licence of the weights: CC BY-NC end header") for line in header
    )
    assert any("metres are the network's estimate" in line for line in header)
    assert sum(map(len, header)) < 2000
    monkeypatch.setattr(trimesh, "load_mesh", None)  # read without it, as tiles and previews are
    again = read_ply(write_ply(ball, TERMS))
    np.testing.assert_array_equal(again.triangles, ball.triangles)
    np.testing.assert_array_equal(again.colors, ball.colors)
    assert len(read_ply(write_ply(Mesh.empty(), TERMS)).triangles) == 0


def test_terms_are_the_copyright_of_a_glb_and_its_scale_is_told():
    data = write_glb(square(0), TERMS)
    asset = json.loads(data[20 : 20 + struct.unpack_from("<I", data, 12)[0]])["asset"]
    assert asset["version"] == "2.0"
    assert "strict (its makers); licence of the weights: CC BY-NC" in asset["copyright"]
    assert "estimate" in asset["extras"]["scale"]
    assert len(trimesh.load_mesh(io.BytesIO(data), file_type="glb").faces) == 2


def test_ply_of_another_writer_reads_back():
    ball = sphere(2)
    other = trimesh.Trimesh(
        ball.vertices, ball.triangles, vertex_colors=ball.colors, process=False
    ).export(file_type="ply")
    assert not other.startswith(write_ply(ball)[:100])
    again = read_ply(other)
    np.testing.assert_array_equal(again.vertices, ball.vertices)
    np.testing.assert_array_equal(again.triangles, ball.triangles)
    np.testing.assert_array_equal(again.colors, ball.colors)


def test_ply_that_is_cut_off_is_refused():
    with pytest.raises(ValueError, match="unexpected length"):
        read_ply(write_ply(sphere(2))[:-1])


def test_mesh_written_piece_by_piece_is_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(meshes, "_ROWS_AT_ONCE", 70)
    ball = sphere(2)
    writer = MeshWriter(tmp_path)
    writer.append(ball.vertices[:50], ball.colors[:50], ball.triangles[:0])
    writer.append(ball.vertices[50:], ball.colors[50:], ball.triangles[:100])
    writer.append(ball.vertices[:0], ball.colors[:0], ball.triangles[100:])
    for terms in (None, TERMS):
        writer.write_ply(tmp_path / "ball.ply", terms)
        assert (tmp_path / "ball.ply").read_bytes() == write_ply(ball, terms)
        writer.write_glb(tmp_path / "ball.glb", terms)
        assert (tmp_path / "ball.glb").read_bytes() == write_glb(ball, terms)


def test_ply_of_an_empty_tile_reads_back():
    assert len(read_ply(write_ply(Mesh.empty())).triangles) == 0


def test_read_ply_says_what_is_wrong():
    with pytest.raises(ValueError, match="not a PLY file"):
        read_ply(b"glTF....")


def test_glb_shows_the_scene_upright():
    # 3 m ahead, 1 m to the right, and 2 m down in OpenCV axes.
    corners = [[1, 2, 3], [2, 2, 3], [1, 4, 3]]
    loaded = load_glb(mesh(corners, [[0, 1, 2]]))
    # In glTF: up is +y, ahead is -z.
    np.testing.assert_allclose(loaded.vertices[0], [1, -2, -3])
    # The front, (1,0,0) x (0,2,0), looked ahead and still does.
    np.testing.assert_allclose(loaded.face_normals[0], [0, 0, -1])


def test_glb_colours_are_linear_and_unlit():
    # sRGB 188 is half of full light: ((188/255 + 0.055) / 1.055) ** 2.4 = 0.503.
    data = write_glb(mesh([[0, 0, 1], [1, 0, 1], [0, 1, 1]], [[0, 1, 2]], [[188, 0, 255]] * 3))
    length = struct.unpack_from("<I", data, 12)[0]
    description = json.loads(data[20 : 20 + length])
    view = description["bufferViews"][description["accessors"][1]["bufferView"]]
    color = struct.unpack_from("<4H", data, 28 + length + view["byteOffset"])
    np.testing.assert_allclose(np.array(color) / 65535, [0.503, 0, 1, 1], atol=0.001)
    assert "KHR_materials_unlit" in description["materials"][0]["extensions"]


def test_glb_of_many_triangles_reads_back():
    ball = sphere(3)
    loaded = load_glb(ball)
    assert len(loaded.faces) == len(ball.triangles)
    assert loaded.is_watertight
    assert loaded.volume > 0


def test_glb_refuses_an_empty_mesh():
    with pytest.raises(ValueError, match="no triangles"):
        write_glb(Mesh.empty())


def test_mesh_refuses_colours_that_do_not_fit():
    with pytest.raises(ValueError, match="one colour a vertex"):
        mesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], [[0, 0, 0]])


def load_glb(m):
    return trimesh.load_mesh(io.BytesIO(write_glb(m)), file_type="glb", process=False)


def boundary_edges(m):
    edges = np.sort(m.triangles[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    return int((np.unique(edges, axis=0, return_counts=True)[1] == 1).sum())
