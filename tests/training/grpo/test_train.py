"""The parts of the fine-tune: loading the policy, checkpoints and the number of steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inference.registry import MODELS
from training.grpo.train import CHECKPOINT_FILES, last_checkpoint, load_policy, total_steps
from training.runs.run import RunAborted, RunConfig

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


def test_epochs_set_the_number_of_steps() -> None:
    config = make_config(epochs=3, photos_per_step=4)
    assert total_steps(config, 10) == 8
    assert total_steps(config.model_copy(update={"epochs": None, "steps": 5}), 10) == 5


def test_constrained_model_with_the_grammar_in_its_prompt_keeps_that_prompt() -> None:
    assert replace(MODELS["moondream2"], grammar_constrained=True).grammar_in_prompt
