"""The events of a filter as CSV or Parquet, piece by piece: a million take no more memory than a few thousand."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import fields
from datetime import datetime, timezone
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import tuple_

from storage.database import Database
from storage.tables import EVENTS
from usage.analytics import event_of, select_events
from usage.events import Event
from usage.time_window import Filter

PIECE = 5_000  # events
COLUMNS = tuple(field.name for field in fields(Event))
_INTS = ("tokens_in", "tokens_out", "candidates")
_FLOATS = ("latency", "first_token", "queue", "cost", "reward")
SCHEMA = pa.schema(
    [
        (name, pa.timestamp("us", "UTC") if name == "time" else pa.int64() if name in _INTS
         else pa.float64() if name in _FLOATS else pa.string())
        for name in COLUMNS
    ]
)  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def export(
    database: Database, wanted: Filter, kind: Literal["csv", "parquet"], now: datetime | None = None
) -> Iterator[bytes]:
    """The file's bytes in pieces, oldest event first; times in UTC, durations in seconds, cost in US dollars.

    Raises StoreError, also in the middle: a file that ends early is no CSV with a last line, and no Parquet.
    """
    events = _pieces(database, wanted, now or datetime.now(timezone.utc))
    return _csv(events) if kind == "csv" else _parquet(events)


def _pieces(database: Database, wanted: Filter, now: datetime) -> Iterator[list[Event]]:
    """Each piece is a query of its own that goes on behind the last event: no transaction stays open meanwhile."""
    query = select_events(wanted, wanted.window(now)).order_by(EVENTS.c.time, EVENTS.c.id).limit(PIECE)
    after = None
    while True:
        part = query if after is None else query.where(tuple_(EVENTS.c.time, EVENTS.c.id) > after)
        with database.transaction() as connection:
            rows = connection.execute(part).mappings().all()
        if rows:
            yield [event_of(row) for row in rows]
        if len(rows) < PIECE:
            return
        after = tuple_(rows[-1]["time"], rows[-1]["id"])


def _csv(pieces: Iterator[list[Event]]) -> Iterator[bytes]:
    head = _lines([COLUMNS])
    for events in pieces:  # the head goes with the first piece, so that a database that is down has sent nothing
        yield head + _lines([_cell(getattr(event, name)) for name in COLUMNS] for event in events)
        head = b""
    if head:
        yield head


def _lines(rows: Any) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    """A name that a spreadsheet would compute is made plain by an apostrophe; an unknown value is empty."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float):
        return f"{value:.9f}".rstrip("0").rstrip(".")
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _parquet(pieces: Iterator[list[Event]]) -> Iterator[bytes]:
    pipe = _Pipe()
    with pq.ParquetWriter(pa.PythonFile(pipe, "w"), SCHEMA, compression="zstd") as writer:
        for events in pieces:
            columns = [[getattr(event, name) for event in events] for name in COLUMNS]
            writer.write_table(pa.table(columns, schema=SCHEMA))
            yield pipe.take()
    yield pipe.take()


class _Pipe(io.RawIOBase):
    """A file that is only written, and forgets what was taken out of it."""

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
