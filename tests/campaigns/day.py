"""A day in miniature: every hour a collection of new drives, faults and kills all the time.

    python tests/campaigns/day.py --drives 300 [--s3 60] [--at-once 1] [--kills 8] [--seed N]
        [--json FILE]

24 collections of small drives, one in six broken on purpose, go one after the other through the
flow `reconstruct-collection` in one process that lives all day. In the first third of the day it
is killed (-9) at random moments and started again; with `--s3` a second such day writes through
a proxy that breaks requests (`tests/fault_proxy.py`), and the S3 server is killed too. What
failed for a reason that passes is run once more in the evening, as the next night's run would.

In the end every good drive must be finished, with the arrays of an undisturbed run byte for byte;
every broken one must have failed with a reason in one line, or be finished, which is counted apart
(`finished_damaged`), as there is no undisturbed run to compare it with; and in the undisturbed
rest of the day the memory of the process and of the servers must not grow. Memory is judged where a
day has 150 drives or more, and then must have been sampled; the result says for each day what grew
by how much, and whether that was judged. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from campaigns.small_runs import (
    Launcher,
    prefect_server,
    small_config,
    stored_objects,
    working_folder,
    write_drive,
    write_tiny_weights,
)
from fault_proxy import FaultPlan, running_proxy
from seaweed import SeaweedProcess

from storage.errors import StoreError
from tasks.config import ReconstructionConfig
from tasks.summary import progress

HOURS = 24
KINDS = 8  # of good drives: their undisturbed runs are made first
BROKEN = ("cut off", "no video", "empty", "damaged")
FAULT_RATE = 0.02  # of the requests
DISTURBED = 1 / 3  # of the day
WARM_UP = 0.25  # of the undisturbed rest: buffers and caches fill
# Of resident memory, in MiB for 100 drives. A mesh or a report that stayed would be 1 or more each.
LARGEST_GROWTH = 15.0
LEAST_DRIVES = 150  # of a day whose memory is judged: some 30 pass until buffers have their sizes
SAMPLE_S = 2.0

Expected = dict[str, dict[str, str]]  # digests of what is stored, by kind of drive


@dataclass(frozen=True)
class Drive:
    """One recording of the day."""

    name: str
    hour: int
    kind: str  # "good 3", or how it is broken


@dataclass
class Day:
    """What a day brought."""

    where: str
    drives: int = 0
    finished: int = 0  # good drives, each compared with its undisturbed run
    finished_damaged: int = 0  # drives broken on purpose; compared with nothing
    failed: dict[str, int] = field(default_factory=dict)  # drives by kind
    kills: dict[str, int] = field(default_factory=dict)  # by victim
    faults: dict[str, int] = field(default_factory=dict)  # of requests, by kind
    evening: int = 0  # drives that were run once more
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # (drives, MiB)
    # MiB for 100 drives, by process; None: too few samples to say.
    growth: dict[str, float | None] = field(default_factory=dict)
    is_memory_judged: bool = False
    wrong: list[str] = field(default_factory=list)


# ---- recordings


def make_day(folder: Path, count: int, samples: dict[str, Path], rng: random.Random) -> list[Drive]:
    """Write the recordings, a folder an hour."""
    drives = []
    for number in range(count):
        kind = rng.choice(BROKEN) if rng.random() < 1 / 6 else f"good {rng.randrange(KINDS)}"
        drive = Drive(f"drive{number:03d}", number * HOURS // count, kind)
        place = folder / f"hour{drive.hour:02d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{drive.name}.mp4").write_bytes(recording(kind, samples, rng))
        drives.append(drive)
    return drives


def recording(kind: str, samples: dict[str, Path], rng: random.Random) -> bytes:
    """Content of a recording; the index of an MP4 is at its end, so that half of it has none."""
    if kind in samples:
        return samples[kind].read_bytes()
    whole = rng.choice(list(samples.values())).read_bytes()
    if kind == "damaged":
        at = len(whole) // 3
        return whole[:at] + rng.randbytes(200) + whole[at + 200 :]
    return {"cut off": whole[: len(whole) // 2], "no video": b"no video\n" * 50, "empty": b""}[kind]


# ---- the process that lives all day


def live(
    folder: str, output: str, config: ReconstructionConfig, hours: list[int], hour_file: str
) -> None:
    """Reconstruct the collections of `hours`; the file says which one is at work."""
    from flows.reconstruct_collection import CollectionIncomplete, reconstruct_collection

    for hour in hours:
        say_hour(hour_file, hour)
        collection = f"{folder}/hour{hour:02d}/*.mp4"
        if not list(Path(folder).glob(f"hour{hour:02d}/*")):
            continue
        try:
            reconstruct_collection(collection, output, config)
        except CollectionIncomplete:
            continue
        except Exception as error:  # the store away for longer than all retries: the next hour
            print(f"hour {hour}: {type(error).__name__}: {error}", flush=True)
    say_hour(hour_file, HOURS)


def say_hour(hour_file: str, hour: int) -> None:
    """Say which hour is at work; whoever looks sees this number or the one before."""
    Path(f"{hour_file}.new").write_text(str(hour))
    os.replace(f"{hour_file}.new", hour_file)


class Life:
    """Keeps that process alive, kills it, and watches its memory."""

    def __init__(
        self,
        folder: Path,
        output: str,
        config: ReconstructionConfig,
        launcher: Launcher,
        environment: dict[str, str],
    ) -> None:
        self._folder, self._output, self._config = folder, output, config
        self._launcher, self._environment = launcher, environment
        self._hour_file = folder / "hour"

    @property
    def hour(self) -> int:
        """The hour that is at work."""
        return int(self._hour_file.read_text()) if self._hour_file.exists() else 0

    def start(self, hours: list[int]) -> ForkServerProcess:
        """Let a process do the work of `hours`."""
        say_hour(str(self._hour_file), hours[0])
        task = (str(self._folder), self._output, self._config, hours, str(self._hour_file))
        return self._launcher.start(live, *task, environment=self._environment)

    def spend(
        self, day: Day, kills: list[tuple[float, str]], server: SeaweedProcess | None, pids: Any
    ) -> None:
        """Live through the day; `kills` are (hour, victim)."""
        process, undisturbed = self.start(list(range(HOURS))), 0
        while self.hour < HOURS:
            if not process.is_alive() and self.hour < HOURS:
                day.wrong.append(f"the process ended with {process.exitcode} at hour {self.hour}")
                return
            if kills and self.hour + time.monotonic() % 1 >= kills[0][0]:
                victim = kills.pop(0)[1]
                day.kills[victim] = day.kills.get(victim, 0) + 1
                if victim == "flow process":
                    with suppress(ProcessLookupError):  # so young that it has no group yet
                        os.killpg(process.pid, signal.SIGKILL)
                    process.kill()
                    process.join()
                    process = self.start(list(range(self.hour, HOURS)))
                elif server is not None:
                    server.kill()
                    server.start()
            if not kills and not undisturbed:
                undisturbed = self.hour + 1
            if undisturbed and self.hour >= undisturbed:
                share = self.hour / HOURS
                for name, pid in {"flow process": process.pid, **pids()}.items():
                    day.memory.setdefault(name, []).append((share * day.drives, resident_mib(pid)))
            process.join(SAMPLE_S)
        process.join()


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(samples: list[tuple[float, float]]) -> float | None:
    """MiB for 100 drives, by least squares after the warm-up; None if that cannot be said."""
    late = samples[int(WARM_UP * len(samples)) :]
    if len({drives for drives, _ in late}) < 2:
        return None
    drives, mib = np.array(late).T
    return float(np.polyfit(drives, mib, 1)[0] * 100)


# ---- the verdict


def unfinished(drives: list[Drive], output: str, expected: Expected) -> list[Drive]:
    """The good drives that are not finished, and all of which nothing is said.

    Where the store is away for longer than all retries, not even the reason can be left in it.
    """
    ends = {drive.name: end_of(f"{output}/{drive.name}.zarr") for drive in drives}
    left = [drive for drive in drives if ends[drive.name][0] != "done"]
    return [drive for drive in left if drive.kind in expected or ends[drive.name][1] is None]


def judge(day: Day, drives: list[Drive], output: str, expected: Expected) -> None:
    """Count what ended how, and say what is wrong."""
    for drive in drives:
        url = f"{output}/{drive.name}.zarr"
        stage, error = end_of(url)
        if stage == "done" and drive.kind not in expected:
            day.finished_damaged += 1
            continue
        if stage == "done":
            day.finished += 1
            if stored_objects(url) != expected[drive.kind]:
                day.wrong.append(f"{drive.name} ({drive.kind}) differs from an undisturbed run")
            continue
        day.failed[drive.kind] = day.failed.get(drive.kind, 0) + 1
        is_told = error and len(error.splitlines()) == 1 and "Traceback" not in error
        if drive.kind in expected or not is_told:
            day.wrong.append(f"{drive.name} ({drive.kind}) is at {stage} and says {error!r}")


def judge_memory(day: Day, processes: Iterable[str]) -> None:
    """Say how much each process has grown; in a day that is judged, not to know is wrong too."""
    day.growth = {name: growth(day.memory.get(name, [])) for name in processes}
    day.is_memory_judged = day.drives >= LEAST_DRIVES
    if not day.is_memory_judged:
        return
    for name, mib in day.growth.items():
        if mib is None:
            day.wrong.append(f"memory of the {name} was not sampled")
        elif mib > LARGEST_GROWTH:
            day.wrong.append(f"memory of the {name} grows by {mib:.1f} MiB for 100 drives")


def growth_in_words(day: Day) -> str:
    """What grew, and whether that counts."""
    found = {name: "unknown" if g is None else f"{g:+.1f}" for name, g in day.growth.items()}
    said = ", ".join(f"{name} {mib}" for name, mib in found.items())
    verdict = "judged" if day.is_memory_judged else f"not judged, fewer than {LEAST_DRIVES} drives"
    return f"MiB for 100 drives: {said} ({verdict})"


def end_of(url: str) -> tuple[str, str | None]:
    """The stage that a drive is at, or "done", and why it failed."""
    try:
        found = progress(url)
    except StoreError as error:
        return "nothing", str(error)
    return found["stage"], found["error"]


@dataclass(frozen=True)
class Place:
    """Where a day is spent."""

    name: str
    drives: int
    output: str
    kills: list[tuple[float, str]]  # (hour, victim)
    pids: Callable[[], dict[str, int]]  # of the servers whose memory is watched
    server: SeaweedProcess | None = None
    environment: dict[str, str] = field(default_factory=dict)


def spend_day(
    place: Place,
    folder: Path,
    samples: dict[str, Path],
    expected: Expected,
    config: ReconstructionConfig,
    launcher: Launcher,
    rng: random.Random,
) -> Day:
    """A whole day in one place, its evening and its verdict."""
    day, made = Day(place.name, place.drives), make_day(folder, place.drives, samples, rng)
    life = Life(folder, place.output, config, launcher, place.environment)
    life.spend(day, list(place.kills), place.server, place.pids)
    left = unfinished(made, place.output, expected)
    day.evening = len(left)
    if left:
        life.start(sorted({drive.hour for drive in left})).join()
    judge(day, made, place.output, expected)
    judge_memory(day, ("flow process", *place.pids()))
    print(
        f"{day.where}: {day.drives} drives, wrong: {day.wrong or 'nothing'}\n"
        f"    {growth_in_words(day)}",
        flush=True,
    )
    return day


def undisturbed_runs(
    samples: dict[str, Path], folder: Path, config: ReconstructionConfig, launcher: Launcher
) -> Expected:
    """What is stored of each good recording by a run that nothing disturbs."""
    process = launcher.start(
        live, str(folder / "samples"), str(folder / "alone"), config, [0], str(folder / "alone.txt")
    )
    process.join()
    return {k: stored_objects(str(folder / f"alone/{p.stem}.zarr")) for k, p in samples.items()}


def moments(rng: random.Random, count: int, victims: list[str]) -> list[tuple[float, str]]:
    """Kills, by hour, in the disturbed part of the day."""
    hours = sorted(rng.uniform(0, HOURS * DISTURBED) for _ in range(count))
    return [(hour, rng.choice(victims)) for hour in hours]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--drives", type=int, default=300)
    parser.add_argument("--s3", type=int, default=0, help="how many of them on S3, with faults")
    parser.add_argument("--at-once", type=int, default=1, help="processes that share the others")
    parser.add_argument("--kills", type=int, default=8, help="in each process's day")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--keep", type=Path, help="folder to work in, left as it is")
    arguments = parser.parse_args()
    rng, began = random.Random(arguments.seed), time.monotonic()
    with (
        working_folder(arguments.keep) as folder,
        prefect_server(folder) as prefect,
        ThreadPoolExecutor(arguments.at_once + 1) as pool,
        ExitStack() as stack,
    ):
        launcher = Launcher(folder / "runs.log")
        config = small_config(write_tiny_weights(folder / "tiny.safetensors"))
        (folder / "samples/hour00").mkdir(parents=True)
        samples = {
            f"good {k}": write_drive(folder / f"samples/hour00/sample{k}.mp4", 8 + 2 * k, seed=k)
            for k in range(KINDS)
        }
        expected = undisturbed_runs(samples, folder, config, launcher)
        local = arguments.drives - arguments.s3
        places = []
        for number in range(arguments.at_once):
            share = local * (number + 1) // arguments.at_once - local * number // arguments.at_once
            kills = moments(rng, arguments.kills, ["flow process"])
            output = str(folder / f"out-{number}")
            pids = lambda: {"Prefect server": prefect}  # noqa: E731
            places.append(Place(f"local-{number}", share, output, kills, pids))
        if arguments.s3:
            server = SeaweedProcess(folder / "seaweed")
            stack.callback(server.kill)
            server.start()
            os.environ |= server.access.environment
            plan = FaultPlan(arguments.seed, FAULT_RATE)
            proxy = stack.enter_context(running_proxy(server.access, plan))
            kills = moments(rng, arguments.kills, ["flow process", "flow process", "S3 server"])
            places.append(
                Place(
                    "s3",
                    arguments.s3,
                    f"{server.access.url}/out",
                    kills,
                    lambda: {"S3 server": server.pid},
                    server,
                    proxy.environment,
                )
            )
        tasks = []
        for place in places:
            own = random.Random(rng.random())
            task = (place, folder / place.name, samples, expected, config, launcher, own)
            tasks.append(pool.submit(spend_day, *task))
        days = [task.result() for task in tasks]
        if arguments.s3:
            days[-1].faults = {str(kind): count for kind, count in proxy.faults.items()}
    found = {"days": [asdict(day) for day in days], "seconds": time.monotonic() - began}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    for day in found["days"]:
        del day["memory"]
    print(json.dumps(found, indent=1))
    return 1 if any(day.wrong for day in days) else 0


if __name__ == "__main__":
    sys.exit(main())
