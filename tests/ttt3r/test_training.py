"""Training: its losses, its data by step number, and that resuming changes nothing."""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.spatial.transform import Rotation

from ttt3r.config import COMPACT, TINY
from ttt3r.model import Model
from ttt3r.synthetic import HELD_OUT_SEED
from ttt3r.training import Stage, TrainSettings, command, train
from ttt3r.training.curriculum import backwards, draw_batch, fit_sides, mirrored, stage_at
from ttt3r.training.export import export
from ttt3r.training.initial import prepare_for_matching
from ttt3r.training.lesson import FOCAL, draw_windows, lesson_loss
from ttt3r.training.losses import (
    FAR,
    LossWeights,
    Targets,
    depth_loss,
    gate_loss,
    neighbour_motion,
    point_loss,
    pose_errors,
    total_loss,
    wide_loss,
)
from ttt3r.training.optimiser import build_optimisers, orthogonalise
from ttt3r.training.run import rate_factor
from ttt3r.training.settings import REFINE, read_state
from ttt3r.training.validation import motion_gain
from ttt3r.training.widening import widen, widened
from ttt3r.weights import load_model, save_weights

SMALL = replace(TINY, encoder_rope_fp16=False, ray_map_encoder=False)
PAIRS = Stage(steps=3, frames=(2,), lanes=4, long_side=24, aspects=((1.5, 1),))
LONGER = Stage(steps=3, frames=(3,), lanes=2, long_side=24, aspects=((1.5, 1), (0.75, 1)))
SETTINGS = TrainSettings(
    model=SMALL, curriculum=(PAIRS, LONGER), total_steps=6, warm_up=2, validate_every=100
)


def moved_by(*translation: float) -> torch.Tensor:
    T = torch.eye(4)
    T[:3, 3] = torch.tensor(translation)
    return T


def two_frame_targets() -> Targets:
    depth = torch.full((1, 2, 3, 5), 4.0)
    lens = torch.tensor([[[5.0, 0, 2], [0, 5.0, 1], [0, 0, 1]]])
    T = torch.stack([moved_by(1, 0, 7), moved_by(1, 0, 9)])[None]
    return Targets.build(depth, torch.ones_like(depth, dtype=torch.bool), T, lens)


