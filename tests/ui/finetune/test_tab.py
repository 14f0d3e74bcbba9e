"""Handlers and snapshots of the Fine-tune tab, with a fake training command."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from access.roles import LOCAL_ADMIN
from inference.registry import MODELS
from rewards import REWARDS
from tests.support.fake_run import HOSTILE, write_adapter, write_alarms, write_result, write_rollouts
from tests.support.finetune_page import FORM, HOSTED, JOBS, event
from tests.support.hub_server import TOKEN, HubServer
from tests.support.runs import FAKE, until
from training.runs.adapters import model_name
from training.runs.run import MAX_STEPS, Run, RunConfig
from ui.api import runs as api_runs
from ui.finetune import run_view
from ui.finetune import tab as finetune
from ui.finetune.estimate import DEFAULT_STEPS, assumed_seconds, estimate
from ui.finetune.form import backend_changed
from ui.finetune.tab import RenderState, base_models, retrain
from ui.playground import tab as playground
from ui.playground.link import PlaygroundSettings
from ui.services import AppServices
from usage.budgets import Budget
from usage.events import UsageEvent
from usage.recorder import insert_events

HERE = Path(finetune.__file__).parent
DEFAULT_MODELS = list(PlaygroundSettings().models)


@pytest.fixture
def services(tmp_path: Path) -> Iterator[AppServices]:
    """Services with the fake training command; unfinished runs are cancelled at the end."""
    services = AppServices.build(tmp_path / "data", f"sqlite:///{tmp_path / 'store.sqlite3'}", FAKE)
    yield services
    for run in services.runs.list():
        if not run.status().finished:
            run.cancel()
    until(lambda: not services.worker.unfinished() and not any(run.alive() for run in services.runs.list()))
    services.worker.stop()
    for name in [name for name in MODELS if name.startswith("run-")]:
        del MODELS[name]


@pytest.fixture
def idle(services: AppServices, monkeypatch: pytest.MonkeyPatch) -> AppServices:
    """Services whose worker executes nothing: queued runs stay queued."""
    monkeypatch.setattr(services.worker, "wake", lambda: None)
    return services


def submit_form(services: AppServices, *weights: float, **changes: Any) -> str:
    """Submit the form with `changes` and return the run's ID."""
    return retrain(services, LOCAL_ADMIN, FORM | changes, weights or [1.0] * len(REWARDS))


def finished_run(services: AppServices, wins: bool = True, **changes: Any) -> Run:
    """Create a finished run with an adapter and a result, without a process."""
    settings = {"base": "moondream-tiny", "reward": {"sharpness": 1}, "seed": 1, "steps": 10, **changes}
    run = services.runs.create(RunConfig.create(**settings))
    write_adapter(run)
    write_result(run, wins=wins, alarm="")
    run.set_status(state="done", step=10, steps=10, started=100.0, ended=142.0)
    return run


def refresh(
    services: AppServices,
    selected: str | None = None,
    state: RenderState | None = None,
    models: Any = DEFAULT_MODELS,
    tab_open: bool = False,
) -> dict[str, Any]:
    """Refresh the tab and return the updates by name."""
    updates = finetune.refresh(services, LOCAL_ADMIN, selected, state, models, tab_open)
    return dict(
        zip(
            ("view", "history", "picker", "bases", "push", "push_note", "rollouts", "state", "timer"),
            updates,
            strict=True,
        )
    )


def is_skip(value: Any) -> bool:
    return isinstance(value, dict) and value.get("__type__") == "update" and len(value) == 1


@pytest.mark.parametrize("template", ["run.html", "history.html", "rollouts.html"])
def test_templates_contain_no_placeholders(template: str) -> None:
    """Gradio runs `${...}` as JavaScript and Handlebars compiles `{{...}}`."""
    text = (HERE / template).read_text()
    assert not any(mark in text for mark in ("{{", "${", "`"))


@pytest.mark.parametrize("script", ["run.js", "history.js"])
def test_scripts_insert_no_html(script: str) -> None:
    text = (HERE / script).read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


# Retrain


