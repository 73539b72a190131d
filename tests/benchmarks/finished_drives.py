"""Time of a collection run that finds nothing new, against the number of finished drives.

    PYTHONPATH=.:tests python tests/benchmarks/finished_drives.py --drives 1000 --json FILE
    PYTHONPATH=.:tests python tests/benchmarks/finished_drives.py --drives 1000 --s3

One small drive is reconstructed; the others are copies of its recording and of its result, on S3
only of that part of the result (attributes and commits) that a run looks at. The run is that of
the deployment, in a process of its own with a Prefect server of its own: imports, the server's
start and the list of the drives count.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
from recordings import moving_squares, write_video
from seaweed import running_seaweed

RUN = """
import json, sys, time
from prefect.testing.utilities import prefect_test_harness
began = time.perf_counter()
from flows.reconstruct_collection import reconstruct_collection
from tasks.config import InferConfig, ReconstructionConfig
config = ReconstructionConfig(infer=InferConfig(weights="untrained"))
imported = time.perf_counter()
with prefect_test_harness(server_startup_timeout=300):
    ready = time.perf_counter()
    outcomes = reconstruct_collection(sys.argv[1], sys.argv[2], config, sys.argv[3])
    ended = time.perf_counter()
    from prefect.client.orchestration import get_client
    with get_client(sync_client=True) as client:
        runs = len(client.read_flow_runs(limit=200))
print(json.dumps({"drives": len(outcomes), "failed": sum(o["error"] is not None for o in outcomes),
    "import_seconds": imported - began, "run_seconds": ended - ready, "runs_started": runs - 1}))
"""


def run(collection: str, output: str, spread: str) -> dict[str, Any]:
    """Run the collection in a process of its own; what it says, and the seconds it took."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", RUN, collection, output, spread],
        capture_output=True,
        text=True,
        env=os.environ | {"PREFECT_LOGGING_LEVEL": "CRITICAL"},
    )
    if done.returncode:
        raise RuntimeError(f"the run failed:\n{done.stderr[-3000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": time.perf_counter() - began}


def moved(root: bytes, number: int) -> bytes:
    """zarr.json of the first drive's store, as that of the copy: it names its recording."""
    return root.replace(b"logs/0000000", f"logs/{number:07d}".encode())


def copy_locally(folder: Path, drives: int) -> tuple[str, str]:
    """Copies of drive 0000000 and its result, dates of change included."""
    for number in range(1, drives):
        shutil.copytree(folder / "logs" / "0000000", folder / "logs" / f"{number:07d}")
        target = folder / "out" / f"{number:07d}.zarr"
        shutil.copytree(folder / "out" / "0000000.zarr", target)
        root = target / "zarr.json"
        root.write_bytes(moved(root.read_bytes(), number))
    return str(folder / "logs"), str(folder / "out")


def copy_to_s3(folder: Path, drives: int, root: str) -> tuple[str, str]:
    """As `copy_locally`, on S3; a drive is finished there once it has been run there."""
    fs, bucket = fsspec.core.url_to_fs(root)
    fs.put(str(folder / "logs" / "0000000"), f"{bucket}/logs/0000000", recursive=True)
    run(f"{root}/logs", f"{root}/out", "here")
    first = f"{bucket}/out/0000000.zarr"
    names = [f"{first}/zarr.json", *fs.find(f"{first}/commits")]
    objects = {name.removeprefix(first): fs.cat(name) for name in names}
    (video,) = fs.find(f"{bucket}/logs/0000000")
    recording = fs.cat(video)

    def copy(number: int) -> None:
        fs.pipe(video.replace("0000000", f"{number:07d}"), recording)
        copied = objects | {"/zarr.json": moved(objects["/zarr.json"], number)}
        fs.pipe({f"{bucket}/out/{number:07d}.zarr{n}": data for n, data in copied.items()})

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(copy, range(1, drives)))
    return f"{root}/logs", f"{root}/out"


def main() -> None:
    """Run the benchmark and print what it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--drives", type=int, default=1000)
    parser.add_argument("--s3", action="store_true", help="On SeaweedFS instead of the disk.")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "logs" / "0000000").mkdir(parents=True)
        write_video(folder / "logs" / "0000000" / "front.mp4", moving_squares(10))
        if settings.s3:
            server = stack.enter_context(running_seaweed(folder / "s3"))
            os.environ |= server.environment
            collection, output = copy_to_s3(folder, settings.drives, server.url)
        else:
            run(str(folder / "logs"), str(folder / "out"), "here")
            collection, output = copy_locally(folder, settings.drives)
        row = run(collection, output, "deployments")
    print(json.dumps(row, indent=2))
    if settings.json:
        settings.json.write_text(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
