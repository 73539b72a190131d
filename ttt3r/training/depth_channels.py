"""Channels beside those of a trained network that learn depth and hardly touch the poses.

Depth takes steps at rates that camera poses do not bear (docs/model-card.md, item 18). So depth
learns in a small network of its own, a vision transformer (`DepthNetwork`), and `join` puts it into
one of twice the width, as new channels of the image tokens. Old channels read old ones only. The
two share norms, which see all channels of a token: the small network divides by what the large one
divides by (`see`), and its channels are small in the joined one, so that norms there hardly notice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt3r.config import ModelConfig
from ttt3r.heads import patch_pixels, points_and_confidence
from ttt3r.layers import LayerNorm, Linear, Mlp, PatchEmbed, Rotary, SelfAttention
from ttt3r.model import Model, Positions
from ttt3r.training.widening import TOKENS, blocks_of, widen, widened

SMALL = 0.0625  # size of the new channels, in that of the old ones
_SPREAD = 0.5**0.5  # of a token half of whose channels are its mean, in that of the others
_MORE_BLOCKS = 2  # of the encoder: depth is there in a single picture, more so than poses
_IMAGE_SIDE = (
    "patch_embed.", "enc_blocks.", "enc_norm.", "decoder_embed.", "dec_blocks.", "dec_norm.",
)  # fmt: skip
_STATE_SIDE = "register_tokens.", "decoder_embed_state.", "dec_blocks_state.", "dec_norm_state."
_DEPTH = "downstream_head.proj."
_ENC_NORMS, _DEC_NORMS = ("norm1", "norm2"), ("norm1", "norm3")
_ATTENDED = "norm_y", "projk", "projv"  # layers that see the other side
# Layers that write a token's channels; "1" is that of a modulated norm.
_WRITERS = "proj", "fc2", "decoder_embed", "proj_q", "1"
_PIXELS_AND_POSE = tuple(
    f"downstream_head.{part}." for part in ("cross_proj", "rgb_proj", "pose_head")
)


class Seen(NamedTuple):
    """What depth's channels need of the others, picture by picture."""

    spreads: Tensor  # [norms, L, T, 1 + N] one over what each norm divides each token by
    tokens: Tensor  # [L, T, N, D] the old channels that the head reads


class _Norm(nn.Module):
    """What a norm does to half of the channels that it sees; the mean of the others is zero."""

    gain: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("gain", torch.ones(()))  # brings `weight` to about 1, as rates expect
        self.index = 0  # in `Seen.spreads`

    def forward(self, x: Tensor, spreads: Tensor) -> Tensor:
        x = x - x.mean(dim=-1, keepdim=True) / 2
        return x * (spreads[self.index] * self.gain) * self.weight + self.bias


class _Block(nn.Module):
    """Self-attention and MLP, named as in the network that it will be part of."""

    def __init__(self, width: int, heads: int, config: ModelConfig, last_norm: str) -> None:
        super().__init__()
        self.norm1 = _Norm(width)
        is_encoder = last_norm == "norm2"
        self.attn = SelfAttention(width, heads, rope_fp16=is_encoder and config.encoder_rope_fp16)
        self.last_norm = last_norm
        self.add_module(last_norm, _Norm(width))
        self.mlp = Mlp(width, int(width * config.mlp_ratio))

    def forward(self, x: Tensor, spreads: Tensor, rotary: Rotary) -> Tensor:
        x = x + self.attn(self.norm1(x, spreads), rotary)
        return x + self.mlp(self.get_submodule(self.last_norm)(x, spreads))


