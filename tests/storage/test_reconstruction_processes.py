"""ReconstructionStore under several processes, under kill -9, and without a usable location."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_segment import SEGMENT, SHAPE

from storage import upkeep
from storage.errors import ChunkMissing, StoreRefused
from storage.reconstruction import ReconstructionStore

ROOT = Path(__file__).resolve().parents[2]
CHUNKS = SEGMENT.chunks(4)  # the last has two frames

# Writes every STEP-th chunk from FIRST on that is not done yet; all values follow from its frames.
WORKER = """
import sys
import numpy as np
from storage.reconstruction import ReconstructionStore
from storage.records import Segment

url, first, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
segment = Segment(index=0, start=0, stop=46, part=0)
store = ReconstructionStore.open(url)
print("ready", flush=True)
for chunk in segment.chunks(4)[first::step]:
    if store.is_chunk_done(segment, chunk, "key"):
        continue
    frames = chunk.stop - chunk.start
    value = np.arange(chunk.start, chunk.stop, dtype=np.float32)
    store.write_chunk(segment, chunk, {
        "depth": np.broadcast_to(1 + value[:, None, None], (frames, 48, 64)),
        "confidence": np.full((frames, 48, 64), 2.0, np.float32),
        "cam_to_seg": np.broadcast_to(value[:, None, None], (frames, 4, 4)),
        "intrinsics": np.zeros((frames, 3, 3), np.float32),
        "descriptor": np.zeros((frames, 8), np.float32),
        "gate": np.zeros((frames, 5), np.float32),
        "state_tokens": np.full((96, 64), chunk.stop, np.float32),
        "state_pose_memory": np.zeros((16, 128), np.float32),
    })
    store.commit_chunk(segment, chunk, {"key": "key"})
"""


# Starting Python with s3fs costs seconds: the default run keeps to the local disk.
on_both = pytest.mark.parametrize(
    "output_url", ["local", pytest.param("s3", marks=pytest.mark.slow)], indirect=True
)


def start_worker(url: str, first: int = 0, step: int = 1) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "error", "-c", WORKER, url, str(first), str(step)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_until_ready(worker: "subprocess.Popen[str]") -> None:
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"


def finish(worker: "subprocess.Popen[str]") -> None:
    worker.communicate(timeout=120)
    assert worker.returncode == 0


def assert_complete(store: ReconstructionStore) -> None:
    depth = store.read(SEGMENT, "depth", 0, 46)
    np.testing.assert_array_equal(depth[:, 0, 0], 1 + np.arange(46))
    np.testing.assert_array_equal(depth, np.broadcast_to(depth[:, :1, :1], depth.shape))
    states = [store.read_state(SEGMENT, chunk)["tokens"][0, 0] for chunk in CHUNKS]
    assert states == [chunk.stop for chunk in CHUNKS]
    assert upkeep.verify(store) == []


@pytest.fixture
def store(output_url: str) -> ReconstructionStore:
    made = ReconstructionStore.create(f"{output_url}/drive.zarr", {})
    made.create_segment(SEGMENT, 4, **SHAPE)
    return made


@on_both
def test_processes_write_different_chunks_of_one_segment_without_locks(store):
    workers = [start_worker(store.url, first, step=2) for first in (0, 1)]
    for worker in workers:
        wait_until_ready(worker)
    for worker in workers:
        finish(worker)
    assert_complete(store)


@on_both
def test_killed_writer_leaves_nothing_that_reads_as_finished(store):
    worker = start_worker(store.url)
    wait_until_ready(worker)
    while store.read_commit("infer/0000/0001") is None and worker.poll() is None:
        time.sleep(0.002)
    worker.kill()
    worker.communicate()
    done = [chunk for chunk in CHUNKS if store.is_chunk_done(SEGMENT, chunk, "key")]
    assert 2 <= len(done) < len(CHUNKS)
    assert upkeep.verify(store) == []
    with pytest.raises(ChunkMissing, match=f"chunk {len(done)} "):
        store.read(SEGMENT, "depth", 0, 46)
    before = store.commits("infer")
    second = start_worker(store.url)
    finish(second)
    assert_complete(store)
    after = store.commits("infer")
    assert {name: after[name] for name in before} == before  # finished chunks were not redone


def test_create_says_why_a_local_folder_cannot_be_used(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreRefused, match=r"file/drive\.zarr: cannot be used: Not a dir"):
        ReconstructionStore.create(tmp_path / "file" / "drive.zarr", {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_create_says_when_a_local_folder_is_not_writable(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreRefused, match="access denied"):
        ReconstructionStore.create(tmp_path / "drive.zarr", {})


def test_create_says_when_the_bucket_is_missing(seaweed):
    with pytest.raises(StoreRefused, match="bucket or parent does not exist"):
        ReconstructionStore.create("s3://no-such-bucket/drive.zarr", {})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials found"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "access denied"),
    ],
)
def test_create_says_in_one_line_without_secrets_when_s3_refuses(seaweed, changes, expected):
    settings = {**os.environ, **seaweed.environment, "HOME": os.devnull, **changes}
    code = (
        "from storage.errors import StoreError\n"
        "from storage.reconstruction import ReconstructionStore\n"
        "try: ReconstructionStore.create('s3://drives/x.zarr', {})\n"
        "except StoreError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={name: value for name, value in settings.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith(f"s3://drives/x.zarr: {expected}")
    assert not {"testkey", "wrong-secret"} & set((done.stdout + done.stderr).split())
