"""The worker with a process that obeys a run's protocol and learns nothing: order, ends, killed processes, restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from training.runs import queue as module
from training.runs.queue import RunQueue
from training.runs.run import Run, RunConfig, RunError, Runs

FAKE = (sys.executable, "-m", "tests.support.fake_run")
PATIENCE = 60.0  # seconds until a machine is not only busy


def until(true: Callable[[], object]) -> None:
    """Waits until something is so."""
    late = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < late, "it never came to be"
        time.sleep(0.02)


def config(seed: int = 1, **changes: object) -> RunConfig:
    return RunConfig.make(**{"base": "moondream-tiny", "reward": {"sharpness": 1}, "seed": seed, "steps": 6, **changes})


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")


@pytest.fixture
def make(runs: Runs) -> Iterator[Callable[..., RunQueue]]:
    """Makes workers on one folder; at the end they stop, and their runs with them."""
    made: list[RunQueue] = []

    def worker(**settings: object) -> RunQueue:
        made.append(RunQueue(runs, **({"command": FAKE, "every": 0.02} | settings)))  # type: ignore[arg-type]
        return made[-1]

    yield worker
    for run in runs.list():
        run.cancel()
    until(lambda: not any(run.alive() for run in runs.list()))
    for one in made:
        one.stop()


def state(run: Run) -> str:
    return run.status().state


def pid(run: Run) -> int:
    """The process that works on a run."""
    return int((run.folder / "pid").read_text())


def test_a_run_is_done_and_its_end_is_told(make: Callable[..., RunQueue]) -> None:
    ended: list[str] = []
    run = make(on_end=lambda run: ended.append(run.id)).submit(config())
    until(lambda: ended)
    assert state(run) == "done" and ended == [run.id]
    assert len(run.metrics()) == 6 and "step 6" in run.log() and run.has_adapter
    assert run.result() is not None


def test_a_job_gets_its_own_token_and_never_that_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "of-this-machine")
    tell = (sys.executable, "-c", "import os; print('token', os.environ.get('HF_TOKEN'))")
    worker = RunQueue(Runs(tmp_path / "runs"), tell, every=0.02)
    asked = {"base": "moondream-tiny", "reward": {"sharpness": 1}, "seed": 1, "where": "jobs"}
    mine = worker.submit(RunConfig.make(**asked), "mine")
    until(lambda: mine.status().over)
    assert "token mine" in mine.log()
    worker.resume(mine)
    until(lambda: mine.status().over)
    assert "Resume it with a token" in mine.status().message and "of-this-machine" not in mine.log()
    worker.stop()


def test_runs_wait_for_each_other_in_their_order(make: Callable[..., RunQueue], runs: Runs) -> None:
    ended: list[str] = []
    worker = make(on_end=lambda run: ended.append(run.id))
    first = worker.submit(config(300))
    until(lambda: first.status().step == 3)
    others = [worker.submit(config(seed)) for seed in (1, 2)]
    assert [worker.position(run) for run in (first, *others)] == [0, 1, 2]
    assert [state(run) for run in others] == ["queued", "queued"]
    first.cancel()
    until(lambda: len(ended) == 3)
    assert ended == [first.id, *(run.id for run in others)]
    assert state(first) == "cancelled" and [state(run) for run in others] == ["done", "done"]
    assert worker.position(first) == 0


def test_a_killed_process_leaves_a_run_that_can_be_resumed(make: Callable[..., RunQueue]) -> None:
    ended: list[str] = []
    worker = make(on_end=lambda run: ended.append(run.id))
    run = worker.submit(config(300, steps=9))
    until(lambda: run.status().step == 3)
    os.kill(pid(run), signal.SIGKILL)
    until(lambda: ended)
    assert state(run) == "interrupted" and "Resume" in run.status().message
    (run.folder / "checkpoint-2").mkdir()
    worker.resume(run)
    until(lambda: run.status().step == 3 and "begins at step 2" in run.log())
    assert [line["step"] for line in run.metrics()] == [1, 2, 3]
    run.cancel()
    until(lambda: state(run) == "cancelled" and len(ended) == 2)


def test_a_cancelled_run_goes_on_to_the_same_number_of_steps(make: Callable[..., RunQueue]) -> None:
    worker = make()
    run = worker.submit(config(300, steps=7))
    until(lambda: run.status().step == 3)
    run.cancel()
    until(lambda: state(run) == "cancelled" and not run.alive())
    (run.folder / "checkpoint-5").mkdir()
    until(lambda: worker._thread is None)
    worker.resume(run)
    until(lambda: state(run) == "done")
    assert run.status().step == 7 and not run.cancelled


def test_a_process_that_fails_is_told_with_its_log(make: Callable[..., RunQueue]) -> None:
    ended: list[str] = []
    run = make(on_end=lambda run: ended.append(run.id)).submit(config(200))
    until(lambda: ended)
    assert state(run) == "failed" and "exit code 3" in run.status().message and "log" in run.status().message


def test_a_process_that_does_not_even_begin_fails(make: Callable[..., RunQueue]) -> None:
    run = make(command=(sys.executable, "-c", "print('no'); raise SystemExit(4)")).submit(config())
    until(lambda: state(run) == "failed")
    assert "exit code 4" in run.status().message and run.log() == "no"


def test_a_command_that_is_not_there_fails(make: Callable[..., RunQueue], tmp_path: Path) -> None:
    run = make(command=(str(tmp_path / "nothing"),)).submit(config())
    until(lambda: state(run) == "failed")
    assert "could not be started" in run.status().message


def test_a_new_worker_follows_what_lives_and_starts_what_waits(make: Callable[..., RunQueue], runs: Runs) -> None:
    before = make()
    first = before.submit(config(300))
    until(lambda: first.status().step == 3)
    second = before.submit(config(2))
    process = pid(first)
    before.stop()
    assert state(first) == "running" and state(second) == "queued", "a run outlives its worker"
    ended: list[str] = []
    after = make(on_end=lambda run: ended.append(run.id))
    after.wake()
    assert after.position(second) == 1 and pid(first) == process
    first.cancel()
    until(lambda: len(ended) == 2)
    assert ended == [first.id, second.id] and first.log().count("begins") == 1


def test_two_workers_do_a_run_once(make: Callable[..., RunQueue], runs: Runs) -> None:
    run = runs.create(config())
    for worker in (make(), make(), make()):
        worker.wake()
    until(lambda: state(run) == "done")
    assert run.log().count("begins") == 1


def test_two_people_at_once_get_a_run_each_and_a_double_click_one(
    make: Callable[..., RunQueue], runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make()
    monkeypatch.setattr(worker, "wake", lambda: None)
    refused: list[str] = []

    def press(seed: int) -> None:
        try:
            worker.submit(config(seed))
        except RunError as error:
            refused.append(str(error))

    people = [threading.Thread(target=press, args=(seed,)) for seed in (1, 2)]
    for person in people:
        person.start()
    for person in people:
        person.join()
    assert sorted(run.config().seed for run in runs.list()) == [1, 2] and refused == []
    press(3)
    press(3)
    assert len(runs.list()) == 3 and "a moment ago" in refused[0]


def test_only_so_many_wait(make: Callable[..., RunQueue], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_QUEUED", 2)
    worker = make()
    monkeypatch.setattr(worker, "wake", lambda: None)
    for seed in (1, 2):
        worker.submit(config(seed))
    with pytest.raises(RunError, match="2 runs are waiting already"):
        worker.submit(config(3))


@pytest.mark.parametrize("now", ["queued", "done"])
def test_only_what_was_stopped_is_resumed(make: Callable[..., RunQueue], runs: Runs, now: str) -> None:
    run = runs.create(config())
    run.set_status(state=now)
    with pytest.raises(RunError, match=now):
        make().resume(run)


def test_what_follows_an_end_may_fail_and_the_next_run_is_done(make: Callable[..., RunQueue]) -> None:
    def fails(_: Run) -> None:
        raise RuntimeError("no")

    worker = make(on_end=fails)
    done = [worker.submit(config(seed)) for seed in (1, 2)]
    until(lambda: [state(run) for run in done] == ["done", "done"])


def test_a_killed_application_leaves_its_run_to_the_next(make: Callable[..., RunQueue], runs: Runs) -> None:
    program = (
        "import sys, time; from training.runs.run import *; from training.runs.queue import *;"
        f"worker = Worker(Runs({str(runs.folder)!r}), {FAKE!r}, every=0.02);"
        "asked = dict(base='moondream-tiny', reward={'sharpness': 1}, steps=6);"
        "[worker.submit(RunConfig.make(seed=seed, **asked)) for seed in (300, 1)]; time.sleep(600)"
    )
    application = subprocess.Popen([sys.executable, "-c", program], cwd=module.ROOT)
    until(lambda: len(runs.list()) == 2 and any(run.status().step == 3 for run in runs.list()))
    application.kill()
    application.wait()
    first, second = make().waiting()
    assert state(first) == "running" and first.alive() and state(second) == "queued"
    after = make()
    after.wake()
    assert after.position(second) == 1
    first.cancel()
    until(lambda: state(second) == "done")
    assert state(first) == "cancelled" and first.log().count("begins") == 1


def test_a_full_disk_at_the_start_is_tried_again(
    make: Callable[..., RunQueue], runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[Run] = []

    def full(*_: object, **__: object) -> None:
        tries.append(run)
        raise OSError(28, "No space left on device")

    run, worker = runs.create(config()), make()
    with monkeypatch.context() as patch:
        patch.setattr(module.subprocess, "Popen", full)
        patch.setattr("training.runs.run.os.fsync", full)
        worker.wake()
        until(lambda: len(tries) >= 4)
        assert state(run) == "queued"
    until(lambda: state(run) == "done")
