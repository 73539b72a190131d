"""The command line `ttt3r`."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from typer.exceptions import TyperException

from storage.wording import on_one_line, reason_of, shown, use_plain_records

if TYPE_CHECKING:
    from storage.video import DriveLocation
    from tasks.config import BudgetConfig, ReconstructionConfig
    from tasks.ledger import Usage
    from tasks.planner import DriveEstimate
    from tasks.prices import Prices
    from tasks.rates import Rates

T = TypeVar("T")
Precision = Literal["auto", "float32", "bfloat16"]

# Commands import what they need when they run: torch, Open3D and Prefect take seconds.
app = typer.Typer(
    name="ttt3r",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Turn long videos, above all drive logs, into camera poses, depth and a mesh.

    Start with [bold]ttt3r demo[/bold], then [bold]ttt3r reconstruct VIDEO --output DIR[/bold].
    Locations are local paths or URLs (s3://bucket/folder). Poses are camera-to-world, axes
    right-down-forward; metres are the network's estimate.
    """,
)
weights_app = typer.Typer(no_args_is_help=True, help="List, fetch, show and import weights.")
app.add_typer(weights_app, name="weights")

USER_ERROR, WORK_ERROR, INCOMPLETE = 2, 1, 3
INTERRUPTED, STOPPED = 128 + signal.SIGINT, 128 + signal.SIGTERM
SERVER_START_S = 300.0  # the first start of a Prefect server makes its tables


def without_credentials(location: str | None) -> str | None:
    """A location that may be repeated in messages, records and databases.

    Raises:
        ValueError: it holds credentials, which the message does not repeat.
    """
    from storage.credentials import refuse_credentials

    return location and refuse_credentials(location)


def location_option(help: str, *names: str) -> Any:
    """An option that takes a location; one with credentials is refused."""
    return typer.Option(*names, help=help, callback=without_credentials)


def location_argument(help: str, metavar: str | None = None) -> Any:
    """An argument that takes a location; one with credentials is refused."""
    return typer.Argument(help=help, metavar=metavar, callback=without_credentials)


