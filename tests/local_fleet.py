"""A fleet on one machine: Prefect server on PostgreSQL, work pools, workers; all on loopback."""

from __future__ import annotations

import itertools
import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from seaweed import free_ports

from storage.reconstruction import ReconstructionStore
from tasks.planned import read_plan
from tasks.summary import list_stores

REPOSITORY = Path(__file__).resolve().parents[1]
READY_TIMEOUT_S = 300  # the first start of a Prefect server makes its tables
HEARTBEAT_S = 30  # the least that Prefect takes
PAGE = 200  # the most runs that the server gives at once


class LocalFleet:
    """A Prefect server with the pools and deployments of `deploy/`, and workers by name."""

    def __init__(self, folder: Path, database: str, extra: dict[str, str]) -> None:
        """`database`: SQLAlchemy URL; `extra`: environment of server and workers."""
        self._folder = folder
        (self._port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self._port}/api"
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self._server: subprocess.Popen[bytes] | None = None
        self.environment = {
            **os.environ,
            **extra,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": self.url,
            "PREFECT_API_DATABASE_CONNECTION_URL": database,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "MALLOC_ARENA_MAX": "1",
            "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "prefect.server.events.ordering.db",
            "DO_NOT_TRACK": "1",
            "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks,storage,ttt3r",
            "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
            "PYTHONSAFEPATH": "1",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
            "PREFECT_CLIENT_MAX_RETRIES": "7",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "OMP_NUM_THREADS": "1",
        }

    def start_server(self) -> None:
        """Start the server and wait until it answers."""
        self._server = self._start(
            "server", "server", "start", "--no-ui", "--port", str(self._port)
        )
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._is_healthy():
            if self._server.poll() is not None or time.monotonic() > deadline:
                log = (self._folder / "server.log").read_text(errors="replace")
                raise RuntimeError(f"the Prefect server is not ready; its log ends:\n{log[-3000:]}")
            time.sleep(0.5)

    def kill_server(self) -> None:
        """As a machine does that loses power."""
        assert self._server is not None
        kill_tree(self._server.pid)
        self._server.wait()

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(json.load(answer))
        except OSError:
            return False

    def set_up(self, gpu_slots: int) -> None:
        """Make pools, deployments and the automation as docs/fleet.md says."""
        self.prefect("work-pool", "create", "cpu", "--type", "process")
        self.prefect("work-pool", "create", "gpu", "--type", "process")
        self.prefect("work-pool", "update", "gpu", "--concurrency-limit", str(gpu_slots))
        self.prefect("--no-prompt", "deploy", "--all", "--prefect-file", "deploy/prefect.yaml")
        self.prefect("automation", "create", "--from-file", "deploy/automations.yaml")

    def start_worker(self, pool: str, name: str, *arguments: str) -> None:
        """Start a worker of a pool."""
        command = ("worker", "start", "--pool", pool, "--name", name, *arguments)
        self.workers[name] = self._start(name, *command)

    def stop_worker(self, name: str) -> None:
        """Kill a worker and all that it started."""
        worker = self.workers.pop(name)
        kill_tree(worker.pid)
        worker.wait()

    def lose_node(self, pid: int) -> str:
        """Kill the worker that process `pid` belongs to and all it started, at once.

        As a machine that is taken away. Returns the worker's name.
        """
        name = next(n for n, w in self.workers.items() if pid in tree_of(w.pid))
        self.stop_worker(name)
        return name

    def prefect(self, *arguments: str) -> str:
        """What a command of the Prefect CLI prints."""
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            env={**self.environment, "COLUMNS": "200"},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            said = f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
            raise RuntimeError(f"prefect {' '.join(arguments)} failed:\n{said}")
        return done.stdout

    def run(self, deployment: str, parameters: dict[str, Any]) -> str:
        """Start a run of a deployment; its id."""
        given = [f"{name}={json.dumps(value)}" for name, value in parameters.items()]
        flags = [word for pair in given for word in ("--param", pair)]
        said = self.prefect("deployment", "run", deployment, *flags)
        return said.partition("UUID: ")[2].split()[0]

    def ask(self, path: str, body: Any) -> Any:
        """The answer of the server's API to a POST; None where it has nothing to say."""
        request = urllib.request.Request(
            f"{self.url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            said = answer.read()
        return json.loads(said) if said else None

    def get(self, path: str) -> Any:
        """The answer of the server's API to a GET."""
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=60) as answer:
            return json.load(answer)

    def flow_runs(self, deployment: str | None = None) -> list[dict[str, Any]]:
        """All runs, or those of a deployment's flow, in the order of their creation."""
        flow = {"flows": {"name": {"any_": [deployment]}}} if deployment else {}
        asked = {**flow, "limit": PAGE, "sort": "ID_DESC"}  # runs that begin meanwhile repeat some
        runs: dict[str, dict[str, Any]] = {}
        for offset in itertools.count(0, PAGE):
            page = self.ask("flow_runs/filter", {**asked, "offset": offset})
            runs |= {run["id"]: run for run in page}
            if len(page) < PAGE:
                break
        return sorted(runs.values(), key=lambda run: str(run["created"]))

    def wait_for(self, run_id: str, timeout_s: float) -> dict[str, Any]:
        """The run, once it has ended; outages of the server are passed over."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            time.sleep(1)
            try:
                (run,) = self.ask("flow_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
            except OSError:
                continue
            if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                return dict(run)
        raise TimeoutError(f"run {run_id} has not ended after {timeout_s} s")

    def must_complete(self, run_id: str, timeout_s: float) -> None:
        """Wait for the run, which must complete; if it does not, it is said why."""
        run = self.wait_for(run_id, timeout_s)
        assert run["state_type"] == "COMPLETED", f"{run['state_type']}: {run['state']['message']}"

    def stop(self) -> None:
        """End everything that was started."""
        for process in (*self.workers.values(), self._server):
            if process is not None:
                kill_tree(process.pid)
                process.wait()

    def _start(self, log: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{log}.log").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "prefect", *arguments],
                env=self.environment,
                cwd=self._folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the demo, which ends them in order
            )


@contextmanager
def running_fleet(folder: Path, gpu_slots: int, extra: dict[str, str]) -> Iterator[LocalFleet]:
    """A server on PostgreSQL with pools and deployments, without workers yet."""
    folder.mkdir(parents=True, exist_ok=True)
    with running_postgres() as database, ExitStack() as stack:
        fleet = LocalFleet(folder, database, extra)
        stack.callback(fleet.stop)
        fleet.start_server()
        fleet.set_up(gpu_slots)
        yield fleet


@contextmanager
def running_postgres() -> Iterator[str]:
    """A PostgreSQL server in a folder of its own; its URL for Prefect.

    As root it runs as the user `postgres`: it refuses to be root.
    """
    user = "postgres" if os.geteuid() == 0 else None
    password, (port,) = secrets.token_hex(16), free_ports(1)
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder, ExitStack() as stack:
        data, key = Path(folder, "data"), Path(folder, "password")
        key.write_text(password)
        if user is not None:
            owner = pwd.getpwnam(user)
            for path in (folder, key):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        common: dict[str, Any] = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL}
        make = [_postgres("initdb"), "-D", data, "-U", "prefect", "-A", "scram-sha-256"]
        subprocess.run([*make, f"--pwfile={key}", "--encoding=UTF8"], check=True, **common)
        with Path(folder, "log").open("wb") as log:
            command = [_postgres("postgres"), "-D", data, "-p", str(port), "-h", "127.0.0.1"]
            settings = ["-c", "unix_socket_directories=", "-c", "max_connections=200"]
            process = subprocess.Popen(
                [*command, *settings], stderr=log, start_new_session=True, **common
            )
        stack.callback(process.wait)
        stack.callback(process.send_signal, signal.SIGQUIT)
        _wait_for_postgres(process, port, Path(folder, "log"))
        yield f"postgresql+asyncpg://prefect:{password}@127.0.0.1:{port}/postgres"


def _postgres(program: str) -> str:
    """A program of the Debian package, which does not put it on the path."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    path = str(found[-1]) if found else shutil.which(program)
    if path is None:
        raise RuntimeError(f"no {program}; install Debian's package postgresql")
    return path


