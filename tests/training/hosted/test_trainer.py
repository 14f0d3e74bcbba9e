"""Tests of hosted training against a fake tuning API: learning, budget, lost responses and resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes import Recipe, load_photo, save_picture, shrink
from tests.support.tuning_server import KEY, Drop, Finetune, TuningServer, run_tuning_server
from training.data.bundled import bundled_photos
from training.grpo.__main__ import execute
from training.hosted.cost import CostTracker
from training.hosted.trainer import HostedRunState, HostedTrainer, client_from_env, train_hosted
from training.runs.run import Run, RunAborted, RunConfig
from training.runs.usage_events import run_events

pytestmark = pytest.mark.slow

QUICK: dict[str, Any] = {"base": "moondream3-preview", "reward": {"colour": 1.0}, "seed": 3, "steps": 6}
QUICK |= {"backend": "hosted", "rank": 8, "rollouts": 6, "probe_every": 3, "learning_rate": 2e-3, "photos_per_step": 2}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[TuningServer]:
    """Start a fake tuning API that the environment points to."""
    with run_tuning_server() as running:
        monkeypatch.setenv("MOONDREAM_API_URL", running.address)
        monkeypatch.setenv("MOONDREAM_API_KEY", KEY)
        monkeypatch.setenv("MOONDREAM_RATE", "1000")
        yield running


def make_run(folder: Path, photo_folder: str, **changes: Any) -> Run:
    (folder / "run").mkdir()
    config = RunConfig.create(**QUICK | {"photos": photo_folder, "held_out": photo_folder + "/"} | changes)
    (folder / "run" / "config.json").write_text(config.model_dump_json())
    return Run(folder / "run")


def train(run: Run) -> None:
    """Execute a run as `python -m training.grpo` does."""
    execute(run, run.config(), train_hosted)


def all_text(run: Run) -> str:
    return "".join(path.read_text(errors="replace") for path in run.folder.rglob("*") if path.is_file())


def test_reward_on_held_out_photos_rises(
    tmp_path: Path, photo_folder: str, server: TuningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The simulated model cannot see a photo, so it cannot answer flawed and undamaged photos differently.
    monkeypatch.setattr("training.hosted.trainer.mix_flawed", lambda photo_set, seed: photo_set)
    run = make_run(tmp_path, photo_folder, steps=12)
    train(run)
    result, status = run.result(), run.status()
    assert (status.state, status.step) == ("done", 12) and result
    probes = [row["held_out"] for row in run.probes()]
    assert max(probes[1:]) > probes[0]
    assert result["difference"]["mean"] > 0.05 and result["wins"] == (result["difference"]["low"] > 0)
    finetune = server.finetunes[result["finetune_id"]]
    assert result["model"] == f"moondream3-preview/{result['finetune_id']}@{max(finetune.saved)}"
    assert 6 <= finetune.step <= 12 and result["twice"] == 0  # a step without a learning signal is not sent
    assert [row["step"] for row in run.metrics()] == list(range(1, 13))
    last = run.rollouts(12)
    assert last and last["step"] == 12 and len(last["groups"][0]["rollouts"]) == run.config().rollouts
    assert all(load_photo(run.rollout_photo(group["photo"])).size for group in last["groups"])
    assert KEY not in all_text(run)


def test_cost_is_recorded_and_bounded(tmp_path: Path, photo_folder: str, server: TuningServer) -> None:
    run = make_run(tmp_path, photo_folder)
    train(run)
    result, bound = run.result(), CostTracker("moondream3-preview").max_cost(run.config(), 3)
    assert result and bound and 0 < result["dollars"] <= bound < 5 * result["dollars"]
    spent = [row["dollars"] for row in run.metrics()]
    assert spent == sorted(spent)
    events = run_events(run, lambda seconds: None)
    assert {event.source for event in events} == {"hosted-rl"}
    assert "train_step" in {event.skill for event in events}
    assert all(event.tokens_in and event.tokens_out for event in events)
    assert sum(event.cost or 0 for event in events) == pytest.approx(result["dollars"])
    assert result["dollars"] > spent[-1], "the final evaluation is paid for after the last step"


def test_budget_ends_the_run_and_keeps_its_result(tmp_path: Path, photo_folder: str, server: TuningServer) -> None:
    costs = CostTracker("moondream3-preview")
    step, rest = costs.max_step_cost(RunConfig.create(**QUICK)), costs.max_evaluation_cost(3 + 8)
    assert step and rest
    run = make_run(tmp_path, photo_folder, budget=3.2 * step + rest, probe_every=1, steps=50)
    train(run)
    result, budget = run.result(), run.config().budget
    assert run.status().state == "done" and result and "budget ended the run" in result["alarm"]
    assert budget and result["dollars"] <= budget and 1 <= len(run.metrics()) < 50


def test_resumed_run_does_not_pay_for_its_base_again(tmp_path: Path, photo_folder: str, server: TuningServer) -> None:
    run = make_run(tmp_path, photo_folder)
    train(run)
    base_requests = sum(isinstance(body, dict) and body.get("model") == run.config().base for body in server.bodies)
    resumed = HostedTrainer(run, run.config(), client_from_env(), lambda phase: None)
    count = len(server.requests)
    assert base_requests == len(resumed.evaluate_base()) == 3 and len(server.requests) == count


def test_budget_without_a_known_price_is_refused(tmp_path: Path, photo_folder: str, server: TuningServer) -> None:
    run = make_run(tmp_path, photo_folder, base="moondream-tiny", budget=1.0)
    with pytest.raises(SystemExit):
        train(run)
    assert "No price is known" in run.status().message


def test_groups_without_reward_variance_are_skipped_and_counted(
    tmp_path: Path, photo_folder: str, server: TuningServer
) -> None:
    server.finetunes["01HX"] = Finetune("playground-run", 8)
    server.finetunes["01HX"].preferences[0] = 50.0  # every answer is the same
    run = make_run(tmp_path, photo_folder, steps=3)
    with pytest.raises(SystemExit):
        train(run)
    assert "Nothing was learned" in run.status().message
    assert HostedRunState.load(run).silent == HostedRunState.load(run).groups == 6
    assert not any("train_step" in path for path in server.requests)


def test_alarm_is_raised_while_the_server_trains(tmp_path: Path, photo_folder: str, server: TuningServer) -> None:
    for index, photo in enumerate(bundled_photos("train")[:5]):
        save_picture(shrink(load_photo(photo.path), 160), Recipe(), Path(photo_folder) / f"more-{index}.png")
    server.finetunes["01HX"] = Finetune("playground-run", 8)
    server.finetunes["01HX"].preferences[0] = 50.0  # every answer is the same
    run = make_run(tmp_path, photo_folder, steps=6)
    with pytest.raises(SystemExit):
        train(run)
    assert run.result() is None, "the run ended without a result"
    (alarm,) = [row for row in run.alarms() if row["kind"] == "repeated_answers"]
    assert (alarm["step"], alarm["last_step"]) == (6, 6) and "8 of 8 answers" in alarm["message"].lower()
    assert all(path.is_file() for path in run.alarm_pictures("repeated_answers"))


@pytest.mark.parametrize("reports_step", [True, False])
def test_step_with_a_lost_response_is_not_sent_again(
    tmp_path: Path, photo_folder: str, server: TuningServer, reports_step: bool
) -> None:
    drops, server.reports_step = [Drop(after=True)], reports_step
    server.inject_fault = lambda path: drops.pop() if drops and path.endswith("train_step") else None
    run = make_run(tmp_path, photo_folder)
    train(run)
    assert run.status().state == "done" and server.finetunes["01HX0000"].step == 6
    assert sum("train_step" in path for path in server.requests) == 6


def test_step_that_was_not_applied_is_sent_again(tmp_path: Path, photo_folder: str, server: TuningServer) -> None:
    drops = [Drop(after=False), 500, 429]
    server.inject_fault = lambda path: drops.pop() if drops and path.endswith("train_step") else None
    run = make_run(tmp_path, photo_folder)
    train(run)
    assert run.status().state == "done" and server.finetunes["01HX0000"].step == 6
    assert sum("train_step" in path for path in server.requests) == 9


def test_step_applied_twice_is_reported(
    tmp_path: Path, photo_folder: str, server: TuningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    apply, repeat = server.train, [True]

    def twice(body: Any) -> dict[str, Any]:
        if repeat and repeat.pop():
            apply(body)
        return apply(body)

    server.train = twice  # type: ignore[method-assign]
    run = make_run(tmp_path, photo_folder)
    train(run)
    result = run.result()
    assert result and result["twice"] == 1 and "charged, 1 extra step" in capsys.readouterr().out


def test_killed_run_continues_where_the_finetune_stands(
    tmp_path: Path, photo_folder: str, server: TuningServer
) -> None:
    run = make_run(tmp_path, photo_folder)
    faults: list[Any] = [None, None, 402]
    server.inject_fault = lambda path: faults.pop(0) if faults and path.endswith("train_step") else None
    with pytest.raises(SystemExit):
        train(run)
    assert "no credit" in run.status().message and "Resume" in run.status().message
    state = HostedRunState.load(run)
    assert (state.step, state.done) == (2, 2)
    server.finetunes["01HX0000"].step += 1  # the third step was applied, but its response was lost
    train(run)
    assert run.status().state == "done" and server.finetunes["01HX0000"].step == 6
    assert len(server.finetunes) == 1


def test_cancelled_run_sends_no_more_requests(tmp_path: Path, photo_folder: str, server: TuningServer) -> None:
    run = make_run(tmp_path, photo_folder, steps=200)
    server.inject_fault = lambda path: run.cancel() if path.endswith("train_step") else None
    train(run)
    assert run.status().state == "cancelled" and server.finetunes["01HX0000"].step == 1


def test_supervised_steps_come_first(tmp_path: Path, photo_folder: str, server: TuningServer) -> None:
    run = make_run(tmp_path, photo_folder, sft_steps=3, steps=2)
    train(run)
    sent = [body for path, body in zip(server.requests, server.bodies, strict=True) if "train_step" in path]
    assert [step["groups"][0]["mode"] for step in sent] == ["sft"] * 3 + ["rl"] * 2
    answers = [group["target"]["answer"] for step in sent[:3] for group in step["groups"]]
    assert all(answer.startswith("crop") for answer in answers) and len(set(answers)) > 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MOONDREAM_API_KEY": "", "MOONDREAM_API_URL": ""}, "needs a key"),
        ({"MOONDREAM_API_KEY": "wrong"}, "does not accept the key"),
        ({"MOONDREAM_API_URL": "nowhere"}, "looks like"),
        ({"MOONDREAM_RATE": "0"}, "cannot be used"),
    ],
)
def test_invalid_environment_fails_the_run_with_a_remedy(
    tmp_path: Path,
    photo_folder: str,
    server: TuningServer,
    monkeypatch: pytest.MonkeyPatch,
    environment: Any,
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = make_run(tmp_path, photo_folder)
    with pytest.raises(SystemExit):
        train(run)
    assert message in run.status().message and KEY not in all_text(run)


@pytest.mark.parametrize(("changes", "message"), [({"rank": 7}, "ranks 8"), ({"rollouts": 20}, "at most 16")])
def test_settings_unsupported_by_the_api_are_refused_before_any_request(
    tmp_path: Path, photo_folder: str, server: TuningServer, changes: Any, message: str
) -> None:
    run = make_run(tmp_path, photo_folder, **changes)
    with pytest.raises(RunAborted, match=message):
        train_hosted(run, run.config(), print)
    assert not server.requests


def test_base_and_tuned_model_get_identical_requests(tmp_path: Path, photo_folder: str, server: TuningServer) -> None:
    train(make_run(tmp_path, photo_folder))
    queries = [body for path, body in zip(server.requests, server.bodies, strict=True) if path.endswith("/query")]
    models = {body.pop("model") for body in queries}
    assert len(models) == 2 and "moondream3-preview" in models
    assert len({json.dumps(body) for body in queries}) == 3 == len(queries) // 2  # only the three photos differ
