"""What a run tells of itself: a line of its log, its result on held-out photos, and the alarm. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recipes import Recipe, save_picture
from rewards import REWARDS, RewardFunction
from training.data.sources import PhotoSet
from training.evaluate import Judged, difference, summary
from training.runs.run import Run

SHOWN = 4  # held-out photos with both answers in the result


def log_line(numbers: dict[str, Any], steps: int) -> str:
    """A step as a line of the log."""
    told = [f"step {numbers['step']}/{steps}", f"reward {numbers['reward']:.3f}"]
    told += [f"{name} {value:.3f}" for name in REWARDS if (value := numbers.get(name)) is not None]
    told += [f"{name} {numbers[name]:.3f}" for name in ("kl", "entropy", "distinct") if numbers.get(name) is not None]
    return "  ".join(told)


def result(
    run: Run, base_model: str, function: RewardFunction, held_out: PhotoSet, base: list[Judged], tuned: list[Judged]
) -> dict[str, Any]:
    """What is written into result.json."""
    metrics = run.metrics()
    gain = difference(base, tuned, function)
    return {
        "base_model": base_model,
        "held_out": len(base),
        "base": summary(base, function),
        "tuned": summary(tuned, function),
        "difference": gain,
        "wins": gain["low"] is not None and gain["low"] > 0,
        "alarm": alarm(metrics, gain),
        "pairs": _pairs(run, function, held_out, base, tuned),
        "steps": run.status().step,
        "entropy": _ends(metrics, "entropy"),
        "distinct": _ends(metrics, "distinct"),
        "valid": min((line["valid"] for line in metrics if line.get("valid") is not None), default=None),
    }


def _pairs(
    run: Run, function: RewardFunction, held_out: PhotoSet, base: list[Judged], tuned: list[Judged]
) -> list[dict[str, Any]]:
    pairs = []
    for place, (photo, name, before, after) in enumerate(zip(held_out.photos, held_out.names, base, tuned)):
        if place == SHOWN:
            break
        save_picture(photo, Recipe(), run.folder / f"pair-{place}.png")
        pair = {"photo": name, "picture": f"pair-{place}.png", "base": str(before.recipe), "tuned": str(after.recipe)}
        pair |= {"base_total": function.total(before.scores), "tuned_total": function.total(after.scores)}
        pairs.append(pair)
    return pairs


def _ends(metrics: Sequence[dict[str, Any]], name: str) -> dict[str, float | None]:
    """The means over the first and the last tenth of the run, at least five steps."""
    known = [line[name] for line in metrics if line.get(name) is not None]
    some = max(5, len(known) // 10)
    ends = {"first": known[:some], "last": known[-some:]}
    return {key: float(np.mean(values)) if values else None for key, values in ends.items()}


def alarm(metrics: Sequence[dict[str, Any]], gain: dict[str, float | None]) -> str:
    """A sentence when the run learned nothing, or learned what does not hold on other photos; else nothing."""
    silent = [line["no_signal"] for line in metrics if line.get("no_signal") is not None]
    if silent and np.mean(silent) > 0.9:
        return "All answers to a photo got the same reward in nearly every step: there was nothing to learn from."
    reward = _ends(metrics, "reward")
    risen = reward["first"] is not None and reward["last"] is not None and reward["last"] > reward["first"] + 0.02
    if risen and gain["mean"] is not None and gain["mean"] < -0.005:
        return "The reward rose in training and fell on held-out photos: what was learned does not hold elsewhere."
    return ""
