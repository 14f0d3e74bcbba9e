"""The recipe parser: prose, JSON, clamping, reported problems, robustness and linear running time."""

from __future__ import annotations

import json
import math
from time import thread_time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes import OPERATIONS, Recipe, parse
from recipes.parsing import MAX_TEXT

# No deadline: these properties must hold on a loaded machine too.
NO_DEADLINE = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("exposure +20", Recipe(exposure=20)),
        ("Exposure: 20%, contrast: −10 %", Recipe(exposure=20, contrast=-10)),
        ("+20 exposure, -10 contrast", Recipe(exposure=20, contrast=-10)),
        ("20% more contrast and 10% less saturation", Recipe(contrast=20, saturation=-10)),
        ("**Exposure**: +20\n- Contrast: -10\n- Look: Sepia", Recipe(exposure=20, contrast=-10, look="sepia")),
        ("I would raise the exposure by 20 and crop 10% from the left.", Recipe((10, 0, 100, 100), exposure=20)),
        ("Crop 10% off the left and the right, then make it warmer.", Recipe((10, 0, 90, 100), warmth=20)),
        ("crop to 80%", Recipe((10, 10, 90, 90))),
        ("crop 10, 5, 90, 95", Recipe((10, 5, 90, 95))),
        ("Brighten by 30, sharpen by 40.", Recipe(exposure=30, sharpening=40)),
        ("a bit warmer, lower the contrast by 15", Recipe(warmth=10, contrast=-15)),
        ("much cooler; slightly darker", Recipe(warmth=-40, exposure=-10)),
        ("It should be black and white", Recipe()),
        ("Convert it to black and white.", Recipe(look="mono")),
        ("look teal", Recipe(look="teal")),
        ("raise exposure by 0.6 stops", Recipe(exposure=40)),
        ("exposure 10; exposure 30", Recipe(exposure=30)),
        ('Sure! {"exposure": 20, "crop": {"left": 10}} Enjoy.', Recipe((10, 0, 100, 100), exposure=20)),
        ('{"crop": [0.1, 0, 0.9, 1], "look": null, "saturation": "20%"}', Recipe((10, 0, 90, 100), saturation=20)),
        ('{"note": 1} {"recipe": {"warmth": 30}}', Recipe(warmth=30)),
        ("exposure \u0662\u0660", Recipe(exposure=20)),
        ("\u202eexposure\u0000 +20\u202c", Recipe(exposure=20)),
        ("exposure", Recipe()),
    ],
)
def test_parse_returns_the_recipe(text: str, recipe: Recipe) -> None:
    assert parse(text).recipe == recipe


@pytest.mark.parametrize(
    "text", ["", "   ", "A warm sunset over sharp mountains.", "{}", "[1, 2]", "no", "look at this", "\0"]
)
def test_text_without_a_recipe_is_not_ok(text: str) -> None:
    parsed = parse(text)
    assert not parsed.ok and parsed.recipe.is_identity and parsed.problems == ("no operation was found",)


@pytest.mark.parametrize("value", [None, 3, b"exposure 20", ["exposure"], object()])
def test_a_source_that_is_not_text_is_reported(value: object) -> None:
    parsed = parse(value)
    assert not parsed.ok and "a recipe must be text or a JSON object" in parsed.problems


