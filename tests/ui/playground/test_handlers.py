"""Tests of the Playground's handlers: model selection, requests, downloads, reports and saved reward functions."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from access.roles import LOCAL_ADMIN, Role
from inference.availability import unavailable
from inference.registry import MODELS
from inference.types import SKILLS, Request
from recipes import read_recipe
from rewards import REWARDS, RewardFunction
from storage.reward_functions import RewardFunctionStore
from ui.playground import reward_functions
from ui.playground import tab as playground
from ui.playground.compare import Comparison, compare
from ui.playground.grid import GRID_HTML, grid_snapshot
from ui.playground.link import PlaygroundSettings
from ui.playground.models import VisitorModels
from ui.playground.picker import check_models, choices
from ui.playground.report import report
from ui.playground.saved_functions import SavedFunctions

HERE = Path(playground.__file__).parent
HOSTILE = '<img src=x onerror="alert(1)">'


@pytest.fixture
def saved(tmp_path: Path) -> SavedFunctions:
    """Return the reward functions of the administrator on localhost."""
    return SavedFunctions(RewardFunctionStore(f"sqlite:///{tmp_path / 'store.sqlite3'}"), LOCAL_ADMIN)


@pytest.fixture
def models(fake_models: None) -> VisitorModels:
    """Return the models as the administrator may use them."""
    return VisitorModels(dict(MODELS), Role.ADMIN, "deployment")


@pytest.fixture
def session(photo: np.ndarray, tmp_path: Path, fake_models: None) -> playground.Session:
    """Create a session that displays a finished comparison of the model one."""
    path = tmp_path / "my photo.png"
    Image.fromarray(photo).save(path)
    *_, last = compare(["one"], Request(photo, "recipe", n=3, seed=5), threading.Event(), interval=0.0)
    settings = PlaygroundSettings(models=("one",), n=3, seed=5)
    return playground.Session("run", threading.Event(), str(path), settings, last.without_pictures())


def inputs(**changes: object) -> dict[str, object]:
    """Values of the Playground's inputs: the defaults without a photo, and the changes."""
    settings = asdict(PlaygroundSettings()) | {"models": ["one"], "upload": None, "reasoning": False, "key": ""}
    return settings | changes


class ClickEvent(gr.EventData):
    """The event of a click, with its data."""

    def __init__(self, data: object) -> None:
        super().__init__(None, data)


@pytest.mark.parametrize("template", ["grid.html", "picker.html"])
def test_templates_have_no_placeholders(template: str) -> None:
    """Gradio would execute `${...}` in a value as JavaScript, and Handlebars would compile `{{...}}`."""
    text = (HERE / template).read_text()
    assert not any(mark in text for mark in ("{{", "${", "`"))


def test_grid_template_is_read_unchanged() -> None:
    assert (HERE / "grid.html").read_text() == GRID_HTML


def test_picker_lists_every_model_and_why_it_is_unavailable(models: VisitorModels) -> None:
    offered = {choice["name"]: choice for choice in choices(models)}
    assert list(offered) == list(MODELS)
    assert offered["one"]["reason"] == ""
    assert all(choice["reason"] == (unavailable(MODELS[name]) or "") for name, choice in offered.items())


@pytest.mark.parametrize("names", [None, [], "one", [1], ["gpt"], [HOSTILE], ["moondream-tiny"] * 0, list("abcde")])
def test_invalid_model_selection_raises_an_escaped_message(names: object) -> None:
    with pytest.raises(gr.Error) as raised:
        check_models(names, MODELS)
    assert "<" not in raised.value.message


@pytest.mark.usefixtures("fake_models")
def test_selected_models_are_deduplicated_and_ordered() -> None:
    assert check_models(["two", "one", "two"], MODELS) == ["one", "two"]


@pytest.mark.parametrize("skill", SKILLS)
def test_prompt_length_and_reasoning_follow_the_skill(skill: str) -> None:
    prompt, length, reasoning = playground.skill_changed(skill, "")
    assert reasoning["visible"] == (skill == "query")
    assert prompt["interactive"] == (SKILLS[skill].prompt != "none")
    assert prompt["value"] == (SKILLS[skill].default_prompt if SKILLS[skill].prompt == "required" else "")
    assert length["visible"] == (skill == "caption")


