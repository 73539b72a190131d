"""Pictures of a reconstruction: interactive plots (Plotly) and plain images (PNG)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from storage.records import Plan
from tasks.meshes import Mesh

Arrays = dict[str, NDArray[Any]]
INK, ACCENT, SECOND = "#1f2933", "#0b7285", "#d9480f"
CAMERAS_SHOWN = 60
THUMBNAIL_PX = 300
POINTS_SHOWN = 5000  # of a line: more make the page slow and tell nothing
UNIFORM_SPREAD = 0.01  # relative; rounding in the store alone makes 0.004
GREY = 160


def evenly(count: int) -> NDArray[np.int64]:
    """At most `POINTS_SHOWN` rows of `count`, evenly spaced, first and last among them."""
    if count <= POINTS_SHOWN:
        return np.arange(count)
    return np.linspace(0, count - 1, POINTS_SHOWN).round().astype(np.int64)


def with_extremes(values: NDArray[Any]) -> NDArray[np.int64]:
    """At most `POINTS_SHOWN` rows of `values` [N] that keep their outline: no peak is lost."""
    if len(values) <= POINTS_SHOWN:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), POINTS_SHOWN // 2).astype(np.int64)
    kept = {0, len(values) - 1}
    for start, stop in pairwise(edges.tolist()):
        window = values[start:stop]
        is_gap = np.isnan(window)
        kept.add(start + int(np.where(is_gap, np.inf, window).argmin()))
        kept.add(start + int(np.where(is_gap, -np.inf, window).argmax()))
    return np.array(sorted(kept))


def top_view(trajectory: Arrays, part: int) -> Any:
    """The path of one part from above: x to the right, z (forward) upwards, metres."""
    import plotly.graph_objects as go

    frames = np.flatnonzero(trajectory["part"] == part)
    seams = frames[1:][np.diff(trajectory["segment"][frames]) != 0]
    frames, seams = frames[evenly(len(frames))], seams[evenly(len(seams))]
    position, joints = (trajectory["cam_to_world"][rows, :3, 3] for rows in (frames, seams))
    figure = go.Figure()
    figure.add_scatter(
        x=position[:, 0],
        y=position[:, 2],
        mode="lines+markers",
        line={"color": ACCENT, "width": 2},
        marker={
            "size": 4,
            "color": frames,
            "colorscale": "Viridis",
            "colorbar": {"title": "frame"},
        },
        customdata=frames,
        hovertemplate="frame %{customdata}<br>x %{x:.2f} m, z %{y:.2f} m<extra></extra>",
        name="path",
    )
    figure.add_scatter(
        x=joints[:, 0],
        y=joints[:, 2],
        mode="markers",
        marker={"symbol": "circle-open", "size": 9, "color": SECOND},
        name="seams of segments",
    )
    figure.add_scatter(
        x=position[:1, 0],
        y=position[:1, 2],
        mode="markers",
        name="start",
        marker={"symbol": "star", "size": 14, "color": INK},
    )
    figure.update_layout(**_layout(460), xaxis_title="right (m)", yaxis_title="forward (m)")
    figure.update_yaxes(scaleanchor="x", scaleratio=1)
    return figure


def scene(mesh: Mesh, trajectory: Arrays, part: int) -> Any:
    """Preview mesh with the cameras, to turn and zoom; y is shown upwards."""
    import plotly.graph_objects as go

    figure = go.Figure()
    x, y, z = _upright(mesh.vertices)
    i, j, k = mesh.triangles.T
    figure.add_mesh3d(
        x=x, y=y, z=z, i=i, j=j, k=k, vertexcolor=mesh.colors, hoverinfo="skip",
        lighting={"ambient": 1.0, "diffuse": 0.0, "specular": 0.0}, name="mesh",
    )  # fmt: skip
    poses = trajectory["cam_to_world"][trajectory["part"] == part]
    x, y, z = _upright(poses[evenly(len(poses)), :3, 3])
    figure.add_scatter3d(
        x=x,
        y=y,
        z=z,
        mode="lines",
        line={"color": SECOND, "width": 5},
        name="path",
        hoverinfo="skip",
    )
    step = (
        np.median(np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)) if len(poses) > 1 else 0
    )
    chosen = poses[:: max(1, len(poses) // CAMERAS_SHOWN)]
    x, y, z = _upright(frustum_lines(chosen, max(3.0 * float(step), 0.05)))
    figure.add_scatter3d(
        x=x,
        y=y,
        z=z,
        mode="lines",
        line={"color": INK, "width": 2},
        name="cameras",
        hoverinfo="skip",
    )
    behind = {"eye": {"x": 0.0, "y": -1.2, "z": 0.9}, "up": {"x": 0, "y": 0, "z": 1}}
    axis = {"showbackground": False, "title": ""}
    figure.update_layout(
        **_layout(620),
        scene={"aspectmode": "data", "camera": behind, "xaxis": axis, "yaxis": axis, "zaxis": axis},
    )
    return figure


def _upright(points: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """World axes (right, down, forward) as Plotly's (right, forward, up)."""
    return points[:, 0], points[:, 2], -points[:, 1]


