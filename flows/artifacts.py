"""What the Prefect UI shows of a run: tables and pictures."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import (
    create_image_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from storage.reconstruction import ReconstructionStore
from tasks.summary import summarise


def artifact_key(*words: str) -> str:
    """Words as an artifact key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")


@contextmanager
def progress_bar(what: str, steps: int) -> Iterator[Callable[[], None]]:
    """A progress bar in the UI while the block runs; it is given what moves the bar by a step."""
    done = 0
    bar = cast(UUID, create_progress_artifact(progress=0.0, description=what))

    def advance() -> None:
        nonlocal done
        done += 1
        update_progress_artifact(artifact_id=bar, progress=100.0 * done / steps)

    yield advance


def publish_drive(url: str) -> None:
    """Publish a drive's figures as a table, and its trajectory and depth as pictures."""
    store = ReconstructionStore.open(url)
    summary = summarise(store)
    drive = str(store.attributes["drive"]["name"])
    create_table_artifact(
        key=artifact_key("drive", drive),
        table=[{"figure": name, "value": str(value)} for name, value in summary.items()],
        description=f"Reconstruction of {drive} at {url}",
    )
    for picture in store.list_files("report/"):
        if picture.endswith(".png"):
            data = base64.b64encode(store.get_file(picture)).decode()
            create_image_artifact(
                key=artifact_key("picture", drive, picture.rsplit("/", 1)[-1].removesuffix(".png")),
                image_url=f"data:image/png;base64,{data}",
                description=f"{picture} of {drive}",
            )


def publish_ledger(ledger: dict[str, Any]) -> None:
    """Publish what a drive took beside what was predicted, as a table."""
    predicted = ledger["predicted"] or {}
    rows = [
        {
            "resource": name,
            "used": used,
            "predicted": predicted.get(name),
            "per video-hour": (ledger["used_per_video_hour"] or {}).get(name),
            "per km, estimated": (ledger["used_per_km_estimated"] or {}).get(name),
        }
        for name, used in ledger["used"].items()
    ]
    if "cost" in ledger:
        per = ("cost_per_video_hour", "cost_per_km_estimated")
        cost = [ledger["cost"], ledger["cost_predicted"], *(ledger[name] for name in per)]
        rows.append(dict(zip(rows[0], [f"cost, {ledger['currency']}", *cost], strict=True)))
    devices = ", ".join(ledger["devices"])
    create_table_artifact(
        key=artifact_key("ledger", ledger["drive"]),
        table=rows,
        description=f"What {ledger['drive']} took on {devices}; kilometres are the network's "
        "estimate",
    )


def publish_collection(outcomes: list[dict[str, Any]]) -> None:
    """Publish what became of every drive as a table."""
    create_table_artifact(
        key="collection", table=outcomes, description="Drives of the collection and their results"
    )
