"""Flows run against a real Prefect server of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest
from opentelemetry.metrics import set_meter_provider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from recordings import moving_squares, write_video


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Thirty small frames."""
    return write_video(tmp_path / "squares.mp4", moving_squares(30))


@pytest.fixture(scope="session")
def metric_reader() -> InMemoryMetricReader:
    """Reads what this process counts; a process has one provider of metrics for good."""
    reader = InMemoryMetricReader()
    set_meter_provider(MeterProvider([reader]))
    return reader


@pytest.fixture
def counted(metric_reader: InMemoryMetricReader) -> Callable[[str], dict[str, float]]:
    """What was counted of a metric since the last call for it or the test's start, by outcome."""
    seen: dict[tuple[str, str], float] = {}

    def new(name: str) -> dict[str, float]:
        found = {}
        data = metric_reader.get_metrics_data()
        for resource in data.resource_metrics if data else ():
            for metric in (m for scope in resource.scope_metrics for m in scope.metrics):
                for point in metric.data.data_points if metric.name == name else ():
                    outcome = str(point.attributes["outcome"])
                    found[outcome] = point.value - seen.get((name, outcome), 0)
                    seen[name, outcome] = point.value
        return {outcome: value for outcome, value in found.items() if value}

    for name in ("ttt3r.collections", "ttt3r.drives"):
        new(name)
    return new
