"""Turn a training run into a checkpoint that everything else can load."""

from __future__ import annotations

from pathlib import Path

import torch

from ttt3r.config import COMPACT, ModelConfig
from ttt3r.training.loop import STATE_FILE
from ttt3r.weights_file import WeightsInfo, save_weights

BUNDLED = Path(__file__).parents[1] / "checkpoints" / "compact.safetensors"
_SOURCE = "trained by ttt3r.training on worlds rendered by ttt3r.synthetic"


def export(
    run: str | Path,
    path: str | Path = BUNDLED,
    *,
    config: ModelConfig = COMPACT,
    name: str = "compact",
    segment_frames: int = 16,
    notes: str = "",
) -> WeightsInfo:
    """Write the averaged weights of a run's folder as safetensors, in half precision.

    Args:
        run: folder that `train` wrote to.
        path: file to write.
        config: of the network that was trained.
        name: what the weights are called.
        segment_frames: recommended length of a segment: about that of the training sequences.
        notes: for whoever lists the weights.

    Returns:
        What was written about them.
    """
    state = Path(run) / STATE_FILE
    if not state.is_file():
        raise ValueError(f"{run} holds no {STATE_FILE}; expected a folder that train() wrote to")
    record = torch.load(state, map_location="cpu", weights_only=True)
    said = f"{record['frames']} training frames in {record['step']} steps, cut3r rule. {notes}"
    info = WeightsInfo(
        name=name,
        config=config,
        sha256="",
        licence="Apache-2.0",
        source=_SOURCE,
        segment_frames=segment_frames,
        trained=True,
        notes=said.strip(),
    )
    return save_weights(path, {k: v.half() for k, v in record["averaged"].items()}, info)
