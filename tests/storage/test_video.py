"""Probing and reading the real recordings beside the project; counts are FFmpeg's."""

import functools
import random
from pathlib import Path
from zlib import crc32

import av
import numpy as np
import pytest

from storage.media import UnreadableVideo
from storage.probe import probe_drive, probe_video
from storage.records import DriveRecord, FrameTable
from storage.video import read_frames

# name: frames that decode, width and height after rotation, degrees clockwise, decoder
ODDBALL = {
    "av1_video.mkv": (125, 640, 360, 0, "pyav"),
    "corrupted.mp4": (49, 1280, 720, 0, "pyav"),
    "derived_1_frame.mp4": (1, 848, 480, 0, "decord"),
    "derived_2_frames.mp4": (2, 848, 480, 0, "decord"),
    "derived_gray8.mp4": (90, 640, 480, 0, "decord"),
    "derived_interlaced.mp4": (45, 848, 480, 0, "pyav"),
    "derived_mjpeg.avi": (60, 848, 480, 0, "decord"),
    "derived_truncated_fragmented.mp4": (50, 848, 480, 0, "pyav"),
    "derived_vfr_dropped.mp4": (60, 848, 480, 0, "decord"),
    "h264_10bits.mp4": (30, 200, 200, 0, "pyav"),
    "h265_video.mp4": (10, 128, 128, 0, "pyav"),
    "lady-running.mp4": (65, 854, 480, 0, "decord"),
    "max-heromode.mp4": (315, 848, 480, 0, "decord"),
    "nasa_13013.mp4": (325, 320, 180, 0, "decord"),
    "nasa_13013_rotated.mp4": (17, 270, 480, 270, "pyav"),
    "realshort.mp4": (36, 320, 240, 0, "decord"),
    "test_non_zero_start.mp4": (12, 200, 112, 0, "decord"),
    "testsrc2_odd_height_and_width_vp9.mp4": (25, 321, 241, 0, "pyav"),
    "testsrc2_vp8.webm": (30, 1280, 720, 0, "pyav"),
    "unordered.mov": (4, 50, 50, 0, "decord"),
    "video_0.mov": (3, 568, 320, 0, "decord"),
    "video_180.mov": (3, 568, 320, 180, "pyav"),
    "video_270.mov": (3, 320, 568, 270, "pyav"),
    "video_90.mov": (3, 320, 568, 90, "pyav"),
}
UNREADABLE = {
    "derived_empty.mp4": "empty",
    "derived_not_a_video.mp4": "not a video",
    "derived_truncated_mid.mp4": "moov",
}
# name: frames, width, height, rate, frames that start a new scene
DRIVES = {
    "drive_20240312_081530": (221, 960, 540, 25.0, ()),
    "drive_20240313_090011": (255, 848, 464, 30.0, ()),
    "drive_20240313_120730": (588, 854, 480, 30.0, (363, 434)),
    "drive_20240314_063355": (296, 640, 360, 24000 / 1001, ()),
    "drive_20240315_101010": (150, 1242, 374, 10.0, ()),
    "drive_20240315_235912": (165, 640, 360, 24000 / 1001, ()),
}


@functools.cache
def probed(location: Path) -> tuple[DriveRecord, FrameTable]:
    return probe_drive(str(location))


def digests(record: DriveRecord, table: FrameTable, *wanted: int) -> list[int]:
    return [crc32(frame.tobytes()) for frame in read_frames(record, table, *wanted)]


def first_frame(location: Path) -> np.ndarray:
    return next(read_frames(*probed(location), 0, 1))


def has_problem(record: DriveRecord, *words: str) -> bool:
    return any(all(word in problem for word in words) for problem in record.problems)


def assert_ranges_are_slices(location: Path, ranges: int) -> None:
    record, table = probed(location)
    whole = digests(record, table, 0, record.frames)
    assert len(whole) == record.frames
    choose = random.Random(record.frames)
    for _ in range(ranges):
        start = choose.randrange(record.frames)
        stop, step = min(record.frames, start + choose.randrange(1, 30)), choose.choice([1, 1, 3])
        assert digests(record, table, start, stop, step) == whole[start:stop:step]


def test_samples_are_all_listed_here(shared_data):
    found = {path.name for path in (shared_data / "oddball").iterdir()}
    assert found == {*ODDBALL, *UNREADABLE}


@pytest.mark.parametrize("name", ODDBALL)
def test_probe_finds_what_decodes(shared_data, name):
    frames, width, height, rotation, backend = ODDBALL[name]
    record, table = probed(shared_data / "oddball" / name)
    assert (record.frames, record.width, record.height) == (frames, width, height)
    assert (record.rotation, record.clips[0].backend) == (rotation, backend)
    assert record.clips[0].reason
    assert len(table) == frames
    assert table.timestamp[0] == 0
    assert np.all(np.diff(table.timestamp) > 0)


@pytest.mark.parametrize("name", ODDBALL)
def test_read_frames_gives_slices_of_the_whole(shared_data, name):
    assert_ranges_are_slices(shared_data / "oddball" / name, ranges=2)
    frame = first_frame(shared_data / "oddball" / name)
    assert frame.shape == (ODDBALL[name][2], ODDBALL[name][1], 3)
    assert frame.dtype == np.uint8


