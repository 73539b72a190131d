"""The cache directory stays bounded, and Prefect's own server on this machine."""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from flows.prefect_home import (
    DATABASE,
    is_set_up,
    nobody_watches,
    prefect_cache,
    unwatched,
    use_home,
)
from storage.errors import StoreUnavailable

HOLD = "import sys, time; from pathlib import Path; from flows.prefect_home import use_home; "


def fill(home: Path, size: int) -> list[Path]:
    """Make a database that has some bytes."""
    home.mkdir(exist_ok=True)
    with closing(sqlite3.connect(home / "prefect.db")) as connection:
        connection.execute("CREATE TABLE runs (name)")
        connection.execute("INSERT INTO runs VALUES (zeroblob(?))", (size,))
        connection.commit()
    return [home / name for name in DATABASE]


def runs_in(home: Path) -> int | None:
    """How many runs the history has; None where there is none."""
    if not (home / "prefect.db").exists():
        return None
    with closing(sqlite3.connect(home / "prefect.db")) as connection:
        return connection.execute("SELECT count(*) FROM runs").fetchone()[0]


@pytest.mark.parametrize(("room", "left"), [(0, 1), (-1, None)])
def test_history_larger_than_allowed_is_begun_anew(tmp_path, room, left):
    fill(tmp_path / "prefect", 100)
    size = (tmp_path / "prefect/prefect.db").stat().st_size
    (tmp_path / "prefect" / "profiles.toml").write_text("kept")
    os.close(use_home(tmp_path / "prefect", size + room))
    assert runs_in(tmp_path / "prefect") == left
    assert (tmp_path / "prefect" / "profiles.toml").read_text() == "kept"


def no_database(file: Path) -> None:
    file.write_bytes(b"no database at all" * 1000)


def torn(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 8 * 3)


def overwritten(file: Path) -> None:
    """All pages but the first, as a disk does that forgot them."""
    file.write_bytes(file.read_bytes()[:4096] + bytes(file.stat().st_size - 4096))


@pytest.mark.parametrize("damage", [no_database, torn, overwritten])
def test_damaged_history_is_begun_anew_and_said_to_be(tmp_path, capsys, damage):
    damage(fill(tmp_path / "prefect", 100_000)[0])
    os.close(use_home(tmp_path / "prefect"))
    assert runs_in(tmp_path / "prefect") is None
    said = f"{tmp_path}/prefect/prefect.db is damaged; a new history of runs is begun\n"
    assert capsys.readouterr().err == said
    os.close(use_home(tmp_path / "prefect"))
    assert capsys.readouterr().err == ""


def test_sound_history_goes_on_even_after_a_kill(tmp_path, capsys):
    """What is in the log of the database only is as good."""
    fill(tmp_path / "made", 100_000)
    shutil.copytree(tmp_path / "made", tmp_path / "prefect")
    with closing(sqlite3.connect(tmp_path / "made/prefect.db")) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("INSERT INTO runs VALUES ('second')")
        connection.commit()
        shutil.rmtree(tmp_path / "prefect")
        shutil.copytree(tmp_path / "made", tmp_path / "prefect")
    os.close(use_home(tmp_path / "prefect"))
    assert runs_in(tmp_path / "prefect") == 2
    assert capsys.readouterr().err == ""


def test_history_in_use_is_left_alone(tmp_path):
    home = tmp_path / "prefect"
    code = f"{HOLD} use_home(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, home], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        fill(home, 101)
        os.close(use_home(home, 300))
        assert runs_in(home) == 1
        other.kill()
        other.wait()
    os.close(use_home(home, 300))
    assert runs_in(home) is None


