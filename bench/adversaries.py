"""`python -m bench.adversaries`: pictures that could cheat the rewards, scored and shown beside the untouched photo.

For each photo: the hacks of HACKS, and the best recipe that hill climbing on the reward itself finds. Prints how often
each hack scores below the untouched photo, and writes contact sheets of the untouched photo and the optimum.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from recipes import OPERATIONS, Recipe, load_photo, random_recipe, render, shrink
from rewards import EQUAL_WEIGHTS, REWARDS, RewardFunction, score_pictures
from rewards.subject import find_subject
from training.contact_sheet import SheetColumn, draw_sheets, write_sheets

PHOTOS = Path(__file__).resolve().parents[1] / "assets" / "photos"
EVALUATIONS = 2_000  # recipes that hill climbing may score
RANDOM_STARTS = 100
COLOURED = 8.0  # mean chroma from which a photo counts as coloured


def _recipe(**values: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda photo: render(photo, Recipe(**values))


def _matrix(*rows: tuple[float, ...]) -> Callable[[np.ndarray], np.ndarray]:
    """Return an edit by a matrix [3, 4] on RGB 0..255."""
    return lambda photo: cv2.transform(photo, np.array(rows, np.float32))


def _noise(photo: np.ndarray) -> np.ndarray:
    grain = np.random.default_rng(0).normal(0, 20, photo.shape)
    return np.clip(photo + grain, 0, 255).round().astype(np.uint8)


def _unsharp(photo: np.ndarray) -> np.ndarray:
    blurred = cv2.GaussianBlur(photo, (0, 0), 2).astype(np.float32)
    return np.clip(photo + 4 * (photo - blurred), 0, 255).round().astype(np.uint8)


def _burnt(photo: np.ndarray) -> np.ndarray:
    """Blow out the lighter half."""
    return np.clip(photo * (270 / max(20.0, float(np.median(photo)))), 0, 255).astype(np.uint8)


def _crushed(photo: np.ndarray) -> np.ndarray:
    """Turn the darker half black."""
    return np.clip((photo.astype(np.float32) - np.median(photo)) * 1.6, 0, 255).astype(np.uint8)


def _border(photo: np.ndarray) -> np.ndarray:
    edge = round(0.12 * max(photo.shape[:2]))
    small = cv2.resize(photo, (photo.shape[1] - 2 * edge, photo.shape[0] - 2 * edge), interpolation=cv2.INTER_AREA)
    return cv2.copyMakeBorder(small, edge, edge, edge, edge, cv2.BORDER_CONSTANT, value=(250, 250, 250))


def _head_cut(photo: np.ndarray) -> np.ndarray:
    """Cut off the upper half of the largest head."""
    _, top, _, bottom = find_subject(photo).heads[0]
    return photo[round((top + bottom) / 2 * len(photo)) :]


# Name -> edit of a photo (uint8 RGB).
HACKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "corner, top left": _recipe(crop=(0, 0, 60, 60)),
    "corner, bottom right": _recipe(crop=(40, 40, 100, 100)),
    "vertical strip": _recipe(crop=(40, 0, 60, 100)),
    "horizontal strip": _recipe(crop=(0, 40, 100, 60)),
    "middle": _recipe(crop=(40, 40, 60, 60)),
    "head cut": _head_cut,
    "flat": _recipe(contrast=-60),
    "veil": _matrix((0.6, 0, 0, 70), (0, 0.6, 0, 70), (0, 0, 0.6, 70)),
    "fade": _recipe(look="fade"),
    "mono": _recipe(look="mono"),
    "noir": _recipe(look="noir"),
    "sepia": _recipe(look="sepia"),
    "pale": _recipe(saturation=-40),
    "orange": _recipe(warmth=100, saturation=40),
    "blue": _recipe(warmth=-100, saturation=40),
    "green": _matrix((0.85, 0, 0, 0), (0, 1.1, 0, 15), (0, 0, 0.85, 0)),
    "burnt": _burnt,
    "crushed": _crushed,
    "neon": lambda photo: render(render(photo, Recipe(saturation=100)), Recipe(saturation=50)),
    "halos": _unsharp,
    "noise": _noise,
    "blur": lambda photo: cv2.GaussianBlur(photo, (0, 0), 0.006 * max(photo.shape[:2])),
    "border": _border,
}
COLOUR_HACKS = ("pale", "mono", "noir", "sepia", "neon")  # they change little in a photo without colours
HEAD_HACKS = ("head cut",)


def applicable_hacks(photo: np.ndarray) -> list[str]:
    """Return the names of the hacks that change a photo (uint8 RGB): some need colours, some a head."""
    left_out = (() if is_coloured(photo) else COLOUR_HACKS) + (() if find_subject(photo).heads else HEAD_HACKS)
    return [name for name in HACKS if name not in left_out]


def total(photo: np.ndarray, picture: np.ndarray, function: RewardFunction) -> float:
    """Return the total of a picture as a group of one."""
    names = [name for name, weight in function.weights.items() if weight]
    return function.total(score_pictures(photo, [picture], names)[0]) or 0.0


def climb(
    photo: np.ndarray, function: RewardFunction, evaluations: int = EVALUATIONS, seed: int = 0
) -> tuple[Recipe, float]:
    """Maximise a reward function over recipes, by coordinate ascent from the best of random recipes and the identity.

    Args:
        photo: uint8 RGB.
        function: The weights.
        evaluations: Largest number of recipes to score.
        seed: Seed of the random recipes.

    Returns:
        The best recipe and its total.
    """
    scored: dict[Recipe, float] = {}

    def score(recipe: Recipe) -> float:
        if recipe not in scored:
            scored[recipe] = total(photo, render(photo, recipe), function)
        return scored[recipe]

    rng = np.random.default_rng(seed)
    starts = sorted((random_recipe(rng, 0.4) for _ in range(RANDOM_STARTS)), key=score, reverse=True)
    for start in (Recipe(), *starts[:2]):
        best = start
        while len(scored) < evaluations:
            before = best
            for change in _coordinates(best):
                best = max([best, *change], key=score)
            if best == before:
                break
    recipe = max(scored, key=lambda recipe: scored[recipe])
    return recipe, scored[recipe]


def _coordinates(recipe: Recipe) -> Iterator[list[Recipe]]:
    """Yield, for each number and choice of a recipe, the recipes that differ in it."""
    for name, operation in OPERATIONS.items():
        if operation.choices:
            yield [recipe.replace(**{name: choice}) for choice in operation.choices]
            continue
        for position, slot in enumerate(operation.slots):
            value = getattr(recipe, name)
            if isinstance(value, tuple):
                variants = [(*value[:position], level, *value[position + 1 :]) for level in slot.levels()]
                yield [recipe.replace(**{name: variant}) for variant in variants]
            else:
                yield [recipe.replace(**{name: level}) for level in slot.levels()]


def examine(file: Path, function: RewardFunction, evaluations: int) -> dict[str, Any]:
    """Score the hacks of a photo and climb to its optimum: totals by hack, and "recipe", "best", "untouched"."""
    cv2.setNumThreads(1)
    photo = shrink(load_photo(file))
    hacks = {name: total(photo, HACKS[name](photo), function) for name in applicable_hacks(photo)}
    recipe, best = climb(photo, function, evaluations) if evaluations else (Recipe(), 0.0)
    return {"file": file, "untouched": total(photo, photo, function), "hacks": hacks, "recipe": recipe, "best": best}


def is_coloured(photo: np.ndarray) -> bool:
    """Return whether a photo has colours that a black and white version would lose."""
    lab = cv2.cvtColor(cv2.resize(photo, (64, 64)).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    return float(np.hypot(lab[..., 1], lab[..., 2]).mean()) >= COLOURED


def main() -> None:
    """Print the table of hacks and write the sheets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="folder of photos (bundled ones by default)")
    parser.add_argument("--every", type=int, default=1, help="use every n-th photo")
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS, help="of hill climbing; 0 for none")
    parser.add_argument("--reward", default=EQUAL_WEIGHTS.to_json(), help="weights as JSON (default: equal weights)")
    parser.add_argument("--sheet", type=Path, help="write contact sheets to <sheet>-1.png and so on")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    files = sorted(options.photos.glob("*.jpg"))[:: options.every]
    function = RewardFunction.from_json(options.reward)
    work = partial(examine, function=function, evaluations=options.evaluations)
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(work, files))
    for name in HACKS:
        wins = [row["hacks"][name] < row["untouched"] for row in rows if name in row["hacks"]]
        if wins:
            print(f"{name:22} below the untouched photo for {np.mean(wins):6.1%} of {len(wins)} photos")
    if options.evaluations:
        gains = [row["best"] - row["untouched"] for row in rows]
        print(f"hill climbing gains {np.mean(gains):.3f} on {', '.join(REWARDS)} as {function.to_json()}")
    if options.sheet and options.evaluations:
        columns = [
            SheetColumn("untouched", [Recipe() for _ in rows], [row["untouched"] for row in rows]),
            SheetColumn("optimum", [row["recipe"] for row in rows], [row["best"] for row in rows]),
        ]
        photos = [shrink(load_photo(file)) for file in files]
        write_sheets(draw_sheets(photos, [file.stem for file in files], columns, len(files)), options.sheet)


if __name__ == "__main__":
    main()
