"""What runs do while the Prefect server is away: they wait for it.

Prefect's own client waits only where it has been connected before; the first request of a new one
fails at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import httpx
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError

OUTAGE_S = 1800.0  # of the Prefect server, that a run waits for
LONGEST_PAUSE_S = 15.0

T = TypeVar("T")
log = logging.getLogger(__name__)


def patiently(ask: Callable[[], T], error: type[Exception] = httpx.HTTPError) -> T:
    """What `ask` returns, which the server must be there for; asked again until it is.

    Args:
        ask: may be done twice.
        error: what an outage looks like.

    Raises:
        Exception: `error`, if the server refuses the request or was away for `OUTAGE_S`.
    """
    deadline, pause = time.monotonic() + OUTAGE_S, 1.0
    while True:
        try:
            return ask()
        except error as found:
            if not _is_outage(found) or time.monotonic() > deadline:
                raise
            log.warning("the Prefect server does not answer (%s); asked again", found)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def given_slots(work: Callable[[], T]) -> T:
    """What `work` returns, a task with a tag: its first question is for slots, on a new client."""
    return patiently(work, ConcurrencySlotAcquisitionError)


def _is_outage(error: BaseException | None) -> bool:
    """Whether the server was away or in trouble; one that refuses does so again."""
    if isinstance(error, ConcurrencySlotAcquisitionError):
        return _is_outage(error.__cause__)
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)
