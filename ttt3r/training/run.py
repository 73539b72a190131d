"""What every training run is made of: a network, its optimisers, and where it stands."""

from __future__ import annotations

import importlib.util
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ttt3r.model import Model
from ttt3r.recording import Recordings
from ttt3r.training.ahead import Ahead
from ttt3r.training.curriculum import fit_sides, stage_at
from ttt3r.training.optimiser import build_optimisers
from ttt3r.training.parallel import average_gradients, workers
from ttt3r.training.settings import (
    STATE_FILE,
    TrainSettings,
    read_state,
    require_same_network,
)
from ttt3r.training.validation import Trial, validate

_SHAPES_RECORDED = 48  # sides, lengths and rules of a curriculum

Network = TypeVar("Network", bound=nn.Module)


def rate_factor(step: int, settings: TrainSettings, time_used: float = 0.0) -> float:
    """Learning rates over time: warm-up, constant, then a cosine down to 2 %.

    `time_used` is the share of the time that is over; it counts where it exceeds that of the steps.
    """
    rising = min(1.0, (step + 1) / settings.warm_up)
    start = settings.total_steps * (1 - settings.cool_down)
    done = max(step, time_used * settings.total_steps)
    fallen = min(1.0, max(0.0, done - start) / max(1.0, settings.total_steps - start))
    return rising * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fallen)))


@dataclass(frozen=True)
class Drawn:
    """What a step learns from."""

    images: Tensor  # [L, T, 3, H, W]
    truth: tuple[Tensor, ...]  # of `Targets`, for depth alone of `Seen`, too; of lessons, poses
    is_lesson: bool
    rule: str

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """What a recording of the step depends on."""
        return (self.is_lesson, self.rule, self.images.shape)


