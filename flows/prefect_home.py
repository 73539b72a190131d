"""Prefect where the user has set up none: a home in the cache, and servers of single processes.

The history of such a server may be forgotten, and nobody watches it.

What is finished is recorded in the drives' stores; a run needs nothing of earlier runs' history.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from flows.commands.printing import say
from storage.errors import StoreRefused, StoreUnavailable
from storage.failures import DISK_FULL, NO_SPACE

MOST_BYTES = 500_000_000  # of the database; a drive takes some 0.4 MB
ROOM_BYTES = 8_000_000  # what a new history takes
LONGEST_CHECK_S = 2.0  # of the database; 400 MB take 0.6 s once they are in memory
LOCK = "ttt3r.lock"  # held, shared, by every process whose server uses the folder
# Settings that name a server, or the database of the embedded one.
SERVERS = (
    "PREFECT_API_URL",
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
)
DATABASE = ("prefect.db", "prefect.db-wal", "prefect.db-shm")


def prefect_cache() -> Path:
    """Home of Prefect where the user has none."""
    return Path.home() / ".cache" / "ttt3r" / "prefect"


def quiet_prefect() -> None:
    """Keep Prefect's home in the cache directory and its log off the terminal.

    Whoever has set up Prefect already, keeps his server, profile and logging. A server of his that
    runs for others leaves a home, too: our runs are none of its, nor is its database ours.
    """
    if not is_set_up():
        os.environ.setdefault("PREFECT_HOME", str(prefect_cache()))
        with suppress(OSError):  # Prefect says what is wrong when it is needed
            Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    # The first start of its own server sets up a database: slow on a busy machine.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "300")


def is_set_up() -> bool:
    """Whether the user names a server or home of Prefect, in the environment or by his profile."""
    named = ("PREFECT_HOME", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH", *SERVERS)
    if any(name in os.environ for name in named):
        return True
    try:
        profiles = tomllib.loads((Path.home() / ".prefect" / "profiles.toml").read_text())
        mine = profiles["profiles"][profiles["active"]]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, LookupError, TypeError):
        return True  # Prefect says what is wrong with it
    return any(name in mine for name in SERVERS)


def use_home(home: Path, most_bytes: int = MOST_BYTES) -> int:
    """Say that this process uses the folder; begin a new history where the old one is no good.

    That is one that is large or damaged. A history that another process uses is left as it is.

    Returns:
        The lock that says so; it is free again when this process has ended.

    Raises:
        StoreRefused: the folder may not be written.
        StoreUnavailable: there is no room in it.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = os.open(home / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            _begin_anew(home, most_bytes)
        fcntl.flock(lock, fcntl.LOCK_SH)
        with tempfile.TemporaryFile(dir=home) as file:
            file.write(bytes(ROOM_BYTES))
    except OSError as error:
        if error.errno in DISK_FULL:
            raise StoreUnavailable(f"{home}: {NO_SPACE}") from error
        raise StoreRefused(
            f"{home} cannot be written ({error.strerror}), and Prefect keeps its records there; "
            "set HOME or PREFECT_HOME to a folder that can be written"
        ) from error
    return lock


def _begin_anew(home: Path, most_bytes: int) -> None:
    """Remove a history that is large or damaged."""
    files = [home / name for name in DATABASE if (home / name).exists()]
    for file in files:
        file.open("r+b").close()  # else Prefect would find out that it may not
    is_large = sum(file.stat().st_size for file in files) > most_bytes
    if not is_large and _is_sound(home / DATABASE[0]):
        return
    if not is_large:
        say(f"{home / DATABASE[0]} is damaged; a new history of runs is begun", err=True)
    for file in files:
        file.unlink(missing_ok=True)


def _is_sound(database: Path) -> bool:
    """Whether nothing is wrong with the database, as far as that shows in a short time."""
    if not database.exists():
        return True
    end = time.monotonic() + LONGEST_CHECK_S
    try:
        with closing(sqlite3.connect(database)) as connection:
            connection.set_progress_handler(lambda: time.monotonic() > end, 1000)
            return connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    except sqlite3.OperationalError:
        return True  # no time is left, or it is in use: that is no damage
    except sqlite3.DatabaseError:
        return False


def shelter_server() -> None:
    """Let a server that Prefect starts for this process be in a process group of its own.

    Ctrl-C in a terminal reaches the whole group of a command. The server would end at once, and
    the flow, which has to tell it that it was interrupted, would wait a minute for it.
    """
    from prefect.server.api import server

    apart = {"Popen": partial(subprocess.Popen, process_group=0)}
    vars(server)["subprocess"] = SimpleNamespace(**(vars(subprocess) | apart))


def nobody_watches() -> bool:
    """Whether runs are on a server of our own, in our home: it has no automations."""
    set_up = ("API_URL", "API_DATABASE_CONNECTION_URL", "FLOWS_HEARTBEAT_FREQUENCY")
    is_ours = os.environ.get("PREFECT_HOME") == str(prefect_cache())
    return is_ours and not any(f"PREFECT_{name}" in os.environ for name in set_up)


@contextmanager
def unwatched() -> Iterator[None]:
    """Run flows without signs of life: for a server that has no automations.

    Prefect's thread that gives them takes up to a second to end, after every flow.
    """
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield
