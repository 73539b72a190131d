"""Random numbers that are a function of (seed, name, index) and of nothing else."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ttt3r.fused import KERNELS

_LOW = 0xFFFFFFFF


class Dice:
    """Counter-based draws for a batch of seeds: no state, so no draw depends on another.

    Every method returns [B, ...] for `index` [B, ...] (or [1, ...]: the same index for all
    seeds), and [B] without one. The same seed, name and index always give the same value,
    whatever the batch, which lets endless streets be laid out from any place on.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        if len(seeds) == 0 or min(seeds) < 0:
            raise ValueError(f"seeds must be one or more non-negative integers, found {seeds!r}")
        values = torch.tensor([int(seed) for seed in seeds], dtype=torch.int64, device=device)
        self.device = values.device
        self.count = len(seeds)
        self._keys = _mix(_mix(values & _LOW) ^ (values >> 32))

    def unit(self, name: str, index: Tensor | None = None) -> Tensor:
        """Uniform float32 in [0, 1)."""
        label = zlib.crc32(name.encode())
        if index is not None and index.numel() and KERNELS.are_on(self.device):
            found = KERNELS.unit(self._keys, label, index.to(torch.int64))
            if found is not None:
                return found
        key = _mix(self._keys ^ label)
        if index is not None:
            key = key.reshape(-1, *[1] * (index.ndim - 1))
            key = _mix(key ^ _mix((index.to(torch.int64) + 0x9E3779B9) & _LOW))
        return (key >> 8).to(torch.float32) * 2.0**-24

    def uniform(self, name: str, low: float, high: float, index: Tensor | None = None) -> Tensor:
        """Uniform in [low, high)."""
        return low + (high - low) * self.unit(name, index)

    def log_uniform(
        self, name: str, low: float, high: float, index: Tensor | None = None
    ) -> Tensor:
        """Uniform in the logarithm, between two positive bounds."""
        return torch.exp(self.uniform(name, math.log(low), math.log(high), index))

    def chance(self, name: str, probability: float | Tensor, index: Tensor | None = None) -> Tensor:
        """Boolean, true with the given probability."""
        return self.unit(name, index) < probability

    def choice(self, name: str, options: Sequence[float], index: Tensor | None = None) -> Tensor:
        """One of the options (float32), each equally likely."""
        table = torch.tensor(list(options), dtype=torch.float32, device=self.device)
        return table[(self.unit(name, index) * len(options)).long()]

    def noise(self, name: str, position: Tensor) -> Tensor:
        """Smooth value noise in [-1, 1) along a line, knots at the integers of `position`."""
        knot = torch.floor(position)
        blend = smoothstep(position - knot)
        before = self.uniform(name, -1.0, 1.0, knot.long())
        after = self.uniform(name, -1.0, 1.0, knot.long() + 1)
        return (before + (after - before) * blend).to(position.dtype)


def smoothstep(x: Tensor) -> Tensor:
    """Cubic ramp from 0 at x <= 0 to 1 at x >= 1, level at both ends."""
    x = x.clamp(0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def _mix(x: Tensor) -> Tensor:
    """Murmur3's 32-bit finaliser, on int64 that hold 32 bits."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW
    return x ^ (x >> 16)