def losses_of(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


# --- targets and losses -------------------------------------------------------------------------


def test_targets_are_relative_to_the_first_camera():
    targets = two_frame_targets()
    torch.testing.assert_close(targets.T_seg_cam[0, 1], moved_by(0, 0, 2))
    torch.testing.assert_close(targets.pointmap_cam[0, 1, 1, 2], torch.tensor([0.0, 0.0, 4.0]))
    torch.testing.assert_close(targets.pointmap_world[0, 1, 1, 2], torch.tensor([0.0, 0.0, 6.0]))


def test_targets_turned_stay_where_they_are():
    targets = two_frame_targets()
    quarter = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # to the right
    turned = targets.turned(torch.stack([torch.eye(3), quarter])[None])
    torch.testing.assert_close(turned.T_seg_cam[..., :3, 3], targets.T_seg_cam[..., :3, 3])
    torch.testing.assert_close(turned.T_seg_cam[0, 1, :3, :3], quarter)
    torch.testing.assert_close(turned.pointmap_world[0, 1, 1, 2], torch.tensor([4.0, 0.0, 2.0]))
    assert turned.pointmap_cam is targets.pointmap_cam


def test_targets_put_the_sky_and_what_is_very_far_at_one_distance():
    depth = torch.tensor([5.0, torch.inf, 500.0, 30.0]).view(1, 1, 1, 4)
    valid = torch.tensor([True, False, True, True]).view(1, 1, 1, 4)
    targets = Targets.build(depth, valid, torch.eye(4).view(1, 1, 4, 4), torch.eye(3)[None])
    assert targets.valid.flatten().tolist() == [True, False, False, True]
    assert targets.pointmap_cam[..., 2].flatten().tolist() == [5.0, FAR, FAR, 30.0]


def test_point_loss_weighs_the_relative_error_by_the_confidence():
    truth = torch.tensor([[0.0, 0.0, 4.0]])
    points = torch.tensor([[0.0, 0.0, 5.0]])  # 1 m of 4 + 1
    found = point_loss(points, torch.tensor([2.0]), truth, torch.tensor([True]))
    assert float(found) == pytest.approx(2 * 0.2 - 0.4 * math.log(2))


def test_point_loss_wants_the_sky_far_and_without_confidence():
    truth = torch.tensor([[0.0, 0.0, 9.0], [0.0, 0.0, 90.0]])
    points = torch.tensor([[0.0, 0.0, 9.0], [0.0, 0.0, 44.5]])  # the sky at half its distance
    valid = torch.tensor([True, False])
    plain = float(point_loss(points, torch.ones(2), truth, valid))
    assert plain == pytest.approx(0.5 * 45.5 / 91, abs=1e-3)
    sure = float(point_loss(points, torch.tensor([1.0, 3.0]), truth, valid))
    assert sure == pytest.approx(plain + 0.5 * math.log(3), abs=1e-3)


def test_depth_loss_is_of_the_depth_within_a_sequence_and_a_fifth_of_its_scale():
    targets = two_frame_targets()
    truth, valid = targets.pointmap_cam, targets.valid
    assert float(depth_loss(truth, truth, valid)) < 1e-4
    assert float(depth_loss(2 * truth, truth, valid)) == pytest.approx(0.2 * math.log(2), abs=1e-3)
    uneven = truth.clone()
    uneven[:, 1] *= 2  # one frame of two: half of log(2) off the mean, everywhere
    within = math.log(2) / 2
    assert float(depth_loss(uneven, truth, valid)) == pytest.approx(1.2 * within, abs=1e-3)


def test_depth_loss_sees_rays_of_another_lens_and_a_sky_that_is_near():
    targets = two_frame_targets()
    truth, valid = targets.pointmap_cam, targets.valid
    wide = truth * torch.tensor([2.0, 2.0, 1.0])
    wide = wide * (truth.norm(dim=-1) / wide.norm(dim=-1))[..., None]  # as far as before
    angles = (wide - truth).norm(dim=-1) / truth.norm(dim=-1)
    assert float(depth_loss(wide, truth, valid)) == pytest.approx(float(angles.mean()), abs=1e-3)
    sky = torch.zeros_like(valid)
    assert float(depth_loss(truth / 2, truth, sky)) == pytest.approx(0.1 * math.log(2), abs=1e-3)


def test_pose_errors_are_relative_to_the_motion_of_their_sequence():
    truth = torch.stack([torch.eye(4), moved_by(0, 0, 1.95)])[None]
    found = torch.stack([torch.eye(4), moved_by(0, 0, 0.95)])[None]
    translation, rotation = pose_errors(found, truth, torch.tensor([[0.05]]))
    assert float(translation[0, 1]) == pytest.approx(1 / 2.0, abs=1e-3)
    assert float(rotation.max()) < 1e-2


def test_neighbour_motion_is_seen_from_the_earlier_camera():
    turned = torch.eye(4)
    turned[:3, :3] = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # looks along world x
    after = turned.clone()
    after[:3, 3] = torch.tensor([3.0, 0, 0])
    motion = neighbour_motion(torch.stack([turned, after])[None])
    torch.testing.assert_close(motion[0, 0], moved_by(0, 0, 3))


def test_total_loss_is_small_only_where_predictions_are_true():
    targets = two_frame_targets()
    model = Model(SMALL)
    found, _ = model.run(
        torch.zeros(1, 2, 3, 8, 8), rule="cut3r", outputs=frozenset({"cam", "world", "trace"})
    )
    pose = torch.zeros(1, 2, 7)
    pose[..., 3] = 1
    pose[0, 1, 2] = 2.0
    right = replace(
        found,
        camera_pose=pose,
        pointmap_cam=targets.pointmap_cam,
        pointmap_world=targets.pointmap_world,
        confidence=torch.ones(1, 2, 3, 5),
        confidence_world=torch.ones(1, 2, 3, 5),
    )
    weights = LossWeights(gate=0.0)
    assert float(total_loss(right, targets, weights)[0].detach()) < 0.01
    wrong = replace(right, pointmap_world=targets.pointmap_cam)  # has not moved
    parts = total_loss(wrong, targets, weights)[1]
    assert float(parts["shift"].detach()) > 0.3
    assert float(parts["world"].detach()) > 0.1


def test_total_loss_asks_for_the_outputs_it_needs():
    model = Model(SMALL)
    found, _ = model.run(torch.zeros(1, 2, 3, 8, 8), rule="cut3r")
    with pytest.raises(ValueError, match="outputs"):
        total_loss(found, two_frame_targets(), LossWeights())


def test_gate_loss_looks_at_the_mean_only_and_not_at_the_first_frame():
    logits = torch.tensor([[[7.0, 9.0], [-3.0, 1.3], [-0.85, -0.85]]])
    assert float(gate_loss(logits, -0.85)) == pytest.approx(0.0, abs=1e-6)


# --- data ---------------------------------------------------------------------------------------


def test_draw_batch_depends_on_the_step_and_the_seed_only():
    first, again = (draw_batch(3, PAIRS, patch=8) for _ in range(2))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, draw_batch(4, PAIRS, patch=8).images)
    assert not torch.equal(first.images, draw_batch(3, PAIRS, patch=8, seed=1).images)


