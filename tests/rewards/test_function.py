"""Reward functions: JSON, links, totals, and rejected input."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards import EQUAL_WEIGHTS, REWARDS, RewardFunction, RewardFunctionError

# No deadline: these properties must hold on a loaded machine too.
NO_DEADLINE = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

weights = st.dictionaries(st.sampled_from(list(REWARDS)), st.floats(0, 1), min_size=1).filter(lambda w: any(w.values()))


@NO_DEADLINE
@given(weights)
def test_json_round_trips_and_links_are_parsed(values: dict[str, float]) -> None:
    function = RewardFunction(values)
    restored = RewardFunction.from_json(function.to_json())
    nonzero = {name: weight for name, weight in values.items() if weight}
    assert restored.weights == nonzero
    same = RewardFunction.from_json(nonzero)
    assert same == restored and hash(same) == hash(restored)
    assert RewardFunction.from_query(",".join(f"{name}:{weight!r}" for name, weight in nonzero.items())) == restored


def test_to_json_contains_only_the_weights() -> None:
    function = RewardFunction({"creativity": 0.7, "sharpness": 0.3})
    assert json.loads(function.to_json()) == {"sharpness": 0.3, "creativity": 0.7}
    assert function == RewardFunction.from_query("sharpness:0.3,creativity:0.7")
    assert list(EQUAL_WEIGHTS.weights) == list(REWARDS) and len(set(EQUAL_WEIGHTS.weights.values())) == 1


@pytest.mark.parametrize(
    ("text", "message"),
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
def test_invalid_reward_functions_are_rejected(text: object, message: str) -> None:
    with pytest.raises(RewardFunctionError, match=message):
        RewardFunction.from_json(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "sharpness", "sharpness:x", "sharpness:nan", "blur:1", "a:1," * 2000, "sharpness:0"]
)
def test_invalid_links_are_rejected(text: str) -> None:
    with pytest.raises(RewardFunctionError):
        RewardFunction.from_query(text)


@NO_DEADLINE
@given(st.text(max_size=60))
def test_any_text_parses_or_raises_reward_function_error(text: str) -> None:
    for parse in (RewardFunction.from_json, RewardFunction.from_query):
        try:
            assert any(parse(text).weights.values())
        except RewardFunctionError as error:
            assert str(error)


def test_total_is_the_weighted_mean_of_available_scores() -> None:
    function = RewardFunction({"sharpness": 0.5, "colour": 1.0, "creativity": 0.0})
    assert function.total({"sharpness": 0.2, "colour": 0.8, "creativity": 0.1}) == pytest.approx(0.6)
    assert function.total({"sharpness": 0.2, "colour": None, "creativity": 0.1}) == 0.2
    assert function.total({"sharpness": None, "colour": None, "creativity": 0.1}) is None
    assert function.total({}) is None


@NO_DEADLINE
@given(weights, st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=3, max_size=3))
def test_total_stays_in_range(values: dict[str, float], scores: list[float | None]) -> None:
    total = RewardFunction(values).total(dict(zip(REWARDS, scores)))
    assert total is None or (math.isfinite(total) and -1e-9 <= total <= 1 + 1e-9)


def test_weights_are_copied() -> None:
    weights = {"sharpness": 1.0}
    function = RewardFunction(weights)
    weights["sharpness"] = 0.0
    assert function.weights == {"sharpness": 1.0}
