"""CUDA graphs: the kernels of a decoder step, recorded once and launched together.

A step of the released network is more than a thousand small kernels, which take longer to launch
one by one than to run. Recorded, they are one launch, and both sides of a decoder layer run beside
each other.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MOST_KEPT = 4  # shapes; each holds the memory that a step takes
WARM_UP = 3  # steps until libraries have chosen their kernels and allocated their workspaces
# Of the largest value: what the order of a sum in another kernel explains, and no wrong result.
LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}

log = logging.getLogger(__name__)


class RecordingFailed(RuntimeError):
    """The step cannot be recorded, or does not give what it gives by itself."""


class Recording:
    """A function of tensors, recorded for tensors of one shape and one place each."""

    def __init__(
        self, function: Callable[..., Any], arguments: Sequence[Tensor], pool: Any = None
    ) -> None:
        """Record `function`, and compare what the recording gives with what it gives itself.

        Args:
            function: waits for nothing on the device and depends on no value; takes `arguments` and
                the keyword `side`, a stream that it may use beside the current one.
            arguments: on one CUDA device.
            pool: memory shared with recordings that never run at the same time; None takes its own.

        Raises:
            RecordingFailed: it cannot be recorded, or gives something else.
        """
        device = arguments[0].device
        self._inputs = [argument.clone() for argument in arguments]
        try:
            self._graph = torch.cuda.CUDAGraph()
            stream, side = torch.cuda.Stream(device), torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    expected = function(*self._inputs, side=side)
            torch.cuda.current_stream(device).wait_stream(stream)
            # Other threads go on decoding and downloading on streams of their own.
            with torch.cuda.graph(
                self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                self._outputs = function(*self._inputs, side=side)
            found = self(*arguments)
        except torch.OutOfMemoryError:
            raise  # who chose so many lanes can take fewer
        except RuntimeError as error:
            raise RecordingFailed(str(error)) from error
        for one, other in zip(tensors_of(found), tensors_of(expected), strict=True):
            if not is_close(one, other):
                raise RecordingFailed("the recording gives other values")

    @property
    def pool(self) -> Any:
        """Where the recording has its memory, to share."""
        return self._graph.pool()

    def __call__(self, *arguments: Tensor) -> Any:
        """What the function gives, in tensors of the caller's own."""
        for mine, given in zip(self._inputs, arguments, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return copied(self._outputs)


class Recordings:
    """Recordings for the shapes met lately; where none can be made, the function itself.

    They share their memory: one runs after the other.
    """

    def __init__(self, what: str, most_kept: int = MOST_KEPT) -> None:
        """Recordings of `what` (for messages), for `most_kept` shapes."""
        self._what, self._most_kept = what, most_kept
        self._kept: OrderedDict[Hashable, Recording] = OrderedDict()
        self._pool: Any = None
        self._is_off = False

    def lacks(self, key: Hashable) -> bool:
        """Whether `call` would record first."""
        return key not in self._kept and not self._is_off

    def call(self, key: Hashable, function: Callable[..., Any], arguments: Sequence[Tensor]) -> Any:
        """What `function` gives for `arguments`.

        Args:
            key: whatever else the result depends on: shapes, settings, where the weights are.
            function: see `Recording`.
            arguments: likewise.
        """
        if self.lacks(key):
            while len(self._kept) >= self._most_kept:
                self._kept.popitem(last=False)
            try:
                self._kept[key] = Recording(function, arguments, self._pool)
                self._pool = self._kept[key].pool
            except RecordingFailed as error:
                self._is_off = True
                log.warning("%s are not recorded, and slower for it: %s", self._what, error)
        if self._is_off:
            return function(*arguments)
        self._kept.move_to_end(key)
        return self._kept[key](*arguments)


def can_record(device: torch.device) -> bool:
    """Whether steps on `device` may be recorded now: on a GPU, without gradients or casts."""
    return (
        device.type == "cuda"
        and torch.is_inference_mode_enabled()
        and not torch.is_autocast_enabled("cuda")
    )


def is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two results of the same step differ by rounding at most."""
    allowed = LARGEST_DIFFERENCE.get(one.dtype, 0.0)
    largest = float(other.abs().amax())
    return float((one.float() - other.float()).abs().amax()) <= allowed * max(largest, 1.0)


def tensors_of(result: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples."""
    if isinstance(result, Tensor):
        yield result
    elif result is not None:
        for part in result:
            yield from tensors_of(part)


def copied(result: Any) -> Any:
    """The same nested tuples with copies of their tensors."""
    if result is None:
        return None
    if isinstance(result, Tensor):
        return result.clone()
    parts = [copied(part) for part in result]
    return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)


@contextmanager
def beside(side: torch.cuda.Stream | None) -> Iterator[None]:
    """Let what is inside run on `side`, beside what the current stream does next; see `joined`."""
    if side is None:
        yield
        return
    side.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(side):
        yield


def joined(side: torch.cuda.Stream | None) -> None:
    """Let the current stream wait for `side`.

    Between two forks each stream waits for the other, so that memory freed after a join is reused
    only after both have read it.
    """
    if side is not None:
        torch.cuda.current_stream(side.device).wait_stream(side)
