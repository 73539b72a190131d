"""The network: encode -> recall pose -> decode -> update -> heads, over frames of L lanes.

One loop, `Model.run`, serves whole sequences, streaming and training. What does not depend on
other frames is batched over lanes and frames; only memory, decoder and state go frame by frame.
Sections refer to the model specification.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ttt3r import heads
from ttt3r.config import ModelConfig
from ttt3r.layers import (
    DecoderBlock,
    EncoderBlock,
    LayerNorm,
    PatchEmbed,
    Rotary,
    linear_fp32,
    rotary_tables,
)
from ttt3r.memory import PoseMemory
from ttt3r.state import Proposal, State, UpdateRule, blend, find_rule

OUTPUTS = frozenset({"cam", "world", "rgb", "trace"})
_RAY_CHANNELS, _RAY_DEPTH = 6, 2


@dataclass(frozen=True)
class Trace:
    """What happens inside, frame by frame; for parity checks and diagnosis."""

    tokens: Tensor  # [L, T, S, D] scene tokens after the frame (and its reset)
    pose_memory: Tensor  # [L, T, M, 2D] pose memory after the frame (and its reset)
    candidate: Tensor  # [L, T, S, D] scene tokens that the decoder proposes
    gate_logits: Tensor  # [L, T, S] mean state-to-image attention logit
    pose_token_in: Tensor  # [L, T, D]
    pose_token_out: Tensor  # [L, T, D]


@dataclass(frozen=True)
class Predictions:
    """What the model says of T frames in L lanes; None where `outputs` did not ask.

    Axes are right-down-forward. Metres are the model's estimate. Segment frame: the camera of
    the first frame since the last reset.
    """

    camera_pose: Tensor  # [L, T, 7] camera to segment: translation, quaternion wxyz
    descriptor: Tensor  # [L, T, E] mean encoder feature
    rate: Tensor  # [L, T, S] learning rate applied to each scene token
    pointmap_cam: Tensor | None = None  # [L, T, H, W, 3] points in the frame's own camera
    confidence: Tensor | None = None  # [L, T, H, W] of pointmap_cam, >= 1
    pointmap_world: Tensor | None = None  # [L, T, H, W, 3] points in the segment frame
    confidence_world: Tensor | None = None  # [L, T, H, W] of pointmap_world, >= 1
    rgb: Tensor | None = None  # [L, T, H, W, 3] colour in (-1, 1)
    trace: Trace | None = None

    @staticmethod
    def concatenate(parts: list[Predictions]) -> Predictions:
        """Join predictions of successive frames."""
        return parts[0] if len(parts) == 1 else _join(parts)


def _join(parts: list[Any]) -> Any:
    """Field by field: tensors along the frames, None as it is, nested records alike."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, dim=1)
    cls = type(parts[0])
    return cls(**{f.name: _join([getattr(p, f.name) for p in parts]) for f in fields(cls)})


@dataclass(frozen=True)
class Encoded:
    """What a frame gives independently of all others."""

    features: Tensor  # [L, T, N, E]
    descriptor: Tensor  # [L, T, E]
    query: Tensor  # [L, T, D] asks the pose memory
    embedded: Tensor  # [L, T, N, D] features in the decoder's width


class Decoded(NamedTuple):
    """One pass of the dual decoder."""

    candidate: Tensor  # [L, S, D]
    layers: dict[int, Tensor]  # image side [L, 1 + N, D] after the layers that the head reads
    gate_logits: Tensor | None  # [L, S]

    @property
    def pose(self) -> Tensor:
        """The pose token that leaves the decoder [L, 1, D]."""
        return self.layers[max(self.layers)][:, :1]


class _Step(NamedTuple):
    """One frame of all lanes."""

    decoded: Decoded
    pose_in: Tensor  # [L, 1, D]
    rate: Tensor  # [L, S]
    tokens: Tensor  # [L, S, D] after the frame
    memory: Tensor  # [L, M, 2D] after the frame


class _Positions(NamedTuple):
    """Rotary tables; `_by_state` and `_by_image` name the heads that are turned."""

    encoder: Rotary  # patches, encoder heads
    patches: Rotary  # patches, image-side heads
    image_by_image: Rotary  # pose token and patches, image-side heads
    image_by_state: Rotary  # pose token and patches, state-side heads
    state_by_image: Rotary
    state_by_state: Rotary


