"""Tests of the page's URL: parameters are validated, and no URL breaks the page."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.registry import MODELS
from inference.types import LENGTHS, MAX_PROMPT, SKILLS
from rewards import REWARDS, RewardFunction
from ui.playground.link import LINK_FIELDS, MAX_LINK, PlaygroundSettings, link_js, read_link
from ui.playground.samples import SAMPLES


def test_empty_query_gives_the_defaults() -> None:
    assert read_link({}, MODELS) == (PlaygroundSettings(), [])
    assert set(PlaygroundSettings().models) <= set(MODELS)


def test_query_can_contain_every_setting() -> None:
    query = {
        "photo": next(iter(SAMPLES)), "models": "moondream2,moondream-tiny", "skill": "detect", "prompt": "a cup",
        "length": "short", "n": "8", "temperature": "0.5", "seed": "99", "reward": "sharpness:0.3,creativity:0.7",
    }  # fmt: skip
    settings, problems = read_link(query, MODELS)
    assert problems == []
    assert settings == PlaygroundSettings(
        query["photo"], ("moondream2", "moondream-tiny"), "detect", "a cup", "short", 8, 0.5, 99,
        RewardFunction({"sharpness": 0.3, "creativity": 0.7}),
    )  # fmt: skip
    assert set(query) == {*LINK_FIELDS, "reward"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("photo", "../../etc/passwd"), ("photo", "/etc/passwd"), ("models", "gpt"), ("models", ","),
        ("models", "moondream-tiny,<script>"), ("skill", "train"), ("length", "endless"), ("n", "0"), ("n", "9"),
        ("n", "1e9"), ("n", "nan"), ("temperature", "inf"), ("temperature", "-1"), ("seed", "x"), ("seed", "-1"),
        ("reward", "beauty:1"), ("reward", "sharpness:nan"), ("reward", "sharpness:0"), ("reward", "sharpness"),
    ],
)  # fmt: skip
def test_invalid_parameter_is_named_and_keeps_its_default(name: str, value: str) -> None:
    settings, problems = read_link({name: value, "prompt": "kept"}, MODELS)
    assert settings == PlaygroundSettings(prompt="kept")
    assert len(problems) == 1 and problems[0].startswith(f"{name}: ")


def test_long_prompt_is_truncated_without_control_characters() -> None:
    settings, _ = read_link({"prompt": "a\x00b\u202e" + "c" * 100_000}, MODELS)
    assert settings.prompt == "ab" + "c" * (MAX_PROMPT - 2)


@given(st.dictionaries(st.sampled_from([*LINK_FIELDS, "reward", "other"]), st.text(max_size=300)))
def test_no_query_raises(query: dict[str, str]) -> None:
    settings, problems = read_link(query, MODELS)
    assert (
        settings.skill in SKILLS
        and settings.length in LENGTHS
        and 1 <= settings.n <= 8
        and 0 <= settings.temperature <= 2
    )
    assert all(name in MODELS for name in settings.models) and len(problems) <= len(query)


@pytest.mark.parametrize("copy", [True, False])
def test_link_js_is_called_with_the_names_of_fields_and_rewards(copy: bool) -> None:
    code = link_js(copy)
    arguments = json.dumps([LINK_FIELDS, list(REWARDS), MAX_LINK, copy])
    assert code.startswith("(") and code.endswith(f")(...{arguments})")
