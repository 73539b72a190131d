"""Awkward recordings made here; each frame shows its own number, so a wrong one is seen."""

import os
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from numbered_video import RATE, X264, encode, number_in, picture
from PIL import Image

from storage import probe
from storage.drives import list_drives
from storage.errors import GivenUp
from storage.media import UnreadableVideo
from storage.probe import probe_drive, probe_video
from storage.records import FrameTable
from storage.scenes import SceneSeries, hard_cuts
from storage.video import read_frames

OPEN_GOP = {"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=2:open-gop=1"}
X265 = {"x265-params": "keyint=10:min-keyint=10:scenecut=0:log-level=none"}
LATE = {"x264-params": "keyint=60:bframes=16:b-adapt=0:b-pyramid=normal:ref=16:scenecut=0"}


def numbers_of(location: Path | str, *wanted: int) -> list[int]:
    record, table = probe_drive(str(location))
    return [number_in(f) for f in read_frames(record, table, *(wanted or (0, record.frames)))]


@pytest.mark.parametrize(
    ("name", "codec", "options", "backend"),
    [
        ("closed.mp4", "libx264", X264, "decord"),
        ("closed.mkv", "libx264", X264, "decord"),
        ("open.mp4", "libx264", OPEN_GOP, "pyav"),
        (
            "hevc_closed.mp4",
            "libx265",
            {"x265-params": X265["x265-params"] + ":open-gop=0"},
            "decord",
        ),
        ("hevc_open.mp4", "libx265", X265, "pyav"),
        ("stream.ts", "libx264", X264, "pyav"),
        ("bframes.avi", "mpeg4", {"bf": "2", "g": "10"}, "pyav"),
    ],
)
def test_every_range_shows_its_own_frames(tmp_path, name, codec, options, backend):
    encode(tmp_path / name, range(60), codec, options)
    record, table = probe_video(str(tmp_path / name))
    assert (record.frames, record.clips[0].backend) == (60, backend)
    assert record.clips[0].is_seekable
    assert record.fps == pytest.approx(25)
    for start, stop, step in [(0, 60, 1), (29, 31, 1), (37, 60, 1), (10, 12, 1), (3, 58, 7)]:
        found = [number_in(f) for f in read_frames(record, table, start, stop, step)]
        assert found == list(range(start, stop, step))


def test_frames_that_an_edit_list_hides_are_not_frames(tmp_path):
    # Time before 0 is hidden: the muxer writes an edit list that starts at 0.
    encode(tmp_path / "a.mp4", range(40), ticks=range(-7, 33))
    record, _ = probe_video(str(tmp_path / "a.mp4"))
    assert (record.frames, record.clips[0].backend) == (33, "pyav")
    assert any("edit list hides 7 frames" in problem for problem in record.problems)
    assert numbers_of(tmp_path / "a.mp4") == list(range(7, 40))
    assert numbers_of(tmp_path / "a.mp4", 20, 25) == [27, 28, 29, 30, 31]


def test_uneven_timestamps_are_kept(tmp_path):
    ticks = [0, 1, 2, 7, 8, 9, 20, 21, 22, 23]
    encode(tmp_path / "a.mkv", range(10), ticks=ticks)
    record, table = probe_video(str(tmp_path / "a.mkv"))
    np.testing.assert_allclose(table.timestamp, np.array(ticks) / 25, atol=1e-3)
    assert record.fps == pytest.approx(25)
    assert any("2 gaps" in problem for problem in record.problems)
    assert numbers_of(tmp_path / "a.mkv", 5, 8) == [5, 6, 7]


