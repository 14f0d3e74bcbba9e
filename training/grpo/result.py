"""The outcome of a run: log lines, and the result on held-out photos with the alarms. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recipes import Recipe, save_picture
from rewards import REWARDS, RewardFunction
from training.data.sources import PhotoSet
from training.evaluate import ScoredAnswer, paired_difference, summarize
from training.grpo.alarms import AlarmMonitor
from training.runs.run import Run

MAX_PAIRS = 4  # held-out photos whose two recipes are shown in the result


def format_log_line(metrics: dict[str, Any], steps: int) -> str:
    """Format the metrics of one step as a line of the log."""
    parts = [f"step {metrics['step']}/{steps}", f"reward {metrics['reward']:.3f}"]
    names = (*REWARDS, "kl", "entropy", "distinct")
    parts += [f"{name} {value:.3f}" for name in names if (value := metrics.get(name)) is not None]
    return "  ".join(parts)


def build_result(
    run: Run,
    base_model: str,
    function: RewardFunction,
    held_out: PhotoSet,
    base: list[ScoredAnswer],
    tuned: list[ScoredAnswer],
) -> dict[str, Any]:
    """Build the content of `result.json`, write the pictures that it refers to, and raise the last alarms.

    Args:
        run: The run.
        base_model: Name of the model that the adapter belongs to.
        function: The reward function of the run.
        held_out: The held-out photos.
        base: The base model's answers to them.
        tuned: The tuned model's answers to them.
    """
    metrics = run.metrics()
    gain = paired_difference(base, tuned, function)
    pairs = []
    for index in range(min(MAX_PAIRS, len(base))):
        picture, before, after = f"pair-{index}.png", base[index], tuned[index]
        save_picture(held_out.photos[index], Recipe(), run.folder / picture)
        pairs.append(
            {
                "photo": held_out.names[index],
                "picture": picture,
                "base": str(before.recipe),
                "tuned": str(after.recipe),
                "base_total": function.total(before.scores),
                "tuned_total": function.total(after.scores),
            }
        )
    alarms = AlarmMonitor(run, function, held_out).check_result(base, tuned)
    return {
        "base_model": base_model,
        "held_out": len(base),
        "base": summarize(base, function),
        "tuned": summarize(tuned, function),
        "difference": gain,
        "wins": gain["low"] is not None and gain["low"] > 0,
        "alarms": alarms,
        "alarm": " ".join(f"{alarm['title']}." for alarm in alarms),
        "pairs": pairs,
        "steps": run.status().step,
        "entropy": _first_and_last(metrics, "entropy"),
        "distinct": _first_and_last(metrics, "distinct"),
        "valid": min((row["valid"] for row in metrics if row.get("valid") is not None), default=None),
    }


def _first_and_last(metrics: Sequence[dict[str, Any]], name: str) -> dict[str, float | None]:
    """Return the means of a metric over the first and the last tenth of the run, but at least five steps."""
    values = [row[name] for row in metrics if row.get(name) is not None]
    count = max(5, len(values) // 10)
    ends = {"first": values[:count], "last": values[-count:]}
    return {key: float(np.mean(part)) if part else None for key, part in ends.items()}
