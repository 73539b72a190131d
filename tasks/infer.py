"""Infer: stream groups of segments through the network, chunk by chunk, into the store."""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from prefect import task
from torch import Tensor

from storage.errors import ChunkMissing
from storage.layout import GATE_QUANTILES, MOTION_COSTS, chunk_commit, segment_claim
from storage.objects import in_parallel
from storage.reconstruction import EncodedChunk, ReconstructionStore
from storage.records import Chunk, Plan, Segment
from storage.wording import redacted
from tasks import metrics
from tasks.attempts import attempt_id, counted, note
from tasks.config import AnotherConfiguration, InferConfig, UnfitMachine
from tasks.frames import DriveInput, Lanes, Round, read_rounds
from tasks.helpers import Take, share
from tasks.interruption import run_until_stopped
from tasks.keys import drop_later, find_key, require_key, stage_key
from tasks.lanes import is_out_of_memory, lane_bytes, settle_for_fewer, settled_lanes
from tasks.pipelining import BackgroundWriter, Clock, prefetch
from tasks.plan import require_network
from tasks.planned import read_plan
from tasks.retries import DRIVE_ERRORS, STAGE_OPTIONS
from tasks.transfer import Download, mark, to_device
from ttt3r.geometry import camera_pose_to_matrix, estimate_focal, intrinsics_from_focal
from ttt3r.model import Model, Predictions
from ttt3r.motion_scale import motion_costs
from ttt3r.state import State
from ttt3r.stream import Stream
from ttt3r.weights import WeightsInfo, load_model, weights_info

VERSION = 4
READ_AHEAD_ROUNDS = 2  # decoded chunks of all lanes that wait for the network, per task
WORTH_GROUPS = 4  # to infer together: the start of a helper takes as long as one or two
PROCESS_BYTES = 800_000_000  # of one that infers on a CPU, without lanes and weights
MOST_DEATHS = 5  # of the process, one after the other and without a chunk finished

log = logging.getLogger(__name__)


class DeadlySegment(ValueError):
    """The process that computes a segment dies again and again at the same chunk."""


def segment_keys(
    store: ReconstructionStore,
    plan: Plan,
    segments: Sequence[Segment],
    config: InferConfig,
    info: WeightsInfo,
) -> dict[int, str]:
    """Keys of inference by segment: its frames, the weights' hash, the rule, the precision.

    As set, not as resolved: a drive inferred on a GPU is not inferred anew on a laptop.
    """
    frames = require_key(store, "probe")
    what = [config.rule, config.precision, info.sha256, plan.chunk_frames]
    return {s.index: stage_key("infer", VERSION, frames, s, what) for s in segments}


def resolve_device(config: InferConfig) -> str:
    """The device that `auto` means here.

    Raises:
        UnfitMachine: a GPU is asked for that torch does not see.
    """
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise UnfitMachine(
            f"device is {config.device!r} and torch sees no GPU; use --device cpu, or install "
            "torch for CUDA (README, 'On a GPU')"
        )
    number = int(config.device.partition(":")[2] or 0)
    if config.device.startswith("cuda") and number >= torch.cuda.device_count():
        raise UnfitMachine(
            f"device is {config.device!r} and torch sees {torch.cuda.device_count()} GPUs, the "
            "first is cuda:0"
        )
    return config.device


