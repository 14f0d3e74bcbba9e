"""Evaluate models on held-out photos: `python -m training.evaluate --models base,<run> --photos <folder> --json`.

Prints the mean of every reward with a 95 % bootstrap interval for each model, and for three references: the untouched
photo, the single recipe that is best for all photos, and the best of 256 random recipes per photo. Models decode
greedily, and each recipe is scored as a group of one.

`--out FOLDER` makes an evaluation of several candidates per photo instead, a folder that can be resumed, like those of
the tab Evaluate: it prints the leaderboard and writes evaluation.csv, .parquet, .json and .html (docs/evaluate.md).

`--sheet sheet.png` writes contact sheets of the first 24 photos, untouched and as edited by each model, to look at:
sheet-1.png, sheet-2.png and so on. `--degraded SEED` degrades each photo at random first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from inference.metering import UsageMeter
from inference.registry import MODELS, answer, register_hosted_models
from inference.types import SKILLS, Answer, ModelSpec, Request
from recipes import PhotoError, Recipe, parse, random_recipe
from rewards import EQUAL_WEIGHTS, REWARDS, RewardFunction, RewardFunctionError, score_recipes
from training.contact_sheet import SHEET_PHOTOS, SheetColumn, draw_sheets, write_sheets
from training.data.sources import PhotoSourceError, degrade, load_photos
from training.evaluations.evaluation import (
    DEFAULT_CANDIDATES,
    EvaluatedModel,
    Evaluation,
    EvaluationConfig,
    create_folder,
)
from training.evaluations.export import markdown_table, write_exports
from training.evaluations.leaderboard import leaderboard
from training.evaluations.runner import ModelAccess, run_evaluation
from training.runs.adapters import base_chain
from training.runs.run import Run, RunError
from usage.events import Deployment, UsageEvent
from usage.prices import Prices
from usage.recorder import Recorder

BOOTSTRAP_SAMPLES = 4_000
POOL_SIZE = 256  # random recipes per photo
DEFAULT_BASE = "moondream-tiny"


class EvaluateError(Exception):
    """Raised when models cannot be evaluated. The message says what to change."""


@dataclass(frozen=True)
class ScoredAnswer:
    """A model's recipe for one photo.

    Attributes:
        recipe: The recipe; the neutral one if the answer could not be parsed.
        scores: One score per reward, 0..1; None where a reward does not apply.
        valid: Whether the answer could be parsed.
    """

    recipe: Recipe
    scores: dict[str, float | None]
    valid: bool = True


def score_answer(photo: np.ndarray, text: str) -> ScoredAnswer:
    """Parse an answer and score its recipe as a group of one."""
    parsed = parse(text)
    recipe = parsed.recipe if parsed.ok else Recipe()
    return ScoredAnswer(recipe, score_recipes(photo, [recipe])[0].scores, parsed.ok)


def reward_totals(answers: Sequence[ScoredAnswer], function: RewardFunction) -> np.ndarray:
    """Return the weighted total of each answer, NaN where no reward applies."""
    totals = [function.total(answer.scores) for answer in answers]
    return np.array([np.nan if total is None else total for total in totals], np.float64)


def summarize(answers: Sequence[ScoredAnswer], function: RewardFunction) -> dict[str, Any]:
    """Return the mean and interval of every reward and of the total, and the share of valid answers."""
    columns = {name: np.array([answer.scores[name] for answer in answers], np.float64) for name in REWARDS}
    return {
        **{name: bootstrap_interval(values) for name, values in columns.items()},
        "total": bootstrap_interval(reward_totals(answers, function)),
        "valid": float(np.mean([answer.valid for answer in answers])),
    }


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> dict[str, float | None]:
    """Compute a mean with its 95 % bootstrap interval.

    Args:
        values: One value per photo; NaN is ignored.
        seed: Seed of the resampling.

    Returns:
        "mean", "low" and "high"; None if there are no values.
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return {"mean": None, "low": None, "high": None}
    means = np.random.default_rng(seed).choice(known, (BOOTSTRAP_SAMPLES, len(known))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(known.mean()), "low": float(low), "high": float(high)}


def paired_difference(
    base: Sequence[ScoredAnswer], tuned: Sequence[ScoredAnswer], function: RewardFunction
) -> dict[str, float | None]:
    """Return the mean of tuned minus base total over the same photos, with its interval."""
    return bootstrap_interval(reward_totals(tuned, function) - reward_totals(base, function))