StoreUrl = Annotated[str, location_argument("A drive's reconstruction: DIR/NAME.zarr or a URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Weights = Annotated[
    str, location_option("Name, path or URL of the weights (`ttt3r weights list`).")
]
Input = Annotated[str, location_argument("A drive, or a folder or glob of drives.", "INPUT")]
Output = Annotated[str, location_option("Folder or URL that takes <drive>.zarr.")]
Rule = Annotated[str, typer.Option(help="Update rule of the state.")]
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


class ExportFormat(StrEnum):
    """What `export` writes."""

    tum = "tum"
    kitti = "kitti"
    ply = "ply"
    glb = "glb"


class TrajectoryFormat(StrEnum):
    """What ground truth comes in."""

    tum = "tum"
    kitti = "kitti"


class Terminated(BaseException):
    """SIGTERM came; Prefect has seen it and left its traces."""


def terminate(number: int, frame: Any) -> None:
    """What SIGTERM does outside of a flow, and after a flow has ended because of it."""
    raise Terminated


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    quiet_prefect()
    use_plain_records()
    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # the terminal is closed; not under nohup
        signal.signal(signal.SIGHUP, terminate)
    try:
        code = app(standalone_mode=False)  # what exits is returned: 0 after --help
        if code == INTERRUPTED:
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted; run the same command again to go on where it stopped", INTERRUPTED)
    except Terminated:
        fail(
            "stopped by SIGTERM; what was computed is kept, run the same command again to go on "
            "where it stopped",
            STOPPED,
        )
    except TyperException as error:
        if said := error.format_message():  # nothing where the help was asked for by no argument
            fail(said.replace("Value error, ", ""), USER_ERROR)
        sys.exit(USER_ERROR)
    except Exception as error:
        if os.environ.get("TTT3R_TRACEBACK"):
            raise
        fail(one_line(error), USER_ERROR if is_users_mistake(error) else WORK_ERROR)
    sys.exit(0)


def is_users_mistake(error: Exception) -> bool:
    """Whether the call was wrong, rather than the work it asked for."""
    from storage.errors import NotAStore, StoreMissing, StoreRefused, StoreTooNew

    mistakes = (ValueError, FileNotFoundError, NotAStore, StoreMissing, StoreRefused, StoreTooNew)
    return isinstance(error, mistakes)


def say(*lines: str, fg: str | None = None, err: bool = False) -> None:
    """Print lines; whoever wrote what is in them, they cannot steer the terminal."""
    typer.secho("\n".join(map(shown, lines)), fg=fg, err=err)


def fail(message: str, code: int) -> None:
    """Print one line on stderr and exit."""
    say(f"ttt3r: {message}", fg="red", err=True)
    sys.exit(code)


def one_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    from storage.errors import StoreError

    text = on_one_line(str(error))
    known = isinstance(error, ValueError | OSError | RuntimeError | StoreError)
    return text if text and known else reason_of(error)


def prefect_cache() -> Path:
    """Home of Prefect where the user has none."""
    return Path.home() / ".cache" / "ttt3r" / "prefect"


def quiet_prefect() -> None:
    """Keep Prefect's home in the cache directory and its log off the terminal.

    Whoever has set up Prefect already, keeps his server, profile and logging.
    """
    home = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect"))
    if not home.exists():
        os.environ.setdefault("PREFECT_HOME", str(prefect_cache()))
        with suppress(OSError):  # Prefect says what is wrong when it is needed
            Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    # The first start of its own server sets up a database: slow on a busy machine.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "300")


def nobody_watches() -> bool:
    """Whether runs are on a server of our own, in our home: it has no automations."""
    set_up = ("API_URL", "API_DATABASE_CONNECTION_URL", "FLOWS_HEARTBEAT_FREQUENCY")
    is_ours = os.environ.get("PREFECT_HOME") == str(prefect_cache())
    return is_ours and not any(f"PREFECT_{name}" in os.environ for name in set_up)


def print_json(data: Any) -> None:
    """Print JSON, two spaces deep."""
    typer.echo(json.dumps(data, indent=2))


def print_figures(figures: dict[str, Any]) -> None:
    """Print one figure a line."""
    width = max(map(len, figures), default=0)
    for name, value in figures.items():
        figure = f"{value:.6g}" if isinstance(value, float) else "-" if value is None else value
        say(f"{name:<{width}}  {figure}")


def print_version(wanted: bool) -> None:
    """Print the version and end, if wanted."""
    if wanted:
        say(f"ttt3r {importlib.metadata.version('ttt3r-pipeline')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version)
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def probe(
    video: Annotated[
        str,
        location_argument("Video, folder of clips or folder of images."),
    ],
    as_json: AsJson = False,
) -> None:
    """Say what a recording really holds, by decoding all of it."""
    from tasks.probe import probe_until_stopped

    record, _ = probe_until_stopped(video)
    figures = {
        "frames": record.frames,
        "width": record.width,
        "height": record.height,
        "fps": record.fps,
        "duration_s": record.duration_s,
        "codec": record.codec,
        "rotation": record.rotation,
        "problems": list(record.problems),
    }
    if as_json:
        details = {
            "cuts": list(record.cuts),
            "clips": [clip.__dict__ for clip in record.clips],
            "unreadable": [frame.__dict__ for frame in record.unreadable],
        }
        print_json({**figures, **details})
        return
    print_figures({**figures, "problems": "; ".join(record.problems) or "none"})


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
    run_reconstruction(source, output, config, budget)


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
        typer.Option(help="Predict for this device, as ledgers name it \\[default: most drives']."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a reconstruction with these settings would take yet; computes and writes nothing.

    Hours and bytes are predicted from drives that are finished under OUTPUT.
    """
    from storage.video import list_drives
    from tasks.planner import estimate_drives, known_rates
    from tasks.prices import read_prices
    from tasks.probe import may_take_over

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
    table = read_prices(prices) if prices else None
    known = known_rates(output, weights, device_kind, rates)
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


def run_reconstruction(
    source: str, output: str, config: ReconstructionConfig, budget: BudgetConfig
) -> None:
    """Run the flow that fits the input, show its progress, print what came out."""
    from flows.prefect_home import shelter_server, unwatched, use_home
    from flows.progress import progress_of
    from flows.reconstruct_drive import check_config
    from storage.drives import store_url
    from storage.video import is_collection, list_drives
    from tasks.prices import read_prices
    from tasks.probe import may_take_over
    from tasks.retries import retried

    refuse_store(output)
    if budget.prices:
        read_prices(budget.prices)
    if os.environ.get("PREFECT_HOME") == str(prefect_cache()):
        use_home(prefect_cache())
    shelter_server()
    check_config(config)
    drives = retried(list_drives)(source, output, may_take_over)
    progress = progress_of([store_url(output, drive.name) for drive in drives])
    with progress, unwatched() if nobody_watches() else nullcontext():
        if is_collection(source):
            outcomes = run_collection(source, output, config, budget)
        else:
            outcomes = [run_drive(drives[0], output, config, budget)]
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


def refuse_store(output: str) -> None:
    """ValueError where an output is a drive's reconstruction, which would hold another one."""
    from storage.errors import StoreError
    from storage.reconstruction import ReconstructionStore

    with suppress(StoreError):
        ReconstructionStore.attributes_at(output)
        raise ValueError(
            f"--output {output} is a reconstruction itself; give the folder that holds it"
        )


def run_drive(
    drive: DriveLocation, output: str, config: ReconstructionConfig, budget: BudgetConfig
) -> dict[str, Any]:
    """Reconstruct one drive; its failure is in what is returned, not raised."""
    from flows.reconstruct_collection import outcome_of, record_of
    from flows.reconstruct_drive import reconstruct_drive
    from tasks.budget import within_budget
    from tasks.infer import device_kind, resolve_device
    from tasks.probe import AnotherDrive

    kind = device_kind(resolve_device(config.infer))
    if within_budget([drive], output, config, budget, kind)[1]:
        return record_of(drive, output, is_left=True)
    try:
        reconstruct_drive(drive.location, output, config, drive.name, prices=budget.prices)
        return outcome_of(drive, output, None)
    except AnotherDrive:
        raise
    except Exception as failure:
        if os.environ.get("TTT3R_TRACEBACK"):
            raise
        return outcome_of(drive, output, one_line(failure))


def run_collection(
    source: str, output: str, config: ReconstructionConfig, budget: BudgetConfig
) -> list[dict[str, Any]]:
    """Reconstruct a collection; failed drives are in what is returned, not raised."""
    from flows.reconstruct_collection import CollectionIncomplete, reconstruct_collection

    try:
        return reconstruct_collection(source, output, config, budget=budget)
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


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Folder that takes the result.")] = "out/demo",
) -> None:
    """Reconstruct the bundled sample drive and compare it with its ground truth."""
    from storage.drives import store_url
    from tasks.config import BudgetConfig, ReconstructionConfig
    from tasks.evaluate import evaluate_store

    sample = Path(__file__).parent / "samples" / "street.mp4"
    run_reconstruction(str(sample), output, ReconstructionConfig(), BudgetConfig())
    truth = sample.with_name("street_groundtruth_tum.txt")
    figures = evaluate_store(store_url(output, "street"), str(truth), "tum")
    say("", "against the sample's ground truth:")
    print_figures(figures)


@app.command()
def status(
    output: Annotated[
        str,
        location_argument("A reconstruction, or a folder or URL of them."),
    ],
    as_json: AsJson = False,
) -> None:
    """Say how far every drive under OUTPUT is."""
    from tasks import summary

    rows = summary.status(output)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        done = f"{row['chunks_done']}/{row['chunks']} chunks"
        aside = f"segments set aside: {row['set_aside']} " if row["set_aside"] else ""
        say(f"{row['drive']:<32} {row['stage']:<10} {done:<18} {aside}{row['error'] or ''}")


@app.command()
def inspect(
    url: StoreUrl,
    as_json: AsJson = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read back all that is committed, check digests."),
    ] = False,
) -> None:
    """Say what is stored, what is finished and how good it is."""
    from storage.reconstruction import ReconstructionStore
    from tasks.summary import summarise

    store = ReconstructionStore.open(url)
    damaged = store.verify() if verify else None
    if as_json:
        print_json({**store.describe(), "figures": summarise(store), "damaged": damaged})
    else:
        print_figures(summarise(store))
    if damaged:
        names = ", ".join(damaged)
        fail(f"{len(damaged)} damaged: {names}; run `ttt3r repair {url}`", WORK_ERROR)


@app.command()
def repair(url: StoreUrl) -> None:
    """Declare damaged data unfinished; the next `ttt3r reconstruct` computes it again."""
    from storage.reconstruction import ReconstructionStore

    dropped = ReconstructionStore.open(url).repair()
    for name in dropped:
        say(name)
    say(f"{len(dropped)} damaged commits and segments dropped", err=True)


@app.command()
def gc(
    url: StoreUrl,
    delete: Annotated[bool, typer.Option("--delete", help="Remove what is listed.")] = False,
    older_than_hours: Annotated[
        float, typer.Option(min=0, help="Leave alone what was written later.")
    ] = 24.0,
) -> None:
    """List, and with --delete remove, what no commit refers to: what killed runs left behind.

    With --delete nothing is removed while any run is at work on the drive.
    """
    from storage.reconstruction import ReconstructionStore

    store = ReconstructionStore.open(url)
    act = store.delete_garbage if delete else store.garbage
    found = act(older_than_hours * 3600)
    for name, size in found.items():
        say(f"{size:>12}  {name}")
    done = "removed" if delete else "can be removed (--delete)"
    say(f"{len(found)} objects, {sum(found.values()):,} bytes {done}", err=True)


@app.command()
def export(
    url: StoreUrl,
    format: Annotated[ExportFormat, typer.Option(help="What to write.")],
    to: Annotated[
        str | None,
        location_option("File or URL to write \\[default: <drive>.<ending> here]."),
    ] = None,
    part: Annotated[
        int | None, typer.Option(help="Trajectory part \\[default: the longest].")
    ] = None,
) -> None:
    """Write the trajectory (tum, kitti) or the mesh (ply, glb) to a file."""
    from tasks.export import export_store

    say(export_store(url, format.value, to, part))


@app.command()
def report(
    url: StoreUrl,
    recording: Annotated[
        str | None,
        location_option("Location of the drive, to show its frames."),
    ] = None,
) -> None:
    """Write the report of a drive that no run is at work on anew and print where it is.

    Without --recording no file is opened that the store names: whoever wrote it could name any.
    """
    from storage.reconstruction import ReconstructionStore
    from tasks.report import NO_FRAMES, report_stage

    store = ReconstructionStore.open(url)
    with store.claim("drive"):
        report_stage.fn(url, recording, anew=True)
    if recording is None:
        say(NO_FRAMES, err=True)
    say(store.file_url("report/report.html"))


@app.command()
def evaluate(
    url: StoreUrl,
    ground_truth: Annotated[
        str,
        location_option("Trajectory file, camera-to-world."),
    ],
    format: Annotated[TrajectoryFormat, typer.Option(help="Format of the file.")],
    depth: Annotated[
        str | None,
        location_option("Folder of 16-bit PNG depth, named by frame, millimetres."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a drive's trajectory, and depth, with ground truth."""
    from tasks.evaluate import evaluate_store

    figures = evaluate_store(url, ground_truth, format.value, depth)
    if as_json:
        print_json(figures)
    else:
        print_figures(figures)


@app.command()
def verify(
    golden: Annotated[Path, typer.Option(help="Folder of sequence files (*.npz).")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Check the network against recorded outputs of the reference implementation."""
    from ttt3r.parity import verify_folder

    rows = verify_folder(golden, device)
    for row in rows:
        mark = "ok  " if row.ok else "FAIL"
        say(f"{mark} {row.file:<32} {row.array:<20} L2 {row.worst_l2:.2e}  max {row.worst_max:.2e}")
    wrong = [row for row in rows if not row.ok]
    if wrong:
        fail(f"{len(wrong)} of {len(rows)} arrays are beyond the limits", WORK_ERROR)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(context: typer.Context) -> None:
    """Train the compact network on rendered worlds (see `ttt3r train --help`)."""
    importlib.import_module("ttt3r.training.command").main(context.args)


@app.command()
def serve(
    collection: Annotated[
        str | None,
        location_option("Folder, URL or glob of drives, where a run names none."),
    ] = None,
    output: Annotated[
        str | None,
        location_option("Folder or URL that takes results, where a run names none."),
    ] = None,
    cron: Annotated[
        str | None,
        typer.Option(help="Reconstruct COLLECTION at these times, UTC: '0 3 * * *' is 3:00 daily."),
    ] = None,
) -> None:
    """Offer both flows as deployments on this machine, until interrupted.

    Needs a server (`prefect server start`). Then, from anywhere:
    prefect deployment run 'reconstruct-drive/local' --param location=... --param output=...
    """
    if cron is not None and (collection is None or output is None):
        raise ValueError("--cron needs --collection and --output: its runs have no other")
    os.environ.setdefault("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    os.environ["PREFECT_LOGGING_LEVEL"] = "INFO"  # runs log to the server
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "flows,tasks,storage,ttt3r")
    # Automations that are made as docs/fleet.md says take a run for lost after 100 s without one.
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    from prefect import serve as serve_deployments

    deployments = local_deployments(collection, output, cron)
    await_server(os.environ["PREFECT_API_URL"])
    serve_deployments(*deployments)


def await_server(url: str) -> None:
    """Wait until the Prefect server answers, which it does some time after it names its address.

    Raises:
        RuntimeError: it does not for `SERVER_START_S`.
    """
    from prefect.client.orchestration import get_client

    deadline = time.monotonic() + SERVER_START_S
    with get_client(sync_client=True) as client:
        if client.api_healthcheck() is None:
            return
        say(f"waiting for the Prefect server at {url}", err=True)
        while error := client.api_healthcheck():
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"no Prefect server answers at {url} ({on_one_line(str(error))}); run `prefect "
                    "server start`, or set PREFECT_API_URL to that of yours, with /api at its end"
                )
            time.sleep(2)


def local_deployments(collection: str | None, output: str | None, cron: str | None) -> list[Any]:
    """Both flows as `serve` offers them.

    Raises:
        ValueError: there is no such time.
    """
    from pydantic import ValidationError

    from flows.reconstruct_collection import reconstruct_collection
    from flows.reconstruct_drive import reconstruct_drive

    given = {"collection": collection, "output": output}
    parameters = {name: seen_from_anywhere(at) for name, at in given.items() if at is not None}
    try:
        nightly = reconstruct_collection.to_deployment("local", cron=cron, parameters=parameters)
    except ValidationError:
        raise ValueError(
            f"--cron {cron!r} is no time; expected minute, hour, day, month and weekday, as "
            "'0 3 * * *' for 3:00 every day, UTC"
        ) from None
    return [reconstruct_drive.to_deployment("local"), nightly]


def seen_from_anywhere(location: str) -> str:
    """A local path made absolute, as runs need not begin in this folder; a URL as it is."""
    return location if "://" in location else os.path.abspath(os.path.expanduser(location))


@weights_app.command("list")
def weights_list(as_json: AsJson = False) -> None:
    """List weights that are bundled, cached or can be fetched."""
    from ttt3r.weights import list_weights

    entries = list_weights()
    if as_json:
        print_json([{**e.__dict__, "path": e.path and str(e.path)} for e in entries])
        return
    for e in entries:
        size = f"{e.size_bytes / 1e6:.1f} MB" if e.size_bytes else "-"
        say(f"{e.name:<20} {e.where:<10} {size:>11}  {e.licence}  {e.notes}")


@weights_app.command("show")
def weights_show(weights: Annotated[str, typer.Argument(help="Name, path or URL.")]) -> None:
    """Show what is recorded of weights: configuration, hash, licence."""
    from ttt3r.weights import weights_info

    print_json(weights_info(weights).to_json())


@weights_app.command("fetch")
def weights_fetch(
    source: Annotated[str, typer.Argument(help="A name of the list, a URL or hub:ORG/REPO/FILE.")],
    sha256: Annotated[str | None, typer.Option(help="Expected SHA-256 of the file.")] = None,
) -> None:
    """Download weights into the cache; a broken download goes on where it stopped."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    from ttt3r.weights import KNOWN_WEIGHTS, fetch

    if source in KNOWN_WEIGHTS:
        say(f"licence of {source}: {KNOWN_WEIGHTS[source].licence}", err=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(source, total=None)
        path = fetch(
            source,
            expected_sha256=sha256,
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    say(str(path))


@weights_app.command("import")
def weights_import(
    checkpoint: Annotated[Path, typer.Argument(help="A released checkpoint (*.pth).")],
    to: Annotated[
        Path | None, typer.Option(help="File to write \\[default: beside it, .safetensors].")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name to record \\[default: the file's].")
    ] = None,
    licence: Annotated[str, typer.Option(help="Licence to record.")] = "CC BY-NC-SA 4.0",
    image_size: Annotated[
        int | None, typer.Option(help="Long side, pixels \\[default: by the head, 512 or 224].")
    ] = None,
    heads: Annotated[
        tuple[int, int, int],
        typer.Option(help="Attention heads of encoder, decoder and state decoder."),
    ] = (16, 12, 16),
) -> None:
    """Turn a released checkpoint into safetensors, running nothing that is in it."""
    from ttt3r.weights import import_checkpoint

    target = to or checkpoint.with_suffix(".safetensors")
    info = import_checkpoint(
        checkpoint,
        target,
        name=name,
        licence=licence,
        image_size=image_size,
        enc_num_heads=heads[0],
        dec_num_heads=heads[1],
        state_dec_num_heads=heads[2],
    )
    say(str(target), info.licence, info.identity)


@weights_app.command("verify")
def weights_verify(weights: Annotated[Path, typer.Argument(help="A .safetensors file.")]) -> None:
    """Hash the tensors of a file again and compare with what is recorded in it."""
    if not weights.is_file():
        raise ValueError(f"there is no weights file {weights}")
    from ttt3r.weights import verify_weights

    say(f"{weights}: {verify_weights(weights).sha256}, as recorded")


if __name__ == "__main__":
    main()
