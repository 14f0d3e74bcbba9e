"""What the events say: figures, series, latency against reward, errors, recent calls. Read-only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
from sqlalchemy import Select, select

from usage.cells import Cells, Kind
from usage.database import Database
from usage.events import OUTCOMES, Event
from usage.period import SECOND, Filter, Window, bin_size, bins, micros, moment
from usage.rollups import Reader
from usage.sketch import ERROR, quantiles
from usage.tables import EVENTS, KINDS

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
        split = wanted.branches if len(wanted.branches) > 1 else ()
        return Dashboard(
            _figures(window, cells, before),
            tuple((name, _figures(window, cells.only("branch", name), before.only("branch", name))) for name in split),
            _series(cells, window, wanted.zone, "calls", by),
            _latencies(cells, window, wanted.zone),
            _series(cells, window, wanted.zone, "cost", by),
            tuple(_amount(name, part) for name, part in cells.split("model")),
            tuple(_dot(name, part) for name, part in cells.split("model")),
            _errors(cells),
        )

    def figures(self, wanted: Filter, now: datetime | None = None) -> Figures:
        """The figures alone."""
        window = wanted.window(now or datetime.now(timezone.utc))
        return _figures(window, self._cells(wanted, window), self._cells(wanted, window.before))

    def series(self, wanted: Filter, measure: str, by: str = "", now: datetime | None = None) -> Series:
        """One measure (a name of UNITS) over time; `by`: "branch", "model", "skill", "outcome", or "" for one line."""
        window = wanted.window(now or datetime.now(timezone.utc))
        return _series(self._cells(wanted, window), window, wanted.zone, measure, by)

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


def measure(cells: Cells) -> dict[str, float | None]:
    """Every measure of UNITS over these cells."""
    rows, priced, counted = cells.rows, cells.flag("priced"), cells.flag("counted")
    calls = int(rows["calls"].sum())
    priced_calls, cost = int(rows["calls"][priced].sum()), int(rows["cost"][priced].sum())
    both = priced & rows["rewarded"]
    reward, spent = int(rows["reward"][both].sum()), int(rows["cost"][both].sum())
    tokens = int(rows["tokens_in"][counted].sum()) + int(rows["tokens_out"][counted].sum())
    latency = quantiles(rows["latency"], rows["calls"], rows["latency_bucket"], list(QUANTILES.values()))
    known = rows[rows["first_bucket"] >= 0]
    (first,) = quantiles(known["first_token"], known["calls"], known["first_bucket"], [0.5])
    return {
        "calls": calls,
        "error_rate": int(rows["calls"][cells.flag("failed")].sum()) / calls if calls else None,
        **{name: None if value is None else value / SECOND for name, value in zip(QUANTILES, latency, strict=True)},
        "first_token": None if first is None else first / SECOND,
        "tokens": tokens if counted.any() else None,
        "cost": cost / DOLLAR if priced_calls else None,
        "cost_per_request": cost / DOLLAR / priced_calls if priced_calls else None,
        "reward_per_cent": (reward / 1_000_000) / (spent / CENT) if spent else None,
    }


def _figures(window: Window, cells: Cells, before: Cells) -> Figures:
    now, then = measure(cells), measure(before)
    calls = cells.rows["calls"]
    return Figures(
        window,
        **{name: Figure(now[name], then[name], unit) for name, unit in UNITS.items()},
        unpriced=int(calls[~cells.flag("priced")].sum()),
        uncounted=int(calls[~cells.flag("counted")].sum()),
        estimated=int(calls[cells.flag("estimated")].sum()),
        percentile_error=0.0 if cells.exact else ERROR,
    )


def _series(cells: Cells, window: Window, zone: str, what: str, by: str) -> Series:
    starts = bins(window, zone)
    parts = cells.split(by) if by else [("", cells)]
    lines = tuple(Line(name, tuple(measure(piece)[what] for piece in _binned(part, starts))) for name, part in parts)
    return Series(what, UNITS[what], bin_size(window), tuple(starts), lines)


def _latencies(cells: Cells, window: Window, zone: str) -> Series:
    starts = bins(window, zone)
    found = [measure(piece) for piece in _binned(cells, starts)]
    lines = tuple(Line(name, tuple(values[name] for values in found)) for name in QUANTILES)
    return Series("latency", "s", bin_size(window), tuple(starts), lines)


def _binned(cells: Cells, starts: list[datetime]) -> Iterator[Cells]:
    """The cells of each bin."""
    place = np.searchsorted([micros(start) for start in starts], cells.rows["time"], side="right") - 1
    return (cells.where(place == number) for number in range(len(starts)))


def _amount(name: str, cells: Cells) -> Amount:
    return Amount(name, measure(cells)["cost"], int(cells.rows["calls"][~cells.flag("priced")].sum()))


def _dot(name: str, cells: Cells) -> Dot:
    values, rewarded = measure(cells), cells.rows[cells.rows["rewarded"]]
    scored = int(rewarded["calls"].sum())
    reward = int(rewarded["reward"].sum()) / 1_000_000 / scored if scored else None
    return Dot(name, int(values["calls"] or 0), values["p50"] or 0.0, reward, values["cost_per_request"])


def _errors(cells: Cells) -> tuple[Count, ...]:
    found = [
        Count(name, int(part.rows["calls"].sum())) for name, part in cells.where(cells.flag("failed")).split("error")
    ]
    return tuple(sorted(found, key=lambda count: (-count.calls, count.name)))
