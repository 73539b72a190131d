"""The transformer's parts: rotary embedding, attention, MLP and blocks.

Activations are [B, tokens, channels]. The residual stream and all norms are float32 even when
the weights or autocast are bfloat16; heads are [B, tokens, heads, head_dim] until the attention
itself.
Sections and formulas refer to the model specification.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt3r.fused import KERNELS


class Rotary(NamedTuple):
    """What turns one token by its position: tables for `rotate`, shared by all heads."""

    cos: Tensor  # [tokens, 1, head_dim]
    sin: Tensor  # [tokens, 1, head_dim], the sign of the rotation folded in


def rotary_tables(positions: Tensor, head_dim: int, base: float = 100.0) -> Rotary:
    """Cosines and sines of section 3: θ_j = position · base^(-j/Q), Q = head_dim / 4.

    Args:
        positions: [tokens, 2] (row, column); may be negative.
        head_dim: channels of one head, a multiple of 4.
        base: wavelength base.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim is {head_dim}; the rotary embedding needs a multiple of 4")
    quarter = head_dim // 4
    steps = torch.arange(quarter, device=positions.device, dtype=torch.float64)
    angle = positions.double()[:, :, None] * base ** (-steps / quarter)  # [tokens, 2, Q]
    cos, sin = angle.cos(), angle.sin()
    cos = torch.stack((cos, cos), dim=2).flatten(1)  # [uy | vy | ux | vx]
    sin = torch.stack((-sin, sin), dim=2).flatten(1)
    return Rotary(cos.float()[:, None], sin.float()[:, None])


