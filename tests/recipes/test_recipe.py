"""Recipes: canonical text, ranges, grammar, words for a card, the seeded sampler."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes import LOOKS, OPERATIONS, Recipe, describe, grammar, parse, random_recipe

# A busy machine must not fail a property.
CALM = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

levels = st.sampled_from


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any recipe, also between the levels a model writes."""
    whole = st.integers(-100, 100)
    crop = tuple(draw(st.integers(low, low + 40)) for low in (0, 0, 60, 60))
    tones = {name: draw(whole) for name in ("exposure", "contrast", "saturation", "warmth")}
    return Recipe(crop=crop, **tones, sharpening=draw(st.integers(0, 100)), look=draw(st.sampled_from(LOOKS)))


def test_canonical_text() -> None:
    recipe = Recipe((10, 0, 90, 100), exposure=20, contrast=-10, warmth=30, sharpening=40)
    text = "crop 10 0 90 100; exposure +20; contrast -10; saturation 0; warmth +30; sharpening 40; look none"
    assert str(recipe) == text
    assert not recipe.is_identity and Recipe().is_identity


@CALM
@given(recipes())
def test_text_and_json_round_trip(recipe: Recipe) -> None:
    for text in (str(recipe), json.dumps(recipe.to_json()), recipe.to_json()):
        parsed = parse(text)
        assert parsed.recipe == recipe
        assert parsed.problems == () and parsed.found == tuple(OPERATIONS)


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
def test_the_constructor_refuses_nonsense(values: dict) -> None:
    with pytest.raises(ValueError):
        Recipe(**values)


def test_the_constructor_clamps_and_rounds() -> None:
    recipe = Recipe(crop=(90, -5, 10, 1000), exposure=10**400, contrast=-1e300, sharpening=-5, saturation=12.6)
    assert recipe.crop == (40, 0, 60, 100)
    assert (recipe.exposure, recipe.contrast, recipe.sharpening, recipe.saturation) == (100, -100, 0, 13)


def test_grammar_spells_exactly_the_canonical_texts() -> None:
    segments = grammar()
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(segment[rng.integers(len(segment))] for segment in segments)
        assert str(parse(text).recipe) == text
    first, last = ("".join(segment[end] for segment in segments) for end in (0, -1))
    assert first.startswith("crop 0 0 60 60; exposure -100") and last.endswith("sharpening 100; look noir")


def test_grammar_has_every_level_once() -> None:
    for segment in grammar():
        assert len(set(segment)) == len(segment)
    assert [len(segment) for segment in grammar() if len(segment) > 1] == [9, 9, 9, 9, 21, 21, 21, 21, 11, len(LOOKS)]


def test_random_recipes_are_seeded_valid_and_varied() -> None:
    one, other = ([random_recipe(np.random.default_rng(7)) for _ in range(3)] for _ in range(2))
    assert one == other
    rng = np.random.default_rng(7)
    drawn = [random_recipe(rng) for _ in range(300)]
    alternatives = [set(segment) for segment in grammar()]
    choices = list(itertools.chain.from_iterable(alternatives))
    for recipe in drawn:
        words = str(recipe).replace(";", "").split()
        assert all(f" {word}" in choices or word in OPERATIONS for word in words)
    untouched = np.mean([recipe.exposure == 0 for recipe in drawn])
    assert 0.4 < untouched < 0.65
    assert {recipe.look for recipe in drawn} == set(LOOKS)
    assert len(set(drawn)) > 250


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe(), "untouched"),
        (Recipe((10, 0, 90, 100), exposure=20, warmth=30), "crop to 80 x 100 %, exposure +20, warmer +30"),
        (Recipe(warmth=-10, sharpening=40, look="mono"), "cooler -10, sharpening 40, mono look"),
    ],
)
def test_describe(recipe: Recipe, words: str) -> None:
    assert describe(recipe) == words


@CALM
@given(recipes())
def test_describe_names_what_is_touched(recipe: Recipe) -> None:
    words = describe(recipe)
    assert (words == "untouched") == recipe.is_identity
    for name in ("exposure", "contrast", "saturation", "sharpening"):
        assert (name in words) == bool(getattr(recipe, name))
