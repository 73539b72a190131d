"""What is worth another try."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import httpx
import torch
from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.settings import PREFECT_TASK_DEFAULT_RETRY_DELAY_SECONDS

from storage.errors import (
    Claimed,
    ClaimLost,
    DataDamaged,
    NotAStore,
    StoreMissing,
    StoreRefused,
    StoreTooNew,
    StoreUnavailable,
)
from storage.failures import is_expired
from tasks import metrics
from tasks.config import AnotherConfiguration, UnfitMachine

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)

# A mistake of the user or of the input stays what it is, however often it is tried.
FINAL_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    ImportError,
    FileNotFoundError,
    PermissionError,
    DataDamaged,
    NotAStore,
    StoreMissing,
    StoreRefused,
    StoreTooNew,
)
# What is wrong with the store, the machine, the Prefect server or the whole run is no fault of one
# segment.
DRIVE_ERRORS = (
    AnotherConfiguration,
    Claimed,
    ClaimLost,
    NotAStore,
    StoreMissing,
    StoreTooNew,
    StoreUnavailable,
    UnfitMachine,
    PermissionError,
    ImportError,
    MemoryError,
    torch.OutOfMemoryError,  # of one lane, or of the weights: more lanes become fewer before
    torch.AcceleratorError,
    httpx.HTTPError,
)
RETRIES = 3
# Others where PREFECT_TASKS_DEFAULT_RETRY_DELAY_SECONDS is set.
RETRY_DELAYS_S = PREFECT_TASK_DEFAULT_RETRY_DELAY_SECONDS.value() or [10, 60, 300]


def is_worth_retrying(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether the failure may be the network's, the store's or the machine's."""
    return _is_worth_retrying(task.name, state.result(raise_on_failure=False))


def _is_worth_retrying(name: str, error: Any) -> bool:
    is_worth_it = is_expired(error) or not isinstance(error, FINAL_ERRORS)
    if is_worth_it:
        metrics.retried(name)
        log.warning("%s failed; at most %d attempts are made: %s", name, RETRIES + 1, error)
    return is_worth_it


def retried(act: Callable[P, T]) -> Callable[P, T]:
    """`act`, which may be done twice, made again where a disk or server fails, as stages are."""

    @wraps(act)
    def retried_act(*arguments: P.args, **named: P.kwargs) -> T:
        for delay_s in _delays_s():
            try:
                return act(*arguments, **named)
            except (StoreUnavailable, OSError) as error:
                if not _is_worth_retrying(act.__name__, error):
                    raise
            time.sleep(delay_s)
        return act(*arguments, **named)

    return retried_act


def _delays_s() -> list[float]:
    """Waits before the further attempts, as Prefect reads its setting."""
    given = RETRY_DELAYS_S if isinstance(RETRY_DELAYS_S, list) else [RETRY_DELAYS_S]
    return [given[min(attempt, len(given) - 1)] for attempt in range(RETRIES)]


# The store decides what is finished: Prefect caches no result.
STAGE_OPTIONS: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": RETRIES,
    "retry_delay_seconds": RETRY_DELAYS_S,
    "retry_condition_fn": is_worth_retrying,
}
