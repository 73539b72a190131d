"""Finished: whether a drive needs a run at all, by few requests and without opening its data.

The record `finished` is written after all stages. It counts only together with all commits that
were there then, so that whatever declares a part unfinished (`ttt3r repair`, an operator) makes the
drive unfinished too.
"""

from __future__ import annotations

import logging
from typing import Any

from storage.drives import absolute
from storage.errors import StoreError
from storage.reconstruction import ReconstructionStore
from tasks import align, fuse, infer, plan, probe, report
from tasks.config import ReconstructionConfig
from tasks.keys import FINISHED, commits_digest, find_key, stage_key
from tasks.planned import ASIDE
from ttt3r.weights import weights_info

log = logging.getLogger(__name__)

STAGES = (probe, plan, infer, align, fuse, report)
VERSIONS = [*(stage.VERSION for stage in STAGES), fuse.MERGE_VERSION]


def finished_key(location: str, config: ReconstructionConfig) -> str:
    """Key of all that decides a drive's result: its files, the configuration, the weights."""
    return _key(probe.fingerprint(absolute(location)), config)


def _key(files: list[list[Any]], config: ReconstructionConfig) -> str:
    network = [config.infer.rule, config.infer.precision, weights_info(config.infer.weights).sha256]
    parts = (config.plan, config.align, config.fuse)
    return stage_key(FINISHED, 1, VERSIONS, files, network, *parts)


def write_finished(location: str, url: str, config: ReconstructionConfig) -> None:
    """Say that all stages are finished, unless there is more to do.

    Segments that are set aside want another try. A recording that changed after it was probed, say
    a folder into which clips are still copied, is finished as it was: the next run probes it again.
    """
    store = ReconstructionStore.open(url)
    files = probe.fingerprint(absolute(location))
    if find_key(store, "probe") != probe.fingerprint_key(files):
        log.warning("%s: the recording changed meanwhile; the next run takes it up", location)
        return
    names = store.commit_names()
    if any(name.startswith(f"{ASIDE}/") for name in names):
        return
    record = {"key": _key(files, config), "commits": commits_digest(names)}
    known = store.read_commit(FINISHED) or {}
    if {name: known.get(name) for name in record} != record:
        store.commit(FINISHED, record)


def drop_outdated(location: str, url: str, config: ReconstructionConfig) -> None:
    """A run begins: what another configuration finished is finished no more."""
    store = ReconstructionStore.open(url)
    known = store.read_commit(FINISHED)
    if known is not None and known.get("key") != finished_key(location, config):
        store.drop_commits(FINISHED)


def is_finished(location: str, url: str, config: ReconstructionConfig) -> bool:
    """Whether the store at `url` holds the finished result of this drive and configuration."""
    try:
        store = ReconstructionStore.open(url)
        record = store.read_commit(FINISHED)
        if record is None or record.get("commits") != commits_digest(store.commit_names()):
            return False
        return bool(record.get("key") == finished_key(location, config))
    except (StoreError, OSError, ValueError):
        return False  # nothing there, or nothing that can be read now: its run will tell
