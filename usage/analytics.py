"""What the events say: figures, series, latency against reward, errors, recent calls. Read-only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from typing import Any

import numpy as np
from sqlalchemy import Select, select

from storage.database import Database
from storage.tables import EVENTS, KINDS
from usage.cells import Cells, Kind, exact_sums
from usage.events import OUTCOMES, Event
from usage.rollups import Reader
from usage.sketch import ERROR, MANY, grouped
from usage.time_window import SECOND, Filter, FilterError, Window, bin_size, bins, micros, moment

MAX_RECENT = 500
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
CENT = 10_000_000  # in billionths of a dollar
DOLLAR = 100 * CENT
UNITS = {
    "calls": "calls",
    "error_rate": "share of calls",
    **dict.fromkeys((*QUANTILES, "first_token"), "s"),
    "tokens": "tokens",
    "cost": "US dollars",
    "cost_per_request": "US dollars",
    "reward_per_cent": "reward per US cent",
}


@dataclass(frozen=True)
class Figure:
    """A value and the one of the period before; None where there is nothing to tell, or it is not known."""

    value: float | None
    before: float | None
    unit: str

    @property
    def change(self) -> float | None:
        """The relative change, 0.1 for 10 % more; None where one of the two is not there, or the one before is 0."""
        return None if self.value is None or not self.before else self.value / self.before - 1


@dataclass(frozen=True)
class Figures:
    """The figures of a filter and of the period before. Seconds, US dollars, shares of 1.

    calls · error_rate: share of calls that ended with an error (a cancelled call is none) · p50, p95, p99: latency of
    all calls in the filter, by nearest rank · first_token: its median, where known · tokens: in and out, where known ·
    cost: of the calls with a known price, None without any · cost_per_request: the same per such call ·
    reward_per_cent: sum of the calls' mean rewards per cent that they cost, of calls that have both.
    unpriced, uncounted: calls whose cost or tokens are not known; estimated: calls whose cost is estimated.
    percentile_error: the relative error that a percentile can have: 0.0 where they are exact.
    """

    window: Window
    calls: Figure
    error_rate: Figure
    p50: Figure
    p95: Figure
    p99: Figure
    first_token: Figure
    tokens: Figure
    cost: Figure
    cost_per_request: Figure
    reward_per_cent: Figure
    unpriced: int
    uncounted: int
    estimated: int
    percentile_error: float


@dataclass(frozen=True)
class Line:
    """One line of a chart: a value for each bin; None where a bin has nothing to tell."""

    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Series:
    """A measure over time. starts: where each bin begins, in the filter's zone; bin: "minute" to "month"."""

    measure: str
    unit: str
    bin: str
    starts: tuple[datetime, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Dot:
    """One model: its calls, median latency (s), mean reward (0..1) of the scored calls, cost per request ($)."""

    model: str
    calls: int
    latency: float
    reward: float | None
    cost_per_request: float | None


@dataclass(frozen=True)
class Count:
    """How many calls have this name (an error class, "" where none was told)."""

    name: str
    calls: int


@dataclass(frozen=True)
class Amount:
    """What a model cost in US dollars, where known, and how many of its calls have no known price."""

    name: str
    cost: float | None
    unpriced: int


@dataclass(frozen=True)
class Dashboard:
    """All that the page shows of a filter, from one look at the data.

    by_branch: a branch's own figures, for each that was chosen where those are several. volume and cost have a line per
    branch or model (`by`); latency has p50, p95 and p99.
    """

    figures: Figures
    by_branch: tuple[tuple[str, Figures], ...]
    volume: Series
    latency: Series
    cost: Series
    cost_per_model: tuple[Amount, ...]
    scatter: tuple[Dot, ...]
    errors: tuple[Count, ...]


@dataclass(frozen=True)
class Options:
    """What there is to choose from: every name that any event has."""

    branches: tuple[str, ...]
    models: tuple[str, ...]
    skills: tuple[str, ...]
    outcomes: tuple[str, ...] = OUTCOMES


class Usage:
    """Answers questions about the events in a database. Every method raises StoreError when that is down."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._reader = Reader(database)

    def options(self) -> Options:
        """The names for the filters, sorted."""
        kinds = self._reader.kinds().values()
        names = {part: tuple(sorted({getattr(kind, part) for kind in kinds})) for part in ("branch", "model", "skill")}
        return Options(names["branch"], names["model"], names["skill"])

    def dashboard(self, wanted: Filter, by: str = "branch", now: datetime | None = None) -> Dashboard:
        """Everything of the page; `by`: "branch" or "model"; `now`: the end of the period, if not this moment."""
        window = wanted.window(now or datetime.now(timezone.utc))
        cells, before = self._cells(wanted, window), self._cells(wanted, window.before)
        starts = bins(window, wanted.zone)
        tally = Tally(cells, starts)
        models = list(_models(tally))
        split = wanted.branches if len(wanted.branches) > 1 else ()
        return Dashboard(
            _figures(window, cells, before),
            tuple((name, _figures(window, cells.only("branch", name), before.only("branch", name))) for name in split),
            _series(tally, starts, window, "calls", by),
            _latencies(tally, starts, window),
            _series(tally, starts, window, "cost", by),
            tuple(amount for amount, _ in models),
            tuple(dot for _, dot in models),
            _errors(tally),
        )

    def figures(self, wanted: Filter, now: datetime | None = None) -> Figures:
        """The figures alone."""
        window = wanted.window(now or datetime.now(timezone.utc))
        return _figures(window, self._cells(wanted, window), self._cells(wanted, window.before))

    def series(self, wanted: Filter, measure: str, by: str = "", now: datetime | None = None) -> Series:
        """One measure (a name of UNITS) over time; `by`: "branch", "model", "skill", "outcome", or "" for one line."""
        window = wanted.window(now or datetime.now(timezone.utc))
        if measure not in UNITS or by not in ("", "branch", "model", "skill", "outcome"):
            raise FilterError(f"A series is one of {', '.join(UNITS)}, by branch, model, skill or outcome.")
        starts = bins(window, wanted.zone)
        return _series(Tally(self._cells(wanted, window), starts), starts, window, measure, by)

    def recent(self, wanted: Filter, limit: int = 50, now: datetime | None = None) -> tuple[Event, ...]:
        """The newest events of the filter, newest first; at most MAX_RECENT."""
        window = wanted.window(now or datetime.now(timezone.utc))
        query = select_events(wanted, window).order_by(EVENTS.c.time.desc(), EVENTS.c.id.desc())
        with self.database.transaction() as connection:
            rows = connection.execute(query.limit(max(0, min(limit, MAX_RECENT)))).mappings().all()
        return tuple(event_of(row) for row in rows)

    def _cells(self, wanted: Filter, window: Window) -> Cells:
        return self._reader.cells(micros(window.start), micros(window.end), lambda kind: matches(kind, wanted))


def matches(kind: Kind, wanted: Filter) -> bool:
    """Whether events of this kind are meant by the filter."""
    pairs = (
        (kind.branch, wanted.branches),
        (kind.model, wanted.models),
        (kind.skill, wanted.skills),
        (kind.outcome, wanted.outcomes),
    )
    return all(not names or name in names for name, names in pairs)


def select_events(wanted: Filter, window: Window) -> Select:
    """The query for the filter's events with their words, in no order. `event_of` reads its rows."""
    query = select(EVENTS, *(column for column in KINDS.c if column.name not in ("id", "digest")))
    query = query.join(KINDS, KINDS.c.id == EVENTS.c.kind)
    query = query.where(EVENTS.c.time >= micros(window.start), EVENTS.c.time < micros(window.end))
    names = {"branch": wanted.branches, "model": wanted.models, "skill": wanted.skills, "outcome": wanted.outcomes}
    for column, chosen in names.items():
        if chosen:
            query = query.where(KINDS.c[column].in_(chosen))
    return query


def event_of(row: Mapping[Any, Any]) -> Event:
    """A row of `select_events` as the event that was recorded."""
    values = {name: value for name, value in row.items() if name not in ("kind", "request")}
    for name, one in {"latency": SECOND, "first_token": SECOND, "queue": SECOND, "cost": DOLLAR}.items():
        values[name] = None if values[name] is None else values[name] / one
    reward = values["reward"]
    values |= {"time": moment(values["time"]), "reward": None if reward is None else reward / 1_000_000}
    return Event(**values, request_id=row["request"])


# ── From cells to figures ───────────────────────────────────────────────────────────────────────────────────────────


class Tally:
    """Cells added up by bin and kind: sums for any part of them are then small work."""

    def __init__(self, cells: Cells, starts: Sequence[datetime]) -> None:
        """starts: where each bin begins."""
        self.cells, self.count = cells, len(starts)
        numbers = np.array(sorted(cells.kinds), np.int64)
        self.kinds = [cells.kinds[int(number)] for number in numbers]
        order = np.zeros(int(numbers.max(initial=0)) + 1, np.int64)
        order[numbers] = np.arange(len(numbers))
        edges = np.array([micros(start) for start in starts])
        self.bins = np.maximum(np.searchsorted(edges, cells.columns["time"], side="right") - 1, 0)
        self.kind = order[cells.columns["kind"]]
        self.sums = self._summed()

    def _summed(self) -> np.ndarray:
        """int64 [bins, kinds, 6]: calls, tokens, cost, scored calls, their rewards (millionths), their cost."""
        columns, size = self.cells.columns, self.count * len(self.kinds)
        places, rewarded = self.bins * len(self.kinds) + self.kind, columns["rewarded"]
        tokens = columns["tokens_in"] + columns["tokens_out"]
        sums = [exact_sums(places, column, size) for column in (columns["calls"], tokens, columns["cost"])]
        sums += [exact_sums(places[rewarded], columns[c][rewarded], size) for c in ("calls", "reward", "cost")]
        return np.stack(sums, axis=-1).reshape(self.count, len(self.kinds), 6)

    def names(self, part: str) -> list[str]:
        """The names that calls have in this part, sorted."""
        there = np.flatnonzero(self.sums[:, :, 0].sum(axis=0))
        return sorted({getattr(self.kinds[place], part) for place in there})

    def totals(self, meant: Callable[[Kind], bool] = lambda _: True) -> list[Totals]:
        """For each bin the totals of the kinds that are meant."""
        masks = [np.array([meant(kind) and check(kind) for kind in self.kinds], bool) for check in CHECKS]
        everything, failed, priced, counted, estimated = (self.sums[:, mask].sum(axis=1) for mask in masks)
        columns = (
            everything[:, 0], failed[:, 0], priced[:, 0], priced[:, 2], counted[:, 0], counted[:, 1],
            estimated[:, 0], everything[:, 3], everything[:, 4], priced[:, 4], priced[:, 5],
        )  # fmt: skip
        return [Totals(*map(int, row)) for row in np.stack(columns, axis=-1)]

    def latency(self, groups: np.ndarray, count: int, shares: Sequence[float]) -> list[list[float | None]]:
        """The latency in seconds at these shares, for each group of cells."""
        columns = self.cells.columns
        found = grouped(columns["latency"], columns["calls"], columns["latency_bucket"], groups, count, shares)
        return [[_in_seconds(value) for value in row] for row in found]

    def first_token(self, groups: np.ndarray, count: int) -> list[float | None]:
        """The median time to the first token in seconds, where known, for each group of cells."""
        known = self.cells.columns["first_bucket"] >= 0
        value, calls, bucket = (self.cells.columns[name][known] for name in ("first_token", "calls", "first_bucket"))
        return [_in_seconds(row[0]) for row in grouped(value, calls, bucket, groups[known], count, [0.5])]

    def groups(self, part: str, names: Sequence[str]) -> np.ndarray:
        """For each cell the place of its name in `names`."""
        places = {name: place for place, name in enumerate(names)}
        return np.array([places.get(getattr(kind, part), 0) for kind in self.kinds], np.int64)[self.kind]


CHECKS: tuple[Callable[[Kind], bool], ...] = (
    lambda _: True,
    lambda kind: kind.failed,
    lambda kind: kind.priced,
    lambda kind: kind.counted,
    lambda kind: kind.estimated,
)


@dataclass(frozen=True)
class Totals:
    """Sums of calls. Cost in billionths of a dollar, rewards in millionths; rewarded and spent: of priced calls."""

    calls: int
    failed: int
    priced: int
    cost: int
    counted: int
    tokens: int
    estimated: int
    scored: int
    reward: int
    rewarded: int
    spent: int

    def measure(self, name: str) -> float | None:
        """One of UNITS that is no percentile."""
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
                return self.rewarded * CENT / (1_000_000 * self.spent) if self.spent else None


def _in_seconds(value: float | None) -> float | None:
    return None if value is None else value / SECOND


def measure(cells: Cells) -> tuple[dict[str, float | None], Totals]:
    """Every measure of UNITS over these cells, and the totals."""
    tally = Tally(cells, [moment(0)])
    (totals,) = tally.totals()
    (latency,) = tally.latency(tally.bins, 1, list(QUANTILES.values()))
    timed = {**dict(zip(QUANTILES, latency, strict=True)), "first_token": tally.first_token(tally.bins, 1)[0]}
    return {name: timed[name] if name in timed else totals.measure(name) for name in UNITS}, totals


def _figures(window: Window, cells: Cells, before: Cells) -> Figures:
    (now, totals), (then, _) = measure(cells), measure(before)
    exact = all(part.exact and len(part) <= MANY for part in (cells, before))
    return Figures(
        window,
        **{name: Figure(now[name], then[name], unit) for name, unit in UNITS.items()},
        unpriced=totals.calls - totals.priced,
        uncounted=totals.calls - totals.counted,
        estimated=totals.estimated,
        percentile_error=0.0 if exact else ERROR,
    )


def _series(tally: Tally, starts: list[datetime], window: Window, what: str, by: str) -> Series:
    names = tally.names(by) if by else [""]
    if what in (*QUANTILES, "first_token"):
        groups = (tally.groups(by, names) if by else 0) * tally.count + tally.bins
        count = len(names) * tally.count
        if what == "first_token":
            flat = tally.first_token(groups, count)
        else:
            flat = [row[0] for row in tally.latency(groups, count, [QUANTILES[what]])]
        values = [flat[place * tally.count : (place + 1) * tally.count] for place in range(len(names))]
    else:
        values = [[totals.measure(what) for totals in tally.totals(_named(by, name))] for name in names]
    lines = tuple(Line(name, tuple(line)) for name, line in zip(names, values, strict=True))
    return Series(what, UNITS[what], bin_size(window), tuple(starts), lines)


def _named(part: str, name: str) -> Callable[[Kind], bool]:
    return (lambda kind: getattr(kind, part) == name) if part else (lambda _: True)


def _latencies(tally: Tally, starts: list[datetime], window: Window) -> Series:
    found = tally.latency(tally.bins, tally.count, list(QUANTILES.values()))
    lines = tuple(Line(name, tuple(values[place] for values in found)) for place, name in enumerate(QUANTILES))
    return Series("latency", "s", bin_size(window), tuple(starts), lines)


def _models(tally: Tally) -> Iterator[tuple[Amount, Dot]]:
    names = tally.names("model")
    medians = tally.latency(tally.groups("model", names), len(names), [0.5])
    for name, (median,) in zip(names, medians, strict=True):
        parts = tally.totals(_named("model", name))
        total = Totals(*(sum(getattr(part, field.name) for part in parts) for field in fields(Totals)))
        reward = total.reward / 1_000_000 / total.scored if total.scored else None
        dot = Dot(name, total.calls, median or 0.0, reward, total.measure("cost_per_request"))
        yield Amount(name, total.measure("cost"), total.calls - total.priced), dot


def _errors(tally: Tally) -> tuple[Count, ...]:
    found: dict[str, int] = {}
    for kind, calls in zip(tally.kinds, tally.sums[:, :, 0].sum(axis=0), strict=True):
        if kind.failed and calls:
            found[kind.error] = found.get(kind.error, 0) + int(calls)
    return tuple(sorted((Count(*each) for each in found.items()), key=lambda count: (-count.calls, count.name)))
