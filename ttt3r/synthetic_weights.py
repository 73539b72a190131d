"""Weights that anyone can regenerate from a seed, for parity tests (specification, appendix A)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np

from ttt3r.heads import canonical_name

_TOKENS = frozenset(
    {
        "pose_token",
        "masked_img_token",
        "masked_ray_map_token",
        "pose_retriever.masked_token",
        "pose_retriever.mem",
    }
)
_BLOCK = 2**15
_HALVED = (
    ".head.4.weight",
    "downstream_head.proj.fc2.weight",
    "downstream_head.cross_proj.fc2.weight",
    "downstream_head.rgb_proj.fc2.weight",
    "pose_head.mlp.fc2.weight",
)


def synthetic_tensor(
    name: str, shape: Sequence[int], weight_seed: int, qk_gain: float
) -> np.ndarray:
    """The float32 tensor that `name`, `shape` and the seed stand for.

    Args:
        name: its full name in the state dict; aliases give the same tensor.
        shape: its shape.
        weight_seed: chooses the set of weights.
        qk_gain: factor on the cross-attention's query and key projections.
    """
    name = canonical_name(name)
    u = _uniform(name, math.prod(shape), weight_seed).reshape(shape)
    if name == "register_tokens.weight":
        return np.float32(1.7320508) * u
    if name in _TOKENS:
        return u
    if len(shape) == 1:
        is_scale = name.rsplit(".", 1)[-1] == "weight"
        return 1 + np.float32(0.25) * u if is_scale else np.float32(0.2) * u
    gain = _gain(name, qk_gain)
    return np.float32(gain * math.sqrt(3 / math.prod(shape[1:]))) * u


def _gain(name: str, qk_gain: float) -> float:
    if name.endswith(("projq.weight", "projk.weight")):
        return qk_gain
    return 0.5 if name.endswith(_HALVED) else 1.0


def _uniform(name: str, count: int, weight_seed: int) -> np.ndarray:
    """SplitMix64, seeded by the name, as float32 in [-1, 1); in blocks that fit the cache."""
    seed = np.uint64((weight_seed << 32) | zlib.crc32(name.encode("ascii")))
    values = np.empty(count, np.float32)
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        values[start:stop] = _mixed(np.arange(start + 1, stop + 1, dtype=np.uint64), seed)
    return values


def _mixed(z: np.ndarray, seed: np.uint64) -> np.ndarray:
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += seed
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
