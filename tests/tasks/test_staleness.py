"""What is made anew takes back what was made from it: no mixture passes for finished."""

from dataclasses import replace

import numpy as np
import pytest

from storage import upkeep
from storage.reconstruction import ReconstructionStore
from tasks.align import align_stage
from tasks.config import AlignConfig, AnotherConfiguration, PlanConfig, ReconstructionConfig
from tasks.infer import infer_stage
from tasks.lanes import settled_lanes
from tasks.plan import plan_stage
from tasks.planned import aside_commit, read_aside, read_plan
from tasks.summary import progress

LATER = ("align", "tiles", "fuse/0000", "fuse/merged", "report")


def of_rule(config: ReconstructionConfig, rule: str) -> ReconstructionConfig:
    """The same with another update rule."""
    return replace(config, infer=replace(config.infer, rule=rule))


@pytest.fixture
def finished(corridor_drive):
    """A drive with a trajectory, and commits of all that comes after it."""
    corridor_drive.infer_perfectly()
    align_stage.fn(corridor_drive.url, AlignConfig(), corridor_drive.config.infer)
    store = ReconstructionStore.open(corridor_drive.url)
    for name in LATER[1:]:
        store.commit(name, {"key": "of this trajectory"})
    assert progress(store.url)["stage"] == "done"
    return store


def test_new_weights_or_rule_take_back_the_trajectory_and_the_chunks_of_the_old(
    finished, corridor_drive
):
    other = of_rule(corridor_drive.config, "cut3r")
    plan_stage.fn(finished.url, other)
    for name in LATER:  # by a run that was at it meanwhile
        finished.commit(name, {"key": "of the trajectory before"})
    infer_stage.fn(finished.url, (0,), other.infer)
    assert not set(LATER) & set(finished.commit_names())
    assert progress(finished.url)["stage"] != "done"


@pytest.mark.parametrize("change", [{"weights": "compact"}, {"rule": "cut3r"}])
def test_result_does_not_stand_under_the_name_of_another_network(finished, corridor_drive, change):
    config = corridor_drive.config
    plan_stage.fn(finished.url, replace(config, infer=replace(config.infer, **change)))
    assert not set(LATER) & set(finished.commit_names())
    assert progress(finished.url)["stage"] == "align"


def test_interrupted_change_of_rule_leaves_no_old_chunk_as_progress(finished, corridor_drive):
    missing = of_rule(corridor_drive.config, "no-such-rule")
    plan_stage.fn(finished.url, missing)
    with pytest.raises(ValueError, match="no-such-rule"):
        infer_stage.fn(finished.url, (0, 1), missing.infer)
    assert progress(finished.url)["chunks_done"] == 0


def test_run_of_an_earlier_configuration_or_plan_infers_nothing(finished, corridor_drive):
    before, config = finished.commits(), corridor_drive.config
    for late in (of_rule(config, "cut3r").infer, replace(config.infer, precision="float32")):
        with pytest.raises(AnotherConfiguration, match="is planned for"):
            infer_stage.fn(finished.url, (0, 1), late)
    with pytest.raises(AnotherConfiguration, match=r"no segment 2 in .* planned with 2"):
        infer_stage.fn(finished.url, (2,), config.infer)
    assert finished.commits() == before
    elsewhere = replace(config.infer, device="cpu", lanes=1)
    assert infer_stage.fn(finished.url, (0, 1), elsewhere) == 0


def test_configuration_that_changes_while_weights_are_loaded_ends_the_run_that_loads_them(
    finished, corridor_drive, monkeypatch
):
    finished.drop_commits("infer/0001")
    kept, other = finished.commits("infer"), of_rule(corridor_drive.config, "cut3r")

    def settled_meanwhile(*arguments):
        plan_stage.fn(finished.url, other)
        return settled_lanes(*arguments)

    monkeypatch.setattr("tasks.infer.settled_lanes", settled_meanwhile)
    with pytest.raises(AnotherConfiguration, match="rule 'cut3r', not 'ttt3r'"):
        infer_stage.fn(finished.url, (0, 1), corridor_drive.config.infer)
    assert finished.commits("infer") == kept


def test_segments_of_an_earlier_plan_replace_none_of_the_new_one(corridor_drive, monkeypatch):
    drive, store = corridor_drive, ReconstructionStore.open(corridor_drive.url)
    other = replace(drive.config, plan=PlanConfig(30, 10, 8))
    kept: dict[str, object] = {}

    def settled_meanwhile(*arguments):
        if not kept:
            kept["begun"] = True
            plan_stage.fn(drive.url, other)
            infer_stage.fn(drive.url, (0, 1), other.infer)
            align_stage.fn(drive.url, other.align, other.infer)
            kept.update(store.commits("infer") | store.commits("align"))
        return settled_lanes(*arguments)

    monkeypatch.setattr("tasks.infer.settled_lanes", settled_meanwhile)
    with pytest.raises(AnotherConfiguration, match="planned anew"):
        infer_stage.fn(drive.url, (0, 1), drive.config.infer)
    assert kept.pop("begun")
    assert store.commits("infer") | store.commits("align") == kept


def test_new_plan_removes_what_the_old_one_had(finished, corridor_drive):
    finished.commit(aside_commit(1), {"attempts": 1, "time": "", "reason": "", "is_running": False})
    plan_stage.fn(finished.url, replace(corridor_drive.config, plan=PlanConfig(40, 8, 8)))
    assert not set(LATER) & set(finished.commit_names())
    assert [s.index for s in read_plan(finished).segments] == [0]
    assert list(upkeep.describe(finished)["segments"]) == ["0000"]
    assert read_aside(finished) == {}


def test_new_calibration_takes_back_the_mesh(finished, corridor_drive):
    align_stage.fn(finished.url, AlignConfig(focal_px=44.0), corridor_drive.config.infer)
    assert [n for n in LATER if n in finished.commit_names()] == ["align"]
    assert progress(finished.url)["stage"] == "fuse"


def test_same_settings_take_back_nothing(finished, corridor_drive):
    before = finished.commits()
    plan_stage.fn(finished.url, corridor_drive.config)
    infer_stage.fn(finished.url, (0, 1), corridor_drive.config.infer)
    align_stage.fn(finished.url, AlignConfig(), corridor_drive.config.infer)
    assert finished.commits() == before


def test_align_reads_long_overlaps_in_part(finished, monkeypatch):
    from tasks import align

    before = finished.read_trajectory()["scale"]
    monkeypatch.setattr(align, "SEAM_FRAMES", 4)
    store, plan = finished, read_plan(finished)
    intrinsics = store.read_trajectory()["intrinsics"]
    motions = align.read_motion_scales(store, plan)
    fits = align.fit_seams(store, plan, intrinsics, motions, align.AlignSettings())
    assert fits[1].frames == 4
    np.testing.assert_allclose(fits[1].sim3.scale, before[1] / before[0], rtol=0.05)


def test_listing_that_is_older_than_the_next_takes_no_finished_chunk_back(
    finished, corridor_drive, monkeypatch
):
    store, infer = ReconstructionStore.open(finished.url), corridor_drive.config.infer
    store.drop_commits("infer/0000")
    infer_stage.fn(finished.url, (0,), infer)
    before = finished.commits("infer/0000")
    last = max(before)
    store.drop_commits(last)
    with monkeypatch.context() as patch:
        patch.setattr(ReconstructionStore, "commits", lambda *_: {})
        infer_stage.fn(finished.url, (0,), infer)
    after = finished.commits("infer/0000")
    assert after.keys() == before.keys()
    kept = {name for name, record in before.items() if after[name] == record}
    assert kept == before.keys() - {last}
