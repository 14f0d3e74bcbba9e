"""Hourly roll-ups of usage events, and the deletion of old events.

A batch with events of an hour increments the hour's `changes` in its own transaction. A roll-up stores the count that
it read before the events, and is valid while the count is unchanged. Any process may therefore build roll-ups at any
time, repeatedly or never: hours without a valid roll-up are read from the events.
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
from sqlalchemy import Connection, delete, func, select, update

from storage.database import Database
from storage.tables import EVENTS, HOUR, HOURS, KINDS
from usage.column_store import KIND_FIELDS, ROW, ColumnStore, EventKind, exact_sums, membership_table, merge_rows
from usage.sketch import bucket_index

QUARTER = HOUR // 4  # offsets of all time zones in use are multiples of 15 minutes
MAX_EXACT = 2_000  # calls per hour that are stored one by one; busier hours are stored in buckets
CACHE_SIZE = 256 * 2**20  # bytes of unpacked hours in memory
RETENTION = timedelta(days=90)
Columns = dict[str, np.ndarray]
TOTALS = ("latency", "tokens_in", "tokens_out", "cost")
HOURS_PER_QUERY = 100  # unpacked at once; bounds the memory
EVENT_COLUMNS = ("time", "kind", "latency", "first_token", "tokens_in", "tokens_out", "cost", "reward")


@dataclass(frozen=True)
class _Hour:
    hour: int
    changes: int
    built: int
    sealed: bool

    @property
    def valid(self) -> bool:
        return self.changes == self.built


class RollupReader:
    """Reads aggregated rows: whole hours from valid roll-ups, everything else from the events."""

    def __init__(self, database: Database, cache_size: int = CACHE_SIZE) -> None:
        self.database = database
        self._cache_room = cache_size
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], Columns] = OrderedDict()

    def kinds(self) -> dict[int, EventKind]:
        """Return all event kinds by id."""
        with self.database.transaction() as connection:
            return read_kinds(connection)

    def read(self, start: int, end: int, selected: Callable[[EventKind], bool]) -> ColumnStore:
        """Return the rows of selected kinds between two times.

        A window that cuts an hour whose events were deleted (see `retire`) is widened to multiples of 15 minutes.

        Args:
            start: Start in microseconds since 1970, included.
            end: End, excluded.
            selected: Whether to include a kind.
        """
        with self.database.transaction() as connection:
            hours = _read_hours(connection, start - start % HOUR, end)
            packed = [h for h in hours if h.sealed or (h.valid and start <= h.hour and h.hour + HOUR <= end)]
            parts = self._unpack_hours(connection, packed)
            covered = [(h.hour, h.hour + HOUR) for h in packed if h.valid]
            parts += [to_columns(read_events(connection, *gap)) for gap in _gaps(start, end, covered)]
            kinds = {kind_id: kind for kind_id, kind in read_kinds(connection).items() if selected(kind)}
        clipped = [_clip(part, start - start % QUARTER, end) for part in [to_columns(np.zeros(0, ROW)), *parts]]
        kind_ids = np.concatenate([part["kind"] for part in clipped])
        mask = membership_table(kinds)[np.minimum(kind_ids, max(kinds, default=0) + 1)]
        indices = None if mask.all() else np.flatnonzero(mask)
        columns = {}
        for name in ROW.names or ():
            column = np.concatenate([part[name] for part in clipped])
            columns[name] = column if indices is None else column[indices]
        return ColumnStore(columns, kinds)

    def _unpack_hours(self, connection: Connection, hours: Sequence[_Hour]) -> list[Columns]:
        """Return the rows of these hours, from the cache if possible."""
        with self._lock:
            columns = {h.hour: self._cache[h.hour, h.built] for h in hours if (h.hour, h.built) in self._cache}
        missing = {h.hour: h for h in hours if h.hour not in columns}
        if missing:
            query = select(HOURS.c.hour, HOURS.c.built, HOURS.c.cells)
            query = query.where(HOURS.c.hour >= min(missing), HOURS.c.hour <= max(missing))
            if len(missing) < 100:
                query = query.where(HOURS.c.hour.in_(list(missing)))
            for hour, built, packed in connection.execute(query):
                if hour in missing and built == missing[hour].built:
                    columns[hour] = self._add_to_cache((hour, built), to_columns(unpack(packed)))
        return [columns[h.hour] for h in hours if h.hour in columns]

    def _add_to_cache(self, key: tuple[int, int], columns: Columns) -> Columns:
        with self._lock:
            if key in self._cache:  # another thread has unpacked the same hour
                return self._cache[key]
            self._cache[key] = columns
            self._cache_room -= _size(columns)
            while self._cache_room < 0 and self._cache:
                self._cache_room += _size(self._cache.popitem(last=False)[1])
        return columns


class TotalsReader:
    """Reads the totals of all events that were ever recorded: of the stored ones and of the roll-ups of deleted ones.

    The totals do not fall when `retire` deletes events. The sums of sealed hours are kept in memory.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self._lock = threading.Lock()
        self._sealed: dict[int, int] = {}  # sealed hour -> `built` of its roll-up
        self._sums: dict[int, np.ndarray] = {}  # kind -> sums over the sealed hours

    def read(self) -> dict[EventKind, dict[str, int]]:
        """Return the number of calls ("calls") and the sums of the columns in `TOTALS` by kind."""
        query = select(EVENTS.c.kind, func.count(), *(func.sum(EVENTS.c[name]) for name in TOTALS))
        with self._lock, self.database.transaction() as connection:
            self._add_sealed_hours(connection)
            sums = dict(self._sums)
            for kind, *stored in connection.execute(query.group_by(EVENTS.c.kind)):
                _add(sums, kind, np.array([int(value or 0) for value in stored], np.int64))
            kinds = read_kinds(connection)
        return {
            kinds[kind]: dict(zip(("calls", *TOTALS), map(int, values), strict=True)) for kind, values in sums.items()
        }

    def _add_sealed_hours(self, connection: Connection) -> None:
        """Add the roll-ups of hours that were sealed since the last call. Starts again if a known one has changed."""
        rows = connection.execute(select(HOURS.c.hour, HOURS.c.built).where(HOURS.c.sealed)).all()
        sealed = {row.hour: row.built for row in rows}
        known, sums = (self._sealed, dict(self._sums)) if self._sealed.items() <= sealed.items() else ({}, {})
        new = sorted(sealed.keys() - known)
        for start in range(0, len(new), HOURS_PER_QUERY):
            query = select(HOURS.c.cells).where(HOURS.c.hour.in_(new[start : start + HOURS_PER_QUERY]))
            columns = np.concatenate([unpack(cells) for cells in connection.execute(query).scalars()])
            kinds, groups = np.unique(columns["kind"], return_inverse=True)
            totals = [exact_sums(groups, columns[name], len(kinds)) for name in ("calls", *TOTALS)]
            for kind, *values in zip(map(int, kinds), *totals, strict=True):
                _add(sums, kind, np.array(values, np.int64))
        self._sealed, self._sums = sealed, sums


