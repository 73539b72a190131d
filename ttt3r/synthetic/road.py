"""A road that never ends: its course, and how fast it is driven."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttt3r.synthetic.dice import Dice, smoothstep

START = 120.0  # metres of road, at least, behind the first camera
START_SPREAD = 250.0  # metres within which drives start
AHEAD = 240.0  # metres of road laid out beyond the last camera
STEP = 2.0  # metres between the samples of the course
FRAME_S = 0.1
_BEND = 70.0  # metres between the places where the heading may change
_LATERAL = 2.2  # m/s^2 that drivers accept in bends


class Road:
    """The course of the road's middle, sampled every STEP metres from station 0.

    The heading stays within bounds, so the road never closes on itself within sight.
    """

    def __init__(self, dice: Dice, length: float) -> None:
        self._dice = dice
        self.swing = dice.log_uniform("swing", 0.08, 1.7)
        self.sharpness = dice.uniform("sharpness", 0.45, 1.0)
        count = math.ceil(length / STEP) + 2
        station = torch.arange(count, device=dice.device, dtype=torch.float64) * STEP
        self.heading = self._heading(station[None])
        middle = self._heading(station[None] + 0.5 * STEP)
        self.x = self._integrate(torch.sin(middle))
        self.z = self._integrate(torch.cos(middle))
        ahead = self._heading(station[None] + 1.0)
        self.curvature = (ahead - self._heading(station[None] - 1.0)) / 2.0
        columns = [self.x, self.z, torch.sin(self.heading), torch.cos(self.heading)]
        # [5, B * samples]: for looking up many places at once
        self._table = torch.stack([*columns, self.curvature]).float().flatten(1)

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

    def nearest(self, x: Tensor, z: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Rough stations [B, P] of world places, searched from `low` to `high` [B] + 60 m."""
        first = ((low - 60) / STEP).long().clamp(min=0)
        span = int(((high - low).max() + 240) / STEP)
        index = first[:, None] + torch.arange(0, span, 3, device=low.device)
        index = index.clamp(max=self.x.shape[1] - 1)
        samples = torch.stack([self.x.gather(1, index), self.z.gather(1, index)], dim=-1)
        distance = torch.cdist(torch.stack([x, z], dim=-1).float(), samples.float())
        return index.gather(1, distance.argmin(dim=-1)).float() * STEP

    def locate(
        self, x: Tensor, z: Tensor, guess: Tensor, sequence: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Station and metres to the right of the road's middle, by Newton steps from a guess.

        All [N]: places in the world (float32), and the sequence whose road is meant.
        """
        count = self.heading.shape[1]
        base, station, side = sequence * count, guess, torch.zeros_like(x)
        for _ in range(4):
            index = (station / STEP).round().long().clamp_(0, count - 1)
            rx, rz, sin, cos, bend = self._table.index_select(1, base + index).unbind(0)
            ahead = (x - rx) * sin + (z - rz) * cos
            side = (x - rx) * cos - (z - rz) * sin
            # On a bend, a step at distance `side` covers less of the middle line on the inside.
            ahead = (ahead / (1 - bend * side).clamp(min=0.3)).clamp_(-10.0, 10.0)
            station = index * STEP + ahead
            side = side - 0.5 * bend * ahead.clamp(-STEP, STEP) ** 2
        return station, side

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
    wish = torch.where(stop, 0.0, wish)
    safe = road.safe_speed()
    # Drives start anywhere between the places of bends, houses and crossings.
    station = START + dice.uniform("start", 0.0, START_SPREAD).double()
    speed = torch.minimum(wish[:, 0], _lookup(safe, station))
    stations = [station]
    for frame in range(1, frames):
        aim = torch.minimum(wish[:, frame], _lookup(safe, station))
        change = (aim - speed).clamp(-5.0 * FRAME_S, 2.5 * FRAME_S)
        speed = speed + change
        station = station + speed * (FRAME_S * motion)
        stations.append(station)
    return torch.stack(stations, dim=1)


def _lookup(samples: Tensor, station: Tensor) -> Tensor:
    index = (station / STEP).long().clamp(max=samples.shape[1] - 1)
    return samples.gather(1, index[:, None])[:, 0]
