"""A bank of tileable grey textures with mip levels, sampled where rays hit.

Textures are looked up in surface coordinates, so they stay attached to what they are
painted on, and through mip levels, so that detail finer than a pixel fades away instead
of flickering.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

SIZE = 128  # texels along a side of the finest level
LEVELS = 8  # 128, 64, ..., 1

# Order of the bank. Masks are 0 or 1 (before filtering); the others are grey, mean near 0.5.
BLANK, CLOUDS, GRAIN, PLASTER, STREAKS, BRICKS, TILES, LEAVES, WEAVE, STRIPES = range(10)
PATCHES, POSTER, WINDOWS, BANDS, SHOPS, GLASS, PLANKS, SPOTS, CRACKS = range(10, 19)


def _octaves(rng: np.random.Generator, weights: dict[int, float], stretch: int = 1) -> np.ndarray:
    """Tileable fractal noise; `weights` maps the number of knots along a side to an amplitude."""
    spectrum = np.zeros((SIZE, SIZE))
    for knots, weight in weights.items():
        spectrum += weight * _value_noise(rng, knots, max(1, knots // stretch))
    spread = (spectrum - spectrum.mean()) / spectrum.std()
    return np.clip(0.5 + 0.22 * spread, 0.0, 1.0)


def _value_noise(rng: np.random.Generator, across: int, down: int) -> np.ndarray:
    knots = rng.uniform(-1.0, 1.0, (down, across))
    rows = _stretch_periodic(knots, SIZE)
    return _stretch_periodic(rows.T, SIZE).T


def _stretch_periodic(knots: np.ndarray, size: int) -> np.ndarray:
    """Resample the first axis to `size` with a smooth, periodic blend of neighbours."""
    position = np.arange(size) * knots.shape[0] / size
    before = np.floor(position).astype(int)
    blend = position - before
    blend = (blend * blend * (3 - 2 * blend))[:, None]
    after = (before + 1) % knots.shape[0]
    return knots[before] * (1 - blend) + knots[after] * blend


def _grid() -> tuple[np.ndarray, np.ndarray]:
    centre = (np.arange(SIZE) + 0.5) / SIZE
    across, down = np.meshgrid(centre, centre)
    return across, down


def _bricks(rng: np.random.Generator) -> np.ndarray:
    across, down = _grid()
    row = np.floor(down * 16)
    shifted = across * 6 + 0.5 * (row % 2)
    joint = (down * 16 % 1 < 0.14) | (shifted % 1 < 0.07)
    tone = rng.uniform(0.25, 0.75, (16, 6))[row.astype(int), np.floor(shifted).astype(int) % 6]
    return np.where(joint, 0.95, tone)


def _tiles(rng: np.random.Generator) -> np.ndarray:
    across, down = _grid()
    joint = (down * 4 % 1 < 0.05) | (across * 4 % 1 < 0.05)
    tone = rng.uniform(0.35, 0.75, (4, 4))
    tone = tone[np.floor(down * 4).astype(int), np.floor(across * 4).astype(int)]
    return np.where(joint, 0.05, tone)


def _rectangles(rng: np.random.Generator, count: int, largest: float) -> np.ndarray:
    canvas = np.full((SIZE, SIZE), 0.5)
    for _ in range(count):
        width, height = (rng.uniform(0.05, largest, 2) * SIZE).astype(int) + 1
        rows = (rng.integers(SIZE) + np.arange(height)) % SIZE
        columns = (rng.integers(SIZE) + np.arange(width)) % SIZE
        canvas[np.ix_(rows, columns)] = rng.uniform(0.0, 1.0)
    return canvas


def _spots(rng: np.random.Generator) -> np.ndarray:
    across, down = _grid()
    canvas = np.full((SIZE, SIZE), 0.3)
    for _ in range(40):
        x, y, radius = rng.uniform(), rng.uniform(), rng.uniform(0.02, 0.09)
        dx = (across - x + 0.5) % 1 - 0.5
        dy = (down - y + 0.5) % 1 - 0.5
        canvas[dx**2 + dy**2 < radius**2] = rng.uniform(0.0, 1.0)
    return canvas


def _windows(rng: np.random.Generator) -> np.ndarray:
    """Mask of 4 x 4 upright windows with a cross bar; curtains make each one different."""
    across, down = _grid()
    x, y = across * 4 % 1, down * 4 % 1
    pane = (x > 0.24) & (x < 0.76) & (y > 0.2) & (y < 0.8)
    frame = (np.abs(x - 0.5) < 0.03) | (np.abs(y - 0.42) < 0.03)
    cell = np.floor(down * 4).astype(int), np.floor(across * 4).astype(int)
    curtain = y < 0.2 + 0.6 * rng.uniform(-0.6, 0.8, (4, 4))[cell]
    strength = rng.uniform(0.75, 1.0, (4, 4))[cell]
    return np.where(pane & ~frame, np.where(curtain, 0.45, strength), 0.0)


def _bands(rng: np.random.Generator) -> np.ndarray:
    """Mask of office floors: ribbon windows with thin mullions."""
    across, down = _grid()
    y = down * 4 % 1
    pane = (y > 0.25) & (y < 0.8) & (across * 8 % 1 > 0.08)
    cell = np.floor(down * 4).astype(int), np.floor(across * 8).astype(int)
    return np.where(pane, rng.uniform(0.6, 1.0, (4, 8))[cell], 0.0)


def _shops(rng: np.random.Generator) -> np.ndarray:
    """Mask of a facade with wide openings and doors, irregular from cell to cell."""
    across, down = _grid()
    column = np.floor(across * 4).astype(int)
    x, y = across * 4 % 1, down * 2 % 1
    left = rng.uniform(0.08, 0.3, 4)[column]
    right = rng.uniform(0.6, 0.92, 4)[column]
    top = rng.uniform(0.15, 0.45, 4)[column]
    pane = (x > left) & (x < right) & (y > top) & (y < 0.85) & (np.abs(x - 0.5) > 0.02)
    return np.where(pane, rng.uniform(0.6, 1.0, 4)[column], 0.0)


def _glass() -> np.ndarray:
    """Mask of a car's cabin: glass between pillars; one repeat covers one face."""
    across, down = _grid()
    pane = (np.abs(across - 0.5) > 0.04) & (across > 0.07) & (across < 0.93)
    return np.where(pane & (down > 0.12) & (down < 0.92), 1.0, 0.0)


