"""Recipes: canonical text, ranges, grammar, descriptions and the seeded sampler."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes import LOOKS, OPERATIONS, Recipe, describe, grammar_segments, parse, random_recipe

# No deadline: these properties must hold on a loaded machine too.
NO_DEADLINE = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Generate any recipe, including values between the levels of the grammar."""
    level = st.integers(-100, 100)
    crop = tuple(draw(st.integers(low, low + 40)) for low in (0, 0, 60, 60))
    tones = {name: draw(level) for name in ("exposure", "contrast", "saturation", "warmth")}
    return Recipe(crop=crop, **tones, sharpening=draw(st.integers(0, 100)), look=draw(st.sampled_from(LOOKS)))


def test_str_is_the_canonical_text() -> None:
    recipe = Recipe((10, 0, 90, 100), exposure=20, contrast=-10, warmth=30, sharpening=40)
    text = "crop 10 0 90 100; exposure +20; contrast -10; saturation 0; warmth +30; sharpening 40; look none"
    assert str(recipe) == text
    assert not recipe.is_identity and Recipe().is_identity


@NO_DEADLINE
@given(recipes())
def test_text_and_json_round_trip(recipe: Recipe) -> None:
    for text in (str(recipe), json.dumps(recipe.to_json()), recipe.to_json()):
        parsed = parse(text)
        assert parsed.recipe == recipe
        assert parsed.problems == () and parsed.operations == tuple(OPERATIONS)


@pytest.mark.parametrize(
    "values",
    [
        {"exposure": float("nan")},
        {"contrast": float("inf")},
        {"exposure": "bright"},
        {"look": "vintage"},
        {"crop": (0, 0, 100)},
        {"crop": (0, 0, 100, float("nan"))},
    ],
)
def test_the_constructor_rejects_invalid_values(values: dict) -> None:
    with pytest.raises(ValueError):
        Recipe(**values)


def test_the_constructor_clamps_and_rounds() -> None:
    recipe = Recipe(crop=(90, -5, 10, 1000), exposure=10**400, contrast=-1e300, sharpening=-5, saturation=12.6)
    assert recipe.crop == (40, 0, 60, 100)
    assert (recipe.exposure, recipe.contrast, recipe.sharpening, recipe.saturation) == (100, -100, 0, 13)


def test_the_grammar_generates_canonical_text() -> None:
    segments = grammar_segments()
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(segment[rng.integers(len(segment))] for segment in segments)
        assert str(parse(text).recipe) == text
    first, last = ("".join(segment[end] for segment in segments) for end in (0, -1))
    assert first.startswith("crop 0 0 60 60; exposure -100") and last.endswith("sharpening 100; look noir")


def test_the_grammar_has_every_level_once() -> None:
    for segment in grammar_segments():
        assert len(set(segment)) == len(segment)
    assert [len(segment) for segment in grammar_segments() if len(segment) > 1] == [
        9,
        9,
        9,
        9,
        21,
        21,
        21,
        21,
        11,
        len(LOOKS),
    ]


def test_random_recipes_are_seeded_valid_and_varied() -> None:
    first, second = ([random_recipe(np.random.default_rng(7)) for _ in range(3)] for _ in range(2))
    assert first == second
    rng = np.random.default_rng(7)
    drawn = [random_recipe(rng) for _ in range(300)]
    alternatives = [set(segment) for segment in grammar_segments()]
    choices = list(itertools.chain.from_iterable(alternatives))
    for recipe in drawn:
        words = str(recipe).replace(";", "").split()
        assert all(f" {word}" in choices or word in OPERATIONS for word in words)
    neutral = np.mean([recipe.exposure == 0 for recipe in drawn])
    assert 0.4 < neutral < 0.65
    assert {recipe.look for recipe in drawn} == set(LOOKS)
    assert len(set(drawn)) > 250


@pytest.mark.parametrize(
    ("recipe", "description"),
    [
        (Recipe(), "untouched"),
        (Recipe((10, 0, 90, 100), exposure=20, warmth=30), "crop to 80 x 100 %, exposure +20, warmer +30"),
        (Recipe(warmth=-10, sharpening=40, look="mono"), "cooler -10, sharpening 40, mono look"),
    ],
)
def test_describe(recipe: Recipe, description: str) -> None:
    assert describe(recipe) == description


@NO_DEADLINE
@given(recipes())
def test_describe_names_the_changed_operations(recipe: Recipe) -> None:
    description = describe(recipe)
    assert (description == "untouched") == recipe.is_identity
    for name in ("exposure", "contrast", "saturation", "sharpening"):
        assert (name in description) == bool(getattr(recipe, name))
