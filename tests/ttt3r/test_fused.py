"""Kernels of our own against the arithmetic that they replace; on a GPU only."""

import pytest
import torch

from ttt3r.fused import KERNELS
from ttt3r.layers import LayerNorm, rotary_tables, rotate
from ttt3r.synthetic.dice import Dice

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("through_fp16", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [(16, 64), (5, 24)])
def test_rotation_is_that_of_torch(heads, head_dim, through_fp16):
    torch.manual_seed(0)
    projected = torch.randn(3, 11, 3 * heads, head_dim, device="cuda").bfloat16()
    x = projected[:, :, : 2 * heads]  # as attention takes it: part of a projection
    positions = torch.randint(-1, 40, (11, 2), device="cuda")
    tables = rotary_tables(positions, head_dim)
    with torch.inference_mode():
        found = rotate(x, tables, through_fp16=through_fp16)
    assert KERNELS.are_on(x.device), "the kernel was not built"
    with torch.enable_grad():
        expected = rotate(x, tables, through_fp16=through_fp16)
    # Fused multiply-adds round once less: at most a step of bfloat16.
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("width", [96, 768, 1024])
def test_norm_is_that_of_torch(width):
    torch.manual_seed(0)
    norm, layer = LayerNorm(width).cuda(), torch.nn.Linear(width, 8).cuda().bfloat16()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = 3 * torch.randn(2, 37, width, device="cuda") + 5
    with torch.inference_mode():
        found = norm.rounded_for(layer, x)
    assert KERNELS.are_on(x.device), "the kernel was not built"
    torch.testing.assert_close(found, norm(x).bfloat16(), rtol=2**-7, atol=1e-3)


def test_dice_fall_the_same_on_both_kinds_of_device():
    seeds = [0, 5, 2**31 + 7, 10**12]
    index = torch.randint(-(2**40), 2**40, (4, 3, 1001))
    for places in (index, index[:1], index[:, 0]):
        expected = Dice(seeds).unit("height", places)
        found = Dice(seeds, "cuda").unit("height", places.cuda())
        assert torch.equal(found.cpu(), expected)
