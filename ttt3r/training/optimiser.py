"""The optimiser: Muon for the matrices of the blocks, AdamW for everything else.

Muon (Jordan et al. 2024) replaces a matrix' momentum by the nearest orthogonal matrix. Small
transformers then need about half the steps; it matters most where a skill has to emerge.
Matrices of one shape are orthogonalised as one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ttt3r.training.parallel import share_out

# Quintic Newton-Schulz iteration of Jordan et al.: maps singular values into about 0.7 .. 1.2.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """About the nearest orthogonal matrix to each of [K, rows, columns].

    In bfloat16 on a GPU; without such products a CPU takes fifteen times as long as in float32.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    dtype = torch.bfloat16 if matrices.is_cuda else torch.float32
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for 2-D weights; fused q, k, v weights count as three."""

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "pieces": 1}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        # One kernel for many matrices (`_foreach`): on a GPU launches are what a step costs.
        shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            for p in moved:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            moments = [self.state[p]["momentum"] for p in moved]
            gradients = [p.grad for p in moved]
            torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
            directions = torch._foreach_lerp(gradients, moments, group["momentum"])
            torch._foreach_mul_(moved, 1 - group["lr"] * group["weight_decay"])
            for p, direction in zip(moved, directions, strict=True):
                pieces = p.chunk(group["pieces"]), direction.chunk(group["pieces"])
                for part, update in zip(*pieces, strict=True):
                    shapes[part.shape[0], part.shape[1]].append((part, update))
        for (rows, columns), entries in shapes.items():
            parts, updates = zip(*entries, strict=True)
            turned = share_out(orthogonalise, torch.stack(updates))
            scale = max(1.0, rows / columns) ** 0.5
            torch._foreach_sub_(parts, turned.unbind(), alpha=self.param_groups[0]["lr"] * scale)


def build_optimisers(
    model: nn.Module, *, lr: float, matrix_lr: float, weight_decay: float
) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for matrices inside blocks, AdamW for embeddings, last layers, norms and biases."""
    whole: list[Tensor] = []
    fused: list[Tensor] = []
    others: list[Tensor] = []
    for name, p in model.named_parameters():
        inside = "blocks" in name or "final_transform" in name
        if p.ndim == 2 and inside:
            (fused if ".qkv." in name else whole).append(p)
        else:
            others.append(p)
    groups = [{"params": whole, "pieces": 1}, {"params": fused, "pieces": 3}]
    return (
        Muon(groups, lr=matrix_lr, weight_decay=weight_decay),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay),
    )
