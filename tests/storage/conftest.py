"""Fixtures of the storage tests."""

from pathlib import Path

import pytest
from seaweed import Seaweed


@pytest.fixture(params=["local", "s3"])
def output_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty location for one test: a folder, and a prefix of a real S3 server."""
    if request.param == "local":
        return str(tmp_path / "output")
    server: Seaweed = request.getfixturevalue("seaweed")
    return f"{server.url}/{tmp_path.name}"
