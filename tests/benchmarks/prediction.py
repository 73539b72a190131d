"""What runs were predicted to cost against what they cost: `ttt3r reconstruct` on real files.

    python tests/benchmarks/prediction.py --json FILE
    python tests/benchmarks/prediction.py --learn 80:640x360 --ask 300:640x360 DRIVE

Drives are FRAMES:WIDTHxHEIGHT, the bundled street back and forth, or locations of recordings. Those
of `--learn` are reconstructed first and leave their ledgers; those of `--ask` are predicted from
these, then reconstructed, each in a process of its own. Seconds of the clock and of
the processor are compared, as the ledgers have both: on a machine that does other things too, the
clock says more about those.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import make_drive, parsed_size

from storage.reconstruction import ReconstructionStore
from tasks.ledger import LEDGER, observed
from tasks.rates import BYTES, GPU_STAGES, Observation, fit_rates

LEARN = ["60:640x360", "200:640x360", "400:640x360", "120:1280x720"]
ASK = ["100:640x360", "300:640x360", "800:640x360", "250:1280x720"]
FIELDS = {"wall": "seconds", "cpu": "cpu_seconds"}


def drive_at(text: str, folder: Path) -> str:
    """Location of a drive that is named or described."""
    frames, _, size = text.partition(":")
    if not frames.isdigit() or not size:
        return text
    return str(make_drive(folder / f"street_{frames}_{size}.mp4", int(frames), parsed_size(size)))


def reconstruct(
    location: str, output: Path, is_bare: bool
) -> tuple[dict[str, Any], dict[str, float]]:
    """The ledger of a drive, and what its whole process took: seconds and processor seconds."""
    command = [sys.executable, "-m", "flows.cli", "reconstruct", location, "--output", str(output)]
    if is_bare:
        here = str(Path(__file__).resolve().parent)
        code = f"import sys; sys.path[:0] = [{here!r}, '.']; import prediction; "
        code += "prediction.run_stages(*sys.argv[1:])"
        command = [sys.executable, "-c", code, location, f"{output}/{Path(location).stem}.zarr"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{location}: {done.stderr[-2000:]}")
    cpu = sum(getattr(after, n) - getattr(before, n) for n in ("ru_utime", "ru_stime"))
    store = ReconstructionStore.open(f"{output}/{Path(location).stem}.zarr")
    ledger = store.read_commit(LEDGER)
    if ledger is None:
        raise RuntimeError(f"{location}: no ledger was written")
    return ledger, {"wall": seconds, "cpu": cpu}


def run_stages(location: str, url: str) -> None:
    """The stages of `reconstruct_drive`, one after the other, without Prefect around them."""
    from tasks.align import align_stage
    from tasks.config import ReconstructionConfig
    from tasks.fuse import fuse_tiles_stage, merge_tiles_stage, plan_tiles_stage
    from tasks.infer import infer_stage
    from tasks.ledger import write_ledger
    from tasks.plan import plan_stage
    from tasks.probe import probe_stage
    from tasks.report import report_stage

    config = ReconstructionConfig()
    probe_stage.fn(location, Path(location).stem, url)
    for group in plan_stage.fn(url, config):
        infer_stage.fn(url, group, config.infer)
    align_stage.fn(url, config.align, config.infer)
    for batch in range(plan_tiles_stage.fn(url, config.fuse)):
        fuse_tiles_stage.fn(url, [batch], config.fuse, config.infer)
    merge_tiles_stage.fn(url, config.fuse)
    report_stage.fn(url, location)
    write_ledger(url)


def observation(ledger: dict[str, Any], clock: str) -> Observation:
    """What a ledger teaches, by the clock wanted."""
    seen = observed(ledger)
    if len(seen) != 1:
        raise RuntimeError(
            f"the ledger of {ledger['drive']} is of an earlier version, or of several devices"
        )
    return replace(seen[0], amounts={**ledger[FIELDS[clock]], BYTES: ledger["used"][BYTES]})


def compare(
    seen: Sequence[Observation], asked: Observation, process: dict[str, float], clock: str
) -> dict[str, Any]:
    """Predicted and actual seconds of a drive: of inference, of the other stages, in all."""
    predicted = fit_rates(seen).predict(asked.work)
    row: dict[str, Any] = {"drive": asked.source, "frames": asked.work.frames, "clock": clock}
    for name, amounts in (("predicted", predicted), ("actual", asked.amounts)):
        infer = sum(amounts[stage] for stage in GPU_STAGES)
        whole = sum(value for stage, value in amounts.items() if stage != BYTES)
        row[name] = {"infer": infer, "others": whole - infer, "all": whole, "bytes": amounts[BYTES]}
        row[f"{name}_stages"] = dict(amounts)
    row["error"] = {k: row["predicted"][k] / v - 1 for k, v in row["actual"].items()}
    row["process"] = process[clock]  # starts of Python and Prefect, and Prefect between stages
    return row


def show(row: dict[str, Any]) -> None:
    """One drive, for people."""
    cells = [
        f"{what} {row['predicted'][what]:7.1f} / {row['actual'][what]:7.1f} s {error:+5.0%}"
        for what, error in row["error"].items()
        if what != "bytes"
    ]
    stored = f"bytes {row['error']['bytes']:+.0%}"
    whole = f"process {row['process']:.1f} s"
    print(f"{row['drive']:24s} {row['clock']:4s} {'  '.join(cells)}  {stored}  {whole}", flush=True)


def main() -> None:
    """Run the benchmark and print a table: predicted / actual."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--learn", nargs="+", default=LEARN)
    parser.add_argument("--ask", nargs="+", default=ASK)
    parser.add_argument("--bare", action="store_true", help="run the stages without Prefect")
    parser.add_argument("--output", type=Path, help="keep the reconstructions here")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        output = settings.output or Path(scratch) / "out"
        bare = settings.bare
        ledgers = [reconstruct(drive_at(d, Path(scratch)), output, bare)[0] for d in settings.learn]
        rows = []
        for text in settings.ask:
            ledger, process = reconstruct(drive_at(text, Path(scratch)), output, bare)
            for clock in FIELDS:
                seen = [observation(one, clock) for one in ledgers]
                rows.append(compare(seen, observation(ledger, clock), process, clock))
                show(rows[-1])
    for clock in FIELDS:
        told = [row for row in rows if row["clock"] == clock]
        predicted, actual = (sum(r[k]["all"] for r in told) for k in ("predicted", "actual"))
        worst = max(abs(row["error"]["all"]) for row in told)
        print(
            f"{clock}: all drives together {predicted:.1f} / {actual:.1f} s "
            f"{predicted / actual - 1:+.0%}, worst drive {worst:.0%}"
        )
    if settings.json:
        settings.json.write_text(json.dumps({"ledgers": ledgers, "results": rows}, indent=2))


if __name__ == "__main__":
    main()
