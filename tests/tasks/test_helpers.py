"""Work that is shared with helper processes, which are real ones here."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

from tasks.helpers import Take, helped, share

ITEMS = 6
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def helpers_find_this_file(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


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
        assert sorted(found[0]) == [0, 1, 2]  # one of them after the helper had taken it
        assert share(1, here, die_at_once, threading.Event(), worth=2) == [[0]]


def test_what_a_helper_had_taken_when_it_died_is_done_also_by_one_that_had_ended(tmp_path):
    def here(take: Take) -> list[int]:
        if not (tmp_path / "taken").exists():
            while not (tmp_path / "taken").exists():
                time.sleep(0.05)
            (tmp_path / "go").touch()
            return [item] if (item := take()) is not None else []
        return list(iter(take, None))

    with helped(2):
        there = partial(die_once_the_other_is_done, tmp_path)
        found = share(2, here, there, threading.Event(), worth=2)
    assert sorted(chain.from_iterable(found)) == [0, 1]


def test_what_an_interrupted_helper_leaves_undone_is_done(tmp_path):
    """SIGTERM to the helper alone."""

    def here(take: Take) -> list[int]:
        deadline = time.monotonic() + 60
        while not (tmp_path / "waits").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return list(iter(take, None))

    with helped(2):
        there = partial(interrupt_itself, tmp_path)
        found = share(3, here, there, threading.Event(), worth=2)
    assert sorted(chain.from_iterable(found)) == [0, 1, 2]


def interrupt_itself(folder: Path, take: Take, stop: threading.Event) -> list[int]:
    take()
    (folder / "waits").touch()
    os.kill(os.getpid(), signal.SIGTERM)
    stop.wait()
    return []


def die_once_the_other_is_done(folder: Path, take: Take, stop: threading.Event) -> None:
    take()
    (folder / "taken").touch()
    while not (folder / "go").exists():
        time.sleep(0.05)
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_helper_that_cannot_read_what_it_is_told_is_done_without(monkeypatch, caplog):
    def here(take: Take) -> list[int]:
        deadline = time.monotonic() + 60
        while "ended with code 1" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        return list(iter(take, None))

    nowhere = ModuleType("nowhere_to_be_found")
    nowhere.there = FunctionType(fail_at_once.__code__, {}, "there")
    nowhere.there.__module__, nowhere.there.__qualname__ = nowhere.__name__, "there"
    monkeypatch.setitem(sys.modules, nowhere.__name__, nowhere)
    with helped(2):
        assert share(2, here, nowhere.there, threading.Event(), worth=2) == [[0, 1]]
        # Nor could the next one: none is started.
        alone = share(2, lambda take: list(iter(take, None)), fail_at_once, threading.Event(), 2)
    assert alone == [[0, 1]]


def test_no_more_helpers_start_than_memory_holds(caplog):
    def here(take: Take) -> list[int]:
        return list(iter(take, None))

    with helped(2):
        found = share(4, here, fail_at_once, threading.Event(), 2, bytes_each=10**15)
        assert found == [[0, 1, 2, 3]]
        assert "memory suffices for 1 of 2 processes" in caplog.text
        # Nor does one that has started for less take part.
        with pytest.raises(LookupError):
            share(4, wait_a_while, fail_at_once, threading.Event(), worth=2)
        found = share(4, here, fail_at_once, threading.Event(), 2, bytes_each=10**15)
    assert found == [[0, 1, 2, 3]]


def wait_a_while(take: Take) -> None:
    while take() is not None:
        time.sleep(5)


def test_without_a_helper_that_cannot_start_the_work_is_done_here(monkeypatch, caplog):
    def refuse(*arguments: object, **named: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with helped(3):
        found = share(4, lambda take: list(iter(take, None)), fail_at_once, threading.Event(), 2)
    assert found == [[0, 1, 2, 3]]
    assert "no more than 1 processes can start" in caplog.text


def test_lines_of_a_helper_are_logged_here_whatever_prefect_does_to_logging(
    tmp_path, caplog, monkeypatch
):
    """As in a container, where our own loggers have handlers and pass nothing on."""
    monkeypatch.setenv("PREFECT_LOGGING_SETTINGS_PATH", str(ROOT / "deploy" / "logging.yaml"))
    caplog.set_level(logging.INFO)

    def here(take: Take) -> None:
        deadline = time.monotonic() + 60
        while not (tmp_path / "said").exists() and time.monotonic() < deadline:
            time.sleep(0.05)

    with helped(2):
        share(2, here, partial(say_so, tmp_path), threading.Event(), worth=2)
    assert "said by tasks.infer" in caplog.messages
    assert "said by storage" in caplog.messages


def say_so(folder: Path, take: Take, stop: threading.Event) -> None:
    take()
    import_module("tasks.infer")  # and with it Prefect
    for name in ("tasks.infer", "storage"):
        logging.getLogger(name).info("said by %s", name)
    (folder / "said").touch()


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