def reference_scores(
    photos: Sequence[np.ndarray], function: RewardFunction, pool: int = POOL_SIZE, seed: int = 0
) -> dict[str, Any]:
    """Score references that need no model.

    Args:
        photos: uint8 RGB.
        function: The weights.
        pool: Number of random recipes.
        seed: Seed of the random recipes.

    Returns:
        Summaries of the untouched photos ("untouched"), of the single recipe that is best for all ("best_single") and
        of the best random recipe per photo ("best_of_<pool>"); only the first one if the pool is empty.
    """
    rng = np.random.default_rng(seed)
    recipes = [Recipe(), *(random_recipe(rng) for _ in range(pool))]
    answers = [
        [ScoredAnswer(recipe, score_recipes(photo, [recipe])[0].scores) for recipe in recipes] for photo in photos
    ]
    if not pool:
        return {"untouched": summarize([row[0] for row in answers], function)}
    totals = np.stack([reward_totals(row, function) for row in answers])
    single = int(np.nanargmax(np.nanmean(totals, axis=0)))
    best = np.nanargmax(np.nan_to_num(totals[:, 1:], nan=-1.0), axis=1) + 1
    return {
        "untouched": summarize([row[0] for row in answers], function),
        "best_single": summarize([row[single] for row in answers], function) | {"recipe": str(recipes[single])},
        f"best_of_{pool}": summarize([row[index] for row, index in zip(answers, best, strict=True)], function),
    }


def greedy_answers(spec: ModelSpec, photos: Sequence[np.ndarray]) -> list[str]:
    """Return a model's recipe for each photo at temperature 0, by the playground's inference. Raises InferenceError."""
    texts = []
    for photo in photos:
        request = Request(photo, "recipe", temperature=0.0)
        texts += [event.text for event in answer(spec, request, Event()) if isinstance(event, Answer)]
    return texts


def resolve_model(name: str, base: str = DEFAULT_BASE) -> ModelSpec:
    """Return the model of a name.

    Args:
        name: A name in MODELS, the folder of a run, or "base".
        base: The model that "base" stands for.

    Raises:
        EvaluateError: There is no such model or run, or the run has no adapter.
    """
    if name == "base":
        name = base
    if name in MODELS:
        return MODELS[name]
    run, base = Run(name), _base_of_run(name)
    if not run.has_adapter:
        raise EvaluateError(f"The run {run.id} has no adapter yet. Choose a run that has finished.")
    return replace(MODELS[base], name=run.id, title=run.id, adapter=str(run.adapter), grammar_constrained=True)


def _base_of_run(folder: str) -> str:
    """Return the name of the model that a run, and the runs that it continues, started from."""
    try:
        chain, base = base_chain(Run(folder))
    except RunError as error:
        raise EvaluateError(
            f"{folder} is neither a model ({', '.join(MODELS)}) nor the folder of a run. {error}"
        ) from None
    if base not in MODELS:
        raise EvaluateError(f"The run {chain[-1].id} continues {base}, which is neither a model nor a run.")
    return base


def evaluate(
    names: Sequence[str], photos: Sequence[np.ndarray], function: RewardFunction, pool: int = POOL_SIZE, seed: int = 0
) -> dict[str, Any]:
    """Evaluate models and references.

    Args:
        names: Models, as `resolve_model` takes them. "base" is the model that the runs among them started from.
        photos: uint8 RGB.
        function: The weights of the total.
        pool: Random recipes per photo, for the references.
        seed: Seed of the random recipes.

    Returns:
        A JSON object with a summary per model and per reference.

    Raises:
        EvaluateError: A model cannot be evaluated.
        InferenceError: A model failed.
    """
    return summarize_models(model_answers(names, photos), photos, function, pool, seed)


def model_answers(names: Sequence[str], photos: Sequence[np.ndarray]) -> dict[str, list[ScoredAnswer]]:
    """Return the scored greedy answers of models to photos, by name; arguments and exceptions are as for `evaluate`."""
    answers = {}
    for name, spec in resolve_models(names).items():  # fails on a wrong name before anything is computed
        texts = greedy_answers(spec, photos)
        answers[name] = [score_answer(photo, text) for photo, text in zip(photos, texts, strict=True)]
    return answers


