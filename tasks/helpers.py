"""Processes beside this one that take their share of a stage's work.

Python lets one thread of a process run at a time, and so does Open3D while it fuses: a process
alone leaves most cores of a machine idle. A helper is an interpreter of its own. It is told what to
do, asks for one item after the other, and finds everything else in the store, where it claims and
commits like a worker on another machine. What it logs and counts is logged and counted here.

Helpers start when work first is worth it, and end with the block that allowed them, or when this
process dies. One that dies is done without: others do what it had taken.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar

import torch

from storage.wording import OUR_LOGGERS, use_plain_records
from tasks import attempts, metrics
from tasks.lanes import free_bytes
from tasks.memory import return_freed_memory, use_one_arena

HELPER_BYTES = 1_500_000_000  # that must be free for each
CANNOT_READ = 1  # exit code of a helper that does not understand what it is told
_LOOK_S = 0.1
# -P: a folder "tasks" where the user happens to be is none of ours.
_COMMAND = ("-P", "-c", "import sys; from tasks.helpers import serve; serve(int(sys.argv[1]))")

T = TypeVar("T")
Take = Callable[[], int | None]  # the next item that nobody has taken; None: there is no more
There = Callable[[Take, threading.Event], T]  # can be pickled; told when to stop

log = logging.getLogger(__name__)
_pool: ContextVar[Helpers | None] = ContextVar("helpers", default=None)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def helped(processes: int) -> Iterator[None]:
    """Let stages in the block share their work among so many processes, this one among them.

    Where a block around this one has helpers, these are the helpers here, too.
    """
    if _pool.get() is not None:
        yield
        return
    pool = Helpers(processes - 1)
    token = _pool.set(pool)
    try:
        yield
    finally:
        _pool.reset(token)
        pool.close()


def share(
    count: int,
    here: Callable[[Take], T],
    there: There[T],
    stop: threading.Event,
    worth: int,
    bytes_each: int = HELPER_BYTES,
) -> list[T]:
    """Do items 0 .. `count` - 1, `here` in this process and `there` in each of its helpers.

    Both take one item after the other, until none is left, or `stop` is set, or one of them has
    failed: then its error is raised once the others have ended. What a helper had taken that died
    or was interrupted is taken again by others, not in order: items have to bear being done twice.

    Args:
        count: items.
        here: does all that it takes; called again for what helpers leave undone.
        there: the same, a function of a module or a `partial` of one.
        stop: set by whoever wants it to end; `here` looks at it by itself.
        worth: for fewer items no helper is started.
        bytes_each: memory that each process needs for the work, this one among them.

    Returns:
        What `here`, and `there` in each helper that lived to the end, returned.
    """
    pool = _pool.get()
    if pool is None:
        return [here(_Items(count, stop).take)]
    return pool.share(count, here, there, stop, worth, max(bytes_each, HELPER_BYTES))


class _Items:
    """Hands out numbers until there are no more, or they are not wanted any more."""

    def __init__(self, count: int, stop: threading.Event) -> None:
        self._numbers, self._stop, self._lock = deque(range(count)), stop, threading.Lock()
        self._is_given_up = False

    def take(self) -> int | None:
        with self._lock:
            return self._numbers.popleft() if self._are_left() else None

    def put_back(self, numbers: Sequence[int]) -> None:
        """Hand these out again: not all of them are done."""
        with self._lock:
            self._numbers.extendleft(reversed(numbers))

    def give_up(self) -> None:
        """Hand out no more."""
        with self._lock:
            self._is_given_up = True

    def are_left(self) -> bool:
        """Whether there is something to take."""
        with self._lock:
            return self._are_left()

    def _are_left(self) -> bool:
        return bool(self._numbers) and not self._is_given_up and not self._stop.is_set()


class Helpers:
    """Up to `most` processes that share what this one has to do."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._started: list[_Helper] = []

    def share(
        self,
        count: int,
        here: Callable[[Take], T],
        there: There[T],
        stop: threading.Event,
        worth: int,
        bytes_each: int,
    ) -> list[T]:
        """See `share`."""
        helpers = self._helpers(count, worth, bytes_each)
        items = _Items(count, stop)
        attempts.note(processes=len(helpers) + 1)

        def attend(helper: _Helper) -> list[T]:
            taken: list[int] = []

            def take() -> int | None:
                if (number := items.take()) is not None:
                    taken.append(number)
                return number

            try:
                value, is_interrupted = helper.work(there, take, stop)
            except HelperLost as lost:
                log.warning("%s; its work is done without it", lost)
                if lost.code == CANNOT_READ:  # nor could the next one
                    self._most = 0
                self._leave(helper)
                items.put_back(taken)
                return []
            except BaseException:
                items.give_up()
                raise
            if is_interrupted:
                self._leave(helper)
                items.put_back(taken)
            return [value]

        threads = torch.get_num_threads()
        with ThreadPoolExecutor(max(1, len(helpers)), thread_name_prefix="helper") as pool:
            if helpers:
                torch.set_num_threads(_threads_each(len(helpers)))
            others = [pool.submit(copy_context().run, attend, helper) for helper in helpers]
            try:
                found = [here(items.take)]
            except BaseException:
                items.give_up()
                raise
            finally:
                pool.shutdown()
                if helpers:
                    torch.set_num_threads(threads)
        found += [value for other in others for value in other.result()]
        if items.are_left():  # this process had ended when a helper left something undone
            found.append(here(items.take))
        return found

    def _helpers(self, count: int, worth: int, bytes_each: int) -> list[_Helper]:
        """Those that have something to do, started as far as there is memory for them."""
        room = free_bytes(torch.device("cpu")) - bytes_each  # less what this process will hold
        ready: list[_Helper] = []
        for helper in self._started[: max(0, count - 1)]:
            more = max(0, bytes_each - helper.bytes_granted)
            if more <= room:
                room -= more
                helper.bytes_granted += more
                ready.append(helper)
        wanted = min(self._most, count - 1) if count >= worth else len(ready)
        try:
            while len(ready) < wanted and room >= bytes_each:
                room -= bytes_each
                ready.append(_Helper(bytes_each))
                self._started.append(ready[-1])
        except OSError as error:
            log.warning("no more than %d processes can start: %s", len(ready) + 1, error)
            self._most = wanted = len(self._started)
        if len(ready) < wanted:
            log.warning("memory suffices for %d of %d processes", len(ready) + 1, wanted + 1)
        return ready

    def _leave(self, helper: _Helper) -> None:
        """Do without it from now on."""
        helper.end()
        self._started.remove(helper)
        attempts.note(processes=len(self._started) + 1)

    def close(self) -> None:
        """End all helpers, none of which has anything to do."""
        for helper in self._started:
            helper.end()
        self._started.clear()


