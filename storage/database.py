"""The database: SQLite by default, PostgreSQL by its URL; its schema brought up to date, its errors in plain words."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, NullPool, create_engine, event, exc, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.sql.schema import Table

from storage import migrate

SCHEMA_LOCK = 7_860_378  # PostgreSQL advisory lock: two processes that start at once create the schema once

# What a database says, and what that means for whoever reads it. {place} is the file.
SQLITE_TROUBLE = {
    "readonly": "{place} is read-only, so nothing was saved. Make it writable, or set DATA_DIR to a folder that is.",
    "locked": "{place} is in use by another program. Nothing was changed; try again in a moment.",
    "is full": "The disk is full, so nothing was saved. Free some space and try again.",
    "not a database": "{place} is damaged or no database. Move it away and a new one is made at the next try.",
    "malformed": "{place} is damaged. Move it away and a new one is made at the next try.",
    "unable to open": "{place} cannot be opened. Check that its folder exists and is writable, or set DATA_DIR.",
    "disk i/o": "{place} cannot be read or written. Check the disk; nothing was changed.",
}
SQLITE_OTHER = "{place} cannot be used. Nothing was changed."
POSTGRES_URL = "DATABASE_URL is no database URL. Use postgresql://user:password@host/name."
POSTGRES_DOWN = "The database cannot be reached. Check that it is running and that DATABASE_URL is right."
POSTGRES_OTHER = "The database refused the request. Check that its user may create and change tables."


class StoreError(Exception):
    """Something could not be kept or found; the message says what to do. `kind` is for code.

    Kinds: "name" (no name), "taken", "unknown" (no such name), "unreadable" (saved by another version), "database".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Database:
    """One database, safe to use from several threads and processes at once. Nothing is opened before the first use."""

    def __init__(self, url: str, busy_seconds: float = 5.0) -> None:
        """`url`: sqlite:///file, postgresql://… or postgres://…; `busy_seconds`: how long to wait for a lock."""
        self._url = _parse_url(url)
        self._engine = _engine(self._url, busy_seconds)
        self._lock = threading.Lock()
        self._ready = False

    @property
    def dialect(self) -> str:
        """ "sqlite" or "postgresql"."""
        return self._engine.dialect.name

    def insert(self, table: Table) -> postgresql.Insert | sqlite.Insert:
        """An INSERT of this database's own kind, which knows ON CONFLICT."""
        return (postgresql if self.dialect == "postgresql" else sqlite).insert(table)

    def close(self) -> None:
        """Close what is open. It is opened again when it is used again."""
        self._engine.dispose()

    @contextmanager
    def transaction(self, write: bool = False) -> Iterator[Connection]:
        """A connection in a transaction, the schema up to date. `write`: takes SQLite's lock at once. StoreError."""
        with self._plain_errors():
            self._prepare()
            with self._begin(write) as connection:
                yield connection

    @contextmanager
    def _begin(self, write: bool) -> Iterator[Connection]:
        with self._engine.connect().execution_options(write=write) as connection, connection.begin():
            yield connection

    def _prepare(self) -> None:
        """Create or update the schema, once; again if the SQLite file has gone since."""
        with self._lock:
            file = _file(self._url)
            if self._ready and (file is None or file.exists()):
                return
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
            if self.dialect != "sqlite" or not self._is_current():
                self._bring_up_to_date()
            self._ready = True

    def _is_current(self) -> bool:
        """Whether nothing is to be done. Only reads, so that a read-only file can still be read."""
        with self._begin(write=False) as connection:
            return migrate.is_current(connection)

    def _bring_up_to_date(self) -> None:
        if self.dialect == "sqlite":
            _let_readers_and_a_writer_work_at_once(self._engine)
        with self._begin(write=True) as connection:
            if self.dialect == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SCHEMA_LOCK})
            migrate.upgrade(connection)

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Turns what a database or the file system says into a StoreError that a person can act on."""
        try:
            yield
        except (exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
            raise StoreError("database", _plain(error, self._url)) from error


def _parse_url(url: str) -> URL:
    """The URL with its driver named. The text itself stays out of every message: it may hold a password."""
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        raise StoreError("database", POSTGRES_URL) from None
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername in ("sqlite", "sqlite+pysqlite") and parsed.database not in (None, "", ":memory:"):
        return parsed
    raise StoreError("database", "DATABASE_URL must be a PostgreSQL database or an SQLite file (sqlite:///file).")


def _engine(url: URL, busy_seconds: float) -> Engine:
    if url.get_backend_name() == "postgresql":
        return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": max(2, round(busy_seconds))})
    engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": busy_seconds})
    event.listen(engine, "connect", _leave_transactions_to_us)
    event.listen(engine, "begin", _begin_transaction)
    return engine


def _leave_transactions_to_us(connection: Any, _record: object) -> None:
    connection.isolation_level = None


def _let_readers_and_a_writer_work_at_once(engine: Engine) -> None:
    """Switches to a write-ahead log. Where that fails, another process is doing it, or the next write says why not."""
    connection = engine.raw_connection()
    try:
        with suppress(sqlite3.OperationalError):
            connection.cursor().execute("PRAGMA journal_mode = WAL")
    finally:
        connection.close()


def _begin_transaction(connection: Connection) -> None:
    """A writer takes its lock at once: taken later, it could fail although it waited."""
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("write") else "BEGIN")


def _file(url: URL) -> Path | None:
    return Path(url.database or "") if url.get_backend_name() == "sqlite" else None


def _plain(error: Exception, url: URL) -> str:
    file = _file(url)
    if file is None:
        return POSTGRES_DOWN if isinstance(error, exc.OperationalError | exc.InterfaceError) else POSTGRES_OTHER
    if isinstance(error, OSError):
        return f"{file.parent} cannot be used as a folder ({error.strerror}). Set DATA_DIR to one that is writable."
    said = str(getattr(error, "orig", error)).lower()
    return next((words for part, words in SQLITE_TROUBLE.items() if part in said), SQLITE_OTHER).format(place=file)
