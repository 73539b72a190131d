"""Ledger: what a finished drive really took, beside what was predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from storage.reconstruction import ReconstructionStore
from storage.records import DriveRecord, Plan
from tasks import metrics
from tasks.keys import ATTEMPTS, require_key, stage_key
from tasks.prices import Prices
from tasks.rates import BYTES, GPU_STAGES, Observation, Workload
from tasks.summary import path_length

VERSION = 3
LEDGER = "ledger"
PREDICTED = "predicted"
# Of the thread that infers; and of a batch of tiles.
COMMIT_SECONDS = ("infer_seconds", "wait_seconds", "stall_seconds"), ("seconds",)
UNKNOWN = "unknown"  # device of what ended before it had one


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
    """Seconds of a drive's attempts, by stage; of those that infer also by kind of device."""

    seconds: Counter[str]  # of all that led to what is stored, lost ones included
    cpu_seconds: Counter[str]  # the same, of processors, all threads together
    lost: Counter[str]  # of attempts that were killed or failed, what they committed left out
    replaced: Counter[str]  # of attempts whose results were replaced: other settings, repairs
    device_seconds: Counter[str]
    device_lost: Counter[str]
    device_frames: Counter[str]  # inferred, overlaps counted twice


def spent_on(store: ReconstructionStore) -> Spent:
    """What the attempts at a drive took."""
    spent = Spent(*(Counter[str]() for _ in fields(Spent)))
    commits = store.commits()
    committed: Counter[str] = Counter()  # seconds that what an attempt committed accounts for
    kinds: dict[str | None, str] = {}  # devices of attempts
    for name, record in commits.items():
        if name.startswith(f"{ATTEMPTS}/"):
            continue
        attempt, kind = record.get("attempt"), str(record.get("device_kind", UNKNOWN))
        if attempt:
            of_chunk, of_batch = COMMIT_SECONDS
            counted = of_batch if name.startswith("fuse/") else of_chunk
            committed[attempt] += sum(record.get(n, 0.0) for n in counted)
        if name.startswith("infer/"):
            spent.device_frames[kind] += record.get("frames_inferred", 0)
            kinds[attempt] = kind
    for name, record in commits.items():
        if not name.startswith(f"{ATTEMPTS}/"):
            continue
        stage, _, attempt = name.removeprefix(f"{ATTEMPTS}/").partition("-")
        if record["outcome"] == "done" and attempt not in committed:
            spent.replaced[stage] += record["seconds"]
            continue
        is_lost = record["outcome"] != "done"
        done = committed[attempt] / record.get("processes", 1)  # which worked at the same time
        lost = max(record["seconds"] - done, 0) if is_lost else 0
        spent.seconds[stage] += record["seconds"]
        spent.cpu_seconds[stage] += record["cpu_seconds"]
        if is_lost:
            spent.lost[stage] += lost
        if stage in GPU_STAGES:
            kind = str(record.get("device_kind", kinds.get(attempt, UNKNOWN)))
            spent.device_seconds[kind] += record["seconds"]
            spent.device_lost[kind] += lost
    _give_unknown_to_main_device(spent)
    return spent


def main_device(spent: Spent) -> str:
    """The kind of device that inferred for longest."""
    known = sorted((spent.device_seconds.keys() | spent.device_frames.keys()) - {UNKNOWN})

    def amount(kind: str) -> tuple[float, float]:
        return spent.device_seconds[kind], spent.device_frames[kind]

    return max(known, key=amount, default=UNKNOWN)


def _give_unknown_to_main_device(spent: Spent) -> None:
    """Attempts that failed before they had a device were on one of those that there are."""
    main = main_device(spent)
    for counter in (spent.device_seconds, spent.device_lost, spent.device_frames):
        if UNKNOWN in counter and main != UNKNOWN:
            counter[main] += counter.pop(UNKNOWN)


def write_ledger(url: str, prices: Prices | None = None) -> dict[str, Any]:
    """Record what the finished drive at `url` took, beside what was predicted; return the record.

    Seconds are of whole attempts at stages, lost ones and the loading of the network included;
    starting containers and processes, and Prefect between the stages, are not in them. A record
    that is up to date is left as it is.
    """
    store = ReconstructionStore.open(url)
    inputs = [require_key(store, stage) for stage in ("align", "fuse/merged")]
    key = stage_key(LEDGER, VERSION, inputs, prices)
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
    kinds = sorted(spent.device_seconds.keys() | spent.device_frames.keys())
    devices = {
        kind: {
            "seconds": float(spent.device_seconds[kind]),
            "lost_seconds": float(spent.device_lost[kind]),
            "frames_inferred": spent.device_frames[kind],
        }
        for kind in kinds
    }
    by_device = (store.read_commit(PREDICTED) or {}).get("by_device") or {}
    predicted = _mix(by_device, shares_of(devices))
    gpu_seconds = sum(spent.seconds[stage] for stage in GPU_STAGES)
    cpu_seconds = spent.seconds.total() - gpu_seconds
    used = Usage(gpu_seconds / 3600, cpu_seconds / 3600, store.stored_bytes())
    trajectory = store.read_trajectory()
    km = path_length(trajectory["cam_to_world"], trajectory["part"]) / 1000
    hours = drive.duration_s / 3600
    return {
        "drive": drive.name,
        "weights_sha256": attributes["weights"]["sha256"],
        "device_kind": main_device(spent),
        "devices": devices,
        **asdict(Workload.of(drive, plan)),
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
        **({} if prices is None else _money(used, devices, by_device, hours, km, prices)),
    }


