"""The JSON report: settings, answers, scores and rankings of what is on the screen."""

from __future__ import annotations

from typing import Any

from inference.types import SKILLS
from recipes import describe
from rewards import RewardFunction
from ui.playground.compare import Card, Column, Comparison
from ui.playground.link import PlaygroundSettings


def report(setup: PlaygroundSettings, comparison: Comparison, reward: RewardFunction | None) -> dict[str, Any]:
    """Plain JSON. `reward` None (all weights zero) leaves every total null."""
    return {
        "settings": {
            "sample_photo": setup.photo or None,
            "skill": setup.skill,
            "prompt": setup.prompt,
            "length": setup.length,
            "candidates": setup.n,
            "temperature": setup.temperature,
            "seed": setup.seed,
        },
        "reward": dict(reward.weights) if reward else None,
        "status": comparison.status,
        "seconds": round(comparison.seconds, 3),
        "models": [_model(column, comparison.skill, reward) for column in comparison.columns],
    }


def _model(column: Column, skill: str, reward: RewardFunction | None) -> dict[str, Any]:
    totals = [total for card in column.cards if (total := _total(card, reward)) is not None]
    return {
        "model": column.name,
        "status": column.status,
        "error": column.error or None,
        "mean_total": sum(totals) / len(totals) if totals else None,
        "candidates": [candidate(card, skill) | {"total": _total(card, reward)} for card in column.cards if card.done],
    }


def candidate(card: Card, skill: str) -> dict[str, Any]:
    """One candidate as report and API give it."""
    answer: dict[str, Any] = {"index": card.index, "text": card.text, "seconds": round(card.seconds, 4)}
    if SKILLS[skill].output == "recipe":
        answer |= {
            "recipe": str(card.recipe) if card.recipe else None,
            "words": describe(card.recipe) if card.recipe else None,
            "problems": list(card.problems),
            "scores": card.scores,
            "fidelity": card.fidelity,
        }
    if card.error:
        answer["error"] = card.error
    if card.reasoning:
        answer["reasoning"] = card.reasoning
    if card.path:
        answer["path"] = card.path
    if SKILLS[skill].output == "regions":
        answer |= {
            "boxes": [[box.x_min, box.y_min, box.x_max, box.y_max] for box in card.boxes],
            "points": [[point.x, point.y] for point in card.points],
        }
    return answer


def _total(card: Card, reward: RewardFunction | None) -> float | None:
    return reward.total(card.scores) if reward and card.scores else None
