import os
import shutil
import socket
from pathlib import Path

import pytest
from recordings import moving_squares, write_video

from storage.drives import hold_name, list_drives
from storage.reconstruction import ReconstructionStore
from storage.records import DriveRecord, FrameTable
from storage.video import read_frames
from tasks.probe import AnotherDrive, may_take_over, probe_stage


@pytest.fixture
def drive(tmp_path):
    """A folder of two clips."""
    for i in range(2):
        (tmp_path / "trip").mkdir(exist_ok=True)
        write_video(tmp_path / "trip" / f"{i}.mp4", moving_squares(4))
    return tmp_path / "trip"


def probe(location, tmp_path) -> ReconstructionStore:
    url = tmp_path / "out" / "trip.zarr"
    probe_stage.fn(str(location), "trip", str(url))
    return ReconstructionStore.open(url)


def record_of(store: ReconstructionStore) -> DriveRecord:
    return DriveRecord.from_json(store.attributes["drive"])


def test_probe_is_not_done_again_for_other_files_in_the_folder(drive, tmp_path):
    before = probe(drive, tmp_path).read_commit("probe")
    (drive / "notes.txt").write_text("rain")
    (drive / "out").mkdir()
    (drive / "out" / "mesh.ply").write_text("ply")
    assert probe(drive, tmp_path).read_commit("probe") == before


def test_probe_is_done_again_when_a_clip_is_added(drive, tmp_path):
    before = probe(drive, tmp_path).read_commit("probe")
    write_video(drive / "2.mp4", moving_squares(4))
    store = probe(drive, tmp_path)
    assert store.read_commit("probe")["key"] != before["key"]
    assert record_of(store).frames == 12


def test_probe_that_is_killed_between_record_and_table_is_done_again(drive, tmp_path, monkeypatch):
    probe(drive, tmp_path)
    kept = shutil.copy2(drive / "1.mp4", tmp_path / "kept.mp4")
    write_video(drive / "1.mp4", moving_squares(6))

    def killed(self, **arrays):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ReconstructionStore, "write_frames", killed)
        with pytest.raises(KeyboardInterrupt):
            probe(drive, tmp_path)
    shutil.move(kept, drive / "1.mp4")
    store = probe(drive, tmp_path)
    assert record_of(store).frames == len(store.read_frames()["index"]) == 8


def test_probe_follows_a_drive_that_was_moved(drive, tmp_path):
    before = probe(drive, tmp_path).read_commit("probe")
    shutil.move(drive, tmp_path / "archive")
    store = probe(tmp_path / "archive", tmp_path)
    assert store.read_commit("probe") == before
    frames = FrameTable.from_arrays(store.read_frames())
    assert len(list(read_frames(record_of(store), frames, 0, 8))) == 8


def test_probe_records_where_a_drive_is_for_any_working_directory(drive, tmp_path, monkeypatch):
    monkeypatch.chdir(drive)
    record = record_of(probe("0.mp4", tmp_path))
    assert record.location == record.clips[0].location == str(drive / "0.mp4")


def test_probe_refuses_to_replace_another_drive(drive, tmp_path):
    before = probe(drive / "0.mp4", tmp_path).commits()
    other = write_video(tmp_path / "other.mp4", moving_squares(5))
    with pytest.raises(ValueError, match="holds the drive at"):
        probe(other, tmp_path)
    assert probe(drive / "0.mp4", tmp_path).commits() == before


def test_drive_that_looks_like_the_one_recorded_is_told_apart_while_both_are_there(tmp_path):
    def clip(camera: str, content: bytes) -> Path:
        path = tmp_path / camera / "cam" / "0.mp4"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        return path.parent

    video = write_video(tmp_path / "v.mp4", moving_squares(8)).read_bytes()
    front = clip("front", video)
    rear = clip("rear", video[:-1] + bytes([video[-1] ^ 1]))
    copy = clip("copy", video)
    output = str(tmp_path / "out")
    url = f"{output}/cam.zarr"
    probe_stage.fn(str(front), "cam", url)
    with pytest.raises(AnotherDrive):
        probe_stage.fn(str(rear), "cam", url)
    assert [drive.name for drive in list_drives(str(rear), output, may_take_over)] == ["rear_cam"]
    probe_stage.fn(str(copy), "cam", url)
    assert record_of(ReconstructionStore.open(url)).location == str(copy)


