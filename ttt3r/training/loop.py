"""The training loop: resumable to the step, on a CPU or one GPU."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ttt3r.geometry import camera_pose_to_matrix
from ttt3r.model import Model
from ttt3r.recording import Recordings
from ttt3r.training.ahead import Ahead
from ttt3r.training.curriculum import draw_batch, draw_lesson, fit_sides, stage_at
from ttt3r.training.depth_channels import (
    SMALL,
    add_depth_channels,
    depth_masks,
    require_depth_channels,
    writes_small_channels,
)
from ttt3r.training.initial import prepare_for_matching
from ttt3r.training.lesson import lesson_loss
from ttt3r.training.losses import Targets, total_loss
from ttt3r.training.optimiser import build_optimisers
from ttt3r.training.parallel import any_of_all, average_gradients, rank, workers
from ttt3r.training.settings import (
    STATE_FILE,
    TrainSettings,
    read_state,
    require_same_network,
)
from ttt3r.training.validation import Trial, validate
from ttt3r.training.widening import times_as_wide, widen, widened

log = logging.getLogger(__name__)
LOG_FILE = "log.jsonl"
_SHAPES_RECORDED = 48  # sides, lengths and rules of a curriculum


def train(
    settings: TrainSettings,
    out_dir: str | Path,
    resume: str | Path | None = None,
    *,
    device: str | None = None,
    stop_after: int | None = None,
    minutes: float = math.inf,
    finish_in: float = math.inf,
) -> Model:
    """Train until `settings.total_steps`; return the model with averaged weights.

    Writes to `out_dir`: `state.pt` (all that resuming needs) and `log.jsonl` (one object per
    step or validation; with frames/s, the share of the time spent rendering and asking for the
    rotations to keep, and on a GPU its busy share and its memory).

    Args:
        settings: what to do.
        out_dir: folder for results; created.
        resume: folder of an earlier run, or a .safetensors file whose weights to start from,
            widened where `settings.model` is a whole number of times as wide. From a folder the
            loss curve goes on as if never interrupted.
        device: "cuda" or "cpu"; None takes a GPU where there is one.
        stop_after: leave after this many steps in all; a later resume goes on from there.
        minutes: leave after this time, likewise.
        finish_in: minutes in which to be done: rates fall with the time, if that is over before
            the steps are. Such a run cannot be repeated to the bit.

    Raises:
        ValueError: `out_dir` holds another run; nothing to resume, or of another network;
            rotations are to be kept that nothing says; depth is to be learnt alone by a network
            whose other channels read what would learn it.
    """
    folder = Path(out_dir)
    if (folder / STATE_FILE).exists() and not _is_same(resume, folder):
        raise ValueError(f"{folder} holds a run; resume that one, or choose another folder")
    if settings.keep_rotations and resume is None:
        raise ValueError("keep_rotations is for trained weights; found none to resume from")
    if settings.depth_alone and resume is None:
        raise ValueError("depth_alone is for trained weights; found none to resume from")
    run = _Run(settings, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if resume is not None:
        run.resume(Path(resume))
    folder.mkdir(parents=True, exist_ok=True)
    last = min(settings.total_steps, stop_after or settings.total_steps)
    with _open_log(folder / LOG_FILE, run.step) as out:
        began = saved = time.monotonic()
        is_last = run.step >= last
        while not is_last:
            _write(out, run.advance((time.monotonic() - began) / 60 / finish_in))
            spent = (time.monotonic() - began) / 60
            is_last = run.step >= last or any_of_all(spent > min(minutes, finish_in))
            if rank() == 0 and (is_last or run.step % settings.validate_every == 0):
                for record in run.validate():
                    _write(out, record)
            if rank() == 0 and (is_last or time.monotonic() - saved > settings.save_every_s):
                run.save(folder)
                saved = time.monotonic()
    run.close()
    return run.averaged


def _is_same(resume: str | Path | None, folder: Path) -> bool:
    return resume is not None and Path(resume).resolve() == folder.resolve()


def _open_log(path: Path, step: int) -> TextIO:
    """The log of a run that is at `step`: what came after its last save will come again."""
    if rank() > 0:
        return Path(os.devnull).open("w")
    if path.exists():
        rows = path.read_text().splitlines(keepends=True)
        path.write_text("".join(row for row in rows if json.loads(row)["step"] <= step))
    return path.open("a", buffering=1)


def _write(out: Any, record: dict[str, Any]) -> None:
    out.write(json.dumps(record) + "\n")
    if "validation" in record or record["step"] % 10 == 0:
        log.info("%s", json.dumps(record))


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
class _Drawn:
    """What a step learns from."""

    images: Tensor  # [L, T, 3, H, W]
    truth: tuple[Tensor, ...]  # the fields of `Targets`; of a lesson, the poses
    is_lesson: bool
    rule: str

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """What a recording of the step depends on."""
        return (self.is_lesson, self.rule, self.images.shape)


class _Run:
    """Model, optimisers and step number: what a checkpoint holds."""

    def __init__(self, settings: TrainSettings, device: str) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.device = settings, torch.device(device)
        self.model = Model(settings.model)
        prepare_for_matching(self.model, settings.seed)
        self.model.to(self.device)
        self.averaged = Model(settings.model).to(self.device)
        self.averaged.load_state_dict(self.model.state_dict())
        # What writes to the small channels of depth that learns alone takes steps as small.
        self._slow = _keep_all_but_depth(self.model) if settings.depth_alone else []
        self.optimisers = build_optimisers(
            self.model,
            lr=settings.lr,
            matrix_lr=settings.matrix_lr,
            weight_decay=settings.weight_decay,
        )
        self.step, self.frames, self.started = 0, 0, time.monotonic()
        self.seconds_before = 0.0
        self.origin = ""  # what is said of the weights that training started from
        self.teacher: Model | None = None  # those weights, where rotations are learnt from them
        self._ahead = Ahead(self._draw, self.device)
        self._recordings = Recordings("training steps", _SHAPES_RECORDED)
        self._names: dict[Hashable, tuple[str, ...]] = {}  # of the loss' parts

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

    def _draw(self, step: int) -> _Drawn:
        """What `step` learns from."""
        stage = stage_at(step, self.settings.curriculum)
        where: dict[str, Any] = {
            "patch": self.settings.model.patch_size,
            "seed": self.settings.seed,
            "share": (rank(), workers()),
            "device": self.device,
        }
        if stage.is_lesson(step):
            images, T = draw_lesson(step, stage, **where)
            return _Drawn(images, (T,), is_lesson=True, rule="cut3r")
        batch = draw_batch(step, stage, **where)
        truth = Targets.build(batch.depth, batch.valid, batch.T_world_cam, batch.intrinsics)
        if self.teacher is not None and batch.images.shape[1] > 1:
            R = _rotations_said(self.teacher, batch.images, stage.rule(step))
            truth = truth.turned(R)
        parts = tuple(getattr(truth, field.name) for field in fields(Targets))
        # A single picture looks the same under every rule.
        rule = "cut3r" if stage.is_still(step) else stage.rule(step)
        return _Drawn(batch.images, parts, is_lesson=False, rule=rule)

    def _differentiate(self, drawn: _Drawn) -> tuple[Tensor, dict[str, Tensor]]:
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

    def _loss(self, drawn: _Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.settings.loss
        if drawn.images.shape[1] == 1:
            weights = weights.of_stills
        outputs = frozenset({"trace"}) if drawn.is_lesson else weights.outputs
        with self._precision():
            found, _ = self.model.run(drawn.images, rule=drawn.rule, outputs=outputs)
        if drawn.is_lesson:
            return lesson_loss(found, drawn.truth[0], weights)
        return total_loss(found, Targets(*drawn.truth), weights)

    def close(self) -> None:
        """Stop drawing ahead."""
        self._ahead.close()

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.half)

    def _apply(self, time_used: float) -> None:
        settings = self.settings
        factor = rate_factor(self.step, settings, time_used)
        before = [parameter.detach().clone() for parameter in self._slow]
        for optimiser, rate in zip(self.optimisers, (settings.matrix_lr, settings.lr), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            optimiser.step()
        keep = min(settings.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            if self._slow:
                torch._foreach_lerp_(self._slow, before, 1 - SMALL)
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
        return [
            {"step": self.step, "validation": world, "rule": rule, "frames": longest}
            | {"seen": self.frames}
            | {
                name: round(value, 4)
                for name, value in validate(
                    self.averaged, Trial(world, longest, height, width, count), rule
                ).items()
            }
            for world in ("rooms", "streets")
            for rule in (("cut3r", "ttt3r") if stage.gated else ("cut3r",))
        ]

    # -- saving ------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write `state.pt` in one go: a killed run leaves the previous one whole."""
        record = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "settings": asdict(self.settings),
            "origin": self.origin,
            "teacher": self.teacher.state_dict() if self.teacher else None,
            "step": self.step,
            "frames": self.frames,
            "seconds": self.seconds_before + time.monotonic() - self.started,
        }
        torch.save(record, folder / f"{STATE_FILE}.part")
        os.replace(folder / f"{STATE_FILE}.part", folder / STATE_FILE)

    def resume(self, place: Path) -> None:
        """Go on from a run's folder, or start from the weights of a .safetensors file."""
        if place.suffix == ".safetensors":
            self._start_from(place)
            return
        record = read_state(place)
        found = TrainSettings.from_record(record["settings"]).model
        require_same_network(found, self.settings.model, place)
        self.model.load_state_dict(record["model"])
        self.averaged.load_state_dict(record["averaged"])
        for optimiser, state in zip(self.optimisers, record["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.step, self.frames = record["step"], record["frames"]
        self.seconds_before, self.origin = record["seconds"], record["origin"]
        if self.settings.keep_rotations:
            if not record.get("teacher"):
                raise ValueError(f"{place} learns true rotations: go on without keep_rotations")
            self._learn_from(record["teacher"])

    def _start_from(self, path: Path) -> None:
        from ttt3r.weights import load_model

        model, info = load_model(path)
        wanted = self.settings.model
        times = times_as_wide(wanted, info.config)
        require_same_network(widened(info.config, times), wanted, path)
        if self.settings.depth_alone:
            model = add_depth_channels(model) if times == 2 else model
            require_depth_channels(model.state_dict(), path)
        else:
            model = widen(model, times)
        self.model.load_state_dict(model.state_dict())
        self.averaged.load_state_dict(model.state_dict())
        self.origin = info.notes if times == 1 else f"widened {times} times: {info.notes}"
        if self.settings.keep_rotations:
            self._learn_from(model.state_dict())

    def _learn_from(self, weights: Mapping[str, Tensor]) -> None:
        self.teacher = Model(self.settings.model).to(self.device)
        self.teacher.load_state_dict(weights)


def _keep_all_but_depth(model: Model) -> list[Tensor]:
    """Give gradients to what learns depth alone only; returns what writes to its channels."""
    slow: list[Tensor] = []
    for name, mask in depth_masks(model.state_dict()).items():
        parameter = model.get_parameter(name)
        parameter.requires_grad_(bool(mask.any()))
        if parameter.requires_grad:
            parameter.register_hook(mask.mul)
            if writes_small_channels(name):
                slow.append(parameter)
    return slow


def _rotations_said(teacher: Model, images: Tensor, rule: str) -> Tensor:
    """What `teacher` says of images [L, T, 3, H, W]: rotations [L, T, 3, 3]."""
    with torch.no_grad():
        found, _ = teacher.run(images, rule=rule, outputs=frozenset())
    return camera_pose_to_matrix(found.camera_pose)[..., :3, :3]
