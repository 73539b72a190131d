"""A proxy on loopback that breaks a share of the requests to an S3 server, by a seeded plan.

    with running_seaweed(folder) as server, running_proxy(server, FaultPlan(seed=1)) as proxy:
        environment = os.environ | proxy.environment  # for a process of its own
        ...
        print(proxy.faults)  # by kind

`proxy.plan = None` lets everything through. A server that is away reads as a reset.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from io import BytesIO
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web
from seaweed import Seaweed
from yarl import URL

HOP_BY_HOP = frozenset({"connection", "expect", "keep-alive", "transfer-encoding"})
REMEMBERED = 20  # older answers of each listing
# What fsspec is told about S3, so that a client gives up in tests before its user does.
IMPATIENCE = {"config_kwargs": {"read_timeout": 2.0, "connect_timeout": 2.0}}


class Fault(StrEnum):
    """How a request is broken."""

    ERROR = "500 InternalError"
    SLOW_DOWN = "503 SlowDown"
    FULL = "507 full store, for a while"
    EXPIRED = "403 ExpiredToken, for a while"
    CONFLICT = "409 to a conditional put, though nothing is there"
    RESET = "reset before anything is read"
    RESET_IN_REQUEST = "reset in mid request body"
    RESET_IN_ANSWER = "reset in mid answer"
    TRUNCATED = "answer shorter than its Content-Length"
    TRUNCATED_CHUNKED = "chunked answer without its end"
    TIMEOUT = "no answer, not applied"
    LOST_ANSWER = "applied, answer lost"
    LATE = "applied after the client gave up"
    STALE_LISTING = "older listing"
    FORGOTTEN = "multipart upload completed, answer lost, upload forgotten"


ERRORS = {
    Fault.ERROR: (500, "InternalError", "We encountered an internal error. Please try again."),
    Fault.SLOW_DOWN: (503, "SlowDown", "Please reduce your request rate."),
    Fault.FULL: (507, "XMinioStorageFull", "Storage backend has reached its minimum free drive."),
    Fault.EXPIRED: (403, "ExpiredToken", "The provided token has expired."),
    Fault.CONFLICT: (409, "ConditionalRequestConflict", "The conditional request cannot succeed."),
}
NO_UPLOAD = (404, "NoSuchUpload", "The specified multipart upload does not exist.")
SPELLS = (Fault.FULL, Fault.EXPIRED)  # these stay for a while
NEED_REQUEST_BODY = (Fault.RESET_IN_REQUEST,)
NEED_CONDITION = (Fault.CONFLICT,)
NEED_COMPLETION = (Fault.FORGOTTEN,)
NEED_WRITE = (Fault.FULL, Fault.LOST_ANSWER, Fault.LATE)
NEED_ANSWER_BODY = (Fault.RESET_IN_ANSWER, Fault.TRUNCATED, Fault.TRUNCATED_CHUNKED)
# Writes and listings are fewer than reads, and spells break many requests.
DEFAULT_WEIGHTS = dict.fromkeys(Fault, 1.0) | {
    Fault.FULL: 0.05,
    Fault.EXPIRED: 0.02,
    Fault.TIMEOUT: 0.3,
    Fault.LATE: 1.0,
    Fault.LOST_ANSWER: 3.0,
    Fault.RESET_IN_REQUEST: 2.0,
    Fault.STALE_LISTING: 5.0,
}


@dataclass
class FaultPlan:
    """Which requests are broken and how; the same seed and requests give the same faults."""

    seed: int
    rate: float = 0.1  # share of the requests
    weights: Mapping[Fault, float] = field(default_factory=lambda: DEFAULT_WEIGHTS)
    limit: int | None = None  # of faults in all
    silence_s: float = 2.5  # before a late request is applied: longer than the client waits
    spell_s: float = 0.5  # how long an expired credential or a full store stays so

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._ends: dict[Fault, float] = {}

    def choose(self, kinds: list[Fault], now: float) -> Fault | None:
        """One of the kinds that suit a request, or None to let it through."""
        for kind, end in self._ends.items():
            if now < end and kind in kinds:
                return kind
        weights = [self.weights.get(kind, 0.0) for kind in kinds]
        if not any(weights) or self._random.random() >= self.rate:
            return None
        kind = self._random.choices(kinds, weights)[0]
        if kind in SPELLS:
            self._ends[kind] = now + self.spell_s
        return kind

    def pick(self, count: int) -> int:
        """A number below `count`."""
        return self._random.randrange(count)


@dataclass
class Answer:
    """What the server said."""

    status: int
    headers: dict[str, str]
    body: bytes


class FaultProxy:
    """Passes requests on to `server`, all but those that its plan breaks."""

    def __init__(self, server: Seaweed, plan: FaultPlan | None) -> None:
        self._upstream, self._server = server.endpoint, server
        self.plan = plan
        self.faults: Counter[Fault] = Counter()
        self.requests = 0
        self.endpoint = ""
        self._listings: dict[str, list[Answer]] = {}
        self._forgotten: set[str] = set()  # ids of multipart uploads
        self._session: ClientSession
        self._late: set[asyncio.Task[None]] = set()

    @property
    def server(self) -> Seaweed:
        """The server as seen through the proxy."""
        return replace(self._server, endpoint=self.endpoint)

    @property
    def settings(self) -> dict[str, Any]:
        """What fsspec needs to know: for `fsspec.config.conf["s3"]` of this process."""
        return {"endpoint_url": self.endpoint, **IMPATIENCE}

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead a process of its own through the proxy."""
        return {**self.server.environment, "FSSPEC_S3": json.dumps(self.settings)}

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        self.requests += 1
        fault = self._choose(request)
        if fault is not None:
            self.faults[fault] += 1
        try:
            return await self._answer(request, fault)
        except (ClientError, OSError):  # the server is away, or was killed in mid answer
            return _hang_up(request)

    def _choose(self, request: web.BaseRequest) -> Fault | None:
        plan = self.plan
        if plan is None or (plan.limit is not None and self.faults.total() >= plan.limit):
            return None
        return plan.choose(self._suitable(request), asyncio.get_running_loop().time())

    def _suitable(self, request: web.BaseRequest) -> list[Fault]:
        is_write = request.method in ("PUT", "POST", "DELETE")
        is_completion = request.method == "POST" and "uploadId" in request.query
        unfit = {
            *(() if is_completion else NEED_COMPLETION),
            *(() if request.can_read_body else NEED_REQUEST_BODY),
            *(() if is_write else NEED_WRITE),
            *(() if "If-None-Match" in request.headers and is_write else NEED_CONDITION),
            *(NEED_ANSWER_BODY if is_write or request.method == "HEAD" else ()),
        }
        if len(self._listings.get(request.path_qs, ())) < 2:
            unfit.add(Fault.STALE_LISTING)
        return [fault for fault in Fault if fault not in unfit]

    async def _answer(self, request: web.BaseRequest, fault: Fault | None) -> web.StreamResponse:
        if fault is Fault.TIMEOUT:
            await self._be_silent()
        if fault in (Fault.RESET, Fault.TIMEOUT):
            return _hang_up(request)
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault in ERRORS:
            await request.content.read()
            return _error(ERRORS[fault], request.path)
        if fault is Fault.RESET_IN_REQUEST:
            return await self._cut_request(request)
        body = await request.content.read()
        if request.query.get("uploadId") in self._forgotten:
            return _error(NO_UPLOAD, request.path)
        if fault is Fault.LATE:
            await self._be_silent()
            late = asyncio.create_task(self._forward_late(request, body))
            self._late.add(late)
            late.add_done_callback(self._late.discard)
            return _hang_up(request)
        if fault is Fault.STALE_LISTING and self.plan is not None:
            older = self._listings[request.path_qs][:-1]
            return _whole(older[self.plan.pick(len(older))], request.method)
        answer = await self._forward(request, body)
        if fault is Fault.FORGOTTEN:
            self._forgotten.add(request.query["uploadId"])
        if fault in (Fault.LOST_ANSWER, Fault.FORGOTTEN):
            return _hang_up(request)
        if fault in NEED_ANSWER_BODY and len(answer.body) > 1:
            return await _cut_answer(request, answer, fault)
        return _whole(answer, request.method)

    async def _forward(
        self, request: web.BaseRequest, body: bytes | AsyncIterator[bytes]
    ) -> Answer:
        """Let the server do it; headers stay as signed, but for those of the connection."""
        headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP}
        data = BytesIO(body) if isinstance(body, bytes) else body
        url = URL(self._upstream + request.raw_path, encoded=True)
        async with self._session.request(
            request.method, url, headers=headers, data=data if body else None, allow_redirects=False
        ) as got:
            kept = {k: v for k, v in got.headers.items() if k.lower() not in HOP_BY_HOP}
            answer = Answer(got.status, kept, await got.read())
        if request.method == "GET" and "list-type" in request.query and answer.status == 200:
            known = self._listings.setdefault(request.path_qs, [])
            if answer.body not in [listing.body for listing in known[-1:]]:
                known.append(answer)
            del known[:-REMEMBERED]
        return answer

    async def _cut_request(self, request: web.BaseRequest) -> web.StreamResponse:
        """Half of the body reaches the server, then both connections end."""
        body = await request.content.read()

        async def half() -> AsyncIterator[bytes]:
            yield body[: len(body) // 2]
            raise ConnectionResetError("on purpose")

        with suppress(ClientError, OSError):
            await self._forward(request, half())
        return _hang_up(request)

    async def _be_silent(self) -> None:
        """Longer than a client waits."""
        await asyncio.sleep(self.plan.silence_s if self.plan else 0)

    async def _forward_late(self, request: web.BaseRequest, body: bytes) -> None:
        """Do it all the same, behind the client's back and perhaps after its next attempt."""
        await self._be_silent()
        with suppress(ClientError, OSError):
            await self._forward(request, body)

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        """Listen on a free port until told to stop."""
        connector = TCPConnector(limit=0, force_close=True)
        self._session = ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=DummyCookieJar(),
            timeout=ClientTimeout(total=60),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )
        runner = web.ServerRunner(web.Server(self.handle, access_log=None), shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.endpoint = f"http://{host}:{port}"
        ready.set()
        await stop.wait()
        for late in self._late:
            late.cancel()
        await self._session.close()
        await runner.cleanup()


@contextmanager
def running_proxy(server: Seaweed, plan: FaultPlan | None) -> Iterator[FaultProxy]:
    """Run a proxy in a thread of its own."""
    proxy, ready = FaultProxy(server, plan), threading.Event()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    def run() -> None:
        loop.run_until_complete(proxy.serve(ready, stop))
        loop.close()

    thread = threading.Thread(target=run, name="fault proxy", daemon=True)
    thread.start()
    if not ready.wait(30):
        raise RuntimeError("the fault proxy does not start")
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def _error(error: tuple[int, str, str], resource: str) -> web.Response:
    status, code, message = error
    text = (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code>'
        f"<Message>{message}</Message><RequestId>0</RequestId></Error>"
    )
    return web.Response(status=status, text=text, content_type="application/xml")


def _whole(answer: Answer, method: str) -> web.Response:
    if method == "HEAD":
        return web.Response(status=answer.status, headers=answer.headers)
    headers = {k: v for k, v in answer.headers.items() if k.lower() != "content-length"}
    return web.Response(status=answer.status, headers=headers, body=answer.body)


async def _cut_answer(request: web.BaseRequest, answer: Answer, fault: Fault) -> web.StreamResponse:
    """The first half of the body, then an end that its headers do not announce."""
    headers = {k: v for k, v in answer.headers.items() if k.lower() != "content-length"}
    response = web.StreamResponse(status=answer.status, headers=headers)
    if fault is Fault.TRUNCATED_CHUNKED:
        response.enable_chunked_encoding()
    else:
        response.content_length = len(answer.body)
    await response.prepare(request)
    await response.write(answer.body[: len(answer.body) // 2])
    await asyncio.sleep(0.01)  # let it leave before a reset throws it away
    if fault is Fault.RESET_IN_ANSWER:
        _hang_up(request)
    elif request.transport is not None:
        request.transport.close()
    return response


def _hang_up(request: web.BaseRequest) -> web.Response:
    """Reset the connection; the response that is returned reaches nobody."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return web.Response()
