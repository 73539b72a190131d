"""Released-style checkpoints become safetensors; anything else is refused by name."""

import argparse
import collections
import contextlib
import hashlib
import io
import os
import pickle
import struct
import sys
import types
import typing
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ttt3r.checkpoint_import import import_checkpoint, infer_config
from ttt3r.config import RELEASED_224_LINEAR, RELEASED_512_DPT, TINY, ModelConfig
from ttt3r.model import Model
from ttt3r.pickle_data import RefusedPickle
from ttt3r.weights import load_model, weights_info

TINY_HEADS = {"enc_num_heads": 2, "dec_num_heads": 2, "state_dec_num_heads": 4, "image_size": 64}
RELEASED_HEADS = {"enc_num_heads": 16, "dec_num_heads": 12, "state_dec_num_heads": 16}
# The smallest widths that divide into the released numbers of heads.
NARROW = ModelConfig(
    enc_embed_dim=64,
    enc_depth=1,
    dec_embed_dim=192,
    dec_depth=4,
    state_size=6,
    local_mem_size=4,
    head_type="linear",
    image_size=224,
    mlp_ratio=1.0,
    **RELEASED_HEADS,
)


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: t.detach() for name, t in Model(config).state_dict().items()}


@contextlib.contextmanager
def fake_omegaconf():
    """Classes pickled under omegaconf's names, which exist only while a file is written."""
    names = {
        "omegaconf.dictconfig": ["DictConfig"],
        "omegaconf.listconfig": ["ListConfig"],
        "omegaconf.base": ["ContainerMetadata", "Metadata"],
        "omegaconf.nodes": ["AnyNode"],
    }
    modules = {"omegaconf": types.ModuleType("omegaconf")}
    for module_name, classes in names.items():
        modules[module_name] = types.ModuleType(module_name)
        for name in classes:
            cls = type(name, (), {"__module__": module_name})
            setattr(modules[module_name], name, cls)
    sys.modules.update(modules)
    try:
        yield modules
    finally:
        for name in modules:
            del sys.modules[name]


def omegaconf_args(modules) -> object:
    """As the pickle of a resolved config is: containers that refer to metadata and parents."""
    container = modules["omegaconf.dictconfig"].DictConfig()
    container._metadata = modules["omegaconf.base"].ContainerMetadata()
    container._metadata.__dict__.update(
        ref_type=typing.Any, object_type=dict, key_type=typing.Any, element_type=int
    )
    container._metadata.resolver_cache = collections.defaultdict(dict)
    node = modules["omegaconf.nodes"].AnyNode()
    node._parent, node._val = container, "Arch(enc_depth=24, eval_me=__import__('os'))"
    node._metadata = modules["omegaconf.base"].Metadata()
    items = modules["omegaconf.listconfig"].ListConfig()
    items._content, items._parent = [node], container
    container._content = {"model": node, "sizes": items}
    return container


def write_released(path, tensors, **extra):
    """A checkpoint as the training code writes it."""
    with fake_omegaconf() as modules:
        model = collections.OrderedDict(tensors)
        model._metadata = collections.OrderedDict({"": {"version": 1}})
        content = {"args": omegaconf_args(modules), "model": model, "epoch": 40, **extra}
        torch.save(content, path)
    return path


