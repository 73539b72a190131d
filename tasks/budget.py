"""Budget: which drives of a collection one run may take, by what they are predicted to take."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from storage.drives import DriveLocation
from storage.folders import open_folder
from tasks.config import BudgetConfig, ReconstructionConfig
from tasks.planner import DriveEstimate, estimate_drives, known_rates, total
from tasks.prices import Prices, read_prices

log = logging.getLogger(__name__)


class OverBudget(ValueError):
    """A run would take more than is allowed."""


def within_budget(
    drives: Sequence[DriveLocation],
    output: str,
    config: ReconstructionConfig,
    budget: BudgetConfig,
    device_kind: str | None = None,
) -> tuple[list[DriveLocation], list[DriveLocation]]:
    """Drives that a run may take, and those that it leaves to the next one, both in order.

    Without limits all are taken. What is done already takes nothing; a drive that does not fit
    is left, and later ones that do fit are taken.

    Raises:
        OverBudget: they do not all fit, and `when_over` is "refuse".
        ValueError: there is a limit, and nothing is known to predict from, or no price.
    """
    if budget.max_gpu_hours is None and budget.max_cost is None:
        return list(drives), []
    prices = read_prices(budget.prices) if budget.prices else None
    rates = known_rates(output, config.infer.weights, device_kind, budget.rates)
    estimates = estimate_drives(drives, output, config, rates, prices)
    taken: list[DriveLocation] = []
    left: list[DriveLocation] = []
    sums = {"gpu_hours": 0.0, "cost": 0.0}
    for drive, estimate in zip(drives, estimates, strict=True):
        needs = _needs(estimate, budget)
        fits = all(sums[name] + need <= limit for name, (need, limit) in needs.items())
        (taken if fits else left).append(drive)
        if fits:
            sums = {n: s + needs.get(n, (0.0, 0.0))[0] for n, s in sums.items()}
    if left:
        _refuse_or_warn(estimates, left, budget, prices)
    return taken, left


def taken_by_run(
    run: str,
    drives: Sequence[DriveLocation],
    output: str,
    config: ReconstructionConfig,
    budget: BudgetConfig,
) -> tuple[list[DriveLocation], list[DriveLocation]]:
    """`within_budget` as a run decided when it began, whatever it has finished since.

    A run that is moved to another machine goes on with the drives that it took, and takes no others
    for what these needed. The names are in `<output>/budget-<run>.json` until `forget_taken`.

    Args:
        run: id of the flow run, the same on every machine.
        drives: those that are not finished.
        output, config, budget: see `within_budget`, also for what is raised.
    """
    if budget.max_gpu_hours is None and budget.max_cost is None:
        return list(drives), []
    folder, name = open_folder(output), _record_name(run)
    known = folder.read(name)
    if known is None:
        taken, left = within_budget(drives, output, config, budget)
        folder.write(name, json.dumps([drive.name for drive in taken]).encode())
        return taken, left
    names = set(json.loads(known))
    return [d for d in drives if d.name in names], [d for d in drives if d.name not in names]


def forget_taken(run: str, output: str) -> None:
    """Remove what a run that has ended decided."""
    open_folder(output).delete(_record_name(run))


def _record_name(run: str) -> str:
    return f"budget-{run}.json"


def _needs(estimate: DriveEstimate, budget: BudgetConfig) -> dict[str, tuple[float, float]]:
    """What a drive takes of everything that is limited, and the limit."""
    found: dict[str, tuple[float | None, float | None]] = {
        "gpu_hours": (estimate.left.gpu_hours if estimate.left else None, budget.max_gpu_hours),
        "cost": (estimate.cost, budget.max_cost),
    }
    needs = {}
    for name, (need, limit) in found.items():
        if limit is None:
            continue
        if need is None:
            raise ValueError(
                f"a budget is given and nothing is known of the {name.replace('_', '-')} that "
                "these weights take: no drive is finished under the output. Reconstruct one "
                "without a budget first, or give the JSON of a benchmark as rates "
                "(tests/benchmarks/pipeline.py)"
            )
        needs[name] = (need, limit)
    return needs


def _refuse_or_warn(
    estimates: Sequence[DriveEstimate],
    left: Sequence[DriveLocation],
    budget: BudgetConfig,
    prices: Prices | None,
) -> None:
    usage, cost = total(estimates)
    said = []
    if budget.max_gpu_hours is not None and usage is not None:
        said.append(f"{usage.gpu_hours:.3g} GPU-hours of {budget.max_gpu_hours:.3g} allowed")
    if budget.max_cost is not None and prices is not None:
        said.append(f"{cost:.3g} {prices.currency} of {budget.max_cost:.3g} allowed")
    whole = f"all {len(estimates)} drives are predicted to take {' and '.join(said)}"
    names = ", ".join(drive.name for drive in left[:10]) + (", ..." if len(left) > 10 else "")
    if budget.when_over == "refuse":
        raise OverBudget(
            f"{whole}; nothing was begun. Raise the limit, give fewer drives (`ttt3r plan` lists "
            f"them), or take what fits: without {names}"
        )
    log.warning("%s; left for the next run: %s", whole, names)
