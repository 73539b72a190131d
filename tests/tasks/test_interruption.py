"""An interruption is heard whatever inference waits for."""

import os
import signal
import threading
import time
from contextlib import contextmanager
from typing import IO

import pytest
from recordings import moving_squares, write_video

from storage import claims, media
from storage.reconstruction import ReconstructionStore
from storage.records import DriveRecord
from tasks.config import InferConfig, PlanConfig, ReconstructionConfig
from tasks.infer import infer_stage
from tasks.interruption import run_until_stopped
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


@pytest.fixture
def interrupted():
    """An interruption raises in the main thread; a shell may start what runs here without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class InterruptedFile:
    """A file that is read in small pieces; with the third comes the interruption."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._reads = file, 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self._reads += 1
        if self._reads == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        return self._file.read(min(size, 2048))


class Ended(BaseException):
    """What a handler that is not Prefect's raises."""


@pytest.fixture
def ended():
    """SIGTERM and SIGHUP raise `Ended` in the main thread."""

    def end(number: int, frame: object) -> None:
        raise Ended

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, end) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


RECEIVERS = ("the main thread", "the work's thread")


def receiving(receiver: str) -> int:
    """Number of the thread that signals are sent to, as the work's thread sees it."""
    return threading.main_thread().ident if receiver == RECEIVERS[0] else threading.get_ident()


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_work_ends_in_order_whatever_a_handler_raises(receiver, ended):
    heard = []

    def work(stop: threading.Event) -> None:
        time.sleep(0.2)  # the main thread waits by now
        to = receiving(receiver)
        signal.pthread_kill(to, signal.SIGTERM)
        heard.append(stop.wait(30))

    with pytest.raises(Ended):
        run_until_stopped(work)
    assert heard == [True]


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_work_ends_in_order_however_many_signals_come(receiver, ended):
    steps = []

    def work(stop: threading.Event) -> None:
        to = receiving(receiver)
        time.sleep(0.2)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.pthread_kill(to, number)
        steps.append(stop.wait(30))
        for _ in range(3):
            signal.pthread_kill(to, signal.SIGTERM)
            time.sleep(0.3)
        steps.append("finished")

    with pytest.raises(Ended):
        run_until_stopped(work)
    assert steps == [True, "finished"]


def test_recording_that_is_probed_does_not_end_where_the_interruption_comes(
    tmp_path, monkeypatch, interrupted
):
    video, url = write_video(tmp_path / "squares.mp4", moving_squares(200)), f"{tmp_path}/out.zarr"
    opened = media.open_bytes

    @contextmanager
    def open_bytes(location):
        with opened(location) as file:
            yield InterruptedFile(file)

    with monkeypatch.context() as patch:
        patch.setattr(media, "open_bytes", open_bytes)
        with pytest.raises(KeyboardInterrupt):
            probe_stage.fn(str(video), "squares", url)
    store = ReconstructionStore.open(url)
    assert store.read_commit("probe") is None
    probe_stage.fn(str(video), "squares", url)
    assert DriveRecord.from_json(store.attributes["drive"]).frames == 200


def test_interruption_is_heard_while_the_claims_of_a_lost_machine_are_watched(planned, interrupted):
    left = "claims/infer/0003/000001.json"
    planned.folder.write(left, b'{"machine": "lost"}')
    finished = [f"infer/{segment:04d}/{chunk:04d}" for segment in (0, 1) for chunk in (0, 1)]

    def interrupt_once_the_first_two_are_done() -> None:
        while planned.commit_names("infer") != finished:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    began = time.monotonic()
    threading.Thread(target=interrupt_once_the_first_two_are_done, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        infer_stage.fn(planned.url, range(4), CONFIG.infer)
    assert time.monotonic() - began < claims.LEASE_S / 2
    assert planned.commit_names("infer") == finished
    assert planned.folder.sizes("claims").keys() == {"claims/zarr.json", left}
    planned.folder.delete(left)
    assert infer_stage.fn(planned.url, range(4), CONFIG.infer) == 16
