"""Several processes that train one network, each on its share of every batch.

On a CPU that others use too, two processes of one thread do about three times the work of one
process of two threads: threads wait for each other at every operation, processes once a step.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def workers() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(parameters: list[Tensor]) -> None:
    """Replace every gradient by its mean over all processes."""
    if workers() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= workers()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def any_of_all(here: bool) -> bool:
    """Whether it holds in any process; all get the same answer."""
    if workers() == 1:
        return here
    votes = torch.tensor(float(here))
    dist.all_reduce(votes)
    return bool(votes > 0)


def share_out(work: Callable[[Tensor], Tensor], items: Tensor) -> Tensor:
    """`work(items)` [K, ...] where each process does only its part of the K items."""
    count = workers()
    if count == 1 or len(items) < count:
        return work(items)
    size = -(-len(items) // count)
    padded = torch.cat([items, items[: size * count - len(items)]])
    done = work(padded[rank() * size : (rank() + 1) * size].contiguous())
    parts = [torch.empty_like(done) for _ in range(count)]
    dist.all_gather(parts, done.contiguous())
    return torch.cat(parts)[: len(items)]


def launch(count: int, work: Callable[..., Any], *arguments: Any) -> None:
    """Call `work(*arguments)` in `count` processes that can talk to each other."""
    if count == 1:
        work(*arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        mp.spawn(_enter, args=(count, meeting, work, arguments), nprocs=count)


def _enter(
    number: int, count: int, meeting: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=number, world_size=count)
    try:
        work(*arguments)
    finally:
        dist.destroy_process_group()


def _end_with_parent(parent: int) -> None:
    """A killed command must not leave its processes training on."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
