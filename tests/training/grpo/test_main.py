"""The command: failures are recorded, killed runs resume, cancelled runs keep their adapter, a run is locked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from filelock import FileLock

import rewards
from inference.registry import MODELS, answer
from inference.types import Answer, Request
from recipes import load_photo
from tests.support.runs import until
from training.data.bundled import bundled_photos
from training.evaluate import greedy_answers, resolve_model
from training.grpo import __main__ as command
from training.grpo.__main__ import execute, main
from training.grpo.train import CHECKPOINT_FILES, GRPOTrainer, last_checkpoint
from training.runs.run import Run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
MakeRun = Callable[..., Run]


def start(run: Run) -> subprocess.Popen[str]:
    """Start the command on a run's folder."""
    arguments = [sys.executable, "-m", "training.grpo", str(run.folder)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def last_complete_step(run: Run) -> int:
    """Return the step of the newest complete checkpoint, 0 if there is none; unlike `last_checkpoint`, read only."""
    folders = [path.parent for path in run.folder.glob("checkpoint-*/trainer_state.json")]
    complete = [folder for folder in folders if all((folder / name).is_file() for name in CHECKPOINT_FILES)]
    return max((int(folder.name.rpartition("-")[2]) for folder in complete), default=0)


def test_exception_in_a_reward_fails_the_run(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: np.ndarray, candidates: list[np.ndarray]) -> list[float | None]:
        raise ZeroDivisionError("in a reward")

    run = make_run(steps=1)
    monkeypatch.setitem(rewards.REWARDS, "sharpness", broken)
    with pytest.raises(SystemExit):
        execute(run, run.config())
    assert run.status().state == "failed"
    assert "ZeroDivisionError" in run.status().message
    assert not run.has_adapter


def test_full_disk_fails_the_run_and_keeps_the_last_checkpoint(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(steps=2, save_every=1)
    save_checkpoint = GRPOTrainer._save_checkpoint

    def fail_at_second_step(self: object, *args: object) -> None:
        if self.state.global_step == 2:  # type: ignore[attr-defined]
            (run.folder / "checkpoint-2").mkdir()
            (run.folder / "checkpoint-2" / "optimizer.pt").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_checkpoint(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(GRPOTrainer, "_save_checkpoint", fail_at_second_step)
    with pytest.raises(SystemExit):
        execute(run, run.config())
    assert run.status().state == "failed"
    assert "disk is full" in run.status().message
    assert last_checkpoint(run.folder) == run.folder / "checkpoint-1"
    monkeypatch.undo()
    execute(run, run.config())
    assert run.status().state == "done"
    assert [row["step"] for row in run.metrics()] == [1, 2]


def test_missing_photos_fail_the_run(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(photos=str(tmp_path / "nowhere"), steps=1)
    with pytest.raises(SystemExit):
        execute(run, run.config())
    assert run.status().state == "failed"
    assert "nowhere is neither a folder" in run.status().message


def test_killed_run_is_interrupted_and_resumes_to_its_last_step(make_run: MakeRun) -> None:
    run = make_run(steps=6, save_every=2, probe_every=2)
    process = start(run)
    until(lambda: process.poll() is not None or last_complete_step(run) >= 2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert run.status().state == "interrupted"
    assert not run.has_adapter

    process = start(run)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    status = run.status()
    assert (status.state, status.step, status.steps) == ("done", 6, 6)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in run.probes()] == [0, 2, 4, 6]
    summary = json.loads(output.strip().splitlines()[-1])
    assert summary["state"] == "done"
    assert summary["peak_memory_bytes"] > 1e8
    assert {"base", "tuned", "difference", "seconds"} <= summary.keys()
    result = run.result()
    assert result and result["tuned"]["valid"] == 1.0
    assert result["difference"]["mean"] == pytest.approx(summary["tuned"]["mean"] - summary["base"]["mean"])
    assert all(row["valid"] == 1.0 for row in run.metrics()), "all answers under the grammar are valid recipes"
    assert (run.folder / "reward.png").read_bytes().startswith(b"\x89PNG")

    # The playground's inference returns the same recipes with the run's adapter.
    photos = [load_photo(run.folder / pair["picture"]) for pair in result["pairs"]]
    assert greedy_answers(resolve_model(str(run.folder)), photos) == [pair["tuned"] for pair in result["pairs"]]
    assert greedy_answers(MODELS["moondream-tiny"], photos) == [pair["base"] for pair in result["pairs"]]


def test_cancelled_run_stops_at_the_next_step_and_keeps_its_adapter(make_run: MakeRun) -> None:
    run = make_run(steps=500, save_every=100)
    process = start(run)
    until(lambda: process.poll() is not None or run.metrics())
    run.cancel()
    output, _ = process.communicate()
    assert process.returncode == 0, output
    status = run.status()
    assert status.state == "cancelled"
    assert 0 < status.step < 100
    assert run.has_adapter
    assert run.result() is None
    assert json.loads(output.strip().splitlines()[-1])["state"] == "cancelled"
    request = Request(load_photo(bundled_photos("held-out")[0].path), "recipe", temperature=0.0)
    events = answer(resolve_model(str(run.folder)), request, Event())
    assert [event for event in events if isinstance(event, Answer)]


def test_second_process_on_the_same_run_exits(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(steps=1)
    with FileLock(run.folder / "lock"):
        monkeypatch.setattr(sys, "argv", ["grpo", str(run.folder)])
        monkeypatch.setattr(command, "LOCK_TIMEOUT", 0.1)
        with pytest.raises(SystemExit, match="Another process"):
            main()
    assert run.status().state == "queued"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"base": "moondream-tiny", "reward": {"sharpness": 1}, "seed": 1, "colour": 2}', "unknown key"),
        ('{"base": "moondream-tiny", "reward": {"beauty": 1}, "seed": 1}', "no reward named beauty"),
        ('{"base": "moondream-tiny", "reward": {"sharpness": 0}, "seed": 1}', "All weights are zero"),
        ('{"base": "moondream-tiny", "reward": {"sharpness": 1}}', "seed"),
        ("{", "JSON"),
    ],
)
def test_invalid_config_exits_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, message: str
) -> None:
    (tmp_path / "config.json").write_text(config)
    monkeypatch.setattr(sys, "argv", ["grpo", str(tmp_path)])
    with pytest.raises(SystemExit, match=message):
        main()
