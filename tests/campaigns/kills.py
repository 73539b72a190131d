"""Kill runs of a small drive at random moments, run again, and compare all that is stored.

    python tests/campaigns/kills.py --runs 200 [--s3 40] [--at-once 2] [--seed N]
        [--json FILE] [--keep FOLDER]

Each run is killed once to three times with signal 9, then run until it has finished. Killed is
one of: the process of `ttt3r reconstruct`; its process group, as when a machine is lost; with
`--s3 N` for that many of the runs the S3 server, which is started again and which all drives at
work are met by. After each kill

- a reader is given the uninterrupted run's bytes or an error, for every chunk, state and file;
- each chunk that was committed before this or an earlier kill has the same commit as then;
- nothing of what is committed is damaged; a drive at work is judged so when its run has ended.

After the last run

- all stored arrays and meshes equal those of the uninterrupted run byte for byte;
- each chunk that was committed before a kill has the same commit as then: it was neither lost nor
  done again.

Exit code 1 where any of this does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from multiprocessing.context import ForkServerProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from campaigns.small_runs import (
    CUT,
    Launcher,
    commit_objects,
    prefect_server,
    readable,
    stored_objects,
    working_folder,
    write_drive,
    write_tiny_weights,
)
from seaweed import SeaweedProcess

from storage import upkeep
from storage.folders import open_folder
from storage.objects import Folder
from storage.reconstruction import ReconstructionStore

# Where the kill shall hit, and how often; inference is what costs.
STAGES = {"probe": 2, "plan": 1, "infer": 12, "align": 3, "fuse": 4, "report": 3}
# What is committed when a stage has ended.
ENDS = {
    "probe": "commits/probe.json",
    "plan": "commits/plan.json",
    "align": "commits/align.json",
    "fuse": "commits/fuse/merged.json",
    "report": "commits/report.json",
}
LONGEST_RUN_S = 600.0
MOST_RUNS = 6  # of one drive; a run may fail while the S3 server is away
S3_AT_ONCE = 6
NAME = "drive.zarr"


@dataclass
class Outcome:
    """What became of one drive that was killed."""

    where: str  # "local" or "s3"
    kills: list[tuple[str, str]] = field(default_factory=list)  # (victim, stage it was in)
    runs: int = 0
    kept: int = 0  # chunks that were committed before the last kill of the drive or the server
    beside: int = 0  # of these, in a lane beside one that lacked the chunk of that round
    recovery_s: float = 0.0  # longest time from a kill to the end of the next run
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run."""

    objects: dict[str, str]  # digests of stored bytes, by object
    readable: dict[str, str]  # digests of values, by what is read
    seconds: dict[str, float]  # of each stage
    chunks: int


