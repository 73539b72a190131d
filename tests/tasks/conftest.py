"""A drive of known geometry: a straight corridor, and a network that is never wrong."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import write_video

from storage.layout import MOTION_COSTS
from storage.reconstruction import ReconstructionStore
from tasks.config import InferConfig, PlanConfig, ReconstructionConfig
from tasks.infer import segment_keys
from tasks.plan import plan_stage
from tasks.planned import read_plan
from tasks.probe import probe_stage
from ttt3r.geometry import depth_to_pointmap
from ttt3r.motion_scale import motion_costs
from ttt3r.weights import weights_info

# The network's own size, so that frames are neither resized nor cropped.
NETWORK = weights_info("untrained").config
WIDTH = NETWORK.image_size
HEIGHT = WIDTH * 3 // 4 // NETWORK.patch_size * NETWORK.patch_size
FOCAL = WIDTH * 0.625
STEP_M = 0.15  # per frame, forward
HALF_WIDTH_M, HALF_HEIGHT_M = 2.0, 1.5
END_M = 30.0  # a wall closes the corridor
# Floor, ceiling, left, right, end.
COLORS = np.array([[90, 90, 90], [200, 200, 220], [200, 40, 40], [40, 160, 40], [40, 40, 200]])


def corridor(z: float) -> tuple[np.ndarray, np.ndarray]:
    """Depth [H, W] in metres and colour [H, W, 3] seen from the middle at `z`, looking forward."""
    v, u = np.mgrid[0:HEIGHT, 0:WIDTH].astype(float)
    x, y = (u - WIDTH // 2) / FOCAL, (v - HEIGHT // 2) / FOCAL
    with np.errstate(divide="ignore"):
        planes = [
            np.where(y > 0, HALF_HEIGHT_M / y, np.inf),
            np.where(y < 0, -HALF_HEIGHT_M / y, np.inf),
            np.where(x < 0, -HALF_WIDTH_M / x, np.inf),
            np.where(x > 0, HALF_WIDTH_M / x, np.inf),
            np.full_like(x, END_M - z),
        ]
    depth = np.stack(planes)
    return depth.min(axis=0), COLORS[depth.argmin(axis=0)].astype(np.uint8)


@dataclass
class Corridor:
    """A planned drive of the corridor; its segments are in units of their own."""

    url: str
    config: ReconstructionConfig
    scales: tuple[float, ...]  # metres per unit of each segment

    def copy(self, folder: Path) -> "Corridor":
        """The same drive in a store of its own, in the state in which this one is now."""
        url = str(folder / "out" / "corridor.zarr")
        shutil.copytree(self.url, url)
        return replace(self, url=url)

    def infer_perfectly(self, said_motion: tuple[float, ...] = ()) -> None:
        """Write and commit what a network without error would: each segment in its own frame.

        With `said_motion` it errs in how far each segment's camera goes, by these factors.
        """
        store = ReconstructionStore.open(self.url)
        plan, info = read_plan(store), weights_info(self.config.infer.weights)
        keys = segment_keys(store, plan, plan.segments, self.config.infer, info)
        said_motion = said_motion or (1.0,) * len(plan.segments)
        for segment, scale, said in zip(plan.segments, self.scales, said_motion, strict=True):
            store.create_segment(segment, plan.chunk_frames, HEIGHT, WIDTH, 2, (1, 4), (1, 8))
            for chunk in segment.chunks(plan.chunk_frames):
                frames = range(chunk.start, chunk.stop)
                arrays = self._arrays(frames, segment.start, scale)
                arrays["cam_to_seg"][:, :3, 3] *= said
                store.write_chunk(segment, chunk, arrays)
                costs = self._motion_costs(frames, arrays)
                store.commit_chunk(
                    segment, chunk, {"key": keys[segment.index], MOTION_COSTS: costs}
                )

    def infer_one_chunk_otherwise(self) -> None:
        """Leave a chunk of the second segment as one of another rule."""
        store, name = ReconstructionStore.open(self.url), "infer/0001/0001"
        plan, other = read_plan(store), replace(self.config.infer, rule="cut3r")
        info = weights_info(other.weights)
        key = segment_keys(store, plan, [plan.segments[1]], other, info)[1]
        store.commit(name, {**(store.read_commit(name) or {}), "key": key})

    @staticmethod
    def _motion_costs(frames: range, arrays: dict[str, np.ndarray]) -> list[float]:
        views = [(frame * STEP_M, *corridor(frame * STEP_M)) for frame in frames]
        striped = [color * ((z + depth) % 2 < 1)[..., None] for z, depth, color in views]
        images = np.stack(striped).astype(np.uint8)
        matrices = torch.from_numpy(arrays["intrinsics"])
        points = depth_to_pointmap(torch.from_numpy(arrays["depth"]), matrices)
        T_seg_cam = torch.from_numpy(arrays["cam_to_seg"])
        return motion_costs(torch.from_numpy(images), points, T_seg_cam, matrices).tolist()

    @staticmethod
    def _arrays(frames: range, first: int, scale: float) -> dict[str, np.ndarray]:
        count = len(frames)
        depth = np.stack([corridor(frame * STEP_M)[0] for frame in frames]) / scale
        cam_to_seg = np.tile(np.eye(4, dtype=np.float32), (count, 1, 1))
        cam_to_seg[:, 2, 3] = [(frame - first) * STEP_M / scale for frame in frames]
        camera = np.array([[FOCAL, 0, WIDTH // 2], [0, FOCAL, HEIGHT // 2], [0, 0, 1]], np.float32)
        return {
            "depth": depth.astype(np.float32),
            "confidence": np.full(depth.shape, 5, np.float32),
            "cam_to_seg": cam_to_seg,
            "intrinsics": np.tile(camera, (count, 1, 1)),
            "descriptor": np.zeros((count, 2), np.float32),
            "gate": np.full((count, 5), 0.3, np.float32),
            "state_tokens": np.zeros((1, 4), np.float32),
            "state_pose_memory": np.zeros((1, 8), np.float32),
        }


def plan_corridor(folder: Path, pixels: int = 1) -> Corridor:
    """Forty frames of the corridor in two segments, the second in other units.

    The recording has `pixels` x `pixels` pixels for every one of the network's input.
    """
    video = folder / "corridor.mp4"
    pictures = (corridor(i * STEP_M)[1] for i in range(40))
    write_video(video, [np.repeat(np.repeat(p, pixels, 0), pixels, 1) for p in pictures])
    config = ReconstructionConfig(plan=PlanConfig(24, 8, 8), infer=InferConfig("untrained"))
    url = str(folder / "out" / "corridor.zarr")
    probe_stage.fn(str(video), "corridor", url)
    plan_stage.fn(url, config)
    return Corridor(url, config, (1.0, 1.25))


@pytest.fixture
def corridor_drive(tmp_path: Path) -> Corridor:
    """A planned drive of the test's own, recorded in the network's own size."""
    return plan_corridor(tmp_path)


@pytest.fixture
def large_corridor_drive(tmp_path: Path) -> Corridor:
    """The same, recorded in twice the network's size."""
    return plan_corridor(tmp_path, pixels=2)


@pytest.fixture(scope="module")
def inferred_corridor(tmp_path_factory) -> Corridor:
    """A drive that a perfect network has inferred; tests copy it."""
    drive = plan_corridor(tmp_path_factory.mktemp("corridor"))
    drive.infer_perfectly()
    return drive
