"""Lenses, and how a camera turns light into an 8-bit picture."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from ttt3r.synthetic.dice import Dice

_NOISE = 1 << 20  # values in the table of normal noise


def draw_intrinsics(dice: Dice, height: int, width: int) -> Tensor:
    """Pinhole matrices [B, 3, 3] with horizontal fields of view of 45 to 110 degrees.

    Square pixels. Tall pictures get a narrower view, so that the vertical one stays below
    85 degrees. The principal point is within 1.5 % of the middle.
    """
    widest = min(110.0, 2 * math.degrees(math.atan(math.tan(math.radians(42.5)) * width / height)))
    view = torch.deg2rad(dice.uniform("field of view", min(45.0, 0.7 * widest), widest))
    focal = 0.5 * width / torch.tan(0.5 * view)
    intrinsics = torch.zeros(dice.count, 3, 3, device=dice.device)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    intrinsics[:, 0, 2] = (width - 1) / 2 + width * dice.uniform("centre x", -0.015, 0.015)
    intrinsics[:, 1, 2] = (height - 1) / 2 + height * dice.uniform("centre y", -0.015, 0.015)
    intrinsics[:, 2, 2] = 1.0
    return intrinsics


def look(heading: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Rotation camera to world [..., 3, 3]; pitch lifts the view, roll tips it to the right.

    World axes are right, down, forward at heading 0; headings turn to the right. Radians.
    """
    heading, pitch, roll = torch.broadcast_tensors(heading, pitch, roll)
    zero, one = torch.zeros_like(heading), torch.ones_like(heading)

    def matrix(*values: Tensor) -> Tensor:
        return torch.stack(values, dim=-1).unflatten(-1, (3, 3))

    sin, cos = torch.sin(heading), torch.cos(heading)
    turn = matrix(cos, zero, sin, zero, one, zero, -sin, zero, cos)
    sin, cos = torch.sin(pitch), torch.cos(pitch)
    lift = matrix(one, zero, zero, zero, cos, -sin, zero, sin, cos)
    sin, cos = torch.sin(roll), torch.cos(roll)
    tip = matrix(cos, -sin, zero, sin, cos, zero, zero, zero, one)
    return turn @ lift @ tip


class Film:
    """Exposure, colour, lens and noise of each sequence, with a slow drift over time."""

    def __init__(self, dice: Dice, *, clean: bool) -> None:
        """`clean` leaves only a fixed exposure and gamma: no noise, blur, vignette or drift."""
        self._dice, self._clean = dice, clean
        self._gain = dice.log_uniform("exposure", 0.65, 1.5)
        self._gamma = dice.uniform("gamma", 0.38, 0.52)
        balance = [dice.log_uniform(f"balance {name}", 0.88, 1.13) for name in "rgb"]
        self._balance = torch.stack(balance, dim=-1)
        self._vignette = dice.uniform("vignette", 0.0, 0.35)
        self._blur = (dice.uniform("blur", -0.15, 0.45)).clamp(min=0)
        self._noise = dice.log_uniform("noise", 0.3, 5.0)
        self._grey = dice.chance("grey", 0.15)

    def develop(self, radiance: Tensor, start: int) -> Tensor:
        """Linear RGB [3, B, T, H, W] of frames start.. to uint8 [B, T, H, W, 3]."""
        frames, height, width = radiance.shape[2:]
        clock = torch.arange(start, start + frames, device=radiance.device)
        colour = radiance * self._exposure(clock, frames)
        if not self._clean:
            colour *= self._falloff(height, width)
            colour = _soften(colour, self._blur)
        curve = self._gamma.reshape(-1, 1, 1, 1)
        colour = colour.clamp_(1e-6, 1.0).log_().mul_(curve).exp_().mul_(255.0)
        if not self._clean:
            colour += self._grain(clock, height, width)
            grey = (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2])[None]
            colour = torch.where(self._grey.reshape(-1, 1, 1, 1), grey, colour)
        colour = colour.add_(0.5).clamp_(0, 255).to(torch.uint8)
        return colour.permute(1, 2, 3, 4, 0).contiguous()

    def _exposure(self, clock: Tensor, frames: int) -> Tensor:
        """Gain [3, B, T, 1, 1]."""
        gain = self._gain[:, None].expand(-1, frames)
        if not self._clean:
            drift = self._dice.noise("drift", (clock / 25.0)[None].expand(len(gain), -1))
            gain = gain * torch.exp(0.12 * drift)
        tint = torch.ones_like(self._balance) if self._clean else self._balance
        return (tint.t()[..., None] * gain)[..., None, None]

    def _falloff(self, height: int, width: int) -> Tensor:
        """Vignette [B, 1, H, W]."""
        y = torch.linspace(-1, 1, height, device=self._gain.device)
        x = torch.linspace(-1, 1, width, device=self._gain.device)
        radius = (x**2)[None] + (y**2)[:, None]
        return 1 - 0.5 * self._vignette.reshape(-1, 1, 1, 1) * radius

    def _grain(self, clock: Tensor, height: int, width: int) -> Tensor:
        """Sensor noise [3, B, T, H, W]: slices of one table, from a place drawn per frame."""
        count = height * width * 3
        table = _noise_table(str(clock.device))
        clock = clock[None].expand(len(self._gain), -1)
        first = (self._dice.unit("grain", clock) * len(table)).long().flatten().tolist()
        table = torch.cat([table] * (2 + count // len(table)))
        slices = torch.stack([table[place : place + count] for place in first])
        grain = slices.reshape(*clock.shape, 3, height, width).permute(2, 0, 1, 3, 4)
        return grain * self._noise.reshape(-1, 1, 1, 1)


@cache
def _noise_table(device: str) -> Tensor:
    return torch.randn(_NOISE, generator=torch.Generator().manual_seed(7)).to(device)


def _soften(colour: Tensor, strength: Tensor) -> Tensor:
    """Blur [3, B, T, H, W] with the kernel (s/4, 1 - s/2, s/4) both ways; edges repeat."""
    share = 0.25 * strength.reshape(-1, 1, 1, 1)
    for axis in (3, 4):
        size = colour.shape[axis]
        side = colour * share
        colour = colour - 2 * side
        colour.narrow(axis, 1, size - 1).add_(side.narrow(axis, 0, size - 1))
        colour.narrow(axis, 0, size - 1).add_(side.narrow(axis, 1, size - 1))
        colour.narrow(axis, 0, 1).add_(side.narrow(axis, 0, 1))
        colour.narrow(axis, size - 1, 1).add_(side.narrow(axis, size - 1, 1))
    return colour
