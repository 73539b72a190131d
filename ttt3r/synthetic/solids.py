"""Solids that rays can hit: where they stand and how they are painted."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ttt3r.synthetic.dice import Dice

BOX, CYLINDER, ELLIPSOID, TRIANGLE = range(4)

# Columns of `Solids.paint`.
COLOUR_LOW, COLOUR_HIGH, COLOUR_MASK = slice(0, 3), slice(3, 6), slice(6, 9)
TEXTURE, TEXTURE_RATE, MASK, MASK_RATE_ACROSS, MASK_RATE_DOWN = 9, 10, 11, 12, 13
OFFSET_ACROSS, OFFSET_DOWN, MASK_OFFSET_ACROSS, MASK_OFFSET_DOWN, LAYER, NOTE = range(14, 20)
PAINT_COLUMNS = 20

# Values of the LAYER column.
ON_OBJECT, ON_WORLD, ON_ROAD = 0.0, 1.0, 2.0


@dataclass(frozen=True)
class Solids:
    """A batch of solids [B, P], or [B, T, P] where they move from frame to frame.

    A solid is the image under `x_world = centre + basis @ x_local` of a unit shape: the box
    [-1, 1]^3, the cylinder of radius 1 about the y axis with -1 <= y <= 1, the unit sphere,
    or the triangle (0,0,0), (1,0,0), (0,0,1).
    """

    kind: Tensor  # [...] BOX, CYLINDER, ELLIPSOID or TRIANGLE
    centre: Tensor  # [..., 3] metres
    basis: Tensor  # [..., 3, 3] columns: local axes in the world, metres
    paint: Tensor  # [..., PAINT_COLUMNS]
    present: Tensor  # [...] bool; absent ones are never drawn
    station: Tensor  # [...] metres along the road, in worlds too long to draw whole; or NaN


def join(parts: list[Solids]) -> Solids:
    """Put batches of solids together along their last dimension P."""

    def together(name: str) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        return torch.cat(tensors, dim=parts[0].present.ndim - 1)

    return Solids(**{field.name: together(field.name) for field in fields(Solids)})


def make_solids(
    kind: int,
    centre: Tensor,
    basis: Tensor,
    paint: Tensor,
    present: Tensor | None = None,
    station: Tensor | None = None,
) -> Solids:
    """Solids of one kind; presence defaults to all, station to none (NaN)."""
    shape = centre.shape[:-1]
    present = (
        torch.ones(shape, dtype=torch.bool, device=centre.device) if present is None else present
    )
    station = centre.new_full(shape, torch.nan) if station is None else station
    return Solids(
        kind=torch.full(shape, kind, dtype=torch.int64, device=centre.device),
        centre=centre,
        basis=basis.expand(*shape, 3, 3),
        paint=paint.expand(*shape, PAINT_COLUMNS),
        present=present.expand(shape),
        station=station.expand(shape),
    )


@dataclass(frozen=True)
class Footing:
    """Where things stand on the ground, [...] of them."""

    position: Tensor  # [..., 3] metres, world
    frame: Tensor  # [..., 3, 3] columns: right, down, forward, unit length
    station: Tensor  # [...]
    present: Tensor  # [...] bool

    def part(
        self,
        kind: int,
        shift: tuple[Tensor, Tensor, Tensor],
        half: tuple[Tensor, Tensor, Tensor],
        colours: Tensor,
        *,
        present: Tensor | None = None,
        axes: Tensor | None = None,
    ) -> Solids:
        """A solid `shift` (right, down, forward) from here; `axes` where not along `frame`."""
        axes = self.frame if axes is None else axes
        offset = (self.frame @ torch.stack(shift, dim=-1)[..., None])[..., 0]
        basis = axes * torch.stack(half, dim=-1).unsqueeze(-2)
        present = self.present if present is None else self.present & present
        return make_solids(kind, self.position + offset, basis, colours, present, self.station)


def turn_basis(heading: Tensor, half: Tensor, climb: Tensor | None = None) -> Tensor:
    """Basis of an upright solid: local z looks along the heading, local x to its right.

    Args:
        heading: [...] radians, 0 along world z, positive towards world x (to the right).
        half: [..., 3] half sizes right, down, forward, metres.
        climb: [...] radians by which forward points above the horizon.

    Returns:
        [..., 3, 3] columns right, down, forward.
    """
    sin, cos = torch.sin(heading), torch.cos(heading)
    zero = torch.zeros_like(sin)
    rise, level = (zero, zero + 1) if climb is None else (torch.sin(climb), torch.cos(climb))
    right = torch.stack([cos, zero, -sin], dim=-1)
    forward = torch.stack([sin * level, -rise, cos * level], dim=-1)
    down = torch.linalg.cross(forward, right)
    return torch.stack([right, down, forward], dim=-1) * half.unsqueeze(-2)


def paint(
    low: Tensor,
    high: Tensor,
    *,
    texture: Tensor | float = 0.0,
    repeat: Tensor | float = 1.0,
    mask_colour: Tensor | None = None,
    mask: Tensor | float = 0.0,
    mask_size: tuple[Tensor | float, Tensor | float] = (1.0, 1.0),
    offset: tuple[Tensor | float, Tensor | float] = (0.0, 0.0),
    mask_offset: tuple[Tensor | float, Tensor | float] = (0.0, 0.0),
    layer: float = ON_OBJECT,
    note: Tensor | float = 0.0,
) -> Tensor:
    """Fill rows of `Solids.paint`: two colours mixed by a texture, a third laid on by a mask.

    Args:
        low, high: [..., 3] linear RGB albedo where the texture is 0 and 1.
        texture, mask: index into the texture bank; mask 0 (BLANK) lays nothing on.
        repeat: size of one repeat of the texture, metres.
        mask_size: width and height of one repeat of the mask, metres; sides only, not tops.
        note: a number for the world's own use, handed back where the solid is seen.
    """
    shape = torch.broadcast_shapes(low.shape, high.shape)[:-1]
    rows = low.new_zeros(*shape, PAINT_COLUMNS)
    rows[..., COLOUR_LOW], rows[..., COLOUR_HIGH] = low, high
    rows[..., COLOUR_MASK] = low if mask_colour is None else mask_colour
    rows[..., TEXTURE], rows[..., TEXTURE_RATE] = texture, 1.0 / repeat
    rows[..., MASK] = mask
    rows[..., MASK_RATE_ACROSS], rows[..., MASK_RATE_DOWN] = 1.0 / mask_size[0], 1.0 / mask_size[1]
    rows[..., OFFSET_ACROSS], rows[..., OFFSET_DOWN] = offset
    rows[..., MASK_OFFSET_ACROSS], rows[..., MASK_OFFSET_DOWN] = mask_offset
    rows[..., LAYER], rows[..., NOTE] = layer, note
    return rows


def draw_colour(
    dice: Dice, name: str, index: Tensor, low: float, high: float, tint: float = 0.25
) -> Tensor:
    """Random linear RGB [..., 3]: a grey level between two bounds, and a tint."""
    level = dice.log_uniform(f"{name} level", low, high, index)
    channels = [dice.uniform(f"{name} {k}", 1 - tint, 1 + tint, index) for k in "rgb"]
    return (level[..., None] * torch.stack(channels, dim=-1)).clamp(0.01, 0.95)
