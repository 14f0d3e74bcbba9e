"""Does the fine-tune learn what the sliders ask? Twelve runs: three rewards and their equal mix, three seeds each.

Judged on the held-out photos, which neither pre-training nor the runs have seen: each model's likeliest recipe, scored
as a group of one. "Gap" is what lies between the base and the best of 256 random recipes per photo.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from inference.registry import MODELS
from recipes import Recipe, load_photo, parse, random_recipe, render, shrink
from rewards import EQUAL_WEIGHTS, REWARDS, RewardFunction, score_pictures
from training.data.bundled import bundled_photos
from training.evaluate import (
    POOL_SIZE,
    ScoredAnswer,
    greedy_answers,
    paired_difference,
    resolve_model,
    reward_totals,
    score_answer,
)
from training.runs.run import RunConfig

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = {name: RewardFunction({name: 1.0}) for name in REWARDS} | {"equal": EQUAL_WEIGHTS}
SEEDS = (1, 2, 3)
MUST_LOOK = ("sharpness", "colour", "equal")


class Photos:
    """The held-out photos with the scores of the untouched ones, of random recipes, and of the base."""

    def __init__(self) -> None:
        self.photos = [shrink(load_photo(info.path)) for info in bundled_photos("held-out")]
        rng = np.random.default_rng(0)
        self.pool = [Recipe(), *(random_recipe(rng) for _ in range(POOL_SIZE))]
        self.scored = [[_judged(photo, recipe) for recipe in self.pool] for photo in self.photos]
        self.base = self.judged("moondream-tiny")

    def judged(self, name: str) -> list[ScoredAnswer]:
        """A model's likeliest recipes, scored."""
        entry = MODELS[name] if name in MODELS else resolve_model(name)
        return [score_answer(photo, text) for photo, text in zip(self.photos, greedy_answers(entry, self.photos), strict=True)]

    def reference_scores(self, function: RewardFunction) -> tuple[float, float]:
        """The total of the best single recipe for all, and of the best of the random ones per photo."""
        table = np.stack([reward_totals(row, function) for row in self.scored])
        return float(table.mean(0).max()), float(table[:, 1:].max(1).mean())

    def swapped(self, judged: list[ScoredAnswer], function: RewardFunction) -> float:
        """The mean total when each photo gets the recipe of another photo, over all other photos."""
        recipes = list(dict.fromkeys(one.recipe for one in judged))
        table = {recipe: [_judged(photo, recipe) for photo in self.photos] for recipe in recipes}
        others = [
            reward_totals([table[other.recipe][place]], function)[0]
            for place in range(len(judged))
            for index, other in enumerate(judged)
            if index != place
        ]
        return float(np.nanmean(others))


def _judged(photo: np.ndarray, recipe: Recipe) -> ScoredAnswer:
    return ScoredAnswer(recipe, score_pictures(photo, [render(photo, recipe)])[0])


def rows() -> list[dict[str, Any]]:
    """The table: one row per claim, one per reward function, and the time and memory of the runs."""
    photos = Photos()
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: [_run(Path(folder) / f"{name}-{seed}", function, seed, photos) for seed in SEEDS]
            for name, function in FUNCTIONS.items()
        }
    return summarise(runs, photos)


