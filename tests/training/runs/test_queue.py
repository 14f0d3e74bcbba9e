"""Tests of the run queue with a fake training process: order, failures, killed processes and restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import FAKE, make_config, until
from training.runs import queue as queue_module
from training.runs.queue import RunQueue
from training.runs.run import Run, RunError, RunStore, Status

pytestmark = pytest.mark.slow

GUEST = "guest:1a2b"
MakeQueue = Callable[..., RunQueue]


@pytest.fixture
def runs(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


@pytest.fixture
def make_queue(runs: RunStore) -> Iterator[MakeQueue]:
    """Create queues on one store; afterwards cancel their runs and stop them."""
    queues: list[RunQueue] = []

    def make(**settings: object) -> RunQueue:
        queues.append(RunQueue(runs, **({"command": FAKE, "poll_seconds": 0.02} | settings)))  # type: ignore[arg-type]
        return queues[-1]

    yield make
    for run in runs.list():
        run.cancel()
    until(lambda: not any(run.alive() for run in runs.list()))
    for queue in queues:
        queue.stop()


def state(run: Run) -> str:
    return run.status().state


def pid(run: Run) -> int:
    """Return the id of a run's training process."""
    return int((run.folder / "pid").read_text())


def test_run_is_executed_and_on_end_is_called(make_queue: MakeQueue) -> None:
    ended: list[str] = []
    run = make_queue(on_end=lambda run: ended.append(run.id)).submit(make_config())
    until(lambda: ended)
    assert state(run) == "done" and ended == [run.id]
    assert len(run.metrics()) == 6 and "step 6" in run.log() and run.has_adapter
    assert run.result() is not None


def test_job_gets_the_submitted_token_and_never_that_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "of-this-machine")
    command = (sys.executable, "-c", "import os; print('token', os.environ.get('HF_TOKEN'))")
    queue = RunQueue(RunStore(tmp_path / "runs"), command, poll_seconds=0.02)
    run = queue.submit(make_config(backend="jobs"), "mine")
    until(lambda: run.status().finished)
    assert "token mine" in run.log()
    with pytest.raises(RunError, match=r"your own Hugging Face token.*Enter it again and resume"):
        queue.resume(run)
    without = queue.submit(make_config(backend="jobs", seed=2))
    until(lambda: without.status().finished)
    assert "Enter it again and resume" in without.status().message and "token" not in without.log()
    queue.stop()


def test_runs_are_executed_in_order_of_submission(make_queue: MakeQueue) -> None:
    ended: list[str] = []
    queue = make_queue(on_end=lambda run: ended.append(run.id))
    first = queue.submit(make_config(seed=300))
    until(lambda: first.status().step == 3)
    others = [queue.submit(make_config(seed=seed)) for seed in (1, 2)]
    assert [queue.position(run) for run in (first, *others)] == [0, 1, 2]
    assert [state(run) for run in others] == ["queued", "queued"]
    first.cancel()
    until(lambda: len(ended) == 3)
    assert ended == [first.id, *(run.id for run in others)]
    assert state(first) == "cancelled" and [state(run) for run in others] == ["done", "done"]
    assert queue.position(first) == 0


def test_run_with_a_killed_process_can_be_resumed(make_queue: MakeQueue) -> None:
    ended: list[str] = []
    queue = make_queue(on_end=lambda run: ended.append(run.id))
    run = queue.submit(make_config(seed=300, steps=9))
    until(lambda: run.status().step == 3)
    os.kill(pid(run), signal.SIGKILL)
    until(lambda: ended)
    assert state(run) == "interrupted" and "Resume" in run.status().message
    (run.folder / "checkpoint-2").mkdir()
    queue.resume(run)
    until(lambda: run.status().step == 3 and "begins at step 2" in run.log())
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    run.cancel()
    until(lambda: state(run) == "cancelled" and len(ended) == 2)


def test_cancelled_run_resumes_to_the_same_number_of_steps(make_queue: MakeQueue) -> None:
    queue = make_queue()
    run = queue.submit(make_config(seed=300, steps=7))
    until(lambda: run.status().step == 3)
    run.cancel()
    until(lambda: state(run) == "cancelled" and not run.alive())
    (run.folder / "checkpoint-5").mkdir()
    until(lambda: queue._thread is None)
    queue.resume(run)
    until(lambda: state(run) == "done")
    assert run.status().step == 7 and not run.cancelled


def test_failing_process_fails_the_run_with_its_exit_code(make_queue: MakeQueue) -> None:
    ended: list[str] = []
    run = make_queue(on_end=lambda run: ended.append(run.id)).submit(make_config(seed=200))
    until(lambda: ended)
    assert state(run) == "failed" and "exit code 3" in run.status().message and "log" in run.status().message