def test_draw_batch_gives_processes_different_sequences_of_equal_shape():
    parts = [draw_batch(3, replace(PAIRS, lanes=8), patch=8, share=(k, 2)) for k in range(2)]
    assert parts[0].images.shape == parts[1].images.shape == (4, 2, 3, 16, 24)
    assert not torch.equal(parts[0].images, parts[1].images)


def test_draw_batch_never_uses_seeds_held_out(monkeypatch):
    from ttt3r.training import curriculum

    seeds: list[int] = []
    honest = curriculum.render

    def spy(world, given, *arguments, **options):
        seeds.extend(given)
        return honest(world, given, *arguments, **options)

    monkeypatch.setattr(curriculum, "render", spy)
    for step in (0, 999_999, 123_456_789):
        draw_batch(step, PAIRS, patch=8)
    assert 0 <= min(seeds) <= max(seeds) < HELD_OUT_SEED


def test_mirrored_sequences_project_to_the_same_pixels():
    batch = draw_batch(0, replace(LONGER, rooms=1.0), patch=8)
    plain = (batch.images, batch.depth, batch.valid, batch.T_world_cam, batch.intrinsics)
    twin = mirrored(plain)
    a = Targets.build(*plain[1:])
    b = Targets.build(*twin[1:])
    flipped = b.pointmap_world.flip(-2) * torch.tensor([-1.0, 1, 1])
    torch.testing.assert_close(flipped, a.pointmap_world, atol=1e-3, rtol=1e-3)


def test_backwards_starts_at_the_last_frame():
    batch = draw_batch(0, LONGER, patch=8)
    plain = (batch.images, batch.depth, batch.valid, batch.T_world_cam, batch.intrinsics)
    there = Targets.build(*plain[1:]).T_seg_cam
    back = Targets.build(*backwards(plain)[1:]).T_seg_cam
    torch.testing.assert_close(back[:, -1] @ there[:, -1], torch.eye(4).expand(len(back), 4, 4))


@pytest.mark.parametrize(
    ("aspect", "sides"), [(16 / 9, (48, 96)), (3.32, (24, 96)), (3 / 4, (96, 72)), (1.5, (64, 96))]
)
def test_fit_sides_gives_whole_patches(aspect, sides):
    assert fit_sides(aspect, 96, 8) == sides


def test_stage_at_goes_on_with_the_last_stage():
    stages = (PAIRS, LONGER)
    assert [stage_at(step, stages) for step in (0, 2, 3, 99)] == [PAIRS, PAIRS, LONGER, LONGER]


def test_lesson_windows_show_the_shift_that_the_poses_tell():
    images, T = draw_windows("rooms", range(3), 16, 24, 4)
    assert images.shape == (12, 2, 3, 16, 24)
    for pair, turn in zip(images, T[:, 1, :3, :3], strict=True):
        right = round(float(torch.atan2(turn[0, 2], turn[0, 0])) * FOCAL)
        down = round(float(torch.atan2(turn[1, 2], turn[1, 1])) * FOCAL)
        before = pair[0][:, max(0, down) : 16 + min(0, down), max(0, right) : 24 + min(0, right)]
        after = pair[1][:, max(0, -down) : 16 - max(0, down), max(0, -right) : 24 - max(0, right)]
        together = torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1]
        assert together > 0.9


