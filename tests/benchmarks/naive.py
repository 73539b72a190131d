"""The network as the specification reads literally: what a straightforward port costs.

One frame at a time, float32, every attention map built and those of the decoder kept to the end
of the frame (the gate is their mean), work that cannot matter done all the same, all heads, and
every view and prediction kept on the host. It uses the parameters of a `Model` and nothing else
of its computation, so that agreement with ours says something.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt3r.heads import DPTHead, DPTStack, LinearHead, camera_pose, colour, points_and_confidence
from ttt3r.model import Model, state_positions


def rotate(t: Tensor, positions: Tensor, base: float, *, through_fp16: bool = False) -> Tensor:
    """Rotary embedding of [B, heads, tokens, d] (section 3)."""
    t = t.half().float() if through_fp16 else t
    quarter = t.shape[-1] // 4
    steps = torch.arange(quarter, device=t.device, dtype=torch.float64)
    angle = positions.to(t.device).double()[:, :, None] * base ** (-steps / quarter)
    parts = []
    for axis, half in enumerate(t.chunk(2, dim=-1)):
        cos, sin = angle[:, axis].cos().float(), angle[:, axis].sin().float()
        u, v = half.chunk(2, dim=-1)
        parts += [u * cos - v * sin, v * cos + u * sin]
    turned = torch.cat(parts, dim=-1)
    return turned.half().float() if through_fp16 else turned


def heads_of(x: Tensor, heads: int) -> Tensor:
    """[B, tokens, width] to [B, heads, tokens, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention by its formula; the result [B, tokens, width] and the map of logits."""
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2), logits


@dataclass
class Naive:
    """One stream; `see` takes a frame, `kept` holds all that was ever said of any."""

    model: Model
    rule: str = "ttt3r"
    kept: list[dict[str, Tensor]] = field(default_factory=list)
    state: Tensor | None = None  # [1, S, D]
    memory: Tensor | None = None  # [1, M, 2D]
    maps: list[Tensor] = field(default_factory=list)  # the decoder's, to the end of the frame

    @torch.inference_mode()
    def see(self, image: Tensor) -> dict[str, Tensor]:
        """Predictions of the next frame [3, H, W] in [-1, 1], on the host."""
        m = self.model
        image = image[None].to(m.device)
        p = m.config.patch_size
        grid = (image.shape[2] // p, image.shape[3] // p)
        ys, xs = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
        where = torch.stack((ys.flatten(), xs.flatten()), dim=1)
        features = self._encode(image, where)
        query = m.pose_retriever.proj_q(features.mean(dim=1, keepdim=True))
        first = self.state is None
        state = m.decoder_embed_state(m.register_tokens.weight)[None] if first else self.state
        memory = m.pose_retriever.mem if first else self.memory
        pose = m.pose_token if first else self._recall(query, memory)
        layers, candidate, logits = self._decode(pose, features, state, where)
        out = self._heads(features, layers, where, grid)
        gate = torch.stack([x.mean(dim=(1, 3)) for x in logits]).mean(dim=0).sigmoid()
        rate = torch.ones_like(gate) if first or self.rule == "cut3r" else gate
        self.state = candidate * rate[..., None] + state * (1 - rate[..., None])
        memory = memory.expand(1, -1, -1)
        token = torch.cat((query, layers[-1][:, :1]), dim=-1)
        for block in m.pose_retriever.write_blocks:
            memory = self._block(block, memory, token, None, None)[0]
        self.memory = memory
        self.maps.clear()
        host = {name: x[0].cpu() for name, x in {**out, "image": image, "rate": rate}.items()}
        self.kept.append(host)
        return host

    def _encode(self, image: Tensor, where: Tensor) -> Tensor:
        m, c = self.model, self.model.config
        x = m.patch_embed.proj(image).flatten(2).transpose(1, 2)
        for block in m.enc_blocks:
            x = x + self._self(block, block.norm1(x), where, fp16=c.encoder_rope_fp16)[0]
            x = x + self._mlp(block, block.norm2(x))
        return m.enc_norm(x)

    def _self(
        self, block: nn.Module, x: Tensor, where: Tensor | None, *, fp16: bool = False
    ) -> tuple[Tensor, Tensor]:
        attn = block.attn
        q, k, v = (heads_of(t, attn.heads) for t in attn.qkv(x).chunk(3, dim=-1))
        if where is not None:
            base = self.model.config.rope_base
            q, k = (rotate(t, where, base, through_fp16=fp16) for t in (q, k))
        mixed, logits = attend(q, k, v)
        return attn.proj(mixed), logits

    def _mlp(self, block: nn.Module, x: Tensor) -> Tensor:
        return block.mlp.fc2(F.gelu(block.mlp.fc1(x)))

    def _block(
        self,
        block: nn.Module,
        x: Tensor,
        y: Tensor,
        x_where: Tensor | None,
        y_where: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """A decoder block (section 6.3); also the cross-attention's logits."""
        mixed, own = self._self(block, block.norm1(x), x_where)
        x = x + mixed
        cross, y = block.cross_attn, block.norm_y(y)
        q = heads_of(cross.projq(block.norm2(x)), cross.heads)
        k, v = heads_of(cross.projk(y), cross.heads), heads_of(cross.projv(y), cross.heads)
        if x_where is not None and y_where is not None:
            base = self.model.config.rope_base
            q, k = rotate(q, x_where, base), rotate(k, y_where, base)
        mixed, logits = attend(q, k, v)
        x = x + cross.proj(mixed)
        self.maps += [own, logits]
        return x + self._mlp(block, block.norm3(x)), logits

    def _recall(self, query: Tensor, memory: Tensor) -> Tensor:
        retriever = self.model.pose_retriever
        token = torch.cat((query, retriever.masked_token), dim=-1)
        for block in retriever.read_blocks:
            token = self._block(block, token, memory, None, None)[0]
        return token[..., query.shape[-1] :]

    def _decode(
        self, pose: Tensor, features: Tensor, state: Tensor, where: Tensor
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Image side after each layer, scene tokens proposed, and the state side's maps."""
        m = self.model
        image, scene = torch.cat((pose, m.decoder_embed(features)), dim=1), state
        of_image = torch.cat((torch.tensor([[-1, -1]]), where))
        of_state = state_positions(m.config.state_size)
        layers, gate_logits = [features], []
        for image_block, state_block in zip(m.dec_blocks, m.dec_blocks_state, strict=True):
            (image, _), (scene, logits) = (
                self._block(image_block, image, scene, of_image, of_state),
                self._block(state_block, scene, image, of_state, of_image),
            )
            gate_logits.append(logits)
            layers.append(image)
        layers[-1] = m.dec_norm(image)
        return layers, m.dec_norm_state(scene), gate_logits

    def _heads(
        self, features: Tensor, layers: list[Tensor], where: Tensor, grid: tuple[int, int]
    ) -> dict[str, Tensor]:
        head, tokens = self.model.downstream_head, layers[-1][:, 1:]
        pose = layers[-1][:, 0]
        to_pose = head.pose_head.mlp
        conditioned = tokens
        for block in head.final_transform:
            x = conditioned
            x = x + self._self(block, _modulated(block.norm1, x, pose), where)[0]
            conditioned = x + self._mlp(block, _modulated(block.norm2, x, pose))
        if isinstance(head, DPTHead):
            levels = [features, *(layers[i][:, 1:] for i in head.levels[1:-1])]
            raw = [
                _dpt(stack, [*levels, last], grid)
                for stack, last in (
                    (head.dpt_self, tokens), (head.dpt_cross, conditioned), (head.dpt_rgb, tokens)
                )
            ]  # fmt: skip
        else:
            raw = [
                _pixels(mlp, x, grid, head)
                for mlp, x in (
                    (head.proj, tokens), (head.cross_proj, conditioned), (head.rgb_proj, tokens)
                )
            ]  # fmt: skip
        points, confidence = points_and_confidence(raw[0], front_only=isinstance(head, LinearHead))
        world, world_confidence = points_and_confidence(raw[1])
        return {
            "pointmap_cam": points,
            "confidence": confidence,
            "pointmap_world": world,
            "confidence_world": world_confidence,
            "rgb": colour(raw[2]),
            "camera_pose": camera_pose(to_pose.fc2(F.gelu(to_pose.fc1(pose)))),
        }


def _modulated(norm: nn.Module, x: Tensor, condition: Tensor) -> Tensor:
    shift, scale = norm.mlp(condition)[:, None].chunk(2, dim=-1)
    return norm.norm(x) * (1 + scale) + shift


def _pixels(mlp: nn.Module, tokens: Tensor, grid: tuple[int, int], head: LinearHead) -> Tensor:
    """[1, N, C·P²] to [1, H, W, C] (section 7.4)."""
    raw = mlp.fc2(F.gelu(mlp.fc1(tokens))).transpose(1, 2).unflatten(2, grid)
    return F.pixel_shuffle(raw, head.patch_size).movedim(1, -1)


def _up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


def _rcu(unit: nn.Module, x: Tensor) -> Tensor:
    return unit.conv2(F.relu(unit.conv1(F.relu(x)))) + x


def _dpt(stack: DPTStack, levels: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """[1, H, W, C] by the formulas of section 7.3, in their order."""
    scratch = stack.scratch
    fine = [
        getattr(scratch, f"layer{i}_rn")(post(x.transpose(1, 2).unflatten(2, grid)))
        for i, (post, x) in enumerate(zip(stack.act_postprocess, levels, strict=True), start=1)
    ]
    net = scratch.refinenet4
    x = net.out_conv(_up(_rcu(net.resConfUnit2, fine[3])))[..., : grid[0], : grid[1]]
    for level in (3, 2, 1):
        net = getattr(scratch, f"refinenet{level}")
        x = x + _rcu(net.resConfUnit1, fine[level - 1])
        x = net.out_conv(_up(_rcu(net.resConfUnit2, x)))
    x = stack.head[2](_up(stack.head[0](x)))
    return stack.head[4](F.relu(x)).movedim(1, -1)
