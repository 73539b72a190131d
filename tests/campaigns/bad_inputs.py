"""Probe and read every bad recording of `bad_files`, each in a process of its own; then a run.

    python tests/campaigns/bad_inputs.py [--only PATTERN] [--json FILE] [--flow none|sample|all]

Exit code 1 where anything is not as it must be: an exception other than the documented ones, a
death or a hang of the process, a wrong frame, fewer frames than `bad_files` asks for, a message of
several lines or with content of another file, a connection, too much memory, or an effect on the
good drive of the collection.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from campaigns.bad_files import GROUP, SECRET, BadInput, all_bad_inputs, encode
from numbered_video import RATE, number_in

from storage.errors import StoreRefused
from storage.media import UnreadableVideo
from storage.probe import probe_drive
from storage.records import DriveRecord, FrameTable
from storage.video import read_frames

LIMIT_S = 120.0  # a case; it takes a second or two alone on a core
LARGEST_MIB = 1800.0  # resident, above the process that forks
NOBODY = 65534


@dataclass
class Outcome:
    """What became of one bad input."""

    name: str
    frames: int = 0
    judged: int = 0  # frames whose numbers were read: a wrong one would have been seen
    unsure: int = 0  # frames of groups whose bytes are hurt: what they show is not judged
    message: str = ""  # of the error, else the problems that were found
    seconds: float = 0.0
    mib: float = 0.0
    failures: list[str] = field(default_factory=list)


def check(case: BadInput, path: Path, limit_s: float = LIMIT_S) -> Outcome:
    """Probe and read one case in a process of its own, and judge what comes of it."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    began = time.monotonic()
    process = context.Process(target=_examine, args=(case, path, sender))
    process.start()
    sender.close()
    outcome = Outcome(case.name)
    if receiver.poll(limit_s):
        try:
            outcome = receiver.recv()
        except EOFError:
            process.join()
            outcome.failures.append(f"the process died with exit code {process.exitcode}")
    else:
        outcome.failures.append(f"no end within {limit_s:g} s")
        process.kill()
    process.join()
    outcome.seconds = time.monotonic() - began
    return outcome


def _examine(case: BadInput, path: Path, sender: Connection) -> None:
    if os.getuid() == 0 and "unreadable" in case.name:
        os.setuid(NOBODY)  # root may read everything
    before = _resident_mib()
    outcome = Outcome(case.name)
    try:
        record, table = probe_drive(str(path))
    except (UnreadableVideo, StoreRefused) as error:
        _judge_error(case, outcome, str(error))
    except BaseException as error:
        outcome.failures.append(f"undocumented {type(error).__name__}: {error}")
    else:
        _examine_frames(case, outcome, record, table)
    outcome.mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    if outcome.mib > LARGEST_MIB:
        outcome.failures.append(f"{outcome.mib:.0f} MiB of memory")
    sender.send(outcome)


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _judge_error(case: BadInput, outcome: Outcome, message: str) -> None:
    outcome.message = message
    fails = outcome.failures
    if case.error is None and (case.least or not case.either):
        fails.append(f"{case.least} frames or more were expected, not: {message}")
    if case.error and not re.search(case.error, message):
        fails.append(f"the error says not {case.error!r} but: {message}")
    if len(message.splitlines()) != 1 or len(message) > 600 or not message.isprintable():
        fails.append(f"the error is not one short line of plain text: {message!r}")
    if SECRET[:8] in message or "root:" in message:
        fails.append(f"the error shows what another file holds: {message}")


def _examine_frames(
    case: BadInput, outcome: Outcome, record: DriveRecord, table: FrameTable
) -> None:
    outcome.frames = record.frames
    outcome.message = "; ".join(record.problems)
    fails = outcome.failures
    if case.error is not None and not case.either:
        fails.append(f"{record.frames} frames came; an error was expected")
    if record.frames < case.least:
        fails.append(f"{record.frames} frames, expected at least {case.least}")
    if case.finding and not re.search(case.finding, outcome.message):
        fails.append(f"no finding says {case.finding!r}: {outcome.message}")
    try:
        fails += _record_faults(record, table)
        pictures = _pictures(record, table, 0, record.frames)
        fails += _range_faults(record, table, pictures)
        if case.numbered:
            wrong, outcome.unsure = _count_wrong(case, record, table)
            outcome.judged = record.frames - outcome.unsure
            fails += [f"{wrong} wrong frames"] if wrong else []
    except BaseException as error:
        fails.append(f"reading failed: {type(error).__name__}: {error}")


