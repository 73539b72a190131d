"""Overlap reading, computing and writing inside one task, by bounded queues."""

from __future__ import annotations

import contextvars
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(
    items: Iterable[T], ahead: int, given_up: threading.Event | None = None
) -> Generator[T, None, None]:
    """Yield `items`, computed in another thread at most `ahead` items in advance.

    An exception of `items` is raised here, in order. Closing the generator early stops the
    thread, so nothing goes on reading after a failure. Once `given_up` is set no more is yielded,
    though an item is waited for: it is up to `items` to end then too.
    """
    given_up = given_up or threading.Event()
    box: queue.Queue[Any] = queue.Queue(maxsize=ahead)
    stop, end = threading.Event(), object()

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                box.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def take() -> Any:
        while not given_up.is_set():
            with suppress(queue.Empty):
                item = box.get(timeout=0.1)
                return end if given_up.is_set() else item
        return end

    def produce() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(end)
        except BaseException as error:
            put(error)

    context = contextvars.copy_context()  # logs say which run they are of
    thread = threading.Thread(target=context.run, args=(produce,), name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := take()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


class BackgroundWriter:
    """Runs writes one after the other beside the caller; at most one waits.

    The failure of a write is raised by a later `submit` or at the end of the `with` block.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> BackgroundWriter:
        return self

    def submit(self, write: Callable[[], None]) -> None:
        """Queue `write`, after waiting until no other one waits."""
        while len(self._pending) > 1:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(contextvars.copy_context().run, write))

    def _wait(self) -> None:
        while self._pending:
            self._pending.popleft().result()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._pool.shutdown(wait=True)


class Clock:
    """Seconds that named stages of a pipeline were busy."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time that the block takes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self._seconds[stage] = self._seconds.get(stage, 0.0) + spent

    def take(self) -> dict[str, float]:
        """What was measured since the last time, as `<stage>_seconds`."""
        taken, self._seconds = self._seconds, {}
        return {f"{stage}_seconds": value for stage, value in taken.items()}


def timed(items: Iterable[T], clock: Clock, stage: str) -> Iterator[T]:
    """`items`, and the time that each takes to come."""
    iterator = iter(items)
    while True:
        with clock.measure(stage):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