def _run(folder: Path, function: RewardFunction, seed: int, photos: Photos) -> dict[str, Any]:
    """One fine-tune from its command, and how its model does."""
    folder.mkdir()
    config = RunConfig.create(base="moondream-tiny", reward=dict(function.weights), seed=seed)
    (folder / "config.json").write_text(config.model_dump_json(include={"base", "reward", "seed"}))
    command = [sys.executable, "-m", "training.grpo", str(folder)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    told, result = json.loads(done.stdout.splitlines()[-1]), json.loads((folder / "result.json").read_text())
    judged = photos.judged(str(folder))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    print(f"{folder.name}: {told['paired_difference']} in {told['seconds']:.0f} s", file=sys.stderr, flush=True)
    return {
        "judged": judged,
        "gain": paired_difference(photos.base, judged, function),
        "seconds": told["seconds"],
        "megabytes": told["peak_memory_bytes"] / 1e6,
        "swapped": photos.swapped(judged, function),
        "entropy": result["entropy"],
        "distinct": result["distinct"],
        "valid": min(line["valid"] for line in lines),
        "recipes": len({str(parse(str(one.recipe)).recipe) for one in judged}),
    }


def summarise(runs: dict[str, list[dict[str, Any]]], photos: Photos) -> list[dict[str, Any]]:
    """The rows of all runs."""
    flat = [run for some in runs.values() for run in some]
    won = sum(run["gain"]["low"] > 0 for run in flat)
    found = [_row("runs that beat their base, interval above zero", won, "of 12", ">= 11")]
    for name, function in FUNCTIONS.items():
        found += _function_rows(name, function, runs, photos)
    own = [_specialist(name, runs) for name in REWARDS]
    found.append(_row("rewards on which their own specialist beats the other two", sum(own), "of 3", ">= 3"))
    found += [
        _row("wall time of a run, the longest", max(run["seconds"] for run in flat), "s", "<= 90"),
        _row("peak memory of a run, the largest", max(run["megabytes"] for run in flat), "MB", "<= 2000"),
        _row("valid recipes, the worst step", min(run["valid"] for run in flat), "share", ">= 1"),
        _row("entropy at the end, the lowest", min(run["entropy"]["last"] for run in flat), "nats a token", None),
        _row(
            "distinct recipes in a group at the end, the fewest",
            min(r["distinct"]["last"] for r in flat),
            "share",
            None,
        ),
        _row("different greedy recipes on the held-out photos, the fewest", min(r["recipes"] for r in flat), "", None),
    ]
    return found


def _function_rows(
    name: str, function: RewardFunction, runs: dict[str, list[dict[str, Any]]], photos: Photos
) -> list[dict[str, Any]]:
    base = float(np.nanmean(reward_totals(photos.base, function)))
    single, best = photos.reference_scores(function)
    tuned = [float(np.nanmean(reward_totals(run["judged"], function))) for run in runs[name]]
    gains = ", ".join(
        f"{r['gain']['mean']:+.3f} ({r['gain']['low']:+.3f} to {r['gain']['high']:+.3f})" for r in runs[name]
    )
    mean = statistics.mean(tuned)
    lost = [(after - run["swapped"]) / max(after - base, 1e-9) for after, run in zip(tuned, runs[name], strict=True)]
    looks = name in MUST_LOOK
    return [
        _row(f"{name}: tuned", mean, "score", None, base, f"against the base; gains of three seeds: {gains}"),
        _row(f"{name}: gap closed", (mean - base) / max(best - base, 1e-9), "share", ">= 0.5", None,
             f"best of {POOL_SIZE} random recipes per photo: {best:.3f}"),
        _row(f"{name}: tuned less the best single recipe", mean - single, "score", "> 0" if looks else None, None,
             f"best single recipe for all photos: {single:.3f}"),
        _row(f"{name}: share of the gain lost with another photo's recipe", statistics.median(lost), "share",
             ">= 0.3" if looks else None, None, "median of three seeds"),
    ]  # fmt: skip


def _specialist(name: str, runs: dict[str, list[dict[str, Any]]]) -> bool:
    """Whether the runs for a reward do better on it, on average, than those for each of the others."""
    function = FUNCTIONS[name]
    means = {
        other: statistics.mean(float(np.nanmean(reward_totals(run["judged"], function))) for run in runs[other])
        for other in REWARDS
    }
    return max(means, key=lambda other: means[other]) == name


def _row(
    name: str, value: float, unit: str, target: str | None, baseline: float | None = None, note: str = ""
) -> dict[str, Any]:
    return {
        "name": f"learning: {name}",
        "value": round(float(value), 3),
        "unit": unit,
        "baseline": None if baseline is None else round(baseline, 3),
        "ratio": None if not baseline else round(value / baseline, 2),
        "target": target,
        "note": note or f"{len(FUNCTIONS) * len(SEEDS)} runs, {len(bundled_photos('held-out'))} held-out photos",
    }
