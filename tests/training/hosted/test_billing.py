"""Payment of hosted runs, with a simulated tuning API over HTTP: budgets, usage events, killed runs, lost databases."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import func, select

from storage.database import Database
from storage.tables import DOLLAR, EVENTS, KINDS
from tests.support.runs import until
from tests.support.tuning_server import KEY, Drop, TuningServer, run_tuning_server
from training.grpo.__main__ import execute
from training.hosted.billing import ACCOUNT_VARIABLE, BillingAccount
from training.hosted.cost import CostTracker
from training.hosted.trainer import train_hosted
from training.runs.queue import RunQueue
from training.runs.run import Ownership, Run, RunConfig, RunStore
from training.runs.usage_events import run_events
from usage.budgets import Budget, Budgets
from usage.events import Deployment, UsageEvent
from usage.recorder import insert_events

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {"base": "moondream3-preview", "reward": {"colour": 1.0}, "seed": 3, "steps": 6}
SETTINGS |= {"backend": "hosted", "rank": 8, "rollouts": 6, "probe_every": 3, "learning_rate": 2e-3}
SETTINGS |= {"photos_per_step": 2, "sft_steps": 2}
DEPLOYMENT = Deployment("main", "c0ffee", "me/playground")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[TuningServer]:
    """Start a simulated tuning API that the environment points to."""
    with run_tuning_server() as running:
        monkeypatch.setenv("MOONDREAM_API_URL", running.address)
        monkeypatch.setenv("MOONDREAM_API_KEY", KEY)
        monkeypatch.setenv("MOONDREAM_RATE", "1000")
        yield running


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database of each kind."""
    file_url = f"sqlite:///{tmp_path / 'usage.sqlite3'}"
    return file_url if request.param == "sqlite" else request.getfixturevalue("postgres_url")


@pytest.fixture
def database(url: str, monkeypatch: pytest.MonkeyPatch) -> Database:
    """Return the database of the deployment, to which training processes record."""
    for name, value in BillingAccount(url, DEPLOYMENT).to_env().items():
        monkeypatch.setenv(name, value)
    return Database(url)


def make_config(photo_folder: str, **changes: Any) -> RunConfig:
    return RunConfig.create(**SETTINGS | {"photos": photo_folder, "held_out": photo_folder + "/"} | changes)


def make_run(folder: Path, photo_folder: str, own_key: bool = False, **changes: Any) -> Run:
    run = RunStore(folder / "runs").create(make_config(photo_folder, **changes))
    run.set_ownership(Ownership("hf:1", "ada", own_key))
    return run


def train(run: Run) -> None:
    """Execute a run as `python -m training.grpo` does."""
    execute(run, run.config(), train_hosted)


def interrupt(run: Run) -> str:
    """Execute a run that must be interrupted; return its message."""
    with pytest.raises(SystemExit):
        train(run)
    assert run.status().state == "interrupted"
    return run.status().message


def recorded(database: Database) -> list[Any]:
    """Return the recorded events of hosted runs: skill, payer, branch, outcome and cost in US dollars."""
    query = select(KINDS.c.skill, KINDS.c.payer, KINDS.c.branch, KINDS.c.outcome, EVENTS.c.cost / float(DOLLAR))
    query = query.join(KINDS, KINDS.c.id == EVENTS.c.kind).where(KINDS.c.source == "hosted-rl")
    with database.transaction() as connection:
        return [tuple(row) for row in connection.execute(query)]


def spend(database: Database, dollars: float) -> None:
    """Record a call of the deployment that is not part of a run."""
    now = datetime.now(timezone.utc)
    event = UsageEvent(now, "moondream3-preview", "query", cost=dollars, cost_basis="estimated", branch="main")
    insert_events(database, [event])


def paid_requests(server: TuningServer) -> list[str]:
    paid = ("/query", "/rollouts", "/train_step")
    return [path for path in server.requests if path.endswith(paid)]


def max_step_cost() -> float:
    cost = CostTracker("moondream3-preview").max_step_cost(RunConfig.create(**SETTINGS))
    assert cost
    return cost


