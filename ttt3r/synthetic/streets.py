"""Streets seen from a moving car, laid out along the road around the camera."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttt3r.synthetic import texture
from ttt3r.synthetic.camera import look
from ttt3r.synthetic.dice import Dice
from ttt3r.synthetic.raycast import Light, Surface
from ttt3r.synthetic.road import AHEAD, CELL, FRAME_S, START, STEP, Hills, Road, drive
from ttt3r.synthetic.solids import (
    BOX,
    CYLINDER,
    ELLIPSOID,
    ON_ROAD,
    ON_WORLD,
    TRIANGLE,
    Solids,
    join,
    make_solids,
    paint,
    turn_basis,
)

BEHIND, SIGHT = 30.0, 150.0  # metres of road drawn behind and ahead of the camera
_HOUSE, _PAVING, _PARKING, _TREE = 13.0, 6.0, 6.5, 9.0  # metres of road per place for one
_CONVOY = 28.0  # metres between the places of moving cars
_FACADES = (texture.WINDOWS, texture.BANDS, texture.SHOPS, texture.WINDOWS)
_FRONTS = (texture.PLASTER, texture.BRICKS, texture.CLOUDS, texture.GRAIN, texture.STREAKS)


class Streets:
    """One street a seed. The world's y axis points down; the road starts along +z."""

    distance = 170.0

    def __init__(self, dice: Dice, motion: float) -> None:
        self._dice, self._motion = dice, motion
        self._frames = 0
        self._hills = Hills(dice)
        self._extend(16)
        self._lane = dice.uniform("lane width", 2.9, 3.7)
        self._lanes = dice.choice("lanes", (1, 1, 1, 2))
        self._parking = dice.chance("parking", 0.6)
        self._edge = self._lane * self._lanes + torch.where(self._parking, 2.3, 0.3)
        self._walk = dice.uniform("pavement", 1.4, 3.5)
        self._paved = dice.chance("paved", 0.8)
        self._hand = torch.where(dice.chance("drives on the left", 0.25), -1.0, 1.0)
        self._built = dice.uniform("built", 0.1, 1.0)
        self._green = dice.uniform("green", 0.0, 0.7)
        self._asphalt = self._draw_asphalt()
        self.light = self._draw_light()

    def _extend(self, frames: int) -> None:
        """Lay out the road and drive it far enough for so many frames."""
        if frames <= self._frames:
            return
        self._frames = max(frames, 2 * self._frames)
        length = START + AHEAD + self._frames * 3.2 * max(self._motion, 0.1)
        self._road = Road(self._dice, length)
        self._stations = drive(self._dice, self._road, self._frames, self._motion)

    def _draw_light(self) -> Light:
        dice = self._dice
        angle = dice.uniform("sun angle", 0, 2 * math.pi)
        tilt = dice.uniform("sun tilt", 0.2, 1.3)
        direction = [tilt.cos() * angle.sin(), -tilt.sin(), tilt.cos() * angle.cos()]
        overcast = dice.uniform("overcast", -0.4, 1.0).clamp(0, 1)[:, None]
        day = dice.log_uniform("daylight", 0.6, 1.4)[:, None]
        low = (1 - tilt / 1.3)[:, None]
        warm = torch.tensor([1.05, 0.95, 0.8], device=dice.device)
        red = torch.tensor([1.1, 0.8, 0.55], device=dice.device)
        cold = torch.tensor([0.85, 0.95, 1.1], device=dice.device)
        sun = 1.5 * (1 - overcast) * day * torch.lerp(warm, red, low)
        ambient = (0.45 + 0.5 * overcast) * day * torch.lerp(cold, torch.ones_like(cold), overcast)
        haze = torch.lerp(
            torch.tensor([0.75, 0.82, 0.92], device=dice.device),
            torch.ones(3, device=dice.device),
            overcast,
        )
        self._haze = haze * day * dice.uniform("horizon", 0.6, 1.05)[:, None]
        zenith = torch.lerp(
            torch.tensor([0.2, 0.36, 0.75], device=dice.device), haze * 0.85, overcast
        )
        self._zenith = zenith * day
        self._clouds = dice.uniform("clouds", -0.3, 1.0).clamp(0, 1)
        self._thick = dice.log_uniform("haze", 0.0008, 0.01)
        return Light(torch.stack(direction, dim=-1), sun, ambient)

    # ---- camera -------------------------------------------------------------------------

    def poses(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """T_world_cam [B, T, 4, 4] and the stations in reach [B, T, 2]."""
        self._extend(stop)
        dice, station = self._dice, self._stations[:, start:stop]
        drift = 0.3 * dice.noise("lane drift", station / 40.0)
        side = self._driver_side()[:, None] + drift
        x, z, heading = self._road.at(station, side)
        ahead = self._road.at(station + 2.0)[2]
        behind = self._road.at(station - 2.0)[2]
        heading = (heading + ahead + behind) / 3
        rise = self._hills.height(x + 2 * torch.sin(heading), z + 2 * torch.cos(heading))
        fall = self._hills.height(x - 2 * torch.sin(heading), z - 2 * torch.cos(heading))
        height = dice.uniform("camera height", 1.2, 2.0)[:, None]
        shake = dice.uniform("shake", 0.0, 0.004)[:, None] * self._motion
        pitch = (rise - fall) / 4 + torch.deg2rad(dice.uniform("pitch", -5.0, 5.0))[:, None]
        pitch = pitch + shake * dice.noise("bump", station / 1.7)
        roll = torch.deg2rad(dice.uniform("roll", -1.5, 1.5))[:, None]
        roll = roll + shake * dice.noise("lurch", station / 2.3)
        yaw = torch.deg2rad(dice.uniform("yaw", -4.0, 4.0))[:, None]
        heading = heading + yaw + 0.01 * dice.noise("steer", station / 17.0)
        T_world_cam = torch.eye(4, device=dice.device).repeat(*station.shape, 1, 1)
        T_world_cam[..., :3, :3] = look(heading, pitch, roll.expand_as(pitch)).float()
        up = self._hills.height(x, z) + height
        T_world_cam[..., :3, 3] = torch.stack([x, -up, z], dim=-1).float()
        reach = torch.stack([station - BEHIND, station + SIGHT], dim=-1).float()
        return T_world_cam, reach

    def _driver_side(self) -> Tensor:
        """Metres [B] that the driver's lane lies to the right of the road's middle."""
        return self._hand * self._lane * (self._lanes - 0.5)

    # ---- what stands along the road -----------------------------------------------------

    def static(self, start: int, stop: int) -> Solids:
        """All that may be seen in frames start..stop."""
        self._extend(stop)
        low = self._stations[:, start] - BEHIND
        high = self._stations[:, stop - 1] + SIGHT
        parts = [
            self._terrain(start, stop),
            self._houses(*self._places(low, high, _HOUSE)),
            self._pavement(*self._places(low, high, _PAVING)),
            self._parked(*self._places(low, high, _PARKING)),
            self._trees(*self._places(low, high, _TREE)),
            self._poles(*self._places(low, high, 27.0)),
        ]
        return join(parts)

    def _places(self, low: Tensor, high: Tensor, pitch: float) -> tuple[Tensor, Tensor]:
        """Numbers [B, K] of the places between two stations, both sides; and the side (-1, 1)."""
        first = torch.floor(low / pitch).long() - 1
        count = int(((high - low) / pitch).max().ceil()) + 3
        place = first[:, None] + torch.arange(count, device=first.device)
        side = torch.tensor([-1.0, 1.0], device=first.device).repeat_interleave(count)
        return torch.cat([place, place], dim=1), side[None].expand(len(low), -1)

    def _stand(self, station: Tensor, side: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """World position on the ground [B, K, 3] (float32), heading and climb [B, K]."""
        x, z, heading = self._road.at(station, side.double())
        ground = self._hills.ground(x, z)
        dx, dz = torch.sin(heading), torch.cos(heading)
        rise = self._hills.ground(x + 2 * dx, z + 2 * dz) - self._hills.ground(
            x - 2 * dx, z - 2 * dz
        )
        position = torch.stack([x, -ground, z], dim=-1).float()
        return position, heading.float(), torch.atan(rise / 4).float()

    def _colour(
        self, name: str, index: Tensor, low: float, high: float, tint: float = 0.25
    ) -> Tensor:
        level = self._dice.log_uniform(f"{name} level", low, high, index)
        channels = [self._dice.uniform(f"{name} {k}", 1 - tint, 1 + tint, index) for k in "rgb"]
        return (level[..., None] * torch.stack(channels, dim=-1)).clamp(0.01, 0.95)

    def _terrain(self, start: int, stop: int) -> Solids:
        """Two triangles for each square of the ground near the cameras."""
        dice = self._dice
        x, z, _ = self._road.at(self._stations[:, [start, stop - 1]])
        low_x, low_z = (torch.floor((v.amin(1) - SIGHT) / CELL) for v in (x, z))
        spans = [int(((v.amax(1) - v.amin(1) + 2 * SIGHT) / CELL).max().ceil()) + 1 for v in (x, z)]
        across = (low_x[:, None] + torch.arange(spans[0], device=dice.device)) * CELL
        down = (low_z[:, None] + torch.arange(spans[1], device=dice.device)) * CELL
        near_x = across[:, :, None].expand(-1, -1, spans[1]).flatten(1)
        near_z = down[:, None, :].expand(-1, spans[0], -1).flatten(1)
        corners = [
            torch.stack([cx, -self._hills.height(cx, cz), cz], dim=-1)
            for cx, cz in (
                (near_x, near_z), (near_x + CELL, near_z),
                (near_x, near_z + CELL), (near_x + CELL, near_z + CELL),
            )
        ]  # fmt: skip
        upright = torch.zeros_like(corners[0])
        upright[..., 1] = 1.0
        basis = [
            torch.stack([corners[1] - corners[0], upright, corners[2] - corners[0]], dim=-1),
            torch.stack([corners[2] - corners[3], upright, corners[1] - corners[3]], dim=-1),
        ]
        centre = torch.cat([corners[0], corners[3]], dim=1).float()
        station = self._nearest_station(centre, start, stop)
        soil = torch.tensor([0.16, 0.12, 0.07], device=dice.device)
        grass = torch.stack([dice.uniform(f"grass {k}", low, high) for k, low, high in
                             (("r", 0.07, 0.3), ("g", 0.14, 0.3), ("b", 0.04, 0.14))], -1)  # fmt: skip
        colours = paint(
            torch.lerp(grass, soil, dice.uniform("soil", 0.1, 0.9)[:, None])[:, None], grass[:, None],
            texture=texture.CLOUDS, repeat=dice.uniform("grass repeat", 2.0, 7.0)[:, None],
            layer=ON_ROAD, glow=0.0,
        )  # fmt: skip
        colours = colours.expand(-1, centre.shape[1], -1).clone()
        colours[..., 16], colours[..., 17] = 0.0, 0.0
        solids = make_solids(TRIANGLE, centre, torch.cat(basis, dim=1).float(), colours)
        self._ground_station = station
        return Solids(
            solids.kind, solids.centre, solids.basis, _with_station(solids.paint, station),
            solids.present, self._stations[:, start, None].float().expand(station.shape),
        )  # fmt: skip

    def _nearest_station(self, centre: Tensor, start: int, stop: int) -> Tensor:
        """Station [B, P] of the nearest sample of the road."""
        low = ((self._stations[:, start] - 60) / STEP).long().clamp(min=0)
        span = int((self._stations[:, stop - 1] - self._stations[:, start]).max() / STEP) + 120
        index = (low[:, None] + torch.arange(0, span, 3, device=low.device)).clamp(
            max=self._road.x.shape[1] - 1
        )
        x, z = self._road.x.gather(1, index).float(), self._road.z.gather(1, index).float()
        middle = torch.stack([x, z], dim=-1)
        nearest = torch.cdist(centre[..., [0, 2]], middle).argmin(dim=-1)
        return index.gather(1, nearest).float() * STEP

    def _houses(self, place: Tensor, side: Tensor) -> Solids:
        dice, key = self._dice, _key(place, side)
        station = (place + 0.5) * _HOUSE
        length = dice.uniform("house length", 0.3, 0.56, key) * _HOUSE
        depth = dice.uniform("house depth", 4.0, 8.0, key)
        style = dice.log_uniform("house style", 3.5, 16.0)[:, None]
        tall = style * dice.log_uniform("house height", 0.6, 1.6, key)
        setback = dice.log_uniform("setback", 0.3, 9.0)[:, None]
        setback = setback * dice.uniform("house setback", 0.7, 1.5, key)
        edge = (self._edge + self._walk)[:, None]
        position, heading, _ = self._stand(station, side * (edge + setback + depth))
        present = dice.chance("house", self._built[:, None], key)
        half = torch.stack([depth, tall / 2 + 1.0, length], dim=-1)
        present &= self._clear_of_road(position, heading, half, station)
        position = (
            position
            - torch.tensor([0.0, 1.0, 0.0], device=place.device) * (tall / 2 - 1.0)[..., None]
        )
        storey = dice.uniform("storey", 2.7, 3.6, key) * 4
        colours = paint(
            self._colour("wall low", key, 0.08, 0.6, 0.3), self._colour("wall high", key, 0.2, 0.8, 0.2),
            texture=dice.choice("front", _FRONTS, key), repeat=dice.uniform("front repeat", 1.0, 3.0, key),
            mask=dice.choice("facade", _FACADES, key), mask_colour=self._colour("pane", key, 0.015, 0.3, 0.15),
            mask_size=(storey * dice.uniform("bay", 0.6, 1.1, key), storey),
            offset=(dice.unit("front across", key), dice.unit("front down", key)),
            mask_offset=(dice.unit("bay across", key), dice.unit("bay down", key)),
        )  # fmt: skip
        return make_solids(
            BOX, position, turn_basis(heading, half), colours, present, station.float()
        )

    def _clear_of_road(
        self, position: Tensor, heading: Tensor, half: Tensor, station: Tensor
    ) -> Tensor:
        """Whether boxes [B, P] keep off the road within 60 m of their station."""
        offsets = torch.arange(-60.0, 61.0, 6.0, device=station.device)
        x, z, _ = self._road.at((station[..., None] + offsets).clamp(min=0))
        dx, dz = x.float() - position[..., None, 0], z.float() - position[..., None, 2]
        sin, cos = torch.sin(heading)[..., None], torch.cos(heading)[..., None]
        across = (dx * cos - dz * sin).abs() - half[..., None, 0]
        along = (dx * sin + dz * cos).abs() - half[..., None, 2]
        gap = torch.hypot(across.clamp(min=0), along.clamp(min=0)).amin(-1)
        return gap > self._edge[:, None] + 0.3

    def _pavement(self, place: Tensor, side: Tensor) -> Solids:
        dice = self._dice
        station = (place + 0.5) * _PAVING
        wide = self._walk[:, None] / 2
        position, heading, climb = self._stand(station, side * (self._edge[:, None] + wide))
        kerb = dice.uniform("kerb", 0.08, 0.16)[:, None]
        half = torch.stack(
            [
                wide.expand_as(side),
                torch.full_like(side, 0.3),
                torch.full_like(side, _PAVING * 0.53),
            ],
            dim=-1,
        )
        position = position + torch.stack(
            [torch.zeros_like(side), (0.3 - kerb).expand_as(side), torch.zeros_like(side)], dim=-1
        )
        one = torch.zeros_like(place[:, :1])
        colours = paint(
            self._colour("slab low", one, 0.12, 0.35, 0.1), self._colour("slab high", one, 0.25, 0.5, 0.1),
            texture=dice.choice("slab", (texture.TILES, texture.GRAIN, texture.BRICKS, texture.CLOUDS), one),
            repeat=dice.uniform("slab repeat", 1.5, 3.5, one), layer=ON_WORLD,
        )  # fmt: skip
        basis = turn_basis(heading, half, climb)
        present = self._paved[:, None].expand_as(side)
        return make_solids(BOX, position, basis, colours, present, station.float())

    def _car(
        self, name: str, key: Tensor, position: Tensor, heading: Tensor, climb: Tensor,
        present: Tensor, station: Tensor,
    ) -> Solids:  # fmt: skip
        """Body, cabin, four wheels and the shade below, standing on `position` [..., 3]."""
        dice = self._dice
        van = dice.chance(f"{name} van", 0.2, key)
        long = dice.uniform(f"{name} length", 1.9, 2.35, key) + 0.3 * van
        wide = dice.uniform(f"{name} width", 0.82, 0.95, key)
        tall = dice.uniform(f"{name} height", 1.4, 1.65, key) + 0.6 * van
        waist = dice.uniform(f"{name} waist", 0.55, 0.62, key) * tall
        frame = turn_basis(heading, torch.ones_like(position), climb)
        grey = dice.chance(f"{name} grey", 0.55, key)[..., None]
        colour = torch.where(
            grey,
            self._colour(f"{name} shade", key, 0.02, 0.85, 0.04),
            self._colour(f"{name} hue", key, 0.1, 0.4, 0.6),
        )
        coat = paint(colour * 0.85, colour, texture=texture.STREAKS, repeat=1.5)
        glass = torch.full_like(colour, 0.03)
        cabin = paint(
            colour * 0.9, colour, texture=texture.CLOUDS, mask=texture.GLASS, mask_colour=glass,
            mask_size=(2 * 0.62 * long, tall - waist), mask_offset=(0.5, 0.5),
        )  # fmt: skip
        rubber = paint(torch.full_like(colour, 0.015), torch.full_like(colour, 0.06),
                       texture=texture.SPOTS, repeat=0.7)  # fmt: skip
        zero = torch.zeros_like(long)
        clear = 0.22
        bulk = (waist - clear) / 2
        parts = [
            (BOX, (zero, -(clear + bulk), zero), (wide, bulk, long), coat),
            (BOX, (zero, -(waist + tall) / 2, -0.12 * long), (wide * 0.88, (tall - waist) / 2, long * 0.62), cabin),
            (BOX, (zero, zero - 0.02, zero), (wide * 0.95, zero + 0.025, long * 0.97), rubber),
        ]  # fmt: skip
        solids = [
            self._attach(kind, position, frame, shift, half, coat_, present, station)
            for kind, shift, half, coat_ in parts
        ]
        # Wheels: cylinders whose axis (local y) points sideways.
        roll = frame[..., [1, 0, 2]]
        for front in (-0.62, 0.62):
            shift = (zero, zero - 0.32, front * long)
            half = (zero + 0.32, wide * 1.02, zero + 0.32)
            solids.append(
                self._attach(CYLINDER, position, frame, shift, half, rubber, present, station, roll)
            )
        return join(solids)

    @staticmethod
    def _attach(
        kind: int, position: Tensor, frame: Tensor, shift: tuple[Tensor, ...],
        half: tuple[Tensor, ...], colours: Tensor, present: Tensor, station: Tensor,
        axes: Tensor | None = None,
    ) -> Solids:  # fmt: skip
        """A part at `shift` (right, down, forward) of something that stands at `position`."""
        axes = frame if axes is None else axes
        centre = position + (frame @ torch.stack(shift, dim=-1)[..., None])[..., 0]
        basis = axes * torch.stack(half, dim=-1).unsqueeze(-2)
        return make_solids(kind, centre, basis, colours, present, station)

    def _parked(self, place: Tensor, side: Tensor) -> Solids:
        dice, key = self._dice, _key(place, side)
        station = (place + dice.uniform("park place", 0.42, 0.58, key)) * _PARKING
        offset = self._edge[:, None] - dice.uniform("park gap", 1.1, 1.3, key)
        position, heading, climb = self._stand(station, side * offset)
        heading = heading + dice.uniform("park skew", -0.04, 0.04, key)
        share = dice.uniform("parked", 0.15, 0.9)[:, None]
        present = self._parking[:, None] & dice.chance("park", share, key)
        return self._car("park", key, position, heading, climb, present, station.float())

    def _trees(self, place: Tensor, side: Tensor) -> Solids:
        dice, key = self._dice, _key(place, side)
        station = (place + dice.uniform("tree place", 0.2, 0.8, key)) * _TREE
        row = dice.chance("tree row", 0.5)[:, None]
        beside = torch.where(row, 0.8, dice.uniform("tree side", 0.8, 9.0, key))
        offset = self._edge[:, None] + torch.where(row, beside, self._walk[:, None] + beside)
        position, _, _ = self._stand(station, side * offset)
        present = dice.chance("tree", self._green[:, None], key)
        trunk = dice.uniform("trunk", 1.0, 1.9, key)
        thick = dice.uniform("trunk width", 0.09, 0.25, key)
        bark = paint(self._colour("bark low", key, 0.03, 0.1, 0.3), self._colour("bark high", key, 0.1, 0.3, 0.3),
                     texture=texture.STREAKS, repeat=0.8)  # fmt: skip
        eye = torch.eye(3, device=place.device).expand(*key.shape, 3, 3)
        zero = torch.zeros_like(trunk)
        flat = station.float()
        green = torch.tensor([0.55, 1.0, 0.3], device=place.device)
        leaf = dice.log_uniform("leaf", 0.06, 0.3, key)[..., None] * green
        leaf = leaf * torch.stack([dice.uniform(f"leaf {k}", 0.6, 1.5, key) for k in "rgb"], dim=-1)
        crown = paint(
            leaf * 0.25,
            leaf,
            texture=texture.LEAVES,
            repeat=dice.uniform("leaf size", 1.2, 2.5, key),
        )
        wide = dice.uniform("crown", 0.9, 2.3, key)
        high = wide * dice.uniform("crown shape", 0.8, 1.7, key)
        lobe = dice.uniform("lobe", -0.6, 0.6, key) * wide
        return join(
            [
                self._attach(CYLINDER, position, eye, (zero, -trunk, zero), (thick, trunk + 0.5, thick), bark, present, flat),
                self._attach(ELLIPSOID, position, eye, (zero, -2 * trunk - 0.6 * high, zero), (wide, high, wide), crown, present, flat),
                self._attach(ELLIPSOID, position, eye, (lobe, -2 * trunk - 0.9 * high, lobe.roll(1, -1)), (0.7 * wide, 0.7 * high, 0.7 * wide), crown.roll(1, dims=1), present, flat),
            ]
        )  # fmt: skip

    def _poles(self, place: Tensor, side: Tensor) -> Solids:
        dice, key = self._dice, _key(place, side)
        station = (place + dice.uniform("pole place", 0.3, 0.7, key)) * 27.0
        offset = self._edge[:, None] + 0.45
        position, heading, _ = self._stand(station, side * offset)
        present = dice.chance("pole", dice.uniform("poles", 0.0, 1.0)[:, None], key)
        tall = dice.uniform("pole height", 2.0, 4.2, key)
        thick = dice.uniform("pole width", 0.05, 0.12, key)
        metal = paint(self._colour("metal low", key, 0.05, 0.3, 0.15), self._colour("metal high", key, 0.2, 0.5, 0.15),
                      texture=texture.STREAKS, repeat=1.0)  # fmt: skip
        sign = paint(self._colour("sign low", key, 0.1, 0.6, 0.8), self._colour("sign high", key, 0.3, 0.8, 0.8),
                     texture=texture.POSTER, repeat=0.9)  # fmt: skip
        frame = turn_basis(heading, torch.ones_like(position))
        zero, flat = torch.zeros_like(tall), station.float()
        lamp = dice.chance("lamp post", 0.6, key)
        arm = (-side * 0.9, -2 * tall + 0.08, zero)
        plate = (zero, -torch.minimum(2 * tall, zero + 2.6), zero)
        return join(
            [
                self._attach(CYLINDER, position, frame, (zero, -tall, zero), (thick, tall + 0.3, thick), metal, present, flat),
                self._attach(BOX, position, frame, arm, (zero + 0.95, zero + 0.07, zero + 0.12), metal, present & lamp, flat),
                self._attach(BOX, position, frame, plate, (zero + 0.38, zero + 0.38, zero + 0.03), sign, present & ~lamp, flat),
            ]
        )  # fmt: skip

    # ---- traffic ------------------------------------------------------------------------

    def moving(self, start: int, stop: int) -> Solids | None:
        """Oncoming cars, and on some streets one that drives ahead: solids [B, T, P]."""
        dice, here = self._dice, self._stations[:, start:stop]
        clock = (
            torch.arange(start, stop, device=here.device, dtype=torch.float64)
            * FRAME_S
            * self._motion
        )
        pace = dice.log_uniform("traffic speed", 3.0, 22.0)[:, None].double()
        count = int((BEHIND + SIGHT) / _CONVOY) + 2
        travelled = pace * clock[None]  # oncoming cars are fixed in station + travelled
        first = torch.floor((here + travelled - BEHIND) / _CONVOY).long()
        place = first[..., None] + torch.arange(count, device=here.device)
        station = (place + dice.uniform("traffic place", 0.25, 0.75, place)) * _CONVOY - travelled[
            ..., None
        ]
        present = dice.chance("traffic", dice.uniform("busy", 0.0, 0.8)[:, None, None], place)
        present = present & (station > 4)
        side = -self._driver_side()[:, None, None].expand(station.shape)
        position, heading, climb = self._stand(station, side)
        oncoming = self._car(
            "traffic", place, position, heading + math.pi, -climb, present, station.float()
        )
        return join([oncoming, self._leader(here, start, stop)])

    def _leader(self, here: Tensor, start: int, stop: int) -> Solids:
        """The car ahead in the driver's lane; its distance swings slowly."""
        dice = self._dice
        clock = torch.arange(start, stop, device=here.device, dtype=torch.float64)
        gap = dice.log_uniform("gap", 9.0, 45.0)[:, None].double()
        gap = gap * (
            1 + 0.3 * dice.noise("gap swing", (self._motion * clock / 60)[None].expand_as(here))
        )
        station = (here + gap)[..., None]
        side = self._driver_side()[:, None, None].expand(station.shape)
        position, heading, climb = self._stand(station, side)
        present = dice.chance("leader", 0.35)[:, None, None].expand(station.shape)
        key = torch.zeros_like(station, dtype=torch.int64)
        return self._car("leader", key, position, heading, climb, present, station.float())

    # ---- colours that depend on the place on the road ------------------------------------

    def colour(self, seen: Surface, frames: int) -> Tensor:
        """Linear RGB [3, F, P] of what pixels see: with road markings, haze and sky."""
        device = seen.depth.device
        sequence = torch.arange(seen.frames.start, seen.frames.stop, device=device) // frames
        ground = (seen.hit & (seen.layer > ON_ROAD - 0.5)).flatten().nonzero()[:, 0]
        albedo = seen.albedo.flatten(1)
        if len(ground):
            albedo.index_copy_(1, ground, self._road_colour(seen, ground, sequence))
        colour = albedo.reshape(seen.albedo.shape).mul_(seen.light)
        haze = self._haze[sequence].t()[..., None]
        thick = -self._thick[sequence][:, None]
        veil = 1 - (thick * seen.length).mul_(seen.depth).exp_()
        colour = colour.lerp_(haze, veil[None]).flatten(1)
        sky = seen.hit.logical_not().flatten().nonzero()[:, 0]
        if len(sky):
            owner = sequence.index_select(0, sky // seen.hit.shape[1])
            direction = seen.direction.flatten(1).index_select(1, sky)
            colour.index_copy_(1, sky, self._sky(direction, owner))
        return colour.reshape(seen.albedo.shape)

    def _sky(self, direction: Tensor, sequence: Tensor) -> Tensor:
        """Gradient from horizon to zenith with a layer of clouds, [3, N]."""
        level = (direction[0] ** 2 + direction[2] ** 2).sqrt().clamp(min=1e-3)
        up = (-direction[1] / torch.hypot(level, direction[1])).clamp(0.0, 1.0)
        looks = torch.cat([self._haze.t(), self._zenith.t(), self._clouds[None]])
        looks = looks.index_select(1, sequence)
        haze, zenith = looks[:3], looks[3:6]
        colour = torch.lerp(haze, zenith, (up * 1.6).clamp(max=1.0).sqrt())
        far = 0.35 / (up + 0.12)
        cloud = texture.sample(
            torch.full_like(up, texture.CLOUDS),
            direction[0] / level * far * 0.4 + looks[6] * 7.0,
            direction[2] / level * far * 0.4,
            far * 0.004,
        )
        cover = looks[6] * ((cloud - 0.45) * 3).clamp(0, 1) * (up * 4).clamp(max=1)
        return torch.lerp(colour, haze * 1.05, cover)

    def _draw_asphalt(self) -> Tensor:
        """What `_road_colour` needs of each sequence, [15, B]."""
        dice = self._dice
        tone = dice.log_uniform("asphalt", 0.05, 0.22)
        tints = [tone * dice.uniform(f"asphalt {k}", 0.92, 1.08) for k in "rgb"]
        return torch.stack(
            [
                *tints,
                self._edge,
                self._lane,
                self._lanes * self._lane,
                (self._lanes > 1.5).float(),
                1 / dice.uniform("dash", 6.0, 12.0),
                dice.uniform("dash share", 0.3, 0.6),
                dice.chance("solid middle", 0.3).float(),
                dice.chance("border", 0.6).float(),
                dice.uniform("marking", 0.35, 0.8),
                dice.chance("yellow middle", 0.3).float(),
            ]
        )

    def _road_colour(self, seen: Surface, pixel: Tensor, sequence: Tensor) -> Tensor:
        """Asphalt and markings over the terrain's own colour [3, N]."""
        owner = sequence.index_select(0, pixel // seen.hit.shape[1])
        flat = torch.stack([seen.point[0], seen.point[2], seen.glow, seen.footprint]).flatten(1)
        x, z, guess, width = flat.index_select(1, pixel).unbind(0)
        station, side = self._on_road(x, z, guess, owner)
        looks = self._asphalt.index_select(1, owner)
        edge, lane, half, many, rate, share, solid, border, paint_, yellow = looks[3:].unbind(0)
        coarse = texture.sample(torch.full_like(x, texture.CLOUDS), x / 9, z / 9, width / 9)
        fine = texture.sample(torch.full_like(x, texture.GRAIN), x / 1.7, z / 1.7, width / 1.7)
        worn = 0.12 * torch.cos(side / lane * (2 * math.pi)).abs_()
        patch = texture.sample(torch.full_like(x, texture.PATCHES), x / 23, z / 23, width / 23)
        crack = texture.sample(torch.full_like(x, texture.CRACKS), x / 7, z / 7, width / 7)
        tone = 0.35 + 0.6 * coarse + 0.4 * fine + 0.5 * patch - 0.45 * crack - worn
        dash = station * rate
        broken = (dash - dash.floor() < share).float()
        across = side.abs()
        middle = _stripe(side, 0.075, width) * torch.maximum(broken, solid)
        lines = _stripe(across - lane, 0.075, width) * broken * many
        lines = torch.maximum(lines, _stripe(across - half, 0.075, width) * border)
        lines = torch.maximum(lines, self._crossing(station, side, width))
        bright = paint_ * (0.75 + 0.4 * fine)
        middle_rgb = torch.stack(
            [bright, bright * (1 - 0.25 * yellow), bright * (1 - 0.85 * yellow)]
        )
        road = torch.lerp(looks[:3] * tone, bright[None], 0.9 * lines[None])
        road = road.lerp_(middle_rgb, 0.9 * middle[None])
        soil = seen.albedo.flatten(1).index_select(1, pixel)
        return soil.lerp_(road, _stripe(side, edge, width)[None])

    @staticmethod
    def _crossing(station: Tensor, side: Tensor, width: Tensor) -> Tensor:
        """Zebra crossings, 3 m long, every 90 m."""
        along = station - torch.floor(station / 90.0) * 90.0 - 45.0
        bars = side - torch.floor(side) - 0.5
        return _stripe(along, 1.5, width) * _stripe(bars, 0.25, width)

    def _on_road(
        self, x: Tensor, z: Tensor, guess: Tensor, sequence: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Station and metres right of the road's middle, by Newton steps from a guess."""
        table, count = self._road.table, self._road.heading.shape[1]
        base, station = sequence * count, guess
        side = torch.zeros_like(x)
        for _ in range(3):
            index = (station / STEP).round().long().clamp_(0, count - 1)
            rx, rz, sin, cos, bend = table.index_select(1, base + index).unbind(0)
            ahead = (x - rx) * sin + (z - rz) * cos
            side = (x - rx) * cos - (z - rz) * sin
            # On a bend, a step at distance `side` covers less of the middle line on the inside.
            ahead = ahead / (1 - bend * side).clamp(min=0.3)
            station = index * STEP + ahead
            side = side - 0.5 * bend * ahead.clamp(-STEP, STEP) ** 2
        return station, side


def _key(place: Tensor, side: Tensor) -> Tensor:
    """One number per place and side of the road."""
    return place * 2 + (side > 0)


def _with_station(paint_rows: Tensor, station: Tensor) -> Tensor:
    """Terrain keeps its nearest station where other things keep their glow."""
    rows = paint_rows.clone()
    rows[..., 19] = station
    return rows


def _stripe(distance: Tensor, half: Tensor | float, width: Tensor) -> Tensor:
    """Share of a pixel of some width that lies within `half` of a line."""
    return ((half - distance.abs()) / width.clamp(min=1e-4) + 0.5).clamp(0, 1)
