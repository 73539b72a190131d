"""Arrays to the device and tensors back without making either side wait."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Images on the device; to a GPU they travel from pinned memory beside its work."""
    tensor = torch.from_numpy(images)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def mark(device: torch.device) -> torch.cuda.Event | None:
    """A point in the work of a GPU; None on the host, which works at once."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class Download:
    """Tensors on their way to the host; whoever queues them does not wait for the device."""

    def __init__(self, tensors: dict[str, Tensor], began: torch.cuda.Event | None) -> None:
        """Queue the copies behind the work that makes `tensors` and began at `began`."""
        device = next(iter(tensors.values())).device
        self.device = str(device)
        self._began, self._computed = began, mark(device)
        self._host = {name: _pinned_copy(tensor) for name, tensor in tensors.items()}
        self._arrived = mark(device)

    def wait(self) -> None:
        """Return when the tensors are there."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """The tensors as arrays; after `wait`."""
        return {name: tensor.numpy() for name, tensor in self._host.items()}

    def seconds(self) -> dict[str, float]:
        """What the GPU was busy with, by its own clock; nothing on the host; after `wait`."""
        if self._began is None or self._computed is None or self._arrived is None:
            return {}
        return {
            "infer_seconds": self._began.elapsed_time(self._computed) / 1000,
            "download_seconds": self._computed.elapsed_time(self._arrived) / 1000,
        }


def _pinned_copy(tensor: Tensor) -> Tensor:
    """A copy in pinned host memory, not there yet where the tensor is on a GPU."""
    if tensor.device.type != "cuda":  # flags of the state live on the host
        return tensor
    target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return target.copy_(tensor, non_blocking=True)
