"""Reward functions: JSON, URL, totals, and everything that makes none."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards import DEFAULT, REWARDS, RewardFunction, RewardFunctionError

# A busy machine must not fail a property.
CALM = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

weights = st.dictionaries(st.sampled_from(list(REWARDS)), st.floats(0, 1), min_size=1).filter(lambda w: any(w.values()))


@CALM
@given(weights)
def test_json_and_query_round_trip(values: dict[str, float]) -> None:
    function = RewardFunction(values)
    again = RewardFunction.from_json(function.to_json())
    kept = {name: weight for name, weight in values.items() if weight}
    assert again.weights == kept
    assert RewardFunction.from_json(kept) == again and hash(RewardFunction.from_json(kept)) == hash(again)
    assert RewardFunction.from_query(function.to_query()) == again


def test_the_whole_json_is_the_weights() -> None:
    function = RewardFunction({"creativity": 0.7, "sharpness": 0.3})
    assert json.loads(function.to_json()) == {"sharpness": 0.3, "creativity": 0.7}
    assert function.to_query() == "sharpness:0.3,creativity:0.7"
    assert list(DEFAULT.weights) == list(REWARDS) and len(set(DEFAULT.weights.values())) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"sharpnes": 1}', "no reward named sharpnes"),
        ('{"sharpness": NaN}', "from 0 to 1"),
        ('{"sharpness": Infinity}', "from 0 to 1"),
        ('{"sharpness": -0.1}', "from 0 to 1"),
        ('{"sharpness": 1.1}', "from 0 to 1"),
        ('{"sharpness": "1"}', "from 0 to 1"),
        ('{"sharpness": true}', "from 0 to 1"),
        ('{"sharpness": null}', "from 0 to 1"),
        ('{"sharpness": 1e999}', "from 0 to 1"),
        ('{"sharpness": 0, "colour": 0}', "zero"),
        ('{"sharpness": 1, "sharpness": 0.5}', "twice"),
        ("{}", "zero"),
        ("[1]", "JSON object"),
        ("3", "JSON object"),
        ("", "not JSON"),
        ("sharpness", "not JSON"),
        ("[" * 1500, "not JSON"),
        ('{"sharpness": 1}' + " " * 5000, "at most"),
        (None, "JSON object"),
        (7, "JSON object"),
        ([("sharpness", 1)], "JSON object"),
    ],
)
def test_what_is_no_reward_function_is_said(text: object, says: str) -> None:
    with pytest.raises(RewardFunctionError, match=says):
        RewardFunction.from_json(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "sharpness", "sharpness:x", "sharpness:nan", "blur:1", "a:1," * 2000, "sharpness:0"]
)
def test_bad_links_are_said(text: str) -> None:
    with pytest.raises(RewardFunctionError):
        RewardFunction.from_query(text)


@CALM
@given(st.text(max_size=60))
def test_no_text_escapes(text: str) -> None:
    for read in (RewardFunction.from_json, RewardFunction.from_query):
        try:
            assert any(read(text).weights.values())
        except RewardFunctionError as error:
            assert str(error)


def test_total_is_the_weighted_mean_of_what_applies() -> None:
    function = RewardFunction({"sharpness": 0.5, "colour": 1.0, "creativity": 0.0})
    assert function.total({"sharpness": 0.2, "colour": 0.8, "creativity": 0.1}) == pytest.approx(0.6)
    assert function.total({"sharpness": 0.2, "colour": None, "creativity": 0.1}) == 0.2
    assert function.total({"sharpness": None, "colour": None, "creativity": 0.1}) is None
    assert function.total({}) is None


@CALM
@given(weights, st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=3, max_size=3))
def test_total_stays_in_range(values: dict[str, float], scores: list[float | None]) -> None:
    total = RewardFunction(values).total(dict(zip(REWARDS, scores)))
    assert total is None or (math.isfinite(total) and -1e-9 <= total <= 1 + 1e-9)


def test_a_function_cannot_be_changed_from_outside() -> None:
    mine = {"sharpness": 1.0}
    function = RewardFunction(mine)
    mine["sharpness"] = 0.0
    assert function.weights == {"sharpness": 1.0}
