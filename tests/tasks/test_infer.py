"""What the infer stage stores is what the network says of the drive's frames."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recordings import moving_squares
from scipy.spatial.transform import Rotation

from storage.layout import GATE_QUANTILES, MOTION_COSTS, chunk_commit
from storage.reconstruction import ReconstructionStore
from storage.records import Segment
from tasks.config import InferConfig, PlanConfig, ReconstructionConfig
from tasks.infer import infer_stage
from tasks.plan import plan_stage
from tasks.planned import read_plan
from tasks.probe import probe_stage
from ttt3r.geometry import estimate_focal
from ttt3r.images import normalise, preprocess
from ttt3r.model import Model
from ttt3r.motion_scale import motion_costs
from ttt3r.weights import load_model

CHUNK_FRAMES = 4
STORED_WITHIN = {"depth": 2**-10, "confidence": 2**-3, "descriptor": 2**-11}  # of the value
LAST_BITS = 1e-4  # that differ with the size of a batch; bfloat16 and float32 differ by more
ONE_POINT = 0.01  # of costs: last bits may decide whether a point is seen


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Twice as large as the network's input, and not of its shape."""
    return moving_squares(17, height=120, width=160)


def planned(folder: Path, pictures: list[np.ndarray], config: InferConfig) -> str:
    """Where a planned drive of three segments, which end within a chunk, lies."""
    recording, url = folder / "pictures", str(folder / "drive.zarr")
    recording.mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(recording / f"{number:04d}.png")
    probe_stage.fn(str(recording), "drive", url)
    plan = PlanConfig(segment_frames=7, overlap_frames=2, chunk_frames=CHUNK_FRAMES)
    plan_stage.fn(url, ReconstructionConfig(plan=plan, infer=config))
    return url


def said_by_the_network(
    model: Model, rule: str, pictures: list[np.ndarray], segment: Segment
) -> dict[str, np.ndarray]:
    """What is to be stored of a segment, computed for it alone, [T, ...]; of states, [chunk, ...].

    Metres, and pixels of the network's input.
    """
    size, patch = model.config.image_size, model.config.patch_size
    frames = np.stack([preprocess(p, size, patch) for p in pictures])
    images = normalise(frames)
    parts: dict[str, list[np.ndarray]] = {}
    state = None
    for start in range(segment.start, segment.stop, CHUNK_FRAMES):
        now = slice(start, min(start + CHUNK_FRAMES, segment.stop))
        chunk = images[now]
        with torch.inference_mode():
            said, state = model.run(chunk[None], state, rule=rule)
        assert said.pointmap_cam is not None
        assert said.confidence is not None
        pointmap = said.pointmap_cam[0].float()
        pose = said.camera_pose[0].double().numpy()
        cam_to_seg = np.tile(np.eye(4), (len(chunk), 1, 1))
        cam_to_seg[:, :3, :3] = Rotation.from_quat(pose[:, 3:], scalar_first=True).as_matrix()
        cam_to_seg[:, :3, 3] = pose[:, :3]
        intrinsics = np.tile(np.eye(3), (len(chunk), 1, 1))
        intrinsics[:, [0, 1], [0, 1]] = estimate_focal(pointmap).numpy()[:, None]
        intrinsics[:, :2, 2] = chunk.shape[3] // 2, chunk.shape[2] // 2
        costs = motion_costs(
            torch.from_numpy(frames[now]),
            pointmap,
            torch.from_numpy(cam_to_seg),
            torch.from_numpy(intrinsics),
        )
        found = {
            "motion_costs": costs[None],
            "depth": pointmap[..., 2],
            "confidence": said.confidence[0].float(),
            "cam_to_seg": cam_to_seg,
            "intrinsics": intrinsics,
            "descriptor": said.descriptor[0].float(),
            "gate": np.quantile(said.rate[0].float().numpy(), GATE_QUANTILES, axis=-1).T,
            "tokens": state.tokens,
            "pose_memory": state.pose_memory,
        }
        for name, values in found.items():
            parts.setdefault(name, []).append(np.asarray(values))
    return {name: np.concatenate(values) for name, values in parts.items()}


def stored(store: ReconstructionStore, segment: Segment) -> dict[str, np.ndarray]:
    """What the store holds of a segment; of states, [chunk, ...]."""
    names = ("depth", "confidence", "cam_to_seg", "intrinsics", "descriptor", "gate")
    frames = {name: store.read(segment, name, segment.start, segment.stop) for name in names}
    states = [store.read_state(segment, chunk) for chunk in segment.chunks(CHUNK_FRAMES)]
    commits = [
        store.read_commit(chunk_commit(segment.index, chunk.index))
        for chunk in segment.chunks(CHUNK_FRAMES)
    ]
    return frames | {
        "motion_costs": np.array([commit[MOTION_COSTS] for commit in commits]),
        **{name: np.stack([state[name] for state in states]) for name in ("tokens", "pose_memory")},
    }


@pytest.mark.parametrize(
    ("rule", "precision", "computes_in", "lanes"),
    [
        ("ttt3r", "auto", "float32", 2),
        ("cut3r", "float32", "float32", 2),
        # Batches of the reference's own size: the last bits of bfloat16 are large.
        ("ttt3r", "bfloat16", "bfloat16", 1),
    ],
)
def test_segments_hold_what_the_network_says(
    tmp_path, pictures, rule, precision, computes_in, lanes
):
    config = InferConfig("untrained", rule, device="cpu", precision=precision, lanes=lanes)
    url = planned(tmp_path, pictures, config)
    infer_stage.fn(url, range(3), config)
    store = ReconstructionStore.open(url)
    segments = read_plan(store).segments
    assert [segment.frames for segment in segments] == [7, 7, 7]
    model, _ = load_model("untrained", dtype=getattr(torch, computes_in))
    for segment in segments:
        expected = said_by_the_network(model, rule, pictures, segment)
        found = stored(store, segment)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(
                found[name],
                values,
                rtol=STORED_WITHIN.get(name, 0),
                atol=ONE_POINT if name == "motion_costs" else LAST_BITS,
                err_msg=name,
            )
