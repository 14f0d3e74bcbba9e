"""Handlers and snapshots of the Evaluate tab, its endpoints, and who may do what."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from pydantic import SecretStr

from access.control import AccessControl
from access.permissions import AccessDenied
from access.roles import Role, Visitor
from inference.registry import MODELS
from recipes import Recipe, save_picture
from rewards import REWARDS
from tests.support.fake_backend import fake_spec
from tests.support.finetune_page import event
from tests.support.runs import FAKE, until
from training.data import uploads
from training.evaluations import runner
from training.evaluations.evaluation import Evaluation
from training.evaluations.queue import RESTARTED, EvaluationQueue
from training.runs.run import RunError
from ui.api import evaluations as api
from ui.evaluate import tab, view
from ui.evaluate.form import HELD_OUT, estimate_text
from ui.evaluate.permissions import MAX_GUEST_PHOTOS
from ui.finetune.form import HUB_DATASET, UPLOADED
from ui.playground.models import visitor_models
from ui.services import AppServices
from usage.prices import Prices

HERE = Path(tab.__file__).parent
ADMIN = Visitor(Role.ADMIN, "", "Administrator", "a")
ADA, BOB = Visitor(Role.USER, "hf:1", "ada", "b"), Visitor(Role.USER, "hf:2", "bob", "c")
GUEST = Visitor(Role.GUEST, "guest:1111", "", "1111")
EQUAL = [1.0] * len(REWARDS)
FORM: dict[str, Any] = {
    "models": ["one", "two"],
    "temperatures": ["1"],
    "photo_source": UPLOADED,
    "files": None,
    "dataset": "",
    "max_photos": 20,
    "candidates": 2,
    "seed": 1,
    "skill": "recipe",
    "prompt": "",
    "key": "",
    "name": "",
}


@pytest.fixture
def services(tmp_path: Path, fake_models: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[AppServices]:
    """Services of a Space that allows guests to train; references are scored with few recipes."""
    few = runner.score_each

    def score_few(photo: np.ndarray, recipes: list[Recipe]) -> np.ndarray:
        return np.resize(few(photo, recipes[:3]), (len(recipes), len(REWARDS)))

    monkeypatch.setattr(runner, "score_each", score_few)
    access = AccessControl("space", space="acme/playground", guest_runs=True)
    services = AppServices.build(tmp_path / "data", f"sqlite:///{tmp_path / 'store.sqlite3'}", FAKE, access=access)
    yield services
    for evaluation in services.evaluations.list():
        if not evaluation.status().finished:
            services.evaluation_queue.cancel(evaluation)
    services.evaluation_queue.join(60)


@pytest.fixture
def files(tmp_path: Path, photo: np.ndarray) -> list[str]:
    """Paths of two uploaded photos."""
    paths = [tmp_path / "first photo.png", tmp_path / "second.png"]
    save_picture(photo[::2, ::2].copy(), Recipe(), paths[0])
    save_picture(photo[::-2, ::2].copy(), Recipe(), paths[1])
    return [str(path) for path in paths]


def start(services: AppServices, visitor: Visitor = ADA, weights: list[float] = EQUAL, **changes: Any) -> Evaluation:
    """Submit the form and wait until the evaluation has ended."""
    evaluation = services.evaluations.get(tab.start(services, visitor, FORM | changes, weights))
    until(lambda: evaluation.status().finished)
    services.evaluation_queue.join(60)
    return evaluation


def refreshed(services: AppServices, visitor: Visitor = ADA, weights: list[float] = EQUAL, **options: Any) -> Any:
    """Return the value of the evaluation's view."""
    return tab.refresh(services, visitor, options.pop("selected", None), None, options, True, weights)[0]


