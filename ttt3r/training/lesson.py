"""The first lesson: two windows of one still picture; how far did the window move?

Poses of rendered pairs teach matching between views very slowly: a natural motion shifts a small
picture by less than a pixel, and depth and focal length blur what it means. Here every patch
votes for the same two numbers. On a CPU matching emerges within some 50,000 frames; without the
lesson 60,000 frames of rendered pairs and sequences had not brought it about.

A window that moves right by d pixels passes for a camera that turns right by d / 30 radians: the
network answers with its pose head, and goes on from there to real motion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt3r.geometry import camera_pose_to_matrix
from ttt3r.model import Predictions
from ttt3r.synthetic import WorldName, render
from ttt3r.training.losses import LossWeights, gate_loss

FOCAL = 30.0  # pixels that stand for one radian
WINDOWS = 4  # pairs from one picture
_NOISE = 0.02
_GAIN = 0.1
_TURN_WEIGHT, _STAY_WEIGHT = 20.0, 0.5


def draw_windows(
    world: WorldName,
    seeds: range,
    height: int,
    width: int,
    reach: int,
    *,
    device: torch.device | str = "cpu",
    supersample: int = 1,
) -> tuple[Tensor, Tensor]:
    """Pairs of windows and how the camera seems to turn between them.

    Args:
        world: where the pictures are taken.
        seeds: one picture each, used for four pairs.
        height: of a window, pixels.
        width: of a window, pixels.
        reach: largest shift in either direction, pixels.
        device: where to render.
        supersample: squared rays a pixel.

    Returns:
        images [L, 2, 3, height, width] in [-1, 1], and T_world_cam [L, 2, 4, 4].
    """
    seen = render(
        world, seeds, 1, height + 3 * reach, width + 4 * reach,
        device=device, supersample=supersample,
    )  # fmt: skip
    pictures = seen.images[:, 0].permute(0, 3, 1, 2).float() / 127.5 - 1
    random = torch.Generator().manual_seed(seeds.start)
    lanes = len(seeds) * WINDOWS
    shift = torch.randint(-reach, reach + 1, (lanes, 2), generator=random)
    spare = torch.tensor([reach, 2 * reach])  # beyond what shifts need: the first one's freedom
    first = reach + (torch.rand(lanes, 2, generator=random) * (spare + 1)).long()
    images = torch.stack(
        [
            torch.stack([_window(pictures[k // WINDOWS], place, height, width) for place in pair])
            for k, pair in enumerate(torch.stack([first, first + shift], dim=1).tolist())
        ]
    )
    gain = 1 + _GAIN * (2 * torch.rand(lanes, 2, 1, 1, 1, generator=random) - 1)
    noise = _NOISE * torch.randn(images.shape, generator=random)
    return images * gain.to(images.device) + noise.to(images.device), _turns(shift).to(device)


def _window(picture: Tensor, place: list[int], height: int, width: int) -> Tensor:
    top, left = place
    return picture[:, top : top + height, left : left + width]


def _turns(shift: Tensor) -> Tensor:
    """Poses [L, 2, 4, 4] that shifts [L, 2] (down, right) pass for."""
    down, right = (shift / FOCAL).unbind(dim=-1)
    zero, one = torch.zeros_like(down), torch.ones_like(down)
    yaw = [right.cos(), zero, right.sin(), zero, one, zero, -right.sin(), zero, right.cos()]
    pitch = [one, zero, zero, zero, down.cos(), down.sin(), zero, -down.sin(), down.cos()]
    T = torch.eye(4).repeat(len(shift), 2, 1, 1)
    turned = [torch.stack(values, dim=-1).unflatten(-1, (3, 3)) for values in (yaw, pitch)]
    T[:, 1, :3, :3] = turned[0] @ turned[1]
    return T


def lesson_loss(
    found: Predictions, T: Tensor, weights: LossWeights
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error of the turn, so that wide shifts lead; the camera itself must stay."""
    if found.trace is None:
        raise ValueError('the lesson needs predictions with the output "trace"')
    said = camera_pose_to_matrix(found.camera_pose)
    parts = {
        "turn": (said - T)[..., :3, :3].square().sum(dim=(-1, -2)).mean() / 2,
        "stay": (said[..., :3, 3].square().sum(dim=-1) + 1e-8).sqrt().mean(),
        "gate": gate_loss(found.trace.gate_logits, weights.gate_logit),
    }
    total = _TURN_WEIGHT * parts["turn"] + _STAY_WEIGHT * parts["stay"]
    return total + weights.gate * parts["gate"], parts
