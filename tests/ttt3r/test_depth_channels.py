"""Depth in channels of its own: what was there before goes on saying what it said."""

from dataclasses import replace

import pytest
import torch

from ttt3r.config import TINY
from ttt3r.model import Model
from ttt3r.training import Stage, command, depth_run, train
from ttt3r.training.curriculum import draw_batch
from ttt3r.training.depth_channels import (
    DepthNetwork,
    join,
    joined_config,
    make_room,
    require_depth_channels,
    see,
    seer,
    take_apart,
)
from ttt3r.training.export import export
from ttt3r.training.initial import prepare_for_matching
from ttt3r.training.losses import Targets, depth_loss
from ttt3r.training.settings import DEPTH_ALONE, POSES_ALONE
from ttt3r.training.widening import widen
from ttt3r.weights import load_model, save_weights

SMALL = replace(TINY, encoder_rope_fp16=False, ray_map_encoder=False)
SETTINGS = replace(
    DEPTH_ALONE,
    model=joined_config(SMALL),
    curriculum=(Stage(1, (4,), 8, 24, 1.0, aspects=((1.5, 1),), stills=0.5, gated=0.5),),
    total_steps=70,  # three batches are rendered
    lr=2e-3,
    matrix_lr=0.01,
    warm_up=2,
    average=0.9,
)


def narrow_model() -> Model:
    torch.manual_seed(3)
    model = Model(SMALL)
    prepare_for_matching(model, seed=0)
    with torch.no_grad():  # as if trained: norms and biases are no longer trivial
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.startswith("downstream_head"):
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def images_seen() -> torch.Tensor:
    return torch.rand(2, 5, 3, 24, 40, generator=torch.Generator().manual_seed(5)) * 2 - 1


def said(model: Model) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found, _ = model.run(images_seen(), outputs=frozenset({"cam", "world"}))
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


def random_network(around: Model) -> DepthNetwork:
    """Depth channels that learnt something else than `around` said."""
    torch.manual_seed(8)
    network = DepthNetwork(around.config)
    network.begin(around, images_seen(), see(seer(around), images_seen(), "ttt3r"))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return network


def test_network_with_room_for_depth_says_what_it_said():
    narrow = narrow_model()
    room = make_room(narrow)
    assert room.config == joined_config(narrow.config)
    require_depth_channels(room, "these")
    assert max(distances(said(room), said(narrow)).values()) < 0.005


def test_joined_network_says_of_depth_what_its_channels_said_alone():
    room = make_room(narrow_model())
    network = random_network(room)
    whole = join(room, network)
    require_depth_channels(whole, "these")
    images = images_seen()
    with torch.no_grad():
        points, confidence = network(images, see(seer(whole), images, "ttt3r"), whole.positions)
        found, _ = whole.run(images, outputs=frozenset({"cam"}))
        first, _ = room.run(images, outputs=frozenset({"cam"}))
    # Alone they divide by what the old channels divide by, together by what all do.
    assert (points - found.pointmap_cam).norm() < 0.003 * found.pointmap_cam.norm()
    assert (confidence - found.confidence).norm() < 0.003 * found.confidence.norm()
    assert (found.pointmap_cam - first.pointmap_cam).norm() > 0.1 * first.pointmap_cam.norm()


def test_depth_begins_as_it_was_with_channels_that_are_ready_to_learn():
    room = make_room(narrow_model())
    network = DepthNetwork(room.config)
    seen = see(seer(room), images_seen(), "ttt3r")
    network.begin(room, images_seen(), seen)
    assert distances(said(join(room, network)), said(room))["depth"] < 0.05
    sizes = []
    for norm in (part for part in network.modules() if hasattr(part, "gain")):
        norm.register_forward_hook(lambda *call: sizes.append(call[2][:, 1:].square().mean()))
    with torch.no_grad():
        network(images_seen(), seen, room.positions)
    assert len(sizes) > 10
    assert all(0.5 < float(size) < 1.5 for size in sizes)


def test_channels_for_depth_hardly_touch_the_poses():
    room = make_room(narrow_model())
    away = distances(said(join(room, random_network(room))), said(room))
    assert away.pop("depth") > 0.1
    assert 0 < max(away.values()) < 0.03


def test_training_goes_on_from_the_channels_of_joined_weights():
    room = make_room(narrow_model())
    whole = join(room, random_network(room))
    network = DepthNetwork(whole.config)
    network.take_from(whole)
    assert max(distances(said(join(whole, network)), said(whole)).values()) < 1e-4
    gains = [value for name, value in network.state_dict().items() if name.endswith("gain")]
    sizes = [norm.weight.abs().mean() for norm in network.modules() if hasattr(norm, "gain")]
    assert len(gains) == len(sizes) > 10
    assert torch.allclose(torch.stack(sizes), torch.ones(len(sizes)))  # as steps expect


def test_joined_network_is_taken_apart_again():
    narrow = narrow_model()
    whole = join(make_room(narrow), random_network(make_room(narrow)))
    old, depth = take_apart(whole)
    assert old.config == narrow.config
    away = distances(said(old), said(narrow))
    away.pop("depth")  # the old channels' head is gone
    assert max(away.values()) < 0.005
    again = join(make_room(old), depth)
    assert max(distances(said(again), said(whole)).values()) < 0.005