@dataclass(frozen=True)
class _Flags:
    """Which lanes start, learn and reset at each frame [T, L].

    The copies on the host choose branches without waiting for the device.
    """

    first: np.ndarray  # [T + 1, L] bool; the last row is for the frame after
    update: np.ndarray
    reset: np.ndarray
    first_on_device: Tensor
    update_on_device: Tensor
    reset_on_device: Tensor

    @classmethod
    def build(
        cls, first: Tensor, shape: tuple[int, int], update: Any, reset: Any, device: Any
    ) -> _Flags:
        learns = _as_flags("update", update, shape, default=True)
        resets = _as_flags("reset", reset, shape, default=False)
        starts = np.concatenate((first.cpu().numpy()[None], resets))
        host = (starts, learns, resets)
        return cls(*host, *(torch.from_numpy(f).to(device, non_blocking=True) for f in host))


def _as_flags(name: str, given: Any, shape: tuple[int, int], *, default: bool) -> np.ndarray:
    """[L, T] flags of any kind as [T, L] bool on the host."""
    if given is None:
        return np.full(shape[::-1], default)
    flags = given.cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if flags.shape != shape or flags.dtype != bool:
        raise ValueError(
            f"{name} is {flags.dtype} {flags.shape}; expected bool [lanes, frames] = {shape}"
        )
    return np.ascontiguousarray(flags.T)


