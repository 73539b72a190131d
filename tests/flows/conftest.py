"""Flows run against a real Prefect server of their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from recordings import moving_squares, write_video


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server with an empty database, for the whole test run."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=300):
        yield


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Thirty small frames."""
    return write_video(tmp_path / "squares.mp4", moving_squares(30))