def device_kind(device: str) -> str:
    """What rates are known by: the model of the GPU, or cpu."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def resolve_precision(config: InferConfig) -> str:
    """float32 or bfloat16."""
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if resolve_device(config).startswith("cuda") else "float32"


@lru_cache(maxsize=1)
def _cached_model(
    weights: str, sha256: str, device: str, precision: str
) -> tuple[Model, WeightsInfo]:
    """The network; `sha256` only tells weights apart that have replaced others of their name."""
    began = time.perf_counter()
    try:
        model, info = load_model(weights, device=device, dtype=getattr(torch, precision))
    except (ValueError, RuntimeError) as error:  # the same for every segment
        if isinstance(error, DRIVE_ERRORS):
            raise
        raise UnfitMachine(f"the weights {weights!r} cannot be loaded: {error}") from error
    note(load_seconds=time.perf_counter() - began)
    if info.sha256 != sha256:
        raise ValueError(f"the weights {weights!r} changed while they were loaded; run again")
    return model, info


@task(name="infer", task_run_name="infer {indices} {url}", **STAGE_OPTIONS)
@counted("infer")
def infer_stage(url: str, indices: Sequence[int], config: InferConfig) -> int:
    """Infer the segments `indices` of the drive at `url`; return the frames computed.

    Finished chunks are skipped: a retry goes on after the last one, from the state stored
    with it. Only unfinished work loads the weights.

    Raises:
        AnotherConfiguration: the drive is planned for another network, or without such segments.
        UnfitMachine: there is no such device here, or the weights cannot be loaded.
    """
    store = ReconstructionStore.open(url)
    plan, info = read_plan(store), weights_info(config.weights)
    require_network(store, config, info)
    if max(indices, default=0) >= len(plan.segments):
        raise AnotherConfiguration(
            f"there is no segment {max(indices)} in {redacted(url)}, which is planned with "
            f"{len(plan.segments)}; a run of an earlier plan is of no use any more"
        )
    segments = [plan.segments[i] for i in indices]
    keys = segment_keys(store, plan, segments, config, info)
    if all(is_segment_done(store, plan, s, keys[s.index]) for s in segments):
        return 0
    note(device_kind=device_kind(resolve_device(config)), weights_sha256=info.sha256)
    work = Work.begin(store, segments, config, info)
    return run_until_stopped(lambda stop: _infer_in_lanes(work, segments, stop))


@dataclass(frozen=True)
class Work:
    """What all segments of a task share."""

    store: ReconstructionStore
    drive: DriveInput
    plan_key: str
    keys: dict[int, str]  # by segment
    model: Model
    config: InferConfig
    info: WeightsInfo

    @classmethod
    def begin(
        cls,
        store: ReconstructionStore,
        segments: Sequence[Segment],
        config: InferConfig,
        info: WeightsInfo,
    ) -> Work:
        """Load the weights and what the store knows of the drive.

        Raises:
            AnotherConfiguration: the drive is planned anew since `segments` were read.
        """
        model, info = _cached_model(
            config.weights, info.sha256, resolve_device(config), resolve_precision(config)
        )
        resizer = model.device if model.device.type == "cuda" else None
        plan_key = find_key(store, "plan")  # read first: what is planned meanwhile is another
        drive = DriveInput.from_store(store, info.config, resizer)
        if plan_key is None or not set(segments) <= set(drive.plan.segments):
            raise planned_anew(store)
        keys = segment_keys(store, drive.plan, segments, config, info)
        return cls(store, drive, plan_key, keys, model, config, info)

    def is_done(self, segment: Segment) -> bool:
        """Whether every chunk of the segment is committed under its key."""
        return is_segment_done(self.store, self.drive.plan, segment, self.keys[segment.index])


def planned_anew(store: ReconstructionStore) -> AnotherConfiguration:
    """What ends a run of segments that are none of the drive's any more."""
    return AnotherConfiguration(
        f"{redacted(store.url)} has been planned anew, for another recording or other segments: a "
        "run of those before is of no use any more"
    )


def unfinished_segments(url: str, indices: Sequence[int], config: InferConfig) -> list[int]:
    """Those of the segments `indices` of the drive at `url` that are not inferred."""
    store, info = ReconstructionStore.open(url), weights_info(config.weights)
    is_chunk_done = _look_at_chunks(store, indices, config, info)
    unfinished = {segment for (segment, _), is_done in is_chunk_done.items() if not is_done}
    return [index for index in indices if index in unfinished]


def share_left(store: ReconstructionStore, config: InferConfig) -> float:
    """Share of the chunks of a planned drive that are not inferred by this network, 0 to 1."""
    indices = [segment.index for segment in read_plan(store).segments]
    is_chunk_done = _look_at_chunks(store, indices, config, weights_info(config.weights))
    return 1 - sum(is_chunk_done.values()) / len(is_chunk_done)


