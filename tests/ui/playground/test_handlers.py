"""The page's handlers as plain functions: choices, requests, downloads, reports, saved reward functions."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from inference.registry import MODELS
from inference.types import SKILLS, Request
from recipes import read_recipe
from rewards import REWARDS, RewardFunction
from storage.reward_functions import RewardFunctionStore
from ui.playground import reward_functions
from ui.playground import tab as playground
from ui.playground.compare import Comparison, compare
from ui.playground.grid import GRID_HTML, grid_value
from ui.playground.link import PlaygroundSettings
from ui.playground.picker import check_choice, choices
from ui.playground.report import report

HERE = Path(playground.__file__).parent
HOSTILE = '<img src=x onerror="alert(1)">'


@pytest.fixture
def store(tmp_path: Path) -> RewardFunctionStore:
    return RewardFunctionStore(f"sqlite:///{tmp_path / 'store.sqlite3'}")


@pytest.fixture
def session(photo: np.ndarray, tmp_path: Path, fakes: None) -> playground.Session:
    """A session that has just run the model one."""
    path = tmp_path / "my photo.png"
    Image.fromarray(photo).save(path)
    *_, last = compare(["one"], Request(photo, "recipe", n=3, seed=5), threading.Event(), every=0.0)
    setup = PlaygroundSettings(models=("one",), n=3, seed=5)
    return playground.Session("run", threading.Event(), str(path), setup, last.without_pictures())


class Clicked(gr.EventData):
    def __init__(self, data: object) -> None:
        super().__init__(None, data)


@pytest.mark.parametrize("template", ["grid.html", "picker.html"])
def test_templates_have_no_place_for_values(template: str) -> None:
    """Gradio would run `${...}` in a value as JavaScript, and Handlebars would compile it."""
    text = (HERE / template).read_text()
    assert not any(mark in text for mark in ("{{", "${", "`"))


def test_the_grid_template_is_the_file() -> None:
    assert (HERE / "grid.html").read_text() == GRID_HTML


@pytest.mark.usefixtures("fakes")
def test_the_picker_offers_every_model_with_its_reason() -> None:
    offered = {choice["name"]: choice for choice in choices()}
    assert list(offered) == list(MODELS)
    assert offered["one"]["reason"] == ""
    assert all(choice["reason"] == (MODELS[name].unavailable() or "") for name, choice in offered.items())


@pytest.mark.parametrize("names", [None, [], "one", [1], ["gpt"], [HOSTILE], ["moondream-tiny"] * 0, list("abcde")])
def test_a_wrong_choice_of_models_is_refused_in_words(names: object) -> None:
    with pytest.raises(gr.Error) as refused:
        check_choice(names)
    assert "<" not in refused.value.message


@pytest.mark.usefixtures("fakes")
def test_models_are_asked_once_and_in_order() -> None:
    assert check_choice(["two", "one", "two"]) == ["one", "two"]


@pytest.mark.parametrize("skill", SKILLS)
def test_the_prompt_follows_the_skill(skill: str) -> None:
    prompt, length, reasoning = playground.choose_skill(skill, "")
    assert reasoning["visible"] == (skill == "query")
    assert prompt["interactive"] == (SKILLS[skill].prompt != "none")
    assert prompt["value"] == (SKILLS[skill].default_prompt if SKILLS[skill].prompt == "required" else "")
    assert length["visible"] == (skill == "caption")


def test_a_persons_own_prompt_survives_a_change_of_skill() -> None:
    assert playground.choose_skill("detect", "my cup")[0]["value"] == "my cup"
    assert (
        playground.choose_skill("detect", SKILLS["point"].default_prompt)[0]["value"] == SKILLS["detect"].default_prompt
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "x" * 100_000}, "2,000"),
        ({"skill": "query", "prompt": "\x00\u202e"}, "needs a prompt"),
        ({"n": 9}, "1 to 8"),
        ({"temperature": float("nan")}, "0 to 2"),
        ({"seed": -1}, "seed"),
        ({"skill": HOSTILE}, "skill"),
        ({"photo": None}, "photo"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words(photo: np.ndarray, changes: dict[str, object], words: str) -> None:
    asked = {"photo": photo, "skill": "recipe", "prompt": "", "length": "normal", "n": 2, "temperature": 1.0, "seed": 1}
    with pytest.raises(gr.Error, match=words) as refused:
        playground.ask(**(asked | changes))  # type: ignore[arg-type]
    assert "<img" not in refused.value.message


def test_a_sample_is_chosen_by_its_name_only() -> None:
    assert Path(playground.choose_sample(Clicked({"file": "chelsea.jpg"}))).name == "chelsea.jpg"
    for wrong in ({"file": "../../etc/passwd"}, {"file": None}, {}, None, "chelsea.jpg"):
        with pytest.raises(gr.Error):
            playground.choose_sample(Clicked(wrong))


def test_the_download_is_the_card_in_full_size(session: playground.Session) -> None:
    card = session.comparison.columns[0].cards[1]
    path = playground.full_picture(session, Clicked({"model": "one", "index": 1}))
    assert read_recipe(path) == card.recipe
    for wrong in ({"model": "two", "index": 1}, {"model": "one", "index": 7}, None, {}):
        with pytest.raises(gr.Error):
            playground.full_picture(session, Clicked(wrong))
    with pytest.raises(gr.Error):
        playground.full_picture(None, Clicked({"model": "one", "index": 1}))


def test_a_download_for_which_there_is_no_room_is_refused_in_words(
    session: playground.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("ui.files.get_upload_folder", lambda: str(tmp_path / "file"))
    for attempt in (
        lambda: playground.full_picture(session, Clicked({"model": "one", "index": 1})),
        lambda: playground.json_report(session, 1.0, 1.0, 1.0),
        lambda: reward_functions.write_file("mine", 1.0, 1.0, 1.0),
    ):
        with pytest.raises(gr.Error, match="could not be written"):
            attempt()


def test_the_report_tells_settings_answers_and_totals(session: playground.Session) -> None:
    function = RewardFunction({"sharpness": 0.5, "colour": 1.0})
    told = json.loads(json.dumps(report(session.setup, session.comparison, function)))
    cards = session.comparison.columns[0].cards
    assert told["settings"]["seed"] == 5 and told["reward"] == {"sharpness": 0.5, "colour": 1.0}
    assert [one["recipe"] for one in told["models"][0]["candidates"]] == [str(card.recipe) for card in cards]
    assert [one["total"] for one in told["models"][0]["candidates"]] == [function.total(card.scores) for card in cards]


def test_a_report_with_all_sliders_at_zero_has_no_totals(session: playground.Session) -> None:
    told = json.loads(Path(playground.json_report(session, *[0.0] * len(REWARDS))).read_text())
    assert told["reward"] is None and told["models"][0]["mean_total"] is None
    with pytest.raises(gr.Error):
        playground.json_report(None, *[1.0] * len(REWARDS))


def test_the_grids_value_is_plain_json(session: playground.Session) -> None:
    value = grid_value(session.comparison, "run", {"src": "", "width": 4, "height": 3})
    assert json.loads(json.dumps(value)) == value
    assert value["rewards"] == list(REWARDS)


def test_leaving_the_page_stops_its_run(session: playground.Session) -> None:
    """Gradio closes the generator when a tab is closed or reloaded."""
    run = playground.run(session.photo, ["slow"], "recipe", "", "normal", 2, 1.0, 1, "")
    _, begun, *_ = next(run)
    assert not begun.cancel.is_set()
    run.close()  # type: ignore[attr-defined]
    assert begun.cancel.is_set()


def test_cancel_sets_the_sessions_event(session: playground.Session) -> None:
    playground.cancel(None)
    playground.cancel(session)
    assert session.cancel.is_set()


def test_a_comparison_without_columns_is_an_empty_grid() -> None:
    assert grid_value(Comparison("recipe"), "run", {})["columns"] == []


# ── Saved reward functions ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the page says beside the handlers' results."""
    said: list[str] = []
    for kind in ("Info", "Warning"):
        monkeypatch.setattr(gr, kind, lambda message, **settings: said.append(message))
    return said