@pytest.mark.parametrize(
    ("matrix", "shown"),  # (a, b, c, d): right goes to (a, b), down to (c, d)
    [
        ((1, 0, 0, 1), lambda stored: stored),
        ((-1, 0, 0, 1), lambda stored: stored[:, ::-1]),
        ((1, 0, 0, -1), lambda stored: stored[::-1]),
        ((-1, 0, 0, -1), lambda stored: stored[::-1, ::-1]),
        ((0, 1, 1, 0), lambda stored: stored.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda stored: stored[::-1, ::-1].transpose(1, 0, 2)),
        ((0, 1, -1, 0), lambda stored: np.rot90(stored, -1)),
    ],
)
def test_pictures_are_turned_and_mirrored_as_the_header_says(tmp_path, matrix, shown):
    path = tmp_path / "a.mp4"
    encode(path, [1] * 12)
    whole = next(read_frames(*probe_video(str(path)), 0, 1))
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    start = data.index(b"tkhd") + 44
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    record, table = probe_video(str(path))
    expected = shown(whole)
    assert (record.height, record.width) == expected.shape[:2]
    for frame in read_frames(record, table, 5, 7):
        np.testing.assert_array_equal(frame, expected)


@pytest.mark.parametrize(
    ("scale", "gap_s", "options"),
    # A camera that waits for motion; and pictures shown long after they are decoded.
    [(90_000, 3600, X264), (10**9, 0, LATE)],
)
def test_timestamps_far_apart_leave_frames_in_order(tmp_path, scale, gap_s, options):
    path = tmp_path / "a.mp4"
    ticks = [i + gap_s * 25 * (i > 30) for i in range(60)]
    encode(
        path,
        range(60),
        "libx264",
        options,
        ticks,
        container_options={"video_track_timescale": f"{scale}"},
    )
    record, _ = probe_video(str(path))
    assert (record.clips[0].backend, record.clips[0].time_base) == ("decord", f"1/{scale}")
    assert numbers_of(path) == list(range(60))
    assert numbers_of(path, 33, 58, 4) == list(range(33, 58, 4))


