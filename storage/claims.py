"""Claims: who works on what, so that two workers that take the same work never mix results.

A claim is the newest of the objects `claims/<name>/<number>.json`. Its holder renews it every
`RENEW_S`. Whoever finds a claim takes it over only when its holder is dead: the process is gone
from this machine, or, for a holder elsewhere, the claim was not renewed for `LEASE_S` while
being watched, so that no two clocks are compared. The next number is created exclusively: of
several that find a dead holder exactly one takes over. A holder that could not renew for half
of the lease stops by itself, well before anybody takes its place, and goes on only after it has
taken its own claim over in the same way. Many claims are watched together: a lost machine is
waited for once, however many it held.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from storage.errors import Claimed, ClaimLost, CommitExists, DataDamaged, GivenUp
from storage.layout import CLAIMS
from storage.objects import Folder, check_name, in_parallel, is_name
from storage.wording import redacted

RENEW_S = 15.0
LEASE_S = 90.0
WATCH_S = 1.0  # between two looks at claims of other machines
LOOKS = 5  # at a claim that is listed and not there
LAST_NUMBER = 999_999  # that the name of an object holds

log = logging.getLogger(__name__)
_held: dict[str, Claim] = {}  # by token, the claims that this process holds


class Claim:
    """The right to work on `name`, from `with` to the end of the block.

    Raises:
        Claimed: on entering, a living worker holds it.
        DataDamaged: on entering, somebody else has put a claim there with the last of all numbers.
    """

    def __init__(self, folder: Folder, name: str, progress: int = 0) -> None:
        """`progress`: any measure of what is done, to see whether a dead holder got on."""
        self._folder, self._prefix = folder, f"{CLAIMS}/{check_name(name)}"
        self.name, self._progress = name, progress
        self.deaths = 0  # holders that died one after the other at this same progress
        self._holder = this_process()
        self._token = uuid.uuid4().hex
        self._object = ""
        self._seen: tuple[list[int], dict[str, Any]] | None = None  # by the last look
        self._seen_since = 0.0
        self._renewed = 0.0
        self._is_lost = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"claim {name}", daemon=True)

    def __enter__(self) -> Claim:
        await_free([self])
        numbers, found = self._seen or ([], {})
        if found.get("progress") == self._progress:
            self.deaths = _deaths_in(found) + 1
        number = max(numbers, default=0) + 1
        if number > LAST_NUMBER:
            raise DataDamaged(
                f"{self._url}: the claim on {self.name!r} has number {LAST_NUMBER}, which no run "
                f"gives; if none is at work, remove {self._object_of(LAST_NUMBER)}"
            )
        self._object = self._object_of(number)
        self._renewed = _now()
        try:
            self._folder.write_new(self._object, self._document())
        except CommitExists:
            raise self._claimed("another worker") from None
        if self._is_overtaken(numbers, found, number):
            self._folder.delete(self._object)
            raise self._claimed("another worker")
        for older in numbers:
            self._folder.delete(self._object_of(older))
        _held[self._token] = self
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        _held.pop(self._token, None)
        try:
            if self._is_mine():
                self._folder.delete(self._object)
        except Exception as failure:  # the next holder finds that this one is gone
            log.warning("claim %r of %s cannot be given up: %s", self.name, self._url, failure)

    def is_free(self) -> bool:
        """Look whether nobody holds it, or a dead worker; to be asked again until it is so.

        Raises:
            Claimed: its holder lives.
        """
        began, before = _now(), self._seen
        numbers, found = self._seen = self._look()
        self._seen_since = self._seen_since or _now()
        is_alive = _is_alive(found) if numbers else False
        # As text: NaN, in a record that is none of ours, is not equal to itself.
        if is_alive is None and before is not None and repr(before[1]) != repr(found):
            is_alive = True
        if is_alive:
            raise self._claimed(f"process {found.get('pid')} on {found.get('host')}")
        return is_alive is False or began - self._seen_since >= LEASE_S

    def check(self) -> None:
        """Make sure, before writing, that the claim is still held.

        Raises:
            ClaimLost: it is somebody else's by now.
        """
        with self._lock:
            if self._is_late():
                self._retake()
            elif not self._is_mine():
                self._is_lost = True
        if self._is_lost:
            raise ClaimLost(
                f"{self._url}: the claim on {self.name!r} was lost, as it could not be renewed for "
                f"{LEASE_S / 2:.0f} s or was removed; what is committed stays, run again"
            )

    def is_on(self, folder: Folder, name: str) -> bool:
        """Whether this is the claim on `name` of that folder."""
        return self.name == name and self._folder.url.rstrip("/") == folder.url.rstrip("/")

    @property
    def _url(self) -> str:
        return redacted(self._folder.url)

    def _is_late(self) -> bool:
        return _now() - self._renewed > LEASE_S / 2

    def _is_mine(self) -> bool:
        return (_parsed(self._folder.read(self._object)) or {}).get("token") == self._token

    def _keep(self) -> None:
        """Renew until told to stop; a store that is away now may be back the next time."""
        while not self._stop.wait(RENEW_S) and not self._is_lost:
            try:
                self._renew()
            except Exception as error:
                log.warning("claim %r of %s not renewed: %s", self.name, self._url, error)

    def _renew(self) -> None:
        began = _now()
        self.check()
        self._folder.write(self._object, self._document())
        # A write that took so long may have landed in a claim that was taken over meanwhile.
        if _now() - began <= LEASE_S / 2:
            self._renewed = began

    def _retake(self) -> None:
        """Take over the claim that was not renewed in time, unless somebody else has."""
        began, numbers = _now(), self._numbers()
        newest = self._object_of(numbers[-1]) if numbers else ""
        if newest != self._object or numbers[-1] == LAST_NUMBER or not self._is_mine():
            self._is_lost = True
            return
        following = self._object_of(numbers[-1] + 1)
        try:
            self._folder.write_new(following, self._document())
        except CommitExists:
            self._is_lost = True
            return
        self._object, self._renewed = following, began
        for older in numbers:
            self._folder.delete(self._object_of(older))

    def _document(self) -> bytes:
        record = {
            "token": self._token,
            "renewal": uuid.uuid4().hex,
            "progress": self._progress,
            "deaths": self.deaths,
            **self._holder,
        }
        return json.dumps(record, indent=1).encode()

    def _object_of(self, number: int) -> str:
        return f"{self._prefix}/{number:06d}.json"

    def _numbers(self) -> list[int]:
        # Below the claim on "tiles" there are those on "tiles/0000".
        names = (n.removeprefix(f"{self._prefix}/") for n in self._folder.sizes(self._prefix))
        return sorted(int(n[:6]) for n in names if re.fullmatch(r"[0-9]{6}\.json", n))

    def _record(self, numbers: list[int]) -> dict[str, Any] | None:
        """Record of the newest of the claims; None where it is gone."""
        return _parsed(self._folder.read(self._object_of(numbers[-1])))

    def _look(self) -> tuple[list[int], dict[str, Any]]:
        """Numbers of the claims that are there, and the record of the newest.

        One that is listed time and again and cannot be read is of an unknown holder.
        """
        for _ in range(LOOKS):
            numbers = self._numbers()
            found = self._record(numbers) if numbers else {}
            if found is not None:
                return numbers, found
            time.sleep(WATCH_S / LOOKS)
        return numbers, {}

    def _is_overtaken(self, numbers: list[int], found: dict[str, Any], number: int) -> bool:
        """Whether it was taken, and perhaps given up, between the look at it and `number`."""
        now = self._numbers()
        if set(now) - {*numbers, number}:
            return True
        older = self._record(numbers) if numbers else None
        return older is not None and older.get("token") != found.get("token")

    def _claimed(self, holder: str) -> Claimed:
        return Claimed(
            f"{self._url}: {self.name!r} is being worked on by {holder}; its work stands, "
            "run again when it has ended"
        )


def await_free(claims: Iterable[Claim], given_up: threading.Event | None = None) -> None:
    """Wait until all claims can be entered; those on lost machines are watched at the same time.

    Raises:
        Claimed: the holder of one lives.
        GivenUp: `given_up` was set.
    """
    waiting, given_up = list(claims), given_up or threading.Event()
    while waiting := _not_free(waiting):
        if given_up.wait(WATCH_S):
            names = ", ".join(sorted(repr(claim.name) for claim in waiting))
            raise GivenUp(f"nobody waits any more for the claims on {names}")


def _not_free(claims: Iterable[Claim]) -> list[Claim]:
    found: list[Claim] = []

    def look(claim: Claim) -> None:
        if not claim.is_free():
            found.append(claim)

    in_parallel(look, claims)
    return found


def check_held(folder: Folder, name: str) -> None:
    """If this process holds the claim on `name`, through whatever object, make sure that it does.

    Raises:
        ClaimLost: it is somebody else's by now.
    """
    mine = [claim for claim in list(_held.values()) if claim.is_on(folder, name)]
    if mine:
        mine[-1].check()


def claimed_names(folder: Folder) -> list[str]:
    """Names that anybody, dead or alive, holds a claim on."""
    below = (name.removeprefix(f"{CLAIMS}/") for name in folder.sizes(CLAIMS))
    return sorted({n.rpartition("/")[0] for n in below if "/" in n and is_name(n)})


def this_process() -> dict[str, Any]:
    """What tells this process apart from all others, on this and other machines."""
    pid = os.getpid()
    return {
        "host": platform.node(),
        "machine": _machine(),
        "pid": pid,
        "started": _start_of(pid),
    }


def _now() -> float:
    """Seconds of a clock that goes on while the machine is suspended, where there is one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _machine() -> str:
    """Boot and process namespace, or "" where process numbers cannot be compared."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """When a process started, in ticks since boot; None where it is gone or only a zombie.

    Raises:
        PermissionError: it is another user's, which this machine does not show.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:  # also where /proc hides it (hidepid)
        with suppress(ProcessLookupError, OverflowError):
            os.kill(pid, 0)
        return None
    except ProcessLookupError:  # it ended while it was read
        return None
    fields = status.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _is_alive(record: dict[str, Any]) -> bool | None:
    """Whether the holder lives; None where that cannot be seen from here."""
    machine, pid, started = (record.get(name) for name in ("machine", "pid", "started"))
    if not machine or machine != _machine() or type(pid) is not int:
        return None
    try:
        is_there = started is not None and _start_of(pid) == started
    except PermissionError:
        return None
    return is_there and (pid != os.getpid() or str(record.get("token")) in _held)


def _deaths_in(record: dict[str, Any]) -> int:
    found = record.get("deaths")
    return found if type(found) is int else 0


def _parsed(data: bytes | None) -> dict[str, Any] | None:
    """A claim's record; one that is not ours to read counts as of an unknown holder."""
    if data is None:
        return None
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
