import shutil

import pytest
from recordings import moving_squares, write_video

from storage.reconstruction import ReconstructionStore
from storage.records import DriveRecord, FrameTable
from storage.video import read_frames
from tasks.probe import probe_stage


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
