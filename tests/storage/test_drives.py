"""Which drives a location holds."""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pytest
from campaigns.bad_files import TEXTS, with_long_text
from PIL import Image

from storage.drives import drive_name, hold_name, is_collection, list_drives
from storage.glance import glance_at
from storage.probe import probe_drive
from tasks.summary import list_stores

PROBE_AND_TELL_OF_PROGRAMS = """
import sys
from storage.probe import probe_drive
sys.addaudithook(lambda event, _: event == "subprocess.Popen" and print("a program is started"))
record, _ = probe_drive(sys.argv[1])
print(record.unreadable[0].reason)
"""

LIST_AS_NOBODY = """
import os, sys
from storage.drives import list_drives
list_drives(sys.argv[1])  # loads what it needs
if os.getuid() == 0:
    os.setuid(65534)  # root may read everything
for location in sys.argv[1:]:
    print(*(drive.name for drive in list_drives(location)))
"""


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def image(path: Path, dtype: type = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4), dtype)).save(path)


def found(location: Path | str, root: Path) -> dict[str, str]:
    return {d.name: str(Path(d.location).relative_to(root)) for d in list_drives(str(location))}


def test_collection_of_drive_folders_is_listed_in_natural_order(tmp_path):
    touch(tmp_path, "drive10/a.mp4", "drive2/a.mp4", "drive2/b.MOV", ".hidden/a.mp4", "notes.txt")
    touch(tmp_path, "drive2/._a.mp4")
    assert list(found(tmp_path, tmp_path).items()) == [
        ("drive2", "drive2"),
        ("drive10", "drive10"),
    ]
    assert is_collection(str(tmp_path))


def test_video_file_and_folder_of_clips_are_single_drives(tmp_path):
    touch(tmp_path, "trip/1.mp4", "trip/2.mp4", "trip/readme.txt")
    assert found(tmp_path / "trip", tmp_path) == {"trip": "trip"}
    assert found(tmp_path / "trip/1.mp4", tmp_path) == {"1": "trip/1.mp4"}
    assert not is_collection(str(tmp_path / "trip"))
    assert not is_collection(f"{tmp_path}/trip/")
    assert not is_collection(str(tmp_path / "trip/1.mp4"))


def test_loose_videos_beside_drive_folders_are_drives_each(tmp_path):
    touch(tmp_path, "loose.mp4", "other.mkv", "deep/er/1.mp4")
    assert found(tmp_path, tmp_path) == {
        "loose": "loose.mp4",
        "other": "other.mkv",
        "er": "deep/er",
    }


def test_image_folders_need_two_pictures_and_no_depth_maps(tmp_path):
    for name in ("a/1.png", "a/2.png", "single/1.png"):
        image(tmp_path / name)
    image(tmp_path / "depth/1.png", np.uint16)
    image(tmp_path / "depth/2.png", np.uint16)
    assert found(tmp_path, tmp_path) == {"a": "a"}


def test_video_with_depth_maps_beside_it_is_one_drive(tmp_path):
    touch(tmp_path, "video.mp4")
    image(tmp_path / "depth/1.png", np.uint16)
    image(tmp_path / "depth/2.png", np.uint16)
    assert found(tmp_path, tmp_path) == {tmp_path.name: "."}


def test_globs_make_every_match_a_drive(tmp_path):
    touch(tmp_path, "x/a.mp4", "x/b.mp4", "y/c.mp4", "x/notes.txt")
    assert found(f"{tmp_path}/x/*", tmp_path) == {"a": "x/a.mp4", "b": "x/b.mp4"}
    assert found(f"{tmp_path}/*", tmp_path) == {"x": "x", "y": "y"}
    assert is_collection(f"{tmp_path}/y/*.mp4")


