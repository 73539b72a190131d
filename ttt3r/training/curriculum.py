"""Which sequences the network sees at which step: a pure function of the step's number.

Pairs come first, small and many: matching between views has to emerge before poses can be
learnt, and only sheer numbers of pairs bring it about. Then sequences grow longer, pictures
larger, motions wider. There are no resets: a reset gives the network the initial state, so a
sequence with one is two shorter sequences.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ttt3r.images import fit
from ttt3r.synthetic import HELD_OUT_SEED, Sequences, WorldName, render
from ttt3r.training.lesson import WINDOWS, draw_windows

# Width over height, and how often: 16:9, 4:3, KITTI, portrait.
ASPECTS = ((16 / 9, 5), (4 / 3, 2), (3.32, 3), (3 / 4, 1))
ONE_ASPECT = ((3 / 2, 1),)
_LANES_PER_STEP = 1024  # seeds set aside for one step and process


@dataclass(frozen=True)
class Stage:
    """A stretch of training in which sequences are alike."""

    steps: int
    frames: tuple[int, ...]  # lengths to choose from
    lanes: int  # sequences of the shortest length; longer ones come in proportionally fewer
    long_side: int  # pixels
    rooms: float = 0.5  # share of room sequences
    motion: tuple[float, float] = (0.5, 1.5)  # scales the natural motion in streets
    rooms_motion: tuple[float, float] = (0.5, 2.0)  # and in rooms
    rooms_turn: tuple[float, float] = (1.0, 1.0)  # scales turns in rooms against the way walked
    aspects: tuple[tuple[float, int], ...] = ASPECTS
    lesson_reach: int = 0  # pixels; above 0 there are lessons in matching, see `lesson`
    lesson_every: int = 1  # steps; the others are sequences
    supersample: int = 2  # squared rays a pixel: single rays make noise of tarmac and grass
    stills: float = 0.0  # share of the steps that see single pictures, each of another world
    gated: float = 0.0  # share of the sequences' steps under the rule ttt3r; the others: cut3r

    def is_lesson(self, step: int) -> bool:
        """Whether `step` is a lesson in matching rather than rendered sequences."""
        return self.lesson_reach > 0 and step % self.lesson_every == 0

    def is_still(self, step: int) -> bool:
        """Whether `step` sees single pictures rather than sequences."""
        return _is_of_share(step, self.stills)

    def rule(self, step: int) -> str:
        """The update rule of `step`."""
        sequences = step - int(step * self.stills)  # steps before this one
        return "ttt3r" if _is_of_share(sequences, self.gated) else "cut3r"


@dataclass(frozen=True)
class Batch:
    """Rendered sequences as tensors on the device; the time axis is second."""

    images: Tensor  # [L, T, 3, H, W] in [-1, 1]
    depth: Tensor  # [L, T, H, W] metres
    valid: Tensor  # [L, T, H, W] bool
    T_world_cam: Tensor  # [L, T, 4, 4]
    intrinsics: Tensor  # [L, 3, 3]


# Lessons until matching has emerged (`turn` about a tenth of its first value), and a few all
# the way, or it is forgotten again while depth is learnt. At this size a natural motion hardly
# moves a picture: wide motions first. Streets come late, so they get most of the last stage.
CURRICULUM = (
    Stage(1100, (2,), 64, 48, aspects=ONE_ASPECT, lesson_reach=8),
    Stage(3000, (2, 4, 4), 64, 48, 0.5, (0.8, 2.0), (1.0, 3.0), lesson_reach=8, lesson_every=3),
    Stage(4000, (4, 8), 16, 80, 0.5, lesson_reach=8, lesson_every=8),
    Stage(2800, (4, 8), 16, 80, 0.35, lesson_reach=8, lesson_every=16),
)
# From trained weights, which match already: no lessons, and both update rules. Single pictures
# show depth in many more worlds, and nothing drowns it there. Cars four times as fast go as far in
# 16 frames as usual ones in 64; a camera in a room that turns little shows the way it goes.
REFINEMENT = (
    Stage(
        1, (8, 16, 16), 8, 80, 0.45, (0.5, 4.0), (0.7, 3.0), (0.2, 1.0), stills=0.3, gated=0.5
    ),
)  # fmt: skip


def _is_of_share(number: int, share: float) -> bool:
    """Whether the `number`-th of many is of the evenly spread `share` of them."""
    return int((number + 1) * share) > int(number * share)


def stage_at(step: int, curriculum: tuple[Stage, ...]) -> Stage:
    """The stage of `step`; the last one goes on for ever."""
    for stage in curriculum:
        if step < stage.steps:
            return stage
        step -= stage.steps
    return curriculum[-1]


def fit_sides(aspect: float, long_side: int, patch: int) -> tuple[int, int]:
    """Height and width in pixels that a picture of `aspect` (width over height) is cropped to."""
    wide, tall = (aspect, 1.0) if aspect >= 1 else (1.0, 1 / aspect)
    view = fit(round(1000 * wide), round(1000 * tall), long_side, patch)
    return view.height, view.width


def draw_batch(
    step: int,
    stage: Stage,
    *,
    patch: int,
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
) -> Batch:
    """Render the batch of `step`: equal arguments, equal batch, on the same kind of device.

    Single pictures are as many as the shortest sequences have frames.

    Every rendered sequence is used twice, the second time mirrored, and in rooms also
    backwards: rendering is dear, and this costs nothing.

    Args:
        step: number of the optimiser's step.
        stage: what sequences are like.
        patch: the network's patch size, pixels.
        seed: of the whole training.
        share: (k, n): the k-th of n equal parts of the batch, of `stage.lanes / n` lanes.
        device: where to render.
    """
    rng = random.Random(seed * 1_000_003 + step)
    frames = 1 if stage.is_still(step) else rng.choice(stage.frames)
    aspect = rng.choices([a for a, _ in stage.aspects], [w for _, w in stage.aspects])[0]
    height, width = fit_sides(aspect, stage.long_side, patch)
    lanes = max(1, stage.lanes * min(stage.frames) // frames // share[1] // 2) * 2
    rng.seed((seed * 1_000_003 + step) * 64 + share[0])
    # One world a call: half the work of rendering so little does not depend on how much it is.
    world: WorldName = "rooms" if rng.random() < stage.rooms else "streets"
    motion = _log_uniform(rng, *(stage.rooms_motion if world == "rooms" else stage.motion))
    turn = _log_uniform(rng, *stage.rooms_turn)
    first = _first_seed(step, seed, share)
    seeds = range(first, first + lanes // 2)
    seen = render(
        world, seeds, frames, height, width,
        device=device, motion=motion, turn=turn, supersample=stage.supersample,
    )  # fmt: skip
    parts = _twice(world, seen)
    return Batch(*(torch.cat(column) for column in zip(*parts, strict=True)))


def draw_lesson(
    step: int,
    stage: Stage,
    *,
    patch: int,
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Images and poses of the lesson of `step`; arguments as for `draw_batch`."""
    rng = random.Random((seed * 1_000_003 + step) * 64 + share[0])
    world: WorldName = "rooms" if rng.random() < stage.rooms else "streets"
    height, width = fit_sides(stage.aspects[0][0], stage.long_side, patch)
    first = _first_seed(step, seed, share)
    pictures = max(1, stage.lanes // share[1] // WINDOWS)
    seeds = range(first, first + pictures)
    return draw_windows(
        world, seeds, height, width, stage.lesson_reach,
        device=device, supersample=stage.supersample,
    )  # fmt: skip


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _first_seed(step: int, seed: int, share: tuple[int, int]) -> int:
    """Each step and process has seeds of its own, all below those held out."""
    first = ((step + seed * 7919) * share[1] + share[0]) * _LANES_PER_STEP
    return first % (HELD_OUT_SEED - _LANES_PER_STEP)


_Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _twice(world: WorldName, seen: Sequences) -> list[_Parts]:
    """Rendered sequences, and their mirror images (in rooms: run backwards)."""
    images = seen.images.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    plain = (images, seen.depth, seen.valid, seen.T_world_cam, seen.intrinsics)
    twin = mirrored(plain)
    return [plain, backwards(twin) if world == "rooms" else twin]


def mirrored(parts: _Parts) -> _Parts:
    """The same sequences seen in a mirror: left is right."""
    images, depth, valid, T_world_cam, intrinsics = parts
    flip = torch.diag(torch.tensor([-1.0, 1, 1, 1], device=depth.device))
    lens = intrinsics.clone()
    lens[:, 0, 2] = depth.shape[-1] - 1 - lens[:, 0, 2]
    return images.flip(-1), depth.flip(-1), valid.flip(-1), flip @ T_world_cam @ flip, lens


def backwards(parts: _Parts) -> _Parts:
    """The same sequences from the last frame to the first."""
    images, depth, valid, T_world_cam, intrinsics = parts
    return images.flip(1), depth.flip(1), valid.flip(1), T_world_cam.flip(1), intrinsics
