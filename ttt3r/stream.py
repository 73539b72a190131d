"""Frames in, predictions out: lanes, batches, resume."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ttt3r.images import as_tensor, normalise
from ttt3r.model import Model, Predictions, as_flags
from ttt3r.state import State, find_rule


class Stream:
    """L independent streams that see their frames in lock step, for as long as there are any.

    All that it remembers is `state`, whose size does not depend on the number of frames: keep
    it, and a new Stream given it goes on identically. What is stateless (encoder, heads) is
    batched over frames, `batch_frames` at most, which bounds memory; results depend on how
    frames are batched only by rounding. Lanes never influence one another.
    """

    def __init__(
        self,
        model: Model,
        lanes: int = 1,
        rule: str = "ttt3r",
        outputs: Set[str] = frozenset({"cam"}),
        state: State | None = None,
        batch_frames: int = 16,
    ) -> None:
        """Start all lanes, or go on from `state`.

        Args:
            model: on the device where all work is done.
            lanes: number of streams.
            rule: name in `state.UPDATE_RULES`.
            outputs: what to predict, see `Model.run`.
            state: of as many lanes, from an earlier stream.
            batch_frames: frames, over all lanes, that encoder and heads take at once.
        """
        find_rule(rule)
        if lanes < 1 or batch_frames < 1:
            raise ValueError(
                f"{lanes} lanes and batches of {batch_frames} frames: both must be > 0"
            )
        if state is not None and state.lanes != lanes:
            raise ValueError(f"the state has {state.lanes} lanes, the stream {lanes}")
        self.model = model
        self.lanes = lanes
        self.rule = rule
        self.outputs = frozenset(outputs)
        self._frames_at_once = max(1, batch_frames // lanes)
        with torch.inference_mode():
            self.state = (model.initial_state(lanes) if state is None else state).detach()

    @torch.inference_mode()
    def feed(
        self,
        images: np.ndarray | Tensor,
        update: np.ndarray | Tensor | None = None,
        reset: np.ndarray | Tensor | None = None,
    ) -> Predictions:
        """Let every lane see its next T frames.

        Args:
            images: [L, T, h, w, 3] uint8, as `images.preprocess` gives them.
            update: [L, T] bool, False keeps a lane's state as it was; None is all True.
            reset: [L, T] bool, True forgets everything after the frame; None is all False.

        Returns:
            Predictions for these frames, on the model's device.
        """
        images = as_tensor(images)
        if images.ndim != 5 or images.shape[0] != self.lanes or not images.shape[1]:
            raise ValueError(
                f"images are {tuple(images.shape)}; expected [lanes, frames, h, w, 3] with "
                f"{self.lanes} lanes and at least one frame"
            )
        frames = images.shape[1]
        update = as_flags("update", update, (self.lanes, frames), default=True)
        reset = as_flags("reset", reset, (self.lanes, frames), default=False)
        parts, state = [], self.state
        for start in range(0, frames, self._frames_at_once):
            now = slice(start, start + self._frames_at_once)
            batch = normalise(images[:, now].to(self.model.device, non_blocking=True))
            predictions, state = self.model.run(
                batch,
                state,
                rule=self.rule,
                update=update[:, now],
                reset=reset[:, now],
                outputs=self.outputs,
            )
            parts.append(predictions)
        self.state = state
        return Predictions.concatenate(parts)


@dataclass(frozen=True)
class OverlapViews:
    """The views of a stream that is reset at intervals (section 9)."""

    frame: np.ndarray  # [V] int32, the frame that each view shows
    reset: np.ndarray  # [V] bool, the stream is reset after this view
    kept: np.ndarray  # [T] int32, the view that speaks for each frame


def overlap_views(frames: int, reset_interval: int | None) -> OverlapViews:
    """Feed each frame once, and again where a reset came after it.

    The second view is the first of the new segment and defines its frame of reference;
    `geometry.stitch_resets` chains the views kept.

    Args:
        frames: number of frames T.
        reset_interval: frames between resets; None never resets.
    """
    if frames < 0 or (reset_interval is not None and reset_interval < 1):
        raise ValueError(
            f"{frames} frames with a reset every {reset_interval}; expected 0 or more frames, and "
            "1 or more between resets"
        )
    index = np.arange(frames, dtype=np.int32)
    resets = np.zeros(frames, bool) if reset_interval is None else (index + 1) % reset_interval == 0
    views = np.repeat(index, 1 + resets)
    kept = (index + np.concatenate(([0], np.cumsum(resets)))[:frames]).astype(np.int32)
    flags = np.zeros(len(views), bool)
    flags[kept] = resets
    return OverlapViews(views, flags, kept)
