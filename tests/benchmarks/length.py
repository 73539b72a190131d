"""Accuracy against sequence length, for each update rule: the project's yardstick.

Renders worlds that nothing is ever trained on (or reads a real video with known poses), lets
the network see them with each rule, and measures trajectory and depth over the first n frames
for each n asked for.

    python tests/benchmarks/length.py --weights compact --world rooms --frames 50 100 500 \
        --rules cut3r ttt3r --seed 1 --sequences 4 --json rooms.json --docs docs

The rule "constant" is no network: a camera that goes straight on at constant speed. With
--segment-frames, a sequence is cut into segments that are aligned by Sim(3), as the pipeline does;
with --metres as well, each sequence ends where the camera has come so far:

    python tests/benchmarks/length.py --world streets --metres 500 --frames 1000 \
        --segment-frames 8 --overlap 3 --rules ttt3r cut3r constant --sequences 4

Rendered pictures are averaged over four rays a pixel, as a recording is on its way down.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttt3r.alignment import OverlapFit, align_overlap, balance_scales, chain
from ttt3r.geometry import camera_pose_to_matrix, estimate_focal, intrinsics_from_focal
from ttt3r.images import fit, preprocess
from ttt3r.metrics import depth_metrics, evaluate_trajectory, read_tum
from ttt3r.model import Model
from ttt3r.motion_scale import motion_costs, motion_scales
from ttt3r.state import UPDATE_RULES
from ttt3r.stream import Stream
from ttt3r.synthetic import HELD_OUT_SEED, camera_path, render_chunks
from ttt3r.weights import load_model

CONSTANT = "constant"
LENGTHS = (50, 100, 200, 300, 500, 700, 1000)
_SOURCE = {"streets": (960, 540), "rooms": (640, 480)}  # pixels of the cameras that are imitated
_CHUNK = 16  # frames at once
_SUPERSAMPLE = 2  # squared rays a pixel
_TRIES = 100  # sequences among which those that come far enough are looked for
_DEPTH_EVERY = 5  # frames whose depth is measured


@dataclass
class Track:
    """What one rule says of K sequences so far."""

    T: list[np.ndarray] = field(default_factory=list)  # [K, t, 4, 4] each
    depth: list[np.ndarray] = field(default_factory=list)  # [K, h, w] of every fifth frame


@dataclass
class Truth:
    """The same of the worlds themselves."""

    T: list[np.ndarray] = field(default_factory=list)
    depth: list[np.ndarray] = field(default_factory=list)  # nan where there is none


Piece = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # images, poses, depth (inf: none)


def rendered(world: str, frames: int, seeds: range, size: int, patch: int) -> Iterator[Piece]:
    """Images [K, t, h, w, 3], poses [K, t, 4, 4] and depth [K, t, h, w] of held-out worlds."""
    view = fit(*_SOURCE[world], size, patch)
    for piece in render_chunks(
        world,  # type: ignore[arg-type]
        seeds, frames, view.height, view.width, chunk_frames=_CHUNK, supersample=_SUPERSAMPLE,
    ):  # fmt: skip
        yield piece.images.numpy(), piece.T_world_cam.double().numpy(), piece.depth.numpy()


def reaching(world: str, first_seed: int, metres: float, frames: int) -> Iterator[tuple[int, int]]:
    """Seeds from `first_seed` on whose camera comes so far within `frames`, and in how many."""
    for seed in range(first_seed, first_seed + _TRIES):
        place = camera_path(world, [seed], frames)[0, :, :3, 3].double()  # type: ignore[arg-type]
        way = place.diff(dim=0).norm(dim=-1).cumsum(0)
        if way[-1] >= metres:
            yield seed, int((way < metres).sum()) + 2
    raise ValueError(
        f"too few of {_TRIES} {world} come {metres:g} m far within {frames} frames; ask for a "
        "shorter way (--metres) or more frames (--frames)"
    )


def recorded(video: str, ground_truth: str, size: int, patch: int) -> Iterator[Piece]:
    """The same of a real video; line i of the TUM file is the pose of frame i. No depth."""
    from storage.probe import probe_video
    from storage.video import read_frames

    record, table = probe_video(video)
    poses = read_tum(ground_truth)[1]
    if len(poses) != len(table.timestamp):
        raise ValueError(
            f"{video} has {len(table.timestamp)} frames, {ground_truth} {len(poses)} poses; "
            "expected one line a frame"
        )
    images: list[np.ndarray] = []
    for number, frame in enumerate(read_frames(record, table, 0, len(poses))):
        images.append(preprocess(frame, size, patch))
        if len(images) == _CHUNK or number + 1 == len(poses):
            first = number + 1 - len(images)
            yield np.stack(images)[None], poses[None, first : number + 1], None
            images = []


def run_rules(
    model: Model, rules: list[str], pieces: Iterator[Piece]
) -> tuple[Truth, dict[str, Track]]:
    """Let every rule see the same sequences from the first frame to the last."""
    truth, tracks = Truth(), {rule: Track() for rule in rules}
    streams: dict[str, Stream] = {}
    seen = 0
    for images, T, depth in pieces:
        chosen = [i for i in range(images.shape[1]) if (seen + i) % _DEPTH_EVERY == 0]
        seen += images.shape[1]
        truth.T.append(T)
        if depth is not None:
            truth.depth += [np.where(np.isfinite(depth[:, i]), depth[:, i], np.nan) for i in chosen]
        for rule, track in tracks.items():
            if rule == CONSTANT:
                continue
            stream = streams.setdefault(rule, Stream(model, len(images), rule, frozenset({"cam"})))
            found = stream.feed(images)
            track.T.append(camera_pose_to_matrix(found.camera_pose).double().cpu().numpy())
            assert found.pointmap_cam is not None
            if depth is not None:
                track.depth += list(found.pointmap_cam[:, chosen, ..., 2].unbind(1))  # type: ignore[arg-type]
    return truth, tracks


Part = tuple[np.ndarray, np.ndarray, np.ndarray]  # of a segment: poses, points, confidence


def see_segments(
    model: Model, offset: float, rule: str, images: np.ndarray, length: int, overlap: int
) -> tuple[list[int], list[Part]]:
    """First frames of the segments of one sequence, and what the network says of each.

    The last segment goes on with the last frame, so that all are equally long. Motions are as large
    as pictures say, as in the pipeline; `offset` is that of the weights' principal point.
    """
    starts = list(range(0, max(1, len(images) - overlap), length - overlap))
    parts: list[Part] = []
    costs = []
    for first in range(0, len(starts), 16):
        lanes = [
            images[np.minimum(np.arange(s, s + length), len(images) - 1)]
            for s in starts[first : first + 16]
        ]
        found = Stream(model, len(lanes), rule, frozenset({"cam"})).feed(np.stack(lanes))
        assert found.pointmap_cam is not None
        assert found.confidence is not None
        poses, points = camera_pose_to_matrix(found.camera_pose), found.pointmap_cam
        matrices = intrinsics_from_focal(estimate_focal(points, offset), *points.shape[2:4], offset)
        for k, lane in enumerate(lanes):
            n = min(length, len(images) - starts[first + k])
            given = torch.from_numpy(lane[:n]), points[k, :n], poses[k, :n], matrices[k, :n]
            costs.append(motion_costs(*given).numpy())
        told = poses.double().numpy(), points.numpy(), found.confidence.numpy()
        parts += list(zip(*told, strict=True))
    for (T, _, _), scale in zip(parts, motion_scales(np.stack(costs)), strict=True):
        T[:, :3, 3] *= scale
    return starts, parts


def run_segments(
    model: Model, offset: float, rule: str, pieces: list[Piece], length: int, overlap: int
) -> tuple[Truth, Track]:
    """One sequence cut into segments that run as lanes and are aligned by Sim(3)."""
    images = np.concatenate([piece[0][0] for piece in pieces])
    T = np.concatenate([piece[1][0] for piece in pieces])
    starts, parts = see_segments(model, offset, rule, images, length, overlap)
    seams = [fit_seam(a, b, length - overlap) for a, b in pairwise(parts)]
    placed = chain(*balance_scales(seams))
    track, truth = Track(), Truth(T=[T[None]])
    whole = np.empty_like(T)
    depths = np.empty((len(images), *parts[0][2].shape[1:]))
    for start, place, (poses, points, _) in zip(starts, placed, parts, strict=True):
        stop = min(start + length, len(images))
        whole[start:stop] = place.apply_pose(poses[: stop - start])
        depths[start:stop] = points[: stop - start, ..., 2] * place.scale
    track.T.append(whole[None])
    if pieces[0][2] is not None:
        depth = np.concatenate([piece[2][0] for piece in pieces if piece[2] is not None])
        truth.depth = [np.where(np.isfinite(d), d, np.nan)[None] for d in depth[::_DEPTH_EVERY]]
        track.depth = list(depths[::_DEPTH_EVERY, None])
    return truth, track


def fit_seam(a: Part, b: Part, shift: int) -> OverlapFit:
    """Segment b's place in segment a, from the frames that both contain."""
    (T_a, points_a, conf_a), (T_b, points_b, conf_b) = a, b
    T_a, points_a, conf_a = T_a[shift:], points_a[shift:], conf_a[shift:]
    count = len(T_a)
    T_b, points_b, conf_b = T_b[:count], points_b[:count], conf_b[:count]
    return align_overlap(
        _moved(T_a, points_a), _moved(T_b, points_b), points_a[..., 2], conf_a, conf_b,
        depth_b=points_b[..., 2], T_a_cam=T_a, T_b_cam=T_b,
    )  # fmt: skip


