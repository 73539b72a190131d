"""Train the compact network on rendered worlds, and export what came of it.

    ttt3r train OUT                                  afresh: some hours of CPU
    ttt3r train OUT --resume WEIGHTS.safetensors     make trained weights better
    ttt3r train OUT --resume WEIGHTS... --widen 2    in a network of twice the width
    ttt3r train OUT --resume WEIGHTS... --depth-alone    depth, in channels of its own
    ttt3r train OUT --resume OUT                     go on after an interruption

Where depth has channels of its own, as in the bundled weights, training goes on with the poses, or,
with --depth-alone, with depth.

OUT gets state.pt (saved every two minutes), log.jsonl, curves.png, pictures of held-out worlds, and
compact.safetensors. A run that goes on keeps the settings that it began with.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import torch

from ttt3r.training.depth_channels import (
    has_depth_channels,
    joined_config,
    require_depth_channels,
)
from ttt3r.training.export import export
from ttt3r.training.loop import LOG_FILE, train
from ttt3r.training.parallel import launch, rank
from ttt3r.training.pictures import draw_curves, draw_views
from ttt3r.training.settings import (
    DEPTH_ALONE,
    POSES_ALONE,
    REFINE,
    STATE_FILE,
    TrainSettings,
    read_state,
    require_same_network,
)
from ttt3r.training.widening import times_as_wide, widened
from ttt3r.weights import load_model, weights_info

_GPU_BATCH = 16  # times the batch that suits a CPU


def main(arguments: list[str]) -> int:
    """Train, and export what came of it."""
    options = _options(arguments)
    settings = choose_settings(options)
    launch(options.workers, _work, settings, options)
    path = options.out / "compact.safetensors"
    info = export(options.out, path)
    draw_curves(options.out / LOG_FILE, options.out / "curves.png")
    for world in ("rooms", "streets"):
        draw_views(load_model(path)[0], world, options.out / f"{world}.png")
    print(json.dumps(info.to_json(), indent=1))
    return 0


def choose_settings(options: argparse.Namespace) -> TrainSettings:
    """Settings of a new run, or those that the run to resume began with.

    Raises:
        ValueError: there is nothing to resume, or nothing left to do.
    """
    if options.resume is not None and options.resume.suffix != ".safetensors":
        return _settings_of(options)
    settings = TrainSettings()
    batch = options.batch or (_GPU_BATCH if options.device == "cuda" else 1)
    if options.resume is not None:
        # Noisier gradients bear lower rates, and rotations are so small that noise drowns them:
        # what the weights say of them already has none.
        calm = min(1.0, batch / _GPU_BATCH) ** 0.5
        found = weights_info(options.resume).config
        times = times_as_wide(found, settings.model)
        expected = replace(widened(settings.model, times), enc_depth=found.enc_depth)
        require_same_network(found, expected, options.resume)
        weights = load_model(options.resume)[0] if times > 1 else None
        has_channels = weights is not None and has_depth_channels(weights)
        if options.depth_alone:
            if weights is not None:
                require_depth_channels(weights, options.resume)
            model = found if has_channels else joined_config(found)
            settings = replace(DEPTH_ALONE, model=model)
        else:
            if has_channels and options.widen > 1:
                raise ValueError(
                    f"{options.resume} has channels for depth, which --widen cannot keep apart; "
                    "leave it out, or widen the weights that they were put beside"
                )
            refine = POSES_ALONE if has_channels else REFINE
            settings = replace(
                refine,
                model=widened(found, options.widen),
                lr=refine.lr * calm,
                matrix_lr=refine.matrix_lr * calm,
                keep_rotations=batch < _GPU_BATCH,
            )
    if (options.out / STATE_FILE).exists():
        raise ValueError(
            f"{options.out} holds a run: go on with --resume {options.out}, or choose another "
            "folder"
        )
    larger = [replace(stage, lanes=stage.lanes * batch) for stage in settings.curriculum]
    return replace(
        settings,
        curriculum=tuple(larger),
        seed=options.seed or 0,
        total_steps=options.steps or settings.total_steps,
    )


def _settings_of(options: argparse.Namespace) -> TrainSettings:
    """Those of the run to go on with; only its number of steps may change."""
    record = read_state(options.resume)
    settings = TrainSettings.from_record(record["settings"])
    if options.batch or options.seed is not None:
        raise ValueError("a run goes on with its own batch and seed: leave out --batch and --seed")
    settings = replace(settings, total_steps=options.steps or settings.total_steps)
    if record["step"] >= settings.total_steps:
        raise ValueError(
            f"{options.resume} has done all of its {record['step']} steps; ask for more (--steps), "
            f"or start from its weights (--resume {options.resume}/compact.safetensors)"
        )
    return settings


def _work(settings: TrainSettings, options: argparse.Namespace) -> None:
    level = logging.INFO if rank() == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s")
    torch.set_float32_matmul_precision("high")  # on a GPU, whose TF32 is exact enough here
    train(
        settings, options.out, options.resume,
        device=options.device, minutes=options.minutes, finish_in=options.finish_in,
    )  # fmt: skip


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _minutes(text: str) -> float:
    minutes = float(text)
    if not minutes > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return minutes


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ttt3r train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for all results")
    parser.add_argument(
        "--resume", type=Path, metavar="FROM", help="folder of a run, or .safetensors file"
    )
    parser.add_argument(
        "--steps", type=_positive, help="steps in all; the learning rates fall towards the last"
    )
    parser.add_argument(
        "--minutes", type=_minutes, default=math.inf, help="stop early; --resume goes on"
    )
    parser.add_argument(
        "--finish-in", type=_minutes, default=math.inf, metavar="MINUTES",
        help="be done by then: the learning rates fall with the time",
    )  # fmt: skip
    parser.add_argument(
        "--batch",
        type=_positive,
        help=f"batches this many times as large [default: {_GPU_BATCH} on a GPU, 1 on a CPU]",
    )
    parser.add_argument(
        "--widen", type=_positive, default=1, metavar="TIMES",
        help="with --resume WEIGHTS: a network so many times as wide, which begins as good as it",
    )  # fmt: skip
    parser.add_argument(
        "--depth-alone", action="store_true",
        help="with --resume WEIGHTS: depth learns in channels of its own, which are added where "
        "there are none; what is said of poses hardly changes",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="of data and first weights [default: 0]")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="[default: a GPU where there is one]"
    )
    parser.add_argument(
        "--workers", type=_positive, default=1, help="processes; on a CPU, one a core [default: 1]"
    )
    options = parser.parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        parser.error("--device cuda: there is no GPU that torch can use")
    options.device = options.device or ("cuda" if has_gpu and options.workers == 1 else "cpu")
    if options.device == "cuda" and options.workers > 1:
        parser.error("--workers is for CPUs: one process uses the whole GPU")
    for name, is_given in (("widen", options.widen > 1), ("depth-alone", options.depth_alone)):
        if is_given and (options.resume is None or options.resume.suffix != ".safetensors"):
            parser.error(f"--{name} is for weights: --resume WEIGHTS.safetensors")
    if options.widen > 1 and options.depth_alone:
        parser.error("--depth-alone makes a network twice as wide: leave out --widen")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"{options.out} is no folder")
    return options
