"""Tests of the OpenTelemetry export against a receiver that speaks protobuf over HTTP, with an outage."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from storage.database import Database
from usage import recorder, telemetry
from usage.events import Deployment, UsageEvent
from usage.recorder import Recorder
from usage.telemetry import TelemetryExporter

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
        self.delay, self.refused = 0.0, 0
        self.traces: list[ExportTraceServiceRequest] = []
        self.metrics: list[ExportMetricsServiceRequest] = []
        self.headers: list[dict[str, str]] = []

    def metric_list(self) -> list[Any]:
        """Return the metrics of all requests."""
        return [
            metric
            for request in self.metrics
            for resource in request.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        ]

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
        time.sleep(self.server.delay)
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


def spool(folder: Path, *events: UsageEvent) -> None:
    """Write events to a file as the recorder does."""
    database = Database(f"sqlite:///{folder.parent / 'unused.sqlite3'}")
    usage = Recorder(database, folder, Deployment())
    for event in events:
        usage.record(event)
    usage.close()
    database.close()


def send_all(exporter: TelemetryExporter) -> None:
    """Run an exporter until no file is left."""
    exporter.start()
    wait_until(lambda: not list(exporter.folder.glob("*.jsonl")))
    exporter.close()


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


@pytest.fixture
def exporter(receiver: Receiver, tmp_path: Path) -> TelemetryExporter:
    return TelemetryExporter(tmp_path / "telemetry")


def test_events_become_spans_and_metrics_and_an_outage_loses_nothing(receiver: Receiver, tmp_path: Path) -> None:
    def create_recorder() -> Recorder:
        exporter = TelemetryExporter(tmp_path / "telemetry")
        database = Database(f"sqlite:///{tmp_path / 'usage.sqlite3'}")
        return Recorder(database, tmp_path / "spool", Deployment(), telemetry=exporter)

    receiver.is_down.set()
    first = create_recorder()
    first.start()
    first.record(EVENT)
    wait_until(lambda: receiver.refused)
    first.close()
    assert not receiver.traces and list((tmp_path / "telemetry").glob("*.jsonl"))
    receiver.is_down.clear()
    second = create_recorder()  # the next process
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
    assert {metric.name for metric in receiver.metric_list()} == {
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
        "gen_ai.client.token.usage",
        "moondream.queue.duration",
        "moondream.cold_start.duration",
    }


def test_histograms_have_the_buckets_of_the_conventions(receiver: Receiver, exporter: TelemetryExporter) -> None:
    spool(exporter.folder, EVENT, FAILED)
    send_all(exporter)
    points = {metric.name: metric.histogram.data_points[0] for metric in receiver.metric_list()}
    bounds = {name: list(point.explicit_bounds) for name, point in points.items()}
    seconds = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]
    assert bounds["gen_ai.server.request.duration"] == bounds["moondream.queue.duration"] == seconds
    assert bounds["gen_ai.server.time_to_first_token"][:4] == [0.001, 0.005, 0.01, 0.02]
    assert bounds["gen_ai.server.time_per_output_token"][:4] == [0.01, 0.025, 0.05, 0.075]
    assert bounds["gen_ai.client.token.usage"][:4] == [1, 4, 16, 64]
    per_token = points["gen_ai.server.time_per_output_token"]
    assert per_token.count == 1 and per_token.sum == pytest.approx((1.5 - 0.25) / 44)


def test_time_per_token_is_only_of_single_successful_answers(receiver: Receiver, exporter: TelemetryExporter) -> None:
    spool(exporter.folder, replace(EVENT, candidates=4), replace(EVENT, outcome="cancelled"))
    send_all(exporter)
    counts = {metric.name: sum(p.count for p in metric.histogram.data_points) for metric in receiver.metric_list()}
    assert "gen_ai.server.time_per_output_token" not in counts
    assert counts["gen_ai.server.time_to_first_token"] == 1 and counts["gen_ai.server.request.duration"] == 2


@pytest.mark.parametrize("signal", telemetry.SIGNALS)
def test_only_the_chosen_signals_are_sent(receiver: Receiver, tmp_path: Path, signal: str) -> None:
    exporter = TelemetryExporter(tmp_path / "telemetry", [signal])
    spool(exporter.folder, EVENT)
    send_all(exporter)
    assert (bool(receiver.spans()), bool(receiver.metrics)) == (signal == "traces", signal == "metrics")


def test_processes_with_one_folder_send_each_event_once(receiver: Receiver, tmp_path: Path) -> None:
    receiver.delay = 0.02
    exporters = [TelemetryExporter(tmp_path) for _ in range(3)]
    events = [replace(EVENT, id=uuid.uuid4().hex) for _ in range(12)]
    for event in events:
        spool(tmp_path, event)
    for exporter in exporters:
        exporter.start()
    wait_until(lambda: not list(tmp_path.glob("*.jsonl")))
    last = replace(EVENT, id=uuid.uuid4().hex)  # all threads are still there
    spool(tmp_path, last)
    for exporter in exporters:
        exporter.notify()
    wait_until(lambda: not list(tmp_path.glob("*.jsonl")))
    for exporter in exporters:
        exporter.close()
    ids = [span.span_id for _, span in receiver.spans()]
    contexts = (telemetry.to_span(event).context for event in (*events, last))
    expected = [context.span_id.to_bytes(8, "big") for context in contexts if context]
    assert sorted(ids) == sorted(expected)


def test_export_goes_on_after_a_file_that_cannot_be_read(
    receiver: Receiver, exporter: TelemetryExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [FileNotFoundError("deleted"), OSError("disk"), RuntimeError("unexpected")]
    read = telemetry.read_spool_file

    def fail_at_first(file: Path) -> Iterator[UsageEvent]:
        if failures:
            raise failures.pop(0)
        return read(file)

    monkeypatch.setattr(telemetry, "read_spool_file", fail_at_first)
    monkeypatch.setattr(telemetry, "POLL_INTERVAL", 0.05)
    spool(exporter.folder, EVENT)
    spool(exporter.folder, FAILED)
    (exporter.folder / "00.jsonl").write_text("no event")
    send_all(exporter)
    assert len(receiver.spans()) == 2 and not failures
    assert [file.name for file in exporter.folder.glob("*.bad")] == ["00.bad"]


def test_events_that_are_spooled_again_are_exported_once(
    receiver: Receiver, exporter: TelemetryExporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(f"sqlite:///{tmp_path / 'usage.sqlite3'}")
    spool_folder = tmp_path / "spool"
    write, failures = recorder.write_atomically, [OSError(28, "No space left on device")]

    def fail_at_first(path: Path, content: str) -> None:
        if path.parent == spool_folder and failures:
            raise failures.pop()
        write(path, content)

    monkeypatch.setattr(recorder, "write_atomically", fail_at_first)
    usage = Recorder(database, spool_folder, Deployment(), telemetry=exporter)
    usage.record(EVENT)
    with pytest.raises(OSError, match="No space"):
        usage.flush()
    usage.flush()
    assert len(list(exporter.folder.glob("*.jsonl"))) == 1


def test_event_that_is_sent_again_has_the_same_ids() -> None:
    ids = {(span.context.trace_id, span.context.span_id) for span in map(telemetry.to_span, (EVENT, EVENT))}
    assert len(ids) == 1 and all(trace and span for trace, span in ids)
