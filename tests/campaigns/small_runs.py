"""Runs of `ttt3r` that cost little, for campaigns of hundreds of them.

A run is a process in a session of its own, forked from one that has imported everything and
started nothing: it is killed as any other process is, and starts in milliseconds, not seconds.
All runs of a campaign talk to one Prefect server.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import fsspec.config
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recordings import moving_squares, write_video
from seaweed import free_ports

from storage import layout
from storage.errors import ChunkMissing, StoreMissing
from storage.folders import open_folder
from storage.reconstruction import ReconstructionStore
from storage.records import Plan
from tasks.config import FuseConfig, InferConfig, PlanConfig, ReconstructionConfig
from ttt3r.config import TINY
from ttt3r.model import Model
from ttt3r.weights import WeightsInfo, save_weights

TESTS = Path(__file__).resolve().parents[1]
SERVER_START_S = 300
ARRAY_FOLDERS = (layout.FRAMES, layout.SEGMENTS, layout.TRAJECTORY)
# Five segments of twelve frames, three chunks each, two lanes: all that can resume is there.
# A coarse mesh, as fusion would take most of the time.
FRAMES, VOXEL_M = 48, 0.1
CUT = ("--segment-frames", "12", "--overlap-frames", "3", "--chunk-frames", "4", "--lanes", "2")
CUT += ("--voxel-m", str(VOXEL_M))


def write_tiny_weights(path: Path) -> Path:
    """Random weights of the smallest network."""
    torch.manual_seed(0)
    info = WeightsInfo("tiny", TINY, "", "Apache-2.0", "random, seed 0", 12, False)
    save_weights(path, Model(TINY), info)
    return path


def write_drive(path: Path, frames: int = FRAMES, seed: int = 0) -> Path:
    """A video of moving squares."""
    return write_video(path, moving_squares(frames, seed=seed))


def small_config(weights: Path) -> ReconstructionConfig:
    """The same cut, for functions."""
    return ReconstructionConfig(
        plan=PlanConfig(segment_frames=12, overlap_frames=3, chunk_frames=4),
        infer=InferConfig(weights=str(weights), lanes=2),
        fuse=FuseConfig(voxel_m=VOXEL_M),
    )


@contextmanager
def working_folder(keep: Path | None) -> Iterator[Path]:
    """A folder that is removed on leaving, unless it is to be kept."""
    folder = Path(tempfile.mkdtemp()) if keep is None else keep
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


# ---- processes


@contextmanager
def prefect_server(folder: Path) -> Iterator[int]:
    """A Prefect server with a database of its own; the environment leads to it. Gives its pid."""
    (port,) = free_ports(1)
    os.environ |= {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    with (folder / "prefect.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--no-ui"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"MALLOC_ARENA_MAX": "1"},  # as deploy/helm/prefect-server.yaml
        )
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}/api/health", process)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SERVER_START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).read()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"no Prefect server after {SERVER_START_S} s (exit {process.poll()})")


class Launcher:
    """Starts functions in processes that share what is imported, and nothing else."""

    def __init__(self, logs: Path) -> None:
        """`logs`: file that takes what the processes print. Prefect's address must be set."""
        self.logs = logs
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        os.environ["PREFECT_LOGGING_LEVEL"] = "CRITICAL"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["campaigns.warm_imports"])

    def start(
        self, target: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] = {}
    ) -> ForkServerProcess:
        """Run `target(*arguments)` in a process of its own session and process group."""
        task = (dict(environment), str(self.logs), target, arguments)
        process = self._context.Process(target=_begin, args=task)
        process.start()
        # Every start looks after all children; an exit code that two threads read at once is lost
        # to one of them, who is told 255. Each process here has somebody who waits for it.
        multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
        return process

    def reconstruct(
        self, source: Path, output: str, *options: str, environment: Mapping[str, str] = {}
    ) -> ForkServerProcess:
        """`ttt3r reconstruct SOURCE --output OUTPUT OPTIONS`."""
        arguments = ("reconstruct", str(source), "--output", output, *options)
        return self.start(command_line, *arguments, environment=environment)


def _begin(
    environment: dict[str, str], log: str, target: Callable[..., Any], arguments: Any
) -> None:
    os.setsid()
    os.environ |= environment
    fsspec.config.set_conf_env(fsspec.config.conf)  # read when it was imported, before the fork
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    target(*arguments)


def command_line(*arguments: str) -> None:
    """What the program `ttt3r` does."""
    import flows.cli

    sys.argv = ["ttt3r", *arguments]
    flows.cli.main()


# ---- what is stored


def readable(url: str) -> dict[str, str]:
    """Digests of all that a reader is given: chunks and states, frames, trajectory, files.

    What is not finished is left out; any error but ChunkMissing is raised.
    """
    try:
        store = ReconstructionStore.open(url)
    except StoreMissing:
        return {}
    found = {}
    for name, read in _parts(store):
        try:
            found[name] = digest(read())
        except ChunkMissing:
            continue
    for record in store.commits().values():
        for name in record.get("files") or ():
            if not name.endswith((".html", ".png")):  # they show times
                found[name] = digest(store.get_file(name))
    return found


def _parts(store: ReconstructionStore) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "frames", store.read_frames
    yield "trajectory", store.read_trajectory
    plan = store.attributes.get("plan")
    for segment in Plan.from_json(plan).segments if plan else ():
        for chunk in segment.chunks(plan["chunk_frames"]):
            label = f"{segment.index}/{chunk.index}"
            yield f"{label}/state", lambda s=segment, c=chunk: store.read_state(s, c)
            for spec in layout.SEGMENT_ARRAYS:
                yield (
                    f"{label}/{spec.name}",
                    lambda s=segment, c=chunk, n=spec.name: store.read(s, n, c.start, c.stop),
                )


def digest(value: Any) -> str:
    """SHA-256 of bytes, of an array's values, or of a dict of both."""
    if isinstance(value, dict):
        return digest("".join(f"{n}:{digest(v)}" for n, v in sorted(value.items())).encode())
    data = value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes()
    return hashlib.sha256(data).hexdigest()


def stored_objects(url: str) -> dict[str, str]:
    """Digests of the stored bytes of all arrays and meshes, by object name."""
    folder = open_folder(url)
    names = [
        name
        for name in folder.sizes()
        if ("/c." in name and name.startswith(ARRAY_FOLDERS)) or name.endswith((".ply", ".glb"))
    ]
    return {name: digest(data) for name, data in folder.read_many(names).items()}


def commit_objects(url: str) -> dict[str, bytes]:
    """The stored bytes of all commits, by object name."""
    folder = open_folder(url)
    names = [n for n in folder.sizes(layout.COMMITS) if not n.endswith("zarr.json")]
    return folder.read_many(names)