def test_process_that_ends_before_the_run_starts_fails_the_run(make_queue: MakeQueue) -> None:
    queue = make_queue(command=(sys.executable, "-c", "print('no'); raise SystemExit(4)"))
    run = queue.submit(make_config())
    until(lambda: state(run) == "failed")
    assert "exit code 4" in run.status().message and run.log() == "no"


def test_missing_command_fails_the_run(make_queue: MakeQueue, tmp_path: Path) -> None:
    run = make_queue(command=(str(tmp_path / "nothing"),)).submit(make_config())
    until(lambda: state(run) == "failed")
    assert "could not be started" in run.status().message


def test_new_queue_adopts_the_running_process_and_starts_queued_runs(make_queue: MakeQueue) -> None:
    old = make_queue()
    first = old.submit(make_config(seed=300))
    until(lambda: first.status().step == 3)
    second = old.submit(make_config(seed=2))
    process = pid(first)
    old.stop()
    assert state(first) == "running" and state(second) == "queued", "a run outlives its queue"
    ended: list[str] = []
    new = make_queue(on_end=lambda run: ended.append(run.id))
    new.wake()
    assert new.position(second) == 1 and pid(first) == process
    first.cancel()
    until(lambda: len(ended) == 2)
    assert ended == [first.id, second.id] and first.log().count("begins") == 1


def test_several_queues_execute_a_run_once(make_queue: MakeQueue, runs: RunStore) -> None:
    run = runs.create(make_config())
    for queue in (make_queue(), make_queue(), make_queue()):
        queue.wake()
    until(lambda: state(run) == "done")
    assert run.log().count("begins") == 1


