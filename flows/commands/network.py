"""Commands on the network itself: `ttt3r verify` and `ttt3r train`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.printing import WORK_ERROR, fail, say

app = typer.Typer()


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
