"""The pose memory: what the stream remembers of where it looked (sections 6.1 and 6.4).

Its blocks are decoder blocks of width 2D without positions. Work that cannot influence the
result is left out: attention over a single token is the projection of that token's value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ttt3r.config import ModelConfig
from ttt3r.layers import DecoderBlock, Linear


class ReadBlock(DecoderBlock):
    """One query token x [B, 1, 2D] looks into the memory y [B, M, 2D]."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.attn.forward_single(self.norm1(x))
        x = x + self.cross_attn.forward_unrotated(self.norm2(x), self.norm_y(y))
        return x + self.mlp(self.norm3(x))


class WriteBlock(DecoderBlock):
    """The memory x [B, M, 2D] takes in one token y [B, 1, 2D]."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.attn(self.norm1(x), None)
        x = x + self.cross_attn.forward_single(self.norm_y(y))
        return x + self.mlp(self.norm3(x))


class PoseMemory(nn.Module):
    """Slots of (image query, pose token) pairs, read by image queries."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, heads = 2 * config.dec_embed_dim, config.dec_num_heads
        self.masked_token = nn.Parameter(torch.zeros(1, 1, config.dec_embed_dim))
        self.mem = nn.Parameter(torch.zeros(1, config.local_mem_size, width))
        self.proj_q = Linear(config.enc_embed_dim, config.dec_embed_dim)
        self.write_blocks = nn.ModuleList(
            WriteBlock(width, heads, config.mlp_ratio) for _ in range(2)
        )
        self.read_blocks = nn.ModuleList(
            ReadBlock(width, heads, config.mlp_ratio) for _ in range(2)
        )

    def query(self, descriptor: Tensor) -> Tensor:
        """Project image descriptors [..., E] to queries [..., D]."""
        return self.proj_q(descriptor).float()

    def read(self, query: Tensor, memory: Tensor) -> Tensor:
        """Recall the pose token [B, 1, D] for `query` [B, 1, D] from `memory` [B, M, 2D]."""
        token = torch.cat((query, self.masked_token.float().expand_as(query)), dim=-1)
        for block in self.read_blocks:
            token = block(token, memory)
        return token[..., query.shape[-1] :]

    def write(self, memory: Tensor, query: Tensor, pose: Tensor) -> Tensor:
        """The memory [B, M, 2D] after taking in `query` and `pose`, both [B, 1, D]."""
        token = torch.cat((query, pose), dim=-1)
        for block in self.write_blocks:
            memory = block(memory, token)
        return memory
