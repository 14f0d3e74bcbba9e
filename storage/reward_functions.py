"""Saved reward functions in the database."""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Table, delete, exc, func, insert, select, true, update

from rewards import RewardFunction, RewardFunctionError
from storage.database import Database, StoreError
from storage.tables import MAX_NAME, REWARD_FUNCTIONS, USER_REWARD_FUNCTIONS

MAX_PER_OWNER = 200


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
    """Stores reward functions by owner and name. Several threads and processes can share a store.

    `owner` is the id of a visitor (see access/roles.py), by default "" for the deployment's own administrator. Owners
    do not see each other's reward functions. Names are unique per owner, regardless of case. The database is opened on
    first use. Every method raises StoreError if the database cannot be used, and then changes nothing.
    """

    def __init__(self, database: Database | str, busy_seconds: float = 5.0) -> None:
        """Create a store.

        Args:
            database: A database, or its URL.
            busy_seconds: How long to wait for a lock, if `database` is a URL.
        """
        self.database = Database(database, busy_seconds) if isinstance(database, str) else database

    def save(
        self, name: str, function: RewardFunction, overwrite: bool = False, *, owner: str = ""
    ) -> SavedRewardFunction:
        """Save a reward function.

        Args:
            name: Its name; see `clean_name`.
            function: The reward function.
            overwrite: Whether to replace a reward function of this name.
            owner: Its owner.

        Raises:
            StoreError: The name is invalid, or taken and not to be overwritten, or the owner has `MAX_PER_OWNER`
                reward functions.
        """
        name = clean_name(name)
        table = _table(owner)
        now = datetime.now(timezone.utc)
        values = {"name": name, "name_key": _key(name), "weights": function.to_json(), "created": now, "updated": now}
        if owner:
            values["owner"] = owner
        with self.database.transaction(write=True) as connection:
            if owner:
                _check_room(connection, owner, _key(name))
            if overwrite:
                statement = self.database.insert(table).values(values)
                keys = ["owner", "name_key"] if owner else ["name_key"]
                changed = {key: statement.excluded[key] for key in ("name", "weights", "updated")}
                connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=changed))
            else:
                with _taken_as_store_error(name):
                    connection.execute(insert(table).values(values))
            return _to_saved(_select(connection, name, owner))

    def list(self, *, owner: str = "") -> list[SavedRewardFunction]:
        """Return an owner's readable reward functions by name. Those of incompatible versions are left out."""
        table = _table(owner)
        with self.database.transaction() as connection:
            rows = connection.execute(select(table).where(_owned(owner)).order_by(table.c.name_key)).all()
        saved = []
        for row in rows:
            try:
                saved.append(_to_saved(row))
            except StoreError:
                continue
        return saved

    def get(self, name: str, *, owner: str = "") -> RewardFunction:
        """Return an owner's reward function with this name."""
        with self.database.transaction() as connection:
            return _to_saved(_select(connection, name, owner)).function

    def rename(self, old: str, new: str, *, owner: str = "") -> None:
        """Rename a reward function. The new name may differ in case only."""
        new, table = clean_name(new), _table(owner)
        values = {"name": new, "name_key": _key(new), "updated": datetime.now(timezone.utc)}
        with self.database.transaction(write=True) as connection:
            row = _select(connection, old, owner)
            with _taken_as_store_error(new):
                connection.execute(update(table).where(table.c.id == row.id).values(values))

    def delete(self, name: str, *, owner: str = "") -> None:
        """Delete an owner's reward function with this name."""
        table = _table(owner)
        with self.database.transaction(write=True) as connection:
            row = _select(connection, name, owner)
            connection.execute(delete(table).where(table.c.id == row.id))

    def close(self) -> None:
        """Close all connections. The next use connects again."""
        self.database.close()


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


def _table(owner: str) -> Table:
    """Return the table of an owner. Versions without owners share the one of the owner ""."""
    return USER_REWARD_FUNCTIONS if owner else REWARD_FUNCTIONS


def _owned(owner: str) -> ColumnElement[bool]:
    return USER_REWARD_FUNCTIONS.c.owner == owner if owner else true()


def _select(connection: Connection, name: str, owner: str) -> Row[Any]:
    table = _table(owner)
    row = connection.execute(select(table).where(_owned(owner), table.c.name_key == _key(clean_name(name)))).first()
    if row is None:
        raise StoreError("unknown", f"There is no reward function called “{name}”. It may have been deleted.")
    return row


def _check_room(connection: Connection, owner: str, key: str) -> None:
    """Raise StoreError if the owner has `MAX_PER_OWNER` reward functions other than the one with this key."""
    count = select(func.count()).where(_owned(owner), USER_REWARD_FUNCTIONS.c.name_key != key)
    if connection.execute(count).scalar_one() >= MAX_PER_OWNER:
        message = f"You have {MAX_PER_OWNER} saved reward functions, which is the limit. Delete one, or overwrite one."
        raise StoreError("full", message)


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