class DepthNetwork(nn.Module):
    """The new channels of a network by themselves; parameters have the names that they have there.

    Args:
        config: of the joined network.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        encoder, decoder = config.enc_embed_dim // 2, config.dec_embed_dim // 2
        heads, decoder_heads = config.enc_num_heads // 2, config.dec_num_heads // 2
        self.patch_size = config.patch_size
        self.patch_embed = PatchEmbed(3, encoder, config.patch_size)
        self.enc_blocks = nn.ModuleList(
            _Block(encoder, heads, config, "norm2") for _ in range(config.enc_depth)
        )
        self.enc_norm = _Norm(encoder)
        self.decoder_embed = Linear(encoder, decoder)
        self.dec_blocks = nn.ModuleList(
            _Block(decoder, decoder_heads, config, "norm3") for _ in range(config.dec_depth)
        )
        self.dec_norm = _Norm(decoder)
        head = Mlp(2 * decoder, 8 * decoder, 4 * config.patch_size**2)
        self.downstream_head = nn.ModuleDict({"proj": head})
        for index, name in enumerate(_norm_names(config)):
            self._norm(f"{name}.weight").index = index
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                fans = nn.init._calculate_fan_in_and_fan_out(module.weight)
                nn.init.trunc_normal_(module.weight, std=(2 / sum(fans)) ** 0.5)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(
        self, images: Tensor, seen: Seen, tables: Callable[..., Positions]
    ) -> tuple[Tensor, Tensor]:
        """Points [L, T, H, W, 3] in each picture's camera, metres, and confidence [L, T, H, W].

        Args:
            images: [L, T, 3, H, W] in [-1, 1].
            seen: what the joined network says of them.
            tables: its rotary tables, `Model.positions`.
        """
        lead, p = images.shape[:2], self.patch_size
        grid = (images.shape[-2] // p, images.shape[-1] // p)
        positions = tables(grid, images.device)
        spreads = seen.spreads.flatten(1, 2)[..., None]
        x = self.patch_embed(images.flatten(0, 1))
        for block in self.enc_blocks:
            x = block(x, spreads[:, :, 1:], positions.encoder)
        x = self.decoder_embed(self.enc_norm(x, spreads[:, :, 1:])).float()
        x = torch.cat((torch.zeros_like(x[:, :1]), x), dim=1)  # nothing of depth enters pose tokens
        for block in self.dec_blocks:
            x = block(x, spreads, positions.image_by_image)
        x = self.dec_norm(x, spreads)[:, 1:]
        tokens = torch.cat((seen.tokens.flatten(0, 1), x), dim=-1)
        raw = patch_pixels(self._head, tokens, grid, p)
        points, confidence = points_and_confidence(raw, front_only=True)
        return points.unflatten(0, lead), confidence.unflatten(0, lead)

    @torch.no_grad()
    def begin(self, around: Model, images: Tensor, seen: Seen) -> None:
        """Say first what `around` says, by its head; and fit the norms to pictures."""
        head = {k.removeprefix(_DEPTH): v for k, v in around.state_dict().items() if _DEPTH in k}
        new = self._head.fc1.weight[:, self._head.fc1.in_features // 2 :].clone()
        self._head.load_state_dict(head)
        self._head.fc1.weight[:, -new.shape[1] :] = 0.1 * new

        def fit(norm: nn.Module, arguments: tuple[Tensor, Tensor]) -> None:
            assert isinstance(norm, _Norm)
            x, spreads = arguments
            norm.gain = 1 / (x * spreads[norm.index])[:, 1:].square().mean().sqrt()

        hooks = [norm.register_forward_pre_hook(fit) for norm in self._norms()]
        self(images, seen, around.positions)
        for hook in hooks:
            hook.remove()

    @torch.no_grad()
    def take_from(self, whole: Model) -> None:
        """Become the new channels of a joined network."""
        tensors = whole.state_dict()
        for name, parameter in self.named_parameters():
            found = _slot(name, tensors[name]).reshape(parameter.shape) / _sizes(name, parameter)
            if _is_norm(name) and name.endswith("weight"):
                gain = found.abs().mean()
                self._norm(name).gain = gain
                found = found / gain
            parameter.copy_(found)

    def parameters_joined(self) -> dict[str, Tensor]:
        """Parameters as they are in the joined network."""
        found = {}
        for name, parameter in self.named_parameters():
            is_scaled = _is_norm(name) and name.endswith("weight")
            gain = self._norm(name).gain if is_scaled else 1.0
            found[name] = parameter.detach() * gain * _sizes(name, parameter)
        return found

    def _norms(self) -> list[_Norm]:
        return [module for module in self.modules() if isinstance(module, _Norm)]

    @property
    def _head(self) -> Mlp:
        head = self.downstream_head["proj"]
        assert isinstance(head, Mlp)
        return head

    def _norm(self, name: str) -> _Norm:
        norm = self.get_submodule(name.rpartition(".")[0])
        assert isinstance(norm, _Norm)
        return norm


def joined_config(config: ModelConfig) -> ModelConfig:
    """The architecture that channels for depth make of one without them."""
    return replace(widened(config, 2), enc_depth=config.enc_depth + _MORE_BLOCKS)


def parted_config(config: ModelConfig) -> ModelConfig:
    """Inverse of `joined_config`."""
    return replace(
        config,
        enc_embed_dim=config.enc_embed_dim // 2,
        enc_num_heads=config.enc_num_heads // 2,
        dec_embed_dim=config.dec_embed_dim // 2,
        dec_num_heads=config.dec_num_heads // 2,
        state_dec_num_heads=config.state_dec_num_heads // 2,
        enc_depth=config.enc_depth - _MORE_BLOCKS,
    )


@torch.no_grad()
def make_room(model: Model) -> Model:
    """A network of twice the width, with more encoder blocks, which says what `model` says.

    New channels of image tokens are zero, and read and write nothing. State tokens have copies of
    their channels, as in `widen`. In pose memory and heads each new channel is the mean of the old
    ones, so that norms, which subtract the mean, leave nothing of it.

    Args:
        model: with linear heads, in float32; the result is on the CPU.

    Raises:
        ValueError: the network cannot be widened (see `widen`).
    """
    wide = widen(_deepened(_centred(model)), 2)
    tensors = wide.state_dict()
    for name, tensor in tensors.items():
        layer = _layer(name)
        if _sees_states(name):
            continue
        if _is_norm(name):
            if name.endswith("weight"):
                tensor *= _SPREAD
        elif name.startswith(_IMAGE_SIDE):
            if tensor.ndim == 2:
                _read_old_only(tensor, 1)
            _rows(tensor, name)[:, 1] = 0
        else:
            _part(name, layer, tensor)
    return wide


@torch.no_grad()
def join(around: Model, network: DepthNetwork) -> Model:
    """The network `around`, with the new channels of `network` in place of its own."""
    tensors = {name: tensor.clone() for name, tensor in around.state_dict().items()}
    for name, tensor in network.parameters_joined().items():
        slot = _slot(name, tensors[name])
        slot.copy_(tensor.view(slot.shape))
    whole = Model(around.config).to(around.device)
    whole.load_tensors(tensors)
    return whole


@torch.no_grad()
def take_apart(whole: Model) -> tuple[Model, DepthNetwork]:
    """The old channels of a joined network, and the new ones.

    The old ones say what `whole` says, apart from depth.
    """
    network = DepthNetwork(whole.config).to(whole.device)
    network.take_from(whole)
    return _old_alone(whole), network


@torch.no_grad()
def seer(whole: Model) -> Model:
    """The old channels of a joined network by themselves, in as many blocks: what `see` needs."""
    return _deepened(_old_alone(whole)).to(whole.device)


def _old_alone(whole: Model) -> Model:
    old = Model(parted_config(whole.config)).to(whole.device)
    given = whole.state_dict()
    tensors = {}
    for name, wanted in old.state_dict().items():
        found = _old_channels(name, given[name], wanted.shape)
        is_scaled = _is_norm(name) and name.endswith("weight") and not _sees_states(name)
        tensors[name] = found / _SPREAD if is_scaled else found
    old.load_tensors(tensors)
    return old


def _old_channels(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of what widening does to a tensor: the first copies, which read what all read."""
    written, read = blocks_of(name)
    if tensor.ndim == 1 or name in TOKENS:
        if tensor.shape[-1] == shape[-1]:
            return tensor
        channels = tensor.view(*tensor.shape[:-1], written, 2, -1)
        return channels[..., 0, :].reshape(shape)
    if tensor.shape[0] > shape[0]:
        tensor = _rows(tensor, name)[:, 0].flatten(0, 1)
    if tensor.shape[1] > shape[1]:
        tensor = tensor.view(tensor.shape[0], read, 2, -1).sum(dim=2).flatten(1)
    return tensor


