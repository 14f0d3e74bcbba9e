"""The parts of the fine-tune: loading the policy, checkpoints and the number of steps."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from inference.registry import MODELS
from training.grpo.train import CHECKPOINT_FILES, last_checkpoint, load_policy, save_adapter, total_steps
from training.runs.run import Run, RunAborted, RunConfig

pytestmark = pytest.mark.slow


def make_config(**changes: object) -> RunConfig:
    return RunConfig.create(**{"base": "moondream-tiny", "reward": {"sharpness": 1.0}, "seed": 1} | changes)


def test_unavailable_base_aborts_the_run() -> None:
    with pytest.raises(RunAborted, match="cannot be trained"):
        load_policy(make_config(base="moondream2"))
    with pytest.raises(RunAborted, match="neither a model"):
        load_policy(make_config(base="gone"))


def test_only_the_adapter_is_trainable_and_its_initialisation_depends_on_the_seed_alone() -> None:
    first, second = load_policy(make_config(rank=4)), load_policy(make_config(rank=4))
    trainable = {name for name, weight in first.model.named_parameters() if weight.requires_grad}
    assert trainable and all(".text.blocks." in name and ".lora_" in name for name in trainable)
    for (name, a), (_, b) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_incomplete_checkpoints_are_deleted(tmp_path: Path) -> None:
    for step, files in ((9, CHECKPOINT_FILES), (10, ("optimizer.pt",)), (11, CHECKPOINT_FILES)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}" if step == 9 else '{"step": ')
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-9"]


class FakeModel:
    """Writes the files of a PEFT adapter whose only tensor has this value."""

    def __init__(self, value: float) -> None:
        self.value = value

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        save_file({"weight": np.full(1, self.value, np.float32)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_process_killed_while_saving_leaves_a_complete_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    run, replace_file, done = Run(tmp_path), os.replace, []

    def replace_or_die(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise SystemExit("simulated kill")
        done.append(target)
        replace_file(source, target)

    save_adapter(FakeModel(1.0), run)
    with monkeypatch.context() as patch:
        patch.setattr("training.grpo.train.os.replace", replace_or_die)
        with suppress(SystemExit):
            save_adapter(FakeModel(2.0), run)
    assert run.has_adapter and (run.adapter / "adapter_config.json").is_file()
    assert load_file(run.adapter / "adapter_model.safetensors")["weight"][0] == (2.0 if renames == 2 else 1.0)
    save_adapter(FakeModel(3.0), run)
    assert load_file(run.adapter / "adapter_model.safetensors")["weight"][0] == 3.0
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_epochs_set_the_number_of_steps() -> None:
    config = make_config(epochs=3, photos_per_step=4)
    assert total_steps(config, 10) == 8
    assert total_steps(config.model_copy(update={"epochs": None, "steps": 5}), 10) == 5


def test_constrained_model_with_the_grammar_in_its_prompt_keeps_that_prompt() -> None:
    assert replace(MODELS["moondream2"], grammar_constrained=True).grammar_in_prompt
