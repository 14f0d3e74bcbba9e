"""Tests of the panel of choices without a browser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from access.roles import LOCAL_ADMIN, Role, Visitor
from recipes import Recipe
from rewards import EQUAL_WEIGHTS, RewardFunction
from storage.database import Database
from storage.preferences import JudgedCandidate, Preference, PreferenceStore
from tests.support.runs import FAKE
from training.preferences.export import MIN_FOR_DPO, read_folder
from ui.playground.compare import Candidate, Column, Comparison
from ui.playground.preference_panel import (
    NO_MORE_PAIRS,
    NO_PAIR,
    ComparedPhoto,
    PairState,
    act,
    prefer,
    slider_values,
    start_dpo,
)
from ui.playground.samples import SAMPLES
from ui.services import AppServices

SAMPLE = next(iter(SAMPLES))
GUEST = Visitor(Role.GUEST, "guest:abc")


def candidate(index: int, exposure: int, *scores: float) -> Candidate:
    names = ("sharpness", "colour", "creativity")
    return Candidate(index, done=True, recipe=Recipe(exposure=exposure), scores=dict(zip(names, scores, strict=True)))


CANDIDATES = (candidate(0, 10, 0.9, 0.1, 0.5), candidate(1, 20, 0.1, 0.8, 0.5), candidate(2, 10, 0.9, 0.1, 0.5))
COMPARED = ComparedPhoto(
    "run", str(SAMPLES[SAMPLE].path), SAMPLE, Comparison("recipe", (Column("one", "One", candidates=CANDIDATES),))
)


@pytest.fixture
def services(tmp_path: Path) -> Any:
    """Return services with only a store of choices."""
    return SimpleNamespace(preferences=PreferenceStore(Database(f"sqlite:///{tmp_path / 'x.sqlite3'}")))


def click(services: Any, action: str, state: PairState, visitor: Visitor = GUEST, **details: Any) -> Any:
    """Do an action of the panel."""
    return act(services, visitor, {"action": action, **details}, COMPARED, state, EQUAL_WEIGHTS)


def test_equal_recipes_are_shown_once_and_pairs_once(services: Any) -> None:
    value, state, _ = click(services, "open", PairState())
    assert {value["pair"]["left"], value["pair"]["right"]} == {"one/0", "one/1"}
    value, state, _ = click(services, "choose", state, **value["pair"], outcome="left", keep=True)
    assert value["pair"] is None and value["error"] == NO_MORE_PAIRS and value["choices"] == 1
    saved = services.preferences.list(GUEST.id, photos=True)[0]
    assert (saved.outcome, saved.sample, saved.photo, saved.start) == ("left", SAMPLE, None, EQUAL_WEIGHTS)
    value = act(services, GUEST, {"action": "open"}, None, state, EQUAL_WEIGHTS)[0]
    assert value["error"] == NO_PAIR
    assert click(services, "delete", state, visitor=LOCAL_ADMIN)[0]["choices"] == 0
    assert len(services.preferences.list(GUEST.id)) == 1  # only one's own choices


def test_photo_is_kept_only_if_its_owner_agrees(services: Any) -> None:
    own = replace(COMPARED, sample="")
    pair = {"left": "one/0", "right": "one/1", "outcome": "left"}
    for keep in (False, True):
        act(services, GUEST, {"action": "choose", "keep": keep, **pair}, own, PairState("run"), EQUAL_WEIGHTS)
    photos = [item.photo for item in services.preferences.list(GUEST.id, photos=True)]
    assert photos[0] is None and photos[1] is not None and photos[1][:2] == b"\xff\xd8"


def test_prefer_is_a_choice_against_the_first_card(services: Any) -> None:
    for index in (0, 1):
        prefer(services, GUEST, {"model": "one", "index": index}, COMPARED, RewardFunction({"sharpness": 1.0}))
        saved = services.preferences.list(GUEST.id)[-1]
        preferred, other = (saved.left, saved.right) if saved.outcome == "left" else (saved.right, saved.left)
        assert preferred.recipe == str(CANDIDATES[index].recipe) and other.recipe == str(CANDIDATES[1 - index].recipe)
    with pytest.raises(gr.Error, match="no two different edits"):
        prefer(services, GUEST, {"model": "one", "index": 9}, COMPARED, EQUAL_WEIGHTS)


def test_apply_and_reset_return_slider_values(services: Any) -> None:
    pair = {"left": "one/0", "right": "one/1"}
    for _ in range(4):
        value, state, sliders = click(services, "choose", PairState("run"), **pair, outcome="left")
        assert sliders is None
    assert value["lead"] == "Agrees with 4 of 4 of your choices (before: 4)."
    fitted = click(services, "apply", state)[2]
    assert slider_values(fitted)[0] == 1.0 > slider_values(fitted)[1]
    assert click(services, "reset", state)[2] == EQUAL_WEIGHTS


def test_unusable_database_is_an_error_in_the_panel(services: Any) -> None:
    value = click(services, "choose", PairState("run"), Visitor(), left="one/0", right="one/1", outcome="left")[0]
    assert "blocks cookies" in value["error"] and value["choices"] == 0


def test_dpo_is_offered_from_fifty_choices_on(tmp_path: Path) -> None:
    built = AppServices.build(tmp_path, f"sqlite:///{tmp_path / 'x.sqlite3'}", command=FAKE)
    left, right = (JudgedCandidate("one", str(Recipe(exposure=level)), {"sharpness": 0.5}) for level in (10, 20))
    own = Preference(left, right, "left", EQUAL_WEIGHTS)  # its photo is not kept
    for choice in [own] + [replace(own, sample=SAMPLE)] * (MIN_FOR_DPO - 1):
        built.preferences.add(choice, "")
    state = PairState("run")
    assert not act(built, LOCAL_ADMIN, {"action": "open"}, COMPARED, state, EQUAL_WEIGHTS)[0]["dpo"]
    with pytest.raises(gr.Error, match="you have 49"):
        start_dpo(built, LOCAL_ADMIN, EQUAL_WEIGHTS)
    built.preferences.add(replace(own, sample=SAMPLE), "")
    assert act(built, LOCAL_ADMIN, {"action": "open"}, COMPARED, state, EQUAL_WEIGHTS)[0]["dpo"]
    with pytest.raises(gr.Error):
        start_dpo(built, GUEST, EQUAL_WEIGHTS)  # has no choices
    config = start_dpo(built, LOCAL_ADMIN, EQUAL_WEIGHTS).config()
    assert (config.method, config.base, config.reward) == ("dpo", "moondream-tiny", dict(EQUAL_WEIGHTS.weights))
    assert len(read_folder(Path(config.photos))[0]) == MIN_FOR_DPO
    assert Path(config.photos).parent == tmp_path / "uploads"
    built.close()
