"""Export of metrics by the processes of flows, where the environment names whom to send them to.

`OTEL_EXPORTER_OTLP_METRICS_ENDPOINT` (or the other variables of OpenTelemetry) names an endpoint
that takes OTLP over HTTP: a collector, or Prometheus itself. Without it nothing is started.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.metrics import set_meter_provider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from prefect.context import FlowRunContext
from prefect.runtime import flow_run

from storage.wording import use_plain_records
from tasks import metrics

ENDPOINTS = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
# Of each export: a receiver that is away must not keep a machine.
TIMEOUT_VARIABLES = ("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT")
TIMEOUT_S = 3


@contextmanager
def observed() -> Iterator[None]:
    """Count the flow run at hand while the block runs; send what it counted before it ends.

    What the run logs is plain: no file's or server's text can steer a terminal or hold a signature.
    """
    use_plain_records()
    provider = start_export()
    try:
        with metrics.run_active(flow_run.flow_name or "none", queued_s()):
            if provider:
                provider.force_flush()
            yield
    finally:
        if provider:
            provider.force_flush()


def queued_s() -> float | None:
    """Seconds that the flow run at hand waited to begin; None if it has begun before.

    A run that replaces a lost one is due when that was, and waits since it was made.
    """
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or run.run_count > 1:
        return None
    due = max(filter(None, (run.expected_start_time, run.created)), default=None)
    return max(0.0, (datetime.now(UTC) - due).total_seconds()) if due else 0.0


def start_export() -> MeterProvider | None:
    """Begin to send metrics, once a process; None where nobody is named to send them to."""
    return _started() if any(os.environ.get(name) for name in ENDPOINTS) else None


@functools.cache
def _started() -> MeterProvider:
    """The process's exporter; its series are told apart by the attempt of a flow run at hand."""
    attempt = f"{flow_run.id}.{flow_run.run_count}" if flow_run.id else str(os.getpid())
    names = {SERVICE_NAME: "ttt3r", SERVICE_INSTANCE_ID: attempt}
    is_set = any(os.environ.get(name) for name in TIMEOUT_VARIABLES)
    exporter = OTLPMetricExporter(timeout=None if is_set else TIMEOUT_S)
    # `observed` sends the last figures; at exit they would only be sent once more.
    reader = PeriodicExportingMetricReader(exporter)
    provider = MeterProvider([reader], Resource.create(names), shutdown_on_exit=False)
    set_meter_provider(provider)
    metrics.start_at_zero()
    return provider
