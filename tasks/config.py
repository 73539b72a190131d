"""Everything a user can set about a reconstruction, checked where it enters."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Limit = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class AnotherConfiguration(ValueError):
    """The drive was planned for other settings since: what is asked for is of no use any more."""


class UnfitMachine(ValueError):
    """This machine cannot run the network that is asked for: no fault of what it should infer."""


@dataclass(frozen=True, config=STRICT)
class PlanConfig:
    """How a drive is cut."""

    segment_frames: Annotated[int, Field(ge=2)] | None = None
    """Frames of one recurrent stream; None: what the weights recommend; 0 is refused."""
    overlap_frames: Annotated[int, Field(ge=1)] | None = None
    """Frames that neighbouring segments share at least; None: a quarter of a segment."""
    chunk_frames: Annotated[int, Field(ge=1)] = 32
    """Frames written and committed together."""
    split_at_cuts: bool = True
    """Start a new trajectory part at every hard cut."""

    def __post_init__(self) -> None:
        segment, overlap = self.segment_frames, self.overlap_frames
        if segment is not None and overlap is not None and overlap > segment // 2:
            raise ValueError(
                f"overlap_frames is {overlap} of segment_frames {segment}; it can be at most half, "
                "or three segments would share one frame"
            )


@dataclass(frozen=True, config=STRICT)
class InferConfig:
    """How the network runs. Only `weights` and `rule` change the result beyond rounding."""

    weights: str = "compact"
    """Name, path or URL of the weights (`ttt3r weights list`)."""
    rule: str = "ttt3r"
    """Update rule of the state."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU."""
    lanes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Segments that run in lock step on one device; auto: as memory allows, up to what helps."""
    segments_per_task: Annotated[int, Field(ge=1)] = 128
    """Segments of one GPU task."""
    frames_per_run: Annotated[int, Field(ge=1)] = 10_000
    """On a fleet: frames, at least, of one run of a GPU worker, which does several tasks."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device is {self.device!r}; expected auto, cpu, cuda or cuda:N")


@dataclass(frozen=True, config=STRICT)
class AlignConfig:
    """How segments become one trajectory."""

    focal_px: Positive | None = None
    """Known focal length in pixels of the recording; None: the network's estimate."""
    scale_prior_sigma: Positive = 0.3
    """Standard deviation of the log of one segment's scale around the model's metres; less where
    seams say that segments differ less."""


@dataclass(frozen=True, config=STRICT)
class FuseConfig:
    """How depth becomes a mesh."""

    voxel_m: Positive | None = None
    """Edge of a voxel in metres; None: about a pixel's footprint at the median depth."""
    depth_limit_m: Positive | None = None
    """Depth beyond this is not fused; None: three times the median depth."""
    confidence_cut: Share = 0.1
    """Share of the least confident measurements within the depth limit that is not fused, as nearly
    as may be: confidence is stored in steps of an eighth, and of those that are equally confident
    all or none are fused."""
    min_observations: Annotated[int, Field(ge=1)] = 2
    """Fused frames that must agree that a surface is there."""
    smallest_piece: Annotated[int, Field(ge=1)] = 50
    """Loose pieces of fewer triangles are dropped from the mesh."""
    view_change: Share = 0.02
    """Fuse a frame if its camera has moved by this share of the median depth, or turned by so many
    radians, since the last one fused; 0: every frame."""
    frame_step: Annotated[int, Field(ge=1)] = 1
    """Of all frames, look at every n-th only."""
    preview_triangles: Annotated[int, Field(ge=100)] = 60_000
    """Size of the decimated preview."""


@dataclass(frozen=True, config=STRICT)
class BudgetConfig:
    """What one run may take, as predicted before it begins; what is done already counts nothing."""

    max_gpu_hours: Limit | None = None
    """Hours of inference, without starts and idle minutes of the machines (docs/fleet.md)."""
    max_cost: Limit | None = None
    """Money for work and storage, in the currency of the price table; bills are higher."""
    prices: str | None = None
    """Price table, a TOML file (`deploy/prices.toml`); path or URL."""
    rates: str | None = None
    """JSON of `tests/benchmarks/pipeline.py`, path or URL: rates where no drive is finished yet."""
    when_over: Literal["refuse", "take_what_fits"] = "refuse"
    """Begin nothing, or take the drives that fit and leave the others to the next run."""

    def __post_init__(self) -> None:
        if self.max_cost is not None and self.prices is None:
            raise ValueError(
                "max_cost needs a price table; give its location as prices (--prices FILE)"
            )
        if self.max_gpu_hours is None and self.max_cost is None:
            if self.when_over != "refuse":
                raise ValueError(
                    "there is no limit to take what fits in; give max_gpu_hours or max_cost"
                )
            if self.rates is not None:
                raise ValueError("rates are for a limit: give max_gpu_hours or max_cost, too")


@dataclass(frozen=True, config=STRICT)
class ReconstructionConfig:
    """Settings of all stages; a stage is redone only when its own part changes."""

    plan: PlanConfig = field(default_factory=PlanConfig)
    infer: InferConfig = field(default_factory=InferConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    fuse: FuseConfig = field(default_factory=FuseConfig)
