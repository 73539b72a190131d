"""Streets seen from a moving car, laid out along the road around the camera."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttt3r.synthetic.camera import look
from ttt3r.synthetic.cars import make_cars
from ttt3r.synthetic.dice import Dice
from ttt3r.synthetic.raycast import Surface
from ttt3r.synthetic.road import AHEAD, FRAME_S, START, START_SPREAD, Road, drive
from ttt3r.synthetic.roadside import Profile, Site
from ttt3r.synthetic.sky import Sky
from ttt3r.synthetic.solids import ON_ROAD, Solids, join
from ttt3r.synthetic.tarmac import Tarmac
from ttt3r.synthetic.terrain import CELL, Hills, make_terrain

BEHIND, SIGHT = 30.0, 150.0  # metres of road drawn behind and ahead of the camera
_CONVOY = 28.0  # metres between the places of moving cars
_FASTEST = 3.2  # metres a frame, with a margin


class Streets:
    """One street a seed. The world's y axis points down; the road starts along +z."""

    distance = 165.0

    def __init__(self, dice: Dice, motion: float) -> None:
        self._dice, self._motion = dice, motion
        self._hills, self._profile = Hills(dice), Profile(dice)
        self._sky, self._tarmac = Sky(dice), Tarmac(dice, self._profile)
        self.light = self._sky.light
        self._extend(16)

    def _extend(self, frames: int) -> None:
        """Lay out the road and drive it for so many frames."""
        length = START + START_SPREAD + AHEAD + frames * _FASTEST * max(self._motion, 0.1)
        road = Road(self._dice, length)
        self._stations = drive(self._dice, road, frames, self._motion)
        self._site = Site(self._dice, road, self._hills, self._profile)

    def _driven(self, start: int, stop: int) -> Tensor:
        """Stations [B, T] of the camera in frames start..stop."""
        if stop > self._stations.shape[1]:
            self._extend(max(stop, 2 * self._stations.shape[1]))
        return self._stations[:, start:stop]

    def poses(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """T_world_cam [B, T, 4, 4] and the stations in reach [B, T, 2]."""
        dice, station = self._dice, self._driven(start, stop)
        side = self._profile.driver[:, None] + 0.3 * dice.noise("lane drift", station / 40.0)
        x, z, heading = self._site.road.at(station, side)
        around = [self._site.road.at(station + shift)[2] for shift in (-2.0, 2.0)]
        heading = (heading + around[0] + around[1]) / 3
        dx, dz = 2 * torch.sin(heading), 2 * torch.cos(heading)
        rise = self._hills.height(x + dx, z + dz) - self._hills.height(x - dx, z - dz)
        up = self._hills.height(x, z) + dice.uniform("camera height", 1.2, 2.0)[:, None]
        T_world_cam = torch.eye(4, device=dice.device).repeat(*station.shape, 1, 1)
        T_world_cam[..., :3, :3] = self._mount(station, heading, rise / 4)
        T_world_cam[..., :3, 3] = torch.stack([x, -up, z], dim=-1).float()
        reach = torch.stack([station - BEHIND, station + SIGHT], dim=-1).float()
        return T_world_cam, reach

    def _mount(self, station: Tensor, heading: Tensor, climb: Tensor) -> Tensor:
        """Rotation [B, T, 3, 3] of a camera fixed a little askew in a car that rocks a little."""
        dice = self._dice
        askew = [
            torch.deg2rad(dice.uniform(name, -most, most))[:, None]
            for name, most in (("yaw", 4.0), ("pitch", 5.0), ("roll", 1.5))
        ]
        shake = dice.uniform("shake", 0.0, 0.004)[:, None] * self._motion
        yaw = heading + askew[0] + 0.01 * dice.noise("steer", station / 17.0)
        pitch = climb + askew[1] + shake * dice.noise("bump", station / 1.7)
        roll = askew[2] + shake * dice.noise("lurch", station / 2.3)
        return look(yaw, pitch, roll).float()

    def static(self, start: int, stop: int) -> Solids:
        """Ground and roadside that may be seen in frames start..stop."""
        station = self._driven(start, stop)
        low, high = station[:, 0], station[:, -1]
        x, z, _ = self._site.road.at(station)
        corner, basis = self._hills.squares(x, z, self.distance + 2 * CELL)
        middle = corner + (basis[..., 0] + basis[..., 2]) / 3
        nearest = self._site.road.nearest(middle[..., 0], middle[..., 2], low, high)
        ground = make_terrain(self._dice, corner, basis, nearest)
        return join([ground, self._site.furnish(low - BEHIND, high + SIGHT)])

    def moving(self, start: int, stop: int) -> Solids | None:
        """Oncoming cars, and on some streets one that drives ahead: solids [B, T, P]."""
        here = self._driven(start, stop)
        clock = torch.arange(start, stop, device=here.device, dtype=torch.float64)[None]
        return join([self._oncoming(here, clock), self._leader(here, clock)])

    def _oncoming(self, here: Tensor, clock: Tensor) -> Solids:
        """Cars that all drive at one speed: they keep their places in a convoy without end."""
        dice = self._dice
        pace = dice.log_uniform("traffic speed", 3.0, 22.0)[:, None] * FRAME_S * self._motion
        travelled = pace.double() * clock
        count = int((BEHIND + SIGHT) / _CONVOY) + 2
        first = torch.floor((here + travelled - BEHIND) / _CONVOY).long()
        place = first[..., None] + torch.arange(count, device=here.device)
        station = (place + dice.uniform("traffic place", 0.25, 0.75, place)) * _CONVOY
        station = station - travelled[..., None]
        present = dice.chance("traffic", dice.uniform("busy", 0.0, 0.8)[:, None, None], place)
        side = -self._profile.driver[:, None, None].expand(station.shape)
        footing = self._site.stand(station, side, present & (station > 4), math.pi)
        return make_cars(dice, "traffic", place, footing)

    def _leader(self, here: Tensor, clock: Tensor) -> Solids:
        """The car ahead in the driver's lane; its distance swings slowly."""
        dice = self._dice
        swing = dice.noise("gap swing", (self._motion * clock / 60).expand_as(here))
        gap = dice.log_uniform("gap", 9.0, 45.0)[:, None] * (1 + 0.3 * swing)
        station = (here + gap)[..., None]
        side = self._profile.driver[:, None, None].expand(station.shape)
        present = dice.chance("leader", 0.35)[:, None, None].expand(station.shape)
        footing = self._site.stand(station, side, present)
        return make_cars(dice, "leader", torch.zeros_like(station, dtype=torch.int64), footing)

    def colour(self, seen: Surface, frames: int) -> Tensor:
        """Linear RGB [3, F, P] of what pixels see: with the road, haze and sky."""
        device = seen.depth.device
        sequence = torch.arange(seen.frames.start, seen.frames.stop, device=device) // frames
        ground = (seen.hit & (seen.layer > ON_ROAD - 0.5)).flatten().nonzero()[:, 0]
        albedo = seen.albedo.flatten(1)
        if len(ground):
            albedo.index_copy_(1, ground, self._pave(seen, ground, sequence))
        colour = albedo.reshape(seen.albedo.shape).mul_(seen.light)
        return self._sky.veil(colour, seen, sequence)

    def _pave(self, seen: Surface, pixel: Tensor, sequence: Tensor) -> Tensor:
        """Albedo [3, N] of the chosen pixels, which all see the ground."""
        owner = sequence.index_select(0, pixel // seen.hit.shape[1])
        values = torch.stack([seen.point[0], seen.point[2], seen.note, seen.footprint]).flatten(1)
        x, z, guess, width = values.index_select(1, pixel).unbind(0)
        station, side = self._site.road.locate(x, z, guess, owner)
        soil = seen.albedo.flatten(1).index_select(1, pixel)
        return self._tarmac.cover(soil, (x, z), station, side, width, owner)