def test_submitting_the_form_queues_a_run_with_its_settings(idle: AppServices) -> None:
    config = idle.runs.get(
        submit_form(idle, 0.5, 0, 1, seed=7, name=" Mine ", rank=4, length="Custom", steps=33)
    ).config()
    assert config.reward == {"sharpness": 0.5, "creativity": 1.0}
    assert (config.base, config.seed, config.name, config.rank, config.steps) == ("moondream-tiny", 7, "Mine", 4, 33)
    assert config.photos == "bundled" and (config.learning_rate, config.beta, config.rollouts) == (2e-3, 0.02, 4)


@pytest.mark.parametrize(("length", "steps"), [("Smoke test", 10), ("Short run", DEFAULT_STEPS)])
def test_length_sets_the_number_of_steps(idle: AppServices, length: str, steps: int) -> None:
    assert idle.runs.get(submit_form(idle, length=length, steps=5)).config().steps == steps


@pytest.mark.parametrize(
    ("changes", "message"),
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
        ({"photo_source": "My photos"}, "Choose photos"),
        ({"photo_source": "My photos", "files": []}, "Choose photos"),
        ({"photo_source": "Hub dataset", "dataset": ""}, "owner/name"),
        ({"photo_source": "Hub dataset", "dataset": "../../etc"}, "owner/name"),
        ({"photo_source": "Hub dataset", "dataset": HOSTILE}, "owner/name"),
    ],
)
def test_invalid_form_raises_a_message_and_queues_nothing(
    idle: AppServices, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(gr.Error, match=message) as refused:
        submit_form(idle, **changes)
    assert "<img" not in refused.value.message
    assert idle.runs.list() == [] and not (idle.runs.folder.parent / "uploads").exists()


def test_job_is_queued_with_its_hardware_and_its_token_is_not_written_to_disk(idle: AppServices) -> None:
    job = {"backend": JOBS, "hardware": "a10g-small"}
    with pytest.raises(gr.Error, match="Enter your Hugging Face token"):
        submit_form(idle, **job, hub_token="  ")
    run = idle.runs.get(submit_form(idle, **job, hub_token=f" {TOKEN} "))
    assert (run.config().backend, run.config().hardware) == ("jobs", "a10g-small")
    assert idle.worker._tokens[run.id] == TOKEN and TOKEN not in repr(run.config())
    assert all(TOKEN.encode() not in file.read_bytes() for file in run.folder.rglob("*") if file.is_file())
    run.set_status(state="failed")
    with pytest.raises(gr.Error, match="Enter your Hugging Face token"):
        finetune.act(idle, LOCAL_ADMIN, "", "", event(run=run.id, action="resume"))
    finetune.act(idle, LOCAL_ADMIN, TOKEN, "", event(run=run.id, action="resume"))
    assert run.status().state == "queued"


@pytest.mark.parametrize("hardware", ["../x", "L4", "x" * 41, "<b>"])
def test_invalid_hardware_name_is_refused(idle: AppServices, hardware: str) -> None:
    with pytest.raises(gr.Error, match="hardware"):
        submit_form(idle, backend=JOBS, hardware=hardware, hub_token=TOKEN)


def test_jobs_backend_lists_hardware_with_prices_and_the_estimate_gives_the_maximum_cost(
    idle: AppServices, hub: HubServer
) -> None:
    base, _, jobs_group, hosted_group, hardware, hourly_prices = backend_changed(JOBS)
    assert base["visible"] and jobs_group["visible"] and not hosted_group["visible"]
    assert hardware["choices"][0] == ("l4x1 · $0.80 an hour · 1 x L4 24 GB, 8 vCPU, 30 GB", "l4x1")
    text = estimate(idle, "Short run", None, 4, JOBS, "l4x1", hourly_prices)
    assert "an unknown time" in text and "$0.80 an hour" in text and "$1.60 at most" in text
    assert "price is not known" in estimate(idle, "Short run", None, 4, JOBS, "h200", hourly_prices)
    assert not any(group["visible"] for group in backend_changed("This machine")[2:4])
    hub.refuse["/api/jobs"] = 500
    *_, hardware, hourly_prices = backend_changed(JOBS)
    assert "error (500)" in hardware["info"] and hourly_prices == {}


def test_estimate_for_jobs_uses_earlier_runs_on_the_same_hardware_only(idle: AppServices) -> None:
    run = finished_run(idle, where="jobs", hardware="l4x1")
    (run.folder / "result.json").write_text(json.dumps({"seconds": 2 * assumed_seconds(10, 4), "steps": 10}))
    text = estimate(idle, "Short run", None, 4, JOBS, "l4x1", {})
    assert run_view.format_duration(2 * assumed_seconds(DEFAULT_STEPS, 4)) in text
    assert "a first guess" in estimate(idle, "Short run", None, 4), "a job is no measure for this machine"


def test_sliders_at_zero_are_refused(idle: AppServices) -> None:
    with pytest.raises(gr.Error, match="All sliders are at zero"):
        submit_form(idle, 0, 0, 0)


def test_duplicate_run_is_refused_and_photos_of_a_refused_run_are_deleted(idle: AppServices, tmp_path: Path) -> None:
    submit_form(idle)
    with pytest.raises(gr.Error, match="a moment ago"):
        submit_form(idle)
    (tmp_path / "one.jpg").write_bytes(b"x")
    with pytest.raises(gr.Error, match="seed"):
        submit_form(idle, photo_source="My photos", files=[str(tmp_path / "one.jpg")], seed=-1)
    assert list((idle.runs.folder.parent / "uploads").iterdir()) == [] and len(idle.runs.list()) == 1


def test_run_starts_from_an_earlier_run_on_a_hub_dataset(idle: AppServices) -> None:
    earlier = finished_run(idle)
    assert model_name(earlier.id) in [name for _, name in base_models(idle, LOCAL_ADMIN)]
    config = idle.runs.get(
        submit_form(idle, base=model_name(earlier.id), photo_source="Hub dataset", dataset="me/cats")
    ).config()
    assert Path(config.base) == earlier.folder.resolve() and config.photos == "hub:me/cats"


def test_base_models_are_local_models_with_distinct_weights(idle: AppServices) -> None:
    assert [name for _, name in base_models(idle, LOCAL_ADMIN)] == ["moondream-tiny"]


def test_estimate_uses_earlier_runs_and_counts_waiting_ones(idle: AppServices) -> None:
    assert "26 s (a first guess" in estimate(idle, "Smoke test", None, 4)
    finished_run(idle)
    text = estimate(idle, "Smoke test", None, 4)
    assert "based on earlier runs" in text and "42 s" in text
    submit_form(idle)
    assert "waits for 1 other run first" in estimate(idle, "Custom", 20, 4)


# Display


def test_refresh_sends_only_changes(idle: AppServices) -> None:
    first = refresh(idle)
    assert first["view"] is None and first["history"]["runs"] == [] and not first["state"].polling
    submit_form(idle)
    second = refresh(idle, state=first["state"])
    assert second["view"]["state"] == "queued" and len(second["history"]["runs"]) == 1 and second["state"].polling
    third = refresh(idle, state=second["state"])
    assert {name for name, update in third.items() if not is_skip(update)} == {"state"}


def test_page_polls_only_while_the_tab_is_open_or_a_run_is_unfinished(idle: AppServices) -> None:
    assert refresh(idle, tab_open=True)["state"].polling
    assert not refresh(idle, state=RenderState(polling=True))["state"].polling


def test_newly_enabled_model_is_selected_with_its_base_until_it_is_disabled(idle: AppServices) -> None:
    state = refresh(idle)["state"]
    run = finished_run(idle)
    assert idle.adapters.auto_enable(run)
    updates = refresh(idle, state=state)
    picker, state = updates["picker"], updates["state"]
    assert picker.value == ["moondream-tiny", model_name(run.id)]
    assert model_name(run.id) in [choice["name"] for choice in picker.props["choices"]]
    idle.adapters.disable(run.id)
    picker = refresh(idle, state=state, models=picker.value)["picker"]
    assert picker.value == ["moondream-tiny"]
    assert model_name(run.id) not in [choice["name"] for choice in picker.props["choices"]]


def test_page_selects_base_and_tuned_model_unless_its_link_names_models(idle: AppServices) -> None:
    run = finished_run(idle)
    idle.adapters.enable(run)
    default = playground.open_page(idle, LOCAL_ADMIN, {}, None)
    assert default["models"].value == ["moondream-tiny", model_name(run.id)]
    linked = playground.open_page(idle, LOCAL_ADMIN, {"models": "moondream-tiny"}, None)
    assert linked["models"].value == ["moondream-tiny"]


def test_unfinished_run_is_displayed_before_the_newest_unless_another_is_selected(idle: AppServices) -> None:
    queued = submit_form(idle)
    newest = finished_run(idle)
    assert finetune.displayed_run(idle, LOCAL_ADMIN, None).id == queued  # type: ignore[union-attr]
    assert finetune.displayed_run(idle, LOCAL_ADMIN, newest.id).id == newest.id  # type: ignore[union-attr]
    assert finetune.displayed_run(idle, LOCAL_ADMIN, "gone").id == queued  # type: ignore[union-attr]


def test_unreadable_run_shows_an_error_and_is_not_listed(idle: AppServices) -> None:
    run = finished_run(idle)
    (run.folder / "config.json").write_text("{")
    updates = refresh(idle, selected=run.id)
    assert "cannot be used" in updates["view"]["error"] and updates["history"]["runs"] == []


def test_snapshots_are_plain_json_without_paths(idle: AppServices) -> None:
    run = finished_run(idle, name=HOSTILE)
    run.append_metrics({"step": 1, "reward": 0.5, "sharpness": None, "colour": "x", "kl": float("inf"), "seconds": 1})
    run.append_probe({"step": 1, "recipe": HOSTILE, "scores": None, "total": None})
    (run.folder / "probe.png").write_bytes((run.folder / "pair0.png").read_bytes())
    snapshot = run_view.run_snapshot(idle, LOCAL_ADMIN, run)
    history = run_view.history_snapshot(idle, LOCAL_ADMIN, run.id)
    text = json.dumps(snapshot, allow_nan=False) + json.dumps(history, allow_nan=False)
    assert str(idle.runs.folder) not in text
    assert snapshot["chart"]["kl"] == [None] and snapshot["chart"]["series"][0]["values"] == [0.5]
    assert snapshot["probe"]["before"].startswith("data:image/jpeg") and HOSTILE in snapshot["probe"]["description"]
    assert snapshot["result"]["pairs"][0]["sides"][1]["src"].startswith("data:image/jpeg")


def test_rollouts_of_a_step_are_shown_best_first_with_their_advantages(idle: AppServices) -> None:
    run = finished_run(idle)
    assert refresh(idle, selected=run.id)["rollouts"] is None, "runs of earlier versions have none"
    for step in (1, 2):
        run.append_metrics({"step": step, "reward": 0.5})
        write_rollouts(run, step, HOSTILE if step == 2 else "")
    assert refresh(idle, selected=run.id)["rollouts"] == {"run": run.id, "last": 2}

    def choose(**data: Any) -> Any:
        event = gr.EventData(None, data)
        return finetune.choose_rollouts(idle, LOCAL_ADMIN, event)

    first, equal = choose(run=run.id, step=1)["groups"]
    totals = [rollout["total"] for rollout in first["rollouts"]]
    assert totals == sorted(totals, reverse=True) and not first["no_signal"] and equal["no_signal"]
    assert sum(rollout["advantage"] for rollout in first["rollouts"]) == pytest.approx(0, abs=1e-9)
    assert all(rollout["src"].startswith("data:image/jpeg") for rollout in first["rollouts"])
    assert [score["name"] for score in first["rollouts"][0]["scores"]] == list(REWARDS)
    hostile = choose(run=run.id, step=99)
    assert hostile["step"] == 2 and HOSTILE in hostile["groups"][0]["rollouts"][0]["text"]
    assert hostile["groups"][0]["rollouts"][0]["src"] == ""
    assert "groups" not in choose(run=run.id, step=0) and "groups" not in choose(run=run.id, step="x")
    with pytest.raises(gr.Error):
        choose(run="../other", step=1)
    assert str(idle.runs.folder) not in json.dumps(hostile, allow_nan=False)


def test_alarms_are_shown_while_a_run_trains_and_in_its_result(idle: AppServices) -> None:
    run = finished_run(idle)
    run.set_status(state="queued")
    assert run_view.run_snapshot(idle, LOCAL_ADMIN, run)["alarms"] == [], "an earlier run has no alarms.json"
    before = run_view.run_fingerprint(idle, LOCAL_ADMIN, run)
    write_alarms(run, step=6)
    assert run_view.run_fingerprint(idle, LOCAL_ADMIN, run) != before
    live = run_view.run_snapshot(idle, LOCAL_ADMIN, run)
    assert "even if it wins" in live["alarm_note"] and live["alarms"][0]["step"] == "steps 2 to 6"
    assert live["alarms"][0]["photo"]["after"].startswith("data:image/jpeg")
    assert live["alarms"][0]["photo"]["description"] == "crop to 60 x 60 %"
    write_result(run, wins=True, alarm="")
    run.set_status(state="done", message=str((run.result() or {})["alarm"]))
    done = run_view.run_snapshot(idle, LOCAL_ADMIN, run)
    assert done["message"] == done["result"]["warning"] == "", "the alarms say it"
    assert done["actions"]["use"]["label"] == "Use anyway" and "then decide" in done["alarm_note"]
    assert run_view.history_snapshot(idle, LOCAL_ADMIN, run.id)["runs"][0]["result"].endswith("· alarm")
    assert not idle.adapters.auto_enable(run)
    status = api_runs.run_status(idle, LOCAL_ADMIN, run.id)
    assert status["alarms"] == status["result"]["alarms"] == run.alarms()
    finetune.use(idle, LOCAL_ADMIN, run)
    assert "in spite of the alarm" in run_view.run_snapshot(idle, LOCAL_ADMIN, run)["alarm_note"]


@pytest.mark.parametrize(
    "result", [{}, {"wins": True}, {"pairs": [3, {}]}, {"base": {"total": None}, "difference": {"mean": None}}]
)
def test_incomplete_result_is_shown_without_a_comparison(idle: AppServices, result: dict[str, Any]) -> None:
    run = finished_run(idle)
    (run.folder / "result.json").write_text(json.dumps(result))
    snapshot = run_view.run_snapshot(idle, LOCAL_ADMIN, run)
    assert snapshot["state"] == "done"
    assert not result or "could not be compared" in snapshot["result"]["verdict"]


@pytest.mark.parametrize(
    ("wins", "low", "high", "text"),
    [
        (True, 0.1, 0.3, "The tuned model wins: on 24 held-out photos its reward is 0.200 higher"),
        (False, -0.1, 0.5, "not clearly better"),
        (False, -0.5, -0.1, "The tuned model is worse"),
    ],
)
def test_verdict_follows_the_confidence_interval(wins: bool, low: float, high: float, text: str) -> None:
    result = {"wins": wins, "held_out": 24, "difference": {"mean": 0.2, "low": low, "high": high}}
    assert text in run_view.verdict(result, in_use=False)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3900, "1 h 5 min"), (None, "–")]
)
def test_format_duration(seconds: float | None, text: str) -> None:
    assert run_view.format_duration(seconds) == text


