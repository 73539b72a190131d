"""Frames per second of the network, against the device's own peak and against a naive port.

    python tests/benchmarks/throughput.py --config 512_dpt --device cpu --size 512x288 \
        --precision bfloat16 --lanes 1 --json FILE

Ours and the naive mode (`naive.py`) run in processes of their own, so that neither's memory hides
the other's, and take turns within the same run, so that a busy machine slows both. Weights are
synthetic unless --weights names some. GFLOP are counted, not estimated: the network runs on
torch's meta device, attention as matrix products, under torch.utils.flop_counter; a
multiply-add is two. The best lanes are those with the most frames per second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from naive import Naive
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ttt3r.config import COMPACT, RELEASED_224_LINEAR, RELEASED_512_DPT, TINY, ModelConfig
from ttt3r.images import normalise, preprocess
from ttt3r.model import Model
from ttt3r.state import UPDATE_RULES, State
from ttt3r.synthetic_weights import synthetic_tensor
from ttt3r.weights import load_model, weights_info
from ttt3r.weights_file import empty_model

CONFIGS = {
    "512_dpt": RELEASED_512_DPT,
    "224_linear": RELEASED_224_LINEAR,
    "compact": COMPACT,
    "tiny": TINY,
}
NATURAL_SIZE = {"512_dpt": "512x288", "224_linear": "224x224", "compact": "80x40", "tiny": "64x48"}
SOURCE = (720, 1280)  # rows and columns of the recording that is imitated
SEED, QK_GAIN = 1, 2.0
COMPARED = ("camera_pose", "pointmap_cam")


@dataclass(frozen=True)
class Settings:
    """One measurement; what a worker process needs to know."""

    config: ModelConfig
    weights: str | None  # None: synthetic
    device: str
    precision: str
    threads: int
    width: int
    height: int
    rule: str = "ttt3r"
    lanes: int = 1
    frames: int = 2
    batch_frames: int = 16
    outputs: tuple[str, ...] = ("cam",)
    recorded: bool = True  # decoder steps, on a GPU


def build(settings: Settings, dtype: torch.dtype) -> Model:
    """The network with the weights asked for, made straight in their run-time type."""
    if settings.weights:
        return load_model(settings.weights, device=settings.device, dtype=dtype)[0]
    model = empty_model(settings.config, dtype)
    tensors = {
        name: torch.from_numpy(synthetic_tensor(name, p.shape, SEED, QK_GAIN)).to(
            settings.device, p.dtype
        )
        for name, p in model.named_parameters()
    }
    model.load_tensors(tensors)
    return model.eval()


def recording(frames: int) -> np.ndarray:
    """Frames [T, H, W, 3] uint8 of a recording: smooth noise that moves."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (SOURCE[0] // 16, 2 * SOURCE[1] // 16, 3), np.uint8)
    wide = coarse.repeat(16, axis=0).repeat(16, axis=1)
    starts = [16 * t % SOURCE[1] for t in range(frames)]
    return np.stack([wide[:, start : start + SOURCE[1]] for start in starts])


def fitted(settings: Settings, frames: np.ndarray) -> np.ndarray:
    """The frames preprocessed, then cut or repeated to the size asked for [T, h, w, 3]."""
    size, patch = settings.config.image_size, settings.config.patch_size
    ready = np.stack([preprocess(frame, size, patch) for frame in frames])
    rows = np.arange(settings.height) % ready.shape[1]
    return ready[:, rows][:, :, np.arange(settings.width) % ready.shape[2]]


# -- the two modes, each in a process of its own ---------------------------------------------------


