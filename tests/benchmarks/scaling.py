"""Time of a whole run against its number of frames, and against the number of workers.

    python tests/benchmarks/scaling.py --frames 250 500 1000 2000 4000 --json FILE
    python tests/benchmarks/scaling.py --frames --workers 1 2 --worker-frames 500 --json FILE

A worker is a process with one torch thread, confined to one core, that runs a drive of its own; so
n workers do n drives in the time that is compared with that of one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline import in_process, make_drive, parsed_size, result_of


def time_of_frames(frames: int, size: tuple[int, int], weights: str) -> dict[str, Any]:
    """Seconds and peak memory of one whole run."""
    with tempfile.TemporaryDirectory() as folder:
        video = make_drive(Path(folder) / "drive.mp4", frames, size)
        run = result_of(in_process("run_flow", str(video), f"{folder}/out", weights, 1))
    names = ("seconds", "cpu_seconds", "stage_seconds", "peak_memory_bytes")
    return {"frames": frames, **{name: run[name] for name in names}}


def time_of_workers(
    workers: int, frames: int, size: tuple[int, int], weights: str
) -> dict[str, Any]:
    """Seconds from the first start of a drive to the last end, servers' starts left out."""
    cores = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        raise ValueError(f"{workers} workers need as many cores; this machine has {len(cores)}")
    with tempfile.TemporaryDirectory() as folder:
        video = make_drive(Path(folder) / "drive.mp4", frames, size)
        began = time.perf_counter()
        started = [
            in_process("run_flow", str(video), f"{folder}/{i}", weights, 1, cores={cores[i]})
            for i in range(workers)
        ]
        runs = [result_of(process) for process in started]
        whole = time.perf_counter() - began
    slowest = max(run["seconds"] for run in runs)
    rate = workers * frames / slowest
    return {
        "workers": workers,
        "frames_each": frames,
        "seconds": slowest,
        "seconds_with_start": whole,
        "frames_per_second": rate,
    }


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="*", default=[250, 500, 1000, 2000, 4000])
    parser.add_argument("--workers", type=int, nargs="*", default=[])
    parser.add_argument("--worker-frames", type=int, default=500)
    parser.add_argument("--size", type=parsed_size, default=(640, 360))
    parser.add_argument("--weights", default="compact")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    lengths, workers = [], []
    for frames in settings.frames:
        lengths.append(time_of_frames(frames, settings.size, settings.weights))
        row, first = lengths[-1], lengths[0]
        print(
            f"{frames:6d} frames  {row['seconds']:8.1f} s  x{row['seconds'] / first['seconds']:.2f}"
            f"  {row['peak_memory_bytes'] / 2**20:6.0f} MiB"
            f"  x{row['peak_memory_bytes'] / first['peak_memory_bytes']:.3f}",
            flush=True,
        )
    for count in settings.workers:
        workers.append(
            time_of_workers(count, settings.worker_frames, settings.size, settings.weights)
        )
        row = workers[-1]
        ratio = row["frames_per_second"] / workers[0]["frames_per_second"]
        print(
            f"{count} workers  {row['frames_per_second']:8.1f} frames/s  x{ratio:.2f}", flush=True
        )
    if settings.json:
        settings.json.write_text(json.dumps({"frames": lengths, "workers": workers}, indent=2))


if __name__ == "__main__":
    main()