def test_downsample_keeps_the_first_and_the_last_row() -> None:
    rows = run_view.downsample(list(range(5000)), 100)
    assert len(rows) == 100 and (rows[0], rows[-1]) == (0, 4999)
    assert run_view.downsample([1, 2], 100) == [1, 2]


# Actions


def test_winner_is_enabled_automatically(services: AppServices) -> None:
    run = services.runs.get(submit_form(services))
    until(lambda: services.adapters.is_enabled(run.id))
    assert run.status().state == "done" and services.adapters.newest_with_base()[1] == model_name(run.id)


def test_use_rename_revert_and_delete(idle: AppServices) -> None:
    run = finished_run(idle, wins=False)
    displayed = finetune.act(idle, LOCAL_ADMIN, "", "", event(run=run.id, action="use"))
    assert displayed == run.id and idle.adapters.is_enabled(run.id)
    finetune.act(idle, LOCAL_ADMIN, "", "", event(run=run.id, action="rename", name="Better"))
    assert MODELS[model_name(run.id)].title == "Better"
    with pytest.raises(gr.Error, match="Revert it first"):
        finetune.act(idle, LOCAL_ADMIN, "", "", event(run=run.id, action="delete"))
    finetune.act(idle, LOCAL_ADMIN, "", "", event(run=run.id, action="revert"))
    assert model_name(run.id) not in MODELS
    assert (
        finetune.act(idle, LOCAL_ADMIN, "", "", event(run=run.id, action="delete")) is None and idle.runs.list() == []
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"run": None, "action": "use"}, "There is no run"),
        ({"run": "../..", "action": "delete"}, "There is no run"),
        ({"action": "format"}, "Unknown action"),
        ({"action": "cancel"}, "already finished"),
        ({"action": "resume"}, "Only a stopped run can be resumed"),
        ({"action": "revert"}, "is not in use"),
        ({"action": "rename", "name": "x" * 100}, "name"),
    ],
)
def test_impossible_action_raises_a_message(idle: AppServices, data: dict[str, Any], message: str) -> None:
    run = finished_run(idle)
    with pytest.raises(gr.Error, match=message):
        finetune.act(idle, LOCAL_ADMIN, "", "", event(**{"run": run.id, **data}))
    assert [listed.id for listed in idle.runs.list()] == [run.id]


