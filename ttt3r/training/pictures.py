"""What a training run looks like: its curves, and what the network sees in held-out worlds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttt3r.model import Model
from ttt3r.synthetic import HELD_OUT_SEED, WorldName, render
from ttt3r.training.curriculum import fit_sides

_PARTS = ("turn", "cam", "depth", "world", "translation", "rotation", "steps")
_CHECKS = ("abs_rel", "moved", "turned", "step_moved", "gate_median")
_FARTHEST = 40.0  # metres; the darkest colour of depth pictures


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Records of a run's log.jsonl."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]


def draw_curves(log: str | Path, path: str | Path) -> None:
    """Draw losses and validation figures of a run's log.jsonl over the frames seen, as PNG."""
    rows = read_log(log)
    steps = [row for row in rows if "loss" in row]
    checks = [row for row in rows if "validation" in row]
    if not steps:
        raise ValueError(f"{log} holds no training step yet; let the training run for a while")
    plt = _pyplot()
    figure, axes = plt.subplots(1, 1 + len(_CHECKS), figsize=(22, 3.4), constrained_layout=True)
    for name in _PARTS:
        rows_with = [r for r in steps if name in r]  # lessons and sequences have different parts
        if rows_with:
            losses = _smooth([r[name] for r in rows_with])
            axes[0].plot([r["seen"] for r in rows_with], losses, label=name)
    axes[0].set(title="losses (smoothed)", xlabel="frames seen")
    axes[0].legend(fontsize=7)
    lines = sorted({(r["validation"], r["rule"]) for r in checks})
    for axis, name in zip(axes[1:], _CHECKS, strict=True):
        for world, rule in lines:
            chosen = [r for r in checks if (r["validation"], r["rule"]) == (world, rule)]
            axis.plot(
                [r["seen"] for r in chosen],
                [r[name] for r in chosen],
                color={"rooms": "C0", "streets": "C1"}[world],
                linestyle="-" if rule == "cut3r" else "--",
                label=f"{world}, {rule}",
            )
        axis.set(title=f"held out: {name}", xlabel="frames seen")
        axis.locator_params(axis="x", nbins=4)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_views(model: Model, world: WorldName, path: str | Path, count: int = 6) -> None:
    """Draw pictures, true depth and predicted depth of held-out sequences, as PNG."""
    height, width = fit_sides(16 / 9, model.config.image_size, model.config.patch_size)
    first = HELD_OUT_SEED + 700_000
    seeds = range(first, first + count)
    seen = render(world, seeds, 4, height, width, device=model.device, supersample=2)
    images = seen.images.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    with torch.inference_mode():
        found, _ = model.run(images, outputs=frozenset({"cam"}))
    assert found.pointmap_cam is not None
    rows = [
        list(seen.images[:, -1].cpu().numpy()),
        list(_inverse(seen.depth[:, -1])),
        list(_inverse(found.pointmap_cam[:, -1, ..., 2])),
    ]
    plt = _pyplot()
    figure, axes = plt.subplots(3, count, figsize=(3 * count, 5.4), constrained_layout=True)
    for line, pictures in zip(axes, rows, strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, vmin=0, vmax=1 / 2.0, cmap="magma")
            axis.set_axis_off()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _inverse(depth: torch.Tensor) -> np.ndarray:
    return (1 / depth.clamp(min=0.5, max=_FARTHEST)).cpu().numpy()


def _smooth(values: list[float], window: int = 25) -> np.ndarray:
    window = min(window, len(values))
    sums = np.convolve(values, np.ones(window), "full")[: len(values)]
    return sums / np.minimum(np.arange(1, len(values) + 1), window)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt
