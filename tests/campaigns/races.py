"""Let two workers infer the same segments of a drive at once; their results must never mix.

    python tests/campaigns/races.py --races 50 [--s3 20] [--seed N] [--json FILE]

The second worker's network sees everything twice as far: its chunks differ from the first one's
in every array but the state, so that each stored array tells who wrote it. The kinds of races:

- `one machine`: the second sees that the process of the first lives;
- `two machines`: it cannot, and watches whether the claim is renewed;
- `frozen`: the first stands still (SIGSTOP) before or amid the writes of a chunk, or before its
  commit, until the second has taken its claims over, and goes on while the second is at work or
  after it has finished;
- `no claims`: claims are switched off, and the commits alone must tell: nobody may end with an
  error of a claim.

After each race every committed chunk must be, in all its arrays, the work of the one worker that
its commit names, and equal what that worker makes alone; whoever did not finish must have ended
with one of the documented errors; a further run must finish what is left. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from campaigns.small_runs import (
    Launcher,
    readable,
    small_config,
    working_folder,
    write_drive,
    write_tiny_weights,
)
from seaweed import running_seaweed

from storage import claims, upkeep
from storage.commits import Commits
from storage.layout import SEGMENT_ARRAYS
from storage.local_folder import LocalFolder
from storage.objects import Folder
from storage.reconstruction import ReconstructionStore
from tasks import infer
from tasks.config import ReconstructionConfig
from tasks.plan import plan_stage
from tasks.planned import read_plan
from tasks.probe import probe_stage

KINDS = {"one machine": 1, "two machines": 1, "frozen": 3, "no claims": 1}
POINTS = ("before the writes", "amid the writes", "before the commit")
OF_CLAIMS = {"Claimed", "ClaimLost"}
DOCUMENTED = {*OF_CLAIMS, "CommitExists"}
LEASE_S, RENEW_S, WATCH_S = 20.0, 2.0, 0.5  # instead of 90, 15 and 1
LIMIT_S = 240.0


@dataclass(frozen=True)
class Worker:
    """How one of the two workers is started."""

    name: str  # "first" or "second"
    machine: str  # "" for the real one
    has_claims: bool = True
    freezes: tuple[str, int] | None = None  # point, and at which round of chunks


@dataclass
class Outcome:
    """What became of one race."""

    kind: str
    where: str
    detail: str = ""
    ended: dict[str, str] = field(default_factory=dict)  # worker: error, or "finished"
    chunks: dict[str, int] = field(default_factory=dict)  # worker: chunks that count in the end
    left: int = 0  # chunks that a further run had to compute
    faults: list[str] = field(default_factory=list)


# ---- the workers


def work(worker: Worker, url: str, config: ReconstructionConfig, result: str) -> None:
    """Infer all segments as `worker`; write how it ended."""
    if worker.machine:
        claims.LEASE_S, claims.RENEW_S, claims.WATCH_S = LEASE_S, RENEW_S, WATCH_S
        claims._machine = lambda: worker.machine
    if not worker.has_claims:
        switch_claims_off()
    platform.node = lambda: worker.name  # recorded in the commits
    if worker.name == "second":
        make_distinct()
    if worker.freezes:
        freeze_at(*worker.freezes)
    segments = range(len(read_plan(ReconstructionStore.open(url)).segments))
    try:
        infer.infer_stage.fn(url, tuple(segments), config.infer)
        ended = "finished"
    except Exception as error:
        ended = type(error).__name__
        traceback.print_exc()
    Path(result).write_text(ended)


class NoClaim:
    """What the holder of no claim sees."""

    deaths = 0


def switch_claims_off() -> None:
    """Whatever this process wants to claim is its own at once, and nobody else sees it."""

    def claims_of_nothing(
        self: ReconstructionStore, progress: Mapping[str, int], given_up: Any = None
    ) -> Any:
        return nullcontext({name: NoClaim() for name in progress})

    ReconstructionStore.claim = lambda self, name, progress=0: nullcontext(NoClaim())
    ReconstructionStore.claims = claims_of_nothing


def make_distinct() -> None:
    """Double all that the network says of a frame; the state stays."""
    original = infer.chunk_tensors

    def doubled(*arguments: Any) -> dict[str, Any]:
        tensors = original(*arguments)
        return {n: t if n.startswith("state_") else 2 * t for n, t in tensors.items()}

    infer.chunk_tensors = doubled


def freeze_at(point: str, count: int) -> None:
    """Stop this process when it gets to `point` for the `count`th time."""
    passed = 0

    def stop() -> None:
        nonlocal passed
        passed += 1
        if passed == count:
            os.kill(os.getpid(), signal.SIGSTOP)

    if point == "before the commit":
        commit = Commits.create

        def late_commit(self: Commits, records: Any) -> list[str]:
            stop()
            return commit(self, records)

        Commits.create = late_commit
        return
    for kind in (LocalFolder, Folder):
        create = kind.create_many

        def late_create(self: Folder, objects: Any, create: Any = create) -> list[str]:
            names = sorted(objects)
            if not any("/c." in name for name in names):
                return create(self, objects)
            half = len(names) // 2 if point == "amid the writes" else 0
            others = create(self, {name: objects[name] for name in names[:half]}) if half else []
            stop()
            return others + create(self, {name: objects[name] for name in names[half:]})

        kind.create_many = late_create


# ---- the races


class Track:
    """Where races take place: a folder or a bucket, and what either worker makes there alone."""

    def __init__(self, root: str, folder: Path, launcher: Launcher, environment: Any) -> None:
        self._root, self._folder, self._launcher = root, folder, launcher
        self._environment = environment
        self._where = "s3" if environment else "local"
        self._video = write_drive(folder / "drive.mp4")
        self._config = small_config(write_tiny_weights(folder / "tiny.safetensors"))
        self.alone = {name: self._run_alone(name) for name in ("first", "second")}

    def _prepare(self, name: str) -> str:
        url = f"{self._root}/{name}/drive.zarr"
        probe_stage.fn(str(self._video), "drive", url)
        plan_stage.fn(url, self._config)
        return url

    def _start(self, worker: Worker, url: str, result: Path) -> ForkServerProcess:
        return self._launcher.start(
            work, worker, url, self._config, str(result), environment=self._environment
        )

    def _run_alone(self, name: str) -> dict[str, str]:
        url, result = self._prepare(f"alone-{name}"), self._folder / f"{self._where}-{name}"
        process = self._start(Worker(name, ""), url, result)
        process.join(LIMIT_S)
        if result.read_text() != "finished":
            raise RuntimeError(f"the {name} worker alone ended with {result.read_text()}")
        return readable(url)

    def race(self, number: int, rng: random.Random) -> Outcome:
        """Let two workers loose on one drive and judge what is stored."""
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        outcome = Outcome(kind, self._where)
        try:
            url = self._prepare(f"{number:03d}")
            self._run_both(outcome, url, number, rng)
            self._judge(outcome, url)
            self._finish(outcome, url, number)
        except Exception:
            outcome.faults.append(traceback.format_exc(limit=4))
        return outcome

    def _run_both(self, outcome: Outcome, url: str, number: int, rng: random.Random) -> None:
        results = {n: self._folder / f"{self._where}-{number}-{n}" for n in ("first", "second")}
        freezes = (rng.choice(POINTS), rng.randint(1, 8)) if outcome.kind == "frozen" else None
        machines = ("one", "other") if outcome.kind in ("two machines", "frozen") else ("", "")
        has_claims = outcome.kind != "no claims"
        first = Worker("first", machines[0], has_claims, freezes)
        second = Worker("second", machines[1], has_claims)
        processes = [self._start(first, url, results["first"])]
        if freezes:
            wait_until_stopped(processes[0])
            outcome.detail = f"{freezes[0]} of round {freezes[1]}"
        else:
            time.sleep(rng.choice([0.0, rng.uniform(0, 2.0)]))
        processes.append(self._start(second, url, results["second"]))
        if freezes:
            self._await_progress(processes[1], url, rng)
            os.kill(processes[0].pid, signal.SIGCONT)
        for process in processes:
            process.join(LIMIT_S)
            if process.is_alive():
                outcome.faults.append("a worker hangs")
                process.kill()
        outcome.ended = {n: p.read_text() if p.exists() else "died" for n, p in results.items()}
        expected = {"finished", *DOCUMENTED} - (set() if has_claims else OF_CLAIMS)
        for name, ended in outcome.ended.items():
            if ended not in expected:
                outcome.faults.append(f"the {name} worker ended with {ended}")

    def _await_progress(self, second: ForkServerProcess, url: str, rng: random.Random) -> None:
        """Wait until the second worker has begun, is half done, or has ended."""
        store = ReconstructionStore.open(url)
        before = len(store.commit_names("infer"))
        wanted = rng.choice([1, 4, 1000])
        deadline = time.monotonic() + LIMIT_S
        while second.is_alive() and time.monotonic() < deadline:
            if len(store.commit_names("infer")) >= before + wanted:
                return
            second.join(0.02)

    def _judge(self, outcome: Outcome, url: str) -> None:
        """Every committed chunk is the work of the one worker that its commit names."""
        store = ReconstructionStore.open(url)
        found = readable(url)
        for name, record in store.commits("infer").items():
            segment, chunk = (int(part) for part in name.split("/")[1:])
            arrays = [f"{segment}/{chunk}/{spec.name}" for spec in SEGMENT_ARRAYS]
            arrays.append(f"{segment}/{chunk}/state")
            owner = self.alone[record["host"]]
            wrong = [a for a in arrays if found.get(a) != owner[a]]
            if wrong:
                outcome.faults.append(f"{name} of the {record['host']} worker: not its {wrong}")
        outcome.faults += [f"damaged: {name}" for name in upkeep.verify(store)]

    def _finish(self, outcome: Outcome, url: str, number: int) -> None:
        store, result = ReconstructionStore.open(url), self._folder / f"{self._where}-{number}-last"
        before = store.commits("infer")
        process = self._start(Worker("first", ""), url, result)
        process.join(LIMIT_S)
        if not result.exists() or result.read_text() != "finished":
            outcome.faults.append("a further run does not finish what is left")
        after = store.commits("infer")
        outcome.left = len(after) - len(before)
        if any(after.get(name) != record for name, record in before.items()):
            outcome.faults.append("a further run computed finished chunks again")
        outcome.chunks = dict(Counter(record["host"] for record in before.values()))
        self._judge(outcome, url)


def wait_until_stopped(process: ForkServerProcess) -> None:
    """Return once the process has stopped itself, or has ended."""
    deadline = time.monotonic() + LIMIT_S
    while process.is_alive() and time.monotonic() < deadline:
        status = Path(f"/proc/{process.pid}/stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "T":
            return
        process.join(0.02)


def run_all(track: Track, races: int, seed: int, at_once: int) -> list[Outcome]:
    """All races of one place."""

    def run_one(number: int) -> Outcome:
        outcome = track.race(number, random.Random(seed * 10_000 + number))
        mark = "FAIL" if outcome.faults else "ok  "
        print(
            f"{mark} {outcome.where} {number}: {outcome.kind} {outcome.detail}: "
            f"{outcome.ended}, chunks {outcome.chunks}, left {outcome.left}",
            *outcome.faults,
            sep="\n      ",
            flush=True,
        )
        return outcome

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(run_one, range(races)))


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Figures of all races."""
    return {
        "races": len(outcomes),
        "kinds": dict(Counter(f"{o.kind}, {o.where}" for o in outcomes)),
        "ends": dict(Counter(" / ".join(o.ended.values()) for o in outcomes)),
        "chunks_by": dict(sum((Counter(o.chunks) for o in outcomes), Counter())),
        "chunks_left_to_a_further_run": sum(o.left for o in outcomes),
        "races_with_faults": sum(bool(o.faults) for o in outcomes),
    }


