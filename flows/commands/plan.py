"""`ttt3r plan`: what a reconstruction would take yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import AsJson
from flows.commands.printing import print_json, say
from flows.commands.settings import (
    ChunkFrames,
    DepthLimitM,
    FocalPx,
    Input,
    Output,
    OverlapFrames,
    Precision,
    PriceTable,
    RatesFile,
    Rule,
    SegmentFrames,
    VoxelM,
    Weights,
    read_settings,
)

if TYPE_CHECKING:
    from tasks.ledger import Usage
    from tasks.planner import DriveEstimate
    from tasks.prices import Prices
    from tasks.rates import Rates

app = typer.Typer()


@app.command()
def plan(
    source: Input,
    output: Output,
    weights: Weights = "compact",
    rule: Rule = "ttt3r",
    precision: Annotated[Precision, typer.Option(help="Arithmetic.")] = "auto",
    segment_frames: SegmentFrames = None,
    overlap_frames: OverlapFrames = None,
    chunk_frames: ChunkFrames = 32,
    focal_px: FocalPx = None,
    voxel_m: VoxelM = None,
    depth_limit_m: DepthLimitM = None,
    prices: PriceTable = None,
    rates: RatesFile = None,
    device_kind: Annotated[
        str | None,
        typer.Option(
            help="Predict for this device, say cpu or NVIDIA H200 \\[default: most drives']."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a reconstruction with these settings would take yet; computes and writes nothing.

    Hours and bytes are predicted from drives that are finished under OUTPUT.
    """
    from storage.drives import list_drives, require_output
    from tasks.planner import estimate_drives, known_rates
    from tasks.prices import read_prices
    from tasks.probe import may_take_over
    from tasks.rates import read_benchmark
    from ttt3r.state import find_rule
    from ttt3r.weights import weights_info

    config = read_settings(
        weights=weights,
        rule=rule,
        precision=precision,
        segment_frames=segment_frames,
        overlap_frames=overlap_frames,
        chunk_frames=chunk_frames,
        focal_px=focal_px,
        voxel_m=voxel_m,
        depth_limit_m=depth_limit_m,
    )
    require_output(output)
    find_rule(rule)
    if rates:
        read_benchmark(rates, weights_info(weights).segment_frames)
    table = read_prices(prices) if prices else None
    known = known_rates(output, weights, device_kind, rates)
    if device_kind and known is None and (other := known_rates(output, weights, None, rates)):
        raise ValueError(
            f"no drive was inferred on a device {device_kind!r}; most were on {other.device_kind!r}"
        )
    drives = list_drives(source, output, may_take_over)
    estimates = estimate_drives(drives, output, config, known, table)
    (print_plan_json if as_json else print_plan)(estimates, known, table)


def print_plan_json(
    estimates: Sequence[DriveEstimate], rates: Rates | None, prices: Prices | None
) -> None:
    """A plan for programs."""
    from dataclasses import asdict

    from tasks.planner import total

    left, cost = total(estimates)
    print_json(
        {
            "drives": [asdict(estimate) for estimate in estimates],
            "left": None if left is None else asdict(left),
            "cost": cost,
            "currency": None if prices is None else prices.currency,
            "device_kind": None if rates is None else rates.device_kind,
            "predicted_from": [] if rates is None else list(rates.sources),
        }
    )


def print_plan(
    estimates: Sequence[DriveEstimate], rates: Rates | None, prices: Prices | None
) -> None:
    """A plan for people: a line a drive, and the sum."""
    from tasks.planner import total

    usage, cost = total(estimates)
    currency = "" if prices is None else prices.currency
    columns = f"{'drive':<32} {'next':<10} {'frames':>9} {'segments':>8} {'video h':>8}"
    say(f"{columns} {'GPU-h':>9} {'CPU-h':>9} {'GB':>9} {currency:>9}".rstrip())
    for e in estimates:
        hours = f"{e.duration_s / 3600:8.3f}"
        sizes = f"{e.name:<32} {e.stage:<10} {e.frames:>9} {e.segments:>8} {hours}"
        say(f"{sizes} {amounts(e.left, e.cost)}".rstrip())
    frames, segments = sum(e.frames for e in estimates), sum(e.segments for e in estimates)
    hours = f"{sum(e.duration_s for e in estimates) / 3600:8.3f}"
    done = f"{sum(e.stage == 'done' for e in estimates)} done"
    whole = f"{f'all {len(estimates)} drives':<32} {done:<10} {frames:>9} {segments:>8} {hours}"
    say(f"{whole} {amounts(usage, cost)}".rstrip())
    for e in estimates:
        if e.reason:
            say(f"{e.name} is unreadable: {e.reason}")
    if rates is None:
        say("nothing is predicted: no drive is finished under the output with these weights")
    else:
        sources = f"{', '.join(rates.sources[:5])}{', ...' if len(rates.sources) > 5 else ''}"
        say(f"GPU-h are hours of the machine that infers, here {rates.device_kind}")
        say(f"predicted from {len(rates.sources)}: {sources}")


def amounts(usage: Usage | None, cost: float | None) -> str:
    """Hours, gigabytes and money as columns."""
    found = (None,) * 3 if usage is None else (usage.gpu_hours, usage.cpu_hours, _gb(usage))
    cells = [f"{'-':>9}" if value is None else f"{value:>9.3g}" for value in found]
    return " ".join([*cells, f"{'' if cost is None else f'{cost:.3g}':>9}"])


def _gb(usage: Usage) -> float | None:
    return None if usage.stored_bytes is None else usage.stored_bytes / 1e9
