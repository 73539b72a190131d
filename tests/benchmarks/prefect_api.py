"""How much one Prefect server holds: its API alone, on SQLite and on PostgreSQL.

    python tests/benchmarks/prefect_api.py --database sqlite postgresql --json FILE

Starts a server of its own in a temporary folder, on loopback, and for PostgreSQL (Debian's package)
a cluster of its own. Clients are lean HTTP requests from this process, `--clients` at a time, but
for `flow of tasks`, which is real flows in processes of their own. Beside each rate stand the CPU
milliseconds of the server and of the database for one operation, what they do idle included: on a
machine that does other things too, they say more than the rate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

READY_TIMEOUT_S = 600
IDLE_S = 30.0
FLOW_OF_TASKS = """
import sys
from prefect import flow, task

@task(persist_result=False)
def stage(i): return i

@flow(persist_result=False)
def drive():
    for i in range(int(sys.argv[1])): stage(i)

for _ in range(int(sys.argv[2])): drive()
"""


@dataclass
class Server:
    """A running server and the processes that serve for it."""

    api: str
    server: psutil.Process
    database: psutil.Process | None
    database_bytes: Callable[[], int]

    def cpu_seconds(self) -> tuple[float, float]:
        """CPU seconds so far of the server and of the database."""
        return _cpu(self.server), 0.0 if self.database is None else _cpu(self.database)


def _cpu(parent: psutil.Process) -> float:
    """CPU seconds of a process and all below it, ended ones included."""
    total = 0.0
    for process in [parent, *parent.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def postgresql(folder: Path) -> Iterator[tuple[str, psutil.Process, Callable[[], int]]]:
    """A cluster of its own: SQLAlchemy URL, process, and the size of its database.

    PostgreSQL refuses root: as root it runs as the user postgres of Debian's package.

    Raises:
        FileNotFoundError: PostgreSQL is not installed.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        raise FileNotFoundError("PostgreSQL is not there; on Debian: apt-get install postgresql")
    programs, port, data = found[-1], free_port(), folder / "data"
    user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    folder.mkdir()
    if user:
        shutil.chown(folder, "postgres", "postgres")

    def run(*command: Any) -> str:
        done = subprocess.run(
            [*user, *map(str, command)], check=True, capture_output=True, text=True, cwd="/"
        )
        return done.stdout

    run(programs / "initdb", "-D", data, "-U", "prefect", "-A", "trust", "-E", "UTF8")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    run(programs / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start")
    try:
        sql = (programs / "psql", "-h", "127.0.0.1", "-p", port, "-U", "prefect", "-At")
        run(*sql, "-d", "postgres", "-c", "CREATE DATABASE prefect")
        pid = int((data / "postmaster.pid").read_text().splitlines()[0])
        yield (
            f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect",
            psutil.Process(pid),
            lambda: int(run(*sql, "-d", "prefect", "-c", "SELECT pg_database_size('prefect')")),
        )
    finally:
        run(programs / "pg_ctl", "-D", data, "-m", "fast", "stop")


def _sqlite_bytes(file: Path) -> int:
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))


@contextmanager
def prefect_server(database: str, folder: Path) -> Iterator[Server]:
    """A server in `folder` with an empty database of that kind."""
    if database == "postgresql":
        with (
            postgresql(folder / "postgresql") as (url, process, size),
            _serve(url, folder) as (api, server),
        ):
            yield Server(api, server, process, size)
        return
    file = folder / "prefect.db"
    with _serve(f"sqlite+aiosqlite:///{file}", folder) as (api, server):
        yield Server(api, server, None, lambda: _sqlite_bytes(file))


