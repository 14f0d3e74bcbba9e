"""The reward function for TRL: it returns the playground's totals, and None or an error where there is no total."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch

import rewards
from inference.types import Answer, Request
from recipes import load_photo
from recipes.recipe import Recipe, random_recipe
from rewards import EQUAL_WEIGHTS, RewardFunction
from tests.support.runs import make_config
from training.grpo.reward import RecipeReward
from training.grpo.rollouts import record_rollouts
from training.runs.run import Run, RunAborted, RunStore
from ui.playground.compare import compare


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Create an empty run."""
    return RunStore(tmp_path).create(make_config())


def test_reward_equals_the_totals_on_the_playground_cards(photos: list[np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    function = RewardFunction({"sharpness": 0.3, "colour": 0.2, "creativity": 0.9})
    texts = [[str(random_recipe(rng)) for _ in range(4)] for _ in photos]
    card_totals = []
    for photo, group in zip(photos, texts, strict=True):

        def answer(name: str, request: Request, cancel: Event, group: list[str] = group) -> Iterator[Answer]:
            yield from (Answer(index, text) for index, text in enumerate(group))

        *_, last = compare(["moondream-tiny"], Request(photo, "recipe", n=4), Event(), answer)
        card_totals += [function.total(candidate.scores) for candidate in last.columns[0].candidates]
    reward = RecipeReward(photos, function, group_size=4)
    for _ in range(2):  # the second call skips rewards with weight 0
        totals = reward([[{"content": text}] for group in texts for text in group], [0] * 4 + [1] * 4 + [2] * 4)
        assert totals == card_totals
    assert len(set(totals)) > 6


def test_invalid_recipe_gets_no_reward(photos: list[np.ndarray]) -> None:
    reward = RecipeReward(photos, EQUAL_WEIGHTS, group_size=2)
    totals = reward(["no recipe here", str(Recipe(exposure=10))], [0, 0])
    assert totals[0] is None
    assert totals[1] is not None
    assert reward.component_means["valid"] == 0.5
    assert reward(["I cannot tell.", "nor can I"], [1, 1]) == [None, None]


def test_groups_have_the_advantages_that_trl_computes(photos: list[np.ndarray], run: Run) -> None:
    reward = RecipeReward(photos, EQUAL_WEIGHTS, group_size=3)
    texts = [str(Recipe()), str(Recipe(exposure=60)), "no recipe", *[str(Recipe(exposure=10))] * 3]
    totals = reward(texts, [2] * 3 + [0] * 3)
    first, second = reward.groups
    assert (first.photo, first.texts, first.totals, first.no_signal) == (2, texts[:3], totals[:3], False)
    known = torch.tensor(totals[:2])
    expected = (known - known.mean()) / (known.std() + 1e-4)  # invalid completions are left out, as in TRL
    assert first.advantages()[:2] == pytest.approx(expected.tolist(), rel=1e-4) and first.advantages()[2] is None
    assert second.no_signal and second.advantages() == pytest.approx([0, 0, 0])
    record_rollouts(run, 7, reward)
    row = run.rollouts(7)
    assert row is not None and [group["photo"] for group in row["groups"]] == [2, 0]
    assert [group["no_signal"] for group in row["groups"]] == [False, True]
    assert row["groups"][0]["rollouts"][2] == {"text": "no recipe", "scores": {}, "total": None, "advantage": None}
    assert max(load_photo(run.rollout_photo(2)).shape) <= 256


def test_non_finite_reward_aborts_the_run(photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rewards.REWARDS, "colour", lambda source, candidates: [float("nan")] * len(candidates))
    reward = RecipeReward(photos, RewardFunction({"colour": 1.0}), group_size=2)
    with pytest.raises(RunAborted, match="not a finite number"):
        reward([str(Recipe()), str(Recipe(exposure=10))], [0, 0])
