"""Two processes under `accelerate launch` (gloo, on CPUs) learn what one process learns from the same batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from recipes import Recipe, load_photo, save_picture, shrink
from training.data.bundled import bundled
from training.runs.run import Run, RunConfig

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "tests" / "support" / "same_rollouts.py"


def config(photos: Path) -> RunConfig:
    return RunConfig(
        base="moondream-tiny",
        reward={"sharpness": 1.0},
        seed=5,
        photos=str(photos),
        held_out=f"{photos}/",
        steps=2,
        photos_per_step=2,
        rollouts=4,
        learning_rate=1e-3,
    )


def learned(folder: Path, photos: Path, *launcher: str) -> tuple[dict[str, np.ndarray], Run]:
    folder.mkdir()
    (folder / "config.json").write_text(config(photos).model_dump_json())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return load_file(folder / "adapter" / "adapter_model.safetensors"), Run(folder)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for place, info in enumerate(bundled("train")[:4]):
        save_picture(shrink(load_photo(info.path), 200), Recipe(), folder / f"{place}.png")
    return folder


def test_two_processes_give_the_update_of_one(tmp_path: Path, photos: Path) -> None:
    one, alone = learned(tmp_path / "one", photos)
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    two, together = learned(tmp_path / "two", photos, *launcher, "--mixed_precision", "no", "--dynamo_backend", "no")
    assert one.keys() == two.keys()
    assert max(np.abs(value).max() for name, value in one.items() if "lora_B" in name) > 1e-4, "something was learned"
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=2e-5, rtol=1e-3, err_msg=name)
    rewards = [[line["reward"] for line in run.metrics()] for run in (alone, together)]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-6)
    assert [line["step"] for line in together.metrics()] == [1, 2]
    assert together.status().state == "done"
