"""The last stage of pre-training: drawn recipes are judged by the error they leave, and the rest is not forgotten."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inference.local.constraint import RecipeConstraint
from inference.types import RECIPE_QUESTION
from recipes import Recipe, grammar_segments, load_photo, parse, shrink
from training.data.bundled import bundled_photos
from training.pretrain.dataset import PretrainDataset
from training.pretrain.degradation import ERROR_SIDE, degrade
from training.pretrain.losses import recipe_segments
from training.pretrain.min_risk import Refinement, _batch, advantages, draw, refine, step_losses
from training.pretrain.train import Parts, Settings, build


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    return [load_photo(info.path) for info in bundled_photos("train")[:3]]


def fresh(photos: list[np.ndarray]) -> Parts:
    return build(Settings(seed=3), photos)


def test_the_better_recipe_has_the_advantage(photos: list[np.ndarray]) -> None:
    undo = Recipe(exposure=60, warmth=-40)
    pairs = []
    for photo in photos[:2]:
        original = shrink(photo, ERROR_SIDE)
        pairs.append((degrade(original, undo, np.random.default_rng(0)), original))
    texts = [str(recipe) for _ in pairs for recipe in (undo, Recipe(), Recipe(exposure=-60))]
    gains, lowered = advantages(texts, pairs, 3)
    for right, nothing, wrong in gains.unflatten(0, (2, 3)).tolist():
        assert right > nothing > wrong
        assert right + nothing + wrong == pytest.approx(0, abs=1e-5)
    assert lowered < 0.5
    assert advantages([str(undo)] * 2, pairs, 1)[1] > 0.5


def test_a_likelier_good_recipe_lowers_the_risk(photos: list[np.ndarray]) -> None:
    model, image_processor, tokenizer = fresh(photos)
    lessons = PretrainDataset(photos, tokenizer, model.config.templates, 2, 1, 1, grid=8)
    batch = _batch(model, image_processor, lessons[0])
    constraint = RecipeConstraint(tokenizer, grammar_segments(), end_id=model.config.eos_id)
    question = lessons.query(RECIPE_QUESTION, "")
    assert batch.lessons["recipe"][0].prompt == question.prompt
    texts, ids = draw(model, constraint, tokenizer, question, batch.features, 3)
    assert [str(parse(text).recipe) for text in texts] == texts
    gains = torch.tensor([2.0, -1.0, -1.0] * 2)
    segments = recipe_segments(tokenizer, 1.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = step_losses(model, constraint, batch, ids, gains, segments)
    before["risk"].backward()
    optimizer.step()
    with torch.no_grad():
        after = step_losses(model, constraint, batch, ids, gains, segments)
    assert after["risk"] < before["risk"]
    assert set(after) == {"risk", "recipe", "text", "end", "region"}


def test_refining_repeats_and_leaves_the_eyes_alone(photos: list[np.ndarray]) -> None:
    how = Refinement(steps=2, batch=2, batches=2, drawn=2)
    one, two = fresh(photos), fresh(photos)
    before = {name: value.clone() for name, value in one[0].state_dict().items()}
    for model, image_processor, tokenizer in (one, two):
        assert refine(model, image_processor, tokenizer, photos, 5, how) > 0
    changed = {name for name, value in one[0].state_dict().items() if not torch.equal(value, before[name])}
    assert any(".text." in name for name in changed)
    assert not any(".vision." in name for name in changed)
    for name, value in one[0].state_dict().items():
        assert torch.equal(value, two[0].state_dict()[name]), name
