"""The embedded model as it is shipped: it looks at photos that it was not trained on, and says what is so."""

import json
from pathlib import Path

import numpy as np
import pytest

from inference.registry import TINY, answer
from inference.types import Answer, Request
from recipes import load_photo, parse, render
from training.data.bundled import bundled_photos
from training.pretrain.degradation import error
from training.pretrain.quality import (
    ModelEvaluator,
    examples,
    held_out,
    levels_seen,
    load_evaluator,
    regions,
    restoration,
    statements,
)


@pytest.fixture(scope="module")
def reader() -> ModelEvaluator:
    return load_evaluator(TINY)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    return held_out()


def test_the_folder_is_small_and_says_what_it_is() -> None:
    folder = Path(TINY)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "demonstration model" in card
    quality = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    assert f"{quality['facts']['true']:.1%}" in card


def test_its_recipes_lower_the_error_of_damaged_held_out_photos(
    reader: ModelEvaluator, photos: list[np.ndarray]
) -> None:
    """What it reaches, so that it does not get worse unseen; what it is meant to reach is in `bench/tiny.py`."""
    found = restoration(reader, examples(photos, copies=4, seed=1234), seed=1234)
    assert found["error_restored"] < 0.85 * found["error_degraded"], found
    assert found["error_restored"] < found["error_best_single_recipe"], found
    assert found["share_lowered"] > 0.7, found


def test_it_sees_light_contrast_warmth_and_blur(reader: ModelEvaluator, photos: list[np.ndarray]) -> None:
    found = levels_seen(reader, examples(photos, copies=4, seed=99))
    assert found["exposure"] > 0.7, found
    assert found["contrast"] > 0.35, found
    assert found["warmth"] > 0.45, found
    assert found["sharpening"] > 0.65, found
    assert found["crop_within_5"] > 0.5, found


def test_its_recipes_belong_to_their_photos(reader: ModelEvaluator, photos: list[np.ndarray]) -> None:
    spoilt = examples(photos, copies=2, seed=5)
    recipes = reader.recipes([e.spoilt for e in spoilt])
    own = np.mean([error(render(e.spoilt, r), e.original) for e, r in zip(spoilt, recipes, strict=True)])
    shifted = recipes[2:] + recipes[:2]
    swapped = np.mean([error(render(e.spoilt, r), e.original) for e, r in zip(spoilt, shifted, strict=True)])
    assert own < 0.8 * swapped


def test_most_of_what_it_states_is_true(reader: ModelEvaluator, photos: list[np.ndarray]) -> None:
    train_eval_split = examples(photos, copies=1, seed=7)
    found = statements(reader, [e.spoilt for e in train_eval_split] + [e.original for e in train_eval_split])
    assert found["true"] >= 0.9, found
    assert found["facts"] > 500
    assert found["without_a_fact"] < 0.02 * found["facts"]


def test_it_finds_areas(reader: ModelEvaluator, photos: list[np.ndarray]) -> None:
    found = regions(reader, [e.original for e in examples(photos, 1, 7)])
    assert found["hit"] > 0.7, found
    assert found["iou"] > 0.4, found
    assert found["nothing_found_for_unknown"] > 0.9, found


@pytest.mark.parametrize("index", [0, 7, 14])
def test_eight_samples_at_temperature_one_are_distinct_and_valid(index: int) -> None:
    photo = load_photo(bundled_photos("held-out")[index].path)
    request = Request(photo=photo, skill="recipe", n=8, temperature=1.0, seed=1)
    texts = [event.text for event in answer("moondream-tiny", request) if isinstance(event, Answer)]
    assert len(set(texts)) == 8
    for text in texts:
        parsed = parse(text)
        assert str(parsed.recipe) == text
        assert not parsed.problems