def test_run_stops_within_one_step_of_the_budget_and_resumes(
    tmp_path: Path, photo_folder: str, server: TuningServer, database: Database
) -> None:
    budgets, step = Budgets(database), max_step_cost()
    spend(database, 1.0)  # calls of others count as well
    budgets.set(Budget("main", 1.0 + 3 * step, stop=True))
    run = make_run(tmp_path, photo_folder, steps=50)
    message = interrupt(run)
    assert "monthly budget of the branch “main”" in message and "resume" in message
    assert run.metrics(), "it had made some steps"
    (status,) = budgets.list()
    assert status.budget.limit <= status.spent <= status.budget.limit + step
    assert len(recorded(database)) == len(run.calls()) > 0

    count = len(paid_requests(server))
    interrupt(run)
    assert len(paid_requests(server)) == count, "nothing is paid while the budget is spent"

    budgets.set(Budget("main", 1.0 + 6 * step, stop=True))
    interrupt(run)
    assert len(paid_requests(server)) > count
    assert [row["step"] for row in run.metrics()] == list(range(1, len(run.metrics()) + 1))
    assert budgets.list()[0].spent <= 1.0 + 7 * step


def test_every_paid_request_of_a_run_is_recorded_once(
    tmp_path: Path, photo_folder: str, server: TuningServer, database: Database
) -> None:
    run = make_run(tmp_path, photo_folder)
    train(run)
    result, events = run.result(), recorded(database)
    assert result and run.status().state == "done"
    assert sum(event[-1] for event in events) == pytest.approx(result["dollars"], rel=1e-6)
    updates = [event for event in events if event[0] == "train_step"]
    assert len(updates) == sum(path.endswith("train_step") for path in server.requests)
    assert {event[1:4] for event in events} == {("deployment", "main", "ok")}
    again = run_events(run, lambda seconds: None)  # as the queue records them when the run has ended
    insert_events(database, [event.with_deployment(DEPLOYMENT) for event in again])
    assert len(recorded(database)) == len(events)
    assert any(event.reward is not None for event in again)


def test_visitors_own_key_is_not_limited_by_the_deployments_budget(
    tmp_path: Path, photo_folder: str, server: TuningServer, database: Database
) -> None:
    spend(database, 1.0)
    Budgets(database).set(Budget("main", 0.5, stop=True))
    run = make_run(tmp_path, photo_folder, own_key=True, steps=2)
    train(run)
    assert run.status().state == "done"
    assert {event[1] for event in recorded(database)} == {"visitor"}
    assert len(recorded(database)) == len(run.calls())
    assert Budgets(database).list()[0].spent == pytest.approx(1.0)


