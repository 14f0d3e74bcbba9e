"""Exports of usage: events as CSV or Parquet, metrics and series as JSON, and a Prometheus collector."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from datetime import datetime, timezone
from operator import itemgetter
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from prometheus_client import Metric as PrometheusMetric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import tuple_

from storage.database import Database
from storage.tables import DOLLAR, EVENTS, SECOND
from usage.analytics import UNITS, Metrics, Series, select_events, to_event
from usage.budgets import Budgets
from usage.column_store import EventKind
from usage.events import UsageEvent
from usage.recorder import Recorder
from usage.rollups import TotalsReader
from usage.time_window import UsageFilter

BATCH_SIZE = 5_000  # events per query; bounds the memory of an export
COLUMNS = tuple(field.name for field in fields(UsageEvent))
_INTS = ("tokens_in", "tokens_out", "candidates")
_FLOATS = ("latency", "first_token", "queue", "cost", "reward")
SCHEMA = pa.schema(
    [
        (name, pa.timestamp("us", "UTC") if name == "time" else pa.int64() if name in _INTS
         else pa.float64() if name in _FLOATS else pa.string())
        for name in COLUMNS
    ]
)  # fmt: skip
_FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r")

# ── Events as files ─────────────────────────────────────────────────────────────────────────────────────────────────


def export_events(
    database: Database,
    usage_filter: UsageFilter,
    file_format: Literal["csv", "parquet"],
    now: datetime | None = None,
) -> Iterator[bytes]:
    """Yield a file of events in chunks, oldest event first.

    Times are in UTC, durations in seconds, costs in US dollars.

    Args:
        database: The database.
        usage_filter: The selected events.
        file_format: "csv" or "parquet".
        now: End of the period; the default is the current time.

    Raises:
        StoreError: The database cannot be read, possibly after some chunks: a truncated CSV lacks rows, a truncated
            Parquet file is invalid.
    """
    batches = _read_batches(database, usage_filter, now or datetime.now(timezone.utc))
    return _to_csv(batches) if file_format == "csv" else _to_parquet(batches)


def _read_batches(database: Database, usage_filter: UsageFilter, now: datetime) -> Iterator[list[UsageEvent]]:
    """Yield batches of events. Each is a query of its own, so that no transaction stays open during a download."""
    query = select_events(usage_filter, usage_filter.window(now))
    query = query.order_by(EVENTS.c.time, EVENTS.c.id).limit(BATCH_SIZE)
    last = None
    while True:
        page = query if last is None else query.where(tuple_(EVENTS.c.time, EVENTS.c.id) > last)
        with database.transaction() as connection:
            rows = connection.execute(page).mappings().all()
        if rows:
            yield [to_event(row) for row in rows]
        if len(rows) < BATCH_SIZE:
            return
        last = tuple_(rows[-1]["time"], rows[-1]["id"])


def _to_csv(batches: Iterator[list[UsageEvent]]) -> Iterator[bytes]:
    header = _csv_lines([COLUMNS])
    for events in batches:  # the header is sent with the first batch, so that nothing is sent if the query fails
        yield header + _csv_lines([_csv_value(getattr(event, name)) for name in COLUMNS] for event in events)
        header = b""
    if header:
        yield header


def _csv_lines(rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _csv_value(value: Any) -> Any:
    """Format a value. Names that a spreadsheet would evaluate as a formula are prefixed with an apostrophe."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float):
        return f"{value:.9f}".rstrip("0").rstrip(".")
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA_PREFIXES) else value


def _to_parquet(batches: Iterator[list[UsageEvent]]) -> Iterator[bytes]:
    buffer = _WriteBuffer()
    with pq.ParquetWriter(pa.PythonFile(buffer, "w"), SCHEMA, compression="zstd") as writer:
        for events in batches:
            columns = [[getattr(event, name) for event in events] for name in COLUMNS]
            writer.write_table(pa.table(columns, schema=SCHEMA))
            yield buffer.take()
    yield buffer.take()


