"""The page's address: everything in it is checked, and nothing in it breaks the page."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.registry import MODELS
from inference.types import LENGTHS, MAX_PROMPT, SKILLS
from rewards import REWARDS, RewardFunction
from ui.playground.link import LINKED, PlaygroundSettings, link_js, read_link
from ui.playground.samples import SAMPLES


def test_an_empty_address_is_the_default() -> None:
    assert read_link({}) == (PlaygroundSettings(), [])
    assert set(PlaygroundSettings().models) <= set(MODELS)


def test_everything_can_be_linked() -> None:
    query = {
        "photo": next(iter(SAMPLES)), "models": "moondream2,moondream-tiny", "skill": "detect", "prompt": "a cup",
        "length": "short", "n": "8", "temperature": "0.5", "seed": "99", "reward": "sharpness:0.3,creativity:0.7",
    }  # fmt: skip
    setup, problems = read_link(query)
    assert problems == []
    assert setup == PlaygroundSettings(
        query["photo"], ("moondream2", "moondream-tiny"), "detect", "a cup", "short", 8, 0.5, 99,
        RewardFunction({"sharpness": 0.3, "creativity": 0.7}),
    )  # fmt: skip
    assert set(query) == {*LINKED, "reward"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("photo", "../../etc/passwd"), ("photo", "/etc/passwd"), ("models", "gpt"), ("models", ","),
        ("models", "moondream-tiny,<script>"), ("skill", "train"), ("length", "endless"), ("n", "0"), ("n", "9"),
        ("n", "1e9"), ("n", "nan"), ("temperature", "inf"), ("temperature", "-1"), ("seed", "x"), ("seed", "-1"),
        ("reward", "beauty:1"), ("reward", "sharpness:nan"), ("reward", "sharpness:0"), ("reward", "sharpness"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_and_left_at_its_default(name: str, value: str) -> None:
    setup, problems = read_link({name: value, "prompt": "kept"})
    assert setup == PlaygroundSettings(prompt="kept")
    assert len(problems) == 1 and problems[0].startswith(f"{name}: ")


def test_a_long_prompt_is_cut_and_control_characters_go() -> None:
    setup, _ = read_link({"prompt": "a\x00b\u202e" + "c" * 100_000})
    assert setup.prompt == "ab" + "c" * (MAX_PROMPT - 2)


@given(st.dictionaries(st.sampled_from([*LINKED, "reward", "other"]), st.text(max_size=300)))
def test_no_address_breaks_the_page(query: dict[str, str]) -> None:
    setup, problems = read_link(query)
    assert setup.skill in SKILLS and setup.length in LENGTHS and 1 <= setup.n <= 8 and 0 <= setup.temperature <= 2
    assert all(name in MODELS for name in setup.models) and len(problems) <= len(query)


@pytest.mark.parametrize("now", [True, False])
def test_the_writer_knows_the_names(now: bool) -> None:
    code = link_js(list(REWARDS), now)
    assert json.dumps(list(LINKED)) in code and json.dumps(list(REWARDS)) in code
    assert "NAMES" not in code and code.startswith("(")
