"""How runs of collections and drives that do not finish are counted: what alerts are made of."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from recordings import moving_squares, write_video
from s3fs import S3FileSystem

from flows.reconstruct_collection import CollectionIncomplete, reconstruct_collection
from flows.reconstruct_drive import reconstruct_drive
from storage.errors import StoreUnavailable
from tasks.config import BudgetConfig, FuseConfig, InferConfig, ReconstructionConfig

CONFIG = ReconstructionConfig(
    infer=InferConfig(weights="untrained"),
    fuse=FuseConfig(voxel_m=0.1),  # coarse: the mesh is not what is tested
)

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_a_night_that_cannot_begin_is_counted_as_failed(video, tmp_path, counted):
    logs, out = str(video.parent), str(tmp_path / "out")
    with pytest.raises(ValueError, match="there is no such file or folder"):
        reconstruct_collection(str(tmp_path / "nowhere"), out, CONFIG)
    assert counted("ttt3r.collections") == {"failed": 1}
    other = replace(CONFIG, infer=InferConfig(weights="nothing-of-this-name"))
    with pytest.raises(ValueError, match="nothing-of-this-name"):
        reconstruct_collection(logs, out, other)
    assert counted("ttt3r.collections") == {"failed": 1}
    with pytest.raises(ValueError, match="a budget is given and nothing is known"):
        reconstruct_collection(logs, out, CONFIG, budget=BudgetConfig(max_gpu_hours=1.0))
    assert counted("ttt3r.collections") == {"failed": 1}
    assert counted("ttt3r.drives") == {}


@pytest.fixture
def no_s3(monkeypatch) -> Iterator[None]:
    """The environment leads fsspec to where nobody listens."""
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # connections to other servers
    yield
    S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("no_s3")
def test_a_night_whose_bucket_is_away_is_counted_as_failed(tmp_path, monkeypatch, counted):
    monkeypatch.setattr("tasks.retries.RETRY_DELAYS_S", [0])
    with pytest.raises(StoreUnavailable):
        reconstruct_collection("s3://logs/2026", str(tmp_path), CONFIG)
    assert counted("ttt3r.collections") == {"failed": 1}


def test_a_night_is_finished_or_incomplete(tmp_path, counted):
    (tmp_path / "logs").mkdir()
    write_video(tmp_path / "logs" / "good.mp4", moving_squares(10))
    reconstruct_collection(str(tmp_path / "logs/*.mp4"), str(tmp_path / "out"), CONFIG)
    assert counted("ttt3r.collections") == {"finished": 1}
    (tmp_path / "logs" / "broken.mp4").write_text("not a video")
    with pytest.raises(CollectionIncomplete):
        reconstruct_collection(str(tmp_path / "logs/*.mp4"), str(tmp_path / "out"), CONFIG)
    assert counted("ttt3r.collections") == {"incomplete": 1}


def test_a_recording_that_stays_unreadable_fails_once(tmp_path, counted):
    broken = tmp_path / "broken.mp4"
    broken.write_text("not a video")

    def count_a_run() -> dict[str, float]:
        with pytest.raises(ValueError, match=r"broken\.mp4"):
            reconstruct_drive(str(broken), str(tmp_path / "out"), CONFIG)
        return counted("ttt3r.drives")

    assert count_a_run() == {"failed": 1}
    assert count_a_run() == {"still_unreadable": 1}
    assert count_a_run() == {"still_unreadable": 1}
    broken.write_text("another one, and not a video either")
    assert count_a_run() == {"failed": 1}
    assert count_a_run() == {"still_unreadable": 1}


def test_a_drive_that_fails_by_no_fault_of_its_recording_fails_each_time(video, tmp_path, counted):
    for _ in range(2):
        with pytest.raises(ValueError, match="is not a price table: there is no such file"):
            reconstruct_drive(
                str(video), str(tmp_path / "out"), CONFIG, prices=str(tmp_path / "none.toml")
            )
        assert counted("ttt3r.drives") == {"failed": 1}
    assert not (tmp_path / "out").exists()
