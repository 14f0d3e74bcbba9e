"""Usage analytics: metrics, time series, latency against reward, errors and recent calls. Read-only queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from typing import Any

import numpy as np
from sqlalchemy import Select, select

from storage.database import Database
from storage.tables import DOLLAR, EVENTS, KINDS, REWARD, SECOND
from usage.column_store import ColumnStore, EventKind, exact_sums
from usage.events import OUTCOMES, UsageEvent
from usage.rollups import RollupReader
from usage.sketch import MAX_SORTED, RELATIVE_ERROR, grouped_quantiles
from usage.time_window import FilterError, UsageFilter, Window, bin_size, bin_starts, from_micros, to_micros

MAX_RECENT = 500
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
CENT = DOLLAR // 100
UNITS = {
    "calls": "calls",
    "error_rate": "share of calls",
    **dict.fromkeys((*QUANTILES, "first_token"), "s"),
    "tokens": "tokens",
    "cost": "US dollars",
    "cost_per_request": "US dollars",
    "reward_per_cent": "reward per US cent",
}
GROUPINGS = ("branch", "model", "skill", "outcome")


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
        tokens: Input and output tokens, of calls with known counts.
        cost: US dollars, of calls with a known price; None without any.
        cost_per_request: Mean cost of these calls.
        reward_per_cent: Sum of mean rewards per US cent, of calls with a reward and a known price.
        unpriced: Number of calls without a known cost.
        uncounted: Number of calls without known token counts.
        estimated: Number of calls whose cost is estimated.
        percentile_error: Largest relative error of a percentile; 0.0 if exact.
    """

    window: Window
    calls: Metric
    error_rate: Metric
    p50: Metric
    p95: Metric
    p99: Metric
    first_token: Metric
    tokens: Metric
    cost: Metric
    cost_per_request: Metric
    reward_per_cent: Metric
    unpriced: int
    uncounted: int
    estimated: int
    percentile_error: float


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
class Dashboard:
    """The content of the Usage tab for one filter, read in one pass.

    Attributes:
        metrics: Metrics of the filter.
        by_branch: Metrics per branch if the filter names several branches.
        volume: Calls over time, one line per group.
        latency: Latency percentiles over time.
        cost: Cost over time, one line per group.
        cost_per_model: Cost per model.
        scatter: Latency against reward, one point per model.
        errors: Error classes, most frequent first.
    """

    metrics: Metrics
    by_branch: tuple[tuple[str, Metrics], ...]
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

    def __init__(self, database: Database) -> None:
        self.database = database
        self._reader = RollupReader(database)

    def options(self) -> FilterOptions:
        """Return the choices of the filters."""
        kinds = self._reader.kinds().values()
        names = {field: tuple(sorted({getattr(kind, field) for kind in kinds})) for field in GROUPINGS}
        return FilterOptions(names["branch"], names["model"], names["skill"])

    def dashboard(self, usage_filter: UsageFilter, by: str = "branch", now: datetime | None = None) -> Dashboard:
        """Query the content of the Usage tab. Charts have one line per value of `by`: "branch" or "model"."""
        window = _window(usage_filter, now)
        current, previous = self._read(usage_filter, window), self._read(usage_filter, window.previous)
        starts = bin_starts(window, usage_filter.zone)
        aggregate = Aggregate(current, starts)
        models = list(_models(aggregate))
        branches = usage_filter.branches if len(usage_filter.branches) > 1 else ()
        return Dashboard(
            _metrics(window, current, previous),
            tuple(
                (name, _metrics(window, current.only("branch", name), previous.only("branch", name)))
                for name in branches
            ),
            _series(aggregate, starts, window, "calls", by),
            _latency_series(aggregate, starts, window),
            _series(aggregate, starts, window, "cost", by),
            tuple(cost for cost, _ in models),
            tuple(point for _, point in models),
            _errors(aggregate),
        )

    def metrics(self, usage_filter: UsageFilter, now: datetime | None = None) -> Metrics:
        """Query the metrics of a filter."""
        window = _window(usage_filter, now)
        return _metrics(window, self._read(usage_filter, window), self._read(usage_filter, window.previous))

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
        window = _window(usage_filter, now)
        if measure not in UNITS or by not in ("", *GROUPINGS):
            raise FilterError(f"measure must be one of {', '.join(UNITS)}, and by one of {', '.join(GROUPINGS)}.")
        starts = bin_starts(window, usage_filter.zone)
        return _series(Aggregate(self._read(usage_filter, window), starts), starts, window, measure, by)

    def recent(self, usage_filter: UsageFilter, limit: int = 50, now: datetime | None = None) -> tuple[UsageEvent, ...]:
        """Return the latest events, newest first; at most `MAX_RECENT`."""
        query = select_events(usage_filter, _window(usage_filter, now))
        query = query.order_by(EVENTS.c.time.desc(), EVENTS.c.id.desc()).limit(max(0, min(limit, MAX_RECENT)))
        with self.database.transaction() as connection:
            rows = connection.execute(query).mappings().all()
        return tuple(to_event(row) for row in rows)

    def _read(self, usage_filter: UsageFilter, window: Window) -> ColumnStore:
        start, end = to_micros(window.start), to_micros(window.end)
        return self._reader.read(start, end, lambda kind: matches(kind, usage_filter))


def _window(usage_filter: UsageFilter, now: datetime | None) -> Window:
    return usage_filter.window(now or datetime.now(timezone.utc))


def _filter_names(usage_filter: UsageFilter) -> dict[str, tuple[str, ...]]:
    """Return the selected names by field of `EventKind`, of which () selects all."""
    return {
        "branch": usage_filter.branches,
        "model": usage_filter.models,
        "skill": usage_filter.skills,
        "outcome": usage_filter.outcomes,
    }


def matches(kind: EventKind, usage_filter: UsageFilter) -> bool:
    """Check whether a filter selects events of this kind."""
    return all(not names or getattr(kind, field) in names for field, names in _filter_names(usage_filter).items())


def select_events(usage_filter: UsageFilter, window: Window) -> Select:
    """Return the unordered SELECT of a filter's events. Convert its rows with `to_event`."""
    query = select(EVENTS, *(column for column in KINDS.c if column.name not in ("id", "digest")))
    query = query.join(KINDS, KINDS.c.id == EVENTS.c.kind)
    query = query.where(EVENTS.c.time >= to_micros(window.start), EVENTS.c.time < to_micros(window.end))
    for column, names in _filter_names(usage_filter).items():
        if names:
            query = query.where(KINDS.c[column].in_(names))
    return query


def to_event(row: Mapping[Any, Any]) -> UsageEvent:
    """Convert a row of `select_events` to the recorded event."""
    values = {name: value for name, value in row.items() if name not in ("kind", "request")}
    for name, unit in {"latency": SECOND, "first_token": SECOND, "queue": SECOND, "cost": DOLLAR}.items():
        values[name] = None if values[name] is None else values[name] / unit
    reward = values["reward"]
    values |= {"time": from_micros(values["time"]), "reward": None if reward is None else reward / REWARD}
    return UsageEvent(**values, request_id=row["request"])


