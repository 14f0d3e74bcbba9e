"""Tests of the OpenTelemetry export against a receiver that speaks protobuf over HTTP, with an outage."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from storage.database import Database
from usage import telemetry
from usage.events import Deployment, UsageEvent
from usage.recorder import Recorder

NOW = datetime(2026, 11, 20, 12, 30, tzinfo=timezone.utc)
EVENT = UsageEvent(
    NOW,
    "moondream2",
    "caption",
    latency=1.5,
    first_token=0.25,
    queue=0.5,
    cold_start=2.0,
    tokens_in=735,
    tokens_out=45,
    tokens_basis="reported",
    branch="topic",
    commit="c0ffee",
    id="1" * 32,
    request_id="2" * 32,
)
FAILED = UsageEvent(NOW, "moondream2", "query", "error", error="out_of_memory", branch="main", id="3" * 32)


class Receiver(ThreadingHTTPServer):
    """A collector that stores what it accepts, and answers with 503 while it is down."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ReceiverHandler)
        self.is_down = threading.Event()
        self.refused = 0
        self.traces: list[ExportTraceServiceRequest] = []
        self.metrics: list[ExportMetricsServiceRequest] = []
        self.headers: list[dict[str, str]] = []

    def spans(self) -> list[tuple[dict[str, Any], Any]]:
        """Return the attributes of the resource and each span."""
        return [
            (values(resource.resource.attributes), span)
            for request in self.traces
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


class ReceiverHandler(BaseHTTPRequestHandler):
    """Parses requests of OTLP/HTTP."""

    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.is_down.is_set():
            self.server.refused += 1
            self.send_response(503)
        else:
            assert self.headers["Content-Type"] == "application/x-protobuf"
            self.server.headers.append(dict(self.headers))
            if self.path == "/v1/traces":
                self.server.traces.append(ExportTraceServiceRequest.FromString(body))
            else:
                assert self.path == "/v1/metrics"
                self.server.metrics.append(ExportMetricsServiceRequest.FromString(body))
            self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def values(attributes: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, str(item.value.WhichOneof("value"))) for item in attributes}


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """Start a receiver, with the standard variables of the environment."""
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Basic%20abc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setattr(telemetry, "RETRY_DELAYS", (0.05, 0.1))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_events_become_spans_and_metrics_and_an_outage_loses_nothing(receiver: Receiver, tmp_path: Path) -> None:
    def recorder() -> Recorder:
        exporter = telemetry.TelemetryExporter(tmp_path / "telemetry")
        database = Database(f"sqlite:///{tmp_path / 'usage.sqlite3'}")
        return Recorder(database, tmp_path / "spool", Deployment(), telemetry=exporter)

    receiver.is_down.set()
    first = recorder()
    first.start()
    first.record(EVENT)
    wait_until(lambda: receiver.refused)
    first.close()
    assert not receiver.traces and list((tmp_path / "telemetry").glob("*.jsonl"))
    receiver.is_down.clear()
    second = recorder()  # the next process
    second.start()
    second.record(FAILED)
    wait_until(lambda: len(receiver.spans()) == 2)
    wait_until(lambda: not list((tmp_path / "telemetry").glob("*.jsonl")))
    second.close()

    by_branch = {resource["deployment.environment.name"]: (resource, span) for resource, span in receiver.spans()}
    resource, span = by_branch["topic"]
    assert resource["service.name"] == "moondream-playground" and resource["service.version"] == "c0ffee"
    assert span.name == "generate_content moondream2" and span.end_time_unix_nano == NOW.timestamp() * 1e9
    assert span.end_time_unix_nano - span.start_time_unix_nano == 1_500_000_000
    attributes = values(span.attributes)
    assert attributes["gen_ai.provider.name"] == "moondream" and attributes["gen_ai.request.model"] == "moondream2"
    assert attributes["gen_ai.usage.input_tokens"] == 735 and attributes["gen_ai.usage.output_tokens"] == 45
    assert attributes["gen_ai.response.time_to_first_chunk"] == 0.25 and "moondream.cost_dollars" not in attributes
    assert attributes["moondream.queue_seconds"] == 0.5 and attributes["moondream.cold_start_seconds"] == 2.0
    _, failed = by_branch["main"]
    assert failed.status.code == 2 and values(failed.attributes)["error.type"] == "out_of_memory"
    assert all(header["authorization"] == "Basic abc" for header in receiver.headers)
    metrics = [
        metric
        for request in receiver.metrics
        for resource_metrics in request.resource_metrics
        for scope in resource_metrics.scope_metrics
        for metric in scope.metrics
    ]
    assert {metric.name for metric in metrics} == {
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.client.token.usage",
        "moondream.queue.duration",
        "moondream.cold_start.duration",
    }


def test_event_that_is_sent_again_has_the_same_ids() -> None:
    ids = {(span.context.trace_id, span.context.span_id) for span in map(telemetry.to_span, (EVENT, EVENT))}
    assert len(ids) == 1 and all(trace and span for trace, span in ids)
