"""Choices between candidates in the database, with the photos that their owners agreed to keep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select

from rewards import RewardFunction, RewardFunctionError
from storage.database import Database, StoreError
from storage.tables import PREFERENCE_PHOTOS, PREFERENCES, SIDES

MAX_PER_OWNER = 2_000
MAX_PHOTOS_PER_OWNER = 200
MAX_PHOTO_BYTES = 500_000
MAX_GUEST_CHOICES = 20_000  # of all guests together; the oldest are deleted first
GUEST_PREFIX = "guest:"  # of the owners that are guests; see access/roles.py
OUTCOMES = ("left", "right", "equal")


@dataclass(frozen=True)
class JudgedCandidate:
    """One side of a choice.

    Attributes:
        model: Name of the model that wrote the recipe.
        recipe: The canonical text of the recipe.
        scores: Score of each reward by name; None where a reward does not apply.
    """

    model: str
    recipe: str
    scores: Mapping[str, float | None]


@dataclass(frozen=True)
class Preference:
    """A choice between two candidates of a photo.

    Attributes:
        left: The candidate on the left.
        right: The one on the right.
        outcome: The preferred side, or "equal".
        start: The weights on the sliders when the choice was made.
        sample: File name of a bundled photo; "" for another photo.
        photo: The photo as a small JPEG file, if its owner agreed to keep it.
        has_photo: Whether a photo is kept with a saved choice, also if `photo` was not loaded.
        id: Its id; 0 before it is saved. Later choices have larger ids.
        created: Time of the choice, in UTC; None before it is saved.
    """

    left: JudgedCandidate
    right: JudgedCandidate
    outcome: str
    start: RewardFunction
    sample: str = ""
    photo: bytes | None = None
    id: int = 0
    created: datetime | None = None
    has_photo: bool = False


class PreferenceStore:
    """Stores choices by owner, which is the id of a visitor (see access/roles.py). Owners see only their own choices.

    Several threads and processes can share a store. Every method raises StoreError if the database cannot be used, and
    then changes nothing.
    """

    def __init__(self, database: Database) -> None:
        """Create a store in a database, which is opened on first use."""
        self.database = database

    def add(self, preference: Preference, owner: str) -> int:
        """Save a choice and return its id.

        Raises:
            StoreError: The outcome is invalid, the photo is too large, or the owner has no room or no identity.
        """
        if owner == GUEST_PREFIX:
            message = "Your choice cannot be kept: this browser blocks cookies. Allow them for this site and try again."
            raise StoreError("full", message)
        if preference.outcome not in OUTCOMES:
            raise StoreError("name", f"A choice is one of {', '.join(OUTCOMES)}.")
        if preference.photo is not None and len(preference.photo) > MAX_PHOTO_BYTES:
            raise StoreError(
                "full", f"The photo's copy is larger than {MAX_PHOTO_BYTES // 1000} kB. Keep the choice only."
            )
        values: dict[str, Any] = {
            "owner": owner,
            "created": datetime.now(timezone.utc),
            "outcome": preference.outcome,
            "start": preference.start.to_json(),
            "sample": preference.sample,
        }
        for side, candidate in zip(SIDES, (preference.left, preference.right), strict=True):
            values |= {f"{side}_model": candidate.model, f"{side}_recipe": candidate.recipe}
            values[f"{side}_scores"] = json.dumps(dict(candidate.scores))
        with self.database.transaction(write=True) as connection:
            if _count(connection, owner) >= MAX_PER_OWNER:
                message = f"You have made {MAX_PER_OWNER:,} choices, which is the limit. Delete them to start again."
                raise StoreError("full", message)
            if owner.startswith(GUEST_PREFIX):
                _make_room_for_guests(connection)
            values["photo"] = None if preference.photo is None else _save_photo(connection, owner, preference.photo)
            return connection.execute(insert(PREFERENCES).values(values)).inserted_primary_key[0]  # type: ignore[index]

    def list(self, owner: str, photos: bool = False) -> list[Preference]:
        """Return an owner's readable choices, oldest first. Those of incompatible versions are left out.

        Args:
            owner: The owner.
            photos: Whether to load the photos; otherwise `photo` is None.
        """
        columns = [*PREFERENCES.c, *([PREFERENCE_PHOTOS.c.jpeg] if photos else [])]
        joined = PREFERENCES.outerjoin(PREFERENCE_PHOTOS, PREFERENCES.c.photo == PREFERENCE_PHOTOS.c.id)
        query = select(*columns).select_from(joined if photos else PREFERENCES)
        with self.database.transaction() as connection:
            rows = connection.execute(query.where(PREFERENCES.c.owner == owner).order_by(PREFERENCES.c.id)).all()
        preferences = []
        for row in rows:
            try:
                preferences.append(_to_preference(row, row.jpeg if photos else None))
            except (RewardFunctionError, ValueError):
                continue
        return preferences

    def count_photos(self, owner: str) -> int:
        """Return how many photos of an owner are kept."""
        query = select(func.count()).select_from(PREFERENCE_PHOTOS).where(PREFERENCE_PHOTOS.c.owner == owner)
        with self.database.transaction() as connection:
            return connection.execute(query).scalar_one()

    def undo(self, owner: str) -> bool:
        """Delete an owner's latest choice, with its photo if no other choice needs it; return whether there was one."""
        with self.database.transaction(write=True) as connection:
            latest = select(func.max(PREFERENCES.c.id)).where(PREFERENCES.c.owner == owner)
            number = connection.execute(latest).scalar_one()
            connection.execute(delete(PREFERENCES).where(PREFERENCES.c.id == number))
            _delete_unused_photos(connection)
            return number is not None

    def delete_all(self, owner: str) -> int:
        """Delete all choices and photos of an owner and return the number of choices."""
        with self.database.transaction(write=True) as connection:
            connection.execute(delete(PREFERENCE_PHOTOS).where(PREFERENCE_PHOTOS.c.owner == owner))
            return connection.execute(delete(PREFERENCES).where(PREFERENCES.c.owner == owner)).rowcount