class Ours:
    """What the project does: batches, lanes, only the outputs asked for."""

    def __init__(self, settings: Settings) -> None:
        dtype = getattr(torch, settings.precision)
        self.model = build(settings, dtype)
        self.state: State | None = None
        self.host: dict[tuple[int, ...], Tensor] = {}  # pinned, as the pipeline's

    def round(self, settings: Settings) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Seconds of each stage for `frames` more frames of each lane, and what came out."""
        stages: dict[str, float] = {}
        self.model.records_steps = settings.recorded
        images = recording(settings.frames)
        clock = Clock(settings.device, stages)
        one = fitted(settings, images)
        clock("preprocess")
        stages["preprocess"] *= settings.lanes
        lanes = torch.from_numpy(one)[None].repeat(settings.lanes, 1, 1, 1, 1)
        said: list[dict[str, np.ndarray]] = []  # of the first lane
        per_batch = max(1, settings.batch_frames // settings.lanes)
        with torch.inference_mode():
            for start in range(0, settings.frames, per_batch):
                some = lanes[:, start : start + per_batch].contiguous()
                if settings.device.startswith("cuda"):
                    some = some.pin_memory()
                said.append(self._batch(some, settings, clock))
        return stages, {name: np.concatenate([part[name] for part in said]) for name in said[0]}

    def _batch(self, images: Tensor, settings: Settings, clock: Clock) -> dict[str, np.ndarray]:
        clock.restart()
        batch = normalise(images.to(settings.device))
        clock("upload")
        encoded = self.model.encode(batch)
        clock("encode")
        decoded, self.state = self.model.decode(encoded, self.state, rule=settings.rule)
        clock("decode")
        predictions = self.model.predict(encoded, decoded, frozenset(settings.outputs))
        clock("heads")
        found = {name: getattr(predictions, name) for name in COMPARED}
        for tensor in (predictions.confidence, *found.values()):
            assert tensor is not None
            self._download(tensor)
        clock("download")
        return {name: tensor[0].float().cpu().numpy() for name, tensor in found.items()}

    def _download(self, tensor: Tensor) -> None:
        if tensor.device.type == "cpu":
            return
        if tensor.shape not in self.host:
            self.host[tensor.shape] = torch.empty(tensor.shape, pin_memory=True)
        self.host[tensor.shape].copy_(tensor, non_blocking=True)

    def reset(self) -> None:
        """Forget all frames."""
        self.state = None


class NaiveMode:
    """What a literal port does; see `naive.py`. One lane, whatever is asked."""

    def __init__(self, settings: Settings) -> None:
        # The reference turns TF32 on when imported (specification, section 11).
        torch.backends.cuda.matmul.allow_tf32 = True
        self.model = build(settings, torch.float32)
        self.naive: Naive | None = None

    def round(self, settings: Settings) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """As `Ours.round`, for one lane."""
        stages: dict[str, float] = {}
        images = recording(settings.frames)
        clock = Clock(settings.device, stages)
        ready = fitted(settings, images)
        clock("preprocess")
        self.naive = self.naive or Naive(self.model, settings.rule)
        said = [self.naive.see(normalise(image)) for image in ready]
        clock("network")
        return stages, {n: np.stack([frame[n].numpy() for frame in said]) for n in COMPARED}

    def reset(self) -> None:
        """Forget all frames."""
        self.naive = None


class Clock:
    """Adds the seconds since the last call, device idle, to a stage."""

    def __init__(self, device: str, stages: dict[str, float]) -> None:
        self.device, self.stages = device, stages
        self.restart()

    def restart(self) -> None:
        """Begin now."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.began = time.perf_counter()

    def __call__(self, stage: str) -> None:
        began = self.began
        self.restart()
        self.stages[stage] = self.stages.get(stage, 0.0) + self.began - began


def serve(kind: str, settings: Settings, pipe: Connection) -> None:
    """A worker: build the mode, then answer (method, settings) until told to stop."""
    torch.set_num_threads(settings.threads)
    mode = {"ours": Ours, "naive": NaiveMode}[kind](settings)
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        method, now = asked
        if method == "reset":
            reset_peak(now.device)
            mode.reset()
            pipe.send(None)
        elif method == "peak":
            pipe.send(peak_bytes(now.device))
        else:
            pipe.send(mode.round(now))