# ── Aggregation ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Aggregate:
    """Sums of rows by bin and kind, from which the totals of any selection of kinds are computed."""

    def __init__(self, rows: ColumnStore, starts: Sequence[datetime]) -> None:
        """Sum rows.

        Args:
            rows: The rows.
            starts: Start of each bin.
        """
        self.rows, self.bin_count = rows, len(starts)
        kind_ids = np.array(sorted(rows.kinds), np.int64)
        self.kinds = [rows.kinds[int(kind_id)] for kind_id in kind_ids]
        kind_indices = np.zeros(int(kind_ids.max(initial=0)) + 1, np.int64)
        kind_indices[kind_ids] = np.arange(len(kind_ids))
        edges = np.array([to_micros(start) for start in starts])
        columns = rows.columns
        self.bins = np.maximum(np.searchsorted(edges, columns["time"], side="right") - 1, 0)  # bin of each row
        self.kind = kind_indices[columns["kind"]]  # index in `kinds` of each row
        # int64 [bins, kinds, 6]: calls, tokens, cost; and calls, rewards (millionths) and cost of the scored calls.
        size = self.bin_count * len(self.kinds)
        groups, rewarded = self.bins * len(self.kinds) + self.kind, columns["rewarded"]
        tokens = columns["tokens_in"] + columns["tokens_out"]
        sums = [exact_sums(groups, column, size) for column in (columns["calls"], tokens, columns["cost"])]
        sums += [exact_sums(groups[rewarded], columns[c][rewarded], size) for c in ("calls", "reward", "cost")]
        self.sums = np.stack(sums, axis=-1).reshape(self.bin_count, len(self.kinds), 6)

    def names(self, field: str) -> list[str]:
        """Return the names in a field of `EventKind` that have calls, sorted."""
        indices = np.flatnonzero(self.sums[:, :, 0].sum(axis=0))
        return sorted({getattr(self.kinds[index], field) for index in indices})

    def totals(self, selected: Callable[[EventKind], bool] = lambda _: True) -> list[Totals]:
        """Return the totals of the selected kinds for each bin."""
        masks = [np.array([selected(kind) and check(kind) for kind in self.kinds], bool) for check in CHECKS]
        calls, failed, priced, counted, estimated = (self.sums[:, mask].sum(axis=1) for mask in masks)
        columns = (
            calls[:, 0], failed[:, 0], priced[:, 0], priced[:, 2], counted[:, 0], counted[:, 1],
            estimated[:, 0], calls[:, 3], calls[:, 4], priced[:, 4], priced[:, 5],
        )  # fmt: skip
        return [Totals(*map(int, row)) for row in np.stack(columns, axis=-1)]

    def latency(self, groups: np.ndarray, count: int, shares: Sequence[float]) -> list[list[float | None]]:
        """Return quantiles of the latency in seconds for each of `count` groups; `groups` has the group of each row."""
        columns = self.rows.columns
        values = grouped_quantiles(
            columns["latency"], columns["calls"], columns["latency_bucket"], groups, count, shares
        )
        return [[_to_seconds(value) for value in row] for row in values]

    def first_token(self, groups: np.ndarray, count: int) -> list[float | None]:
        """Return the median time to the first token in seconds for each group, of calls that report it."""
        known = self.rows.columns["first_bucket"] >= 0
        sums, calls, buckets = (self.rows.columns[name][known] for name in ("first_token", "calls", "first_bucket"))
        medians = grouped_quantiles(sums, calls, buckets, groups[known], count, [0.5])
        return [_to_seconds(median) for (median,) in medians]

    def groups(self, field: str, names: Sequence[str]) -> np.ndarray:
        """Return for each row the index in `names` of its kind's name."""
        indices = {name: index for index, name in enumerate(names)}
        return np.array([indices.get(getattr(kind, field), 0) for kind in self.kinds], np.int64)[self.kind]


CHECKS: tuple[Callable[[EventKind], bool], ...] = (
    lambda _: True,
    lambda kind: kind.failed,
    lambda kind: kind.priced,
    lambda kind: kind.counted,
    lambda kind: kind.estimated,
)


@dataclass(frozen=True)
class Totals:
    """Sums over calls. Costs are in billionths of a US dollar, rewards in millionths.

    Attributes:
        calls: Number of calls.
        failed: Number of failed calls.
        priced: Number of calls with a known cost.
        cost: Their cost.
        counted: Number of calls with known token counts.
        tokens: Their tokens.
        estimated: Number of calls with an estimated cost.
        scored: Number of calls with a reward.
        reward: Their rewards.
        priced_reward: Rewards of the calls with a reward and a known cost.
        priced_reward_cost: Cost of these calls.
    """

    calls: int
    failed: int
    priced: int
    cost: int
    counted: int
    tokens: int
    estimated: int
    scored: int
    reward: int
    priced_reward: int
    priced_reward_cost: int

    def measure(self, name: str) -> float | None:
        """Return a metric of `UNITS` that is not a percentile."""
        match name:
            case "calls":
                return self.calls
            case "error_rate":
                return self.failed / self.calls if self.calls else None
            case "tokens":
                return self.tokens if self.counted else None
            case "cost":
                return self.cost / DOLLAR if self.priced else None
            case "cost_per_request":
                return self.cost / (DOLLAR * self.priced) if self.priced else None
            case _:
                cost = self.priced_reward_cost
                return self.priced_reward * CENT / (REWARD * cost) if cost else None


