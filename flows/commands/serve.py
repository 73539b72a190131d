"""`ttt3r serve`: both flows as deployments on this machine."""

from __future__ import annotations

import os
import time
from typing import Annotated, Any

import typer

from flows.commands.options import location_option
from flows.commands.printing import say
from storage.wording import on_one_line

SERVER_START_S = 300.0  # the first start of a Prefect server makes its tables

app = typer.Typer()


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
        ValueError: there is no such time, or `output` takes no results.
    """
    from pydantic import ValidationError

    from flows.reconstruct_collection import reconstruct_collection
    from flows.reconstruct_drive import reconstruct_drive
    from storage.drives import require_output

    if output is not None:
        require_output(output)
    given = {"collection": collection, "output": output}
    parameters = {name: seen_from_anywhere(at) for name, at in given.items() if at is not None}
    try:
        nightly = reconstruct_collection.to_deployment("local", cron=cron, parameters=parameters)
        parameters.pop("collection", None)
        by_hand = reconstruct_drive.to_deployment("local", parameters=parameters)
    except ValidationError:
        raise ValueError(
            f"--cron {cron!r} is no time; expected minute, hour, day, month and weekday, as "
            "'0 3 * * *' for 3:00 every day, UTC"
        ) from None
    return [by_hand, nightly]


def seen_from_anywhere(location: str) -> str:
    """A local path made absolute, as runs need not begin in this folder; a URL as it is."""
    return location if "://" in location else os.path.abspath(os.path.expanduser(location))