def test_lesson_loss_is_zero_for_the_right_turn():
    _, T = draw_windows("rooms", range(1), 16, 24, 4)
    model = Model(SMALL)
    found, _ = model.run(
        torch.zeros(4, 2, 3, 8, 8), rule="cut3r", outputs=frozenset({"cam", "trace"})
    )
    turns = Rotation.from_matrix(T[..., :3, :3].flatten(0, 1).numpy())
    quaternions = torch.from_numpy(turns.as_quat(canonical=True, scalar_first=True)).float()
    pose = torch.cat([torch.zeros(4, 2, 3), quaternions.unflatten(0, (4, 2))], dim=-1)
    weights = LossWeights(gate=0.0)
    right = lesson_loss(replace(found, camera_pose=pose), T, weights)[0]
    assert float(right.detach()) < 1e-3
    still = torch.tensor([0.0, 0, 0, 1, 0, 0, 0]).expand(4, 2, 7)
    assert float(lesson_loss(replace(found, camera_pose=still), T, weights)[0].detach()) > 0.02


def test_stage_mixes_lessons_into_sequences():
    stage = replace(PAIRS, lesson_reach=4, lesson_every=3)
    assert [stage.is_lesson(step) for step in range(4)] == [True, False, False, True]
    assert not PAIRS.is_lesson(0)


def test_wide_loss_is_the_share_of_squared_motion_left_unexplained():
    truth = torch.stack([torch.eye(4), moved_by(0, 0, 2)])[None]
    still = torch.eye(4).expand(1, 2, 4, 4)
    least = torch.tensor([[0.01]])
    assert float(wide_loss(truth, truth, least)) == 0.0
    # Half of the four shares are rotations, which are right; standing still explains nothing.
    assert float(wide_loss(still, truth, least)) == pytest.approx(0.5, abs=1e-3)


def test_stage_shares_its_steps_between_the_rules():
    rules = [replace(PAIRS, gated=0.25).rule(step) for step in range(8)]
    assert rules.count("ttt3r") == 2
    assert {PAIRS.rule(step) for step in range(8)} == {"cut3r"}


def test_stage_shows_single_pictures_and_shares_the_other_steps_between_the_rules():
    stage = replace(PAIRS, frames=(2, 4), lanes=8, rooms=1.0, stills=0.5, gated=0.5)
    assert [stage.is_still(step) for step in range(4)] == [False, True, False, True]
    assert {stage.rule(step) for step in (0, 4, 8)} == {"cut3r"}
    assert {stage.rule(step) for step in (2, 6, 10)} == {"ttt3r"}
    shapes = [draw_batch(step, stage, patch=8).images.shape[:2] for step in (1, 3)]
    assert shapes == [(16, 1), (16, 1)]


def test_rooms_of_a_stage_turn_as_it_says():
    usual, calm = (
        draw_batch(3, replace(PAIRS, lanes=8, rooms=1.0, rooms_turn=(turn, turn)), patch=8)
        for turn in (1.0, 0.25)
    )
    turned = [
        (batch.T_world_cam[:, 1] - batch.T_world_cam[:, 0])[..., :3, :3].norm()
        for batch in (usual, calm)
    ]
    assert 0.2 < turned[1] / turned[0] < 0.35
    assert torch.equal(calm.T_world_cam[..., :3, 3], usual.T_world_cam[..., :3, 3])


def test_supersampled_batches_show_the_same_scene_with_less_noise():
    rough, smooth = (
        draw_batch(0, replace(PAIRS, lanes=16, rooms=0.0, supersample=rays), patch=8)
        for rays in (1, 3)
    )
    assert torch.equal(rough.depth, smooth.depth)

    def roughness(images: torch.Tensor) -> float:
        return float(images.diff(dim=-1).abs().mean())

    assert roughness(smooth.images) < 0.9 * roughness(rough.images)


# --- optimiser ----------------------------------------------------------------------------------


