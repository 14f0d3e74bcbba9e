"""`python -m rewards.report`: measure whether the rewards depend on the photo, as a table and JSON.

For each reward alone and for equal weights: the mean score of the untouched photos, of the single recipe that is best
for all of them, and of the best recipe per photo, both out of the same random recipes. The blind share is the gain of
the single recipe divided by the gain of the best per photo; at 1 a model would not need to see the photo. `at limits`
is the share of photos whose best recipe has an operation at its limit. Each recipe is scored as a group of one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from recipes import OPERATIONS, PREVIEW_SIDE, Recipe, load_photo, random_recipe, render, shrink
from rewards import EQUAL_WEIGHTS, REWARDS, RewardFunction, score_pictures

PHOTOS = Path(__file__).resolve().parents[1] / "assets" / "photos"
COLUMNS = ("untouched", "best_single", "best_per_photo", "blind_share", "at_limits")


def random_recipes(count: int = 256, seed: int = 0) -> list[Recipe]:
    """Draw the random recipes that the report compares."""
    rng = np.random.default_rng(seed)
    return [random_recipe(rng) for _ in range(count)]


def score_photo(photo: np.ndarray, recipes: list[Recipe]) -> np.ndarray:
    """Score the untouched photo and each recipe as groups of one: float64 [1 + recipes, rewards], None as NaN."""
    return score_each(photo, [Recipe(), *recipes])


def score_each(photo: np.ndarray, recipes: list[Recipe]) -> np.ndarray:
    """Score each recipe as a group of one: float64 [recipes, rewards], None as NaN. A repeated one is scored once."""
    source = shrink(photo, PREVIEW_SIDE)
    scored = {recipe: score_pictures(source, [render(source, recipe)])[0] for recipe in dict.fromkeys(recipes)}
    rows = [[scored[recipe][name] for name in REWARDS] for recipe in recipes]
    return np.array(rows, np.float64).reshape(len(recipes), len(REWARDS))  # numpy reads None as NaN


def score_file(file: Path, recipes: list[Recipe]) -> np.ndarray:
    """Load and score a photo on one OpenCV thread, as a worker process."""
    cv2.setNumThreads(1)
    return score_photo(load_photo(file), recipes)


def summarise(scores: np.ndarray, recipes: list[Recipe]) -> dict[str, dict[str, Any]]:
    """Summarise scores [photos, 1 + recipes, rewards]: COLUMNS and the best single recipe per reward function."""
    functions = {name: RewardFunction({name: 1.0}) for name in REWARDS} | {"equal weights": EQUAL_WEIGHTS}
    return {name: _row(total_scores(scores, function), recipes) for name, function in functions.items()}


def total_scores(scores: np.ndarray, function: RewardFunction) -> np.ndarray:
    """Compute `RewardFunction.total` for scores [..., rewards]; NaN where no weighted reward has a score."""
    weights = np.array([function.weights.get(name, 0.0) for name in REWARDS])
    available = (~np.isnan(scores)) @ weights
    return np.where(available > 0, np.nan_to_num(scores) @ weights / np.maximum(available, 1e-9), np.nan)


def _row(totals: np.ndarray, recipes: list[Recipe]) -> dict[str, Any]:
    untouched, per_recipe = totals[:, 0].mean(), totals[:, 1:].mean(axis=0)
    single = max(untouched, per_recipe.max())
    best = totals[:, 1:].max(axis=1).mean()
    winners = [recipes[index] for index in totals[:, 1:].argmax(axis=1)]
    return {
        "untouched": float(untouched),
        "best_single": float(single),
        "best_per_photo": float(best),
        "blind_share": float((single - untouched) / max(best - untouched, 1e-9)),
        "at_limits": float(np.mean([at_limit(recipe) for recipe in winners])),
        "best_single_recipe": str(recipes[int(per_recipe.argmax())] if single > untouched else Recipe()),
    }


def at_limit(recipe: Recipe) -> bool:
    """Return whether a number is at a limit of its range other than its neutral value, or the crop is the smallest."""
    left, top, right, bottom = recipe.crop
    narrowest = OPERATIONS["crop"].slots[2].low - OPERATIONS["crop"].slots[0].high
    singles = [(name, op.slots[0]) for name, op in OPERATIONS.items() if len(op.slots) == 1]
    extreme = any(getattr(recipe, name) in {slot.low, slot.high} - {slot.neutral} for name, slot in singles)
    return extreme or min(right - left, bottom - top) <= narrowest


def markdown_table(rows: dict[str, dict[str, Any]]) -> str:
    """Format the rows as a Markdown table."""
    lines = ["| reward | untouched | best single | best per photo | blind share | at limits |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[column]:.3f}" for column in COLUMNS) + " |")
    return "\n".join(lines)


def report(files: Iterable[Path], recipes: list[Recipe], processes: int = 2) -> dict[str, dict[str, Any]]:
    """Score the files in several processes and summarise."""
    # spawn, because a fork after OpenCV has started its threads can hang
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        scores = list(pool.map(partial(score_file, recipes=recipes), files))
    return summarise(np.stack(scores), recipes)


def main() -> None:
    """Print the table, and write JSON with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="folder of photos (bundled ones by default)")
    parser.add_argument("--every", type=int, default=1, help="use every n-th photo")
    parser.add_argument("--recipes", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    files = sorted(
        file for file in options.photos.iterdir() if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")
    )
    files = files[:: options.every]
    rows = report(files, random_recipes(options.recipes, options.seed), options.processes)
    print(f"{len(files)} photos, {options.recipes} random recipes (seed {options.seed})\n\n{markdown_table(rows)}\n")
    for name, row in rows.items():
        print(f"best single recipe for {name}: {row['best_single_recipe']}")
    if options.json:
        options.json.write_text(json.dumps({"photos": len(files), "recipes": options.recipes, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
