"""Run a small drive on S3, input and output, while a proxy breaks requests; compare all bytes.

    python tests/campaigns/s3_faults.py --faults 2000 [--seed N] [--rate R] [--json FILE]

A drive is run again until it has finished, with faults going on. Then

- all stored arrays and meshes equal those of the run without faults byte for byte;
- each chunk that was ever seen committed, past the proxy, while a run went on has the same commit
  at the end of that run and of all later ones: it was neither lost nor done again;
- what is committed reads back as its digests say.

Exit code 1 where any of this does not hold, or where 1,000 faults or more are asked for and one of
the kinds did not occur. What few requests can meet (older listings, conflicts, late writes, a full
store) is drawn more often than the rest. Forgotten multipart uploads are left out: only an object
of 100 MiB or more is written in parts, and these drives have none.

Waits are shortened by two settings that users have too:
PREFECT_TASKS_DEFAULT_RETRY_DELAY_SECONDS, and `read_timeout` in FSSPEC_S3.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from campaigns.small_runs import (
    CUT,
    Launcher,
    commit_objects,
    prefect_server,
    stored_objects,
    working_folder,
    write_drive,
    write_tiny_weights,
)
from fault_proxy import DEFAULT_WEIGHTS, SPELLS, Fault, FaultPlan, FaultProxy, running_proxy
from seaweed import running_seaweed

from storage import upkeep
from storage.folders import open_folder
from storage.reconstruction import ReconstructionStore

LONGEST_RUN_S = 900.0
MOST_RUNS = 12  # of one drive
NAME = "drive.zarr"
LOOK_S = 0.5  # between two looks at what is committed
ENOUGH = 1000  # faults, among which each kind occurs
KINDS = set(Fault) - {Fault.FORGOTTEN}
# Among the kinds that suit a request; conditional puts and spells are few.
WEIGHTS = DEFAULT_WEIGHTS | {
    Fault.FULL: 0.5,
    Fault.EXPIRED: 0.05,
    Fault.CONFLICT: 5.0,
    Fault.LATE: 2.0,
}
STALE_RATE = 0.4  # of the few listings that were answered otherwise before
CALM_S = 90.0  # between two spells: one ends all attempts, and stages need their time


class CampaignPlan(FaultPlan):
    """A plan under which listings are stale often, and spells come one at a time."""

    def choose(self, kinds: list[Fault], now: float) -> Fault | None:
        if Fault.STALE_LISTING in kinds and self._random.random() < STALE_RATE:
            return Fault.STALE_LISTING
        is_soon = any(now < end + CALM_S for end in self._ends.values())
        going_on = {kind for kind, end in self._ends.items() if now < end}
        unfit = {kind for kind in SPELLS if is_soon and kind not in going_on}
        return super().choose([kind for kind in kinds if kind not in unfit], now)


@dataclass
class Outcome:
    """What became of one drive."""

    faults: dict[str, int] = field(default_factory=dict)  # that it met, by kind
    exit_codes: list[int] = field(default_factory=list)  # of its runs
    seconds: float = 0.0
    kept: int = 0  # chunks that were seen committed while a run went on
    wrong: list[str] = field(default_factory=list)


class Campaign:
    """Drives that are run through the proxy, and what a run without faults gives."""

    def __init__(self, proxy: FaultProxy, launcher: Launcher, bucket: str, weights: Path) -> None:
        self._proxy, self._launcher, self._bucket = proxy, launcher, bucket
        self._options = ("--weights", str(weights), *CUT)
        if self._run("whole") != 0:
            raise RuntimeError(f"the run without faults failed: {launcher.logs.read_text()}")
        self.requests = proxy.requests
        self.reference = stored_objects(f"{bucket}/whole/{NAME}")

    def _run(self, name: str) -> int:
        """Exit code of `ttt3r reconstruct`; -9 where it had to be killed for its slowness."""
        source = f"{self._bucket}/input/drive.mp4"
        process = self._launcher.reconstruct(source, f"{self._bucket}/{name}", *self._options)
        process.join(LONGEST_RUN_S)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode if process.exitcode is not None else -9

    def reconstruct(self, number: int, plan: FaultPlan) -> Outcome:
        """Run one drive until it has finished, and judge what is stored after each run."""
        outcome, before, began = Outcome(), self._proxy.faults.copy(), time.monotonic()
        url, kept = f"{self._bucket}/{number:04d}/{NAME}", dict[str, bytes]()
        while not outcome.exit_codes or outcome.exit_codes[-1] != 0:
            if len(outcome.exit_codes) == MOST_RUNS:
                outcome.wrong.append(f"not finished after {MOST_RUNS} runs")
                break
            with noting_commits(url, kept):
                self._proxy.plan = plan
                outcome.exit_codes.append(self._run(f"{number:04d}"))
                self._proxy.plan = None
                time.sleep(2 * plan.silence_s)  # what is late arrives
            self._judge_kept(url, kept, outcome)
        outcome.kept = len(kept)
        found = self._proxy.faults - before
        outcome.faults = {kind.name: count for kind, count in sorted(found.items())}
        outcome.wrong += [f"{n} died or hung" for n in outcome.exit_codes if n < 0]
        self._judge_bytes(url, outcome)
        outcome.seconds = time.monotonic() - began
        open_folder(f"{self._bucket}/{number:04d}").delete_tree(NAME)
        return outcome

    def _judge_kept(self, url: str, kept: dict[str, bytes], outcome: Outcome) -> None:
        """Chunks that were seen committed must be as they were first seen."""
        now = committed_chunks(url)
        outcome.wrong += [
            f"{name} was {'lost' if name not in now else 'done again'}"
            for name, data in kept.items()
            if now.get(name) != data
        ]

    def _judge_bytes(self, url: str, outcome: Outcome) -> None:
        found = stored_objects(url)
        names = found.keys() | self.reference.keys()
        for name in sorted(names):
            if found.get(name) != self.reference.get(name):
                outcome.wrong.append(f"{name} {'differs' if name in found else 'is missing'}")
        damaged = upkeep.verify(ReconstructionStore.open(url))
        outcome.wrong += [f"damaged: {name}" for name in damaged]


def committed_chunks(url: str) -> dict[str, bytes]:
    """The commits of all finished chunks."""
    found = commit_objects(url)
    return {name: data for name, data in found.items() if name.startswith("commits/infer/")}


@contextmanager
def noting_commits(url: str, kept: dict[str, bytes]) -> Iterator[None]:
    """While the block runs, look again and again, and add to `kept` each commit as first seen."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_S):
            for name, data in committed_chunks(url).items():
                kept.setdefault(name, data)

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            yield
        finally:
            over.set()
        looking.result()  # raises where it could not look


