import pytest
from pydantic import ValidationError

from storage.records import Clip, DriveRecord, Plan, Segment
from tasks.config import PlanConfig
from tasks.plan import group_segments, plan_drive


def drive(frames: int, cuts: tuple[int, ...] = ()) -> DriveRecord:
    clip = Clip("drive.mp4", frames, 1, "pyav")
    return DriveRecord("drive", "drive.mp4", (clip,), frames, 64, 48, 10.0, 1.0, "h264", 0, cuts)


@pytest.mark.parametrize("frames", [1, 2, 9, 10, 11, 17, 18, 25, 100, 101, 997])
@pytest.mark.parametrize("cuts", [(), (5,), (3, 50)])
def test_plan_owns_every_frame_exactly_once(frames, cuts):
    plan = plan_drive(drive(frames, cuts), PlanConfig(10, 3), 100)
    owned = [frame for owner in plan.owner_ranges() for frame in owner]
    assert owned == list(range(frames))
    for segment, owner in zip(plan.segments, plan.owner_ranges(), strict=True):
        assert segment.start <= owner.start < owner.stop <= segment.stop


@pytest.mark.parametrize("frames", [11, 17, 18, 25, 100, 101, 997])
def test_plan_neighbours_share_at_least_the_overlap(frames):
    plan = plan_drive(drive(frames), PlanConfig(10, 3), 100)
    assert all(segment.frames == 10 for segment in plan.segments)
    assert all(len(plan.overlap(segment)) >= 3 for segment in plan.segments[1:])


def test_plan_of_24_frames_has_the_segments_worked_out_by_hand():
    plan = plan_drive(drive(24), PlanConfig(10, 3), 100)
    assert plan.segments == (
        Segment(0, 0, 10, 0),
        Segment(1, 7, 17, 0),
        Segment(2, 14, 24, 0),
    )
    assert [list(plan.overlap(s)) for s in plan.segments] == [[], [7, 8, 9], [14, 15, 16]]
    assert plan.owner_ranges() == [range(0, 8), range(8, 15), range(15, 24)]


def test_plan_never_overlaps_across_a_hard_cut():
    plan = plan_drive(drive(40, cuts=(15,)), PlanConfig(10, 3), 100)
    assert plan.parts == 2
    first_of_second = next(s for s in plan.segments if s.part == 1)
    assert first_of_second.start == 15
    assert len(plan.overlap(first_of_second)) == 0
    assert all(s.stop <= 15 for s in plan.segments if s.part == 0)


def test_plan_ignores_cuts_when_told_so():
    config = PlanConfig(10, 3, split_at_cuts=False)
    assert plan_drive(drive(40, cuts=(15,)), config, 100).parts == 1


def test_plan_takes_the_weights_segment_length_and_a_quarter_of_overlap_by_default():
    plan = plan_drive(drive(100), PlanConfig(), recommended_frames=20)
    assert plan.segments[0].frames == 20
    assert len(plan.overlap(plan.segments[1])) >= 5
    assert plan.chunk_frames == 20


def test_plan_survives_json():
    plan = plan_drive(drive(40, cuts=(15,)), PlanConfig(10, 3), 100)
    assert Plan.from_json(plan.to_json()) == plan


def test_plan_of_an_empty_drive_is_refused():
    with pytest.raises(ValueError, match="no frame"):
        plan_drive(drive(0), PlanConfig(), 10)


def test_plan_config_refuses_an_overlap_of_more_than_half():
    with pytest.raises(ValidationError, match="at most half"):
        PlanConfig(segment_frames=10, overlap_frames=6)


def test_group_segments_keeps_order_and_size():
    plan = plan_drive(drive(100), PlanConfig(10, 3), 100)
    groups = group_segments(plan, 4)
    assert [i for group in groups for i in group] == [s.index for s in plan.segments]
    assert all(len(group) == 4 for group in groups[:-1])
