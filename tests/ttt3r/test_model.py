import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ttt3r.config import RELEASED_224_LINEAR, RELEASED_512_DPT, TINY
from ttt3r.images import normalise
from ttt3r.model import Model
from ttt3r.state import UPDATE_RULES, State, update_rule

ALL = frozenset({"cam", "world", "rgb", "trace"})
FIELDS = (
    "camera_pose",
    "descriptor",
    "rate",
    "pointmap_cam",
    "confidence",
    "pointmap_world",
    "confidence_world",
    "rgb",
)


@pytest.fixture
def images(frames):
    """Network input of two lanes and five frames [2, 5, 3, 48, 64]."""
    return normalise(frames(2, 5))


@pytest.fixture(params=["512_dpt", "224_linear"])
def manifest(request, golden):
    """A released configuration, and the names, shapes and aliases of its checkpoint."""
    config = {"512_dpt": RELEASED_512_DPT, "224_linear": RELEASED_224_LINEAR}[request.param]
    return config, json.loads((golden / f"state_dict_{request.param}.json").read_text())


def meta_tensors(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_model_has_exactly_the_tensors_of_the_published_checkpoints(manifest):
    config, expected = manifest
    with torch.device("meta"):
        model = Model(config)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {n: s for n, s in expected["shapes"].items() if n not in expected["aliases"]}


def test_checkpoint_names_load_strictly_aliases_included(manifest):
    config, expected = manifest
    with torch.device("meta"):
        model = Model(config)
    model.load_state_dict(meta_tensors(expected["shapes"]))
    model.load_tensors(meta_tensors(expected["shapes"]))


def test_load_tensors_takes_an_alias_for_the_tensor_it_stands_for():
    config = replace(TINY, head_type="dpt", patch_size=16)
    model = Model(config)
    tensors = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    name = "downstream_head.dpt_self.scratch.layer2_rn.weight"
    values = tensors.pop(name)
    tensors["downstream_head.dpt_self.scratch.layer_rn.1.weight"] = values
    model.load_tensors(tensors)
    assert torch.equal(model.state_dict()[name], values)


def test_load_tensors_on_the_meta_device_takes_the_tensors_themselves(model, images):
    with torch.device("meta"):
        other = Model(TINY)
    other.load_tensors(model.state_dict())
    assert other.device.type == "cpu"
    expected, _ = model.run(images)
    found, _ = other.run(images)
    assert torch.equal(found.camera_pose, expected.camera_pose)


def test_load_tensors_names_every_tensor_that_does_not_fit_and_loads_none(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    del tensors["pose_token"], tensors["enc_norm.bias"]
    tensors["surprise.weight"] = torch.zeros(1)
    tensors["dec_norm.weight"] = torch.zeros(5)
    with pytest.raises(ValueError, match="4 tensors") as error:
        model.load_tensors(tensors)
    for part in (
        "missing pose_token",
        "missing enc_norm.bias",
        "unexpected surprise.weight",
        "dec_norm.weight is (5,), expected (32,)",
    ):
        assert part in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_first_frame_overwrites_the_state_and_later_ones_are_gated(model, images):
    predictions, _ = model.run(images, outputs=ALL)
    trace = predictions.trace
    assert torch.equal(predictions.rate[:, 0], torch.ones(2, TINY.state_size))
    assert torch.equal(trace.tokens[:, 0], trace.candidate[:, 0])
    gate = trace.gate_logits.sigmoid()
    torch.testing.assert_close(predictions.rate[:, 1:], gate[:, 1:])
    assert gate.std() > 1e-3
    blended = gate[:, 1, :, None] * trace.candidate[:, 1]
    blended = blended + (1 - gate[:, 1, :, None]) * trace.tokens[:, 0]
    torch.testing.assert_close(trace.tokens[:, 1], blended)


def test_cut3r_replaces_the_state_at_every_frame(model, images):
    predictions, state = model.run(images, rule="cut3r", outputs=ALL)
    assert torch.equal(predictions.rate, torch.ones_like(predictions.rate))
    assert torch.equal(state.tokens, predictions.trace.candidate[:, -1])


def test_rules_agree_on_two_frames_and_part_on_the_third(model, images):
    cut3r, _ = model.run(images, rule="cut3r")
    ttt3r, _ = model.run(images, rule="ttt3r")
    assert torch.equal(cut3r.pointmap_cam[:, :2], ttt3r.pointmap_cam[:, :2])
    assert not torch.allclose(cut3r.pointmap_cam[:, 2], ttt3r.pointmap_cam[:, 2])


def test_frame_without_update_leaves_the_state_exactly_as_it_was(model, images):
    update = torch.ones(2, 5, dtype=torch.bool)
    update[1, 3] = False
    trace = model.run(images, update=update, outputs=ALL)[0].trace
    assert torch.equal(trace.tokens[1, 3], trace.tokens[1, 2])
    assert torch.equal(trace.pose_memory[1, 3], trace.pose_memory[1, 2])
    assert not torch.equal(trace.tokens[0, 3], trace.tokens[0, 2])
    assert not torch.equal(trace.pose_memory[0, 3], trace.pose_memory[0, 2])


def test_reset_acts_after_the_frame_and_starts_a_new_stream(model, images, close):
    reset = torch.zeros(2, 5, dtype=torch.bool)
    reset[:, 2] = True
    found, state = model.run(images, reset=reset)
    plain, _ = model.run(images)
    fresh, fresh_state = model.run(images[:, 3:])
    close(found.camera_pose[:, :3], plain.camera_pose[:, :3])
    close(found.camera_pose[:, 3:], fresh.camera_pose)
    close(found.pointmap_cam[:, 3:], fresh.pointmap_cam)
    close(state.tokens, fresh_state.tokens)


def test_reset_of_the_last_frame_gives_the_initial_state(model, images):
    reset = torch.zeros(2, 5, dtype=torch.bool)
    reset[0, 4] = True
    _, state = model.run(images, reset=reset)
    start = model.initial_state(2)
    assert state.first.tolist() == [True, False]
    assert torch.equal(state.tokens[0], start.tokens[0])
    assert torch.equal(state.pose_memory[0], start.pose_memory[0])


def test_lanes_with_different_flags_equal_runs_of_one_lane(model, frames, close):
    images = normalise(frames(3, 6))
    update = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]]).bool()
    reset = torch.tensor([[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1]]).bool()
    _, warm = model.run(images[1:2])
    states = [model.initial_state(1), warm, model.initial_state(1)]
    start = State(
        torch.cat([s.tokens for s in states]),
        torch.cat([s.pose_memory for s in states]),
        torch.cat([s.first for s in states]),
    )
    together, after = model.run(images, start, update=update, reset=reset, outputs=ALL)
    for lane in range(3):
        one = slice(lane, lane + 1)
        alone, alone_after = model.run(
            images[one], states[lane], update=update[one], reset=reset[one], outputs=ALL
        )
        for name in FIELDS:
            close(getattr(together, name)[one], getattr(alone, name))
        close(after.tokens[one], alone_after.tokens)
        close(after.pose_memory[one], alone_after.pose_memory)
        assert torch.equal(after.first[one], alone_after.first)


