"""Fine-tuning quality: twelve GRPO runs, for each reward and their equal mix with three seeds.

Evaluated on the held-out photos, which neither pre-training nor the runs use: each model's greedy recipe, scored as a
group of one. "Gap" is the difference between the base and the best of 256 random recipes per photo.
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
IMAGE_DEPENDENT = ("sharpness", "colour", "equal")


class HeldOutPhotos:
    """The held-out photos with the scores of the identity, of random recipes, and of the base model."""

    def __init__(self) -> None:
        self.photos = [shrink(load_photo(info.path)) for info in bundled_photos("held-out")]
        rng = np.random.default_rng(0)
        self.pool = [Recipe(), *(random_recipe(rng) for _ in range(POOL_SIZE))]
        self.scored = [[_score(photo, recipe) for recipe in self.pool] for photo in self.photos]
        self.base = self.score_model("moondream-tiny")

    def score_model(self, name: str) -> list[ScoredAnswer]:
        """Score a model's greedy recipes."""
        spec = MODELS[name] if name in MODELS else resolve_model(name)
        return [
            score_answer(photo, text)
            for photo, text in zip(self.photos, greedy_answers(spec, self.photos), strict=True)
        ]

    def reference_scores(self, function: RewardFunction) -> tuple[float, float]:
        """Return the mean total of the best single recipe for all photos, and of the best random recipe per photo."""
        table = np.stack([reward_totals(row, function) for row in self.scored])
        return float(table.mean(0).max()), float(table[:, 1:].max(1).mean())

    def swapped_total(self, answers: list[ScoredAnswer], function: RewardFunction) -> float:
        """Return the mean total when each photo gets the recipes of all other photos."""
        recipes = list(dict.fromkeys(answer.recipe for answer in answers))
        table = {recipe: [_score(photo, recipe) for photo in self.photos] for recipe in recipes}
        others = [
            reward_totals([table[other.recipe][index]], function)[0]
            for index in range(len(answers))
            for other_index, other in enumerate(answers)
            if other_index != index
        ]
        return float(np.nanmean(others))


def _score(photo: np.ndarray, recipe: Recipe) -> ScoredAnswer:
    return ScoredAnswer(recipe, score_pictures(photo, [render(photo, recipe)])[0])


def rows() -> list[dict[str, Any]]:
    """Run all fine-tunes and build the rows."""
    photos = HeldOutPhotos()
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: [_run(Path(folder) / f"{name}-{seed}", function, seed, photos) for seed in SEEDS]
            for name, function in FUNCTIONS.items()
        }
    return summarise(runs, photos)


def _run(folder: Path, function: RewardFunction, seed: int, photos: HeldOutPhotos) -> dict[str, Any]:
    """Run one fine-tune as a command and evaluate its model."""
    folder.mkdir()
    config = RunConfig.create(base="moondream-tiny", reward=dict(function.weights), seed=seed)
    (folder / "config.json").write_text(config.model_dump_json(include={"base", "reward", "seed"}))
    command = [sys.executable, "-m", "training.grpo", str(folder)]
    process = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    summary, result = json.loads(process.stdout.splitlines()[-1]), json.loads((folder / "result.json").read_text())
    answers = photos.score_model(str(folder))
    print(f"{folder.name}: {summary['difference']} in {summary['seconds']:.0f} s", file=sys.stderr, flush=True)
    return {
        "answers": answers,
        "gain": paired_difference(photos.base, answers, function),
        "seconds": summary["seconds"],
        "megabytes": summary["peak_memory_bytes"] / 1e6,
        "swapped": photos.swapped_total(answers, function),
        "entropy": result["entropy"],
        "distinct": result["distinct"],
        "valid": result["valid"],
        "recipes": len({str(parse(str(answer.recipe)).recipe) for answer in answers}),
    }


def summarise(runs: dict[str, list[dict[str, Any]]], photos: HeldOutPhotos) -> list[dict[str, Any]]:
    """Build the rows of all runs."""
    flat = [run for group in runs.values() for run in group]
    improved = sum(run["gain"]["low"] > 0 for run in flat)
    table = [_row("runs that improve on the base, interval above zero", improved, "of 12", ">= 11")]
    for name, function in FUNCTIONS.items():
        table += _function_rows(name, function, runs, photos)
    specialists = sum(_is_specialist(name, runs) for name in REWARDS)
    table.append(_row("rewards whose own runs beat those of the other two", specialists, "of 3", ">= 3"))
    table += [
        _row("longest wall time of a run", max(run["seconds"] for run in flat), "s", "<= 90"),
        _row("largest peak memory of a run", max(run["megabytes"] for run in flat), "MB", "<= 2000"),
        _row("valid recipes in the worst step", min(run["valid"] for run in flat), "share", ">= 1"),
        _row("lowest final entropy", min(run["entropy"]["last"] for run in flat), "nats per token", None),
        _row(
            "smallest final share of distinct recipes per group",
            min(r["distinct"]["last"] for r in flat),
            "share",
            None,
        ),
        _row("fewest different greedy recipes on the held-out photos", min(r["recipes"] for r in flat), "", None),
    ]
    return table


def _function_rows(
    name: str, function: RewardFunction, runs: dict[str, list[dict[str, Any]]], photos: HeldOutPhotos
) -> list[dict[str, Any]]:
    base = float(np.nanmean(reward_totals(photos.base, function)))
    single, best = photos.reference_scores(function)
    tuned = [float(np.nanmean(reward_totals(run["answers"], function))) for run in runs[name]]
    gains = ", ".join(
        f"{r['gain']['mean']:+.3f} ({r['gain']['low']:+.3f} to {r['gain']['high']:+.3f})" for r in runs[name]
    )
    mean = statistics.mean(tuned)
    losses = [(after - run["swapped"]) / max(after - base, 1e-9) for after, run in zip(tuned, runs[name], strict=True)]
    image_dependent = name in IMAGE_DEPENDENT
    return [
        _row(f"{name}: tuned", mean, "score", None, base, f"against the base; gains of three seeds: {gains}"),
        _row(f"{name}: gap closed", (mean - base) / max(best - base, 1e-9), "share", ">= 0.5", None,
             f"best of {POOL_SIZE} random recipes per photo: {best:.3f}"),
        _row(f"{name}: tuned minus the best single recipe", mean - single, "score", "> 0" if image_dependent else None,
             None,
             f"best single recipe for all photos: {single:.3f}"),
        _row(f"{name}: share of the gain lost with another photo's recipe", statistics.median(losses), "share",
             ">= 0.3" if image_dependent else None, None, "median of three seeds"),
    ]  # fmt: skip


def _is_specialist(name: str, runs: dict[str, list[dict[str, Any]]]) -> bool:
    """Return whether the runs for a reward score higher on it, on average, than the runs for the others."""
    function = FUNCTIONS[name]
    means = {
        other: statistics.mean(float(np.nanmean(reward_totals(run["answers"], function))) for run in runs[other])
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
