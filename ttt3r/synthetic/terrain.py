"""The ground that streets run over: hills, as triangles on a square grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttt3r.synthetic import texture
from ttt3r.synthetic.dice import Dice
from ttt3r.synthetic.solids import ON_ROAD, TRIANGLE, Solids, make_solids, paint

CELL = 20.0  # side of the squares, metres


class Hills:
    """Ground height as a function of place, two long waves, triangulated on a square grid."""

    def __init__(self, dice: Dice) -> None:
        flat = dice.chance("flat", 0.25)
        self._waves = []
        for wave, (short, long) in enumerate(((260.0, 420.0), (450.0, 900.0))):
            angle = dice.uniform(f"hill angle {wave}", 0, 2 * math.pi)
            rate = 2 * math.pi / dice.uniform(f"hill length {wave}", short, long)
            slope = torch.where(flat, 0.0, dice.uniform(f"hill slope {wave}", 0.005, 0.04))
            phase = dice.uniform(f"hill phase {wave}", 0, 2 * math.pi)
            self._waves.append((slope / rate, rate * angle.cos(), rate * angle.sin(), phase))

    def height(self, x: Tensor, z: Tensor) -> Tensor:
        """Smooth ground height [B, ...] at world places [B, ...], metres upwards."""
        total = torch.zeros_like(x)
        for size, rate_x, rate_z, phase in self._waves:
            values = (v.reshape(-1, *[1] * (x.ndim - 1)) for v in (size, rate_x, rate_z, phase))
            tall, kx, kz, start = values
            total = total + tall * torch.sin(kx * x + kz * z + start)
        return total

    def ground(self, x: Tensor, z: Tensor) -> Tensor:
        """Height of the triangulated ground that rays hit."""
        left, back = torch.floor(x / CELL) * CELL, torch.floor(z / CELL) * CELL
        u, v = (x - left) / CELL, (z - back) / CELL
        far = u + v > 1
        corner = self.height(left + CELL * far, back + CELL * far)
        side_x = self.height(left + CELL * ~far, back + CELL * far)
        side_z = self.height(left + CELL * far, back + CELL * ~far)
        u, v = torch.where(far, 1 - u, u), torch.where(far, 1 - v, v)
        return corner + u * (side_x - corner) + v * (side_z - corner)

    def squares(self, x: Tensor, z: Tensor, reach: float) -> tuple[Tensor, Tensor]:
        """Corners [B, P, 3] and bases [B, P, 3, 3] of the triangles near places [B, T]."""
        spans = []
        for place in (x, z):
            low = torch.floor((place.amin(1) - reach) / CELL)
            count = int(((place.amax(1) - place.amin(1)).max() + 2 * reach) / CELL) + 2
            spans.append((low[:, None] + torch.arange(count, device=x.device)) * CELL)
        across, along = torch.broadcast_tensors(spans[0][:, :, None], spans[1][:, None, :])
        corner = [
            self._vertex(across.flatten(1) + dx, along.flatten(1) + dz)
            for dx, dz in ((0.0, 0.0), (CELL, 0.0), (0.0, CELL), (CELL, CELL))
        ]
        upright = torch.zeros_like(corner[0])
        upright[..., 1] = 1.0
        basis = [
            torch.stack([corner[1] - corner[0], upright, corner[2] - corner[0]], dim=-1),
            torch.stack([corner[2] - corner[3], upright, corner[1] - corner[3]], dim=-1),
        ]
        return torch.cat([corner[0], corner[3]], 1).float(), torch.cat(basis, 1).float()

    def _vertex(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.stack([x, -self.height(x, z), z], dim=-1)


def make_terrain(dice: Dice, corner: Tensor, basis: Tensor, nearest_station: Tensor) -> Solids:
    """Meadow triangles; each carries the station of the road nearest to it as its note."""
    bounds = (("r", 0.07, 0.3), ("g", 0.14, 0.3), ("b", 0.04, 0.14))
    grass = torch.stack([dice.uniform(f"grass {k}", low, high) for k, low, high in bounds], -1)
    soil = torch.tensor([0.16, 0.12, 0.07], device=dice.device)
    colours = paint(
        torch.lerp(grass, soil, dice.uniform("soil", 0.1, 0.9)[:, None])[:, None],
        grass[:, None].expand(corner.shape),
        texture=texture.CLOUDS,
        repeat=dice.uniform("grass repeat", 2.0, 7.0)[:, None],
        layer=ON_ROAD,
        note=nearest_station,
    )
    return make_solids(TRIANGLE, corner, basis, colours)
