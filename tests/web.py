"""A web server on loopback that serves the files of a folder, in ranges, unless told to fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class WebServer(ThreadingHTTPServer):
    """Serves `folder` at `url`."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.signature = ""  # a query that addresses without one are led to
        self.fail: Callable[[BaseHTTPRequestHandler], int | None] = lambda request: None  # status
        self.requests = 0

    def fail_after(self, count: int, status: int) -> None:
        """Answer `count` more requests, all others with `status`."""
        last = self.requests + count
        self.fail = lambda request: status if self.requests > last else None

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebServer

    def do_GET(self) -> None:
        """Send the file, the asked range of it, or an error."""
        self.server.requests += 1
        path, _, query = self.path.partition("?")
        file = self.server.folder / path.lstrip("/")
        if self.server.signature and not query:
            self._answer(302, Location=f"{path}?{self.server.signature}")
        elif status := self.server.fail(self):
            self._answer(status)
        elif not file.is_file():
            self._answer(404)
        else:
            self._send(file.read_bytes(), self.headers.get("Range"))

    do_HEAD = do_GET

    def _send(self, data: bytes, asked: str | None) -> None:
        if asked is None:
            self._answer(200, data)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or len(data)) + 1, len(data))
        place = f"bytes {start}-{stop - 1}/{len(data)}"
        self._answer(206, data[start:stop], **{"Content-Range": place})

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def running_web(folder: Path) -> Iterator[WebServer]:
    """Run a server in a thread of its own."""
    with WebServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, name="web server", daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