def reset_peak(device: str) -> None:
    """Forget earlier peaks of this process."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """Most memory since `reset_peak`: allocated on a GPU, resident on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Worker:
    """The parent's end of `serve`."""

    def __init__(self, kind: str, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(kind, settings, other), daemon=True)
        self.process.start()
        other.close()

    def ask(self, method: str, settings: Settings) -> Any:
        """Have the worker do it and wait for the answer."""
        self.pipe.send((method, settings))
        return self.pipe.recv()

    def wait_until_ready(self) -> None:
        """Return when the weights are there."""
        self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()


# -- figures ---------------------------------------------------------------------------------------


def count_gflop(settings: Settings) -> float:
    """GFLOP of one frame of one lane that is not the first."""
    model = empty_model(settings.config)
    images = torch.empty(1, 1, 3, settings.height, settings.width, device="meta")
    outputs = frozenset(settings.outputs)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.run(images, rule=settings.rule, outputs=outputs)
    with FlopCounterMode(display=False) as constant:
        model.initial_state(1)
    return (counter.get_total_flops() - constant.get_total_flops()) / 1e9


def matmul_peak(settings: Settings) -> float:
    """GFLOP/s of the best square matrix product in the precision of the run."""
    torch.set_num_threads(settings.threads)
    on_gpu = settings.device.startswith("cuda")
    best = 0.0
    for side in (4096, 8192) if on_gpu else (1024, 2048):
        a = torch.randn(side, side, device=settings.device).to(getattr(torch, settings.precision))
        clock = Clock(settings.device, {})
        for _ in range(20 if on_gpu else 4):
            clock.restart()
            torch.mm(a, a)
            clock("mm")
            best = max(best, 2e-9 * side**3 / clock.stages.pop("mm"))
    return best


def measure(settings: Settings, workers: dict[str, Worker], args: argparse.Namespace) -> dict:
    """One row of the table."""
    each = {
        "ours": settings,
        "naive": replace(settings, lanes=1, frames=args.naive_frames, precision="float32"),
    }
    each = {kind: each[kind] for kind in workers}
    # The first round warms up; it starts the stream, so it is where outputs can be compared.
    first: dict[str, Any] = {}
    for kind, worker in workers.items():
        worker.ask("reset", each[kind])
        first[kind] = worker.ask("round", each[kind])[1]
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in workers}
    for _ in range(args.repeats):
        for kind, worker in workers.items():
            rounds[kind].append(worker.ask("round", each[kind])[0])
    row = {**asdict(settings), "config": args.config}
    frames = settings.lanes * settings.frames
    stages = _median_stages(rounds["ours"])
    seconds = sum(t for name, t in stages.items() if name != "preprocess")
    gflop = count_gflop(settings)
    row |= {
        "frames_per_second": frames / seconds,
        "stage_seconds_per_frame": {name: t / frames for name, t in stages.items()},
        "gflop_per_frame": gflop,
        "gflop_per_second": gflop * frames / seconds,
        "share_of_peak": gflop * frames / seconds / args.peak,
        "peak_memory_bytes": workers["ours"].ask("peak", each["ours"]),
    }
    return row | _against_naive(row, rounds, first, workers, each)


