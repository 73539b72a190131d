"""Kill processes of a fleet at random moments while it reconstructs a collection.

    python tests/campaigns/fleet_kills.py --drives 40 [--kills 60] [--seed N] [--json FILE]

A Prefect server on PostgreSQL, SeaweedFS, two workers of the pool `gpu` and one of `cpu` do a
collection of small drives. Every few seconds one of these is killed (-9): the process of an
inference run, of a fusion run, of a drive's run or of the collection's run; a worker alone; a
worker with all it started, as when its machine is lost; the S3 server; the Prefect server. Workers
and servers are started again; a collection whose run was killed is run again, as the next night
would.

A kill counts where the signal was delivered; of 40 kills or more at least one must have hit each
kind of victim.

After each kill a reader of the drive is given the undisturbed run's values or an error, and what
is committed stays as it is. In the end every drive must be finished, its arrays and meshes those
of an undisturbed run byte for byte, and every chunk that was seen committed must have the same
commit still. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from campaigns.small_runs import (
    readable,
    stored_objects,
    working_folder,
    write_drive,
    write_tiny_weights,
)
from local_fleet import LocalFleet, claims_under, running_fleet, tree_of
from seaweed import SeaweedProcess

from storage import upkeep
from storage.reconstruction import ReconstructionStore
from tasks.summary import list_stores, progress

FRAMES = 96  # eleven segments, two runs of the pool gpu
# Three batches of tiles: fewer are fused by the drive's own run, without any of `fuse-tiles`.
MANY_BATCHES = {"voxel_m": 0.0042, "frame_step": 12}
DRIVE, COLLECTION = "reconstruct-drive/fleet", "reconstruct-collection/scheduled"
# What is killed, and how often.
VICTIMS = {
    "infer-segments": 6,
    "fuse-tiles": 1,
    "reconstruct-drive": 4,
    "reconstruct-collection": 1,
    "worker": 2,
    "machine": 2,
    "S3 server": 2,
    "Prefect server": 1,
}
ENOUGH_KILLS = 40  # among which every kind of victim is
PAUSE_S = (2.0, 12.0)  # between two kills
DRIVES_AT_ONCE = 4
WORKERS = {"cpu": ("cpu",), "gpu-a": ("gpu", "--limit", "1"), "gpu-b": ("gpu", "--limit", "1")}
LIMIT_S = 3600.0


@dataclass
class Found:
    """What a campaign came to."""

    drives: int
    kills: list[tuple[str, str]] = field(default_factory=list)  # (victim, stages at work)
    collections: int = 0  # runs of the collection
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Campaign:
    """A fleet at work on a collection, and whoever disturbs it."""

    def __init__(
        self, fleet: LocalFleet, server: SeaweedProcess, folder: Path, rng: random.Random
    ) -> None:
        self._fleet, self._server, self._rng = fleet, server, rng
        self._logs = folder / "logs"
        self.output = f"{server.access.url}/out"
        cut = {"segment_frames": 12, "overlap_frames": 3, "chunk_frames": 4}
        weights = str(write_tiny_weights(folder / "tiny.safetensors"))
        grouped = {"segments_per_task": 6, "frames_per_run": 1}
        self._config = {
            "plan": cut,
            "infer": {"weights": weights, "lanes": 2, **grouped},
            "fuse": MANY_BATCHES,
        }
        self._kept: dict[str, str] = {}  # chunks seen committed, and their commits
        alone = {"location": str(write_drive(folder / "drive.mp4", FRAMES)), "spread": "here"}
        ended = self._run(DRIVE, {**alone, "output": str(folder / "alone")})
        if ended["state_type"] != "COMPLETED":
            raise RuntimeError(f"the undisturbed run: {ended['state']['message']}")
        self._objects = stored_objects(str(folder / "alone/drive.zarr"))
        self._readable = readable(str(folder / "alone/drive.zarr"))

    def _run(self, deployment: str, parameters: dict[str, Any]) -> dict[str, Any]:
        run_id = self._fleet.run(deployment, {**parameters, "config": self._config})
        return self._fleet.wait_for(run_id, LIMIT_S)

    def run(self, drives: int, kills: int) -> Found:
        """Have the collection done, and kill meanwhile."""
        found, began = Found(drives), time.monotonic()
        video = self._logs.parent / "drive.mp4"
        for number in range(drives):
            place = self._logs / f"drive{number:03d}"
            place.mkdir(parents=True)
            (place / "front.mp4").write_bytes(video.read_bytes())
        run_id = self._start_collection(found)
        while True:
            if len(found.kills) < kills:
                time.sleep(self._rng.uniform(*PAUSE_S))
                self._kill_something(found)
            ended = self._ended(run_id)
            if ended is None:
                time.sleep(0.5)
            elif ended["state_type"] == "CRASHED":
                run_id = self._start_collection(found)
            else:
                if ended["state_type"] != "COMPLETED":
                    found.faults.append(f"the collection {ended['state']['message']}")
                break
            if time.monotonic() - began > LIMIT_S:
                found.faults.append(f"the collection has not ended after {LIMIT_S} s")
                break
        self._judge(found)
        if kills >= ENOUGH_KILLS:
            missed = sorted(VICTIMS.keys() - {victim for victim, _ in found.kills})
            found.faults += [f"no {victim} was killed" for victim in missed]
        found.seconds = time.monotonic() - began
        return found

    def _start_collection(self, found: Found) -> str:
        found.collections += 1
        given = {"collection": str(self._logs), "output": self.output, "config": self._config}
        return self._fleet.run(COLLECTION, {**given, "drives_at_once": DRIVES_AT_ONCE})

    def _ended(self, run_id: str) -> dict[str, Any] | None:
        """The run, if it has ended."""
        with suppress(TimeoutError):
            return self._fleet.wait_for(run_id, 2)
        return None

    def _kill_something(self, found: Found) -> None:
        """Kill a victim, if any drive is at work; another one where the first is not there."""
        at_work = sorted({claim["url"] for claim in claims_under(self.output)})
        if not at_work:
            return
        victim = next(filter(self._kill, self._victims(found)), None)
        if victim is None:
            return
        stages = Counter(progress(url)["stage"] for url in at_work)
        said = ", ".join(f"{count} {stage}" for stage, count in sorted(stages.items()))
        found.kills.append((victim, said))
        print(f"{len(found.kills):3d} killed {victim}; at work: {said}", flush=True)
        for url in at_work:
            self._look(url, found)

    def _victims(self, found: Found) -> list[str]:
        """All kinds of victims, in the order in which they are looked for.

        Kinds that were not hit yet come first, as some are there for a short time only; the rest is
        by chance, with the frequent ones rather at the beginning.
        """
        hit = {victim for victim, _ in found.kills}
        by_chance = sorted(VICTIMS, key=lambda v: self._rng.random() ** (1 / VICTIMS[v]))
        return sorted(reversed(by_chance), key=lambda victim: victim in hit)

    def _kill(self, victim: str) -> bool:
        """Kill one of that kind; False if there was none."""
        if victim == "S3 server":
            self._server.kill()
            self._server.start()
        elif victim == "Prefect server":
            self._fleet.kill_server()
            self._fleet.start_server()
        elif victim in ("worker", "machine"):
            return self._kill_worker(self._rng.choice(list(WORKERS)), alone=victim == "worker")
        else:
            return self._kill_run(victim)
        return True

    def _kill_worker(self, name: str, alone: bool) -> bool:
        """Kill a worker, and unless `alone` all that it started; start another one.

        False if it had ended before: its number may be another process's by now.
        """
        worker = self._fleet.workers[name]
        is_there = worker.poll() is None
        if is_there and not alone:
            self._fleet.stop_worker(name)
        elif is_there:
            worker.kill()
            worker.wait()
        self._fleet.start_worker(*WORKERS[name][:1], name, *WORKERS[name][1:])
        return is_there

    def _kill_run(self, flow: str) -> bool:
        """Kill the process of some run of a flow that is under way; False if there is none."""
        running = {run["id"] for run in self._fleet.flow_runs(flow)}
        pids = [pid for pid, run in self._processes().items() if run in running]
        self._rng.shuffle(pids)
        for pid in pids:
            with suppress(ProcessLookupError):  # it ended this very moment
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    def _processes(self) -> dict[int, str]:
        """The flow run of every process below a worker."""
        found = {}
        for worker in self._fleet.workers.values():
            for pid in tree_of(worker.pid):
                with suppress(OSError):
                    for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                        if entry.startswith(b"PREFECT__FLOW_RUN_ID="):
                            found[pid] = entry.partition(b"=")[2].decode()
        return found

    def _look(self, url: str, found: Found) -> None:
        """What a reader is given is finished, and what is committed stays."""
        for name, value in readable(url).items():
            if value != self._readable.get(name):
                found.faults.append(f"{url}: {name} reads otherwise")
        for name, record in ReconstructionStore.open(url).commits("infer").items():
            commit = self._kept.setdefault(f"{url} {name}", record["commit_id"])
            if commit != record["commit_id"]:
                found.faults.append(f"{url}: {name} was committed again")

    def _judge(self, found: Found) -> None:
        stores = list_stores(self.output)
        if len(stores) != found.drives:
            found.faults.append(f"{len(stores)} drives are stored")
        for url in stores:
            self._look(url, found)
            stage = progress(url)["stage"]
            if stage != "done":
                found.faults.append(f"{url} is at {stage}")
            objects = stored_objects(url)
            for name in sorted(objects.keys() | self._objects.keys()):
                if objects.get(name) != self._objects.get(name):
                    found.faults.append(f"{url}: {name} differs from the undisturbed run")
            damaged = upkeep.verify(ReconstructionStore.open(url))
            found.faults += [f"{url}: damaged: {name}" for name in damaged]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--drives", type=int, default=40)
    parser.add_argument("--kills", type=int, default=60, help="at most, while there is work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the outcome to")
    parser.add_argument("--keep", type=Path, help="folder to work in, left as it is")
    arguments = parser.parse_args()
    with working_folder(arguments.keep) as folder:
        server = SeaweedProcess(folder / "seaweed")
        try:
            server.start()
            os.environ |= server.access.environment
            with running_fleet(folder / "fleet", 2, server.access.environment) as fleet:
                for name, (pool, *rest) in WORKERS.items():
                    fleet.start_worker(pool, name, *rest)
                campaign = Campaign(fleet, server, folder, random.Random(arguments.seed))
                found = campaign.run(arguments.drives, arguments.kills)
        finally:
            server.kill()
    figures = {**asdict(found), "victims": dict(Counter(victim for victim, _ in found.kills))}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    del figures["kills"]
    print(json.dumps(figures, indent=1))
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
