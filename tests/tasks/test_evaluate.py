from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recordings import moving_squares

from storage.reconstruction import ReconstructionStore
from tasks.align import align_stage
from tasks.config import AlignConfig
from tasks.evaluate import evaluate_store, paired_truth
from tasks.export import describe_part, export_store
from tasks.planned import aside_commit, read_plan
from tasks.probe import probe_stage
from ttt3r.metrics import kitti_text, read_kitti_indexed, tum_text

ASIDE = {"attempts": 1, "time": "", "reason": "it is damaged", "is_running": False}


@pytest.fixture
def damaged_folder(tmp_path) -> ReconstructionStore:
    """A drive of twelve images, of which numbers 3 and 4 cannot be read."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, picture in enumerate(moving_squares(12)):
        path = folder / f"{number:02d}.jpg"
        Image.fromarray(picture).save(path)
        if number in (3, 4):
            path.write_bytes(path.read_bytes()[:-300])
    url = str(tmp_path / "out" / "images.zarr")
    probe_stage.fn(str(folder), "images", url)
    return ReconstructionStore.open(url)


def along_x(count: int) -> np.ndarray:
    """Poses [N, 4, 4], the i-th at x = i."""
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, 0, 3] = np.arange(count)
    return poses


def write_truth(path: Path, format: str, poses: np.ndarray, times: np.ndarray) -> Path:
    path.write_text(kitti_text(poses) if format == "kitti" else tum_text(times, poses))
    return path


@pytest.mark.parametrize(
    ("format", "times"),
    [
        ("kitti", np.arange(12) / 10),
        ("tum", np.arange(12) / 10),
        ("tum", np.arange(12) * 7 + 1e9),  # another clock: one pose an image
    ],
)
def test_truth_is_that_of_the_recorded_frame_where_others_do_not_decode(
    damaged_folder, tmp_path, format, times
):
    path = write_truth(tmp_path / "truth.txt", format, along_x(12), times)
    frames, truth = paired_truth(damaged_folder, np.arange(2, 10), path, format)
    assert frames.tolist() == [*range(2, 10)]
    assert truth[:, 0, 3].tolist() == [2, 5, 6, 7, 8, 9, 10, 11]


def test_truth_that_meets_images_by_chance_is_refused(damaged_folder, tmp_path):
    path = write_truth(tmp_path / "truth.txt", "tum", along_x(20), np.arange(20) * 0.3)
    with pytest.raises(ValueError, match=r"images have no times, and .* 20 poses for 12 images"):
        paired_truth(damaged_folder, np.arange(10), path, "tum")


def test_truth_may_have_a_clock_of_its_own(corridor_drive, tmp_path):
    store, mine = ReconstructionStore.open(corridor_drive.url), np.arange(40)
    path = write_truth(tmp_path / "t.txt", "tum", along_x(40), np.arange(40) / 10 + 1.7e9)
    with pytest.raises(ValueError, match=r"no timestamps .*--time-offset .* 1700000000\.0+ s"):
        paired_truth(store, mine, path, "tum")
    frames, truth = paired_truth(store, mine, path, "tum", 1.7e9)
    assert frames.tolist() == truth[:, 0, 3].tolist() == mine.tolist()


def test_kitti_export_of_a_later_part_tells_its_frames(corridor_drive, tmp_path):
    corridor_drive.infer_perfectly()
    store = ReconstructionStore.open(corridor_drive.url)
    store.commit(aside_commit(0), ASIDE)
    align_stage.fn(store.url, AlignConfig(), corridor_drive.config.infer)
    path = export_store(store.url, "kitti", str(tmp_path / "kitti.txt"))
    assert read_kitti_indexed(path)[0].tolist() == [*range(16, 40)]
    said = describe_part(store.url, "kitti")
    assert said.startswith("part 0 of 1: frames 16 to 39, 24 of 40; lines begin with the frame's")
    assert describe_part(store.url, "ply") == "part 0 of 1: frames 16 to 39, 24 of 40"
    figures = evaluate_store(store.url, path, "kitti")
    assert (figures["frames"], figures["frames_without_truth"]) == (24, 0)
    assert figures["frames_elsewhere"] == 16
    assert figures["ate_none_m"] == pytest.approx(0, abs=1e-6)


def test_depth_is_that_of_the_recorded_frame_and_of_some_pixels_of_very_many(
    corridor_drive, tmp_path, monkeypatch
):
    corridor_drive.infer_perfectly()
    store = ReconstructionStore.open(corridor_drive.url)
    numbers = np.arange(40) + 2 * (np.arange(40) >= 10)  # as if two frames had not decoded
    monkeypatch.setattr("tasks.evaluate.frame_numbers", lambda _: numbers)
    align_stage.fn(store.url, AlignConfig(), corridor_drive.config.infer)
    trajectory = store.read_trajectory()
    truth = tmp_path / "kitti.txt"
    truth.write_text(kitti_text(trajectory["cam_to_world"], numbers))
    for frame in (3, 10):
        depth = store.read(read_plan(store).segments[0], "depth", frame, frame + 1)[0]
        millimetres = np.round(1000 * depth * trajectory["scale"][0]).astype(np.uint16)
        Image.fromarray(millimetres).save(tmp_path / f"{numbers[frame]}.png")
    for most in (2**22, 1000):
        monkeypatch.setattr("tasks.evaluate.MOST_PIXELS", most)
        figures = evaluate_store(store.url, str(truth), "kitti", str(tmp_path))
        assert figures["depth_frames"] == 2
        assert figures["abs_rel"] == pytest.approx(0, abs=2e-3)


def test_depth_is_compared_in_metres_of_the_truth(corridor_drive, tmp_path):
    corridor_drive.infer_perfectly()
    store = ReconstructionStore.open(corridor_drive.url)
    align_stage.fn(store.url, AlignConfig(scale_prior_sigma=100.0), corridor_drive.config.infer)
    trajectory, plan = store.read_trajectory(), read_plan(store)
    assert trajectory["scale"][1] > 1.2 * trajectory["scale"][0]  # segments have units of their own
    twice = trajectory["cam_to_world"]
    twice[:, :3, 3] *= 2
    (tmp_path / "kitti.txt").write_text(kitti_text(twice))
    for frame in (3, 35):
        owner = trajectory["segment"][frame]
        depth = store.read(plan.segments[owner], "depth", frame, frame + 1)[0]
        millimetres = np.round(2000 * depth * trajectory["scale"][owner]).astype(np.uint16)
        Image.fromarray(millimetres).save(tmp_path / f"{frame}.png")
    figures = evaluate_store(store.url, str(tmp_path / "kitti.txt"), "kitti", str(tmp_path))
    assert figures["abs_rel"] == pytest.approx(0, abs=2e-3)
    assert figures["delta_125"] == 1


def test_depth_of_eight_bits_is_no_depth(corridor_drive, tmp_path):
    corridor_drive.infer_perfectly()
    store = ReconstructionStore.open(corridor_drive.url)
    align_stage.fn(store.url, AlignConfig(), corridor_drive.config.infer)
    truth = export_store(store.url, "kitti", str(tmp_path / "kitti.txt"))
    Image.new("L", (80, 56), 30).save(tmp_path / "3.png")
    with pytest.raises(ValueError, match=r"3\.png is a PNG file of mode L; expected 16-bit"):
        evaluate_store(store.url, truth, "kitti", str(tmp_path))


def test_depth_is_compared_where_there_is_a_trajectory(corridor_drive, tmp_path):
    corridor_drive.infer_perfectly()
    url, infer = corridor_drive.url, corridor_drive.config.infer
    store = ReconstructionStore.open(url)
    store.commit(aside_commit(1), ASIDE)
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