class Model(nn.Module):
    """CUT3R's network; parameter names are those of the published checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.pose_token = nn.Parameter(torch.zeros(1, 1, c.dec_embed_dim))
        self.patch_embed = PatchEmbed(3, c.enc_embed_dim, c.patch_size)
        self.enc_blocks = nn.ModuleList(
            EncoderBlock(
                c.enc_embed_dim, c.enc_num_heads, c.mlp_ratio, rope_fp16=c.encoder_rope_fp16
            )
            for _ in range(c.enc_depth)
        )
        self.enc_norm = LayerNorm(c.enc_embed_dim)
        if c.ray_map_encoder:
            self._add_ray_map_encoder()
        self.register_tokens = nn.Embedding(c.state_size, c.enc_embed_dim)
        self.decoder_embed_state = nn.Linear(c.enc_embed_dim, c.dec_embed_dim)
        self.decoder_embed = nn.Linear(c.enc_embed_dim, c.dec_embed_dim)
        self.pose_retriever = PoseMemory(c)
        self.dec_blocks = nn.ModuleList(
            DecoderBlock(c.dec_embed_dim, c.dec_num_heads, c.mlp_ratio) for _ in range(c.dec_depth)
        )
        self.dec_norm = LayerNorm(c.dec_embed_dim)
        self.dec_blocks_state = nn.ModuleList(
            DecoderBlock(c.dec_embed_dim, c.state_dec_num_heads, c.mlp_ratio)
            for _ in range(c.dec_depth)
        )
        self.dec_norm_state = LayerNorm(c.dec_embed_dim)
        self.downstream_head: heads.DPTHead | heads.LinearHead = (
            heads.DPTHead(c) if c.head_type == "dpt" else heads.LinearHead(c)
        )
        self._positions_of: dict[tuple[int, int, str], _Positions] = {}
        self._initialise()
        self.register_load_state_dict_pre_hook(_drop_aliases)

    # -- what a caller uses ----------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.pose_token.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.pose_token.dtype

    def initial_state(self, lanes: int) -> State:
        """The state before any frame (section 5): a constant of the weights."""
        tokens = linear_fp32(self.decoder_embed_state, self.register_tokens.weight)
        memory = self.pose_retriever.mem.float()
        return State(
            tokens[None].expand(lanes, -1, -1),
            memory.expand(lanes, -1, -1),
            torch.ones(lanes, dtype=torch.bool),
        )

    def run(
        self,
        images: Tensor,
        state: State | None = None,
        *,
        rule: str = "ttt3r",
        update: Tensor | np.ndarray | None = None,
        reset: Tensor | np.ndarray | None = None,
        outputs: Set[str] = frozenset({"cam"}),
    ) -> tuple[Predictions, State]:
        """Let L independent streams see T more frames each.

        Differentiable. Lanes never influence one another.

        Args:
            images: [L, T, 3, H, W] in [-1, 1]; sides are multiples of the patch size.
            state: what the lanes remember; None starts all of them.
            rule: name in `state.UPDATE_RULES`.
            update: [L, T] bool, False keeps the state as it was; None is all True.
            reset: [L, T] bool, True forgets everything after the frame; None is all False.
            outputs: any of "cam", "world", "rgb", "trace"; what is not asked for is not
                computed.

        Returns:
            The predictions of these frames, and the state after them.
        """
        lanes, frames, grid = self._check(images, outputs)
        chosen = find_rule(rule)
        gate = chosen.uses_gate or "trace" in outputs
        start = self.initial_state(lanes)
        state = start if state is None else _checked_state(state, start)
        flags = _Flags.build(state.first, (lanes, frames), update, reset, images.device)

        encoded = self.encode(images)
        positions = self._positions(grid, images.device)
        steps: list[_Step] = []
        tokens, memory = state.tokens, state.pose_memory
        for t in range(frames):
            step = self._step(t, encoded, tokens, memory, flags, chosen, positions, gate)
            # Forget after the frame: the next one starts a stream.
            tokens = _choose(flags.reset, flags.reset_on_device, t, start.tokens, step.tokens)
            memory = _choose(flags.reset, flags.reset_on_device, t, start.pose_memory, step.memory)
            steps.append(step._replace(tokens=tokens, memory=memory))
        after = State(tokens, memory, torch.from_numpy(flags.first[-1].copy()))
        return self._predict(encoded, steps, positions, grid, outputs), after

    def encode(self, images: Tensor) -> Encoded:
        """Everything that a frame gives by itself, all frames at once (section 4).

        Args:
            images: [L, T, 3, H, W] in [-1, 1].
        """
        lead, p = images.shape[:2], self.config.patch_size
        grid = (images.shape[-2] // p, images.shape[-1] // p)
        rotary = self._positions(grid, images.device).encoder
        x = self.patch_embed(images.flatten(0, 1))  # [L·T, N, E]
        for block in self.enc_blocks:
            x = block(x, rotary)
        features = self.enc_norm(x)
        descriptor = features.float().mean(dim=1)
        query = self.pose_retriever.query(descriptor)
        embedded = self.decoder_embed(features).float()
        return Encoded(
            *(part.unflatten(0, lead) for part in (features, descriptor, query, embedded))
        )

    def decode(
        self, pose: Tensor, embedded: Tensor, tokens: Tensor, positions: _Positions, *, gate: bool
    ) -> Decoded:
        """The dual decoder (section 6.2): both sides read the other's previous layer.

        Args:
            pose: [L, 1, D] pose token.
            embedded: [L, N, D] image tokens.
            tokens: [L, S, D] scene tokens.
            positions: rotary tables.
            gate: whether to compute the gate's logits.
        """
        image, scene = torch.cat((pose, embedded), dim=1), tokens
        wanted, layers, logits = self.downstream_head.levels, {}, []
        blocks = zip(self.dec_blocks, self.dec_blocks_state, strict=True)
        for index, (image_block, state_block) in enumerate(blocks, start=1):
            (image, _), (scene, logit) = (
                image_block(image, scene, positions.image_by_image, positions.state_by_image),
                state_block(
                    scene, image, positions.state_by_state, positions.image_by_state, gate=gate
                ),
            )
            logits.append(logit)
            if index in wanted:
                layers[index] = image
        layers[len(self.dec_blocks)] = self.dec_norm(image).float()
        gate_logits = torch.stack(logits).mean(dim=0) if gate else None
        return Decoded(self.dec_norm_state(scene).float(), layers, gate_logits)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take all weights from `tensors`, which must hold exactly the model's names and shapes.

        Names that the checkpoints use for a second copy (`scratch.layer_rn.*`) are accepted.
        A model built on the meta device takes the tensors themselves, others copy the values.

        Raises:
            ValueError: naming every missing, unexpected and misshapen tensor; nothing is loaded.
        """
        given = dict(tensors)
        _drop_aliases(self, given, "")
        _check_names_and_shapes(given, dict(self.named_parameters()))
        is_meta = self.device.type == "meta"
        dtype = self.dtype
        self.load_state_dict(
            {k: v.to(dtype) for k, v in given.items()} if is_meta else given, assign=is_meta
        )

    # -- one frame ---------------------------------------------------------------------------

    def _step(
        self,
        t: int,
        encoded: Encoded,
        tokens: Tensor,
        memory: Tensor,
        flags: _Flags,
        rule: UpdateRule,
        positions: _Positions,
        gate: bool,
    ) -> _Step:
        """Frame `t`: recall its pose, decode, learn (section 6)."""
        query = encoded.query[:, t, None]
        pose = self._recall(t, query, memory, flags)
        decoded = self.decode(pose, encoded.embedded[:, t], tokens, positions, gate=gate)
        proposal = Proposal(
            tokens, decoded.candidate, decoded.gate_logits, flags.first_on_device[t]
        )
        rate = _learning_rate(t, rule, proposal, flags)
        written = self.pose_retriever.write(memory, query, decoded.pose)
        return _Step(
            decoded,
            pose,
            rate,
            tokens=blend(tokens, decoded.candidate, rate),
            memory=_choose(flags.update, flags.update_on_device, t, written, memory),
        )

    def _recall(self, t: int, query: Tensor, memory: Tensor, flags: _Flags) -> Tensor:
        """The pose token that enters the decoder [L, 1, D] (section 6.1)."""
        fresh = self.pose_token.float().expand_as(query)
        if flags.first[t].all():
            return fresh
        recalled = self.pose_retriever.read(query, memory)
        return _choose(flags.first, flags.first_on_device, t, fresh, recalled)

    # -- all frames --------------------------------------------------------------------------

    def _predict(
        self,
        encoded: Encoded,
        steps: list[_Step],
        positions: _Positions,
        grid: tuple[int, int],
        outputs: Set[str],
    ) -> Predictions:
        """Run the heads on all lanes and frames at once (section 7)."""
        lead = (steps[0].rate.shape[0], len(steps))
        head = self.downstream_head
        pose_token = _over_time([s.decoded.pose[:, 0] for s in steps])  # [L, T, D]
        flat_pose = pose_token.flatten(0, 1)
        parts: dict[str, Tensor] = {"camera_pose": heads.camera_pose(head.pose_head(flat_pose))}
        if outputs & {"cam", "world", "rgb"}:
            levels = [self._level(i, encoded, steps) for i in head.levels]  # each [L·T, N, *]
        if "cam" in outputs:
            parts["pointmap_cam"], parts["confidence"] = head.cam(levels, grid)
        if "world" in outputs:
            parts["pointmap_world"], parts["confidence_world"] = head.world(
                levels, flat_pose, positions.patches, grid
            )
        if "rgb" in outputs:
            parts["rgb"] = head.rgb(levels, grid)
        return Predictions(
            descriptor=encoded.descriptor,
            rate=_over_time([s.rate for s in steps]),
            trace=_trace(steps, pose_token) if "trace" in outputs else None,
            **{name: part.unflatten(0, lead) for name, part in parts.items()},
        )

    def _level(self, index: int, encoded: Encoded, steps: list[_Step]) -> Tensor:
        """Image tokens after decoder layer `index`, the pose token left out: [L·T, N, *]."""
        if index == 0:
            return encoded.features.flatten(0, 1)
        return _over_time([s.decoded.layers[index][:, 1:] for s in steps]).flatten(0, 1)

    def _positions(self, grid: tuple[int, int], device: torch.device) -> _Positions:
        """Rotary tables for a grid of patches; kept, as a drive has one grid."""
        key = (*grid, str(device))
        if key not in self._positions_of:
            with torch.inference_mode(False):  # training may meet the tables after inference
                self._positions_of[key] = _rotary_tables(self.config, grid, device)
        return self._positions_of[key]

    # -- checks and initial values -----------------------------------------------------------

    def _check(self, images: Tensor, outputs: Set[str]) -> tuple[int, int, tuple[int, int]]:
        """Lanes, frames and the grid of patches."""
        patch = self.config.patch_size
        if images.ndim != 5 or images.shape[2] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}; expected floats "
                "[lanes, frames, 3, H, W] in [-1, 1] (see images.normalise)"
            )
        lanes, frames, _, height, width = images.shape
        if not lanes or not frames or not height or not width or height % patch or width % patch:
            raise ValueError(
                f"{lanes} lanes of {frames} frames of {width}x{height} pixels: needs at least one "
                f"of each, and sides that are multiples of the patch size, {patch}"
            )
        if outputs - OUTPUTS:
            raise ValueError(
                f"unknown outputs {sorted(outputs - OUTPUTS)}; known: {sorted(OUTPUTS)}"
            )
        return lanes, frames, (height // patch, width // patch)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Random weights to train from: Xavier's variance; heads see to their last layers."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(module.weight)
                nn.init.trunc_normal_(module.weight, std=(2 / (fan_in + fan_out)) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        retriever = self.pose_retriever
        for token in (self.pose_token, retriever.masked_token, retriever.mem):
            nn.init.trunc_normal_(token, std=0.02)
        nn.init.trunc_normal_(self.register_tokens.weight, std=0.02)
        self.downstream_head.initialise_outputs()

    def _add_ray_map_encoder(self) -> None:
        """Weights that checkpoints hold for known cameras; images never use them."""
        c = self.config
        self.masked_img_token = nn.Parameter(torch.zeros(1, c.enc_embed_dim))
        self.masked_ray_map_token = nn.Parameter(torch.zeros(1, c.enc_embed_dim))
        self.patch_embed_ray_map = PatchEmbed(_RAY_CHANNELS, c.enc_embed_dim, c.patch_size)
        self.enc_blocks_ray_map = nn.ModuleList(
            EncoderBlock(c.enc_embed_dim, c.enc_num_heads, c.mlp_ratio, rope_fp16=False)
            for _ in range(_RAY_DEPTH)
        )
        self.enc_norm_ray_map = LayerNorm(c.enc_embed_dim)


def _choose(host: np.ndarray, on_device: Tensor, t: int, yes: Tensor, no: Tensor) -> Tensor:
    """For each lane, `yes` where its flag at frame `t` is set, else `no`; both [L, *, *]."""
    if host[t].all():
        return yes
    if not host[t].any():
        return no
    return torch.where(on_device[t][:, None, None], yes, no)


def _learning_rate(t: int, rule: UpdateRule, proposal: Proposal, flags: _Flags) -> Tensor:
    """How far each scene token moves [L, S]: all the way at first, not at all without update."""
    rate = rule.rate(proposal)
    if flags.first[t].any():  # the initial tokens are not normalised: overwrite them
        rate = rate.masked_fill(flags.first_on_device[t][:, None], 1.0)
    if not flags.update[t].all():
        rate = rate.masked_fill(~flags.update_on_device[t][:, None], 0.0)
    return rate


def _over_time(tensors: list[Tensor]) -> Tensor:
    """[L, *] of each frame to [L, T, *]."""
    return torch.stack(tensors, dim=1)


def _trace(steps: list[_Step], pose_token_out: Tensor) -> Trace:
    logits = [s.decoded.gate_logits for s in steps]
    return Trace(
        tokens=_over_time([s.tokens for s in steps]),
        pose_memory=_over_time([s.memory for s in steps]),
        candidate=_over_time([s.decoded.candidate for s in steps]),
        gate_logits=_over_time([g for g in logits if g is not None]),
        pose_token_in=_over_time([s.pose_in[:, 0] for s in steps]),
        pose_token_out=pose_token_out,
    )


def state_positions(count: int) -> Tensor:
    """(row, column) of each scene token [count, 2]; rows are even and near square (section 3)."""
    width = int(count**0.5)
    width += width % 2
    index = torch.arange(count)
    return torch.stack((index // width, index % width), dim=1)


def _rotary_tables(config: ModelConfig, grid: tuple[int, int], device: torch.device) -> _Positions:
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    patches = torch.stack((rows.flatten(), columns.flatten()), dim=1)
    image = torch.cat((torch.tensor([[-1, -1]]), patches))  # the pose token comes first
    state = state_positions(config.state_size)
    encoder_dim = config.enc_embed_dim // config.enc_num_heads
    image_dim = config.dec_embed_dim // config.dec_num_heads
    state_dim = config.dec_embed_dim // config.state_dec_num_heads

    def table(positions: Tensor, head_dim: int) -> Rotary:
        return rotary_tables(positions.to(device), head_dim, config.rope_base)

    return _Positions(
        encoder=table(patches, encoder_dim),
        patches=table(patches, image_dim),
        image_by_image=table(image, image_dim),
        image_by_state=table(image, state_dim),
        state_by_image=table(state, image_dim),
        state_by_state=table(state, state_dim),
    )


def _checked_state(state: State, start: State) -> State:
    """`state` as the loop wants it; ValueError if it is not of this model and these lanes."""
    for name in ("tokens", "pose_memory", "first"):
        found, expected = getattr(state, name).shape, getattr(start, name).shape
        if found != expected:
            raise ValueError(
                f"the state's {name} is {tuple(found)}; this model and these images need "
                f"{tuple(expected)}"
            )
    device = start.tokens.device
    return State(state.tokens.to(device).float(), state.pose_memory.to(device).float(), state.first)


def _drop_aliases(module: nn.Module, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
    """Forget the second name of a tensor; use it where the first one is missing."""
    for name in list(tensors):
        if heads.canonical_name(name) != name:
            tensors.setdefault(heads.canonical_name(name), tensors[name])
            del tensors[name]


def _check_names_and_shapes(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    problems = [f"missing {name}" for name in expected if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in expected]
    problems += [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(
            f"{len(problems)} tensors do not fit the model's configuration: " + "; ".join(problems)
        )
