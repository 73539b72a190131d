"""What every attempt at a stage takes, also one that is killed: what the ledger adds up.

An attempt is the object `commits/attempts/<stage>-<id>`. It is written while the attempt runs, so
that of a killed one at most `HEARTBEAT_S` is unknown, but for the processors' time of its helpers,
which is known when they end. The commits that an attempt makes hold its
id: what no commit refers to was lost, or its result was replaced.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from storage.errors import StoreError
from storage.reconstruction import ReconstructionStore
from tasks import metrics
from tasks.keys import ATTEMPTS
from tasks.memory import return_freed_memory

HEARTBEAT_S = 15.0
TRIM_S = 0.25
SHORTEST_FAILURE_S = 1.0  # a refusal at the door is no attempt

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)
_current: ContextVar[Borrowed | None] = ContextVar("attempt", default=None)


@dataclass
class Borrowed:
    """An attempt of another process, in whose name this one works."""

    id: str
    is_used: bool = False  # something is committed by it
    notes: dict[str, Any] = field(default_factory=dict)
    cpu_seconds: float = 0.0  # that this process took


class Attempt(Borrowed):
    """One call of a stage's function."""

    def __init__(self, url: str, stage: str) -> None:
        """Start the clocks."""
        super().__init__(uuid.uuid4().hex[:12])
        self._url, self._name = url, f"{ATTEMPTS}/{stage}-{self.id}"
        self._stage = stage
        self._began, self._cpu = time.perf_counter(), time.process_time()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=self._name, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        """Record the attempt now and then, and give freed memory back before it piles up."""
        written = self._began
        while not self._ended.wait(min(TRIM_S, HEARTBEAT_S)):
            return_freed_memory()
            if time.perf_counter() - written >= HEARTBEAT_S:
                self._write("running")
                written = time.perf_counter()

    def end(self, outcome: str) -> None:
        """Stop the clocks; nothing is recorded of an attempt that found nothing to do."""
        self._ended.set()
        self._thread.join()
        is_failure = outcome != "done" and self._seconds() > SHORTEST_FAILURE_S
        if self.is_used or is_failure:
            self._write(outcome)
            metrics.attempt_ended(self._stage, outcome, self._seconds())

    def _seconds(self) -> float:
        return time.perf_counter() - self._began

    def _write(self, outcome: str) -> None:
        record = {
            "outcome": outcome,
            "seconds": self._seconds(),
            "cpu_seconds": time.process_time() - self._cpu + self.cpu_seconds,
            **self.notes,
        }
        try:
            ReconstructionStore.open(self._url).commit(self._name, record)
        except (StoreError, OSError) as error:  # only the ledger would have known
            log.warning("%s: %s cannot be recorded: %s", self._url, self._name, error)


def counted(stage: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Record what calls of a stage's function take, in the store at its argument `url`."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @wraps(function)
        def call(*args: P.args, **named: P.kwargs) -> T:
            attempt = Attempt(signature.bind(*args, **named).arguments["url"], stage)
            token = _current.set(attempt)
            try:
                result = function(*args, **named)
            except BaseException as error:
                attempt.end("failed" if isinstance(error, Exception) else "interrupted")
                raise
            finally:
                _current.reset(token)
                return_freed_memory()  # or the next stage's peak comes on top
            attempt.end("done")
            return result

        return call

    return decorate


def attempt_id() -> str | None:
    """Id of the attempt that runs here, for a commit that it makes; None outside of one."""
    attempt = _current.get()
    if attempt is None:
        return None
    attempt.is_used = True
    return attempt.id


def note(**facts: Any) -> None:
    """Record facts with the attempt that runs here."""
    attempt = _current.get()
    if attempt is not None:
        attempt.notes |= facts


def lent() -> str | None:
    """Id of the attempt that runs here, for another process that works in its name."""
    attempt = _current.get()
    return None if attempt is None else attempt.id


@contextmanager
def borrowed(lent_id: str | None) -> Iterator[Borrowed]:
    """Work in the name of another process's attempt, and say what came of it, to be taken back."""
    attempt = Borrowed(lent_id or "")
    token = _current.set(attempt if lent_id else None)
    cpu = time.process_time()
    try:
        yield attempt
    finally:
        _current.reset(token)
        attempt.cpu_seconds = time.process_time() - cpu


def take_back(work: Borrowed) -> None:
    """Count what another process did in the name of the attempt that runs here."""
    attempt = _current.get()
    if attempt is not None:
        attempt.is_used |= work.is_used
        attempt.cpu_seconds += work.cpu_seconds
