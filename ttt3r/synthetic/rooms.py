"""Furnished rooms seen by a hand-held camera that wanders about and comes back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttt3r.synthetic import texture
from ttt3r.synthetic.camera import look
from ttt3r.synthetic.dice import Dice
from ttt3r.synthetic.raycast import Light, Surface
from ttt3r.synthetic.solids import (
    BOX,
    CYLINDER,
    ELLIPSOID,
    Solids,
    join,
    make_solids,
    paint,
    turn_basis,
)

FURNITURE, PICTURES = 20, 10
_CLEARANCE = 0.3  # metres between the camera's region and any furniture
_WAVES = 3
_ONE = torch.ones(())

_WALL_TEXTURES = (texture.PLASTER, texture.CLOUDS, texture.BRICKS, texture.STRIPES, texture.SPOTS,
                  texture.GRAIN, texture.PATCHES, texture.TILES)  # fmt: skip
_FLOOR_TEXTURES = (texture.PLANKS, texture.TILES, texture.GRAIN, texture.WEAVE, texture.PLANKS)
_THING_TEXTURES = (texture.CLOUDS, texture.GRAIN, texture.STREAKS, texture.WEAVE, texture.STRIPES,
                   texture.PATCHES, texture.PLANKS, texture.POSTER, texture.SPOTS,
                   texture.BRICKS)  # fmt: skip


class Rooms:
    """One closed room a seed: 3 to 10 m wide, origin on the floor's middle, y down.

    The camera stays in an ellipse about the middle that is kept clear of furniture.
    """

    distance = 1e9

    def __init__(self, dice: Dice, motion: float, turn: float = 1.0) -> None:
        self._dice, self._motion, self._turn = dice, motion, turn
        self._half = torch.stack(
            [dice.uniform("room x", 1.7, 5.0), dice.uniform("room z", 1.7, 5.0)], dim=-1
        )
        self._ceiling = dice.uniform("room height", 2.3, 3.4)
        share = torch.stack([dice.uniform(f"clear {k}", 0.32, 0.5) for k in "xz"], dim=-1)
        self._clear = self._half * share
        self.light = self._draw_light()
        self._solids = join([self._shell(), self._furniture(), self._on_walls()])

    def _draw_light(self) -> Light:
        dice = self._dice
        angle = dice.uniform("lamp angle", 0, 2 * math.pi)
        tilt = dice.uniform("lamp tilt", 0.4, 1.3)
        direction = [tilt.cos() * angle.sin(), -tilt.sin(), tilt.cos() * angle.cos()]
        warm = dice.uniform("lamp warmth", -0.15, 0.15)
        tint = torch.stack([1 + warm, torch.ones_like(warm), 1 - warm], dim=-1)
        sun = dice.uniform("lamp", 0.25, 0.8)[:, None] * tint
        ambient = dice.uniform("ambient", 0.35, 0.7)[:, None] * (0.5 + 0.5 * tint)
        return Light(torch.stack(direction, dim=-1), sun, ambient)

    def _colour(self, name: str, index: Tensor, low: float = 0.04, high: float = 0.9) -> Tensor:
        """Random linear RGB [..., 3]: a grey level and a tint."""
        level = self._dice.log_uniform(f"{name} level", low, high, index)
        tint = [self._dice.uniform(f"{name} {k}", 0.55, 1.3, index) for k in "rgb"]
        return (level[..., None] * torch.stack(tint, dim=-1)).clamp(0.01, 0.95)

    def _paint(
        self, name: str, index: Tensor, textures: tuple[int, ...], repeat: tuple[float, float]
    ) -> Tensor:
        dice = self._dice
        return paint(
            self._colour(f"{name} low", index),
            self._colour(f"{name} high", index, 0.15),
            texture=dice.choice(f"{name} texture", textures, index),
            repeat=dice.log_uniform(f"{name} repeat", *repeat, index),
            offset=(dice.unit(f"{name} across", index), dice.unit(f"{name} down", index)),
        )

    def _index(self, count: int) -> Tensor:
        return torch.arange(count, device=self._dice.device)[None].expand(self._dice.count, -1)

    def _shell(self) -> Solids:
        """Floor, ceiling and four walls, as slabs that overlap at the corners."""
        x, z, top = self._half[:, 0], self._half[:, 1], self._ceiling
        thick, zero = torch.full_like(x, 0.25), torch.zeros_like(x)
        middle = -top / 2
        places = [
            (zero, thick, zero, x + 0.5, thick, z + 0.5),
            (zero, -top - thick, zero, x + 0.5, thick, z + 0.5),
            (x + thick, middle, zero, thick, top / 2 + 0.5, z + 0.5),
            (-x - thick, middle, zero, thick, top / 2 + 0.5, z + 0.5),
            (zero, middle, z + thick, x + 0.5, top / 2 + 0.5, thick),
            (zero, middle, -z - thick, x + 0.5, top / 2 + 0.5, thick),
        ]
        values = torch.stack([torch.stack(place, dim=-1) for place in places], dim=1)
        walls = self._index(4)
        wall = self._paint("wall", walls, _WALL_TEXTURES, (0.6, 3.0))
        plain = self._dice.chance("same walls", 0.5)[:, None, None]
        wall = torch.where(plain, wall[:, :1], wall)
        floor = self._paint("floor", self._index(1), _FLOOR_TEXTURES, (0.6, 2.5))
        ceiling = self._paint("ceiling", self._index(1), _WALL_TEXTURES[:6], (0.8, 3.0))
        basis = torch.diag_embed(values[..., 3:])
        return make_solids(BOX, values[..., :3], basis, torch.cat([floor, ceiling, wall], dim=1))

    def _furniture(self) -> Solids:
        """Things that stand on the floor between the clear ellipse and the walls."""
        dice, index = self._dice, self._index(FURNITURE)
        angle = dice.uniform("thing angle", 0, 2 * math.pi, index)
        around = torch.stack([torch.sin(angle), torch.cos(angle)], dim=-1)
        inner = _ellipse_radius(self._clear, around)
        outer = (self._half[:, None] / around.abs().clamp(min=1e-4)).amin(-1)
        room = (outer - inner - _CLEARANCE).clamp(min=0.02) / 2
        size = torch.minimum(dice.log_uniform("thing size", 0.12, 0.8, index), 0.85 * room)
        place = dice.uniform("thing place", 0, 1, index)
        radius = inner + _CLEARANCE + size + place * (2 * room - 2 * size)
        flat = around * radius[..., None]
        squash = dice.uniform("thing squash", 0.45, 1.0, index)
        tall = dice.log_uniform("thing height", 0.2, 1.1, index)
        tall = torch.minimum(tall, self._ceiling[:, None] / 2 - 0.02)
        kind = dice.unit("thing kind", index)
        present = index < dice.uniform("things", 5, FURNITURE + 1)[:, None]
        heading = dice.uniform("thing heading", -math.pi, math.pi, index)
        heading = torch.where(dice.chance("thing square", 0.5, index), 0.0, heading)
        colours = self._paint("thing", index, _THING_TEXTURES, (0.25, 1.6))
        # A box turned any way keeps inside the circle of its radius `size`.
        square = torch.stack([size * 0.75, tall, size * 0.6 * squash], dim=-1)
        upright = torch.stack([size * squash, tall, size * squash], dim=-1)
        ball = torch.stack([size, torch.minimum(size * squash, tall), size], dim=-1)
        parts = []
        for shape, half, chosen in (
            (BOX, square, kind < 0.6),
            (CYLINDER, upright, (kind >= 0.6) & (kind < 0.8)),
            (ELLIPSOID, ball, kind >= 0.8),
        ):
            lifted = torch.stack([flat[..., 0], -half[..., 1], flat[..., 1]], dim=-1)
            basis = turn_basis(heading, half)
            parts.append(make_solids(shape, lifted, basis, colours, present & chosen))
        return join([*parts, self._shelves(parts[0], colours)])

    def _shelves(self, boxes: Solids, colours: Tensor) -> Solids:
        """Smaller things on top of the boxes that are low enough to carry something."""
        dice, index = self._dice, self._index(FURNITURE)
        half = boxes.basis.norm(dim=-2)
        size = half * torch.stack(
            [dice.uniform(f"small {k}", 0.25, 0.7, index) for k in "xyz"], dim=-1
        )
        top = boxes.centre[..., 1] - half[..., 1]
        room = self._ceiling[:, None] + top
        size[..., 1] = torch.minimum(size[..., 1], room / 2 - 0.02)
        centre = boxes.centre.clone()
        centre[..., 1] = top - size[..., 1]
        basis = boxes.basis / half.unsqueeze(-2) * size.unsqueeze(-2)
        present = boxes.present & (size[..., 1] > 0.05) & dice.chance("small", 0.6, index)
        return make_solids(BOX, centre, basis, colours.roll(1, dims=1), present)

    def _on_walls(self) -> Solids:
        """Pictures, windows and doors: thin boxes on the walls."""
        dice, index = self._dice, self._index(PICTURES)
        wall = (dice.unit("picture wall", index) * 4).long()
        on_x = wall < 2
        sign = torch.where(wall % 2 == 0, 1.0, -1.0)
        along = torch.where(on_x, self._half[:, None, 1], self._half[:, None, 0])
        wide = torch.minimum(dice.log_uniform("picture width", 0.15, 0.7, index), 0.4 * along)
        tall = dice.log_uniform("picture height", 0.15, 0.55, index)
        door = dice.chance("door", 0.2, index)
        wide, tall = torch.where(door, 0.42, wide), torch.where(door, 1.0, tall)
        slide = dice.uniform("picture slide", -0.9, 0.9, index) * (along - wide)
        height = torch.where(door, 1.0, dice.uniform("picture level", 1.2, 1.7, index))
        depth = torch.full_like(wide, 0.02) + 0.02 * dice.unit("picture depth", index)
        wall_at = torch.where(on_x, self._half[:, None, 0], self._half[:, None, 1]) * sign
        x, z = torch.where(on_x, wall_at, slide), torch.where(on_x, slide, wall_at)
        heading = torch.where(on_x, math.pi / 2, 0.0)
        half = torch.stack([wide, tall, depth], dim=-1)
        centre = torch.stack([x, -height, z], dim=-1)
        present = index < dice.uniform("pictures", 2, PICTURES + 1)[:, None]
        colours = paint(
            self._colour("picture low", index),
            self._colour("picture high", index, 0.3),
            texture=dice.choice("picture texture", (texture.POSTER, texture.PATCHES,
                                texture.CLOUDS, texture.SPOTS, texture.WINDOWS), index),
            repeat=dice.log_uniform("picture repeat", 0.4, 1.5, index),
            offset=(dice.unit("picture across", index), dice.unit("picture down", index)),
            note=torch.where(dice.chance("picture glow", 0.2, index), 0.8, 0.0),
        )  # fmt: skip
        return make_solids(BOX, centre, turn_basis(heading, half), colours, present)

    def _wander(self, name: str, clock: Tensor, pace: Tensor) -> Tensor:
        """Smooth noise [B, T] in [-1, 1] whose mean speed is about `pace` per frame."""
        total = torch.zeros(1, device=clock.device, dtype=clock.dtype)
        for wave in range(_WAVES):
            share = (0.5, 0.3, 0.2)[wave]
            rate = pace * self._dice.uniform(f"{name} rate {wave}", 0.7, 1.3) * (1 + 1.3 * wave)
            phase = self._dice.uniform(f"{name} phase {wave}", 0, 2 * math.pi)
            total = total + share * torch.sin(rate[:, None] * clock + phase[:, None])
        return total

    def poses(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """T_world_cam [B, stop - start, 4, 4]; rooms are always drawn whole."""
        dice = self._dice
        clock = torch.arange(start, stop, device=dice.device, dtype=torch.float64) * self._motion
        step = dice.log_uniform("step", 0.02, 0.17)
        turn = dice.log_uniform("turn", 0.008, 0.09) * self._turn
        place = [
            self._clear[:, k, None]
            * 0.7
            * self._wander(f"walk {k}", clock, 0.8 * step / self._clear[:, k])
            for k in range(2)
        ]
        level = dice.uniform("eye level", 1.2, 1.65)[:, None]
        level = level + 0.12 * self._wander("bob", clock, step / 0.5)
        sweep = dice.uniform("sweep", 0.6, 3.0)
        heading = dice.uniform("heading", -math.pi, math.pi)[:, None] + sweep[
            :, None
        ] * self._wander("yaw", clock, turn / sweep)
        pitch = 0.3 * self._wander("pitch", clock, 0.35 * turn / 0.3) - 0.08
        roll = 0.1 * self._wander("roll", clock, 0.2 * turn / 0.1)
        T_world_cam = torch.eye(4, device=dice.device).repeat(dice.count, stop - start, 1, 1)
        T_world_cam[..., :3, :3] = look(heading, pitch, roll).float()
        T_world_cam[..., :3, 3] = torch.stack([place[0], -level, place[1]], dim=-1).float()
        return T_world_cam, None

    def static(self, start: int, stop: int) -> Solids:
        """Everything in the room."""
        return self._solids

    def moving(self, start: int, stop: int) -> Solids | None:
        """Nothing moves in a room."""
        return None

    def colour(self, seen: Surface, frames: int) -> Tensor:
        """Linear RGB [3, F, P] of what pixels see."""
        return seen.albedo.mul_(torch.lerp(seen.light, _ONE.to(seen.light), seen.note))


def _ellipse_radius(half: Tensor, direction: Tensor) -> Tensor:
    """Distance [B, P] from the middle to an ellipse with half axes [B, 2] along [B, P, 2]."""
    return (direction / half[:, None]).square().sum(-1).rsqrt()