def _planks(rng: np.random.Generator) -> np.ndarray:
    across, down = _grid()
    row = np.floor(down * 8).astype(int)
    shifted = (across + rng.uniform(0, 1, 8)[row]) * 2
    joint = (down * 8 % 1 < 0.06) | (shifted % 1 < 0.012)
    tone = rng.uniform(0.3, 0.75, (8, 2))[row, np.floor(shifted).astype(int) % 2]
    wood = tone + 0.5 * (_octaves(rng, {2: 1, 4: 1, 8: 0.5}) - 0.5)
    grain = 0.4 * (_value_noise(rng, 4, 64) * 0.5)
    return np.clip(np.where(joint, 0.05, wood + grain), 0.0, 1.0)


def _cracks(rng: np.random.Generator) -> np.ndarray:
    """Mask of thin lines where two smooth fields cross their mean."""
    fields = [_octaves(rng, {3: 1.0, 6: 0.7, 12: 0.5, 24: 0.3}) - 0.5 for _ in range(2)]
    lines = np.minimum(np.abs(fields[0]), np.abs(fields[1]) * 1.3)
    return np.clip(1.3 - lines / 0.025, 0.0, 1.0)


def _paint_bank() -> list[np.ndarray]:
    """All textures [SIZE, SIZE] in 0..1, in the order of the names above."""
    rng = np.random.default_rng(20240607)
    across, down = _grid()
    leaves = _octaves(rng, {8: 0.7, 16: 1.0, 32: 1.0, 64: 0.8})
    leaves = np.clip((leaves - 0.5) * 1.8 + 0.5, 0.0, 1.0)
    weave = 0.5 + 0.25 * (np.sin(across * 32 * np.pi) + np.sin(down * 32 * np.pi))
    stripes = (across * 6 % 1 < 0.5) * 0.6 + 0.2 + 0.1 * _value_noise(rng, 16, 16)
    return [
        np.full((SIZE, SIZE), 0.5),
        _octaves(rng, {2: 1.0, 4: 0.8, 8: 0.6, 16: 0.45, 32: 0.3, 64: 0.2}),
        _octaves(rng, {4: 0.5, 16: 0.5, 32: 0.7, 64: 1.0, 128: 1.0}),
        _octaves(rng, {3: 1.0, 9: 0.6, 27: 0.5, 64: 0.5}),
        _octaves(rng, {4: 1.0, 16: 0.8, 64: 0.6}, stretch=8),
        _bricks(rng),
        _tiles(rng),
        leaves,
        np.clip(weave + 0.1 * _value_noise(rng, 64, 64), 0, 1),
        np.clip(stripes, 0, 1),
        _rectangles(rng, 60, 0.3),
        _rectangles(rng, 25, 0.6) * 0.7 + 0.3 * _octaves(rng, {4: 1, 16: 1, 32: 1}),
        _windows(rng),
        _bands(rng),
        _shops(rng),
        _glass(),
        _planks(rng),
        _spots(rng),
        _cracks(rng),
    ]


