"""Tests of saved reward functions by role: in the database, in a guest's browser, and shared ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from access.roles import LOCAL_ADMIN, Role, Visitor
from rewards import RewardFunction
from storage.reward_functions import RewardFunctionStore, StoreError
from ui.playground import reward_functions
from ui.playground.saved_functions import MAX_IN_BROWSER, BrowserStore, SavedFunctions

GUEST, USER = Visitor(Role.GUEST, "guest:a", "", "a"), Visitor(Role.USER, "hf:1", "ann", "b")
OTHER_USER, SPACE_ADMIN = Visitor(Role.USER, "hf:3", "bob", "d"), Visitor(Role.ADMIN, "hf:2", "owner", "c")
SHARP, COLOURFUL = RewardFunction({"sharpness": 1.0}), RewardFunction({"colour": 0.5})


@pytest.fixture
def store(tmp_path: Path) -> RewardFunctionStore:
    """Return a store with the shared reward function calm."""
    store = RewardFunctionStore(f"sqlite:///{tmp_path / 'store.sqlite3'}")
    store.save("calm", SHARP)
    return store


@pytest.fixture(autouse=True)
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the notes and warnings that handlers show."""
    shown: list[str] = []
    for kind in ("Info", "Warning"):
        monkeypatch.setattr(gr, kind, lambda message, **settings: shown.append(message))
    return shown


@pytest.mark.parametrize("visitor", [GUEST, USER])
def test_own_ones_hide_shared_ones_which_stay_as_they_are(store: RewardFunctionStore, visitor: Visitor) -> None:
    saved = SavedFunctions(store, visitor)
    assert reward_functions.choices(saved) == [("calm · shared", "calm")] and saved.get("calm") == SHARP
    assert saved.save("Calm", COLOURFUL) == "Calm"
    assert reward_functions.choices(saved) == [("Calm", "Calm")] and saved.get("calm") == COLOURFUL
    saved.delete("calm")
    assert saved.get("calm") == store.get("calm") == SHARP


@pytest.mark.parametrize("visitor", [GUEST, USER])
def test_only_administrators_change_shared_ones(store: RewardFunctionStore, visitor: Visitor) -> None:
    saved = SavedFunctions(store, visitor)
    for attempt in (
        lambda: reward_functions.save(saved, "calm", "calm", 0.1, 0.2, 0.3),
        lambda: reward_functions.rename(saved, "calm", "mine"),
        lambda: reward_functions.delete(saved, "calm"),
    ):
        with pytest.raises(gr.Error, match="shared by this deployment, and only an administrator may change it"):
            attempt()
    assert [entry.name for entry in store.list()] == ["calm"] and store.get("calm") == SHARP


def test_administrator_with_an_account_has_own_ones_and_changes_shared_ones(store: RewardFunctionStore) -> None:
    saved = SavedFunctions(store, SPACE_ADMIN)
    saved.save("mine", COLOURFUL)
    saved.save("calm", COLOURFUL, overwrite=True)
    saved.rename("calm", "quiet")
    assert store.get("quiet") == COLOURFUL and store.list(owner=SPACE_ADMIN.id)[0].name == "mine"
    saved.delete("quiet")
    assert store.list() == []


def test_users_do_not_see_each_others(store: RewardFunctionStore) -> None:
    SavedFunctions(store, USER).save("secret", COLOURFUL)
    for visitor in (OTHER_USER, GUEST, SPACE_ADMIN, LOCAL_ADMIN):
        saved = SavedFunctions(store, visitor)
        assert saved.weights() == {"calm": {"sharpness": 1.0}}
        with pytest.raises(StoreError, match="no reward function"):
            saved.get("secret")


def test_guests_ones_are_in_the_browser_only(store: RewardFunctionStore) -> None:
    saved = SavedFunctions(store, GUEST)
    assert reward_functions.save(saved, None, " mine ", 0.25, 0.0, 1.0)["value"] == "mine"
    content = json.loads(json.dumps(reward_functions.browser_update(saved)))
    again = SavedFunctions(store, GUEST, content)
    assert reward_functions.load(again, "mine") == [0.25, 0.0, 1.0, "mine"]
    assert reward_functions.rename(again, "mine", "ours")["value"] == "ours"
    assert set(again.weights()) == {"ours", "calm"}
    reward_functions.delete(again, "ours")
    assert reward_functions.browser_update(again) == {}
    assert [entry.name for entry in store.list()] == ["calm"] and store.list(owner=GUEST.id) == []


