"""Fixtures of the model's tests, and the tolerances they share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ttt3r.config import TINY
from ttt3r.model import Model
from ttt3r.state import State

# Relative L2 error by the type that the arithmetic runs in. float32: rounding of other batch
# shapes. bfloat16: 8 bits of mantissa through a few layers.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2}


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of recorded outputs of the reference implementation."""
    return Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """Assert that two arrays agree to the tolerance of a dtype (float32 unless given)."""

    def check(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
        found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
        assert found.shape == expected.shape
        scale = expected.norm().clamp_min(1e-12)
        error = ((found - expected).norm() / scale).item()
        assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"

    return check


@pytest.fixture
def model() -> Model:
    """A tiny seeded network whose gate, heads and state are all in a lively range."""
    torch.manual_seed(0)
    network = Model(TINY)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


@pytest.fixture
def frames() -> Callable[..., np.ndarray]:
    """Draw images [L, T, 48, 64, 3] uint8: smooth noise, different in each lane."""

    def draw(lanes: int, count: int, seed: int = 0) -> np.ndarray:
        coarse = np.random.default_rng(seed).integers(0, 256, (lanes, count, 6, 8, 3), np.uint8)
        return coarse.repeat(8, axis=2).repeat(8, axis=3)

    return draw


@pytest.fixture(scope="session")
def arrays_of() -> Callable[[State], dict[str, np.ndarray]]:
    """A state's arrays, as they are stored."""

    def arrays(state: State) -> dict[str, np.ndarray]:
        names = ("tokens", "pose_memory", "first")
        return {name: getattr(state, name).numpy().copy() for name in names}

    return arrays
