"""From tokens to pointmaps, confidence, colour and camera pose (sections 7 and 8).

Heads take any number of frames at once: B is lanes times frames.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt3r.config import ModelConfig
from ttt3r.layers import Mlp, ModulatedBlock, Rotary, without_autocast

LEVEL_WIDTHS = (96, 192, 384, 768)  # fixed, whatever the decoder's width
FUSED_WIDTH = 256
_ALIAS = re.compile(r"(.*\bscratch\.)layer_rn\.(\d)\.weight")


def canonical_name(name: str) -> str:
    """The first of the two names under which checkpoints hold the DPT levels' weights."""
    alias = _ALIAS.fullmatch(name)
    return f"{alias[1]}layer{int(alias[2]) + 1}_rn.weight" if alias else name


def points_and_confidence(raw: Tensor, *, front_only: bool = False) -> tuple[Tensor, Tensor]:
    """Points and confidence from raw channels x, y, z, c (section 8.1), in float32.

    Args:
        raw: [..., 4].
        front_only: mirror points so that z >= 0; a z of exactly 0 gives the point 0.

    Returns:
        [..., 3] points, metres as the model estimates them, and [...] confidence >= 1.
    """
    raw = raw.float()
    xyz = raw[..., :3]
    if front_only:
        xyz = xyz * xyz[..., 2:].sign()
    distance = torch.linalg.vector_norm(xyz, dim=-1, keepdim=True)
    return xyz * (distance.expm1() / distance.clamp_min(1e-8)), 1 + raw[..., 3].exp()


def colour(raw: Tensor) -> Tensor:
    """Colour in (-1, 1) from raw channels [..., 3] (section 8.2), in float32."""
    return 2 * (raw.float().sigmoid() * (1 - 2e-6) + 1e-6 - 0.5)


def camera_pose(raw: Tensor) -> Tensor:
    """Translation and unit quaternion wxyz, w >= 0, from raw [..., 7] (section 8.3)."""
    translation, quaternion = raw.float().split((3, 4), dim=-1)
    distance = torch.linalg.vector_norm(translation, dim=-1, keepdim=True)
    translation = translation * (distance.expm1() / distance.clamp_min(1e-8))
    quaternion = F.normalize(quaternion, dim=-1, eps=1e-12)
    quaternion = torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)
    return torch.cat((translation, quaternion), dim=-1)


