"""How far bfloat16 is from float32 over long sequences: poses, depth, trajectory error.

    python tests/benchmarks/precision.py --frames 200 --json FILE

Golden-style networks (the configurations of tests/golden, synthetic weights) see noise that moves;
the bundled compact network sees held-out rendered streets and rooms, whose true trajectories
give an ATE at either precision.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttt3r.config import ModelConfig
from ttt3r.geometry import camera_pose_to_matrix
from ttt3r.images import fit
from ttt3r.metrics import ate, path_lengths
from ttt3r.model import Model
from ttt3r.stream import Stream
from ttt3r.synthetic import HELD_OUT_SEED, render_chunks
from ttt3r.synthetic_weights import synthetic_tensor
from ttt3r.weights import load_model
from ttt3r.weights_file import build_model, empty_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = ("dpt_landscape_ttt3r", "linear_square_ttt3r", "compact streets", "compact rooms")
_SOURCE = {"streets": (960, 540), "rooms": (640, 480)}
_CHUNK = 20


def golden_model(name: str, dtype: torch.dtype) -> tuple[Model, dict[str, Any]]:
    """The network of a recorded sequence, and that file's settings."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
        settings = json.loads(str(archive["config_json"]))
    known = {k: v for k, v in settings.items() if k in ModelConfig.__dataclass_fields__}
    config = ModelConfig(**known, ray_map_encoder=False)
    tensors = {
        n: torch.from_numpy(
            synthetic_tensor(n, p.shape, settings["weight_seed"], settings["qk_gain"])
        )
        for n, p in empty_model(config).named_parameters()
    }
    return build_model(config, tensors, dtype).eval(), settings


def noise(frames: int, height: int, width: int) -> np.ndarray:
    """Images [1, T, h, w, 3] uint8: coarse noise that drifts by a pixel a frame."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 8, (width + frames) // 8 + 1, 3), np.uint8)
    wide = coarse.repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([wide[:, t : t + width] for t in range(frames)])[None]


def measure(case: str, frames: int, device: str = "cpu") -> dict[str, float]:
    """Differences between bfloat16 and float32 in one case, both on `device`."""
    truth = None
    if case in CASES[:2]:
        make: Callable[[torch.dtype], Model] = lambda dtype: golden_model(case, dtype)[0]  # noqa: E731
        settings = golden_model(case, torch.float32)[1]
        images = noise(frames, settings["height"], settings["width"])
    else:
        make = lambda dtype: load_model("compact", dtype=dtype)[0]  # noqa: E731
        images, truth = rendered(case.split()[1], frames, make(torch.float32).config)
    exact, rounded = (
        run(make(dtype).to(device), images) for dtype in (torch.float32, torch.bfloat16)
    )
    return compare(exact, rounded, truth)


def rendered(world: str, frames: int, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Images [1, T, h, w, 3] and poses [T, 4, 4] of one held-out world."""
    view = fit(*_SOURCE[world], config.image_size, config.patch_size)
    seeds = range(HELD_OUT_SEED + 7, HELD_OUT_SEED + 8)
    pieces = list(
        render_chunks(world, seeds, frames, view.height, view.width, chunk_frames=_CHUNK)  # type: ignore[arg-type]
    )
    images = np.concatenate([p.images[0].numpy() for p in pieces])
    return images[None], np.concatenate([p.T_world_cam[0].double().numpy() for p in pieces])


def run(model: Model, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Poses [T, 4, 4] and distances [T, H, W] of every pixel, from one stream."""
    stream, poses, distances = Stream(model), [], []
    for start in range(0, images.shape[1], _CHUNK):
        said = stream.feed(images[:, start : start + _CHUNK])
        assert said.pointmap_cam is not None
        poses.append(camera_pose_to_matrix(said.camera_pose[0]).double().cpu().numpy())
        distances.append(said.pointmap_cam[0].norm(dim=-1).cpu().numpy())
    return np.concatenate(poses), np.concatenate(distances)


Run = tuple[np.ndarray, np.ndarray]


def compare(exact: Run, rounded: Run, truth: np.ndarray | None) -> dict[str, float]:
    """Figures of the second run relative to the first; NaN-free or the comparison is void."""
    turn = np.einsum("tji,tjk->tik", exact[0][:, :3, :3], rounded[0][:, :3, :3])
    angle = np.degrees(np.arccos(np.clip((np.trace(turn, axis1=1, axis2=2) - 1) / 2, -1, 1)))
    moved = np.linalg.norm(exact[0][:, :3, 3] - rounded[0][:, :3, 3], axis=1)
    extent = np.linalg.norm(exact[0][:, :3, 3] - exact[0][0, :3, 3], axis=1).max()
    depth = np.abs(rounded[1] / exact[1] - 1)
    found = {
        "rotation_deg_max": float(angle.max()),
        "translation_max_of_extent": float(moved.max() / extent),
        "depth_relative_median": float(np.median(depth)),
        "depth_relative_p95": float(np.quantile(depth, 0.95)),
    }
    if truth is not None:
        length = float(path_lengths(truth)[-1])
        found["ate_of_length_float32"] = ate(exact[0], truth) / length
        found["ate_of_length_bfloat16"] = ate(rounded[0], truth) / length
    return found


def main() -> None:
    """Run all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for case in args.cases:
        rows.append(
            {"case": case, "frames": args.frames, **measure(case, args.frames, args.device)}
        )
        print(
            "  ".join(
                f"{k} {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in rows[-1].items()
            )
        )
    if args.json:
        args.json.write_text(json.dumps({"results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