def test_previews_are_no_drives_where_there_are_other_videos(tmp_path):
    touch(tmp_path, "go/GX01.MP4", "go/GL01.LRV", "go/more/GX02.MP4", "go/more/GL02.LRV")
    assert found(tmp_path / "go", tmp_path) == {"GX01": "go/GX01.MP4", "more": "go/more"}
    assert found(f"{tmp_path}/go/more/*", tmp_path) == {"GX02": "go/more/GX02.MP4"}
    assert found(f"{tmp_path}/go/*.LRV", tmp_path) == {"GL01": "go/GL01.LRV"}
    assert found(tmp_path / "go/GL01.LRV", tmp_path) == {"GL01": "go/GL01.LRV"}
    touch(tmp_path, "left/GL03.LRV")
    assert found(tmp_path / "left", tmp_path) == {"left": "left"}


def test_brackets_in_a_file_name_are_not_a_glob(tmp_path):
    touch(tmp_path, "drive [1].mp4")
    assert found(tmp_path / "drive [1].mp4", tmp_path) == {"drive_1": "drive [1].mp4"}


def test_names_that_clash_take_their_parents_names(tmp_path):
    touch(tmp_path, "mon/front.mp4", "tue/front.mp4", "tue/Back.mp4", "mon/back.mkv")
    names = [d.name for d in list_drives(f"{tmp_path}/*/*")]
    assert names == ["mon_back", "mon_front", "tue_Back", "tue_front"]


def test_names_that_clash_after_all_are_numbered(tmp_path):
    touch(tmp_path, "a.mp4", "a.mkv")
    names = [d.name for d in list_drives(f"{tmp_path}/a.*")]
    assert len(set(names)) == 2


def names_in(logs: Path, output: Path) -> list[str]:
    return [drive.name for drive in list_drives(f"{logs}/*/*", str(output))]


def hold_all(logs: Path, output: Path) -> None:
    for drive in list_drives(f"{logs}/*/*", str(output)):
        hold_name(f"{output}/{drive.name}.zarr", drive.location)


def test_a_name_that_is_held_stays_whatever_drives_come(tmp_path):
    logs, output = tmp_path / "logs", tmp_path / "out"
    touch(logs, "24/drive1/1.mp4", "24/drive2/1.mp4")
    hold_all(logs, output)
    for night, names in (
        ("25", ["drive1", "drive2", "25_drive1"]),
        ("23", ["23_drive1", "drive1", "drive2", "25_drive1"]),
    ):
        touch(logs, f"{night}/drive1/1.mp4")
        assert names_in(logs, output) == names
        hold_all(logs, output)
    assert names_in(logs, tmp_path / "other") == ["23_drive1", "24_drive1", "drive2", "25_drive1"]


def test_numbers_that_are_held_stay(tmp_path):
    logs, output = tmp_path / "logs", tmp_path / "out"
    touch(logs, "x/a.mkv", "x/a.mp4")
    hold_all(logs, output)
    mkv, mp4 = names_in(logs, output)
    touch(logs, "x/a.avi")
    avi, *others = names_in(logs, output)
    assert others == [mkv, mp4]
    assert len({avi, mkv, mp4}) == 3


def test_a_name_stays_its_drives_when_that_has_left_the_collection(tmp_path):
    logs, output = tmp_path / "logs", tmp_path / "out"
    for night, left, names in (
        ("24", None, ["front"]),
        ("25", "24", ["25_front"]),
        ("26", None, ["25_front", "26_front"]),
        ("27", "25", ["26_front", "27_front"]),
        ("28", "26", ["27_front", "28_front"]),
    ):
        touch(logs, f"{night}/front.mp4")
        if left:
            (logs / left / "front.mp4").unlink()
        assert names_in(logs, output) == names
        hold_all(logs, output)
    (logs / "28/front.mp4").unlink()
    assert names_in(logs, output) == ["27_front"]  # alone, under the name that it has


def test_numbers_stay_when_others_have_left(tmp_path):
    logs, output = tmp_path / "logs", tmp_path / "out"
    touch(logs, "x/a.avi", "x/a.mkv", "x/a.mp4")
    hold_all(logs, output)
    avi, _, mp4 = names_in(logs, output)
    (logs / "x/a.avi").unlink()
    (logs / "x/a.mkv").unlink()
    assert names_in(logs, output) == [mp4]
    touch(logs, "x/a.mov", "x/a.webm")
    new = {*names_in(logs, output)} - {mp4}
    assert len(new) == 2
    assert avi not in new


