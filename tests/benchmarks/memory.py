"""Peak memory of a reconstruction against its number of frames.

Renders nothing and needs no weights: a pattern video of each length, the same segment length, one
process a run, its peak resident memory as the system reports it.

    python tests/benchmarks/memory.py --frames 500 2000 --json FILE
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recordings import moving_squares, write_video

RUN = """
import resource, sys
from flows.cli import main
try:
    main()
except SystemExit as stop:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
    raise
"""


def peak_memory(video: Path, output: Path, weights: str) -> tuple[int, float]:
    """Bytes and seconds of one `ttt3r reconstruct`, in a process of its own."""
    command = ["reconstruct", str(video), "--output", str(output), "--weights", weights]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", RUN, *command], capture_output=True, text=True, check=True
    )
    return int(done.stderr.strip().splitlines()[-1]), time.perf_counter() - began


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--weights", default="untrained")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for frames in settings.frames:
            # The pattern repeats: what is measured is the pipeline, not the making of the video.
            pattern = moving_squares(100, 96, 160)
            images = [pattern[i % 100] for i in range(frames)]
            video = write_video(Path(folder) / f"{frames}.mp4", images)
            peak, seconds = peak_memory(video, Path(folder) / "out", settings.weights)
            rows.append({"frames": frames, "peak_memory_bytes": peak, "seconds": seconds})
            ratio = peak / rows[0]["peak_memory_bytes"]
            print(f"{frames:6d} frames  {peak / 2**20:7.0f} MiB  x{ratio:.3f}  {seconds:6.1f} s")
    if settings.json:
        settings.json.write_text(json.dumps({"results": rows}, indent=2))


if __name__ == "__main__":
    main()
