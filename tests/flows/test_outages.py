"""A Prefect server that is away for a while, seen through a proxy, costs a run nothing but time."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from prefect.settings import PREFECT_API_URL

from storage.reconstruction import ReconstructionStore
from tasks.plan import read_aside
from tasks.summary import progress

OUTAGE_S = 12.0  # longer than Prefect's client takes for its second attempt at a first request
RECONSTRUCT = """
import sys
from flows.reconstruct_drive import reconstruct_drive
from tasks.config import InferConfig, PlanConfig, ReconstructionConfig

plan = PlanConfig(segment_frames=16, chunk_frames=4)
config = ReconstructionConfig(plan=plan, infer=InferConfig(weights="untrained"))
reconstruct_drive(*sys.argv[1:], config)
"""


class OutageProxy:
    """Passes connections on to a server, which is away for a while once `request` is first seen."""

    def __init__(self, server: str, request: bytes) -> None:
        """`server`: URL; `request`: part of a request line."""
        self._server, self._request = urlsplit(server), request
        self._writers: set[asyncio.StreamWriter] = set()
        self.port, self.outages = 0, 0

    async def listen(self) -> None:
        """Accept connections, at the same port as before."""
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections, and end those that are open."""
        self._listener.close()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(self._server.hostname, self._server.port)
        self._writers |= {writer, there[1]}
        with suppress(OSError):
            await asyncio.gather(self._pass_on(reader, there[1]), self._pass_on(there[0], writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            if self._request in data and not self.outages:
                self.outages += 1
                await self.stop()
                await asyncio.sleep(OUTAGE_S)
                await self.listen()
                return
            writer.write(data)
            await writer.drain()
        writer.close()


@contextmanager
def running_proxy(server: str, request: bytes) -> Iterator[OutageProxy]:
    """Run a proxy in a thread of its own."""
    proxy, ready = OutageProxy(server, request), threading.Event()
    loop, done = asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        await proxy.listen()
        ready.set()
        await done.wait()
        await proxy.stop()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(30)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()


def test_first_task_waits_for_a_server_that_went_away_before_it(prefect_server, video, tmp_path):
    server = PREFECT_API_URL.value()
    with running_proxy(server, b"/increment-with-lease ") as proxy:
        here = f"http://127.0.0.1:{proxy.port}{urlsplit(server).path}"
        done = subprocess.run(
            [sys.executable, "-c", RECONSTRUCT, str(video), str(tmp_path)],
            env={**os.environ, "PREFECT_API_URL": here, "PREFECT_CLIENT_MAX_RETRIES": "7"},
            capture_output=True,
            text=True,
        )
    assert proxy.outages == 1
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the Prefect server does not answer" in done.stderr
    url = f"{tmp_path}/{video.stem}.zarr"
    assert progress(url)["stage"] == "done"
    assert read_aside(ReconstructionStore.open(url)) == {}
