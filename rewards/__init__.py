"""Rewards: score finished pictures. One file per reward; a reward is a function named in REWARDS."""

from rewards.colour import colour
from rewards.creativity import creativity
from rewards.function import RewardFunction, RewardFunctionError
from rewards.scoring import Reward, ScoredRecipe, score_pictures, score_recipes
from rewards.sharpness import sharpness

REWARDS: dict[str, Reward] = {"sharpness": sharpness, "colour": colour, "creativity": creativity}
EQUAL_WEIGHTS = RewardFunction(dict.fromkeys(REWARDS, 1.0))

__all__ = [
    "EQUAL_WEIGHTS",
    "REWARDS",
    "Reward",
    "RewardFunction",
    "RewardFunctionError",
    "ScoredRecipe",
    "score_pictures",
    "score_recipes",
]