def test_queued_run_is_cancelled_and_resumed(idle: AppServices) -> None:
    run = idle.runs.get(submit_form(idle))
    with pytest.raises(gr.Error, match="has not finished"):
        finetune.act(idle, LOCAL_ADMIN, "", "", event(run=run.id, action="use"))
    finetune.act(idle, LOCAL_ADMIN, "", "", event(run=run.id, action="cancel"))
    assert run.status().state == "cancelled"
    finetune.act(idle, LOCAL_ADMIN, "", "", event(run=run.id, action="resume"))
    assert run.status().state == "queued" and not run.cancelled


def test_base_of_a_queued_run_is_not_deleted(idle: AppServices) -> None:
    earlier = finished_run(idle)
    waiting = submit_form(idle, base=model_name(earlier.id))
    with pytest.raises(gr.Error, match="An unfinished run starts from this one"):
        finetune.act(idle, LOCAL_ADMIN, "", "", event(run=earlier.id, action="delete"))
    finetune.act(idle, LOCAL_ADMIN, "", "", event(run=waiting, action="cancel"))
    finetune.act(idle, LOCAL_ADMIN, "", "", event(run=earlier.id, action="delete"))
    assert [run.id for run in idle.runs.list()] == [waiting]


def test_download_is_a_zip_named_after_the_run(idle: AppServices) -> None:
    run = finished_run(idle, name="So/me <b>")
    path = Path(finetune.download(idle, LOCAL_ADMIN, event(run=run.id)))
    assert path.suffix == ".zip" and path.name.startswith("So-me") and path.stat().st_size > 1000