class Campaign:
    """Drives that are killed, in one place: a local folder or a bucket."""

    def __init__(
        self,
        root: str,
        video: Path,
        weights: Path,
        launcher: Launcher,
        server: SeaweedProcess | None = None,
    ) -> None:
        self._root, self._video, self._launcher = root, video, launcher
        self._options = ("--weights", str(weights), *CUT)
        self._server = server
        self._where = "s3" if server else "local"
        self._at_work: dict[str, Outcome] = {}  # drives whose runs a kill of the server meets
        self._kept: dict[str, dict[str, bytes]] = {}  # by drive: chunks' commits seen at kills
        self.server_kills = 0
        self._there = threading.RLock()  # held while the server must be, or is not, there
        self.reference = self._uninterrupted()

    def _start(self, name: str) -> ForkServerProcess:
        access = self._server.access.environment if self._server else {}
        output = f"{self._root}/{name}"
        return self._launcher.reconstruct(self._video, output, *self._options, environment=access)

    def _uninterrupted(self) -> Reference:
        process, url, ends = self._start("whole"), f"{self._root}/whole/{NAME}", {}
        began = time.monotonic()
        while process.is_alive():
            there = {n for n in commit_objects(url) if n not in ends}
            ends |= dict.fromkeys(there, time.monotonic() - began)
            process.join(0.01)
        if process.exitcode != 0:
            raise RuntimeError(f"the uninterrupted run ended with exit code {process.exitcode}")
        chunks = [seconds for name, seconds in ends.items() if name.startswith("commits/infer/")]
        stops = {"start": 0.0, **{stage: ends[name] for stage, name in ENDS.items()}}
        stops["infer"] = max(chunks)
        order = ("start", *STAGES)
        spent = {b: stops[b] - stops[a] for a, b in pairwise(order)}
        return Reference(stored_objects(url), readable(url), spent, len(chunks))

    def run(self, number: int, rng: random.Random) -> Outcome:
        """Kill one drive's runs, run it to its end, and judge what is stored."""
        outcome, name = Outcome(self._where), f"{number:04d}"
        url = f"{self._root}/{name}/{NAME}"
        try:
            for _ in range(rng.choice([1] * 8 + [2, 3])):
                if not self._kill_one(name, url, rng, outcome):
                    break
                with self._there:
                    self._judge_committed(url, outcome)
                    self._judge_undamaged(url, outcome)
            self._finish(name, outcome)
            if not outcome.faults:
                with self._there:
                    self._judge_finished(url, outcome)
        except Exception:
            outcome.faults.append(traceback.format_exc(limit=5))
        return outcome

    def _kill_one(self, name: str, url: str, rng: random.Random, outcome: Outcome) -> bool:
        """Start a run and kill; False if it ended before."""
        before = len(outcome.kills)
        with self._run_of(name, outcome) as process:
            self._await_moment(process, open_folder(url), rng)
            if process.is_alive():
                self._kill(self._choose_victim(rng), process, url, outcome)
            process.join(LONGEST_RUN_S)
        if len(outcome.kills) == before and process.exitcode != 0:
            outcome.faults.append(f"a run that nobody killed: exit code {process.exitcode}")
        return len(outcome.kills) > before

    @contextmanager
    def _run_of(self, name: str, outcome: Outcome) -> Iterator[ForkServerProcess]:
        """A run of a drive, which the block sees to its end."""
        with self._there:  # a kill of the server is this run's from its first moment on
            process, began = self._start(name), time.monotonic()
            self._at_work[f"{self._root}/{name}/{NAME}"] = outcome
        outcome.runs += 1
        yield process
        del self._at_work[f"{self._root}/{name}/{NAME}"]
        if process.exitcode != -signal.SIGKILL:
            outcome.recovery_s = max(outcome.recovery_s, time.monotonic() - began)

    def _kill(self, victim: str, process: ForkServerProcess, url: str, outcome: Outcome) -> None:
        if victim == "s3 server":
            with self._there:
                self._kill_server(dict(self._at_work))
            return
        with suppress(ProcessLookupError):  # it ended this very moment
            (os.killpg if victim == "process group" else os.kill)(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == -signal.SIGKILL:
            with self._there:
                outcome.kills.append((victim, stage_of(url, self.reference.chunks)))
                self._note_committed(url, outcome)

    def _kill_server(self, met: dict[str, Outcome]) -> None:
        """Kill and start the S3 server; what the drives at work had committed is still there."""
        for url, outcome in met.items():
            outcome.kills.append(("s3 server", stage_of(url, self.reference.chunks)))
            self._note_committed(url, outcome)
        self._server.kill()
        self._server.start()
        self.server_kills += 1
        for url, outcome in met.items():
            self._judge_committed(url, outcome)

    def _note_committed(self, url: str, outcome: Outcome) -> None:
        """Remember the commits of all chunks that are finished now; those first seen stay."""
        found = commit_objects(url)
        chunks = {n: data for n, data in found.items() if n.startswith("commits/infer/")}
        self._kept[url] = chunks | self._kept.get(url, {})
        outcome.kept, outcome.beside = len(chunks), beside_unfinished(chunks)

    def _choose_victim(self, rng: random.Random) -> str:
        if self._server and rng.random() < 0.3:
            return "s3 server"
        return rng.choice(["process", "process group"])

    def _await_moment(self, process: ForkServerProcess, folder: Folder, rng: random.Random) -> None:
        """Wait until a random moment of a random stage; a stage that is over is passed by."""
        stage = rng.choices(list(STAGES), list(STAGES.values()))[0]
        seconds = self.reference.seconds
        if stage == "infer" and rng.random() < 0.75:  # else anywhere, the loading of weights too
            count = rng.randrange(self.reference.chunks)
            pause = rng.uniform(0, 0.08)
            reached = lambda: len(folder.sizes("commits/infer")) >= count  # noqa: E731
        else:
            before = [None, *STAGES][list(STAGES).index(stage)]
            pause = rng.uniform(0, seconds[stage])
            count = self.reference.chunks
            reached = {
                None: lambda: True,
                "infer": lambda: len(folder.sizes("commits/infer")) >= count,
            }.get(before, lambda: folder.read(ENDS[before]) is not None)
        while process.is_alive():
            with self._there:
                if reached():
                    break
            process.join(0.05 if self._server else 0.002)
        process.join(pause)

    def _judge_committed(self, url: str, outcome: Outcome) -> None:
        """Compare what a reader is given, and the chunks that were committed before a kill."""
        kept = self._kept.get(url, {})
        for name, found in readable(url).items():
            if found != self.reference.readable.get(name):
                outcome.faults.append(f"after {outcome.kills[-1]}: {name} reads otherwise")
        outcome.faults += _changed(kept, commit_objects(url), f"after {outcome.kills[-1]}")

    def _judge_undamaged(self, url: str, outcome: Outcome) -> None:
        if commit_objects(url) and (damaged := upkeep.verify(ReconstructionStore.open(url))):
            outcome.faults.append(f"after {outcome.kills[-1]}: damaged: {damaged}")

    def _finish(self, name: str, outcome: Outcome) -> None:
        """Run until it finishes: with a server that is killed, a run may fail."""
        while outcome.runs < MOST_RUNS:
            before = len(outcome.kills)
            with self._run_of(name, outcome) as process:
                process.join(LONGEST_RUN_S)
            if process.exitcode == 0:
                return
            if len(outcome.kills) == before and not self._server:
                break
        outcome.faults.append(f"run {outcome.runs} ended with exit code {process.exitcode}")

    def _judge_finished(self, url: str, outcome: Outcome) -> None:
        outcome.faults += _changed(self._kept.pop(url, {}), commit_objects(url), "in the end")
        found, expected = stored_objects(url), self.reference.objects
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                outcome.faults.append(f"{name} differs from the uninterrupted run")
        if not outcome.faults:
            open_folder(url).delete_tree("")


def _changed(kept: dict[str, bytes], now: dict[str, bytes], when: str) -> list[str]:
    return [
        f"{name} {when}: {'done again' if name in now else 'lost'}"
        for name, data in kept.items()
        if now.get(name) != data
    ]


def stage_of(url: str, chunks: int) -> str:
    """The stage that was in progress, from what is committed; `chunks` are all of the drive."""
    commits = commit_objects(url)
    done = [stage for stage, name in ENDS.items() if name in commits]
    if done == ["probe", "plan"]:
        found = sum(name.startswith("commits/infer/") for name in commits)
        return "infer" if found < chunks else "align"
    following = {None: "probe", "probe": "plan", "align": "fuse", "fuse": "report"}
    return following.get(done[-1] if done else None, "after the report")


def beside_unfinished(chunks: dict[str, bytes]) -> int:
    """Committed chunks whose round the other lane has not finished: it is computed again with it.

    Lanes resume together, so that batches have the shapes of an uninterrupted run. What comes
    out for the lane that had finished is not written.
    """
    parts = [name.removesuffix(".json").split("/")[2:] for name in chunks]
    done = {(int(segment), int(chunk)) for segment, chunk in parts}
    return sum((segment ^ 1, chunk) not in done for segment, chunk in done if segment ^ 1 < 5)


def run_all(campaign: Campaign, runs: int, seed: int, at_once: int) -> list[Outcome]:
    """Kill and finish `runs` drives, so many at a time."""

    def run_one(number: int) -> Outcome:
        outcome = campaign.run(number, random.Random(seed * 10_000 + number))
        mark = "FAIL" if outcome.faults else "ok  "
        killed = ", ".join(f"{victim} in {stage}" for victim, stage in outcome.kills)
        lines = [f"{mark} {outcome.where} {number}: {killed or 'ended first'}", *outcome.faults]
        print("\n      ".join(lines), flush=True)
        return outcome

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(run_one, range(runs)))


