"""A disk or server that holds recordings and goes away is no fault of the recordings."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import fsspec
import numpy as np
import pytest
from botocore.exceptions import ClientError
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from recordings import moving_squares, write_video
from seaweed import SeaweedProcess, free_ports
from web import WebServer, running_web

from storage.drives import list_drives
from storage.errors import StoreRefused, StoreUnavailable
from storage.glance import glance_at
from storage.media import UnreadableVideo
from storage.probe import probe_drive
from storage.video import read_frames
from tasks.probe import fingerprint
from tasks.summary import list_stores


class FailingFileSystem(MemoryFileSystem):
    """Files in memory on a disk that may fail."""

    protocol = "failing"
    store, pseudo_dirs, failure = {}, [""], None

    def info(self, path, **options):
        """As its parent, unless the disk fails."""
        if self.failure:
            raise self.failure
        return super().info(path, **options)


fsspec.register_implementation("failing", FailingFileSystem, clobber=True)


def upload(folder: Path, url: str) -> str:
    fs, path = fsspec.core.url_to_fs(url)
    for file in sorted(folder.iterdir()):
        fs.pipe_file(f"{path}/{file.name}", file.read_bytes())
    return url


def make_clips(folder: Path) -> None:
    for name in ("1.mp4", "2.mp4"):
        write_video(folder / name, moving_squares(8))


def make_images(folder: Path) -> None:
    for number, frame in enumerate(moving_squares(4)):
        Image.fromarray(frame).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def large_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise: more than is read ahead of a remote file."""
    noise = np.random.default_rng(0).integers(0, 256, (56, 320, 320, 3), np.uint8)
    path = write_video(tmp_path_factory.mktemp("large") / "1.mp4", list(noise))
    assert path.stat().st_size > 9 * 2**20
    return path


