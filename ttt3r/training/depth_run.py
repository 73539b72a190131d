"""Training channels for depth, beside those of trained weights (`depth_channels`)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt3r.model import Model
from ttt3r.training.curriculum import draw_batch, stage_at
from ttt3r.training.depth_channels import (
    DepthNetwork,
    Seen,
    join,
    joined_config,
    make_room,
    require_depth_channels,
    see,
    seer,
)
from ttt3r.training.losses import Targets, depth_loss, point_loss
from ttt3r.training.parallel import rank, workers
from ttt3r.training.run import Drawn, Run
from ttt3r.training.settings import TrainSettings, require_same_network

_SHARE = 4  # a step sees one part in so many of a batch that was rendered
_USES = 2  # of a picture, on average: seen oftener, pictures are learnt by heart
_FIRST = 32  # batches to choose from at the first step
_PICTURES_KEPT = 10_000  # by each process; 33 KB a picture of 80 pixels


@dataclass(frozen=True)
class _Batch:
    """Rendered sequences, and what depth's channels need of the others, packed."""

    images: Tensor  # [L, T, 3, H, W] uint8
    depth: Tensor  # [L, T, H, W] float16
    valid: Tensor  # [L, T, H, W] bool
    T_world_cam: Tensor  # [L, T, 4, 4]
    intrinsics: Tensor  # [L, 3, 3]
    seen: Seen  # float16
    rule: str

    def lanes(self, chosen: Tensor) -> tuple[Tensor, Targets, Seen]:
        """Images, the truth and what was seen of some sequences."""
        images = self.images[chosen].float() / 127.5 - 1
        truth = Targets.build(
            self.depth[chosen].float(),
            self.valid[chosen],
            self.T_world_cam[chosen],
            self.intrinsics[chosen],
        )
        seen = Seen(self.seen.spreads[:, chosen].float(), self.seen.tokens[chosen].float())
        return images, truth, seen


class DepthRun(Run[DepthNetwork]):
    """Depth's channels learn by themselves, from pictures rendered once and seen many times.

    In single pictures depth sees many worlds. In sequences it learns one scale for all frames, and
    meets what norms divide by after the first.
    """

    def __init__(self, settings: TrainSettings, device: str) -> None:
        super().__init__(settings, device)
        self._around: Model | None = None
        self._seer: Model | None = None
        largest = max(stage.lanes * min(stage.frames) for stage in settings.curriculum)
        self._most = max(_FIRST, _PICTURES_KEPT * workers() // largest)
        self._batches: dict[int, _Batch] = {}

    @property
    def around(self) -> Model:
        """The network that depth's channels are to be part of."""
        assert self._around is not None, "depth learns alone beside trained weights"
        return self._around

    def whole(self) -> Model:
        return join(self.around, self.averaged)

    def _fresh(self) -> DepthNetwork:
        return DepthNetwork(self.settings.model)

    def _draw(self, step: int) -> Drawn:
        # What is kept only saves time: a run that goes on renders again what its steps see.
        later, since = divmod(step, _SHARE * _USES)
        newest = _FIRST - 1 + later
        oldest = max(0, newest + 1 - self._most)
        self._batches.pop(oldest - 1, None)
        rng = random.Random((self.settings.seed * 1_000_003 + step) * 64 + rank())
        number = rng.randint(oldest, newest) if since else newest
        if number not in self._batches:
            self._batches[number] = self._render(number)
        batch = self._batches[number]
        lanes = len(batch.images)
        chosen = rng.sample(range(lanes), max(1, lanes // _SHARE))
        images, truth, seen = batch.lanes(torch.tensor(chosen, device=self.device))
        parts = (getattr(truth, field.name) for field in fields(Targets))
        return Drawn(images, (*parts, *seen), is_lesson=False, rule=batch.rule)

    def _render(self, number: int, share: tuple[int, int] | None = None) -> _Batch:
        stage = stage_at(max(0, number - _FIRST) * _SHARE * _USES, self.settings.curriculum)
        rule = "cut3r" if stage.is_still(number) else stage.rule(number)
        batch = draw_batch(
            number,
            stage,
            patch=self.settings.model.patch_size,
            seed=self.settings.seed,
            share=share or (rank(), workers()),
            device=self.device,
        )
        if self._seer is None:
            self._seer = seer(self.around)
        seen = see(self._seer, batch.images, rule)
        return _Batch(
            (batch.images * 127.5 + 127.5).round().byte(),
            batch.depth.half(),
            batch.valid,
            batch.T_world_cam,
            batch.intrinsics,
            Seen(*(part.half() for part in seen)),
            rule,
        )

    def _loss(self, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        count = len(fields(Targets))
        truth, seen = Targets(*drawn.truth[:count]), Seen(*drawn.truth[count:])
        with self._precision():
            points, confidence = self.model(drawn.images, seen, self.around.positions)
        parts = {
            "cam": point_loss(points, confidence, truth.pointmap_cam, truth.valid),
            "depth": depth_loss(points, truth.pointmap_cam, truth.valid),
        }
        weights = self.settings.loss
        return weights.cam * parts["cam"] + weights.depth * parts["depth"], parts

    def _record(self) -> dict[str, Any]:
        return {**super()._record(), "around": self.around.state_dict()}

    def _go_on(self, record: Mapping[str, Any], place: Path) -> None:
        super()._go_on(record, place)
        around = Model(self.settings.model)
        around.load_state_dict(record["around"])
        self._around = around.to(self.device)

    def _start_from(self, path: Path) -> None:
        from ttt3r.weights import load_model

        model, info = load_model(path)
        wanted = self.settings.model
        is_new = info.config.enc_embed_dim < wanted.enc_embed_dim
        require_same_network(joined_config(info.config) if is_new else info.config, wanted, path)
        if is_new:
            around = make_room(model)
        else:
            require_depth_channels(model, path)
            around = model
        self._around = around.to(self.device)
        if is_new:  # all processes fit the norms to the same pictures
            batch = self._render(0, (0, 1))
            images, _, seen = batch.lanes(torch.arange(len(batch.images), device=self.device))
            self.model.begin(around, images, seen)
        else:
            self.model.take_from(around)
        self.averaged.load_state_dict(self.model.state_dict())
        self.origin, self.segment_frames = info.notes, info.segment_frames
