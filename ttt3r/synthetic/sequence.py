"""Render labelled sequences of the procedural worlds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol

import torch
from torch import Tensor

from ttt3r.synthetic.camera import Film, draw_intrinsics
from ttt3r.synthetic.dice import Dice
from ttt3r.synthetic.raycast import Light, RayCaster, Surface, Views
from ttt3r.synthetic.rooms import Rooms
from ttt3r.synthetic.solids import Solids
from ttt3r.synthetic.streets import Streets

HELD_OUT_SEED = 1_000_000_000  # this seed and all above are for evaluation: never train on them

WorldName = Literal["streets", "rooms"]


@dataclass(frozen=True)
class Sequences:
    """B rendered sequences of T frames, with exact geometry. World axes: y points down."""

    images: Tensor  # [B, T, H, W, 3] uint8 RGB
    depth: Tensor  # [B, T, H, W] float32 z-depth, metres; inf where not valid (sky)
    valid: Tensor  # [B, T, H, W] bool; false for the sky
    T_world_cam: Tensor  # [B, T, 4, 4] float32, metres; the first need not be the identity
    intrinsics: Tensor  # [B, 3, 3] float32, pixels; the top-left pixel's centre is (0, 0)


class World(Protocol):
    """What a kind of world tells the renderer about a batch of seeds."""

    light: Light
    distance: float

    def poses(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]: ...
    def static(self, start: int, stop: int) -> Solids: ...
    def moving(self, start: int, stop: int) -> Solids | None: ...
    def colour(self, seen: Surface, frames: int) -> Tensor: ...


_PIXELS_AT_ONCE = (1 << 21, 1 << 24)  # rays of a slice on a CPU; on a GPU, which waits for launches

_WORLDS: dict[str, Callable[[Dice, float, float], World]] = {
    "streets": lambda dice, motion, turn: Streets(dice, motion),
    "rooms": Rooms,
}


def render(
    world: WorldName,
    seeds: Sequence[int],
    frames: int,
    height: int,
    width: int,
    *,
    device: torch.device | str = "cpu",
    motion: float = 1.0,
    turn: float = 1.0,
    clean: bool = False,
    supersample: int = 1,
) -> Sequences:
    """Render whole sequences at once; see `render_chunks` for the arguments."""
    pieces = list(
        render_chunks(
            world, seeds, frames, height, width,
            device=device, motion=motion, turn=turn, clean=clean, supersample=supersample,
        )
    )  # fmt: skip
    return _concatenate(pieces)


def camera_path(
    world: WorldName,
    seeds: Sequence[int],
    frames: int,
    *,
    device: torch.device | str = "cpu",
    motion: float = 1.0,
    turn: float = 1.0,
) -> Tensor:
    """T_world_cam [B, T, 4, 4] that `render` would give, without rendering anything."""
    _check(world, frames, 1, 1, motion, turn, 1)
    return _WORLDS[world](Dice(seeds, device), motion, turn).poses(0, frames)[0]


def render_chunks(
    world: WorldName,
    seeds: Sequence[int],
    frames: int,
    height: int,
    width: int,
    *,
    device: torch.device | str = "cpu",
    motion: float = 1.0,
    turn: float = 1.0,
    clean: bool = False,
    supersample: int = 1,
    chunk_frames: int | None = None,
) -> Iterator[Sequences]:
    """Render sequences in time slices; memory does not grow with `frames`.

    Sequence i depends on seeds[i] alone: not on its batch mates, nor on `frames` (a longer
    sequence starts with the same frames), nor on the slices.

    Args:
        world: "streets" (a drive at 10 Hz) or "rooms" (a hand-held camera indoors).
        seeds: one sequence each; from HELD_OUT_SEED on they are reserved for evaluation.
        motion: scales speeds and turns; 0 stands still, 1 is life.
        turn: scales turns once more, in rooms; in streets the road tells how a car turns.
        clean: no sensor noise, blur, vignette, drift or tint: equal surfaces, equal colours.
        supersample: colours are the mean of this many squared rays a pixel; depth is always
            that of the pixel's centre.
        chunk_frames: frames a slice; chosen to bound memory when None.

    Raises:
        ValueError: for an unknown world, or sizes and counts below 1.
    """
    _check(world, frames, height, width, motion, turn, supersample)
    dice = Dice(seeds, device)
    scene = _WORLDS[world](dice, motion, turn)
    film = Film(dice, clean=clean)
    intrinsics = draw_intrinsics(dice, height, width)
    if chunk_frames is None:
        pixels = dice.count * height * width * supersample**2
        chunk_frames = max(1, min(16, _PIXELS_AT_ONCE[dice.device.type == "cuda"] // pixels))
    for start in range(0, frames, chunk_frames):
        stop = min(start + chunk_frames, frames)
        yield _render_slice(scene, film, intrinsics, start, stop, height, width, supersample)


def _check(
    world: str,
    frames: int,
    height: int,
    width: int,
    motion: float,
    turn: float,
    supersample: int,
) -> None:
    if world not in _WORLDS:
        raise ValueError(f"unknown world {world!r}; choose one of {sorted(_WORLDS)}")
    if min(frames, height, width, supersample) < 1 or min(motion, turn) < 0:
        raise ValueError(
            "frames, height, width and supersample must be at least 1, motion and turn at least 0; "
            f"found {frames}, {height}, {width}, {supersample}, {motion} and {turn}"
        )


def _render_slice(
    scene: World,
    film: Film,
    intrinsics: Tensor,
    start: int,
    stop: int,
    height: int,
    width: int,
    supersample: int,
) -> Sequences:
    T_world_cam, reach = scene.poses(start, stop)
    views = Views(T_world_cam, intrinsics, height, width, reach, scene.distance)
    static, moving = scene.static(start, stop), scene.moving(start, stop)
    colour, depth, valid = _look(scene, views, static, moving)
    if supersample > 1:
        fine = Views(
            T_world_cam, _magnify(intrinsics, supersample), height * supersample,
            width * supersample, reach, scene.distance,
        )  # fmt: skip
        colour = _look(scene, fine, static, moving)[0]
        colour = colour.unflatten(4, (width, supersample)).unflatten(3, (height, supersample))
        colour = colour.mean(dim=(4, 6))
    images = film.develop(colour, start)
    return Sequences(images, depth, valid, T_world_cam, intrinsics)


def _magnify(intrinsics: Tensor, factor: int) -> Tensor:
    """Intrinsics of the same view with `factor` times the pixels."""
    scaled = intrinsics.clone()
    scaled[:, :2] *= factor
    scaled[:, :2, 2] += (factor - 1) / 2
    return scaled


def _look(
    scene: World, views: Views, static: Solids, moving: Solids | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Linear RGB [3, B, T, H, W], depth and validity [B, T, H, W] of some views."""
    caster = RayCaster(views, static, moving, scene.light)
    depth, pair = caster.nearest()
    colour = torch.empty(3, *depth.shape, device=depth.device)
    for seen in caster.surfaces(depth, pair):
        colour[:, seen.frames, seen.pixels] = scene.colour(seen, views.T_world_cam.shape[1])
    shape = (*views.T_world_cam.shape[:2], views.height, views.width)
    return colour.reshape(3, *shape), depth.reshape(shape), (pair >= 0).reshape(shape)


def _concatenate(pieces: list[Sequences]) -> Sequences:
    joined = {
        field.name: torch.cat([getattr(piece, field.name) for piece in pieces], dim=1)
        for field in fields(Sequences)
        if field.name != "intrinsics"
    }
    return Sequences(**joined, intrinsics=pieces[0].intrinsics)