def frustum_lines(T_world_cam: NDArray[Any], size: float) -> NDArray[Any]:
    """Pyramids of `size` metres as one line [P, 3] with NaN between the strokes."""
    corners = size * np.array([[-0.6, -0.4, 1], [0.6, -0.4, 1], [0.6, 0.4, 1], [-0.6, 0.4, 1]])
    apex, gap = np.zeros((1, 3)), np.full((1, 3), np.nan)
    strokes = [np.concatenate([corners, corners[:1], gap])]
    strokes += [np.concatenate([apex, corner[None], gap]) for corner in corners]
    outline = np.concatenate(strokes)
    world = np.einsum("nij,pj->npi", T_world_cam[:, :3, :3], outline)
    return (world + T_world_cam[:, None, :3, 3]).reshape(-1, 3)


def over_time(trajectory: Arrays, timestamp: NDArray[Any], plan: Plan) -> Any:
    """Confidence, learning rate and focal length per frame; residual and scale per segment."""
    from plotly.subplots import make_subplots

    titles = (
        "median confidence of a frame (1 = none)",
        "median learning rate of the state tokens (1 = overwritten, as in CUT3R)",
        "focal length estimated from one frame (pixels of the network's input)",
        "seam residual, relative to depth",
        "scale of a segment",
    )
    figure = make_subplots(
        rows=5, cols=1, shared_xaxes=True, vertical_spacing=0.05, subplot_titles=titles
    )
    for row, name in enumerate(("confidence", "gate", "focal"), 1):
        shown = with_extremes(trajectory[name])
        figure.add_scatter(
            x=timestamp[shown],
            y=trajectory[name][shown],
            mode="lines",
            line={"color": ACCENT},
            row=row,
            col=1,
        )
    starts = timestamp[[segment.start for segment in plan.segments]]
    for row, name in enumerate(("seam_residual", "scale"), 4):
        shown = with_extremes(trajectory[name])
        figure.add_scatter(
            x=starts[shown],
            y=trajectory[name][shown],
            mode="lines+markers",
            line={"color": SECOND},
            row=row,
            col=1,
        )
    figure.update_layout(**_layout(860), showlegend=False)
    figure.update_annotations(font_size=13)
    figure.update_xaxes(title="time (s)", row=5, col=1)
    return figure


def _layout(height: int) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 60, "r": 20, "t": 30, "b": 50},
        "template": "plotly_white",
        "font": {"family": "system-ui, sans-serif", "color": INK},
        "legend": {"orientation": "h", "y": 1.08},
    }


def colormap(values: NDArray[Any], low: float, high: float, name: str) -> NDArray[np.uint8]:
    """Values [H, W] as RGB [H, W, 3]; what is not finite is grey."""
    from matplotlib import colormaps

    span = max(high - low, 1e-9)
    rgb = colormaps[name](np.clip((values - low) / span, 0, 1))[..., :3]
    rgb[~np.isfinite(values)] = 0.5
    return np.asarray(np.round(rgb * 255), np.uint8)


def strip_cells(
    color: NDArray[np.uint8] | None, depth: NDArray[Any], confidence: NDArray[Any]
) -> list[NDArray[np.uint8]]:
    """One column of the strip: the frame, if any, inverse depth (near is bright), confidence.

    Uniform confidence is grey: a colour would say sure or unsure.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        nearness = np.where(depth > 0, 1 / depth, np.nan)
    valid = nearness[np.isfinite(nearness)]
    low, high = np.percentile(valid, [2, 98]) if valid.size else (0.0, 1.0)
    if is_uniform(confidence):
        certainty = np.full((*confidence.shape, 3), GREY, np.uint8)
    else:
        sure = np.log(np.maximum(confidence, 1.0))
        certainty = colormap(sure, 0.0, float(max(np.percentile(sure, 98), 0.1)), "viridis")
    shown = [] if color is None else [color]
    return [*shown, colormap(nearness, float(low), float(high), "inferno"), certainty]


def is_uniform(confidence: NDArray[Any]) -> bool:
    """Whether the confidence [H, W] says the same of all pixels."""
    low, high = float(np.min(confidence)), float(np.max(confidence))
    return high - low <= UNIFORM_SPREAD * max(abs(low), abs(high))


def png(image: NDArray[np.uint8], width: int | None = None) -> bytes:
    """RGB [H, W, 3] as PNG, resized to `width` pixels, bicubic, if that is given."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    if width is not None:
        size = (width, round(width * picture.height / picture.width))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def trajectory_png(trajectory: Arrays, part: int) -> bytes:
    """The path from above as a plain picture, for places without scripts."""
    from matplotlib.figure import Figure

    position = trajectory["cam_to_world"][trajectory["part"] == part, :3, 3]
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(position[:, 0], position[:, 2], color=ACCENT, linewidth=2)
    axes.plot(position[:1, 0], position[:1, 2], "*", color=INK, markersize=12)
    axes.set(xlabel="right (m)", ylabel="forward (m)", title="trajectory from above")
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def strip_png(columns: Sequence[Sequence[NDArray[np.uint8]]]) -> bytes:
    """All cells of a strip in one picture: frames in columns."""
    return png(np.concatenate([np.concatenate(list(cells)) for cells in columns], axis=1))
