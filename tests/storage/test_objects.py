"""Folders of objects: the same promises on a local disk and on a real S3 server."""

import pytest

from storage.objects import Folder, open_folder


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