def test_push_without_a_run_or_a_repository_name_is_refused(idle: AppServices) -> None:
    with pytest.raises(gr.Error, match="no run to push"):
        finetune.push(idle, LOCAL_ADMIN, None, "me/it", "hf_x", True)
    finished_run(idle)
    with pytest.raises(gr.Error, match="owner/name"):
        finetune.push(idle, LOCAL_ADMIN, None, "it", "hf_x", True)


# Named API endpoints


def test_endpoints_start_cancel_use_and_revert_runs(idle: AppServices) -> None:
    started = api_runs.retrain(idle, LOCAL_ADMIN, {"colour": 1}, "moondream-tiny", "bundled", 5, 3, "By program")
    expected = {"state": "queued", "position": 0, "steps": 5, "reward": {"colour": 1.0}}
    assert started | expected == started
    assert api_runs.runs(idle, LOCAL_ADMIN)[0]["name"] == "By program"
    assert api_runs.cancel_run(idle, LOCAL_ADMIN, started["run"])["state"] == "cancelled"
    run = finished_run(idle)
    assert api_runs.use_run(idle, LOCAL_ADMIN, run.id) == {"models": ["moondream-tiny", model_name(run.id)]}
    assert (
        api_runs.run_status(idle, LOCAL_ADMIN, run.id)["in_use"]
        and api_runs.run_status(idle, LOCAL_ADMIN, run.id)["result"]["wins"]
    )
    assert api_runs.revert(idle, LOCAL_ADMIN, run.id) == {"models": []}


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
def test_retrain_endpoint_refuses_invalid_arguments(idle: AppServices, changes: dict[str, Any]) -> None:
    arguments = {
        "reward": {"colour": 1},
        "base": "moondream-tiny",
        "photos": "bundled",
        "steps": 5,
        "seed": 3,
    } | changes
    with pytest.raises(gr.Error):
        api_runs.retrain(idle, LOCAL_ADMIN, *arguments.values())
    assert idle.runs.list() == []