class PoseHead(nn.Module):
    """Pose token [B, D] to raw pose [B, 7]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = Mlp(width, 4 * width, 7)

    def forward(self, token: Tensor) -> Tensor:
        return self.mlp.forward_fp32_out(token)


class _Head(nn.Module, ABC):
    """What both kinds of head share: the pose, and tokens turned into the world's frame.

    Subclasses list in `levels` the decoder layers that they read (0 is the encoder's output).
    """

    levels: tuple[int, ...]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.dec_embed_dim
        self.pose_head = PoseHead(width)
        self.final_transform = nn.ModuleList(
            ModulatedBlock(width, config.dec_num_heads, config.mlp_ratio) for _ in range(2)
        )

    @torch.no_grad()
    def initialise_outputs(self) -> None:
        """Start with small outputs: cameras near the identity, all points 1.7 m ahead of them."""
        pose = self.pose_head.mlp.fc2
        nn.init.trunc_normal_(pose.weight, std=1e-3)
        pose.bias[3] = 1.0  # w of the quaternion
        for layer, pixels in self.point_outputs():
            layer.weight.mul_(0.1)
            assert layer.bias is not None
            layer.bias[2 * pixels : 3 * pixels] = 1.0  # raw z; expm1(1) = 1.7

    @abstractmethod
    def last_layers(self) -> list[nn.Module]:
        """The last layer of each output, which work in float32."""

    @abstractmethod
    def point_outputs(self) -> list[tuple[nn.Linear | nn.Conv2d, int]]:
        """The last layers that give points, with their outputs per channel x, y, z, c."""

    def to_world(self, tokens: Tensor, pose_token: Tensor, rotary: Rotary) -> Tensor:
        """Condition image tokens [B, N, D] on their pose token [B, D] (section 7.2)."""
        for block in self.final_transform:
            tokens = block(tokens, pose_token, rotary)
        return tokens

    @abstractmethod
    def cam(self, levels: Sequence[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Points [B, H, W, 3] in the frame's own camera and their confidence [B, H, W]."""

    @abstractmethod
    def world(
        self, levels: Sequence[Tensor], pose_token: Tensor, rotary: Rotary, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Points [B, H, W, 3] in the segment's frame and their confidence [B, H, W]."""

    @abstractmethod
    def rgb(self, levels: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Colour [B, H, W, 3] in (-1, 1)."""


def patch_pixels(mlp: Mlp, tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Raw channels [B, H, W, C] of the pixels that each of the tokens [B, N, D] holds."""
    p = patch_size
    patches = mlp.forward_fp32_out(tokens).unflatten(2, (-1, p, p)).unflatten(1, grid)
    return patches.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)  # B gh p gw p C


class LinearHead(_Head):
    """One MLP per output; each token holds the pixels of its patch (section 7.4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width, pixels = config.dec_embed_dim, config.patch_size**2
        self.levels = (config.dec_depth,)
        self.patch_size = config.patch_size
        self.proj = Mlp(width, 4 * width, 4 * pixels)
        self.cross_proj = Mlp(width, 4 * width, 4 * pixels)
        self.rgb_proj = Mlp(width, 4 * width, 3 * pixels)

    def last_layers(self) -> list[nn.Module]:
        mlps = (self.pose_head.mlp, self.proj, self.cross_proj, self.rgb_proj)
        return [mlp.fc2 for mlp in mlps]

    def point_outputs(self) -> list[tuple[nn.Linear | nn.Conv2d, int]]:
        pixels = self.patch_size**2
        return [(self.proj.fc2, pixels), (self.cross_proj.fc2, pixels)]

    def cam(self, levels: Sequence[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return points_and_confidence(
            patch_pixels(self.proj, levels[-1], grid, self.patch_size), front_only=True
        )

    def world(
        self, levels: Sequence[Tensor], pose_token: Tensor, rotary: Rotary, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        tokens = self.to_world(levels[-1], pose_token, rotary)
        return points_and_confidence(patch_pixels(self.cross_proj, tokens, grid, self.patch_size))

    def rgb(self, levels: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        return colour(patch_pixels(self.rgb_proj, levels[-1], grid, self.patch_size))


class ResidualConvUnit(nn.Module):
    """Two 3x3 convolutions with pre-activations and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(FUSED_WIDTH, FUSED_WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(FUSED_WIDTH, FUSED_WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(F.relu(x)))) + x


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class RefineNet(nn.Module):
    """Add a finer level to the coarser ones and double the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(FUSED_WIDTH, FUSED_WIDTH, 1)
        self.resConfUnit1 = ResidualConvUnit()  # in refinenet4 it exists, unused
        self.resConfUnit2 = ResidualConvUnit()

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        # A 1x1 convolution commutes with interpolation, whose weights sum to 1: before it,
        # there are four times fewer pixels.
        return _double(self.out_conv(self.resConfUnit2(x)))


class Scratch(nn.Module):
    """Levels to one width, and their fusion from coarse to fine."""

    def __init__(self) -> None:
        super().__init__()
        for level, width in enumerate(LEVEL_WIDTHS, start=1):
            self.add_module(
                f"layer{level}_rn", nn.Conv2d(width, FUSED_WIDTH, 3, padding=1, bias=False)
            )
        for level in range(1, 5):
            self.add_module(f"refinenet{level}", RefineNet())

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        fine = [self.get_submodule(f"layer{i}_rn")(m) for i, m in enumerate(maps, start=1)]
        grid = fine[2].shape[-2:]
        x = self.get_submodule("refinenet4")(fine[3], None)[..., : grid[0], : grid[1]]
        for level in (3, 2, 1):
            x = self.get_submodule(f"refinenet{level}")(x, fine[level - 1])
        return x


class DPTStack(nn.Module):
    """Four token maps to one map of `channels` at 16 times the resolution (section 7.3)."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        e, d = config.enc_embed_dim, config.dec_embed_dim
        w0, w1, w2, w3 = LEVEL_WIDTHS
        self.act_postprocess = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(e, w0, 1), nn.ConvTranspose2d(w0, w0, 4, 4)),
                nn.Sequential(nn.Conv2d(d, w1, 1), nn.ConvTranspose2d(w1, w1, 2, 2)),
                nn.Sequential(nn.Conv2d(d, w2, 1)),
                nn.Sequential(nn.Conv2d(d, w3, 1), nn.Conv2d(w3, w3, 3, 2, 1)),
            ]
        )
        self.scratch = Scratch()
        self.head = nn.Sequential(
            nn.Conv2d(FUSED_WIDTH, 128, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(128, 128, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(128, channels, 1),
        )

    def forward(self, levels: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Levels [B, N, *] to [B, H, W, channels], float32."""
        dtype = next(self.parameters()).dtype
        maps = [
            post(level.to(dtype).unflatten(1, grid).permute(0, 3, 1, 2))
            for post, level in zip(self.act_postprocess, levels, strict=True)
        ]
        x = self.scratch(maps)
        for layer in list(self.head)[:-1]:
            x = layer(x)
        return _conv1x1_fp32(self.last, x).permute(0, 2, 3, 1)

    @property
    def last(self) -> nn.Conv2d:
        """The layer whose output is the stack's."""
        layer = self.head[-1]
        assert isinstance(layer, nn.Conv2d)
        return layer


def _conv1x1_fp32(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 1x1 convolution in float32: an exponential will magnify what comes out."""
    assert layer.bias is not None
    with without_autocast(x):
        return F.conv2d(x.float(), layer.weight.float(), layer.bias.float())


class DPTHead(_Head):
    """Three independent DPT stacks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        depth = config.dec_depth
        self.levels = (0, depth * 2 // 4, depth * 3 // 4, depth)
        self.dpt_self = DPTStack(config, 4)
        self.dpt_cross = DPTStack(config, 4)
        self.dpt_rgb = DPTStack(config, 3)

    def last_layers(self) -> list[nn.Module]:
        stacks = (self.dpt_self, self.dpt_cross, self.dpt_rgb)
        return [self.pose_head.mlp.fc2, *(stack.last for stack in stacks)]

    def point_outputs(self) -> list[tuple[nn.Linear | nn.Conv2d, int]]:
        return [(self.dpt_self.last, 1), (self.dpt_cross.last, 1)]

    def cam(self, levels: Sequence[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return points_and_confidence(self.dpt_self(levels, grid))

    def world(
        self, levels: Sequence[Tensor], pose_token: Tensor, rotary: Rotary, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        tokens = self.to_world(levels[-1], pose_token, rotary)
        return points_and_confidence(self.dpt_cross([*levels[:-1], tokens], grid))

    def rgb(self, levels: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        return colour(self.dpt_rgb(levels, grid))
