"""What weights have learnt, part by part: motion by axis, depth by distance and by frame.

Held-out worlds, in sequences as long as those of training. Of each axis of the motion between
neighbouring frames: its size, the error of what the network says, their correlation, and the gain
(how much of the true motion is said, by least squares). Shifted windows of stills
(`ttt3r.training.lesson`) tell whether the network matches sideways and up and down at all.

    python tests/benchmarks/learnt.py --weights compact --frames 16 --sequences 48
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt3r.geometry import camera_pose_to_matrix
from ttt3r.images import fit
from ttt3r.model import Model
from ttt3r.synthetic import HELD_OUT_SEED, WorldName, render
from ttt3r.training.lesson import draw_windows
from ttt3r.training.losses import Targets, neighbour_motion
from ttt3r.training.validation import motion_gain
from ttt3r.weights import load_model

SEED = HELD_OUT_SEED + 700_000
SOURCE = {"streets": (960, 540), "rooms": (640, 480)}  # pixels of the cameras that are imitated
DISTANCES = (0.0, 3.0, 6.0, 12.0, 25.0, 50.0, 200.0)  # metres
REACH = 8  # pixels that windows are shifted by
TURNS, WAYS = ("yaw", "pitch", "roll"), ("right", "down", "forward")


def motion_rows(found: Tensor, truth: Tensor) -> list[dict[str, Any]]:
    """One row an axis of motions [L, T, 4, 4]: degrees and metres, between neighbours."""
    said, true = neighbour_motion(found), neighbour_motion(truth)
    parts = [
        *zip(TURNS, turns(said).unbind(-1), turns(true).unbind(-1), strict=True),
        *zip(WAYS, said[..., :3, 3].unbind(-1), true[..., :3, 3].unbind(-1), strict=True),
    ]
    return [{"axis": name} | compared(a.flatten(), b.flatten()) for name, a, b in parts]


def turns(T: Tensor) -> Tensor:
    """Yaw, pitch and roll [..., 3] of small rotations, degrees."""
    R = T[..., :3, :3]
    yaw, pitch = torch.atan2(R[..., 0, 2], R[..., 2, 2]), torch.asin(-R[..., 1, 2].clamp(-1, 1))
    roll = torch.atan2(R[..., 1, 0], R[..., 1, 1])
    return torch.rad2deg(torch.stack([yaw, pitch, roll], dim=-1))


def compared(said: Tensor, true: Tensor) -> dict[str, float]:
    """Root mean squares of the truth and of the error, correlation and gain."""
    return {
        "true": float(true.square().mean().sqrt()),
        "error": float((said - true).square().mean().sqrt()),
        "correlation": float(torch.corrcoef(torch.stack([said, true]))[0, 1]),
        "gain": float(motion_gain(said, true)),
    }


def depth_rows(depth: Tensor, truth: Tensor, valid: Tensor) -> dict[str, Any]:
    """abs rel after one median scale a sequence, of all, by distance and by frame."""
    scales = [(t[v] / d[v]).median() for d, t, v in zip(depth, truth, valid, strict=True)]
    error = (depth * torch.stack(scales)[:, None, None, None] - truth) / truth
    bands = {}
    for near, far in pairwise(DISTANCES):
        inside = valid & (truth >= near) & (truth < far)
        if inside.any():
            bands[f"{near:g}-{far:g} m"] = {
                "share": float(inside.sum() / valid.sum()),
                "abs_rel": float(error[inside].abs().mean()),
                "bias": float(error[inside].mean()),
            }
    frames = [float(error[:, t][valid[:, t]].abs().mean()) for t in range(error.shape[1])]
    whole = error[valid].abs()
    return {
        "abs_rel": float(whole.mean()),
        "median": float(whole.median()),
        "by_distance": bands,
        "by_frame": frames,
    }


def measure(
    model: Model, world: WorldName, rule: str, frames: int, sequences: int
) -> dict[str, Any]:
    """All figures of one world under one rule."""
    view = fit(*SOURCE[world], model.config.image_size, model.config.patch_size)
    seen = render(
        world, range(SEED, SEED + sequences), frames, view.height, view.width, supersample=2,
    )  # fmt: skip
    truth = Targets.build(seen.depth, seen.valid, seen.T_world_cam, seen.intrinsics)
    images = seen.images.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    windows, shifts = draw_windows(
        world, range(SEED, SEED + sequences), view.height, view.width, REACH, supersample=2,
    )  # fmt: skip
    with torch.inference_mode():
        found, _ = model.run(images, rule=rule, outputs=frozenset({"cam"}))
        shifted, _ = model.run(windows, rule=rule, outputs=frozenset())
    assert found.pointmap_cam is not None
    depth, true_depth = found.pointmap_cam[..., 2], truth.pointmap_cam[..., 2]
    return {
        "world": world,
        "rule": rule,
        "motion": motion_rows(camera_pose_to_matrix(found.camera_pose), truth.T_seg_cam),
        "windows": motion_rows(camera_pose_to_matrix(shifted.camera_pose), shifts)[:2],
        "depth": depth_rows(depth, true_depth, truth.valid),
    }


def report(row: dict[str, Any]) -> str:
    """The figures of one world and rule as Markdown."""
    lines = [f"{row['world']}, {row['rule']}", "", "| | true | error | correlation | gain |"]
    lines.append("|---" * 5 + "|")
    for name, parts in (("", row["motion"]), ("windows: ", row["windows"])):
        for part in parts:
            unit = "deg" if part["axis"] in TURNS else "m"
            lines.append(
                f"| {name}{part['axis']} {unit} | {part['true']:.3g} | {part['error']:.3g} | "
                f"{part['correlation']:.2f} | {part['gain']:.2f} |"
            )
    depth = row["depth"]
    lines.append(f"\nabs rel {depth['abs_rel']:.3f}, median {depth['median']:.3f}; by distance:")
    for band, value in depth["by_distance"].items():
        lines.append(
            f"  {band}: {value['abs_rel']:.3f} (bias {value['bias']:+.3f}) of {value['share']:.0%}"
        )
    frames = depth["by_frame"]
    lines.append(f"first frame {frames[0]:.3f}, last {frames[-1]:.3f}\n")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="compact")
    parser.add_argument("--worlds", nargs="+", choices=sorted(SOURCE), default=sorted(SOURCE))
    parser.add_argument("--rules", nargs="+", default=["cut3r", "ttt3r"])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    model, _ = load_model(options.weights)
    rows = []
    for world in options.worlds:
        for rule in options.rules:
            rows.append(measure(model, world, rule, options.frames, options.sequences))
            print(report(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"results": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
