"""Folders of objects: the same promises on a local disk and on a real S3 server."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

import pytest

from storage.errors import StoreRefused, StoreUnavailable
from storage.folders import open_folder
from storage.objects import Folder


@pytest.fixture
def bracketed(output_url: str) -> Folder:
    """A folder whose name is a glob that matches its neighbour's, and not its own."""
    return open_folder(f"{output_url}/run[1]/drive.zarr")


def test_tree_is_deleted_by_its_name_not_by_what_it_matches(bracketed, output_url):
    neighbour = open_folder(f"{output_url}/run1/drive.zarr")
    for folder in (bracketed, neighbour):
        folder.write_many({"a/b": b"1", "a/c/d": b"2", "a*": b"3", "ab/c": b"4"})
    bracketed.delete_tree("a")
    bracketed.delete_tree("a?")
    assert set(bracketed.sizes()) == {"a*", "ab/c"}
    assert set(neighbour.sizes()) == {"a*", "a/b", "a/c/d", "ab/c"}
    bracketed.delete_tree("a*")  # below it, not itself
    assert set(bracketed.sizes()) == {"a*", "ab/c"}


def test_every_act_takes_names_as_they_are(bracketed, output_url, tmp_path):
    neighbour = open_folder(f"{output_url}/run1/drive.zarr")
    neighbour.write_many({"a": b"theirs", "b": b"theirs"})
    bracketed.write_new("a", b"mine")
    source = tmp_path / "source"
    source.write_bytes(b"uploaded")
    bracketed.upload("c", source)
    assert bracketed.read("a") == b"mine"
    assert bracketed.read("b") is None
    assert bracketed.read_many(["a", "b", "c"]) == {"a": b"mine", "c": b"uploaded"}
    bracketed.download("c", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"uploaded"
    with pytest.raises(FileNotFoundError):
        bracketed.download("b", tmp_path / "copy")
    bracketed.delete("b")
    bracketed.delete("a")
    assert set(bracketed.sizes()) == set(bracketed.objects()) == {"c"}
    assert set(neighbour.sizes()) == {"a", "b"}


def test_objects_are_not_there_before_the_disk_has_them(tmp_path, monkeypatch):
    folder = open_folder(str(tmp_path / "drive.zarr"))
    folder.write("before", b"1")

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    for write in (folder.write_many, folder.create_many):
        with pytest.raises(StoreUnavailable):
            write({"a": b"2", "b/c": b"3"})
    monkeypatch.undo()
    assert folder.objects().keys() == {"before"}


def test_disk_without_hard_links_is_said_to_be_none_for_results(tmp_path, monkeypatch):
    def link(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    folder = open_folder(str(tmp_path))
    with pytest.raises(StoreRefused, match=r"no hard links \(FAT, .*choose another output"):
        folder.write_new("a", b"1")
    with pytest.raises(StoreRefused, match="no hard links"):
        folder.create_many({"b": b"1"})
    assert list(tmp_path.iterdir()) == []


def test_many_objects_are_created_but_for_those_that_are_there(bracketed):
    bracketed.write_new("a/b", b"theirs")
    bracketed.write_new("a/c", b"same")
    objects = {"a/b": b"mine", "a/c": b"same", "a/d/e": b"", "f": b"4" * 100_000}
    assert bracketed.create_many(objects) == ["a/b"]
    assert bracketed.read_many(objects) == objects | {"a/b": b"theirs"}


def test_digest_of_an_object_is_that_of_its_content(bracketed):
    content = os.urandom(20 * 2**20)
    bracketed.write("a/b", content)
    assert bracketed.sha256("a/b") == hashlib.sha256(content).hexdigest()
    assert bracketed.sha256("a/c") is None


def test_disk_that_is_full_while_an_object_is_copied_to_it_is_named(tmp_path, monkeypatch):
    def copy(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = open_folder(str(tmp_path / "drive.zarr"))
    folder.write("a", b"1")
    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(StoreUnavailable, match=rf"^{tmp_path}/small: no space is left"):
        folder.download("a", tmp_path / "small/a")


def test_local_url_is_the_folder_that_it_names(tmp_path):
    for url in (f"file://{tmp_path}/a", f"file:{tmp_path}/a", f"local://{tmp_path}/a"):
        open_folder(url).write("b", url.encode())
        assert (tmp_path / "a/b").read_text() == url


@pytest.mark.parametrize("url", ["s3://bucket//out", "s3://bucket/logs//out/drive.zarr"])
def test_url_with_an_empty_part_is_refused_with_the_one_that_was_meant(url):
    meant = url.replace("//out", "/out")
    with pytest.raises(ValueError, match=rf"{url} has an empty part.*did you mean {meant}\?"):
        open_folder(url)
