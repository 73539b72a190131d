import numpy as np
import pytest
from PIL import Image

from storage.reconstruction import ReconstructionStore
from tasks.align import align_stage
from tasks.config import AlignConfig
from tasks.evaluate import evaluate_store
from tasks.export import export_store
from tasks.planned import aside_commit, read_plan


def test_depth_is_compared_where_there_is_a_trajectory(corridor_drive, tmp_path):
    corridor_drive.infer_perfectly()
    url, infer = corridor_drive.url, corridor_drive.config.infer
    store = ReconstructionStore.open(url)
    aside = {"attempts": 1, "time": "", "reason": "it is damaged", "is_running": False}
    store.commit(aside_commit(1), aside)
    align_stage.fn(url, AlignConfig(), infer)
    trajectory = store.read_trajectory()
    np.testing.assert_array_equal(trajectory["part"], np.where(np.arange(40) < 24, 0, -1))
    truth = export_store(url, "kitti", str(tmp_path / "kitti.txt"))
    depth = store.read(read_plan(store).segments[0], "depth", 3, 4)[0] * trajectory["scale"][0]
    for frame in (3, 39):  # the second is of nobody
        millimetres = np.round(1000 * depth).astype(np.uint16)
        Image.fromarray(millimetres).save(tmp_path / f"{frame:06d}.png")
    figures = evaluate_store(url, truth, "kitti", str(tmp_path))
    assert figures["depth_frames"] == 1
    assert figures["abs_rel"] == pytest.approx(0, abs=1e-3)
