"""`python -m training.evaluate --models base,<run> --photos <folder> --reward '{"sharpness":1}' --json`

How models do on photos that nobody trained on: the mean of every reward with a 95 % bootstrap interval, beside the
untouched photo, the single recipe that is best for all, and the best of 256 random recipes per photo. Each model gives
its likeliest recipe (temperature 0), scored as a group of one, as the others are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

import numpy as np

from inference.registry import MODELS, ModelSpec, answer
from inference.types import Answer, Request
from recipes import Recipe, parse, random_recipe
from rewards import DEFAULT, REWARDS, RewardFunction, RewardFunctionError, score_recipes
from training.data.sources import CollectError, collect
from training.runs.run import Run, RunError

RESAMPLES = 4_000
POOL = 256
CHUNK = 32  # recipes rendered at once


class EvaluateError(Exception):
    """It cannot be evaluated like this; the message says what to change."""


@dataclass(frozen=True)
class Judged:
    """One model's recipe on one photo: its scores (None: does not apply), and whether it could be read."""

    recipe: Recipe
    scores: dict[str, float | None]
    valid: bool = True


def judge(photo: np.ndarray, text: str) -> Judged:
    """Scores an answer as a group of one; one that is no recipe counts as the untouched photo, and as not valid."""
    parsed = parse(text)
    recipe = parsed.recipe if parsed.ok else Recipe()
    return Judged(recipe, score_recipes(photo, [recipe])[0].scores, parsed.ok)


def totals(judged: Sequence[Judged], function: RewardFunction) -> np.ndarray:
    """The function's total per photo, NaN where no reward applies."""
    values = [function.total(one.scores) for one in judged]
    return np.array([np.nan if value is None else value for value in values], np.float64)


def summary(judged: Sequence[Judged], function: RewardFunction) -> dict[str, Any]:
    """Mean and interval of every reward and of the total, and the share of answers that could be read."""
    columns = {name: np.array([_number(one.scores[name]) for one in judged]) for name in REWARDS}
    return {
        **{name: interval(values) for name, values in columns.items()},
        "total": interval(totals(judged, function)),
        "valid": float(np.mean([one.valid for one in judged])),
    }


def interval(values: np.ndarray, seed: int = 0) -> dict[str, float | None]:
    """Mean of what is not NaN, with its 95 % bootstrap interval over photos; Nones when there is nothing."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {"mean": None, "low": None, "high": None}
    drawn = np.random.default_rng(seed).choice(known, (RESAMPLES, len(known))).mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"mean": float(known.mean()), "low": float(low), "high": float(high)}


def difference(base: Sequence[Judged], tuned: Sequence[Judged], function: RewardFunction) -> dict[str, float | None]:
    """How much better the second is on the same photos: mean of the paired differences, with its interval."""
    return interval(totals(tuned, function) - totals(base, function))


def reference(photos: Sequence[np.ndarray], function: RewardFunction, pool: int = POOL, seed: int = 0) -> dict:
    """What the photos allow: untouched, the best single recipe for all, the best recipe per photo out of `pool`."""
    rng = np.random.default_rng(seed)
    recipes = [Recipe(), *(random_recipe(rng) for _ in range(pool))]
    judged = [[Judged(recipe, _alone(photo, recipe)) for recipe in recipes] for photo in photos]
    table = np.stack([totals(row, function) for row in judged])
    single = int(np.nanargmax(np.nanmean(table, axis=0)))
    best = np.nanargmax(np.nan_to_num(table[:, 1:], nan=-1.0), axis=1) + 1
    return {
        "untouched": summary([row[0] for row in judged], function),
        "best_single": summary([row[single] for row in judged], function) | {"recipe": str(recipes[single])},
        f"best_of_{pool}": summary([row[at] for row, at in zip(judged, best, strict=True)], function),
    }


def _alone(photo: np.ndarray, recipe: Recipe) -> dict[str, float | None]:
    return score_recipes(photo, [recipe])[0].scores


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def ask(entry: ModelSpec, photos: Sequence[np.ndarray]) -> list[str]:
    """The entry's likeliest recipe for each photo, through the same door as the playground. Raises InferenceError."""
    texts = []
    for photo in photos:
        request = Request(photo, "recipe", temperature=0.0)
        texts += [event.text for event in answer(entry, request, Event()) if isinstance(event, Answer)]
    return texts


