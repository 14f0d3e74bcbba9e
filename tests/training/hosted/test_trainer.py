"""The hosted loop over real HTTP: it learns, pays no more than it may, and tells what is applied twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.tuning_server import KEY, Drop, Finetune, StandInTuning, stand_in_tuning
from training.grpo import train as grpo
from training.hosted import trainer as hosted
from training.hosted.cost import Spend
from training.runs.run import Run, RunAborted, RunConfig
from training.runs.usage_events import run_events

QUICK: dict[str, Any] = {"base": "moondream3-preview", "reward": {"colour": 1.0}, "seed": 3, "steps": 6}
QUICK |= {"where": "hosted", "rank": 8, "rollouts": 6, "probe_every": 3, "learning_rate": 2e-3, "photos_per_step": 2}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInTuning]:
    """The stand-in, whose address and key this process is given."""
    with stand_in_tuning() as running:
        monkeypatch.setenv("MOONDREAM_API_URL", running.address)
        monkeypatch.setenv("MOONDREAM_API_KEY", KEY)
        monkeypatch.setenv("MOONDREAM_RATE", "1000")
        yield running


def made(folder: Path, few: str, **changes: Any) -> Run:
    (folder / "run").mkdir()
    config = RunConfig.make(**QUICK | {"photos": few, "held_out": few + "/"} | changes)
    (folder / "run" / "config.json").write_text(config.model_dump_json())
    return Run(folder / "run")


def do(run: Run) -> None:
    """As `python -m training.grpo` does it."""
    grpo._live(run, run.config(), True, hosted.work)


def everything(run: Run) -> str:
    return "".join(path.read_text(errors="replace") for path in run.folder.rglob("*") if path.is_file())


def test_the_reward_on_held_out_photos_rises(tmp_path: Path, few: str, server: StandInTuning) -> None:
    run = made(tmp_path, few, steps=12)
    do(run)
    result, status = run.result(), run.status()
    assert (status.state, status.step) == ("done", 12) and result
    probes = [line["held_out"] for line in run.probes()]
    assert max(probes[1:]) > probes[0]
    assert result["difference"]["mean"] > 0.05 and result["wins"] == (result["difference"]["low"] > 0)
    finetune = server.finetunes[result["finetune_id"]]
    assert result["model"] == f"moondream3-preview/{result['finetune_id']}@{max(finetune.saved)}"
    assert 6 <= finetune.step <= 12 and result["twice"] == 0  # a step whose groups all agree is not sent
    assert [line["step"] for line in run.metrics()] == list(range(1, 13))
    assert KEY not in everything(run)


def test_what_is_paid_is_counted_and_bounded(tmp_path: Path, few: str, server: StandInTuning) -> None:
    run = made(tmp_path, few)
    do(run)
    result, bound = run.result(), Spend("moondream3-preview").bound(run.config(), 3)
    assert result and bound and 0 < result["dollars"] <= bound < 5 * result["dollars"]
    spent = [line["dollars"] for line in run.metrics()]
    assert spent == sorted(spent)
    events = run_events(run, lambda seconds: None)
    assert {event.source for event in events} == {"hosted-rl"}
    assert sum(event.cost or 0 for event in events) == pytest.approx(spent[-1])


def test_the_budget_ends_a_run_and_what_was_learned_is_kept(tmp_path: Path, few: str, server: StandInTuning) -> None:
    spend = Spend("moondream3-preview")
    step, rest = spend.step(RunConfig.make(**QUICK)), spend.judging(3 + 8)
    assert step and rest
    run = made(tmp_path, few, budget=3.2 * step + rest, probe_every=1, steps=50)
    do(run)
    result, budget = run.result(), run.config().budget
    assert run.status().state == "done" and result and "budget ended it" in result["alarm"]
    assert budget and result["dollars"] <= budget and 1 <= len(run.metrics()) < 50


def test_a_run_that_goes_on_does_not_pay_for_its_base_again(tmp_path: Path, few: str, server: StandInTuning) -> None:
    run = made(tmp_path, few)
    do(run)
    asked = sum(isinstance(body, dict) and body.get("model") == run.config().base for body in server.bodies)
    again = hosted._Loop(run, run.config(), hosted.server_of_environment(), lambda phase: None)
    before = len(server.asked)
    assert asked == len(again._base()) == 3 and len(server.asked) == before


def test_a_budget_without_a_price_is_refused(tmp_path: Path, few: str, server: StandInTuning) -> None:
    run = made(tmp_path, few, base="moondream-tiny", budget=1.0)
    with pytest.raises(SystemExit):
        do(run)
    assert "No price is known" in run.status().message


def test_groups_without_variance_are_left_out_and_counted(tmp_path: Path, few: str, server: StandInTuning) -> None:
    server.finetunes["01HX"] = Finetune("playground-run", 8)
    server.finetunes["01HX"].likes[0] = 50.0  # it says one thing only
    run = made(tmp_path, few, steps=3)
    with pytest.raises(SystemExit):
        do(run)
    assert "Nothing was learned" in run.status().message
    assert hosted.State.of(run).silent == hosted.State.of(run).groups == 6
    assert not any("train_step" in path for path in server.asked)


@pytest.mark.parametrize("says_step", [True, False])
def test_a_step_whose_answer_is_lost_is_not_sent_again(
    tmp_path: Path, few: str, server: StandInTuning, says_step: bool
) -> None:
    drops, server.says_step = [Drop(after=True)], says_step
    server.before = lambda path: drops.pop() if drops and path.endswith("train_step") else None
    run = made(tmp_path, few)
    do(run)
    assert run.status().state == "done" and server.finetunes["01HX0000"].step == 6
    assert sum("train_step" in path for path in server.asked) == 6


def test_a_step_that_did_not_arrive_is_sent_again(tmp_path: Path, few: str, server: StandInTuning) -> None:
    drops = [Drop(after=False), 500, 429]
    server.before = lambda path: drops.pop() if drops and path.endswith("train_step") else None
    run = made(tmp_path, few)
    do(run)
    assert run.status().state == "done" and server.finetunes["01HX0000"].step == 6
    assert sum("train_step" in path for path in server.asked) == 9


def test_a_step_that_is_applied_twice_is_told(
    tmp_path: Path, few: str, server: StandInTuning, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, doubled = server.train, [True]

    def twice(body: Any) -> dict[str, Any]:
        if doubled and doubled.pop():
            plain(body)
        return plain(body)

    server.train = twice  # type: ignore[method-assign]
    run = made(tmp_path, few)
    do(run)
    result = run.result()
    assert result and result["twice"] == 1 and "WARNING: 1 step more" in capsys.readouterr().out


def test_a_run_that_was_killed_goes_on_where_the_finetune_stands(
    tmp_path: Path, few: str, server: StandInTuning
) -> None:
    run = made(tmp_path, few)
    faults: list[Any] = [None, None, 402]
    server.before = lambda path: faults.pop(0) if faults and path.endswith("train_step") else None
    with pytest.raises(SystemExit):
        do(run)
    assert "no credit" in run.status().message and "Resume" in run.status().message
    state = hosted.State.of(run)
    assert (state.step, state.done) == (2, 2)
    server.finetunes["01HX0000"].step += 1  # its third step was applied, and it was killed before it knew
    do(run)
    assert run.status().state == "done" and server.finetunes["01HX0000"].step == 6
    assert len(server.finetunes) == 1


def test_a_cancelled_run_stops_asking(tmp_path: Path, few: str, server: StandInTuning) -> None:
    run = made(tmp_path, few, steps=200)
    server.before = lambda path: run.cancel() if path.endswith("train_step") else None
    do(run)
    assert run.status().state == "cancelled" and server.finetunes["01HX0000"].step == 1


def test_examples_come_first_where_they_are_asked_for(tmp_path: Path, few: str, server: StandInTuning) -> None:
    run = made(tmp_path, few, sft_steps=3, steps=2)
    do(run)
    sent = [body for path, body in zip(server.asked, server.bodies, strict=True) if "train_step" in path]
    assert [step["groups"][0]["mode"] for step in sent] == ["sft"] * 3 + ["rl"] * 2
    answers = [group["target"]["answer"] for step in sent[:3] for group in step["groups"]]
    assert all(answer.startswith("crop") for answer in answers) and len(set(answers)) > 1


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"MOONDREAM_API_KEY": "", "MOONDREAM_API_URL": ""}, "needs a key"),
        ({"MOONDREAM_API_KEY": "wrong"}, "does not accept the key"),
        ({"MOONDREAM_API_URL": "nowhere"}, "looks like"),
        ({"MOONDREAM_RATE": "0"}, "cannot be used"),
    ],
)
def test_what_cannot_work_says_what_to_do(
    tmp_path: Path, few: str, server: StandInTuning, monkeypatch: pytest.MonkeyPatch, environment: Any, said: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = made(tmp_path, few)
    with pytest.raises(SystemExit):
        do(run)
    assert said in run.status().message and KEY not in everything(run)


@pytest.mark.parametrize(("changes", "said"), [({"rank": 7}, "ranks 8"), ({"rollouts": 20}, "at most 16")])
def test_what_the_api_does_not_take_is_refused_here(
    tmp_path: Path, few: str, server: StandInTuning, changes: Any, said: str
) -> None:
    run = made(tmp_path, few, **changes)
    with pytest.raises(RunAborted, match=said):
        hosted.work(run, run.config(), print)
    assert not server.asked


def test_base_and_tuned_model_are_asked_in_the_same_way(tmp_path: Path, few: str, server: StandInTuning) -> None:
    do(made(tmp_path, few))
    asked = [body for path, body in zip(server.asked, server.bodies, strict=True) if path.endswith("/query")]
    models = {body.pop("model") for body in asked}
    assert len(models) == 2 and "moondream3-preview" in models
    assert len({json.dumps(body) for body in asked}) == 3 == len(asked) // 2  # three photos, nothing else differs