@torch.no_grad()
def see(old: Model, images: Tensor, rule: str) -> Seen:
    """What channels for depth need of the network that they are part of.

    What they add themselves to what norms divide by is left out: they are small.

    Args:
        old: the other channels (`seer`), in float32; a quarter of the work of the whole network.
        images: [L, T, 3, H, W] in [-1, 1].
        rule: how the state learns.
    """
    names = _norm_names(old.config)
    calls: dict[str, list[Tensor]] = {name: [] for name in names}
    tokens: list[Tensor] = []

    def note(x: Tensor, name: str) -> None:
        # Both halves of a token have a mean of zero.
        calls[name].append((x.var(dim=-1, unbiased=False) / 2 + LayerNorm.EPS).rsqrt())

    hooks = [
        old.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: note(arguments[0], name)
        )
        for name in names
    ]
    hooks.append(
        old.dec_norm.register_forward_hook(lambda *arguments: tokens.append(arguments[2][:, 1:]))
    )
    try:
        old.run(images, rule=rule, outputs=frozenset())
    finally:
        for hook in hooks:
            hook.remove()
    spreads = [
        # The encoder sees all frames at once, and no pose token.
        F.pad(found[0].unflatten(0, images.shape[:2]), (1, 0), value=1.0)
        if name.startswith("enc")
        else torch.stack(found, dim=1)
        for name, found in calls.items()
    ]
    return Seen(torch.stack(spreads), torch.stack(tokens, dim=1))


def has_depth_channels(model: Model) -> bool:
    """Whether image tokens have channels for depth apart from others, as `join` leaves them."""
    return not any(_is_linked(name, tensor) for name, tensor in model.state_dict().items())


def require_depth_channels(model: Model, where: str | Path) -> None:
    """ValueError unless depth has channels of its own in `model`, which nothing else reads."""
    if not has_depth_channels(model):
        raise ValueError(
            f"{where}: what says the poses reads all channels, so depth cannot learn alone; "
            "expected weights of half the width, or what came of such with --depth-alone"
        )


