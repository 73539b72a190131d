"""What a stream remembers, and the rules that decide how fast it changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """What the model remembers of the frames so far, for L independent lanes (streams).

    A value: each step returns a new one, so it can be kept, compared, stored and resumed.
    """

    tokens: Tensor  # [L, S, D] float32, scene tokens
    pose_memory: Tensor  # [L, M, 2D] float32, pairs read by pose queries
    first: Tensor  # [L] bool, on the CPU: the next frame starts a stream

    @property
    def lanes(self) -> int:
        """Number of independent streams."""
        return self.tokens.shape[0]

    def detach(self) -> State:
        """The same values without history: where training cuts a long sequence."""
        return State(self.tokens.detach(), self.pose_memory.detach(), self.first)

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, np.ndarray], device: torch.device | str = "cpu"
    ) -> State:
        """The state whose `tokens`, `pose_memory` and `first` were stored; they are copied.

        Without `first`, every lane is taken to continue: the arrays were stored after a frame.

        Raises:
            ValueError: arrays are missing, or not of the same lanes.
        """
        missing = {"tokens", "pose_memory"} - arrays.keys()
        if missing:
            raise ValueError(
                f"a state needs the arrays tokens and pose_memory; {sorted(missing)} not found "
                f"among {sorted(arrays)}"
            )
        tokens, memory = (
            torch.as_tensor(np.array(arrays[name]), dtype=torch.float32, device=device)
            for name in ("tokens", "pose_memory")
        )
        first = np.array(arrays.get("first", np.zeros(len(tokens), bool)), dtype=bool)
        if tokens.ndim != 3 or memory.ndim != 3 or not len(tokens) == len(memory) == len(first):
            raise ValueError(
                f"tokens {tuple(tokens.shape)}, pose_memory {tuple(memory.shape)} and first "
                f"{first.shape} are no [L, S, D], [L, M, 2D] and [L] of the same L lanes"
            )
        return cls(tokens, memory, torch.from_numpy(first))


@dataclass(frozen=True)
class Proposal:
    """What an update rule may look at when a frame proposes new scene tokens."""

    tokens: Tensor  # [L, S, D] scene tokens before the frame
    candidate: Tensor  # [L, S, D] scene tokens that the decoder proposes
    gate_logits: Tensor | None  # [L, S] mean state-to-image attention logit; see `uses_gate`
    first: Tensor  # [L] bool: the frame starts a stream


RateFunction = Callable[[Proposal], Tensor]


@dataclass(frozen=True)
class UpdateRule:
    """How far each scene token moves towards its candidate."""

    rate: RateFunction  # -> [L, S] in [0, 1]
    uses_gate: bool  # whether gate_logits must be computed


UPDATE_RULES: dict[str, UpdateRule] = {}


def update_rule(name: str, *, uses_gate: bool = False) -> Callable[[RateFunction], RateFunction]:
    """Register a rate function as a rule that callers choose by `name`."""

    def register(function: RateFunction) -> RateFunction:
        UPDATE_RULES[name] = UpdateRule(function, uses_gate)
        return function

    return register


@update_rule("cut3r")
def _full_update(proposal: Proposal) -> Tensor:
    """CUT3R: the candidate replaces the state."""
    return torch.ones_like(proposal.tokens[..., 0])


@update_rule("ttt3r", uses_gate=True)
def _attention_gate(proposal: Proposal) -> Tensor:
    """TTT3R: each token learns as fast as it attends to the image (section 6.6)."""
    assert proposal.gate_logits is not None
    return torch.sigmoid(proposal.gate_logits.float())


def find_rule(name: str) -> UpdateRule:
    """The rule of that name; ValueError lists the known ones."""
    if name not in UPDATE_RULES:
        raise ValueError(f"unknown update rule {name!r}; known: {', '.join(sorted(UPDATE_RULES))}")
    return UPDATE_RULES[name]


def blend(state: Tensor, candidate: Tensor, rate: Tensor) -> Tensor:
    """Move `state` [L, S, D] towards `candidate` by `rate` [L, S]; exact at 0 and at 1."""
    return torch.lerp(state.float(), candidate.float(), rate.float()[..., None])
