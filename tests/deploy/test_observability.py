"""Dashboard and alerts name metrics and labels that exist, in PromQL that parses."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tasks.prices import read_prices

OBSERVABILITY = Path(__file__).resolve().parents[2] / "deploy" / "observability"

# Prints all metrics as Prometheus names them: as a process begins, and after it has counted
# everything. In a process of its own: the provider is global.
EXPORT = """
from unittest.mock import patch
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import set_meter_provider
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import generate_latest
set_meter_provider(MeterProvider([PrometheusMetricReader()]))
from tasks import metrics
metrics.start_at_zero()
print(generate_latest().decode(), "counted", sep="\\n")
metrics.retried("infer")
metrics.segment_set_aside()
metrics.drive_failed()
metrics.drive_still_unreadable()
for outcome in ("finished", "incomplete", "failed"):
    metrics.collection_ended(outcome)
metrics.attempt_ended("infer", "failed", 2.0)
metrics.drive_finished({"used": {"stored_bytes": 1}})
metrics.chunk_stored({"frames_inferred": 4, "infer_seconds": 1.0}, ends_segment=True)
# No GPU is here: its gauge is read as if there were one.
with (
    metrics.run_active("infer-segments", 3.0),
    patch("torch.cuda.is_initialized", lambda: True),
    patch("torch.cuda.device_count", lambda: 1),
    patch("torch.cuda.max_memory_allocated", lambda device: 5),
):
    print(generate_latest().decode())
"""


@pytest.fixture(scope="module")
def series() -> tuple[list[Sample], list[Sample]]:
    """What a process sends when it begins, and after it has counted everything."""
    run = subprocess.run([sys.executable, "-c", EXPORT], capture_output=True, text=True, check=True)
    begun, counted = (
        [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith("ttt3r_")
        ]
        for text in run.stdout.split("counted\n")
    )
    return begun, counted


@pytest.fixture(scope="module")
def exported(series: tuple[list[Sample], list[Sample]]) -> dict[str, set[str]]:
    """Labels of each metric."""
    labels: dict[str, set[str]] = {}
    for sample in series[1]:
        labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


@pytest.fixture(scope="module")
def outcomes(series: tuple[list[Sample], list[Sample]]) -> dict[str, set[str]]:
    """Outcomes that each metric has been seen to count."""
    found: dict[str, set[str]] = {}
    for sample in series[1]:
        found.setdefault(sample.name, set()).add(sample.labels.get("outcome", ""))
    return found


def queries() -> Iterator[tuple[str, str]]:
    """Where a query stands, and the query."""
    dashboard = json.loads((OBSERVABILITY / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield f"panel {panel['title']}", target["expr"]
    for group in yaml.safe_load((OBSERVABILITY / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"]


QUERIES = dict(queries())


@pytest.mark.parametrize("where", QUERIES)
def test_queries_parse_and_name_metrics_and_labels_that_exist(where, exported):
    query = QUERIES[where]
    promql_parser.parse(query)
    named = re.findall(r"(ttt3r_\w+)(?:{([^}]*)})?", query)
    assert named
    for metric, matchers in named:
        assert metric in exported
        assert set(re.findall(r"(\w+)=", matchers)) <= exported[metric]
    # Prometheus makes `instance` of the resource's service.instance.id.
    known = set().union(*(exported[metric] for metric, _ in named)) | {"instance"}
    for names in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
        assert {name.strip() for name in names.split(",") if name} <= known


@pytest.mark.parametrize("where", QUERIES)
def test_increases_are_asked_only_of_series_that_begin_at_zero(where, series):
    """Prometheus' rate() and increase() see nothing of what the first sample of a series holds."""
    begun, counted = series
    named = set(re.findall(r"\b(?:rate|increase)\((ttt3r_\w+)", QUERIES[where]))
    at_zero = {(s.name, *s.labels.items()) for s in begun if s.value == 0}
    assert {(s.name, *s.labels.items()) for s in counted if s.name in named} <= at_zero


def test_outcomes_that_alerts_wait_for_are_counted(outcomes):
    waited_for = [
        (metric, outcome)
        for where, query in QUERIES.items()
        if where.startswith("alert")
        for metric, one_of in re.findall(r'(ttt3r_\w+){outcome=~?"([^"]*)"}', query)
        for outcome in one_of.split("|")
    ]
    assert len(waited_for) >= 5
    assert all(outcome in outcomes[metric] for metric, outcome in waited_for)


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool (Debian: prometheus)")
def test_alerts_fire_and_end_in_prometheus_as_they_should():
    command = ["promtool", "test", "rules", str(Path(__file__).with_name("alerts_test.yaml"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_is_shown(exported):
    shown = set(re.findall(r"ttt3r_\w+", " ".join(QUERIES.values())))
    histogram = {"ttt3r_run_queued_seconds_count", "ttt3r_run_queued_seconds_sum"}
    assert set(exported) - histogram == shown


def test_a_query_that_does_not_parse_is_found():
    with pytest.raises(ValueError, match=r"."):
        promql_parser.parse("sum(rate(ttt3r_frames_total[5m])")


def test_the_alert_on_cost_reckons_with_the_price_table():
    prices = read_prices(str(OBSERVABILITY.parent / "prices.toml"))
    per_month = prices.per_gb_month * prices.months_stored
    expected = [prices.per_gpu_hour["NVIDIA A10G"], prices.per_cpu_hour, per_month]
    found = re.findall(r"/ (?:3600|1e9) \* ([\d.]+)", QUERIES["alert CostOverBudget"])
    assert [float(price) for price in found] == pytest.approx(expected)


def test_alerts_say_how_bad_and_what_it_is_about():
    for group in yaml.safe_load((OBSERVABILITY / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
            assert rule["labels"]["severity"] in {"info", "warning", "critical"}
            assert rule["annotations"]["summary"]
