"""Ending in good order when the machine is taken away: SIGTERM, or Ctrl-C on the terminal."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
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
    goes on. To leave sooner would free the claims of what still writes.

    The system hands a signal to any thread, and Python's handler waits until the main thread runs
    again: so it looks up every tenth of a second.
    """
    stop = threading.Event()
    pool = ThreadPoolExecutor(1, thread_name_prefix="work")
    try:
        future = pool.submit(contextvars.copy_context().run, work, stop)
        while not wait([future], _LOOK_S).done:
            pass
        return future.result()
    except BaseException:  # one of `work` itself, too: then it has ended
        stop.set()
        ended = False
        while not ended:
            with suppress(BaseException):
                pool.shutdown()
                ended = True
        raise
    finally:
        pool.shutdown()
