"""Fixtures for tests of the GRPO fine-tune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from training.runs.run import Run, RunConfig

SETTINGS = {"base": "moondream-tiny", "reward": {"sharpness": 1.0}, "seed": 7, "photos_per_step": 2, "rollouts": 2}


@pytest.fixture
def make_run(tmp_path: Path, photo_folder: str) -> Callable[..., Run]:
    """Create a run of a small fine-tune on three photos; keyword arguments change its config."""

    def make(**changes: object) -> Run:
        folder = tmp_path / "run"
        folder.mkdir()
        config = RunConfig.create(**SETTINGS | {"photos": photo_folder, "held_out": photo_folder + "/"} | changes)
        (folder / "config.json").write_text(config.model_dump_json())
        return Run(folder)

    return make
