"""The cache directory stays bounded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.prefect_home import DATABASE, use_home

HOLD = "import sys, time; from pathlib import Path; from flows.prefect_home import use_home; "


def fill(home: Path, size: int) -> list[Path]:
    home.mkdir(exist_ok=True)
    files = [home / name for name in DATABASE]
    for file in files:
        file.write_bytes(bytes(size))
    return files


@pytest.mark.parametrize(("size", "stays"), [(100, True), (101, False)])
def test_history_larger_than_allowed_is_begun_anew(tmp_path, size, stays):
    files = fill(tmp_path / "prefect", size)
    (tmp_path / "prefect" / "profiles.toml").write_text("kept")
    os.close(use_home(tmp_path / "prefect", 300))
    assert [file.exists() for file in files] == [stays] * 3
    assert (tmp_path / "prefect" / "profiles.toml").read_text() == "kept"


def test_history_in_use_is_left_alone(tmp_path):
    home = tmp_path / "prefect"
    code = f"{HOLD} use_home(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, home], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        files = fill(home, 101)
        os.close(use_home(home, 300))
        assert all(file.exists() for file in files)
        other.kill()
        other.wait()
    os.close(use_home(home, 300))
    assert not any(file.exists() for file in files)
