"""Fusion of a drive, batch by batch of tiles."""

from __future__ import annotations

from dataclasses import asdict

from prefect import flow

from flows.children import Child, ChildrenLost, Spread, run_children, work_key
from flows.leaving import told_when_left
from flows.telemetry import observed
from storage.credentials import refuse_credentials
from storage.reconstruction import ReconstructionStore
from tasks.config import FuseConfig, InferConfig
from tasks.fuse import fuse_tiles_stage, merge_tiles_stage, plan_tiles_stage, unfused_batches
from tasks.keys import require_key

DEPLOYMENT = "fuse-tiles/fleet"
BATCHES_PER_RUN = 2  # fewer are fused by the drive's own run, sooner than another one starts
BATCHES_PER_TASK = 32  # of the drive's own run: a task may fail and be tried again three times
RUNS_AT_ONCE = 16  # of one drive


@flow(name="fuse-tiles", persist_result=False)
def fuse_tiles(
    url: str,
    batches: list[int],
    config: FuseConfig = FuseConfig(),  # noqa: B008 (frozen)
    infer: InferConfig = InferConfig(),  # noqa: B008
) -> None:
    """Fuse some batches of tiles of a drive whose tiles are planned; finished ones are kept.

    Args:
        url: the drive's Zarr group.
        batches: numbers of batches.
        config: how depth becomes a mesh.
        infer: its weights tell how frames are resized.
    """
    for given in (url, infer.weights):
        refuse_credentials(given)
    with told_when_left(), observed():
        fuse_tiles_stage(url, batches, config, infer)


def fuse_drive(url: str, name: str, config: FuseConfig, infer: InferConfig, spread: Spread) -> None:
    """Fuse all tiles of a drive and merge them into its meshes.

    Raises:
        ChildrenLost: runs elsewhere ended without finishing their batches.
    """
    count = plan_tiles_stage(url, config)
    if spread == "deployments" and count > BATCHES_PER_RUN:
        fuse_elsewhere(url, name, count, config, infer)
    else:
        for first in range(0, count, BATCHES_PER_TASK):
            batches = range(first, min(first + BATCHES_PER_TASK, count))
            fuse_tiles_stage(url, batches, config, infer)
    merge_tiles_stage(url, config)


def fuse_elsewhere(url: str, name: str, count: int, config: FuseConfig, infer: InferConfig) -> None:
    """Fuse what is not finished of `count` batches, `BATCHES_PER_RUN` to a run of its own.

    Cut the same whatever is finished, so that a parent that was run again finds the runs of the
    one before.
    """
    store = ReconstructionStore.open(url)
    key, todo = require_key(store, "tiles"), set(unfused_batches(url, range(count)))

    def child(batches: list[int]) -> Child:
        return Child(
            f"{name}, tiles {batches[0]} to {batches[-1]}",
            {"url": url, "batches": batches, "config": asdict(config), "infer": asdict(infer)},
            work_key(url, key, batches),
            lambda: unfused_batches(url, range(count)),
        )

    cut = [range(count)[i : i + BATCHES_PER_RUN] for i in range(0, count, BATCHES_PER_RUN)]
    children = [child(list(batches)) for batches in cut if todo.intersection(batches)]
    run_children(DEPLOYMENT, url, children, RUNS_AT_ONCE)
    lost = [c for c in children if c.error]
    if lost:
        raise ChildrenLost(lost)
