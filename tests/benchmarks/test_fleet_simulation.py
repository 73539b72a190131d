"""The simulation against cases worked out by hand."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fleet_simulation import (
    CASES,
    CLAIM_RENEWAL_S,
    DRIVES_A_GPU,
    MEASURED_API,
    SEGMENTS_PER_TASK,
    Drive,
    Fleet,
    Night,
    Services,
    Setting,
    cost_per_video_hour,
    night,
    simulate,
)

from flows.infer_segments import bundle
from storage.claims import LEASE_S, RENEW_S
from storage.records import Plan, Segment
from tasks.config import InferConfig
from tasks.plan import group_segments
from tasks.prices import read_prices

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DRIVE = Drive(probe_s=10, group_s=(100, 60), align_s=5, fuse_s=(20, 30))


def test_the_base_case_is_what_the_defaults_make():
    plan = Plan(48_000, 32, tuple(Segment(i, 75 * i, 75 * i + 100, 0) for i in range(480)))
    config = InferConfig()
    runs = bundle(plan, group_segments(plan, config.segments_per_task), config.frames_per_run)
    assert {len(run) for run in runs[:-1]} == {CASES["goal"].segments_per_run}
    assert len(runs) == len(CASES["goal"].drive(1.0).group_s)
    assert config.segments_per_task == SEGMENTS_PER_TASK
    assert RENEW_S == CLAIM_RENEWAL_S
    (lost, *_) = yaml.safe_load((DEPLOY / "automations.yaml").read_text())["automations"]
    assert Setting(1).detection_s == lost["trigger"]["within"] + LEASE_S


def test_runs_are_in_the_pools_and_nodes_idle_as_long_as_deploy_says():
    deployments = yaml.safe_load((DEPLOY / "prefect.yaml").read_text())["deployments"]
    on_gpus = [d["entrypoint"] for d in deployments if d["work_pool"]["name"] != "cpu"]
    assert on_gpus == ["flows.infer_segments.infer_segments"]
    nodes = yaml.safe_load_all((DEPLOY / "kubernetes" / "karpenter.yaml").read_text())
    pools = [node["spec"] for node in nodes if node["kind"] == "NodePool"]
    idle = {pool["disruption"]["consolidateAfter"] for pool in pools}
    assert idle == {f"{Setting(1).idle_s / 60:.0f}m"}


def test_one_machine_of_each_kind_takes_the_sum_of_all_times():
    found = simulate([DRIVE], Fleet(gpus=1, cpus=3, cold_start_s=40, start_s=7, idle_s=30))
    # start, probe, cold start, two runs with their starts, align, two fusions with theirs
    assert found.finished_h * 3600 == pytest.approx(7 + 10 + 40 + 107 + 67 + 5 + 27 + 37)
    # The machine is billed from the request until it has been idle after its last group.
    assert found.gpu_billed_h * 3600 == pytest.approx(40 + 107 + 67 + 30)
    assert found.gpu_work_h * 3600 == pytest.approx(160)
    assert found.gpu_start_h * 3600 == pytest.approx(14)
    assert found.cpu_work_h * 3600 == pytest.approx(10 + 5 + 20 + 30)
    # The runs of the collection and of the drive hold a place from beginning to end.
    assert found.cpu_billed_h * 3600 == pytest.approx(300 + 300 + 27 + 37)
    assert found.cpu_busy == pytest.approx(664 / 900)
    assert (found.interruptions, found.gpu_lost_h) == (0, 0)
    assert (found.cpu_interruptions, found.cpu_lost_h) == (0, 0)
    assert found.flow_runs == 2 + 2 + 1 + 1


class FirstMachinesGo(Night):
    """A night whose machines of the first moment, the collection's and the drive's, are taken."""

    after_s = math.inf

    def _lifetime_s(self) -> float:
        return self.after_s if self._env.now == 0 else math.inf


@pytest.mark.parametrize(
    ("after_s", "notice_s", "finished_s", "lost_s"),
    [
        (60, 0, 300, 0),  # it waits for its GPU, and is back before its children are done
        (12, 0, 12 + 50 + 7 + 10 + 40 + 107 + 67 + 5 + 27 + 37, 5),  # the probe begins anew
        (12, 120, 12 + 40 + 7 + 10 + 40 + 107 + 67 + 5 + 27 + 37, 5),  # noticed at once
        (235, 0, 235 + 50 + 7 + 5 + 27 + 37, 4),  # at alignment: children are not awaited again
        (250, 120, 300, 0),  # its tiles are done at 300, it is back at 297
    ],
)
def test_a_parent_whose_machine_is_taken_goes_on_with_its_children(
    after_s, notice_s, finished_s, lost_s
):
    fleet = Fleet(1, 3, cold_start_s=40, start_s=7, notice_s=notice_s, detection_s=50)
    of_one = FirstMachinesGo([DRIVE], fleet, Services(), 0)
    of_one.after_s = after_s
    found = of_one.run()
    assert found.finished_h * 3600 == pytest.approx(finished_s)
    assert found.cpu_lost_h * 3600 == pytest.approx(lost_s)
    assert found.cpu_work_h * 3600 == pytest.approx(10 + 5 + 20 + 30)
    assert found.gpu_work_h * 3600 == pytest.approx(160)
    assert found.cpu_interruptions == 2
    assert found.flow_runs == 2 + 2 + 1 + 1 + 2
    # Billed until the machine that is lost has been replaced, too.
    assert found.cpu_billed_h * 3600 == pytest.approx(2 * finished_s + 27 + 37)


def test_two_machines_run_the_groups_beside_each_other():
    found = simulate([DRIVE], Fleet(gpus=2, cpus=4, cold_start_s=40))
    assert found.finished_h * 3600 == pytest.approx(10 + 40 + 100 + 5 + 30)


def test_drives_wait_for_their_slot():
    fleet = Fleet(gpus=4, cpus=4, drives_at_once=1, cold_start_s=40, idle_s=10)
    found = simulate([DRIVE] * 3, fleet)
    assert found.finished_h * 3600 == pytest.approx(3 * (10 + 40 + 100 + 5 + 30))
    # One parent after the other: what waits for a slot holds no place.
    assert found.cpu_billed_h == pytest.approx(2 * found.finished_h + 3 * 50 / 3600)


def test_parents_that_fill_the_pool_are_refused():
    with pytest.raises(ValueError, match=r"3 runs that wait .* fill the 3 places"):
        simulate([DRIVE] * 2, Fleet(gpus=1, cpus=3))
    assert simulate([DRIVE] * 2, Fleet(gpus=1, cpus=3, drives_at_once=1)).finished_h > 0


def test_waiting_parents_are_paid_for():
    case, setting = CASES["tuned"], Setting(4, drive_hours=60, interruptions_per_hour=0)
    prices = read_prices(str(DEPLOY / "prices.toml"))
    recommended = night(case, setting, MEASURED_API)
    assert recommended["drives_at_once"] == DRIVES_A_GPU * 4
    # A place for each of them, one for the collection, a fifth more than tiles of 4 GPUs need.
    assert recommended["cpus"] == 12 + 1 + math.ceil(4 * 1.2 * 1248 / 190)
    at_once_back = night(case, replace(setting, idle_s=1.0), MEASURED_API)
    assert at_once_back["gpu_billed_h"] < recommended["gpu_billed_h"] - 4 * 299 / 3600
    all_at_once = night(case, replace(setting, drives_at_once=60), MEASURED_API)
    for row in (recommended, all_at_once):
        # 48,000 frames inferred at 300 a second, 36,000 at 45 ms on a CPU machine
        work = 160 * prices.per_gpu_hour["NVIDIA H200"] + 1620 * prices.per_cpu_hour
        assert cost_per_video_hour(row, case, prices, of="work") == pytest.approx(work / 3600)
        money = row["gpu_billed_h"] * prices.per_gpu_hour["NVIDIA H200"]
        money += row["cpu_billed_h"] * prices.per_cpu_hour
        assert cost_per_video_hour(row, case, prices) == pytest.approx(money / 60)
    # All of them wait for 4 GPUs, half of the night on average, and tiles come on top.
    waited_h = all_at_once["cpu_billed_h"] - 60 * 1248 / 3600
    assert waited_h > 0.5 * 60 * all_at_once["finished_h"]
    assert recommended["cpu_billed_h"] < 13 * recommended["finished_h"] + 60 * 1248 / 3600 + 0.01


@pytest.mark.parametrize("notice_s", [0, 120])
def test_work_is_conserved_whatever_is_interrupted(notice_s):
    drives = [Drive(5, (900, 1800, 400), 5, (60,))] * 20
    fleet = Fleet(
        gpus=7,
        cpus=8,
        drives_at_once=5,
        cold_start_s=90,
        start_s=20,
        chunk_s=30,
        interruptions_per_hour=1.0,
        notice_s=notice_s,
        detection_s=88,
    )
    found = simulate(drives, fleet, seed=3)
    assert found.gpu_work_h * 3600 == pytest.approx(sum(drive.gpu_s for drive in drives))
    assert found.cpu_work_h * 3600 == pytest.approx(20 * (5 + 5 + 60))
    assert found.interruptions > 10
    assert found.cpu_interruptions > 10
    runs = 20 * (3 + 1 + 1) + 1
    assert found.flow_runs >= runs + found.cpu_interruptions
    spent = found.gpu_work_h + found.gpu_lost_h + found.gpu_start_h
    assert spent <= found.gpu_billed_h + 1e-9
    if notice_s:
        assert found.gpu_lost_h == 0
    else:
        assert 0 < found.worst_loss_s <= 30
        assert found.gpu_lost_h * 3600 <= 30 * found.interruptions
    undisturbed = replace(fleet, interruptions_per_hour=0.0)
    assert found.finished_h > simulate(drives, undisturbed).finished_h


def test_waiting_for_the_store_is_not_lost_with_a_machine():
    drives = [Drive(0, (600,), 0, ())] * 20
    fleet = Fleet(4, 22, chunk_s=10, interruptions_per_hour=2.0, detection_s=88)
    found = simulate(drives, fleet, Services(puts_per_gpu_s=10, puts_limit=10), seed=3)
    assert found.interruptions > 10
    assert found.gpu_work_h * 3600 == pytest.approx(20 * 600)
    assert 0 < found.worst_loss_s <= 10


def test_a_full_prefect_server_decides_how_long_it_takes():
    drives = [Drive(0, (1,) * 10, 0, ())] * 10
    found = simulate(drives, Fleet(gpus=100, cpus=100), Services(create_s=2, run_s=3, drive_s=3))
    # 10 drives and 100 groups are created, 110 runs served, one after the other.
    assert found.finished_h * 3600 == pytest.approx(110 * 2 + 110 * 3, rel=0.02)
    assert found.prefect_busy == pytest.approx(1.0, abs=0.02)
    assert found.bottleneck == "Prefect server"
    twice = simulate(drives, Fleet(100, 100), Services(create_s=2, run_s=3, drive_s=3, servers=2))
    assert twice.finished_h == pytest.approx(found.finished_h / 2, rel=0.05)


def test_polls_and_heartbeats_leave_less_of_the_server():
    services = Services(create_s=1, poll_s=0.5, poll_interval_s=10, pollers=10)
    found = simulate(
        [Drive(0, (1,), 0, ())] * 50, Fleet(gpus=5, cpus=5, drives_at_once=3), services
    )
    assert found.prefect_background == pytest.approx(10 * 0.5 / 10)
    with pytest.raises(ValueError, match=r"20 workers .* alone take 100%"):
        simulate([DRIVE], Fleet(gpus=10, cpus=10), replace(services, pollers=20))


def test_a_store_at_its_limit_stretches_inference():
    drives = [Drive(0, (100,), 0, ())] * 4
    limited = Services(puts_per_gpu_s=10, puts_limit=20)
    found = simulate(drives, Fleet(gpus=4, cpus=6), limited)
    # One after the other they start: the third and fourth find 30 and 40 of 20 requests a second.
    assert found.finished_h * 3600 == pytest.approx(200)
    assert found.store_busy == pytest.approx(400 * 10 / (200 * 20))