def _moved(T: np.ndarray, points: np.ndarray) -> np.ndarray:
    return np.einsum("fij,fhwj->fhwi", T[:, :3, :3], points) + T[:, None, None, :3, 3]


def figures(truth: Truth, track: Track | None, frames: int) -> dict[str, float | None]:
    """Means over the sequences, of their first `frames` frames; no track is "constant"."""
    T_true = np.concatenate(truth.T, axis=1)[:, :frames]
    T_found = _straight(T_true) if track is None else np.concatenate(track.T, axis=1)[:, :frames]
    rows = []
    for k in range(len(T_true)):
        found = evaluate_trajectory(T_found[k], T_true[k])
        row = {"ate": found["ate_sim3_m"], "rpe_t": found["rpe_trans_m"],
               "rpe_r": found["rpe_rot_deg"], "distance": found["distance_m"]}  # fmt: skip
        count = -(-frames // _DEPTH_EVERY)
        if track is not None and track.depth:
            row |= _depth_row(truth.depth[:count], track.depth[:count], k)
        rows.append(row)
    names = ("ate", "rpe_t", "rpe_r", "abs_rel", "delta_125", "distance")
    return {name: _mean([row.get(name) for row in rows]) for name in names}


def _depth_row(truth: list[np.ndarray], found: list[np.ndarray], k: int) -> dict[str, Any]:
    measured = depth_metrics(
        np.stack([np.asarray(d[k]) for d in found]), np.stack([d[k] for d in truth])
    )
    return {"abs_rel": measured["abs_rel"], "delta_125": measured["delta_125"]}


def _straight(T_true: np.ndarray) -> np.ndarray:
    T = np.tile(np.eye(4), (*T_true.shape[:2], 1, 1))
    T[..., 2, 3] = np.arange(T_true.shape[1])
    return T


def _mean(values: list[Any]) -> float | None:
    known = [float(v) for v in values if v is not None]
    return sum(known) / len(known) if known else None


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per length and rule."""
    model, info = load_model(options.weights)
    if options.segment_frames:
        return _measure_segments(model, info.principal_offset, options)
    sides = (model.config.image_size, model.config.patch_size)
    if options.video:
        pieces = recorded(options.video, options.ground_truth, *sides)
    else:
        first = _first_seed(options)
        seeds = range(first, first + options.sequences)
        pieces = rendered(options.world, max(options.frames), seeds, *sides)
    truth, tracks = run_rules(model, options.rules, pieces)
    seen = sum(T.shape[1] for T in truth.T)
    return [
        {"world": _world(options), "frames": frames, "rule": rule}
        | figures(truth, None if rule == CONSTANT else tracks[rule], frames)
        for frames in sorted({min(n, seen) for n in options.frames})
        for rule in options.rules
    ]


def _first_seed(options: argparse.Namespace) -> int:
    return HELD_OUT_SEED + 1000 * options.seed


def _world(options: argparse.Namespace) -> str:
    return Path(options.video).parent.name if options.video else options.world


def _measure_segments(
    model: Model, offset: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One record per length and rule; with --metres per rule, `frames` is a mean."""
    rows: dict[tuple[Any, ...], list[dict[str, float | None]]] = {}
    for pieces in one_by_one(options, (model.config.image_size, model.config.patch_size)):
        seen = sum(piece[1].shape[1] for piece in pieces)
        lengths = [seen] if options.metres else sorted({min(n, seen) for n in options.frames})
        for rule in options.rules:
            if rule == CONSTANT:
                truth, track = Truth(T=[piece[1] for piece in pieces]), None
            else:
                truth, track = run_segments(
                    model, offset, rule, pieces, options.segment_frames, options.overlap
                )
            for n in lengths:
                row = figures(truth, track, n) | {"frames": n}
                rows.setdefault((rule,) if options.metres else (n, rule), []).append(row)
    results = []
    for key, of_key in rows.items():
        means = {name: _mean([row[name] for row in of_key]) for name in of_key[0]}
        record = {"world": _world(options), "frames": round(means["frames"]), "rule": key[-1]}
        how = {"segment_frames": options.segment_frames} if key[-1] != CONSTANT else {}
        far = {"metres": options.metres} if options.metres else {}
        results.append(means | record | how | far)
    return results


def one_by_one(options: argparse.Namespace, sides: tuple[int, int]) -> Iterator[list[Piece]]:
    """The pieces of one sequence after the other."""
    first, longest = _first_seed(options), max(options.frames)
    if options.video:
        yield list(recorded(options.video, options.ground_truth, *sides))
    elif options.metres:
        found = reaching(options.world, first, options.metres, longest)
        for seed, frames in islice(found, options.sequences):
            yield list(rendered(options.world, frames, range(seed, seed + 1), *sides))
    else:
        for seed in range(first, first + options.sequences):
            yield list(rendered(options.world, longest, range(seed, seed + 1), *sides))


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    titles = ("world", "frames", "rule", "ATE m", "of distance", "RPE m", "RPE deg", "abs rel",
              "delta 1.25")  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for r in results:
        share = 100 * r["ate"] / r["distance"] if r.get("distance") else None
        values = [r["ate"], share, r["rpe_t"], r["rpe_r"], r["abs_rel"], r["delta_125"]]
        cells = ["" if v is None else f"{v:.3g}" for v in values]
        if cells[1]:
            cells[1] += " %"
        name = r["rule"] + (f", segments of {r['segment_frames']}" if "segment_frames" in r else "")
        lines.append(f"| {r['world']} | {r['frames']} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Curves of each figure against the length, one line a rule."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = ("ate", "rpe_t", "rpe_r", "abs_rel")
    _, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 3.2), constrained_layout=True)
    for axis, name in zip(axes, shown, strict=True):
        for rule in dict.fromkeys(r["rule"] for r in results):
            points = [
                (r["frames"], r[name]) for r in results if r["rule"] == rule and r[name] is not None
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=rule)
        axis.set(xlabel="frames", title=name)
        axis.grid(alpha=0.3)
    axes[0].legend()
    plt.savefig(path, dpi=110)
    plt.close()


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="compact", help="name, .safetensors file or URL")
    parser.add_argument("--world", choices=sorted(_SOURCE), default="rooms")
    parser.add_argument("--frames", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument(
        "--rules", nargs="+", default=["cut3r", "ttt3r"], choices=[*UPDATE_RULES, CONSTANT]
    )
    parser.add_argument("--seed", type=int, default=0, help="which held-out worlds")
    parser.add_argument("--sequences", type=int, default=3)
    parser.add_argument("--video", help="a real video instead of a rendered world")
    parser.add_argument("--ground-truth", help="its poses, TUM format, one line a frame")
    parser.add_argument("--segment-frames", type=int, help="cut into segments aligned by Sim(3)")
    parser.add_argument(
        "--metres", type=float,
        help="end each rendered sequence so far from its start, along its path; those that do not "
        "come so far within the largest of --frames are passed over",
    )  # fmt: skip
    parser.add_argument("--overlap", type=int, default=4, help="frames that neighbours share")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path, help="folder for the table and the curves")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if bool(options.video) != bool(options.ground_truth):
        parser.error("--video and --ground-truth go together")
    if min(options.frames) < 3 or options.sequences < 1:
        parser.error("--frames needs numbers of 3 or more, --sequences 1 or more")
    if options.segment_frames and not 1 <= options.overlap < options.segment_frames:
        parser.error("--overlap must be at least 1 and below --segment-frames")
    if options.metres is not None and (not options.segment_frames or options.video):
        parser.error("--metres goes with --segment-frames and a rendered world")
    if options.metres is not None and not options.metres > 0:
        parser.error("--metres needs a number above 0")
    return options


def main(arguments: list[str]) -> int:
    """Measure, print the table, and write what was asked for."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    began = time.monotonic()
    try:
        results = measure(options)
    except (ValueError, OSError) as error:
        print(f"length.py: {error}", file=sys.stderr)
        return 2
    text = table(results)
    print(text)
    if options.json:
        record = {
            "results": results,
            "weights": options.weights,
            "seed": options.seed,
            "sequences": options.sequences,
            "seconds": round(time.monotonic() - began, 1),
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.docs:
        name = results[0]["world"] + ("-segments" if options.segment_frames else "")
        (options.docs / f"length-{name}.md").write_text(text)
        plot(results, options.docs / f"length-{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
