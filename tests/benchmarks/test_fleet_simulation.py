"""The simulation against cases worked out by hand."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fleet_simulation import (
    CASES,
    CLAIM_RENEWAL_S,
    SEGMENTS_PER_TASK,
    Drive,
    Fleet,
    Services,
    Setting,
    simulate,
)

from flows.infer_segments import bundle
from storage.claims import LEASE_S, RENEW_S
from storage.records import Plan, Segment
from tasks.config import InferConfig
from tasks.plan import group_segments

DRIVE = Drive(probe_s=10, group_s=(100, 60), align_s=5, fuse_s=(20, 30))


def test_the_base_case_is_what_the_defaults_make():
    plan = Plan(48_000, 32, tuple(Segment(i, 75 * i, 75 * i + 100, 0) for i in range(480)))
    config = InferConfig()
    runs = bundle(plan, group_segments(plan, config.segments_per_task), config.frames_per_run)
    assert {len(run) for run in runs[:-1]} == {CASES["goal"].segments_per_run}
    assert len(runs) == len(CASES["goal"].drive(1.0).group_s)
    assert config.segments_per_task == SEGMENTS_PER_TASK
    assert RENEW_S == CLAIM_RENEWAL_S
    automations = Path(__file__).resolve().parents[2] / "deploy" / "automations.yaml"
    (lost, _) = yaml.safe_load(automations.read_text())["automations"]
    assert Setting(1).detection_s == lost["trigger"]["within"] + LEASE_S


def test_one_machine_of_each_kind_takes_the_sum_of_all_times():
    found = simulate([DRIVE], Fleet(gpus=1, cpus=1, cold_start_s=40, start_s=7, idle_s=30))
    # probe, cold start, two runs with their starts, align, two fusions with theirs
    assert found.finished_h * 3600 == pytest.approx(10 + 40 + 107 + 67 + 5 + 27 + 37)
    # The machine is billed from the request to the end of its last group: nothing is left then.
    assert found.gpu_billed_h * 3600 == pytest.approx(40 + 107 + 67)
    assert found.gpu_work_h * 3600 == pytest.approx(160)
    assert found.gpu_start_h * 3600 == pytest.approx(14)
    assert found.cpu_work_h * 3600 == pytest.approx(10 + 5 + 27 + 37)
    assert (found.interruptions, found.gpu_lost_h) == (0, 0)
    assert found.flow_runs == 2 + 2 + 1


def test_two_machines_run_the_groups_beside_each_other():
    found = simulate([DRIVE], Fleet(gpus=2, cpus=2, cold_start_s=40))
    assert found.finished_h * 3600 == pytest.approx(10 + 40 + 100 + 5 + 30)


def test_drives_wait_for_their_slot():
    fleet = Fleet(gpus=4, cpus=4, drives_at_once=1, cold_start_s=40, idle_s=10)
    found = simulate([DRIVE] * 3, fleet)
    assert found.finished_h * 3600 == pytest.approx(3 * (10 + 40 + 100 + 5 + 30))


@pytest.mark.parametrize("notice_s", [0, 120])
def test_work_is_conserved_whatever_is_interrupted(notice_s):
    drives = [Drive(5, (900, 1800, 400), 5, (60,))] * 20
    fleet = Fleet(
        gpus=7,
        cpus=3,
        cold_start_s=90,
        start_s=20,
        chunk_s=30,
        interruptions_per_hour=1.0,
        notice_s=notice_s,
        detection_s=88,
    )
    found = simulate(drives, fleet, seed=3)
    assert found.gpu_work_h * 3600 == pytest.approx(sum(drive.gpu_s for drive in drives))
    assert found.cpu_work_h * 3600 == pytest.approx(20 * (5 + 5 + 60 + 20))
    assert found.interruptions > 10
    spent = found.gpu_work_h + found.gpu_lost_h + found.gpu_start_h
    assert spent <= found.gpu_billed_h + 1e-9
    if notice_s:
        assert found.gpu_lost_h == 0
    else:
        assert 0 < found.worst_loss_s <= 30
        assert found.gpu_lost_h * 3600 <= 30 * found.interruptions
    assert found.finished_h > simulate(drives, Fleet(7, 3, cold_start_s=90, start_s=20)).finished_h


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
    found = simulate([Drive(0, (1,), 0, ())] * 50, Fleet(gpus=5, cpus=5), services)
    assert found.prefect_background == pytest.approx(10 * 0.5 / 10)
    with pytest.raises(ValueError, match=r"20 workers .* alone take 100%"):
        simulate([DRIVE], Fleet(gpus=10, cpus=10), replace(services, pollers=20))


def test_a_store_at_its_limit_stretches_inference():
    drives = [Drive(0, (100,), 0, ())] * 4
    limited = Services(puts_per_gpu_s=10, puts_limit=20)
    found = simulate(drives, Fleet(gpus=4, cpus=4), limited)
    # One after the other they start: the third and fourth find 30 and 40 of 20 requests a second.
    assert found.finished_h * 3600 == pytest.approx(200)
    assert found.store_busy == pytest.approx(400 * 10 / (200 * 20))
