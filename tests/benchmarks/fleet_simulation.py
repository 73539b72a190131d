"""A fleet on paper: what a night of drives takes on N GPUs, and what limits it.

    python tests/benchmarks/fleet_simulation.py --ledgers OUTPUT --api prefect_api.json --json FILE
    python tests/benchmarks/fleet_simulation.py --case goal --gpus 50 100 200 --plot FILE.png

A discrete-event simulation of the deployments as they are: drives wait for a slot, then each holds
a place in the CPU pool until it is finished. There it is probed, its groups of segments queue for
GPU machines that start cold, are interrupted and run again from their last committed chunk, then it
is aligned, and its tiles are fused in further places. Those are interrupted, too: the run begins
anew with the stage that it was at, and finds what its children do. Every flow run asks the Prefect
server, which is a queue of its own; every chunk asks the object store. Stage times of the case
`compact` are those of ledgers (`--ledgers`); the cases `paper` and `goal` are the released network
on GPUs, which nothing here has run: their figures are parameters, see `CASES`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import simpy

Process = Generator[Any, Any, Any]
Step = float | Callable[[], simpy.Event]
"""Of a run in the CPU pool: seconds of work, or what begins its children, once, and awaits them."""


@dataclass(frozen=True)
class Drive:
    """What one drive takes, seconds on one machine."""

    probe_s: float
    group_s: tuple[float, ...]  # inference of each group of segments
    align_s: float
    fuse_s: tuple[float, ...]  # each run of batches of tiles

    @property
    def gpu_s(self) -> float:
        """Inference in all."""
        return sum(self.group_s)


@dataclass(frozen=True)
class Fleet:
    """Machines, and what they do to a run."""

    gpus: int
    cpus: int  # places: each takes one run of the pool, at work or waiting
    drives_at_once: int = 10**9
    cold_start_s: float = 0.0  # from asking for a GPU machine until its worker asks for work
    idle_s: float = 60.0  # without work until it is given back
    start_s: float = 0.0  # of a flow run on a machine: process, imports, weights
    chunk_s: float = 1.0  # between commits of a GPU
    interruptions_per_hour: float = 0.0  # of one GPU machine, and of one place
    notice_s: float = 0.0  # between the warning and the end; 0: none comes
    detection_s: float = 0.0  # until a run whose machine is gone is started again


@dataclass(frozen=True)
class Services:
    """What flow runs ask of the Prefect server and of the object store."""

    create_s: float = 0.0  # seconds of one server for creating a run
    run_s: float = 0.0  # for the states, task and events of a run of infer-segments, fuse-tiles
    drive_s: float = 0.0  # the same of reconstruct-drive, with its eight tasks
    poll_s: float = 0.0  # for one poll of a worker
    poll_interval_s: float = 10.0  # PREFECT_WORKER_QUERY_SECONDS
    pollers: int = 0  # workers: one a machine in a process pool, one a pool in Kubernetes
    heartbeat_s: float = 0.0  # for one heartbeat of a run
    heartbeat_interval_s: float = 30.0
    servers: int = 1
    puts_per_gpu_s: float = 0.0  # requests of a GPU that infers
    puts_limit: float = math.inf  # of the store, per second


@dataclass
class Result:
    """What became of it; hours are machine-hours."""

    finished_h: float = 0.0  # from the beginning until the last drive
    gpu_billed_h: float = 0.0
    gpu_work_h: float = 0.0  # inference that counts
    gpu_lost_h: float = 0.0  # inference done twice because a machine was lost
    gpu_start_h: float = 0.0  # starting runs, waiting for the store
    cpu_billed_h: float = 0.0  # places held: work, starts, waiting parents, what was lost
    cpu_work_h: float = 0.0  # stages that count
    cpu_lost_h: float = 0.0  # stages done twice
    interruptions: int = 0  # of GPU machines
    cpu_interruptions: int = 0
    flow_runs: int = 0
    prefect_busy: float = 0.0  # share of the servers' time, of which polls and heartbeats:
    prefect_background: float = 0.0
    store_busy: float = 0.0  # requests in all, of those that the limit allows
    cpu_busy: float = 0.0  # share of the places that runs hold
    gpu_busy: float = 0.0  # work of what is billed
    worst_loss_s: float = 0.0

    @property
    def bottleneck(self) -> str:
        """What is busiest, of the whole time until the last drive; waiting parents are busy."""
        shares = {
            "GPUs": self.gpu_busy,
            "CPU pool": self.cpu_busy,
            "Prefect server": self.prefect_busy,
            "object store": self.store_busy,
        }
        return max(shares, key=lambda name: shares[name])


@dataclass
class Group:
    """A group of segments on its way through the GPU pool."""

    left_s: float
    done: simpy.Event
    waits: bool = field(default=False)


class Night:
    """One run of the simulation."""

    def __init__(
        self, drives: Sequence[Drive], fleet: Fleet, services: Services, seed: int
    ) -> None:
        self._drives, self._fleet, self._services = drives, fleet, services
        self._random = random.Random(seed)
        self._env = simpy.Environment()
        self._slots = simpy.Resource(self._env, fleet.drives_at_once)
        self._cpus = simpy.Resource(self._env, fleet.cpus)
        self._prefect = simpy.Resource(self._env, services.servers)
        self._queue = simpy.Store(self._env)
        self._nodes = self._active = 0
        self._prefect_s = 0.0
        self._result = Result()
        # Workers and runs ask all the time: what is left of a server serves the rest.
        polls = services.pollers * services.poll_s / services.poll_interval_s
        beats = (fleet.gpus + fleet.cpus) * services.heartbeat_s / services.heartbeat_interval_s
        self._background = (polls + beats) / services.servers
        if self._background >= 1:
            raise ValueError(
                f"polls of {services.pollers} workers and heartbeats of {fleet.gpus + fleet.cpus} "
                f"machines alone take {self._background:.0%} of {services.servers} Prefect servers"
            )
        parents = min(fleet.drives_at_once, len(drives)) + 1  # and the collection's run
        if fleet.cpus <= parents:
            raise ValueError(
                f"{parents} runs that wait for their children fill the {fleet.cpus} places of the "
                "CPU pool; tiles would never run"
            )

    def run(self) -> Result:
        """Simulate until the last drive is finished."""
        began = [self._env.process(self._drive(drive)) for drive in self._drives]
        collection = self._env.process(self._on_cpu([lambda: self._env.all_of(began)]))
        self._env.run(collection)
        finished, result = self._env.now, self._result
        self._env.run()  # machines that are idle are given back
        result.finished_h = finished / 3600
        places_h = result.finished_h * self._fleet.cpus
        result.cpu_busy = result.cpu_billed_h / places_h if finished else 0.0
        result.prefect_background = self._background
        served = self._prefect_s / (finished * self._services.servers) if finished else 0.0
        result.prefect_busy = served + self._background
        puts_s = self._services.puts_per_gpu_s * result.gpu_work_h / self._services.puts_limit
        result.store_busy = puts_s / result.finished_h if result.finished_h else 0.0
        result.gpu_busy = result.gpu_work_h / result.gpu_billed_h if result.gpu_billed_h else 0.0
        return result

    # ---- a drive

    def _drive(self, drive: Drive) -> Process:
        with self._slots.request() as slot:
            yield slot
            yield from self._ask_prefect(self._services.create_s)
            steps: list[Step] = [
                drive.probe_s,
                self._children(self._infer_groups(drive)),
                drive.align_s,
                self._children(self._fuse_tiles(drive)),
                self._children(self._ask_prefect(self._services.drive_s)),
            ]
            yield from self._on_cpu(steps)

    def _children(self, process: Process) -> Step:
        """Begin a process at the first call only: a parent that is run anew finds it under way."""
        return cache(lambda: self._env.process(process))

    def _infer_groups(self, drive: Drive) -> Process:
        groups = [Group(seconds, self._env.event()) for seconds in drive.group_s]
        for group in groups:
            yield from self._enqueue(group)
        yield self._env.all_of([group.done for group in groups])

    def _fuse_tiles(self, drive: Drive) -> Process:
        yield self._env.all_of([self._env.process(self._fuse(part)) for part in drive.fuse_s])

    def _fuse(self, seconds: float) -> Process:
        yield from self._ask_prefect(self._services.create_s + self._services.run_s)
        yield from self._on_cpu([seconds])

    def _on_cpu(self, steps: Sequence[Step]) -> Process:
        """Hold a place until all steps are done; if it is taken away, go on in another.

        There the run starts anew, with the step that it was at. The place that was lost is empty
        until its machine is replaced.
        """
        env, fleet, result = self._env, self._fleet, self._result
        left = list(steps)
        while left:
            with self._cpus.request() as place:
                yield place
                began, end = env.now, env.now + self._lifetime_s()
                gone = env.event() if math.isinf(end) else env.timeout(end - began)
                yield env.timeout(fleet.start_s) | gone
                while left and env.now < end:
                    yield from self._step(left, gone, end)
                if left:
                    noticed_s = 0.0 if fleet.notice_s else fleet.detection_s
                    yield env.timeout(max(fleet.cold_start_s, noticed_s))
                result.cpu_billed_h += (env.now - began) / 3600
            result.flow_runs += 1
            if left:
                result.cpu_interruptions += 1
                yield from self._ask_prefect(self._services.create_s)

    def _step(self, left: list[Step], gone: simpy.Event, end: float) -> Process:
        """Do the first of the steps that are left, unless the machine goes before it is done."""
        env, step, began = self._env, left[0], self._env.now
        yield (step() if callable(step) else env.timeout(step)) | gone
        is_done = env.now < end
        if is_done:
            left.pop(0)
        if callable(step):
            return
        if is_done:
            self._result.cpu_work_h += step / 3600
        else:
            self._result.cpu_lost_h += (env.now - began) / 3600

    def _lifetime_s(self) -> float:
        """How long a machine stays."""
        per_s = self._fleet.interruptions_per_hour / 3600
        return self._random.expovariate(per_s) if per_s else math.inf

    def _ask_prefect(self, seconds: float) -> Process:
        if not seconds:
            return
        with self._prefect.request() as server:
            yield server
            yield self._env.timeout(seconds / (1 - self._background))
        self._prefect_s += seconds

    # ---- GPU machines

    def _enqueue(self, group: Group) -> Process:
        yield from self._ask_prefect(self._services.create_s)
        self._queue.put(group)
        if self._nodes < self._fleet.gpus and self._nodes - self._active < len(self._queue.items):
            self._nodes += 1
            self._env.process(self._machine())

    def _machine(self) -> Process:
        """A GPU machine from the request for it until it is given back or taken away."""
        env, fleet = self._env, self._fleet
        began = env.now
        end = env.now + self._lifetime_s()
        yield env.timeout(min(fleet.cold_start_s, end - env.now))
        is_taken = env.now >= end
        while not is_taken:
            asked = self._queue.get()
            idle_until = min(fleet.idle_s, end - env.now)
            yield asked | env.timeout(idle_until)
            if not asked.triggered:
                asked.cancel()
                is_taken = env.now >= end
                break
            is_taken = yield from self._infer(asked.value, end)
        self._nodes -= 1
        if is_taken:
            self._result.interruptions += 1
            if self._queue.items and self._nodes < fleet.gpus:
                self._nodes += 1
                env.process(self._machine())
        self._result.gpu_billed_h += (env.now - began) / 3600

    def _infer(self, group: Group, end: float) -> Process:
        """Run a group until it is done or the machine is taken away; whether it was."""
        env, fleet, services = self._env, self._fleet, self._services
        self._active += 1
        asked = env.now
        yield from self._ask_prefect(services.run_s)
        pick_up = self._random.uniform(0, services.poll_interval_s) if services.poll_s else 0.0
        start = fleet.start_s + pick_up
        load = self._active * services.puts_per_gpu_s / services.puts_limit
        stretch = max(1.0, load)  # the store makes everybody wait
        work_from = env.now + start
        done_at = work_from + group.left_s * stretch
        if done_at <= end:
            yield env.timeout(done_at - env.now)
            self._result.gpu_work_h += group.left_s / 3600
            self._result.gpu_start_h += (env.now - asked - group.left_s) / 3600
            self._finish(group)
            return False
        yield env.timeout(max(0.0, end - env.now))
        self._active -= 1
        worked_s, notice_s = (end - work_from) / stretch, fleet.notice_s / stretch
        self._take_away(group, worked_s - notice_s, worked_s, asked)
        return True

    def _take_away(self, group: Group, warned_s: float, worked_s: float, asked: float) -> None:
        """Keep what is committed; the rest goes back into the queue when its loss is noticed."""
        fleet, result = self._fleet, self._result
        chunks = max(0.0, warned_s) / fleet.chunk_s
        kept = (math.ceil(chunks) if fleet.notice_s else math.floor(chunks)) * fleet.chunk_s
        kept = min(kept, group.left_s, max(0.0, worked_s))
        lost = 0.0 if fleet.notice_s else max(0.0, worked_s) - kept
        group.left_s -= kept
        result.gpu_work_h += kept / 3600
        result.gpu_lost_h += lost / 3600
        result.worst_loss_s = max(result.worst_loss_s, lost)
        result.gpu_start_h += (self._env.now - asked - kept - lost) / 3600
        result.flow_runs += 1
        self._env.process(self._again(group))

    def _again(self, group: Group) -> Process:
        yield self._env.timeout(0 if self._fleet.notice_s else self._fleet.detection_s)
        yield from self._enqueue(group)

    def _finish(self, group: Group) -> None:
        self._active -= 1
        self._result.flow_runs += 1
        group.done.succeed()


def simulate(
    drives: Sequence[Drive], fleet: Fleet, services: Services | None = None, seed: int = 0
) -> Result:
    """What becomes of `drives` on `fleet`.

    Raises:
        ValueError: the Prefect servers are busy with polls and heartbeats alone, or the CPU pool
            is full of runs that wait.
    """
    return Night(drives, fleet, services or Services(), seed).run()


# ---- what is simulated


@dataclass(frozen=True)
class Case:
    """A network on a kind of machine; seconds are of one machine and one frame."""

    about: str
    device_kind: str  # as in the price table
    infer_s: float  # of a frame inferred
    segment_frames: int
    probe_s: float  # of a frame of the recording, as the other stages
    align_s: float
    fuse_s: float
    start_s: float  # of a flow run: process, imports, weights
    chunk_s: float  # between commits of a GPU: frames of a chunk times lanes, over the rate
    chunk_frames: int = 32
    segments_per_run: int = 128  # as the defaults of InferConfig have it for segments of 100 frames
    objects_per_chunk: float = 10.7  # counted in a store: shards and commit
    objects_per_segment: float = 14.0  # counted: metadata of its arrays, and its claim
    frames_per_s: float = 10.0  # of the recording
    fuse_run_s: float = 600.0  # what one run of fuse-tiles gets

    @property
    def overlap(self) -> float:
        """Frames inferred for one of the recording: a quarter of a segment overlaps."""
        return self.segment_frames / (self.segment_frames - max(self.segment_frames // 4, 1))

    @property
    def puts_per_s(self) -> float:
        """Objects that a GPU writes per second, and renewals of the claims of its segments."""
        chunks = self.objects_per_chunk / self.chunk_frames
        segments = self.objects_per_segment / self.segment_frames
        of_an_hour = 3600 * self.frames_per_s * self.overlap / self.segment_frames
        claims = min(self.segments_per_run, SEGMENTS_PER_TASK, of_an_hour)
        return (chunks + segments) / self.infer_s + claims / CLAIM_RENEWAL_S

    def drive(self, hours: float) -> Drive:
        """A drive of so many hours."""
        frames = hours * 3600 * self.frames_per_s
        inferred = frames * self.overlap
        groups = math.ceil(inferred / self.segment_frames / self.segments_per_run)
        fuse_s = frames * self.fuse_s
        parts = max(1, round(fuse_s / self.fuse_run_s))
        return Drive(
            frames * self.probe_s,
            (inferred * self.infer_s / groups,) * groups,
            frames * self.align_s,
            (fuse_s / parts,) * parts,
        )


CLAIM_RENEWAL_S = 15.0  # storage.claims.RENEW_S: each segment in work has a claim
SEGMENTS_PER_TASK = 128  # InferConfig.segments_per_task: so many are claimed at once
# Other stages of the released network, at 512x288: decoding 1280x720 takes 7 ms (docs/performance),
# fusion 0.33 s a frame on two cores at voxels of 10 cm (measured once, loaded machine); every tenth
# frame is fused here (`frame_step`). Alignment is an assumption. None has run on a GPU machine.
RELEASED = {"segment_frames": 100, "probe_s": 0.007, "align_s": 0.005, "fuse_s": 0.033}
CASES = {
    "paper": Case(
        "released network at the paper's 20 frames/s, one lane; not measured here",
        "NVIDIA A10G",
        infer_s=1 / 20,
        start_s=30.0,
        chunk_s=32 / 20,
        **RELEASED,
    ),
    "goal": Case(
        "released network at our goal of 300 frames/s in 64 lanes on an H200; not measured",
        "NVIDIA H200",
        infer_s=1 / 300,
        start_s=30.0,
        chunk_s=64 * 32 / 300,
        **RELEASED,
    ),
}
CASES["tuned"] = replace(
    CASES["goal"],
    about="as goal, a whole drive of an hour to a run and a segment to a chunk",
    segments_per_run=512,
    chunk_frames=100,
    chunk_s=64 * 100 / 300,
)


def compact_case(output: str) -> Case:
    """The bundled network on one core: processor seconds in the ledgers of drives under `output`.

    Raises:
        ValueError: there is no reconstruction.
    """
    from prediction import observation

    from storage.reconstruction import ReconstructionStore
    from tasks.ledger import LEDGER
    from tasks.rates import Workload, fit_rates
    from tasks.summary import list_stores

    found = [ReconstructionStore.open(url).read_commit(LEDGER) for url in list_stores(output)]
    rates = fit_rates([observation(ledger, "cpu") for ledger in found if ledger])
    segment, frames = 8, 36_000.0
    inferred = frames * segment / 6
    work = Workload(frames, inferred, frames * 1280 * 720 / 1e6, inferred / segment)
    took = rates.predict(work)
    infer_s = took["infer"] / inferred
    return Case(
        f"compact network on {rates.device_kind}, by {len(rates.sources)} ledgers",
        rates.device_kind,
        infer_s=infer_s,
        segment_frames=segment,
        probe_s=took["probe"] / frames,
        align_s=(took["align"] + took["plan"] + took["report"]) / frames,
        fuse_s=took["fuse"] / frames,
        start_s=15.0,
        chunk_s=16 * segment * infer_s,
        chunk_frames=segment,
        segments_per_run=1280,
    )


def prefect_figures(file: Path | None, database: str = "postgresql") -> dict[str, float]:
    """Seconds of a server's core for each kind of operation, by the JSON of `prefect_api.py`."""
    if file is None:
        return MEASURED_API
    rows = json.loads(file.read_text())["results"]
    cost = {r["operation"]: r["server_cpu_ms"] / 1000 for r in rows if r["database"] == database}
    return {
        "create_s": cost["create a flow run"],
        "run_s": cost["flow of 1 tasks"],
        "drive_s": cost["flow of 8 tasks"],
        "poll_s": cost["poll a work pool"],
        "heartbeat_s": cost["receive and store an event"],
    }


