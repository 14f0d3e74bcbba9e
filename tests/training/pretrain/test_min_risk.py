"""Minimum risk training: advantages, losses, reproducibility, and the frozen vision tower."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inference.local.constraint import RecipeConstraint
from inference.types import RECIPE_QUESTION
from recipes import Recipe, grammar_segments, load_photo, parse, shrink
from training.data.bundled import bundled_photos
from training.pretrain.dataset import EXAMPLES, PretrainDataset
from training.pretrain.degradation import ERROR_SIDE, degrade
from training.pretrain.losses import packed_forward, recipe_segments
from training.pretrain.min_risk import (
    MinRiskConfig,
    average_weights,
    compute_advantages,
    min_risk_losses,
    recipe_costs,
    sample_recipes,
    train_min_risk,
)
from training.pretrain.photos import PretrainPhotos
from training.pretrain.text_stage import REGIONS, TextStageConfig, cache_batch, cache_batches, train_text
from training.pretrain.train import ModelParts, PretrainConfig, build_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photos() -> PretrainPhotos:
    return PretrainPhotos([load_photo(info.path) for info in bundled_photos("train")[:3]])


def untrained_model(photos: PretrainPhotos) -> ModelParts:
    return build_model(PretrainConfig(seed=3), photos.bundled)


def test_better_recipes_have_higher_advantages(photos: PretrainPhotos) -> None:
    inverse_recipe = Recipe(exposure=60, warmth=-40)
    pairs = []
    for photo in photos.bundled[:2]:
        original = shrink(photo, ERROR_SIDE)
        pairs.append((degrade(original, inverse_recipe, np.random.default_rng(0)), original))
    texts = [str(recipe) for _ in pairs for recipe in (inverse_recipe, Recipe(), Recipe(exposure=-20))]
    advantages, reduction = compute_advantages(texts, pairs, 3)
    for correct, identity, wrong in advantages.unflatten(0, (2, 3)).tolist():
        assert correct > identity > wrong
        assert correct + identity + wrong == pytest.approx(0, abs=1e-5)
    assert reduction < 0.5
    assert compute_advantages([str(inverse_recipe)] * 2, pairs, 1)[1] > 0.5


def test_a_crop_through_the_subject_costs_more_than_its_error(photos: PretrainPhotos) -> None:
    photo = shrink(photos.bundled[0], ERROR_SIDE)
    texts = [str(Recipe()), str(Recipe(crop=(25, 25, 75, 75)))]
    errors, costs = recipe_costs(photo, photo, texts)
    added = costs - errors
    assert errors[0] == 0
    assert added[0] == 0 < added[1]


def test_a_gradient_step_lowers_the_risk(photos: PretrainPhotos) -> None:
    model, image_processor, tokenizer = untrained_model(photos)
    dataset = PretrainDataset(photos, tokenizer, model.config.templates, 2, 1, 1, grid=8)
    batch = cache_batch(model, image_processor, dataset[0])
    constraint = RecipeConstraint(tokenizer, grammar_segments(), end_id=model.config.eos_id)
    question = dataset.query(RECIPE_QUESTION, "")
    assert batch.examples["recipe"][0].prompt == question.prompt
    texts, ids = sample_recipes(model, constraint, tokenizer, question, batch.features, 3)
    assert [str(parse(text).recipe) for text in texts] == texts
    advantages = torch.tensor([2.0, -1.0, -1.0] * 2)
    segments = recipe_segments(tokenizer)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = min_risk_losses(model, constraint, batch, ids, advantages, segments)
    before["risk"].backward()
    optimizer.step()
    with torch.no_grad():
        after = min_risk_losses(model, constraint, batch, ids, advantages, segments)
    assert after["risk"] < before["risk"]
    assert set(after) == {"risk", "recipe", "text", "end", "region"}


def test_training_is_reproducible_and_freezes_the_vision_tower(photos: PretrainPhotos) -> None:
    first, second = untrained_model(photos), untrained_model(photos)
    before = {name: value.clone() for name, value in first[0].state_dict().items()}
    for model, image_processor, tokenizer in (first, second):
        batches = cache_batches(model, image_processor, tokenizer, photos, 5, count=2)
        assert train_text(model, tokenizer, batches, TextStageConfig(steps=2)) > 0
        assert train_min_risk(model, tokenizer, batches, 5, MinRiskConfig(steps=2, samples=2)) > 0
    changed = {name for name, value in first[0].state_dict().items() if not torch.equal(value, before[name])}
    assert any(".text." in name for name in changed) and any(".region." in name for name in changed)
    assert not any(".vision." in name for name in changed)
    for name, value in first[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[name]), name


def test_weights_are_averaged() -> None:
    model, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = 0.75 * model.weight.detach() + 0.25 * other.weight.detach()
    average_weights(model, other, 0.25)
    assert torch.allclose(model.weight, expected)


def test_the_text_stage_lowers_the_loss_of_regions(photos: PretrainPhotos) -> None:
    model, image_processor, tokenizer = untrained_model(photos)
    batches = cache_batches(model, image_processor, tokenizer, photos, 5, count=1)
    assert len(batches[0].rows()[0]) == len(EXAMPLES) + REGIONS

    def region_loss() -> float:
        with torch.no_grad():
            return packed_forward(model, batches[0].features, batches[0].rows())[2].item()

    before = region_loss()
    train_text(model, tokenizer, batches, TextStageConfig(steps=8, warmup_steps=2))
    assert region_loss() < 0.95 * before
