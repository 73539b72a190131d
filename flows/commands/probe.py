"""`ttt3r probe`: what a recording holds."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.options import AsJson, location_argument
from flows.commands.printing import print_figures, print_json

app = typer.Typer()


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