def require_inferred(
    store: ReconstructionStore, indices: Sequence[int], config: InferConfig, info: WeightsInfo
) -> None:
    """Make sure that all of the segments is inferred, and by this network.

    Raises:
        ChunkMissing: some is not.
    """
    is_chunk_done = _look_at_chunks(store, indices, config, info)
    left = [at for at, is_done in is_chunk_done.items() if not is_done]
    if left:
        segment, chunk = left[0]
        raise ChunkMissing(
            f"{len(left)} of {len(is_chunk_done)} chunks of {redacted(store.url)} are not there or "
            "not inferred as the drive is configured, the first is chunk "
            f"{chunk} of segment {segment}; cancel runs of earlier configurations, then run "
            "`ttt3r reconstruct` again"
        )


def _look_at_chunks(
    store: ReconstructionStore, indices: Sequence[int], config: InferConfig, info: WeightsInfo
) -> dict[tuple[int, int], bool]:
    """Whether chunks are finished under their segment's key, by numbers of segment and chunk."""
    plan = read_plan(store)
    segments = [plan.segments[i] for i in indices]
    keys = segment_keys(store, plan, segments, config, info)
    finished = store.finished_chunks(segments, plan.chunk_frames)
    return {
        (s.index, c.index): finished.get((s.index, c.index)) == keys[s.index]
        for s in segments
        for c in s.chunks(plan.chunk_frames)
    }


def _infer_in_lanes(work: Work, segments: Sequence[Segment], stop: threading.Event) -> int:
    """Infer what is not finished, in fewer lanes where memory does not suffice."""
    store, config, info = work.store, work.config, work.info
    lanes = settled_lanes(store, work.drive, config, info, work.model.device)
    while True:
        # Always the same lanes together, so that an interrupted run repeats the same batches.
        groups = [segments[i : i + lanes] for i in range(0, len(segments), lanes)]
        try:
            return _infer_together(work, groups, stop)
        except (RuntimeError, MemoryError) as error:
            if lanes == 1 or not is_out_of_memory(error):
                raise
            lanes = settle_for_fewer(store, config, info, lanes)


def _infer_together(work: Work, groups: Sequence[Sequence[Segment]], stop: threading.Event) -> int:
    """Infer what is not finished of groups, on a CPU in several processes; the frames computed."""
    todo = [group for group in groups if not all(map(work.is_done, group))]
    if not todo:
        return 0
    here = partial(infer_groups, work, todo, stop=stop)
    if work.model.device.type != "cpu":  # one process keeps a GPU busy
        return here(partial(next, iter(range(len(todo))), None))
    numbers = [[segment.index for segment in group] for group in todo]
    there = partial(infer_there, work.store.url, numbers, work.config)
    needed = max(map(len, todo)) * lane_bytes(work.drive, work.model.device) + PROCESS_BYTES
    needed += sum(tensor.nbytes for tensor in work.model.state_dict().values())
    return sum(share(len(todo), here, there, stop, WORTH_GROUPS, needed))


def infer_there(
    url: str,
    groups: Sequence[Sequence[int]],
    config: InferConfig,
    take: Take,
    stop: threading.Event,
) -> int:
    """Infer those of the groups, given by their segments, that are taken; in a helper."""
    store, info = ReconstructionStore.open(url), weights_info(config.weights)
    plan = read_plan(store)
    segments = [[plan.segments[i] for i in group] for group in groups]
    work = Work.begin(store, [s for group in segments for s in group], config, info)
    return infer_groups(work, segments, take, stop)


def is_segment_done(store: ReconstructionStore, plan: Plan, segment: Segment, key: str) -> bool:
    """Whether every chunk of the segment is committed under `key`."""
    return all(store.is_chunk_done(segment, c, key) for c in segment.chunks(plan.chunk_frames))


