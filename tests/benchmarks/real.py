"""Accuracy of the whole pipeline on recordings with ground truth, beside two empty guesses.

    python tests/benchmarks/real.py --data ../shared/data --weights compact untrained --json FILE

`constant velocity` is a camera that drives straight on at one speed: what a Sim(3) fit makes of it
is the least that any figure has to beat.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from flows.prefect_home import quiet_prefect
from tasks.config import InferConfig, ReconstructionConfig
from tasks.evaluate import evaluate_store
from ttt3r.metrics import evaluate_trajectory, read_tum

SEQUENCES = {
    "KITTI 03, 500 frames": ("kitti03_head", None),
    "7-Scenes, 1000 frames": ("sevenscenes_1000", "depth"),
}
SHOWN = ("ate_sim3_m", "rpe_trans_m", "rpe_rot_deg", "kitti_t_rel_percent", "abs_rel", "delta_125")


def constant_velocity(truth: Path) -> dict[str, float | int | None]:
    """Figures of a straight path at one speed."""
    _, poses = read_tum(truth)
    guess = np.tile(np.eye(4), (len(poses), 1, 1))
    guess[:, 2, 3] = np.arange(len(poses))
    return evaluate_trajectory(guess, poses)


def reconstruct(folder: Path, depth: str | None, weights: str) -> dict[str, float | int | None]:
    """Figures of the whole pipeline."""
    from flows.reconstruct_drive import reconstruct_drive

    with tempfile.TemporaryDirectory() as output:
        config = ReconstructionConfig(infer=InferConfig(weights=weights))
        url = reconstruct_drive(str(folder / "video.mp4"), output, config)
        truth = folder / "groundtruth_tum.txt"
        return evaluate_store(url, str(truth), "tum", depth and str(folder / depth))


def table(rows: list[dict[str, object]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| sequence | network | " + " | ".join(("distance_m", *SHOWN)) + " |"]
    lines.append("|" + "---|" * (3 + len(SHOWN)))
    for row in rows:
        values = [row.get(name) for name in ("distance_m", *SHOWN)]
        shown = ["-" if v is None else f"{v:.3g}" for v in values]
        lines.append(f"| {row['sequence']} | {row['network']} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", nargs="+", default=["compact", "untrained"])
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    quiet_prefect()  # before Prefect is imported
    rows: list[dict[str, object]] = []
    for sequence, (name, depth) in SEQUENCES.items():
        folder = settings.data / name
        guess = constant_velocity(folder / "groundtruth_tum.txt")
        rows.append({"sequence": sequence, "network": "constant velocity", **guess})
        for weights in settings.weights:
            figures = reconstruct(folder, depth, weights)
            rows.append({"sequence": sequence, "network": weights, **figures})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if settings.json:
        settings.json.write_text(json.dumps({"results": rows}, indent=2))


if __name__ == "__main__":
    main()