@pytest.mark.parametrize("name", ["evaluation", "photos", "list"])
def test_templates_have_no_placeholders_and_scripts_insert_no_html(name: str) -> None:
    text = (HERE / f"{name}.html").read_text()
    assert not any(mark in text for mark in ("{{", "${", "`"))
    script = (HERE / f"{name}.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)


def test_an_evaluation_of_uploaded_photos(services: AppServices, files: list[str]) -> None:
    evaluation = start(services, files=files, name=" Mine ", temperatures=["0.5", "1"], models=["one", "prose"])
    value = refreshed(services)
    assert (value["name"], value["state"], value["progress"]) == ("Mine", "done", None)
    assert [row["label"] for row in value["table"]["rows"]] == [
        "Fake one, T 0.5",
        "Fake one, T 1",
        "Fake prose, T 0.5",
        "Fake prose, T 1",
        "untouched photo",
        "best of 256 recipes",
    ]
    assert "2 own photos" in value["summary"] and set(value["actions"]) == {"rename", "delete", "export"}
    assert list(uploads.uploads_folder(services.runs).glob("*")) == []  # the evaluation has copies
    assert str(services.runs.folder) not in str(value)
    sharp = refreshed(services, weights=[1.0, *([0.0] * (len(REWARDS) - 1))])
    for row in sharp["table"]["rows"]:
        assert row["reward"]["mean"] == pytest.approx(row["parts"][next(iter(REWARDS))])
    photos = view.photos_snapshot(services, ADA, {"evaluation": evaluation.id, "order": "photo"}, None)
    assert photos and [photo["name"] for photo in photos["photos"]] == ["0000-first-photo.png", "0001-second.png"]
    assert all(cell["src"].startswith("data:image/jpeg") for photo in photos["photos"] for cell in photo["cells"])


def test_a_refresh_sends_only_changes_and_nothing_while_the_tab_is_closed(
    services: AppServices, files: list[str]
) -> None:
    start(services, files=files)
    _, listed, state, _ = tab.refresh(services, ADA, None, None, {}, True, EQUAL)
    assert [row["badge"] for row in listed["list"]] == ["Done"]
    assert all(value == gr.skip() for value in tab.refresh(services, ADA, None, state, {}, True, EQUAL)[:3])
    assert tab.refresh(services, ADA, None, state, {}, True, [0.5, 1, 1])[0]["table"]
    assert all(value == gr.skip() for value in tab.refresh(services, ADA, None, None, {}, False, EQUAL)[:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "models"),
        ({"models": ["gone"]}, "no model called"),
        ({"temperatures": ["hot"]}, "Temperatures are numbers"),
        ({"temperatures": ["0", "0.5", "1", "2"]}, "models"),
        ({"photo_source": HUB_DATASET, "dataset": "no name"}, "owner/name"),
        ({"files": []}, "Choose photos"),
        ({"seed": None}, "Fill in: seed"),
        ({"candidates": 9}, "candidates"),
        ({"skill": "segment"}, "cannot segment"),
        ({"models": ["moondream3-preview"]}, "needs a Moondream API key"),
    ],
)
def test_invalid_inputs_are_named(
    changes: dict[str, Any], message: str, services: AppServices, files: list[str]
) -> None:
    with pytest.raises(gr.Error, match=message):
        tab.start(services, ADA, FORM | {"files": files} | changes, EQUAL)
    with pytest.raises(gr.Error, match="All sliders are at zero"):
        tab.start(services, ADA, FORM | {"files": files}, [0.0] * len(REWARDS))
    assert services.evaluations.list() == []


def test_owners_and_administrators_only(services: AppServices, files: list[str]) -> None:
    evaluation = start(services, files=files)
    assert refreshed(services, BOB) is None and refreshed(services, GUEST) is None
    assert refreshed(services, ADMIN)["id"] == evaluation.id
    wanted = {"evaluation": evaluation.id}
    for action in ("cancel", "resume", "rename", "delete"):
        with pytest.raises(gr.Error, match="Only its owner"):
            tab.act(services, BOB, "", event(action=action, **wanted))
    with pytest.raises(gr.Error, match="Only its owner"):
        tab.download(services, BOB, EQUAL, event(format="csv", **wanted))
    with pytest.raises(gr.Error, match="Only its owner"):
        tab.open_comparison(services, BOB, event(photo=0, model=0, **wanted))
    with pytest.raises(AccessDenied):
        view.photos_snapshot(services, BOB, wanted, None)
    with pytest.raises(gr.Error, match="Only its owner"):
        api.evaluation(services, BOB, evaluation.id)
    with pytest.raises(gr.Error, match="no evaluation"):
        api.evaluation(services, ADA, "../runs")


