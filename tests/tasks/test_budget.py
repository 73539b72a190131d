"""The budget over real videos of which only headers are read; rates are those of a benchmark."""

import json
import logging
import subprocess
import sys

import pytest
from recordings import moving_squares, write_video

from storage.drives import list_drives
from tasks.budget import OverBudget, forget_taken, taken_by_run, within_budget
from tasks.config import BudgetConfig, InferConfig, ReconstructionConfig

ESTIMATE_AS_NOBODY = """
import os, sys
from storage.drives import list_drives
from tasks.config import InferConfig, ReconstructionConfig
from tasks.planner import estimate_drives
config = ReconstructionConfig(infer=InferConfig(weights="untrained"))
for user in (os.getuid(), 65534):  # what is needed is loaded, then root's rights are given up
    if os.getuid() == 0:
        os.setuid(user)
    drives = list_drives(sys.argv[1])
    print(*(e.stage for e in estimate_drives(drives, sys.argv[1], config, None)))
"""

CONFIG = ReconstructionConfig(infer=InferConfig("untrained"))


@pytest.fixture
def drives(tmp_path):
    for name, frames in (("a", 20), ("b", 60), ("c", 30)):
        write_video(tmp_path / f"{name}.mp4", moving_squares(frames))
    return list_drives(f"{tmp_path}/*.mp4")


@pytest.fixture
def rates(tmp_path):
    """A second of inference for each frame, half as much for all other stages together."""
    stages = dict.fromkeys(("probe", "plan", "align", "report", "fuse-tiles"), 10.0)
    run = {"stage_seconds": {**stages, "infer": 100.0}}
    row = {"frames": 100, "video_size": "64x48", "run": run}
    (tmp_path / "rates.json").write_text(json.dumps({"results": [row]}))
    return str(tmp_path / "rates.json")


def names(drives):
    return [drive.name for drive in drives]


def test_drives_that_fit_are_taken_in_order_and_others_left(drives, rates, tmp_path, caplog):
    # Some 20, 60 and 30 s (a small part of them is fixed): a and c fit into a minute.
    budget = BudgetConfig(60 / 3600, rates=rates, when_over="take_what_fits")
    with caplog.at_level(logging.WARNING):
        taken, left = within_budget(drives, str(tmp_path / "out"), CONFIG, budget)
    assert (names(taken), names(left)) == (["a", "c"], ["b"])
    assert "left for the next run: b" in caplog.text


def test_run_that_is_moved_takes_no_more_for_what_it_has_finished(drives, rates, tmp_path):
    # Some 20, 60 and 30 s, and a small fixed part: either a and c fit, or b alone.
    budget = BudgetConfig(75 / 3600, rates=rates, when_over="take_what_fits")
    output = str(tmp_path / "out")
    taken, left = taken_by_run("first", drives, output, CONFIG, budget)
    assert (names(taken), names(left)) == (["a", "c"], ["b"])
    todo = drives[1:]  # a is finished
    taken, left = taken_by_run("first", todo, output, CONFIG, budget)
    assert (names(taken), names(left)) == (["c"], ["b"])
    taken, left = taken_by_run("second", todo, output, CONFIG, budget)
    assert (names(taken), names(left)) == (["b"], ["c"])
    for run in ("first", "second"):
        forget_taken(run, output)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_does_not_fit_is_refused_with_the_figures(drives, rates, tmp_path):
    budget = BudgetConfig(60 / 3600, rates=rates)
    with pytest.raises(OverBudget, match=r"all 3 drives .* GPU-hours of 0\.0167 .* without b"):
        within_budget(drives, str(tmp_path / "out"), CONFIG, budget)
    budget = BudgetConfig(200 / 3600, rates=rates)
    assert within_budget(drives, str(tmp_path / "out"), CONFIG, budget) == (drives, [])


def test_money_counts_all_stages(drives, rates, tmp_path):
    prices = tmp_path / "prices.toml"
    prices.write_text('currency = "EUR"\nper_cpu_hour = 3600\n[per_gpu_hour]\ncpu = 3600\n')
    # A second costs 1 EUR: some 30, 90 and 45 for inference and the other stages together.
    budget = BudgetConfig(None, 100.0, str(prices), rates, "take_what_fits")
    taken, left = within_budget(drives, str(tmp_path / "out"), CONFIG, budget)
    assert (names(taken), names(left)) == (["a", "c"], ["b"])


def test_without_limits_nothing_is_read_and_without_rates_nothing_is_begun(drives, tmp_path):
    assert within_budget(drives, "/nowhere", CONFIG, BudgetConfig()) == (drives, [])
    with pytest.raises(ValueError, match="nothing is known of the gpu-hours"):
        within_budget(drives, str(tmp_path / "out"), CONFIG, BudgetConfig(1.0))
    with pytest.raises(ValueError, match="price table"):
        BudgetConfig(max_cost=1.0)


def test_drive_that_may_not_be_read_does_not_stop_the_plan_of_others(public_path):
    for name in ("a", "b"):
        (public_path / "logs" / name).mkdir(parents=True)
        write_video(public_path / f"logs/{name}/1.mp4", moving_squares(8))
    (public_path / "logs/b/1.mp4").chmod(0)
    command = [sys.executable, "-c", ESTIMATE_AS_NOBODY, str(public_path / "logs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "new unreadable", done.stderr
