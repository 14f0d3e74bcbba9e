"""Saved reward functions in the database."""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import Connection, Row, delete, exc, insert, select, update

from rewards import RewardFunction, RewardFunctionError
from storage.database import Database, StoreError
from storage.tables import MAX_NAME, REWARD_FUNCTIONS


@dataclass(frozen=True)
class SavedRewardFunction:
    """A saved reward function.

    Attributes:
        name: Its unique name.
        function: Its weights.
        created: Time of creation, in UTC.
        updated: Time of the last change, in UTC.
    """

    name: str
    function: RewardFunction
    created: datetime
    updated: datetime


class RewardFunctionStore:
    """Stores reward functions by name. Several threads and processes can share a store.

    Names are unique regardless of case. The database is opened on first use. Every method raises StoreError if the
    database cannot be used, and then changes nothing.
    """

    def __init__(self, database: Database | str, busy_seconds: float = 5.0) -> None:
        """Create a store.

        Args:
            database: A database, or its URL.
            busy_seconds: How long to wait for a lock, if `database` is a URL.
        """
        self.database = Database(database, busy_seconds) if isinstance(database, str) else database

    def save(self, name: str, function: RewardFunction, overwrite: bool = False) -> SavedRewardFunction:
        """Save a reward function.

        Args:
            name: Its name; see `clean_name`.
            function: The reward function.
            overwrite: Whether to replace a reward function of this name.

        Raises:
            StoreError: The name is invalid, or taken and not to be overwritten.
        """
        name = clean_name(name)
        now = datetime.now(timezone.utc)
        values = {"name": name, "name_key": _key(name), "weights": function.to_json(), "created": now, "updated": now}
        with self.database.transaction(write=True) as connection:
            if overwrite:
                statement = self.database.insert(REWARD_FUNCTIONS).values(values)
                changed = {key: statement.excluded[key] for key in ("name", "weights", "updated")}
                connection.execute(statement.on_conflict_do_update(index_elements=["name_key"], set_=changed))
            else:
                with _taken_as_store_error(name):
                    connection.execute(insert(REWARD_FUNCTIONS).values(values))
            return _to_saved(self._select(connection, name))

    def list(self) -> list[SavedRewardFunction]:
        """Return all readable reward functions by name. Those of incompatible versions are left out."""
        with self.database.transaction() as connection:
            rows = connection.execute(select(REWARD_FUNCTIONS).order_by(REWARD_FUNCTIONS.c.name_key)).all()
        saved = []
        for row in rows:
            try:
                saved.append(_to_saved(row))
            except StoreError:
                continue
        return saved

    def get(self, name: str) -> RewardFunction:
        """Return the reward function with this name."""
        with self.database.transaction() as connection:
            return _to_saved(self._select(connection, name)).function

    def rename(self, old: str, new: str) -> None:
        """Rename a reward function. The new name may differ in case only."""
        new = clean_name(new)
        values = {"name": new, "name_key": _key(new), "updated": datetime.now(timezone.utc)}
        with self.database.transaction(write=True) as connection:
            row = self._select(connection, old)
            with _taken_as_store_error(new):
                connection.execute(update(REWARD_FUNCTIONS).where(REWARD_FUNCTIONS.c.id == row.id).values(values))

    def delete(self, name: str) -> None:
        """Delete the reward function with this name."""
        with self.database.transaction(write=True) as connection:
            row = self._select(connection, name)
            connection.execute(delete(REWARD_FUNCTIONS).where(REWARD_FUNCTIONS.c.id == row.id))

    def close(self) -> None:
        """Close all connections. The next use connects again."""
        self.database.close()

    def _select(self, connection: Connection, name: str) -> Row[Any]:
        query = select(REWARD_FUNCTIONS).where(REWARD_FUNCTIONS.c.name_key == _key(clean_name(name)))
        row = connection.execute(query).first()
        if row is None:
            raise StoreError("unknown", f"There is no reward function called “{name}”. It may have been deleted.")
        return row


def clean_name(name: str) -> str:
    """Trim a name and normalize it to Unicode NFC.

    Names may be in any script. Characters that change the text direction are invisible and not allowed.

    Raises:
        StoreError: The name is empty, longer than `MAX_NAME`, or contains invisible control characters.
    """
    name = unicodedata.normalize("NFC", name[: 10 * MAX_NAME]).strip()
    if not name:
        raise StoreError("name", "The name is empty. Enter a name.")
    if len(name) > MAX_NAME:
        raise StoreError("name", f"The name is too long. Use at most {MAX_NAME} characters.")
    if any(_is_invisible(character) for character in name):
        raise StoreError("name", "The name contains invisible control characters. Enter it again without them.")
    return name


def _is_invisible(character: str) -> bool:
    joiners = "\u200c\u200d"  # part of words in Persian and Hindi, and of emoji
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in joiners


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


@contextmanager
def _taken_as_store_error(name: str) -> Iterator[None]:
    try:
        yield
    except exc.IntegrityError as error:
        message = f"A reward function called “{name}” already exists. Choose another name, or overwrite it."
        raise StoreError("taken", message) from error


def _to_saved(row: Row[Any]) -> SavedRewardFunction:
    try:
        function = RewardFunction.from_json(row.weights)
    except RewardFunctionError as error:
        message = f"“{row.name}” was saved by another version and cannot be read. Save it again or delete it."
        raise StoreError("unreadable", message) from error
    return SavedRewardFunction(row.name, function, _to_utc(row.created), _to_utc(row.updated))


def _to_utc(time: datetime) -> datetime:
    """Convert to UTC. SQLite stores UTC without a time zone."""
    return time.replace(tzinfo=timezone.utc) if time.tzinfo is None else time.astimezone(timezone.utc)
