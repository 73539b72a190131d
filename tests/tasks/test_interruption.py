"""An interruption is heard whatever inference waits for."""

import os
import signal
import threading
import time
from functools import partial

import pytest
from recordings import moving_squares, write_video

from storage import claims
from storage.reconstruction import ReconstructionStore
from tasks.config import InferConfig, PlanConfig, ReconstructionConfig
from tasks.infer import infer_stage
from tasks.plan import plan_stage
from tasks.probe import probe_stage

CONFIG = ReconstructionConfig(
    plan=PlanConfig(segment_frames=8, overlap_frames=2, chunk_frames=4),
    infer=InferConfig(weights="untrained", lanes=2),
)


@pytest.fixture
def planned(tmp_path) -> ReconstructionStore:
    """A planned drive of 44 frames, in seven segments of two chunks at most."""
    video, url = write_video(tmp_path / "squares.mp4", moving_squares(44)), f"{tmp_path}/out.zarr"
    probe_stage.fn(str(video), "squares", url)
    plan_stage.fn(url, CONFIG)
    return ReconstructionStore.open(url)


def test_interruption_is_heard_while_the_claims_of_a_lost_machine_are_watched(planned, request):
    left = "claims/infer/0003/000001.json"
    planned._folder.write(left, b'{"machine": "lost"}')
    finished = [f"infer/{segment:04d}/{chunk:04d}" for segment in (0, 1) for chunk in (0, 1)]

    def interrupt_once_the_first_two_are_done() -> None:
        while planned.commit_names("infer") != finished:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    began = time.monotonic()
    # A shell starts what goes on in the background with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(partial(signal.signal, signal.SIGINT, before))
    threading.Thread(target=interrupt_once_the_first_two_are_done, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        infer_stage.fn(planned.url, range(4), CONFIG.infer)
    assert time.monotonic() - began < claims.LEASE_S / 2
    assert planned.commit_names("infer") == finished
    assert planned._folder.sizes("claims").keys() == {"claims/zarr.json", left}
    planned._folder.delete(left)
    assert infer_stage.fn(planned.url, range(4), CONFIG.infer) == 16
