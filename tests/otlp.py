"""A receiver of metrics on loopback that reads OTLP, as a collector does."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)


class Received:
    """What came: the last value of every series, summed over the processes that sent it."""

    def __init__(self) -> None:
        self.url = ""
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self._series: dict[tuple[str, str, frozenset[tuple[str, str]]], list[Any]] = {}

    def take(self, headers: dict[str, str], body: bytes) -> None:
        """Read one request."""
        self.headers.append(headers)
        self.bodies.append(body)
        for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    points = getattr(metric, metric.WhichOneof("data")).data_points
                    for point in points:
                        labels = frozenset((a.key, a.value.string_value) for a in point.attributes)
                        key = (metric.name, names["service.instance.id"], labels)
                        self._series.setdefault(key, []).append(point)

    def values(self, name: str, label: str = "") -> dict[str, float]:
        """The last value by `label`."""
        found: dict[str, float] = {}
        for (metric, _, labels), points in self._series.items():
            if metric == name:
                last = points[-1]
                value = last.as_double if last.HasField("as_double") else last.as_int
                key = dict(labels).get(label, "")
                found[key] = found.get(key, 0) + value
        return found

    def first_values(self, name: str) -> list[float]:
        """The first value of each series."""
        return [
            points[0].as_double or points[0].as_int
            for (metric, _, _), points in self._series.items()
            if metric == name
        ]

    def count(self, name: str) -> int:
        """How much a histogram holds."""
        return sum(p[-1].count for (metric, _, _), p in self._series.items() if metric == name)


@contextmanager
def receiver() -> Iterator[Received]:
    """A receiver at `url` while the block runs."""
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            received.take(dict(self.headers), body)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(ExportMetricsServiceResponse().SerializeToString())

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    received.url = f"http://127.0.0.1:{server.server_port}/v1/metrics"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
