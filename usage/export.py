"""Exports of usage: events as CSV or Parquet, metrics and series as JSON, and a Prometheus collector."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from prometheus_client import Metric as PrometheusMetric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from usage.analytics import KINDS, UNITS, Metrics, Series, conditions
from usage.budgets import Budgets
from usage.cache import EventCache
from usage.events import UsageEvent
from usage.recorder import Recorder
from usage.time_window import UsageFilter, to_micros

CHUNK = 1 << 18  # bytes
# Columns of a file and their SQL.
COLUMNS = {field.name: f'"{field.name}"' for field in fields(UsageEvent)} | {
    "time": "make_timestamp(time) AT TIME ZONE 'UTC'",
    **{name: f"{name} / 1e6" for name in ("latency", "first_token", "queue", "cold_start", "reward")},
    "cost": "cost / 1e9",
    "request_id": "request",
}
# In CSV, names that a spreadsheet would evaluate as a formula are prefixed with an apostrophe.
NAMES = ("model", "skill", "source", "branch", "commit", "space", "adapter", "error", "request_id")
CSV_COLUMNS = COLUMNS | {
    "time": "strftime(make_timestamp(time), '%Y-%m-%dT%H:%M:%S.%f+00:00')",
    **{name: rf"regexp_replace({COLUMNS[name]}, '^([-=+@\t\r])', '''\1')" for name in NAMES},
}
FORMATS = {"csv": "FORMAT csv, HEADER", "parquet": "FORMAT parquet, COMPRESSION zstd"}

# ── Events as files ─────────────────────────────────────────────────────────────────────────────────────────────────


def export_events(
    cache: EventCache,
    usage_filter: UsageFilter,
    file_format: Literal["csv", "parquet"],
    now: datetime | None = None,
) -> Iterator[bytes]:
    """Yield a file of events in chunks, oldest event first.

    Times are in UTC, durations in seconds, costs in US dollars.

    Args:
        cache: The events.
        usage_filter: The selected events.
        file_format: "csv" or "parquet".
        now: End of the period; the default is the current time.

    Raises:
        StoreError: The events cannot be read, or the disk is full.
    """
    window = usage_filter.window(now or datetime.now(timezone.utc))
    columns = CSV_COLUMNS if file_format == "csv" else COLUMNS
    condition, names = conditions(usage_filter)
    query = f"""
        COPY (
            SELECT {", ".join(f'{sql} AS "{name}"' for name, sql in columns.items())} FROM events {KINDS}
            WHERE time >= $start AND time < $end AND {condition} ORDER BY events.time, id
        ) TO $file ({FORMATS[file_format]})
    """
    span = {"start": to_micros(window.start), "end": to_micros(window.end)}
    with tempfile.TemporaryDirectory(dir=cache.folder) as folder:
        path = Path(folder) / "events"
        with cache.read() as cursor:
            cursor.execute(query, {**span, **names, "file": str(path)})
        with open(path, "rb") as file:
            yield from iter(lambda: file.read(CHUNK), b"")


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
LATENCY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # upper limits in seconds
BUCKETS = [*(f"count_if(latency <= {limit} * 1e6)" for limit in LATENCY_BUCKETS), "count(*)"]
COUNTERS = {  # name -> description, and value in SQL
    "calls": ("Model calls.", "count(*)"),
    "latency_seconds": ("Computing time of model calls.", "sum(latency) / 1e6"),
    "queue_seconds": ("Time that calls waited before the computation.", "coalesce(sum(queue), 0) / 1e6"),
    "cold_starts": ("Calls for which the model was loaded first.", "count(cold_start)"),
    "cold_start_seconds": ("Time in which models were loaded.", "coalesce(sum(cold_start), 0) / 1e6"),
    "tokens": ("Input and output tokens, if known.", "coalesce(sum(tokens_in + tokens_out), 0)"),
    "cost_dollars": ("Cost in US dollars, if known.", "coalesce(sum(cost), 0) / 1e9"),
    "unpriced_calls": ("Calls without a known cost.", "count(*) - count(cost)"),
}


class UsageCollector(Collector):
    """Prometheus collector of usage.

    Counters are sums over all events that were ever recorded in the database, by branch, model, skill and outcome; they
    do not fall when old events are archived. `collect` raises StoreError if the database cannot be read.
    """

    def __init__(self, cache: EventCache, budgets: Budgets, recorder: Recorder) -> None:
        self.cache, self.budgets, self.recorder = cache, budgets, recorder

    def collect(self) -> Iterator[PrometheusMetric]:
        """Yield all metrics, read from the database."""
        columns = ", ".join([*LABELS, *(sql for _, sql in COUNTERS.values()), *BUCKETS])
        with self.cache.read() as cursor:
            rows = cursor.execute(f"SELECT {columns} FROM events {KINDS} GROUP BY ALL ORDER BY ALL").fetchall()
        for column, (name, (description, _)) in enumerate(COUNTERS.items(), len(LABELS)):
            counter = CounterMetricFamily(f"moondream_{name}", description, labels=LABELS)
            for row in rows:
                counter.add_metric([_label(text) for text in row[: len(LABELS)]], row[column])
            yield counter
        yield _latency(rows)
        budgets = self.budgets.list()
        gauges = {"limit": "Monthly budget in US dollars.", "spent": "Spent this month in US dollars."}
        for name, description in gauges.items():
            gauge = GaugeMetricFamily(f"moondream_budget_{name}_dollars", description, labels=["branch"])
            for status in budgets:
                value = status.budget.limit if name == "limit" else status.spent
                gauge.add_metric([_label(status.budget.branch)], value)
            yield gauge
        yield CounterMetricFamily("moondream_usage_events_lost", "Events that could not be stored.", self.recorder.lost)


def _latency(rows: list[tuple[Any, ...]]) -> HistogramMetricFamily:
    """Return the histogram of the latency by branch, model and skill, from the rows of the counters."""
    column, sums = len(LABELS) + list(COUNTERS).index("latency_seconds"), dict[tuple[str, ...], list[float]]()
    for row in rows:
        numbers = [row[column], *row[-len(BUCKETS) :]]
        sums[row[:3]] = [sum(pair) for pair in zip(numbers, sums.get(row[:3], [0] * len(numbers)), strict=True)]
    limits = [*map(floatToGoString, LATENCY_BUCKETS), "+Inf"]
    description = "Computing time of model calls, as a histogram."
    family = HistogramMetricFamily("moondream_call_duration_seconds", description, labels=LABELS[:3])
    for names, (total, *counts) in sums.items():
        family.add_metric([_label(name) for name in names], list(zip(limits, counts, strict=True)), total)
    return family


def _label(text: str) -> str:
    """Replace carriage returns, which the text format does not escape."""
    return text.replace("\r", " ")
