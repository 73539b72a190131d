"""A fleet on one machine, broken on purpose: `make fleet-demo`.

A Prefect server on PostgreSQL, SeaweedFS as S3, two workers of the pool `gpu` (a CPU thread stands
in for each GPU) and one of `cpu` reconstruct a collection that lies on S3. While it runs, a worker
is killed with all its processes, and the server is killed and started again. Nothing is left
behind.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from local_fleet import REPOSITORY, LocalFleet, commits_of_all, running_fleet, wait_for_work
from seaweed import Seaweed, running_seaweed

from storage import upkeep
from storage.reconstruction import ReconstructionStore
from tasks.summary import list_stores, progress

RECORDINGS = REPOSITORY.parent / "shared" / "data" / "drives"
DEPLOYMENT = "reconstruct-collection/scheduled"
TAKEN_UP_WITHIN_S = 600  # 100 s until the run counts as lost, and what a busy machine adds
SAMPLE = REPOSITORY / "flows" / "samples" / "street.mp4"


def upload(s3: Seaweed, recordings: Path) -> str:
    """Put the collection on S3: real recordings where they are, and the rendered sample."""
    found = sorted(recordings.glob("*/*.mp4"))
    if not found:
        print(f"SKIPPED LOUDLY: no real recordings at {recordings}", flush=True)
    files = s3.filesystem()
    for drive, video in [*((v.parent.name, v) for v in found), ("street", SAMPLE)]:
        files.put_file(str(video), f"{s3.bucket}/logs/{drive}/{video.name}")
    return f"{s3.url}/logs"


def lose_a_node(fleet: LocalFleet, output: str) -> None:
    """Kill a worker in the middle of a group of segments; say when somebody goes on with it.

    Raises:
        TimeoutError: nobody does.
    """
    work = wait_for_work(output)
    name = fleet.lose_node(work.pid)
    began, kept = time.monotonic(), work.commits()
    fleet.start_worker("gpu", "replacement", "--limit", "1")
    print(f"killed worker {name} with its run; {len(kept)} chunks of the run stand", flush=True)
    while len(work.commits()) <= len(kept):
        if work.is_finished():
            print("its segments were finished, so that there is nothing to take up", flush=True)
            return
        if time.monotonic() - began > TAKEN_UP_WITHIN_S:
            raise TimeoutError(
                f"nobody went on with {', '.join(work.segments)} of {work.url} within "
                f"{TAKEN_UP_WITHIN_S} s; {len(kept)} chunks stand"
            )
        time.sleep(0.5)
    assert kept.items() <= work.commits().items(), "a chunk that was finished was computed again"
    print(f"the lost run was taken up {time.monotonic() - began:.0f} s later", flush=True)


def restart_the_server(fleet: LocalFleet, output: str) -> None:
    """Kill the Prefect server in the middle of inference and start it again."""
    wait_for_work(output)
    began = time.monotonic()
    fleet.kill_server()
    fleet.start_server()
    print(f"the server was killed, and is back after {time.monotonic() - began:.0f} s", flush=True)


def print_drives(output: str) -> bool:
    """One line a drive; whether each is finished or set aside with a reason."""
    print(f"\n{'drive':<28} {'stage':<8} {'chunks':>11}  {'set aside':<10} why it failed")
    rows = [progress(url) for url in list_stores(output)]
    for row in rows:
        chunks = f"{row['chunks_done']}/{row['chunks']}"
        aside = len(row["set_aside"]) or "-"
        print(
            f"{row['drive']:<28} {row['stage']:<8} {chunks:>11}  {aside:<10} {row['error'] or ''}"
        )
    stores = map(ReconstructionStore.open, list_stores(output))
    damaged = [name for store in stores for name in upkeep.verify(store)]
    print(f"read back and compared with their digests: {len(damaged)} damaged", flush=True)
    return not damaged and all(row["stage"] == "done" or row["error"] for row in rows)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recordings", type=Path, default=RECORDINGS)
    parser.add_argument("--undisturbed", action="store_true", help="Kill nothing.")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fleet-demo-") as name:
        folder = Path(name)
        with running_seaweed(folder / "s3") as s3:
            os.environ |= s3.environment
            with running_fleet(folder / "fleet", gpu_slots=2, extra=s3.environment) as fleet:
                sys.exit(run(fleet, s3, settings))


def run(fleet: LocalFleet, s3: Seaweed, settings: argparse.Namespace) -> int:
    """Reconstruct the collection, in the middle of it break things; the exit code."""
    collection, output = upload(s3, settings.recordings), f"{s3.url}/reconstructions"
    fleet.start_worker("cpu", "cpu")
    for name in ("gpu-a", "gpu-b"):
        fleet.start_worker("gpu", name, "--limit", "1")
    began = time.monotonic()
    config = {"infer": {"frames_per_run": 500}}  # small, to have several runs for each drive
    parameters = {"collection": collection, "output": output, "config": config}
    run_id = fleet.run(DEPLOYMENT, parameters)
    if not settings.undisturbed:
        lose_a_node(fleet, output)
        restart_the_server(fleet, output)
    ended = fleet.wait_for(run_id, timeout_s=3600)
    print(f"the collection ended {ended['state_name']} after {time.monotonic() - began:.0f} s")
    before, runs = commits_of_all(output), len(fleet.flow_runs("infer-segments"))
    fine = print_drives(output)
    began = time.monotonic()
    second = fleet.wait_for(fleet.run(DEPLOYMENT, parameters), 3600)
    again = len(fleet.flow_runs("infer-segments")) - runs
    print(f"a second run took {time.monotonic() - began:.0f} s and {again} runs of the pool gpu")
    drives = [progress(url) for url in list_stores(output)]
    wrong = problems([ended, second], drives, again)
    wrong += [] if fine else ["a drive is damaged, or neither finished nor failed with a reason"]
    wrong += [] if commits_of_all(output) == before else ["finished chunks were computed again"]
    for problem in wrong:
        print(f"WRONG: {problem}", flush=True)
    return 1 if wrong else 0


def problems(
    collections: list[dict[str, Any]], drives: list[dict[str, Any]], again: int
) -> list[str]:
    """What is wrong with how the collection's runs ended, and with the second one.

    A drive that failed, its store saying why, fails its collection. It is tried again by the second
    run, as are segments that were set aside; nothing else is.

    Args:
        collections: runs of the collection, as the server has them.
        drives: what is known of each drive, as `progress` gives it.
        again: runs of the pool gpu that the second run started.
    """
    right = "FAILED" if any(drive["error"] for drive in drives) else "COMPLETED"
    found = [
        f"a run of the collection ended {run['state_type']} instead of {right}: "
        f"{(run.get('state') or {}).get('message')}"
        for run in collections
        if run["state_type"] != right
    ]
    if again and not any(drive["error"] or drive["set_aside"] for drive in drives):
        found.append(f"the second run started {again} runs of the pool gpu; all was finished")
    return found


if __name__ == "__main__":
    main()
