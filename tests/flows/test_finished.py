"""Which drives need no run."""

from dataclasses import replace

import pytest
from recordings import moving_squares, write_video

from flows.reconstruct_drive import reconstruct_drive
from storage.reconstruction import ReconstructionStore
from tasks.align import align_stage
from tasks.config import AlignConfig, FuseConfig, InferConfig, PlanConfig, ReconstructionConfig
from tasks.finished import is_finished

CONFIG = ReconstructionConfig(
    plan=PlanConfig(segment_frames=12, overlap_frames=4, chunk_frames=5),
    infer=InferConfig(weights="untrained", lanes=2),
    fuse=FuseConfig(voxel_m=0.1),  # coarse: the mesh is not what is tested
)

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_drive_is_finished_until_its_video_its_configuration_or_a_commit_changes(tmp_path):
    video = write_video(tmp_path / "squares.mp4", moving_squares(20))
    url = str(tmp_path / "out" / "squares.zarr")
    assert not is_finished(str(video), url, CONFIG)
    reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    assert is_finished(str(video), url, CONFIG)
    assert is_finished(str(video), url, replace(CONFIG, infer=replace(CONFIG.infer, lanes=1)))
    assert not is_finished(str(video), url, replace(CONFIG, fuse=FuseConfig(voxel_m=0.5)))
    store = ReconstructionStore.open(url)
    store.drop_commits("infer/0001/0001")
    assert not is_finished(str(video), url, CONFIG)
    reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    assert is_finished(str(video), url, CONFIG)
    write_video(video, moving_squares(21))
    assert not is_finished(str(video), url, CONFIG)


def results(url: str) -> set[str]:
    names = ReconstructionStore.open(url).commit_names()
    return {name for name in names if not name.startswith("attempts/")}


def test_run_of_another_configuration_that_is_killed_leaves_nothing_finished(tmp_path):
    video = write_video(tmp_path / "squares.mp4", moving_squares(20))
    url = reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    other = replace(CONFIG, align=AlignConfig(focal_px=60.0))
    before = results(url)
    with pytest.MonkeyPatch.context() as patch:  # killed after all its stages
        patch.setattr("flows.reconstruct_drive.write_finished", lambda *_: None)
        reconstruct_drive(str(video), str(tmp_path / "out"), other)
    assert results(url) == before - {"finished"}  # so their names do not tell
    assert not is_finished(str(video), url, CONFIG)


def test_recording_that_cannot_be_looked_at_is_left_to_its_own_run(tmp_path):
    video = write_video(tmp_path / "squares.mp4", moving_squares(10))
    url = reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    assert is_finished(str(video), url, CONFIG)
    video.unlink()
    assert not is_finished(str(video), url, CONFIG)


def test_clip_that_comes_while_its_drive_is_at_work_is_not_passed_over(tmp_path, monkeypatch):
    drive = tmp_path / "drive"
    drive.mkdir()
    write_video(drive / "1.mp4", moving_squares(20))
    align = align_stage.fn

    def copy_goes_on(url, *given):
        write_video(drive / "2.mp4", moving_squares(20))
        return align(url, *given)

    with monkeypatch.context() as patch:
        patch.setattr(align_stage, "fn", copy_goes_on)
        url = reconstruct_drive(str(drive), str(tmp_path / "out"), CONFIG)
    assert not is_finished(str(drive), url, CONFIG)
    reconstruct_drive(str(drive), str(tmp_path / "out"), CONFIG)
    assert is_finished(str(drive), url, CONFIG)
    assert len(ReconstructionStore.open(url).read_frames()["timestamp"]) == 40


def test_drive_with_a_segment_set_aside_wants_another_run(tmp_path):
    video = write_video(tmp_path / "squares.mp4", moving_squares(20))
    url = reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    store = ReconstructionStore.open(url)
    store.drop_commits("infer/0001")
    depth = tmp_path / "out" / "squares.zarr" / "segments/0001/depth/zarr.json"
    depth.write_text("{}")
    reconstruct_drive(str(video), str(tmp_path / "out"), CONFIG)
    assert not is_finished(str(video), url, CONFIG)
