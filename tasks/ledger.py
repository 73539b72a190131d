"""Ledger: what a finished drive really took, beside what was predicted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from storage.reconstruction import ReconstructionStore
from storage.records import DriveRecord, Plan
from tasks.keys import stage_key
from tasks.plan import require_key
from tasks.summary import path_length

VERSION = 1
LEDGER = "ledger"


@dataclass(frozen=True)
class Usage:
    """Resources of a drive, predicted or used."""

    gpu_hours: float  # of the machine that infers, whatever its device
    cpu_hours: float  # of the machines of all other stages
    stored_bytes: float


@dataclass(frozen=True)
class Rates:
    """What one unit of work takes, and how it is known."""

    infer_s: float  # per frame inferred, overlaps counted twice: network and waiting for frames
    other_s: float  # per frame of the drive: probe, align and fuse
    stored_bytes: float  # per frame inferred
    drives: tuple[str, ...] = field(default=())  # whose ledgers these are from

    def predict(self, frames: int, frames_inferred: int) -> Usage:
        """What a drive takes that has `frames` frames and `frames_inferred` with its overlaps."""
        return Usage(
            self.infer_s * frames_inferred / 3600,
            self.other_s * frames / 3600,
            self.stored_bytes * frames_inferred,
        )


def write_ledger(url: str, predicted: Rates | None = None) -> dict[str, Any]:
    """Record what the finished drive at `url` took; return the record.

    Seconds are those of the committed work: what a killed attempt lost is not counted. A record
    that is up to date is left as it is, the prediction made before the run included.
    """
    store = ReconstructionStore.open(url)
    key = stage_key(LEDGER, VERSION, [require_key(store, s) for s in ("align", "fuse/merged")])
    known = store.read_commit(LEDGER)
    if known is not None and known["key"] == key:
        return known
    record = {"key": key, **_figures(store)}
    if predicted is not None:
        usage = predicted.predict(record["frames"], record["frames_inferred"])
        record["predicted"] = asdict(usage)
        record["predicted_from"] = list(predicted.drives)
    store.commit(LEDGER, record)
    return record


def _figures(store: ReconstructionStore) -> dict[str, Any]:
    attributes = store.attributes
    drive, plan = (
        DriveRecord.from_json(attributes["drive"]),
        Plan.from_json(attributes["plan"]),
    )
    commits = store.commits()
    infer = [record for name, record in commits.items() if name.startswith("infer/")]
    fuse = [record for name, record in commits.items() if name.startswith("fuse/")]
    trajectory = store.read_trajectory()
    seconds = {
        "probe": _total([commits["probe"]], "seconds"),
        "infer": _total(infer, "infer_seconds") + _total(infer, "wait_seconds"),
        "align": _total([commits["align"]], "seconds"),
        "fuse": _total(fuse, "seconds"),
    }
    others = sum(value for stage, value in seconds.items() if stage != "infer")
    used = Usage(seconds["infer"] / 3600, others / 3600, store.stored_bytes())
    km = path_length(trajectory["cam_to_world"], trajectory["part"]) / 1000
    return {
        "drive": drive.name,
        "weights_sha256": attributes["weights"]["sha256"],
        "device_kind": ", ".join(sorted({str(r.get("device_kind", "unknown")) for r in infer})),
        "frames": drive.frames,
        "frames_inferred": sum(segment.frames for segment in plan.segments),
        "segments": len(plan.segments),
        "video_s": drive.duration_s,
        "km_estimated": km,
        "seconds": seconds,
        "used": asdict(used),
        "used_per_video_hour": _per(used, drive.duration_s / 3600),
        "used_per_km_estimated": _per(used, km),
    }


def _total(records: Iterable[dict[str, Any]], name: str) -> float:
    return float(sum(record.get(name, 0.0) for record in records))


def _per(usage: Usage, amount: float) -> dict[str, float] | None:
    """Usage for one unit of `amount`; None where there is nothing to divide by."""
    return {k: v / amount for k, v in asdict(usage).items()} if amount > 0 else None


def rates_from(ledgers: Iterable[dict[str, Any]]) -> Rates | None:
    """Means over all frames of the ledgers; None without any."""
    found = list(ledgers)
    frames = sum(ledger["frames"] for ledger in found)
    inferred = sum(ledger["frames_inferred"] for ledger in found)
    if not inferred:
        return None
    used = [ledger["used"] for ledger in found]
    return Rates(
        3600 * _total(used, "gpu_hours") / inferred,
        3600 * _total(used, "cpu_hours") / frames,
        _total(used, "stored_bytes") / inferred,
        tuple(ledger["drive"] for ledger in found),
    )
