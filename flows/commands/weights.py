"""`ttt3r weights ...`: those that there are, and those that others have released."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import AsJson
from flows.commands.printing import print_json, say

app = typer.Typer(
    name="weights", no_args_is_help=True, help="List, fetch, show and import weights."
)


@app.command("list")
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


@app.command("show")
def weights_show(weights: Annotated[str, typer.Argument(help="Name, path or URL.")]) -> None:
    """Show what is recorded of weights: configuration, hash, licence."""
    from ttt3r.weights import weights_info

    print_json(weights_info(weights).to_json())


@app.command("fetch")
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


@app.command("import")
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


@app.command("verify")
def weights_verify(weights: Annotated[Path, typer.Argument(help="A .safetensors file.")]) -> None:
    """Hash the tensors of a file again and compare with what is recorded in it."""
    if not weights.is_file():
        raise ValueError(f"there is no weights file {weights}")
    from ttt3r.weights import verify_weights

    say(f"{weights}: {verify_weights(weights).sha256}, as recorded")
