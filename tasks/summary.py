"""How far a reconstruction is, and how good: figures for people, from the store alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import fsspec
import numpy as np

from storage.drives import store_name, store_url, stores_in
from storage.errors import StoreError
from storage.failures import explaining
from storage.layout import chunk_numbers
from storage.media import is_there
from storage.reconstruction import ReconstructionStore
from storage.records import NOWHERE
from storage.remote_folder import REMOTE_OPTIONS
from tasks.keys import FINISHED, STAGES, commits_digest
from tasks.planned import ASIDE, list_aside, read_plan, read_record

# What one thread each is busy with during inference, by the seconds in the chunks' commits.
BUSY = {
    "reading": ("prepare", "decode", "preprocess"),
    "network": ("infer",),
    "writing": ("download", "encode", "write"),
}


def list_stores(location: str) -> list[str]:
    """URLs of the reconstructions at or directly under `location`.

    Raises:
        ValueError: there is none.
        StoreUnavailable: the location cannot be read.
    """
    with explaining(location):
        fs, path = fsspec.core.url_to_fs(location, **REMOTE_OPTIONS)
        if path.rstrip("/").endswith(".zarr") and is_there(fs, path.rstrip("/")):
            return [location.rstrip("/")]
    found = stores_in(location)
    if not found:
        raise ValueError(
            f"there is no reconstruction (<drive>.zarr) at {location}; give the --output of "
            "`ttt3r reconstruct`"
        )
    return [store_url(location, name) for name in found]


def status(location: str) -> list[dict[str, Any]]:
    """`progress` of each reconstruction at or directly under `location`.

    One that cannot be read is a row too: `error` says why, and `stage` is "unknown".

    Raises:
        ValueError, StoreUnavailable: as of `list_stores`.
    """
    return [_row(url) for url in list_stores(location)]


def _row(url: str) -> dict[str, Any]:
    try:
        return progress(url)
    except Exception as error:  # whatever is in a store, the others are shown
        said = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
        nothing = {"chunks": 0, "chunks_done": 0, "set_aside": []}
        return {"drive": store_name(url), "url": url, "stage": "unknown", **nothing, "error": said}


def progress(url: str) -> dict[str, Any]:
    """Drive, stage that is next or `done`, chunks finished and planned, and the last failure.

    `set_aside`: the segments that the drive goes on without; their chunks are not counted.
    """
    store = ReconstructionStore.open(url)
    commits = {name: store.read_commit(name) for name in ("probe", "plan", "align", "report")}
    commits["fuse"] = store.read_commit("fuse/merged")
    aside = list_aside(store)
    chunks, done = count_chunks(store, aside)
    commits["infer"] = {} if chunks and done == chunks else None
    stage = next((name for name in STAGES if commits[name] is None), "done")
    failed = store.read_commit("failed")
    return {
        "drive": str(store.attributes.get("drive", {}).get("name") or store_name(url)),
        "url": url,
        "stage": stage,
        "chunks": chunks,
        "chunks_done": done,
        "set_aside": aside,
        "error": None if failed is None else failed.get("error", "the reason is not recorded"),
    }


def has_lost_commits(store: ReconstructionStore) -> bool:
    """Whether the drive was finished, and some of the commits that it had then are gone.

    A later run that failed has left one more, and says so itself.
    """
    finished = store.read_commit(FINISHED)
    if finished is None:
        return False
    names = store.commit_names()
    before = [n for n in names if n != "failed" and not n.startswith(f"{ASIDE}/")]
    return finished.get("commits") not in (commits_digest(names), commits_digest(before))


def count_chunks(store: ReconstructionStore, aside: Collection[int] = ()) -> tuple[int, int]:
    """Chunks that the plan asks for without those of `aside`, and how many are committed."""
    if "plan" not in store.attributes:
        return 0, 0
    plan = read_plan(store)
    wanted = {
        segment.index: segment.count_chunks(plan.chunk_frames)
        for segment in plan.segments
        if segment.index not in aside
    }
    numbers = filter(None, map(chunk_numbers, store.commit_names("infer")))
    done = sum(chunk < wanted.get(segment, 0) for segment, chunk in numbers)
    return sum(wanted.values()), done


def summarise(store: ReconstructionStore) -> dict[str, Any]:
    """Figures of a reconstruction, as far as it is: plain numbers and words."""
    figures: dict[str, Any] = {
        key: value for key, value in progress(store.url).items() if key != "url"
    }
    if "drive" in store.attributes:
        record = read_record(store)
        figures |= {
            "frames": record.frames,
            "frames_unreadable": sum(max(lost.count, 1) for lost in record.unreadable),
            "recording": f"{record.width} x {record.height}, {record.codec}, {record.fps:.4g} fps",
            "duration_s": record.duration_s,
        }
    if "plan" in store.attributes:
        plan = read_plan(store)
        commit = store.read_commit("align") or {}
        parts = plan.without(commit.get("missing", ())).parts
        figures |= {"segments": len(plan.segments), "parts": parts}
    figures |= _inference_figures(store) | _trajectory_figures(store) | _mesh_figures(store)
    return figures


def busy_seconds(records: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds that reading, network and writing were busy; they run beside each other."""
    return {
        part: float(sum(r.get(f"{stage}_seconds", 0.0) for r in records for stage in stages))
        for part, stages in BUSY.items()
    }


def _inference_figures(store: ReconstructionStore) -> dict[str, Any]:
    records = list(store.commits("infer").values())
    busy = busy_seconds(records)
    frames = sum(record.get("frames_inferred", 0) for record in records)
    if not busy["network"] or not frames:
        return {}
    devices = sorted({str(record.get("device")) for record in records})
    return {
        "inference_frames_per_s": frames / busy["network"],
        "inference_limited_by": max(busy, key=lambda part: busy[part]),
        "device": ", ".join(devices),
    }


def _trajectory_figures(store: ReconstructionStore) -> dict[str, Any]:
    commit = store.read_commit("align")
    if commit is None:
        return {}
    arrays = store.read_trajectory()
    residuals = [s["residual"] for s in commit["seams"] if s["residual"] is not None]
    figures = {
        "length_m_estimated": path_length(arrays["cam_to_world"], arrays["part"]),
        "median_confidence": float(np.nanmedian(arrays["confidence"])),
        "focal_px": float(arrays["intrinsics_source"][0, 0]),
        "focal_source": commit["focal_source"],
    }
    missing = int((arrays["part"] == NOWHERE).sum())
    if missing:
        figures["frames_without_pose"] = missing
    if residuals:
        figures["seam_residual_median"] = float(np.median(residuals))
        figures["seam_residual_worst"] = float(np.max(residuals))
    return figures


def path_length(T_world_cam: Any, part: Any) -> float:
    """Length of the camera's path, metres, jumps between parts left out."""
    steps = np.linalg.norm(np.diff(T_world_cam[:, :3, 3], axis=0), axis=1)
    return float(steps[(np.diff(part) == 0) & (part[1:] != NOWHERE)].sum())


def _mesh_figures(store: ReconstructionStore) -> dict[str, Any]:
    merged = store.read_commit("fuse/merged")
    if merged is None:
        return {}
    return {"mesh_triangles": sum(mesh["triangles"] for mesh in merged["meshes"])}
