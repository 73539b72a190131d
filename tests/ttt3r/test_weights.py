"""Weights by name or path: saved, described, checked, loaded."""

import dataclasses
import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from ttt3r.config import TINY
from ttt3r.model import Model
from ttt3r.weights import (
    WeightsInfo,
    WeightsMissing,
    load_model,
    save_weights,
    verify_weights,
    weights_info,
    worth,
)

INFO = WeightsInfo(
    name="tiny",
    config=TINY,
    sha256="",
    licence="CC0",
    source="made here",
    segment_frames=24,
    trained=True,
    notes="a note with \"quotes\" and 'ünïcode'",
)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(5)
    return Model(TINY).eval()


def predict(model: Model):
    torch.manual_seed(1)
    images = torch.rand(1, 3, 3, 32, 48) * 2 - 1
    with torch.inference_mode():
        return model.run(images)[0]


def test_save_weights_and_load_model_are_inverse(tmp_path, model):
    stored = save_weights(tmp_path / "deep" / "tiny.safetensors", model, INFO)
    loaded, info = load_model(tmp_path / "deep" / "tiny.safetensors")
    assert info == stored == dataclasses.replace(INFO, sha256=stored.sha256)
    assert torch.equal(predict(loaded).pointmap_cam, predict(model).pointmap_cam)
    assert not loaded.training
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["tiny.safetensors"]


def test_weights_are_as_readable_as_any_file_that_is_made(tmp_path, model):
    save_weights(tmp_path / "a.safetensors", model, INFO)
    (tmp_path / "other").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "other"]


def test_load_model_result_does_not_depend_on_the_length_of_the_notes(tmp_path, model):
    found = []
    for length in (0, 1, 13, 1000):
        info = dataclasses.replace(INFO, notes="x" * length)
        save_weights(tmp_path / "tiny.safetensors", model, info)
        found.append(predict(load_model(tmp_path / "tiny.safetensors")[0]).pointmap_cam)
    assert all(torch.equal(other, found[0]) for other in found)


def test_load_model_survives_the_replacement_of_its_file(tmp_path, model):
    path = tmp_path / "tiny.safetensors"
    save_weights(path, model, INFO)
    loaded, _ = load_model(path)
    path.write_bytes(b"")
    assert torch.equal(predict(loaded).camera_pose, predict(model).camera_pose)


def test_save_weights_takes_a_state_dict_and_stores_aliases_once(tmp_path):
    kept, alias = "h.dpt_self.scratch.layer2_rn.weight", "h.dpt_self.scratch.layer_rn.1.weight"
    weight = torch.ones(2, 2)
    both = save_weights(tmp_path / "a.safetensors", {kept: weight, alias: weight}, INFO)
    only_alias = save_weights(tmp_path / "b.safetensors", {alias: weight}, INFO)
    assert both.sha256 == only_alias.sha256
    assert verify_weights(tmp_path / "a.safetensors") == both


def test_sha256_names_the_network_and_nothing_else(tmp_path, model):
    def digest(tensors, **changes) -> str:
        info = dataclasses.replace(INFO, **changes)
        return save_weights(tmp_path / "x.safetensors", tensors, info).sha256

    tensors = dict(model.state_dict())
    first = digest(tensors)
    backwards = dict(reversed(tensors.items()))
    assert digest(backwards, name="other", licence="MIT", notes="", segment_frames=9) == first
    assert digest(tensors, config=dataclasses.replace(TINY, state_dec_num_heads=2)) != first
    tensors["pose_token"] = tensors["pose_token"].clone()
    tensors["pose_token"][0, 0, 0] += 1e-6
    assert digest(tensors) != first


def test_load_model_converts_to_the_dtype_asked_for(tmp_path, model):
    save_weights(tmp_path / "tiny.safetensors", model, INFO)
    loaded, info = load_model(tmp_path / "tiny.safetensors", dtype=torch.bfloat16)
    weight = "dec_blocks.0.mlp.fc1.weight"
    assert torch.equal(loaded.get_parameter(weight), model.get_parameter(weight).bfloat16())
    # What the specification wants in float32 (norms, tokens, last layers) is not rounded.
    for name in ("dec_norm.weight", "pose_token", "downstream_head.pose_head.mlp.fc2.weight"):
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    assert loaded.dtype == torch.bfloat16
    assert info.sha256 == weights_info(tmp_path / "tiny.safetensors").sha256


def test_load_model_reads_half_precision_files(tmp_path, model):
    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save_weights(tmp_path / "half.safetensors", halves, INFO)
    loaded, _ = load_model(tmp_path / "half.safetensors")
    assert torch.equal(loaded.enc_norm.weight, model.enc_norm.weight.half().float())
    assert loaded.pose_token.dtype == torch.float32