def test_unreachable_database_stops_a_run_before_it_pays(
    tmp_path: Path, photo_folder: str, server: TuningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = BillingAccount("postgresql://me:hunter2@127.0.0.1:9/gone", DEPLOYMENT)
    monkeypatch.setenv(ACCOUNT_VARIABLE, closed.to_env()[ACCOUNT_VARIABLE])
    run = make_run(tmp_path, photo_folder, steps=2)
    message = interrupt(run)
    assert "database cannot be reached" in message and "Resume it when the database works again" in message
    assert not paid_requests(server)
    assert all(b"hunter2" not in file.read_bytes() for file in run.folder.iterdir() if file.is_file())
    assert "hunter2" not in repr(closed)

    run.set_ownership(Ownership("hf:1", own_key=True))
    train(run)  # the visitor's own payment does not depend on the deployment's database
    assert run.status().state == "done"


def test_database_lost_during_a_run_loses_no_call(
    tmp_path: Path, photo_folder: str, server: TuningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "usage.sqlite3"
    account = BillingAccount(f"sqlite:///{file}", DEPLOYMENT)
    monkeypatch.setenv(ACCOUNT_VARIABLE, account.to_env()[ACCOUNT_VARIABLE])
    steps: list[str] = []

    def damage(path: str) -> None:
        if path.endswith("train_step"):
            steps.append(path)
            if len(steps) == 4:
                file.write_bytes(b"not a database " * 1000)

    server.inject_fault = damage
    run = make_run(tmp_path, photo_folder)
    assert "Resume it when the database works again" in interrupt(run)
    assert len(steps) == 4 and paid_requests(server)[-1].endswith("train_step")
    calls = len(run.calls())
    file.unlink()
    train(run)
    assert run.status().state == "done" and len(run.calls()) > calls
    assert len(recorded(Database(account.database_url))) == len(run.calls())


def training_processes() -> list[psutil.Process]:
    """Return the training processes that queues of this process have started."""
    processes = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            if "training.grpo" in child.cmdline():
                processes.append(child)
    return processes


def test_killed_training_process_loses_at_most_the_step_in_flight(
    tmp_path: Path, photo_folder: str, server: TuningServer, database: Database, url: str
) -> None:
    """Kill the real process with SIGKILL during its fifth update; the events before it are in the database."""
    during: list[int] = []
    updates: list[str] = []
    until(lambda: not training_processes())  # those of the test before may still be ending, on the same server

    def kill(path: str) -> Drop | None:
        if not path.endswith("train_step"):
            return None
        updates.append(path)
        if len(updates) != 5:
            return None
        during.append(len(recorded(database)))
        for process in training_processes():
            process.send_signal(signal.SIGKILL)
        return Drop(after=False)

    server.inject_fault = kill
    runs = RunStore(tmp_path / "runs")
    queue = RunQueue(runs, poll_seconds=0.05, environment=BillingAccount(url, DEPLOYMENT).to_env())
    try:
        run = queue.submit(make_config(photo_folder))
        until(lambda: run.status().ended)  # the queue has stored how it ended
        assert run.status().state == "interrupted" and "killed" in run.status().message
        events = recorded(database)
        assert len(events) == during[0] > 0, "the events were there while the run was running"
        assert sum(event[0] == "train_step" for event in events) == 4
        queue.resume(run)
        until(lambda: run.status().finished)
        assert run.status().state == "done", run.log()
        assert len(recorded(database)) == len(run.calls())
        assert sum(event[0] == "train_step" for event in recorded(database)) == server.finetunes["01HX0000"].step == 8
    finally:
        queue.stop()


def test_queue_keeps_the_message_of_a_run_that_its_budget_interrupted(
    tmp_path: Path, photo_folder: str, server: TuningServer, database: Database, url: str
) -> None:
    spend(database, 1.0)
    Budgets(database).set(Budget("main", 0.5, stop=True))
    queue = RunQueue(
        RunStore(tmp_path / "runs"), poll_seconds=0.05, environment=BillingAccount(url, DEPLOYMENT).to_env()
    )
    try:
        run = queue.submit(make_config(photo_folder))
        until(lambda: run.status().finished)
        assert run.status().state == "interrupted" and "monthly budget" in run.status().message
        assert not paid_requests(server)
    finally:
        queue.stop()


def test_account_names_the_database_independently_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    environ = BillingAccount("sqlite:///data/usage.sqlite3", DEPLOYMENT).to_env()
    monkeypatch.chdir("/")
    account = BillingAccount.from_env(environ)
    assert account == BillingAccount(f"sqlite:///{tmp_path}/data/usage.sqlite3", DEPLOYMENT)
    assert BillingAccount.from_env({}) is None


def test_log_of_a_run_contains_neither_photos_nor_prompts(
    tmp_path: Path, photo_folder: str, server: TuningServer, database: Database, capfd: pytest.CaptureFixture[str]
) -> None:
    faults: list[Any] = [None, None, 400]
    server.inject_fault = lambda path: faults.pop(0) if faults and path.endswith("rollouts") else None
    run = make_run(tmp_path, photo_folder)
    with pytest.raises(SystemExit):
        train(run)
    train(run)
    output = "".join(capfd.readouterr())
    assert "spent $" in output
    question = next(body["question"] for body in server.bodies if isinstance(body, dict) and "question" in body)
    written = output + "".join(file.read_text() for file in run.folder.glob("*.json*"))
    assert "base64" not in written and question[:40] not in written
    with database.transaction() as connection:
        assert connection.execute(select(func.count()).select_from(EVENTS)).scalar() == len(run.calls())
