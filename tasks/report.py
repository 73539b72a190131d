"""Report: one self-contained page per drive, and its pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from prefect import task

from storage.drives import absolute, drive_files
from storage.reconstruction import ReconstructionStore
from storage.records import NOWHERE
from storage.wording import redacted
from tasks import report_figures as figures
from tasks.attempts import attempt_id, counted
from tasks.frames import DriveInput, Image
from tasks.keys import find_key, require_key, stage_key
from tasks.meshes import read_ply
from tasks.pipelining import prefetch
from tasks.planned import longest_part, read_aside, read_plan, read_record
from tasks.probe import relocated
from tasks.retries import STAGE_OPTIONS
from tasks.summary import busy_seconds, summarise
from ttt3r.weights import WeightsInfo, worth

VERSION = 4
STRIP_FRAMES = 6
# Above this, neighbouring segments disagree so much that a seam can be seen.
LARGE_SEAM_RESIDUAL = 0.1
LARGE_FOCAL_SPREAD = 0.2
LARGE_FOCAL_RATIO = 1.25
NO_FRAMES = (
    "Frames of the recording are not shown, as it was not named: "
    "`ttt3r report --recording LOCATION`."
)
# What the seconds in the chunks' commits were spent on: `<name>_seconds`.
BUSY_WITH = {
    "prepare": "claiming segments and sizing their arrays",
    "decode": "decoding",
    "preprocess": "resizing",
    "wait": "network waiting for frames",
    "infer": "network",
    "stall": "network waiting for the writer",
    "download": "copying from the device",
    "encode": "compressing",
    "write": "writing",
}
# How the page names figures of a summary, in which order and in what unit.
FIGURES = {
    "drive": ("drive", "{}"),
    "recording": ("recording", "{}"),
    "duration_s": ("duration", "{:.1f} s"),
    "frames": ("frames", "{:,}"),
    "frames_unreadable": ("frames that do not decode", "{:,}"),
    "frames_without_pose": ("frames without a pose", "{:,}"),
    "parts": ("parts", "{:,}"),
    "segments": ("segments", "{:,}"),
    "set_aside": ("segments set aside", "{}"),
    "chunks": ("chunks", "{:,}"),
    "device": ("device", "{}"),
    "inference_frames_per_s": ("speed of the network", "{:.1f} frames/s"),
    "inference_limited_by": ("inference is limited by", "{}"),
    "length_m_estimated": ("length of the path, estimated", "{:.1f} m"),
    "median_confidence": ("median confidence", "{:.2f}"),
    "focal_px": ("focal length", "{:.1f} pixels of the recording"),
    "focal_source": ("focal length is", "{}"),
    "seam_residual_median": ("seam residual, median", "{:.1%} of the depth"),
    "seam_residual_worst": ("seam residual, worst", "{:.1%} of the depth"),
    "mesh_triangles": ("triangles of all meshes", "{:,}"),
}
GRID_SHOWN = ("voxel_m", "depth_limit_m", "min_confidence")
# What the page shows beside results: a change redoes the page and nothing else.
SHOWN_ATTRIBUTES = ("drive", "plan", "configuration", "weights", "versions")


@task(name="report", task_run_name="report {url}", **STAGE_OPTIONS)
@counted("report")
def report_stage(url: str, recording: str | None = None, anew: bool = False) -> None:
    """Write `report/report.html` and its pictures, unless they are up to date.

    Where that fails, a report of before is still there.

    Args:
        url: the drive's store.
        recording: location of the drive, whose frames are shown. None: they are left out, and no
            file is opened that the store names, which could be any if others wrote it.
        anew: also if they are up to date.

    Raises:
        ValueError: a stage has not finished, or the store names other files than the recording's.
    """
    store = ReconstructionStore.open(url)
    key = report_key(store, recording is not None)
    if not anew and find_key(store, "report") == key:
        return
    trajectory = store.read_trajectory()
    part = longest_part(trajectory["part"])
    columns = strip(store, trajectory, recording)
    notes = warnings(store, trajectory) + ([] if recording is not None else [NO_FRAMES])
    page = render(store, trajectory, part, columns, notes)
    contents = {
        "report/report.html": page.encode(),
        "report/trajectory.png": figures.trajectory_png(trajectory, part),
        "report/frames.png": figures.strip_png([c["images"] for c in columns]),
    }
    store.drop_commits("report")
    files = {name: store.put_file(name, data) for name, data in contents.items()}
    record = {"key": key, "attempt": attempt_id(), "warnings": notes, "files": files}
    store.commit("report", record)


def report_key(store: ReconstructionStore, has_frames: bool) -> str:
    """Key of all that the page shows, with or without frames of the recording.

    Raises:
        ValueError: a stage has not finished.
    """
    for stage in ("probe", "plan"):
        require_key(store, stage)
    stages = [require_key(store, stage) for stage in ("align", "fuse/merged")]
    attributes = store.attributes
    shown = {name: attributes[name] for name in SHOWN_ATTRIBUTES}
    left_out = () if has_frames else (NO_FRAMES,)
    return stage_key("report", VERSION, stages, shown, *left_out)


def warnings(store: ReconstructionStore, trajectory: figures.Arrays) -> list[str]:
    """What a user should know before trusting the result, in plain words."""
    record = read_record(store)
    plan = read_plan(store)
    info = WeightsInfo.from_json(store.attributes["weights"])
    notes = []
    if not info.trained:
        notes.append(
            "The weights are UNTRAINED (random): poses, depth and mesh mean nothing. They show "
            "only that the pipeline runs."
        )
    elif note := worth(info):
        notes.append(f"Weights {info.name}: {note}")
    notes += record.problems
    if plan.parts > 1:
        notes.append(
            f"The recording has hard cuts: it became {plan.parts} separate parts, each with a "
            "world of its own."
        )
    align = store.read_commit("align") or {}
    notes += _missing_warnings(store, align.get("missing", ()))
    notes += _seam_warnings(align)
    notes += _focal_warnings(align, float(trajectory["intrinsics_source"][0, 0]))
    notes.append(
        "Metres are the network's estimate: nothing outside the video (GNSS, a known "
        "trajectory) fixes the scale."
    )
    return notes


def _missing_warnings(store: ReconstructionStore, missing: Sequence[int]) -> list[str]:
    plan, aside = read_plan(store), read_aside(store)
    placed = plan.without(missing)
    without = plan.frames - sum(len(own) for own in placed.owner_ranges())
    notes = [
        f"Segment {index} (frames {plan.segments[index].start} to {plan.segments[index].stop - 1}) "
        f"was set aside: {aside[index]['reason'] if index in aside else 'reason unknown'}. The "
        "next run tries it again."
        for index in missing
    ]
    if notes:
        notes.append(
            f"Without what was set aside {without} of {plan.frames} frames have no pose and no "
            f"depth, and the trajectory has {placed.parts} separate parts, each with a world of "
            "its own."
        )
    return notes


def _seam_warnings(align: dict[str, Any]) -> list[str]:
    notes = []
    residuals = [s["residual"] for s in align["seams"] if s["residual"] is not None]
    bad = sum(residual > LARGE_SEAM_RESIDUAL for residual in residuals)
    if bad:
        notes.append(
            f"At {bad} of {len(align['seams'])} seams neighbouring segments disagree by more than "
            f"{LARGE_SEAM_RESIDUAL:.0%} of the depth: expect steps in the mesh and drift."
        )
    if any(s["method"] == "poses" for s in align["seams"]):
        notes.append("Some seams had too few valid points and were joined by poses alone.")
    return notes


def _focal_warnings(align: dict[str, Any], focal_px: float) -> list[str]:
    if align["focal_source"] == "assumed":
        return [
            "The focal length could not be estimated; a field of view of 60 degrees is assumed. "
            "Give the true one with --focal-px."
        ]
    if align["focal_source"] == "estimated":
        spread = align["focal_spread"]
        scatter = f", from estimates that scatter by {spread:.0%}"
        return [
            f"The focal length, {focal_px:.0f} pixels of the recording, is the network's estimate"
            f"{scatter if spread > LARGE_FOCAL_SPREAD else ''}, and widths and heights in the mesh "
            "are only as right as it is: if you know the camera's, give it with --focal-px."
        ]
    ratio = align.get("focal_estimate_ratio")
    if ratio and not 1 / LARGE_FOCAL_RATIO <= ratio <= LARGE_FOCAL_RATIO:
        return [
            f"The network takes the focal length for {ratio:.2g} times the one that was given with "
            "--focal-px, which was used: make sure that it is in pixels of this recording. If it "
            "is, the network errs."
        ]
    return []


def strip(
    store: ReconstructionStore, trajectory: figures.Arrays, recording: str | None
) -> list[dict[str, Any]]:
    """Depth and confidence of some frames over the whole drive, and these, as pictures."""
    info = WeightsInfo.from_json(store.attributes["weights"])
    drive = DriveInput.from_store(store, info.config)
    if recording is not None:
        drive = replace(drive, record=relocated(drive.record, absolute(recording)))
    placed = np.flatnonzero(trajectory["part"] != NOWHERE)
    count = min(STRIP_FRAMES, len(placed))
    columns = []
    for row in np.linspace(0, len(placed) - 1, count).round().astype(int).tolist():
        frame = int(placed[row])
        segment = drive.plan.segments[int(trajectory["segment"][frame])]
        color = None if recording is None else read_own(drive, frame)
        depth = store.read(segment, "depth", frame, frame + 1)[0]
        confidence = store.read(segment, "confidence", frame, frame + 1)[0]
        columns.append(
            {
                "frame": frame,
                "time": drive.frames.timestamp[frame],
                "images": figures.strip_cells(color, depth, confidence),
                "uniform": figures.is_uniform(confidence),
            }
        )
    return columns


def read_own(drive: DriveInput, frame: int) -> Image:
    """A frame out of the recording at the drive's location, whatever else its record names.

    Raises:
        ValueError: the record has the frame in another file; that is not opened.
    """
    record, table = drive.record, drive.frames
    files = {c.location for n, c in enumerate(record.clips) if frame in table.rows_of(n)}
    others = files - {record.location}
    if others.difference(drive_files(record.location)[0] if others else ()):
        raise ValueError(
            f"frame {frame} is in {redacted(min(others))}, says the store, which is not part of "
            f"{redacted(record.location)}; give the location that was reconstructed"
        )
    with closing(prefetch(drive.read(frame, frame + 1), 1)) as frames:
        return next(frames)


def render(
    store: ReconstructionStore,
    trajectory: figures.Arrays,
    part: int,
    columns: list[dict[str, Any]],
    notes: list[str],
) -> str:
    """The page. Text from outside (names, problems) is escaped by the template."""
    from plotly.offline import get_plotlyjs

    record = read_record(store)
    plan = read_plan(store)
    merged = store.read_commit("fuse/merged") or {}
    preview = "fusion/preview.ply"
    mesh = read_ply(store.get_file(preview, merged.get("files", {}).get(preview)))
    summary = summarise(store)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name("report.html.jinja").read_text()
    )
    return template.render(
        drive=record,
        location=redacted(record.location),
        headline_figures=headline_figures(summary),
        warnings=notes,
        parts=summary["parts"],
        starts_drive=trajectory["part"][0] == part,
        plotly_js=Markup(f"<script>{get_plotlyjs()}</script>"),
        top_view=embed(figures.top_view(trajectory, part)),
        scene=embed(figures.scene(mesh, trajectory, part)) if len(mesh.triangles) else None,
        mesh_file=mesh_location(store, part),
        strip=[_encode_column(column) for column in columns],
        over_time=embed(figures.over_time(trajectory, store.read_frames()["timestamp"], plan)),
        points_shown=figures.POINTS_SHOWN,
        timings=timings(store),
        facts=facts(store, summary),
    )


def embed(figure: Any) -> Markup:
    """A Plotly figure as HTML; Plotly escapes `<`, `>` and `/` in its text for the script."""
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False))


def mesh_location(store: ReconstructionStore, part: int) -> str | None:
    """Where the full mesh of a part is: as GLB where there is one, else as PLY."""
    merged = store.read_commit("fuse/merged") or {}
    folders = [mesh["folder"] for mesh in merged["meshes"] if mesh["part"] == part]
    names = [f"{folder}/mesh.{ending}" for folder in folders for ending in ("glb", "ply")]
    # Commits of earlier versions do not list their files.
    written = merged.get("files") or store.list_files("fusion/")
    found = [name for name in names if name in written]
    return redacted(store.file_url(found[0])) if found else None


def _encode_column(column: dict[str, Any]) -> dict[str, Any]:
    names = ("frame", "depth", "confidence")[-len(column["images"]) :]
    notes = [""] * (len(names) - 1) + ["uniform" if column["uniform"] else ""]
    cells = []
    for name, note, image in zip(names, notes, column["images"], strict=True):
        data = base64.b64encode(figures.png(image, figures.THUMBNAIL_PX)).decode()
        cells.append({"alt": name, "note": note, "data": data})
    return {"frame": column["frame"], "time": column["time"], "cells": cells}


def headline_figures(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures that matter most, with their labels."""
    triangles = "triangles" if summary["parts"] == 1 else "triangles, all parts"
    shown = [
        (f"{summary['frames']:,}", "frames"),
        (f"{summary['duration_s']:.1f} s", "of video"),
        (f"{summary['length_m_estimated']:.1f} m", "path, estimated"),
        (f"{summary['segments']}", "segments"),
        (f"{summary['mesh_triangles']:,}", triangles),
    ]
    if "inference_frames_per_s" in summary:
        shown.append((f"{summary['inference_frames_per_s']:.1f}", "frames/s through the network"))
    if "seam_residual_median" in summary:
        shown.append((f"{summary['seam_residual_median']:.1%}", "median seam residual"))
    return shown