def test_orthogonalise_keeps_directions_and_evens_out_their_strengths():
    u, _, v = torch.linalg.svd(torch.randn(2, 6, 10, generator=torch.manual_seed(0)))
    strengths = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.2, 0.1])
    found = orthogonalise((u * strengths) @ v[:, :6])
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_optimisers_share_all_parameters_between_them():
    model = Model(SMALL)
    optimisers = build_optimisers(model, lr=1e-3, matrix_lr=0.02, weight_decay=0.0)
    held = [p for o in optimisers for g in o.param_groups for p in g["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))


def test_initial_weights_look_near_and_gate_moderately():
    model = Model(SMALL)
    prepare_for_matching(model, seed=0)
    images = draw_batch(0, LONGER, patch=8).images
    with torch.inference_mode():
        found, _ = model.run(images, rule="ttt3r", outputs=frozenset({"cam", "trace"}))
    assert found.trace is not None
    assert found.trace.gate_logits.mean().abs() < 6
    assert (found.pointmap_cam[..., 2] > 0.5).float().mean() > 0.9


def test_learning_rate_rises_stays_and_falls():
    settings = TrainSettings(total_steps=100, warm_up=10, cool_down=0.5)
    factors = [rate_factor(step, settings) for step in (0, 9, 50, 75, 99)]
    assert factors[:3] == pytest.approx([0.1, 1.0, 1.0])
    assert factors[3] == pytest.approx(0.51)
    assert factors[4] < 0.03


# --- the loop -----------------------------------------------------------------------------------


def test_training_resumed_gives_the_curve_of_an_uninterrupted_run(tmp_path):
    train(SETTINGS, tmp_path / "whole", device="cpu")
    train(SETTINGS, tmp_path / "first", device="cpu", stop_after=2)
    model = train(SETTINGS, tmp_path / "second", tmp_path / "first", device="cpu")
    curve = losses_of(tmp_path / "whole")
    assert len(curve) == 6
    assert losses_of(tmp_path / "first") + losses_of(tmp_path / "second") == curve
    stored = torch.load(tmp_path / "whole" / "state.pt", weights_only=True)["averaged"]
    assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())


def test_training_learns_the_poses_of_a_batch_it_keeps_seeing():
    model = Model(SMALL)
    prepare_for_matching(model, seed=0)
    batch = draw_batch(0, replace(PAIRS, rooms=1.0), patch=8)
    targets = Targets.build(batch.depth, batch.valid, batch.T_world_cam, batch.intrinsics)
    optimisers = build_optimisers(model, lr=2e-3, matrix_lr=0.01, weight_decay=0.0)
    curve = []
    for _ in range(30):
        found, _ = model.run(
            batch.images, rule="cut3r", outputs=frozenset({"cam", "world", "trace"})
        )
        loss, parts = total_loss(found, targets, LossWeights())
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        curve.append(float(parts["cam"].detach() + parts["translation"].detach()))
    assert curve[-1] < 0.6 * curve[0]


def test_training_continues_from_exported_weights(tmp_path):
    train(SETTINGS, tmp_path / "run", device="cpu", stop_after=2)
    path = tmp_path / "small.safetensors"
    info = export(tmp_path / "run", path, name="small")
    assert info.segment_frames == 3, "as long as the longest that it learns from"
    assert info.trained
    assert info.licence == "Apache-2.0"
    assert "cut3r" in info.notes
    model, _ = load_model(path)
    assert model.config == SMALL
    train(SETTINGS, tmp_path / "more", path, device="cpu", stop_after=1)
    assert len(losses_of(tmp_path / "more")) == 1


def test_rotations_kept_begin_without_an_error_and_outlast_an_interruption(tmp_path):
    train(SETTINGS, tmp_path / "run", device="cpu", stop_after=2)
    export(tmp_path / "run", tmp_path / "small.safetensors", name="small")
    # Which rule it is shows from the third frame on.
    true = replace(SETTINGS, curriculum=(replace(LONGER, gated=1.0),))
    kept = replace(true, keep_rotations=True)
    for name, settings in (("kept", kept), ("true", true)):
        train(settings, tmp_path / name, tmp_path / "small.safetensors", device="cpu", stop_after=4)
    first = {
        name: json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])
        for name in ("kept", "true")
    }
    assert first["kept"]["rotation"] < 1e-3 < first["true"]["rotation"]
    assert first["kept"]["translation"] == first["true"]["translation"]
    train(kept, tmp_path / "cut", tmp_path / "small.safetensors", device="cpu", stop_after=2)
    train(kept, tmp_path / "cut", tmp_path / "cut", device="cpu", stop_after=4)
    assert losses_of(tmp_path / "cut") == pytest.approx(losses_of(tmp_path / "kept"), rel=1e-6)
    with pytest.raises(ValueError, match="learns true rotations"):
        train(kept, tmp_path / "true", tmp_path / "true", device="cpu")
    with pytest.raises(ValueError, match="keep_rotations is for trained weights"):
        train(kept, tmp_path / "new", device="cpu")