def test_guests_need_the_permission_and_have_limits(services: AppServices, files: list[str]) -> None:
    with pytest.raises(gr.Error, match=f"at most {MAX_GUEST_PHOTOS} photos"):
        tab.start(services, GUEST, FORM | {"files": files, "max_photos": 51}, EQUAL)
    assert start(services, GUEST, files=files).owner == GUEST.id
    services.access.guest_runs = False
    with pytest.raises(gr.Error, match="Guests cannot evaluate"):
        tab.start(services, GUEST, FORM | {"files": files}, EQUAL)
    with pytest.raises(gr.Error, match="Guests cannot evaluate"):
        api.evaluate(services, GUEST, ["one"])


def test_cancel_resume_rename_and_delete(services: AppServices, files: list[str]) -> None:
    evaluation = services.evaluations.get(tab.start(services, ADA, FORM | {"files": files, "models": ["slow"]}, EQUAL))
    with pytest.raises(gr.Error, match="has not ended"):
        tab.act(services, ADA, "", event(evaluation=evaluation.id, action="delete"))
    until(lambda: evaluation.photos() is not None)
    assert tab.act(services, ADA, "", event(evaluation=evaluation.id, action="cancel")) == evaluation.id
    until(lambda: evaluation.status().finished)
    services.evaluation_queue.join(60)
    value = refreshed(services)
    assert value["state"] == "cancelled" and value["actions"]["resume"] == ""
    services.adapters.models["slow"] = fake_spec("slow")  # answers at once
    tab.act(services, ADA, "", event(evaluation=evaluation.id, action="resume"))
    until(lambda: evaluation.status().state == "done")
    services.evaluation_queue.join(60)
    tab.act(services, ADA, "", event(evaluation=evaluation.id, action="rename", name="<b>New</b>"))
    assert refreshed(services)["name"] == "<b>New</b>"
    assert tab.act(services, ADA, "", event(evaluation=evaluation.id, action="delete")) is None
    assert refreshed(services) is None and not evaluation.folder.exists()


def test_a_restart_interrupts_what_waits(services: AppServices, files: list[str]) -> None:
    evaluation = start(services, files=files)
    evaluation.set_status(state="queued", ended=0.0)
    EvaluationQueue(services.evaluations).mark_orphans()
    assert evaluation.status().state == "interrupted"
    assert "resume" in refreshed(services)["actions"]


def test_the_end_of_the_process_interrupts_an_evaluation_and_keeps_those_that_wait(
    services: AppServices, files: list[str]
) -> None:
    slow = FORM | {"files": files, "models": ["slow"]}
    running, waiting = (services.evaluations.get(tab.start(services, ADA, slow, EQUAL)) for _ in range(2))
    until(lambda: running.photos() is not None)
    services.close()
    assert (running.status().state, waiting.status().state) == ("interrupted", "queued")
    assert running.status().message == RESTARTED
    queue = EvaluationQueue(services.evaluations)
    queue.mark_orphans()
    assert waiting.status().state == "interrupted"
    services.adapters.models["slow"] = fake_spec("slow")  # answers at once
    for evaluation in (running, waiting):
        queue.resume(evaluation, tab.model_access(services, ADA, visitor_models(services.adapters, ADA)))
    queue.join(60)
    assert (running.status().state, waiting.status().state) == ("done", "done")


def test_one_unfinished_evaluation_per_guest(services: AppServices, files: list[str]) -> None:
    slow = FORM | {"files": files, "models": ["slow"]}
    tab.start(services, GUEST, slow, EQUAL)
    with pytest.raises(gr.Error, match="has not ended"):
        tab.start(services, GUEST, slow, EQUAL)


def test_a_visitors_key_is_not_stored_and_needed_to_resume(
    services: AppServices, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "paid", fake_spec("paid", needs_key=True))
    evaluation = start(services, files=files, models=["paid"], key="secret-key")
    assert evaluation.own_key and evaluation.status().state == "done"
    assert all(b"secret-key" not in file.read_bytes() for file in evaluation.folder.iterdir())
    evaluation.set_status(state="cancelled")
    with pytest.raises(gr.Error, match="your own Moondream API key"):
        tab.act(services, ADA, "", event(evaluation=evaluation.id, action="resume"))
    with pytest.raises(RunError, match="your own Moondream API key"):
        access = tab.model_access(services, ADMIN, visitor_models(services.adapters, ADMIN))
        services.evaluation_queue.resume(evaluation, access)
    tab.act(services, ADA, "other-key", event(evaluation=evaluation.id, action="resume"))
    models = visitor_models(services.adapters, ADA, SecretStr("other-key"))
    assert models.payer == "visitor"