def timings(store: ReconstructionStore) -> list[tuple[str, str]]:
    """Busy seconds of each stage, from the commits."""
    commits = store.commits()
    infer = [record for name, record in commits.items() if name.startswith("infer/")]
    fuse = [record for name, record in commits.items() if name.startswith("fuse/")]

    def total(records: list[dict[str, Any]], name: str) -> float:
        return float(sum(record.get(name, 0.0) for record in records))

    seconds = {
        "probe": total([commits.get("probe", {})], "seconds"),
        **{f"infer: {what}": total(infer, f"{name}_seconds") for name, what in BUSY_WITH.items()},
        "align": total([commits.get("align", {})], "seconds"),
        "fuse": total(fuse, "seconds"),
    }
    rows = [(name, f"{value:.1f} s") for name, value in seconds.items()]
    return [*rows, ("inference is limited by", limit(infer))]


def limit(infer: list[dict[str, Any]]) -> str:
    """What inference would be faster without, in words."""
    busy = busy_seconds(infer)
    slowest = max(busy, key=lambda part: busy[part])
    if not busy[slowest]:
        return "unknown"
    others = (f"{part} {busy[part] / busy[slowest]:.0%}" for part in busy if part != slowest)
    return f"{slowest}; in its time, {' and '.join(others)} busy"


