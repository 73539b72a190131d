"""Commands on what a reconstruction has stored: look at it, mend it, take things out of it."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Annotated, Literal

import typer

from flows.commands.options import AsJson, StoreUrl, location_argument, location_option
from flows.commands.printing import WORK_ERROR, fail, print_figures, print_json, say

app = typer.Typer()
TrajectoryFormat = Literal["tum", "kitti"]
ExportFormat = Literal["tum", "kitti", "ply", "glb"]


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
    from storage import upkeep
    from storage.errors import StoreError
    from storage.reconstruction import ReconstructionStore
    from tasks.summary import has_lost_commits, summarise

    store = ReconstructionStore.open(url)
    damaged = upkeep.verify(store) if verify else None
    # Figures may be among what is damaged, which is said below.
    with suppress(StoreError) if damaged else nullcontext():
        if as_json:
            print_json({**upkeep.describe(store), "figures": summarise(store), "damaged": damaged})
        else:
            print_figures(summarise(store))
    if damaged == [] and has_lost_commits(store):
        fail(
            "finished once, but commits are missing since: run `ttt3r reconstruct` again; what "
            "is committed is undamaged",
            WORK_ERROR,
        )
    if damaged == []:
        say("all that is committed is there and undamaged", err=True)
    if damaged:
        names = ", ".join(damaged)
        fail(f"{len(damaged)} damaged: {names}; run `ttt3r repair {url}`", WORK_ERROR)


@app.command()
def repair(url: StoreUrl) -> None:
    """Declare damaged data unfinished; the next `ttt3r reconstruct` computes it again."""
    from storage import upkeep
    from storage.reconstruction import ReconstructionStore
    from tasks.keys import FINISHED

    if upkeep.restore_root(url):
        say("zarr.json is made anew: the next run probes and plans the drive again", err=True)
    store = ReconstructionStore.open(url)
    dropped = upkeep.repair(store)
    if dropped:
        store.drop_commits(FINISHED)  # what is missing from now on is not lost
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
    from storage import upkeep
    from storage.reconstruction import ReconstructionStore

    act = upkeep.delete_garbage if delete else upkeep.list_garbage
    found = act(ReconstructionStore.open(url), older_than_hours * 3600)
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
    from tasks.export import describe_part, export_store

    say(export_store(url, format, to, part))
    if words := describe_part(url, format, part):
        say(words, err=True)


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
    time_offset: Annotated[
        float,
        typer.Option(help="tum: what the file's clock shows at the first frame, seconds."),
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Compare a drive's trajectory, and depth, with ground truth."""
    from tasks.evaluate import evaluate_store

    figures = evaluate_store(url, ground_truth, format, depth, time_offset)
    if as_json:
        print_json(figures)
    else:
        print_figures(figures)
