"""Database access: SQLite by default, PostgreSQL by URL, with schema migrations and readable errors."""

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

SCHEMA_LOCK = 7_860_378  # key of the PostgreSQL advisory lock that serializes migrations

# Part of SQLite's error message -> message for the user.
SQLITE_ERRORS = {
    "readonly": "{file} is read-only. Nothing was saved. Make it writable, or set DATA_DIR to a writable folder.",
    "locked": "{file} is in use by another program. Nothing was changed. Try again in a moment.",
    "is full": "The disk is full. Nothing was saved. Free some space and try again.",
    "not a database": "{file} is damaged or not a database. Move it away; a new one is created at the next attempt.",
    "malformed": "{file} is damaged. Move it away; a new one is created at the next attempt.",
    "unable to open": "{file} cannot be opened. Check that its folder exists and is writable, or set DATA_DIR.",
    "disk i/o": "{file} cannot be read or written. Nothing was changed. Check the disk.",
}
SQLITE_ERROR = "{file} cannot be used. Nothing was changed."
POSTGRES_URL = "DATABASE_URL is not a database URL. Use postgresql://user:password@host/name."
POSTGRES_UNREACHABLE = "The database cannot be reached. Check that it is running and that DATABASE_URL is right."
POSTGRES_REFUSED = "The database refused the request. Check that its user may create and change tables."


class StoreError(Exception):
    """Raised if data cannot be stored or found. The message tells the user what to do.

    Attributes:
        kind: "name" (invalid name), "taken" (name exists), "unknown" (no such name), "unreadable" (saved by another
            version), "full" (a limit is reached) or "database".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Database:
    """A database that several threads and processes can share. Connects on first use."""

    def __init__(self, url: str, busy_seconds: float = 5.0) -> None:
        """Create a database without connecting.

        Args:
            url: sqlite:///file, postgresql://… or postgres://…
            busy_seconds: How long to wait for a lock.

        Raises:
            StoreError: The URL is invalid.
        """
        self._url = _parse_url(url)
        self._file = Path(self._url.database or "") if self._url.get_backend_name() == "sqlite" else None
        self._engine = _create_engine(self._url, busy_seconds)
        self._lock = threading.Lock()
        self._ready = False

    @property
    def dialect(self) -> str:
        """Name of the SQL dialect: "sqlite" or "postgresql"."""
        return self._engine.dialect.name

    @property
    def address(self) -> str:
        """The URL without its password."""
        return self._url.render_as_string(hide_password=True)

    def insert(self, table: Table) -> postgresql.Insert | sqlite.Insert:
        """Return an INSERT statement of this dialect, which supports ON CONFLICT."""
        return (postgresql if self.dialect == "postgresql" else sqlite).insert(table)

    def close(self) -> None:
        """Close all connections. The next use connects again."""
        self._engine.dispose()

    @contextmanager
    def transaction(self, write: bool = False) -> Iterator[Connection]:
        """Open a connection in a transaction, after migrating the schema if needed.

        All queries of a transaction that only reads see the same state of the database.

        Args:
            write: Whether the transaction writes. SQLite's write lock is taken at the start.

        Raises:
            StoreError: The database cannot be used.
        """
        try:
            self._prepare()
            with self._begin(write) as connection:
                yield connection
        except (exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
            raise StoreError("database", self._error_message(error)) from error

    @contextmanager
    def _begin(self, write: bool) -> Iterator[Connection]:
        options: dict[str, Any] = {"write": write}
        if self.dialect == "postgresql" and not write:
            options["isolation_level"] = "REPEATABLE READ"  # SQLite reads from a snapshot anyway
        with self._engine.connect() as connection, connection.execution_options(**options).begin():
            yield connection

    def _prepare(self) -> None:
        """Create or migrate the schema once, and again if the SQLite file was deleted."""
        with self._lock:
            if self._ready and (self._file is None or self._file.exists()):
                return
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
            if self.dialect != "sqlite" or not self._is_current():
                self._migrate()
            self._ready = True

    def _is_current(self) -> bool:
        """Check the schema version without writing, so that read-only files can be read."""
        with self._begin(write=False) as connection:
            return migrate.is_current(connection)

    def _migrate(self) -> None:
        if self.dialect == "sqlite":
            _enable_write_ahead_log(self._engine)
        with self._begin(write=True) as connection:
            if self.dialect == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SCHEMA_LOCK})
            migrate.upgrade(connection)

    def _error_message(self, error: Exception) -> str:
        """Return a message for the user, without the URL and its password."""
        if self._file is None:
            unreachable = isinstance(error, exc.OperationalError | exc.InterfaceError)
            return POSTGRES_UNREACHABLE if unreachable else POSTGRES_REFUSED
        if isinstance(error, OSError):
            folder = self._file.parent
            return f"{folder} cannot be used as a folder ({error.strerror}). Set DATA_DIR to a writable folder."
        sqlite_message = str(getattr(error, "orig", error)).lower()
        message = next((message for part, message in SQLITE_ERRORS.items() if part in sqlite_message), SQLITE_ERROR)
        return message.format(file=self._file)


def _parse_url(url: str) -> URL:
    """Parse a URL and add the driver. Errors do not contain the URL, which may hold a password."""
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        raise StoreError("database", POSTGRES_URL) from None
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername in ("sqlite", "sqlite+pysqlite") and parsed.database not in (None, "", ":memory:"):
        return parsed
    raise StoreError("database", "DATABASE_URL must name a PostgreSQL database or an SQLite file (sqlite:///file).")


def _create_engine(url: URL, busy_seconds: float) -> Engine:
    if url.get_backend_name() == "postgresql":
        return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": max(2, round(busy_seconds))})
    engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": busy_seconds})
    event.listen(engine, "connect", _disable_driver_transactions)
    event.listen(engine, "begin", _begin_transaction)
    return engine


def _disable_driver_transactions(connection: Any, _record: object) -> None:
    connection.isolation_level = None


def _begin_transaction(connection: Connection) -> None:
    """Begin an SQLite transaction. Writers lock at once: upgrading a read lock later can fail despite waiting."""
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("write") else "BEGIN")


def _enable_write_ahead_log(engine: Engine) -> None:
    """Let readers and a writer work at once. A failure is ignored: the next write reports it if it matters."""
    connection = engine.raw_connection()
    try:
        with suppress(sqlite3.OperationalError):
            connection.cursor().execute("PRAGMA journal_mode = WAL")
    finally:
        connection.close()
