"""Fixtures that several test folders share."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# The networks of the tests are tiny: more threads only wait for each other. Set before torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Helpers beside this file are plain modules; pytest's importlib mode does not find them.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from s3fs import S3FileSystem
from seaweed import Seaweed, SeaweedProcess, running_seaweed


class SmallDisk:
    """A file system in memory of a size that can be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, megabytes: int) -> None:
        options = f"remount,size={megabytes}m"
        subprocess.run(["mount", "-o", options, str(self.path)], check=True)


# Take minutes each. Without this, two processes would begin them last, as they hold few tests.
BEGUN_FIRST = (
    "test_kills.py",
    "test_s3_faults.py",
    "test_races.py",
    "test_automations.py",
    "test_fleet.py",
)
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of `BEGUN_FIRST` before all others, in that order of files."""
    order = {name: number for number, name in enumerate(BEGUN_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real recordings beside the project; the test skips where it is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"SKIPPED LOUDLY: real recordings are not at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A folder that every user may enter; pytest closes its own anew whenever a session begins."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of one megabyte; skips where nothing may be mounted."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("SKIPPED LOUDLY: no file system may be mounted here; a full disk is untested")
    yield SmallDisk(path)
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A real S3 server on loopback; the environment leads fsspec and zarr to it."""
    with (
        running_seaweed(tmp_path_factory.mktemp("seaweed")) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def mortal_seaweed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SeaweedProcess]:
    """A real S3 server that a test may kill; the environment leads fsspec to it, once a request."""
    server = SeaweedProcess(tmp_path / "seaweed")
    for name, value in {**server.access.environment, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # connections to other servers
    try:
        server.start()
        yield server
    finally:
        server.kill()
        S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server with an empty database, for the whole test run.

    Flows of this process give it no signs of life, whose thread takes up to a second to end.
    """
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with (
        prefect_test_harness(server_startup_timeout=300),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield
