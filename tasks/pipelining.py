"""Overlap reading, computing and writing inside one task, by bounded queues."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T], ahead: int) -> Generator[T, None, None]:
    """Yield `items`, computed in another thread at most `ahead` items in advance.

    An exception of `items` is raised here, in order. Closing the generator early stops the
    thread, so nothing goes on reading after a failure.
    """
    box: queue.Queue[Any] = queue.Queue(maxsize=ahead)
    stop, end = threading.Event(), object()

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                box.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(end)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := box.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


class BackgroundWriter:
    """Runs writes one after the other beside the caller; at most one waits.

    The failure of a write is raised by the next `submit` or at the end of the `with` block.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._last: Future[None] | None = None

    def __enter__(self) -> BackgroundWriter:
        return self

    def submit(self, write: Callable[[], None]) -> None:
        """Queue `write`, after waiting for the one before it."""
        self._wait()
        self._last = self._pool.submit(write)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

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
