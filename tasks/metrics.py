"""Metrics of the stages: what dashboards and alerts of a fleet are made of.

Written through OpenTelemetry's interface, which does nothing until a process has started to export
(`flows.telemetry`). No metric carries a drive's name, as every drive would make series of its own:
which drive it was is said by the logs, and what it took by its store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from opentelemetry.metrics import CallbackOptions, Observation, get_meter

from tasks.keys import STAGES

SECONDS = "_seconds"
QUEUE_BUCKETS_S = (1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 4 * 3600)

_tell: Callable[[Mapping[str, Any], bool], None] | None = None
_meter = get_meter("ttt3r")
_frames = _meter.create_counter("ttt3r.inference.frames", "{frame}", "frames inferred and stored")
_chunks = _meter.create_counter("ttt3r.inference.chunks", "{chunk}", "chunks inferred and stored")
_busy = _meter.create_counter(
    "ttt3r.inference.busy", "s", "time that a part of inference took; parts overlap"
)
_segments = _meter.create_counter("ttt3r.segments", "{segment}", "segments done or set aside")
_drives = _meter.create_counter("ttt3r.drives", "{drive}", "drives finished or failed")
_collections = _meter.create_counter(
    "ttt3r.collections", "{collection}", "runs of a collection that ended, but for those stopped"
)
_stored = _meter.create_counter("ttt3r.stored", "By", "size of finished drives")
_stages = _meter.create_counter("ttt3r.stage", "s", "time of attempts at a stage, lost ones too")
_retries = _meter.create_counter("ttt3r.retries", "{retry}", "stages that are tried again")
_active = _meter.create_up_down_counter("ttt3r.runs.active", "{run}", "flow runs of this process")
_queued = _meter.create_histogram(
    "ttt3r.run.queued",
    "s",
    "from the time a run was due to its start",
    explicit_bucket_boundaries_advisory=QUEUE_BUCKETS_S,
)


def _gpu_memory(options: CallbackOptions) -> Iterable[Observation]:
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            peak = torch.cuda.max_memory_allocated(device)
            yield Observation(peak, {"device": f"cuda:{device}"})


_meter.create_observable_gauge(
    "ttt3r.gpu.memory.peak", [_gpu_memory], "By", "most memory of the GPU that tensors held"
)


def start_at_zero() -> None:
    """Make series begin at zero: an increase is only seen from one value to the next."""
    for counter in (_frames, _chunks, _stored):
        counter.add(0)
    for outcome in ("done", "set_aside"):
        _segments.add(0, {"outcome": outcome})
    for stage in STAGES:
        _stages.add(0, {"stage": stage, "outcome": "done"})
    for outcome in ("finished", "failed", "still_unreadable"):
        _drives.add(0, {"outcome": outcome})


def count_elsewhere(tell: Callable[[Mapping[str, Any], bool], None]) -> None:
    """Let another process count the chunks of this one: it is told of each."""
    global _tell
    _tell = tell


def chunk_stored(record: Mapping[str, Any], *, ends_segment: bool) -> None:
    """Count a chunk by its commit record."""
    if _tell is not None:
        _tell(record, ends_segment)
        return
    _frames.add(record["frames_inferred"])
    _chunks.add(1)
    for name, value in record.items():
        if name.endswith(SECONDS):
            _busy.add(value, {"part": name.removesuffix(SECONDS)})
    if ends_segment:
        _segments.add(1, {"outcome": "done"})


def segment_set_aside() -> None:
    """Count a segment that fails even alone."""
    _segments.add(1, {"outcome": "set_aside"})


def drive_finished(ledger: Mapping[str, Any]) -> None:
    """Count a drive by its ledger."""
    _drives.add(1, {"outcome": "finished"})
    _stored.add(ledger["used"]["stored_bytes"])


def attempt_ended(stage: str, outcome: str, seconds: float) -> None:
    """Count the time of an attempt that was done, failed or was interrupted."""
    _stages.add(seconds, {"stage": stage, "outcome": outcome})


def drive_failed() -> None:
    """Count a drive that ended with an error."""
    _drives.add(1, {"outcome": "failed"})


def drive_still_unreadable() -> None:
    """Count a drive whose recording could not be read before, and is still the same."""
    _drives.add(1, {"outcome": "still_unreadable"})


def collection_ended(outcome: str) -> None:
    """Count a run of a collection: finished, incomplete (drives failed), or failed as a whole."""
    _collections.add(1, {"outcome": outcome})


def retried(stage: str) -> None:
    """Count a stage that failed and is tried again."""
    _retries.add(1, {"stage": stage})


@contextmanager
def run_active(flow: str, queued_s: float | None) -> Iterator[None]:
    """Count a flow run as active while the block runs, after it had waited `queued_s`."""
    if queued_s is not None:
        _queued.record(queued_s, {"flow": flow})
    _active.add(1, {"flow": flow})
    try:
        yield
    finally:
        _active.add(-1, {"flow": flow})