def infer_groups(
    work: Work, groups: Sequence[Sequence[Segment]], take: Take, stop: threading.Event
) -> int:
    """Run those groups of segments that are taken, each in lock step, one a lane, until `stop`.

    Returns the frames computed.

    Claiming and reading, the network, and compressing and writing run beside each other, across
    groups: the network waits for neither as long as they keep up.
    """
    runs = [LaneRun(work, group, stop) for group in groups]
    order = iter(take, None)
    rounds = read_rounds(work.drive, groups, order, lambda position: runs[position].open(), stop)
    with (
        ExitStack() as claims,
        closing(prefetch(rounds, READ_AHEAD_ROUNDS, stop)) as reader,
        BackgroundWriter() as writer,
    ):
        for run in runs:
            claims.callback(run.close)
        clock = Clock()
        while not stop.is_set():
            with clock.measure("wait"):
                now = next(reader, None)
            if now is None:
                break
            run = runs[now.group]
            result = run.step(now, clock)
            is_last = now.number == run.lanes.rounds.stop - 1
            with clock.measure("stall"):
                writer.submit(partial(_write, work, result, run.close if is_last else None))
            clock = Clock()
    return sum(run.computed for run in runs)


class LaneRun:
    """Segments that run in lock step, one a lane.

    All lanes resume at the first chunk that any of them lacks, so that batches have the shapes
    of an uninterrupted run and its bytes come out again.
    """

    def __init__(self, work: Work, segments: Sequence[Segment], stop: threading.Event) -> None:
        self._work, self._segments, self._stop = work, tuple(segments), stop
        self._claims = ExitStack()
        self._done: dict[tuple[int, int], bool] = {}
        self._stream: Stream | None = None
        self.lanes = Lanes(self._segments, range(0))
        self.computed = 0

    def open(self) -> Lanes:
        """Become the only worker at what is not done, and make room for it in the store."""
        work, plan = self._work, self._work.drive.plan
        network, (height, width) = work.drive.config, work.drive.size
        wanted = [segment for segment in self._segments if not work.is_done(segment)]
        self._claim(wanted)
        if wanted:  # else another worker has finished them since they were looked at
            require_network(work.store, work.config, work.info)
            if find_key(work.store, "plan") != work.plan_key:
                raise planned_anew(work.store)
            # What was made without segments that were set aside stays while these are tried again.
            left_out = (work.store.read_commit("align") or {}).get("missing", ())
            if any(segment.index not in left_out for segment in wanted):
                drop_later(work.store, "infer")
            in_parallel(self._drop_stale, wanted)
        work.store.create_segments(
            self._segments,
            plan.chunk_frames,
            height,
            width,
            network.enc_embed_dim,
            (network.state_size, network.dec_embed_dim),
            (network.local_mem_size, 2 * network.dec_embed_dim),
        )
        self._done = {
            (s.index, c.index): work.store.is_chunk_done(s, c, work.keys[s.index])
            for s in self._segments
            for c in s.chunks(plan.chunk_frames)
        }
        missing = [number for (_, number), done in self._done.items() if not done]
        rounds = max(len(s.chunks(plan.chunk_frames)) for s in self._segments)
        self.lanes = Lanes(self._segments, range(min(missing, default=rounds), rounds))
        return self.lanes

    def _claim(self, segments: Sequence[Segment]) -> None:
        """Claim segments, unless one kills whoever does."""
        store, done = self._work.store, {segment_claim(s.index): 0 for s in segments}

        def count(claim: str) -> None:
            done[claim] = len(store.commit_names(claim))

        in_parallel(count, done)
        claims = self._claims.enter_context(store.claims(done, self._stop))
        for segment in segments:
            claim = claims[segment_claim(segment.index)]
            if claim.deaths >= MOST_DEATHS:
                raise DeadlySegment(
                    f"the process that computed segment {segment.index} (frames {segment.start}.."
                    f"{segment.stop}) died {claim.deaths} times in a row at chunk "
                    f"{done[claim.name]}"
                )

    def _drop_stale(self, segment: Segment) -> None:
        """Take back chunks of other weights, rule, frames or plan: they are not progress."""
        store, key = self._work.store, self._work.keys[segment.index]
        chunks = segment.chunks(self._work.drive.plan.chunk_frames)
        current = {chunk_commit(segment.index, chunk.index) for chunk in chunks}
        records = store.commits(segment_claim(segment.index))
        for name in store.commit_names(segment_claim(segment.index)):
            # A listing may be older than the one before: what only one has is asked for by name.
            record = records.get(name) or store.read_commit(name) or {}
            if name not in current or record.get("key") != key:
                store.drop_commits(name)

    def close(self) -> None:
        """Give the claims up."""
        self._claims.close()

    def step(self, now: Round, clock: Clock) -> RoundResult:
        """Let all lanes see their next chunk; the result is on its way to the host."""
        model = self._work.model
        if self._stream is None:
            self._stream = self._start()
        began = mark(model.device)
        with clock.measure("infer"):
            images = to_device(now.images, model.device)
            predictions = self._stream.feed(images, update=torch.from_numpy(now.present))
            tensors = chunk_tensors(
                predictions, self._stream.state, self._work.info.principal_offset
            )
            assert predictions.pointmap_cam is not None
            costs = _motion_costs(images, tensors, predictions.pointmap_cam, now.present)
            tensors[MOTION_COSTS] = costs
        chunks = self._unfinished(now.number)
        self.computed += sum(chunk.stop - chunk.start for _, _, chunk in chunks)
        download = Download(tensors, began)
        return RoundResult(len(self._segments), chunks, download, now.seconds, clock)

    def _start(self) -> Stream:
        """Begin, or go on from the state that is stored with the last finished chunk."""
        work, first = self._work, self.lanes.rounds.start
        chunks = [segment.chunks(work.drive.plan.chunk_frames) for segment in self._segments]
        state = _resume(work.store, self._segments, chunks, first, work.model)
        return Stream(work.model, len(self._segments), work.config.rule, state=state)

    def _unfinished(self, number: int) -> list[tuple[int, Segment, Chunk]]:
        """Lanes, segments and chunks of a round that the store lacks."""
        chunks = self.lanes.chunks(number, self._work.drive.plan.chunk_frames)
        found = zip(self.lanes.segments, chunks, strict=True)
        return [
            (lane, segment, chunk)
            for lane, (segment, chunk) in enumerate(found)
            if chunk.stop and not self._done[segment.index, chunk.index]
        ]


