import numpy as np
import pytest
import torch

from ttt3r.layers import CrossAttention, rotary_tables, rotate
from ttt3r.memory import PoseMemory


@pytest.fixture(scope="module")
def units(golden):
    arrays = np.load(golden / "units.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays.files if "rope" in name}


def test_rotate_agrees_with_the_reference(units):
    tables = rotary_tables(units["rope_pos"][0], 12)
    found = rotate(units["rope_in"].transpose(1, 2), tables).transpose(1, 2)
    torch.testing.assert_close(found, units["rope_out_f32"])


def test_rotate_through_fp16_agrees_with_the_reference_to_the_bit(units):
    tables = rotary_tables(units["rope_pos"][0], 12)
    found = rotate(units["rope_in"].transpose(1, 2), tables, through_fp16=True)
    assert torch.equal(found.transpose(1, 2), units["rope_out_f16path"])


def test_rotate_turns_rows_in_the_first_half_and_columns_in_the_second():
    tables = rotary_tables(torch.tensor([[0, 0], [1, 0], [0, -1]]), 4)
    found = rotate(torch.tensor([1.0, 0, 1, 0]).expand(1, 3, 1, 4), tables)[0, :, 0]
    c, s = np.cos(1.0), np.sin(1.0)
    expected = torch.tensor([[1.0, 0, 1, 0], [c, s, 1, 0], [1, 0, c, -s]], dtype=torch.float32)
    torch.testing.assert_close(found, expected)


def test_rotary_tables_refuse_a_head_that_does_not_split_in_four():
    with pytest.raises(ValueError, match="head_dim is 6"):
        rotary_tables(torch.zeros(1, 2), 6)


def test_gate_logits_are_the_mean_of_the_attention_logits():
    torch.manual_seed(0)
    attention = CrossAttention(16, 2)
    x, y = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    x_tables = rotary_tables(torch.randint(9, (5, 2)), 8)
    y_tables = rotary_tables(torch.randint(9, (7, 2)), 8)
    _, found = attention(x, y, x_tables, y_tables, gate=True)
    q = rotate(attention.projq(x).unflatten(-1, (2, 8)), x_tables)
    k = rotate(attention.projk(y).unflatten(-1, (2, 8)), y_tables)
    logits = torch.einsum("bshd,bnhd->bhsn", q, k) / 8**0.5
    torch.testing.assert_close(found, logits.mean(dim=(1, 3)))


def test_pose_memory_leaves_out_only_work_that_cannot_matter(model):
    """Reading and writing equal the full decoder block, attention over one token included."""
    memory: PoseMemory = model.pose_retriever
    query, pose = torch.randn(2, 1, 32), torch.randn(2, 1, 32)
    slots = torch.randn(2, 8, 64)

    def full(block, x, y):
        x = x + block.attn(block.norm1(x), None)
        x = x + block.cross_attn.forward_unrotated(block.norm2(x), block.norm_y(y))
        return x + block.mlp(block.norm3(x))

    written = slots
    for block in memory.write_blocks:
        written = full(block, written, torch.cat((query, pose), dim=-1))
    torch.testing.assert_close(memory.write(slots, query, pose), written)
    read = torch.cat((query, memory.masked_token.expand(2, 1, 32)), dim=-1)
    for block in memory.read_blocks:
        read = full(block, read, slots)
    torch.testing.assert_close(memory.read(query, slots), read[..., 32:])