def shares_of(devices: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Shares of the frames that each kind of device inferred, of those that inferred any."""
    frames = {kind: device["frames_inferred"] for kind, device in devices.items()}
    return {kind: n / sum(frames.values()) for kind, n in frames.items() if n}


def _mix(
    by_device: Mapping[str, Mapping[str, Any]], shares: Mapping[str, float]
) -> dict[str, Any] | None:
    """What is predicted where kinds of device share the frames; None if one is not known."""
    if not shares or not by_device.keys() >= shares.keys():
        return None
    if len(shares) == 1:
        return dict(by_device[next(iter(shares))])
    parts = [(by_device[kind], share) for kind, share in shares.items()]
    usage = {f.name: _mean([(part[f.name], share) for part, share in parts]) for f in fields(Usage)}
    stages = set.intersection(*(set(part["seconds"]) for part, _ in parts))
    seconds = {s: sum(part["seconds"][s] * share for part, share in parts) for s in sorted(stages)}
    sources = sorted({source for part, _ in parts for source in part["from"]})
    return {**usage, "seconds": seconds, "from": sources}


def _mean(parts: list[tuple[float | None, float]]) -> float | None:
    """Mean of values with their shares; None where one is not known."""
    known = [value * share for value, share in parts if value is not None]
    return sum(known) if known and len(known) == len(parts) else None


def _money(
    used: Usage,
    devices: Mapping[str, Mapping[str, float]],
    by_device: Mapping[str, Mapping[str, Any]],
    video_hours: float,
    km: float,
    prices: Prices,
) -> dict[str, Any]:
    """Cost in all, as predicted, per video-hour and kilometre; None without a price for it."""
    hours = {kind: device["seconds"] / 3600 for kind, device in devices.items()}
    cost = prices.cost(hours, used.cpu_hours, used.stored_bytes)
    expected = []  # of the whole drive on each kind, and the share of it
    for kind, share in shares_of(devices).items():
        whole = Usage(*(by_device.get(kind, {}).get(f.name) for f in fields(Usage)))
        cost_there = prices.cost({kind: whole.gpu_hours}, whole.cpu_hours, whole.stored_bytes)
        expected.append((cost_there, share))
    return {
        "currency": prices.currency,
        "cost": cost,
        "cost_predicted": _mean(expected),
        "cost_per_video_hour": cost / video_hours if cost is not None and video_hours else None,
        "cost_per_km_estimated": cost / km if cost is not None and km else None,
    }


def observed(ledger: Mapping[str, Any]) -> list[Observation]:
    """What rates can learn from a ledger, by kind of device; nothing from one of version 1."""
    if "megapixels" not in ledger:
        return []
    names = ("frames", "frames_inferred", "megapixels", "segments")
    work = Workload(**{name: ledger[name] for name in names})
    seconds, lost = ledger["seconds"], ledger["lost_seconds"]
    amounts = {stage: value - lost.get(stage, 0.0) for stage, value in seconds.items()}
    amounts[BYTES] = ledger["used"][BYTES]
    found = []
    for kind, (share, took, of_it_lost) in _devices_in(ledger).items():
        own = amounts | {"infer": took - of_it_lost}
        lost_share = of_it_lost / took if took else 0.0
        found.append(Observation(ledger["drive"], kind, work, own, lost_share, share))
    return found


def _devices_in(ledger: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """By kind of device: share of the frames, seconds, and those of them that were lost."""
    if "devices" in ledger:
        devices = ledger["devices"]
        return {
            kind: (share, devices[kind]["seconds"], devices[kind]["lost_seconds"])
            for kind, share in shares_of(devices).items()
        }
    # Version 2 names all kinds and does not tell them apart: their mean stands for each.
    took, lost = (
        sum(ledger[name].get(stage, 0.0) for stage in GPU_STAGES)
        for name in ("seconds", "lost_seconds")
    )
    return {kind: (1.0, took, lost) for kind in ledger["device_kind"].split(", ")}