USE_AS_NOBODY = """
import os, sys
from pathlib import Path
from flows.prefect_home import use_home
if os.getuid() == 0:
    os.setuid(65534)
try:
    use_home(Path(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("closed", ["", "prefect", "prefect/prefect.db"])
def test_home_that_may_not_be_written_is_one_line_that_says_what_to_set(public_path, closed):
    (public_path / "prefect").mkdir()
    (public_path / "prefect").chmod(0o777)
    fill(public_path / "prefect", 100)
    home = public_path / ("prefect" if closed else "cache/prefect")
    (public_path / closed).chmod(0o444 if closed.endswith("db") else 0o555)
    command = [sys.executable, "-c", USE_AS_NOBODY, str(home)]
    said = subprocess.check_output(command, text=True).strip()
    assert said == (
        f"StoreRefused {home} cannot be written (Permission denied), and Prefect keeps its records "
        "there; set HOME or PREFECT_HOME to a folder that can be written"
    )


def test_home_without_room_is_said_to_be_before_anything_starts(small_disk):
    with pytest.raises(StoreUnavailable, match=rf"^{small_disk.path}: no space is left; make room"):
        use_home(small_disk.path)


def test_signs_of_life_are_left_out_while_nobody_watches():
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 30}):
        with unwatched():
            assert PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value() is None
        assert PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value() == 30


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("PREFECT_HOME", None, True),
        ("PREFECT_HOME", "/home/of/another/prefect", False),
        ("PREFECT_API_URL", "http://127.0.0.1:4200/api", False),
        ("PREFECT_API_DATABASE_CONNECTION_URL", "sqlite+aiosqlite:////fleet.db", False),
        ("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30", False),
    ],
)
def test_only_a_server_that_nobody_has_set_up_is_not_watched(monkeypatch, name, value, expected):
    for other in ("API_URL", "API_DATABASE_CONNECTION_URL", "FLOWS_HEARTBEAT_FREQUENCY"):
        monkeypatch.delenv(f"PREFECT_{other}", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(prefect_cache()))
    if value is not None:
        monkeypatch.setenv(name, value)
    assert nobody_watches() is expected


@pytest.mark.parametrize(
    ("profiles", "expected"),
    [
        (None, False),  # as of a server that was started there
        ('active = "ephemeral"\n[profiles.ephemeral]\nPREFECT_LOGGING_LEVEL = "INFO"', False),
        ('active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://host/api"', True),
        ('active = "x"\n[profiles.mine]\nPREFECT_API_URL = "http://host/api"', True),
    ],
)
def test_home_of_a_server_for_others_is_not_ours(tmp_path, monkeypatch, profiles, expected):
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".prefect").mkdir()
    (tmp_path / ".prefect" / "prefect.db").touch()
    if profiles:
        (tmp_path / ".prefect" / "profiles.toml").write_text(profiles)
    assert is_set_up() is expected
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    assert is_set_up()


def listening(pid: int) -> set[str]:
    """Addresses that a process or its children listen on, as hexadecimal of /proc/net."""
    own = {pid, *(p for p in processes() if parent_of(p) == pid)}
    sockets = {link for p in own for link in links_of(p) if link.startswith("socket:")}
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


def processes() -> list[int]:
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]


def parent_of(pid: int) -> int | None:
    try:
        return int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    except OSError:
        return None


def links_of(pid: int) -> list[str]:
    try:
        return [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc of Linux")
def test_own_server_listens_on_loopback_only(tmp_path):
    environment = {
        **{n: v for n, v in os.environ.items() if not n.startswith("PREFECT_")},
        "HOME": str(tmp_path),
    }
    code = """if True:
        from flows.prefect_home import quiet_prefect
        quiet_prefect()
        from prefect import flow
        @flow
        def serve_me():
            print("running", flush=True)
            input()
        serve_me()
    """
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as running:
        assert running.stdout.readline() == b"running\n"
        seen = listening(running.pid)
        running.communicate(b"\n")
    assert seen == {"0100007F"}  # 127.0.0.1
    assert (tmp_path / ".cache" / "ttt3r" / "prefect" / "prefect.db").exists()
