"""Planner: what a collection will take, before anything is computed, from what drives took.

Rates come from the ledgers of drives that are finished under the same output with the same
weights, on the same kind of device. Where there is none, unfinished drives and the JSON of a
benchmark stand in; without these nothing is predicted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from storage.bounds import ILLEGIBLE
from storage.drives import DriveLocation, absolute, store_url
from storage.errors import StoreError, StoreRefused
from storage.glance import glance_at
from storage.media import UnreadableVideo
from storage.reconstruction import ReconstructionStore
from storage.records import Clip, DriveRecord, Plan
from storage.wording import reason_of
from tasks.align import align_key
from tasks.attempts import ATTEMPTS
from tasks.config import ReconstructionConfig
from tasks.finished import is_finished
from tasks.fuse import merge_key, tiles_key
from tasks.infer import share_left
from tasks.keys import STAGES, find_key
from tasks.ledger import LEDGER, PREDICTED, Usage, observed
from tasks.plan import plan_drive
from tasks.planned import read_aside, read_plan, read_record
from tasks.prices import Prices
from tasks.probe import recording_key
from tasks.rates import (
    BYTES,
    CPU_STAGES,
    GPU_STAGES,
    Observation,
    Rates,
    Workload,
    by_most_common_device,
    fit_rates,
    read_benchmark,
)
from tasks.report import report_key
from tasks.summary import count_chunks, list_stores
from tasks.terms import Terms
from ttt3r.weights import weights_info

ENOUGH = 32  # drives that rates are learnt from: more say little more
LOOKERS = 32  # threads that look at drives: each waits for the store most of the time
NOTHING = Usage(0.0, 0.0, 0.0)
COMMIT_OF = {stage: "fuse/merged" if stage == "fuse" else stage for stage in STAGES}


@dataclass(frozen=True)
class DriveEstimate:
    """One drive of a plan; frames are from its probe, else from its header."""

    name: str
    location: str
    stage: str  # that is next, "done", "new", or "unreadable": nothing can be inferred
    frames: int
    duration_s: float
    segments: int
    left: Usage | None  # what is still to be spent; None: no rates are known
    cost: float | None  # of `left`, where prices are given
    reason: str = ""  # why it is unreadable


# ---- rates


def known_rates(
    output: str, weights: str, device_kind: str | None = None, benchmark: str | None = None
) -> Rates | None:
    """Rates of one kind of device, that of most drives if none is named; None: nothing is known.

    Args:
        output: where the drives are from whose ledgers rates are learnt.
        weights: rates of other weights say nothing.
        device_kind: as ledgers name it, "cpu" or "NVIDIA H100".
        benchmark: JSON of `throughput.py` or `pipeline.py`, for where no drive is finished.
    """
    known = observations(_stores_in(output), weights, benchmark, device_kind)
    seen = by_most_common_device(known, device_kind)
    return fit_rates(seen) if seen else None


def observations(
    urls: Sequence[str],
    weights: str,
    benchmark: str | None = None,
    device_kind: str | None = None,
) -> list[Observation]:
    """What drives took, on any kind of device; until `ENOUGH` finished ones, of the kind, are seen.

    Args:
        urls: of their stores, in the order in which they are looked into.
        weights: rates of other weights say nothing.
        benchmark: stands in where no drive is finished.
        device_kind: None: any kind counts.
    """
    info = weights_info(weights)
    finished: list[Observation] = []
    unfinished: list[Observation] = []
    with ThreadPoolExecutor(LOOKERS) as pool:
        for first in range(0, len(urls), ENOUGH):
            batch = urls[first : first + ENOUGH]
            for done, begun in pool.map(lambda url: _observe(url, info.sha256), batch):
                finished += done
                unfinished += begun
            if sum(device_kind in (None, o.device_kind) for o in finished) >= ENOUGH:
                break
    if finished:
        return finished
    return unfinished + (read_benchmark(benchmark, info.segment_frames) if benchmark else [])


def _stores_in(output: str) -> list[str]:
    """All stores, first `ENOUGH` that lie evenly over all."""
    try:
        urls = list_stores(output)
    except ValueError:  # nothing there yet
        return []
    count = min(ENOUGH, len(urls))
    evenly = [urls[i * len(urls) // count] for i in range(count)]
    return list(dict.fromkeys(evenly + urls))


def _observe(url: str, sha256: str) -> tuple[list[Observation], list[Observation]]:
    """What a drive took if it is finished, and what it took so far if it is not."""
    try:
        store = ReconstructionStore.open(url)
        ledger = store.read_commit(LEDGER)
        finished = observed(ledger) if ledger and ledger["weights_sha256"] == sha256 else []
        unfinished = _observe_unfinished(store, sha256) if ledger is None else []
        for observation in (*finished, *unfinished):
            fit_rates([observation])  # fails where its figures are none
        return finished, unfinished
    except (StoreError, *ILLEGIBLE):  # a damaged neighbour: others tell the rates
        return [], []


def _observe_unfinished(store: ReconstructionStore, sha256: str) -> list[Observation]:
    """Inference of the chunks that are committed, as far as it is known what they took."""
    attempts = store.commits(ATTEMPTS).values()
    seconds: Counter[str] = Counter()
    for attempt in attempts:
        if attempt.get("weights_sha256") == sha256:
            seconds[str(attempt["device_kind"])] += attempt["seconds"]
    chunks, done = count_chunks(store)
    if not seconds or not done:
        return []
    record = read_record(store)
    work = Workload.of(record, read_plan(store))
    source = f"{record.name} (unfinished)"
    return [
        Observation(source, kind, work.scaled(done / chunks * share), {"infer": seconds[kind]})
        for kind, share in _shares(store, seconds).items()
    ]


def _shares(store: ReconstructionStore, kinds: Collection[str]) -> dict[str, float]:
    """Shares of the frames that are inferred, by kinds of device that inferred any."""
    if len(kinds) == 1:  # the rule: no need to read what every chunk says
        return dict.fromkeys(kinds, 1.0)
    frames: Counter[str] = Counter()
    for record in store.commits("infer").values():
        frames[str(record.get("device_kind"))] += record.get("frames_inferred", 0)
    return {k: frames[k] / frames.total() for k in kinds if frames[k]}


def predict(rates: Rates, work: Workload, shares: Mapping[str, float]) -> Usage:
    """What is left of a drive's work; `shares` of the stages that are left, 1 if not named.

    Hours that infer are those of rates plus the share that drives lost to killed attempts.
    """
    amounts = {n: v * shares.get(n, 1.0) for n, v in rates.predict(work).items()}
    gpu = _hours(amounts, GPU_STAGES)
    stored = amounts.get(BYTES)
    return Usage(
        None if gpu is None else gpu / (1 - min(rates.lost_share, 0.9)),
        _hours(amounts, CPU_STAGES),
        stored,
    )


def _hours(amounts: Mapping[str, float], stages: Sequence[str]) -> float | None:
    found = [amounts.get(stage) for stage in stages]
    known = [seconds for seconds in found if seconds is not None]
    return sum(known) / 3600 if len(known) == len(found) else None


def record_prediction(url: str, config: ReconstructionConfig) -> None:
    """Write into a planned drive's store what the whole of it is predicted to take.

    One prediction for each kind of device that is known; what was predicted before the first
    run of a plan stays.
    """
    store = ReconstructionStore.open(url)
    plan_key = find_key(store, "plan")
    if (store.read_commit(PREDICTED) or {}).get("plan_key") == plan_key:
        return
    others = [other for other in _stores_in(url.rpartition("/")[0]) if other != url]
    # Every drive's run looks: if each looked at all, that would be a look for each pair of drives.
    seen = observations(others[:ENOUGH], config.infer.weights)
    work = Workload.of(read_record(store), read_plan(store))
    by_device = {}
    for kind in {observation.device_kind for observation in seen}:
        rates = fit_rates(by_most_common_device(seen, kind))
        seconds = {n: v for n, v in rates.predict(work).items() if n != BYTES}
        usage = asdict(predict(rates, work, {}))
        by_device[kind] = {**usage, "seconds": seconds, "from": list(rates.sources)}
    store.commit(PREDICTED, {"plan_key": plan_key, "by_device": by_device})


# ---- estimates


def estimate_drives(
    drives: Iterable[DriveLocation],
    output: str,
    config: ReconstructionConfig,
    rates: Rates | None,
    prices: Prices | None = None,
) -> list[DriveEstimate]:
    """What every drive will take yet.

    Raises:
        ValueError: the prices have none for the device of the rates.
    """
    if prices is not None and rates is not None:
        prices.require_price(rates.device_kind)
    with ThreadPoolExecutor(LOOKERS) as pool:
        return list(pool.map(lambda d: _estimate(d, output, config, rates, prices), drives))


def _estimate(
    drive: DriveLocation,
    output: str,
    config: ReconstructionConfig,
    rates: Rates | None,
    prices: Prices | None,
) -> DriveEstimate:
    store = _store_of(drive, output)
    try:
        record = _record_of(drive, store)
        plan = plan_drive(record, config.plan, weights_info(config.infer.weights).segment_frames)
    except (UnreadableVideo, StoreRefused) as error:  # its run takes no time to speak of
        return DriveEstimate(
            drive.name, drive.location, "unreadable", 0, 0.0, 0, NOTHING, 0.0, reason_of(error)
        )
    if store is None:
        shares = {}
    elif is_finished(drive.location, store.url, config):
        shares = dict.fromkeys((*STAGES, BYTES), 0.0)
    else:
        shares = shares_left(store, config, plan)
    stage = "new" if store is None else next((s for s in STAGES if shares[s]), "done")
    left = NOTHING if stage == "done" else None
    if rates is not None and left is None:
        left = predict(rates, Workload.of(record, plan), shares)
    cost = None
    if prices is not None and left is not None:
        hours = {rates.device_kind: left.gpu_hours} if rates is not None else {}
        cost = prices.cost(hours, left.cpu_hours, left.stored_bytes)
    sizes = (record.frames, record.duration_s, len(plan.segments))
    return DriveEstimate(drive.name, drive.location, stage, *sizes, left, cost)


def _store_of(drive: DriveLocation, output: str) -> ReconstructionStore | None:
    """The drive's store if the recording is probed as it is now."""
    try:
        store = ReconstructionStore.open(store_url(output, drive.name))
        is_current = find_key(store, "probe") == recording_key(absolute(drive.location))
        return store if is_current else None
    except (StoreError, OSError, ValueError):  # not begun, or nothing that can be looked at
        return None