@pytest.mark.parametrize("handler", [api_runs.run_status, api_runs.cancel_run, api_runs.use_run, api_runs.revert])
@pytest.mark.parametrize("run", ["", "../../etc", HOSTILE, None])
def test_endpoints_refuse_unknown_run_ids(idle: AppServices, handler: Any, run: Any) -> None:
    with pytest.raises(gr.Error, match="There is no run") as refused:
        handler(idle, LOCAL_ADMIN, run)
    assert "<img" not in refused.value.message


# Moondream's tuning API

HOSTED_FORM = {"backend": HOSTED, "moondream_key": "md-secret-7777"}


def test_hosted_run_trains_the_apis_base_within_a_budget_and_its_key_is_not_written(idle: AppServices) -> None:
    run = idle.runs.get(submit_form(idle, **HOSTED_FORM, budget=2.5, sft_steps=3))
    config = run.config()
    assert (config.backend, config.base, config.budget, config.sft_steps) == ("hosted", "moondream3-preview", 2.5, 3)
    assert "md-secret" not in "".join(file.read_text() for file in run.folder.iterdir() if file.is_file())


def test_hosted_run_needs_a_key_and_a_budget_of_its_own(idle: AppServices) -> None:
    with pytest.raises(gr.Error, match="Enter your Moondream API key"):
        submit_form(idle, **HOSTED_FORM | {"moondream_key": " "})
    with pytest.raises(gr.Error, match="Fill in: budget"):
        submit_form(idle, **HOSTED_FORM, budget=None)


