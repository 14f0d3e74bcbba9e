"""The fine-tune: its reward is the screen's, it can be killed, cancelled and gone on with, and says how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch

import rewards
from inference.registry import MODELS, answer
from inference.types import Answer, Request
from recipes import load_photo
from recipes.recipe import Recipe, random_recipe
from rewards import DEFAULT, RewardFunction
from training.data.bundled import bundled
from training.evaluate import ask, entry_of
from training.grpo import train as grpo
from training.grpo.result import alarm
from training.grpo.reward import Scorer
from training.grpo.train import last_checkpoint, learner, steps_of
from training.runs.run import Run, RunAborted, RunConfig
from ui.playground.compare import compare

ROOT = Path(__file__).resolve().parents[3]
QUICK = {"base": "moondream-tiny", "reward": {"sharpness": 1.0}, "seed": 7, "photos_per_step": 2, "rollouts": 2}


def made(tmp_path: Path, few: str, **values: object) -> Run:
    folder = tmp_path / "run"
    folder.mkdir()
    config = RunConfig.make(**{**QUICK, "photos": few, "held_out": few + "/", **values})
    (folder / "config.json").write_text(config.model_dump_json())
    return Run(folder)


def start(run: Run, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "training.grpo", str(run.folder), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_reward_that_the_trainer_gets_is_the_one_on_the_cards(photos: list[np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    function = RewardFunction({"sharpness": 0.3, "colour": 0.2, "creativity": 0.9})
    texts = [[str(random_recipe(rng)) for _ in range(4)] for _ in photos]
    on_cards = []
    for photo, group in zip(photos, texts, strict=True):

        def said(name: str, request: Request, cancel: Event, group: list[str] = group) -> Iterator[Answer]:
            yield from (Answer(index, text) for index, text in enumerate(group))

        *_, last = compare(["moondream-tiny"], Request(photo, "recipe", n=4), Event(), said)
        on_cards += [function.total(card.scores) for card in last.columns[0].cards]
    scorer = Scorer(photos, function, group=4)
    for _ in range(2):  # the second time without the rewards that weigh nothing
        got = scorer([[{"content": text}] for group in texts for text in group], [0] * 4 + [1] * 4 + [2] * 4)
        assert got == on_cards
    assert len(set(got)) > 6


def test_an_answer_that_is_no_recipe_gets_no_reward(photos: list[np.ndarray]) -> None:
    scorer = Scorer(photos, DEFAULT, group=2)
    got = scorer(["no recipe here", str(Recipe(exposure=10))], [0, 0])
    assert got[0] is None
    assert got[1] is not None
    assert scorer.parts["valid"] == 0.5
    assert scorer(["I cannot tell.", "nor can I"], [1, 1]) == [None, None]


def test_a_reward_that_is_no_number_stops_the_run(photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rewards.REWARDS, "colour", lambda source, candidates: [float("nan")] * len(candidates))
    with pytest.raises(RunAborted, match="no number"):
        Scorer(photos, RewardFunction({"colour": 1.0}), group=2)([str(Recipe()), str(Recipe(exposure=10))], [0, 0])


def test_a_reward_that_raises_fails_the_run_and_says_so(
    tmp_path: Path, few: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: np.ndarray, candidates: list[np.ndarray]) -> list[float | None]:
        raise ZeroDivisionError("in a reward")

    run = made(tmp_path, few, steps=1)
    monkeypatch.setitem(rewards.REWARDS, "sharpness", broken)
    with pytest.raises(SystemExit):
        grpo._live(run, run.config(), main_process=True)
    assert run._written_status().state == "failed"
    assert "ZeroDivisionError" in run._written_status().message
    assert not run.has_adapter


def test_a_full_disk_fails_the_run_and_keeps_what_was_there(
    tmp_path: Path, few: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(tmp_path, few, steps=2, save_every=1)
    whole = grpo.GRPOTrainer._save_checkpoint

    def full(self: object, *args: object) -> None:
        if self.state.global_step == 2:  # type: ignore[attr-defined]
            (run.folder / "checkpoint-2").mkdir()
            (run.folder / "checkpoint-2" / "optimizer.pt").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        whole(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(grpo.GRPOTrainer, "_save_checkpoint", full)
    with pytest.raises(SystemExit):
        grpo._live(run, run.config(), main_process=True)
    status = run._written_status()
    assert status.state == "failed"
    assert "disk is full" in status.message
    assert last_checkpoint(run.folder) == run.folder / "checkpoint-1"
    monkeypatch.undo()
    grpo._live(run, run.config(), main_process=True)
    assert run._written_status().state == "done"
    assert [line["step"] for line in run.metrics()] == [1, 2]


def test_photos_that_cannot_be_read_stop_the_run(tmp_path: Path) -> None:
    run = made(tmp_path, str(tmp_path / "nowhere"), steps=1)
    with pytest.raises(SystemExit):
        grpo._live(run, run.config(), main_process=True)
    assert "nowhere is neither a folder" in run._written_status().message


def test_a_killed_run_is_interrupted_and_goes_on_to_the_same_step(tmp_path: Path, few: str) -> None:
    run = made(tmp_path, few, steps=6, save_every=2, probe_every=2)
    child = start(run)
    while child.poll() is None and last_complete(run) < 2:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert run.status().state == "interrupted"
    assert not run.has_adapter
    told, _ = (again := start(run)).communicate()
    assert again.returncode == 0, told
    status = run.status()
    assert (status.state, status.step, status.steps) == ("done", 6, 6)
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in run.probes()] == [0, 2, 4, 6]
    last = json.loads(told.strip().splitlines()[-1])
    assert last["state"] == "done"
    assert last["peak_memory_bytes"] > 1e8
    assert {"base", "tuned", "difference", "seconds"} <= last.keys()
    result = run.result()
    assert result and result["tuned"]["valid"] == 1.0
    assert result["difference"]["mean"] == pytest.approx(last["tuned"]["mean"] - last["base"]["mean"])
    assert all(line["valid"] == 1.0 for line in run.metrics()), "constrained answers are recipes, all of them"
    assert (run.folder / "reward.png").read_bytes().startswith(b"\x89PNG")
    tuned_as_served(run)


def last_complete(run: Run) -> int:
    """The step of the newest checkpoint that is whole; looking at it removes nothing."""
    found = [path.parent for path in run.folder.glob("checkpoint-*/trainer_state.json")]
    whole = [path for path in found if all((path / name).is_file() for name in grpo.CHECKPOINT_FILES)]
    return max((int(path.name.rpartition("-")[2]) for path in whole), default=0)


def tuned_as_served(run: Run) -> None:
    """The result's recipes are those that the playground's own path answers with the run's adapter."""
    result = run.result()
    assert result
    photos = [load_photo(run.folder / pair["picture"]) for pair in result["pairs"]]
    assert ask(entry_of(str(run.folder)), photos) == [pair["tuned"] for pair in result["pairs"]]
    assert ask(MODELS["moondream-tiny"], photos) == [pair["base"] for pair in result["pairs"]]