def test_poses_learn_without_the_channels_for_depth(tmp_path):
    room = make_room(narrow_model())
    first = join(room, random_network(room))
    path = tmp_path / "joined.safetensors"
    save_weights(path, first, replace(load_model("compact")[1], config=first.config))
    settings = replace(
        POSES_ALONE,
        model=first.config,
        curriculum=(Stage(1, (4,), 2, 24, 1.0, aspects=((1.5, 1),)),),
        total_steps=6,
        keep_rotations=True,
        average=0.5,
    )
    whole = train(settings, tmp_path / "whole", path, device="cpu")
    train(settings, tmp_path / "cut", path, device="cpu", stop_after=3)
    resumed = train(settings, tmp_path / "cut", tmp_path / "cut", device="cpu")
    away = distances(said(whole), said(first))
    assert away["translation"] > 0.05
    assert away["depth"] < 0.01
    assert max(distances(said(resumed), said(whole)).values()) == 0
    stored = take_apart(load_model(path)[0])[1].state_dict()  # in half precision
    for name, tensor in take_apart(whole)[1].state_dict().items():
        assert torch.allclose(tensor, stored[name], rtol=1e-4), name
    assert "poses alone" in export(tmp_path / "whole", tmp_path / "out.safetensors").notes


def test_depth_learns_alone_and_goes_on_after_an_interruption(tmp_path, narrow_path, monkeypatch):
    monkeypatch.setattr(depth_run, "_PICTURES_KEPT", 1)  # the oldest of the batches are dropped
    whole = train(SETTINGS, tmp_path / "whole", narrow_path, device="cpu")
    first = make_room(load_model(narrow_path)[0])
    assert depth_error(whole) < 0.9 * depth_error(first)
    train(SETTINGS, tmp_path / "cut", narrow_path, device="cpu", stop_after=40)
    resumed = train(SETTINGS, tmp_path / "cut", tmp_path / "cut", device="cpu")
    for name, found in whole.state_dict().items():
        assert torch.equal(found, resumed.get_parameter(name)), name
    old, depth = take_apart(whole)
    old_first, depth_first = take_apart(first)
    for name, expected in old_first.state_dict().items():
        if not name.startswith("downstream_head.proj"):
            assert torch.equal(old.get_parameter(name), expected), name
    for name, learnt in depth.named_parameters():
        assert not torch.equal(learnt, depth_first.get_parameter(name)), name
    with pytest.raises(ValueError, match="learns 'depth', expected 'poses'"):
        train(replace(SETTINGS, learns="poses"), tmp_path / "cut", tmp_path / "cut")


def test_run_that_learns_depth_is_exported_whole(tmp_path, narrow_path):
    whole = train(SETTINGS, tmp_path / "run", narrow_path, device="cpu", stop_after=3)
    info = export(tmp_path / "run", tmp_path / "out.safetensors")
    assert info.config == joined_config(SMALL)
    assert "depth alone" in info.notes
    assert info.segment_frames == load_model(narrow_path)[1].segment_frames
    found = load_model(tmp_path / "out.safetensors")[0]
    assert max(distances(said(found), said(whole)).values()) < 0.01  # half precision
    again = replace(SETTINGS, total_steps=1, lr=1e-9, matrix_lr=1e-9)
    kept = train(again, tmp_path / "again", tmp_path / "out.safetensors", device="cpu")
    assert max(distances(said(kept), said(found)).values()) < 1e-4


def test_depth_does_not_learn_alone_where_poses_read_all_channels(tmp_path):
    wide = widen(narrow_model(), 2)
    path = tmp_path / "wide.safetensors"
    save_weights(path, wide, replace(load_model("compact")[1], config=wide.config))
    with pytest.raises(ValueError, match="depth cannot learn alone"):
        train(replace(SETTINGS, model=wide.config), tmp_path / "run", path, device="cpu")
    with pytest.raises(ValueError, match="found none to resume from"):
        train(SETTINGS, tmp_path / "new", device="cpu")


def test_command_teaches_depth_or_poses_alone(tmp_path, capsys):
    def choose(*arguments: object):
        options = command._options([str(argument) for argument in (tmp_path, *arguments)])
        return command.choose_settings(options)

    config = replace(DEPTH_ALONE.model, enc_depth=3)
    path = tmp_path / "weights.safetensors"
    narrow = Model(config)
    for model in (narrow, make_room(narrow)):
        save_weights(path, model, replace(load_model("compact")[1], config=model.config))
        found = choose("--resume", path, "--depth-alone", "--device", "cpu")
        assert found == replace(DEPTH_ALONE, model=joined_config(config))
    poses = choose("--resume", path, "--device", "cpu", "--batch", 16)
    assert (poses.model, poses.learns) == (joined_config(config), "poses")
    assert poses.loss == POSES_ALONE.loss
    with pytest.raises(ValueError, match="has channels for depth"):
        choose("--resume", path, "--widen", 2)
    wide = widen(narrow, 2)
    save_weights(path, wide, replace(load_model("compact")[1], config=wide.config))
    with pytest.raises(ValueError, match="depth cannot learn alone"):
        choose("--resume", path, "--depth-alone", "--device", "cpu")
    for wrong in (("--depth-alone",), ("--resume", path, "--depth-alone", "--widen", 2)):
        with pytest.raises(SystemExit):
            choose(*wrong)
    assert "--depth-alone is for weights" in capsys.readouterr().err
