"""A road that never ends: its course, the hills it runs over, and how fast it is driven."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttt3r.synthetic.dice import Dice, smoothstep

START = 120.0  # metres of road behind the first camera
AHEAD = 240.0  # metres of road laid out beyond the last camera
STEP = 2.0  # metres between the samples of the course
CELL = 20.0  # side of the squares of the terrain, metres
FRAME_S = 0.1
_BEND = 70.0  # metres between the places where the heading may change
_LATERAL = 2.2  # m/s^2 that drivers accept in bends


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


class Road:
    """The course of the road's middle, sampled every STEP metres from station 0.

    The heading stays within bounds, so the road never closes on itself within sight.
    """

    def __init__(self, dice: Dice, length: float) -> None:
        self._dice = dice
        self.swing = dice.log_uniform("swing", 0.08, 1.7)
        self.sharpness = dice.uniform("sharpness", 0.45, 1.0)
        count = int(math.ceil(length / STEP)) + 2
        station = torch.arange(count, device=dice.device, dtype=torch.float64) * STEP
        self.heading = self._heading(station[None])
        middle = self._heading(station[None] + 0.5 * STEP)
        self.x = self._integrate(torch.sin(middle))
        self.z = self._integrate(torch.cos(middle))
        ahead = self._heading(station[None] + 1.0)
        self.curvature = (ahead - self._heading(station[None] - 1.0)) / 2.0
        columns = [self.x, self.z, torch.sin(self.heading), torch.cos(self.heading)]
        # [5, B * samples]: for looking up many places at once
        self.table = torch.stack([*columns, self.curvature]).float().flatten(1)

    def _heading(self, station: Tensor) -> Tensor:
        """Heading [B, S]: levels drawn every _BEND metres, blended in the middle between them."""
        place = station / _BEND
        knot = torch.floor(place)
        knot = knot.expand(self._dice.count, -1)
        level = [
            self._dice.uniform("bend", -1, 1, (knot + k).long()).double() * self.swing[:, None]
            for k in range(2)
        ]
        blend = smoothstep(((place - knot) - 0.5) / self.sharpness[:, None] + 0.5)
        return level[0] + (level[1] - level[0]) * blend

    @staticmethod
    def _integrate(rate: Tensor) -> Tensor:
        steps = torch.cumsum(rate * STEP, dim=1)
        return torch.cat([torch.zeros_like(steps[:, :1]), steps[:, :-1]], dim=1)

    def at(self, station: Tensor, side: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """World x, z and heading [B, ...] (float64) at stations, `side` metres to the right."""
        shape = station.shape
        flat = station.double().reshape(shape[0], -1).clamp(0, (self.x.shape[1] - 2) * STEP)
        index = torch.floor(flat / STEP).long()
        share = flat / STEP - index

        def between(samples: Tensor) -> Tensor:
            before, after = samples.gather(1, index), samples.gather(1, index + 1)
            return (before + (after - before) * share).reshape(shape)

        x, z, heading = between(self.x), between(self.z), between(self.heading)
        return x + side * torch.cos(heading), z - side * torch.sin(heading), heading

    def safe_speed(self) -> Tensor:
        """Speed [B, samples] that keeps sideways acceleration comfortable here and just ahead."""
        limit = torch.sqrt(_LATERAL / self.curvature.abs().clamp(min=1e-4))
        window = int(18 / STEP)
        limit = torch.nn.functional.pad(limit, (0, window - 1), value=1e9)
        return limit.unfold(1, window, 1).amin(-1)


def drive(dice: Dice, road: Road, frames: int, motion: float) -> Tensor:
    """Stations [B, frames] (float64) of a car that brakes for bends, and sometimes stops."""
    time = torch.arange(frames, device=dice.device, dtype=torch.float64)[None] * FRAME_S
    time = time.expand(dice.count, -1)
    base = dice.log_uniform("speed", 1.2, 30.0)[:, None].double()
    wish = base * (0.75 + 0.25 * dice.noise("mood", time / 6.0))
    stop = dice.chance("stop", 0.1, torch.floor(time / 12.0).long())
    wish = torch.where(stop, 0.0, wish).unbind(1)
    safe = road.safe_speed()
    station = torch.full((dice.count,), START, device=dice.device, dtype=torch.float64)
    speed = torch.minimum(wish[0], _lookup(safe, station))
    stations = [station]
    for frame in range(1, frames):
        aim = torch.minimum(wish[frame], _lookup(safe, station))
        change = (aim - speed).clamp(-5.0 * FRAME_S, 2.5 * FRAME_S)
        speed = speed + change
        station = station + speed * (FRAME_S * motion)
        stations.append(station)
    return torch.stack(stations, dim=1)


def _lookup(samples: Tensor, station: Tensor) -> Tensor:
    index = (station / STEP).long().clamp(max=samples.shape[1] - 1)
    return samples.gather(1, index[:, None])[:, 0]
