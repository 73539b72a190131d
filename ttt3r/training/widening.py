"""A wider network that computes what a narrow one does, so that training goes on with more room.

After Chen, Goodfellow and Shlens (2016), "Net2Net", arXiv 1511.05641. Every channel, attention
head and hidden unit is there several times, with the same value. What reads the copies takes random
shares of them that sum to what it took of the one; so their gradients differ, and they part.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ttt3r.config import ModelConfig
from ttt3r.model import Model

_MEMORY_BLOCKS = "pose_retriever.write_blocks", "pose_retriever.read_blocks"
TOKENS = (
    "pose_token",
    "register_tokens.weight",
    "pose_retriever.masked_token",
    "pose_retriever.mem",
)


def widened(config: ModelConfig, times: int) -> ModelConfig:
    """An architecture with `times` the width and heads; depth, tokens and pixels as before."""
    return replace(
        config,
        enc_embed_dim=config.enc_embed_dim * times,
        enc_num_heads=config.enc_num_heads * times,
        dec_embed_dim=config.dec_embed_dim * times,
        dec_num_heads=config.dec_num_heads * times,
        state_dec_num_heads=config.state_dec_num_heads * times,
    )


def times_as_wide(config: ModelConfig, narrow: ModelConfig) -> int:
    """How many times as wide as `narrow` an architecture is; 1 where that is no whole number."""
    times, rest = divmod(config.enc_embed_dim, narrow.enc_embed_dim)
    return 1 if rest else times


@torch.no_grad()
def widen(model: Model, times: int) -> Model:
    """A network of `times` the width that says the same as `model`, but for rounding.

    Args:
        model: with linear heads, on the CPU, in float32.
        times: 1 leaves it as it is.

    Raises:
        ValueError: the network has DPT heads, whose widths are their own, or encodes ray maps.
    """
    if times == 1:
        return model
    config = model.config
    if config.head_type != "linear" or config.ray_map_encoder:
        raise ValueError(
            f"head_type is {config.head_type!r} and ray_map_encoder {config.ray_map_encoder}; only "
            "networks with linear heads and without that encoder are widened"
        )
    generator = torch.Generator().manual_seed(0)
    wide = Model(widened(config, times))
    tensors = model.state_dict()
    wide.load_tensors(
        {
            name: _widen_tensor(name, tensors[name], tuple(wanted.shape), times, generator)
            for name, wanted in wide.state_dict().items()
        }
    )
    return wide


def _widen_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], times: int, generator: torch.Generator
) -> Tensor:
    """Copy the channels of `tensor` where `shape` is wider; share them out where they are read."""
    written, read = blocks_of(name)
    if tensor.ndim == 1 or name in TOKENS:  # channels last, and nothing is read
        same = shape[-1] == tensor.shape[-1]
        return tensor if same else tensor[..., _copies(tensor.shape[-1], written, times)]
    if shape[0] > tensor.shape[0]:
        tensor = tensor[_copies(tensor.shape[0], written, times)]
    if shape[1] == tensor.shape[1]:  # the pixels of a patch
        return tensor
    shares = torch.rand(shape[0], read, times, tensor.shape[1] // read, generator=generator) + 0.5
    shares = (shares / shares.sum(dim=2, keepdim=True)).reshape(shape[0], shape[1])
    return tensor[:, _copies(tensor.shape[1], read, times)] * shares


def _copies(channels: int, blocks: int, times: int) -> Tensor:
    """Of each channel of the wide tensor the one that it copies: [c c .. d d ..] block by block."""
    return torch.arange(channels).view(blocks, 1, -1).expand(-1, times, -1).flatten()


def blocks_of(name: str) -> tuple[int, int]:
    """Blocks that the channels that a tensor writes, and those it reads, consist of.

    Queries, keys and values side by side are three; shift and scale are two; a slot of the pose
    memory is a query beside a pose token, and so is what its blocks pass on.
    """
    slot = 2 if name.startswith(_MEMORY_BLOCKS) else 1
    kind = name.rpartition(".")[0]
    if kind.endswith(".qkv"):
        return 3, slot
    if kind.endswith((".projq", ".projk", ".projv", ".fc1")):
        return 1, slot
    if name == "pose_retriever.mem" or kind.endswith(".mlp.1"):
        return 2, 1
    return slot, 1
