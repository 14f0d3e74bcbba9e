"""Runs inside the request, as on ZeroGPU: its decorator is inert here, so it is the way through the application that is
tested, and that nothing of it needs the hardware. The forked process with its GPU has never run."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from gradio_client import Client

import app
from settings import Settings
from tests.e2e.conftest import serving
from tests.support import fake_run
from tests.training.runs.test_queue import config
from training.runs import inline as zero_gpu
from training.runs.queue import RunQueue
from training.runs.run import RunConfig, Runs


def test_a_real_run_inside_the_request(tmp_path: Path, few: str) -> None:
    niceness, ended = os.nice(0), []
    worker = RunQueue(Runs(tmp_path), inside=zero_gpu.do, on_end=ended.append)
    asked = {"base": "moondream-tiny", "reward": {"colour": 1.0}, "seed": 1, "steps": 2, "photos": few, "held_out": few}
    run = worker.submit(RunConfig.make(**asked))
    assert (run.status().state, run.alive(), len(worker.waiting())) == ("queued", False, 1)
    worker.do_inside(run)
    status, result = run.status(), run.result()
    assert (status.state, status.step, len(ended)) == ("done", 2, 1) and run.has_adapter
    assert result and 0 < result["seconds"] < 600
    assert "step 2/2" in run.log() and os.nice(0) == niceness
    worker.do_inside(run)  # it is over: nothing is done twice
    assert run.status() == status


def test_one_run_at_a_time_and_what_gets_no_gpu_can_be_resumed(tmp_path: Path) -> None:
    at_once, most, refused = threading.Semaphore(0), [], [True]

    def inside(folder: str) -> None:
        if refused.pop() if refused else False:
            raise RuntimeError("no quota")
        most.append(at_once.acquire(blocking=False))
        at_once.release()
        fake_run.main(folder)
        at_once.acquire()

    worker = RunQueue(Runs(tmp_path), inside=inside)
    first = worker.submit(config(1))
    with pytest.raises(RuntimeError, match="no quota"):
        worker.do_inside(first)
    assert first.status().state == "interrupted" and "Resume it" in first.status().message
    worker.resume(first)
    train_eval_split = [first, worker.submit(config(2))]
    threads = [threading.Thread(target=worker.do_inside, args=[run]) for run in train_eval_split]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.status().state for run in train_eval_split] == ["done", "done"] and most == [False, False]


def test_what_waited_for_a_request_that_is_gone_is_said_to_be_interrupted(tmp_path: Path) -> None:
    run = RunQueue(Runs(tmp_path), inside=fake_run.main).submit(config())
    RunQueue(Runs(tmp_path), inside=fake_run.main).abandon()
    assert run.status().state == "interrupted"


def test_a_program_waits_for_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_inside", lambda: fake_run.main)
    with serving(tmp_path, train_in_request=True) as address:
        client = Client(address, verbose=False)
        told = client.predict({"colour": 1}, "moondream-tiny", "bundled", 4, 107, "", api_name="/retrain")
    assert told["state"] == "done" and told["step"] == 4


@pytest.mark.parametrize(
    ("said", "inside"),
    [
        ({}, False),
        ({"SPACES_ZERO_GPU": "true"}, True),
        ({"TRAIN_IN_REQUEST": "1"}, True),
        ({"SPACES_ZERO_GPU": "true", "TRAIN_IN_REQUEST": "0"}, False),
    ],
)
def test_the_hardware_or_a_setting_chooses(said: dict[str, str], inside: bool) -> None:
    assert Settings.from_env(said).train_in_request is inside
