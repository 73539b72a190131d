"""Training all of a network on sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt3r.geometry import camera_pose_to_matrix
from ttt3r.model import Model
from ttt3r.training.curriculum import draw_batch, draw_lesson, stage_at
from ttt3r.training.initial import prepare_for_matching
from ttt3r.training.lesson import lesson_loss
from ttt3r.training.losses import Targets, total_loss
from ttt3r.training.parallel import rank, workers
from ttt3r.training.run import Drawn, Run
from ttt3r.training.settings import require_same_network
from ttt3r.training.widening import times_as_wide, widen, widened


class WholeRun(Run[Model]):
    """All of the network learns, from rendered sequences, single pictures and lessons."""

    _teacher: Model | None = None  # the first weights, where rotations are learnt from them

    def whole(self) -> Model:
        return self.averaged

    def _fresh(self) -> Model:
        model = Model(self.settings.model)
        prepare_for_matching(model, self.settings.seed)
        return model

    def _draw(self, step: int) -> Drawn:
        stage = stage_at(step, self.settings.curriculum)
        where: dict[str, Any] = {
            "patch": self.settings.model.patch_size,
            "seed": self.settings.seed,
            "share": (rank(), workers()),
            "device": self.device,
        }
        if stage.is_lesson(step):
            images, T = draw_lesson(step, stage, **where)
            return Drawn(images, (T,), is_lesson=True, rule="cut3r")
        batch = draw_batch(step, stage, **where)
        truth = Targets.build(batch.depth, batch.valid, batch.T_world_cam, batch.intrinsics)
        if self._teacher is not None and batch.images.shape[1] > 1:
            R = _rotations_said(self._teacher, batch.images, stage.rule(step))
            truth = truth.turned(R)
        parts = tuple(getattr(truth, field.name) for field in fields(Targets))
        # A single picture looks the same under every rule.
        rule = "cut3r" if stage.is_still(step) else stage.rule(step)
        return Drawn(batch.images, parts, is_lesson=False, rule=rule)

    def _loss(self, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.settings.loss
        if drawn.images.shape[1] == 1:
            weights = weights.of_stills
        outputs = frozenset({"trace"}) if drawn.is_lesson else weights.outputs
        with self._precision():
            found, _ = self.model.run(drawn.images, rule=drawn.rule, outputs=outputs)
        if drawn.is_lesson:
            return lesson_loss(found, drawn.truth[0], weights)
        return total_loss(found, Targets(*drawn.truth), weights)

    def _record(self) -> dict[str, Any]:
        teacher = self._teacher.state_dict() if self._teacher else None
        return {**super()._record(), "teacher": teacher}

    def _go_on(self, record: Mapping[str, Any], place: Path) -> None:
        super()._go_on(record, place)
        if self.settings.keep_rotations:
            if not record.get("teacher"):
                raise ValueError(f"{place} learns true rotations: go on without keep_rotations")
            self._learn_from(record["teacher"])

    def _start_from(self, path: Path) -> None:
        from ttt3r.weights import load_model

        model, info = load_model(path)
        times = times_as_wide(self.settings.model, info.config)
        require_same_network(widened(info.config, times), self.settings.model, path)
        origin = info.notes if times == 1 else f"widened {times} times: {info.notes}"
        self._begin_with(widen(model, times).state_dict(), origin)

    def _begin_with(self, weights: Mapping[str, Tensor], origin: str) -> None:
        self.model.load_state_dict(weights)
        self.averaged.load_state_dict(weights)
        self.origin = origin
        if self.settings.keep_rotations:
            self._learn_from(weights)

    def _learn_from(self, weights: Mapping[str, Tensor]) -> None:
        self._teacher = Model(self.model.config).to(self.device)
        self._teacher.load_state_dict(weights)


def _rotations_said(teacher: Model, images: Tensor, rule: str) -> Tensor:
    """What `teacher` says of images [L, T, 3, H, W]: rotations [L, T, 3, 3]."""
    with torch.no_grad():
        found, _ = teacher.run(images, rule=rule, outputs=frozenset())
    return camera_pose_to_matrix(found.camera_pose)[..., :3, :3]