def summary(outcomes: list[Outcome], server_kills: int, seconds: float) -> dict[str, object]:
    """Figures of all drives together; a kill of the server meets several, and is one kill."""
    met = [kill for outcome in outcomes for kill in outcome.kills]
    victims = Counter(victim for victim, _ in met)
    drives_met = victims.pop("s3 server", 0)
    killed = [outcome for outcome in outcomes if outcome.kills]
    return {
        "drives_killed": len(killed),
        "drives_that_ended_first": len(outcomes) - len(killed),
        "on_s3": sum(outcome.where == "s3" for outcome in killed),
        "kills": victims.total() + server_kills,
        "victims": {**victims, "s3 server": server_kills},
        "drives_met_by_a_kill_of_the_server": drives_met,
        "stages": dict(Counter(stage for _, stage in met)),  # of each drive that was met
        "finished_chunks_kept": sum(outcome.kept for outcome in outcomes),
        "of_these_in_a_round_computed_again": sum(outcome.beside for outcome in outcomes),
        "longest_run_after_a_kill_s": max((o.recovery_s for o in outcomes), default=0.0),
        "drives_with_faults": sum(bool(outcome.faults) for outcome in outcomes),
        "seconds": seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200, help="drives to kill")
    parser.add_argument("--s3", type=int, default=0, help="how many of them on S3")
    parser.add_argument("--at-once", type=int, default=2, help="local drives at the same time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the outcomes to")
    parser.add_argument("--keep", type=Path, help="folder to work in, left as it is")
    arguments = parser.parse_args()
    began, server_kills = time.monotonic(), 0
    with (
        working_folder(arguments.keep) as folder,
        prefect_server(folder),
        ThreadPoolExecutor(2) as places,
        ExitStack() as stack,
    ):
        video = write_drive(folder / "drive.mp4")
        weights = write_tiny_weights(folder / "tiny.safetensors")
        launcher = Launcher(folder / "runs.log")
        local, tasks = arguments.runs - arguments.s3, []
        if local:
            campaign = Campaign(str(folder / "local"), video, weights, launcher)
            task = (campaign, local, arguments.seed, arguments.at_once)
            tasks.append(places.submit(run_all, *task))
        if arguments.s3:
            server = SeaweedProcess(folder / "seaweed")
            stack.callback(server.kill)
            server.start()
            os.environ |= server.access.environment
            campaign = Campaign(server.access.url, video, weights, launcher, server)
            # Many at a time: they wait most of the time, and a kill of the server meets them all.
            task = (campaign, arguments.s3, arguments.seed + 1, S3_AT_ONCE)
            tasks.append(places.submit(run_all, *task))
        outcomes = [outcome for task in tasks for outcome in task.result()]
        if arguments.s3:
            server_kills = campaign.server_kills
    found = summary(outcomes, server_kills, time.monotonic() - began)
    print(json.dumps(found, indent=1))
    if arguments.json:
        results = {**found, "outcomes": [asdict(outcome) for outcome in outcomes]}
        arguments.json.write_text(json.dumps(results, indent=1))
    return 1 if any(outcome.faults for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