@pytest.mark.parametrize(
    ("text", "recipe", "problem"),
    [
        ("exposure 1000000000", Recipe(exposure=100), "exposure 1e+09 was clamped to -100..100"),
        ("exposure 10^9", Recipe(exposure=100), "exposure 1e+09 was clamped to -100..100"),
        ("exposure -1e999", Recipe(exposure=-100), "exposure -inf was clamped to -100..100"),
        ("warmth -inf", Recipe(warmth=-100), "warmth -inf was clamped to -100..100"),
        ("contrast nan", Recipe(), "contrast: not a number"),
        ("crop 90 0 10 100", Recipe((40, 0, 60, 100)), "crop 90 was clamped to 0..40"),
        ("crop 1 2 3", Recipe(), "crop needs four numbers: left top right bottom"),
        ("exposure 20; look vintage", Recipe(exposure=20), "look: vintage is not one of none"),
        ("exposure 20; blur 30", Recipe(exposure=20), "blur is not an operation"),
        ("sharpening -30", Recipe(), "sharpening -30 was clamped to 0..100"),
        ('{"exposure": "bright"}', Recipe(), "exposure: bright is not 1 number(s)"),
        ('{"exposure": true}', Recipe(), "exposure: True is not 1 number(s)"),
        ('{"exposure": NaN}', Recipe(), "exposure: not a number"),
        ('{"exposure": -Infinity, "blur": 3}', Recipe(exposure=-100), "blur is not an operation"),
        ('{"crop": [10, 20]}', Recipe(), "crop: [10, 20] is not 4 number(s)"),
        ('{"look": 3, "exposure": 10}', Recipe(exposure=10), "look: 3 is not one of none"),
    ],
)
def test_problems_are_reported(text: str, recipe: Recipe, problem: str) -> None:
    parsed = parse(text)
    assert parsed.recipe == recipe
    assert any(message.startswith(problem) for message in parsed.problems), parsed.problems


words = st.sampled_from([*OPERATIONS, "left", "warmer", "raise", "by", "mono", "to", "{", "}", '"', ":", ";", ",", "%"])
numbers = st.one_of(st.integers().map(str), st.floats().map(str), st.sampled_from(["10^9", "nan", "-inf", "1e400"]))


@NO_DEADLINE
@given(st.one_of(st.text(max_size=300), st.lists(st.one_of(words, numbers), max_size=40).map(" ".join)))
def test_parse_never_raises_and_returns_a_valid_recipe(text: str) -> None:
    parsed = parse(text)
    assert parse(str(parsed.recipe)).recipe == parsed.recipe
    assert parsed.ok == bool(parsed.operations)
    assert all(math.isfinite(number) for number in (*parsed.recipe.crop, parsed.recipe.exposure))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from([*OPERATIONS, "recipe"]), inner),
    max_leaves=12,
)


@NO_DEADLINE
@given(st.dictionaries(st.sampled_from([*OPERATIONS, "recipe", "x"]), json_values))
def test_parse_never_raises_on_json(values: dict) -> None:
    from_mapping, from_text = parse(values), parse(json.dumps(values))
    if "recipe" not in values and OPERATIONS.keys() & values.keys():
        assert from_mapping.recipe == from_text.recipe


@NO_DEADLINE
@given(st.floats(), st.sampled_from(["exposure", "contrast", "saturation", "warmth", "sharpening"]))
def test_numbers_are_clamped_alike_in_text_and_json(value: float, name: str) -> None:
    from_text, from_mapping = parse(f"{name} {value!r}").recipe, parse({name: value}).recipe
    assert from_text == from_mapping
    slot = OPERATIONS[name].slots[0]
    expected = slot.neutral if math.isnan(value) else round(min(max(value, slot.low), slot.high))
    assert getattr(from_text, name) == expected


PIECES = ["1", "(", "{", "[{", "exposure ", "crop left ", "+", "a", "e1", "1.1", ", ", "1 ", "exposure 1 ", "left ",
          '{"a":', "warmer ", "black ", "b ", "\u200f", "look ", "1^", ". "]  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
def test_parsing_time_is_linear_in_the_length(piece: str) -> None:
    """Compares CPU time, not wall time: about 0.3 s is usual, and a quadratic version needs 4 to 7 s."""
    text = piece * (100_000 // len(piece))
    times = []
    for _ in range(2):
        start = thread_time()
        parse(text)
        times.append(thread_time() - start)
    assert min(times) < 2.5


def test_text_beyond_the_limit_is_truncated_and_reported() -> None:
    parsed = parse("exposure 20; " + "x" * (MAX_TEXT + 10))
    assert parsed.recipe.exposure == 20
    assert any("characters were read" in problem for problem in parsed.problems)