def _add(sums: dict[int, np.ndarray], kind: int, values: np.ndarray) -> None:
    sums[kind] = sums[kind] + values if kind in sums else values


def build(database: Database, limit: int, before: int) -> int:
    """Build missing or invalid roll-ups, newest first.

    Args:
        database: The database.
        limit: Maximum number of hours.
        before: Only hours that ended before this time, in microseconds since 1970.

    Returns:
        The number of built hours.
    """
    with database.transaction() as connection:
        query = select(HOURS.c.hour).where(HOURS.c.built != HOURS.c.changes, HOURS.c.hour + HOUR <= before)
        hours = connection.execute(query.order_by(HOURS.c.hour.desc()).limit(limit)).scalars().all()
    for hour in hours:
        with database.transaction(write=True) as connection:
            _build_hour(connection, hour)
    return len(hours)


def _build_hour(connection: Connection, hour: int) -> None:
    row = connection.execute(select(HOURS).where(HOURS.c.hour == hour).with_for_update()).one()
    rows = round_to_quarters(read_events(connection, hour, hour + HOUR))
    if row.sealed:
        rows = np.concatenate([unpack(row.cells), rows])
    if len(rows) > MAX_EXACT:
        rows = merge_rows(rows)
    values = {"built": row.changes, "cells": pack(rows)}
    connection.execute(update(HOURS).where(HOURS.c.hour == hour).values(values))
    if row.sealed:  # the roll-up now contains these late events; they must not be counted twice
        connection.execute(delete(EVENTS).where(EVENTS.c.time >= hour, EVENTS.c.time < hour + HOUR))