@contextmanager
def s3_environment(folder: Path) -> Any:
    """A running S3 server; the environment leads to it."""
    with running_seaweed(folder) as server:
        os.environ |= server.environment
        yield server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--races", type=int, default=50)
    parser.add_argument("--s3", type=int, default=0, help="how many of them on S3")
    parser.add_argument("--at-once", type=int, default=2, help="races at the same time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the outcomes to")
    parser.add_argument("--keep", type=Path, help="folder to work in, left as it is")
    arguments = parser.parse_args()
    began, outcomes = time.monotonic(), []
    with working_folder(arguments.keep) as folder, ExitStack() as stack:
        launcher = Launcher(folder / "workers.log")
        places = [(str(folder / "local"), arguments.races - arguments.s3, {})]
        if arguments.s3:
            server = stack.enter_context(s3_environment(folder / "seaweed"))
            places.append((server.url, arguments.s3, server.environment))
        for root, races, environment in places:
            track = Track(root, folder, launcher, environment)
            outcomes += run_all(track, races, arguments.seed, arguments.at_once)
    found = {**summary(outcomes), "seconds": time.monotonic() - began}
    print(json.dumps(found, indent=1))
    if arguments.json:
        results = [asdict(outcome) for outcome in outcomes]
        arguments.json.write_text(json.dumps({**found, "outcomes": results}, indent=1))
    return 1 if found["races_with_faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
