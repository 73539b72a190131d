"""Decoder steps recorded as CUDA graphs, and what may be in them."""

import logging

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ttt3r.config import TINY
from ttt3r.model import Model
from ttt3r.recording import Recordings
from ttt3r.state import UPDATE_RULES
from ttt3r.stream import Stream


class DevicesSeen(TorchDispatchMode):
    """The devices of all tensors that operators take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        self.seen |= {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
        return result


@pytest.mark.parametrize("rule", sorted(UPDATE_RULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_reads_no_value_and_touches_nothing_off_its_device(rule, dtype):
    """On the meta device there is no value to read: what runs there can be recorded."""
    lanes, patches = 2, 12
    with torch.device("meta"), torch.inference_mode():
        model = Model(TINY).set_precision(dtype)
        start = model.initial_state(lanes)
        flags = torch.ones(lanes, dtype=torch.bool)
        width = TINY.dec_embed_dim
        tensors = (torch.empty(lanes, 1, width), torch.empty(lanes, patches, width))
        step = model._advance((3, 4), lanes, rule, trace=False)
        with DevicesSeen() as devices:
            step(*tensors, start.tokens, start.pose_memory, flags, flags)
    assert devices.seen == {"meta"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="recordings can be made here")
def test_where_nothing_can_be_recorded_the_function_itself_is_called(caplog):
    recordings, calls = Recordings("steps"), []

    def double(x, side=None):
        calls.append(side)
        return (2 * x,)

    with caplog.at_level(logging.WARNING, logger="ttt3r"):
        for value in (1.0, 2.0):
            (found,) = recordings.call("key", double, [torch.full((3,), value)])
            assert torch.equal(found, torch.full((3,), 2 * value))
    assert len(calls) == 2
    assert len(caplog.messages) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_steps_give_what_steps_give(dtype):
    torch.manual_seed(0)
    model = Model(TINY).eval().to("cuda").set_precision(dtype)
    images = np.random.default_rng(0).integers(0, 255, (2, 9, 48, 64, 3), np.uint8)
    reset, update = np.zeros((2, 9), bool), np.ones((2, 9), bool)
    reset[0, 3], update[1, 5] = True, False
    found = Stream(model, 2).feed(images, update, reset)
    assert model._recordings._kept, "nothing was recorded"
    model.records_steps = False
    plain = Stream(model, 2).feed(images, update, reset)
    for name in ("camera_pose", "pointmap_cam", "confidence", "rate"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name), rtol=1e-3, atol=1e-4)
