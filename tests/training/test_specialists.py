"""The specialists of moondream-tiny that ship with the project: files, settings and figures."""

from __future__ import annotations

import json

import pytest

from inference.registry import MODELS, SPECIALISTS, TINY
from training.data.bundled import bundled_photos
from training.runs.adapters import ADAPTER_FILE, check_adapter
from training.specialists import COMPARISON_FILE, FOLDER, specialist_config


@pytest.mark.parametrize("name", SPECIALISTS)
def test_specialist_has_a_small_adapter_that_fits_and_settings_of_the_registry(name: str) -> None:
    spec, folder = MODELS[f"moondream-tiny-{name}"], FOLDER / name
    assert (spec.source, spec.adapter) == (TINY, str(folder))
    check_adapter(folder, MODELS["moondream-tiny"])
    assert (folder / ADAPTER_FILE).stat().st_size < 1_000_000
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    config = specialist_config(name)
    assert {weight: value for weight, value in training["reward"].items() if value} == SPECIALISTS[name]
    assert all(training[key] == getattr(config, key) for key in ("seed", "steps", "beta"))


@pytest.mark.parametrize("name", SPECIALISTS)
def test_specialist_beats_its_base_on_the_held_out_photos(name: str) -> None:
    training = json.loads((FOLDER / name / "training.json").read_text(encoding="utf-8"))
    assert training["held_out"] == len(bundled_photos("held-out"))
    assert training["difference"]["low"] > 0, training["difference"]
    card = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    assert f"{training['tuned']['total']['mean']:.3f}" in card and (FOLDER / name / "sheet.jpg").is_file()


def test_each_specialist_is_better_than_the_others_at_what_it_was_tuned_for() -> None:
    """On held-out photos and degraded copies of them; the interval of *balanced* is above zero for the base only."""
    rows = json.loads(COMPARISON_FILE.read_text(encoding="utf-8"))
    names = [f"moondream-tiny-{name}" for name in SPECIALISTS]
    pairs = [(row["model"], row["other"]) for row in rows]
    assert sorted(pairs) == sorted(
        (one, other) for one in names for other in ("moondream-tiny", *names) if one != other
    )
    for row in rows:
        if row["other"] == "moondream-tiny" or row["model"] != "moondream-tiny-balanced":
            assert row["low"] > 0, row
