"""The record of a run's rollouts, which the page shows as pictures. Imports no torch."""

from __future__ import annotations

from recipes import encode_jpeg, shrink
from storage.files import write_atomically
from training.grpo.reward import RecipeReward
from training.runs.rollouts import MAX_GROUPS, MAX_TEXT
from training.runs.run import Run

PHOTO_SIDE = 256  # px: long side of the copies of the training photos


def record_rollouts(run: Run, step: int, reward: RecipeReward) -> None:
    """Record the rollouts of a step with their advantages, and small copies of their photos.

    Args:
        run: The run.
        step: The step.
        reward: The reward function, after its call in this step.

    Raises:
        OSError: The folder of the run cannot be written.
    """
    groups = reward.groups[:MAX_GROUPS]
    for group in groups:
        path = run.rollout_photo(group.photo)
        if not path.exists():
            write_atomically(path, encode_jpeg(shrink(reward.photos[group.photo], PHOTO_SIDE)))
    rows = [
        {
            "photo": group.photo,
            "no_signal": group.no_signal,
            "rollouts": [
                {"text": text[:MAX_TEXT], "scores": _rounded(scores or {}), "total": total, "advantage": advantage}
                for text, scores, total, advantage in zip(
                    group.texts, group.scores, group.totals, group.advantages(), strict=True
                )
            ],
        }
        for group in groups
    ]
    run.append_rollouts({"step": step, "groups": rows})


def _rounded(scores: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if score is None else round(score, 4) for name, score in scores.items()}
