"""What decides a training run, and how its folder remembers that."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ttt3r.config import COMPACT, ModelConfig
from ttt3r.training.curriculum import CURRICULUM, REFINEMENT, Stage
from ttt3r.training.losses import LossWeights

STATE_FILE = "state.pt"


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides what training does, apart from where it runs."""

    model: ModelConfig = COMPACT
    curriculum: tuple[Stage, ...] = CURRICULUM
    loss: LossWeights = field(default_factory=LossWeights)
    seed: int = 0
    total_steps: int = 10900
    lr: float = 8e-4  # AdamW
    matrix_lr: float = 0.003  # Muon
    weight_decay: float = 0.01
    warm_up: int = 100
    cool_down: float = 0.6  # last share of the steps, over which the rates fall to 2 %
    clip: float = 1.0
    average: float = 0.99  # weights that are validated and exported: moving average
    validate_every: int = 100
    save_every_s: float = 120.0
    learns: Literal["all", "depth", "poses"] = "all"  # see `depth_channels`
    keep_rotations: bool = False  # learn rotations from what the first weights say of them
    half: bool = False  # bfloat16 autocast: half as many kernels again, for matrices this small

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TrainSettings:
        """Inverse of `dataclasses.asdict`."""
        made = {
            "model": ModelConfig(**record["model"]),
            "curriculum": tuple(Stage(**stage) for stage in record["curriculum"]),
            "loss": LossWeights(**record["loss"]),
        }
        return cls(**{**record, **made})


# From trained weights: at full rates what they know is soon forgotten. For batches of a
# GPU: smaller ones take these rates times the square root of their share (`command.py`).
REFINE = TrainSettings(
    curriculum=REFINEMENT,
    total_steps=4000,
    lr=5e-4,
    matrix_lr=0.0015,
    warm_up=50,
    cool_down=0.85,
    validate_every=400,
    loss=LossWeights(
        cam=1,
        depth=5,
        translation=1.5,
        rotation=1.5,
        steps=1.5,
        wide=2.5,
        gate=0.1,
        gate_logit=-1.7,
    ),
)
# Depth in channels of its own (`depth_channels`), beside trained ones: what says the poses does not
# learn, so rates may be those of a first training. Many small steps count.
DEPTH_ALONE = TrainSettings(
    curriculum=(replace(REFINEMENT[0], frames=(8,), lanes=16, rooms=0.5, stills=0.7),),
    total_steps=40_000,
    lr=8e-4,
    matrix_lr=0.003,
    warm_up=200,
    cool_down=0.9,
    average=0.995,
    validate_every=1000,
    loss=LossWeights(cam=1, depth=5).of_stills,
    learns="depth",
)


# From weights that have such channels: what says the poses learns without them. `shift` compares
# with the camera's own points, which are depth's.
POSES_ALONE = replace(
    REFINE,
    curriculum=(replace(REFINEMENT[0], stills=0.0),),
    loss=replace(REFINE.loss, cam=0, depth=0, shift=0),
    learns="poses",
)


def read_state(run: str | Path) -> dict[str, Any]:
    """What `train` saved in the folder `run`.

    Raises:
        ValueError: nothing was saved there, or it cannot be read.
    """
    path = Path(run) / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{run} holds no {STATE_FILE}; expected the folder of a run, which saves its first "
            "after two minutes"
        )
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
        TrainSettings.from_record(record["settings"])
        record["weights"]
    except (RuntimeError, EOFError, OSError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged, or not of this version's `ttt3r train`: {error}"
        ) from None
    return record


def require_same_network(found: ModelConfig, expected: ModelConfig, where: str | Path) -> None:
    """ValueError where weights are of another architecture than the one to be trained."""
    differing = [
        f"{f.name} is {getattr(found, f.name)}, expected {getattr(expected, f.name)}"
        for f in fields(ModelConfig)
        if getattr(found, f.name) != getattr(expected, f.name)
    ]
    if differing:
        raise ValueError(f"{where} is of another network: {'; '.join(differing)}")
