"""The command that trains on rendered worlds."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path

from ttt3r.training.curriculum import stage_at
from ttt3r.training.export import export
from ttt3r.training.loop import LOG_FILE, TrainSettings, train
from ttt3r.training.parallel import launch, rank
from ttt3r.training.pictures import draw_curves, draw_views
from ttt3r.weights import load_model


def main(arguments: list[str]) -> int:
    """Train, and export what came of it."""
    options = _options(arguments)
    settings = replace(TrainSettings(), seed=options.seed)
    larger = [replace(s, lanes=s.lanes * options.batch) for s in settings.curriculum]
    settings = replace(settings, curriculum=tuple(larger))
    if options.steps:
        settings = replace(settings, total_steps=options.steps)
    launch(options.workers, _work, settings, options)
    path = options.out / "compact.safetensors"
    longest = max(stage_at(settings.total_steps - 1, settings.curriculum).frames)
    info = export(options.out, path, segment_frames=longest)
    draw_curves(options.out / LOG_FILE, options.out / "curves.png")
    for world in ("rooms", "streets"):
        draw_views(load_model(path)[0], world, options.out / f"{world}.png")
    print(json.dumps(info.to_json(), indent=1))
    return 0


def _work(settings: TrainSettings, options: argparse.Namespace) -> None:
    level = logging.INFO if rank() == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s")
    train(settings, options.out, options.resume, device=options.device)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ttt3r train", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the state, the log and the weights")
    parser.add_argument(
        "--resume", type=Path, help="folder of a run, or .safetensors to start from"
    )
    parser.add_argument("--steps", type=int, help="train until this many steps in all")
    parser.add_argument("--batch", type=int, default=1, help="batches this many times as large")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda or cpu; a GPU is used where there is one")
    parser.add_argument("--workers", type=int, default=1, help="processes; on a CPU, one a core")
    return parser.parse_args(arguments)
