"""Flows run against a real Prefect server of their own."""

from pathlib import Path

import pytest
from recordings import moving_squares, write_video


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Thirty small frames."""
    return write_video(tmp_path / "squares.mp4", moving_squares(30))
