"""What a parent asks of others: the same whatever is finished, so that nothing is started twice."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from uuid import UUID, uuid4

import pytest
import torch
from prefect import flow, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import run_flow
from prefect.runtime import flow_run
from prefect.states import Cancelled, Cancelling, Crashed, Failed, Pending, Running, State
from recordings import moving_squares, write_video

from flows import fuse_tiles, infer_segments, reconstruct_collection
from flows.children import MOST_CRASHES, Child, cancel_children, family_tag, settle, start
from storage.drives import DriveLocation
from storage.errors import StoreUnavailable
from storage.reconstruction import ReconstructionStore
from tasks.config import FuseConfig, InferConfig, PlanConfig, ReconstructionConfig
from tasks.plan import plan_stage
from tasks.probe import probe_stage
from tasks.summary import progress

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def asked(monkeypatch):
    """Works and parameters of the children that parents ask for, one dict a parent."""
    found = []

    def note(deployment, family, children, *rest, **options):
        found.append({child.work: child.parameters for child in children})

    for module in (fuse_tiles, infer_segments):
        monkeypatch.setattr(module, "run_children", note)
    # Prefect takes artifacts of its flows only.
    monkeypatch.setattr(infer_segments, "progress_bar", lambda *what: nullcontext(lambda: None))
    return found


@pytest.fixture
def deployment(prefect_server) -> str:
    """A deployment whose runs nobody takes."""
    with get_client(sync_client=True) as client:
        part = client.create_flow_from_name("part")
        client.create_deployment(part, "nobody")
    return "part/nobody"


@pytest.fixture
def output() -> str:
    """An output of which the server knows nothing yet."""
    return f"memory://{uuid4()}"


def child(work: str) -> Child:
    return Child("part", {}, work, lambda: None)


def read(run_id: UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id)


def put(run_id: UUID, state: State) -> FlowRun:
    """The run after the server was told its state."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run_id, state, force=True)
    return read(run_id)


@flow
def parent(deployment: str, family: str) -> UUID:
    """Starts one child."""
    return start(deployment, family, child(family))


def test_parent_that_is_run_again_asks_for_the_same_runs_of_tiles(tmp_path, asked, monkeypatch):
    store = ReconstructionStore.create(tmp_path / "drive.zarr", {})
    store.commit("tiles", {"key": "k"})
    for todo in ([0, 1, 2, 3, 4], [1, 2, 4], [4]):
        monkeypatch.setattr(fuse_tiles, "unfused_batches", lambda url, count, left=todo: left)
        fuse_tiles.fuse_elsewhere(store.url, "drive", 5, FuseConfig(), InferConfig())
    cuts = [[run["batches"] for run in runs.values()] for runs in asked]
    assert cuts == [[[0, 1], [2, 3], [4]], [[0, 1], [2, 3], [4]], [[4]]]
    assert asked[2].keys() < asked[1].keys() == asked[0].keys()


def test_parent_that_is_run_again_asks_for_the_same_runs_of_segments(tmp_path, asked):
    video = write_video(tmp_path / "squares.mp4", moving_squares(44))
    infer = InferConfig(weights="untrained", lanes=2, segments_per_task=2, frames_per_run=1)
    config = ReconstructionConfig(plan=PlanConfig(8, 2, 4), infer=infer)
    url = str(tmp_path / "drive.zarr")
    probe_stage.fn(str(video), "squares", url)
    groups = plan_stage.fn(url, config)
    store = ReconstructionStore.open(url)
    store.commit("infer/0000/0000", {"key": "k"})
    infer_segments.infer_elsewhere(url, "drive", groups, infer)
    aside = {"key": "k", "attempts": 1, "time": "", "reason": "it failed", "is_running": True}
    store.commit("aside/0003", aside)
    infer_segments.infer_elsewhere(url, "drive", groups, infer)
    first, second = asked
    again = {work: run for work, run in second.items() if not run["alone"]}
    assert again == first
    (alone,) = (run for run in second.values() if run["alone"])
    assert alone["indices"] == [3]


def test_parent_of_runs_that_set_all_segments_aside_says_why(tmp_path, asked):
    video = write_video(tmp_path / "squares.mp4", moving_squares(14))
    infer = InferConfig(weights="untrained")
    url = str(tmp_path / "drive.zarr")
    probe_stage.fn(str(video), "squares", url)
    groups = plan_stage.fn(url, ReconstructionConfig(plan=PlanConfig(8, 2, 4), infer=infer))
    store = ReconstructionStore.open(url)
    store.commit("infer/0000/0000", {"key": "k"})
    aside = {"attempts": 1, "time": "", "reason": "it is damaged", "is_running": False}
    store.commit("aside/0000", aside)
    infer_segments.infer_elsewhere(url, "drive", groups, infer)
    store.commit("aside/0001", aside)
    with pytest.raises(RuntimeError, match=r"no segment could .* segment 1: it is damaged"):
        infer_segments.infer_elsewhere(url, "drive", groups, infer)


def test_store_that_is_away_while_a_child_is_lost_costs_no_more_than_its_crash():
    def away():
        raise StoreUnavailable("the server does not answer")

    child = Child("segments 0 to 3", {}, "work", away)
    for crashes in range(1, MOST_CRASHES):
        assert not settle(child, None)
        assert child.crashes == crashes
    assert settle(child, None)
    assert "lost 7 times in a row" in child.error


