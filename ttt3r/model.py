"""The network: encode -> recall pose -> decode -> update -> heads, over frames of L lanes.

`Model.run` serves whole sequences, streaming and training. What does not depend on other frames
is batched over lanes and frames (`encode`, `predict`); only memory, decoder and state go frame by
frame (`decode`, one `step` a frame).
Sections refer to the model specification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, fields
from functools import partial
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
    Linear,
    PatchEmbed,
    Rotary,
    linear_fp32,
    rotary_tables,
)
from ttt3r.memory import PoseMemory
from ttt3r.recording import Recordings, beside, can_record, joined
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

    grid: tuple[int, int]  # rows and columns of patches, N in all
    features: Tensor  # [L, T, N, E]
    descriptor: Tensor  # [L, T, E]
    query: Tensor  # [L, T, D] asks the pose memory
    embedded: Tensor  # [L, T, N, D] features in the decoder's width


@dataclass(frozen=True)
class Decoded:
    """What the sequential part says of T frames, for the heads."""

    levels: tuple[Tensor, ...]  # [L, T, N, D] image tokens after each decoder layer of the head's
    pose: Tensor  # [L, T, D] the pose token that leaves the decoder
    rate: Tensor  # [L, T, S]
    trace: Trace | None


class Step(NamedTuple):
    """One frame of all lanes through memory, decoder and update."""

    layers: tuple[Tensor, ...]  # [L, 1 + N, D] image side after each layer that the head reads
    tokens: Tensor  # [L, S, D] after the frame
    memory: Tensor  # [L, M, 2D] after the frame
    rate: Tensor  # [L, S]
    pose_in: Tensor  # [L, 1, D] the pose token that enters the decoder
    candidate: Tensor  # [L, S, D]
    gate_logits: Tensor | None  # [L, S]


class Positions(NamedTuple):
    """Rotary tables; `_by_state` and `_by_image` name the heads that are turned."""

    encoder: Rotary  # patches, encoder heads
    patches: Rotary  # patches, image-side heads
    image_by_image: Rotary  # pose token and patches, image-side heads
    image_by_state: Rotary  # pose token and patches, state-side heads
    state_by_image: Rotary
    state_by_state: Rotary


@dataclass(frozen=True)
class _Flags:
    """Which lanes start, learn and reset at each frame."""

    first: Tensor  # [T + 1, L] bool, on the device; the last row is for the frame after
    update: Tensor  # [T, L] bool, on the device
    reset: np.ndarray  # [T, L] bool, on the host: resets are rare, and nobody waits to hear of one

    @classmethod
    def build(
        cls, first: Tensor, shape: tuple[int, int], update: Any, reset: Any, device: torch.device
    ) -> _Flags:
        lanes, frames = shape
        learns = np.ascontiguousarray(as_flags("update", update, shape, default=True).T)
        resets = np.ascontiguousarray(as_flags("reset", reset, shape, default=False).T)
        if update is None and reset is None and bool(first.all()):
            # Made where they are used: a recording must not read the host's memory.
            starts = torch.zeros(frames + 1, lanes, dtype=torch.bool, device=device)
            starts[0].fill_(True)
            return cls(starts, torch.ones_like(starts[1:]), resets)
        first_rows = np.concatenate((first.cpu().numpy()[None], resets))
        return cls(_to_device(first_rows, device), _to_device(learns, device), resets)


def _to_device(flags: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(flags).to(device, non_blocking=True)


def as_flags(name: str, given: Any, shape: tuple[int, int], *, default: bool) -> np.ndarray:
    """Flags [L, T] of any kind as bool on the host; None is `default` throughout."""
    if given is None:
        return np.full(shape, default)
    flags = given.cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if flags.shape != shape or flags.dtype != bool:
        raise ValueError(
            f"{name} is {flags.dtype} {flags.shape}; expected bool [lanes, frames] = {shape}"
        )
    return flags


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
        self.decoder_embed_state = Linear(c.enc_embed_dim, c.dec_embed_dim)
        self.decoder_embed = Linear(c.enc_embed_dim, c.dec_embed_dim)
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
        self._positions_of: dict[tuple[int, int, str], Positions] = {}
        self.records_steps = True  # on a GPU, in inference: one launch for a whole step
        self._recordings = Recordings("decoder steps")
        self._initialise()
        self.register_load_state_dict_pre_hook(_drop_aliases)

    # -- what a caller uses ----------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.pose_token.device

    @property
    def dtype(self) -> torch.dtype:
        """Type that the layers work in; see `set_precision`."""
        return self.patch_embed.proj.weight.dtype

    def set_precision(self, dtype: torch.dtype) -> Model:
        """Hold the weights in `dtype`, except where its rounding would show: those in float32.

        Exempt are the norms, the learnt tokens, and the layers whose output an exponential
        magnifies; together 0.3 % of the released weights.
        """
        exempt = self._float32_parameters()
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if name in exempt else dtype)
        self._recordings = Recordings("decoder steps")  # those before read the weights before
        return self

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
        self._check(images, outputs)
        encoded = self.encode(images)
        decoded, after = self.decode(
            encoded, state, rule=rule, update=update, reset=reset, trace="trace" in outputs
        )
        return self.predict(encoded, decoded, outputs), after

    def encode(self, images: Tensor) -> Encoded:
        """Everything that a frame gives by itself, all frames at once (section 4).

        Args:
            images: [L, T, 3, H, W] in [-1, 1].
        """
        lead, p = images.shape[:2], self.config.patch_size
        grid = (images.shape[-2] // p, images.shape[-1] // p)
        rotary = self.positions(grid, images.device).encoder
        x = self.patch_embed(images.flatten(0, 1))  # [L·T, N, E]
        for block in self.enc_blocks:
            x = block(x, rotary)
        features = self.enc_norm(x)
        descriptor = features.mean(dim=1)
        query = self.pose_retriever.query(descriptor)
        embedded = self.decoder_embed(features).float()
        parts = (features, descriptor, query, embedded)
        return Encoded(grid, *(part.unflatten(0, lead) for part in parts))

    def decode(
        self,
        encoded: Encoded,
        state: State | None = None,
        *,
        rule: str = "ttt3r",
        update: Tensor | np.ndarray | None = None,
        reset: Tensor | np.ndarray | None = None,
        trace: bool = False,
    ) -> tuple[Decoded, State]:
        """Frame by frame through memory, decoder and state (section 6); arguments as in `run`."""
        lanes, frames = encoded.query.shape[:2]
        start = self.initial_state(lanes)
        state = start if state is None else _checked_state(state, start)
        flags = _Flags.build(state.first, (lanes, frames), update, reset, start.tokens.device)
        advance = self._advance(encoded.grid, lanes, rule, trace=trace)
        kept: list[tuple[tuple[Tensor, ...], Tensor]] = []  # all that heads need of a frame
        steps: list[Step] = []
        tokens, memory = state.tokens, state.pose_memory
        for t in range(frames):
            step = advance(
                encoded.query[:, t, None],
                encoded.embedded[:, t],
                tokens,
                memory,
                flags.first[t],
                flags.update[t],
            )
            tokens, memory = step.tokens, step.memory
            if flags.reset[t].any():  # forget after the frame: the next one starts a stream
                forgets = flags.first[t + 1][:, None, None]
                tokens = torch.where(forgets, start.tokens, tokens)
                memory = torch.where(forgets, start.pose_memory, memory)
            kept.append((step.layers, step.rate))
            if trace:
                steps.append(step._replace(tokens=tokens, memory=memory))
        first = torch.from_numpy(flags.reset[-1].copy())
        return _collect(kept, steps), State(tokens, memory, first)

    def step(
        self,
        query: Tensor,
        embedded: Tensor,
        tokens: Tensor,
        memory: Tensor,
        first: Tensor,
        update: Tensor,
        *,
        rule: UpdateRule,
        positions: Positions,
        gate: bool,
        side: torch.cuda.Stream | None = None,
    ) -> Step:
        """One frame of all lanes: recall its pose, decode, learn (section 6).

        Tensors in, tensors out: nothing here waits for the device or depends on values, so the
        whole step can be recorded and replayed.

        Args:
            query: [L, 1, D] asks the pose memory.
            embedded: [L, N, D] image tokens.
            tokens: [L, S, D] scene tokens.
            memory: [L, M, 2D] pose memory.
            first: [L] bool, the frame starts a stream.
            update: [L] bool, the frame changes the state.
            rule: how fast scene tokens learn.
            positions: rotary tables of the grid.
            gate: whether to compute the gate's logits.
            side: lets the state side of each decoder layer run beside the image side.
        """
        recalled = self.pose_retriever.read(query, memory)
        pose = torch.where(first[:, None, None], self.pose_token.float(), recalled)
        layers, candidate, logits = self._dual_decoder(
            pose, embedded, tokens, positions, gate=gate, side=side
        )
        rate = rule.rate(Proposal(tokens, candidate, logits, first))
        rate = rate.masked_fill(first[:, None], 1.0)  # initial tokens are not normalised: overwrite
        rate = rate.masked_fill(~update[:, None], 0.0)
        written = self.pose_retriever.write(memory, query, layers[-1][:, :1])
        return Step(
            layers,
            tokens=blend(tokens, candidate, rate),
            memory=torch.where(update[:, None, None], written, memory),
            rate=rate,
            pose_in=pose,
            candidate=candidate,
            gate_logits=logits,
        )

    def predict(self, encoded: Encoded, decoded: Decoded, outputs: Set[str]) -> Predictions:
        """Run the heads on all lanes and frames at once (section 7); `outputs` as in `run`."""
        lead, grid, head = decoded.rate.shape[:2], encoded.grid, self.downstream_head
        pose = decoded.pose.flatten(0, 1)
        parts: dict[str, Tensor] = {"camera_pose": heads.camera_pose(head.pose_head(pose))}
        levels = [level.flatten(0, 1) for level in decoded.levels]  # [L·T, N, *]
        if 0 in head.levels:
            levels.insert(0, encoded.features.flatten(0, 1))
        if "cam" in outputs:
            parts["pointmap_cam"], parts["confidence"] = head.cam(levels, grid)
        if "world" in outputs:
            rotary = self.positions(grid, pose.device).patches
            parts["pointmap_world"], parts["confidence_world"] = head.world(
                levels, pose, rotary, grid
            )
        if "rgb" in outputs:
            parts["rgb"] = head.rgb(levels, grid)
        return Predictions(
            descriptor=encoded.descriptor,
            rate=decoded.rate,
            trace=decoded.trace,
            **{name: part.unflatten(0, lead) for name, part in parts.items()},
        )

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
        if is_meta:
            given = {name: given[name].to(p.dtype) for name, p in self.named_parameters()}
        self.load_state_dict(given, assign=is_meta)

    def positions(self, grid: tuple[int, int], device: torch.device) -> Positions:
        """Rotary tables for a grid of patches; kept, as a drive has one grid."""
        key = (*grid, str(device))
        if key not in self._positions_of:
            with torch.inference_mode(False):  # training may meet the tables after inference
                self._positions_of[key] = _rotary_tables(self.config, grid, device)
        return self._positions_of[key]

    # -- parts -------------------------------------------------------------------------------

    def _advance(
        self, grid: tuple[int, int], lanes: int, rule: str, *, trace: bool
    ) -> Callable[..., Step]:
        """`step` with its settings, on a GPU as a recording unless its inside is wanted too."""
        device, chosen = self.pose_token.device, find_rule(rule)
        step = partial(
            self.step,
            rule=chosen,
            positions=self.positions(grid, device),
            gate=trace or chosen.uses_gate,
        )
        if trace or not self.records_steps or not can_record(device):
            return step
        key = (grid, lanes, rule, self.dtype, self.pose_token.data_ptr())
        return lambda *arguments: self._recordings.call(key, step, arguments)

    def _dual_decoder(
        self,
        pose: Tensor,
        embedded: Tensor,
        tokens: Tensor,
        positions: Positions,
        *,
        gate: bool,
        side: torch.cuda.Stream | None,
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        """Both sides read the other's previous layer (section 6.2).

        Returns:
            The image side [L, 1 + N, D] after each layer that the head reads, the scene tokens
            [L, S, D] proposed, and with `gate` the gate's logits [L, S].
        """
        image, scene = torch.cat((pose, embedded), dim=1), tokens
        layers, logits = [], []
        blocks = zip(self.dec_blocks, self.dec_blocks_state, strict=True)
        for index, (image_block, state_block) in enumerate(blocks, start=1):
            with beside(side):
                proposed, logit = state_block(
                    scene, image, positions.state_by_state, positions.image_by_state, gate=gate
                )
            image, _ = image_block(image, scene, positions.image_by_image, positions.state_by_image)
            joined(side)
            scene = proposed
            logits.append(logit)
            if index in self.downstream_head.levels[:-1]:
                layers.append(image)
        layers.append(self.dec_norm(image))
        gate_logits = torch.stack(logits).mean(dim=0) if gate else None
        return tuple(layers), self.dec_norm_state(scene), gate_logits

    def _float32_parameters(self) -> set[str]:
        """Names of the parameters that stay float32 at any precision."""
        head, retriever = self.downstream_head, self.pose_retriever
        modules: list[nn.Module] = [self.register_tokens, self.decoder_embed_state]
        modules += [*head.last_layers(), *(m for m in self.modules() if isinstance(m, LayerNorm))]
        exempt = {id(p) for m in modules for p in m.parameters()}
        exempt |= {id(p) for p in (self.pose_token, retriever.mem, retriever.masked_token)}
        return {name for name, p in self.named_parameters() if id(p) in exempt}

    # -- checks and initial values -----------------------------------------------------------

    def _check(self, images: Tensor, outputs: Set[str]) -> None:
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


def _over_time(tensors: list[Tensor]) -> Tensor:
    """[L, *] of each frame to [L, T, *]."""
    return torch.stack(tensors, dim=1)


def _collect(kept: list[tuple[tuple[Tensor, ...], Tensor]], traced: list[Step]) -> Decoded:
    """Layers and rate of all frames, the pose token apart from the image tokens."""
    by_layer = list(zip(*(layers for layers, _ in kept), strict=True))
    pose = _over_time([last[:, 0] for last in by_layer[-1]])
    return Decoded(
        levels=tuple(_over_time([tokens[:, 1:] for tokens in frames]) for frames in by_layer),
        pose=pose,
        rate=_over_time([rate for _, rate in kept]),
        trace=_trace(traced, pose) if traced else None,
    )


def _trace(steps: list[Step], pose_token_out: Tensor) -> Trace:
    return Trace(
        tokens=_over_time([s.tokens for s in steps]),
        pose_memory=_over_time([s.memory for s in steps]),
        candidate=_over_time([s.candidate for s in steps]),
        gate_logits=_over_time([s.gate_logits for s in steps if s.gate_logits is not None]),
        pose_token_in=_over_time([s.pose_in[:, 0] for s in steps]),
        pose_token_out=pose_token_out,
    )


def state_positions(count: int) -> Tensor:
    """(row, column) of each scene token [count, 2]; rows are even and near square (section 3)."""
    width = int(count**0.5)
    width += width % 2
    index = torch.arange(count)
    return torch.stack((index // width, index % width), dim=1)


def _rotary_tables(config: ModelConfig, grid: tuple[int, int], device: torch.device) -> Positions:
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    patches = torch.stack((rows.flatten(), columns.flatten()), dim=1)
    image = torch.cat((torch.tensor([[-1, -1]]), patches))  # the pose token comes first
    state = state_positions(config.state_size)
    encoder_dim = config.enc_embed_dim // config.enc_num_heads
    image_dim = config.dec_embed_dim // config.dec_num_heads
    state_dim = config.dec_embed_dim // config.state_dec_num_heads

    def table(positions: Tensor, head_dim: int) -> Rotary:
        return rotary_tables(positions.to(device), head_dim, config.rope_base)

    return Positions(
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
