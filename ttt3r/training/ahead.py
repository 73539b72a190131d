"""Batches drawn one step ahead: a GPU learns from one while the next is rendered."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

Drawn = TypeVar("Drawn")


class Ahead(Generic[Drawn]):
    """What `draw(step)` gives for successive steps.

    On a GPU a thread draws the next step's on a stream of its own. On a CPU, where drawing and
    learning would only share the cores, nothing is drawn before it is asked for.
    """

    def __init__(self, draw: Callable[[int], Drawn], device: torch.device) -> None:
        self._draw = draw
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1) if self._stream else None
        self._next: tuple[int, Future[Drawn]] | None = None

    def take(self, step: int) -> Drawn:
        """The batch of `step`; what it is made of may be used on any stream."""
        if self._thread is None:
            return self._draw(step)
        if self._next is None or self._next[0] != step:
            self._begin(step)
        assert self._next is not None
        drawn = self._next[1].result()
        self._begin(step + 1)
        return drawn

    def wait(self) -> None:
        """Return when nothing is being drawn."""
        if self._next is not None:
            self._next[1].exception()

    def close(self) -> None:
        """Stop drawing."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _begin(self, step: int) -> None:
        assert self._thread is not None
        self._next = (step, self._thread.submit(self._on_stream, step))

    def _on_stream(self, step: int) -> Drawn:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            drawn = self._draw(step)
            self._stream.synchronize()
        return drawn
