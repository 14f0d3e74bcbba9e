"""The specialists of moondream-tiny that ship with the project: files, settings and figures."""

from __future__ import annotations

import json

import pytest

from inference.registry import MODELS, SPECIALISTS, TINY
from training.data.bundled import bundled_photos
from training.runs.adapters import ADAPTER_FILE, check_adapter
from training.runs.run import RunConfig
from training.specialists import FOLDER, SEED


@pytest.mark.parametrize("name", SPECIALISTS)
def test_specialist_has_a_small_adapter_that_fits_and_settings_of_the_registry(name: str) -> None:
    spec, folder = MODELS[f"moondream-tiny-{name}"], FOLDER / name
    assert (spec.source, spec.adapter) == (TINY, str(folder))
    check_adapter(folder, MODELS["moondream-tiny"])
    assert (folder / ADAPTER_FILE).stat().st_size < 1_000_000
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    config = RunConfig.create(base="moondream-tiny", reward=SPECIALISTS[name], seed=SEED)
    assert {weight: value for weight, value in training["reward"].items() if value} == SPECIALISTS[name]
    assert all(training[key] == getattr(config, key) for key in ("seed", "steps"))


@pytest.mark.parametrize("name", SPECIALISTS)
def test_specialist_beats_its_base_on_the_held_out_photos(name: str) -> None:
    training = json.loads((FOLDER / name / "training.json").read_text(encoding="utf-8"))
    assert training["held_out"] == len(bundled_photos("held-out"))
    assert training["difference"]["low"] > 0, training["difference"]
    card = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    assert f"{training['tuned']['total']['mean']:.3f}" in card and (FOLDER / name / "sheet.jpg").is_file()


def test_specialists_differ_in_what_they_were_tuned_for() -> None:
    training = {name: json.loads((FOLDER / name / "training.json").read_text(encoding="utf-8")) for name in SPECIALISTS}
    creativity = {name: figures["tuned"]["creativity"]["mean"] for name, figures in training.items()}
    assert creativity["bold"] > creativity["balanced"], creativity
