"""Who may start, change and see training runs: the rules by visitor, and the page's events over HTTP."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

import app
from access.control import AccessControl
from access.permissions import AccessDenied
from access.roles import LOCAL_ADMIN, Role, Visitor
from inference.registry import MODELS
from settings import Settings
from tests.support.app_server import app_server
from tests.support.event_client import EventClient, EventError
from tests.support.fake_run import write_adapter, write_alarms, write_result, write_rollouts
from tests.support.finetune_page import FORM, HOSTED, JOBS, event
from tests.support.hub_server import TOKEN
from tests.support.runs import FAKE, make_config, until
from training.data import uploads
from training.runs import queue
from training.runs.adapters import model_name
from training.runs.run import Run, RunStore
from ui.api import runs as api_runs
from ui.finetune import rollouts, run_view
from ui.finetune import tab as finetune
from ui.finetune.form import visitor_updates
from ui.finetune.permissions import MAX_GUEST_RUNS, MAX_GUEST_STEPS, action_refusal
from ui.services import AppServices

ADMIN = Visitor(Role.ADMIN, "", "Administrator", "a")
ADA, BOB = Visitor(Role.USER, "hf:1", "ada", "b"), Visitor(Role.USER, "hf:2", "bob", "c")
GUEST, OTHER_GUEST = Visitor(Role.GUEST, "guest:1111", "", "1111"), Visitor(Role.GUEST, "guest:2222", "", "2222")
NO_SECRET = Visitor()
ACTIONS = ("cancel", "resume", "use", "revert", "share", "unshare", "rename", "delete", "download", "push", "run")
KEY = "k" * 32


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AppServices]:
    """Services of a Space that allows guests to train, whose worker executes nothing."""
    access = AccessControl("space", space="acme/playground", guest_runs=True)
    services = AppServices.build(tmp_path / "data", f"sqlite:///{tmp_path / 'store.sqlite3'}", FAKE, access=access)
    monkeypatch.setattr(services.worker, "wake", lambda: None)
    yield services
    services.worker.stop()
    for name in [name for name in MODELS if name.startswith("run-")]:
        del MODELS[name]


@pytest.fixture
def no_guest_runs(services: AppServices) -> AppServices:
    """Return the same services, where guests may not train."""
    return replace(services, access=AccessControl("space", space="acme/playground"))


def finished_run(services: AppServices, visitor: Visitor, state: str = "done", wins: bool = True, **config: Any) -> Run:
    """Create a finished run of a visitor with an adapter and a result, without a process."""
    aside = RunStore(services.runs.folder.parent / "aside")  # the worker would start a queued run of its own store
    run = aside.create(make_config(**config), visitor.id, visitor.name)
    write_adapter(run)
    write_result(run, wins=wins, alarm="")
    run.set_status(state=state, step=6, steps=6, started=100.0, ended=142.0)
    services.runs.folder.mkdir(parents=True, exist_ok=True)
    run.folder.rename(services.runs.folder / run.id)
    return services.runs.get(run.id)


def start(services: AppServices, visitor: Visitor, **changes: Any) -> Run:
    """Submit the form as a visitor."""
    return services.runs.get(finetune.retrain(services, visitor, FORM | changes, (1.0, 1.0, 1.0)))


def act(services: AppServices, visitor: Visitor, run: Run, action: str, key: str = "") -> str | None:
    """Click a button of the run view as a visitor."""
    return finetune.act(services, visitor, key, key, event(run=run.id, action=action, name="New name"))


def snapshot(services: AppServices, visitor: Visitor, run: Run) -> dict[str, Any]:
    return run_view.run_snapshot(services, visitor, run)


# Starting runs


def test_runs_belong_to_the_visitor_who_starts_them(services: AppServices) -> None:
    for number, visitor in enumerate((ADMIN, ADA, GUEST)):
        run = start(services, visitor, seed=number)
        assert (run.owner, run.owner_name, run.own_key) == (visitor.id, visitor.name, False)


@pytest.mark.parametrize(
    ("visitor", "changes", "message"),
    [
        (NO_SECRET, {}, "session is unknown"),
        (GUEST, {"backend": JOBS, "hub_token": TOKEN}, "this machine only. Sign in with Hugging Face"),
        (GUEST, {"backend": HOSTED, "moondream_key": "md-key"}, "this machine only"),
        (GUEST, {"length": "Custom", "steps": MAX_GUEST_STEPS + 1}, "at most 120 steps"),
        (GUEST, {"rollouts": 5}, "at most 4 rollouts"),
        (ADA, {"backend": JOBS}, "Enter your Hugging Face token"),
        (ADA, {"backend": HOSTED}, "Enter your Moondream API key"),
        (ADMIN, {"backend": JOBS}, "Enter your Hugging Face token"),
    ],
)
def test_run_that_a_visitor_may_not_start_is_refused_before_files_are_copied(
    services: AppServices,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    visitor: Visitor,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setenv("MOONDREAM_API_KEY", "md-deployment")
    photo = tmp_path / "one.jpg"
    photo.write_bytes(b"x")
    with pytest.raises(gr.Error, match=message):
        start(services, visitor, **changes, photo_source="My photos", files=[str(photo)])
    uploaded = services.runs.folder.parent / "uploads"
    assert services.runs.list() == [] and not uploaded.exists()


def test_only_an_administrator_may_leave_the_key_empty(services: AppServices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONDREAM_API_KEY", "md-deployment")
    assert not start(services, ADMIN, backend=HOSTED).own_key
    own = start(services, ADA, backend=HOSTED, moondream_key="md-own")
    assert own.own_key and services.worker._tokens[own.id] == "md-own"


def test_key_is_needed_again_to_resume_an_own_run(services: AppServices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONDREAM_API_KEY", "md-deployment")
    own = start(services, ADA, backend=HOSTED, moondream_key="md-own")
    own.set_status(state="interrupted")
    with pytest.raises(gr.Error, match="Enter your Moondream API key"):
        act(services, ADA, own, "resume")
    with pytest.raises(gr.Error, match="own Moondream API key"):
        act(services, ADMIN, own, "resume")  # not with the deployment's key either
    act(services, ADA, own, "resume", key="md-again")
    assert services.worker._tokens[own.id] == "md-again"


def test_guests_train_only_where_the_deployment_allows_it(no_guest_runs: AppServices) -> None:
    with pytest.raises(gr.Error, match="Guests cannot train models here. Sign in"):
        start(no_guest_runs, GUEST)
    with pytest.raises(gr.Error, match="Guests cannot train models here"):
        api_runs.retrain(no_guest_runs, GUEST, {"colour": 1}, "moondream-tiny", "bundled", 5, 3)
    stopped = finished_run(no_guest_runs, GUEST, state="cancelled")
    with pytest.raises(gr.Error, match="Guests cannot train models here"):
        act(no_guest_runs, GUEST, stopped, "resume")
    assert start(no_guest_runs, ADA).owner == ADA.id


def test_a_guest_has_one_unfinished_run_and_a_user_three(services: AppServices) -> None:
    start(services, GUEST)
    with pytest.raises(gr.Error, match="You have a run waiting already, which is the limit"):
        start(services, GUEST, seed=2)
    stopped = finished_run(services, GUEST, state="cancelled")
    with pytest.raises(gr.Error, match="which is the limit"):
        act(services, GUEST, stopped, "resume")
    start(services, OTHER_GUEST)
    for seed in range(3):
        start(services, ADA, seed=seed)
    with pytest.raises(gr.Error, match="You have 3 runs waiting already"):
        start(services, ADA, seed=9)
    start(services, BOB)


def test_guests_together_cannot_fill_the_queue(services: AppServices) -> None:
    for number in range(MAX_GUEST_RUNS):
        start(services, replace(GUEST, id=f"guest:{number}"))
    with pytest.raises(gr.Error, match="runs are waiting already. Try again later"):
        start(services, OTHER_GUEST)
    assert start(services, ADA)


def test_full_queue_refuses_everyone_with_a_message(services: AppServices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "MAX_QUEUED", 2)
    start(services, ADA)
    start(services, BOB)
    with pytest.raises(gr.Error, match="The queue is full: 2 runs are waiting or training. Try again later."):
        start(services, ADMIN, seed=2)


def test_run_starts_from_an_own_or_a_shared_run_only(services: AppServices) -> None:
    run = finished_run(services, ADA)
    name = model_name(run.id)

    def bases(visitor: Visitor) -> list[str]:
        return [base for _, base in finetune.base_models(services, visitor)]

    assert name in bases(ADA) and name in bases(ADMIN)
    for visitor in (BOB, GUEST, NO_SECRET):
        assert name not in bases(visitor)
    with pytest.raises(gr.Error, match="Choose a base model from the list"):
        start(services, BOB, base=name)
    with pytest.raises(gr.Error, match="Choose a base model from the list"):
        api_runs.retrain(services, BOB, {"colour": 1}, name, "bundled", 5, 3)
    services.adapters.share(run)
    assert start(services, BOB, base=name).config().base == str(run.folder.resolve())


def test_uploads_belong_to_the_visitor_and_replaced_ones_are_announced(
    services: AppServices, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    photo = tmp_path / "one.jpg"
    photo.write_bytes(b"x" * 600)
    services = replace(services, upload_quota=1000)
    monkeypatch.setattr(uploads, "RECENT_SECONDS", 0.0)
    notes: list[str] = []
    monkeypatch.setattr(gr, "Info", lambda message, **_: notes.append(message))
    first = start(services, ADA, photo_source="My photos", files=[str(photo)])
    with pytest.raises(gr.Error, match="delete your runs with uploaded photos"):
        start(services, ADA, photo_source="My photos", files=[str(photo)], seed=2)
    act(services, ADA, first, "cancel")
    start(services, ADA, photo_source="My photos", files=[str(photo)], seed=3)
    assert "The oldest upload was deleted to make room (0 MB)." in notes and not Path(first.config().photos).exists()


# Changing runs


@pytest.mark.parametrize("visitor", [BOB, GUEST, OTHER_GUEST, NO_SECRET])
@pytest.mark.parametrize("owner", [ADMIN, ADA, replace(GUEST, id="guest:3333"), NO_SECRET])
def test_runs_of_others_cannot_be_changed(services: AppServices, visitor: Visitor, owner: Visitor) -> None:
    run = finished_run(services, owner)
    for action in ACTIONS:
        assert "can change or download this run" in action_refusal(services, visitor, run, action)
    for action in ("cancel", "resume", "use", "revert", "share", "unshare", "rename", "delete"):
        with pytest.raises(gr.Error, match="and administrators can change or download this run"):
            act(services, visitor, run, action, key="md-own")
    for call in (api_runs.cancel_run, api_runs.use_run, api_runs.revert):
        with pytest.raises(gr.Error, match="and administrators can change or download this run"):
            call(services, visitor, run.id)
    with pytest.raises(gr.Error, match="and administrators can change or download this run"):
        finetune.download(services, visitor, event(run=run.id))
    with pytest.raises(gr.Error, match="and administrators can change or download this run"):
        finetune.push(services, visitor, run.id, "me/it", "hf_x", True)
    with pytest.raises(gr.Error, match="and administrators can change or download this run"):
        finetune.run_inline(services, visitor, run.id)
    assert run.config().name == "" and not services.adapters.is_enabled(run.id)


@pytest.mark.parametrize("visitor", [GUEST, ADA, ADMIN])
def test_own_runs_are_used_renamed_reverted_downloaded_and_deleted(services: AppServices, visitor: Visitor) -> None:
    run = finished_run(services, visitor)
    act(services, visitor, run, "use")
    act(services, visitor, run, "rename")
    assert run.config().name == "New name"
    assert Path(finetune.download(services, visitor, event(run=run.id))).is_file()
    act(services, visitor, run, "revert")
    act(services, visitor, run, "delete")
    assert services.runs.list() == []


@pytest.mark.parametrize("visitor", [GUEST, ADA])
def test_own_runs_are_cancelled_and_resumed(services: AppServices, visitor: Visitor) -> None:
    run = start(services, visitor)
    act(services, visitor, run, "cancel")
    assert run.status().state == "cancelled"
    act(services, visitor, run, "resume")
    assert run.status().state == "queued"


def test_administrators_change_the_runs_of_others(services: AppServices) -> None:
    run = finished_run(services, ADA)
    act(services, ADMIN, run, "use")
    assert services.adapters.is_visible(run.id, ADA.id) and not services.adapters.is_visible(run.id, ADMIN.id)
    act(services, ADMIN, run, "revert")
    act(services, ADMIN, run, "delete")
    assert services.runs.list() == []


def test_push_needs_a_signed_in_owner(services: AppServices) -> None:
    run = finished_run(services, GUEST)
    with pytest.raises(gr.Error, match="Guests cannot push to the Hub"):
        finetune.push(services, GUEST, run.id, "me/it", "hf_x", True)
    with pytest.raises(gr.Error, match="owner/name"):
        finetune.push(services, ADA, finished_run(services, ADA).id, "it", "hf_x", True)


# The personal swap, and "Use for everyone"


def picker_models(services: AppServices, visitor: Visitor) -> list[str]:
    """Refresh a page that was opened before the last change and return the models of its picker."""
    state = finetune.RenderState(adapters_version=0)
    services.adapters.version += 1
    picker = finetune.refresh(services, visitor, None, state, [], False)[2]
    return [choice["name"] for choice in picker.props["choices"]]


def test_winner_joins_the_playground_of_its_owner_until_it_is_shared(services: AppServices) -> None:
    run = finished_run(services, ADA)
    name = model_name(run.id)
    assert services.adapters.auto_enable(run)
    everyone = (ADA, BOB, GUEST, NO_SECRET, ADMIN)
    assert [name in picker_models(services, visitor) for visitor in everyone] == [True, False, False, False, False]
    with pytest.raises(gr.Error, match="Only administrators can offer a model to everyone"):
        act(services, ADA, run, "share")
    act(services, ADMIN, run, "share")
    assert all(name in picker_models(services, visitor) for visitor in everyone)
    assert api_runs.use_run(services, ADMIN, run.id) == {"models": ["moondream-tiny", name]}
    with pytest.raises(gr.Error, match="Only administrators can offer a model to everyone"):
        act(services, ADA, run, "unshare")
    act(services, ADMIN, run, "unshare")
    assert [name in picker_models(services, visitor) for visitor in everyone] == [True, False, False, False, False]


@pytest.mark.parametrize("action", ["revert", "rename", "delete", "resume"])
def test_owner_does_not_change_what_everyone_uses(services: AppServices, action: str) -> None:
    run = finished_run(services, ADA, state="cancelled")
    act(services, ADMIN, run, "share")
    with pytest.raises(gr.Error, match="in use for everyone. Only administrators can change that"):
        act(services, ADA, run, action)
    assert services.adapters.is_shared(run.id)
    act(services, ADMIN, run, "unshare")
    act(services, ADA, run, "revert")


def test_unfinished_run_is_not_shared(services: AppServices) -> None:
    with pytest.raises(gr.Error, match="has not finished"):
        act(services, ADMIN, start(services, ADA), "share")


# What visitors see


def test_buttons_of_other_visitors_runs_are_disabled_with_the_reason(services: AppServices) -> None:
    run = finished_run(services, ADA)
    seen = snapshot(services, BOB, run)
    assert set(seen["actions"]) == {"use", "share", "download", "rename", "delete"}
    assert all(action["disabled"] for action in seen["actions"].values())
    assert seen["note"] == "Only ada and administrators can change or download this run."
    guests = snapshot(services, BOB, finished_run(services, GUEST))
    assert guests["note"] == "Only the guest who started it and administrators can change or download this run."


def test_owner_sees_own_buttons_and_why_sharing_is_disabled(services: AppServices) -> None:
    seen = snapshot(services, ADA, finished_run(services, ADA))
    assert [name for name, action in seen["actions"].items() if action["disabled"]] == ["share"]
    assert seen["note"] == "Only administrators can offer a model to everyone."
    admin = snapshot(services, ADMIN, finished_run(services, ADA))
    assert admin["note"] == "" and admin["actions"]["use"]["label"] == "Use for its owner"
    assert not any(action["disabled"] for action in admin["actions"].values())


def test_local_user_sees_neither_owners_nor_sharing(services: AppServices) -> None:
    services = replace(services, access=AccessControl("local"))
    run = finished_run(services, LOCAL_ADMIN)
    seen = snapshot(services, LOCAL_ADMIN, run)
    assert "Owner" not in seen["summary"] and not {"share", "unshare"} & set(seen["actions"])
    act(services, LOCAL_ADMIN, run, "use")
    [row] = run_view.history_snapshot(services, LOCAL_ADMIN, None)["runs"]
    assert (row["owner"], row["badge"]) == ("", "In use")


def test_history_names_owners_and_never_their_ids(services: AppServices) -> None:
    owners = (ADMIN, ADA, GUEST, Visitor(Role.USER, "key:abcdef", "API key"))
    all_runs = [finished_run(services, owner) for owner in owners]
    services.adapters.share(all_runs[1])
    page = run_view.history_snapshot(services, GUEST, None)
    rows = page["runs"][::-1]
    assert [row["owner"] for row in rows] == ["Administrator", "ada", "You", "API key"]
    assert [row["mine"] for row in rows] == [False, False, True, False]
    assert rows[1]["badge"] == "For everyone"
    sent = json.dumps([page, *(snapshot(services, GUEST, run) for run in all_runs), api_runs.runs(services, GUEST)])
    for owner_id in ("hf:1", "1111", "key:", "abcdef"):
        assert owner_id not in sent
    assert run_view.history_snapshot(services, OTHER_GUEST, None)["runs"][1]["owner"] == "Guest"


def test_runs_on_own_photos_show_others_no_photos_file_names_or_datasets(services: AppServices, tmp_path: Path) -> None:
    uploaded = str(services.runs.folder.parent / "uploads" / "abc")
    mine = finished_run(services, ADA, photos=uploaded, held_out=uploaded, state="failed")
    mine.set_status(message="secret-holiday.jpg cannot be read")
    (mine.folder / "log.txt").write_text("the first: secret-holiday.jpg")
    (mine.folder / "probe.png").write_bytes((mine.folder / "pair0.png").read_bytes())
    result = mine.result() or {}
    result["pairs"][0]["photo"] = "secret-holiday.jpg"
    (mine.folder / "result.json").write_text(json.dumps(result))
    mine.append_probe({"step": 1, "photo": "secret-holiday.jpg", "recipe": "", "scores": {}, "total": 0.5})
    write_alarms(mine, step=2)
    mine.set_alarms([row | {"photo": "secret-holiday.jpg"} for row in mine.alarms()])
    mine.append_metrics({"step": 1, "reward": 0.5})
    write_rollouts(mine, 1, "")
    dataset = finished_run(services, ADA, photos="hub:ada/secret-set")
    for visitor in (BOB, GUEST, NO_SECRET):
        sent = json.dumps(
            [snapshot(services, visitor, run) for run in (mine, dataset)]
            + [api_runs.run_status(services, visitor, run.id) for run in (mine, dataset)]
        )
        assert "secret" not in sent
        assert "crop 40 40 100 100" not in sent, "the recipe describes a photo"
        alarms = api_runs.run_status(services, visitor, mine.id)["alarms"]
        assert [alarm["kind"] for alarm in alarms] == ["cut_subject", "at_limits"]
        seen = snapshot(services, visitor, mine)
        assert len(seen["alarms"]) == 2 and all(alarm["photo"] is None for alarm in seen["alarms"])
        assert rollouts.rollout_snapshot(visitor, mine, 1) is None
        assert seen["log"] is None and seen["probe"] is None and seen["result"]["pairs"] == []
        assert seen["state"] == "failed" and seen["result"]["rows"] and "uploaded photos" in seen["summary"]
    for visitor in (ADA, ADMIN):
        seen = snapshot(services, visitor, mine)
        assert [alarm["photo"]["name"] for alarm in seen["alarms"]] == ["secret-holiday.jpg"] * 2
        assert api_runs.run_status(services, visitor, mine.id)["alarms"][0]["recipe"].startswith("crop 40 40 100 100")
        assert len((rollouts.rollout_snapshot(visitor, mine, 1) or {})["groups"]) == 2
        assert "secret-holiday" in seen["log"] and seen["probe"] and seen["result"]["pairs"]
        assert "ada/secret-set" in snapshot(services, visitor, dataset)["summary"]


def test_runs_on_bundled_photos_are_shown_to_everyone(services: AppServices) -> None:
    run = finished_run(services, ADA)
    (run.folder / "log.txt").write_text("step 1")
    seen = snapshot(services, NO_SECRET, run)
    assert seen["log"] == "step 1" and len(seen["result"]["pairs"]) == 3


def test_page_shows_the_visitors_own_run_first_and_polls_for_own_runs_only(services: AppServices) -> None:
    others = start(services, BOB)
    mine = finished_run(services, ADA)
    for visitor, run in ((ADA, mine), (BOB, others), (GUEST, others)):
        displayed = finetune.displayed_run(services, visitor, None)
        assert displayed is not None and displayed.id == run.id
    states = [finetune.refresh(services, visitor, None, None, [], False)[-2] for visitor in (ADA, BOB, GUEST)]
    assert [state.polling for state in states] == [False, True, False]


def test_form_says_why_a_guest_cannot_train(services: AppServices, no_guest_runs: AppServices) -> None:
    inputs = {"backend": "This machine", "length": "Short run", "steps": None, "rollouts": 4}
    submit, note = finetune.form_updates(no_guest_runs, GUEST, inputs)
    assert not submit["interactive"] and note["visible"] and "Sign in with Hugging Face" in note["value"]
    for visitor in (GUEST, ADA, ADMIN):
        submit, note = finetune.form_updates(services, visitor, inputs)
        assert submit["interactive"] and not note["visible"]
    submit, note = finetune.form_updates(services, GUEST, inputs | {"backend": JOBS})
    assert not submit["interactive"] and "this machine only" in note["value"]


def test_guests_cannot_choose_a_backend_and_only_administrators_may_leave_the_key_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOONDREAM_API_KEY", "md-deployment")
    updates = [visitor_updates(visitor) for visitor in (GUEST, ADA, ADMIN)]
    assert [backend["interactive"] for backend, _ in updates] == [False, True, True]
    assert "Guests cannot use Hugging Face Jobs" in updates[0][0]["info"] and updates[1][0]["info"] is None
    placeholders = [key["placeholder"] for _, key in updates]
    assert placeholders == ["", "", "Leave empty to use this deployment's key"]


def test_push_form_is_disabled_with_the_reason(services: AppServices) -> None:
    run = finished_run(services, ADA)
    for visitor, reason in ((ADA, ""), (ADMIN, ""), (BOB, "Only ada and administrators"), (GUEST, "Only ada")):
        button, note = finetune.refresh(services, visitor, run.id, None, [], True)[4:6]
        assert button["interactive"] == (not reason) and note["value"].startswith(reason)


def test_actions_raise_access_denied_without_the_page(services: AppServices) -> None:
    run = finished_run(services, ADA)
    calls: list[Callable[..., object]] = [finetune.cancel, finetune.resume, finetune.use, finetune.share]
    calls += [finetune.unshare, finetune.revert, finetune.delete]
    for call in calls:
        with pytest.raises(AccessDenied, match="Only ada"):
            call(services, BOB, run)
    with pytest.raises(AccessDenied, match="Only ada"):
        finetune.rename(services, BOB, run, "x")


# Over HTTP: a deployment on another address than localhost, where guests may train


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, AppServices]]:
    """Address and services of a served application in mode `link` with an API key."""
    folder = tmp_path_factory.mktemp("deployment")
    options: dict[str, Any] = {
        "host": "0.0.0.0",
        "guest_runs": True,
        "api_keys": (hashlib.sha256(KEY.encode()).hexdigest(),),
    }
    services = app.build_services(Settings(data_dir=folder, **options), FAKE)
    with app_server(folder, services=services, **options) as address:
        yield address, services
    for run in services.runs.list():
        if not run.status().finished:
            run.cancel()
    until(lambda: not any(run.alive() for run in services.runs.list()))
    services.worker.stop()
    for name in [name for name in MODELS if name.startswith("run-")]:
        del MODELS[name]


def submit_over_http(client: EventClient, seed: int) -> None:
    client.send("tune-start", "click", tune_base="moondream-tiny", tune_seed=seed, tune_length="Smoke test")


def test_guest_controls_an_own_run_and_no_other_guest_does(deployment: tuple[str, AppServices]) -> None:
    address, services = deployment
    with EventClient(address) as mine, EventClient(address) as other:
        submit_over_http(mine, 301)
        run = next(run for run in services.runs.list() if run.config().seed == 301)
        assert run.owner.startswith("guest:") and len(run.owner) > len("guest:")
        other.session_hash = mine.session_hash  # a leaked session hash does not help
        for action in ("cancel", "delete", "rename", "use", "share", "resume"):
            with pytest.raises(EventError, match="Only the guest who started it"):
                other.send("run-view", "act", {"run": run.id, "action": action, "name": "x"})
        with pytest.raises(EventError, match="Only the guest who started it"):
            other.send("run-view", "download", {"run": run.id})
        with pytest.raises(EventError, match="which is the limit"):
            submit_over_http(mine, 302)
        mine.send("run-view", "act", {"run": run.id, "action": "cancel"})
        until(lambda: run.status().state == "cancelled" and not run.alive())
        with pytest.raises(EventError, match="Only administrators can offer"):
            mine.send("run-view", "act", {"run": run.id, "action": "share"})
        mine.send("run-view", "act", {"run": run.id, "action": "delete"})
    assert run.id not in [listed.id for listed in services.runs.list()]


def test_request_without_a_session_is_refused(deployment: tuple[str, AppServices]) -> None:
    address, services = deployment
    run = finished_run(services, ADA)
    with EventClient(address) as client:
        client.http.cookies.clear()
        with pytest.raises(EventError, match="session is unknown"):
            submit_over_http(client, 303)
        with pytest.raises(EventError, match="session is unknown"):
            client.send("run-view", "act", {"run": run.id, "action": "delete"})
    assert run.status().state == "done"


def test_administrator_shares_a_guests_run(deployment: tuple[str, AppServices]) -> None:
    address, services = deployment
    run = finished_run(services, GUEST)
    with EventClient(address) as client:
        assert client.http.get("/admin", params={"token": services.access.link.token}).status_code in (200, 303)
        client.send("run-view", "act", {"run": run.id, "action": "share"})
        assert services.adapters.is_shared(run.id)
        client.send("run-view", "act", {"run": run.id, "action": "unshare"})
        assert not services.adapters.is_shared(run.id)


def test_api_key_owns_its_runs(deployment: tuple[str, AppServices]) -> None:
    address, services = deployment
    others = finished_run(services, ADA)

    def call(client: EventClient, name: str, *data: Any) -> Any:
        body = {"data": list(data), "session_hash": client.session_hash}
        response = client.http.post(f"/gradio_api/run/{name}", json=body)
        if response.is_error:
            raise EventError(response.json().get("error"))
        return response.json()["data"][0]

    arguments = ({"colour": 1}, "moondream-tiny", "bundled", 6, 304, "")
    with EventClient(address, headers={"X-Moondream-Auth": KEY}) as client, EventClient(address) as guest:
        run = services.runs.get(call(client, "retrain", *arguments)["run"])
        assert run.owner.startswith("key:") and KEY not in run.owner
        assert call(client, "run_status", run.id)["mine"] and not call(guest, "run_status", run.id)["mine"]
        for name in ("cancel_run", "use_run", "revert"):
            with pytest.raises(EventError):
                call(client, name, others.id)
            with pytest.raises(EventError):
                call(guest, name, run.id)
        assert not run.cancelled
        call(client, "cancel_run", run.id)
        assert run.cancelled