class _WriteBuffer(io.RawIOBase):
    """A write-only file whose written bytes can be taken out."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._written = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        part = bytes(data)
        self._parts.append(part)
        self._written += len(part)
        return len(part)

    def tell(self) -> int:
        return self._written

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


# ── Metrics as JSON ─────────────────────────────────────────────────────────────────────────────────────────────────


def metrics_report(metrics: Metrics) -> dict[str, Any]:
    """Convert metrics to JSON. Unknown values are null, never 0."""
    named = {name: getattr(metrics, name) for name in UNITS}
    return {
        "start": metrics.window.start.isoformat(),
        "end": metrics.window.end.isoformat(),
        "figures": {
            name: {"value": metric.value, "before": metric.previous, "change": metric.change, "unit": metric.unit}
            for name, metric in named.items()
        },
        "calls_without_known_cost": metrics.unpriced,
        "calls_without_known_tokens": metrics.uncounted,
        "calls_with_estimated_cost": metrics.estimated,
        "percentile_error": metrics.percentile_error,
    }


def series_report(series: Series) -> dict[str, Any]:
    """Convert a series to JSON: bin starts in the filter's time zone, and the values of each line by name."""
    return {
        "measure": series.measure,
        "unit": series.unit,
        "bin": series.bin,
        "starts": [start.isoformat() for start in series.starts],
        "lines": {line.name: list(line.values) for line in series.lines},
    }


# ── Prometheus ──────────────────────────────────────────────────────────────────────────────────────────────────────

LABELS = ("branch", "model", "skill", "outcome")
# Counter -> its description, and its value from the totals of a kind.
COUNTERS: dict[str, tuple[str, Callable[[EventKind, dict[str, int]], float]]] = {
    "calls": ("Model calls.", lambda _, totals: totals["calls"]),
    "latency_seconds": ("Computing time of model calls.", lambda _, totals: totals["latency"] / SECOND),
    "tokens": (
        "Input and output tokens, if known.",
        lambda kind, totals: totals["tokens_in"] + totals["tokens_out"] if kind.counted else 0,
    ),
    "cost_dollars": ("Cost in US dollars, if known.", lambda _, totals: totals["cost"] / DOLLAR),
    "unpriced_calls": ("Calls without a known cost.", lambda kind, totals: 0 if kind.priced else totals["calls"]),
}


class UsageCollector(Collector):
    """Prometheus collector of usage.

    Counters are sums over all events that were ever recorded in the database, by branch, model, skill and outcome; they
    do not fall when old events are deleted. `collect` raises StoreError if the database cannot be read.
    """

    def __init__(self, database: Database, budgets: Budgets, recorder: Recorder) -> None:
        self.totals, self.budgets, self.recorder = TotalsReader(database), budgets, recorder

    def collect(self) -> Iterator[PrometheusMetric]:
        """Yield all metrics, read from the database."""
        groups: dict[tuple[str, ...], list[tuple[EventKind, dict[str, int]]]] = {}
        for kind, totals in self.totals.read().items():
            labels = tuple(_label(getattr(kind, name)) for name in LABELS)
            groups.setdefault(labels, []).append((kind, totals))
        for name, (description, value) in COUNTERS.items():
            counter = CounterMetricFamily(f"moondream_{name}", description, labels=LABELS)
            for labels, group in sorted(groups.items(), key=itemgetter(0)):
                counter.add_metric(labels, sum(value(kind, totals) for kind, totals in group))
            yield counter
        budgets = self.budgets.list()
        gauges = {"limit": "Monthly budget in US dollars.", "spent": "Spent this month in US dollars."}
        for name, description in gauges.items():
            gauge = GaugeMetricFamily(f"moondream_budget_{name}_dollars", description, labels=["branch"])
            for status in budgets:
                value = status.budget.limit if name == "limit" else status.spent
                gauge.add_metric([_label(status.budget.branch)], value)
            yield gauge
        yield CounterMetricFamily("moondream_usage_events_lost", "Events that could not be stored.", self.recorder.lost)


def _label(text: str) -> str:
    """Replace carriage returns, which the text format does not escape."""
    return text.replace("\r", " ")
