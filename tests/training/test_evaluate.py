"""Evaluation: scores, intervals, references and model resolution, and the command's JSON output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from inference.registry import MODELS
from recipes import Recipe, load_photo, random_recipe, render, save_picture, shrink
from rewards import EQUAL_WEIGHTS, REWARDS, RewardFunction, score_pictures, score_recipes
from training.contact_sheet import CELL, HEADER, MARGIN, draw_sheets, write_sheets
from training.data.bundled import bundled_photos
from training.evaluate import (
    EvaluateError,
    bootstrap_interval,
    degrade_photos,
    evaluate,
    greedy_answers,
    paired_difference,
    reference_scores,
    resolve_model,
    score_answer,
    sheet_columns,
    summarize,
)
from training.runs.run import Run, RunConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    return [shrink(load_photo(photo.path), 160) for photo in bundled_photos("held-out")[:3]]


def test_answer_is_scored_like_a_card(photos: list[np.ndarray]) -> None:
    recipe = Recipe(exposure=20, look="teal")
    answer = score_answer(photos[0], str(recipe))
    assert answer.scores == score_recipes(photos[0], [recipe])[0].scores
    assert answer.scores == score_pictures(photos[0], [render(photos[0], recipe)])[0]
    assert answer.valid


def test_invalid_answer_is_scored_as_the_untouched_photo(photos: list[np.ndarray]) -> None:
    answer = score_answer(photos[0], "I cannot tell.")
    assert answer.recipe == Recipe()
    assert not answer.valid
    assert summarize([answer, score_answer(photos[0], str(Recipe()))], EQUAL_WEIGHTS)["valid"] == 0.5


def test_interval_contains_the_mean_and_shrinks_with_more_photos() -> None:
    rng = np.random.default_rng(0)
    wide, narrow = (bootstrap_interval(rng.normal(0.5, 0.1, count)) for count in (10, 400))
    for interval in (wide, narrow):
        assert interval["low"] < interval["mean"] < interval["high"]
    assert narrow["high"] - narrow["low"] < 0.4 * (wide["high"] - wide["low"])
    assert bootstrap_interval(np.array([np.nan, 0.25])) == {"mean": 0.25, "low": 0.25, "high": 0.25}
    assert bootstrap_interval(np.array([np.nan])) == {"mean": None, "low": None, "high": None}


def test_interval_covers_the_true_mean_in_about_95_percent_of_samples() -> None:
    rng = np.random.default_rng(1)
    intervals = [bootstrap_interval(rng.normal(0, 1, 60)) for _ in range(150)]
    assert 0.88 < np.mean([interval["low"] <= 0 <= interval["high"] for interval in intervals]) <= 1


def test_difference_is_paired_by_photo(photos: list[np.ndarray]) -> None:
    base = [score_answer(photo, str(Recipe())) for photo in photos]
    tuned = [score_answer(photo, str(Recipe(saturation=30))) for photo in photos]
    function = RewardFunction({"colour": 1.0})
    gain = paired_difference(base, tuned, function)
    expected = np.mean([b.scores["colour"] - a.scores["colour"] for a, b in zip(base, tuned, strict=True)])
    assert gain["mean"] == pytest.approx(expected)
    assert paired_difference(base, base, function) == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_references_are_the_best_recipes_of_the_pool(photos: list[np.ndarray]) -> None:
    references = reference_scores(photos, RewardFunction({"sharpness": 1.0}), pool=12, seed=3)
    rng = np.random.default_rng(3)
    pool = [Recipe(), *(random_recipe(rng) for _ in range(12))]
    scores = np.array([[score_recipes(photo, [r])[0].scores["sharpness"] for r in pool] for photo in photos])
    assert references["untouched"]["total"]["mean"] == pytest.approx(scores[:, 0].mean())
    assert references["best_single"]["total"]["mean"] == pytest.approx(scores.mean(0).max())
    assert references["best_of_12"]["total"]["mean"] == pytest.approx(scores[:, 1:].max(1).mean())


def test_models_are_evaluated_on_their_greedy_answers(photos: list[np.ndarray]) -> None:
    texts = greedy_answers(MODELS["moondream-tiny"], photos)
    assert len(texts) == len(photos)
    result = evaluate(["base"], photos, EQUAL_WEIGHTS, pool=4)
    answers = [score_answer(photo, text) for photo, text in zip(photos, texts, strict=True)]
    assert result["models"] == {"base": summarize(answers, EQUAL_WEIGHTS)}
    assert set(result) == {"photos", "reward", "models", "untouched", "best_single", "best_of_4"}


def write_run(folder: Path, base: str) -> Run:
    config = RunConfig(base=base, reward={"sharpness": 1.0}, seed=1)
    folder.mkdir()
    (folder / "config.json").write_text(config.model_dump_json())
    return Run(folder)


def test_run_resolves_to_its_base_with_its_adapter(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", "moondream-tiny")
    second = write_run(tmp_path / "second", str(first.folder))
    with pytest.raises(EvaluateError, match="no adapter"):
        resolve_model(str(first.folder))
    for run in (first, second):
        run.adapter.mkdir()
        (run.adapter / "adapter_model.safetensors").touch()
        spec = resolve_model(str(run.folder))
        assert spec.source == MODELS["moondream-tiny"].source
        assert spec.adapter == str(run.adapter)


def test_unknown_models_and_circular_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluateError, match="neither a model"):
        resolve_model(str(tmp_path / "nothing"))
    write_run(tmp_path / "circle", str(tmp_path / "circle"))
    with pytest.raises(EvaluateError, match="circle"):
        resolve_model(str(tmp_path / "circle"))


def test_command_prints_one_json_object(tmp_path: Path, photos: list[np.ndarray]) -> None:
    for index, photo in enumerate(photos[:2]):
        save_picture(photo, Recipe(), tmp_path / f"{index}.png")
    command = [sys.executable, "-m", "training.evaluate", "--models", "base,moondream-tiny-steady"]
    command += ["--photos", str(tmp_path), "--reward", '{"sharpness":1}', "--pool", "5", "--json"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(process.stdout)
    assert result["photos"] == 2
    assert list(result["models"]) == ["base", "moondream-tiny-steady"]
    for row in (*result["models"].values(), result["untouched"], result["best_single"], result["best_of_5"]):
        for name in (*REWARDS, "total"):
            assert row[name]["low"] <= row[name]["mean"] <= row[name]["high"]
        assert row["total"] == row["sharpness"]
        assert row["valid"] == 1.0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--reward", '{"beauty": 1}', "no reward named"),
        ("--models", "gone", "neither a model"),
        ("--photos", "gone", "zip"),
        ("--sheet", "sheet.gif", "must end in .png"),
        ("--degraded", "-1", "must be 0 or more"),
    ],
)
def test_invalid_option_exits_with_a_message_and_no_traceback(option: str, value: str, message: str) -> None:
    command = [sys.executable, "-m", "training.evaluate", "--pool", "2", option, value]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode != 0
    assert message in process.stderr
    assert "Traceback" not in process.stderr


def test_degraded_photos_depend_on_the_seed_and_the_index_only(photos: list[np.ndarray]) -> None:
    degraded, again, other = (degrade_photos(photos, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(first, second) for first, second in zip(degraded, again, strict=True))
    assert np.array_equal(degrade_photos(photos[:1], 3)[0], degraded[0]), "whatever the number of photos"
    changed = [not np.array_equal(photo, flawed) for photo, flawed in zip(photos, degraded, strict=True)]
    assert all(changed) and not all(np.array_equal(*pair) for pair in zip(degraded, other, strict=True))


def test_sheet_shows_each_photo_untouched_and_after_each_model(photos: list[np.ndarray]) -> None:
    bright = [score_answer(photo, str(Recipe(exposure=100, look="mono"))) for photo in photos]
    invalid = [score_answer(photo, "no recipe") for photo in photos]
    columns = sheet_columns({"base": bright, "/runs/tuned": invalid}, photos, EQUAL_WEIGHTS)
    assert [column.title for column in columns] == ["untouched", "base", "tuned"]
    assert columns[1].totals == pytest.approx([EQUAL_WEIGHTS.total(answer.scores) for answer in bright])
    (sheet,) = draw_sheets(photos, ["a.jpg"] * 3, columns)
    pixels = np.asarray(sheet).astype(int)
    assert max(pixels.shape) <= 2_100
    untouched, mono, unchanged = (
        pixels[HEADER : HEADER + 60, MARGIN + column * CELL[0] : MARGIN + column * CELL[0] + 60] for column in range(3)
    )
    assert np.array_equal(untouched, unchanged), "an answer that is no recipe does not change the photo"
    assert np.ptp(mono, axis=-1).max() == 0 < np.ptp(untouched, axis=-1).max()
    assert mono.mean() > untouched.mean()


def test_sheets_have_eight_photos_per_page_and_at_most_the_limit(photos: list[np.ndarray], tmp_path: Path) -> None:
    many = photos * 7
    columns = sheet_columns({}, many, EQUAL_WEIGHTS)
    pages = draw_sheets(many, ["x.jpg"] * 21, columns, limit=17)
    assert len(pages) == 3 and pages[2].height < pages[0].height
    files = write_sheets(pages, tmp_path / "new" / "sheet.png")
    assert [file.name for file in files] == ["sheet-1.png", "sheet-2.png", "sheet-3.png"]
    assert all(load_photo(file).shape[1] == page.width for file, page in zip(files, pages, strict=True))


def test_command_writes_sheets_of_degraded_photos(tmp_path: Path, photos: list[np.ndarray]) -> None:
    for index, photo in enumerate(photos):
        save_picture(photo, Recipe(), tmp_path / f"{index}.png")
    command = [sys.executable, "-m", "training.evaluate", "--models", "base", "--photos", str(tmp_path), "--pool", "0"]
    command += ["--sheet", str(tmp_path / "out" / "sheet.png"), "--sheet-photos", "2", "--degraded", "5", "--json"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(process.stdout)
    assert result["degraded"] == 5 and set(result) == {"photos", "reward", "degraded", "models", "untouched"}
    degraded = degrade_photos([load_photo(tmp_path / f"{index}.png") for index in range(3)], 5)
    expected = summarize([score_answer(photo, str(Recipe())) for photo in degraded], EQUAL_WEIGHTS)
    assert result["untouched"]["total"]["mean"] == pytest.approx(expected["total"]["mean"])
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["sheet-1.png"]
    assert "wrote" in process.stderr and "sheet-1.png" in process.stderr
