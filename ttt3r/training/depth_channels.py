"""A network of twice the width whose new channels learn depth and hardly touch the poses.

Depth takes steps at rates that camera poses do not bear (docs/model-card.md, item 18). So half of
the image side's channels learn depth, and but for the depth head nothing else reads them. What they
share with the rest are norms, which see all channels of a token. The new channels are small, and
learn at rates as small, so that norms hardly notice; what reads them magnifies them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ttt3r.model import Model
from ttt3r.training.widening import TOKENS, blocks_of, widen

SMALL = 0.0625  # size of the new channels, in that of the old ones
_IMAGE_SIDE = (
    "patch_embed.", "enc_blocks.", "enc_norm.", "decoder_embed.", "dec_blocks.", "dec_norm.",
)  # fmt: skip
_STATE_SIDE = "register_tokens.", "decoder_embed_state.", "dec_blocks_state.", "dec_norm_state."
_DEPTH = "downstream_head.proj."
_ATTENDED = "norm_y", "projk", "projv"  # layers that see the other side
# Layers that write a token's channels; "1" is that of a modulated norm.
_WRITERS = "proj", "fc2", "decoder_embed", "proj_q", "1"
_PIXELS_AND_POSE = tuple(
    f"downstream_head.{part}." for part in ("cross_proj", "rgb_proj", "pose_head")
)
_NORM = (0.5 + 0.5 * SMALL**2) ** 0.5  # a token's size among all channels, in that of the old ones


@torch.no_grad()
def add_depth_channels(model: Model) -> Model:
    """A network of twice the width that says what `model` says, but for about a per cent.

    The new channels of image tokens begin as small copies of the old ones, which read nothing of
    them. State tokens have copies of their channels, as in `widen`. In pose memory and heads each
    new channel is the mean of the old ones: the norms' mean stays the same, and in the new channels
    of pose tokens it leaves nothing. So depth, which sees copies there no longer, changes a little.

    Args:
        model: with linear heads, on the CPU, in float32.

    Raises:
        ValueError: the network cannot be widened (see `widen`).
    """
    wide = widen(_centred(model), 2)
    tensors = wide.state_dict()
    for name, tensor in tensors.items():
        layer = _layer(name)
        if name.startswith(_STATE_SIDE if layer not in _ATTENDED else _IMAGE_SIDE):
            continue  # sees states only
        if "norm" in layer:
            _fit_norm(name, tensor)
        elif name.startswith(_IMAGE_SIDE):
            _part_image_side(name, layer, tensor)
        elif name == _DEPTH + "fc1.weight":
            _columns(tensor, 1)[:, :, 1] /= SMALL
        elif not name.startswith(_DEPTH):
            _part(name, layer, tensor)
    return wide


def require_depth_channels(tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """ValueError unless weights are of such a network: old channels read no new ones."""
    for name, tensor in tensors.items():
        is_reader = name.endswith(("qkv.weight", "projq.weight", "fc1.weight"))
        if name.startswith(_IMAGE_SIDE) and is_reader:
            old = _rows(tensor, name)[:, 0].flatten(0, 1)
            if _columns(old, 1)[:, :, 1].any():
                raise ValueError(
                    f"{where}: what says the poses reads all channels, so depth cannot learn "
                    "alone; expected weights of half the width, or what came of such with "
                    "--depth-alone"
                )


def depth_masks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What learns depth alone: the new channels of image tokens, and all of the depth head."""
    masks = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in tensors.items()}
    for name, mask in masks.items():
        if name.startswith(_DEPTH):
            mask.fill_(True)
        elif name.startswith(_IMAGE_SIDE) and _layer(name) != "norm_y":
            _rows(mask, name)[:, 1] = True
    return masks


def writes_small_channels(name: str) -> bool:
    """Whether a parameter writes the new channels: its steps are to be as small as they are."""
    return name.startswith(_IMAGE_SIDE) and _layer(name) in _WRITERS


def _layer(name: str) -> str:
    return name.split(".")[-2] if "." in name else name


def _rows(tensor: Tensor, name: str) -> Tensor:
    """The rows of a wide tensor as [blocks, old and new, rows, ...], a view."""
    return tensor.view(blocks_of(name)[0], 2, -1, *tensor.shape[1:])


def _columns(tensor: Tensor, blocks: int) -> Tensor:
    """The columns of a wide matrix as [rows, blocks, old and new, columns], a view."""
    return tensor.view(tensor.shape[0], blocks, 2, -1)


def _centred(model: Model) -> Model:
    """The same network, whose image tokens have a mean of zero: norms subtract it anyway.

    So other channels can be put beside theirs, and norms subtract nothing else.
    """
    centred = Model(model.config)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if name.startswith(_IMAGE_SIDE) and _layer(name) in _WRITERS:
            tensor -= tensor.mean(dim=0)
    centred.load_tensors(tensors)
    return centred


def _fit_norm(name: str, tensor: Tensor) -> None:
    """Let a norm of old and new channels side by side give what that of the old ones gave."""
    is_weight = name.endswith("weight")
    if is_weight:
        tensor *= 0.5**0.5 if name.startswith("pose_retriever.") else _NORM
    if not name.startswith(_IMAGE_SIDE + _STATE_SIDE):
        return
    new = tensor[tensor.shape[0] // 2 :]
    if name.startswith("dec_norm."):  # what it says is read by the pose memory, too
        new *= 1 if is_weight else SMALL
    elif is_weight:
        new /= SMALL


def _part_image_side(name: str, layer: str, tensor: Tensor) -> None:
    """Let old rows read old columns only, and new ones write little."""
    rows = _rows(tensor, name)
    if tensor.ndim == 2:
        for old in rows[:, 0]:
            _read_old_only(old, 1)
    if layer in _WRITERS:
        rows[:, 1] *= SMALL


def _part(name: str, layer: str, tensor: Tensor) -> None:
    """Let all rows read old columns only, and each new channel be the mean of the old ones.

    So the mean that norms subtract is the same, and leaves nothing in the new channels.
    """
    if name in TOKENS:
        channels = tensor.view(*tensor.shape[:-1], blocks_of(name)[0], 2, -1)
        channels[..., 1, :] = channels[..., 0, :].mean(dim=-1, keepdim=True)
        return
    if tensor.ndim == 2 and layer not in ("proj", "fc2"):  # those read heads and hidden units
        _read_old_only(tensor, blocks_of(name)[1])
    if layer in _WRITERS and not name.startswith(_PIXELS_AND_POSE):
        rows = _rows(tensor, name)
        rows[:, 1] = rows[:, 0].mean(dim=1, keepdim=True)


def _read_old_only(matrix: Tensor, blocks: int) -> None:
    """Take what `matrix` reads of copies from the channels that they copy."""
    old, new = _columns(matrix, blocks).unbind(2)
    old += new
    new.zero_()
