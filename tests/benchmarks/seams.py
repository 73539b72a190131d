"""How much a seam tells of the scale between two segments, and how much it claims to tell.

Held-out streets are cut into segments, of which the true scales are known from the rendered depth:
the error of a seam is what it measures less what is true. Printed by quarters of the seams, from
those that claim most to those that claim least. All numbers are logarithms.

    python tests/benchmarks/seams.py --segment-frames 16 --overlap 4 --rule ttt3r --seed 2
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from length import Piece, fit_seam, one_by_one, see_segments

from ttt3r.model import Model
from ttt3r.weights import load_model

FAR = 60.0  # metres; depth beyond says nothing here
QUARTERS = 4


def true_scales(
    points: list[np.ndarray], starts: list[int], depth: np.ndarray, frames: int
) -> np.ndarray:
    """[K] log of what takes each segment's depth to the true one, [N, h, w], inf at sky."""
    scales = []
    for start, segment in zip(starts, points, strict=True):
        truth = depth[start : start + frames]
        said = segment[: len(truth), ..., 2]
        near = truth < FAR
        scales.append(float(np.median(np.log(truth[near] / said[near]))))
    return np.array(scales)


def measure(
    model: Model, offset: float, rule: str, pieces: list[Piece], length: int, overlap: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of one drive: claimed and true errors of its seams [K-1, 2], and scales of segments [K]."""
    images = np.concatenate([piece[0][0] for piece in pieces])
    depth = np.concatenate([piece[2][0] for piece in pieces if piece[2] is not None])
    starts, parts = see_segments(model, offset, rule, images, length, overlap)
    scales = true_scales([points for _, points, _ in parts], starts, depth, length)
    fits = [fit_seam(a, b, length - overlap) for a, b in pairwise(parts)]
    errors = np.log([fit.scale for fit in fits]) - np.diff(scales)
    return np.stack([[fit.scale_sigma for fit in fits], errors], axis=1), scales


def summary(seams: np.ndarray, scales: list[np.ndarray]) -> dict[str, Any]:
    """Figures of all seams [n, 2] and of the segments of each drive."""
    order = seams[np.argsort(seams[:, 0])]
    quarters = [
        {"claimed": [float(q[0, 0]), float(q[-1, 0])], "rms": float(np.sqrt((q[:, 1] ** 2).mean()))}
        for q in np.array_split(order, QUARTERS)
    ]
    return {
        "seams": len(seams),
        "claimed": float(np.median(seams[:, 0])),
        "rms": float(np.sqrt((seams[:, 1] ** 2).mean())),
        "mean": float(seams[:, 1].mean()),
        "quarters": quarters,
        "segments_within_drives": float(np.mean([x.std() for x in scales])),
        "drives": float(np.std([x.mean() for x in scales])),
    }


def main(arguments: list[str]) -> int:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="compact")
    parser.add_argument("--rule", default="ttt3r")
    parser.add_argument("--segment-frames", type=int, default=16)
    parser.add_argument("--overlap", type=int, default=4)
    parser.add_argument("--seed", type=int, default=2, help="which held-out drives")
    parser.add_argument("--sequences", type=int, default=12)
    parser.add_argument("--metres", type=float, default=500.0)
    parser.add_argument("--frames", type=int, nargs="+", default=[1000], help="at most, a drive")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.world, options.video = "streets", None
    model, info = load_model(options.weights)
    seams, scales = [], []
    for pieces in one_by_one(options, (model.config.image_size, model.config.patch_size)):
        of_drive, of_segments = measure(
            model,
            info.principal_offset,
            options.rule,
            pieces,
            options.segment_frames,
            options.overlap,
        )
        seams.append(of_drive)
        scales.append(of_segments)
    if sum(map(len, seams)) < QUARTERS:
        parser.error(f"fewer than {QUARTERS} seams; ask for longer or more drives")
    found = summary(np.concatenate(seams), scales)
    print("| claimed | error, rms |\n|---|---|")
    for q in found["quarters"]:
        print(f"| {q['claimed'][0]:.3f} to {q['claimed'][1]:.3f} | {q['rms']:.3f} |")
    print(
        f"{found['seams']} seams: claimed {found['claimed']:.4f} (median), error "
        f"{found['rms']:.4f} rms, {found['mean']:+.4f} in the mean; segments of a drive differ by "
        f"{found['segments_within_drives']:.3f}, drives by {found['drives']:.3f}"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
