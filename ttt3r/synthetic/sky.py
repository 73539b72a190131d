"""Daylight: sun, sky and haze of each street."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttt3r.synthetic import texture
from ttt3r.synthetic.dice import Dice
from ttt3r.synthetic.raycast import Light, Surface

_NOON, _DUSK = (1.05, 0.95, 0.8), (1.1, 0.8, 0.55)  # colour of the sun
_SHADE = (0.85, 0.95, 1.1)  # colour of the light from a clear sky
_HORIZON, _ZENITH = (0.75, 0.82, 0.92), (0.2, 0.36, 0.75)


class Sky:
    """From clear noon to overcast dusk, one sky a sequence."""

    def __init__(self, dice: Dice) -> None:
        def rgb(values: tuple[float, float, float]) -> Tensor:
            return torch.tensor(values, device=dice.device)

        angle = dice.uniform("sun angle", 0, 2 * math.pi)
        tilt = dice.uniform("sun tilt", 0.2, 1.3)
        towards = [tilt.cos() * angle.sin(), -tilt.sin(), tilt.cos() * angle.cos()]
        overcast = dice.uniform("overcast", -0.4, 1.0).clamp(0, 1)[:, None]
        day = dice.log_uniform("daylight", 0.6, 1.4)[:, None]
        sun = torch.lerp(rgb(_NOON), rgb(_DUSK), (1 - tilt / 1.3)[:, None])
        shade = torch.lerp(rgb(_SHADE), torch.ones_like(sun), overcast)
        self.light = Light(
            torch.stack(towards, dim=-1),
            1.5 * (1 - overcast) * day * sun,
            (0.45 + 0.5 * overcast) * day * shade,
        )
        white = torch.lerp(rgb(_HORIZON), torch.ones_like(sun), overcast)
        haze = white * day * dice.uniform("horizon", 0.6, 1.05)[:, None]
        zenith = torch.lerp(rgb(_ZENITH), 0.85 * white, overcast) * day
        clouds = dice.uniform("clouds", -0.3, 1.0).clamp(0, 1)
        thick = dice.log_uniform("haze", 0.0008, 0.01)
        self._looks = torch.cat([haze.t(), zenith.t(), clouds[None], thick[None]])  # [8, B]

    def veil(self, colour: Tensor, seen: Surface, sequence: Tensor) -> Tensor:
        """Lay haze over colours [3, F, P] of the frames of some sequences [F], and add the sky."""
        looks = self._looks[:, sequence, None]
        share = 1 - (-looks[7] * seen.length).mul_(seen.depth).exp_()
        shape, colour = colour.shape, colour.lerp_(looks[:3], share[None]).flatten(1)
        pixel = seen.hit.logical_not().flatten().nonzero()[:, 0]
        if len(pixel):
            owner = sequence.index_select(0, pixel // shape[2])
            direction = seen.direction.flatten(1).index_select(1, pixel)
            colour.index_copy_(1, pixel, self._gaze(direction, self._looks.index_select(1, owner)))
        return colour.reshape(shape)

    @staticmethod
    def _gaze(direction: Tensor, looks: Tensor) -> Tensor:
        """Gradient from horizon to zenith with a layer of clouds, [3, N]."""
        level = torch.hypot(direction[0], direction[2]).clamp(min=1e-3)
        up = (-direction[1] / torch.hypot(level, direction[1])).clamp(0.0, 1.0)
        haze, zenith, clouds = looks[:3], looks[3:6], looks[6]
        colour = torch.lerp(haze, zenith, (up * 1.6).clamp(max=1.0).sqrt())
        far = 0.35 / (up + 0.12)
        x, z = (0.4 * far * direction[k] / level for k in (0, 2))
        kind = torch.full_like(up, texture.CLOUDS)
        cloud = texture.sample(kind, x + 7.0 * clouds, z, 0.004 * far)
        cover = clouds * ((cloud - 0.45) * 3).clamp(0, 1) * (up * 4).clamp(max=1)
        return torch.lerp(colour, haze * 1.05, cover)