@pytest.fixture
def trip(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of what the test's parameter names."""
    folder = tmp_path / "trip"
    folder.mkdir()
    if request.param == "large clip":
        shutil.copy(request.getfixturevalue("large_clip"), folder)
    else:
        {"clips": make_clips, "images": make_images}[request.param](folder)
    return folder


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    """A web server that holds two clips."""
    make_clips(tmp_path)
    with running_web(tmp_path) as server:
        yield server


@pytest.mark.parametrize("trip", ["clips", "images", "large clip"], indirect=True)
def test_server_that_dies_between_frames_is_one_line(trip, mortal_seaweed: SeaweedProcess):
    url = upload(trip, f"{mortal_seaweed.access.url}/trip")
    record, table = probe_drive(url)
    frames = read_frames(record, table, 0, record.frames)
    next(frames)
    mortal_seaweed.kill()
    with pytest.raises(StoreUnavailable, match=rf"^{url}.*: the server does not answer; check "):
        list(frames)


def test_server_that_dies_while_probing_costs_no_clip(tmp_path, mortal_seaweed: SeaweedProcess):
    (tmp_path / "trip").mkdir()
    make_clips(tmp_path / "trip")
    url = upload(tmp_path / "trip", f"{mortal_seaweed.access.url}/trip")
    with pytest.raises(StoreUnavailable, match=rf"^{url}: the server does not answer; check "):
        probe_drive(url, progress=lambda frames: mortal_seaweed.kill())


@pytest.mark.parametrize("read", [list_drives, probe_drive, glance_at, fingerprint, list_stores])
@pytest.mark.parametrize("path", ["", "/trip", "/trip/1.mp4"])
def test_server_that_is_away_is_no_empty_place(monkeypatch, read, path):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    options = {"key": "k", "secret": "s", "skip_instance_cache": True}
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    conf = {"s3": {**options, "client_kwargs": {"endpoint_url": endpoint}}}
    monkeypatch.setattr(fsspec.config, "conf", conf)
    with pytest.raises(StoreUnavailable, match=rf"^s3://away{path}: the server does not answer"):
        read(f"s3://away{path}")


@pytest.mark.parametrize(
    "failure", [OSError(errno.EIO, "Input/output error"), ConnectionResetError("reset")]
)
def test_disk_that_fails_is_one_line(tmp_path, monkeypatch, failure):
    (tmp_path / "trip").mkdir()
    make_clips(tmp_path / "trip")
    url = upload(tmp_path / "trip", "failing://trip")
    record, table = probe_drive(url)
    monkeypatch.setattr(FailingFileSystem, "failure", failure)
    with pytest.raises(StoreUnavailable, match=r"^failing://.*trip/1.mp4: cannot be used"):
        next(read_frames(record, table, 0, 8))
    with pytest.raises(StoreUnavailable, match=r"^failing://trip: cannot be used"):
        probe_drive(url)


def refused(code: str) -> PermissionError:
    """A refusal as s3fs raises it."""
    error = PermissionError("refused")
    error.__cause__ = ClientError({"Error": {"Code": code, "Message": ""}}, "GetObject")
    return error


@pytest.mark.parametrize(
    ("code", "said", "is_final"),
    [
        ("ExpiredToken", "the credentials have expired; renew them", False),
        ("RequestTimeTooSkewed", "this machine's clock differs from the server's", True),
        ("AccessDenied", "access denied", True),
    ],
)
def test_each_refusal_says_what_to_do(monkeypatch, code, said, is_final):
    monkeypatch.setattr(FailingFileSystem, "failure", refused(code))
    with pytest.raises(StoreUnavailable, match=rf"^failing://trip: {said}") as told:
        probe_drive("failing://trip")
    assert isinstance(told.value, StoreRefused) == is_final


@pytest.mark.parametrize(
    ("code", "ends"),
    [("ExpiredToken", True), ("RequestTimeTooSkewed", True), ("AccessDenied", False)],
)
def test_only_a_folder_of_others_is_passed_over(tmp_path, monkeypatch, code, ends):
    make_clips(tmp_path)
    upload(tmp_path, "failing://drives/mine")
    upload(tmp_path, "failing://drives/theirs")
    listed = FailingFileSystem.ls

    def ls(self, path, *arguments, **options):
        if path.rstrip("/").endswith("theirs"):
            raise refused(code)
        return listed(self, path, *arguments, **options)

    monkeypatch.setattr(FailingFileSystem, "ls", ls)
    with pytest.raises(StoreUnavailable) if ends else nullcontext():
        assert [drive.name for drive in list_drives("failing://drives")] == ["mine"]


def test_clip_that_is_gone_is_still_the_clips_own_fault(tmp_path):
    (tmp_path / "trip").mkdir()
    make_clips(tmp_path / "trip")
    record, table = probe_drive(str(tmp_path / "trip"))
    (tmp_path / "trip/1.mp4").unlink()
    with pytest.raises(UnreadableVideo, match="there is no such file"):
        next(read_frames(record, table, 0, 8))
    assert len(list(read_frames(record, table, 8, 16))) == 8


@pytest.mark.parametrize("status", [429, 500, 503, 401, 403])
def test_web_server_in_trouble_is_no_missing_file(web: WebServer, status):
    url = f"{web.url}/1.mp4"
    record, table = probe_drive(url)
    web.fail_after(0, status)
    for read in (lambda _: next(read_frames(record, table, 0, 8)), list_drives, probe_drive):
        with pytest.raises(StoreUnavailable, match=rf"^{url}: .*HTTP status {status}") as told:
            read(url)
        assert isinstance(told.value, StoreRefused) == (status in (401, 403))


def test_web_server_that_fails_between_frames_is_unavailable(web: WebServer, large_clip: Path):
    shutil.copy(large_clip, web.folder)
    url = f"{web.url}/1.mp4"
    record, table = probe_drive(url)
    frames = read_frames(record, table, 0, record.frames)
    next(frames)
    web.fail_after(0, 503)
    with pytest.raises(StoreUnavailable, match=rf"^{url}: .*HTTP status 503"):
        list(frames)


@pytest.mark.parametrize("read", [list_drives, probe_drive, glance_at, fingerprint])
def test_web_server_that_fails_at_any_request_is_unavailable(web: WebServer, read):
    url, before = f"{web.url}/1.mp4", web.requests
    expected = read(url)
    for count in range(web.requests - before):
        web.fail_after(count, 503)
        with pytest.raises(StoreUnavailable, match=rf"^{url}: .*HTTP status 503"):
            read(url)
    web.fail_after(1000, 503)
    assert str(read(url)) == str(expected)


@pytest.mark.parametrize("status", [404, 410])
def test_file_that_a_web_server_has_not_is_a_missing_one(web: WebServer, status):
    url = f"{web.url}/1.mp4"
    record, table = probe_drive(url)
    web.fail_after(0, status)
    for read in (probe_drive, lambda url: next(read_frames(record, table, 0, 8))):
        with pytest.raises(UnreadableVideo, match="there is no such file"):
            read(url)
    with pytest.raises(ValueError, match="no drive is found"):
        list_drives(url)
