"""A disk that is full: one line, nothing committed is lost, and work goes on once there is room."""

import os
import subprocess
import sys

import pytest
from recordings import moving_squares, write_video
from small_segment import SEGMENT, SHAPE, chunk_arrays

from storage import upkeep
from storage.errors import StoreRefused, StoreUnavailable
from storage.reconstruction import ReconstructionStore


def test_full_disk_costs_no_committed_chunk(small_disk):
    store = ReconstructionStore.create(small_disk.path / "drive.zarr", {})
    store.create_segment(SEGMENT, 8, **SHAPE)
    first, second, *_ = SEGMENT.chunks(8)
    store.write_chunk(SEGMENT, first, chunk_arrays(first, 1.0))
    store.commit_chunk(SEGMENT, first, {"key": "k"})
    room = os.statvfs(small_disk.path)
    (small_disk.path / "other").write_bytes(bytes(room.f_bavail * room.f_frsize))
    for write in (
        lambda: store.write_chunk(SEGMENT, second, chunk_arrays(second, 2.0)),
        lambda: store.commit("plan", {"key": "k"}),
        lambda: store.put_file("report/report.html", b"x" * 100_000),
    ):
        with pytest.raises(StoreUnavailable, match="no space is left; make room and run again"):
            write()
    assert not store.is_chunk_done(SEGMENT, second, "k")
    assert store.is_chunk_done(SEGMENT, first, "k")
    assert upkeep.verify(store) == []
    (small_disk.path / "other").unlink()
    store.write_chunk(SEGMENT, second, chunk_arrays(second, 2.0))
    store.commit_chunk(SEGMENT, second, {"key": "k"})
    assert store.read(SEGMENT, "cam_to_seg", 0, 16).mean() == 1.5
    assert upkeep.verify(store) == []


@pytest.mark.slow
def test_run_on_a_full_disk_ends_in_one_line_and_goes_on_once_there_is_room(small_disk, tmp_path):
    video = write_video(tmp_path / "squares.mp4", moving_squares(120))
    url = small_disk.path / "squares.zarr"
    arguments = ["--weights", "untrained", "--segment-frames", "24", "--chunk-frames", "4"]
    command = [sys.executable, "-m", "flows.cli", "reconstruct", str(video), "--output"]
    environment = {**os.environ, "PREFECT_TASKS_DEFAULT_RETRY_DELAY_SECONDS": "[0.1, 0.1, 0.1]"}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, str(small_disk.path), *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )

    small_disk.resize(3)
    full = run()
    assert full.returncode == 1, full.stderr
    lines = [line for line in full.stderr.splitlines() if line.startswith("ttt3r:")]
    assert lines == [
        f"ttt3r: {url}: no space is left; make room and run again, what is finished is kept"
    ]
    assert "Traceback" not in full.stderr
    kept = ReconstructionStore.open(url).commits("infer")
    assert kept
    assert upkeep.verify(ReconstructionStore.open(url)) == []
    small_disk.resize(100)
    assert run().returncode == 0
    store = ReconstructionStore.open(url)
    assert {name: store.read_commit(name) for name in kept} == kept
    assert store.commit_names("aside") == []


def test_output_that_may_not_be_written_is_refused(tmp_path, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk.path)], check=True)
    with pytest.raises((StoreUnavailable, StoreRefused), match="Read-only file system"):
        ReconstructionStore.create(small_disk.path / "drive.zarr", {})
