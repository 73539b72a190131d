"""Ledger: what a finished drive really took, beside what was predicted."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from storage.reconstruction import ReconstructionStore
from storage.records import DriveRecord, Plan
from tasks import metrics
from tasks.attempts import ATTEMPTS
from tasks.keys import stage_key
from tasks.plan import require_key
from tasks.prices import Prices
from tasks.rates import BYTES, GPU_STAGES, Observation, Work
from tasks.summary import path_length

VERSION = 2
LEDGER = "ledger"
PREDICTED = "predicted"
CHUNK_SECONDS = ("infer_seconds", "wait_seconds", "stall_seconds")  # of the thread that infers


@dataclass(frozen=True)
class Usage:
    """Resources of a drive, predicted or used; None: not known."""

    gpu_hours: float | None  # of the machines that infer, whatever their device
    cpu_hours: float | None  # of the machines of all other stages
    stored_bytes: float | None

    def __add__(self, other: Usage) -> Usage:
        """Of both together; what is unknown of one is unknown of both."""
        mine, theirs = asdict(self), asdict(other)
        return Usage(**{name: _sum(mine[name], theirs[name]) for name in mine})

    def per(self, amount: float) -> dict[str, float | None] | None:
        """Usage for one unit of `amount`; None where there is nothing to divide by."""
        if amount <= 0:
            return None
        return {k: None if v is None else v / amount for k, v in asdict(self).items()}


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


@dataclass(frozen=True)
class Spent:
    """Seconds of a drive's attempts, by stage."""

    seconds: Counter[str]  # of all that led to what is stored, lost ones included
    cpu_seconds: Counter[str]  # the same, of processors, all threads together
    lost: Counter[str]  # of attempts that were killed or failed, what they committed left out
    replaced: Counter[str]  # of attempts whose results were replaced: other settings, repairs


def spent_on(store: ReconstructionStore) -> Spent:
    """What the attempts at a drive took."""
    spent = Spent(Counter(), Counter(), Counter(), Counter())
    commits = store.commits()
    committed: Counter[str] = Counter()  # seconds that an attempt's committed chunks account for
    for name, record in commits.items():
        if record.get("attempt") and not name.startswith(f"{ATTEMPTS}/"):
            committed[record["attempt"]] += sum(record.get(n, 0.0) for n in CHUNK_SECONDS)
    for name, record in commits.items():
        if not name.startswith(f"{ATTEMPTS}/"):
            continue
        stage, _, attempt = name.removeprefix(f"{ATTEMPTS}/").partition("-")
        if record["outcome"] == "done" and attempt not in committed:
            spent.replaced[stage] += record["seconds"]
            continue
        spent.seconds[stage] += record["seconds"]
        spent.cpu_seconds[stage] += record["cpu_seconds"]
        if record["outcome"] != "done":
            spent.lost[stage] += max(0.0, record["seconds"] - committed[attempt])
    return spent


def write_ledger(url: str, prices: Prices | None = None) -> dict[str, Any]:
    """Record what the finished drive at `url` took, beside what was predicted; return the record.

    Seconds are of whole attempts at stages, lost ones and the loading of the network included;
    starting containers and processes, and Prefect between the stages, are not in them. A record
    that is up to date is left as it is.
    """
    store = ReconstructionStore.open(url)
    inputs = [require_key(store, stage) for stage in ("align", "fuse/merged")]
    key = stage_key(LEDGER, VERSION, inputs, prices.to_json() if prices else None)
    known = store.read_commit(LEDGER)
    if known is not None and known["key"] == key:
        return known
    record = {"key": key, **_figures(store, prices)}
    store.commit(LEDGER, record)
    metrics.drive_finished(record)
    return record


def _figures(store: ReconstructionStore, prices: Prices | None) -> dict[str, Any]:
    attributes, spent = store.attributes, spent_on(store)
    drive, plan = DriveRecord.from_json(attributes["drive"]), Plan.from_json(attributes["plan"])
    kinds = {str(r.get("device_kind", "unknown")) for r in store.commits("infer").values()}
    kind = ", ".join(sorted(kinds))
    predicted = ((store.read_commit(PREDICTED) or {}).get("by_device") or {}).get(kind)
    gpu_seconds = sum(spent.seconds[stage] for stage in GPU_STAGES)
    cpu_seconds = spent.seconds.total() - gpu_seconds
    used = Usage(gpu_seconds / 3600, cpu_seconds / 3600, store.stored_bytes())
    trajectory = store.read_trajectory()
    km = path_length(trajectory["cam_to_world"], trajectory["part"]) / 1000
    hours = drive.duration_s / 3600
    return {
        "drive": drive.name,
        "weights_sha256": attributes["weights"]["sha256"],
        "device_kind": kind,
        **asdict(Work.of(drive, plan)),
        "video_s": drive.duration_s,
        "km_estimated": km,
        "seconds": dict(spent.seconds),
        "cpu_seconds": dict(spent.cpu_seconds),
        "lost_seconds": dict(spent.lost),
        "replaced_seconds": dict(spent.replaced),
        "used": asdict(used),
        "predicted": predicted,
        "used_per_video_hour": used.per(hours),
        "used_per_km_estimated": used.per(km),
        **({} if prices is None else _money(used, predicted, hours, km, kind, prices)),
    }


def _money(
    used: Usage,
    predicted: dict[str, Any] | None,
    video_hours: float,
    km: float,
    device_kind: str,
    prices: Prices,
) -> dict[str, Any]:
    """Cost in all, as predicted, per video-hour and kilometre; None without a price for it."""
    cost = prices.cost(**asdict(used), device_kind=device_kind)
    expected = {name: (predicted or {}).get(name) for name in asdict(used)}
    return {
        "currency": prices.currency,
        "cost": cost,
        "cost_predicted": prices.cost(**expected, device_kind=device_kind),
        "cost_per_video_hour": cost / video_hours if cost is not None and video_hours else None,
        "cost_per_km_estimated": cost / km if cost is not None and km else None,
    }


def observed(ledger: dict[str, Any]) -> Observation | None:
    """What rates can learn from a ledger; None from one of an earlier version."""
    if "megapixels" not in ledger:
        return None
    names = ("frames", "frames_inferred", "megapixels", "segments")
    seconds, lost = ledger["seconds"], ledger["lost_seconds"]
    amounts = {stage: value - lost.get(stage, 0.0) for stage, value in seconds.items()}
    infer = sum(seconds.get(stage, 0.0) for stage in GPU_STAGES)
    lost_share = sum(lost.get(stage, 0.0) for stage in GPU_STAGES) / infer if infer else 0.0
    return Observation(
        ledger["drive"],
        ledger["device_kind"],
        Work(**{name: ledger[name] for name in names}),
        amounts | {BYTES: ledger["used"][BYTES]},
        lost_share,
    )
