"""Export: what was committed, or an error."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from aiobotocore.client import AioBaseClient
from seaweed import Seaweed

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


def test_mesh_is_exported_to_s3(store, seaweed: Seaweed):
    target = f"{seaweed.url}/meshes/mesh.ply"
    assert export_store(store.url, "ply", target) == target
    assert seaweed.filesystem().cat_file(target) == b"ply as committed"


def test_interrupted_export_to_s3_leaves_the_earlier_object(store, seaweed: Seaweed, monkeypatch):
    """Ctrl-C when the first of the parts has arrived."""
    mesh = bytes(105_000_000)
    files = {MESH: store.put_file(MESH, mesh)}
    merged = {**store.read_commit("fuse/merged"), "files": files}
    store.commit("fuse/merged", merged)
    target = f"{seaweed.url}/mesh.ply"
    server = seaweed.filesystem()
    server.pipe_file(target, b"earlier")
    call, parts = AioBaseClient._make_api_call, []

    async def interrupted(self, operation, options):
        answer = await call(self, operation, options)
        if operation == "UploadPart" and not parts:
            parts.append(options["PartNumber"])
            os.kill(os.getpid(), signal.SIGINT)
        return answer

    monkeypatch.setattr(AioBaseClient, "_make_api_call", interrupted)
    # A shell lets what it starts in the background ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            export_store(store.url, "ply", target)
    finally:
        signal.signal(signal.SIGINT, before)
    assert server.info(target)["size"] in (len(b"earlier"), len(mesh))


@pytest.mark.parametrize("scheme", ["file://", "local://"])
def test_export_to_a_file_url_that_fails_leaves_the_earlier_file(store, tmp_path, scheme):
    target = tmp_path / "mesh.ply"
    export_store(store.url, "ply", f"{scheme}{target}")
    assert target.read_bytes() == b"ply as committed"
    Path(store.url, MESH).unlink()
    with pytest.raises(DataDamaged, match="gone"):
        export_store(store.url, "ply", f"{scheme}{target}")
    assert target.read_bytes() == b"ply as committed"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("s3://bucket/", "names no file"),
        ("s3://mesh.ply", "names no file"),
        ("https://host/mesh.ply", "is on a web server"),
        ("simplecache::s3://bucket/mesh.ply", "chains file systems"),
    ],
)
def test_what_is_no_remote_file_is_refused(store, target, said):
    with pytest.raises(ValueError, match=said):
        export_store(store.url, "ply", target)