def test_damage_in_the_middle_costs_only_what_it_hits(tmp_path):
    path = tmp_path / "a.mp4"
    encode(path, range(60))
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        hit = next(p for p in packets if p.pts // packets[1].duration == 23)
        place, size = hit.pos, hit.size
    data = bytearray(path.read_bytes())
    data[place : place + size] = b"\xff" * size
    path.write_bytes(data)
    record, table = probe_video(str(path))
    assert (record.clips[0].backend, record.clips[0].is_damaged) == ("pyav", True)
    lost = {u.index for u in record.unreadable}
    assert lost <= set(range(20, 30))
    assert lost | set(table.index.tolist()) == set(range(60))
    whole = [number_in(f) for f in read_frames(record, table, 0, record.frames)]
    outside = [row for row, index in enumerate(table.index) if not 20 <= index < 30]
    assert [whole[row] for row in outside] == [int(table.index[row]) for row in outside]
    for start, stop in [(15, 40), (22, 28), (45, 55)]:
        part = [number_in(f) for f in read_frames(record, table, start, stop)]
        assert part == whole[start:stop]


def test_cut_off_matroska_tells_when_its_pictures_end(tmp_path):
    encode(tmp_path / "a.mkv", range(200))
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
    record, _ = probe_video(str(tmp_path / "cut.mkv"))
    assert 60 < record.frames < 140
    assert any("promises 8.0 s, the pictures end" in problem for problem in record.problems)


def test_false_frame_count_in_the_header_is_not_believed(tmp_path):
    encode(tmp_path / "a.mp4", range(10), options={"x264-params": "bframes=0"})
    data = (tmp_path / "a.mp4").read_bytes()
    times = data.index(b"stts") + 8  # after it: number of entries, then count and duration
    assert int.from_bytes(data[times + 4 : times + 8], "big") == 10 - (data[times + 3] - 1)
    false = data[: times + 4] + (100_000).to_bytes(4, "big") + data[times + 8 :]
    (tmp_path / "a.mp4").write_bytes(false)
    record, table = probe_video(str(tmp_path / "a.mp4"))
    assert (record.frames, len(table)) == (10, 10)
    assert any("promises 100000 frames, 10 decode" in p for p in record.problems)
    assert len(record.unreadable) <= 1


def test_clips_of_a_folder_are_one_drive_in_natural_order(tmp_path):
    for name, numbers in [("cam2", range(20)), ("cam10", range(20, 35)), ("cam11", range(35, 50))]:
        encode(tmp_path / f"{name}.mp4", numbers)
    record, table = probe_drive(str(tmp_path))
    assert [Path(c.location).name for c in record.clips] == ["cam2.mp4", "cam10.mp4", "cam11.mp4"]
    assert record.frames == 50
    np.testing.assert_allclose(table.timestamp, np.arange(50) / 25, atol=1e-9)
    np.testing.assert_array_equal(table.clip, [0] * 20 + [1] * 15 + [2] * 15)
    np.testing.assert_array_equal(table.index, [*range(20), *range(15), *range(15)])
    assert numbers_of(tmp_path, 15, 40) == list(range(15, 40))
    assert numbers_of(tmp_path, 4, 50, 9) == list(range(4, 50, 9))


def test_broken_clip_of_a_drive_is_left_out_and_breaks_it(tmp_path):
    encode(tmp_path / "1.mp4", range(12))
    (tmp_path / "2.mp4").write_bytes(b"")
    encode(tmp_path / "3.mp4", range(12, 24))
    encode(tmp_path / "4.mp4", range(8), width=256)
    record, table = probe_drive(str(tmp_path))
    assert [clip.frames for clip in record.clips] == [12, 0, 12, 0]
    assert 12 in record.cuts
    reasons = {u.clip: u.reason for u in record.unreadable}
    assert "empty" in reasons[1]
    assert "256 x 64" in reasons[3]
    assert set(table.clip.tolist()) == {0, 2}
    assert numbers_of(tmp_path) == list(range(24))
    assert "2.mp4: the clip is left out" in record.problems[0]
    assert "times after it are too early" in record.problems[0]
    assert not any("times after" in problem for problem in record.problems[1:])
    with pytest.raises(ValueError, match=r"2\.mp4 holds frames that nobody can count"):
        table.numbers(record)


def test_clip_of_another_size_takes_its_time_and_its_numbers(tmp_path):
    encode(tmp_path / "0.mp4", range(4), width=256)
    encode(tmp_path / "1.mp4", range(12))
    encode(tmp_path / "2.mp4", range(10), width=256)
    encode(tmp_path / "3.mp4", range(12, 24))
    encode(tmp_path / "4.mp4", range(8), width=256)
    record, table = probe_drive(str(tmp_path))
    assert record.frames == 24
    expected = [*range(12), *range(22, 34)]  # of 25 a second, from the first that is used
    np.testing.assert_allclose(table.timestamp, np.array(expected) / 25, atol=1e-9)
    assert record.duration_s == pytest.approx(34 / 25)
    np.testing.assert_array_equal(table.numbers(record), np.array(expected) + 4)


def test_previews_beside_clips_are_no_clips(tmp_path):
    for clip in (1, 2):
        encode(tmp_path / f"GX0{clip}.MP4", range(12), width=256, container="mp4")
        encode(tmp_path / f"GL0{clip}.LRV", range(12), container="mp4")
    record, _ = probe_drive(str(tmp_path))
    assert [Path(clip.location).name for clip in record.clips] == ["GX01.MP4", "GX02.MP4"]
    assert (record.frames, record.width) == (24, 256)
    assert probe_drive(str(tmp_path / "GL01.LRV"))[0].width == 128


def test_of_two_sizes_with_equally_many_frames_the_larger_counts(tmp_path):
    encode(tmp_path / "1.mp4", range(12))
    encode(tmp_path / "2.mp4", range(12), width=256)
    record, _ = probe_drive(str(tmp_path))
    assert [clip.frames for clip in record.clips] == [0, 12]


@pytest.mark.parametrize("size", [2**62, 2**63, 2**64 - 1])
def test_clip_whose_header_leads_far_beyond_its_end_costs_that_clip(tmp_path, size):
    encode(tmp_path / "1.mp4", range(12))
    head = struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0)
    (tmp_path / "2.mp4").write_bytes(head + struct.pack(">I4sQ", 1, b"mdat", size) + bytes(64))
    encode(tmp_path / "3.mp4", range(12, 24))
    record, _ = probe_drive(str(tmp_path))
    assert [clip.frames for clip in record.clips] == [12, 0, 12]
    assert "moov" in record.clips[1].reason


