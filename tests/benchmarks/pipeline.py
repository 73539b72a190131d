"""What a whole run costs beyond the network, and where its time and memory go.

Renders nothing: the bundled sample street, forward and backward again and again, encoded as H.264
of any size. Each measurement is a process of its own, with one torch thread unless told otherwise.

    python tests/benchmarks/pipeline.py --frames 2000 --size 1280x720 --json FILE
    python tests/benchmarks/pipeline.py --frames 1000 4000 --size 640x360 --json FILE

`model`: the same frames, decoded and resized before, in the same segments and lanes, nothing
stored. `inference`: the infer task from video to committed chunks. `run`: the whole flow.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import wraps
from pathlib import Path
from typing import Any

import av
import numpy as np

SAMPLE = Path("flows/samples/street.mp4")
SAMPLE_FRAMES = 100
RATE = 30


def make_drive(path: Path, frames: int, size: tuple[int, int]) -> Path:
    """Write the sample street, back and forth, as H.264 with a key frame every second."""
    with av.open(str(SAMPLE)) as source:
        pictures = [f for f, _ in zip(source.decode(video=0), range(SAMPLE_FRAMES), strict=False)]
        there = [picture.reformat(*size, format="yuv420p").to_ndarray() for picture in pictures]
    turn = there + there[-2:0:-1]
    options = {"preset": "veryfast", "g": str(RATE), "bf": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(RATE), options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(turn[i % len(turn)], format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


class Stopwatch:
    """Seconds spent inside functions, also in other threads."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.cpu_seconds: Counter[str] = Counter()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its wall time and the time of its own thread added to `name`."""

        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            began, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[name] += time.perf_counter() - began
                self.cpu_seconds[name] += time.thread_time() - cpu

        return timed


