"""Export: trajectory or mesh of a drive in the formats that other tools read."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import fsspec
import numpy as np
from fsspec.core import split_protocol
from numpy.typing import NDArray

from storage.drives import store_name
from storage.failures import scratch_folder
from storage.folders import open_folder
from storage.reconstruction import ReconstructionStore
from storage.wording import redacted
from tasks.planned import frame_numbers, longest_part
from tasks.terms import read_terms
from ttt3r.metrics import kitti_text, tum_text


def export_store(url: str, format: str, to: str | None = None, part: int | None = None) -> str:
    """Write one part of a drive.

    Args:
        url: the drive's store.
        format: tum, kitti (camera-to-world, metres as estimated; a 13th number, the frame's, leads
            each line where lines are not frames 0, 1, .. of the recording), ply or glb.
        to: file or URL; None: in the working directory, named after the store.
        part: trajectory part; None: the longest.

    Returns:
        Where it was written.

    Raises:
        ValueError: that stage has not finished, or there is no such part, or no such folder.
        DataDamaged: what is stored is not what was committed; nothing is written.
    """
    store = ReconstructionStore.open(url)
    part = choose_part(store, part)
    ending = format if format in ("ply", "glb") else f"{format}.txt"
    # What the user typed, not what the store says of itself.
    target = to or f"{store_name(url)}.{ending}"
    write = copy_mesh if format in ("ply", "glb") else write_trajectory
    protocol = split_protocol(target)[0]
    if protocol not in (None, "file", "local"):
        folder_url, name = _remote_place(target)
        with scratch_folder() as folder:
            # Not into an open file: leaving that completes what an interruption left half sent.
            open_folder(folder_url).upload(name, write(store, format, part, folder))
        return target
    path = Path(target if protocol is None else fsspec.core.url_to_fs(target)[1])
    if path.is_dir():
        raise ValueError(f"{target} is a folder; give the file to write in it")
    if path.exists() and not path.is_file():  # a pipe is no file to replace
        with (
            scratch_folder() as folder,
            write(store, format, part, folder).open("rb") as made,
            path.open("wb") as file,
        ):
            shutil.copyfileobj(made, file)
        return target
    if not path.parent.is_dir():
        raise ValueError(
            f"there is no folder {path.parent} to write {path.name} to; create it first"
        )
    # If that fails, an earlier file is still there.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as beside:
        os.replace(write(store, format, part, Path(beside)), path)
    return target


def _remote_place(target: str) -> tuple[str, str]:
    """The folder and name that a URL gives to a file."""
    folder_url, _, name = target.rpartition("/")
    if target.startswith(("http://", "https://")):
        raise ValueError(f"{redacted(target)} is on a web server, which takes no files")
    if not name or "://" not in folder_url.rstrip("/"):
        raise ValueError(f"{redacted(target)} names no file in a folder or bucket; add its name")
    return folder_url, name


def describe_part(url: str, format: str, part: int | None = None) -> str:
    """What a user should know of an exported part; "" where that is nothing."""
    store = ReconstructionStore.open(url)
    part = choose_part(store, part)
    of_frame = store.read_trajectory()["part"]
    mine = np.flatnonzero(of_frame == part)
    words = []
    if len(mine) < len(of_frame):
        words.append(
            f"part {part} of {int(of_frame.max()) + 1}: frames {mine[0]} to {mine[-1]}, "
            f"{len(mine)} of {len(of_frame)}"
        )
    if format == "kitti" and not _is_whole(store, mine):
        words.append("lines begin with the frame's number, which other readers of KITTI may refuse")
    return "; ".join(words)


def _is_whole(store: ReconstructionStore, mine: NDArray[np.int64]) -> bool:
    """Whether frames are the first of the recording, without a gap."""
    return np.array_equal(frame_numbers(store)[mine], np.arange(len(mine)))


def choose_part(store: ReconstructionStore, part: int | None) -> int:
    """`part`, or the longest one if None."""
    of_frame = store.read_trajectory()["part"]
    if part is None:
        return longest_part(of_frame)
    parts = int(of_frame.max()) + 1
    if not 0 <= part < parts:
        raise ValueError(
            f"there is no trajectory part {part} in {store.url}; it has {parts}, from 0"
        )
    return part


def write_trajectory(store: ReconstructionStore, format: str, part: int, folder: Path) -> Path:
    """Write the part's trajectory into a folder."""
    arrays = store.read_trajectory()
    mine = np.flatnonzero(arrays["part"] == part)
    poses = arrays["cam_to_world"][mine]
    if format == "kitti":
        text = kitti_text(poses, None if _is_whole(store, mine) else frame_numbers(store)[mine])
    else:
        comments = "".join(f"# {line}\n" for line in read_terms(store).lines)
        text = comments + tum_text(store.read_frames()["timestamp"][mine], poses)
    path = folder / "trajectory.txt"
    path.write_bytes(text.encode())
    return path


def copy_mesh(store: ReconstructionStore, format: str, part: int, folder: Path) -> Path:
    """Copy the part's mesh, of any size, into a folder."""
    merged = store.read_commit("fuse/merged")
    if merged is None:
        raise ValueError(f"{store.url} has no mesh yet; run `ttt3r reconstruct` again")
    mesh = next(mesh for mesh in merged["meshes"] if mesh["part"] == part)
    if not mesh["triangles"]:
        raise ValueError(f"part {part} of {store.url} has an empty mesh; there is nothing to write")
    name = f"{mesh['folder']}/mesh.{format}"
    files = merged.get("files") or {}
    if name not in files and not store.list_files(name):
        raise ValueError(
            f"{store.url} has no {format.upper()} of part {part}, as it would be too large "
            f"({mesh['triangles']:,} triangles); export ply instead"
        )
    return store.local_copy(name, folder, files.get(name))