def test_training_refuses_a_folder_without_a_state(tmp_path):
    with pytest.raises(ValueError, match=r"state\.pt"):
        train(SETTINGS, tmp_path / "run", tmp_path)


def test_training_refuses_weights_of_another_network(tmp_path):
    train(SETTINGS, tmp_path / "run", device="cpu", stop_after=1)
    wider = replace(SETTINGS, model=replace(SMALL, state_size=16))
    with pytest.raises(ValueError, match="state_size is 12, expected 16"):
        train(wider, tmp_path / "more", tmp_path / "run", device="cpu")
    path = tmp_path / "small.safetensors"
    export(tmp_path / "run", path, name="small")
    with pytest.raises(ValueError, match="state_size is 12, expected 16"):
        train(wider, tmp_path / "more", path, device="cpu")
    assert not (tmp_path / "more").exists()


def test_training_does_not_write_over_another_run(tmp_path):
    train(SETTINGS, tmp_path, device="cpu", stop_after=1)
    with pytest.raises(ValueError, match="holds a run"):
        train(SETTINGS, tmp_path, device="cpu", stop_after=1)


def test_training_refuses_a_damaged_state(tmp_path):
    train(SETTINGS, tmp_path, device="cpu", stop_after=1)
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged"):
        train(SETTINGS, tmp_path, tmp_path, device="cpu")


def test_training_resumed_in_its_folder_logs_every_step_once(tmp_path):
    train(SETTINGS, tmp_path, device="cpu", stop_after=2)
    log = tmp_path / "log.jsonl"
    lost = [json.dumps({"step": 3, "loss": 9.0}) + "\n"]  # killed before step 3 was saved
    log.write_text(log.read_text() + "".join(lost))
    train(SETTINGS, tmp_path, tmp_path, device="cpu", stop_after=4)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert 9.0 not in losses_of(tmp_path)


def test_training_stops_when_its_time_is_over(tmp_path):
    train(SETTINGS, tmp_path, device="cpu", minutes=1e-6)
    assert len(losses_of(tmp_path)) == 1
    assert read_state(tmp_path)["step"] == 1


