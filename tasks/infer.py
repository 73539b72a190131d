"""Infer: stream groups of segments through the network, chunk by chunk, into the store."""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from prefect import task

from storage.layout import chunk_commit, segment_claim
from storage.reconstruction import ReconstructionStore
from storage.records import Chunk, Plan, Segment
from tasks.config import InferConfig
from tasks.frames import DriveInput, read_rounds
from tasks.interruption import run_until_stopped
from tasks.keys import drop_later, stage_key
from tasks.pipelining import BackgroundWriter, prefetch
from tasks.plan import read_plan, require_key
from tasks.retries import STAGE_OPTIONS
from ttt3r.geometry import camera_pose_to_matrix, estimate_focal, intrinsics_from_focal
from ttt3r.model import Model, Predictions
from ttt3r.state import State
from ttt3r.stream import Stream
from ttt3r.weights import WeightsInfo, load_model, weights_info

VERSION = 1
READ_AHEAD_CHUNKS = 2  # decoded chunks that wait for the network, per task
MOST_DEATHS = 5  # of the process, one after the other and without a chunk finished

log = logging.getLogger(__name__)


class DeadlySegment(ValueError):
    """The process that computes a segment dies again and again at the same chunk."""


def segment_key(
    store: ReconstructionStore, plan: Plan, segment: Segment, config: InferConfig, info: WeightsInfo
) -> str:
    """Key of a segment's inference: its frames, the weights' hash, the rule, the precision.

    As set, not as resolved: a drive inferred on a GPU is not inferred anew on a laptop.
    """
    what = [config.rule, config.precision, info.sha256, plan.chunk_frames]
    return stage_key("infer", VERSION, require_key(store, "probe"), segment, what)


def resolve_device(config: InferConfig) -> str:
    """The device that `auto` means here.

    Raises:
        ValueError: a GPU is asked for and torch sees none.
    """
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device is {config.device!r} and torch sees no GPU; use --device cpu, or install "
            "torch for CUDA (README, 'On a GPU')"
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
def _cached_model(weights: str, sha256: str, device: str) -> tuple[Model, WeightsInfo]:
    """The network; `sha256` only tells weights apart that have replaced others of their name."""
    model, info = load_model(weights, device=device)
    if info.sha256 != sha256:
        raise ValueError(f"the weights {weights!r} changed while they were loaded; run again")
    return model, info


@task(name="infer", task_run_name="infer {indices} {url}", tags=["gpu"], **STAGE_OPTIONS)
def infer_stage(url: str, indices: Sequence[int], config: InferConfig) -> int:
    """Infer the segments `indices` of the drive at `url`; return the frames computed.

    Finished chunks are skipped: a retry goes on after the last one, from the state stored
    with it. Only unfinished work loads the weights.
    """
    store = ReconstructionStore.open(url)
    plan, info = read_plan(store), weights_info(config.weights)
    keys = {i: segment_key(store, plan, plan.segments[i], config, info) for i in indices}
    # Always the same lanes together, so that an interrupted run repeats the same batches.
    batches = [indices[i : i + config.lanes] for i in range(0, len(indices), config.lanes)]
    lanes = [[plan.segments[i] for i in batch] for batch in batches]
    todo = [
        segments
        for segments in lanes
        if not all(is_segment_done(store, plan, s, keys[s.index]) for s in segments)
    ]
    if not todo:
        return 0
    drop_later(store, "infer")
    model, info = _cached_model(config.weights, info.sha256, resolve_device(config))
    drive = DriveInput.from_store(store, info.config)
    return sum(_infer_claimed(store, drive, segments, keys, model, config) for segments in todo)


def _infer_claimed(
    store: ReconstructionStore,
    drive: DriveInput,
    segments: Sequence[Segment],
    keys: dict[int, str],
    model: Model,
    config: InferConfig,
) -> int:
    """Infer `segments` as the only worker at them; an interruption waits for their chunk."""
    with ExitStack() as claims:
        for segment in segments:
            done = len(store.commit_names(f"infer/{segment.index:04d}"))
            claim = claims.enter_context(store.claim(segment_claim(segment.index), done))
            if claim.deaths >= MOST_DEATHS:
                raise DeadlySegment(
                    f"the process that computed segment {segment.index} (frames {segment.start}.."
                    f"{segment.stop}) died {claim.deaths} times in a row at chunk {done}"
                )
            _drop_stale(store, drive.plan, segment, keys[segment.index])
        return run_until_stopped(
            lambda stop: infer_lanes(store, drive, segments, keys, model, config, stop)
        )


def unfinished_segments(url: str, indices: Sequence[int], config: InferConfig) -> list[int]:
    """Those of the segments `indices` of the drive at `url` that are not inferred."""
    store = ReconstructionStore.open(url)
    plan, info = read_plan(store), weights_info(config.weights)
    segments = [plan.segments[i] for i in indices]
    keys = {s.index: segment_key(store, plan, s, config, info) for s in segments}
    return [s.index for s in segments if not is_segment_done(store, plan, s, keys[s.index])]


def is_segment_done(store: ReconstructionStore, plan: Plan, segment: Segment, key: str) -> bool:
    """Whether every chunk of the segment is committed under `key`."""
    return all(store.is_chunk_done(segment, c, key) for c in segment.chunks(plan.chunk_frames))