class Peaks:
    """Resident memory of this process, by what it did meanwhile (Linux)."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with the peak meanwhile under `name` and that before under "between"."""

        @wraps(function)
        def watched(*arguments: Any, **named: Any) -> Any:
            self.take("between")
            try:
                return function(*arguments, **named)
            finally:
                self.take(name)

        return watched

    def take(self, name: str) -> None:
        """Count the peak since the last time for `name`."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        self.bytes[name] = max(self.bytes[name], int(found[1]) * 1024)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on


def run_flow(
    video: str, output: str, weights: str, threads: int, device: str = "cpu", processes: int = 1
) -> dict[str, Any]:
    """Run the flow on a Prefect server of its own; what each part took."""
    import torch

    torch.set_num_threads(threads)
    os.environ.pop("PREFECT_API_URL", None)  # a server of its own, as where nobody has used one
    os.environ["PREFECT_HOME"] = f"{output}.prefect"
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "300")
    from prefect.client.orchestration import get_client

    from flows.prefect_home import unwatched
    from flows.reconstruct_drive import reconstruct_drive
    from storage.reconstruction import ReconstructionStore
    from tasks.align import align_stage
    from tasks.config import InferConfig, ReconstructionConfig
    from tasks.fuse import fuse_tiles_stage, merge_tiles_stage, plan_tiles_stage
    from tasks.infer import device_kind, infer_stage, resolve_device
    from tasks.plan import plan_stage
    from tasks.probe import probe_stage
    from tasks.report import report_stage
    from tasks.summary import busy_seconds

    watch, peaks = Stopwatch(), Peaks()
    tasks: list[Any] = [probe_stage, plan_stage, infer_stage, align_stage]
    tasks += [plan_tiles_stage, fuse_tiles_stage, merge_tiles_stage, report_stage]
    stages = [task.name for task in tasks]
    for task in tasks:
        task.fn = peaks.around(task.name, watch.around(task.name, task.fn))
    watched = {"commit": "commit", "commit_chunks": "commit", "create_segments": "create"}
    for method, name in watched.items():
        setattr(
            ReconstructionStore, method, watch.around(name, getattr(ReconstructionStore, method))
        )
    started = time.perf_counter()
    with get_client(sync_client=True) as client, unwatched():
        client.api_version()  # its first answer takes long: a part of its start
        server = time.perf_counter() - started
        began, cpu = time.perf_counter(), time.process_time()
        config = ReconstructionConfig(infer=InferConfig(weights=weights, device=device))
        url = reconstruct_drive(video, output, config, processes=processes)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    peaks.take("between")
    records = list(ReconstructionStore.open(url).commits("infer").values())
    names = {name for record in records for name in record if name.endswith("_seconds")}
    outside = seconds - sum(watch.seconds[name] for name in stages)
    orchestration = outside + watch.seconds["commit"]
    return {
        "url": url,
        "device_kind": device_kind(resolve_device(config.infer)),
        "stored_bytes": ReconstructionStore.open(url).stored_bytes(),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "server_start_seconds": server,
        "stage_seconds": {name: watch.seconds[name] for name in stages},
        "prefect_seconds": outside,
        "commit_seconds": watch.seconds["commit"],
        "create_segment_seconds": watch.seconds["create"],
        "commit_cpu_seconds": watch.cpu_seconds["commit"],
        "create_segment_cpu_seconds": watch.cpu_seconds["create"],
        "orchestration_share": orchestration / seconds,
        "inference_busy_seconds": {n: sum(r.get(n, 0.0) for r in records) for n in sorted(names)},
        "inference_busy": busy_seconds(records),
        # On a GPU by its own clock: the share of the task in which it computes.
        "network_busy_share": busy_seconds(records)["network"] / watch.seconds["infer"],
        "lanes": max(record["lanes"] for record in records),
        "stage_peak_bytes": dict(peaks.bytes),
        "peak_memory_bytes": max(peaks.bytes.values()),
    }


def run_model(url: str, weights: str, threads: int, device: str = "cpu") -> dict[str, Any]:
    """The network alone on the frames of a finished store, in the same segments and lanes."""
    import torch

    torch.set_num_threads(threads)
    from storage.reconstruction import ReconstructionStore
    from tasks.frames import DriveInput
    from ttt3r.stream import Stream
    from ttt3r.weights import load_model

    store = ReconstructionStore.open(url)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # what `auto` means
    model, info = load_model(weights, device=device, dtype=dtype)
    drive = DriveInput.from_store(store, info.config)
    frames = np.stack(list(drive.read(0, drive.plan.frames)))
    lanes = max(record["lanes"] for record in store.commits("infer").values())
    Stream(model, lanes).feed(np.stack([frames[:8]] * lanes))  # the first call allocates
    began, cpu = time.perf_counter(), time.process_time()
    seen = 0
    for rounds in lock_step(drive, lanes):
        stream = Stream(model, len(rounds[0]))
        for chunks in rounds:
            images, present = stack(frames, chunks)
            stream.feed(images, update=present)
            seen += int(present.sum())
    if device != "cpu":
        torch.cuda.synchronize(device)
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "frames_through_network": seen,
    }


def lock_step(drive: Any, lanes: int) -> Iterator[list[list[tuple[int, int]]]]:
    """For each group of segments its rounds: the frames (start, stop) that every lane sees."""
    segments = drive.plan.segments
    for i in range(0, len(segments), lanes):
        cut = [segment.chunks(drive.plan.chunk_frames) for segment in segments[i : i + lanes]]
        yield [
            [(c[n].start, c[n].stop) if n < len(c) else (0, 0) for c in cut]
            for n in range(max(map(len, cut)))
        ]


def stack(frames: np.ndarray, chunks: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Images [L, T, h, w, 3] and which of them there are [L, T]."""
    counts = np.array([stop - start for start, stop in chunks])
    images = np.zeros((len(chunks), counts.max(), *frames.shape[1:]), np.uint8)
    for lane, (start, stop) in enumerate(chunks):
        images[lane, : stop - start] = frames[start:stop]
    return images, np.arange(counts.max()) < counts[:, None]


