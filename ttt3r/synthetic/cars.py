"""Cars, parked or driven."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt3r.synthetic import texture
from ttt3r.synthetic.dice import Dice
from ttt3r.synthetic.solids import BOX, CYLINDER, Footing, Solids, draw_colour, join, paint

_CLEAR = 0.22  # metres of air below the body
_WHEEL = 0.32  # radius, metres


def make_cars(dice: Dice, name: str, key: Tensor, footing: Footing) -> Solids:
    """Body, cabin, wheels and the shade below of the cars numbered `key`, driving forward."""
    van = dice.chance(f"{name} van", 0.2, key)
    long = dice.uniform(f"{name} length", 1.9, 2.35, key) + 0.3 * van
    wide = dice.uniform(f"{name} width", 0.82, 0.95, key)
    tall = dice.uniform(f"{name} height", 1.4, 1.65, key) + 0.6 * van
    waist = dice.uniform(f"{name} waist", 0.55, 0.62, key) * tall
    coat, cabin, rubber = _coats(dice, name, key, 1.24 * long, tall - waist)
    zero = torch.zeros_like(long)
    bulk, glass = (waist - _CLEAR) / 2, (tall - waist) / 2
    middle = -(waist + tall) / 2
    parts = [
        footing.part(BOX, (zero, -(_CLEAR + bulk), zero), (wide, bulk, long), coat),
        footing.part(BOX, (zero, middle, -0.12 * long), (0.88 * wide, glass, 0.62 * long), cabin),
        footing.part(BOX, (zero, zero - 0.02, zero), (0.95 * wide, zero + 0.025, long), rubber),
    ]
    axle = footing.frame[..., [1, 0, 2]]  # the cylinder's axis points sideways
    wheel = (zero + _WHEEL, 1.02 * wide, zero + _WHEEL)
    for place in (-0.62, 0.62):
        shift = (zero, zero - _WHEEL, place * long)
        parts.append(footing.part(CYLINDER, shift, wheel, rubber, axes=axle))
    return join(parts)


def _coats(
    dice: Dice, name: str, key: Tensor, length: Tensor, height: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Paint of body, cabin (whose windows fill length x height) and tyres."""
    colour = torch.where(
        dice.chance(f"{name} grey", 0.55, key)[..., None],
        draw_colour(dice, f"{name} shade", key, 0.02, 0.85, 0.04),
        draw_colour(dice, f"{name} hue", key, 0.1, 0.4, 0.6),
    )
    cabin = paint(
        0.9 * colour,
        colour,
        mask=texture.GLASS,
        mask_colour=torch.full_like(colour, 0.03),
        mask_size=(length, height),
        mask_offset=(0.5, 0.5),
    )
    dark, grey = torch.full_like(colour, 0.015), torch.full_like(colour, 0.06)
    coat = paint(0.85 * colour, colour, texture=texture.STREAKS, repeat=1.5)
    return coat, cabin, paint(dark, grey, texture=texture.SPOTS, repeat=0.7)
