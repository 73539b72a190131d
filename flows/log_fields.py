"""Fields that say of each line of a log which run, drive and segments it is about.

`deploy/logging.yaml` puts them, with what a line itself brings, into JSON.
"""

from __future__ import annotations

import logging
from typing import Any

FIELDS = {
    "collection": "collection",
    "location": "recording",
    "url": "drive",
    "indices": "segments",
}


class RunFields(logging.Filter):
    """Adds the fields of the run at hand; what a line says of itself stays."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields; no line is dropped."""
        fields = run_fields()
        if hasattr(record, "segment"):
            fields.pop("segments", None)
        record.__dict__.update(fields | record.__dict__)
        return True


def run_fields() -> dict[str, Any]:
    """Flow, run and task at hand, and those of their parameters that are in FIELDS."""
    from prefect.context import FlowRunContext, TaskRunContext  # this module is loaded by Prefect

    flow, task = FlowRunContext.get(), TaskRunContext.get()
    fields: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    if flow is not None and flow.flow_run is not None:
        fields |= {"flow_run_name": flow.flow_run.name, "flow_run_id": str(flow.flow_run.id)}
        parameters |= flow.parameters or {}
    if task is not None:
        fields |= {"task_name": task.task.name}
        parameters |= task.parameters
    return fields | {FIELDS[k]: v for k, v in parameters.items() if k in FIELDS}