def _is_linked(name: str, tensor: Tensor) -> bool:
    """Whether a matrix of the image side takes anything from new channels to old ones, or back."""
    layer = _layer(name)
    if not name.startswith(_IMAGE_SIDE) or tensor.ndim != 2 or layer in _ATTENDED:
        return False
    half = tensor.shape[1] // 2
    old, new = _rows(tensor, name).unbind(1)
    links = [old[..., half:]]
    if "cross_attn" not in name:
        links.append(new[..., :half])
    elif layer in _WRITERS:  # depth does not attend to the state
        links.append(new)
    return any(bool(link.any()) for link in links)


def _norm_names(config: ModelConfig) -> list[str]:
    """The norms through which depth passes, in their order: it does not attend to states."""
    encoder = [f"enc_blocks.{i}.{name}" for i in range(config.enc_depth) for name in _ENC_NORMS]
    decoder = [f"dec_blocks.{i}.{name}" for i in range(config.dec_depth) for name in _DEC_NORMS]
    return [*encoder, "enc_norm", *decoder, "dec_norm"]


def _sees_states(name: str) -> bool:
    """Whether a layer sees scene tokens only, whose channels are all there twice."""
    attends = _layer(name) in _ATTENDED
    return name.startswith(_IMAGE_SIDE if attends else _STATE_SIDE)


def _is_norm(name: str) -> bool:
    return "norm" in _layer(name)


def _layer(name: str) -> str:
    return name.split(".")[-2] if "." in name else name


def _slot(name: str, tensor: Tensor) -> Tensor:
    """Where in a tensor of the joined network a parameter of the depth network is, a view."""
    if name.startswith(_DEPTH):
        return tensor
    new = _rows(tensor, name)[:, 1]
    return new[..., tensor.shape[1] // 2 :] if tensor.ndim == 2 else new


def _sizes(name: str, parameter: Tensor) -> Tensor:
    """What a parameter of the depth network is multiplied by in the joined one."""
    sizes = torch.ones(parameter.shape[-1] if parameter.ndim == 2 else 1, device=parameter.device)
    if name == _DEPTH + "fc1.weight":
        sizes[sizes.shape[0] // 2 :] = 1 / SMALL
    elif name.startswith("dec_norm."):  # what it says is read by the pose memory, too
        sizes *= SMALL if name.endswith("bias") else 1
    elif _is_norm(name):
        sizes /= SMALL if name.endswith("weight") else 1
    elif _layer(name) in _WRITERS and not name.startswith(_DEPTH):
        sizes *= SMALL
    return sizes


def _rows(tensor: Tensor, name: str) -> Tensor:
    """The rows of a wide tensor as [blocks, old and new, rows, ...], a view."""
    return tensor.view(blocks_of(name)[0], 2, -1, *tensor.shape[1:])


def _centred(model: Model) -> Model:
    """The same network, whose image tokens have a mean of zero: norms subtract it anyway.

    So other channels can be put beside theirs, and norms subtract nothing else.
    """
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if name.startswith(_IMAGE_SIDE) and _layer(name) in _WRITERS:
            tensor -= tensor.mean(dim=0)
    centred = Model(model.config)
    centred.load_tensors(tensors)
    return centred


def _deepened(model: Model) -> Model:
    """The same network with more blocks in its encoder, which are zero: they change nothing."""
    deep = Model(replace(model.config, enc_depth=model.config.enc_depth + _MORE_BLOCKS))
    given = model.state_dict()
    deep.load_tensors(
        {name: given.get(name, torch.zeros_like(t)) for name, t in deep.state_dict().items()}
    )
    return deep


def _part(name: str, layer: str, tensor: Tensor) -> None:
    """Let all rows read old columns only, and each new channel be the mean of the old ones."""
    if name in TOKENS:
        channels = tensor.view(*tensor.shape[:-1], blocks_of(name)[0], 2, -1)
        channels[..., 1, :] = channels[..., 0, :].mean(dim=-1, keepdim=True)
        return
    if tensor.ndim == 2 and layer not in ("proj", "fc2"):  # those read heads and hidden units
        _read_old_only(tensor, blocks_of(name)[1])
    if layer in _WRITERS and not name.startswith((*_PIXELS_AND_POSE, _DEPTH)):
        rows = _rows(tensor, name)
        rows[:, 1] = rows[:, 0].mean(dim=1, keepdim=True)


def _read_old_only(matrix: Tensor, blocks: int) -> None:
    """Take what `matrix` reads of copies from the channels that they copy."""
    old, new = matrix.view(matrix.shape[0], blocks, 2, -1).unbind(2)
    old += new
    new.zero_()
