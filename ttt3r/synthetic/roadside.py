"""What stands along a road: pavements, houses, trees, poles, parked cars.

Everything has a numbered place along the road and is drawn from that number, so any
stretch of road can be furnished without the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt3r.synthetic import texture
from ttt3r.synthetic.cars import make_cars
from ttt3r.synthetic.dice import Dice
from ttt3r.synthetic.road import Road
from ttt3r.synthetic.solids import (
    BOX,
    CYLINDER,
    ELLIPSOID,
    ON_WORLD,
    Footing,
    Solids,
    draw_colour,
    join,
    make_solids,
    paint,
    turn_basis,
)
from ttt3r.synthetic.terrain import Hills

# Metres of road to each place for one of these, on either side.
_HOUSE, _PAVING, _PARKING, _TREE, _POLE = 13.0, 6.0, 6.5, 9.0, 27.0

_FACADES = (texture.WINDOWS, texture.BANDS, texture.SHOPS, texture.WINDOWS)
_FRONTS = (texture.PLASTER, texture.BRICKS, texture.CLOUDS, texture.GRAIN, texture.STREAKS)
_SLABS = (texture.TILES, texture.GRAIN, texture.BRICKS, texture.CLOUDS)


class Profile:
    """Cross-section of each sequence's street, and how much stands along it; all [B]."""

    def __init__(self, dice: Dice) -> None:
        self.lane = dice.uniform("lane width", 2.9, 3.7)
        self.lanes = dice.choice("lanes", (1, 1, 1, 2))  # each way
        self.parking = dice.chance("parking", 0.6)
        self.edge = self.lane * self.lanes + torch.where(self.parking, 2.3, 0.3)
        self.pavement = dice.uniform("pavement", 1.4, 3.5)
        self.paved = dice.chance("paved", 0.8)
        self.built = dice.uniform("built", 0.1, 1.0)
        self.green = dice.uniform("green", 0.0, 0.7)
        hand = torch.where(dice.chance("drives on the left", 0.25), -1.0, 1.0)
        # Metres that the driver's lane lies to the right of the road's middle.
        self.driver = hand * self.lane * (self.lanes - 0.5)


