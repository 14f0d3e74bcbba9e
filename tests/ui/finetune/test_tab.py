"""The Fine-tune tab's handlers as plain functions, with runs whose process learns nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from inference.registry import MODELS
from rewards import REWARDS
from tests.support.fake_run import HOSTILE, write_adapter, write_result
from tests.support.hub_server import TOKEN, StandInHub
from tests.training.runs.test_queue import FAKE, until
from training.runs.adapters import model_name
from training.runs.run import MAX_STEPS, Run, RunConfig
from ui.api import runs as api_runs
from ui.finetune import run_view
from ui.finetune import tab as finetune
from ui.finetune.estimate import SHORT, estimate, guess
from ui.finetune.form import place_chosen
from ui.finetune.tab import RenderState, bases, retrain, show
from ui.playground import tab as playground
from ui.playground.link import PlaygroundSettings
from ui.services import AppServices
from usage import ledger
from usage.budgets import Budget
from usage.events import Event

HERE = Path(finetune.__file__).parent
DEFAULT = list(PlaygroundSettings().models)
FORM: dict[str, Any] = {
    "base": "moondream-tiny",
    "kind": "Bundled photos",
    "files": None,
    "dataset": "",
    "length": "Smoke test",
    "steps": None,
    "seed": 1,
    "name": "",
    "learning_rate": 2e-3,
    "beta": 0.02,
    "rollouts": 8,
    "rank": 16,
    "place": "This machine",
    "hardware": None,
    "token": "",
    "key": "",
    "budget": 5.0,
    "examples": 10,
}


@pytest.fixture
def services(tmp_path: Path) -> Iterator[AppServices]:
    made = AppServices.open(tmp_path / "data", f"sqlite:///{tmp_path / 'store.sqlite3'}", FAKE)
    yield made
    for run in made.runs.list():
        if not run.status().over:
            run.cancel()
    until(lambda: not made.worker.waiting() and not any(run.alive() for run in made.runs.list()))
    made.worker.stop()
    for name in [name for name in MODELS if name.startswith("run-")]:
        del MODELS[name]


@pytest.fixture
def still(services: AppServices, monkeypatch: pytest.MonkeyPatch) -> AppServices:
    """The same with a worker that does nothing: what is queued stays queued."""
    monkeypatch.setattr(services.worker, "wake", lambda: None)
    return services


def press(services: AppServices, *weights: float, **changes: Any) -> str:
    return retrain(services, *(FORM | changes).values(), *(weights or [1.0] * len(REWARDS)))


def finished(services: AppServices, wins: bool = True, **changes: Any) -> Run:
    """A run that is over, without its process."""
    asked = {"base": "moondream-tiny", "reward": {"sharpness": 1}, "seed": 1, "steps": 10, **changes}
    run = services.runs.create(RunConfig.make(**asked))
    write_adapter(run)
    write_result(run, wins=wins, alarm="")
    run.set_status(state="done", step=10, steps=10, started=100.0, ended=142.0)
    return run


def clicked(**data: Any) -> gr.EventData:
    return gr.EventData(None, data)


def is_skip(value: Any) -> bool:
    return isinstance(value, dict) and value.get("__type__") == "update" and len(value) == 1


@pytest.mark.parametrize("template", ["run.html", "history.html"])
def test_templates_have_no_place_for_values(template: str) -> None:
    """Gradio would run `${...}` in a value as JavaScript, and Handlebars would compile it."""
    text = (HERE / template).read_text()
    assert not any(mark in text for mark in ("{{", "${", "`"))


@pytest.mark.parametrize("script", ["run.js", "history.js"])
def test_what_is_drawn_goes_in_as_text(script: str) -> None:
    text = (HERE / script).read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


# Retrain


def test_the_button_queues_what_the_form_says(still: AppServices) -> None:
    config = still.runs.get(press(still, 0.5, 0, 1, seed=7, name=" Mine ", rank=4, length="Custom", steps=33)).config()
    assert config.reward == {"sharpness": 0.5, "creativity": 1.0}
    assert (config.base, config.seed, config.name, config.rank, config.steps) == ("moondream-tiny", 7, "Mine", 4, 33)
    assert config.photos == "bundled" and (config.learning_rate, config.beta, config.rollouts) == (2e-3, 0.02, 8)


@pytest.mark.parametrize(("length", "steps"), [("Smoke test", 10), ("Short run", SHORT)])
def test_lengths_are_numbers_of_steps(still: AppServices, length: str, steps: int) -> None:
    assert still.runs.get(press(still, length=length, steps=5)).config().steps == steps


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": "gpt"}, "Choose a base"),
        ({"base": None}, "Choose a base"),
        ({"base": "moondream2"}, "Choose a base"),
        ({"base": "/etc"}, "Choose a base"),
        ({"seed": None}, "Fill in: seed"),
        ({"learning_rate": None, "rank": None}, "Fill in: learning rate, rank"),
        ({"seed": -1}, "seed"),
        ({"length": "Custom", "steps": MAX_STEPS + 1}, "steps"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"name": "x" * 81}, "name"),
        ({"kind": "My photos"}, "Choose photos"),
        ({"kind": "My photos", "files": []}, "Choose photos"),
        ({"kind": "Hub dataset", "dataset": ""}, "owner/name"),
        ({"kind": "Hub dataset", "dataset": "../../etc"}, "owner/name"),
        ({"kind": "Hub dataset", "dataset": HOSTILE}, "owner/name"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_words(still: AppServices, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(gr.Error, match=words) as refused:
        press(still, **changes)
    assert "<img" not in refused.value.message
    assert still.runs.list() == [] and not (still.runs.folder.parent / "uploads").exists()


def test_a_job_is_queued_with_its_hardware_and_a_token_that_is_written_nowhere(still: AppServices) -> None:
    elsewhere = {"place": "Hugging Face Jobs", "hardware": "a10g-small"}
    with pytest.raises(gr.Error, match="Give your Hugging Face token"):
        press(still, **elsewhere, token="  ")
    run = still.runs.get(press(still, **elsewhere, token=f" {TOKEN} "))
    assert (run.config().where, run.config().hardware) == ("jobs", "a10g-small")
    assert still.worker._tokens[run.id] == TOKEN and TOKEN not in repr(run.config())
    assert all(TOKEN.encode() not in file.read_bytes() for file in run.folder.rglob("*") if file.is_file())
    run.set_status(state="failed")
    with pytest.raises(gr.Error, match="Give your Hugging Face token"):
        finetune.act(still, "", "", clicked(run=run.id, do="resume"))
    finetune.act(still, TOKEN, "", clicked(run=run.id, do="resume"))
    assert run.status().state == "queued"


@pytest.mark.parametrize("hardware", ["../x", "L4", "x" * 41, "<b>"])
def test_hardware_is_a_name(still: AppServices, hardware: str) -> None:
    with pytest.raises(gr.Error, match="hardware"):
        press(still, place="Hugging Face Jobs", hardware=hardware, token=TOKEN)


def test_the_place_shows_its_hardware_and_what_it_costs_at_most(still: AppServices, hub: StandInHub) -> None:
    base, _, shown, other, offered, hourly = place_chosen("Hugging Face Jobs")
    assert (
        base["visible"]
        and shown["visible"]
        and not other["visible"]
        and offered["choices"][0] == ("l4x1 · $0.80 an hour · 1 x L4 24 GB, 8 vCPU, 30 GB", "l4x1")
    )
    words = estimate(still, "Short run", None, 8, "Hugging Face Jobs", "l4x1", hourly)
    assert "a time not known yet" in words and "$0.80 an hour" in words and "$1.60 at most" in words
    assert "price is not known" in estimate(still, "Short run", None, 8, "Hugging Face Jobs", "h200", hourly)
    assert not any(group["visible"] for group in place_chosen("This machine")[2:4])
    hub.refuse["/api/jobs"] = 500
    *_, offered, hourly = place_chosen("Hugging Face Jobs")
    assert "error (500)" in offered["info"] and hourly == {}


def test_earlier_jobs_say_how_long_the_next_takes(still: AppServices) -> None:
    run = finished(still, where="jobs", hardware="l4x1")
    (run.folder / "result.json").write_text(json.dumps({"seconds": 2 * guess(10, 8), "steps": 10}))
    there = estimate(still, "Short run", None, 8, "Hugging Face Jobs", "l4x1", {})
    assert run_view.duration(2 * guess(SHORT, 8)) in there
    assert "a first guess" in estimate(still, "Short run", None, 8), "and nothing of those here"


def test_sliders_at_zero_train_nothing(still: AppServices) -> None:
    with pytest.raises(gr.Error, match="All sliders are at zero"):
        press(still, 0, 0, 0)


def test_a_double_click_is_one_run_and_leaves_no_photos_behind(still: AppServices, tmp_path: Path) -> None:
    press(still)
    with pytest.raises(gr.Error, match="a moment ago"):
        press(still)
    (tmp_path / "one.jpg").write_bytes(b"x")
    with pytest.raises(gr.Error, match="seed"):
        press(still, kind="My photos", files=[str(tmp_path / "one.jpg")], seed=-1)
    assert list((still.runs.folder.parent / "uploads").iterdir()) == [] and len(still.runs.list()) == 1


def test_a_dataset_and_an_earlier_run_can_be_started_from(still: AppServices) -> None:
    earlier = finished(still)
    assert model_name(earlier.id) in [name for _, name in bases(still)]
    config = still.runs.get(press(still, base=model_name(earlier.id), kind="Hub dataset", dataset="me/cats")).config()
    assert Path(config.base) == earlier.folder.resolve() and config.photos == "hub:me/cats"


def test_bases_are_local_models_with_weights_of_their_own(still: AppServices) -> None:
    assert [name for _, name in bases(still)] == ["moondream-tiny"]


def test_the_estimate_learns_from_earlier_runs(still: AppServices) -> None:
    assert "25 s (a first guess" in estimate(still, "Smoke test", None, 8)
    finished(still)
    told = estimate(still, "Smoke test", None, 8)
    assert "as earlier runs" in told and "42 s" in told
    press(still)
    assert "waits for 1 other run first" in estimate(still, "Custom", 20, 8)


# What is shown


def test_news_is_sent_once(still: AppServices) -> None:
    first = show(still, None, None, DEFAULT, False)
    assert first[0] is None and first[1]["runs"] == [] and not first[4].active
    press(still)
    second = show(still, None, first[4], DEFAULT, False)
    assert second[0]["state"] == "queued" and len(second[1]["runs"]) == 1 and second[4].active
    third = show(still, None, second[4], DEFAULT, False)
    assert [is_skip(part) for part in third] == [True, True, True, True, False, True]


def test_the_page_asks_on_only_while_something_happens(still: AppServices) -> None:
    assert show(still, None, None, DEFAULT, True)[4].active
    assert not show(still, None, RenderState(active=True), DEFAULT, False)[4].active


def test_a_winner_comes_to_the_front_of_every_page(still: AppServices) -> None:
    seen = show(still, None, None, DEFAULT, False)[4]
    run = finished(still)
    assert still.adapters.settle(run)
    picker, seen = show(still, None, seen, DEFAULT, False)[2], show(still, None, seen, DEFAULT, False)[4]
    assert picker.value == ["moondream-tiny", model_name(run.id)]
    assert model_name(run.id) in [choice["name"] for choice in picker.props["choices"]]
    still.adapters.revert(run.id)
    picker = show(still, None, seen, picker.value, False)[2]
    assert picker.value == ["moondream-tiny"]
    assert model_name(run.id) not in [choice["name"] for choice in picker.props["choices"]]


class Asked:
    """A request with a query."""

    def __init__(self, **query: str) -> None:
        self.query_params = query


def test_a_new_page_shows_base_and_tuned_unless_its_address_says_else(still: AppServices) -> None:
    run = finished(still)
    still.adapters.use(run)
    plain = playground.open_page(still, Asked())  # type: ignore[arg-type]
    assert plain[0].value == ["moondream-tiny", model_name(run.id)]
    told = playground.open_page(still, Asked(models="moondream-tiny"))  # type: ignore[arg-type]
    assert told[0].value == ["moondream-tiny"]


def test_the_run_that_works_is_shown_before_the_newest(still: AppServices) -> None:
    queued = press(still)
    newest = finished(still)
    assert finetune.current(still, None).id == queued  # type: ignore[union-attr]
    assert finetune.current(still, newest.id).id == newest.id  # type: ignore[union-attr]
    assert finetune.current(still, "gone").id == queued  # type: ignore[union-attr]


def test_a_run_that_cannot_be_read_is_said(still: AppServices) -> None:
    run = finished(still)
    (run.folder / "config.json").write_text("{")
    shown = show(still, run.id, None, DEFAULT, False)
    assert "cannot be used" in shown[0]["error"] and shown[1]["runs"] == []


def test_a_view_is_plain_json_and_names_no_path(still: AppServices) -> None:
    run = finished(still, name=HOSTILE)
    run.add("metrics", {"step": 1, "reward": 0.5, "sharpness": None, "colour": "x", "kl": float("inf"), "seconds": 1})
    run.add("probes", {"step": 1, "recipe": HOSTILE, "scores": None, "total": None})
    (run.folder / "probe.png").write_bytes((run.folder / "pair0.png").read_bytes())
    value = run_view.run_value(still, run)
    text = json.dumps(value, allow_nan=False) + json.dumps(run_view.history_value(still, run.id), allow_nan=False)
    assert str(still.runs.folder) not in text
    assert value["chart"]["kl"] == [None] and value["chart"]["series"][0]["values"] == [0.5]
    assert value["probe"]["before"].startswith("data:image/jpeg") and HOSTILE in value["probe"]["words"]
    assert value["result"]["pairs"][0]["sides"][1]["src"].startswith("data:image/jpeg")


@pytest.mark.parametrize(
    "result", [{}, {"wins": True}, {"pairs": [3, {}]}, {"base": {"total": None}, "difference": {"mean": None}}]
)
def test_a_poor_result_is_shown_as_far_as_it_goes(still: AppServices, result: dict[str, Any]) -> None:
    run = finished(still)
    (run.folder / "result.json").write_text(json.dumps(result))
    value = run_view.run_value(still, run)
    assert value["state"] == "done"
    assert not result or "could not be compared" in value["result"]["verdict"]


@pytest.mark.parametrize(
    ("wins", "low", "high", "words"),
    [
        (True, 0.1, 0.3, "The tuned model wins: on 24 photos that it has not seen its reward is 0.200 higher"),
        (False, -0.1, 0.5, "not clearly better"),
        (False, -0.5, -0.1, "The tuned model is worse"),
    ],
)
def test_the_verdict_is_honest(wins: bool, low: float, high: float, words: str) -> None:
    result = {"wins": wins, "held_out": 24, "difference": {"mean": 0.2, "low": low, "high": high}}
    assert words in run_view.verdict(result, used=False)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3900, "1 h 5 min"), (None, "–")]
)
def test_durations_are_said_as_people_do(seconds: float | None, words: str) -> None:
    assert run_view.duration(seconds) == words


def test_a_long_curve_is_thinned_with_its_ends() -> None:
    thin = run_view.thinned(list(range(5000)), 100)
    assert len(thin) == 100 and (thin[0], thin[-1]) == (0, 4999)
    assert run_view.thinned([1, 2], 100) == [1, 2]


# What is done


def test_a_run_is_done_and_its_winner_used_by_itself(services: AppServices) -> None:
    run = services.runs.get(press(services))
    until(lambda: services.adapters.uses(run.id))
    assert run.status().state == "done" and services.adapters.front()[1] == model_name(run.id)


def test_the_buttons_do_what_they_say(still: AppServices) -> None:
    run = finished(still, wins=False)
    shown = finetune.act(still, "", "", clicked(run=run.id, do="use"))
    assert shown == run.id and still.adapters.uses(run.id)
    finetune.act(still, "", "", clicked(run=run.id, do="rename", name="Better"))
    assert MODELS[model_name(run.id)].title == "Better"
    with pytest.raises(gr.Error, match="Revert it first"):
        finetune.act(still, "", "", clicked(run=run.id, do="delete"))
    finetune.act(still, "", "", clicked(run=run.id, do="revert"))
    assert model_name(run.id) not in MODELS
    assert finetune.act(still, "", "", clicked(run=run.id, do="delete")) is None and still.runs.list() == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"do": "use"}, "There is no run"),
        ({"run": "../..", "do": "delete"}, "There is no run"),
        ({"do": "format"}, "no such button"),
        ({"do": "cancel"}, "over already"),
        ({"do": "resume"}, "Only a run that was stopped"),
        ({"do": "revert"}, "not in service"),
        ({"do": "rename", "name": "x" * 100}, "name"),
    ],
)
def test_what_a_button_cannot_do_is_said(still: AppServices, data: dict[str, Any], words: str) -> None:
    run = finished(still)
    if words not in ("There is no run",):
        data = {"run": run.id, **data}
    with pytest.raises(gr.Error, match=words):
        finetune.act(still, "", "", clicked(**data))
    assert [one.id for one in still.runs.list()] == [run.id]


def test_a_queued_run_is_cancelled_and_resumed(still: AppServices) -> None:
    run = still.runs.get(press(still))
    with pytest.raises(gr.Error, match="not over yet"):
        finetune.act(still, "", "", clicked(run=run.id, do="use"))
    finetune.act(still, "", "", clicked(run=run.id, do="cancel"))
    assert run.status().state == "cancelled"
    finetune.act(still, "", "", clicked(run=run.id, do="resume"))
    assert run.status().state == "queued" and not run.cancelled


def test_what_a_queued_run_starts_from_is_not_deleted(still: AppServices) -> None:
    earlier = finished(still)
    waiting = press(still, base=model_name(earlier.id))
    with pytest.raises(gr.Error, match="Another run is waiting"):
        finetune.act(still, "", "", clicked(run=earlier.id, do="delete"))
    finetune.act(still, "", "", clicked(run=waiting, do="cancel"))
    finetune.act(still, "", "", clicked(run=earlier.id, do="delete"))
    assert [run.id for run in still.runs.list()] == [waiting]


def test_a_download_is_a_zip_of_the_run(still: AppServices) -> None:
    run = finished(still, name="So/me <b>")
    path = Path(finetune.download(still, clicked(run=run.id)))
    assert path.suffix == ".zip" and path.name.startswith("So-me") and path.stat().st_size > 1000


def test_a_push_without_a_run_or_a_name_is_refused(still: AppServices) -> None:
    with pytest.raises(gr.Error, match="no run yet"):
        finetune.push(still, None, "me/it", "hf_x", True)
    finished(still)
    with pytest.raises(gr.Error, match="owner/name"):
        finetune.push(still, None, "it", "hf_x", True)


# The endpoints


def test_the_endpoints_do_the_same(still: AppServices) -> None:
    told = api_runs.retrain(still, {"colour": 1}, "moondream-tiny", "bundled", 5, 3, "By program")
    assert (told["state"], told["position"], told["steps"], told["reward"]) == ("queued", 0, 5, {"colour": 1.0})
    assert api_runs.runs(still)[0]["name"] == "By program"
    assert api_runs.cancel_run(still, told["run"])["state"] == "cancelled"
    run = finished(still)
    assert api_runs.use_run(still, run.id) == {"models": ["moondream-tiny", model_name(run.id)]}
    assert api_runs.run_status(still, run.id)["in_use"] and api_runs.run_status(still, run.id)["result"]["wins"]
    assert api_runs.revert(still, run.id) == {"models": []}


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": {"beauty": 1}},
        {"reward": None},
        {"base": "/etc"},
        {"photos": "/etc"},
        {"photos": "hub:../x"},
        {"steps": None},
        {"steps": 10**9},
        {"seed": -1},
    ],
)
def test_the_endpoint_refuses_what_the_page_refuses(still: AppServices, changes: dict[str, Any]) -> None:
    asked = {"reward": {"colour": 1}, "base": "moondream-tiny", "photos": "bundled", "steps": 5, "seed": 3} | changes
    with pytest.raises(gr.Error):
        api_runs.retrain(still, *asked.values())
    assert still.runs.list() == []


@pytest.mark.parametrize("handler", [api_runs.run_status, api_runs.cancel_run, api_runs.use_run, api_runs.revert])
@pytest.mark.parametrize("run", ["", "../../etc", HOSTILE, None])
def test_an_endpoint_finds_only_runs(still: AppServices, handler: Any, run: Any) -> None:
    with pytest.raises(gr.Error, match="There is no run") as refused:
        handler(still, run)
    assert "<img" not in refused.value.message


# On Moondream's tuning API


HOSTED = {"place": "Moondream's tuning API", "key": "md-secret-7777"}


def test_the_tuning_api_trains_its_own_base_within_a_budget(still: AppServices) -> None:
    run = still.runs.get(press(still, **HOSTED, budget=2.5, examples=3))
    config = run.config()
    assert (config.where, config.base, config.budget, config.sft_steps) == ("hosted", "moondream3-preview", 2.5, 3)
    assert "md-secret" not in "".join(file.read_text() for file in run.folder.iterdir() if file.is_file())


def test_the_tuning_api_needs_a_key_a_budget_and_money(still: AppServices) -> None:
    with pytest.raises(gr.Error, match="Give your Moondream key"):
        press(still, **HOSTED | {"key": " "})
    with pytest.raises(gr.Error, match="Fill in: budget"):
        press(still, **HOSTED, budget=None)
    branch = still.meter.recorder.deployment.branch
    still.budgets.set(Budget(branch, 0.01, stop=True))
    spent = Event(datetime.now(timezone.utc), "m", "query", branch=branch, cost=0.02, cost_basis="reported")
    ledger.add(still.usage.database, [spent])
    with pytest.raises(gr.Error, match="is spent"):
        press(still, **HOSTED)
    assert press(still), "what costs nothing goes on"


def test_the_form_says_what_the_tuning_api_costs_at_most(still: AppServices) -> None:
    base, rate, job, api, *_ = place_chosen(HOSTED["place"])
    assert (base["visible"], rate["value"], job["visible"], api["visible"]) == (False, 2e-4, False, True)
    assert place_chosen("This machine")[1]["value"] == RunConfig.model_fields["learning_rate"].default
    words = estimate(still, "Short run", None, 8, HOSTED["place"], None, {}, 2.0, 10)
    assert "at most" in words and "stops at your budget of $2.00" in words and "assumed" in words
