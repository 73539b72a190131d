"""Depth in channels of its own: what was there before goes on saying what it said."""

from dataclasses import replace

import pytest
import torch

from ttt3r.config import TINY
from ttt3r.model import Model
from ttt3r.training import Stage, command, train
from ttt3r.training.curriculum import draw_batch
from ttt3r.training.depth_channels import (
    add_depth_channels,
    depth_masks,
    require_depth_channels,
)
from ttt3r.training.initial import prepare_for_matching
from ttt3r.training.losses import Targets, depth_loss
from ttt3r.training.settings import DEPTH_ALONE
from ttt3r.training.widening import widen, widened
from ttt3r.weights import load_model, save_weights

SMALL = replace(TINY, encoder_rope_fp16=False, ray_map_encoder=False)
SETTINGS = replace(
    DEPTH_ALONE,
    model=widened(SMALL, 2),
    curriculum=(Stage(1, (4,), 2, 24, 1.0, aspects=((1.5, 1),), stills=0.5),),
    total_steps=40,
    lr=4e-3,
    matrix_lr=0.02,
    warm_up=2,
)


def narrow_model() -> Model:
    torch.manual_seed(3)
    model = Model(SMALL)
    prepare_for_matching(model, seed=0)
    return model


def said(model: Model) -> dict[str, torch.Tensor]:
    images = torch.rand(2, 5, 3, 24, 40, generator=torch.Generator().manual_seed(5)) * 2 - 1
    with torch.no_grad():
        found, _ = model.run(images, outputs=frozenset({"cam", "world"}))
    return {
        "translation": found.camera_pose[..., :3],
        "rotation": found.camera_pose[..., 4:],
        "rate": found.rate,
        "depth": found.pointmap_cam[..., 2],
        "world": found.pointmap_world,
    }


def distances(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict:
    """Relative, in L2."""
    return {
        name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()
    }


def depth_error(model: Model) -> float:
    """Of single pictures that training saw."""
    seen = draw_batch(1, replace(SETTINGS.curriculum[0], lanes=16), patch=8)
    targets = Targets.build(seen.depth, seen.valid, seen.T_world_cam, seen.intrinsics)
    with torch.no_grad():
        found, _ = model.run(seen.images)
    return float(depth_loss(found.pointmap_cam, targets.pointmap_cam, targets.valid))


@pytest.fixture
def narrow_path(tmp_path):
    path = tmp_path / "narrow.safetensors"
    save_weights(path, narrow_model(), replace(load_model("compact")[1], config=SMALL))
    return path


def test_network_with_new_channels_says_what_it_said_without():
    narrow = load_model("compact")[0]
    wide = add_depth_channels(narrow)
    assert wide.config == widened(narrow.config, 2)
    require_depth_channels(wide.state_dict(), "these")
    assert max(distances(said(wide), said(narrow)).values()) < 0.01


def test_what_new_channels_learn_changes_depth_and_hardly_the_poses():
    wide = add_depth_channels(load_model("compact")[0])
    before = said(wide)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, mask in depth_masks(wide.state_dict()).items():
            if name.startswith("downstream_head"):
                continue
            tensor = wide.get_parameter(name)
            noise = torch.randn(tensor.shape, generator=generator)
            tensor += noise * mask * tensor[mask].square().mean().nan_to_num().sqrt()
    away = distances(said(wide), before)
    assert away.pop("depth") > 0.1
    assert max(away.values()) < 0.03


def test_depth_learns_alone_and_goes_on_after_an_interruption(tmp_path, narrow_path):
    whole = train(SETTINGS, tmp_path / "whole", narrow_path, device="cpu")
    assert depth_error(whole) < 0.9 * depth_error(add_depth_channels(narrow_model()))
    train(SETTINGS, tmp_path / "cut", narrow_path, device="cpu", stop_after=20)
    resumed = train(SETTINGS, tmp_path / "cut", tmp_path / "cut", device="cpu")
    first = add_depth_channels(narrow_model())
    for name, mask in depth_masks(first.state_dict()).items():
        assert torch.equal(whole.get_parameter(name), resumed.get_parameter(name)), name
        kept = whole.get_parameter(name)[~mask]
        # The weights were stored in half precision.
        assert torch.allclose(kept, first.get_parameter(name)[~mask], rtol=2e-3, atol=1e-4), name
        if mask.ndim > 1 and mask.any():
            moved = whole.get_parameter(name) - first.get_parameter(name)
            assert moved[mask].norm() > 0.01 * first.get_parameter(name)[mask].norm(), name


def test_depth_does_not_learn_alone_where_poses_read_all_channels(tmp_path):
    wide = widen(narrow_model(), 2)
    path = tmp_path / "wide.safetensors"
    save_weights(path, wide, replace(load_model("compact")[1], config=wide.config))
    with pytest.raises(ValueError, match="depth cannot learn alone"):
        train(SETTINGS, tmp_path / "run", path, device="cpu")
    with pytest.raises(ValueError, match="found none to resume from"):
        train(SETTINGS, tmp_path / "new", device="cpu")


def test_command_teaches_depth_alone(tmp_path, capsys):
    def choose(*arguments: object):
        options = command._options([str(argument) for argument in (tmp_path, *arguments)])
        return command.choose_settings(options)

    config = replace(DEPTH_ALONE.model, enc_depth=3)
    path = tmp_path / "weights.safetensors"
    narrow = Model(config)
    for model in (narrow, add_depth_channels(narrow)):
        save_weights(path, model, replace(load_model("compact")[1], config=model.config))
        found = choose("--resume", path, "--depth-alone", "--device", "cpu")
        assert found == replace(DEPTH_ALONE, model=widened(config, 2))
    save_weights(path, widen(narrow, 2), replace(load_model("compact")[1], config=model.config))
    with pytest.raises(ValueError, match="depth cannot learn alone"):
        choose("--resume", path, "--depth-alone", "--device", "cpu")
    for wrong in (("--depth-alone",), ("--resume", path, "--depth-alone", "--widen", 2)):
        with pytest.raises(SystemExit):
            choose(*wrong)
    assert "--depth-alone is for weights" in capsys.readouterr().err