@dataclass(frozen=True)
class Setting:
    """One night: a case, and what is varied."""

    gpus: int
    drive_hours: float = 10_000.0
    hours_a_drive: float = 1.0
    tile_places_per_gpu: float = 0.0  # 0: as many as keep up; parents have places of their own
    interruptions_per_hour: float = 0.05
    notice_s: float = 120.0
    cold_start_s: float = 240.0  # assumed: node, image, worker
    idle_s: float = 300.0  # consolidateAfter in deploy/kubernetes/karpenter.yaml
    # 100 s until the automation marks the run, 90 s until another machine takes its claims over.
    detection_s: float = 190.0
    drives_at_once: int = 0  # 0: `DRIVES_A_GPU` for each, as deploy/prefect.yaml has it
    servers: int = 1
    prefixes: int = 1


def night(case: Case, setting: Setting, api: dict[str, float]) -> dict[str, Any]:
    """Simulate one night; figures for a row of a table."""
    count = round(setting.drive_hours / setting.hours_a_drive)
    drive = case.drive(setting.hours_a_drive)
    at_once = min(setting.drives_at_once or DRIVES_A_GPU * setting.gpus, count)
    starts = case.start_s * len(drive.group_s)
    tiles_s = sum(drive.fuse_s) + case.start_s * len(drive.fuse_s)
    keeping_up = 1.2 * tiles_s / (drive.gpu_s + starts)
    tile_places = math.ceil(setting.gpus * (setting.tile_places_per_gpu or keeping_up))
    cpus = tile_places + at_once + 1
    fleet = Fleet(
        setting.gpus,
        cpus,
        at_once,
        cold_start_s=setting.cold_start_s,
        idle_s=setting.idle_s,
        start_s=case.start_s,
        chunk_s=case.chunk_s,
        interruptions_per_hour=setting.interruptions_per_hour,
        notice_s=setting.notice_s,
        detection_s=setting.detection_s,
    )
    services = Services(
        **api,
        pollers=2,
        servers=setting.servers,
        puts_per_gpu_s=case.puts_per_s,
        puts_limit=S3_PUTS_PER_S * setting.prefixes,
    )
    try:
        result = simulate([drive] * count, fleet, services)
    except ValueError as error:
        return {**asdict(setting), "problem": str(error)}
    return {
        **asdict(setting),
        "drives_at_once": at_once,
        "cpus": cpus,
        "segments_per_run": case.segments_per_run,
        **asdict(result),
        "bottleneck": result.bottleneck,
        "runs_per_s": result.flow_runs / result.finished_h / 3600,
        "puts_per_gpu_s": case.puts_per_s,
    }