def entry_of(name: str, base: str = "moondream-tiny") -> ModelSpec:
    """A model by its name in MODELS, by the folder of a run, or "base": what the runs began with.

    Raises EvaluateError.
    """
    if name == "base":
        name = base
    if name in MODELS:
        return MODELS[name]
    try:
        run = Run(name)
        below = entry_of(_origin(run))
    except RunError as error:
        raise EvaluateError(
            f"{name} is neither a model ({', '.join(MODELS)}) nor the folder of a run. {error}"
        ) from None
    if not run.has_adapter:
        raise EvaluateError(f"The run {run.id} has learned nothing yet: it has no adapter.")
    return replace(below, name=run.id, title=run.id, adapter=str(run.adapter), grammar_constrained=True)


def _origin(run: Run) -> str:
    """The name of the model under a run and the runs that it went on from. Raises RunError."""
    base = run.config().base
    for _ in range(20):
        if base in MODELS:
            return base
        base = Run(base).config().base
    raise RunError("The runs go on from each other in a circle.")


def evaluate(
    names: Sequence[str], photos: Sequence[np.ndarray], function: RewardFunction, pool: int = POOL, seed: int = 0
) -> dict[str, Any]:
    """The whole table as one JSON object. names: as `entry_of` takes them. Raises EvaluateError, InferenceError."""
    runs = [name for name in names if name != "base" and name not in MODELS]
    for name in runs:
        entry_of(name)  # a wrong name is told before anything is computed
    base = _base(runs)
    models = {}
    for name in names:
        texts = ask(entry_of(name, base), photos)
        models[name] = summary([judge(photo, text) for photo, text in zip(photos, texts, strict=True)], function)
    return {"photos": len(photos), "reward": json.loads(function.to_json()), "models": models} | reference(
        photos, function, pool, seed
    )


def _base(runs: Sequence[str]) -> str:
    try:
        found = {_origin(Run(run)) for run in runs} or {"moondream-tiny"}
    except RunError as error:
        raise EvaluateError(str(error)) from None
    if len(found) > 1:
        raise EvaluateError("These runs began with different models, so there is no one base. Name the models instead.")
    return found.pop()


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    rows = {**result["models"], **{key: row for key, row in result.items() if key.startswith(("untouched", "best_"))}}
    lines = [f"{result['photos']} photos", "", f"| | {' | '.join(REWARDS)} | total | valid |", "|---" * 6 + "|"]
    for name, row in rows.items():
        cells = [_cell(row[key]) for key in (*REWARDS, "total")]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['valid']:.2f} |")
    return "\n".join(lines)


def _cell(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "–"
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="base", help='by commas: names of models, folders of runs, or "base"')
    parser.add_argument("--photos", default="bundled", help="a folder, a zip file, hub:owner/dataset, or bundled")
    parser.add_argument("--reward", default=DEFAULT.to_json(), help="weights as JSON (default: equal weights)")
    parser.add_argument("--max-photos", type=int, default=200)
    parser.add_argument("--pool", type=int, default=POOL, help="random recipes per photo (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    try:
        function = RewardFunction.from_json(args.reward)
        found = collect(args.photos, "held-out", args.max_photos)
        names = [name.strip() for name in args.models.split(",") if name.strip()]
        result = evaluate(names, found.photos, function, args.pool)
    except (EvaluateError, CollectError, RewardFunctionError) as error:
        sys.exit(str(error))
    if found.unreadable:
        print(found.words(), file=sys.stderr)
    print(json.dumps(result) if args.json else table(result))


if __name__ == "__main__":
    main()