def test_rates_fall_with_the_time_that_a_run_has_to_finish_in(tmp_path):
    settings = replace(SETTINGS, warm_up=1, cool_down=0.5, total_steps=1000)
    rates = [rate_factor(100, settings, used) for used in (0.0, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([1.0, 1.0, 0.51, 0.02])
    assert rate_factor(750, settings, 0.1) == pytest.approx(0.51)
    train(settings, tmp_path, device="cpu", finish_in=1e-6)
    assert read_state(tmp_path)["step"] == 1


def test_exported_weights_tell_where_they_come_from(tmp_path):
    train(SETTINGS, tmp_path / "run", device="cpu", stop_after=1)
    export(tmp_path / "run", tmp_path / "small.safetensors", name="small")
    gated = replace(SETTINGS, curriculum=(replace(PAIRS, gated=0.5),))
    train(gated, tmp_path / "more", tmp_path / "small.safetensors", device="cpu", stop_after=1)
    notes = export(tmp_path / "more", tmp_path / "better.safetensors", name="better").notes
    assert notes == (
        "8 training frames in 1 steps, cut3r and ttt3r. "
        "Before: 8 training frames in 1 steps, cut3r."
    )


def test_training_validates_on_held_out_worlds(tmp_path):
    train(replace(SETTINGS, validate_every=2), tmp_path, device="cpu", stop_after=2)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = [row for row in rows if "validation" in row]
    assert [row["validation"] for row in found] == ["rooms", "streets"]
    assert all(math.isfinite(row["turn_gain"] + row["move_gain"]) for row in found)
    assert all(row["confidence"] >= 1 for row in found)
    assert all(row["abs_rel"] > 0 and 0 <= row["gate_median"] <= 1 for row in found)
    assert all(0 < row["rendering"] < 1 for row in rows if "loss" in row)


def test_single_pictures_train_depth_and_no_motion(tmp_path):
    stage = replace(PAIRS, stills=0.5, gated=0.5)
    settings = replace(SETTINGS, curriculum=(stage,), loss=LossWeights(depth=5.0))
    train(settings, tmp_path, device="cpu", stop_after=2)
    first, second = (
        json.loads(line)
        for line in (tmp_path / "log.jsonl").read_text().splitlines()
        if "loss" in json.loads(line)
    )
    assert (first["frames"], second["frames"]) == (2, 1)
    assert {"depth", "rotation", "gate"} <= first.keys()
    assert "depth" in second
    assert "rotation" not in second
    assert math.isfinite(second["loss"])
    assert not second["skipped"]


def test_motion_gain_tells_how_far_motions_are_understated():
    true = torch.tensor([[4.0, 0.0, -2.0], [0.0, 1.0, 0.0]])
    assert float(motion_gain(true, true)) == pytest.approx(1)
    assert float(motion_gain(0.25 * true, true)) == pytest.approx(0.25)
    assert float(motion_gain(torch.zeros(2, 3), true)) == 0


# --- a wider network ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["cut3r", "ttt3r"])
def test_wider_network_says_the_same(rule, close):
    narrow = load_model("compact")[0]
    wide = widen(narrow, 2)
    assert wide.config == widened(narrow.config, 2)
    images = torch.rand(2, 4, 3, 24, 40, generator=torch.Generator().manual_seed(5)) * 2 - 1
    outputs = {"cam", "world", "rgb"}
    with torch.no_grad():
        expected, state = narrow.run(images, rule=rule, outputs=outputs)
        found, wide_state = wide.run(images, rule=rule, outputs=outputs)
    for field in ("camera_pose", "rate", "pointmap_cam", "confidence", "rgb"):
        close(getattr(found, field), getattr(expected, field))
    for field in ("pointmap_world", "confidence_world"):
        close(getattr(found, field), getattr(expected, field))
    close(wide_state.tokens, state.tokens.repeat(1, 1, 2))
    query, pose = state.pose_memory.chunk(2, dim=-1)
    close(wide_state.pose_memory, torch.cat((query, query, pose, pose), dim=-1))


def test_copies_of_a_channel_learn_different_things():
    wide = widen(load_model("compact")[0], 2)
    images = torch.rand(1, 3, 3, 24, 40, generator=torch.Generator().manual_seed(5)) * 2 - 1
    wide.run(images)[0].pointmap_cam.square().mean().backward()
    for name in ("enc_blocks.0.mlp.fc1", "dec_blocks.1.cross_attn.projv"):
        gradient = wide.get_submodule(name).weight.grad
        first, second = gradient.unflatten(0, (2, -1)).unbind(0)
        assert (first - second).norm() > 0.1 * first.norm(), name


@pytest.mark.parametrize(
    "other", [{"head_type": "dpt", "patch_size": 16}, {"ray_map_encoder": True}]
)
def test_networks_with_parts_that_cannot_be_widened_are_refused(other):
    with pytest.raises(ValueError, match="only networks with linear heads"):
        widen(Model(replace(SMALL, **other)), 2)


def test_training_starts_from_narrower_weights_as_good_as_they_are(tmp_path):
    train(SETTINGS, tmp_path / "narrow", device="cpu", stop_after=2)
    path = tmp_path / "narrow.safetensors"
    export(tmp_path / "narrow", path)
    train(replace(SETTINGS, seed=9), tmp_path / "same", path, device="cpu", stop_after=1)
    wider = replace(SETTINGS, seed=9, model=widened(SMALL, 2))
    train(wider, tmp_path / "wide", path, device="cpu", stop_after=1)
    assert losses_of(tmp_path / "wide") == pytest.approx(losses_of(tmp_path / "same"), rel=1e-4)
    export(tmp_path / "wide", tmp_path / "wide.safetensors")
    model, info = load_model(tmp_path / "wide.safetensors")
    assert model.config == wider.model
    assert "widened 2 times" in info.notes


# --- the command --------------------------------------------------------------------------------


def options(*arguments: object) -> argparse.Namespace:
    return command._options([str(argument) for argument in arguments])


def test_command_refines_trained_weights_and_begins_afresh_without(tmp_path):
    assert command.choose_settings(options(tmp_path, "--device", "cpu")) == TrainSettings()
    weights = tmp_path / "weights.safetensors"
    save_weights(weights, Model(COMPACT), replace(load_model("compact")[1], config=COMPACT))
    refine = (tmp_path, "--resume", weights, "--device", "cpu", "--batch")
    chosen = command.choose_settings(options(*refine, 16))
    assert replace(chosen, curriculum=REFINE.curriculum) == REFINE
    assert chosen.curriculum[0].lanes == 16 * REFINE.curriculum[0].lanes
    small = command.choose_settings(options(*refine, 1))
    rates = (small.lr / REFINE.lr, small.matrix_lr / REFINE.matrix_lr)
    assert rates == pytest.approx((0.25, 0.25)), "small batches are noisy"
    assert (small.keep_rotations, chosen.keep_rotations) == (True, False)
    assert small.curriculum == REFINE.curriculum
    wider = command.choose_settings(options(*refine, 16, "--widen", 2))
    assert wider == replace(chosen, model=widened(chosen.model, 2))


def test_command_goes_on_with_the_bundled_weights(tmp_path):
    bundled = Path(command.__file__).parents[1] / "checkpoints" / "compact.safetensors"
    for more, learns in (((), "poses"), (("--depth-alone",), "depth")):
        chosen = command.choose_settings(options(tmp_path, "--resume", bundled, *more))
        assert (chosen.learns, chosen.model) == (learns, load_model("compact")[1].config)


def test_command_goes_on_with_weights_that_were_widened(tmp_path):
    wide = widen(Model(COMPACT), 2)
    path = tmp_path / "wide.safetensors"
    save_weights(path, wide, replace(load_model("compact")[1], config=wide.config))
    found = command.choose_settings(options(tmp_path / "run", "--resume", path, "--widen", 3))
    assert found.model == widened(REFINE.model, 6)


def test_command_resumes_with_the_settings_that_the_run_began_with(tmp_path):
    train(replace(SETTINGS, seed=3), tmp_path, device="cpu", stop_after=1)
    found = command.choose_settings(options(tmp_path, "--resume", tmp_path, "--steps", 9))
    assert found == replace(SETTINGS, seed=3, total_steps=9)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--seed", 1), "--seed"),
        (("--batch", 2), "--batch"),
        (("--steps", 1), "all of its 1 steps"),
    ],
)
def test_command_refuses_what_a_run_cannot_change(tmp_path, more, complaint):
    train(SETTINGS, tmp_path, device="cpu", stop_after=1)
    with pytest.raises(ValueError, match=complaint):
        command.choose_settings(options(tmp_path, "--resume", tmp_path, *more))


