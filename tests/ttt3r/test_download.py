"""Downloads from a real server on loopback: broken connections, resumption, changed files."""

import contextlib
import dataclasses
import errno
import http.server
import re
import shutil
import threading
from collections.abc import Iterator

import pytest

from ttt3r.download import DownloadFailed, Retry, download, locked, without_secrets

QUICK = Retry(attempts=3, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=5)
BODY = bytes(range(256)) * 16384  # 4 MiB


@dataclasses.dataclass
class Site:
    """What the server holds and how badly it behaves."""

    body: bytes = BODY
    etag: str | None = '"v1"'
    honours_range: bool = True
    honours_if_range: bool = True
    announces_length: bool = True
    status: int = 200  # of failing answers
    failures: int = 0  # requests that get `status` before one is served
    drops_after: list[int] = dataclasses.field(default_factory=list)  # bytes, one per request
    ranges: list[str | None] = dataclasses.field(default_factory=list)  # as asked, in order
    port: int = 0

    def url(self, name: str = "file.bin") -> str:
        return f"http://127.0.0.1:{self.port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        site = self.site
        asked = self.headers.get("Range")
        site.ranges.append(asked)
        if site.failures:
            site.failures -= 1
            self.send_response(site.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        condition = self.headers.get("If-Range")
        if site.honours_if_range and condition not in (None, site.etag):
            start = 0
        if start >= len(site.body):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.serve(start if site.honours_range else 0)

    def serve(self, start: int) -> None:
        site = self.site
        self.send_response(206 if start else 200)
        if start:
            last = len(site.body) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(site.body)}")
        if site.announces_length:
            self.send_header("Content-Length", str(len(site.body) - start))
        if site.etag:
            self.send_header("ETag", site.etag)
        self.end_headers()
        stop = len(site.body)
        if site.drops_after:
            stop = min(stop, start + site.drops_after.pop(0))
        with contextlib.suppress(ConnectionError):
            self.wfile.write(site.body[start:stop])
        self.close_connection = True

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    handler = type("SiteHandler", (Handler,), {"site": site})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        site.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield site
        server.shutdown()
        thread.join()


