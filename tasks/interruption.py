"""Ending in good order when the machine is taken away: SIGTERM, or Ctrl-C on the terminal."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

_LOOK_S = 0.1


def run_until_stopped(work: Callable[[threading.Event], T]) -> T:
    """Run `work` beside the main thread and let it end in good order when interrupted.

    Prefect raises TerminationSignal in the main thread on SIGTERM, in the middle of whatever
    runs there; its handler must stay, as it takes part in rescheduling the run. Where it is not
    in place, that of the command line raises. Here the main thread only waits, for whatever may be
    raised: `work` sees the event set, finishes what it is at, and returns; then the interruption
    goes on, however many more come. To leave sooner would free the claims of what still writes.
    """
    stop = threading.Event()
    pool = ThreadPoolExecutor(1, thread_name_prefix="work")
    future: Future[T] | None = None
    try:
        future = pool.submit(contextvars.copy_context().run, work, stop)
        _await(future)
        return future.result()
    except BaseException:  # one of `work` itself, too: then it has ended
        has_ended = False
        while not has_ended:
            with suppress(BaseException):
                stop.set()
                if future is not None:
                    _await(future)
                pool.shutdown()
                has_ended = True
        raise
    finally:
        pool.shutdown()


def _await(future: Future[T]) -> None:
    """Wait until it is done, whatever comes of it.

    A signal may reach another thread, or this one just before it waits: Python runs the handler
    once the main thread runs again. And a `join` that is interrupted takes its thread for dead.
    """
    while not future.done():
        with suppress(TimeoutError):
            future.exception(_LOOK_S)
