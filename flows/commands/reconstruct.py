"""`ttt3r reconstruct`: run the flow that fits the input and say what came out."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.printing import INCOMPLETE, WORK_ERROR, fail, one_line, say
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
    checked,
    read_settings,
)
from flows.prefect_home import nobody_watches, prefect_cache, shelter_server, unwatched, use_home

if TYPE_CHECKING:
    from storage.drives import DriveLocation
    from tasks.config import BudgetConfig, ReconstructionConfig

app = typer.Typer()


@app.command()
def reconstruct(
    source: Input,
    output: Output,
    weights: Weights = "compact",
    rule: Rule = "ttt3r",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[Precision, typer.Option(help="Arithmetic.")] = "auto",
    lanes: Annotated[
        int | None, typer.Option(min=1, help="Segments in lock step \\[default: as memory allows].")
    ] = None,
    segment_frames: SegmentFrames = None,
    overlap_frames: OverlapFrames = None,
    chunk_frames: ChunkFrames = 32,
    focal_px: FocalPx = None,
    voxel_m: VoxelM = None,
    depth_limit_m: DepthLimitM = None,
    max_gpu_hours: Annotated[
        float | None, typer.Option(min=0, help="Refuse a run predicted to infer for longer.")
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option(min=0, help="Refuse a run whose work is predicted to cost more.")
    ] = None,
    take_what_fits: Annotated[
        bool,
        typer.Option(
            "--take-what-fits", help="Over a limit: run the drives that fit, leave the others."
        ),
    ] = False,
    prices: PriceTable = None,
    rates: RatesFile = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes of this machine that share a drive's work.")
    ] = 1,
) -> None:
    """Turn a drive, or a collection of drives, into poses, depth, a mesh and a report.

    A second run does only what is not finished. Exit code 1: some drive failed; 3: all drives
    are finished, some without segments that could not be computed, which the next run tries
    again, or drives were left because of the budget; 143: stopped by SIGTERM, run again to go on.
    """
    from tasks.config import BudgetConfig

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
        device=device,
        lanes=lanes,
    )
    budget = checked(
        lambda: BudgetConfig(
            max_gpu_hours=max_gpu_hours,
            max_cost=max_cost,
            prices=prices,
            rates=rates,
            when_over="take_what_fits" if take_what_fits else "refuse",
        )
    )
    run_reconstruction(source, output, config, budget, processes)


def run_reconstruction(
    source: str,
    output: str,
    config: ReconstructionConfig,
    budget: BudgetConfig,
    processes: int = 1,
) -> None:
    """Run the flow that fits the input, show its progress, print what came out."""
    if os.environ.get("PREFECT_HOME") == str(prefect_cache()):
        use_home(prefect_cache())
    from flows.progress import progress_of
    from flows.reconstruct_drive import check_config
    from storage.drives import is_collection, list_drives, require_output, store_url
    from tasks.prices import read_prices
    from tasks.probe import may_take_over
    from tasks.retries import retried

    require_output(output)
    if budget.prices:
        read_prices(budget.prices)
    shelter_server()
    check_config(config)
    drives = retried(list_drives)(source, output, may_take_over)
    progress = progress_of([store_url(output, drive.name) for drive in drives])
    with progress, unwatched() if nobody_watches() else nullcontext():
        if is_collection(source):
            outcomes = run_collection(source, output, config, budget, processes)
        else:
            outcomes = [run_drive(drives[0], output, config, budget, processes)]
    if len(outcomes) == 1 and outcomes[0]["error"]:
        fail(outcomes[0]["error"], WORK_ERROR)
    for outcome in outcomes:
        print_result(outcome)
    failed = sum(outcome["error"] is not None for outcome in outcomes)
    if failed:
        fail(f"{failed} of {len(outcomes)} drives failed", WORK_ERROR)
    aside = sum(len(outcome["set_aside"]) for outcome in outcomes)
    if aside:
        fail(f"{aside} segments were set aside (see the warnings); run again to retry", INCOMPLETE)
    left = sum(outcome["left"] for outcome in outcomes)
    if left:
        fail(f"{left} of {len(outcomes)} drives are left for the next run", INCOMPLETE)


def run_drive(
    drive: DriveLocation,
    output: str,
    config: ReconstructionConfig,
    budget: BudgetConfig,
    processes: int,
) -> dict[str, Any]:
    """Reconstruct one drive; its failure is in what is returned, not raised."""
    from flows.reconstruct_collection import outcome_of, record_of
    from flows.reconstruct_drive import reconstruct_drive
    from tasks.align import ImpossibleFocal
    from tasks.budget import within_budget
    from tasks.infer import device_kind, resolve_device
    from tasks.probe import AnotherDrive

    kind = device_kind(resolve_device(config.infer))
    if within_budget([drive], output, config, budget, kind)[1]:
        return record_of(drive, output, is_left=True)
    try:
        given = (drive.location, output, config, drive.name)
        reconstruct_drive(*given, prices=budget.prices, processes=processes)
        return outcome_of(drive, output, None)
    except (AnotherDrive, ImpossibleFocal):
        raise
    except Exception as failure:
        if os.environ.get("TTT3R_TRACEBACK"):
            raise
        return outcome_of(drive, output, one_line(failure))


def run_collection(
    source: str,
    output: str,
    config: ReconstructionConfig,
    budget: BudgetConfig,
    processes: int,
) -> list[dict[str, Any]]:
    """Reconstruct a collection; failed drives are in what is returned, not raised."""
    from flows.reconstruct_collection import CollectionIncomplete, reconstruct_collection

    try:
        return reconstruct_collection(source, output, config, budget=budget, processes=processes)
    except CollectionIncomplete as error:
        return error.outcomes


def print_result(outcome: dict[str, Any]) -> None:
    """Where a drive's mesh and report are, or why there are none."""
    from storage.reconstruction import ReconstructionStore

    if outcome["error"]:
        say(outcome["url"], f"  failed: {outcome['error']}", fg="red")
        return
    if outcome["left"]:
        say(outcome["url"], "  left for the next run: over the budget", fg="yellow")
        return
    store = ReconstructionStore.open(outcome["url"])
    say(outcome["url"])
    for warning in (store.read_commit("report") or {}).get("warnings", []):
        say(f"  warning: {warning}", fg="yellow")
    for label, name in (
        ("mesh", "fusion/mesh.ply"),
        ("preview", "fusion/preview.glb"),
        ("report", "report/report.html"),
    ):
        if store.list_files(name):
            say(f"  {label:<8}{store.file_url(name)}")
    others = len((store.read_commit("fuse/merged") or {}).get("meshes", ())) - 1
    if others > 0:
        say(f"  others  {store.file_url('fusion/part*/mesh.ply')} (shorter parts: {others})")
