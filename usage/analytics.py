"""Usage analytics: metrics, time series, latency against reward, errors and recent calls, in SQL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from storage.database import Database
from storage.tables import DOLLAR, REWARD, SECOND
from usage.cache import EventCache
from usage.events import OUTCOMES, UsageEvent
from usage.time_window import FilterError, UsageFilter, Window, bin_size, bin_starts, from_micros, to_micros

MAX_RECENT = 500
# Name -> column of durations in microseconds, and percentile by nearest rank.
PERCENTILES = {
    "p50": ("latency", 50),
    "p95": ("latency", 95),
    "p99": ("latency", 99),
    "first_token": ("first_token", 50),
    "queue": ("queue", 95),
}
DURATIONS = ("latency", "first_token", "queue")
LATENCIES = ("p50", "p95", "p99")
UNITS = {
    "calls": "calls",
    "error_rate": "share of calls",
    **dict.fromkeys(PERCENTILES, "s"),
    "cold_starts": "calls",
    "tokens": "tokens",
    "cost": "US dollars",
    "cost_per_request": "US dollars",
    "reward_per_cent": "reward per US cent",
}
NO_CALLS = {"calls": 0, "cold_starts": 0}  # metrics that are known without any call
GROUPINGS = ("branch", "model", "skill", "outcome")

# Sums over the events of each bin and kind, separately for those with and without each known value. Numbers are
# integers: microseconds, billionths of a dollar, millionths of a reward.
KNOWN = {"counted": "tokens_in + tokens_out", "priced": "cost", "scored": "reward"}
SUMS = {
    "calls": "count(*)",
    "cold_starts": "count(cold_start)",
    "tokens": "sum(tokens_in + tokens_out)",
    "cost": "sum(cost)",
    "reward": "sum(reward)",
}
# The other metrics, computed from these sums. Cancelled calls did not fail.
MEASURES = {
    "calls": "sum(calls)",
    "error_rate": "sum(if(outcome = 'error', calls, 0)) / sum(calls)",
    "cold_starts": "sum(cold_starts)",
    "tokens": "sum(tokens)",
    "cost": "sum(cost) / 1e9",
    "cost_per_request": "sum(cost) / 1e9 / sum(if(priced, calls, 0))",
    "reward": "sum(reward) / 1e6 / sum(if(scored, calls, 0))",
    "reward_per_cent": "sum(if(priced, reward, NULL)) / 1e6 / nullif(sum(if(scored, cost, NULL)) / 1e7, 0)",
}
COUNTS = {
    "unpriced": "sum(if(priced, 0, calls))",
    "uncounted": "sum(if(counted, 0, calls))",
    "estimated": "sum(if(cost_basis = 'estimated', calls, 0))",
}
# The kinds of events that the filter selects. Sums are computed over all kinds with the same names in some columns, and
# belong to the first of them.
NAMES = ("branch", "model", "outcome", "error", "cost_basis")
SELECTED = """
    CREATE OR REPLACE TEMP TABLE selected AS
    SELECT *, min(kind) OVER (PARTITION BY {names}) AS first_kind FROM kinds WHERE {condition}