def test_command_refuses_a_folder_with_another_run(tmp_path):
    train(SETTINGS, tmp_path, device="cpu", stop_after=1)
    with pytest.raises(ValueError, match="holds a run"):
        command.choose_settings(options(tmp_path))


def test_command_refuses_weights_of_another_network(tmp_path):
    train(SETTINGS, tmp_path / "run", device="cpu", stop_after=1)
    path = tmp_path / "small.safetensors"
    export(tmp_path / "run", path, name="small")
    with pytest.raises(ValueError, match="another network"):
        command.choose_settings(options(tmp_path / "more", "--resume", path))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--widen", 2), "--widen is for weights"),
        (("--widen", 2, "--resume", "run"), "--widen is for weights"),
        (("--steps", 0), "not a whole number above 0"),
        (("--workers", "-1"), "not a whole number above 0"),
        (("--minutes", 0), "not above 0"),
        (("--device", "tpu"), "invalid choice"),
    ],
)
def test_command_refuses_wrong_numbers(tmp_path, capsys, arguments, complaint):
    with pytest.raises(SystemExit):
        options(tmp_path, *arguments)
    assert complaint in capsys.readouterr().err


def test_command_refuses_a_file_as_its_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        options(tmp_path / "file")
    assert "no folder" in capsys.readouterr().err


@pytest.mark.slow
def test_command_trains_in_two_processes_and_exports_what_came_of_it(tmp_path):
    line = [sys.executable, "-m", "ttt3r.training", tmp_path, "--workers", "2", "--steps", "2"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path)[1] > 0
    assert load_model(tmp_path / "compact.safetensors")[1].segment_frames == 2
    assert {"curves.png", "rooms.png", "streets.png"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.slow
def test_killed_command_leaves_no_process_behind(tmp_path):
    line = [sys.executable, "-m", "ttt3r.training", tmp_path, "--workers", "2"]
    run = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    wait_until(lambda: losses_of(tmp_path) if (tmp_path / "log.jsonl").is_file() else False)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert len(children) >= 2
    run.kill()
    run.wait()
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


def wait_until(holds: Callable[[], object], patience_s: float = 120) -> None:
    end = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