def facts(store: ReconstructionStore, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What ran: weights and licence, figures, settings as they were used, versions."""
    attributes = store.attributes
    info = WeightsInfo.from_json(attributes["weights"])
    rows = [
        ("weights", f"{info.name} ({info.source}), sha256 {info.sha256}"),
        ("licence of the weights", info.licence),
    ]
    for name, (label, form) in FIGURES.items():
        if summary.get(name) not in (None, []):
            rows.append((label, form.format(summary[name])))
    used = used_settings(store, summary)
    for stage, settings in attributes["configuration"].items():
        rows.append((stage, settings_line(settings, used.get(stage, {}))))
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in attributes["versions"].items())))
    return rows


def used_settings(store: ReconstructionStore, summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What each stage worked with that its settings leave open, or only bound."""
    plan, chunks = read_plan(store), store.commits("infer").values()
    shared = [len(plan.overlap(segment)) for segment in plan.segments]
    grids = [record["grid"] for record in store.commits("tiles").values() if "grid" in record]
    inferred = {
        "device": summary.get("device"),
        "lanes": extent([record.get("lanes") for record in chunks]),
    }
    return {
        "plan": {
            "segment_frames": extent([segment.frames for segment in plan.segments]),
            "overlap_frames": extent([frames or None for frames in shared]),
            "chunk_frames": plan.chunk_frames,
        },
        "infer": {name: value for name, value in inferred.items() if value is not None},
        "align": {"focal_px": extent([summary.get("focal_px")])},
        "fuse": {name: extent([grid.get(name) for grid in grids]) for name in GRID_SHOWN},
    }


def extent(values: Sequence[float | None]) -> str | None:
    """Smallest and largest of the values that there are, to four digits if they are no integers."""
    known = {value for value in values if value is not None}
    if not known:
        return None
    ends = sorted({min(known), max(known)})
    return " to ".join(str(v) if isinstance(v, int) else f"{v:.4g}" for v in ends)


def settings_line(settings: dict[str, Any], used: dict[str, Any]) -> str:
    """Settings of a stage as it used them; lengths that were given are used to the last digit."""
    words = []
    for name in {**settings, **used}:
        given = settings.get(name)
        value = given if isinstance(given, float) else used.get(name, given)
        is_derived = name in used and value is not None and given in (None, "auto")
        words.append(
            f"{name} = {'none' if value is None else value}{' (derived)' if is_derived else ''}"
        )
    return ", ".join(words)
