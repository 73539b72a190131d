"""One drive: from video to poses, depth, mesh and report."""

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.artifacts import publish_drive, publish_ledger
from flows.children import Spread
from flows.fuse_tiles import fuse_drive
from flows.infer_segments import infer_drive
from flows.leaving import told_when_left
from flows.telemetry import observed
from storage.claims import Claim
from storage.credentials import refuse_credentials
from storage.drives import absolute, drive_name, require_output, store_url
from storage.errors import Claimed, ClaimLost, StoreError
from storage.media import UnreadableVideo
from storage.reconstruction import ReconstructionStore
from storage.wording import reason_of
from tasks import metrics
from tasks.align import ImpossibleFocal, align_stage, require_possible_focal
from tasks.config import ReconstructionConfig
from tasks.finished import drop_outdated, write_finished
from tasks.helpers import helped
from tasks.infer import resolve_device
from tasks.ledger import write_ledger
from tasks.memory import use_one_arena
from tasks.plan import plan_stage, segment_lengths
from tasks.planned import read_record
from tasks.planner import record_prediction
from tasks.prices import Prices, read_prices
from tasks.probe import AnotherDrive, probe_stage, recording_key
from tasks.report import report_stage
from tasks.retries import retried
from ttt3r.state import find_rule
from ttt3r.weights import weights_info

log = logging.getLogger(__name__)


@flow(name="reconstruct-drive", flow_run_name="{location}", persist_result=False)
def reconstruct_drive(
    location: str,
    output: str,
    config: ReconstructionConfig = ReconstructionConfig(),  # noqa: B008 (frozen)
    name: str | None = None,
    spread: Spread = "here",
    prices: str | None = None,
    processes: Annotated[int, Field(ge=1)] = 1,
) -> str:
    """Turn one drive into poses, depth, a mesh and a report.

    What is already finished is not done again; a failure is recorded in the drive's store. The
    result is the same wherever it is computed.

    Args:
        location: video file, folder of clips or folder of images; path or fsspec URL.
        output: folder or URL that takes `<name>.zarr`.
        config: settings of all stages.
        name: name of the drive; None: that of the file or folder.
        spread: here: all in this process; deployments: groups of segments and batches of tiles
            each in a run of `infer-segments/fleet` and `fuse-tiles/fleet`, which this one awaits.
        prices: price table, a TOML file: what the drive cost goes into its ledger.
        processes: of this machine that share the work, where `spread` is "here"; on a CPU from some
            600 frames on. A GPU is used by one of them.

    Returns:
        URL of the drive's Zarr group.

    Raises:
        Claimed: another run is at work on this drive.
    """
    use_one_arena()
    with told_when_left(), observed(), helped(processes):
        try:
            for given in (location, output, config.infer.weights, prices or ""):
                refuse_credentials(given)
            require_output(output)
            check_config(config, spread)
            table = read_prices(prices) if prices else None
            name = name or drive_name(location)
        except Exception:  # a mistake of the call, which makes no store
            metrics.drive_failed()
            raise
        url = store_url(output, name)
        try:
            with ReconstructionStore.create(url, {}).claim("drive") as claim:
                run_stages(location, name, url, config, spread, table, claim)
        except (AnotherDrive, Claimed, ClaimLost, ImpossibleFocal):  # no failure of this drive
            raise
        except UnreadableVideo as error:
            record_failure(url, error, location)
            raise
        except Exception as error:
            record_failure(url, error)
            raise
    return url


def check_config(config: ReconstructionConfig, spread: Spread = "here") -> None:
    """Find a user's mistakes before anything is computed.

    Raises:
        ValueError: unknown weights or rule, segments that would overlap by more than half, or a
            device that is not there though it is wanted in this process.
    """
    segment_lengths(config.plan, weights_info(config.infer.weights).segment_frames)
    find_rule(config.infer.rule)
    if spread == "here":
        resolve_device(config.infer)


def run_stages(
    location: str,
    name: str,
    url: str,
    config: ReconstructionConfig,
    spread: Spread,
    prices: Prices | None,
    claim: Claim,
) -> None:
    """All stages of one drive, in order, as long as this run has its claim on the drive.

    Raises:
        ClaimLost: another run has taken the drive over.
    """
    check_claim = retried(claim.check)
    probe_stage(location, name, url)
    retried(check_focal)(url, config)
    retried(drop_outdated)(location, url, config)
    retried(forget_failure)(url)
    groups = plan_stage(url, config)
    retried(record_prediction)(url, config)
    infer_drive(url, name, groups, config.infer, spread)
    check_claim()
    align_stage(url, config.align, config.infer)
    check_claim()
    fuse_drive(url, name, config.fuse, config.infer, spread)
    check_claim()
    report_stage(url, location)
    retried(publish_drive)(url)
    publish_ledger(retried(write_ledger)(url, prices))
    retried(write_finished)(location, url, config)


def check_focal(url: str, config: ReconstructionConfig) -> None:
    """Find out before anything is dropped, or computed, that the focal length cannot be right."""
    require_possible_focal(read_record(ReconstructionStore.open(url)), config.align)


def forget_failure(url: str) -> None:
    """Take back what an earlier run of the drive recorded of its failure."""
    ReconstructionStore.open(url).drop_commits("failed")


def record_failure(url: str, error: Exception, unreadable: str | None = None) -> None:
    """Say in the drive's store that the last attempt failed, and why; count it.

    Args:
        url: the drive's store.
        error: why it failed.
        unreadable: location of the recording, if that is what cannot be read. As long as it stays
            the same, it is counted as failed once only.
    """
    record = {"error": reason_of(error), "time": datetime.now(UTC).isoformat()}
    is_known = False
    if unreadable is not None:
        with suppress(StoreError, OSError, ValueError):  # it is gone by now
            record["recording"] = recording_key(absolute(unreadable))
    try:
        store = ReconstructionStore.create(url, {})
        if "recording" in record:
            known = store.read_commit("failed") or {}
            is_known = known.get("recording") == record["recording"]
        store.commit("failed", record)
    except (StoreError, OSError) as also:  # the first error says more than this one
        log.warning("%s: the failure cannot be recorded: %s", url, also)
    if is_known:
        metrics.drive_still_unreadable()
    else:
        metrics.drive_failed()
