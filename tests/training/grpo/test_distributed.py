"""Two processes under `accelerate launch` (gloo, CPU) compute the update that one process computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from recipes import Recipe, load_photo, save_picture, shrink
from training.data.bundled import bundled_photos
from training.runs.run import Run, RunConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "tests" / "support" / "same_rollouts.py"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, photo in enumerate(bundled_photos("train")[:4]):
        save_picture(shrink(load_photo(photo.path), 200), Recipe(), folder / f"{index}.png")
    return folder


def train(folder: Path, photos: Path, *launcher: str) -> tuple[dict[str, np.ndarray], Run]:
    """Execute a short run with a launcher; return its adapter and its folder."""
    folder.mkdir()
    config = RunConfig(
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
    (folder / "config.json").write_text(config.model_dump_json())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), str(folder)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return load_file(folder / "adapter" / "adapter_model.safetensors"), Run(folder)


def test_two_processes_compute_the_same_update_as_one(tmp_path: Path, photos: Path) -> None:
    expected, single = train(tmp_path / "one", photos)
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    options = ("--mixed_precision", "no", "--dynamo_backend", "no")
    adapter, distributed = train(tmp_path / "two", photos, *launcher, *options)
    assert expected.keys() == adapter.keys()
    largest = max(np.abs(value).max() for name, value in expected.items() if "lora_B" in name)
    assert largest > 1e-4, "the update is not zero"
    for name, value in expected.items():
        np.testing.assert_allclose(adapter[name], value, atol=2e-5, rtol=1e-3, err_msg=name)
    rewards = [[row["reward"] for row in run.metrics()] for run in (single, distributed)]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-6)
    assert [row["step"] for row in distributed.metrics()] == [1, 2]
    assert distributed.status().state == "done"
