"""How well the network does on worlds it never trains on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt3r.geometry import camera_pose_to_matrix
from ttt3r.model import Model, Predictions
from ttt3r.synthetic import HELD_OUT_SEED, WorldName, render
from ttt3r.training.losses import FAR, Targets, neighbour_motion

_SEED = HELD_OUT_SEED + 500_000  # well away from the benchmarks' seeds


@dataclass(frozen=True)
class Trial:
    """One set of held-out sequences."""

    world: WorldName
    frames: int
    height: int
    width: int
    count: int
    motion: float = 1.0


def validate(model: Model, trial: Trial, rule: str = "cut3r") -> dict[str, float]:
    """Errors of `model` on `trial`; ratios of 1 mean no better than the guess named.

    Keys: `abs_rel` of the depth after one median scale a sequence, `point` (relative error),
    `moved` (error of all camera positions over that of "has not moved"), `turned` (same for
    rotation), `step_moved` and `step_turned` (same between neighbouring frames), `constant`
    (error of a step over that of the best constant step), `turn_gain` and `move_gain` (how much
    of the true motion is said, by least squares: below 1 understates), `confidence` (mean),
    `gate_median`, `gate_low`, `gate_high` (deciles of the TTT3R rate).
    """
    seen = render(
        trial.world, range(_SEED, _SEED + trial.count), trial.frames, trial.height, trial.width,
        device=model.device, motion=trial.motion, supersample=2,
    )  # fmt: skip
    targets = Targets.build(seen.depth, seen.valid, seen.T_world_cam, seen.intrinsics)
    images = seen.images.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    with torch.inference_mode():
        found, _ = model.run(images, rule=rule, outputs=frozenset({"cam", "trace"}))
        return {k: float(v) for k, v in _measure(found, targets).items()}


def _measure(found: Predictions, truth: Targets) -> dict[str, Tensor]:
    assert found.pointmap_cam is not None
    assert found.confidence is not None
    assert found.trace is not None
    T = camera_pose_to_matrix(found.camera_pose)
    steps, true_steps = neighbour_motion(T), neighbour_motion(truth.T_seg_cam)
    depth, true_depth = found.pointmap_cam[..., 2], truth.pointmap_cam[..., 2]
    away = (found.pointmap_cam - truth.pointmap_cam).norm(dim=-1)
    relative = away / (truth.pointmap_cam.norm(dim=-1) + 1)
    rates = torch.sigmoid(found.trace.gate_logits[:, 1:]).flatten()
    deciles = torch.quantile(rates, torch.tensor([0.1, 0.5, 0.9], device=rates.device))
    position = true_steps[..., :3, 3]
    eye = torch.eye(3, device=T.device)
    return {
        "abs_rel": torch.stack(
            [_abs_rel(d[v], t[v]) for d, t, v in zip(depth, true_depth, truth.valid, strict=True)]
        ).mean(),
        "point": relative[truth.valid].mean(),
        "confidence": found.confidence[truth.valid].mean(),
        "moved": _ratio(T[:, 1:], truth.T_seg_cam[:, 1:]),
        "turned": _turn_ratio(T[:, 1:], truth.T_seg_cam[:, 1:]),
        "turn_gain": motion_gain(T[..., :3, :3] - eye, truth.T_seg_cam[..., :3, :3] - eye),
        "move_gain": motion_gain(T[..., :3, 3], truth.T_seg_cam[..., :3, 3]),
        "step_moved": _ratio(steps, true_steps),
        "step_turned": _turn_ratio(steps, true_steps),
        "constant": (steps[..., :3, 3] - position).norm(dim=-1).mean()
        / (position - position.flatten(0, 1).median(dim=0).values).norm(dim=-1).mean(),
        "gate_low": deciles[0],
        "gate_median": deciles[1],
        "gate_high": deciles[2],
    }


def _abs_rel(depth: Tensor, truth: Tensor) -> Tensor:
    return (depth * (truth.median() / depth.median()) / truth - 1).abs().mean()


def _ratio(T: Tensor, truth: Tensor) -> Tensor:
    error = (T - truth)[..., :3, 3].norm(dim=-1).mean()
    return error / truth[..., :3, 3].norm(dim=-1).mean().clamp(min=1e-6)


def motion_gain(said: Tensor, true: Tensor) -> Tensor:
    """The factor that makes `said` of `true`, by least squares; any shape."""
    return (said * true).sum() / true.square().sum().clamp(min=1e-12)


def _turn_ratio(T: Tensor, truth: Tensor) -> Tensor:
    eye = torch.eye(3, device=truth.device)
    error = (T - truth)[..., :3, :3].flatten(-2).norm(dim=-1).mean()
    return error / (truth[..., :3, :3] - eye).flatten(-2).norm(dim=-1).mean().clamp(min=1e-6)


__all__ = ["FAR", "Trial", "validate"]
