"""Usage analytics: metrics, time series, latency against reward, errors and recent calls, in SQL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import duckdb

from storage.database import Database
from storage.tables import DOLLAR, REWARD, SECOND
from usage.cache import EventCache
from usage.events import OUTCOMES, UsageEvent
from usage.time_window import FilterError, UsageFilter, Window, bin_size, bin_starts, from_micros, to_micros

MAX_RECENT = 500
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
UNITS = {
    "calls": "calls",
    "error_rate": "share of calls",
    **dict.fromkeys((*QUANTILES, "first_token", "queue"), "s"),
    "cold_starts": "calls",
    "tokens": "tokens",
    "cost": "US dollars",
    "cost_per_request": "US dollars",
    "reward_per_cent": "reward per US cent",
}
NO_CALLS = {"calls": 0, "cold_starts": 0}  # metrics that are known without any call
GROUPINGS = ("branch", "model", "skill", "outcome")

# The metrics in SQL. Columns are integers: microseconds, billionths of a dollar, millionths of a reward. Cancelled
# calls did not fail; percentiles are by nearest rank.
LATENCIES = f"quantile_disc(latency, {list(QUANTILES.values())})"
MEASURES = {
    "calls": "count(*)",
    "error_rate": "count_if(outcome = 'error') / count(*)",
    **{name: f"quantile_disc(latency, {share}) / 1e6" for name, share in QUANTILES.items()},
    "first_token": "quantile_disc(first_token, 0.5) / 1e6",
    "queue": "quantile_disc(queue, 0.95) / 1e6",
    "cold_starts": "count(cold_start)",
    "tokens": "sum(tokens_in + tokens_out)",
    "cost": "sum(cost) / 1e9",
    "cost_per_request": "sum(cost) / 1e9 / count(cost)",
    "reward": "sum(reward) / 1e6 / count(reward)",
    "reward_per_cent": """sum(reward) FILTER (cost IS NOT NULL) / 1e6
        / nullif(sum(cost) FILTER (reward IS NOT NULL) / 1e7, 0)""",
}
COUNTS = {
    "unpriced": "count(*) - count(cost)",
    "uncounted": "count(*) - count(tokens_in + tokens_out)",
    "estimated": "count_if(cost_basis = 'estimated')",
}
# Maps each slot of $slot microseconds to the number of its bin; $edges has the bins' starts and the last one's end.
BINS = """
    CREATE OR REPLACE TEMP TABLE bins AS
    SELECT unnest(range($edges[i] // $slot, $edges[i + 1] // $slot)) AS slot, i - 1 AS bin
    FROM range(1, len($edges)) AS edges(i)
"""
KINDS = "JOIN kinds USING (kind)"
SLOTS = {"minute": 60 * SECOND}  # otherwise a quarter of an hour, of which all offsets of time zones are multiples
QUARTER = 15 * 60 * SECOND
RECENT_SHARES = (1 / 256, 1 / 16, 1)  # of the period in which recent events are searched, one after the other


@dataclass(frozen=True)
class Metric:
    """A metric and its value in the previous period of the same length.

    Attributes:
        value: The value; None if unknown or undefined, for example a mean of no calls.
        previous: The previous value, likewise.
        unit: A value of `UNITS`.
    """

    value: float | None
    previous: float | None
    unit: str

    @property
    def change(self) -> float | None:
        """Relative change, 0.1 for +10 %; None if a value is unknown or the previous one is 0."""
        return None if self.value is None or not self.previous else self.value / self.previous - 1


@dataclass(frozen=True)
class Metrics:
    """The metrics of a filter.

    Attributes:
        window: The time window.
        calls: Number of calls.
        error_rate: Fraction of calls that failed. Cancelled calls did not fail.
        p50: Median latency in seconds by nearest rank; `p95` and `p99` likewise.
        first_token: Median time to the first token in seconds, of calls that report it.
        queue: 95th percentile of the time waited before the computation in seconds, of calls that report it.
        cold_starts: Number of calls for which the model was loaded first. Their `queue` does not include loading.
        tokens: Input and output tokens, of calls with known counts.
        cost: US dollars, of calls with a known price; None without any.
        cost_per_request: Mean cost of these calls.
        reward_per_cent: Sum of mean rewards per US cent, of calls with a reward and a known price.
        unpriced: Number of calls without a known cost.
        uncounted: Number of calls without known token counts.
        estimated: Number of calls whose cost is estimated.
    """

    window: Window
    calls: Metric
    error_rate: Metric
    p50: Metric
    p95: Metric
    p99: Metric
    first_token: Metric
    queue: Metric
    cold_starts: Metric
    tokens: Metric
    cost: Metric
    cost_per_request: Metric
    reward_per_cent: Metric
    unpriced: int
    uncounted: int
    estimated: int


@dataclass(frozen=True)
class SeriesLine:
    """One line of a chart: a value per bin, None for bins without data."""

    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Series:
    """A metric over time.

    Attributes:
        measure: Name of the metric.
        unit: Its unit.
        bin: Bin size: "minute", "hour", "6 hours", "day" or "month".
        starts: Start of each bin, in the filter's time zone.
        lines: One line per group.
    """

    measure: str
    unit: str
    bin: str
    starts: tuple[datetime, ...]
    lines: tuple[SeriesLine, ...]


@dataclass(frozen=True)
class ScatterPoint:
    """A model in the chart of latency against reward.

    Attributes:
        model: Name of the model.
        calls: Number of calls.
        latency: Median latency in seconds.
        reward: Mean reward of the scored calls, 0..1.
        cost_per_request: Mean cost in US dollars.
    """

    model: str
    calls: int
    latency: float
    reward: float | None
    cost_per_request: float | None


@dataclass(frozen=True)
class ErrorCount:
    """Number of failed calls with an error class; `name` is "" for unclassified errors."""

    name: str
    calls: int


@dataclass(frozen=True)
class ModelCost:
    """Known cost of a model in US dollars, and the number of its calls without a known price."""

    name: str
    cost: float | None
    unpriced: int


@dataclass(frozen=True)
class BranchSummary:
    """Whether a branch is cheaper and better than others; `reward` is the mean of the scored calls."""

    name: str
    calls: int
    error_rate: float | None = None
    cost_per_request: float | None = None
    reward: float | None = None
    reward_per_cent: float | None = None


@dataclass(frozen=True)
class Dashboard:
    """The content of the Usage tab for one filter, read in one pass.

    Attributes:
        metrics: Metrics of the filter.
        branches: Summaries of the filter's branches, or of all that have calls, most calls first.
        volume: Calls over time, one line per group.
        latency: Latency percentiles over time.
        cost: Cost over time, one line per group.
        cost_per_model: Cost per model.
        scatter: Latency against reward, one point per model.
        errors: Error classes, most frequent first.
    """

    metrics: Metrics
    branches: tuple[BranchSummary, ...]
    volume: Series
    latency: Series
    cost: Series
    cost_per_model: tuple[ModelCost, ...]
    scatter: tuple[ScatterPoint, ...]
    errors: tuple[ErrorCount, ...]


@dataclass(frozen=True)
class FilterOptions:
    """Choices of the filters: every recorded name, sorted."""

    branches: tuple[str, ...]
    models: tuple[str, ...]
    skills: tuple[str, ...]
    outcomes: tuple[str, ...] = OUTCOMES


class UsageAnalytics:
    """Queries on recorded events. Every method raises StoreError if the database cannot be used.

    `now` is the end of the filter's period in all methods; the default is the current time.
    """

    def __init__(self, database: Database, data_dir: Path | None = None) -> None:
        """Create the queries without reading anything.

        Args:
            database: The database with the events.
            data_dir: Folder of the local cache; None for one in memory.
        """
        self.database = database
        self.cache = EventCache(database, data_dir)

    def options(self) -> FilterOptions:
        """Return the choices of the filters."""
        with self.cache.read() as cursor:
            names = [
                tuple(name for (name,) in cursor.execute(f"SELECT DISTINCT {column} FROM kinds ORDER BY 1").fetchall())
                for column in ("branch", "model", "skill")
            ]
        return FilterOptions(*names)

    def dashboard(self, usage_filter: UsageFilter, by: str = "branch", now: datetime | None = None) -> Dashboard:
        """Query the content of the Usage tab. Charts have one line per value of `by`: "branch" or "model"."""
        with self._open(usage_filter, now) as selection:
            volume, cost = selection.series(("calls", "cost"), by)
            models = selection.models()
            return Dashboard(
                selection.metrics(),
                selection.branches(),
                volume,
                selection.latency_series(),
                cost,
                tuple(cost for cost, _ in models),
                tuple(point for _, point in models),
                selection.errors(),
            )

    def metrics(self, usage_filter: UsageFilter, now: datetime | None = None) -> Metrics:
        """Query the metrics of a filter."""
        with self._open(usage_filter, now) as selection:
            return selection.metrics()

    def series(self, usage_filter: UsageFilter, measure: str, by: str = "", now: datetime | None = None) -> Series:
        """Query a metric over time.

        Args:
            usage_filter: The selected events.
            measure: A name in `UNITS`.
            by: A name in `GROUPINGS` for one line per value, or "" for a single line.
            now: End of the period.

        Raises:
            FilterError: `measure` or `by` is unknown.
        """
        if measure not in UNITS or by not in ("", *GROUPINGS):
            raise FilterError(f"measure must be one of {', '.join(UNITS)}, and by one of {', '.join(GROUPINGS)}.")
        with self._open(usage_filter, now) as selection:
            (series,) = selection.series((measure,), by)
            return series

    def recent(self, usage_filter: UsageFilter, limit: int = 50, now: datetime | None = None) -> tuple[UsageEvent, ...]:
        """Return the latest events, newest first; at most `MAX_RECENT`."""
        with self._open(usage_filter, now) as selection:
            return selection.recent(max(0, min(limit, MAX_RECENT)))

    @contextmanager
    def _open(self, usage_filter: UsageFilter, now: datetime | None) -> Iterator[Selection]:
        with self.cache.read() as cursor:
            window = usage_filter.window(now or datetime.now(timezone.utc))
            yield Selection(cursor, usage_filter, window)


def conditions(usage_filter: UsageFilter) -> tuple[str, dict[str, list[str]]]:
    """Return the SQL condition on the names that a filter selects, and its parameters."""
    names = {
        "branch": usage_filter.branches,
        "model": usage_filter.models,
        "skill": usage_filter.skills,
        "outcome": usage_filter.outcomes,
    }
    parameters = {column: list(selected) for column, selected in names.items() if selected}
    selected = " AND ".join(f"{column} IN (SELECT unnest(${column}))" for column in parameters)
    return f"kind IN (SELECT kind FROM kinds WHERE {selected})" if selected else "true", parameters


@dataclass(frozen=True)
class Selection:
    """The events that a filter selects, in one state of the cache."""

    cursor: duckdb.DuckDBPyConnection
    usage_filter: UsageFilter
    window: Window

    def query(self, columns: str, join: str = "", end: str = "", **parameters: Any) -> list[tuple[Any, ...]]:
        """Select columns of the window's events; `start` in `parameters` replaces the window's start."""
        condition, names = conditions(self.usage_filter)
        sql = f"SELECT {columns} FROM events {join} WHERE time >= $start AND time < $end AND {condition} {end}"
        span = {"start": to_micros(self.window.start), "end": to_micros(self.window.end)}
        return self.cursor.execute(sql, {**span, **names, **parameters}).fetchall()

    def metrics(self) -> Metrics:
        """Return the metrics of the window and of the previous one."""
        measures = {name: MEASURES[name] for name in UNITS if name not in QUANTILES} | COUNTS
        columns = ["time >= $middle", LATENCIES, *measures.values()]
        start, middle = to_micros(self.window.previous.start), to_micros(self.window.start)
        values: dict[bool, dict[str, Any]] = {is_current: dict(NO_CALLS) for is_current in (True, False)}
        for is_current, latencies, *row in self.query(
            ", ".join(columns), KINDS, "GROUP BY 1", start=start, middle=middle
        ):
            percentiles = {name: value / SECOND for name, value in zip(QUANTILES, latencies, strict=True)}
            values[is_current] = {**percentiles, **dict(zip(measures, row, strict=True))}
        current, previous = values[True], values[False]
        metrics: dict[str, Any] = {
            name: Metric(current.get(name), previous.get(name), unit) for name, unit in UNITS.items()
        }
        return Metrics(self.window, **metrics, **{name: current.get(name, 0) for name in COUNTS})

    def branches(self) -> tuple[BranchSummary, ...]:
        """Return the summaries of the filter's branches, or of all, most calls first."""
        names = ("calls", "error_rate", "cost_per_request", "reward", "reward_per_cent")
        columns = ["branch", *(MEASURES[name] for name in names)]
        rows = self.query(", ".join(columns), KINDS, "GROUP BY branch ORDER BY count(*) DESC, branch")
        summaries = {row[0]: BranchSummary(*row) for row in rows}
        without_calls = [BranchSummary(name, 0) for name in self.usage_filter.branches if name not in summaries]
        return (*summaries.values(), *without_calls)

    def series(self, measures: Sequence[str], by: str) -> list[Series]:
        """Return each measure per bin, with one line per name in the column `by`, or a single line."""
        columns = [by or "''", *(MEASURES[name] for name in measures)]
        lines: dict[str, dict[int, list[Any]]] = {} if by else {"": {}}
        for index, name, *values in self._by_bin(", ".join(columns), "GROUP BY 1, 2 ORDER BY 2", KINDS if by else ""):
            lines.setdefault(name, {})[index] = values
        return [
            self._series(
                name,
                UNITS[name],
                {line: {index: values[column] for index, values in rows.items()} for line, rows in lines.items()},
            )
            for column, name in enumerate(measures)
        ]

    def latency_series(self) -> Series:
        """Return the latency percentiles per bin."""
        rows = self._by_bin(LATENCIES, "GROUP BY 1")
        lines = {
            name: {index: values[column] / SECOND for index, values in rows} for column, name in enumerate(QUANTILES)
        }
        return self._series("latency", "s", lines)

    def _by_bin(self, columns: str, end: str, join: str = "") -> list[tuple[Any, ...]]:
        slot = SLOTS.get(bin_size(self.window), QUARTER)
        edges = [*map(to_micros, self._starts), -(-to_micros(self.window.end) // slot) * slot]
        self.cursor.execute(BINS, {"edges": edges, "slot": slot})
        return self.query(f"bin, {columns}", f"{join} JOIN bins ON slot = time // $slot", end, slot=slot)

    @property
    def _starts(self) -> list[datetime]:
        return bin_starts(self.window, self.usage_filter.zone)

    def _series(self, name: str, unit: str, lines: Mapping[str, Mapping[int, Any]]) -> Series:
        """Fill in bins without events: no calls, and no value of any other measure."""
        starts, missing = tuple(self._starts), NO_CALLS.get(name)
        filled = (
            SeriesLine(line, tuple(values.get(index, missing) for index in range(len(starts))))
            for line, values in lines.items()
        )
        return Series(name, unit, bin_size(self.window), starts, tuple(filled))

    def models(self) -> list[tuple[ModelCost, ScatterPoint]]:
        """Return cost, latency and reward of each model."""
        columns = ["model", "count(*)", MEASURES["p50"], MEASURES["reward"]]
        columns += [MEASURES["cost_per_request"], MEASURES["cost"], COUNTS["unpriced"]]
        rows = self.query(", ".join(columns), KINDS, "GROUP BY model ORDER BY model")
        return [(ModelCost(row[0], *row[5:]), ScatterPoint(*row[:5])) for row in rows]

    def errors(self) -> tuple[ErrorCount, ...]:
        """Return the classes of errors, most frequent first."""
        rows = self.query(
            "error, count(*)", KINDS, "AND outcome = 'error' GROUP BY error ORDER BY count(*) DESC, error"
        )
        return tuple(ErrorCount(*row) for row in rows)

    def recent(self, limit: int) -> tuple[UsageEvent, ...]:
        """Return the latest events, newest first. The newest part of the window usually has enough of them."""
        names = [name for name in UsageEvent.__dataclass_fields__ if name != "request_id"]
        columns, rows = ", ".join(f'"{name}"' for name in [*names, "request"]), []
        start, end = to_micros(self.window.start), to_micros(self.window.end)
        for share in RECENT_SHARES:
            newest = end - round((end - start) * share)
            rows = self.query(columns, KINDS, f"ORDER BY time DESC, id DESC LIMIT {limit:d}", start=newest)
            if len(rows) >= limit:
                break
        return tuple(_to_event(dict(zip([*names, "request_id"], row, strict=True))) for row in rows)


def _to_event(values: dict[str, Any]) -> UsageEvent:
    """Convert a row to the recorded event."""
    for name, unit in {
        "latency": SECOND,
        "first_token": SECOND,
        "queue": SECOND,
        "cold_start": SECOND,
        "cost": DOLLAR,
        "reward": REWARD,
    }.items():
        values[name] = None if values[name] is None else values[name] / unit
    return UsageEvent(**{**values, "time": from_micros(values["time"])})