def test_concurrent_submissions_get_a_run_each_and_a_double_click_one(
    make_queue: MakeQueue, runs: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = make_queue()
    monkeypatch.setattr(queue, "wake", lambda: None)
    errors: list[str] = []

    def submit(seed: int) -> None:
        try:
            queue.submit(make_config(seed=seed))
        except RunError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(run.config().seed for run in runs.list()) == [1, 2] and errors == []
    submit(3)
    submit(3)
    assert len(runs.list()) == 3 and "a moment ago" in errors[0]


def test_queue_length_is_limited(make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "MAX_QUEUED", 2)
    queue = make_queue()
    monkeypatch.setattr(queue, "wake", lambda: None)
    for seed in (1, 2):
        queue.submit(make_config(seed=seed))
    with pytest.raises(RunError, match="The queue is full: 2 runs are waiting or training. Try again later"):
        queue.submit(make_config(seed=3))
    stopped = queue.unfinished()[0]
    stopped.cancel()
    queue.submit(make_config(seed=3))
    with pytest.raises(RunError, match="The queue is full"):
        queue.resume(stopped)


def test_number_of_unfinished_runs_per_owner_is_limited(
    make_queue: MakeQueue, runs: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = make_queue()
    monkeypatch.setattr(queue, "wake", lambda: None)
    first = queue.submit(make_config(seed=1), owner=GUEST, owner_name="Guest", max_unfinished=1)
    assert (first.owner, first.owner_name, first.own_key) == (GUEST, "Guest", False)
    with pytest.raises(RunError, match="You have a run waiting already"):
        queue.submit(make_config(seed=2), owner=GUEST, max_unfinished=1)
    queue.submit(make_config(seed=1), owner="guest:other", max_unfinished=1)  # the same config is no double click
    queue.submit(make_config(seed=1))
    first.cancel()
    queue.submit(make_config(seed=2), owner=GUEST, max_unfinished=1)
    with pytest.raises(RunError, match="You have a run waiting already"):
        queue.resume(first, max_unfinished=1)
    queue.submit(make_config(seed=3), owner=GUEST, max_unfinished=2)
    with pytest.raises(RunError, match="You have 2 runs waiting already"):
        queue.submit(make_config(seed=4), owner=GUEST, max_unfinished=2)


def test_one_of_several_simultaneous_submissions_of_a_guest_is_accepted(
    make_queue: MakeQueue, runs: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, errors, barrier = make_queue(), [], threading.Barrier(8)
    monkeypatch.setattr(queue, "wake", lambda: None)

    def submit(seed: int) -> None:
        barrier.wait()
        try:
            queue.submit(make_config(seed=seed), owner=GUEST, max_unfinished=1)
        except RunError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs.list()) == 1 and len(errors) == 7


def test_full_store_deletes_only_finished_runs_of_guests_that_nothing_uses(
    make_queue: MakeQueue, runs: RunStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("training.runs.run.MAX_RUNS", 8)
    photos = tmp_path / "uploads" / "of-a-guest"
    photos.mkdir(parents=True)
    owners = ("", "hf:1", GUEST, GUEST, GUEST, GUEST, GUEST)
    admins, users, enabled, parent, base, oldest, waiting = (
        runs.create(make_config(photos=str(photos)), owner=owner) for owner in owners
    )
    for run in (admins, users, enabled, parent, base, oldest):
        run.set_status(state="done")
    runs.create(make_config(base=str(parent.folder)))
    queue = make_queue()
    monkeypatch.setattr(queue, "wake", lambda: None)
    with pytest.raises(RunError, match="Delete one first"):
        queue.submit(make_config(base=f"run-{base.id}", seed=2))
    queue.release = lambda run_id: run_id != enabled.id
    queue.submit(make_config(base=f"run-{base.id}", seed=2))
    assert not oldest.folder.exists() and photos.exists()
    assert all(run.folder.exists() for run in (admins, users, enabled, parent, base, waiting))
    with pytest.raises(RunError, match="Delete one first"):
        queue.submit(make_config(base=f"run-{base.id}", seed=3))
    assert len(runs.list()) == 8


def test_photos_of_a_deleted_run_are_deleted(
    make_queue: MakeQueue, runs: RunStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("training.runs.run.MAX_RUNS", 1)
    photos = tmp_path / "uploads" / "of-a-guest"
    photos.mkdir(parents=True)
    runs.create(make_config(photos=str(photos)), owner=GUEST).set_status(state="done")
    queue = make_queue(release=lambda run_id: True)
    monkeypatch.setattr(queue, "wake", lambda: None)
    run = queue.submit(make_config())
    assert [kept.id for kept in runs.list()] == [run.id] and not photos.exists()


def test_run_with_a_visitors_key_never_continues_with_that_of_the_deployment(
    make_queue: MakeQueue, runs: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONDREAM_API_KEY", "of-the-deployment")
    before = make_queue(command=PRINT_KEY)
    monkeypatch.setattr(before, "wake", lambda: None)
    run = before.submit(make_config(backend="hosted"), "of-the-visitor", owner="hf:1")
    paid = before.submit(make_config(backend="hosted", seed=2), owner="hf:1")
    assert run.own_key and not paid.own_key
    assert all(b"of-the-visitor" not in file.read_bytes() for file in runs.folder.rglob("*") if file.is_file())
    after = make_queue(command=PRINT_KEY)  # the application restarted
    after.wake()
    until(lambda: run.status().finished and paid.status().finished)
    assert "your own Moondream API key" in run.status().message and run.log() == ""
    assert paid.log() == "key of-the-deployment"
    with pytest.raises(RunError, match=r"Moondream API key.*Enter it again and resume"):
        after.resume(run)
    after.resume(run, "of-the-visitor")
    until(lambda: run.log() == "key of-the-visitor")
    until(lambda: paid.status().finished and run.status().finished)
    after.resume(paid, "of-the-visitor")
    assert paid.own_key and (paid.owner, run.owner) == ("hf:1", "hf:1")
    until(lambda: paid.log().splitlines() == ["key of-the-deployment", "key of-the-visitor"])
    until(lambda: after._tokens == {})


def test_token_that_a_run_does_not_need_is_ignored(make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = make_queue()
    monkeypatch.setattr(queue, "wake", lambda: None)
    assert not queue.submit(make_config(), "unused").own_key
    assert queue.submit(make_config(photos="hub:me/photos"), "needed").own_key


@pytest.mark.parametrize(
    ("owner", "token", "expected"),
    [
        ("", "", "of-this-machine None"),
        ("hf:1", "", "None 1"),
        ("hf:1", "of-the-visitor", "of-the-visitor None"),
    ],
)
def test_run_of_a_visitor_does_not_read_datasets_with_the_deployments_token(
    make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch, owner: str, token: str, expected: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "of-this-machine")
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", raising=False)
    program = "import os; print(os.environ.get('HF_TOKEN'), os.environ.get('HF_HUB_DISABLE_IMPLICIT_TOKEN'))"
    queue = make_queue(command=(sys.executable, "-c", program))
    run = queue.submit(make_config(photos="hub:me/private"), token, owner=owner)
    until(lambda: run.status().finished)
    assert run.log() == expected


PRINT_KEY = (sys.executable, "-c", "import os; print('key', os.environ.get('MOONDREAM_API_KEY'))")


def test_hosted_run_gets_the_submitted_key_although_the_worker_takes_it_at_once(
    make_queue: MakeQueue, runs: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker executes the run before `submit` and `resume` continue: the key must be stored by then."""
    monkeypatch.setenv("MOONDREAM_API_KEY", "of-the-deployment")
    queue = make_queue(command=PRINT_KEY)
    create, set_status = runs.create, Run.set_status

    def execute(run: Run) -> None:
        queue.wake()
        until(lambda: run._read_status().finished)

    def create_and_execute(*args: Any, **settings: Any) -> Run:
        run = create(*args, **settings)
        execute(run)
        return run

    def set_status_and_execute(run: Run, **changes: Any) -> Status:
        status = set_status(run, **changes)
        if changes.get("state") == "queued":
            execute(run)
        return status

    with monkeypatch.context() as patch:
        patch.setattr(runs, "create", create_and_execute)
        run = queue.submit(make_config(backend="hosted"), "of-the-visitor")
    assert run.log() == "key of-the-visitor"
    until(lambda: queue._thread is None)
    monkeypatch.setattr(Run, "set_status", set_status_and_execute)
    queue.resume(run, "second-of-the-visitor")
    assert run.log().splitlines() == ["key of-the-visitor", "key second-of-the-visitor"]


def test_start_that_is_retried_keeps_the_submitted_key(make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONDREAM_API_KEY", "of-the-deployment")
    attempts: list[int] = []

    def full(*_: object, **__: object) -> None:
        attempts.append(1)
        raise OSError(28, "No space left on device")

    queue = make_queue(command=PRINT_KEY)
    with monkeypatch.context() as patch:
        patch.setattr(queue, "wake", lambda: None)
        run = queue.submit(make_config(backend="hosted"), "of-the-visitor")
    with monkeypatch.context() as patch:
        patch.setattr(queue_module.subprocess, "Popen", full)
        patch.setattr("training.runs.run.os.fsync", full)
        queue.wake()
        until(lambda: len(attempts) >= 4)
    until(lambda: run.status().finished)
    assert run.log() == "key of-the-visitor"


@pytest.mark.parametrize("current", ["queued", "done"])
def test_only_stopped_runs_can_be_resumed(make_queue: MakeQueue, runs: RunStore, current: str) -> None:
    run = runs.create(make_config())
    run.set_status(state=current)
    with pytest.raises(RunError, match=current):
        make_queue().resume(run)


def test_failing_on_end_does_not_stop_the_queue(make_queue: MakeQueue) -> None:
    def fail(_: Run) -> None:
        raise RuntimeError("no")

    queue = make_queue(on_end=fail)
    submitted = [queue.submit(make_config(seed=seed)) for seed in (1, 2)]
    until(lambda: [state(run) for run in submitted] == ["done", "done"])


def test_run_of_a_killed_application_is_adopted_by_the_next(make_queue: MakeQueue, runs: RunStore) -> None:
    program = (
        "import time; from training.runs.run import *; from training.runs.queue import *;"
        f"queue = RunQueue(RunStore({str(runs.folder)!r}), {FAKE!r}, poll_seconds=0.02);"
        "config = dict(base='moondream-tiny', reward={'sharpness': 1}, steps=6);"
        "[queue.submit(RunConfig.create(seed=seed, **config)) for seed in (300, 1)]; time.sleep(600)"
    )
    application = subprocess.Popen([sys.executable, "-c", program], cwd=queue_module.ROOT)
    until(lambda: len(runs.list()) == 2 and any(run.status().step == 3 for run in runs.list()))
    application.kill()
    application.wait()
    first, second = make_queue().unfinished()
    assert state(first) == "running" and first.alive() and state(second) == "queued"
    queue = make_queue()
    queue.wake()
    assert queue.position(second) == 1
    first.cancel()
    until(lambda: state(second) == "done")
    assert state(first) == "cancelled" and first.log().count("begins") == 1


def test_start_is_retried_while_the_disk_is_full(
    make_queue: MakeQueue, runs: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[Run] = []

    def full(*_: object, **__: object) -> None:
        attempts.append(run)
        raise OSError(28, "No space left on device")

    run, queue = runs.create(make_config()), make_queue()
    with monkeypatch.context() as patch:
        patch.setattr(queue_module.subprocess, "Popen", full)
        patch.setattr("training.runs.run.os.fsync", full)
        queue.wake()
        until(lambda: len(attempts) >= 4)
        assert state(run) == "queued"
    until(lambda: state(run) == "done")


def test_a_visitor_may_store_a_limited_number_of_runs(
    make_queue: MakeQueue, runs: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.runs.queue.MAX_OWN_RUNS", 1)
    queue = make_queue()
    monkeypatch.setattr(queue, "wake", lambda: None)
    queue.submit(make_config(seed=1), owner="hf:1")
    with pytest.raises(RunError, match="Delete one first"):
        queue.submit(make_config(seed=2), owner="hf:1")
    queue.submit(make_config(seed=2), owner="hf:2")
    for seed in (3, 4):  # the deployment's administrator has no limit
        queue.submit(make_config(seed=seed))
    assert len(runs.list()) == 4