def _count(connection: Connection, owner: str) -> int:
    query = select(func.count()).select_from(PREFERENCES).where(PREFERENCES.c.owner == owner)
    return connection.execute(query).scalar_one()


def _make_room_for_guests(connection: Connection) -> None:
    """Delete the guests' oldest choices if there are too many of all guests together."""
    guests = PREFERENCES.c.owner.startswith(GUEST_PREFIX)
    query = select(PREFERENCES.c.id).where(guests).order_by(PREFERENCES.c.id.desc()).offset(MAX_GUEST_CHOICES - 1)
    newest_to_delete = connection.execute(query.limit(1)).scalar()
    if newest_to_delete is not None:
        connection.execute(delete(PREFERENCES).where(guests, PREFERENCES.c.id <= newest_to_delete))
        _delete_unused_photos(connection)


def _save_photo(connection: Connection, owner: str, jpeg: bytes) -> int:
    """Save a photo once per owner and return its id. Raises StoreError if there are too many."""
    digest = hashlib.sha256(jpeg).hexdigest()
    owned = PREFERENCE_PHOTOS.c.owner == owner
    known = connection.execute(
        select(PREFERENCE_PHOTOS.c.id).where(owned, PREFERENCE_PHOTOS.c.digest == digest)
    ).scalar()
    if known is not None:
        return known
    if connection.execute(select(func.count()).where(owned)).scalar_one() >= MAX_PHOTOS_PER_OWNER:
        message = (
            f"{MAX_PHOTOS_PER_OWNER} of your photos are kept, which is the limit. Choose without keeping the photo."
        )
        raise StoreError("full", message)
    values = {"owner": owner, "digest": digest, "jpeg": jpeg}
    return connection.execute(insert(PREFERENCE_PHOTOS).values(values)).inserted_primary_key[0]  # type: ignore[index]


def _delete_unused_photos(connection: Connection) -> None:
    used = select(PREFERENCES.c.photo).where(PREFERENCES.c.photo.is_not(None))
    connection.execute(delete(PREFERENCE_PHOTOS).where(PREFERENCE_PHOTOS.c.id.not_in(used)))


def _to_preference(row: Row[Any], photo: bytes | None) -> Preference:
    values = row._mapping
    left, right = (
        JudgedCandidate(values[f"{side}_model"], values[f"{side}_recipe"], json.loads(values[f"{side}_scores"]))
        for side in SIDES
    )
    start = RewardFunction.from_json(row.start)
    created = row.created.replace(tzinfo=timezone.utc) if row.created.tzinfo is None else row.created
    return Preference(left, right, row.outcome, start, row.sample, photo, row.id, created, values["photo"] is not None)