@pytest.mark.gpu
def test_load_model_puts_every_tensor_on_the_device(tmp_path, model):
    save_weights(tmp_path / "tiny.safetensors", model, INFO)
    loaded, _ = load_model(tmp_path / "tiny.safetensors", device="cuda", dtype=torch.bfloat16)
    assert {p.device.type for p in loaded.parameters()} == {"cuda"}


def test_load_model_names_tensors_that_do_not_fit(tmp_path, model):
    tensors = dict(model.state_dict())
    del tensors["enc_norm.bias"]
    tensors["surprise"] = torch.ones(1)
    tensors["pose_token"] = torch.ones(1, 1, 7)
    save_weights(tmp_path / "tiny.safetensors", tensors, INFO)
    with pytest.raises(ValueError, match="do not fit") as caught:
        load_model(tmp_path / "tiny.safetensors")
    for part in ("enc_norm.bias", "surprise", "pose_token", "(1, 1, 7)"):
        assert part in str(caught.value)


def test_load_model_tells_how_to_import_a_pth(tmp_path):
    (tmp_path / "cut3r.pth").write_bytes(b"PK")
    with pytest.raises(ValueError, match="ttt3r weights import") as caught:
        load_model(tmp_path / "cut3r.pth")
    assert "\n" not in str(caught.value)


def test_load_model_names_a_missing_file_and_an_unknown_name(tmp_path):
    with pytest.raises(WeightsMissing, match=r"no weights file .*none\.safetensors"):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(WeightsMissing, match=r"no weights named 'compat'.*untrained"):
        load_model("compat", cache_dir=tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 9, 500, -1])
def test_load_model_refuses_a_truncated_file(tmp_path, model, keep):
    path = tmp_path / "tiny.safetensors"
    save_weights(path, model, INFO)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"truncated|not a safetensors file"):
        load_model(path)


def test_load_model_refuses_a_file_without_our_record(tmp_path, model):
    save_file(dict(model.state_dict()), tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="does not say which network"):
        load_model(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("licence"),
        lambda record: record.update(surprise=1),
        lambda record: record["config"].update(depth_of_the_future=3),
        lambda record: record["config"].update(enc_num_heads=5),
        lambda record: record.update(config=None),
    ],
)
def test_weights_info_refuses_records_it_does_not_understand(tmp_path, model, change):
    record = {**INFO.to_json(), "sha256": "0"}
    change(record)
    metadata = {"ttt3r": json.dumps(record)}
    save_file(dict(model.state_dict()), tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"x\.safetensors: .*(expected|whole multiple)"):
        weights_info(tmp_path / "x.safetensors")


@pytest.mark.parametrize("header", [b"[]", b'"x"', b"{", b'{"__metadata__": 3}', b"[" * 100_000])
def test_weights_info_refuses_headers_that_are_not_safetensors(tmp_path, header):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="not a safetensors file"):
        weights_info(tmp_path / "x.safetensors")


def test_verify_weights_finds_a_flipped_bit(tmp_path, model):
    path = tmp_path / "tiny.safetensors"
    assert verify_weights_after(path, model) == weights_info(path)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged or was edited"):
        verify_weights(path)


def verify_weights_after(path, model) -> WeightsInfo:
    save_weights(path, model, INFO)
    return verify_weights(path)


def test_of_bundled_weights_is_said_what_they_are_worth_and_of_others_what_is_noted():
    bundled = weights_info("compact")
    assert "working example" in worth(bundled)
    assert "once their scale is fitted" in worth(bundled)  # metres are a matter of their own
    trained_further = dataclasses.replace(bundled, sha256="0" * 64)
    assert worth(trained_further) == trained_further.notes


def test_untrained_weights_are_the_same_each_time_and_leave_the_generator_alone():
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    first, info = load_model("untrained")
    second, again = load_model("untrained")
    assert torch.equal(torch.rand(3), expected)
    assert info == again == weights_info("untrained")
    assert not info.trained
    assert torch.equal(predict_any(first), predict_any(second))


def predict_any(model: Model) -> torch.Tensor:
    size = model.config.patch_size
    with torch.inference_mode():
        return model.run(torch.zeros(1, 1, 3, 2 * size, 3 * size))[0].pointmap_cam


def test_untrained_digest_is_that_of_the_same_tensors_in_a_file(tmp_path):
    model, info = load_model("untrained")
    assert save_weights(tmp_path / "u.safetensors", model, info).sha256 == info.sha256


def test_load_model_does_not_fall_back_where_bundled_weights_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("ttt3r.weights.BUNDLED_DIR", tmp_path)
    with pytest.raises(WeightsMissing, match=r"'compact' are not bundled.*'untrained'"):
        load_model("compact", cache_dir=tmp_path)
