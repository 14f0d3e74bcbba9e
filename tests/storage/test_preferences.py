"""Tests of stored choices on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import insert

from rewards import RewardFunction
from storage import preferences as module
from storage.database import Database, StoreError
from storage.preferences import JudgedCandidate, Preference, PreferenceStore
from storage.tables import PREFERENCES

LEFT = JudgedCandidate("moondream-tiny", "exposure 20", {"sharpness": 0.5, "colour": None, "creativity": 0.25})
RIGHT = JudgedCandidate("run-1", "contrast -20", {"sharpness": 0.1, "colour": 0.2, "creativity": 0.3})
CHOICE = Preference(LEFT, RIGHT, "left", RewardFunction({"sharpness": 0.5}))
GUEST, USER = "guest:abc", "hf:1"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PreferenceStore]:
    """Return an empty store on either database."""
    url = f"sqlite:///{tmp_path / 'x.sqlite3'}"
    database = Database(url if request.param == "sqlite" else request.getfixturevalue("postgres_url"))
    yield PreferenceStore(database)
    database.close()


def test_choices_are_kept_per_owner_and_undone_in_order(store: PreferenceStore) -> None:
    for outcome in ("left", "right", "equal"):
        store.add(replace(CHOICE, outcome=outcome), USER)
    store.add(replace(CHOICE, sample="astronaut.jpg"), GUEST)
    saved = store.list(USER)
    assert [item.outcome for item in saved] == ["left", "right", "equal"]
    assert replace(saved[0], id=0, created=None) == CHOICE and saved[0].created is not None
    assert [item.sample for item in store.list(GUEST)] == ["astronaut.jpg"]
    assert store.list("") == []
    assert store.undo(USER) and [item.outcome for item in store.list(USER)] == ["left", "right"]
    assert store.delete_all(USER) == 2 and not store.undo(USER)
    assert len(store.list(GUEST)) == 1


def test_photos_are_kept_once_and_deleted_with_their_last_choice(store: PreferenceStore) -> None:
    store.add(replace(CHOICE, photo=b"first"), USER)
    store.add(replace(CHOICE, photo=b"first"), USER)
    store.add(replace(CHOICE, photo=b"first"), GUEST)
    store.add(replace(CHOICE, photo=b"second"), USER)
    assert store.count_photos(USER) == 2 and store.count_photos(GUEST) == 1
    assert [item.photo for item in store.list(USER, photos=True)] == [b"first", b"first", b"second"]
    assert [(item.photo, item.has_photo) for item in store.list(USER)] == [(None, True)] * 3
    store.undo(USER)
    store.undo(USER)
    assert store.count_photos(USER) == 1
    store.undo(USER)
    assert store.count_photos(USER) == 0 and store.count_photos(GUEST) == 1
    store.delete_all(GUEST)
    assert store.count_photos(GUEST) == 0


def test_limits(store: PreferenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="blocks cookies"):
        store.add(CHOICE, "guest:")
    with pytest.raises(StoreError, match="one of left, right, equal"):
        store.add(replace(CHOICE, outcome="skip"), USER)
    with pytest.raises(StoreError, match="copy is larger"):
        store.add(replace(CHOICE, photo=b"x" * (module.MAX_PHOTO_BYTES + 1)), USER)
    monkeypatch.setattr(module, "MAX_PHOTOS_PER_OWNER", 1)
    store.add(replace(CHOICE, photo=b"first"), USER)
    with pytest.raises(StoreError, match="of your photos are kept"):
        store.add(replace(CHOICE, photo=b"second"), USER)
    monkeypatch.setattr(module, "MAX_PER_OWNER", 2)
    store.add(replace(CHOICE, photo=b"first"), USER)
    with pytest.raises(StoreError, match="which is the limit"):
        store.add(CHOICE, USER)
    monkeypatch.setattr(module, "MAX_GUEST_CHOICES", 2)
    for owner in ("guest:a", "guest:b", "guest:c"):
        store.add(replace(CHOICE, photo=b"own"), owner)
    assert [len(store.list(owner)) for owner in ("guest:a", "guest:b", "guest:c", USER)] == [0, 1, 1, 2]
    assert store.count_photos("guest:a") == 0


def test_choices_of_other_versions_are_left_out(store: PreferenceStore) -> None:
    store.add(CHOICE, USER)
    with store.database.transaction(write=True) as connection:
        row = dict(connection.execute(PREFERENCES.select()).one()._mapping) | {"id": 7, "start": '{"removed": 1}'}
        connection.execute(insert(PREFERENCES).values(row))
    assert [item.id for item in store.list(USER)] == [1]
    assert store.delete_all(USER) == 2
