"""Time of one drive's inference on one and on two workers of a fleet, and what a run costs.

    PYTHONPATH=.:tests python tests/benchmarks/fan_out.py --json FILE

A real Prefect server on PostgreSQL, a worker of the pool `cpu` and, first one, then two of the
pool `gpu`, one thread each. The network is larger than the bundled one and its weights are
synthetic, so that inference takes the time; of what the drive shows nothing depends.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from local_fleet import LocalFleet, running_fleet
from recordings import moving_squares, write_video

from storage.reconstruction import ReconstructionStore
from tasks.planned import read_plan
from ttt3r.config import COMPACT
from ttt3r.parity import synthetic_model
from ttt3r.weights_file import WeightsInfo, save_weights

NETWORK = replace(COMPACT, enc_embed_dim=384, enc_depth=12, dec_embed_dim=384, dec_depth=8)
SEGMENT_FRAMES, CHUNK_FRAMES = 24, 24


def make_weights(path: Path) -> Path:
    """Synthetic weights of the benchmark's network."""
    model = synthetic_model(NETWORK, weight_seed=1, qk_gain=1.0, device="cpu")
    info = WeightsInfo(
        name="fan-out",
        config=NETWORK,
        sha256="",
        licence="none",
        source="synthetic",
        segment_frames=SEGMENT_FRAMES,
        trained=False,
    )
    save_weights(path, model, info)
    return path


def seconds_between(earlier: str, later: str) -> float:
    """Between two times as Prefect's API writes them."""
    times = (datetime.fromisoformat(t.replace("Z", "+00:00")) for t in (earlier, later))
    first, last = times
    return (last - first).total_seconds()


def measure(
    fleet: LocalFleet, video: Path, weights: Path, output: Path, workers: int, groups: int
) -> dict[str, Any]:
    """Reconstruct the drive with so many workers of the pool gpu."""
    names = [f"gpu-{i}" for i in range(workers)]
    for name in names:
        fleet.start_worker("gpu", name, "--limit", "1")
    time.sleep(20)  # they are up and ask for work
    plan = {"chunk_frames": CHUNK_FRAMES}
    infer = {"weights": str(weights), "lanes": 4, "segments_per_task": groups, "frames_per_run": 1}
    fuse = {"frame_step": 4}
    given = {"location": str(video), "output": str(output / str(workers))}
    run_id = fleet.run(
        "reconstruct-drive/fleet", {**given, "config": {"plan": plan, "infer": infer, "fuse": fuse}}
    )
    ended = fleet.wait_for(run_id, 3600)
    if ended["state_type"] != "COMPLETED":
        raise RuntimeError(f"the drive's run ended {ended['state_name']}: {ended['state']}")
    store = ReconstructionStore.open(f"{output}/{workers}/{video.stem}.zarr")
    runs = [
        run for run in fleet.flow_runs("infer-segments") if run["parameters"]["url"] == store.url
    ]
    busy = sum(
        record.get("infer_seconds", 0.0) + record.get("wait_seconds", 0.0)
        for record in store.commits("infer").values()
    )
    held = [held_seconds(fleet, run) for run in runs]
    first, last = min(r["created"] for r in runs), max(r["end_time"] for r in runs)
    for name in names:
        fleet.stop_worker(name)
    return {
        "workers": workers,
        "segments": len(read_plan(store).segments),
        "runs": len(runs),
        "infer_seconds": seconds_between(first, last),
        "drive_seconds": seconds_between(ended["start_time"], ended["end_time"]),
        "slot_held_seconds": sum(held) / len(held),
        "overhead_seconds": (sum(held) - busy) / len(held),
    }


def held_seconds(fleet: LocalFleet, run: dict[str, Any]) -> float:
    """How long a run held its slot: from Pending to its end."""
    states = fleet.get(f"flow_run_states/?flow_run_id={run['id']}")
    pending = min(state["timestamp"] for state in states if state["type"] == "PENDING")
    return seconds_between(pending, run["end_time"])


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=582)
    parser.add_argument("--segments-per-run", type=int, default=8)
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = make_weights(folder / "fan-out.safetensors")
        video = write_video(folder / "squares.mp4", moving_squares(settings.frames, 60, 80))
        rows = []
        with running_fleet(folder / "fleet", gpu_slots=2, extra={}) as fleet:
            fleet.start_worker("cpu", "cpu")
            for workers in (1, 2):
                group = settings.segments_per_run
                rows.append(measure(fleet, video, weights, folder / "out", workers, group))
                print(json.dumps(rows[-1]), flush=True)
    for what in ("infer_seconds", "drive_seconds"):
        print(f"{what}: two workers {rows[0][what] / rows[1][what]:.2f} times as fast as one")
    if settings.json:
        settings.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