def test_a_cancelled_run_stops_at_its_next_step_and_keeps_what_it_learned(tmp_path: Path, few: str) -> None:
    run = made(tmp_path, few, steps=500, save_every=100)
    child = start(run)
    while child.poll() is None and not run.metrics():
        time.sleep(0.05)
    run.cancel()
    told, _ = child.communicate()
    assert child.returncode == 0, told
    status = run.status()
    assert status.state == "cancelled"
    assert 0 < status.step < 100
    assert run.has_adapter
    assert run.result() is None
    assert json.loads(told.strip().splitlines()[-1])["state"] == "cancelled"
    request = Request(load_photo(bundled("held-out")[0].path), "recipe", temperature=0.0)
    assert [e for e in answer(entry_of(str(run.folder)), request, Event()) if isinstance(e, Answer)]


def test_two_processes_do_not_work_on_one_run(tmp_path: Path, few: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    run = made(tmp_path, few, steps=1)
    with FileLock(run.folder / "lock"):
        monkeypatch.setattr(sys, "argv", ["grpo", str(run.folder)])
        monkeypatch.setattr(grpo, "LOCK_PATIENCE", 0.1)
        with pytest.raises(SystemExit, match="Another process"):
            grpo.main()
    assert run.status().state == "queued"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"base": "moondream-tiny", "reward": {"sharpness": 1}, "seed": 1, "colour": 2}', "no such key"),
        ('{"base": "moondream-tiny", "reward": {"beauty": 1}, "seed": 1}', "no reward named beauty"),
        ('{"base": "moondream-tiny", "reward": {"sharpness": 0}, "seed": 1}', "All weights are zero"),
        ('{"base": "moondream-tiny", "reward": {"sharpness": 1}}', "seed"),
        ("{", "JSON"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, words: str) -> None:
    (tmp_path / "config.json").write_text(config)
    monkeypatch.setattr(sys, "argv", ["grpo", str(tmp_path)])
    with pytest.raises(SystemExit, match=words):
        grpo.main()


