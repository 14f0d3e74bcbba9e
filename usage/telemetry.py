"""OpenTelemetry export: one span per usage event and the metrics of the GenAI conventions, over OTLP/HTTP.

Events come from copies of the spool files, which are deleted once the collector has accepted them: its outage only
delays them. Addresses and headers are the standard OTEL_EXPORTER_OTLP_* environment variables. Prompts, photos and
answers are not part of an event and therefore never exported.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from itertools import islice
from pathlib import Path
from typing import Any

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from usage.events import UsageEvent
from usage.recorder import read_spool_file
from usage.time_window import to_micros

SERVICE, PROVIDER = "moondream-playground", "moondream"
BATCH_SIZE = 500  # spans per request
RETRY_DELAYS = (1.0, 60.0)  # first and longest delay, in seconds
METRICS_INTERVAL = 60_000  # milliseconds
TRAINING_SOURCES = ("fine-tune", "hosted-rl")
SCOPE = InstrumentationScope(SERVICE)
_log = logging.getLogger(__name__)


class TelemetryExporter:
    """Sends the events in a folder of spool files to a collector, from a background thread."""

    def __init__(self, folder: Path) -> None:
        """Create the exporter.

        Args:
            folder: Folder of the spool files. `notify` tells that there are new ones.
        """
        self.folder = folder
        self._spans = OTLPSpanExporter()
        self._meters: dict[tuple[str, str], _Metrics] = {}  # by branch and commit
        self._files, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="usage-telemetry", daemon=True)

    def start(self) -> None:
        """Start the thread, which also sends what earlier processes left."""
        self._files.set()
        self._thread.start()

    def notify(self) -> None:
        """Send new files soon."""
        self._files.set()

    def close(self) -> None:
        """Stop the thread and send the metrics. Files that are not sent yet are sent by the next process."""
        self._stop.set()
        self._files.set()
        self._spans.shutdown()
        if self._thread.is_alive():
            self._thread.join(2)
        for metrics in list(self._meters.values()):
            metrics.provider.shutdown(5_000)

    def _loop(self) -> None:
        delay = RETRY_DELAYS[0]
        while not self._stop.is_set():
            self._files.wait()
            self._files.clear()
            for file in sorted(self.folder.glob("[0-9]*.jsonl")):
                while not self._stop.is_set() and not self._send(file):
                    self._stop.wait(delay)
                    delay = min(2 * delay, RETRY_DELAYS[1])
                delay = RETRY_DELAYS[0]

    def _send(self, file: Path) -> bool:
        """Send a file and delete it. Returns whether the collector accepted it."""
        try:
            events = iter(list(read_spool_file(file)))
        except (OSError, ValueError, TypeError, KeyError):
            _log.error("%s is not a file of usage events. Renaming it to .bad.", file.name)
            file.rename(file.with_suffix(".bad"))
            return True
        sent: list[UsageEvent] = []
        while batch := list(islice(events, BATCH_SIZE)):
            if self._spans.export([to_span(event) for event in batch]) != SpanExportResult.SUCCESS:
                return False  # the whole file is sent again; its spans have the same ids
            sent += batch
        for event in sent:
            self._metrics_of(event).record(event)
        file.unlink(missing_ok=True)
        return True

    def _metrics_of(self, event: UsageEvent) -> _Metrics:
        key = event.branch, event.commit
        if key not in self._meters:
            self._meters[key] = _Metrics(resource_of(event))
        return self._meters[key]


class _Metrics:
    """The histograms of one branch and commit."""

    def __init__(self, resource: Resource) -> None:
        reader = PeriodicExportingMetricReader(OTLPMetricExporter(), METRICS_INTERVAL)
        self.provider = MeterProvider([reader], resource, shutdown_on_exit=False)
        histogram = self.provider.get_meter(SERVICE).create_histogram
        self._duration = histogram("gen_ai.server.request.duration", "s", "Computing time of model calls.")
        self._first_token = histogram("gen_ai.server.time_to_first_token", "s", "Time to the first token.")
        self._queue = histogram("moondream.queue.duration", "s", "Time that calls waited before the computation.")
        self._cold_start = histogram(
            "moondream.cold_start.duration", "s", "Time in which a model was loaded for a call."
        )
        self._tokens = histogram("gen_ai.client.token.usage", "{token}", "Tokens of model calls.")

    def record(self, event: UsageEvent) -> None:
        """Add an event."""
        names = ("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model", "error.type")
        attributes = {name: value for name, value in attributes_of(event).items() if name in names}
        self._duration.record(event.latency, attributes)
        times = {self._first_token: event.first_token, self._queue: event.queue, self._cold_start: event.cold_start}
        for histogram, seconds in times.items():
            if seconds is not None:
                histogram.record(seconds, attributes)
        for kind, tokens in {"input": event.tokens_in, "output": event.tokens_out}.items():
            if tokens is not None:
                self._tokens.record(tokens, {**attributes, "gen_ai.token.type": kind})


def to_span(event: UsageEvent) -> ReadableSpan:
    """Convert an event to a span, whose ids derive from the event's: it is the same if it is sent again."""
    attributes, end = attributes_of(event), 1000 * to_micros(event.time)
    trace, span = (hashlib.sha256(text.encode()).digest() for text in (event.request_id or event.id, event.id))
    context = SpanContext(
        int.from_bytes(trace[:16], "big"), int.from_bytes(span[:8], "big"), False, TraceFlags(TraceFlags.SAMPLED)
    )
    return ReadableSpan(
        f"{attributes['gen_ai.operation.name']} {event.model}",
        context,
        resource=resource_of(event),
        attributes=attributes,
        kind=SpanKind.CLIENT,
        status=Status(StatusCode.ERROR, event.error) if event.outcome == "error" else Status(StatusCode.UNSET),
        start_time=end - round(1e9 * event.latency),
        end_time=end,
        instrumentation_scope=SCOPE,
    )


def resource_of(event: UsageEvent) -> Resource:
    """Return the deployment of an event: branches appear as environments."""
    names = {"service.name": SERVICE, "service.version": event.commit, "deployment.environment.name": event.branch}
    return Resource({name: value for name, value in names.items() if value})


def attributes_of(event: UsageEvent) -> dict[str, Any]:
    """Return the attributes of an event's span. Unknown values are left out."""
    training = event.source in TRAINING_SOURCES
    values = {
        "gen_ai.operation.name": "fine_tune" if training else "generate_content",
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": event.model,
        "gen_ai.response.model": event.adapter or event.model,
        "gen_ai.request.choice.count": event.candidates,
        "gen_ai.usage.input_tokens": event.tokens_in,
        "gen_ai.usage.output_tokens": event.tokens_out,
        "gen_ai.response.time_to_first_chunk": event.first_token,
        "error.type": (event.error or "_OTHER") if event.outcome == "error" else None,
        "moondream.skill": event.skill,
        "moondream.source": event.source,
        "moondream.outcome": event.outcome,
        "moondream.queue_seconds": event.queue,
        "moondream.cold_start_seconds": event.cold_start,
        "moondream.cost_dollars": event.cost,
        "moondream.cost_basis": event.cost_basis,
        "moondream.reward": event.reward,
    }
    return {name: value for name, value in values.items() if value is not None}
