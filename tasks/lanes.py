"""How many segments run in lock step: from free memory, fewer where it does not suffice."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from storage.errors import CommitExists
from storage.reconstruction import ReconstructionStore
from tasks.config import InferConfig
from tasks.frames import DriveInput
from tasks.keys import require_key, stage_key
from ttt3r.weights import WeightsInfo

COMMIT = "lanes"
VERSION = 1
MOST_LANES = {"cpu": 16, "cuda": 64}  # beyond, they bring no more frames a second
CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMORY_SHARE = {"cpu": 0.25, "cuda": 0.6}  # of what is free
# Values a pixel and a token that are alive at once; errs on the high side.
HOST_BYTES_PER_PIXEL = 48  # colours read ahead, depth and confidence twice, the encoded chunk
HEAD_CHANNELS = 512
TOKEN_WIDTHS = 32

log = logging.getLogger(__name__)


def lanes_key(store: ReconstructionStore, config: InferConfig, info: WeightsInfo) -> str:
    """Key of the choice: what the memory of a lane depends on."""
    what = [config.lanes, config.device, config.precision, info.sha256]
    return stage_key("lanes", VERSION, require_key(store, "plan"), what)


def settled_lanes(
    store: ReconstructionStore,
    drive: DriveInput,
    config: InferConfig,
    info: WeightsInfo,
    device: torch.device,
) -> int:
    """Lanes of this drive: as recorded in its store, else as set or as memory allows.

    Batches of other sizes round otherwise: a resumed run must take the lanes of the first.
    """
    key = lanes_key(store, config, info)
    record = store.read_commit(_commit_name(key))
    if record is not None:
        return int(record["lanes"])
    lanes = choose_lanes(drive, device) if config.lanes == "auto" else config.lanes
    try:
        store.commit(_commit_name(key), {"key": key, "lanes": lanes}, exclusive=True)
    except CommitExists:  # another worker of this drive was first
        return settled_lanes(store, drive, config, info, device)
    return lanes


def settle_for_fewer(
    store: ReconstructionStore, config: InferConfig, info: WeightsInfo, lanes: int
) -> int:
    """Record half of `lanes` for the rest of the drive, after they did not fit; return it.

    Less if another worker of the drive has recorded less.
    """
    key = lanes_key(store, config, info)
    recorded = (store.read_commit(_commit_name(key)) or {}).get("lanes", lanes)
    fewer = min(lanes // 2, int(recorded))
    log.warning("%s: %d lanes do not fit into memory; going on with %d", store.url, lanes, fewer)
    store.commit(_commit_name(key), {"key": key, "lanes": fewer, "reduced": True})
    return fewer


def _commit_name(key: str) -> str:
    """Each choice has a name of its own, so that only one worker can be the first to make it."""
    return f"{COMMIT}/{key[:16]}"


def choose_lanes(drive: DriveInput, device: torch.device) -> int:
    """As many lanes as a share of the free memory holds, within what helps."""
    fitting = int(MEMORY_SHARE[device.type] * free_bytes(device) / lane_bytes(drive, device))
    return max(1, min(MOST_LANES[device.type], fitting))


def lane_bytes(drive: DriveInput, device: torch.device) -> int:
    """Memory of the device for one lane, about."""
    height, width = drive.size
    host = drive.plan.chunk_frames * height * width * HOST_BYTES_PER_PIXEL
    return _activation_bytes(drive) + (0 if device.type == "cuda" else host)


def _activation_bytes(drive: DriveInput) -> int:
    """What the network holds for one frame, about."""
    height, width = drive.size
    tokens = height * width // drive.config.patch_size**2
    return 4 * (tokens * TOKEN_WIDTHS * drive.config.enc_embed_dim + height * width * HEAD_CHANNELS)


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses; of the host, what limits of control groups leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = meminfo.read_text().splitlines()
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return min(found + left_by_limits(CONTROL_GROUPS, Path("/proc/self/cgroup")))


def left_by_limits(mount: Path, own: Path) -> list[int]:
    """Bytes that each memory limit on this process leaves (control groups, version 2).

    Args:
        mount: where the groups are mounted; of a container, its own group.
        own: the file that names this process's group.

    Files that the system holds in memory and may forget (`inactive_file`) are not counted as used.
    """
    names = own.read_text().splitlines() if own.exists() else []
    name = next((line.removeprefix("0::/") for line in names if line.startswith("0::/")), "")
    folders = [mount / name, *(mount / name).parents]
    left = []
    for folder in folders[: folders.index(mount) + 1]:
        limit = folder / "memory.max"
        if limit.exists() and (allowed := limit.read_text().strip()) != "max":
            held = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text()) - int(held["inactive_file"])
            left.append(max(0, int(allowed) - used))
    return left


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
