"""The store: saved reward functions in a database, SQLite by default, PostgreSQL by its URL."""

import sqlite3
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    DateTime,
    Engine,
    Integer,
    MetaData,
    NullPool,
    Row,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    exc,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url

from rewards import RewardFunction, RewardFunctionError

MAX_NAME = 80
METADATA = MetaData()
SCHEMA_VERSION = Table("schema_version", METADATA, Column("version", Integer, nullable=False))
REWARD_FUNCTIONS = Table(
    "reward_functions",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("name", String(MAX_NAME), nullable=False),
    Column("name_key", Text, nullable=False, unique=True),
    Column("weights", Text, nullable=False),
    Column("created", DateTime(timezone=True), nullable=False),
    Column("updated", DateTime(timezone=True), nullable=False),
)
# Step n brings a database of version n to version n + 1. A step, once released, is never edited: add the next one.
STEPS: tuple[Callable[[Connection], None], ...] = (lambda connection: REWARD_FUNCTIONS.create(connection),)
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


@dataclass(frozen=True)
class SavedRewardFunction:
    """A reward function as it is kept: its name, its weights, and when it was made and last changed (UTC)."""

    name: str
    function: RewardFunction
    created: datetime
    updated: datetime


class Store:
    """Keeps reward functions by name. Safe to use from several threads and processes at once.

    Names are unique whatever their case. Nothing is opened before the first use. Every method raises StoreError where
    the database cannot do its part, and then has changed nothing.
    """

    def __init__(self, url: str, busy_seconds: float = 5.0) -> None:
        """`url`: sqlite:///file, postgresql://… or postgres://…; `busy_seconds`: how long to wait for a lock."""
        self._url = _parse_url(url)
        self._engine = _engine(self._url, busy_seconds)
        self._lock = threading.Lock()
        self._ready = False

    def save(self, name: str, function: RewardFunction, overwrite: bool = False) -> SavedRewardFunction:
        """Keep `function` as `name`; a name that is taken is an error unless `overwrite`."""
        name = clean_name(name)
        now = datetime.now(timezone.utc)
        values = {"name": name, "name_key": _key(name), "weights": function.to_json(), "created": now, "updated": now}
        with self._transaction(write=True) as connection:
            if overwrite:
                connection.execute(self._upsert(values))
            else:
                with _unless_taken(name):
                    connection.execute(insert(REWARD_FUNCTIONS).values(values))
            return _saved(self._row(connection, name))

    def list(self) -> list[SavedRewardFunction]:
        """All that is kept and can be read, by name. What another version saved in its own way is left out."""
        with self._transaction() as connection:
            rows = connection.execute(select(REWARD_FUNCTIONS).order_by(REWARD_FUNCTIONS.c.name_key)).all()
        return [saved for saved in map(_saved_or_none, rows) if saved is not None]

    def get(self, name: str) -> RewardFunction:
        """The reward function called `name`."""
        with self._transaction() as connection:
            return _saved(self._row(connection, name)).function

    def rename(self, old: str, new: str) -> None:
        """Call `old` `new` from now on; a change of case alone is one too."""
        new = clean_name(new)
        values = {"name": new, "name_key": _key(new), "updated": datetime.now(timezone.utc)}
        with self._transaction(write=True) as connection:
            row = self._row(connection, old)
            with _unless_taken(new):
                connection.execute(update(REWARD_FUNCTIONS).where(REWARD_FUNCTIONS.c.id == row.id).values(values))

    def delete(self, name: str) -> None:
        """Forget the reward function called `name`."""
        with self._transaction(write=True) as connection:
            row = self._row(connection, name)
            connection.execute(delete(REWARD_FUNCTIONS).where(REWARD_FUNCTIONS.c.id == row.id))

    def ping(self) -> None:
        """Return if the store answers and can be read; raise StoreError otherwise."""
        with self._transaction() as connection:
            connection.execute(select(REWARD_FUNCTIONS.c.id).limit(1)).first()

    def close(self) -> None:
        """Close what is open. The store opens it again when it is used again."""
        self._engine.dispose()

    def _row(self, connection: Connection, name: str) -> Row[Any]:
        query = select(REWARD_FUNCTIONS).where(REWARD_FUNCTIONS.c.name_key == _key(clean_name(name)))
        row = connection.execute(query).first()
        if row is None:
            raise StoreError("unknown", f"There is no reward function called “{name}”. It may have been deleted.")
        return row

    def _upsert(self, values: dict[str, Any]) -> postgresql.Insert | sqlite.Insert:
        dialect = postgresql if self._engine.dialect.name == "postgresql" else sqlite
        statement = dialect.insert(REWARD_FUNCTIONS).values(values)
        changed = {key: statement.excluded[key] for key in ("name", "weights", "updated")}
        return statement.on_conflict_do_update(index_elements=["name_key"], set_=changed)

    @contextmanager
    def _transaction(self, write: bool = False) -> Iterator[Connection]:
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
            if self._engine.dialect.name != "sqlite" or not self._is_current():
                self._bring_up_to_date()
            self._ready = True

    def _is_current(self) -> bool:
        """Whether nothing is to be done. Only reads, so that a read-only file can still be read."""
        with self._begin(write=False) as connection:
            return _version(connection) >= len(STEPS)

    def _bring_up_to_date(self) -> None:
        if self._engine.dialect.name == "sqlite":
            _let_readers_and_a_writer_work_at_once(self._engine)
        with self._begin(write=True) as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SCHEMA_LOCK})
            version = _version(connection)
            for step in STEPS[version:]:
                step(connection)
            if version < len(STEPS):
                SCHEMA_VERSION.create(connection, checkfirst=True)
                connection.execute(delete(SCHEMA_VERSION))
                connection.execute(insert(SCHEMA_VERSION).values(version=len(STEPS)))

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Turns what a database or the file system says into a StoreError that a person can act on."""
        try:
            yield
        except (exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
            raise StoreError("database", _plain(error, self._url)) from error


def clean_name(name: str) -> str:
    """The name as it is kept: trimmed, in Unicode's composed form.

    Raises StoreError where that leaves nothing, more than MAX_NAME characters, or invisible control characters.
    Names in any script are welcome, right-to-left ones too; characters that turn the direction of what follows are not.
    """
    name = unicodedata.normalize("NFC", name[: 10 * MAX_NAME]).strip()
    if not name:
        raise StoreError("name", "The name is empty. Type one.")
    if len(name) > MAX_NAME:
        raise StoreError("name", f"The name is too long. Use at most {MAX_NAME} characters.")
    if any(_is_invisible(character) for character in name):
        raise StoreError("name", "The name has invisible control characters. Type it anew without them.")
    return name


def _is_invisible(character: str) -> bool:
    joiners = "\u200c\u200d"  # part of words in Persian and Hindi, and of emoji
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in joiners


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


@contextmanager
def _unless_taken(name: str) -> Iterator[None]:
    try:
        yield
    except exc.IntegrityError as error:
        message = f"There is a reward function called “{name}” already. Choose another name, or overwrite it."
        raise StoreError("taken", message) from error


def _saved(row: Row[Any]) -> SavedRewardFunction:
    try:
        function = RewardFunction.from_json(row.weights)
    except RewardFunctionError as error:
        message = f"“{row.name}” was saved by another version and cannot be read here. Save it anew or delete it."
        raise StoreError("unreadable", message) from error
    return SavedRewardFunction(row.name, function, _utc(row.created), _utc(row.updated))


def _saved_or_none(row: Row[Any]) -> SavedRewardFunction | None:
    try:
        return _saved(row)
    except StoreError:
        return None


def _utc(moment: datetime) -> datetime:
    """SQLite forgets the zone; what was written was UTC."""
    return moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment.astimezone(timezone.utc)


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


def _version(connection: Connection) -> int:
    if not inspect(connection).has_table(SCHEMA_VERSION.name):
        return 0
    return connection.execute(select(SCHEMA_VERSION.c.version)).scalar() or 0


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