def _record_faults(record: DriveRecord, table: FrameTable) -> Iterator[str]:
    """What is wrong with the record and the table as such."""
    if DriveRecord.from_json(json.loads(json.dumps(record.to_json()))) != record:
        yield "the record does not survive JSON"
    if len(table) != record.frames or sum(c.frames for c in record.clips) != record.frames:
        yield "frame counts disagree"
    if not np.isfinite(table.timestamp).all() or (np.diff(table.timestamp) < 0).any():
        yield "timestamps fall, or are not finite"
    if not (np.isfinite(record.fps) and record.fps > 0 and np.isfinite(record.duration_s)):
        yield f"{record.fps} frames a second, {record.duration_s} s"
    for number in range(len(record.clips)):
        index = table.index[table.clip == number]
        if (np.diff(index) <= 0).any() or (index < 0).any():
            yield f"positions in clip {number} do not rise"
    if any("\n" in problem or not problem.isprintable() for problem in record.problems):
        yield "a problem is not one plain line"


def _pictures(record: DriveRecord, table: FrameTable, start: int, stop: int) -> list[int]:
    """A digest of each frame."""
    return [hash(frame.tobytes()) for frame in read_frames(record, table, start, stop)]


def _range_faults(record: DriveRecord, table: FrameTable, whole: list[int]) -> Iterator[str]:
    """Ranges whose frames are not those of the whole."""
    if len(whole) != record.frames:
        yield f"{len(whole)} of {record.frames} frames can be read"
    for start in {record.frames // 3, record.frames // 2, max(0, record.frames - 2)}:
        stop = min(start + 5, record.frames)
        if _pictures(record, table, start, stop) != whole[start:stop]:
            yield f"frames {start}..{stop} differ from those read from the beginning"


def _count_wrong(case: BadInput, record: DriveRecord, table: FrameTable) -> tuple[int, int]:
    """(frames that show another number than they should, frames whose own bytes are hurt)."""
    numbers = [number_in(frame) for frame in read_frames(record, table, 0, record.frames)]
    told = table.index if case.numbered == "index" else np.rint(table.timestamp * RATE)
    shifts = [int(n - t) for n, t in zip(numbers, told, strict=True)]
    hit = case.hit()
    judged = [s for s, n in zip(shifts, numbers, strict=True) if not _is_hit(n, s, hit)]
    # Times count from the first frame that decodes, which need not be the first of the file.
    right = 0 if case.numbered == "index" else max(set(judged), key=judged.count, default=0)
    return sum(s != right for s in judged), len(shifts) - len(judged)


def _is_hit(number: int, shift: int, hit: frozenset[int]) -> bool:
    return number // GROUP * GROUP in hit or (number - shift) // GROUP * GROUP in hit


# ---- a whole run


def run_collection(cases: list[BadInput], folder: Path) -> list[str]:
    """Reconstruct all cases beside a good drive; what is not as it must be."""
    collection, alone = folder / "collection", folder / "alone"
    for place in (collection, alone):
        place.mkdir()
        encode(place / "good.mp4", range(40))
    for case in cases:
        case.make(collection / case.name)
    faults = _run(alone / "good.mp4", folder / "out_alone", 0)
    faults += _run(collection, folder / "out", 1)
    if faults:
        return faults
    outcomes = json.loads((folder / "out" / "collection.json").read_text())["drives"]
    for outcome in outcomes:
        error = outcome["error"]
        if error and (len(error.splitlines()) != 1 or "Traceback" in error or "root:" in error):
            faults.append(f"{outcome['name']}: {error!r}")
    print(f"{len(outcomes)} drives, {sum(o['error'] is not None for o in outcomes)} set aside")
    return faults + _differences(folder / "out" / "good.zarr", folder / "out_alone" / "good.zarr")


def _run(source: Path, output: Path, expected: int) -> list[str]:
    arguments = ["--weights", "untrained", "--segment-frames", "16", "--chunk-frames", "8"]
    command = [sys.executable, "-m", "flows.cli", "reconstruct", str(source), "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TTT3R_TRACEBACK", None)
    done = subprocess.run(
        [*command, str(output), *arguments], env=environment, capture_output=True, timeout=7200
    )
    said = done.stderr.decode(errors="replace")
    faults = []
    if done.returncode != expected:
        faults.append(f"{source.name}: exit code {done.returncode}: {said[-2000:]}")
    if "Traceback" in said or "root:x" in said:
        faults.append(f"{source.name} says: {said[-2000:]}")
    return faults


def _differences(store: Path, expected: Path) -> list[str]:
    """Stored array objects of a drive that differ from those of the same drive run alone."""
    ours, theirs = _array_bytes(store), _array_bytes(expected)
    names = [n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)]
    return [f"{store.name}: {name} differs from a run alone" for name in sorted(names)]


