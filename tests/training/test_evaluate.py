"""Evaluation: means, intervals and references are what their names say, and the command prints one JSON object."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from inference.registry import MODELS
from recipes import Recipe, load_photo, random_recipe, render, shrink
from rewards import EQUAL_WEIGHTS, REWARDS, RewardFunction, score_pictures, score_recipes
from training.data.bundled import bundled_photos
from training.evaluate import EvaluateError, greedy_answers, paired_difference, resolve_model, evaluate, bootstrap_interval, score_answer, reference_scores, summarize
from training.runs.run import Run, RunConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    return [shrink(load_photo(info.path), 160) for info in bundled_photos("held-out")[:3]]


def test_a_judged_answer_has_the_scores_of_the_screen(photos: list[np.ndarray]) -> None:
    recipe = Recipe(exposure=20, look="teal")
    found = score_answer(photos[0], str(recipe))
    assert found.scores == score_recipes(photos[0], [recipe])[0].scores
    assert found.scores == score_pictures(photos[0], [render(photos[0], recipe)])[0]
    assert found.valid


def test_what_is_no_recipe_counts_as_untouched_and_not_valid(photos: list[np.ndarray]) -> None:
    found = score_answer(photos[0], "I cannot tell.")
    assert found.recipe == Recipe()
    assert not found.valid
    assert summarize([found, score_answer(photos[0], str(Recipe()))], EQUAL_WEIGHTS)["valid"] == 0.5


def test_an_interval_holds_the_mean_and_shrinks_with_more_photos() -> None:
    rng = np.random.default_rng(0)
    few, many = (bootstrap_interval(rng.normal(0.5, 0.1, count)) for count in (10, 400))
    for found in (few, many):
        assert found["low"] < found["mean"] < found["high"]
    assert many["high"] - many["low"] < 0.4 * (few["high"] - few["low"])
    assert bootstrap_interval(np.array([np.nan, 0.25])) == {"mean": 0.25, "low": 0.25, "high": 0.25}
    assert bootstrap_interval(np.array([np.nan])) == {"mean": None, "low": None, "high": None}


def test_about_nineteen_intervals_of_twenty_hold_the_truth() -> None:
    rng = np.random.default_rng(1)
    found = [bootstrap_interval(rng.normal(0, 1, 60)) for _ in range(150)]
    assert 0.88 < np.mean([one["low"] <= 0 <= one["high"] for one in found]) <= 1


def test_the_difference_is_paired(photos: list[np.ndarray]) -> None:
    base = [score_answer(photo, str(Recipe())) for photo in photos]
    better = [score_answer(photo, str(Recipe(saturation=30))) for photo in photos]
    function = RewardFunction({"colour": 1.0})
    gain = paired_difference(base, better, function)
    assert gain["mean"] == pytest.approx(
        np.mean([b.scores["colour"] - a.scores["colour"] for a, b in zip(base, better)])
    )
    assert paired_difference(base, base, function) == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_the_references_are_in_order(photos: list[np.ndarray]) -> None:
    function = RewardFunction({"sharpness": 1.0})
    found = reference_scores(photos, function, pool=12, seed=3)
    rng = np.random.default_rng(3)
    pool = [Recipe(), *(random_recipe(rng) for _ in range(12))]
    table = np.array([[score_recipes(photo, [r])[0].scores["sharpness"] for r in pool] for photo in photos])
    assert found["untouched"]["total"]["mean"] == pytest.approx(table[:, 0].mean())
    assert found["best_single"]["total"]["mean"] == pytest.approx(table.mean(0).max())
    assert found["best_of_12"]["total"]["mean"] == pytest.approx(table[:, 1:].max(1).mean())


def test_models_answer_as_in_the_playground(photos: list[np.ndarray]) -> None:
    texts = greedy_answers(MODELS["moondream-tiny"], photos)
    assert len(texts) == len(photos)
    found = evaluate(["base"], photos, EQUAL_WEIGHTS, pool=4)
    expected = summarize([score_answer(photo, text) for photo, text in zip(photos, texts, strict=True)], EQUAL_WEIGHTS)
    assert found["models"] == {"base": expected}
    assert set(found) == {"photos", "reward", "models", "untouched", "best_single", "best_of_4"}


def test_a_run_stands_for_its_base_with_its_adapter(tmp_path: Path) -> None:
    config = RunConfig(base="moondream-tiny", reward={"sharpness": 1.0}, seed=1)
    run, onward = Run(tmp_path / "first"), Run(tmp_path / "second")
    for one, base in ((run, "moondream-tiny"), (onward, str(run.folder))):
        one.adapter.mkdir(parents=True)
        (one.folder / "config.json").write_text(config.model_copy(update={"base": base}).model_dump_json())
    with pytest.raises(EvaluateError, match="no adapter"):
        resolve_model(str(run.folder))
    for one in (run, onward):
        (one.adapter / "adapter_model.safetensors").touch()
        entry = resolve_model(str(one.folder))
        assert entry.source == MODELS["moondream-tiny"].source
        assert entry.adapter == str(one.adapter)


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(EvaluateError, match="neither a model"):
        resolve_model(str(tmp_path / "nothing"))
    circle = Run(tmp_path / "circle")
    circle.folder.mkdir()
    config = RunConfig(base=str(circle.folder), reward={"sharpness": 1.0}, seed=1)
    (circle.folder / "config.json").write_text(config.model_dump_json())
    with pytest.raises(EvaluateError, match="circle"):
        resolve_model(str(circle.folder))


def test_the_command_prints_one_json_object(tmp_path: Path, photos: list[np.ndarray]) -> None:
    from recipes import save_picture

    for place, photo in enumerate(photos[:2]):
        save_picture(photo, Recipe(), tmp_path / f"{place}.png")
    command = [
        sys.executable,
        "-m",
        "training.evaluate",
        "--models",
        "base,moondream-tiny-steady",
        "--photos",
        str(tmp_path),
    ]
    command += ["--reward", '{"sharpness":1}', "--pool", "5", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["photos"] == 2
    assert list(found["models"]) == ["base", "moondream-tiny-steady"]
    for row in (*found["models"].values(), found["untouched"], found["best_single"], found["best_of_5"]):
        for name in (*REWARDS, "total"):
            assert row[name]["low"] <= row[name]["mean"] <= row[name]["high"]
        assert row["total"] == row["sharpness"]
        assert row["valid"] == 1.0


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--reward", '{"beauty": 1}', "no reward named"),
        ("--models", "gone", "neither a model"),
        ("--photos", "gone", "zip"),
    ],
)
def test_a_wrong_option_is_told_without_a_traceback(option: str, value: str, words: str) -> None:
    command = [sys.executable, "-m", "training.evaluate", "--pool", "2", option, value]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr
