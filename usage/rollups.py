"""Roll-ups: each hour's events as packed cells, built from the events alone, and dropped as soon as they are not true.

A batch that brings events of an hour counts up the hour's `changes` in its own transaction. A roll-up notes the count
that it has seen before it looked at the events; it is true exactly as long as the count has not moved. So any process
may build at any time, twice or not at all: what is not rolled up is read from the events.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
from sqlalchemy import Connection, delete, select, update

from storage.database import Database
from storage.tables import EVENTS, HOURS, KINDS
from usage.cells import CELL, KIND_FIELDS, Cells, Kind, merged, table
from usage.sketch import buckets
from usage.time_window import HOUR

QUARTER = HOUR // 4  # every time zone in use is a whole number of quarters away from UTC
EXACT = 2_000  # an hour with so many calls keeps each; a busier one keeps buckets
CACHE = 256 * 2**20  # bytes of unpacked hours that are kept in memory
RETENTION = timedelta(days=90)
Columns = dict[str, np.ndarray]
COLUMNS = ("time", "kind", "latency", "first_token", "tokens_in", "tokens_out", "cost", "reward")


@dataclass(frozen=True)
class _Hour:
    hour: int
    changes: int
    built: int
    sealed: bool

    @property
    def clean(self) -> bool:
        return self.changes == self.built


class Reader:
    """Reads cells: whole hours from their roll-ups where these are true, everything else from the events."""

    def __init__(self, database: Database, cache: int = CACHE) -> None:
        self.database = database
        self._room = cache
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], Columns] = OrderedDict()

    def kinds(self) -> dict[int, Kind]:
        """Every kind that there is, by its number."""
        with self.database.transaction() as connection:
            return read_kinds(connection)

    def cells(self, start: int, end: int, meant: Callable[[Kind], bool]) -> Cells:
        """The cells of the events from `start` up to `end` (microseconds since 1970) whose kind is meant.

        Where a period cuts an hour whose events have gone (see `retire`), it is widened to quarters of an hour.
        """
        with self.database.transaction() as connection:
            hours = _hours(connection, start - start % HOUR, end)
            packed = [h for h in hours if h.sealed or (h.clean and start <= h.hour and h.hour + HOUR <= end)]
            parts = self._unpacked(connection, packed)
            done = [(h.hour, h.hour + HOUR) for h in packed if h.clean]
            parts += [columns_of(read_events(connection, *span)) for span in _gaps(start, end, done)]
            kinds = {number: kind for number, kind in read_kinds(connection).items() if meant(kind)}
        inside = [_inside(part, start - start % QUARTER, end) for part in [columns_of(np.zeros(0, CELL)), *parts]]
        number = np.concatenate([part["kind"] for part in inside])
        chosen = table(kinds)[np.minimum(number, max(kinds, default=0) + 1)]
        places = None if chosen.all() else np.flatnonzero(chosen)
        return Cells({name: _joined(inside, name, places) for name in CELL.names or ()}, kinds)

    def _unpacked(self, connection: Connection, hours: Sequence[_Hour]) -> list[Columns]:
        """The cells of these hours, from memory where they are."""
        with self._lock:
            found = {h.hour: self._kept[h.hour, h.built] for h in hours if (h.hour, h.built) in self._kept}
        missing = {h.hour: h for h in hours if h.hour not in found}
        if missing:
            query = select(HOURS.c.hour, HOURS.c.built, HOURS.c.cells)
            query = query.where(HOURS.c.hour >= min(missing), HOURS.c.hour <= max(missing))
            if len(missing) < 100:
                query = query.where(HOURS.c.hour.in_(list(missing)))
            for hour, built, cells in connection.execute(query):
                if hour in missing and built == missing[hour].built:
                    found[hour] = self._keep((hour, built), columns_of(unpack(cells)))
        return [found[h.hour] for h in hours if h.hour in found]

    def _keep(self, key: tuple[int, int], cells: Columns) -> Columns:
        with self._lock:
            self._kept[key] = cells
            self._room -= _bytes(cells)
            while self._room < 0 and self._kept:
                self._room += _bytes(self._kept.popitem(last=False)[1])
        return cells


def build(database: Database, limit: int, before: int) -> int:
    """Roll up at most `limit` hours that ended before that time and whose roll-up is not true. Returns how many."""
    with database.transaction() as connection:
        query = select(HOURS.c.hour).where(HOURS.c.built != HOURS.c.changes, HOURS.c.hour + HOUR <= before)
        hours = connection.execute(query.order_by(HOURS.c.hour.desc()).limit(limit)).scalars().all()
    for hour in hours:
        with database.transaction(write=True) as connection:
            _build(connection, hour)
    return len(hours)


def _build(connection: Connection, hour: int) -> None:
    row = connection.execute(select(HOURS).where(HOURS.c.hour == hour).with_for_update()).one()
    events = read_events(connection, hour, hour + HOUR)
    cells = np.concatenate([unpack(row.cells), quartered(events)]) if row.sealed else quartered(events)
    if len(cells) > EXACT:
        cells = merged(cells)
    values = {"built": row.changes, "cells": pack(cells)}
    connection.execute(update(HOURS).where(HOURS.c.hour == hour).values(values))
    if row.sealed:  # what came late is in the roll-up now, and must not be counted twice
        connection.execute(delete(EVENTS).where(EVENTS.c.time >= hour, EVENTS.c.time < hour + HOUR))


def retire(database: Database, limit: int, before: int) -> int:
    """Delete the events of at most `limit` hours that ended before that time, once rolled up. Returns how many.

    The roll-ups stay. An hour is sealed and emptied in one transaction, so that no call is counted twice or lost.
    """
    with database.transaction() as connection:
        old = select(HOURS.c.hour).where(HOURS.c.hour + HOUR <= before, HOURS.c.sealed.is_(False))
        hours = connection.execute(old.order_by(HOURS.c.hour).limit(limit)).scalars().all()
    for hour in hours:
        with database.transaction(write=True) as connection:
            _build(connection, hour)
            connection.execute(delete(EVENTS).where(EVENTS.c.time >= hour, EVENTS.c.time < hour + HOUR))
            connection.execute(update(HOURS).where(HOURS.c.hour == hour).values(sealed=True))
    return len(hours)


def quartered(cells: np.ndarray) -> np.ndarray:
    """The cells at the start of their quarter of an hour."""
    cells = cells.copy()
    cells["time"] -= cells["time"] % QUARTER
    return cells


def pack(cells: np.ndarray) -> bytes:
    """Cells as bytes: column after column, which compresses to about a third."""
    columns = b"".join(np.ascontiguousarray(cells[name]).tobytes() for name in CELL.names or ())
    return zlib.compress(columns, 1)


def unpack(packed: bytes | None) -> np.ndarray:
    """What `pack` has packed."""
    columns = zlib.decompress(packed) if packed else b""
    cells = np.zeros(len(columns) // CELL.itemsize, CELL)
    place = 0
    for name in CELL.names or ():
        kind = CELL[name]
        cells[name] = np.frombuffer(columns, kind, len(cells), place)
        place += kind.itemsize * len(cells)
    return cells


def read_kinds(connection: Connection) -> dict[int, Kind]:
    """Every kind that there is, by its number."""
    rows = connection.execute(select(KINDS.c.id, *(KINDS.c[name] for name in KIND_FIELDS))).all()
    return {number: Kind(*words) for number, *words in rows}


def read_events(connection: Connection, start: int, end: int) -> np.ndarray:
    """The events from `start` up to `end` as cells of one call each."""
    query = select(*(EVENTS.c[name] for name in COLUMNS)).where(EVENTS.c.time >= start, EVENTS.c.time < end)
    return cells_of(connection.execute(query).all())


def cells_of(events: Sequence[Any]) -> np.ndarray:
    """Rows of COLUMNS as cells of one call each, at their own time."""
    rows = np.zeros(len(events), CELL)
    if len(events):
        for name, values in zip(COLUMNS, zip(*events, strict=True), strict=True):
            rows[name] = [0 if value is None else value for value in values]
        known = np.array([row.first_token is not None for row in events])
        rows["rewarded"] = [row.reward is not None for row in events]
        rows["latency_bucket"] = buckets(rows["latency"])
        rows["first_bucket"] = np.where(known, buckets(rows["first_token"]), -1)
        rows["calls"] = 1
    return rows


def _hours(connection: Connection, start: int, end: int) -> list[_Hour]:
    query = select(HOURS.c.hour, HOURS.c.changes, HOURS.c.built, HOURS.c.sealed)
    rows = connection.execute(query.where(HOURS.c.hour >= start, HOURS.c.hour < end).order_by(HOURS.c.hour)).all()
    return [_Hour(*row) for row in rows]


def _gaps(start: int, end: int, done: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What is left of a span without these spans, which rise and do not overlap."""
    gaps, place = [], start
    for first, last in done:
        if first > place:
            gaps.append((place, first))
        place = max(place, last)
    return [*gaps, (place, end)] if place < end else gaps


def columns_of(cells: np.ndarray) -> Columns:
    """Rows of CELL as one array per field: sums run over these several times as fast."""
    return {name: np.ascontiguousarray(cells[name]) for name in CELL.names or ()}


def _bytes(cells: Columns) -> int:
    return sum(column.nbytes for column in cells.values())


def _inside(cells: Columns, start: int, end: int) -> Columns:
    """Of these cells those in the span."""
    time = cells["time"]
    if not len(time) or (start <= time.min() and time.max() < end):
        return cells
    mask = (time >= start) & (time < end)
    return {name: column[mask] for name, column in cells.items()}


def _joined(parts: list[Columns], name: str, places: np.ndarray | None) -> np.ndarray:
    column = np.concatenate([part[name] for part in parts])
    return column if places is None else column[places]
