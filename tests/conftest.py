"""Fixtures that several test folders share."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real recordings beside the project; the test skips where it is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"SKIPPED LOUDLY: real recordings are not at {SHARED_DATA}")
    return SHARED_DATA
