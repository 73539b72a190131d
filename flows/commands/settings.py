"""Settings of a reconstruction, as `ttt3r reconstruct` and `ttt3r plan` take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from flows.commands.options import location_argument, location_option

if TYPE_CHECKING:
    from tasks.config import ReconstructionConfig

T = TypeVar("T")
Precision = Literal["auto", "float32", "bfloat16"]

Weights = Annotated[
    str, location_option("Name, path or URL of the weights (`ttt3r weights list`).")
]
Input = Annotated[str, location_argument("A drive, or a folder or glob of drives.", "INPUT")]
Output = Annotated[str, location_option("Folder or URL that takes <drive>.zarr.")]
Rule = Annotated[str, typer.Option(help="Update rule of the state: ttt3r or cut3r.")]
SegmentFrames = Annotated[
    int | None, typer.Option(min=2, help="Frames of a segment \\[default: the weights' own].")
]
OverlapFrames = Annotated[
    int | None, typer.Option(min=1, help="Frames that segments share \\[default: a quarter].")
]
ChunkFrames = Annotated[int, typer.Option(min=1, help="Frames written together.")]
FocalPx = Annotated[float | None, typer.Option(help="Known focal length, pixels of the recording.")]
VoxelM = Annotated[
    float | None, typer.Option(help="Edge of a voxel, metres \\[default: from the depth].")
]
DepthLimitM = Annotated[
    float | None, typer.Option(help="Fuse no depth beyond \\[default: 3 x the median].")
]
PriceTable = Annotated[
    str | None, location_option("Price table (see deploy/prices.toml).", "--prices")
]
RatesFile = Annotated[
    str | None,
    location_option(
        "JSON of tests/benchmarks/pipeline.py, for where no drive is finished.", "--rates"
    ),
]


def read_settings(
    *,
    weights: str,
    rule: str,
    precision: Precision,
    segment_frames: int | None,
    overlap_frames: int | None,
    chunk_frames: int,
    focal_px: float | None,
    voxel_m: float | None,
    depth_limit_m: float | None,
    device: str = "auto",
    lanes: int | None = None,
) -> ReconstructionConfig:
    """The configuration that the options ask for; ValueError says what is wrong with one."""
    from tasks.config import (
        AlignConfig,
        FuseConfig,
        InferConfig,
        PlanConfig,
        ReconstructionConfig,
    )

    return checked(
        lambda: ReconstructionConfig(
            plan=PlanConfig(
                segment_frames=segment_frames,
                overlap_frames=overlap_frames,
                chunk_frames=chunk_frames,
            ),
            infer=InferConfig(
                weights=weights,
                rule=rule,
                device=device,
                precision=precision,
                lanes=lanes or "auto",
            ),
            align=AlignConfig(focal_px=focal_px),
            fuse=FuseConfig(voxel_m=voxel_m, depth_limit_m=depth_limit_m),
        )
    )


def checked(make: Callable[[], T]) -> T:
    """What `make` makes; what is wrong with a value is said in one line."""
    from pydantic import ValidationError

    try:
        return make()
    except ValidationError as error:
        first = error.errors()[0]
        where, said = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {said}" if where else said) from None
