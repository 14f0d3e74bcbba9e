"""Retention: events of old months move from the database's rows to Parquet files in its table usage_archive.

They stay part of every figure: caches read the files, and keep copies of them in `DATA_DIR/usage-archive`. The files
are in the database because several deployments, each with its own DATA_DIR, can share it.
"""

from __future__ import annotations

from datetime import datetime, timezone
from itertools import takewhile

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import bindparam, delete, insert, literal_column, select

from storage.database import Database
from storage.tables import ARCHIVE, EVENT_NUMBER, EVENTS, KIND_COLUMNS, KINDS
from usage.time_window import from_micros, to_micros

RETENTION_MONTHS = 13
MAX_EVENTS = 100_000  # per file and transaction


def archive_old_events(database: Database, now: datetime, months: int = RETENTION_MONTHS) -> int:
    """Archive all events that are older than the month of `now` and the `months` months before it.

    Each file is written in the transaction that deletes its events.

    Returns:
        The number of archived events.

    Raises:
        StoreError: The database cannot be written.
    """
    total, before = 0, to_micros(_month_start(now, -months))
    while archived := _archive_file(database, before):
        total += archived
    return total


def _archive_file(database: Database, before: int) -> int:
    """Archive the oldest events of one month before a time; return their number, at most MAX_EVENTS."""
    is_old = EVENTS.c.time < before
    with database.transaction() as connection:
        if connection.execute(select(EVENTS.c.id).where(is_old).limit(1)).first() is None:
            return 0
    number = literal_column(EVENT_NUMBER[database.dialect]).label("number")
    names = [KINDS.c[name] for name in KIND_COLUMNS]  # for other readers of the file
    query = select(number, *EVENTS.c, *names).join(KINDS, KINDS.c.id == EVENTS.c.kind).where(is_old)
    query = query.order_by(EVENTS.c.time, EVENTS.c.id).limit(MAX_EVENTS)
    with database.transaction(write=True) as connection:
        # PostgreSQL waits for another process that archives the same events, and then leaves them out.
        result = connection.execute(query.with_for_update(of=EVENTS))
        columns, rows = list(result.keys()), result.all()
        if not rows:
            return 0
        month = _month(rows[0].time)
        rows = list(takewhile(lambda row: _month(row.time) == month, rows))
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table(dict(zip(columns, zip(*rows, strict=True), strict=True))), buffer, compression="zstd")
        values = {"month": month, "events": len(rows), "content": buffer.getvalue().to_pybytes()}
        connection.execute(insert(ARCHIVE).values(values))
        ids = [{"event": row.id} for row in rows]
        connection.execute(delete(EVENTS).where(EVENTS.c.id == bindparam("event")), ids)
    return len(rows)


def _month(micros: int) -> str:
    return from_micros(micros).strftime("%Y-%m")


def _month_start(now: datetime, months: int) -> datetime:
    """Return the start of the month that is `months` months after that of `now`, in UTC."""
    now = now.astimezone(timezone.utc)
    index = now.year * 12 + now.month - 1 + months
    return datetime(index // 12, index % 12 + 1, 1, tzinfo=timezone.utc)
