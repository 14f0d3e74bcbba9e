"""OpenTelemetry export: one span per usage event and the metrics of the GenAI conventions, over OTLP/HTTP.

Events come from copies of the spool files, which are deleted once the collector has accepted them: its outage only
delays them. Of several processes with one folder, one sends at a time. Addresses and headers are the standard
OTEL_EXPORTER_OTLP_* environment variables. Prompts, photos and answers are not part of an event and therefore never
exported.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
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
SIGNALS = ("traces", "metrics")
BATCH_SIZE = 500  # spans per request
RETRY_DELAYS = (1.0, 60.0)  # first and longest delay, in seconds
POLL_INTERVAL = 5.0  # seconds between two searches for files of other processes
METRICS_INTERVAL = 60_000  # milliseconds
TRAINING_SOURCES = ("fine-tune", "hosted-rl")
SCOPE = InstrumentationScope(SERVICE)
# Bucket boundaries of the conventions, https://github.com/open-telemetry/semantic-conventions-genai. The SDK's own are
# for milliseconds.
SECONDS = [0.01 * 2**power for power in range(14)]
FIRST_TOKEN_SECONDS = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0]
TOKEN_SECONDS = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5]
TOKENS = [4**power for power in range(14)]
TOKEN_USAGE = "gen_ai.client.token.usage"
HISTOGRAMS = {  # name -> unit, description, bucket boundaries
    "gen_ai.server.request.duration": ("s", "Computing time of model calls.", SECONDS),
    "gen_ai.server.time_to_first_token": ("s", "Time to the first token.", FIRST_TOKEN_SECONDS),
    "gen_ai.server.time_per_output_token": ("s", "Time per token after the first.", TOKEN_SECONDS),
    "moondream.queue.duration": ("s", "Time that calls waited before the computation.", SECONDS),
    "moondream.cold_start.duration": ("s", "Time in which a model was loaded for a call.", SECONDS),
    TOKEN_USAGE: ("{token}", "Tokens of model calls.", TOKENS),
}
_log = logging.getLogger(__name__)


class TelemetryExporter:
    """Sends the events in a folder of spool files to a collector, from a background thread."""

    def __init__(self, folder: Path, signals: Sequence[str] = SIGNALS) -> None:
        """Create the exporter.

        Args:
            folder: Folder of the spool files. `notify` announces new ones.
            signals: What is sent: values of SIGNALS.
        """
        self.folder, self._signals = folder, signals
        self._spans = OTLPSpanExporter()
        self._meters: dict[tuple[str, str], _Metrics] = {}  # by branch and commit
        self._lock = FileLock(folder / "exporter.lock")
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
        while not self._stop.is_set():
            self._files.wait(POLL_INTERVAL)
            self._files.clear()
            try:
                with suppress(Timeout), self._lock.acquire(timeout=0):  # else another process is sending
                    self._send_all()
            except Exception as error:
                _log.warning("Usage events could not be exported (%s). They are sent later.", type(error).__name__)
                self._stop.wait(RETRY_DELAYS[0])
                self._files.set()

    def _send_all(self) -> None:
        """Send all files, and repeat each until the collector has accepted it."""
        delay = RETRY_DELAYS[0]
        for file in sorted(self.folder.glob("[0-9]*.jsonl")):
            while not self._stop.is_set() and not self._send(file):
                self._stop.wait(delay)
                delay = min(2 * delay, RETRY_DELAYS[1])
            delay = RETRY_DELAYS[0]

    def _send(self, file: Path) -> bool:
        """Send a file and delete it. Returns whether to go on with the next one."""
        try:
            events = list(read_spool_file(file))
        except OSError as error:
            _log.warning("%s cannot be read (%s). It is sent later.", file.name, error.strerror)
            return True
        except (ValueError, TypeError, KeyError):
            _log.error("%s is not a file of usage events. Renaming it to .bad.", file.name)
            file.rename(file.with_suffix(".bad"))
            return True
        for start in range(0, len(events), BATCH_SIZE) if "traces" in self._signals else ():
            spans = [to_span(event) for event in events[start : start + BATCH_SIZE]]
            if self._spans.export(spans) != SpanExportResult.SUCCESS:
                return False  # the whole file is sent again; its spans have the same ids
        for event in events if "metrics" in self._signals else ():
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
        meter = self.provider.get_meter(SERVICE)
        self._histograms = {
            name: meter.create_histogram(name, unit, description, explicit_bucket_boundaries_advisory=boundaries)
            for name, (unit, description, boundaries) in HISTOGRAMS.items()
        }

    def record(self, event: UsageEvent) -> None:
        """Add an event."""
        names = ("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model", "error.type")
        attributes = {name: value for name, value in attributes_of(event).items() if name in names}
        for name, seconds in durations_of(event).items():
            self._histograms[name].record(seconds, attributes)
        for kind, tokens in {"input": event.tokens_in, "output": event.tokens_out}.items():
            if tokens is not None:
                self._histograms[TOKEN_USAGE].record(tokens, {**attributes, "gen_ai.token.type": kind})


def durations_of(event: UsageEvent) -> dict[str, float]:
    """Return the known durations of an event in seconds, by the names of their histograms.

    Times of tokens are those of successful calls, as the conventions define them. The time per token is known if a
    call has one answer: the tokens of several are counted together.
    """
    first_token = event.first_token if event.outcome == "ok" else None
    per_token = None
    if first_token is not None and event.candidates == 1 and event.tokens_out and event.tokens_out > 1:
        per_token = (event.latency - first_token) / (event.tokens_out - 1)
    values = {
        "gen_ai.server.request.duration": event.latency,
        "gen_ai.server.time_to_first_token": first_token,
        "gen_ai.server.time_per_output_token": per_token,
        "moondream.queue.duration": event.queue,
        "moondream.cold_start.duration": event.cold_start,
    }
    return {name: value for name, value in values.items() if value is not None}


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
