"""The surface of a road: asphalt, and what is painted on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttt3r.synthetic import texture
from ttt3r.synthetic.dice import Dice
from ttt3r.synthetic.roadside import Profile

_LINE = 0.075  # half the width of a painted line, metres


class Tarmac:
    """Asphalt and markings of each sequence's road."""

    def __init__(self, dice: Dice, profile: Profile) -> None:
        tone = dice.log_uniform("asphalt", 0.05, 0.22)
        self._looks = torch.stack(
            [
                *[tone * dice.uniform(f"asphalt {k}", 0.92, 1.08) for k in "rgb"],
                profile.edge,
                profile.lane,
                profile.lanes * profile.lane,
                (profile.lanes > 1.5).float(),
                1 / dice.uniform("dash", 6.0, 12.0),
                dice.uniform("dash share", 0.3, 0.6),
                dice.chance("solid middle", 0.3).float(),
                dice.chance("border", 0.6).float(),
                dice.uniform("marking", 0.35, 0.8),
                dice.chance("yellow middle", 0.3).float(),
                dice.log_uniform("crossings", 50.0, 400.0),
            ]
        )

    def cover(
        self, soil: Tensor, place: tuple[Tensor, Tensor], station: Tensor, side: Tensor,
        width: Tensor, sequence: Tensor,
    ) -> Tensor:  # fmt: skip
        """Albedo [3, N] of the ground: `soil` [3, N], and the road where it covers it.

        Args:
            place: world x and z, [N] each.
            station, side: [N] metres along the road, and to the right of its middle.
            width: [N] metres that a pixel covers; finer things fade.
            sequence: [N] whose road it is.
        """
        looks = self._looks.index_select(1, sequence)
        fine = _pattern(texture.GRAIN, place, 1.7, width)
        tone = 0.47 + 0.15 * fine - 0.12 * torch.cos(side / looks[4] * (2 * math.pi)).abs_()
        tone += 0.6 * _pattern(texture.CLOUDS, place, 9.0, width)
        tone += 0.5 * _pattern(texture.PATCHES, place, 23.0, width)
        tone -= 0.45 * _pattern(texture.CRACKS, place, 7.0, width)
        middle, lines = _markings(looks, station, side, width)
        bright, yellow = looks[11] * (0.75 + 0.4 * fine), looks[12]
        gold = torch.stack([bright, bright * (1 - 0.25 * yellow), bright * (1 - 0.85 * yellow)])
        road = torch.lerp(looks[:3] * tone, bright[None], 0.9 * lines[None])
        road = road.lerp_(gold, 0.9 * middle[None])
        return soil.lerp_(road, _stripe(side, looks[3], width)[None])


def _pattern(kind: int, place: tuple[Tensor, Tensor], repeat: float, width: Tensor) -> Tensor:
    x, z = (coordinate / repeat for coordinate in place)
    return texture.sample(torch.full_like(x, kind), x, z, width / repeat)


def _markings(looks: Tensor, station: Tensor, side: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Shares [N] of a pixel covered by the middle line, and by any other marking."""
    lane, half, many, rate, share, solid, border = looks[4:11].unbind(0)
    dash = station * rate
    broken = (dash - dash.floor() < share).float()
    across = side.abs()
    middle = _stripe(side, _LINE, width) * torch.maximum(broken, solid)
    lines = _stripe(across - lane, _LINE, width) * broken * many
    lines = torch.maximum(lines, _stripe(across - half, _LINE, width) * border)
    return middle, torch.maximum(lines, _zebra(station, side, width, looks[13]))


def _zebra(station: Tensor, side: Tensor, width: Tensor, apart: Tensor) -> Tensor:
    """Bars 0.5 m wide and 3 m long, every so many metres."""
    along = station - torch.floor(station / apart) * apart - apart / 2
    bars = side - torch.floor(side) - 0.5
    return _stripe(along, 1.5, width) * _stripe(bars, 0.25, width)


def _stripe(distance: Tensor, half: Tensor | float, width: Tensor) -> Tensor:
    """Share of a pixel of some width that lies within `half` of a line."""
    return ((half - distance.abs()) / width.clamp(min=1e-4) + 0.5).clamp(0, 1)