@cache
def _bank(device: str) -> tuple[Tensor, Tensor]:
    """Texel quads [4, texels] float32 (a 2 x 2 neighbourhood each) and [LEVELS] level offsets."""
    quads, offsets, total = [], [], 0
    images = np.stack(_paint_bank())
    for _ in range(LEVELS):
        right = np.roll(images, -1, axis=2)
        corners = [images, right, np.roll(images, -1, axis=1), np.roll(right, -1, axis=1)]
        quads.append(np.stack([corner.reshape(-1) for corner in corners]))
        offsets.append(total)
        total += images.size
        size = images.shape[1]
        if size > 1:
            images = images.reshape(-1, size // 2, 2, size // 2, 2).mean(axis=(2, 4))
    table = torch.from_numpy(np.concatenate(quads, axis=1)).float().contiguous()
    return table.to(device), torch.tensor(offsets, dtype=torch.int32, device=device)


def sample(texture: Tensor, across: Tensor, down: Tensor, footprint: Tensor) -> Tensor:
    """Look textures up, bilinear in the mip level that fits the footprint.

    Args:
        texture: [...] index into the bank, float or integer.
        across, down: [...] surface coordinates in repeats of the texture.
        footprint: [...] width of a pixel on the surface, in repeats.

    Returns:
        [...] values in 0..1.
    """
    table, offsets = _bank(str(across.device))
    level = torch.log2(footprint * SIZE + 1e-6).round_().clamp_(0, LEVELS - 1).to(torch.int32)
    size = torch.bitwise_right_shift(torch.full_like(level, SIZE), level)
    scale = size.to(torch.float32)
    x = (across - across.floor()).mul_(scale).sub_(0.5)
    y = (down - down.floor()).mul_(scale).sub_(0.5)
    left, top = x.floor(), y.floor()
    column = left.to(torch.int32).bitwise_and_(size - 1)
    row = top.to(torch.int32).bitwise_and_(size - 1)
    texel = texture.to(torch.int32).mul_(size).add_(row).mul_(size).add_(column).flatten()
    texel += offsets.index_select(0, level.flatten())
    quad = table.index_select(1, texel).reshape(4, *x.shape)
    x, y = x.sub_(left), y.sub_(top)
    upper = torch.lerp(quad[0], quad[1], x)
    lower = torch.lerp(quad[2], quad[3], x)
    return upper.lerp_(lower, y)