def _drop_stale(store: ReconstructionStore, plan: Plan, segment: Segment, key: str) -> None:
    """Take back chunks of other weights, rule, frames or plan: they are not progress."""
    current = {chunk_commit(segment.index, c.index) for c in segment.chunks(plan.chunk_frames)}
    for name, record in store.commits(f"infer/{segment.index:04d}").items():
        if name not in current or record.get("key") != key:
            store.drop_commits(name)


def infer_lanes(
    store: ReconstructionStore,
    drive: DriveInput,
    segments: Sequence[Segment],
    keys: dict[int, str],
    model: Model,
    config: InferConfig,
    stop: threading.Event,
) -> int:
    """Run `segments` in lock step, one a lane, until `stop`; return the frames computed.

    All lanes resume at the first chunk that any of them lacks, so that batches have the shapes
    of an uninterrupted run and its bytes come out again.
    """
    chunk_frames, (height, width) = drive.plan.chunk_frames, drive.size
    for segment in segments:
        store.create_segment(
            segment,
            chunk_frames,
            height,
            width,
            drive.config.enc_embed_dim,
            (drive.config.state_size, drive.config.dec_embed_dim),
            (drive.config.local_mem_size, 2 * drive.config.dec_embed_dim),
        )
    chunks = [segment.chunks(chunk_frames) for segment in segments]
    done = [
        [store.is_chunk_done(s, c, keys[s.index]) for c in cs]
        for s, cs in zip(segments, chunks, strict=True)
    ]
    rounds = max(len(cs) for cs in chunks)
    start = min(flags.index(False) if False in flags else rounds for flags in done)
    stream = Stream(
        model, len(segments), config.rule, state=_resume(store, segments, chunks, start, model)
    )
    precision = torch.autocast(
        next(model.parameters()).device.type,
        torch.bfloat16,
        enabled=resolve_precision(config) == "bfloat16",
    )
    batches = prefetch(read_rounds(drive, segments, range(start, rounds)), READ_AHEAD_CHUNKS)
    computed = 0
    with closing(batches), BackgroundWriter() as writer:
        waiting = time.perf_counter()
        for number, (images, present) in zip(range(start, rounds), batches, strict=True):
            if stop.is_set():
                break
            began = time.perf_counter()
            with precision:
                predictions = stream.feed(images, update=torch.from_numpy(present))
            arrays = chunk_arrays(predictions, stream.state)
            seconds = time.perf_counter() - began
            waited, waiting = began - waiting, time.perf_counter()
            for lane, segment in enumerate(segments):
                if number >= len(chunks[lane]) or done[lane][number]:
                    continue
                chunk = chunks[lane][number]
                computed += chunk.stop - chunk.start
                record = {
                    "key": keys[segment.index],
                    "frames_inferred": chunk.stop - chunk.start,
                    "infer_seconds": seconds / len(segments),
                    "wait_seconds": waited / len(segments),
                    "host": platform.node(),
                    "device": str(next(model.parameters()).device),
                    "device_kind": device_kind(str(next(model.parameters()).device)),
                }
                writer.submit(
                    partial(_write, store, segment, chunk, _of_lane(arrays, lane, chunk), record)
                )
    return computed


def _write(
    store: ReconstructionStore,
    segment: Segment,
    chunk: Chunk,
    arrays: dict[str, NDArray[np.generic]],
    record: dict[str, object],
) -> None:
    began = time.perf_counter()
    store.write_chunk(segment, chunk, arrays)
    write_seconds = time.perf_counter() - began
    store.commit_chunk(segment, chunk, {**record, "write_seconds": write_seconds})


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


def chunk_arrays(predictions: Predictions, state: State) -> dict[str, NDArray[np.generic]]:
    """Arrays to store, [L, T, ..] and [L, ..] of the state: metres, pixels, as in the layout."""
    pointmap = predictions.pointmap_cam
    if pointmap is None or predictions.confidence is None:
        raise ValueError("predictions hold no 'cam' output; the stream must be asked for it")
    height, width = pointmap.shape[-3:-1]
    focal = estimate_focal(pointmap.float())
    quantiles = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], device=pointmap.device)
    gate = torch.quantile(predictions.rate.float(), quantiles, dim=-1).movedim(0, -1)
    tensors = {
        "depth": pointmap[..., 2],
        "confidence": predictions.confidence,
        "cam_to_seg": camera_pose_to_matrix(predictions.camera_pose.float()),
        "intrinsics": intrinsics_from_focal(focal, height, width),
        "descriptor": predictions.descriptor,
        "gate": gate,
    }
    arrays = {name: tensor.float().cpu().numpy() for name, tensor in tensors.items()}
    saved = state.to_arrays()
    return {
        **arrays,
        "state_tokens": saved["tokens"],
        "state_pose_memory": saved["pose_memory"],
        "state_first": saved["first"],
    }


def _of_lane(
    arrays: dict[str, NDArray[np.generic]], lane: int, chunk: Chunk
) -> dict[str, NDArray[np.generic]]:
    """One lane's arrays, cut to the frames that the chunk has."""
    frames = chunk.stop - chunk.start
    return {
        name: array[lane] if name.startswith("state_") else array[lane, :frames]
        for name, array in arrays.items()
    }