def resolve_models(names: Sequence[str]) -> dict[str, ModelSpec]:
    """Return the models by name; see `resolve_model`. "base" is the model that the runs among them started from."""
    runs = [name for name in names if name != "base" and name not in MODELS]
    bases = {_base_of_run(name) for name in runs} or {DEFAULT_BASE}
    if len(bases) > 1:
        raise EvaluateError('The runs started from different models, so "base" is ambiguous. Name the models instead.')
    (base,) = bases
    return {name: resolve_model(name, base) for name in names}


class UnrecordedCalls(Recorder):
    """Discards usage events: a shell command has no database."""

    def __init__(self) -> None:
        self.deployment = Deployment()

    def record(self, event: UsageEvent) -> None:
        """Discard an event."""


def evaluate_to_folder(
    folder: Path, names: Sequence[str], temperatures: Sequence[float], function: RewardFunction, **settings: Any
) -> dict[str, Any]:
    """Make or resume an evaluation in a folder, and write its exports.

    Args:
        folder: A new folder, or one of an evaluation with the same settings.
        names: Models, as `resolve_model` takes them. Each one is evaluated at each temperature.
        temperatures: Sampling temperatures.
        function: The reward weights.
        **settings: Further settings of `EvaluationConfig`.

    Returns:
        The leaderboard.

    Raises:
        EvaluateError: A model cannot be evaluated, or the evaluation failed.
        RunError: The settings or the folder cannot be used.
    """
    register_hosted_models(None, os.environ.get("MOONDREAM_API_KEY"), None, {})
    specs = resolve_models(names)
    models = [
        EvaluatedModel(name=name, temperature=temperature, title=spec.title)
        for name, spec in specs.items()
        for temperature in temperatures
    ]
    config = EvaluationConfig.create(models=models, reward=dict(function.weights), **settings)
    evaluation = create_folder(folder, config)
    ended = threading.Event()
    threading.Thread(target=_print_progress, args=(evaluation, ended), daemon=True).start()
    try:
        access = ModelAccess.of_specs(specs, UsageMeter(UnrecordedCalls(), Prices()))
        run_evaluation(evaluation, access, workers=os.cpu_count() or 1)
    finally:
        ended.set()
    status = evaluation.status()
    if status.state != "done":
        raise EvaluateError(status.message)
    write_exports(evaluation, function, folder)
    return leaderboard(evaluation.results(), function)


def _print_progress(evaluation: Evaluation, ended: threading.Event) -> None:
    """Print the progress every few seconds."""
    while not ended.wait(5):
        status = evaluation.status()
        left = status.seconds_left()
        remaining = "" if left is None else f", about {left:.0f} s left"
        print(f"{status.phase}: {status.step} of {status.steps or '?'}{remaining}", file=sys.stderr)


def summarize_models(
    answers: Mapping[str, Sequence[ScoredAnswer]],
    photos: Sequence[np.ndarray],
    function: RewardFunction,
    pool: int = POOL_SIZE,
    seed: int = 0,
) -> dict[str, Any]:
    """Return a summary per model and per reference; arguments and result are as for `evaluate`."""
    models = {name: summarize(model, function) for name, model in answers.items()}
    return {"photos": len(photos), "reward": json.loads(function.to_json()), "models": models} | reference_scores(
        photos, function, pool, seed
    )


def sheet_columns(
    answers: Mapping[str, Sequence[ScoredAnswer]], photos: Sequence[np.ndarray], function: RewardFunction
) -> list[SheetColumn]:
    """Return the columns of a contact sheet: the untouched photos, then the edits of each model.

    Args:
        answers: Answers by name of the model.
        photos: uint8 RGB.
        function: The weights of the totals in the captions.
    """
    untouched = [score_answer(photo, str(Recipe())) for photo in photos]
    columns = []
    for name, model in {"untouched": untouched, **answers}.items():
        totals = [function.total(answer.scores) for answer in model]
        title = Path(name).name if name not in MODELS and name != "base" else name
        columns.append(SheetColumn(title, [answer.recipe if answer.valid else None for answer in model], totals))
    return columns