def rotate(x: Tensor, rotary: Rotary, *, through_fp16: bool = False) -> Tensor:
    """Turn the head vectors `x` [B, tokens, heads, head_dim] by their tokens' positions.

    The arithmetic is float32; `through_fp16` rounds the input and the result to half precision,
    as the reference does in its image encoder. The result has the dtype of `x`.
    """
    if KERNELS.apply_to(x, x.dtype):
        found = KERNELS.rotate(x, rotary.cos, rotary.sin, through_fp16=through_fp16)
        if found is not None:
            return found
    t = x.half().float() if through_fp16 else x.float()
    uy, vy, ux, vx = t.chunk(4, dim=-1)
    swapped = torch.cat((vy, uy, vx, ux), dim=-1)
    turned = torch.addcmul(t * rotary.cos, swapped, rotary.sin)
    return (turned.half() if through_fp16 else turned).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fused softmax attention of [B, tokens, heads, head_dim]; returns [B, tokens, width]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu":
        # There the bfloat16 kernel gains nothing, and its backward is five times slower.
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(v.dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


def _mean_logits(q: Tensor, k: Tensor) -> Tensor:
    """Mean over heads and keys of q·k/sqrt(head_dim), float32 [B, queries]."""
    mean_key = k.float().mean(dim=1, keepdim=True)
    return (q.float() * mean_key).sum(dim=(2, 3)) / (q.shape[2] * q.shape[3] ** 0.5)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with eps 1e-6, float32 from end to end; `Linear` casts what it takes from it."""

    EPS = 1e-6

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=self.EPS)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)

    def rounded_for(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """The same in the type that `layer`, which takes it, works in."""
        dtype = layer.weight.dtype
        if KERNELS.apply_to(x, dtype):
            found = KERNELS.normalise(x, self.weight, self.bias, self.eps, dtype)
            if found is not None:
                return found
        return self(x).to(dtype)


class Linear(nn.Linear):
    """A linear layer that takes its input in any floating type; it works in its weights' own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Where autocast does not act on tensors of the device of `x`."""
    if not torch.amp.is_autocast_available(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply `layer` in float32 whatever its weights' dtype or autocast says."""
    with without_autocast(x):
        return F.linear(x.float(), layer.weight.float(), layer.bias.float())


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, width: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, out or width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))

    def forward_fp32_out(self, x: Tensor) -> Tensor:
        """Same, with the last layer in float32: for values that an exponential will magnify."""
        return linear_fp32(self.fc2, F.gelu(self.fc1(x)))


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection (rows: all q, all k, all v)."""

    def __init__(self, width: int, heads: int, *, rope_fp16: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.rope_fp16 = rope_fp16
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3 * self.heads, -1))  # [B, N, 3h, d]
        qk, v = heads.split((2 * self.heads, self.heads), dim=2)
        if rotary is not None:
            qk = rotate(qk, rotary, through_fp16=self.rope_fp16)
        q, k = qk.chunk(2, dim=2)
        return self.proj(attend(q, k, v))

    def forward_single(self, x: Tensor) -> Tensor:
        """The attention of one token to itself [B, 1, width]: its softmax weight is 1."""
        value = slice(2 * x.shape[-1], None)
        weight, bias = self.qkv.weight[value], self.qkv.bias[value]
        return self.proj(F.linear(x.to(weight.dtype), weight, bias))


class CrossAttention(nn.Module):
    """Multi-head attention of tokens x to tokens y, which come normalised."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projq = Linear(width, width)
        self.projk = Linear(width, width)
        self.projv = Linear(width, width)
        self.proj = Linear(width, width)

    def forward(
        self, x: Tensor, y: Tensor, x_rotary: Rotary, y_rotary: Rotary, *, gate: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; with `gate`, also the mean scaled logit of each query [B, tokens of x].

        The mean goes over all heads and all keys, in float32. Over the keys it commutes with the
        dot product, so no attention map is built (section 6.6).
        """
        q, k, v = self._heads(x, y, x_rotary, y_rotary)
        logits = _mean_logits(q, k) if gate else None
        return self.proj(attend(q, k, v)), logits

    def forward_unrotated(self, x: Tensor, y: Tensor) -> Tensor:
        """Attention without positions."""
        return self.proj(attend(*self._heads(x, y, None, None)))

    def forward_single(self, y: Tensor) -> Tensor:
        """Attention to a single token y [B, 1, width]: the same for every query."""
        return self.proj(self.projv(y))

    def _heads(
        self, x: Tensor, y: Tensor, x_rotary: Rotary | None, y_rotary: Rotary | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = y.to(self.projk.weight.dtype)
        q = self.projq(x).unflatten(-1, (self.heads, -1))
        k = self.projk(y).unflatten(-1, (self.heads, -1))
        v = self.projv(y).unflatten(-1, (self.heads, -1))
        if x_rotary is not None and y_rotary is not None:
            q, k = rotate(q, x_rotary), rotate(k, y_rotary)
        return q, k, v


class EncoderBlock(nn.Module):
    """Self-attention and MLP, both with residuals (section 4)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, rope_fp16: bool) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = SelfAttention(width, heads, rope_fp16=rope_fp16)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        x = x + self.attn(self.norm1.rounded_for(self.attn.qkv, x), rotary)
        return x + self.mlp(self.norm2.rounded_for(self.mlp.fc1, x))


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention to the other side, MLP (section 6.3)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.norm2 = LayerNorm(width)
        self.cross_attn = CrossAttention(width, heads)
        self.norm3 = LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.norm_y = LayerNorm(width)

    def forward(
        self, x: Tensor, y: Tensor, x_rotary: Rotary, y_rotary: Rotary, *, gate: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The new x; with `gate`, also the mean cross-attention logit of each token of x."""
        x = x + self.attn(self.norm1.rounded_for(self.attn.qkv, x), x_rotary)
        crossed, logits = self.cross_attn(
            self.norm2.rounded_for(self.cross_attn.projq, x),
            self.norm_y.rounded_for(self.cross_attn.projk, y),
            x_rotary, y_rotary, gate=gate,
        )  # fmt: skip
        x = x + crossed
        return x + self.mlp(self.norm3.rounded_for(self.mlp.fc1, x)), logits


class ModulatedNorm(nn.Module):
    """LayerNorm whose scale and shift come from a conditioning vector (section 7.2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.mlp = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.mlp(condition)[:, None].chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class ModulatedBlock(nn.Module):
    """Encoder block with modulated norms: `condition` is [B, width]."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = ModulatedNorm(width)
        self.attn = SelfAttention(width, heads)
        self.norm2 = ModulatedNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, condition: Tensor, rotary: Rotary) -> Tensor:
        x = x + self.attn(self.norm1(x, condition), rotary)
        return x + self.mlp(self.norm2(x, condition))


class PatchEmbed(nn.Module):
    """Cut images [B, C, H, W] into patches and embed each: [B, N, width], row by row."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.proj(images.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
        return tokens.float().contiguous()