def test_many_names_that_are_alike_take_little_memory(tmp_path):
    logs, output = tmp_path / "logs", tmp_path / "out"
    touch(logs, *(f"x/{'long' * 40}{i}.mp4" for i in range(300)))
    tracemalloc.start()
    hold_all(logs, output)
    names = names_in(logs, output)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(names)) == 300
    assert max(map(len, names)) <= 124
    assert peak < 10 * 2**20  # all pairs of a drive and a number: 28
    held = {drive.location: drive.name for drive in list_drives(f"{logs}/*/*", str(output))}
    for i in range(0, 300, 2):
        (logs / f"x/{'long' * 40}{i}.mp4").unlink()
    assert all(held[d.location] == d.name for d in list_drives(f"{logs}/*/*", str(output)))


def test_a_store_that_cannot_be_read_stops_no_listing(tmp_path):
    logs, output = tmp_path / "logs", tmp_path / "out"
    touch(logs, "x/a.mp4", "x/b.mp4", "x/c.mp4")
    hold_all(logs, output)
    (output / "a.zarr/zarr.json").write_text("nonsense")
    with (output / "b.zarr/zarr.json").open("wb") as file:
        file.truncate(2**26)
    assert names_in(logs, output) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("/data/..weird\tname?.mp4", "weird_name"),
        ("memory://bucket/trip 7/", "trip_7"),
        ("s3://bucket", "bucket"),
        ("https://host/v/clip.mp4?token=abc/../x", "clip"),
        ("/data/...", "drive"),
        ("/data/Fahrt_ü.mov", "Fahrt_ü"),
        ("s3://bucket/run #1/a?b.mp4", "a_b"),
        (f"/data/{'走' * 100}.mp4", "走" * 66),
    ],
)
def test_drive_names_are_safe_as_file_names(location, name):
    assert drive_name(location) == name


def test_remote_collections_are_listed(tmp_path):
    for name in ("one/a.mp4", "two/b.mp4"):
        with fsspec.open(f"memory://drive-tests/{name}", "wb") as file:
            file.write(b"x")
    drives = list_drives("memory://drive-tests")
    assert [d.name for d in drives] == ["one", "two"]
    assert all(fsspec.open(f"{d.location}").fs.isdir(d.location) for d in drives)
    assert [d.name for d in list_drives("memory://drive-tests/*/*.mp4")] == ["a", "b"]


def test_number_signs_and_question_marks_are_letters_of_a_remote_name(seaweed, tmp_path):
    logs = f"{seaweed.url}/{tmp_path.name}"
    for name in ("run #1/a#b.mp4", "run #1/a?c.mp4", "run 2?/d.mp4", "e#.zarr/f.mp4"):
        seaweed.filesystem().pipe_file(f"{logs}/{name}", b"a video")
    assert {d.name for d in list_drives(logs)} == {"run_1", "run_2"}
    assert [d.name for d in list_drives(f"{logs}/run #1/*")] == ["a_b", "a_c"]


