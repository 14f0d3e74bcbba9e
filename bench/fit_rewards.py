"""`python -m bench.fit_rewards`: fit the weights of the rewards' terms on judged pairs, report on photos not used.

The pairs of `rewards.agreement` are split by photo into two halves. The weights are fitted on each half, from a neutral
start (the same value for every weight), and the agreement is reported on the other half, so that every pair is judged
by weights that have not seen its photo. `--all` fits on all photos: the start of the weights in `rewards/`.
Thresholds such as the black point are not fitted: they are ranges of photographs. The objective is

    log loss of the pairs (Bradley-Terry on ln total) + HACK hacks near or above their photo
    + GAIN missing gain of the best of random recipes, undamaged and degraded + PRIOR squared ln(weight / start)
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np

from bench.adversaries import HACKS, PHOTOS, applicable_hacks
from recipes import Recipe, load_photo, render, shrink
from rewards import guard, naturalness
from rewards.agreement import FUNCTIONS, Pair, load_pairs, markdown_table, table
from rewards.comparison import Comparison, compare
from rewards.report import random_recipes
from rewards.subject import Subject
from training.data.sources import degrade

sharpness, colour, creativity = (  # the package's attributes of these names are functions
    importlib.import_module(f"rewards.{name}") for name in ("sharpness", "colour", "creativity")
)

# Module -> names of the weights that are fitted.
WEIGHTS: dict[ModuleType, tuple[str, ...]] = {
    guard: ("LOST", "CUT", "HEAD", "AREA", "ASPECT", "BORDER"),
    naturalness: (
        *(
            "BLACK",
            "WHITE",
            "LIGHT",
            "FLAT",
            "HARSH",
            "WHITES",
            "BLACKS",
            "SATURATED",
            "NEW_WHITES",
            "NEW_BLACKS",
            "NEW_CLIPPED",
        ),
        *("NEON", "DULL", "CAST", "LIGHT_CAST", "NEW_CAST", "BOOST", "PALE", "CHANGE", "HUE", "HEAL", "CLEAN"),
    ),
    sharpness: ("EXCESS",),
    creativity: ("RESTRAINT", "QUALITY"),
}
NAMES = [(module, name) for module, names in WEIGHTS.items() for name in names]
SCORES: dict[str, Callable[[Comparison], float]] = {
    "sharpness": sharpness.score_comparison,
    "colour": colour.score_comparison,
    "creativity": creativity.score_comparison,
}
NEUTRAL = 0.2  # of every weight, per unit of its fault
SLOPE = 4.0  # of the log loss in ln total
FACTORS = (0.5, 0.8, 1.25, 2.0)  # tried per weight and round
ROUNDS = 6
LIMITS = (0.002, 3.0)  # of a weight
PRIOR, HACK, GAIN = 0.02, 8.0, 1.0  # weights in the objective
HACK_SLOPE, HACK_MARGIN = 12.0, 0.2  # in ln total
IMPORTANCE = np.array([3, 1, 1, 1]) / 6  # of the reward functions in the log loss, equal weights first
GAIN_WANTED = 0.08  # of the best of `GAIN_RECIPES` over the untouched photo, for each reward function
GAIN_RECIPES = 64


@dataclass(frozen=True)
class Cases:
    """What is compared for a set of photos. Each comparison has arrays [n] in place of numbers.

    Attributes:
        pairs: The judged pairs.
        better: The preferred edits, [pairs].
        worse: The rejected edits, [pairs].
        untouched: The photos, [hacks]: each repeated for each of its hacks.
        hacks: See `bench.adversaries.HACKS`, [hacks].
        plain: Identity and random recipes on the undamaged photos, [photos * (1 + GAIN_RECIPES)].
        flawed: The same on degraded photos.
    """

    pairs: list[Pair]
    better: Comparison
    worse: Comparison
    untouched: Comparison
    hacks: Comparison
    plain: Comparison
    flawed: Comparison


def measure_photo(work: tuple[Path, list[Pair]]) -> dict[str, Any]:
    """Render and measure everything of one photo: lists of comparisons by the names of `Cases`, and its "pairs"."""
    file, pairs = work
    cv2.setNumThreads(1)
    photo = shrink(load_photo(file))
    recipes = [Recipe(), *random_recipes(GAIN_RECIPES)]
    flawed = degrade(photo, np.random.default_rng(0))
    sources = {pair.source: shrink(load_photo(pair.source)) for pair in pairs}
    names = applicable_hacks(photo)
    plain = [_measure(photo, recipe) for recipe in recipes]
    return {
        "pairs": pairs,
        "better": [_measure(sources[pair.source], pair.preferred) for pair in pairs],
        "worse": [_measure(sources[pair.source], pair.rejected) for pair in pairs],
        "untouched": [plain[0]] * len(names),
        "hacks": [_flatten(compare(photo, [HACKS[name](photo)])[0]) for name in names],
        "plain": plain,
        "flawed": [_measure(flawed, recipe) for recipe in recipes],
    }


def _measure(photo: np.ndarray, recipe: Recipe) -> Comparison:
    return _flatten(compare(photo, [render(photo, recipe)])[0])


def _flatten(value: Any) -> Any:
    """Return a comparison without its pictures, boxes and subject: numbers and dataclasses of numbers only."""
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Subject)):
        fields = {field.name: _flatten(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value if isinstance(value, float) else None


def _stack(rows: Sequence[Any]) -> Any:
    """Join flattened comparisons to one with arrays [rows] in place of numbers."""
    first = rows[0]
    if not dataclasses.is_dataclass(first) or isinstance(first, type):
        return None if first is None else np.array(rows)
    names = [field.name for field in dataclasses.fields(first)]
    return dataclasses.replace(first, **{name: _stack([getattr(row, name) for row in rows]) for name in names})


def join(measured: Sequence[dict[str, Any]]) -> Cases:
    """Join what `measure_photo` returned for several photos."""
    rows = {field.name: [row for photo in measured for row in photo[field.name]] for field in dataclasses.fields(Cases)}
    pairs = rows.pop("pairs")
    return Cases(pairs, **{name: _stack(values) for name, values in rows.items()})


@contextmanager
def weights_set(values: Sequence[float]) -> Iterator[None]:
    """Set the weights of the terms, in the order of NAMES, and restore them afterwards."""
    before = present_weights()
    try:
        for (module, name), value in zip(NAMES, values, strict=True):
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in zip(NAMES, before, strict=True):
            setattr(module, name, value)


def present_weights() -> list[float]:
    """Return the weights of the terms, in the order of NAMES."""
    return [float(getattr(module, name)) for module, name in NAMES]


def totals(comparisons: Comparison) -> np.ndarray:
    """Return the totals [functions, n] of the reward functions in FUNCTIONS."""
    scores = np.stack([score(comparisons) for score in SCORES.values()])
    weights = np.array([[function.weights.get(name, 0.0) for name in SCORES] for function in FUNCTIONS.values()])
    return weights @ scores / weights.sum(axis=1, keepdims=True)


def objective(cases: Cases, values: Sequence[float], start: Sequence[float]) -> float:
    """Return the loss of weights; see the module's docstring."""
    with weights_set(values):
        margins = np.log(totals(cases.better) + 1e-6) - np.log(totals(cases.worse) + 1e-6)
        excess = np.log(totals(cases.hacks)[0] + 1e-6) - np.log(totals(cases.untouched)[0] + 1e-6)
        gain = gains(cases)
    loss = float((IMPORTANCE @ np.logaddexp(0, -SLOPE * margins)).mean())
    hacks = float(np.logaddexp(0, HACK_SLOPE * (excess + HACK_MARGIN)).mean() / HACK_SLOPE)
    missing = float(np.maximum(0, GAIN_WANTED - gain).sum())
    spread = float(np.mean(np.log(np.array(values) / np.array(start)) ** 2))
    return loss + HACK * hacks + GAIN * missing + PRIOR * spread