def _array_bytes(store: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("c.*")}
    assert found, f"{store} holds no array"
    return found


# ---- the campaign


@contextmanager
def watched_server() -> Iterator[tuple[str, list[Any]]]:
    """(a URL on this machine that must not be asked, the connections that came all the same)."""
    came: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, address = server.accept()
                except OSError:
                    return
                came.append(address)
                connection.close()

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/never.ts", came


def check_all(cases: list[BadInput], folder: Path) -> list[Outcome]:
    """Make and check every case."""
    outcomes = []
    for number, case in enumerate(cases):
        place = folder / f"{number:03}"
        place.mkdir()
        place.chmod(0o755)
        try:
            case.make(place / case.name)
            outcome = check(case, place / case.name)
        except (OSError, ValueError) as error:
            outcome = Outcome(case.name, failures=[f"cannot be made: {error}"])
        outcomes.append(outcome)
        mark = "FAIL" if outcome.failures else "ok  "
        said = (outcome.failures or [outcome.message])[0][:150]
        print(
            f"{mark} {case.name[:40]!r:<44} {outcome.frames:>3} frames {outcome.seconds:5.1f} s "
            f"{outcome.mib:5.0f} MiB  {said!r}",
            flush=True,
        )
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression of case names")
    parser.add_argument("--json", type=Path, help="file to write the outcomes to")
    parser.add_argument("--flow", choices=["none", "sample", "all"], default="sample")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, watched_server() as (url, came):
        root = Path(folder)
        root.chmod(0o755)
        cases = [c for c in all_bad_inputs(url) if re.search(arguments.only, c.name)]
        (root / "files").mkdir(mode=0o755)
        outcomes = check_all(cases, root / "files")
        chosen = [c for c in cases if c.quick or arguments.flow == "all"]
        faults = [] if arguments.flow == "none" else run_collection(chosen, root)
        if came:
            faults.append(f"{len(came)} connections to a server that a file names")
    failed = [outcome for outcome in outcomes if outcome.failures]
    summary = {
        "files": len(outcomes),
        "failed": len(failed),
        "frames": sum(o.frames for o in outcomes),
        "files_where_a_wrong_frame_would_be_seen": sum(o.judged > 0 for o in outcomes),
        "frames_of_which_a_wrong_one_would_be_seen": sum(o.judged for o in outcomes),
        "unsure_frames": sum(o.unsure for o in outcomes),
        "slowest_s": max(o.seconds for o in outcomes),
        "largest_mib": max(o.mib for o in outcomes),
        "connections": len(came),
        "faults_of_the_run": faults,
    }
    print(json.dumps(summary, indent=1))
    for outcome in failed:
        print(repr(outcome.name), *outcome.failures, sep="\n    ")
    if arguments.json:
        results = [asdict(outcome) for outcome in outcomes]
        arguments.json.write_text(json.dumps({**summary, "outcomes": results}, indent=1))
    return 1 if failed or faults else 0


if __name__ == "__main__":
    sys.exit(main())