def write_archive(path, pickled: bytes, storages=(), compression=zipfile.ZIP_STORED, root="x/"):
    """A torch zip with a hand-written pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}data.pkl", pickled)
        archive.writestr(f"{root}byteorder", b"little")
        for key, data in storages:
            archive.writestr(f"{root}data/{key}", data)
    return path


def pickle_of_tensor(offset=0, shape=(2,), strides=(1,), claimed=2, key="0", kind="FloatStorage"):
    """The pickle of {"model": {"w": tensor}} for an archive with storage `key`."""

    class Storage:
        pass

    class Rebuilt:
        def __reduce__(self):
            arguments = (Storage(), offset, shape, strides, False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, Storage):
                return ("storage", getattr(torch, kind), key, "cpu", claimed)
            return None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"model": {"w": Rebuilt()}})
    return buffer.getvalue()


TWO_FLOATS = ("0", struct.pack("<2f", 1.0, 2.0))


# -- round trip -------------------------------------------------------------------------------


def test_import_checkpoint_keeps_every_bit_and_infers_the_configuration(tmp_path):
    tensors = random_tensors(NARROW)
    pth = write_released(tmp_path / "cut3r.pth", tensors, best_so_far=float("inf"))
    info = import_checkpoint(pth, tmp_path / "narrow.safetensors")
    assert info.config == NARROW
    assert info.source_sha256 == hashlib.sha256(pth.read_bytes()).hexdigest()
    assert (info.name, info.licence, info.source) == ("narrow", "CC BY-NC-SA 4.0", "cut3r.pth")
    assert (info.segment_frames, info.trained) == (100, True)
    with safe_open(tmp_path / "narrow.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)
    assert "omegaconf" not in sys.modules


def test_import_checkpoint_is_loadable_and_predicts_as_the_original(tmp_path):
    torch.manual_seed(3)
    original = Model(TINY).eval()
    pth = write_released(tmp_path / "tiny.pth", original.state_dict())
    out = tmp_path / "tiny.safetensors"
    stored = import_checkpoint(pth, out, **TINY_HEADS)
    model, info = load_model(out)
    assert info == stored == weights_info(out)
    images = torch.rand(1, 2, 3, 32, 48) * 2 - 1
    with torch.inference_mode():
        expected, found = original.run(images)[0], model.run(images)[0]
    assert torch.equal(found.pointmap_cam, expected.pointmap_cam)
    assert torch.equal(found.camera_pose, expected.camera_pose)


def test_import_checkpoint_strips_a_module_prefix(tmp_path):
    tensors = random_tensors(TINY)
    prefixed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    plain = write_released(tmp_path / "a.pth", tensors)
    wrapped = write_released(tmp_path / "b.pth", prefixed)
    first = import_checkpoint(plain, tmp_path / "a.safetensors", **TINY_HEADS)
    second = import_checkpoint(wrapped, tmp_path / "b.safetensors", **TINY_HEADS)
    assert first.sha256 == second.sha256


@pytest.mark.parametrize(
    "extra",
    [
        {"best_so_far": np.float64(0.25)},
        {"args": argparse.Namespace(model="x")},
        {"optimizer": {"state": {0: {"step": torch.tensor(3), "m": torch.ones(2).half()}}}},
        {"scaler": {"scale": 65536.0}},
    ],
)
def test_import_checkpoint_ignores_other_inert_entries(tmp_path, extra):
    pth = write_released(tmp_path / "a.pth", random_tensors(TINY), **extra)
    assert import_checkpoint(pth, tmp_path / "a.safetensors", **TINY_HEADS).config == TINY


def test_import_checkpoint_takes_views_that_stay_inside_their_storage(tmp_path):
    tensors = random_tensors(TINY)
    name = "decoder_embed.weight"
    turned = tensors[name].t().contiguous().t()
    pth = write_released(tmp_path / "a.pth", {**tensors, name: turned})
    import_checkpoint(pth, tmp_path / "a.safetensors", **TINY_HEADS)
    model, _ = load_model(tmp_path / "a.safetensors")
    assert torch.equal(model.decoder_embed.weight, tensors[name])


def test_import_checkpoint_says_that_a_file_is_not_the_published_one(tmp_path, caplog):
    pth = write_released(tmp_path / "a.pth", random_tensors(TINY))
    info = import_checkpoint(pth, tmp_path / "a.safetensors", **TINY_HEADS)
    assert "not match" in info.identity
    assert hashlib.sha256(pth.read_bytes()).hexdigest() in caplog.text


def test_import_checkpoint_records_what_the_caller_says(tmp_path):
    pth = write_released(tmp_path / "a.pth", random_tensors(TINY))
    info = import_checkpoint(
        pth,
        tmp_path / "a.safetensors",
        **TINY_HEADS,
        name="mine",
        licence="CC0",
        source="from a friend",
        segment_frames=7,
        notes="fine-tuned",
    )
    assert weights_info(tmp_path / "a.safetensors") == info
    assert (info.name, info.licence, info.source) == ("mine", "CC0", "from a friend")
    assert (info.segment_frames, info.notes) == (7, "fine-tuned")


# -- configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize("config", [RELEASED_512_DPT, RELEASED_224_LINEAR, NARROW])
def test_infer_config_finds_the_configuration_from_shapes(config):
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Model(config).state_dict().items()}
    assert infer_config(shapes) == config


def test_infer_config_asks_for_the_heads_that_shapes_do_not_tell():
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Model(TINY).state_dict().items()}
    assert infer_config(shapes, **TINY_HEADS) == TINY
    with pytest.raises(ValueError, match="pass enc_num_heads"):
        infer_config(shapes)


def test_infer_config_names_the_tensor_it_misses():
    with pytest.raises(ValueError, match=r"'patch_embed\.proj\.weight' is missing"):
        infer_config({"layer.weight": (3, 3)})


# -- tensors that do not fit ------------------------------------------------------------------


def test_import_checkpoint_names_missing_extra_and_misshapen_tensors(tmp_path):
    tensors = random_tensors(TINY)
    del tensors["enc_norm.bias"]
    tensors["surprise.weight"] = torch.ones(2)
    tensors["dec_norm.weight"] = torch.ones(5)
    pth = write_released(tmp_path / "a.pth", tensors)
    with pytest.raises(ValueError, match="do not fit") as caught:
        import_checkpoint(pth, tmp_path / "a.safetensors", **TINY_HEADS)
    for part in ("enc_norm.bias", "surprise.weight", "dec_norm.weight", "(5,)"):
        assert part in str(caught.value)
    assert list(tmp_path.glob("*.safetensors")) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_import_checkpoint_refuses_other_dtypes(tmp_path, dtype):
    tensors = random_tensors(TINY)
    tensors["enc_norm.bias"] = tensors["enc_norm.bias"].to(dtype)
    pth = write_released(tmp_path / "a.pth", tensors)
    with pytest.raises(ValueError, match=rf"'enc_norm\.bias' is {str(dtype)[6:]}"):
        import_checkpoint(pth, tmp_path / "a.safetensors", **TINY_HEADS)


@pytest.mark.parametrize("value", [3, "text", [torch.ones(1)], {"inner": torch.ones(1)}])
def test_import_checkpoint_refuses_anything_but_tensors_in_model(tmp_path, value):
    pth = write_released(tmp_path / "a.pth", {**random_tensors(TINY), "odd": value})
    with pytest.raises(ValueError, match="as 'odd'; expected only tensors"):
        import_checkpoint(pth, tmp_path / "a.safetensors", **TINY_HEADS)


def test_import_checkpoint_refuses_a_bare_state_dict(tmp_path):
    torch.save(random_tensors(TINY), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="expected a dict with a dict 'model'"):
        import_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors", **TINY_HEADS)


def dpt_like(alias: torch.Tensor) -> dict[str, torch.Tensor]:
    prefix = "downstream_head.dpt_self.scratch"
    return {
        f"{prefix}.layer1_rn.weight": torch.arange(4.0),
        f"{prefix}.layer_rn.0.weight": alias,
    }


def test_import_checkpoint_refuses_an_alias_that_differs(tmp_path):
    pth = write_released(tmp_path / "a.pth", dpt_like(torch.zeros(4)))
    with pytest.raises(ValueError, match=r"layer_rn\.0\.weight' should equal .*layer1_rn"):
        import_checkpoint(pth, tmp_path / "a.safetensors")


@pytest.mark.parametrize("shared", [True, False])
def test_import_checkpoint_ignores_an_alias_that_is_equal(tmp_path, shared):
    tensors = dpt_like(torch.arange(4.0))
    if shared:
        first, second = tensors
        tensors[second] = tensors[first]
    pth = write_released(tmp_path / "a.pth", tensors)
    with pytest.raises(ValueError, match=r"patch_embed\.proj\.weight' is missing"):
        import_checkpoint(pth, tmp_path / "a.safetensors")


# -- files that are refused -------------------------------------------------------------------


class Payload:
    def __init__(self, target, *arguments):
        self.target, self.arguments = target, arguments

    def __reduce__(self):
        return self.target, self.arguments


@pytest.mark.parametrize("where", ["args", "epoch", "model"])
def test_import_checkpoint_runs_nothing_of_a_hostile_file(tmp_path, where):
    canary = tmp_path / "ran"
    content = {"args": None, "model": {}, "epoch": 1}
    content[where] = Payload(os.system, f"touch {canary}")
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(RefusedPickle, match=r"'(posix|nt)\.system'"):
        import_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors")
    assert not canary.exists()
    assert list(tmp_path.glob("*.safetensors")) == []


def test_import_checkpoint_gives_stubs_no_side_effects(tmp_path):
    """An installed omegaconf is not called either, with whatever arguments and state."""
    calls = []
    with fake_omegaconf() as modules:
        cls = modules["omegaconf.dictconfig"].DictConfig
        cls.__init__ = lambda self, *arguments: calls.append(arguments)
        cls.__setstate__ = lambda self, state: calls.append(state)

        class Reduced:
            def __reduce__(self):
                return cls, ("side effect",), {"state": 1}

        content = {"args": Reduced(), "model": random_tensors(TINY)}
        torch.save(content, tmp_path / "a.pth")
        import_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors", **TINY_HEADS)
    assert calls == []


def test_import_checkpoint_refuses_a_legacy_file(tmp_path):
    canary = tmp_path / "ran"
    content = {"model": {}, "args": Payload(os.system, f"touch {canary}")}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="legacy"):
        import_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors")
    assert not canary.exists()


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9, 0.999])
def test_import_checkpoint_refuses_a_truncated_file(tmp_path, keep):
    pth = write_released(tmp_path / "a.pth", random_tensors(TINY))
    data = pth.read_bytes()
    pth.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match="truncated"):
        import_checkpoint(pth, tmp_path / "a.safetensors", **TINY_HEADS)


def test_import_checkpoint_names_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*none\.pth"):
        import_checkpoint(tmp_path / "none.pth", tmp_path / "a.safetensors")


def test_import_checkpoint_refuses_another_name_for_its_output(tmp_path):
    pth = write_released(tmp_path / "a.pth", random_tensors(TINY))
    with pytest.raises(ValueError, match=r"not a \.safetensors file"):
        import_checkpoint(pth, tmp_path / "a.bin", **TINY_HEADS)


@pytest.mark.parametrize(
    "case",
    [
        {"shape": (3,)},
        {"offset": 1},
        {"strides": (2,)},
        {"shape": (1000000,), "strides": (0,)},
        {"shape": (-2,)},
        {"offset": -1},
        {"shape": (2, 1)},
        {"shape": [2]},
        {"shape": (2**62,)},
    ],
)
def test_import_checkpoint_refuses_tensors_outside_their_storage(tmp_path, case):
    pth = write_archive(tmp_path / "a.pth", pickle_of_tensor(**case), [TWO_FLOATS])
    with pytest.raises(RefusedPickle, match="a tensor"):
        import_checkpoint(pth, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "case", [{"claimed": 3}, {"claimed": 1}, {"claimed": -2}, {"kind": "DoubleStorage"}]
)
def test_import_checkpoint_refuses_storages_of_another_size(tmp_path, case):
    pth = write_archive(tmp_path / "a.pth", pickle_of_tensor(**case), [TWO_FLOATS])
    with pytest.raises(RefusedPickle, match=r"claims|persistent id"):
        import_checkpoint(pth, tmp_path / "a.safetensors")


@pytest.mark.parametrize("key", ["1", "../data.pkl", "/etc/passwd", "../../../etc/passwd", ""])
def test_import_checkpoint_refuses_storages_that_are_not_in_the_archive(tmp_path, key):
    pth = write_archive(tmp_path / "a.pth", pickle_of_tensor(key=key), [TWO_FLOATS])
    with pytest.raises(RefusedPickle, match="not in the archive"):
        import_checkpoint(pth, tmp_path / "a.safetensors")


def test_import_checkpoint_refuses_persistent_ids_of_another_kind(tmp_path):
    for persistent_id in (b"X\x01\x00\x00\x000", b"N", b"(X\x07\x00\x00\x00storageNNNNt"):
        pth = write_archive(tmp_path / "a.pth", b"\x80\x02" + persistent_id + b"Q.")
        with pytest.raises(RefusedPickle, match="persistent id"):
            import_checkpoint(pth, tmp_path / "a.safetensors")


def test_import_checkpoint_refuses_compressed_entries(tmp_path):
    bomb = ("0", bytes(2**24))
    pth = write_archive(tmp_path / "a.pth", b"\x80\x02}.", [bomb], zipfile.ZIP_DEFLATED)
    assert pth.stat().st_size < 2**16
    with pytest.raises(ValueError, match="compressed"):
        import_checkpoint(pth, tmp_path / "a.safetensors")


def test_import_checkpoint_refuses_entries_that_claim_more_than_the_file_holds(tmp_path):
    pth = write_archive(tmp_path / "a.pth", pickle_of_tensor(), [TWO_FLOATS])
    data = bytearray(pth.read_bytes())
    record = data.rindex(b"PK\x01\x02")  # directory record of data/0: sizes at 20 and 24
    struct.pack_into("<II", data, record + 20, 2**30, 2**30)
    pth.write_bytes(data)
    with pytest.raises(ValueError, match="runs into"):
        import_checkpoint(pth, tmp_path / "a.safetensors")


def test_import_checkpoint_refuses_entries_that_overlap(tmp_path):
    pth = write_archive(tmp_path / "a.pth", pickle_of_tensor(), [TWO_FLOATS])
    data = bytearray(pth.read_bytes())
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 4)
    third = data.index(b"PK\x01\x02", second + 4)
    data[third + 42 : third + 46] = data[second + 42 : second + 46]  # offset of the header
    pth.write_bytes(data)
    with pytest.raises(ValueError, match="runs into"):
        import_checkpoint(pth, tmp_path / "a.safetensors")


@pytest.mark.parametrize("root", ["", "/x/", "../x/", "x/../y/", "x\\y/", "x//"])
def test_import_checkpoint_refuses_names_that_are_not_plain(tmp_path, root):
    pth = write_archive(tmp_path / "a.pth", b"\x80\x02}.", [TWO_FLOATS], root=root)
    with pytest.raises(ValueError, match=r"plain relative path|not one of torch"):
        import_checkpoint(pth, tmp_path / "a.safetensors")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_import_checkpoint_refuses_a_name_twice(tmp_path):
    pth = write_archive(tmp_path / "a.pth", pickle_of_tensor(), [TWO_FLOATS, TWO_FLOATS])
    with pytest.raises(ValueError, match="no name twice"):
        import_checkpoint(pth, tmp_path / "a.safetensors")


def test_import_checkpoint_refuses_big_endian_tensors(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/byteorder", b"big")
    with pytest.raises(ValueError, match="little-endian"):
        import_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors")
