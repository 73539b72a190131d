import numpy as np
import pytest
import torch

from ttt3r.state import Proposal, State, blend, find_rule


@pytest.fixture
def state():
    torch.manual_seed(0)
    return State(torch.randn(3, 4, 8), torch.randn(3, 2, 16), torch.tensor([True, False, False]))


def assert_same(found, expected):
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.pose_memory, expected.pose_memory)
    assert torch.equal(found.first, expected.first)


def test_state_survives_its_arrays_exactly(state, arrays_of):
    assert_same(State.from_arrays(arrays_of(state)), state)


def test_state_without_first_flags_continues_its_streams(state, arrays_of):
    arrays = arrays_of(state)
    del arrays["first"]
    assert State.from_arrays(arrays).first.tolist() == [False, False, False]


def test_state_and_its_arrays_share_no_memory(state, arrays_of):
    tokens = state.tokens.clone()
    arrays = arrays_of(state)
    restored = State.from_arrays(arrays)
    arrays["tokens"][:] = 0
    assert torch.equal(restored.tokens, tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, r"\['tokens'\] not found"),
        ({"pose_memory": np.zeros((2, 2, 16))}, "the same L lanes"),
        ({"tokens": np.zeros((4, 8))}, r"tokens \(4, 8\)"),
    ],
)
def test_from_arrays_refuses_what_is_no_state(state, arrays_of, change, message):
    arrays = {n: a for n, a in {**arrays_of(state), **change}.items() if a is not None}
    with pytest.raises(ValueError, match=message):
        State.from_arrays(arrays)


def test_blend_is_exact_at_its_ends_and_linear_between():
    old, new = torch.full((1, 3, 2), 0.1), torch.full((1, 3, 2), 0.7)
    found = blend(old, new, torch.tensor([[0.0, 1.0, 0.25]]))
    assert torch.equal(found[0, 0], old[0, 0])
    assert torch.equal(found[0, 1], new[0, 1])
    torch.testing.assert_close(found[0, 2], torch.tensor([0.25, 0.25]))


def test_ttt3r_rate_is_the_sigmoid_of_the_gate():
    logits = torch.tensor([[0.0, np.log(3.0)]], dtype=torch.float32)
    proposal = Proposal(torch.zeros(1, 2, 4), torch.ones(1, 2, 4), logits, torch.tensor([False]))
    torch.testing.assert_close(find_rule("ttt3r").rate(proposal), torch.tensor([[0.5, 0.75]]))


def test_unknown_rule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'nope'; known: cut3r, ttt3r"):
        find_rule("nope")