@dataclass(frozen=True)
class RoundResult:
    """One round of all lanes, ready to be stored."""

    lanes: int
    chunks: list[tuple[int, Segment, Chunk]]  # lane, segment and chunk
    download: Download
    read_seconds: dict[str, float]
    clock: Clock
    attempt: str | None = field(default_factory=attempt_id)


def _write(work: Work, result: RoundResult, after: Callable[[], None] | None) -> None:
    """Compress and write all chunks of a round together, commit each, then do `after`."""
    clock, store = result.clock, work.store
    result.download.wait()
    with clock.measure("download"):
        arrays = result.download.arrays()
    costs = arrays.pop(MOTION_COSTS)
    encoded: dict[int, EncodedChunk] = {}

    def encode(what: tuple[int, Segment, Chunk]) -> None:
        lane, segment, chunk = what
        found = _of_lane(arrays, lane, chunk)
        _require_poses(found["cam_to_seg"], segment, chunk)
        encoded[lane] = store.encode_chunk(segment, chunk, found)

    with clock.measure("encode"):
        in_parallel(encode, result.chunks)
    with clock.measure("write"):
        store.write_encoded([encoded[lane] for lane, _, _ in result.chunks])
    seconds = result.read_seconds | clock.take() | result.download.seconds()
    spent = {name: value / result.lanes for name, value in seconds.items()}
    shared = {
        "attempt": result.attempt,
        "lanes": result.lanes,
        "host": platform.node(),
        "device": result.download.device,
        "device_kind": device_kind(result.download.device),
        **spent,
    }

    commits = []
    for lane, segment, chunk in result.chunks:
        own = {
            "key": work.keys[segment.index],
            "frames_inferred": chunk.stop - chunk.start,
            MOTION_COSTS: [round(float(cost), 4) for cost in costs[lane]],
        }
        commits.append((segment, chunk, own | shared))
    store.commit_chunks(commits)
    for segment, chunk, record in commits:
        metrics.chunk_stored(record, ends_segment=chunk.stop == segment.stop)
        names = {"drive": store.url, "segment": segment.index, "chunk": chunk.index}
        log.info("frames %d..%d stored", chunk.start, chunk.stop, extra=names | spent)
    if after is not None:
        after()