def cost_per_video_hour(
    row: dict[str, Any], case: Case, prices: Any, of: Literal["billed", "work"] = "billed"
) -> float:
    """Money for an hour of video: of the hours billed, or of work alone, which budgets go by."""
    gpu = row[f"gpu_{of}_h"] * prices.per_gpu_hour[case.device_kind]
    return float((gpu + row[f"cpu_{of}_h"] * prices.per_cpu_hour) / row["drive_hours"])


DRIVES_A_GPU = 3  # docs/fleet.md
S3_PUTS_PER_S = 3500.0  # documented, of a partitioned prefix, and 5,500 GET
# docs/scale.md: seconds of one core of the Prefect server, on PostgreSQL.
MEASURED_API = {
    "create_s": 0.028,
    "run_s": 0.25,
    "drive_s": 0.56,
    "poll_s": 0.017,
    "heartbeat_s": 0.0011,
}
DATABASE_BYTES_A_RUN = 100_000  # of a run of one task, on PostgreSQL


def steady(name: str, case: Case, gpus: int, api: dict[str, float]) -> dict[str, Any]:
    """What so many GPUs ask for as long as all of them work: rates, worked out, not simulated."""
    drive = case.drive(1.0)
    run_s = drive.group_s[0] + case.start_s
    runs = gpus / run_s
    drives = runs / len(drive.group_s)
    fusions = drives * len(drive.fuse_s)
    of_prefect = (runs + fusions) * (api["create_s"] + api["run_s"])
    of_prefect += drives * (api["create_s"] + api["drive_s"])
    tiles_s = sum(drive.fuse_s) + case.start_s * len(drive.fuse_s)
    slowest = max(drive.fuse_s) + case.start_s
    parent_s = case.start_s + drive.probe_s + run_s + drive.align_s + slowest
    parents = drives * parent_s
    cpus = parents + drives * tiles_s
    beats = (gpus + cpus) / 30
    working = drive.group_s[0] / run_s
    return {
        "case": name,
        "gpus": gpus,
        "segments_per_run": case.segments_per_run,
        "video_hours_per_hour": drives * 3600,
        "runs_per_s": runs + fusions + drives,
        "heartbeats_per_s": beats,
        "prefect_cores": of_prefect + beats * api["heartbeat_s"],
        "prefect_cores_if_each_machine_polls": (gpus + cpus) / 10 * api["poll_s"],
        "database_gb_per_day": (runs + fusions + 3 * drives) * DATABASE_BYTES_A_RUN * 86400 / 1e9,
        "puts_per_s": gpus * working * case.puts_per_s,
        "store_partitions": gpus * working * case.puts_per_s / S3_PUTS_PER_S,
        "cpu_machines": cpus,
        "drives_at_once": parents,
    }


