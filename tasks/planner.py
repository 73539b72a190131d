"""Planner: what a collection will take, before anything is computed, from what drives took.

Rates come from the ledgers of drives that are finished under the same output with the same
weights, and on the same kind of device where that is given. Without one nothing is predicted:
a first drive has to be run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from storage.drives import DriveLocation
from storage.glance import glance_at
from storage.reconstruction import ReconstructionStore, StoreError
from storage.records import Clip, DriveRecord
from tasks.config import ReconstructionConfig
from tasks.ledger import LEDGER, Rates, Usage, rates_from
from tasks.plan import plan_drive
from tasks.summary import list_stores, progress
from ttt3r.weights import weights_info

LEDGERS_READ = 32  # stores that are looked into for rates, evenly over all
NOTHING = Usage(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class DriveEstimate:
    """One drive of a plan; frames are from its probe, else from its header."""

    name: str
    location: str
    stage: str  # that is next, "done", or "new"
    frames: int
    duration_s: float
    segments: int
    left: Usage | None  # what is still to be spent; None: no rates are known


def known_rates(output: str, weights: str, device_kind: str | None = None) -> Rates | None:
    """Rates from finished drives under `output`; None if there is none to learn from."""
    try:
        urls = list_stores(output)
    except ValueError:  # nothing there yet
        return None
    sha256 = weights_info(weights).sha256
    ledgers = []
    for url in urls[:: max(1, len(urls) // LEDGERS_READ)]:
        try:
            ledger = ReconstructionStore.open(url).read_commit(LEDGER)
        except StoreError:  # a damaged neighbour: others tell the rates
            continue
        if ledger is None or ledger["weights_sha256"] != sha256:
            continue
        if device_kind in (None, ledger["device_kind"]):
            ledgers.append(ledger)
    return rates_from(ledgers)


def estimate_drive(
    drive: DriveLocation, url: str, config: ReconstructionConfig, rates: Rates | None
) -> DriveEstimate:
    """What the drive holds, how far it is, and what it will take yet.

    Progress is that of the stored plan: other settings than those of the earlier run may
    redo stages that are taken for done here.

    Raises:
        UnreadableVideo: the drive was never probed and its header says nothing.
    """
    stage, record, share_left = "new", None, 1.0
    try:
        state = progress(url)
        stage = state["stage"]
        attributes = ReconstructionStore.open(url).attributes
        record = DriveRecord.from_json(attributes["drive"]) if "drive" in attributes else None
        share_left = 1 - state["chunks_done"] / state["chunks"] if state["chunks"] else 1.0
    except StoreError:  # not begun
        pass
    record = record or _promised(drive)
    plan = plan_drive(record, config.plan, weights_info(config.infer.weights).segment_frames)
    left = None
    if rates is not None:
        whole = rates.predict(plan.frames, sum(s.frames for s in plan.segments))
        left = NOTHING if stage == "done" else _scaled(whole, share_left)
    return DriveEstimate(
        drive.name,
        drive.location,
        stage,
        record.frames,
        record.duration_s,
        len(plan.segments),
        left,
    )


def _promised(drive: DriveLocation) -> DriveRecord:
    """A record from the header alone, good for planning only."""
    seen = glance_at(drive.location)
    fps = seen.frames / seen.duration_s if seen.duration_s else 0.0
    clip = Clip(drive.location, seen.frames, 0, "none")
    return DriveRecord(
        drive.name, drive.location, (clip,), seen.frames, 0, 0, fps, seen.duration_s, "", 0
    )


def _scaled(usage: Usage, share_left: float) -> Usage:
    """Only inference and what it stores are resumed in parts; the other stages run whole."""
    return Usage(usage.gpu_hours * share_left, usage.cpu_hours, usage.stored_bytes * share_left)


def total(estimates: Sequence[DriveEstimate]) -> Usage | None:
    """What all drives take together; None if that of one is unknown."""
    left = [estimate.left for estimate in estimates if estimate.left is not None]
    if len(left) < len(estimates):
        return None
    return Usage(
        sum(usage.gpu_hours for usage in left),
        sum(usage.cpu_hours for usage in left),
        sum(usage.stored_bytes for usage in left),
    )


def check_budget(estimates: Sequence[DriveEstimate], max_gpu_hours: float) -> None:
    """Refuse a run that is predicted to take more hours of the inferring machine.

    Raises:
        ValueError: over the budget, or nothing is known to predict from.
    """
    needed = total(estimates)
    if needed is None:
        raise ValueError(
            "a budget is given and no finished drive under the output tells what these weights "
            "take; reconstruct one drive without --max-gpu-hours first"
        )
    if needed.gpu_hours > max_gpu_hours:
        raise ValueError(
            f"the run is predicted to take {needed.gpu_hours:.3g} GPU-hours, more than the "
            f"{max_gpu_hours:.3g} of --max-gpu-hours; nothing was begun. Raise the limit or give "
            "fewer drives (`ttt3r plan` lists them)"
        )
