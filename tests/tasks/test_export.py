"""Export: what was committed, or an error."""

from pathlib import Path

import numpy as np
import pytest

from storage.errors import DataDamaged
from storage.reconstruction import ReconstructionStore
from tasks.export import export_store

MESH = "fusion/mesh.ply"


@pytest.fixture
def store(tmp_path: Path) -> ReconstructionStore:
    """A drive of four frames and a mesh."""
    made = ReconstructionStore.create(tmp_path / "drive.zarr", {})
    made.write_trajectory({"part": np.zeros(4, np.int32)})
    made.commit("align", {"key": "key"})
    files = {MESH: made.put_file(MESH, b"ply as committed")}
    meshes = [{"part": 0, "triangles": 1, "folder": "fusion"}]
    made.commit("fuse/merged", {"key": "key", "meshes": meshes, "files": files})
    return made


def test_mesh_is_exported_as_it_was_committed(store, tmp_path):
    target = tmp_path / "mesh.ply"
    export_store(store.url, "ply", str(target))
    assert target.read_bytes() == b"ply as committed"


@pytest.mark.parametrize(("content", "said"), [(b"ply with a hole", "not what"), (None, "gone")])
def test_damaged_mesh_is_not_exported(store, tmp_path, content, said):
    stored, target = Path(store.url, MESH), tmp_path / "mesh.ply"
    stored.unlink() if content is None else stored.write_bytes(content)
    with pytest.raises(DataDamaged, match=said):
        export_store(store.url, "ply", str(target))
    assert not target.exists()


def test_mesh_larger_than_any_other_file_is_exported(store, tmp_path, monkeypatch):
    monkeypatch.setattr("storage.reconstruction.MOST_FILE_BYTES", 10)
    with pytest.raises(DataDamaged, match="larger than"):
        store.get_file(MESH)
    target = tmp_path / "mesh.ply"
    export_store(store.url, "ply", str(target))
    assert target.read_bytes() == b"ply as committed"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["mesh.ply"]


def test_folder_is_no_file_to_write(store, tmp_path):
    with pytest.raises(ValueError, match="is a folder; give the file"):
        export_store(store.url, "ply", str(tmp_path))


def test_missing_folder_is_said_to_be(store, tmp_path):
    with pytest.raises(ValueError, match=rf"no folder {tmp_path}/none to write mesh.ply to"):
        export_store(store.url, "ply", str(tmp_path / "none" / "mesh.ply"))
    assert not (tmp_path / "none").exists()


def test_mesh_that_was_too_large_for_a_format_is_said_to_be(store):
    with pytest.raises(ValueError, match="too large"):
        export_store(store.url, "glb")