def _threads_each(helpers: int) -> int:
    return max(1, min(torch.get_num_threads(), usable_cores() // (helpers + 1)))


class HelperLost(RuntimeError):
    """A helper has died, with this exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(
            f"a helper process ended with code {code} (-9: killed, by the system where memory ran "
            "out)"
        )
        self.code = code


class _Helper:
    """One helper, as seen from here."""

    def __init__(self, bytes_granted: int) -> None:
        self.bytes_granted = bytes_granted  # that it may hold
        self._connection, theirs = Pipe()
        with theirs:
            # In a process group of its own: Ctrl-C is for this process, which tells its helpers.
            self._process = subprocess.Popen(
                [sys.executable, *_COMMAND, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                process_group=0,
                # It has to find the same code, installed or not.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            )

    def work(self, there: There[T], take: Take, stop: threading.Event) -> tuple[T, bool]:
        """Have it do what it takes until there is no more.

        Returns:
            What it returned, and whether it was interrupted, with something left undone.

        Raises:
            HelperLost: it has died.
        """
        threads = torch.get_num_threads()
        try:
            self._connection.send(("work", (there, attempts.lent(), threads)))
            is_told = False
            while True:
                if stop.is_set() and not is_told:
                    self._connection.send(("stop", None))
                    is_told = True
                if not self._connection.poll(_LOOK_S):
                    continue
                kind, said = self._connection.recv()
                if kind == "ended":
                    break
                self._hear(kind, said, take)
        except (EOFError, OSError) as error:
            self.end()
            raise HelperLost(self._process.returncode) from error
        value, failure, borrowed, is_interrupted = said
        attempts.take_back(borrowed)
        if failure is not None:
            raise failure
        return value, is_interrupted

    def _hear(self, kind: str, said: Any, take: Take) -> None:
        if kind == "take":
            self._connection.send(("item", take()))
        elif kind == "log":
            record = logging.makeLogRecord(said)
            if (logger := logging.getLogger(record.name)).isEnabledFor(record.levelno):
                logger.handle(record)
        elif kind == "chunk_stored":
            metrics.chunk_stored(said[0], ends_segment=said[1])

    def end(self) -> None:
        """Let it end: nobody talks to it any more."""
        self._connection.close()
        self._process.wait()


# --- in the helper --------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Do what the process at the other end of a pipe asks for, until that has closed it."""
    _Server(Connection(descriptor)).run()


class _Server:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._work: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._items: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._stop = threading.Event()

    def run(self) -> None:
        use_one_arena()
        use_plain_records()
        metrics.count_elsewhere(lambda *said: self._say("chunk_stored", said))
        import prefect.main  # noqa: F401  (sets up logging when it is imported, so not after this)

        logging.root.handlers[:] = [_ToOthers(self._say)]
        logging.root.setLevel(logging.INFO)
        for name in OUR_LOGGERS:
            ours = logging.getLogger(name)
            ours.handlers.clear()
            ours.setLevel(logging.NOTSET)
            ours.propagate = True
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self._interrupted)
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        while (work := self._work.get()) is not None:
            self._do(*work)

    def _interrupted(self, number: int, frame: Any) -> None:
        self._stop.set()
        self._work.put(None)

    def _listen(self) -> None:
        try:
            while True:
                kind, said = self._connection.recv()
                if kind == "work":
                    self._stop.clear()
                    self._work.put(said)
                elif kind == "item":
                    self._items.put(said)
                elif kind == "stop":
                    self._stop.set()
        except (EOFError, OSError):
            pass
        except Exception:  # what it is told cannot be read here: it is of no use
            traceback.print_exc()
            os._exit(CANNOT_READ)
        # Nobody listens any more. If this process was at work, the other one has died, and whoever
        # goes on shall find the claims of both free: see `storage.claims`.
        os._exit(0)

    def _do(self, there: There[Any], lent: str | None, threads: int) -> None:
        torch.set_num_threads(threads)
        value, failure = None, None
        ended = threading.Event()
        threading.Thread(target=_trim, args=(ended,), daemon=True).start()
        with attempts.borrowed(lent) as borrowed:
            try:
                value = there(self._take, self._stop)
            except Exception as error:
                failure = _portable(error)
        ended.set()
        return_freed_memory()
        self._say("ended", (value, failure, borrowed, self._stop.is_set()))

    def _take(self) -> int | None:
        if self._stop.is_set():
            return None
        self._say("take", None)
        return self._items.get()

    def _say(self, kind: str, said: Any) -> None:
        with self._sending, suppress(OSError):  # who does not listen any more has died
            self._connection.send((kind, said))


class _ToOthers(logging.Handler):
    """Lets the lines of this process be logged by the one that it helps."""

    def __init__(self, say: Callable[[str, Any], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        told = {**record.__dict__, "msg": record.getMessage(), "args": None}
        if record.exc_info:
            told |= {
                "exc_info": None,
                "exc_text": "".join(traceback.format_exception(*record.exc_info)),
            }
        self._say("log", told)


def _portable(error: Exception) -> Exception:
    """The error, or if that cannot be sent a RuntimeError of its text; with where it was raised."""
    error.add_note("in a helper process:\n" + "".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _trim(ended: threading.Event) -> None:
    """Give freed memory back before it piles up, as `attempts` does."""
    while not ended.wait(attempts.TRIM_S):
        return_freed_memory()