def test_drive_of_broken_clips_only_is_unreadable(tmp_path):
    (tmp_path / "1.mp4").write_bytes(b"")
    (tmp_path / "2.mp4").write_bytes(b"no video")
    with pytest.raises(UnreadableVideo, match="no clip decodes"):
        probe_drive(str(tmp_path))


def test_single_odd_frame_is_no_cut_and_a_new_scene_is(tmp_path):
    same, other = picture(0b01010101), picture(0b11110000)
    for name, numbers in [
        ("glitch", [85] * 20 + [240] + [85] * 20),
        ("cut", [85] * 20 + [240] * 20),
    ]:
        encode(tmp_path / f"{name}.mp4", numbers)
    assert not np.array_equal(same, other)
    assert probe_video(str(tmp_path / "glitch.mp4"))[0].cuts == ()
    assert probe_video(str(tmp_path / "cut.mp4"))[0].cuts == (20,)


def test_avi_whose_frames_wait_for_later_ones_has_the_times_of_its_rate(tmp_path):
    encode(tmp_path / "b.avi", range(40))  # with B-frames; AVI has no timestamps of its own
    record, table = probe_video(str(tmp_path / "b.avi"))
    assert (record.frames, record.fps) == (40, RATE)
    np.testing.assert_allclose(table.timestamp, np.arange(40) / RATE)
    assert any("25 frames a second are assumed" in problem for problem in record.problems)
    shown = [number_in(frame) for frame in read_frames(record, table, 0, 40)]
    assert shown == list(range(40))


def cuts_of(change: list[float]) -> list[int]:
    """Hard cuts of frames that change so much; where it is much they do not look alike."""
    values = np.array([np.nan, *change], np.float32)
    correlation = np.where(values > 15, 0.3, 0.95).astype(np.float32)
    return hard_cuts(SceneSeries(values, correlation, 0 * correlation, values, values))


def test_repeated_frames_make_no_cuts_of_motion_and_hide_none():
    repeated = [20.0, *[0.0] * 5] * 20
    assert cuts_of(repeated) == []
    repeated[60] = 80.0
    assert cuts_of(repeated) == [61]


def test_camera_that_stands_still_between_fast_turns_hides_no_cut():
    assert cuts_of([40.0] * 10 + [0.4] * 6 + [60.0] + [0.4] * 6 + [40.0] * 10) == [17]


@pytest.mark.parametrize("frames", [2, 3])
def test_too_few_frames_to_compare_with_make_no_cut(tmp_path, frames):
    encode(tmp_path / "a.mp4", [85, 240, 85][:frames])
    assert probe_video(str(tmp_path / "a.mp4"))[0].cuts == ()


def test_very_many_cuts_take_little_time():
    frames = np.arange(200_000)
    is_cut = (frames % 5 == 0) & (frames > 0)
    change = np.where(is_cut, 60, 1).astype(np.float32)
    correlation = np.where(is_cut, 0.1, 0.95).astype(np.float32)
    began = time.process_time()
    cuts = hard_cuts(SceneSeries(change, correlation, correlation, change, change))
    assert time.process_time() - began < 10  # a search of them for each takes 27 s
    assert cuts == frames[is_cut].tolist()


def test_frozen_stretches_are_told(tmp_path):
    encode(tmp_path / "a.mp4", [*range(20), *[20] * 100, *range(20, 40)])
    record, _ = probe_video(str(tmp_path / "a.mp4"))
    assert any("does not change" in problem for problem in record.problems)


def assert_drive_reads_from(url: str, folder: Path) -> None:
    for name, numbers in [("1.mp4", range(20)), ("2.mkv", range(20, 35))]:
        encode(folder / name, numbers)
        with fsspec.open(f"{url}/trip/{name}", "wb") as file:
            file.write((folder / name).read_bytes())
    (drive,) = list_drives(url)
    record, table = probe_drive(drive.location)
    assert (drive.name, record.name, record.frames) == ("trip", "trip", 35)
    assert {clip.backend for clip in record.clips} == {"decord"}
    found = [number_in(f) for f in read_frames(record, table, 8, 31)]
    assert found == list(range(8, 31))


def test_drives_stream_from_memory_and_need_no_copy(tmp_path):
    assert_drive_reads_from(f"memory://{tmp_path.name}", tmp_path)


