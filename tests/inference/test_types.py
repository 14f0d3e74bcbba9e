"""Validation and cleaning of requests."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import recipes
from inference.types import (
    MAX_PROMPT,
    MAX_SEED,
    RECIPE_QUESTION,
    SKILLS,
    Request,
    RequestError,
    clean,
    recipe_prompt,
)

PHOTO = np.zeros((4, 6, 3), np.uint8)


@pytest.mark.parametrize("skill", SKILLS.values(), ids=list(SKILLS))
def test_default_prompt_of_every_skill_is_valid(skill: Any) -> None:
    request = Request(PHOTO, skill.name, skill.default_prompt)
    assert request.prompt == skill.default_prompt
    if skill.prompt != "required":
        assert Request(PHOTO, skill.name).prompt == skill.default_prompt


def test_empty_recipe_prompt_becomes_the_recipe_question() -> None:
    assert Request(PHOTO, "recipe", " \n ").prompt == RECIPE_QUESTION


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skill": "paint"}, "Unknown skill"),
        ({"photo": None}, "no photo"),
        ({"photo": PHOTO.astype(float)}, "no photo"),
        ({"photo": PHOTO[..., 0]}, "no photo"),
        ({"photo": PHOTO[:0]}, "empty"),
        ({"prompt": "x" * (MAX_PROMPT + 1)}, "2,001 characters"),
        ({"skill": "detect", "prompt": " \x00 "}, "needs a prompt"),
        ({"length": "endless"}, "short, normal, long"),
        ({"n": 0}, "from 1 to 8"),
        ({"n": 9}, "from 1 to 8"),
        ({"n": 2.5}, "whole number"),
        ({"n": None}, "whole number"),
        ({"seed": -1}, "seed"),
        ({"seed": MAX_SEED + 1}, "seed"),
        ({"seed": math.inf}, "seed"),
        ({"temperature": math.nan}, "from 0 to 2"),
        ({"temperature": -0.1}, "from 0 to 2"),
        ({"temperature": 2.1}, "from 0 to 2"),
        ({"temperature": "warm"}, "from 0 to 2"),
    ],
)
def test_invalid_request_raises_with_a_message(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Request(**{"photo": PHOTO, "skill": "query", "prompt": "Is it dark?", **change})


def test_integral_floats_are_accepted_as_integers() -> None:
    request = Request(PHOTO, "recipe", n=4.0, seed=7.0)  # type: ignore[arg-type]
    assert (request.n, request.seed) == (4, 7) and isinstance(request.n, int)


@pytest.mark.parametrize(
    ("typed", "cleaned"),
    [
        ("a\x00b\x1b[31m", "ab[31m"),
        ("one\r\n\ttwo", "one   two"),
        ("\u202eright to left\u202c", "right to left"),
        ("\u2067isolated\u2069", "isolated"),
        ("\ud800lone", "lone"),
        ("<b>é 日本 👩\u200d🚀 می\u200cخواهم</b>", "<b>é 日本 👩\u200d🚀 می\u200cخواهم</b>"),
    ],
)
def test_prompt_cleaning_removes_only_control_characters(typed: str, cleaned: str) -> None:
    assert Request(PHOTO, "query", typed).prompt == cleaned


@given(st.text())
def test_clean_is_idempotent_and_encodable(text: str) -> None:
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    cleaned.encode("utf-8")


def test_caption_ignores_the_prompt() -> None:
    assert Request(PHOTO, "caption", "whatever was typed before").prompt == ""


def test_recipe_prompt_contains_a_valid_example() -> None:
    """The example in the prompt is a valid recipe with all operations."""
    prompt = recipe_prompt("make it moody")
    parsed = recipes.parse(prompt.split("values: ")[1].split(". The operations")[0])
    assert parsed.operations == tuple(recipes.OPERATIONS) and not parsed.problems
    assert all(f"{name} (" in prompt for name in recipes.OPERATIONS)
    assert prompt.endswith("make it moody")
    assert "wish" not in recipe_prompt() and "wish" not in recipe_prompt(RECIPE_QUESTION)
