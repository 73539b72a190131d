"""Rates: what a unit of work takes, learnt from what drives took.

A stage's seconds are taken as a sum over what a drive asks for: a fixed part, and parts for each
frame, frame inferred, decoded megapixel and segment. Drives that are alike cannot tell these parts
from each other: then a prior share decides, and the more drives differ the less it says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from storage.records import DriveRecord, Plan
from tasks.config import PlanConfig
from tasks.documents import read_document
from tasks.keys import STAGES
from tasks.plan import plan_drive

GPU_STAGES = ("infer",)
CPU_STAGES = tuple(stage for stage in STAGES if stage not in GPU_STAGES)
BYTES = "stored_bytes"
LARGEST_BENCHMARK_BYTES = 1_000_000
MISFITS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
# Shares of a drive's whole that are: fixed, by frame, by frame inferred, by decoded megapixel, by
# segment. Guesses from profiles of the compact network; a share of 0 is not fitted.
PRIOR_SHARES = {
    "probe": (0.05, 0.15, 0, 0.8, 0),
    "plan": (0.5, 0, 0, 0, 0.5),
    "infer": (0.05, 0, 0.6, 0.25, 0.1),
    "align": (0.05, 0.15, 0, 0, 0.8),
    "fuse": (0.05, 0.75, 0, 0.2, 0),
    "report": (0.7, 0.3, 0, 0, 0),
    BYTES: (0.02, 0.2, 0.75, 0, 0.03),
}
NOISE, SHARE_SPREAD = 0.1, 0.5  # relative: of one drive's figure, and of a prior share


@dataclass(frozen=True)
class Workload:
    """What a drive asks for."""

    frames: float
    frames_inferred: float  # overlaps counted twice
    megapixels: float  # of all frames of the recording, as decoded
    segments: float

    @classmethod
    def of(cls, record: DriveRecord, plan: Plan) -> Workload:
        """The work of a drive that is cut by `plan`."""
        inferred = sum(segment.frames for segment in plan.segments)
        pixels = record.frames * record.width * record.height
        return cls(record.frames, inferred, pixels / 1e6, len(plan.segments))

    def scaled(self, share: float) -> Workload:
        """A share of it."""
        return Workload(*(getattr(self, f.name) * share for f in fields(self)))

    def units(self) -> NDArray[np.float64]:
        """[5]: one, and the amounts, in the order of `PRIOR_SHARES`."""
        return np.array([1, self.frames, self.frames_inferred, self.megapixels, self.segments])


@dataclass(frozen=True)
class Observation:
    """What some work took: seconds of stages, and `stored_bytes`, as far as they are known."""

    source: str  # drive, or file of a benchmark
    device_kind: str
    work: Workload
    amounts: Mapping[str, float]
    lost_share: float = 0.0  # of the seconds that infer: attempts that were killed or failed
    share_inferred: float = 1.0  # of the frames: other kinds of device inferred the others

    def units(self, stage: str) -> NDArray[np.float64]:
        """[5]: of the work that the amount of a stage is for."""
        is_part = stage in GPU_STAGES
        return (self.work.scaled(self.share_inferred) if is_part else self.work).units()


@dataclass(frozen=True)
class Rates:
    """What each unit takes, [5] for each stage that is known, and how it is known."""

    device_kind: str
    per_unit: Mapping[str, NDArray[np.float64]]
    lost_share: float
    sources: tuple[str, ...]

    def predict(self, work: Workload) -> dict[str, float]:
        """Seconds of every stage that is known, and `stored_bytes`; losses are not in it."""
        units = work.units()
        return {name: float(units @ per_unit) for name, per_unit in self.per_unit.items()}


def fit_rates(observations: Sequence[Observation]) -> Rates:
    """Rates from observations of one kind of device; at least one is needed."""
    per_unit = {}
    for name, shares in PRIOR_SHARES.items():
        seen = [o for o in observations if o.amounts.get(name, 0) > 0]
        if seen:
            units = np.stack([o.units(name) for o in seen])
            per_unit[name] = fit(units, np.array([o.amounts[name] for o in seen]), shares)
    lost = float(np.mean([o.lost_share for o in observations]))
    return Rates(observations[0].device_kind, per_unit, lost, tuple(o.source for o in observations))


def fit(
    units: NDArray[np.float64], amounts: NDArray[np.float64], shares: Sequence[float]
) -> NDArray[np.float64]:
    """Amount per unit [k], none negative, that explains `amounts` [n] of `units` [n, k].

    Least squares of relative errors, with `shares` [k] of the mean amount as prior.
    """
    prior = np.array(shares)
    mean_units, mean_amount = units.mean(axis=0), amounts.mean()
    data = units / amounts[:, None] / NOISE
    pull = np.diag(mean_units / mean_amount) / SHARE_SPREAD
    is_free = prior > 0
    rows = np.vstack([data, pull[is_free]])[:, is_free]
    wanted = np.concatenate([np.full(len(amounts), 1 / NOISE), prior[is_free] / SHARE_SPREAD])
    found = np.zeros(len(prior))
    found[is_free] = nnls(rows, wanted)[0]
    return found


def by_most_common_device(
    observations: Iterable[Observation], device_kind: str | None
) -> list[Observation]:
    """Those of one kind of device: that given, else the one most of them are of."""
    found = list(observations)
    kinds = [o.device_kind for o in found]
    kind = device_kind or max(kinds, key=kinds.count, default="")
    return [o for o in found if o.device_kind == kind]


def read_benchmark(file: str, recommended_frames: int) -> list[Observation]:
    """Observations in the JSON, at a path or URL, that `throughput.py` or `pipeline.py` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is neither.
    """
    try:
        data = json.loads(read_document(file, LARGEST_BENCHMARK_BYTES))
        if "frames_per_second" in data:
            return [_from_throughput(file, data)]
        if not data["results"]:
            raise ValueError("it holds no results")
        return [_from_pipeline(file, row, recommended_frames) for row in data["results"]]
    except MISFITS as error:
        raise ValueError(
            f"{file} is not the JSON of tests/benchmarks/throughput.py or pipeline.py: {error!r}"
        ) from None


def _from_throughput(file: str, data: dict[str, Any]) -> Observation:
    frames = 1000.0
    work = Workload(frames, frames, 0.0, 0.0)
    kind = str(data.get("device_kind", data.get("device", "cpu")))
    return Observation(file, kind, work, {"infer": frames / data["frames_per_second"]})


def _from_pipeline(file: str, row: dict[str, Any], recommended_frames: int) -> Observation:
    width, height = map(int, row["video_size"].split("x"))
    frames, seconds = int(row["frames"]), row["run"]["stage_seconds"]
    record = DriveRecord("", "", (), frames, width, height, 0.0, 0.0, "", 0)
    work = Workload.of(record, plan_drive(record, PlanConfig(), recommended_frames))
    amounts = {name: seconds[name] for name in ("probe", "plan", "infer", "align", "report")}
    amounts["fuse"] = sum(seconds[name] for name in seconds if name.endswith("-tiles"))
    # Files of earlier versions do not have these.
    amounts |= {BYTES: row["run"].get(BYTES, 0.0)}
    kind = str(row.get("device_kind", "cpu"))
    return Observation(file, kind, work, amounts)
