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

OUTAGE_S = 1800.0  # of the Prefect server, that a run waits for
LONGEST_PAUSE_S = 15.0

T = TypeVar("T")
log = logging.getLogger(__name__)


def patiently(ask: Callable[[], T]) -> T:
    """What `ask` returns, which the server must be there for; asked again until it is.

    Args:
        ask: may be done twice.

    Raises:
        httpx.HTTPError: the server refuses the request, or was away for `OUTAGE_S`.
    """
    deadline, pause = time.monotonic() + OUTAGE_S, 1.0
    while True:
        try:
            return ask()
        except httpx.HTTPError as error:
            if not _is_outage(error) or time.monotonic() > deadline:
                raise
            log.warning("the Prefect server does not answer (%s); asked again", error)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _is_outage(error: httpx.HTTPError) -> bool:
    """Whether the server was away or in trouble; one that refuses does so again."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)