def test_a_model_that_is_not_here_cannot_be_trained() -> None:
    with pytest.raises(RunAborted, match="cannot be trained"):
        learner(RunConfig(base="moondream2", reward={"sharpness": 1.0}, seed=1))
    with pytest.raises(RunAborted, match="neither a model"):
        learner(RunConfig(base="gone", reward={"sharpness": 1.0}, seed=1))


def test_only_the_adapter_learns() -> None:
    found = learner(RunConfig(base="moondream-tiny", reward={"sharpness": 1.0}, seed=1, rank=4))
    named = {name for name, weight in found.model.named_parameters() if weight.requires_grad}
    assert named and all(".text.blocks." in name and ".lora_" in name for name in named)
    again = learner(RunConfig(base="moondream-tiny", reward={"sharpness": 1.0}, seed=1, rank=4))
    for (name, one), (_, other) in zip(found.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, files in ((9, grpo.CHECKPOINT_FILES), (10, ("optimizer.pt",)), (11, grpo.CHECKPOINT_FILES)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}" if step == 9 else '{"step": ')
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-9"]


def test_epochs_are_passes_over_the_photos() -> None:
    config = RunConfig.model_validate({**QUICK, "epochs": 3, "photos_per_step": 4})
    assert steps_of(config, 10) == 8
    assert steps_of(config.model_copy(update={"epochs": None, "steps": 5}), 10) == 5


def lines(reward: tuple[float, float], no_signal: float = 0.0) -> list[dict[str, float]]:
    return [{"reward": value, "no_signal": no_signal} for value in np.linspace(*reward, 40)]


@pytest.mark.parametrize(
    ("reward", "no_signal", "gain", "word"),
    [
        ((0.4, 0.7), 0.0, -0.05, "does not hold"),
        ((0.4, 0.7), 0.0, 0.05, ""),
        ((0.4, 0.4), 0.0, -0.05, ""),
        ((0.4, 0.4), 1.0, 0.0, "nothing to learn"),
    ],
)
def test_the_alarm(reward: tuple[float, float], no_signal: float, gain: float, word: str) -> None:
    said = alarm(lines(reward, no_signal), {"mean": gain, "low": gain - 0.1, "high": gain + 0.1})
    assert word in said
    assert bool(said) == bool(word)


def test_a_tuned_model_of_another_question_is_asked_it() -> None:
    entry = replace(MODELS["moondream2"], grammar_constrained=True)
    assert entry.grammar_in_prompt, "a model that is told the grammar is told it in training and in service alike"