def test_lane_is_not_touched_by_what_another_lane_sees(model, images):
    before, _ = model.run(images, outputs=ALL)
    changed = images.clone()
    changed[1] = -changed[1]
    after, _ = model.run(changed, outputs=ALL)
    assert all(torch.equal(getattr(before, n)[0], getattr(after, n)[0]) for n in FIELDS)
    assert not torch.equal(before.pointmap_cam[1], after.pointmap_cam[1])


def test_one_long_run_equals_runs_of_one_frame(model, images, close):
    whole, whole_state = model.run(images, outputs=ALL)
    state, parts = None, []
    for t in range(5):
        part, state = model.run(images[:, t : t + 1], state, outputs=ALL)
        parts.append(part)
    for name in FIELDS:
        close(torch.cat([getattr(p, name) for p in parts], dim=1), getattr(whole, name))
    close(state.tokens, whole_state.tokens)


def test_run_predicts_only_what_was_asked_for(model, images):
    everything, _ = model.run(images, outputs=ALL)
    poses, _ = model.run(images, outputs=frozenset())
    assert torch.equal(poses.camera_pose, everything.camera_pose)
    unasked = ("pointmap_cam", "confidence", "pointmap_world", "confidence_world", "rgb", "trace")
    assert all(getattr(poses, name) is None for name in unasked)
    assert poses.descriptor.shape == (2, 5, TINY.enc_embed_dim)
    assert everything.pointmap_world.shape == (2, 5, 48, 64, 3)
    assert everything.confidence.min() >= 1


def test_gradient_of_the_last_frame_reaches_the_first_image(model, images):
    images.requires_grad_()
    predictions, _ = model.run(images)
    predictions.pointmap_cam[0, -1].sum().backward()
    assert images.grad[0, 0].abs().max() > 0
    assert torch.equal(images.grad[1], torch.zeros_like(images.grad[1]))


def test_every_weight_that_can_influence_the_result_is_trained(model, images):
    predictions, _ = model.run(images, outputs=frozenset({"cam", "world", "rgb"}))
    loss = predictions.pointmap_cam.sum() + predictions.pointmap_world.sum()
    loss = loss + predictions.camera_pose.square().sum() + predictions.rgb.sum()
    (loss + predictions.confidence.sum() + predictions.confidence_world.sum()).backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    # Attention to a single token has weight 1: its query and key cannot matter.
    dead = ("norm2.", "cross_attn.projq.", "cross_attn.projk.")
    assert without == {
        name
        for name, _ in model.named_parameters()
        if ".write_blocks." in name and any(part in name for part in dead)
    }