def _record_of(drive: DriveLocation, store: ReconstructionStore | None) -> DriveRecord:
    """What the probe found, else what the header says: good for planning only."""
    if store is not None:
        return read_record(store)
    seen = glance_at(drive.location)
    fps = seen.frames / seen.duration_s if seen.duration_s else 0.0
    clip = Clip(drive.location, seen.frames, 0, "none")
    pixels = (seen.width, seen.height)
    return DriveRecord(
        drive.name, drive.location, (clip,), seen.frames, *pixels, fps, seen.duration_s, "", 0
    )


def shares_left(
    store: ReconstructionStore, config: ReconstructionConfig, plan: Plan
) -> dict[str, float]:
    """Share of every stage of a probed drive that is to be done under these settings."""
    is_planned = store.read_commit("plan") is not None and read_plan(store) == plan
    infer = share_left(store, config.infer) if is_planned else 1.0
    left = {"probe": 0.0, "plan": float(not is_planned), "infer": infer, BYTES: infer}
    info = weights_info(config.infer.weights)
    keys: dict[str, Callable[[], str]] = {  # each once the stages before are known to be current
        "align": lambda: align_key(
            store, plan.without(sorted(read_aside(store))), config.align, config.infer, info
        ),
        "fuse": lambda: merge_key(tiles_key(store, config.fuse), Terms.of_weights(info.to_json())),
        "report": lambda: report_key(store, has_frames=True),
    }
    is_current = infer == 0
    for stage, key in keys.items():
        is_current = is_current and find_key(store, COMMIT_OF[stage]) == key()
        left[stage] = float(not is_current)
    return left


def total(estimates: Sequence[DriveEstimate]) -> tuple[Usage | None, float | None]:
    """What all drives take together, and cost; None where that of one is unknown."""
    usage: Usage | None = NOTHING
    cost: float | None = 0.0
    for estimate in estimates:
        usage = None if usage is None or estimate.left is None else usage + estimate.left
        cost = None if cost is None or estimate.cost is None else cost + estimate.cost
    return usage, cost