def run_campaign(folder: Path, faults: int, seed: int, rate: float) -> dict[str, Any]:
    """Inject at least that many faults; what happened."""
    began, outcomes = time.monotonic(), list[Outcome]()
    with (
        running_seaweed(folder / "s3") as server,
        running_proxy(server, None) as proxy,
        prefect_server(folder),
    ):
        # The processes go through the proxy by fsspec's settings, this one past it.
        os.environ |= {
            **server.environment,
            "FSSPEC_S3": proxy.environment["FSSPEC_S3"],
            "PREFECT_TASKS_DEFAULT_RETRY_DELAY_SECONDS": "[0.2, 1, 3]",
        }
        drive = write_drive(folder / "drive.mp4")
        open_folder(f"{server.url}/input").upload("drive.mp4", drive)
        weights = write_tiny_weights(folder / "tiny.safetensors")
        campaign = Campaign(proxy, Launcher(folder / "runs.log"), server.url, weights)
        while proxy.faults.total() < faults:
            plan = CampaignPlan(seed + len(outcomes), rate, WEIGHTS)
            outcomes.append(campaign.reconstruct(len(outcomes), plan))
            print(
                f"{len(outcomes):>3} drives {proxy.faults.total():>5} faults  exit codes "
                f"{outcomes[-1].exit_codes} {outcomes[-1].seconds:5.1f} s {outcomes[-1].wrong}",
                flush=True,
            )
    codes = Counter(code for outcome in outcomes for code in outcome.exit_codes)
    return {
        "faults": proxy.faults.total(),
        "by_kind": {kind.value: count for kind, count in sorted(proxy.faults.items())},
        "requests": proxy.requests,
        "requests_of_a_run_without_faults": campaign.requests,
        "drives": len(outcomes),
        "runs": codes.total(),
        "exit_codes": dict(codes),
        "kinds_that_did_not_occur": sorted(KINDS - proxy.faults.keys()),
        "chunks_seen_committed": sum(outcome.kept for outcome in outcomes),
        "finished_at_once": sum(outcome.exit_codes == [0] for outcome in outcomes),
        "wrong": sum(len(outcome.wrong) for outcome in outcomes),
        "seconds": round(time.monotonic() - began),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=2000, help="least number of faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.2, help="share of the requests")
    parser.add_argument("--json", type=Path, help="file to write the outcomes to")
    parser.add_argument("--keep", type=Path, help="folder for logs that stays")
    arguments = parser.parse_args()
    with working_folder(arguments.keep) as folder:
        summary = run_campaign(folder, arguments.faults, arguments.seed, arguments.rate)
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=1))
    print(json.dumps({k: v for k, v in summary.items() if k != "outcomes"}, indent=1))
    is_one_missing = arguments.faults >= ENOUGH and summary["kinds_that_did_not_occur"]
    return 1 if summary["wrong"] or is_one_missing else 0


if __name__ == "__main__":
    sys.exit(main())