def test_download_gets_the_file_and_reports_progress(site, tmp_path):
    seen = []
    path = download(
        site.url(), tmp_path / "sub" / "file", progress=lambda *step: seen.append(step), retry=QUICK
    )
    assert path.read_bytes() == BODY
    assert seen[-1] == (len(BODY), len(BODY))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_download_does_nothing_if_the_file_is_there(site, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    assert download(site.url(), tmp_path / "file", retry=QUICK).read_bytes() == b"mine"
    assert site.ranges == []


def test_download_continues_where_the_connection_broke(site, tmp_path):
    site.drops_after = [1_000_000, 2_000_000]
    download(site.url(), tmp_path / "file", retry=QUICK)
    assert (tmp_path / "file").read_bytes() == BODY
    assert site.ranges == [None, "bytes=1000000-", "bytes=3000000-"]


def test_download_outlasts_more_breaks_than_attempts_while_it_gets_further(site, tmp_path):
    site.drops_after = [300_000] * 10
    download(site.url(), tmp_path / "file", retry=QUICK)
    assert (tmp_path / "file").read_bytes() == BODY
    assert len(site.ranges) == 11


def test_download_continues_in_another_process(site, tmp_path):
    site.drops_after = [1_000_000, 0, 0, 0]
    with pytest.raises(DownloadFailed, match="1000000 bytes are kept"):
        download(site.url(), tmp_path / "file", retry=QUICK)
    site.drops_after, site.ranges[:] = [], []
    download(site.url(), tmp_path / "file", retry=QUICK)
    assert (tmp_path / "file").read_bytes() == BODY
    assert site.ranges == ["bytes=1000000-"]


def test_download_starts_again_where_the_server_ignores_range(site, tmp_path):
    site.honours_range = False
    site.drops_after = [1_000_000]
    download(site.url(), tmp_path / "file", retry=QUICK)
    assert (tmp_path / "file").read_bytes() == BODY
    assert site.ranges == [None, "bytes=1000000-"]


def test_download_gives_up_on_a_server_that_never_gets_further(site, tmp_path):
    site.honours_range = False
    site.drops_after = [1_000_000] * 9
    with pytest.raises(DownloadFailed, match="ended after 1000000 of 4194304"):
        download(site.url(), tmp_path / "file", retry=QUICK)
    assert len(site.ranges) == QUICK.attempts
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("honours_if_range", [True, False])
@pytest.mark.parametrize("size", [len(BODY), 2_500_000, 500_000])
def test_download_never_joins_two_versions(site, tmp_path, honours_if_range, size):
    site.honours_if_range = honours_if_range
    site.drops_after = [1_000_000, 0, 0]
    with pytest.raises(DownloadFailed):
        download(site.url(), tmp_path / "file", retry=QUICK)
    site.body, site.etag = BODY[::-1][:size], '"v2"'
    download(site.url(), tmp_path / "file", retry=QUICK)
    assert (tmp_path / "file").read_bytes() == site.body


@pytest.mark.parametrize("etag", [None, 'W/"v1"'])
def test_download_does_not_resume_what_it_cannot_recognise(site, tmp_path, etag):
    site.etag = etag
    site.drops_after = [1_000_000]
    download(site.url(), tmp_path / "file", retry=QUICK)
    assert (tmp_path / "file").read_bytes() == BODY
    assert site.ranges == [None, None]


def test_download_does_not_resume_a_partial_file_of_unknown_origin(site, tmp_path):
    (tmp_path / "file.partial").write_bytes(b"x" * 1000)
    download(site.url(), tmp_path / "file", retry=QUICK)
    assert (tmp_path / "file").read_bytes() == BODY
    assert site.ranges == [None]


def test_download_finishes_a_partial_file_that_is_whole(site, tmp_path):
    site.drops_after = [len(BODY) - 1, 0, 0]
    with pytest.raises(DownloadFailed):
        download(site.url(), tmp_path / "file", retry=QUICK)
    with (tmp_path / "file.partial").open("ab") as file:
        file.write(BODY[-1:])  # as if killed between the last byte and the rename
    site.ranges.clear()
    download(site.url(), tmp_path / "file", retry=QUICK)
    assert (tmp_path / "file").read_bytes() == BODY
    assert site.ranges == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_download_tries_again_when_the_server_is_busy(site, tmp_path, status):
    site.status, site.failures = status, 2
    download(site.url(), tmp_path / "file", retry=QUICK)
    assert (tmp_path / "file").read_bytes() == BODY


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_download_does_not_insist_on_what_is_not_there(site, tmp_path, status):
    site.status, site.failures = status, 9
    with pytest.raises(DownloadFailed, match=f"HTTP status {status}"):
        download(site.url(), tmp_path / "file", retry=QUICK)
    assert len(site.ranges) == 1


def test_download_gives_up_where_nothing_listens(tmp_path):
    with pytest.raises(DownloadFailed, match="refused"):
        download("http://127.0.0.1:9/file", tmp_path / "file", retry=QUICK)


def test_download_takes_a_body_of_unknown_length(site, tmp_path):
    site.announces_length = False
    download(site.url(), tmp_path / "file", retry=QUICK)
    assert (tmp_path / "file").read_bytes() == BODY


def test_download_refuses_another_size_before_it_starts(site, tmp_path):
    with pytest.raises(DownloadFailed, match="published file has 10"):
        download(site.url(), tmp_path / "file", expected_size=10, retry=QUICK)
    assert not (tmp_path / "file.partial").exists()


def test_download_stops_a_server_that_sends_without_end(site, tmp_path):
    site.announces_length = False
    with pytest.raises(DownloadFailed, match="more than the 1000000 bytes"):
        download(site.url(), tmp_path / "file", expected_size=1_000_000, retry=QUICK)
    assert (tmp_path / "file.partial").stat().st_size < 3_000_000


def test_download_refuses_what_does_not_fit_on_the_disk(site, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(total=2**20, used=0, free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DownloadFailed, match="room for 1048576"):
        download(site.url(), tmp_path / "file", retry=QUICK)


def test_download_does_not_insist_when_the_disk_is_full(site, tmp_path):
    def fail(done, total):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DownloadFailed, match="No space left"):
        download(site.url(), tmp_path / "file", progress=fail, retry=QUICK)
    assert len(site.ranges) == 1


def test_download_takes_any_fsspec_url_and_resumes_it(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(BODY)
    calls = []

    def break_once(done, total):
        calls.append(done)
        if len(calls) == 2:
            raise ConnectionError("broken")

    url = source.as_uri()
    download(url, tmp_path / "file", progress=break_once, retry=QUICK)
    assert (tmp_path / "file").read_bytes() == BODY
    assert calls == [2**20, 2 * 2**20, 3 * 2**20, 4 * 2**20]


def test_download_names_an_fsspec_file_that_is_not_there(tmp_path):
    url = (tmp_path / "none.bin").as_uri()
    with pytest.raises(DownloadFailed, match="FileNotFoundError"):
        download(url, tmp_path / "file", retry=QUICK)


def test_download_keeps_passwords_and_signatures_out_of_messages_and_files(site, tmp_path, caplog):
    site.drops_after = [1_000_000, 0, 0]
    url = site.url("file.bin?signature=SECRET")
    with pytest.raises(DownloadFailed) as caught:
        download(url, tmp_path / "file", retry=QUICK)
    note = (tmp_path / "file.partial.json").read_text()
    assert "SECRET" not in str(caught.value) + caplog.text + note
    assert without_secrets("https://me:SECRET@host:1/a.pth?x=SECRET#y") == "https://host:1/a.pth"


def test_locked_lets_one_in_at_a_time(tmp_path):
    inside, most = [], []

    def work():
        with locked(tmp_path / "file"):
            inside.append(1)
            most.append(len(inside))
            threading.Event().wait(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
