"""Plan: cut a drive into overlapping segments, and segments into groups for the GPU tasks."""

from __future__ import annotations

import math
from dataclasses import asdict
from importlib.metadata import version
from itertools import pairwise

from prefect import task

from storage.reconstruction import ReconstructionStore
from storage.records import DriveRecord, Plan, Segment
from storage.wording import redacted
from tasks.attempts import attempt_id, counted
from tasks.config import AnotherConfiguration, InferConfig, PlanConfig, ReconstructionConfig
from tasks.keys import drop_later, find_key, require_key, stage_key
from tasks.planned import ASIDE, read_plan, read_record
from tasks.retries import STAGE_OPTIONS
from ttt3r.weights import WeightsInfo, weights_info

VERSION = 1
VERSIONED = ("ttt3r-pipeline", "torch", "numpy", "zarr", "prefect", "av", "decord")


def cut_into_segments(
    frames: int, cuts: tuple[int, ...], segment: int, overlap: int
) -> tuple[Segment, ...]:
    """Cut `frames` into segments of at most `segment` frames that share at least `overlap`.

    A hard cut starts a new part; inside a part segments are equally long and equally spaced.
    """
    bounds = [0, *(c for c in sorted(set(cuts)) if 0 < c < frames), frames]
    segments: list[Segment] = []
    for part, (start, stop) in enumerate(pairwise(bounds)):
        length = min(segment, stop - start)
        count = 1 if length < segment else math.ceil((stop - start - overlap) / (segment - overlap))
        step = (stop - start - length) / max(count - 1, 1)
        for i in range(count):
            first = start + round(i * step)
            segments.append(Segment(len(segments), first, first + length, part))
    return tuple(segments)


def segment_lengths(config: PlanConfig, recommended_frames: int) -> tuple[int, int]:
    """Frames of a segment, and those at least that it shares with the next one.

    Raises:
        ValueError: segments would overlap by more than half.
    """
    segment = config.segment_frames or recommended_frames
    overlap = config.overlap_frames or max(segment // 4, 1)
    if overlap > segment // 2:
        raise ValueError(
            f"overlap_frames is {overlap} of segments of {segment} frames; it can be at most half, "
            "or three segments would share one frame"
        )
    return segment, overlap


def plan_drive(record: DriveRecord, config: PlanConfig, recommended_frames: int) -> Plan:
    """Plan of one drive; `recommended_frames` stands in for a segment length not set.

    Raises:
        ValueError: the drive has no frames, or segments would overlap by more than half.
    """
    if record.frames < 1:
        raise ValueError(f"{record.name} has no frame that decodes; there is nothing to plan")
    segment, overlap = segment_lengths(config, recommended_frames)
    cuts = record.cuts if config.split_at_cuts else ()
    segments = cut_into_segments(record.frames, cuts, segment, overlap)
    longest = max(s.frames for s in segments)
    return Plan(record.frames, min(config.chunk_frames, longest), segments)


def group_segments(plan: Plan, size: int) -> list[tuple[int, ...]]:
    """Indices of segments, `size` to a GPU task."""
    indices = [s.index for s in plan.segments]
    return [tuple(indices[i : i + size]) for i in range(0, len(indices), size)]


@task(name="plan", task_run_name="plan {url}", **STAGE_OPTIONS)
@counted("plan")
def plan_stage(url: str, config: ReconstructionConfig) -> list[tuple[int, ...]]:
    """Plan the drive in the store at `url`; return the groups of segments to infer.

    Records beside the plan what it is made with: configuration, weights and versions.
    """
    store = ReconstructionStore.open(url)
    record = read_record(store)
    info = weights_info(config.infer.weights)
    plan = plan_drive(record, config.plan, info.segment_frames)
    key = stage_key("plan", VERSION, require_key(store, "probe"), plan)
    is_new = find_key(store, "plan") != key
    if is_new:
        store.drop_commits("plan")
        store.drop_commits(ASIDE)
        drop_later(store, "plan")
        _remove_surplus(store, plan)
    elif planned_network(store) != network_settings(config.infer, info):
        drop_later(store, "infer")  # else it would stand there under the name of other weights
    store.update_attributes(
        {
            "plan": plan.to_json(),
            "configuration": asdict(config),
            "weights": info.to_json(),
            "versions": {name: version(name) for name in VERSIONED},
        }
    )
    if is_new:
        store.commit("plan", {"key": key, "attempt": attempt_id()})
    return group_segments(plan, config.infer.segments_per_task)


def _remove_surplus(store: ReconstructionStore, plan: Plan) -> None:
    """Remove segments that the plan before had and this one has not."""
    if "plan" in store.attributes:
        for index in range(len(plan.segments), len(read_plan(store).segments)):
            store.remove_segment(index)


def network_settings(config: InferConfig, info: WeightsInfo) -> dict[str, str]:
    """What of a configuration decides what is inferred.

    As set, not as resolved: machines differ in what `auto` means.
    """
    return {"rule": config.rule, "precision": config.precision, "weights": info.sha256}


def planned_network(store: ReconstructionStore) -> dict[str, str | None]:
    """The `network_settings` that the drive is planned for."""
    attributes = store.attributes
    infer = attributes.get("configuration", {}).get("infer", {})
    weights = attributes.get("weights", {}).get("sha256")
    return {"rule": infer.get("rule"), "precision": infer.get("precision"), "weights": weights}


def require_network(store: ReconstructionStore, config: InferConfig, info: WeightsInfo) -> None:
    """Make sure that the drive is still to be inferred so.

    Raises:
        AnotherConfiguration: it is planned for other weights, another rule or another precision.
    """
    planned, asked = planned_network(store), network_settings(config, info)
    others = [f"{n} {planned[n]!r}, not {asked[n]!r}" for n in asked if planned[n] != asked[n]]
    if others:
        raise AnotherConfiguration(
            f"{redacted(store.url)} is planned for {'; '.join(others)}; run `ttt3r reconstruct` "
            "with the settings that you want: a run of others is of no use any more"
        )