@dataclass(frozen=True)
class Site:
    """A road on its hills, with what to build beside it."""

    dice: Dice
    road: Road
    hills: Hills
    profile: Profile

    def stand(
        self, station: Tensor, side: Tensor, present: Tensor, turn: Tensor | float = 0.0
    ) -> Footing:
        """Footing on the ground, `side` metres right of the road's middle; turned to the right."""
        x, z, heading = self.road.at(station, side.double())
        heading = heading + turn
        dx, dz = 2 * torch.sin(heading), 2 * torch.cos(heading)
        rise = self.hills.ground(x + dx, z + dz) - self.hills.ground(x - dx, z - dz)
        position = torch.stack([x, -self.hills.ground(x, z), z], dim=-1).float()
        unit = torch.ones_like(position)
        frame = turn_basis(heading.float(), unit, torch.atan(rise / 4).float())
        return Footing(position, frame, station.float(), present)

    def furnish(self, low: Tensor, high: Tensor) -> Solids:
        """All that stands between two stations [B]."""
        return join(
            [
                self._pavements(*_places(low, high, _PAVING)),
                self._houses(*_places(low, high, _HOUSE)),
                self._parked(*_places(low, high, _PARKING)),
                self._trees(*_places(low, high, _TREE)),
                self._poles(*_places(low, high, _POLE)),
            ]
        )

    def _pavements(self, place: Tensor, side: Tensor, key: Tensor) -> Solids:
        dice, profile = self.dice, self.profile
        wide = (profile.pavement[:, None] / 2).expand_as(side)
        present = profile.paved[:, None].expand_as(side)
        offset = side * (profile.edge[:, None] + wide)
        footing = self.stand((place + 0.5) * _PAVING, offset, present)
        one = torch.zeros_like(place[:, :1])
        colours = paint(
            draw_colour(dice, "slab low", one, 0.12, 0.35, 0.1),
            draw_colour(dice, "slab high", one, 0.25, 0.5, 0.1),
            texture=dice.choice("slab", _SLABS, one),
            repeat=dice.uniform("slab repeat", 1.5, 3.5, one),
            layer=ON_WORLD,
        )
        zero = torch.zeros_like(side)
        sunk = 0.3 - dice.uniform("kerb", 0.08, 0.16)[:, None] + zero
        return footing.part(BOX, (zero, sunk, zero), (wide, zero + 0.3, zero + 3.2), colours)

    def _houses(self, place: Tensor, side: Tensor, key: Tensor) -> Solids:
        dice, profile = self.dice, self.profile
        station = (place + 0.5) * _HOUSE
        long = dice.uniform("house length", 0.3, 0.56, key) * _HOUSE
        deep = dice.uniform("house depth", 4.0, 8.0, key)
        tall = dice.log_uniform("house style", 3.5, 16.0)[:, None]
        tall = tall * dice.log_uniform("house height", 0.6, 1.6, key)
        setback = dice.log_uniform("setback", 0.3, 9.0)[:, None]
        setback = setback * dice.uniform("house setback", 0.7, 1.5, key)
        offset = side * ((profile.edge + profile.pavement)[:, None] + setback + deep)
        present = dice.chance("house", profile.built[:, None], key)
        footing = self.stand(station, offset, present)
        upright = footing.frame.clone()
        upright[..., 2] = torch.linalg.cross(
            upright[..., 0], _DOWN.to(upright).expand_as(upright[..., 0])
        )
        upright[..., 1] = _DOWN.to(upright)
        half = torch.stack([deep, tall / 2 + 1.0, long], dim=-1)  # one metre below the ground
        centre = footing.position - (tall / 2 - 1.0)[..., None] * _DOWN.to(upright)
        basis = upright * half.unsqueeze(-2)
        present = present & self._is_off_road(centre, upright, half, station)
        return make_solids(BOX, centre, basis, self._facades(key), present, station.float())

    def _facades(self, key: Tensor) -> Tensor:
        dice = self.dice
        storeys = dice.uniform("storey", 2.7, 3.6, key) * 4  # a texture shows four of them
        return paint(
            draw_colour(dice, "wall low", key, 0.08, 0.6, 0.3),
            draw_colour(dice, "wall high", key, 0.2, 0.8, 0.2),
            texture=dice.choice("front", _FRONTS, key),
            repeat=dice.uniform("front repeat", 1.0, 3.0, key),
            mask=dice.choice("facade", _FACADES, key),
            mask_colour=draw_colour(dice, "pane", key, 0.01, 0.15, 0.2),
            mask_size=(storeys * dice.uniform("bay", 0.6, 1.1, key), storeys),
            offset=(dice.unit("front across", key), dice.unit("front down", key)),
            mask_offset=(dice.unit("bay across", key), dice.unit("bay down", key)),
        )

    def _is_off_road(self, centre: Tensor, axes: Tensor, half: Tensor, station: Tensor) -> Tensor:
        """Whether boxes [B, P] keep off the road within 60 m of their station."""
        offsets = torch.arange(-60.0, 61.0, 6.0, device=station.device)
        x, z, _ = self.road.at((station[..., None] + offsets).clamp(min=0))
        dx, dz = x.float() - centre[..., None, 0], z.float() - centre[..., None, 2]
        sin, cos = axes[..., 0, 2, None], axes[..., 0, 0, None]
        across = (dx * cos - dz * sin).abs() - half[..., None, 0]
        along = (dx * sin + dz * cos).abs() - half[..., None, 2]
        gap = torch.hypot(across.clamp(min=0), along.clamp(min=0)).amin(-1)
        return gap > self.profile.edge[:, None] + 0.3

    def _parked(self, place: Tensor, side: Tensor, key: Tensor) -> Solids:
        dice, profile = self.dice, self.profile
        station = (place + dice.uniform("park place", 0.42, 0.58, key)) * _PARKING
        offset = side * (profile.edge[:, None] - dice.uniform("park gap", 1.1, 1.3, key))
        share = dice.uniform("parked", 0.15, 0.9)[:, None]
        present = profile.parking[:, None] & dice.chance("park", share, key)
        skew = dice.uniform("park skew", -0.04, 0.04, key)
        return make_cars(dice, "park", key, self.stand(station, offset, present, skew))

    def _trees(self, place: Tensor, side: Tensor, key: Tensor) -> Solids:
        dice, profile = self.dice, self.profile
        station = (place + dice.uniform("tree place", 0.2, 0.8, key)) * _TREE
        far = profile.pavement[:, None] + dice.uniform("tree side", 0.8, 9.0, key)
        beside = torch.where(dice.chance("tree row", 0.5)[:, None], 0.8, far)
        present = dice.chance("tree", profile.green[:, None], key)
        footing = self.stand(station, side * (profile.edge[:, None] + beside), present)
        tall = dice.uniform("trunk", 1.0, 1.9, key)
        thick = dice.uniform("trunk width", 0.09, 0.25, key)
        wide = dice.uniform("crown", 0.9, 2.3, key)
        high = wide * dice.uniform("crown shape", 0.8, 1.7, key)
        bark, crown = self._leaves(key)
        zero = torch.zeros_like(tall)
        parts = [footing.part(CYLINDER, (zero, -tall, zero), (thick, tall + 0.5, thick), bark)]
        for lobe, size in ((0, 1.0), (1, 0.75), (2, 0.65)):
            lean = 0.7 * wide if lobe else zero
            x, z = (dice.uniform(f"lobe {lobe} {k}", -1, 1, key) * lean for k in "xz")
            y = -2 * tall - (0.6 + 0.2 * lobe) * high
            parts.append(
                footing.part(ELLIPSOID, (x, y, z), (size * wide, size * high, size * wide), crown)
            )
        return join(parts)

    def _leaves(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Paint of trunks and crowns."""
        dice = self.dice
        bark = paint(
            draw_colour(dice, "bark low", key, 0.03, 0.1, 0.3),
            draw_colour(dice, "bark high", key, 0.1, 0.3, 0.3),
            texture=texture.STREAKS,
            repeat=0.8,
        )
        tint = torch.stack([dice.uniform(f"leaf {k}", 0.6, 1.5, key) for k in "rgb"], dim=-1)
        green = torch.tensor([0.55, 1.0, 0.3], device=key.device) * tint
        leaf = dice.log_uniform("leaf", 0.06, 0.3, key)[..., None] * green
        repeat = dice.uniform("leaf size", 1.2, 2.5, key)
        return bark, paint(0.15 * leaf, 1.3 * leaf, texture=texture.LEAVES, repeat=repeat)

    def _poles(self, place: Tensor, side: Tensor, key: Tensor) -> Solids:
        dice = self.dice
        station = (place + dice.uniform("pole place", 0.3, 0.7, key)) * _POLE
        present = dice.chance("pole", dice.uniform("poles", 0.0, 1.0)[:, None], key)
        footing = self.stand(station, side * (self.profile.edge[:, None] + 0.45), present)
        tall = dice.uniform("pole height", 2.0, 4.2, key)
        thick = dice.uniform("pole width", 0.05, 0.12, key)
        metal = paint(
            draw_colour(dice, "metal low", key, 0.05, 0.3, 0.15),
            draw_colour(dice, "metal high", key, 0.2, 0.5, 0.15),
            texture=texture.STREAKS,
        )
        sign = paint(
            draw_colour(dice, "sign low", key, 0.1, 0.6, 0.8),
            draw_colour(dice, "sign high", key, 0.3, 0.8, 0.8),
            texture=texture.POSTER,
            repeat=0.9,
        )
        zero = torch.zeros_like(tall)
        lamp = dice.chance("lamp post", 0.6, key)
        arm, size = (-0.9 * side, 0.08 - 2 * tall, zero), (zero + 0.95, zero + 0.07, zero + 0.12)
        plate, flat = (
            (zero, -(2 * tall).clamp(max=2.6), zero),
            (zero + 0.38, zero + 0.38, zero + 0.03),
        )
        return join(
            [
                footing.part(CYLINDER, (zero, -tall, zero), (thick, tall + 0.3, thick), metal),
                footing.part(BOX, arm, size, metal, present=lamp),
                footing.part(BOX, plate, flat, sign, present=~lamp),
            ]
        )


_DOWN = torch.tensor([0.0, 1.0, 0.0])


def _places(low: Tensor, high: Tensor, pitch: float) -> tuple[Tensor, Tensor, Tensor]:
    """Places [B, K] between two stations on both sides: number, side (-1 or 1), and a key."""
    first = torch.floor(low / pitch).long() - 1
    count = int(((high - low) / pitch).max().ceil()) + 3
    place = first[:, None] + torch.arange(count, device=first.device)
    place = torch.cat([place, place], dim=1)
    side = torch.tensor([-1.0, 1.0], device=first.device).repeat_interleave(count)
    side = side.expand(len(low), -1)
    return place, side, place * 2 + (side > 0)