def test_custom_prompt_survives_a_change_of_skill() -> None:
    assert playground.skill_changed("detect", "my cup")[0]["value"] == "my cup"
    assert (
        playground.skill_changed("detect", SKILLS["point"].default_prompt)[0]["value"]
        == SKILLS["detect"].default_prompt
    )


@pytest.mark.parametrize(
    ("changes", "message"),
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
def test_invalid_input_raises_an_escaped_message(photo: np.ndarray, changes: dict[str, object], message: str) -> None:
    values = {"photo": photo} | changes
    with pytest.raises(gr.Error, match=message) as raised:
        playground.build_request(values.pop("photo"), inputs(**values))  # type: ignore[arg-type]
    assert "<img" not in raised.value.message


def test_sample_is_selected_by_file_name_only() -> None:
    assert Path(playground.sample_selected(ClickEvent({"file": "chelsea.jpg"}))).name == "chelsea.jpg"
    for invalid in ({"file": "../../etc/passwd"}, {"file": None}, {}, None, "chelsea.jpg"):
        with pytest.raises(gr.Error):
            playground.sample_selected(ClickEvent(invalid))


def test_download_has_the_candidates_recipe(session: playground.Session) -> None:
    candidate = session.comparison.columns[0].candidates[1]
    path = playground.render_full_size(session, ClickEvent({"model": "one", "index": 1}))
    assert read_recipe(path) == candidate.recipe
    for invalid in ({"model": "two", "index": 1}, {"model": "one", "index": 7}, None, {}):
        with pytest.raises(gr.Error):
            playground.render_full_size(session, ClickEvent(invalid))


def test_unwritable_download_raises_a_message(
    session: playground.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("ui.files.get_upload_folder", lambda: str(tmp_path / "file"))
    for attempt in (
        lambda: playground.render_full_size(session, ClickEvent({"model": "one", "index": 1})),
        lambda: playground.write_report(session, 1.0, 1.0, 1.0),
        lambda: reward_functions.export_file("mine", 1.0, 1.0, 1.0),
    ):
        with pytest.raises(gr.Error, match="could not be written"):
            attempt()


def test_report_has_settings_answers_and_totals(session: playground.Session) -> None:
    function = RewardFunction({"sharpness": 0.5, "colour": 1.0})
    result = json.loads(json.dumps(report(session.settings, session.comparison, function)))
    reported, candidates = result["models"][0]["candidates"], session.comparison.columns[0].candidates
    assert result["settings"]["seed"] == 5 and result["reward"] == {"sharpness": 0.5, "colour": 1.0}
    assert [entry["recipe"] for entry in reported] == [str(candidate.recipe) for candidate in candidates]
    assert [entry["total"] for entry in reported] == [function.total(candidate.scores) for candidate in candidates]


def test_report_with_all_sliders_at_zero_has_no_totals(session: playground.Session) -> None:
    result = json.loads(Path(playground.write_report(session, *[0.0] * len(REWARDS))).read_text())
    assert result["reward"] is None and result["models"][0]["mean_total"] is None


def test_grid_snapshot_is_plain_json(session: playground.Session) -> None:
    snapshot = grid_snapshot(session.comparison, "run", {"src": "", "width": 4, "height": 3})
    assert json.loads(json.dumps(snapshot)) == snapshot
    assert snapshot["rewards"] == list(REWARDS)


def test_closing_the_page_stops_its_run(session: playground.Session, models: VisitorModels) -> None:
    """Gradio closes the generator when the page is closed or reloaded."""
    run = playground.run(inputs(upload=session.photo, models=["slow"], n=2), models)
    _, started, *_ = next(run)
    assert not started.cancel.is_set()
    run.close()  # type: ignore[attr-defined]
    assert started.cancel.is_set()


def test_cancel_sets_the_event_of_the_session(session: playground.Session) -> None:
    playground.cancel(session)
    assert session.cancel.is_set()


def test_session_without_a_comparison_is_refused() -> None:
    """A request with another visitor's session hash arrives without that visitor's session."""
    for attempt in (
        lambda: playground.cancel(None),
        lambda: playground.render_full_size(None, ClickEvent({"model": "one", "index": 1})),
        lambda: playground.write_report(None, *[1.0] * len(REWARDS)),
    ):
        with pytest.raises(gr.Error, match="no comparison in this page. Run one first") as raised:
            attempt()
        assert raised.value.title in ("Cancel", "Download", "Report")


def test_comparison_without_columns_is_an_empty_grid() -> None:
    assert grid_snapshot(Comparison("recipe"), "run", {})["columns"] == []


# ── Saved reward functions ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the notes and warnings that handlers show."""
    shown: list[str] = []
    for kind in ("Info", "Warning"):
        monkeypatch.setattr(gr, kind, lambda message, **settings: shown.append(message))
    return shown


def test_reward_function_is_saved_loaded_renamed_and_deleted(saved: SavedFunctions, messages: list[str]) -> None:
    weights = (0.25, 0.0, 1.0)
    assert reward_functions.save(saved, None, " mine ", *weights)["value"] == "mine"
    assert reward_functions.load(saved, "mine") == [*weights, "mine"]
    with pytest.raises(gr.Error, match="already"):
        reward_functions.save(saved, None, "Mine", 1.0, 1.0, 1.0)
    reward_functions.save(saved, "mine", "mine", 1.0, 1.0, 1.0)
    assert reward_functions.load(saved, "mine")[:3] == [1.0, 1.0, 1.0]
    assert reward_functions.rename(saved, "mine", "ours")["choices"] == [("ours", "ours")]
    assert reward_functions.delete(saved, "ours")[0]["choices"] == []
    for action in (lambda: reward_functions.load(saved, "ours"), lambda: reward_functions.delete(saved, "ours")):
        with pytest.raises(gr.Error, match="no reward function"):
            action()


@pytest.mark.parametrize("name", ["", None, "x" * 200, "a\x00b"])
def test_invalid_name_is_refused(saved: SavedFunctions, name: str | None) -> None:
    with pytest.raises(gr.Error, match=r"[Nn]ame"):
        reward_functions.save(saved, None, name, 1.0, 1.0, 1.0)


def test_store_messages_are_escaped(saved: SavedFunctions) -> None:
    with pytest.raises(gr.Error) as raised:
        reward_functions.load(saved, HOSTILE)
    assert "&lt;img" in raised.value.message and "<img" not in raised.value.message


def test_sliders_at_zero_cannot_be_saved_or_exported(saved: SavedFunctions) -> None:
    for attempt in (
        lambda: reward_functions.save(saved, None, "x", 0, 0, 0),
        lambda: reward_functions.export_file("x", 0, 0, 0),
    ):
        with pytest.raises(gr.Error, match="zero"):
            attempt()


def test_damaged_store_shows_a_warning_and_no_names(tmp_path: Path, messages: list[str]) -> None:
    (tmp_path / "bad.sqlite3").write_bytes(b"no database" * 100)
    damaged = SavedFunctions(RewardFunctionStore(f"sqlite:///{tmp_path / 'bad.sqlite3'}"), LOCAL_ADMIN)
    assert reward_functions.choices(damaged) == []
    assert "damaged" in messages[0]
    with pytest.raises(gr.Error, match="damaged"):
        reward_functions.save(damaged, None, "x", 1.0, 1.0, 1.0)


def test_exported_file_can_be_imported() -> None:
    path = reward_functions.export_file("../../my file", 0.5, 0.0, 0.25)
    assert json.loads(Path(path).read_text()) == {"sharpness": 0.5, "creativity": 0.25}
    assert reward_functions.import_file(path)[:3] == [0.5, 0.0, 0.25]
    assert ".." not in Path(path).name


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"beauty": 1}', b'{"sharpness": NaN}', b"{" * 50_000])
def test_file_without_a_reward_function_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(gr.Error) as raised:
        reward_functions.import_file(str(tmp_path / "x.json"))
    assert "Traceback" not in raised.value.message
