"""What a store says of its drive, its plan, and what the drive goes on without.

Of the store alone, so that commands which only look need neither torch nor Prefect.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.reconstruction import ReconstructionStore
from storage.records import NOWHERE, DriveRecord, FrameTable, Plan
from tasks.keys import require_key

ASIDE = "aside"  # commits "aside/0003": why the drive goes on without a segment


def read_plan(store: ReconstructionStore) -> Plan:
    """The plan in a store."""
    return Plan.from_json(store.attributes["plan"])


def read_record(store: ReconstructionStore) -> DriveRecord:
    """What the probe found of the drive."""
    return DriveRecord.from_json(store.attributes["drive"])


def frame_numbers(store: ReconstructionStore) -> NDArray[np.int64]:
    """[N] place of every frame of the drive in its recording (`FrameTable.numbers`)."""
    return FrameTable.from_arrays(store.read_frames()).numbers(read_record(store))


def read_placed_plan(store: ReconstructionStore) -> Plan:
    """The plan of the trajectory: segments that it does without are in no part.

    Raises:
        ValueError: the drive is not aligned.
    """
    require_key(store, "align")
    align = store.read_commit("align") or {}
    return read_plan(store).without(align.get("missing", ()))


def read_aside(store: ReconstructionStore) -> dict[int, dict[str, Any]]:
    """Why segments are set aside, by their index; other names are none of ours."""
    records = store.commits(ASIDE)
    return {index: records[name] for name, index in _aside_in(records).items()}


def list_aside(store: ReconstructionStore) -> list[int]:
    """Segments that are set aside, from a listing: no record is read."""
    return sorted(_aside_in(store.commit_names(ASIDE)).values())


def _aside_in(names: Iterable[str]) -> dict[str, int]:
    """Indices of the segments that commits set aside, by the commits' names."""
    found = {name: re.fullmatch(f"{ASIDE}/([0-9]{{4,9}})", name) for name in names}
    return {name: int(match[1]) for name, match in found.items() if match}


def aside_commit(index: int) -> str:
    """Name of the commit that sets a segment aside."""
    return f"{ASIDE}/{index:04d}"


def longest_part(part: NDArray[np.int32]) -> int:
    """The trajectory part with the most frames; `part` [N] of each frame, NOWHERE for none."""
    return int(np.bincount(part[part != NOWHERE]).argmax())