def in_process(what: str, *arguments: Any, cores: set[int] | None = None) -> subprocess.Popen[str]:
    """Start a measurement in a process of its own, on some cores only if wanted."""
    pin = f"import os; os.sched_setaffinity(0, {cores!r}); " if cores else ""
    folder = str(Path(__file__).resolve().parent)
    code = (
        f"{pin}import sys, json; sys.path[:0] = [{folder!r}, '.']; import pipeline; "
        f"found = pipeline.{what}(*json.loads(sys.argv[1])); print(json.dumps(found))"
    )
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What the measurement found.

    Raises:
        RuntimeError: it failed.
    """
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the measurement failed:\n{errors[-3000:]}")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def measure(
    frames: int, size: tuple[int, int], weights: str, threads: int, device: str, processes: int
) -> dict[str, Any]:
    """One length: the whole run, and the network alone on the same frames."""
    with tempfile.TemporaryDirectory() as folder:
        video = make_drive(Path(folder) / "drive.mp4", frames, size)
        run = result_of(
            in_process("run_flow", str(video), f"{folder}/out", weights, threads, device, processes)
        )
        model = result_of(in_process("run_model", run["url"], weights, threads, device))
    return {
        "frames": frames,
        "video_size": f"{size[0]}x{size[1]}",
        "device_kind": run["device_kind"],  # as ledgers and prices name it
        "run": run,
        "model": model,
        "model_frames_per_second": frames / model["seconds"],
        "inference_frames_per_second": frames / run["stage_seconds"]["infer"],
        "run_frames_per_second": frames / run["seconds"],
        "inference_to_model": model["seconds"] / run["stage_seconds"]["infer"],
        "run_to_model": model["seconds"] / run["seconds"],
        "peak_memory_bytes": run["peak_memory_bytes"],
    }


def show(row: dict[str, Any]) -> None:
    """One length, for people."""
    run = row["run"]
    print(f"{row['frames']} frames of {row['video_size']}, {run['lanes']} lanes")
    for name in ("model", "inference", "run"):
        share = row.get(f"{name}_to_model", 1.0)
        print(
            f"  {name:10s} {row[f'{name}_frames_per_second']:8.1f} frames/s  {share:7.1%} of model"
        )
    for name, seconds in run["stage_seconds"].items():
        share, peak = seconds / run["seconds"], run["stage_peak_bytes"][name] / 2**20
        print(f"  stage {name:12s} {seconds:8.2f} s  {share:7.1%} of the run, {peak:5.0f} MiB")
    for name, seconds in run["inference_busy_seconds"].items():
        print(f"  inference {name:20s} {seconds:8.2f} s")
    print(
        f"  Prefect {run['prefect_seconds']:.2f} s, commits {run['commit_seconds']:.2f} s: "
        f"{run['orchestration_share']:.2%} of the run; not in it: creating segments, beside the "
        f"network, {run['create_segment_seconds']:.2f} s; start of the server "
        f"{run['server_start_seconds']:.1f} s"
    )
    print(f"  network busy {run['network_busy_share']:.1%} of the inference task")
    print(f"  peak memory {row['peak_memory_bytes'] / 2**20:.0f} MiB", flush=True)


def parsed_size(text: str) -> tuple[int, int]:
    """(width, height) of "1280x720"."""
    width, height = text.split("x")
    return int(width), int(height)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[400])
    parser.add_argument("--size", type=parsed_size, default=(1280, 720))
    parser.add_argument("--weights", default="compact")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process")
    parser.add_argument("--device", default="cpu", help="of the network: cpu, cuda")
    parser.add_argument("--processes", type=int, default=1, help="that share the run's work")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    rows = []
    for frames in settings.frames:
        rows.append(
            measure(
                frames,
                settings.size,
                settings.weights,
                settings.threads,
                settings.device,
                settings.processes,
            )
        )
        show(rows[-1])
    for row in rows[1:]:
        ratio = row["peak_memory_bytes"] / rows[0]["peak_memory_bytes"]
        print(f"memory at {row['frames']} frames: x{ratio:.3f} of that at {rows[0]['frames']}")
    if settings.json:
        settings.json.write_text(json.dumps({"results": rows}, indent=2))


if __name__ == "__main__":
    main()
