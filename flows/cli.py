"""The command line `ttt3r`: its commands put together, and how it ends."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from flows.commands import demo, network, plan, probe, reconstruct, results, serve, weights
from flows.commands.printing import (
    INTERRUPTED,
    STOPPED,
    USER_ERROR,
    WORK_ERROR,
    fail,
    one_line,
    say,
)
from flows.prefect_home import quiet_prefect
from storage.wording import use_plain_records

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
for module in (probe, reconstruct, plan, demo, results, network, serve, weights):
    app.add_typer(module.app)  # in the order of the help


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
            hint = "; quote a glob: 'LOGS/*.mp4'" if "unexpected extra arg" in said else ""
            fail(said.replace("Value error, ", "") + hint, USER_ERROR)
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


if __name__ == "__main__":
    main()
