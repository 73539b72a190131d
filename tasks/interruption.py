"""Ending in good order when the machine is taken away: SIGTERM, or Ctrl-C on the terminal."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TypeVar

from prefect.exceptions import TerminationSignal

T = TypeVar("T")


def run_until_stopped(work: Callable[[threading.Event], T]) -> T:
    """Run `work` beside the main thread and let it end in good order when interrupted.

    Prefect raises TerminationSignal in the main thread on SIGTERM, in the middle of whatever
    runs there; its handler must stay, as it takes part in rescheduling the run. Here the main
    thread only waits: `work` sees the event set, finishes what it is at, and returns; then the
    interruption goes on. To leave sooner would free the claims of what still writes.
    """
    stop = threading.Event()
    pool = ThreadPoolExecutor(1, thread_name_prefix="work")
    future = pool.submit(contextvars.copy_context().run, work, stop)
    try:
        return future.result()
    except (TerminationSignal, KeyboardInterrupt):
        stop.set()
        while not future.done():
            with suppress(TerminationSignal, KeyboardInterrupt):
                wait([future])
        raise
    finally:
        pool.shutdown()