def _resume(
    store: ReconstructionStore,
    segments: Sequence[Segment],
    chunks: Sequence[Sequence[Chunk]],
    start: int,
    model: Model,
) -> State | None:
    """State of all lanes before chunk `start`; None at the beginning."""
    if start == 0:
        return None
    states = [
        store.read_state(segment, cs[min(start, len(cs)) - 1])
        for segment, cs in zip(segments, chunks, strict=True)
    ]
    return State.from_arrays(
        {
            name: np.stack([state[name] for state in states])
            for name in ("tokens", "pose_memory", "first")
        },
        device=next(model.parameters()).device,
    )


def chunk_tensors(
    predictions: Predictions, state: State, principal_offset: float = 0.0
) -> dict[str, Tensor]:
    """What is stored, [L, T, ..] and [L, ..] of the state: metres, pixels, as in the layout."""
    pointmap = predictions.pointmap_cam
    if pointmap is None or predictions.confidence is None:
        raise ValueError("predictions hold no 'cam' output; the stream must be asked for it")
    height, width = pointmap.shape[-3:-1]
    focal = estimate_focal(pointmap.float(), principal_offset)
    quantiles = torch.tensor(GATE_QUANTILES, device=pointmap.device)
    gate = torch.quantile(predictions.rate.float(), quantiles, dim=-1).movedim(0, -1)
    tensors = {
        "depth": pointmap[..., 2],
        "confidence": predictions.confidence,
        "cam_to_seg": camera_pose_to_matrix(predictions.camera_pose.float()),
        "intrinsics": intrinsics_from_focal(focal, height, width, principal_offset),
        "descriptor": predictions.descriptor,
        "gate": gate,
        "state_tokens": state.tokens,
        "state_pose_memory": state.pose_memory,
    }
    return {
        **{name: tensor.float() for name, tensor in tensors.items()},
        "state_first": state.first,
    }


def _motion_costs(
    images: Tensor, tensors: dict[str, Tensor], pointmap: Tensor, present: NDArray[np.bool_]
) -> Tensor:
    """`motion_costs` of the frames that each lane has, [L, S]; `tensors` as `chunk_tensors`."""
    rows = []
    for lane, count in enumerate(present.sum(axis=1).tolist()):
        matrices = tensors["intrinsics"][lane, :count]
        of_lane = images[lane, :count], pointmap[lane, :count], tensors["cam_to_seg"][lane, :count]
        rows.append(motion_costs(*of_lane, matrices))
    return torch.stack(rows)


def _require_poses(cam_to_seg: NDArray[np.generic], segment: Segment, chunk: Chunk) -> None:
    """A segment without a place for each of its frames cannot be aligned: it fails by itself."""
    lost = np.flatnonzero(~np.isfinite(cam_to_seg).all(axis=(1, 2)))
    if len(lost):
        raise ValueError(
            f"the network says no finite camera pose of {len(lost)} frames of segment "
            f"{segment.index}, the first is frame {chunk.start + lost[0]}"
        )


def _of_lane(
    arrays: dict[str, NDArray[np.generic]], lane: int, chunk: Chunk
) -> dict[str, NDArray[np.generic]]:
    """One lane's arrays, cut to the frames that the chunk has."""
    frames = chunk.stop - chunk.start
    return {
        name: array[lane] if name.startswith("state_") else array[lane, :frames]
        for name, array in arrays.items()
    }