def test_drive_that_was_tried_again_has_not_got_on(tmp_path):
    store = ReconstructionStore.create(tmp_path / "out" / "drive.zarr", {})
    drive = DriveLocation("drive", str(tmp_path / "drive.mp4"))
    part = reconstruct_collection.drive_child(
        drive, str(tmp_path / "out"), ReconstructionConfig(), None
    )
    for crashes in range(1, MOST_CRASHES):
        store.commit(f"attempts/probe-{crashes}", {"outcome": "running"})
        assert not settle(part, None)
        assert part.crashes == crashes
    store.commit("probe", {"key": "k"})
    assert not settle(part, None)
    assert part.crashes == 1


def test_child_that_is_refused_again_and_again_waits_longer(deployment, output):
    steps = iter(range(100))
    part = Child("segments 0 to 3", {}, f"work of {output}", lambda: next(steps))
    waits = []
    for _ in range(8):
        run_id = start(deployment, output, part)
        assert not settle(part, put(run_id, Failed(message="ClaimLost: another run has it")))
        waits.append(part.due - time.monotonic())
    assert [round(wait, -1) for wait in waits] == [10, 20, 40, 80, 160, 300, 300, 300]
    assert not settle(part, put(start(deployment, output, part), Crashed()))
    assert part.due <= time.monotonic()


def test_cancelling_reaches_runs_below_a_run_that_is_between_two_attempts(deployment, output):
    with get_client(sync_client=True) as client:
        drive = client.create_flow_run(parent, tags=[family_tag(output)])
        given = {"deployment": deployment, "family": f"{output}/a.zarr"}
        part = run_flow(parent, flow_run=drive, parameters=given)  # and the drive's run is gone
    alone = parent(deployment, f"{output}/b.zarr")
    cancel_children(output)
    assert read(part).state.is_cancelled()
    assert not read(alone).state.is_cancelled()


def test_runs_that_wait_are_cancelled_before_slots_are_free(deployment, output):
    waiting, working = (
        [start(deployment, output, child(f"{output} {kind} {i}")) for i in range(4)]
        for kind in ("waiting", "working")
    )
    for run_id in working:
        put(run_id, Running())
    cancel_children(output)
    when = {run_id: read(run_id).state.timestamp for run_id in waiting + working}
    assert max(when[i] for i in waiting) < min(when[i] for i in working)


@pytest.mark.parametrize("begins", [True, False])
def test_run_that_is_starting_is_cancelled_once_it_runs_or_should(deployment, output, begins):
    run_id = start(deployment, output, child(output))
    put(run_id, Pending())
    with ThreadPoolExecutor() as pool:
        cancelling = pool.submit(cancel_children, output)
        time.sleep(3)
        assert read(run_id).state.is_pending()
        if begins:
            put(run_id, Running())
            began = time.monotonic()
        cancelling.result()
        assert read(run_id).state.is_cancelling()
        assert not begins or time.monotonic() - began < 5


def test_run_that_was_told_to_end_is_not_joined(deployment, output):
    first = start(deployment, output, child(output))
    assert start(deployment, output, child(output)) == first
    put(first, Running())
    assert put(first, Cancelling()).state.is_cancelling()
    second = start(deployment, output, child(output))
    assert second != first
    put(first, Cancelled())
    assert start(deployment, output, child(output)) == second


def test_child_that_was_cancelled_with_another_parent_is_run_again_so_many_times(
    deployment, output
):
    part = child(output)
    for attempt in range(1, MOST_CRASHES + 1):
        run_id = start(deployment, output, part)
        cancel_children(output)
        assert settle(part, read(run_id)) == (attempt == MOST_CRASHES)
        assert part.attempt == attempt
    assert "lost 7 times in a row" in part.error


def test_child_that_was_cancelled_by_itself_has_ended(deployment, output):
    part = child(output)
    assert settle(part, put(start(deployment, output, part), Cancelled(message="by hand")))
    assert part.error == "by hand"


@flow
def cancelled_parent(deployment: str, family: str) -> bool:
    """Whether a child has ended after it was cancelled with this run."""
    part = child(family)
    run_id = start(deployment, family, part)
    put(UUID(flow_run.get_id()), Cancelling())
    cancel_children(family)
    return settle(part, read(run_id)) and part.error is not None


def test_child_of_a_parent_that_is_cancelled_is_not_run_again(deployment, output):
    assert cancelled_parent(deployment, output)


def test_drive_whose_runs_are_all_lost_has_failed_unless_one_is_at_work(tmp_path, monkeypatch):
    for name in ("idle", "busy"):
        write_video(tmp_path / f"{name}.mp4", moving_squares(4))
    urls = {name: str(tmp_path / "out" / f"{name}.zarr") for name in ("idle", "busy")}

    def lose(deployment, family, children, at_once, on_end=lambda child: None):
        for part in children:
            while not settle(part, None):
                pass
            on_end(part)

    monkeypatch.setattr(reconstruct_collection, "run_children", lose)
    collect = reconstruct_collection.reconstruct_collection
    with (
        ReconstructionStore.create(urls["busy"], {}).claim("drive"),
        pytest.raises(reconstruct_collection.CollectionIncomplete) as failed,
    ):
        collect(f"{tmp_path}/*.mp4", str(tmp_path / "out"), spread="deployments")
    assert [o["name"] for o in failed.value.outcomes if o["error"]] == ["busy", "idle"]
    assert "DriveLost: lost 7 times in a row" in progress(urls["idle"])["error"]
    assert progress(urls["busy"])["error"] is None


def test_run_that_finds_no_gpu_says_that_it_goes_on_without(output, caplog):
    url = f"{output}/drive.zarr"
    for device, is_told in (("auto", not torch.cuda.is_available()), ("cpu", False)):
        caplog.clear()
        infer_segments.infer_segments(url, [], InferConfig(device=device))
        assert ("this run infers on the CPU" in caplog.text) == is_told