def test_drives_that_were_moved_keep_their_names_and_new_ones_take_none(tmp_path):
    output = tmp_path / "out"

    def names(logs: str) -> list[str]:
        drives = list_drives(f"{tmp_path}/{logs}/*/*", str(output), may_take_over)
        return [drive.name for drive in drives]

    for day in ("24", "25"):
        (tmp_path / "logs" / day).mkdir(parents=True)
    video = write_video(tmp_path / "logs/24/front.mp4", moving_squares(4))
    probe_stage.fn(str(video), "front", f"{output}/front.zarr")
    begun = write_video(tmp_path / "logs/24/rear.mp4", moving_squares(4))
    hold_name(f"{output}/rear.zarr", str(begun))
    shutil.move(tmp_path / "logs", tmp_path / "archive")
    assert names("archive") == ["front", "rear"]
    shutil.copytree(tmp_path / "archive", tmp_path / "copy")  # dates of change included
    shutil.rmtree(tmp_path / "archive")
    write_video(tmp_path / "copy/24/front.mp4", moving_squares(6))
    assert names("copy") == ["24_front", "rear"]
    begun.parent.mkdir(parents=True)
    begun.write_bytes(b"not gone")
    assert names("copy") == ["24_front", "24_rear"]
    begun.unlink()
    hold_name(f"{output}/rear.zarr", f"{tmp_path}/copy/24/rear.mp4")
    begun.write_bytes(b"not gone")
    assert names("copy") == ["24_front", "rear"]


def test_a_record_that_cannot_be_read_stops_no_listing(tmp_path):
    output = tmp_path / "out"
    (tmp_path / "logs").mkdir()
    for name in ("front", "rear", "side"):
        video = write_video(tmp_path / f"logs/{name}.mp4", moving_squares(4))
        probe_stage.fn(str(video), name, f"{output}/{name}.zarr")
    shutil.move(tmp_path / "logs", tmp_path / "archive")
    (output / "front.zarr/commits/probe.json").unlink()
    (output / "front.zarr/commits/probe.json").symlink_to("/etc/hostname")
    ReconstructionStore.open(output / "rear.zarr").drop_commits("probe")
    drives = list_drives(f"{tmp_path}/archive/*", str(output), may_take_over)
    assert [drive.name for drive in drives] == ["archive_front", "archive_rear", "side"]


@pytest.mark.parametrize(
    "recorded",
    ["github://a", "reference://x", "dir://x", "simplecache::/gone", "http://[", 3, None],
)
def test_a_foreign_store_that_names_no_place_of_ours_stops_no_listing(tmp_path, recorded):
    output = tmp_path / "out"
    (tmp_path / "logs").mkdir()
    write_video(tmp_path / "logs/front.mp4", moving_squares(4))
    attributes = {} if recorded is None else {"location": recorded}
    ReconstructionStore.create(output / "front.zarr", attributes)
    (drive,) = list_drives(f"{tmp_path}/logs/*", str(output), may_take_over)
    is_held = isinstance(recorded, str)
    assert drive.name == ("logs_front" if is_held else "front")


def test_a_server_that_only_a_foreign_store_names_is_not_asked(tmp_path):
    output = tmp_path / "out"
    (tmp_path / "logs").mkdir()
    write_video(tmp_path / "logs/front.mp4", moving_squares(4))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        recorded = f"http://127.0.0.1:{server.getsockname()[1]}/front.mp4"
        ReconstructionStore.create(output / "front.zarr", {"location": recorded})
        (drive,) = list_drives(f"{tmp_path}/logs/*", str(output), may_take_over)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert drive.name == "logs_front"
