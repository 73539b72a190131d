"""What commands print, and the exit codes that they end with."""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

import typer

from storage.wording import on_one_line, reason_of, shown

USER_ERROR, WORK_ERROR, INCOMPLETE = 2, 1, 3
INTERRUPTED, STOPPED = 128 + signal.SIGINT, 128 + signal.SIGTERM


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


def print_json(data: Any) -> None:
    """Print JSON, two spaces deep."""
    typer.echo(json.dumps(data, indent=2))


def print_figures(figures: dict[str, Any]) -> None:
    """Print one figure a line."""
    width = max(map(len, figures), default=0)
    for name, value in figures.items():
        figure = f"{value:.6g}" if isinstance(value, float) else "-" if value is None else value
        say(f"{name:<{width}}  {figure}")