def test_spent_budget_stops_hosted_runs_that_the_deployments_key_pays(
    idle: AppServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONDREAM_API_KEY", "md-deployment")
    deployment_pays = HOSTED_FORM | {"moondream_key": ""}
    paused = idle.runs.get(submit_form(idle, **deployment_pays))
    paused.set_status(state="interrupted")
    branch = idle.meter.recorder.deployment.branch
    idle.budgets.set(Budget(branch, 0.01, stop=True))
    paid = UsageEvent(datetime.now(timezone.utc), "m", "query", branch=branch, cost=0.02, cost_basis="reported")
    insert_events(idle.usage.database, [paid])
    with pytest.raises(gr.Error, match="is spent"):
        submit_form(idle, **deployment_pays, seed=2)
    with pytest.raises(gr.Error, match="is spent"):
        finetune.act(idle, LOCAL_ADMIN, "", "", event(run=paused.id, action="resume"))
    assert submit_form(idle), "a run that costs nothing is allowed"
    assert idle.runs.get(submit_form(idle, **HOSTED_FORM, seed=3)).own_key, "an own key pays itself"


def test_estimate_for_the_tuning_api_gives_the_maximum_cost(idle: AppServices) -> None:
    base, learning_rate, jobs_group, hosted_group, *_ = backend_changed(HOSTED)
    assert not base["visible"] and not jobs_group["visible"] and hosted_group["visible"]
    assert learning_rate["value"] == 2e-4
    assert backend_changed("This machine")[1]["value"] == RunConfig.model_fields["learning_rate"].default
    text = estimate(idle, "Short run", None, 4, HOSTED, None, {}, 2.0, 10)
    assert "at most" in text and "stops at your budget of $2.00" in text and "assumed" in text
