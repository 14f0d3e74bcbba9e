"""Tests of runs inside the request, as on ZeroGPU. The decorator has no effect off that hardware."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from gradio_client import Client

import app
from settings import Settings
from tests.support import fake_run
from tests.support.app_server import app_server
from tests.support.runs import make_config
from training.runs.inline import run_inline
from training.runs.queue import RunQueue
from training.runs.run import RunStore

pytestmark = pytest.mark.slow


def test_run_inline_trains_in_the_calling_process(tmp_path: Path, photo_folder: str) -> None:
    niceness, ended = os.nice(0), []
    queue = RunQueue(RunStore(tmp_path), inline=run_inline, on_end=ended.append)
    run = queue.submit(make_config(reward={"colour": 1.0}, steps=2, photos=photo_folder, held_out=photo_folder))
    assert (run.status().state, run.alive(), len(queue.unfinished())) == ("queued", False, 1)
    queue.run_inline(run)
    status, result = run.status(), run.result()
    assert (status.state, status.step, len(ended)) == ("done", 2, 1) and run.has_adapter
    assert result and 0 < result["seconds"] < 600
    assert "step 2/2" in run.log() and os.nice(0) == niceness
    queue.run_inline(run)
    assert run.status() == status, "a finished run is not executed again"


def test_inline_runs_are_serialized_and_failed_starts_can_be_resumed(tmp_path: Path) -> None:
    running, overlaps, failures = threading.Semaphore(0), [], [True]

    def inline(folder: str) -> None:
        if failures:
            failures.pop()
            raise RuntimeError("no quota")
        overlaps.append(running.acquire(blocking=False))
        running.release()
        fake_run.main(folder)
        running.acquire()

    queue = RunQueue(RunStore(tmp_path), inline=inline)
    first = queue.submit(make_config(seed=1))
    with pytest.raises(RuntimeError, match="no quota"):
        queue.run_inline(first)
    assert first.status().state == "interrupted" and "Resume it" in first.status().message
    queue.resume(first)
    both = [first, queue.submit(make_config(seed=2))]
    threads = [threading.Thread(target=queue.run_inline, args=[run]) for run in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.status().state for run in both] == ["done", "done"] and overlaps == [False, False]


def test_mark_orphans_interrupts_queued_inline_runs_of_an_earlier_process(tmp_path: Path) -> None:
    run = RunQueue(RunStore(tmp_path), inline=fake_run.main).submit(make_config())
    RunQueue(RunStore(tmp_path), inline=fake_run.main).mark_orphans()
    assert run.status().state == "interrupted"


def test_api_call_returns_when_its_inline_run_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_import_run_inline", lambda: fake_run.main)
    with app_server(tmp_path, train_in_request=True) as address:
        client = Client(address, verbose=False)
        status = client.predict({"colour": 1}, "moondream-tiny", "bundled", 4, 107, "", api_name="/retrain")
    assert status["state"] == "done" and status["step"] == 4


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SPACES_ZERO_GPU": "true"}, True),
        ({"TRAIN_IN_REQUEST": "1"}, True),
        ({"SPACES_ZERO_GPU": "true", "TRAIN_IN_REQUEST": "0"}, False),
    ],
)
def test_zero_gpu_hardware_or_the_setting_enables_inline_runs(environment: dict[str, str], expected: bool) -> None:
    assert Settings.from_env(environment).train_in_request is expected