def gains(cases: Cases) -> np.ndarray:
    """Return the mean gain of the best recipe over the untouched photo: [undamaged and degraded, functions]."""
    rows = [totals(part).reshape(len(FUNCTIONS), -1, 1 + GAIN_RECIPES) for part in (cases.plain, cases.flawed)]
    return np.array([(row.max(axis=-1) - row[..., 0]).mean(axis=-1) for row in rows])


def fit(cases: Cases, start: Sequence[float], rounds: int = ROUNDS) -> list[float]:
    """Minimise the objective by coordinate search over factors of the weights."""
    best, loss = list(start), objective(cases, start, start)
    for _ in range(rounds):
        before = loss
        for position in range(len(best)):
            for factor in FACTORS:
                trial = list(best)
                trial[position] = float(np.clip(best[position] * factor, *LIMITS))
                value = objective(cases, trial, start)
                if value < loss - 1e-6:
                    best, loss = trial, value
        if before - loss < 1e-4:
            break
    return best


def split(measured: Sequence[dict[str, Any]], seed: int) -> list[list[int]]:
    """Return the indices of two halves of the photos; those with pairs and those without are halved separately."""
    order = np.random.default_rng(seed).permutation(len(measured))
    labelled = [index for index in order if measured[index]["pairs"]]
    others = [index for index in order if not measured[index]["pairs"]]
    return [[*labelled[half::2], *others[half::2]] for half in (0, 1)]


def cross_fit(work: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> np.ndarray:
    """Fit on some photos, and return whether each pair of others is judged right: bool [functions, pairs]."""
    train, test = map(join, work)
    with weights_set(fit(train, [NEUTRAL] * len(NAMES))):
        return totals(test.better) > totals(test.worse)


def main() -> None:
    """Print the agreement on photos not used for fitting, or with --all the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="fit on all photos and print the weights")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    pairs = load_pairs()
    work = [(file, [pair for pair in pairs if pair.photo == file.name]) for file in sorted(PHOTOS.glob("*.jpg"))]
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        measured = list(pool.map(measure_photo, work))
        if options.all:
            for (module, name), value in zip(NAMES, fit(join(measured), [NEUTRAL] * len(NAMES)), strict=True):
                print(f"{module.__name__}.{name} = {value:.2g}")
            return
        halves = [[measured[index] for index in half] for half in split(measured, options.seed)]
        right = np.hstack(list(pool.map(cross_fit, [(halves[1], halves[0]), (halves[0], halves[1])])))
    tested = [pair for half in halves for photo in half for pair in photo["pairs"]]
    print(markdown_table(tested, table(tested, dict(zip(FUNCTIONS, right, strict=True)))))


if __name__ == "__main__":
    main()