def _to_seconds(micros: float | None) -> float | None:
    return None if micros is None else micros / SECOND


def measure_all(rows: ColumnStore) -> tuple[dict[str, float | None], Totals]:
    """Return every metric of `UNITS` over these rows, and the totals."""
    aggregate = Aggregate(rows, [from_micros(0)])
    (totals,) = aggregate.totals()
    (latency,) = aggregate.latency(aggregate.bins, 1, list(QUANTILES.values()))
    (first_token,) = aggregate.first_token(aggregate.bins, 1)
    percentiles = {**dict(zip(QUANTILES, latency, strict=True)), "first_token": first_token}
    return {name: percentiles[name] if name in percentiles else totals.measure(name) for name in UNITS}, totals


def _metrics(window: Window, current: ColumnStore, previous: ColumnStore) -> Metrics:
    (values, totals), (previous_values, _) = measure_all(current), measure_all(previous)
    exact = all(rows.exact and len(rows) <= MAX_SORTED for rows in (current, previous))
    return Metrics(
        window,
        **{name: Metric(values[name], previous_values[name], unit) for name, unit in UNITS.items()},
        unpriced=totals.calls - totals.priced,
        uncounted=totals.calls - totals.counted,
        estimated=totals.estimated,
        percentile_error=0.0 if exact else RELATIVE_ERROR,
    )


def _series(aggregate: Aggregate, starts: list[datetime], window: Window, measure: str, by: str) -> Series:
    names = aggregate.names(by) if by else [""]
    bin_count = aggregate.bin_count
    if measure in (*QUANTILES, "first_token"):
        groups = (aggregate.groups(by, names) if by else 0) * bin_count + aggregate.bins
        count = len(names) * bin_count
        if measure == "first_token":
            flat = aggregate.first_token(groups, count)
        else:
            flat = [row[0] for row in aggregate.latency(groups, count, [QUANTILES[measure]])]
        values = [flat[index * bin_count : (index + 1) * bin_count] for index in range(len(names))]
    else:
        values = [[totals.measure(measure) for totals in aggregate.totals(_has_name(by, name))] for name in names]
    lines = tuple(SeriesLine(name, tuple(line)) for name, line in zip(names, values, strict=True))
    return Series(measure, UNITS[measure], bin_size(window), tuple(starts), lines)


def _has_name(field: str, name: str) -> Callable[[EventKind], bool]:
    return (lambda kind: getattr(kind, field) == name) if field else (lambda _: True)


def _latency_series(aggregate: Aggregate, starts: list[datetime], window: Window) -> Series:
    by_bin = aggregate.latency(aggregate.bins, aggregate.bin_count, list(QUANTILES.values()))
    lines = tuple(SeriesLine(name, tuple(row[index] for row in by_bin)) for index, name in enumerate(QUANTILES))
    return Series("latency", "s", bin_size(window), tuple(starts), lines)


def _models(aggregate: Aggregate) -> Iterator[tuple[ModelCost, ScatterPoint]]:
    names = aggregate.names("model")
    medians = aggregate.latency(aggregate.groups("model", names), len(names), [0.5])
    for name, (median,) in zip(names, medians, strict=True):
        by_bin = aggregate.totals(_has_name("model", name))
        totals = Totals(*(sum(getattr(part, field.name) for part in by_bin) for field in fields(Totals)))
        reward = totals.reward / REWARD / totals.scored if totals.scored else None
        point = ScatterPoint(name, totals.calls, median or 0.0, reward, totals.measure("cost_per_request"))
        yield ModelCost(name, totals.measure("cost"), totals.calls - totals.priced), point


def _errors(aggregate: Aggregate) -> tuple[ErrorCount, ...]:
    counts: dict[str, int] = {}
    for kind, calls in zip(aggregate.kinds, aggregate.sums[:, :, 0].sum(axis=0), strict=True):
        if kind.failed and calls:
            counts[kind.error] = counts.get(kind.error, 0) + int(calls)
    errors = (ErrorCount(name, calls) for name, calls in counts.items())
    return tuple(sorted(errors, key=lambda error: (-error.calls, error.name)))
