"""Tests of the run queue with a fake training process: order, failures, killed processes and restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.runs import FAKE, make_config, until
from training.runs import queue as queue_module
from training.runs.queue import RunQueue
from training.runs.run import Run, RunError, RunStore

pytestmark = pytest.mark.slow

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
    queue.resume(run)
    until(lambda: run.status().finished)
    assert "Resume it with a token" in run.status().message and "of-this-machine" not in run.log()
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
    with pytest.raises(RunError, match=r"The queue is full \(2 runs\)"):
        queue.submit(make_config(seed=3))


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
