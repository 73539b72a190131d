"""Turn a training run into a checkpoint that everything else can load."""

from __future__ import annotations

from pathlib import Path

from ttt3r.training.settings import TrainSettings, read_state
from ttt3r.weights_file import WeightsInfo, save_weights

BUNDLED = Path(__file__).parents[1] / "checkpoints" / "compact.safetensors"
_RENDERED_OFFSET = -0.5  # `synthetic.camera` puts the principal point around the middle
_SOURCE = "trained by ttt3r.training on worlds rendered by ttt3r.synthetic"


def export(
    run: str | Path,
    path: str | Path = BUNDLED,
    *,
    name: str = "compact",
    notes: str = "",
) -> WeightsInfo:
    """Write the averaged weights of a run's folder as safetensors, in half precision.

    Args:
        run: folder that `train` wrote to.
        path: file to write.
        name: what the weights are called.
        notes: for whoever lists the weights.

    Returns:
        What was written about them.
    """
    record = read_state(run)
    settings = TrainSettings.from_record(record["settings"])
    rules = "cut3r and ttt3r" if any(s.gated for s in settings.curriculum) else "cut3r"
    learnt = {
        "all": rules,
        "poses": f"poses alone, {rules}",
        "depth": "depth alone, in channels of its own",
    }[settings.learns]
    said = f"{record['frames']} training frames in {record['step']} steps, {learnt}. {notes}"
    if record["origin"]:
        said = f"{said.strip()} Before: {record['origin']}"
    info = WeightsInfo(
        name=name,
        config=settings.model,
        sha256="",
        licence="Apache-2.0",
        source=_SOURCE,
        segment_frames=record["segment_frames"],
        trained=True,
        notes=said.strip(),
        principal_offset=_RENDERED_OFFSET,
    )
    return save_weights(path, {k: v.half() for k, v in record["weights"].items()}, info)