def test_comparison_with_an_earlier_evaluation(services: AppServices, files: list[str]) -> None:
    first, second = start(services, files=files), start(services, files=files, models=["two"])
    rows = refreshed(services, selected=second.id, compare=first.id)["table"]["rows"]
    assert rows[0]["earlier"]["photos"] == 2 and rows[0]["earlier"]["mean"] == 0
    assert refreshed(services, selected=second.id, reference=0)["table"]["rows"][0]["wins"] is None


def test_downloads_and_the_playground(services: AppServices, files: list[str]) -> None:
    evaluation = start(services, files=files, temperatures=["0.5", "1"], name="a/b:c")
    for kind in ("csv", "parquet", "json", "html"):
        path = Path(tab.download(services, ADA, EQUAL, event(evaluation=evaluation.id, format=kind, reference=0)))
        assert path.suffix == f".{kind}" and path.stat().st_size > 200
    with pytest.raises(gr.Error, match="Unknown format"):
        tab.download(services, ADA, EQUAL, event(evaluation=evaluation.id, format="exe"))
    values = tab.open_comparison(services, ADA, event(evaluation=evaluation.id, photo=1, model=2))
    assert values["temperature"] == 0.5 and values["n"] == 2 and values["models"].value == ["one", "two"]
    assert Path(values["upload"]).read_bytes() == evaluation.photo_file(1).read_bytes()
    with pytest.raises(gr.Error, match="no longer available"):
        tab.open_comparison(services, ADA, event(evaluation=evaluation.id, photo=9, model=0))


def test_endpoints_start_and_follow_an_evaluation(services: AppServices, monkeypatch: pytest.MonkeyPatch) -> None:
    status = api.evaluate(
        services, ADA, ["one", {"name": "one", "temperature": 0.2}], reward={"sharpness": 1}, max_photos=2, name="API"
    )
    assert status["state"] in ("queued", "running") and status["name"] == "API"
    services.evaluation_queue.join(60)
    status = api.evaluation(services, ADA, status["evaluation"])
    assert status["state"] == "done" and status["leaderboard"]["reward"] == {"sharpness": 1}
    other = api.evaluation(services, ADA, status["evaluation"], {"colour": 1})["leaderboard"]
    assert other["reward"] == {"colour": 1} and other["rows"][0]["label"] == "Fake one, T 1"
    for arguments, message in (
        ({"models": "one"}, "Send `models`"),
        ({"models": [{"name": "one", "size": 1}]}, "Send `models`"),
        ({"models": ["one"], "reward": {"beauty": 1}}, "no reward named"),
        ({"models": ["one"], "skill": "paint"}, "Unknown skill"),
        ({"models": ["one"], "photos": "/etc"}, "owner/name"),
    ):
        with pytest.raises(gr.Error, match=message):
            api.evaluate(services, ADA, **arguments)


def test_estimate_counts_models_photos_and_paid_calls(services: AppServices) -> None:
    specs = visitor_models(services.adapters, ADMIN, SecretStr("key")).specs
    form = FORM | {"photo_source": HELD_OUT, "models": ["moondream-tiny", "moondream3-preview"]}
    text = estimate_text(form, specs, Prices(), 1)
    assert "2 models × 15 photos × 2 candidates" in text and "30 paid calls cost about $0.0" in text
    assert "waits for 1 other first" in text and "reference recipes" in text
    free = estimate_text(form | {"models": ["moondream-tiny"], "skill": "caption"}, specs, Prices(), 0)
    assert "It costs nothing." in free and "reference" not in free
    assert "at most 6" in estimate_text(form | {"temperatures": ["0", "1", "2", "0.5"]}, specs, Prices(), 0)
    assert "at least one model" in estimate_text(form | {"models": []}, specs, Prices(), 0)
