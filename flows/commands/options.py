"""Options and arguments of more than one command; locations are refused with credentials."""

from __future__ import annotations

from typing import Annotated, Any

import typer


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