@pytest.mark.parametrize("name", UNREADABLE)
def test_probe_says_why_a_file_is_unreadable(shared_data, name):
    with pytest.raises(UnreadableVideo, match=UNREADABLE[name]) as error:
        probe_video(str(shared_data / "oddball" / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", DRIVES)
def test_probe_finds_frames_rate_and_cuts_of_drives(shared_data, name):
    frames, width, height, rate, cuts = DRIVES[name]
    record, _ = probed(shared_data / "drives" / name)
    assert (record.name, record.frames, record.width, record.height) == (
        name,
        frames,
        width,
        height,
    )
    assert record.fps == pytest.approx(rate, rel=1e-4)
    assert record.duration_s == pytest.approx(frames / rate, rel=1e-3)
    assert record.cuts == cuts
    assert DriveRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize("name", ["drive_20240314_063355", "drive_20240315_235912"])
def test_read_frames_gives_slices_of_drives(shared_data, name):
    assert_ranges_are_slices(shared_data / "drives" / name, ranges=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("drives/drive_20240312_174205/front.mp4", 1231),
        ("kitti03_head/video.mp4", 500),
        ("sevenscenes_1000/video.mp4", 1000),
    ],
)
def test_long_recordings_have_no_cuts_and_exact_ranges(shared_data, name, frames):
    record, _ = probed(shared_data / name)
    assert (record.frames, record.cuts, record.problems) == (frames, (), ())
    assert_ranges_are_slices(shared_data / name, ranges=6)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRIVES)
def test_read_frames_gives_slices_of_every_drive(shared_data, name):
    assert_ranges_are_slices(shared_data / "drives" / name, ranges=6)


def test_probe_tells_where_a_file_is_cut_off(shared_data):
    record, _ = probed(shared_data / "drives" / "drive_20240315_235912")
    assert has_problem(record, "promises 296 frames, 165 decode", "cut off after 6.9 s")
    (lost,) = record.unreadable
    assert (lost.index, lost.count) == (165, 131)


def test_probe_lists_the_frame_that_does_not_decode(shared_data):
    record, table = probed(shared_data / "oddball" / "corrupted.mp4")
    (lost,) = record.unreadable
    assert (lost.index, lost.count) == (30, 1)
    assert list(table.index) == [i for i in range(50) if i != 30]
    assert has_problem(record, "50 frames, 49 decode")


def test_probe_keeps_the_gaps_of_a_variable_frame_rate(shared_data):
    record, table = probed(shared_data / "oddball" / "derived_vfr_dropped.mp4")
    frames = [i for i in range(90) if not 10 <= i % 30 < 20]
    np.testing.assert_allclose(table.timestamp, np.array(frames) * 1001 / 30000, atol=1e-9)
    assert has_problem(record, "variable frame rate", "33 to 367 ms")
    assert has_problem(record, "3 gaps")


def test_probe_counts_time_from_the_first_frame(shared_data):
    record, table = probed(shared_data / "oddball" / "test_non_zero_start.mp4")
    np.testing.assert_allclose(table.timestamp, np.arange(12) / 30, atol=1e-9)
    assert has_problem(record, "first timestamp is 8.33 s")


def test_probe_tells_of_interlacing_and_of_several_tracks(shared_data):
    assert has_problem(probed(shared_data / "oddball" / "derived_interlaced.mp4")[0], "interlaced")
    assert has_problem(probed(shared_data / "oddball" / "nasa_13013.mp4")[0], "2 video tracks")


def test_rotated_frames_are_turned_clockwise_by_the_flag(shared_data):
    location = shared_data / "oddball" / "video_90.mov"
    with av.open(str(location)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    clockwise = stored.transpose(1, 0, 2)[:, ::-1]  # the stored top row becomes the right column
    np.testing.assert_array_equal(first_frame(location), clockwise)


@pytest.mark.parametrize(
    "name",
    ["max-heromode.mp4", "lady-running.mp4", "derived_mjpeg.avi", "nasa_13013.mp4"],
)
def test_decord_gives_the_pictures_of_pyav(shared_data, name):
    location = shared_data / "oddball" / name
    record, table = probed(location)
    assert record.clips[0].backend == "decord"
    with av.open(str(location)) as container:
        plain = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
        for ours, theirs in zip(read_frames(record, table, 0, 60), plain, strict=False):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("folder", "frames", "width", "height"),
    [("fox_portrait/images", 50, 540, 960), ("kitti06_start/frames", 51, 1226, 370)],
)
def test_image_folders_are_drives_at_an_assumed_rate(shared_data, folder, frames, width, height):
    record, table = probed(shared_data / folder)
    assert (record.frames, record.width, record.height) == (frames, width, height)
    assert (record.fps, record.cuts, record.clips[0].backend) == (10.0, (), "images")
    assert has_problem(record, "10 frames a second are assumed")
    np.testing.assert_allclose(table.timestamp, np.arange(frames) / 10)
    last = list(read_frames(record, table, frames - 2, frames))
    assert [frame.shape for frame in last] == [(height, width, 3)] * 2