@contextmanager
def _serve(database_url: str, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_API_DATABASE_CONNECTION_URL": database_url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    command = [str(Path(sys.executable).with_name("prefect")), "server", "start"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    log = (folder / "server.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    api = f"http://127.0.0.1:{port}/api"
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not _is_ready(api):
            if process.poll() is not None or time.monotonic() > deadline:
                text = (folder / "server.log").read_text()[-2000:]
                raise RuntimeError(f"the Prefect server does not start:\n{text}")
            time.sleep(0.5)
        yield api, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def _is_ready(api: str) -> bool:
    try:
        return httpx.get(f"{api}/health", timeout=2).is_success
    except httpx.HTTPError:
        return False


class Bench:
    """One server under load; each method is one kind of operation."""

    def __init__(self, server: Server, client: httpx.AsyncClient, clients: int) -> None:
        self._server, self._client, self._clients = server, client, clients
        self._deployment, self._runs = "", list[str]()
        self._refused = 0
        self.rows: list[dict[str, Any]] = []

    async def _post(self, path: str, body: Any) -> Any:
        while True:  # as Prefect's own client does: SQLite is locked, or a connection is dropped
            with suppress(httpx.TransportError):
                answer = await self._client.post(path, json=body)
                if answer.status_code != 503:
                    break
            self._refused += 1
            await asyncio.sleep(0.2 * random.random())
        answer.raise_for_status()
        return answer.json() if answer.content else None

    async def _get(self, path: str) -> Any:
        answer = await self._client.get(path)
        answer.raise_for_status()
        return answer.json()

    @contextmanager
    def _measured(self, name: str, operations: int) -> Iterator[None]:
        size, cpu = self._server.database_bytes(), self._server.cpu_seconds()
        began, self._refused = time.perf_counter(), 0
        yield
        seconds = time.perf_counter() - began
        now = self._server.cpu_seconds()
        row = {
            "operation": name,
            "operations": operations,
            "per_second": operations / seconds,
            "server_cpu_ms": 1000 * (now[0] - cpu[0]) / operations,
            "database_cpu_ms": 1000 * (now[1] - cpu[1]) / operations,
            "refused": self._refused,
            "database_bytes": (self._server.database_bytes() - size) / operations,
        }
        self.rows.append(row)
        show(row)

    async def _many(self, count: int, operation: Callable[[int], Awaitable[Any]]) -> list[Any]:
        """`operation` of 0 .. count - 1, as many at a time as there are clients."""
        numbers, found = iter(range(count)), list[Any]()

        async def client() -> None:
            for number in numbers:
                found.append(await operation(number))

        await asyncio.gather(*(client() for _ in range(self._clients)))
        return found

    async def prepare(self) -> None:
        """A work pool and a deployment."""
        await self._post("/work_pools/", {"name": "pool", "type": "process"})
        flow = await self._post("/flows/", {"name": "bench"})
        body = {"name": "bench", "flow_id": flow["id"], "work_pool_name": "pool"}
        self._deployment = (await self._post("/deployments/", body))["id"]
        await self._many(20, self._create)  # the first requests fill caches
        before = self._server.cpu_seconds()
        await asyncio.sleep(IDLE_S)
        after = self._server.cpu_seconds()
        idle = [(now - then) / IDLE_S for now, then in zip(after, before, strict=True)]
        print(f"  idle: server {idle[0]:.1%}, database {idle[1]:.1%} of a core", flush=True)

    async def _create(self, _: int) -> str:
        path = f"/deployments/{self._deployment}/create_flow_run"
        return str((await self._post(path, {"parameters": {}}))["id"])

    async def create(self, count: int) -> None:
        """What `run_deployment(timeout=0)` asks for."""
        with self._measured("create a flow run", count):
            self._runs = await self._many(count, self._create)

    async def complete(self) -> None:
        """What a worker and the run itself report: pending, running, completed."""

        async def one(number: int) -> None:
            for kind in ("PENDING", "RUNNING", "COMPLETED"):
                path = f"/flow_runs/{self._runs[number]}/set_state"
                await self._post(path, {"state": {"type": kind}, "force": False})

        with self._measured("take it to completed (3 states)", len(self._runs)):
            await self._many(len(self._runs), one)

    async def read(self, count: int) -> None:
        """What a parent asks again and again while it waits for a child."""
        with self._measured("read a flow run", count):
            await self._many(count, lambda n: self._get(f"/flow_runs/{self._runs[n % 10]}"))

    async def poll(self, count: int) -> None:
        """What an idle worker asks again and again."""
        path = "/work_pools/pool/get_scheduled_flow_runs"
        with self._measured("poll a work pool", count):
            await self._many(count, lambda _: self._post(path, {"limit": 1}))

    async def events(self, count: int, batch: int = 50) -> None:
        """Events as they come in over HTTP, until they can be queried."""
        kind = f"bench.{time.time_ns()}"

        async def one(_: int) -> None:
            resource = {"prefect.resource.id": "bench.resource"}
            body = [{"event": kind, "resource": resource, "occurred": _now()}] * batch
            await self._post("/events", [{**event, "id": str(uuid.uuid4())} for event in body])

        with self._measured("receive and store an event", count):
            await self._many(count // batch, one)
            await self._until(lambda: self._events_of(kind), count)

    async def _events_of(self, kind: str) -> int:
        found = await self._post("/events/filter", {"filter": {"event": {"name": [kind]}}})
        return int(found["total"])

    async def _until(self, asked: Callable[[], Awaitable[int]], wanted: int) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while (found := await asked()) < wanted:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server stored {found} of {wanted} in {READY_TIMEOUT_S} s")
            await asyncio.sleep(0.2)

    async def flows_of_tasks(self, processes: int, flows: int, tasks: int) -> None:
        """Real flows, one task after the other, until the server knows of all tasks."""
        before = await self._completed_tasks()
        arguments = [sys.executable, "-c", FLOW_OF_TASKS, str(tasks), str(flows)]
        environment = {
            **os.environ,
            "PREFECT_API_URL": self._server.api,
            "PREFECT_LOGGING_LEVEL": "ERROR",
        }
        count = processes * flows
        with self._measured(f"flow of {tasks} tasks", count):
            started = [subprocess.Popen(arguments, env=environment) for _ in range(processes)]
            for process in started:
                if await asyncio.to_thread(process.wait):
                    raise RuntimeError("a flow of tasks failed")
            await self._until(self._completed_tasks, before + count * tasks)

    async def _completed_tasks(self) -> int:
        state = {"state": {"type": {"any_": ["COMPLETED"]}}}
        return int(await self._post("/task_runs/count", {"task_runs": state}))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


async def measure(server: Server, clients: int, scale: float) -> list[dict[str, Any]]:
    """All operations on one server; `scale` 1 makes some 2,000 runs."""
    async with httpx.AsyncClient(base_url=server.api, timeout=60) as client:
        bench = Bench(server, client, clients)
        await bench.prepare()
        await bench.create(int(1000 * scale))
        await bench.flows_of_tasks(2, max(2, int(40 * scale)), 1)
        await bench.flows_of_tasks(2, max(2, int(20 * scale)), 8)
        await bench.poll(int(500 * scale))
        await bench.complete()
        await bench.read(int(2000 * scale))
        await bench.events(int(100 * scale) * 50)
        return bench.rows


def show(row: dict[str, Any]) -> None:
    """One operation, for people."""
    print(
        f"  {row['operation']:34s} {row['per_second']:8.1f}/s"
        f"  server {row['server_cpu_ms']:7.2f} ms"
        f"  database {row['database_cpu_ms']:6.2f} ms  {row['database_bytes']:8.0f} bytes"
        f"  refused {row['refused']}",
        flush=True,
    )


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    databases = ("sqlite", "postgresql")
    parser.add_argument("--database", nargs="+", choices=databases, default=list(databases))
    parser.add_argument("--clients", type=int, default=8, help="requests at a time")
    parser.add_argument("--scale", type=float, default=1.0, help="1: some 2,000 flow runs each")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers end with this process
    results = []
    for database in settings.database:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o755)  # PostgreSQL's user passes through
            print(database, flush=True)
            with prefect_server(database, Path(folder)) as server:
                rows = asyncio.run(measure(server, settings.clients, settings.scale))
        results += [{"database": database, **row} for row in rows]
        if settings.json:
            settings.json.write_text(json.dumps({"results": results}, indent=2))


if __name__ == "__main__":
    main()