def test_training_works_after_inference_on_the_same_image_size(model, images):
    with torch.inference_mode():
        model.run(images)
    predictions, _ = model.run(images)
    predictions.pointmap_cam.sum().backward()
    assert model.pose_token.grad is not None


@pytest.mark.parametrize("rule", ["cut3r", "ttt3r"])
def test_autocast_stays_near_float32_and_keeps_the_state_in_float32(model, images, close, rule):
    expected, _ = model.run(images, rule=rule, outputs=ALL)
    with torch.autocast("cpu", torch.bfloat16):
        found, state = model.run(images, rule=rule, outputs=ALL)
    assert state.tokens.dtype == state.pose_memory.dtype == torch.float32
    for name in set(FIELDS) - {"pointmap_cam"}:
        assert getattr(found, name).dtype == torch.float32
        close(getattr(found, name), getattr(expected, name), torch.bfloat16)
    # A raw z near 0 may change sign, which mirrors the point: compare distances.
    close(found.pointmap_cam.norm(dim=-1), expected.pointmap_cam.norm(dim=-1), torch.bfloat16)


def test_autocast_gives_finite_gradients(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        predictions, _ = model.run(images)
    predictions.pointmap_cam.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_bfloat16_weights_stay_near_float32(frames, close, head):
    torch.manual_seed(0)
    config = replace(TINY, head_type=head, patch_size=16) if head == "dpt" else TINY
    model = Model(config)
    images = normalise(frames(1, 3))
    with torch.inference_mode():
        expected, _ = model.run(images)
        found, state = model.to(torch.bfloat16).run(images)
    assert state.tokens.dtype == torch.float32
    close(found.pointmap_cam, expected.pointmap_cam, torch.bfloat16)
    close(found.camera_pose, expected.camera_pose, torch.bfloat16)


def test_new_weights_start_with_cameras_near_the_identity(images):
    torch.manual_seed(1)
    predictions, _ = Model(TINY).run(images)
    identity = torch.tensor([0.0, 0, 0, 1, 0, 0, 0]).expand(2, 5, 7)
    torch.testing.assert_close(predictions.camera_pose, identity, atol=0.05, rtol=0)
    assert predictions.pointmap_cam.abs().max() < 20


def test_added_rule_is_chosen_by_name_and_never_slows_the_first_frame(model, images, monkeypatch):
    monkeypatch.setattr("ttt3r.state.UPDATE_RULES", dict(UPDATE_RULES))

    @update_rule("still")
    def still(proposal):
        return torch.zeros_like(proposal.tokens[..., 0])

    trace = model.run(images, rule="still", outputs=ALL)[0].trace
    assert torch.equal(trace.tokens[:, 0], trace.candidate[:, 0])
    assert torch.equal(trace.tokens[:, 4], trace.tokens[:, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 5, 3, 48, 60)}, "multiples of the patch size, 8"),
        ({"images": torch.zeros(2, 0, 3, 48, 64)}, "at least one"),
        ({"images": torch.zeros(2, 5, 48, 64, 3)}, "expected floats"),
        ({"images": torch.zeros(2, 5, 3, 48, 64, dtype=torch.uint8)}, "uint8"),
        ({"rule": "ttt4r"}, "known: cut3r, ttt3r"),
        ({"outputs": {"depth"}}, r"unknown outputs \['depth'\]"),
        ({"update": np.ones((5, 2), bool)}, r"expected bool \[lanes, frames\] = \(2, 5\)"),
        ({"reset": np.ones((2, 5))}, "reset is float64"),
    ],
)
def test_run_refuses_what_it_cannot_mean(model, images, change, message):
    arguments = {"images": images, **change}
    with pytest.raises(ValueError, match=message):
        model.run(arguments.pop("images"), **arguments)


def test_run_refuses_a_state_of_other_lanes(model, images):
    with pytest.raises(ValueError, match=r"tokens is \(3, 12, 32\).*need \(2, 12, 32\)"):
        model.run(images, model.initial_state(3))


def test_dpt_head_without_four_levels_to_read_is_refused():
    with pytest.raises(ValueError, match="dec_depth is 2; the DPT head reads four levels"):
        replace(TINY, head_type="dpt", patch_size=16, dec_depth=2)
    three = replace(TINY, head_type="dpt", patch_size=16, dec_depth=3)
    found, _ = Model(three).run(torch.zeros(1, 1, 3, 32, 32))
    assert found.pointmap_cam.shape == (1, 1, 32, 32, 3)