def degrade_photos(photos: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """Return photos degraded at random; see `training.data.sources.degrade`.

    Args:
        photos: uint8 RGB.
        seed: Seed of the degradations. That of a photo depends on the seed and on its index only.
    """
    return [degrade(photo, np.random.default_rng([seed, index])) for index, photo in enumerate(photos)]


def format_table(result: Mapping[str, Any]) -> str:
    """Format the result of `evaluate` as a Markdown table."""
    rows = {**result["models"], **{key: row for key, row in result.items() if key.startswith(("untouched", "best_"))}}
    degraded = "" if result.get("degraded") is None else f", degraded at random with seed {result['degraded']}"
    lines = [
        f"{result['photos']} photos{degraded}",
        "",
        f"| | {' | '.join(REWARDS)} | total | valid |",
        "|---" * 6 + "|",
    ]
    for name, row in rows.items():
        cells = []
        for column in (*REWARDS, "total"):
            mean, low, high = (row[column][key] for key in ("mean", "low", "high"))
            cells.append("–" if mean is None else f"{mean:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} | {row['valid']:.2f} |")
    return "\n".join(lines)


def print_evaluation(args: argparse.Namespace, function: RewardFunction) -> None:
    """Make the evaluation that the arguments describe and print its leaderboard. Exits with a message on an error."""
    try:
        table = evaluate_to_folder(
            args.out,
            [name.strip() for name in args.models.split(",") if name.strip()],
            [float(text) for text in args.temperature.split(",")],
            function,
            photos=args.photos if args.photos == "bundled" or ":" in args.photos else str(Path(args.photos).resolve()),
            skill=args.skill,
            prompt=args.prompt or SKILLS[args.skill].default_prompt,
            candidates=args.candidates,
            max_photos=args.max_photos,
            seed=args.seed,
            degraded=args.degraded,
            pool=args.pool,
        )
    except RunError as error:
        raise EvaluateError(str(error)) from None
    except ValueError as error:
        raise EvaluateError(f"--temperature: {error}") from None
    print(json.dumps(table) if args.json else markdown_table(table))


def main() -> None:
    """Parse the arguments and print the result as a table or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="base", help='comma-separated model names, run folders, or "base"')
    parser.add_argument("--photos", default="bundled", help="a folder, a zip file, hub:owner/dataset, or bundled")
    parser.add_argument("--reward", default=EQUAL_WEIGHTS.to_json(), help="weights as JSON (default: equal weights)")
    parser.add_argument("--max-photos", type=int, default=200, help="maximum number of photos (default: %(default)s)")
    parser.add_argument(
        "--pool", type=int, default=POOL_SIZE, help="random recipes per photo, 0 for none (default: %(default)s)"
    )
    parser.add_argument("--degraded", type=int, metavar="SEED", help="degrade each photo at random, with this seed")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="write contact sheets FILE-1.png, FILE-2.png ..."
    )
    parser.add_argument(
        "--sheet-photos", type=int, default=SHEET_PHOTOS, help="photos on the contact sheets (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    group = parser.add_argument_group("with --out")
    group.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the evaluation, created or resumed")
    group.add_argument("--candidates", type=int, default=DEFAULT_CANDIDATES, help="per photo (default: %(default)s)")
    group.add_argument("--temperature", default="1", help="one or several, separated by commas (default: %(default)s)")
    group.add_argument("--skill", choices=SKILLS, default="recipe", help="only recipes are scored")
    group.add_argument("--prompt", default="", help="the prompt of the skill")
    group.add_argument("--seed", type=int, default=1, help="seed of the answers (default: %(default)s)")
    args = parser.parse_args()
    if args.sheet and args.sheet.suffix.lower() != ".png":
        parser.error("argument --sheet: the file name must end in .png")
    if args.pool < 0 or args.sheet_photos < 1 or (args.degraded or 0) < 0:
        parser.error("--pool and --degraded must be 0 or more, --sheet-photos 1 or more")
    try:
        function = RewardFunction.from_json(args.reward)
        if args.out:
            print_evaluation(args, function)
            return
        photo_set = load_photos(args.photos, "held-out", args.max_photos)
        names = [name.strip() for name in args.models.split(",") if name.strip()]
        photos = photo_set.photos if args.degraded is None else degrade_photos(photo_set.photos, args.degraded)
        answers = model_answers(names, photos)
        if args.sheet:
            columns = sheet_columns(answers, photos, function)
            for file in write_sheets(draw_sheets(photos, photo_set.names, columns, args.sheet_photos), args.sheet):
                print(f"wrote {file}", file=sys.stderr)
        result = summarize_models(answers, photos, function, args.pool) | {"degraded": args.degraded}
    except (EvaluateError, PhotoSourceError, RewardFunctionError, PhotoError) as error:
        sys.exit(str(error))
    if photo_set.unreadable:
        print(photo_set.describe(), file=sys.stderr)
    print(json.dumps(result) if args.json else format_table(result))


if __name__ == "__main__":
    main()
