"""Tests of the DPO fine-tune: real steps of TRL's trainer on moondream-tiny."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes import random_recipe
from rewards import EQUAL_WEIGHTS
from storage.preferences import JudgedCandidate, Preference
from training.data.bundled import bundled_photos
from training.dpo.train import PreferenceCollator, build_trainer, load_held_out, load_rows
from training.grpo.__main__ import execute_locked
from training.grpo.train import load_policy
from training.preferences.export import write_folder
from training.runs.run import Run, RunAborted, RunConfig, RunError

pytestmark = pytest.mark.slow
SAMPLES = {photo.path.name: photo.path for photo in bundled_photos("held-out")[:2]}
STEPS = 6


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Write four choices on two held-out photos, and one that the grammar cannot express; return a run's config."""
    rng = np.random.default_rng(0)
    texts = [str(random_recipe(rng)) for _ in range(8)]
    sides = [JudgedCandidate("moondream-tiny", text, {}) for text in (*texts, texts[0], "exposure 7")]
    names = [*SAMPLES, *SAMPLES, next(iter(SAMPLES))]
    choices = [
        Preference(sides[2 * index], sides[2 * index + 1], "left", EQUAL_WEIGHTS, name)
        for index, name in enumerate(names)
    ]
    folder = tmp_path / "choices"
    folder.mkdir()
    assert write_folder(choices, SAMPLES, folder) == 5
    return RunConfig.create(
        base="moondream-tiny", reward={"sharpness": 1}, seed=1, method="dpo", photos=str(folder), steps=STEPS, beta=0.1
    )


def test_run_learns_the_choices_and_is_judged_on_other_photos(config: RunConfig, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    (run.folder / "config.json").write_text(config.model_dump_json())
    execute_locked(run, run.config(), time.time())
    assert run.status().state == "done", run.status().message
    metrics = run.metrics()
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)  # the policy is still the reference
    assert metrics[-1]["reward"] == 1.0 and metrics[-1]["margin"] > metrics[1]["margin"]
    assert run.has_adapter and not any(path.is_dir() for path in run.adapter.iterdir())
    result = run.result()
    assert result is not None and result["base_model"] == "moondream-tiny" and "wins" in result
    assert result["held_out"] == len(bundled_photos("held-out")) - len(SAMPLES)
    assert not set(SAMPLES) & {pair["photo"] for pair in result["pairs"]}
    assert run.probes()[0]["photo"] not in SAMPLES


def test_log_probabilities_are_those_of_the_policy(config: RunConfig, tmp_path: Path) -> None:
    bundle = load_policy(config)
    rows, photos = load_rows(Path(config.photos), bundle)
    assert len(rows) == 4  # the fifth recipe is not in the grammar
    trainer = build_trainer(Run(tmp_path), config, bundle, rows, photos, 1)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    assert isinstance(trainer.data_collator, PreferenceCollator)
    assert batch["input_ids"].shape == batch["completion_mask"].shape and len(batch["input_ids"]) == 4
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    with torch.no_grad():
        scores = bundle.model(**inputs, labels=labels, fused_lm_head=True)
        logits = bundle.model(**inputs).logits
    assert scores.log_probs.shape == (4, labels.shape[1] - 1)
    assert torch.all(scores.log_probs[batch["completion_mask"][:, 1:] == 0] == 0)
    start = int(batch["completion_mask"].any(0).int().argmax())
    constraint = bundle.policy.constraint
    assert constraint is not None
    masked = constraint.apply(logits[:, start - 1 : -1].float(), labels[:, start:].clamp(min=0)).log_softmax(-1)
    expected = masked.gather(-1, batch["input_ids"][:, start:, None]).squeeze(-1) * (labels[:, start:] != -100)
    torch.testing.assert_close(scores.log_probs[:, start - 1 :], expected, atol=2e-4, rtol=1e-4)


def test_runs_that_cannot_be_judged_are_refused(config: RunConfig) -> None:
    with pytest.raises(RunAborted, match="nearly all held-out photos"):
        load_held_out(config, {photo.path.name for photo in bundled_photos("held-out")[3:]})
    with pytest.raises(RunError, match="this machine only"):
        RunConfig.create(**config.model_dump() | {"backend": "jobs"})
    rows = Path(config.photos) / "preferences.jsonl"
    row = json.loads(rows.read_text().splitlines()[-1])
    rows.write_text(json.dumps(row))
    with pytest.raises(RunAborted, match="no choice to train on"):
        load_rows(rows.parent, load_policy(config))
