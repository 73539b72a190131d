"""Initial weights from which matching between views emerges early.

The network has to find, for each patch, where its content was before. Random projections hide
that: these make every cross-attention start as "look near your own place, for what looks like
you, and copy it", and give scene tokens a smooth code of their place, so that where something
was found can be read off linearly. After Trockman and Kolter (2023), "Mimetic initialization of
self-attention layers", extended to cross-attention and to rotary positions.
"""

from __future__ import annotations

import math

import torch

from ttt3r.heads import LinearHead
from ttt3r.layers import CrossAttention, ModulatedBlock, SelfAttention
from ttt3r.model import Model

_LOCALITY = 2.5  # bias of queries and keys in the heads that look near
_USUAL_DISTANCE = 1.3  # log(1 + metres) of the first guess of all points


@torch.no_grad()
def prepare_for_matching(model: Model, seed: int) -> None:
    """Overwrite the attention weights of a fresh model in place."""
    generator = torch.Generator().manual_seed(seed)
    for module in (model.dec_blocks, model.dec_blocks_state):
        for part in module.modules():
            if isinstance(part, CrossAttention):
                _alike_and_near(part, generator)
    for name, part in model.named_modules():
        if isinstance(part, SelfAttention | CrossAttention):
            # In the encoder, much copying would wash the patches out.
            _copying(part, 0.2 if name.startswith("enc_blocks") else 0.7, generator)
    _places(model, generator)
    head = model.downstream_head
    if isinstance(head, LinearHead):
        _first_guesses(head)


def _first_guesses(head: LinearHead) -> None:
    """All points a few metres ahead, and the same in camera and world: nothing has moved."""
    head.proj.fc2.weight.mul_(0.3)
    bias = head.proj.fc2.bias.view(4, -1)
    bias.zero_()
    bias[2] = _USUAL_DISTANCE
    head.cross_proj.load_state_dict(head.proj.state_dict())
    for block in head.final_transform.modules():
        if isinstance(block, ModulatedBlock):
            block.attn.proj.weight.mul_(0.1)
            block.mlp.fc2.weight.mul_(0.1)


def _orthogonal(width: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]


def _alike_and_near(attention: CrossAttention, generator: torch.Generator) -> None:
    """Queries and keys share a projection; half the heads also share a bias, hence a place.

    A common bias turned by both positions gives a logit that falls with their distance. The
    slowest rotation hardly turns over a picture: a negative product there takes the mean of
    the logits, which is the TTT3R gate, back to a few units; training does the rest.
    """
    width = attention.projq.weight.shape[0]
    shared = _orthogonal(width, generator)
    attention.projq.weight.copy_(shared)
    attention.projk.weight.copy_(shared)
    heads, size = attention.heads, width // attention.heads
    near = torch.zeros(heads, size)
    near[: heads // 2] = _LOCALITY
    key = near.view(heads, 2, 2, -1).clone()  # [axis, u or v, frequency]
    slow = (key.shape[-1] - 2) * _LOCALITY
    key[: heads // 2, ..., -1] = -slow
    attention.projq.bias.copy_(near.flatten())
    attention.projk.bias.copy_(key.flatten())


def _copying(
    attention: SelfAttention | CrossAttention, share: float, generator: torch.Generator
) -> None:
    """Value and output projections undo each other: share squared of the content is copied."""
    width = attention.proj.weight.shape[0]
    turn = _orthogonal(width, generator)
    if isinstance(attention, CrossAttention):
        attention.projv.weight.copy_(share * turn)
    else:
        attention.qkv.weight[2 * width :].copy_(share * turn)
    attention.proj.weight.copy_(share * turn.T)


def _places(model: Model, generator: torch.Generator) -> None:
    """Scene tokens start as codes of their place in their grid, and a random rest."""
    config = model.config
    across = math.isqrt(config.state_size)
    across += across % 2  # as the rotary positions count (section 3)
    number = torch.arange(config.state_size, dtype=torch.float32)
    places = torch.stack([number // across, number % across], dim=-1) - (across - 1) / 2
    waves = [torch.sin(places * f + shift) for f in (0.25, 0.5, 1.0) for shift in (0, math.pi / 2)]
    code = torch.cat([places / across * 2, *waves], dim=-1)[:, : config.enc_embed_dim]
    tokens = 0.3 * torch.randn(config.state_size, config.enc_embed_dim, generator=generator)
    tokens[:, : code.shape[1]] = code
    model.register_tokens.weight.copy_(tokens)
    torch.nn.init.eye_(model.decoder_embed_state.weight)
