"""Render the sample drive that `ttt3r demo` reconstructs, with its ground truth.

    python tests/benchmarks/make_sample_drive.py [--output flows/samples] [--frames 300]

Writes street.mp4 (H.264, 10 frames a second), street_groundtruth_tum.txt,
street_groundtruth_kitti.txt (camera to world, metres, first frame the identity) and
street_intrinsics.json. The seed is a held-out one: no network was trained on this street.
"""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from scipy.spatial.transform import Rotation

from ttt3r.synthetic import HELD_OUT_SEED, render_chunks

SEED = HELD_OUT_SEED + 812
WIDTH, HEIGHT, RATE = 640, 360, 10
LARGEST = 3_000_000  # bytes


def render_drive(frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures [N, H, W, 3], poses [N, 4, 4] relative to the first, and intrinsics [3, 3]."""
    images, poses, intrinsics = [], [], np.eye(3)
    for piece in render_chunks("streets", [SEED], frames, HEIGHT, WIDTH, supersample=2):
        images.append(piece.images[0].numpy())
        poses.append(piece.T_world_cam[0].double().numpy())
        intrinsics = piece.intrinsics[0].double().numpy()
    T_world_cam = np.concatenate(poses)
    return np.concatenate(images), np.linalg.inv(T_world_cam[0]) @ T_world_cam, intrinsics


def write_video(path: Path, images: np.ndarray, crf: int) -> int:
    """Encode pictures; the same pictures give the same bytes. Returns the size."""
    options = {"crf": str(crf), "preset": "slow", "threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(RATE), options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path.stat().st_size


def write_ground_truth(folder: Path, poses: np.ndarray, intrinsics: np.ndarray) -> None:
    """Poses in TUM's and KITTI's formats, and the camera as JSON."""
    times = np.arange(len(poses)) / RATE
    quaternions = Rotation.from_matrix(poses[:, :3, :3]).as_quat()  # x, y, z, w
    rows = np.column_stack([times, poses[:, :3, 3], quaternions])
    header = "timestamp tx ty tz qx qy qz qw (camera to world, metres)"
    np.savetxt(folder / "street_groundtruth_tum.txt", rows, fmt="%.7f", header=header)
    flat = poses[:, :3].reshape(-1, 12)
    np.savetxt(folder / "street_groundtruth_kitti.txt", flat, fmt="%.7f")
    camera = {
        "width": WIDTH,
        "height": HEIGHT,
        "fx": round(float(intrinsics[0, 0]), 4),
        "fy": round(float(intrinsics[1, 1]), 4),
        "cx": round(float(intrinsics[0, 2]), 4),
        "cy": round(float(intrinsics[1, 2]), 4),
        "pixel_origin": "centre of the top-left pixel",
        "frames": len(poses),
        "frames_per_second": RATE,
        "seed": SEED,
        "distance_m": round(
            float(np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1).sum()), 2
        ),
    }
    (folder / "street_intrinsics.json").write_text(json.dumps(camera, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("flows/samples"))
    parser.add_argument("--frames", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    images, poses, intrinsics = render_drive(arguments.frames)
    for crf in range(20, 40):
        size = write_video(arguments.output / "street.mp4", images, crf)
        if size <= LARGEST:
            break
    write_ground_truth(arguments.output, poses, intrinsics)
    print(f"{len(images)} frames, {size} bytes at crf {crf}, in {arguments.output}")


if __name__ == "__main__":
    main()
