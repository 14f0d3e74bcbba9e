"""Local cache of the usage events in DuckDB, which answers every query. The events themselves stay in the database.

Before each read the cache takes over what has changed in the database. New events are found by their number, in the
order of insertion. In PostgreSQL a transaction can commit after one with higher numbers; and events can be changed or
deleted. Each transaction therefore increments `changes` of the hours whose events it changes: of these hours the cache
compares counts and sums with the database, and reads an hour again where they differ.

Every process has a file of its own, `DATA_DIR/usage-cache/<n>.duckdb`, because only one process can write to it. A
file that is damaged, or that belongs to another version or database, is replaced. Without a folder that can be written
the cache is in memory.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from sqlalchemy import Connection, Select, func, literal, literal_column, select

from storage.database import Database, StoreError
from storage.files import write_atomically
from storage.tables import ARCHIVE, EVENT_NUMBER, EVENTS, HOUR, HOURS, KIND_COLUMNS, KINDS
from usage.events import hide_session

VERSION = 2  # of the cache's tables
CACHE_FOLDER, ARCHIVE_FOLDER = "usage-cache", "usage-archive"  # in DATA_DIR
MAX_FILES = 16  # processes with a cache of their own; further ones keep it in memory
BATCH_SIZE = 50_000  # events that are copied at once
MAX_HOURS_PER_QUERY = 50  # more hours are compared, and copied, in a single query over all events
Span = tuple[int, int]  # from a time in microseconds to another, which it does not include
ALWAYS: Span = (-(2**62), 2**62)
VERIFY_DELAY = 30.0  # seconds after the start until all of an existing cache is compared
EVENTS_PER_PART = 50_000  # events that are compared at once, while reads wait
PAUSE = 0.05  # seconds between two parts
BUILD_WAIT = 1.0  # seconds after which a read gives up while the cache is built, which can take a minute
MEMORY_LIMIT = "2GB"
TEXTS = ("id", "request", "session", *KIND_COLUMNS, "source_url")


def _schema(*names: str) -> pa.Schema:
    return pa.schema([(name, pa.string() if name in TEXTS else pa.int64()) for name in names])


# Tables of the cache. `archive` is 0 for events in the database, else the id of their file in usage_archive.
SCHEMAS = {
    "cache": _schema("version", "source_url"),
    "hours": _schema("hour", "changes"),
    "kinds": _schema("kind", *KIND_COLUMNS),
    "archives": _schema("archive"),
    "events": _schema("archive", "number", *(column.name for column in EVENTS.c)),
}
SUMMED = ("kind", "cost", "reward", "latency")  # compared for each hour, with the number of events and their numbers
FINGERPRINT = ", ".join(["count(*)", "sum(number)", *(f"sum({name})" for name in SUMMED)])
_DAMAGE = (duckdb.IOException, duckdb.FatalException, duckdb.InternalException, duckdb.SerializationException)
_log = logging.getLogger(__name__)


class CacheBuildingError(StoreError):
    """Raised by reads while many events are copied to the cache."""

    def __init__(self, copied: int, total: int) -> None:
        message = f"The usage events are being read: {copied:,} of {total:,}. They are available in a moment."
        super().__init__("database", message)


class EventCache:
    """The usage events of a database in a local DuckDB file. Threads can share a cache."""

    def __init__(self, database: Database, data_dir: Path | None = None) -> None:
        """Create a cache without opening it.

        Args:
            database: The database with the events.
            data_dir: Folder of the cache and of copies of the archive; None for a cache in memory.
        """
        self.database, self._data_dir = database, data_dir
        self._number = literal_column(EVENT_NUMBER[database.dialect]).label("number")
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._file: Path | None = None
        self._file_lock: FileLock | None = None
        self._head: tuple[Any, ...] = ()  # state of the database that the cache has
        self._progress: tuple[int, int] | None = None  # copied events and all of them, while many are copied

    @property
    def folder(self) -> Path | None:
        """Folder of the cache, also for temporary files; None for a cache in memory."""
        return self._file.parent if self._file else None

    def start(self) -> None:
        """Open or build the cache in a background thread, and compare all of it with the database."""
        threading.Thread(target=self._prepare, name="usage-cache", daemon=True).start()

    def close(self) -> None:
        """Close the file. The next read opens it again."""
        self._closed.set()
        with self._lock:
            self._close()

    @contextmanager
    def read(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """Bring the cache up to date and open a cursor, which sees one state of the events.

        Raises:
            CacheBuildingError: Another thread is building the cache.
            StoreError: The database cannot be read, the cache cannot be written, or memory is too small for the query.
        """
        while not self._lock.acquire(timeout=BUILD_WAIT):
            if progress := self._progress:
                raise CacheBuildingError(*progress)
        try:
            try:
                connection = self._update()
            except _DAMAGE as error:
                self._discard(error)
                try:
                    connection = self._update()
                except _DAMAGE as second_error:  # a full disk, for example
                    self._discard(second_error)
                    self._data_dir = None
                    connection = self._update()
            cursor = connection.cursor().begin()
        finally:
            self._lock.release()
        try:
            yield cursor
        except _DAMAGE as error:
            with self._lock:
                self._discard(error)
            message = "The local copy of the usage events was damaged. It is being built again; try again in a moment."
            raise StoreError("database", message) from error
        except duckdb.OutOfMemoryException as error:
            message = "This period has more usage events than fit into memory. Choose a shorter period."
            raise StoreError("database", message) from error
        finally:
            with suppress(duckdb.Error):
                cursor.close()

    def verify(self) -> None:
        """Compare all of the cache with the database, part by part, and copy the hours that differ.

        Raises:
            StoreError: The database cannot be read.
        """
        numbered = "SELECT time, row_number() OVER (ORDER BY time) AS row FROM events WHERE archive = 0"
        starts = f"SELECT DISTINCT time - time % {HOUR} FROM ({numbered}) WHERE row % {EVENTS_PER_PART} = 0 ORDER BY 1"
        with self.read() as cursor:
            hours = [hour for (hour,) in cursor.execute(starts).fetchall()]
        for part in pairwise([ALWAYS[0], *hours, ALWAYS[1]]):
            with self._lock:
                self._update([part])
            if self._closed.wait(PAUSE):
                return

    def _prepare(self) -> None:
        try:
            with self.read():
                pass
            if not self._closed.wait(VERIFY_DELAY):
                self.verify()
        except (StoreError, duckdb.Error) as error:
            _log.warning("The usage events could not be read: %s", error)

    # ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _open(self) -> duckdb.DuckDBPyConnection:
        """Open the first file that no other process uses, and replace it if it is damaged or out of date."""
        try:
            self._file = self._claim_file()
        except OSError as error:
            _log.warning("Usage is kept in memory, because its cache cannot be written: %s", error.strerror)
            self._file = None
        if self._file is None:
            return self._create(":memory:")
        if self._file.exists() and (connection := self._open_file(self._file)):
            return connection
        self._delete_file()
        return self._create(self._file)

    def _open_file(self, path: Path) -> duckdb.DuckDBPyConnection | None:
        """Open an existing file; return None if it is damaged, or belongs to another version or database."""
        with suppress(duckdb.Error):
            connection = self._connect(path)
            try:
                rows = connection.execute("SELECT version, source_url FROM cache").fetchall()
                if rows == [(VERSION, self.database.address)]:
                    return connection
            except duckdb.Error:
                pass
            connection.close()
        return None

    def _claim_file(self) -> Path | None:
        if self._data_dir is None:
            return None
        folder = self._data_dir / CACHE_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(MAX_FILES):
            lock = FileLock(folder / f"{number}.lock")
            with suppress(Timeout):
                lock.acquire(timeout=0)
                self._file_lock = lock
                return folder / f"{number}.duckdb"
        return None

    def _create(self, path: Path | str) -> duckdb.DuckDBPyConnection:
        connection = self._connect(path)
        for table in SCHEMAS:
            _replace(connection, table, [])
        _replace(connection, "cache", [(VERSION, self.database.address)])
        return connection

    def _connect(self, path: Path | str) -> duckdb.DuckDBPyConnection:
        options = {
            "threads": min(4, os.cpu_count() or 1),
            "memory_limit": MEMORY_LIMIT,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "preserve_insertion_order": True,
            # Queries join the events to small tables, in this order. The planner cannot estimate how many events
            # have a bin, and would build a hash table of all of them instead.
            "disabled_optimizers": "join_order,build_side_probe_side",
        }
        return duckdb.connect(str(path), config=options)

    def _close(self) -> None:
        if self._connection:
            with suppress(duckdb.Error):
                self._connection.close()
        if self._file_lock:
            self._file_lock.release()
        self._connection, self._file_lock, self._head = None, None, ()

    def _discard(self, error: Exception) -> None:
        _log.warning("The cache of the usage events is built again (%s).", type(error).__name__)
        if self._connection:
            with suppress(duckdb.Error):
                self._connection.close()
        self._delete_file()
        self._close()

    def _delete_file(self) -> None:
        if self._file:
            for path in (self._file, self._file.with_name(f"{self._file.name}.wal")):
                path.unlink(missing_ok=True)

    # ── Copying from the database ───────────────────────────────────────────────────────────────────────────────────

    def _update(self, verify: Sequence[Span] = ()) -> duckdb.DuckDBPyConnection:
        """Take over what has changed in the database. Call it with the lock.

        Args:
            verify: Whole hours that are compared in addition to the changed ones.
        """
        connection = self._connection = self._connection or self._open()
        with self.database.transaction() as source:
            query = select(KINDS.c.id, *(KINDS.c[name] for name in KIND_COLUMNS)).order_by(KINDS.c.id)
            kinds = source.execute(query).all()
            head = (kinds, *source.execute(self._head_query()).one())
            if head == self._head and not verify:
                return connection
            connection.execute("BEGIN")
            try:
                self._copy_archives(source, connection)
                self._copy_events(source, connection, verify)
                _replace(connection, "kinds", kinds)
                connection.execute("COMMIT")
            except BaseException:
                with suppress(duckdb.Error):
                    connection.execute("ROLLBACK")
                raise
            finally:
                self._progress = None
        self._head = head
        return connection

    def _head_query(self) -> Select:
        """Select what differs after any change of the events, without reading them."""
        newest = select(func.max(self._number)).select_from(EVENTS).scalar_subquery()
        archives = select(func.count()).select_from(ARCHIVE).scalar_subquery()
        return select(func.count(), func.sum(HOURS.c.changes), newest, archives).select_from(HOURS)

    def _copy_archives(self, source: Connection, connection: duckdb.DuckDBPyConnection) -> None:
        """Take over new archives. Their events are no longer in the database."""
        known = {archive for (archive,) in connection.execute("SELECT archive FROM archives").fetchall()}
        archives = source.execute(select(ARCHIVE.c.id, ARCHIVE.c.month).order_by(ARCHIVE.c.id)).all()
        for archive, month in archives:
            if archive in known:
                continue
            content = source.execute(select(ARCHIVE.c.content).where(ARCHIVE.c.id == archive)).scalar_one()
            if self._data_dir and self._file:
                folder = self._data_dir / ARCHIVE_FOLDER
                folder.mkdir(exist_ok=True)
                write_atomically(folder / f"{month}-{archive}.parquet", content)
            stored = pq.read_table(pa.BufferReader(content))
            missing = pa.nulls(len(stored), pa.int64())  # of columns that are younger than the file
            columns = {
                name: stored[name] if name in stored.schema.names else missing for name in SCHEMAS["events"].names
            }
            columns["archive"] = pa.array([archive] * len(stored), pa.int64())
            events = pa.table(columns, SCHEMAS["events"])
            with _registered(connection, events):
                connection.execute("DELETE FROM events WHERE id IN (SELECT id FROM new_rows)")
                connection.execute("INSERT INTO events SELECT * FROM new_rows")
        if len(archives) != len(known):
            _replace(connection, "archives", [(archive,) for archive, _ in archives])

    def _copy_events(self, source: Connection, connection: duckdb.DuckDBPyConnection, verify: Sequence[Span]) -> None:
        """Copy new events, then compare the changed hours and `verify`, and copy the hours that differ."""
        known = dict(connection.execute("SELECT hour, changes FROM hours").fetchall())
        current = dict(source.execute(select(HOURS.c.hour, HOURS.c.changes)).all())
        ((newest,),) = connection.execute("SELECT coalesce(max(number), -1) FROM events WHERE archive = 0").fetchall()
        self._copy(source, connection, self._number > newest)
        if known or verify:
            changed = sorted(hour for hour in known.keys() | current.keys() if known.get(hour) != current.get(hour))
            differing = self._differing_hours(source, connection, [*_spans(changed), *verify])
            for start, end in _spans(differing):
                connection.execute("DELETE FROM events WHERE archive = 0 AND time >= ? AND time < ?", [start, end])
                self._copy(source, connection, EVENTS.c.time >= start, EVENTS.c.time < end)
        if known != current:
            _replace(connection, "hours", list(current.items()))

    def _copy(self, source: Connection, connection: duckdb.DuckDBPyConnection, *conditions: Any) -> None:
        """Append the events that meet the conditions."""
        query = select(literal(0), self._number, *EVENTS.c).where(*conditions)
        with source.execute(query.execution_options(yield_per=BATCH_SIZE)) as result:
            for rows in result.partitions():
                if self._progress is None and len(rows) == BATCH_SIZE:
                    total = source.execute(select(func.count()).select_from(EVENTS).where(*conditions)).scalar_one()
                    self._progress = (0, total)
                with _registered(connection, _to_arrow("events", rows)):
                    connection.execute("INSERT INTO events SELECT * FROM new_rows")
                if self._progress:
                    self._progress = (self._progress[0] + len(rows), self._progress[1])

    def _differing_hours(
        self, source: Connection, connection: duckdb.DuckDBPyConnection, spans: Sequence[Span]
    ) -> list[int]:
        """Return the hours in the spans whose events differ from those in the database."""
        hour, number = EVENTS.c.time - EVENTS.c.time % HOUR, self._number.element
        sums = [func.sum(EVENTS.c[name]) for name in SUMMED]
        query = select(hour, func.count(), func.sum(number), *sums).group_by(hour)
        ours, theirs = {}, {}
        for start, end in spans:
            condition = f"archive = 0 AND time >= {start} AND time < {end}"
            cached = connection.execute(
                f"SELECT time - time % {HOUR}, {FINGERPRINT} FROM events WHERE {condition} GROUP BY 1"
            )
            ours |= {row[0]: row[1:] for row in cached.fetchall()}
            stored = source.execute(query.where(EVENTS.c.time >= start, EVENTS.c.time < end))
            theirs |= {row[0]: tuple(row[1:]) for row in stored}
        return sorted(hour for hour in ours.keys() | theirs.keys() if ours.get(hour) != theirs.get(hour))


def _spans(hours: Sequence[int]) -> list[Span]:
    """Return the time spans of hours; a single one for many hours."""
    return [ALWAYS] if len(hours) > MAX_HOURS_PER_QUERY else [(hour, hour + HOUR) for hour in hours]


def _to_arrow(table: str, rows: Sequence[Any]) -> pa.Table:
    """Convert rows to Arrow. Session hashes that older versions inserted are replaced."""
    schema = SCHEMAS[table]
    columns = dict(zip(schema.names, zip(*rows, strict=True), strict=True)) if rows else {}
    if "session" in columns:
        hashes = {session: hide_session(session) for session in set(columns["session"])}
        columns["session"] = tuple(hashes[session] for session in columns["session"])
    return pa.table({name: columns.get(name, ()) for name in schema.names}, schema)


@contextmanager
def _registered(connection: duckdb.DuckDBPyConnection, rows: pa.Table) -> Iterator[None]:
    """Make rows available as the table new_rows."""
    connection.register("new_rows", rows)
    try:
        yield
    finally:
        connection.unregister("new_rows")


def _replace(connection: duckdb.DuckDBPyConnection, table: str, rows: Sequence[Any]) -> None:
    """Replace a table. Deleted rows would still count in the query planner's estimates."""
    with _registered(connection, _to_arrow(table, rows)):
        connection.execute(f"CREATE OR REPLACE TABLE {table} AS SELECT * FROM new_rows")