"""
KIND_NAMES = "JOIN selected USING (kind)"
# Maps each slot of $slot microseconds to the number of its bin; $edges has the bins' starts and the last one's end. The
# first bin, -1, is the previous period.
BINS = """
    CREATE OR REPLACE TEMP TABLE bins AS
    SELECT unnest(range($edges[i] // $slot, $edges[i + 1] // $slot)) AS slot, i - 2 AS bin
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
            models = selection.models()
            return Dashboard(
                selection.metrics(),
                selection.branches(),
                selection.series("calls", by),
                selection.latency_series(),
                selection.series("cost", by),
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
        with self._open(usage_filter, now, by) as selection:
            return selection.series(measure, by)

    def recent(self, usage_filter: UsageFilter, limit: int = 50, now: datetime | None = None) -> tuple[UsageEvent, ...]:
        """Return the latest events, newest first; at most `MAX_RECENT`."""
        limit, rows = max(0, min(limit, MAX_RECENT)), []
        names = [name for name in UsageEvent.__dataclass_fields__ if name != "request_id"]
        columns = ", ".join(f'"{name}"' for name in [*names, "request"])
        condition, parameters = conditions(usage_filter)
        window = usage_filter.window(now or datetime.now(timezone.utc))
        start, end = to_micros(window.start), to_micros(window.end)
        with self.cache.read() as cursor:
            for share in RECENT_SHARES:  # the newest part of the window usually has enough events
                rows = cursor.execute(
                    f"""SELECT {columns} FROM events {KINDS} WHERE time >= $start AND time < $end AND {condition}
                    ORDER BY time DESC, id DESC LIMIT {limit:d}""",
                    {"start": end - round((end - start) * share), "end": end, **parameters},
                ).fetchall()
                if len(rows) >= limit:
                    break
        return tuple(_to_event(dict(zip([*names, "request_id"], row, strict=True))) for row in rows)

    @contextmanager
    def _open(self, usage_filter: UsageFilter, now: datetime | None, by: str = "") -> Iterator[Selection]:
        window = usage_filter.window(now or datetime.now(timezone.utc))
        with self.cache.read() as cursor:
            yield Selection(cursor, usage_filter, window, by)


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


class Selection:
    """The events that a filter selects in its period and in the previous one, in one state of the cache."""

    def __init__(self, cursor: duckdb.DuckDBPyConnection, usage_filter: UsageFilter, window: Window, by: str) -> None:
        """Create tables of the bins and of the selected kinds. Sums are kept apart by `NAMES` and the column `by`."""
        self.cursor, self.usage_filter, self.window = cursor, usage_filter, window
        self.starts = bin_starts(window, usage_filter.zone)
        slot = SLOTS.get(bin_size(window), QUARTER)
        start, end = to_micros(window.previous.start), to_micros(window.end)
        edges = [start // slot * slot, *map(to_micros, self.starts), -(-end // slot) * slot]
        cursor.execute(BINS, {"edges": edges, "slot": slot})
        condition, parameters = conditions(usage_filter)
        cursor.execute(SELECTED.format(names=", ".join({*NAMES, by} - {""}), condition=condition), parameters)
        self.bins, self.filter = f"JOIN bins ON slot = time // {slot}", KIND_NAMES if parameters else ""

    @cached_property
    def sums(self) -> str:
        """Name of the table of sums per bin and kind. The bin of the previous period is -1."""
        known = {name: f"{sql} IS NOT NULL" for name, sql in KNOWN.items()}
        columns = {"bin": f"if(time < {to_micros(self.window.start)}, -1, bin)", "kind": "first_kind"} | known | SUMS
        selection = ", ".join(f"{sql} AS {name}" for name, sql in columns.items())
        both = Window(self.window.previous.start, self.window.end)
        sums = self._events(selection, f"{self.bins} {KIND_NAMES}", both)
        self.cursor.execute(f"CREATE OR REPLACE TEMP TABLE sums AS {sums} GROUP BY ALL")
        return "sums"

    def _events(self, columns: str, joins: str, window: Window | None = None) -> str:
        """Return a query on the events of a window, by default of the filter's period.

        `joins` must have `filter` or `KIND_NAMES`, which also gives the columns of `kinds`.
        """
        start, end = to_micros((window or self.window).start), to_micros((window or self.window).end)
        return f"SELECT {columns} FROM events {joins} WHERE time >= {start} AND time < {end}"

    def _sums(self, columns: str, end: str) -> list[tuple[Any, ...]]:
        """Select from the sums."""
        return self.cursor.execute(f"SELECT {columns} FROM {self.sums} {KIND_NAMES} {end}").fetchall()

    def metrics(self) -> Metrics:
        """Return the metrics of the window and of the previous one."""
        measures = {name: sql for name, sql in MEASURES.items() if name in UNITS} | COUNTS
        values: dict[bool, dict[str, Any]] = {is_current: dict(NO_CALLS) for is_current in (True, False)}
        for is_current, *row in self._sums(", ".join(["bin >= 0", *measures.values()]), "GROUP BY 1"):
            values[is_current] |= zip(measures, row, strict=True)
        current = values[True] | self._percentiles(self.window)
        previous = values[False] | self._percentiles(self.window.previous)
        metrics: dict[str, Any] = {
            name: Metric(current.get(name), previous.get(name), unit) for name, unit in UNITS.items()
        }
        return Metrics(self.window, **metrics, **{name: current.get(name, 0) for name in COUNTS})

    def _percentiles(self, window: Window) -> dict[str, Any]:
        """Return the percentiles of all calls in a window. NumPy selects them in half the time of quantile_disc."""
        rows = self.cursor.sql(self._events(", ".join(DURATIONS), self.filter, window)).to_arrow_table()
        durations = {name: rows[name].drop_null().to_numpy() for name in DURATIONS}
        return {name: _nearest_rank(durations[column], percent) for name, (column, percent) in PERCENTILES.items()}

    def branches(self) -> tuple[BranchSummary, ...]:
        """Return the summaries of the filter's branches, or of all, most calls first."""
        names = ("calls", "error_rate", "cost_per_request", "reward", "reward_per_cent")
        columns = ["branch", *(MEASURES[name] for name in names)]
        rows = self._sums(", ".join(columns), "WHERE bin >= 0 GROUP BY branch ORDER BY sum(calls) DESC, branch")
        summaries = {row[0]: BranchSummary(*row) for row in rows}
        without_calls = [BranchSummary(name, 0) for name in self.usage_filter.branches if name not in summaries]
        return (*summaries.values(), *without_calls)

    def series(self, measure: str, by: str) -> Series:
        """Return a measure per bin, with one line per name in the column `by`, or a single line."""
        group = f"bin, {by}" if by else "bin, ''"
        if measure in PERCENTILES:
            column, percent = PERCENTILES[measure]
            joins = f"{self.bins} {KIND_NAMES}"
            query = self._events(f"{group}, quantile_disc({column}, {percent / 100}) / {SECOND}", joins)
            rows = self.cursor.execute(f"{query} GROUP BY 1, 2 ORDER BY 2").fetchall()
        else:
            rows = self._sums(f"{group}, {MEASURES[measure]}", "WHERE bin >= 0 GROUP BY 1, 2 ORDER BY 2")
        lines: dict[str, dict[int, Any]] = {} if by else {"": {}}
        for index, name, value in rows:
            lines.setdefault(name, {})[index] = value
        return self._series(measure, UNITS[measure], lines)

    def latency_series(self) -> Series:
        """Return the latency percentiles per bin."""
        shares = [PERCENTILES[name][1] / 100 for name in LATENCIES]
        query = self._events(f"bin, quantile_disc(latency, {shares})", f"{self.bins} {self.filter}")
        rows = self.cursor.execute(f"{query} GROUP BY bin").fetchall()
        lines = {
            name: {index: values[column] / SECOND for index, values in rows} for column, name in enumerate(LATENCIES)
        }
        return self._series("latency", "s", lines)

    def _series(self, name: str, unit: str, lines: Mapping[str, Mapping[int, Any]]) -> Series:
        """Fill in bins without events: no calls, and no value of any other measure."""
        missing, bins = NO_CALLS.get(name), range(len(self.starts))
        filled = (
            SeriesLine(line, tuple(values.get(index, missing) for index in bins)) for line, values in lines.items()
        )
        return Series(name, unit, bin_size(self.window), tuple(self.starts), tuple(filled))

    def models(self) -> list[tuple[ModelCost, ScatterPoint]]:
        """Return cost, latency and reward of each model."""
        query = self._events(f"model, quantile_disc(latency, 0.5) / {SECOND}", KIND_NAMES)
        latencies = dict(self.cursor.execute(f"{query} GROUP BY model").fetchall())
        columns = ["model", "sum(calls)", MEASURES["reward"], MEASURES["cost_per_request"], MEASURES["cost"]]
        rows = self._sums(", ".join([*columns, COUNTS["unpriced"]]), "WHERE bin >= 0 GROUP BY model ORDER BY model")
        return [
            (ModelCost(model, cost, unpriced), ScatterPoint(model, calls, latencies[model], reward, cost_per_request))
            for model, calls, reward, cost_per_request, cost, unpriced in rows
        ]

    def errors(self) -> tuple[ErrorCount, ...]:
        """Return the classes of errors, most frequent first."""
        end = "WHERE bin >= 0 AND outcome = 'error' GROUP BY error ORDER BY sum(calls) DESC, error"
        return tuple(ErrorCount(*row) for row in self._sums("error, sum(calls)", end))


def _nearest_rank(durations: NDArray[np.int64], percent: int) -> float | None:
    """Return a percentile of durations in seconds, or None if there are none."""
    index = -(-percent * len(durations) // 100) - 1
    return int(np.partition(durations, index)[index]) / SECOND if len(durations) else None


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