def _wait_for_postgres(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    ready = [_postgres("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    deadline = time.monotonic() + 60
    while subprocess.run(ready).returncode:
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace")
            raise RuntimeError(f"PostgreSQL is not ready; its log ends:\n{said[-2000:]}")
        time.sleep(0.2)


def kill_tree(pid: int) -> None:
    """Kill -9 a process and all its descendants."""
    for process in tree_of(pid):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def tree_of(pid: int) -> list[int]:
    """A process and all its descendants, from /proc."""
    found = [pid]
    for process in found:
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, task.read_text().split())
    return found


@dataclass(frozen=True)
class Work:
    """Inference that goes on: what one process holds of one drive, with a chunk committed."""

    pid: int
    url: str
    segments: tuple[str, ...]  # as in the names of commits, "infer/0003"

    def commits(self) -> dict[str, str]:
        """Chunks of these segments that are committed, and what identifies each commit."""
        found = ReconstructionStore.open(self.url).commits("infer")
        return {n: r["commit_id"] for n, r in found.items() if n[:10] in self.segments}

    def is_finished(self) -> bool:
        """Whether every chunk of these segments is committed."""
        plan = read_plan(ReconstructionStore.open(self.url))
        ours = [s for s in plan.segments if f"infer/{s.index:04d}" in self.segments]
        return len(self.commits()) >= sum(len(s.chunks(plan.chunk_frames)) for s in ours)


def wait_for_work(output: str, timeout_s: float = 600) -> Work:
    """Some inference under `output` that is under way and has got somewhere."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        held: dict[tuple[int, str], list[str]] = {}
        for claim in claims_under(output):
            if claim["name"].startswith("infer/"):
                held.setdefault((claim["pid"], claim["url"]), []).append(claim["name"])
        for (pid, url), segments in held.items():
            work = Work(pid, url, tuple(segments))
            if work.commits():
                return work
        time.sleep(0.2)
    raise TimeoutError(f"no inference under {output} got on within {timeout_s} s")


def claims_under(output: str) -> list[dict[str, Any]]:
    """Who is at work on what under `output`: `url` of the drive, `name` of the work, `pid`."""
    fs, root = fsspec.core.url_to_fs(output)
    fs.invalidate_cache()
    found = []
    for claim in fs.glob(f"{root}/*.zarr/claims/**/[0-9]*.json"):
        drive, _, name = claim.rpartition("/")[0].partition(".zarr/claims/")
        with suppress(FileNotFoundError):  # given up since it was listed
            record = json.loads(fs.cat(claim))
            url = f"{output}/{drive.rpartition('/')[2]}.zarr"
            found.append({**record, "url": url, "name": name})
    return found


def commits_of_all(output: str) -> dict[str, str]:
    """What identifies every committed chunk of every drive under `output`."""
    return {
        f"{url} {name}": record["commit_id"]
        for url in list_stores(output)
        for name, record in ReconstructionStore.open(url).commits("infer").items()
    }
