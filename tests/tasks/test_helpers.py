"""Work that is shared with helper processes, which are real ones here."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from tasks.helpers import Take, helped, share

ITEMS = 6


@pytest.fixture(autouse=True)
def helpers_find_this_file(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def write_down(folder: Path, take: Take, stop: threading.Event | None = None) -> list[int]:
    """Write the process's number into a file for each item; the items."""
    done = []
    for item in iter(take, None):
        (folder / str(item)).write_text(str(os.getpid()))
        logging.getLogger("tasks.test").info("item %d", item)
        done.append(item)
        while len(set(map(Path.read_text, folder.iterdir()))) < 2 and stop is None:
            time.sleep(0.05)  # until the helper, too, has had something to do
    return done


def fail_at_once(take: Take, stop: threading.Event) -> None:
    take()
    raise LookupError("no such thing")


def die_at_once(take: Take, stop: threading.Event) -> None:
    take()
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_stop(folder: Path, take: Take, stop: threading.Event) -> str:
    take()
    (folder / "waits").touch()
    stop.wait()
    return "stopped"


def test_items_are_done_once_each_by_two_processes(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    here, there = partial(write_down, tmp_path), partial(write_down, tmp_path)
    with helped(2):
        found = share(ITEMS, here, there, threading.Event(), worth=2)
    assert len(found) == 2
    assert sorted(found[0] + found[1]) == list(range(ITEMS))
    workers = {int(path.read_text()) for path in tmp_path.iterdir()}
    assert len(workers) == 2
    assert os.getpid() in workers
    # What the helper logs is logged here.
    assert {r.getMessage() for r in caplog.records} >= {f"item {i}" for i in range(ITEMS)}


@pytest.mark.parametrize(("processes", "worth"), [(1, 2), (2, ITEMS + 1)])
def test_few_items_or_one_process_start_no_helper(tmp_path, processes, worth):
    def here(take: Take) -> list[int]:
        return write_down(tmp_path, take, threading.Event())

    with helped(processes):
        found = share(ITEMS, here, fail_at_once, threading.Event(), worth)
    assert found == [list(range(ITEMS))]


def test_the_error_of_a_helper_is_raised_here_once_all_have_ended():
    is_over = []

    def here(take: Take) -> None:
        while take() is not None:
            time.sleep(0.1)
        is_over.append(True)

    with helped(2), pytest.raises(LookupError, match="no such thing"):
        share(10_000, here, fail_at_once, threading.Event(), worth=2)
    assert is_over


def test_a_helper_that_dies_is_done_without(caplog):
    def here(take: Take) -> list[int]:
        taken = []
        while (item := take()) is not None:
            taken.append(item)
            deadline = time.monotonic() + 60
            while "ended with code -9" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.05)
        return taken

    with helped(2):
        found = share(3, here, die_at_once, threading.Event(), worth=2)
        assert found == [[0, 2]]  # the other one was taken by the helper
        assert share(1, here, die_at_once, threading.Event(), worth=2) == [[0]]


def test_a_helper_that_cannot_read_what_it_is_told_is_done_without(monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    with helped(2):
        found = share(2, lambda take: 1, fail_at_once, threading.Event(), worth=2)
    assert found == [1]


def test_a_helper_is_told_to_stop(tmp_path):
    stop = threading.Event()

    def here(take: Take) -> str:
        while not (tmp_path / "waits").exists():
            time.sleep(0.05)
        stop.set()
        assert take() is None
        return "here"

    with helped(2):
        found = share(5, here, partial(wait_for_stop, tmp_path), stop, worth=2)
    assert found == ["here", "stopped"]


def test_helpers_end_with_the_process_that_they_help(tmp_path):
    """Also where it is killed while they work: they hold no claim any longer than it does."""
    pid = os.fork()
    if pid == 0:
        with helped(2):
            there = partial(write_down_and_wait, tmp_path)
            share(2, wait_forever, there, threading.Event(), worth=2)
        os._exit(1)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    helper = int((tmp_path / "pid").read_text())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 20
    while is_running(helper) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(helper)


def write_down_and_wait(folder: Path, take: Take, stop: threading.Event) -> None:
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)


def wait_forever(take: Take) -> None:
    time.sleep(600)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
