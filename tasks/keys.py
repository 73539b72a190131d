"""What a stage's result depends on: its key, and which results fall with another's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from typing import Any

from storage.reconstruction import ReconstructionStore

FINISHED = "finished"  # commit of a drive, after those of all stages
ATTEMPTS = "attempts"  # commits "attempts/infer-...": what stages took, as `tasks.attempts` says
STAGES = ("probe", "plan", "infer", "align", "fuse", "report")
# Commits of the stages in order. Chunks of `infer` are not among them: each has its own key.
STAGE_COMMITS = ("probe", "plan", "align", "tiles", "fuse", "report")


def stage_key(stage: str, version: int, *inputs: Any) -> str:
    """Hash a stage's name, code version, the keys of its inputs and its settings.

    `inputs` are strings, numbers, dataclasses, or dicts and lists of these. Equal inputs give
    equal keys on every machine.
    """
    plain = [asdict(i) if is_dataclass(i) and not isinstance(i, type) else i for i in inputs]
    text = json.dumps([stage, version, *plain], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def commits_digest(names: Iterable[str]) -> str:
    """Digest of the names of all commits that a finished drive needs."""
    counted = sorted(n for n in names if n != FINISHED and not n.startswith(f"{ATTEMPTS}/"))
    return hashlib.sha256("\n".join(counted).encode()).hexdigest()


def drop_later(store: ReconstructionStore, stage: str) -> None:
    """Take back what was made from a stage's result, before the stage is done again.

    Else a kill in between would leave, say, the mesh of an old trajectory as finished.
    `infer` stands between `plan` and `align`.
    """
    after = "plan" if stage == "infer" else stage
    for later in STAGE_COMMITS[STAGE_COMMITS.index(after) + 1 :]:
        store.drop_commits(later)


def find_key(store: ReconstructionStore, stage: str) -> str | None:
    """Key of a stage; None where it has not finished."""
    return (store.read_commit(stage) or {}).get("key")


def require_key(store: ReconstructionStore, stage: str) -> str:
    """Key of a finished stage.

    Raises:
        ValueError: the stage has not finished.
    """
    commit = store.read_commit(stage)
    if commit is None:
        raise ValueError(
            f"stage {stage!r} of {store.url} has not finished; run `ttt3r reconstruct` again"
        )
    return str(commit["key"])