def test_nothing_found_says_what_was_looked_for(tmp_path):
    touch(tmp_path, "notes.txt")
    with pytest.raises(ValueError, match="there is no such file or folder; check the path"):
        list_drives(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no drives are given"):
        list_drives("")
    for location in (tmp_path, f"{tmp_path}/*.mp4"):
        with pytest.raises(ValueError, match=r"no drive is found; expected a video file"):
            list_drives(str(location))


def test_results_of_earlier_runs_are_no_drives(tmp_path):
    touch(tmp_path, "trip/1.mp4", "trip/2.mp4")
    for name in ("trajectory.png", "frames.png"):
        image(tmp_path / "trip/out/trip.zarr/report" / name)
    assert found(tmp_path / "trip", tmp_path) == {"trip": "trip"}
    with pytest.raises(ValueError, match="no drive is found"):
        list_drives(str(tmp_path / "trip/out"))
    with pytest.raises(ValueError, match="no drive is found"):
        list_drives(f"{tmp_path}/trip/out/*")


def test_links_that_lead_out_of_their_folder_or_nowhere_are_passed_over(tmp_path):
    touch(tmp_path, "elsewhere/secret.mp4", "drives/a.mp4", "drives/pool/b.mp4")
    drives = tmp_path / "drives"
    (drives / "out.mp4").symlink_to("../elsewhere/secret.mp4")
    (drives / "absolute.mp4").symlink_to("/etc/passwd")
    (drives / "folder").symlink_to(tmp_path / "elsewhere")
    (drives / "loop").symlink_to("..")
    (drives / "inside.mp4").symlink_to("pool/b.mp4")
    (drives / "nowhere.mp4").symlink_to("gone.mp4")
    names = {drive.name for drive in list_drives(str(drives))}
    assert names == {"a", "inside", "pool"}
    assert {d.name for d in list_drives(f"{drives}/*.mp4")} == {"a", "inside"}


def test_link_that_is_given_itself_is_followed(tmp_path):
    touch(tmp_path, "elsewhere/a.mp4")
    (tmp_path / "drives").symlink_to("elsewhere")
    assert len(list_drives(str(tmp_path / "drives"))) == 1


def test_names_that_are_not_utf8_do_not_stop_the_others(tmp_path, caplog):
    touch(tmp_path, "a.mp4", "\udcff.mp4", "日本.mp4", "more/b.mp4")
    assert {drive.name for drive in list_drives(str(tmp_path))} == {"a", "日本", "more"}
    assert {drive.name for drive in list_drives(f"{tmp_path}/*.mp4")} == {"a", "日本"}
    assert "rename it" in caplog.text


@pytest.mark.parametrize("kind", ["bomb_first", "large_first", "ztxt_first"])
def test_image_that_cannot_be_opened_does_not_stop_the_others(tmp_path, kind):
    image(tmp_path / "a/1.png")
    image(tmp_path / "a/2.png")
    first = tmp_path / "b/0.png"
    image(first)
    image(tmp_path / "b/1.png")
    if kind == "bomb_first":
        Image.new("1", (20_000, 20_000)).save(first)
    elif kind == "large_first":  # not for Pillow
        Image.new("1", (8192, 8193)).save(first)
    else:
        first.write_bytes(with_long_text(first.read_bytes()))
    assert found(tmp_path, tmp_path) == {"a": "a", "b": "b"}
    record, _ = probe_drive(str(tmp_path / "b"))
    assert record.frames == 1
    assert [(lost.index, lost.count) for lost in record.unreadable] == [(0, 1)]
    assert glance_at(str(tmp_path / "b")).frames == 2


def test_image_of_another_kind_than_its_name_starts_no_program(tmp_path):
    for name in ("0.png", "1.png"):
        image(tmp_path / name)
    (tmp_path / "0.png").write_text(TEXTS["eps"])
    command = [sys.executable, "-c", PROBE_AND_TELL_OF_PROGRAMS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "it is not an image that can be read\n", done.stderr


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_folder_that_may_not_be_read_does_not_stop_the_others(public_path, mode):
    touch(public_path, "all/a.mp4", "all/locked/b.mp4", "all/more/c.mp4")
    locked = public_path / "all/locked"
    locked.chmod(mode)
    places = [
        str(public_path / "all"),
        f"{public_path}/all/*",
        f"{public_path}/all/*/*.mp4",
        str(locked),
    ]
    command = [sys.executable, "-c", LIST_AS_NOBODY, *places]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    locked.chmod(0o755)
    assert done.stdout.splitlines() == ["a more", "a more", "c"], done.stderr
    assert f"{locked}: passed over, as this folder may not be read" in done.stderr
    assert f"StoreRefused: {locked}: access denied" in done.stderr


def test_drives_that_others_add_are_found_by_a_process_that_has_looked_before(seaweed, tmp_path):
    logs, others = f"{seaweed.url}/{tmp_path.name}", seaweed.filesystem()
    for count, name in enumerate(("monday", "tuesday"), 1):
        others.pipe_file(f"{logs}/{name}/front.mp4", b"a video")
        assert len(list_drives(logs)) == count
        others.pipe_file(f"{logs}-out/{name}.zarr/zarr.json", b"{}")
        assert len(list_stores(f"{logs}-out")) == count