class Run(ABC, Generic[Network]):
    """A network that learns, its optimisers and step number: what a checkpoint holds.

    Subclasses say what the network is, what it sees at each step, and what it is punished for.
    """

    def __init__(self, settings: TrainSettings, device: str) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.device = settings, torch.device(device)
        self.model = self._fresh().to(self.device)
        self.averaged = self._fresh().to(self.device)
        self.averaged.load_state_dict(self.model.state_dict())
        self.optimisers = build_optimisers(
            self.model,
            lr=settings.lr,
            matrix_lr=settings.matrix_lr,
            weight_decay=settings.weight_decay,
        )
        self.step, self.frames, self.started = 0, 0, time.monotonic()
        self.seconds_before = 0.0
        self.origin = ""  # what is said of the weights that training started from
        last = stage_at(settings.total_steps - 1, settings.curriculum)
        self.segment_frames = max(last.frames)  # recommended
        self._ahead = Ahead(self._draw, self.device)
        self._recordings = Recordings("training steps", _SHAPES_RECORDED)
        self._names: dict[Hashable, tuple[str, ...]] = {}  # of the loss' parts

    @abstractmethod
    def _fresh(self) -> Network:
        """What is to be trained, as it is before any training."""

    @abstractmethod
    def whole(self) -> Model:
        """The network that training makes, with averaged weights."""

    @abstractmethod
    def _draw(self, step: int) -> Drawn:
        """What `step` learns from."""

    @abstractmethod
    def _loss(self, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts."""

    @abstractmethod
    def _start_from(self, path: Path) -> None:
        """Start from the weights of a .safetensors file."""

    # -- one step ----------------------------------------------------------------------------

    def advance(self, time_used: float = 0.0) -> dict[str, Any]:
        """One optimiser step; returns its log record. For `time_used` see `rate_factor`."""
        began = time.monotonic()
        drawn = self._ahead.take(self.step)
        waited = self._now() - began
        loss, parts = self._differentiate(drawn)
        average_gradients(list(self.model.parameters()))
        norm = torch.nn.utils.clip_grad_norm_(
            self.optimisers[1].param_groups[0]["params"], self.settings.clip
        )
        # The gradients' norm is the same in all processes, so they agree.
        is_sound = bool(torch.isfinite(norm))
        if is_sound:  # a step on infinities would be the last
            self._apply(time_used)
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        images = drawn.images
        lanes, frames = images.shape[0] * workers(), images.shape[1]
        self.frames += lanes * frames
        spent = self._now() - began
        return {
            "step": self.step,
            "loss": float(loss),
            **{name: round(float(part), 5) for name, part in parts.items()},
            "lanes": lanes,
            "frames": frames,
            "sides": list(images.shape[-2:]),
            "rule": drawn.rule,
            "skipped": not is_sound,
            "frames_per_s": round(lanes * frames / spent, 1),
            "rendering": round(waited / spent, 3),
            **(self._load() if self.step % 10 == 0 else {}),
            "seen": self.frames,
        }

    def _load(self) -> dict[str, float]:
        """How busy the GPU was lately, where its driver's package is there, and its memory."""
        if self.device.type != "cuda":
            return {}
        load = {"memory_gib": round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)}
        if importlib.util.find_spec("pynvml"):
            load["busy"] = torch.cuda.utilization(self.device) / 100
        return load

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def _differentiate(self, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts; gradients are in the parameters."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]

        def function(images: Tensor, *truth: Tensor, side: Any = None) -> tuple[Any, ...]:
            loss, parts = self._loss(replace(drawn, images=images, truth=truth))
            self._names[drawn.kind] = tuple(parts)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            return loss.detach(), tuple(part.detach() for part in parts.values()), gradients

        arguments = (drawn.images, *drawn.truth)
        if self.device.type == "cuda":  # thousands of small kernels, launched as one
            if self._recordings.lacks(drawn.kind):
                self._ahead.wait()
            loss, parts, gradients = self._recordings.call(drawn.kind, function, arguments)
        else:
            loss, parts, gradients = function(*arguments)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss, dict(zip(self._names[drawn.kind], parts, strict=True))

    def close(self) -> None:
        """Stop drawing ahead."""
        self._ahead.close()

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.half)

    def _apply(self, time_used: float) -> None:
        settings = self.settings
        factor = rate_factor(self.step, settings, time_used)
        for optimiser, rate in zip(self.optimisers, (settings.matrix_lr, settings.lr), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            optimiser.step()
        keep = min(settings.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.averaged.parameters()), list(self.model.parameters()), 1 - keep
            )

    # -- validation --------------------------------------------------------------------------

    def validate(self) -> list[dict[str, Any]]:
        """Records of the averaged weights on held-out worlds, as long as those trained on."""
        stage = stage_at(self.step - 1, self.settings.curriculum)
        height, width = fit_sides(16 / 9, stage.long_side, self.settings.model.patch_size)
        longest = max(stage.frames)
        count = max(16, 64 // longest)
        whole = self.whole()
        return [
            {"step": self.step, "validation": world, "rule": rule, "frames": longest}
            | {"seen": self.frames}
            | {
                name: round(value, 4)
                for name, value in validate(
                    whole, Trial(world, longest, height, width, count), rule
                ).items()
            }
            for world in ("rooms", "streets")
            for rule in (("cut3r", "ttt3r") if stage.gated else ("cut3r",))
        ]

    # -- saving ------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write `state.pt` in one go: a killed run leaves the previous one whole."""
        torch.save(self._record(), folder / f"{STATE_FILE}.part")
        os.replace(folder / f"{STATE_FILE}.part", folder / STATE_FILE)

    def _record(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "weights": self.whole().state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "settings": asdict(self.settings),
            "origin": self.origin,
            "segment_frames": self.segment_frames,
            "step": self.step,
            "frames": self.frames,
            "seconds": self.seconds_before + time.monotonic() - self.started,
        }

    def resume(self, place: Path) -> None:
        """Go on from a run's folder, or start from the weights of a .safetensors file."""
        if place.suffix == ".safetensors":
            self._start_from(place)
            return
        self._go_on(read_state(place), place)

    def _go_on(self, record: Mapping[str, Any], place: Path) -> None:
        found = TrainSettings.from_record(record["settings"])
        require_same_network(found.model, self.settings.model, place)
        if found.learns != self.settings.learns:
            raise ValueError(
                f"the run in {place} learns {found.learns!r}, expected {self.settings.learns!r}; "
                "go on with its own settings, or start from its weights, compact.safetensors"
            )
        self.model.load_state_dict(record["model"])
        self.averaged.load_state_dict(record["averaged"])
        for optimiser, state in zip(self.optimisers, record["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.step, self.frames = record["step"], record["frames"]
        self.seconds_before, self.origin = record["seconds"], record["origin"]
        self.segment_frames = record["segment_frames"]
