"""Training all of a network but the channels that learnt depth alone (`depth_channels`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt3r.model import Model
from ttt3r.training.depth_channels import (
    DepthNetwork,
    join,
    make_room,
    parted_config,
    require_depth_channels,
    take_apart,
)
from ttt3r.training.initial import prepare_for_matching
from ttt3r.training.settings import require_same_network
from ttt3r.training.whole_run import WholeRun


class PoseRun(WholeRun):
    """Old channels learn poses by themselves; depth's are put beside them again.

    Trained in the joined network, depth's would be lost: steps are of a size for all channels, and
    depth's are small.
    """

    _depth: DepthNetwork | None = None

    def whole(self) -> Model:
        assert self._depth is not None, "poses learn alone beside channels for depth"
        return join(make_room(self.averaged).to(self.device), self._depth)

    def _fresh(self) -> Model:
        model = Model(parted_config(self.settings.model))
        prepare_for_matching(model, self.settings.seed)
        return model

    def _record(self) -> dict[str, Any]:
        assert self._depth is not None
        return {**super()._record(), "depth": self._depth.state_dict()}

    def _go_on(self, record: Mapping[str, Any], place: Path) -> None:
        super()._go_on(record, place)
        self._depth = DepthNetwork(self.settings.model).to(self.device)
        self._depth.load_state_dict(record["depth"])

    def _start_from(self, path: Path) -> None:
        from ttt3r.weights import load_model

        model, info = load_model(path)
        require_same_network(info.config, self.settings.model, path)
        require_depth_channels(model, path)
        old, self._depth = take_apart(model.to(self.device))
        self._begin_with(old.state_dict(), info.notes)
