"""The training loop: resumable to the step, on a CPU or one GPU."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from ttt3r.model import Model
from ttt3r.training.depth_run import DepthRun
from ttt3r.training.parallel import any_of_all, rank
from ttt3r.training.pose_run import PoseRun
from ttt3r.training.run import Run
from ttt3r.training.settings import STATE_FILE, TrainSettings
from ttt3r.training.whole_run import WholeRun

log = logging.getLogger(__name__)
LOG_FILE = "log.jsonl"
_KINDS: dict[str, type[Run[Any]]] = {"all": WholeRun, "depth": DepthRun, "poses": PoseRun}


def train(
    settings: TrainSettings,
    out_dir: str | Path,
    resume: str | Path | None = None,
    *,
    device: str | None = None,
    stop_after: int | None = None,
    minutes: float = math.inf,
    finish_in: float = math.inf,
) -> Model:
    """Train until `settings.total_steps`; return the model with averaged weights.

    Writes to `out_dir`: `state.pt` (all that resuming needs) and `log.jsonl` (one object per
    step or validation; with frames/s, the share of the time spent rendering and asking for the
    rotations to keep, and on a GPU its busy share and its memory).

    Args:
        settings: what to do.
        out_dir: folder for results; created.
        resume: folder of an earlier run, or a .safetensors file whose weights to start from,
            widened where `settings.model` is a whole number of times as wide, with room for depth's
            channels where they learn. From a folder the loss curve goes on as if never interrupted.
        device: "cuda" or "cpu"; None takes a GPU where there is one.
        stop_after: leave after this many steps in all; a later resume goes on from there.
        minutes: leave after this time, likewise.
        finish_in: minutes in which to be done: rates fall with the time, if that is over before
            the steps are. Such a run cannot be repeated to the bit.

    Raises:
        ValueError: `out_dir` holds another run; nothing to resume, or of another network;
            rotations are to be kept, or depth or poses learnt alone, without weights to start from;
            one of these by a network where channels for the one read those for the other.
    """
    folder = Path(out_dir)
    if (folder / STATE_FILE).exists() and not _is_same(resume, folder):
        raise ValueError(f"{folder} holds a run; resume that one, or choose another folder")
    if settings.keep_rotations and resume is None:
        raise ValueError("keep_rotations is for trained weights; found none to resume from")
    if settings.learns != "all" and resume is None:
        raise ValueError(
            f"learning {settings.learns} alone is for trained weights; found none to resume from"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = _KINDS[settings.learns](settings, device)
    if resume is not None:
        run.resume(Path(resume))
    folder.mkdir(parents=True, exist_ok=True)
    last = min(settings.total_steps, stop_after or settings.total_steps)
    with _open_log(folder / LOG_FILE, run.step) as out:
        began = saved = time.monotonic()
        is_last = run.step >= last
        while not is_last:
            _write(out, run.advance((time.monotonic() - began) / 60 / finish_in))
            spent = (time.monotonic() - began) / 60
            is_last = run.step >= last or any_of_all(spent > min(minutes, finish_in))
            if rank() == 0 and (is_last or run.step % settings.validate_every == 0):
                for record in run.validate():
                    _write(out, record)
            if rank() == 0 and (is_last or time.monotonic() - saved > settings.save_every_s):
                run.save(folder)
                saved = time.monotonic()
    run.close()
    return run.whole()


def _is_same(resume: str | Path | None, folder: Path) -> bool:
    return resume is not None and Path(resume).resolve() == folder.resolve()


def _open_log(path: Path, step: int) -> TextIO:
    """The log of a run that is at `step`: what came after its last save will come again."""
    if rank() > 0:
        return Path(os.devnull).open("w")
    if path.exists():
        rows = path.read_text().splitlines(keepends=True)
        path.write_text("".join(row for row in rows if json.loads(row)["step"] <= step))
    return path.open("a", buffering=1)


def _write(out: Any, record: dict[str, Any]) -> None:
    out.write(json.dumps(record) + "\n")
    if "validation" in record or record["step"] % 10 == 0:
        log.info("%s", json.dumps(record))