def _median_stages(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def _against_naive(
    row: dict, rounds: dict, first: dict, workers: dict[str, Worker], each: dict[str, Settings]
) -> dict[str, Any]:
    """The naive mode's figures and the differences of the outputs; None if it did not run."""
    if "naive" not in workers:
        return {"speedup_over_naive": None, "naive": None}
    seconds = _median_stages(rounds["naive"])["network"] / each["naive"].frames
    shared = min(each["naive"].frames, each["ours"].frames)
    difference = {
        name: float(np.linalg.norm(ours[:shared] - theirs[:shared]) / np.linalg.norm(theirs))
        for (name, ours), theirs in zip(first["ours"].items(), first["naive"].values(), strict=True)
    }
    return {
        "speedup_over_naive": seconds * row["frames_per_second"],
        "relative_difference_to_naive": difference,
        "naive": {
            "frames_per_second": 1 / seconds,
            "peak_memory_bytes": workers["naive"].ask("peak", each["naive"]),
        },
    }


def print_row(row: dict[str, Any]) -> None:
    """One row of the table, and its stages."""
    ratio = row["speedup_over_naive"]
    print(
        f"{row['width']}x{row['height']:<4} {row['rule']:6} lanes {row['lanes']:3}  "
        + ("" if row["recorded"] else "launched one by one  ")
        + f"{row['frames_per_second']:8.3f} frames/s  {row['gflop_per_frame']:7.1f} GFLOP/frame  "
        f"{100 * row['share_of_peak']:5.1f} % of peak  "
        f"{row['peak_memory_bytes'] / 2**20:7.0f} MiB  "
        + ("" if ratio is None else f"x{ratio:.2f} naive")
    )
    stages = row["stage_seconds_per_frame"].items()
    print("    ms per frame: " + "  ".join(f"{name} {1e3 * t:.1f}" for name, t in stages))
    if row.get("relative_difference_to_naive"):
        parts = row["relative_difference_to_naive"].items()
        print("    relative difference to naive: " + ", ".join(f"{n} {d:.1e}" for n, d in parts))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=CONFIGS, default="512_dpt")
    parser.add_argument("--weights", help="name or file; synthetic ones of --config if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", nargs="+", help="as 512x288; several make several rows")
    parser.add_argument("--precision", choices=["float32", "bfloat16"])
    parser.add_argument("--rules", nargs="+", choices=sorted(UPDATE_RULES), default=["ttt3r"])
    parser.add_argument("--lanes", type=int, nargs="+", default=[1])
    parser.add_argument("--frames", type=int, default=4, help="of a round, per lane")
    parser.add_argument("--batch-frames", type=int, default=16, help="that encoder and heads take")
    parser.add_argument("--outputs", nargs="+", default=["cam"], choices=["cam", "world", "rgb"])
    parser.add_argument("--repeats", type=int, default=3, help="rounds, after one to warm up")
    parser.add_argument("--naive-frames", type=int, default=1, help="of a round; 0: no naive mode")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--launched", action="store_true", help="each row also without CUDA graphs of decoder steps"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if "cam" not in args.outputs:
        parser.error("--outputs must have cam: it is what is compared")
    args.precision = args.precision or ("float32" if args.device == "cpu" else "bfloat16")
    return args


def rows_wanted(args: argparse.Namespace) -> list[Settings]:
    """Every size, rule and number of lanes asked for."""
    config = weights_info(args.weights).config if args.weights else CONFIGS[args.config]
    sizes = [tuple(map(int, size.split("x"))) for size in args.size or [NATURAL_SIZE[args.config]]]
    plain = Settings(
        config=config,
        weights=args.weights,
        device=args.device,
        precision=args.precision,
        threads=args.threads,
        width=sizes[0][0],
        height=sizes[0][1],
        frames=args.frames,
        batch_frames=args.batch_frames,
        outputs=tuple(args.outputs),
    )
    return [
        replace(plain, width=width, height=height, rule=rule, lanes=lanes, recorded=recorded)
        for width, height in sizes
        for rule in args.rules
        for lanes in args.lanes
        for recorded in ((True, False) if args.launched else (True,))
    ]


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, print a table, write JSON."""
    args = parse(argv)
    wanted = rows_wanted(args)
    kinds = ["ours", "naive"] if args.naive_frames else ["ours"]
    args.peak = matmul_peak(wanted[0])
    print(f"{args.config} on {args.device}, {args.precision}, {args.threads} threads; ", end="")
    print(f"best matrix product {args.peak:.0f} GFLOP/s")
    workers = {kind: Worker(kind, wanted[0]) for kind in kinds}
    rows = []
    for worker in workers.values():
        worker.wait_until_ready()
    for settings in wanted:
        rows.append(measure(settings, workers, args))
        print_row(rows[-1])
    for worker in workers.values():
        worker.close()
    best = max(rows, key=lambda row: row["frames_per_second"])
    if args.json:
        about = {"matmul_peak_gflops": args.peak, "machine": platform.platform()}
        about["torch"] = torch.__version__
        args.json.write_text(json.dumps({**best, **about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
