"""The JSON report of a comparison: settings, answers, scores and totals. Uses no Gradio."""

from __future__ import annotations

from typing import Any

from inference.types import SKILLS
from recipes import describe
from rewards import RewardFunction
from ui.playground.compare import Candidate, Comparison
from ui.playground.link import PlaygroundSettings


def report(settings: PlaygroundSettings, comparison: Comparison, reward: RewardFunction | None) -> dict[str, Any]:
    """Build the report.

    Args:
        settings: The settings of the comparison.
        comparison: Its last snapshot.
        reward: Weights of the totals; None (all weights are zero) leaves the totals null.

    Returns:
        A JSON object.
    """

    def total(candidate: Candidate) -> float | None:
        return reward.total(candidate.scores) if reward else None

    models = []
    for column in comparison.columns:
        totals = [value for value in map(total, column.candidates) if value is not None]
        models.append(
            {
                "model": column.name,
                "status": column.status,
                "error": column.error or None,
                "mean_total": sum(totals) / len(totals) if totals else None,
                "candidates": [
                    candidate_json(candidate, comparison.skill) | {"total": total(candidate)}
                    for candidate in column.candidates
                    if candidate.done
                ],
            }
        )
    return {
        "settings": {
            "sample_photo": settings.photo or None,
            "skill": settings.skill,
            "prompt": settings.prompt,
            "length": settings.length,
            "candidates": settings.n,
            "temperature": settings.temperature,
            "seed": settings.seed,
        },
        "reward": dict(reward.weights) if reward else None,
        "status": comparison.status,
        "seconds": round(comparison.seconds, 3),
        "models": models,
    }


def candidate_json(candidate: Candidate, skill: str) -> dict[str, Any]:
    """Describe a candidate, in the report and in the API."""
    result: dict[str, Any] = {
        "index": candidate.index,
        "text": candidate.text,
        "seconds": round(candidate.seconds, 4),
    }
    if SKILLS[skill].output == "recipe":
        result |= {
            "recipe": str(candidate.recipe) if candidate.recipe else None,
            "words": describe(candidate.recipe) if candidate.recipe else None,
            "problems": list(candidate.problems),
            "scores": candidate.scores,
            "fidelity": candidate.fidelity,
        }
    result |= {key: value for key in ("error", "reasoning") if (value := getattr(candidate, key))}
    if candidate.path:
        result["outline"] = candidate.path  # Gradio's client would download what is called "path"
    if SKILLS[skill].output == "regions":
        result |= {
            "boxes": [[box.x_min, box.y_min, box.x_max, box.y_max] for box in candidate.boxes],
            "points": [[point.x, point.y] for point in candidate.points],
        }
    return result