def retire(database: Database, limit: int, before: int) -> int:
    """Delete the events of old hours after rolling them up. Roll-ups are kept.

    Each hour is sealed and emptied in one transaction, so that no call is lost or counted twice.

    Args:
        database: The database.
        limit: Maximum number of hours.
        before: Only hours that ended before this time, in microseconds since 1970.

    Returns:
        The number of retired hours.
    """
    with database.transaction() as connection:
        query = select(HOURS.c.hour).where(HOURS.c.hour + HOUR <= before, HOURS.c.sealed.is_(False))
        hours = connection.execute(query.order_by(HOURS.c.hour).limit(limit)).scalars().all()
    for hour in hours:
        with database.transaction(write=True) as connection:
            _build_hour(connection, hour)
            connection.execute(delete(EVENTS).where(EVENTS.c.time >= hour, EVENTS.c.time < hour + HOUR))
            connection.execute(update(HOURS).where(HOURS.c.hour == hour).values(sealed=True))
    return len(hours)


def round_to_quarters(rows: np.ndarray) -> np.ndarray:
    """Return a copy with times rounded down to 15 minutes."""
    rows = rows.copy()
    rows["time"] -= rows["time"] % QUARTER
    return rows


def pack(rows: np.ndarray) -> bytes:
    """Compress rows column by column, to about a third of their size."""
    return zlib.compress(b"".join(np.ascontiguousarray(rows[name]).tobytes() for name in ROW.names or ()), 1)


def unpack(packed: bytes | None) -> np.ndarray:
    """Decompress rows that `pack` compressed."""
    data = zlib.decompress(packed) if packed else b""
    rows = np.zeros(len(data) // ROW.itemsize, ROW)
    offset = 0
    for name in ROW.names or ():
        dtype = ROW[name]
        rows[name] = np.frombuffer(data, dtype, len(rows), offset)
        offset += dtype.itemsize * len(rows)
    return rows


def read_kinds(connection: Connection) -> dict[int, EventKind]:
    """Return all event kinds by id."""
    rows = connection.execute(select(KINDS.c.id, *(KINDS.c[name] for name in KIND_FIELDS))).all()
    return {kind_id: EventKind(*names) for kind_id, *names in rows}


def read_events(connection: Connection, start: int, end: int) -> np.ndarray:
    """Return the events between two times, `end` excluded, as rows of one call each."""
    query = select(*(EVENTS.c[name] for name in EVENT_COLUMNS)).where(EVENTS.c.time >= start, EVENTS.c.time < end)
    return to_rows(connection.execute(query).all())


def to_rows(events: Sequence[Any]) -> np.ndarray:
    """Convert database rows of `EVENT_COLUMNS` to rows of one call each."""
    rows = np.zeros(len(events), ROW)
    if len(events):
        for name, values in zip(EVENT_COLUMNS, zip(*events, strict=True), strict=True):
            rows[name] = [0 if value is None else value for value in values]
        has_first_token = np.array([event.first_token is not None for event in events])
        rows["rewarded"] = [event.reward is not None for event in events]
        rows["latency_bucket"] = bucket_index(rows["latency"])
        rows["first_bucket"] = np.where(has_first_token, bucket_index(rows["first_token"]), -1)
        rows["calls"] = 1
    return rows


def to_columns(rows: np.ndarray) -> Columns:
    """Convert rows to one contiguous array per field, several times as fast to sum."""
    return {name: np.ascontiguousarray(rows[name]) for name in ROW.names or ()}


def _read_hours(connection: Connection, start: int, end: int) -> list[_Hour]:
    query = select(HOURS.c.hour, HOURS.c.changes, HOURS.c.built, HOURS.c.sealed)
    rows = connection.execute(query.where(HOURS.c.hour >= start, HOURS.c.hour < end).order_by(HOURS.c.hour)).all()
    return [_Hour(*row) for row in rows]


def _gaps(start: int, end: int, covered: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the parts of a span outside of ascending, disjoint spans."""
    gaps, position = [], start
    for first, last in covered:
        if first > position:
            gaps.append((position, first))
        position = max(position, last)
    return [*gaps, (position, end)] if position < end else gaps


def _size(columns: Columns) -> int:
    return sum(column.nbytes for column in columns.values())


def _clip(columns: Columns, start: int, end: int) -> Columns:
    """Return the rows between two times."""
    time = columns["time"]
    if not len(time) or (start <= time.min() and time.max() < end):
        return columns
    mask = (time >= start) & (time < end)
    return {name: column[mask] for name, column in columns.items()}