def test_saving_loading_renaming_and_deleting(store: RewardFunctionStore, quiet: list[str]) -> None:
    weights = (0.25, 0.0, 1.0)
    assert reward_functions.save(store, None, " mine ", *weights)["value"] == "mine"
    assert reward_functions.load(store, "mine") == [*weights, "mine"]
    with pytest.raises(gr.Error, match="already"):
        reward_functions.save(store, None, "Mine", 1.0, 1.0, 1.0)
    reward_functions.save(store, "mine", "mine", 1.0, 1.0, 1.0)
    assert reward_functions.load(store, "mine")[:3] == [1.0, 1.0, 1.0]
    assert reward_functions.rename(store, "mine", "ours")["choices"] == ["ours"]
    assert reward_functions.delete(store, "ours")[0]["choices"] == []
    for lost in (lambda: reward_functions.load(store, "ours"), lambda: reward_functions.delete(store, "ours")):
        with pytest.raises(gr.Error, match="no reward function"):
            lost()


@pytest.mark.parametrize("name", ["", None, "x" * 200, "a\x00b"])
def test_a_name_that_cannot_be_kept_is_refused(store: RewardFunctionStore, name: str | None) -> None:
    with pytest.raises(gr.Error, match=r"[Nn]ame"):
        reward_functions.save(store, None, name, 1.0, 1.0, 1.0)


def test_what_the_store_says_is_escaped(store: RewardFunctionStore) -> None:
    with pytest.raises(gr.Error) as refused:
        reward_functions.load(store, HOSTILE)
    assert "&lt;img" in refused.value.message and "<img" not in refused.value.message


def test_sliders_at_zero_cannot_be_saved_or_exported(store: RewardFunctionStore) -> None:
    for attempt in (
        lambda: reward_functions.save(store, None, "x", 0, 0, 0),
        lambda: reward_functions.write_file("x", 0, 0, 0),
    ):
        with pytest.raises(gr.Error, match="zero"):
            attempt()


def test_a_damaged_store_leaves_the_page_alone(tmp_path: Path, quiet: list[str]) -> None:
    (tmp_path / "bad.sqlite3").write_bytes(b"no database" * 100)
    damaged = RewardFunctionStore(f"sqlite:///{tmp_path / 'bad.sqlite3'}")
    assert reward_functions.names(damaged) == []
    assert "damaged" in quiet[0]
    with pytest.raises(gr.Error, match="damaged"):
        reward_functions.save(damaged, None, "x", 1.0, 1.0, 1.0)


def test_a_file_there_and_back() -> None:
    path = reward_functions.write_file("../../my file", 0.5, 0.0, 0.25)
    assert json.loads(Path(path).read_text()) == {"sharpness": 0.5, "creativity": 0.25}
    assert reward_functions.read_file(path)[:3] == [0.5, 0.0, 0.25]
    assert ".." not in Path(path).name


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"beauty": 1}', b'{"sharpness": NaN}', b"{" * 50_000])
def test_a_file_without_a_reward_function_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(gr.Error) as refused:
        reward_functions.read_file(str(tmp_path / "x.json"))
    assert "Traceback" not in refused.value.message