def sweep(name: str, case: Case, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """All nights of one case: each thing varied alone."""
    from tasks.prices import read_prices

    prices, api = read_prices(str(settings.prices)), prefect_figures(settings.api)
    base = Setting(settings.gpus[len(settings.gpus) // 2], drive_hours=settings.drive_hours)
    base = replace(base, prefixes=settings.prefixes, servers=settings.servers)
    nights = [("GPUs", case, replace(base, gpus=n)) for n in settings.gpus]
    for size in settings.segments_per_run:
        nights.append(("segments a run", replace(case, segments_per_run=size), base))
    for prefixes in settings.partitions:
        nights.append(("partitions", case, replace(base, prefixes=prefixes)))
    for many in settings.drives_at_once:
        nights.append(("drives at once", case, replace(base, drives_at_once=many)))
    for rate in settings.interruptions:
        for notice in (0.0, 120.0):
            varied = replace(base, interruptions_per_hour=rate, notice_s=notice)
            nights.append(("interruptions", case, varied))
    rows = []
    for varied_name, this, setting in nights:
        row = {"case": name, "varied": varied_name, **night(this, setting, api)}
        if "problem" not in row:
            row["cost_per_video_hour"] = cost_per_video_hour(row, this, prices)
            row["cost_of_work"] = cost_per_video_hour(row, this, prices, of="work")
            row["currency"] = prices.currency
        rows.append(row)
        show(row)
    return rows


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show(row: dict[str, Any]) -> None:
    """One night, for people."""
    head = f"{row['case']:8s} {row['varied']:15s} {row['gpus']:6d} GPUs"
    if "problem" in row:
        print(f"{head}  {row['problem']}", flush=True)
        return
    warned = "warned" if row["notice_s"] else "not warned"
    print(
        f"{head} {row['cpus']:6d} CPUs {row['segments_per_run']:5d} segments a run, "
        f"{row['interruptions_per_hour']:g}/h {warned}: {row['finished_h']:7.2f} h, GPU work "
        f"{row['gpu_work_h']:8.1f} lost {row['gpu_lost_h']:6.2f} starts {row['gpu_start_h']:7.1f} "
        f"of {row['gpu_billed_h']:8.1f} h billed, CPU work {row['cpu_work_h']:8.1f} lost "
        f"{row['cpu_lost_h']:6.2f} of {row['cpu_billed_h']:8.1f} h; busy: GPU "
        f"{row['gpu_busy']:4.0%} CPU {row['cpu_busy']:4.0%} Prefect {row['prefect_busy']:4.0%} "
        f"store {row['store_busy']:4.0%}; {row['runs_per_s']:.2f} runs/s; "
        f"{row['prefixes']} partitions, {row['drives_at_once']} drives at once; "
        f"{row['cost_per_video_hour']:.3f} {row['currency']} a video-hour, work alone "
        f"{row['cost_of_work']:.3f}; {row['bottleneck']}",
        flush=True,
    )


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Hours and shares against GPUs, and cost against segments a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (hours, busy, cost) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for name in dict.fromkeys(row["case"] for row in rows):
        mine = [r for r in rows if r["case"] == name and "problem" not in r]
        by_gpus = [r for r in mine if r["varied"] == "GPUs"]
        sizes = [r for r in mine if r["varied"] == "segments a run"]
        x = [r["gpus"] for r in by_gpus]
        hours.loglog(x, [r["finished_h"] for r in by_gpus], "o-", label=name)
        busy.semilogx(x, [100 * r["prefect_busy"] for r in by_gpus], "o-", label=f"{name}: Prefect")
        busy.semilogx(x, [100 * r["store_busy"] for r in by_gpus], "x--", label=f"{name}: store")
        sizes_x = [r["segments_per_run"] for r in sizes]
        cost.loglog(sizes_x, [r["cost_per_video_hour"] for r in sizes], "o-", label=name)
    hours.set(xlabel="GPU machines", ylabel="hours until the last drive")
    busy.set(xlabel="GPU machines", ylabel="busy, %")
    cost.set(xlabel="segments a run", ylabel="cost of a video-hour, example prices")
    for axes in (hours, busy, cost):
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=80)


def main() -> None:
    """Run the sweeps and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=["compact", *CASES])
    parser.add_argument("--ledgers", help="output of `ttt3r reconstruct`, for the case compact")
    parser.add_argument("--api", type=Path, help="JSON of prefect_api.py")
    parser.add_argument("--prices", type=Path, default=Path("deploy/prices.toml"))
    parser.add_argument("--drive-hours", type=float, default=10_000)
    parser.add_argument("--gpus", type=int, nargs="+", default=[25, 50, 100, 200, 400])
    parser.add_argument("--segments-per-run", type=int, nargs="*", default=[64, 128, 256, 1024])
    parser.add_argument("--partitions", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--drives-at-once", type=int, nargs="*", default=[16, 256, 10_000])
    parser.add_argument("--interruptions", type=float, nargs="*", default=[0.05, 0.2, 1.0])
    parser.add_argument("--prefixes", type=int, default=1, help="partitions of the object store")
    parser.add_argument("--servers", type=int, default=1, help="Prefect servers on one database")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    settings = parser.parse_args()
    names = settings.case or ["compact", *CASES] if settings.ledgers else settings.case or [*CASES]
    if "compact" in names and not settings.ledgers:
        parser.error("the case compact needs --ledgers")
    rows: list[dict[str, Any]] = []
    steadily: list[dict[str, Any]] = []
    for name in names:
        case = CASES[name] if name in CASES else compact_case(settings.ledgers)
        print(f"{name}: {case.about}", flush=True)
        for gpus, size in ((100, 128), (100, 512), (10_000, 128), (10_000, 512)):
            sized, api = replace(case, segments_per_run=size), prefect_figures(settings.api)
            steadily.append(steady(name, sized, gpus, api))
            print("  ".join(f"{k} {_short(v)}" for k, v in steadily[-1].items()), flush=True)
        rows += sweep(name, case, settings)
    if settings.json:
        settings.json.write_text(json.dumps({"results": rows, "steady": steadily}, indent=2))
    if settings.plot:
        plot(rows, settings.plot)


if __name__ == "__main__":
    main()