def test_other_visitors_browsers_are_not_changed(store: RewardFunctionStore) -> None:
    content = {"from earlier": {"colour": 1.0}}
    for visitor in (USER, LOCAL_ADMIN, SPACE_ADMIN):
        saved = SavedFunctions(store, visitor, content)
        assert "from earlier" not in saved.weights()
        assert reward_functions.browser_update(saved) == gr.skip()


@pytest.mark.parametrize("name", ["", "x" * 200, "a\x00b", "\u202eabc"])
def test_guests_names_are_validated(store: RewardFunctionStore, name: str) -> None:
    saved = SavedFunctions(store, GUEST, {"old": {"colour": 1.0}})
    for attempt in (
        lambda: reward_functions.save(saved, None, name, 1.0, 1.0, 1.0),
        lambda: reward_functions.rename(saved, "old", name),
    ):
        with pytest.raises(gr.Error, match="name"):
            attempt()


def test_guests_names_are_unique_and_limited(store: RewardFunctionStore) -> None:
    browser = BrowserStore(None)
    for number in range(MAX_IN_BROWSER):
        browser.save(f"n{number}", SHARP)
    with pytest.raises(StoreError, match="50 saved reward functions"):
        browser.save("one more", SHARP)
    with pytest.raises(StoreError, match="already exists"):
        browser.save("N1", SHARP)
    with pytest.raises(StoreError, match="already exists"):
        browser.rename("n1", "N2")
    assert browser.save("N1", COLOURFUL, overwrite=True) == "N1" and browser.rename("n1", "n1") == "n1"
    assert len(browser.names()) == MAX_IN_BROWSER and browser.get("n1") == COLOURFUL


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("no object", []),
        ([1, 2], []),
        ({"ok": {"colour": 1}, "bad": {"beauty": 1}, "\u202e": {"colour": 1}}, ["ok"]),
        ({"ok": {"colour": 1}, "worse": {"colour": float("nan")}, "text": 7, "": {"colour": 1}}, ["ok"]),
        ({"ok": {"colour": 1}, "OK": {"colour": 0.5}}, ["ok"]),
        ({f"n{number}": {"colour": 1} for number in range(10_000)}, sorted(f"n{n}" for n in range(MAX_IN_BROWSER))),
    ],
)
def test_damaged_browser_data_is_ignored_with_a_message(
    store: RewardFunctionStore, messages: list[str], content: Any, kept: list[str]
) -> None:
    saved = SavedFunctions(store, GUEST, content)
    assert [name for _, name in reward_functions.choices(saved)] == [*kept, "calm"]
    assert "in this browser could not be read" in messages[0]


def test_damaged_database_leaves_the_browsers_ones(tmp_path: Path, messages: list[str]) -> None:
    (tmp_path / "bad.sqlite3").write_bytes(b"no database" * 100)
    damaged = RewardFunctionStore(f"sqlite:///{tmp_path / 'bad.sqlite3'}")
    saved = SavedFunctions(damaged, GUEST, {"mine": {"colour": 1.0}})
    assert reward_functions.choices(saved) == [("mine", "mine")]
    assert "damaged" in messages[0]
    assert saved.get("mine") == RewardFunction({"colour": 1.0})


@pytest.mark.parametrize(
    ("visitor", "mode", "note"),
    [
        (GUEST, "space", "Saved in this browser. Sign in to keep them in your account."),
        (GUEST, "link", "Saved in this browser."),
        (USER, "space", "Saved in your account."),
        (LOCAL_ADMIN, "local", ""),
        (LOCAL_ADMIN, "link", "Saved in this deployment. Everyone can load them."),
    ],
)
def test_note_names_the_place(visitor: Visitor, mode: str, note: str) -> None:
    assert reward_functions.storage_note(visitor, mode) == note
