"""Quality of the published moondream-tiny on held-out photos."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from inference.registry import TINY, answer
from inference.types import Answer, Request
from recipes import Recipe, load_photo, parse, render, save_picture, shrink
from training.data.bundled import bundled_photos
from training.pretrain import quality
from training.pretrain.degradation import lab_error
from training.pretrain.quality import (
    ModelEvaluator,
    degraded_photos,
    evaluate_levels,
    evaluate_regions,
    evaluate_restoration,
    evaluate_statements,
    evaluate_undamaged,
    held_out_photos,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def evaluator() -> ModelEvaluator:
    return ModelEvaluator.from_folder(TINY)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    return held_out_photos()


def test_the_folder_is_small_and_has_a_model_card() -> None:
    folder = Path(TINY)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "demonstration model" in card
    figures = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    assert f"{figures['facts']['true']:.1%}" in card


def test_recipes_lower_the_error_of_degraded_photos(evaluator: ModelEvaluator, photos: list[np.ndarray]) -> None:
    """Guards against regressions; the targets are in `bench/tiny.py`."""
    result = evaluate_restoration(evaluator, degraded_photos(photos, copies=4, seed=1234), seed=1234)
    assert result["error_restored"] < 0.75 * result["error_degraded"], result
    assert result["error_restored"] < result["error_best_single_recipe"], result
    assert result["share_lowered"] > 0.8, result


def test_good_photos_are_left_nearly_alone(evaluator: ModelEvaluator, photos: list[np.ndarray]) -> None:
    result = evaluate_undamaged(evaluator, photos)
    assert result["change"] <= 3.2, result
    assert result["share_cut_subject"] == result["share_cut_head"] == 0, result


def test_sources_of_the_photos_are_listed_without_held_out_ones() -> None:
    sources = json.loads((Path(TINY) / "sources.json").read_text(encoding="utf-8"))
    assert sources[0]["name"] == "bundled" and len(sources) > 1
    used = {digest for source in sources for digest in source["files"].values()}
    assert len(used) == sum(source["photos"] for source in sources)
    for info in bundled_photos("held-out"):
        assert hashlib.sha256(info.path.read_bytes()).hexdigest()[:16] not in used


def test_predicted_levels_correlate_with_true_levels(evaluator: ModelEvaluator, photos: list[np.ndarray]) -> None:
    result = evaluate_levels(evaluator, degraded_photos(photos, copies=4, seed=99))
    assert result["exposure"] > 0.7, result
    assert result["contrast"] > 0.35, result
    assert result["warmth"] > 0.4, result
    assert result["sharpening"] > 0.6, result
    assert result["crop_within_5"] > 0.5, result


def test_recipes_depend_on_their_photo(evaluator: ModelEvaluator, photos: list[np.ndarray]) -> None:
    degraded = degraded_photos(photos, copies=2, seed=5)
    recipes = evaluator.recipes([e.degraded for e in degraded])
    own = np.mean([lab_error(render(e.degraded, r), e.original) for e, r in zip(degraded, recipes, strict=True)])
    shifted = recipes[2:] + recipes[:2]
    swapped = np.mean([lab_error(render(e.degraded, r), e.original) for e, r in zip(degraded, shifted, strict=True)])
    assert own < 0.8 * swapped


def test_most_statements_are_true(evaluator: ModelEvaluator, photos: list[np.ndarray]) -> None:
    degraded = degraded_photos(photos, copies=1, seed=7)
    result = evaluate_statements(evaluator, [e.degraded for e in degraded] + [e.original for e in degraded])
    assert result["true"] >= 0.9, result
    assert result["facts"] > 500
    assert result["without_a_fact"] < 0.02 * result["facts"]


def test_detect_and_point_find_areas(evaluator: ModelEvaluator, photos: list[np.ndarray]) -> None:
    result = evaluate_regions(evaluator, [e.original for e in degraded_photos(photos, 1, 7)])
    assert result["hit"] > 0.75, result
    assert result["iou"] > 0.45, result
    assert result["nothing_found_for_unknown"] > 0.9, result


@pytest.mark.parametrize("index", [0, 7, 14])
def test_eight_samples_at_temperature_1_are_distinct_and_valid(index: int) -> None:
    photo = load_photo(bundled_photos("held-out")[index].path)
    request = Request(photo=photo, skill="recipe", n=8, temperature=1.0, seed=1)
    texts = [event.text for event in answer("moondream-tiny", request) if isinstance(event, Answer)]
    assert len(set(texts)) == 8
    for text in texts:
        parsed = parse(text)
        assert str(parsed.recipe) == text
        assert not parsed.problems


def test_command_measures_a_folder_of_photos(
    tmp_path: Path, photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, photo in enumerate(photos[:2]):
        save_picture(shrink(photo, 200), Recipe(), tmp_path / f"{index}.png")
    arguments = ["quality", str(TINY), "--photos", str(tmp_path), "--copies", "1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    quality.main()
    figures = json.loads(capsys.readouterr().out)
    assert figures["recipe"]["cases"] == 2 and figures["undamaged"]["photos"] == 2
    assert figures["undamaged"]["change"] > 0 or figures["undamaged"]["share_untouched"] == 1
    sheet = tmp_path / "sheet.jpg"
    monkeypatch.setattr(sys, "argv", [*arguments, "--sheet", str(sheet)])
    quality.main()
    drawn = load_photo(sheet)
    assert drawn.shape[:2] == (quality.SHEET_CELL[1], 8 * quality.SHEET_CELL[0]) and drawn.std() > 20
    sheet.unlink()
    assert f"{figures['facts']['true']:.1%} true of {figures['facts']['facts']}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["quality", str(TINY), "--photos", str(tmp_path / "missing")])
    with pytest.raises(SystemExit, match="missing"):
        quality.main()


def test_batches_do_not_change_the_recipes(evaluator: ModelEvaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [example.degraded for example in degraded_photos(held_out_photos()[:3], copies=1, seed=5)]
    together = evaluator.recipes(small)
    monkeypatch.setattr(quality, "BATCH", 2)
    assert evaluator.recipes(small) == together