def test_drives_stream_from_local_folders_and_s3(output_url, tmp_path):
    if "://" not in output_url:
        Path(output_url, "trip").mkdir(parents=True)
    assert_drive_reads_from(output_url, tmp_path)


class GivenUpLater(threading.Event):
    """Set from when it was looked at so often."""

    looks = 5

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_reading_can_be_given_up_on_the_way_to_the_first_frame(tmp_path):
    encode(tmp_path / "a.mp4", range(40))
    record, table = probe_video(str(tmp_path / "a.mp4"))
    record = replace(record, clips=(replace(record.clips[0], is_seekable=False),))
    assert number_in(next(read_frames(record, table, 39, 40))) == 39
    with pytest.raises(GivenUp):
        next(read_frames(record, table, 39, 40, given_up=GivenUpLater()))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_pauses_between_frames_do_not_fill_memory(tmp_path):
    # All 500 frames are 1.4 GB of RGB: decord given the whole file decodes them while it waits.
    path = tmp_path / "a.mp4"
    encode(path, range(500), width=15360)
    record, table = probe_video(str(path))
    assert record.clips[0].backend == "decord"
    frames = read_frames(record, table, 0, record.frames)
    next(frames)
    before = resident_mib()
    time.sleep(3)
    assert resident_mib() - before < 250


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_file_that_changed_since_probing_is_refused(tmp_path):
    path = tmp_path / "a.mp4"
    encode(path, range(30))
    record, table = probe_video(str(path))
    encode(path, range(12))
    with pytest.raises(UnreadableVideo, match="probe it again"):
        list(read_frames(record, table, 5, 25))


def test_wrong_ranges_and_tables_are_refused(tmp_path):
    encode(tmp_path / "a.mp4", range(10))
    record, table = probe_video(str(tmp_path / "a.mp4"))
    for wrong in [(-1, 5), (0, 11), (6, 5), (0, 5, 0)]:
        with pytest.raises(ValueError, match="frames 0 to 10"):
            read_frames(record, table, *wrong)
    short = FrameTable.from_arrays({k: v[:5] for k, v in table.to_arrays().items()})
    with pytest.raises(ValueError, match="5 rows"):
        read_frames(record, short, 0, 5)
    assert list(read_frames(record, table, 4, 4)) == []


def test_frames_can_be_asked_for_in_another_size(tmp_path):
    encode(tmp_path / "a.mp4", range(3))
    frames = list(read_frames(*probe_video(str(tmp_path / "a.mp4")), 0, 3, size=(32, 16)))
    assert [frame.shape for frame in frames] == [(16, 32, 3)] * 3


def test_missing_and_pictureless_locations_say_what_to_do(tmp_path):
    with pytest.raises(UnreadableVideo, match="no such file or folder; check the path"):
        probe_drive(str(tmp_path / "none.mp4"))
    with av.open(str(tmp_path / "sound.mp4"), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(UnreadableVideo, match="no video track; the file holds audio only"):
        probe_video(str(tmp_path / "sound.mp4"))
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/hostname\n")
    with pytest.raises(UnreadableVideo, match="not a video"):
        probe_video(str(tmp_path / "list.mp4"))


def test_progress_ends_with_the_number_of_frames(tmp_path):
    encode(tmp_path / "1.mp4", range(60))
    encode(tmp_path / "2.mp4", range(60, 80))
    seen: list[int] = []
    probe_drive(str(tmp_path), seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 80


def test_drive_of_more_frames_than_a_store_holds_is_decoded_no_further(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "MOST_FRAMES", 60)
    for name in ("1.mp4", "2.mp4", "3.mp4"):
        encode(tmp_path / name, range(40))
    seen: list[int] = []
    with pytest.raises(UnreadableVideo, match=r"2.mp4: with it the drive has 80 frames .* 60 "):
        probe_drive(str(tmp_path), seen.append)
    assert max(seen) == 40
    encode(tmp_path / "1.mp4", range(130))
    with pytest.raises(UnreadableVideo, match=r"1.mp4: with it the drive has 100 frames"):
        probe_video(str(tmp_path / "1.mp4"))


def test_folder_of_more_images_than_a_store_holds_frames_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "MOST_FRAMES", 2)
    for number in range(3):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.png")
    with pytest.raises(UnreadableVideo, match=r"has 3 frames or more, and at most 2"):
        probe_drive(str(tmp_path))


def test_images_are_read_upright_in_natural_order(tmp_path):
    for number in (2, 10, 1):
        Image.fromarray(picture(number)).save(tmp_path / f"frame{number}.png")
    turned = Image.fromarray(picture(11)).rotate(90, expand=True)  # anticlockwise
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    turned.save(tmp_path / "frame11.png", exif=exif)
    assert numbers_of(tmp_path) == [1, 2, 10, 11]


def test_images_that_cannot_be_used_are_listed(tmp_path):
    for number in range(6):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.jpg")
    (tmp_path / "2.jpg").write_bytes((tmp_path / "2.jpg").read_bytes()[:-300])
    Image.fromarray(picture(4, width=256)).save(tmp_path / "4.jpg")
    record, table = probe_drive(str(tmp_path))
    damaged, larger = record.unreadable
    assert (damaged.index, larger.index) == (2, 4)
    assert "truncated" in damaged.reason.lower()
    assert larger.reason.startswith("its size is 256 x 64 instead of 128 x 64 pixels")
    assert list(table.index) == [0, 1, 3, 5]
    np.testing.assert_allclose(table.timestamp, [0, 0.1, 0.3, 0.5])
    assert record.duration_s == pytest.approx(0.6)
    assert list(table.numbers(record)) == [0, 1, 3, 5]
    assert numbers_of(tmp_path, 1, 4) == [1, 3, 5]
    (tmp_path / "6.jpg").write_bytes((tmp_path / "5.jpg").read_bytes())
    with pytest.raises(UnreadableVideo, match="holds 7 images, 6 when it was probed"):
        list(read_frames(record, table, 0, 4))


def test_image_of_another_size_than_when_probed_is_refused(tmp_path):
    for number in range(4):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.png")
    record, table = probe_drive(str(tmp_path))
    frames = read_frames(record, table, 0, 4)
    assert number_in(next(frames)) == 0
    Image.fromarray(picture(2, width=256)).save(tmp_path / "2.png")
    assert number_in(next(frames)) == 1
    with pytest.raises(UnreadableVideo, match=r"2.png: its size is 256 x 64 .*128 x 64 when"):
        next(frames)


def test_images_replaced_by_as_many_others_are_noticed(tmp_path):
    for number in range(4):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.png")
    record, table = probe_drive(str(tmp_path))
    assert len(list(read_frames(record, table, 0, 4))) == 4
    (tmp_path / "0.png").unlink()
    Image.fromarray(picture(85)).save(tmp_path / "9.png", compress_level=0)
    with pytest.raises(UnreadableVideo, match=r"bytes, \d+ when it was probed; probe it again"):
        list(read_frames(record, table, 0, 4))


def test_folder_of_images_is_not_listed_for_every_read(tmp_path, monkeypatch):
    for number in range(8):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.png")
    record, table = probe_drive(str(tmp_path))
    list(read_frames(record, table, 0, 1))
    listings: list[str] = []

    def listed(_: LocalFileSystem, path: str, **options: object) -> None:
        listings.append(path)

    monkeypatch.setattr(LocalFileSystem, "ls", listed)
    assert [number_in(next(read_frames(record, table, i, i + 1))) for i in range(8)] == [*range(8)]
    assert listings == []


def test_of_very_many_images_that_cannot_be_used_the_last_stands_for_the_rest(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(probe, "MOST_UNREADABLE", 2)
    for number in range(9):
        width = 256 if number in (1, 3, 5, 7) else 320
        Image.fromarray(picture(number, width=width)).save(tmp_path / f"{number}.png")
    record, table = probe_drive(str(tmp_path))
    assert [(u.index, u.count) for u in record.unreadable] == [(1, 1), (3, 1), (5, 2)]
    assert "more follow" in record.unreadable[-1].reason
    assert list(table.index) == [0, 2, 4, 6, 8]
    assert numbers_of(tmp_path, 1, 4) == [2, 4, 6]
