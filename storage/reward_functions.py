"""The store: saved reward functions in the database."""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import Connection, Row, delete, exc, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from rewards import RewardFunction, RewardFunctionError
from storage.database import Database, StoreError
from storage.tables import MAX_NAME, REWARD_FUNCTIONS


@dataclass(frozen=True)
class SavedRewardFunction:
    """A reward function as it is kept: its name, its weights, and when it was made and last changed (UTC)."""

    name: str
    function: RewardFunction
    created: datetime
    updated: datetime


class RewardFunctionStore:
    """Keeps reward functions by name. Safe to use from several threads and processes at once.

    Names are unique whatever their case. Nothing is opened before the first use. Every method raises StoreError where
    the database cannot do its part, and then has changed nothing.
    """

    def __init__(self, database: Database | str, busy_seconds: float = 5.0) -> None:
        """`database`: one that is shared, or the URL of one; `busy_seconds`: how long to wait for its lock."""
        self.database = Database(database, busy_seconds) if isinstance(database, str) else database

    def save(self, name: str, function: RewardFunction, overwrite: bool = False) -> SavedRewardFunction:
        """Keep `function` as `name`; a name that is taken is an error unless `overwrite`."""
        name = clean_name(name)
        now = datetime.now(timezone.utc)
        values = {"name": name, "name_key": _key(name), "weights": function.to_json(), "created": now, "updated": now}
        with self.database.transaction(write=True) as connection:
            if overwrite:
                connection.execute(self._upsert(values))
            else:
                with _unless_taken(name):
                    connection.execute(insert(REWARD_FUNCTIONS).values(values))
            return _saved(self._row(connection, name))

    def list(self) -> list[SavedRewardFunction]:
        """All that is kept and can be read, by name. What another version saved in its own way is left out."""
        with self.database.transaction() as connection:
            rows = connection.execute(select(REWARD_FUNCTIONS).order_by(REWARD_FUNCTIONS.c.name_key)).all()
        return [saved for saved in map(_saved_or_none, rows) if saved is not None]

    def get(self, name: str) -> RewardFunction:
        """The reward function called `name`."""
        with self.database.transaction() as connection:
            return _saved(self._row(connection, name)).function

    def rename(self, old: str, new: str) -> None:
        """Call `old` `new` from now on; a change of case alone is one too."""
        new = clean_name(new)
        values = {"name": new, "name_key": _key(new), "updated": datetime.now(timezone.utc)}
        with self.database.transaction(write=True) as connection:
            row = self._row(connection, old)
            with _unless_taken(new):
                connection.execute(update(REWARD_FUNCTIONS).where(REWARD_FUNCTIONS.c.id == row.id).values(values))

    def delete(self, name: str) -> None:
        """Forget the reward function called `name`."""
        with self.database.transaction(write=True) as connection:
            row = self._row(connection, name)
            connection.execute(delete(REWARD_FUNCTIONS).where(REWARD_FUNCTIONS.c.id == row.id))

    def ping(self) -> None:
        """Return if the store answers and can be read; raise StoreError otherwise."""
        with self.database.transaction() as connection:
            connection.execute(select(REWARD_FUNCTIONS.c.id).limit(1)).first()

    def close(self) -> None:
        """Close what is open. The store opens it again when it is used again."""
        self.database.close()

    def _row(self, connection: Connection, name: str) -> Row[Any]:
        query = select(REWARD_FUNCTIONS).where(REWARD_FUNCTIONS.c.name_key == _key(clean_name(name)))
        row = connection.execute(query).first()
        if row is None:
            raise StoreError("unknown", f"There is no reward function called “{name}”. It may have been deleted.")
        return row

    def _upsert(self, values: dict[str, Any]) -> postgresql.Insert | sqlite.Insert:
        statement = self.database.insert(REWARD_FUNCTIONS).values(values)
        changed = {key: statement.excluded[key] for key in ("name", "weights", "updated")}
        return statement.on_conflict_do_update(index_elements=["name_key"], set_=changed)


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
