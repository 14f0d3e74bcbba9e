"""Rewards: time of scoring, against scikit-image; and how far the rewards depend on the photo."""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from skimage import color, metrics, morphology
from skimage.filters import gaussian, laplace

from bench.recipes import median_ms
from recipes import PREVIEW_SIDE, Recipe, load_photo, render, shrink
from rewards import REWARDS, score_pictures
from rewards.report import PHOTOS, random_recipes, score_photo, summarise
from training.data.sources import degrade

PHOTO = Path(__file__).resolve().parent.parent / "assets" / "photos" / "astronaut.jpg"
PHOTO_STEP = 4  # every 4th bundled photo is used for the blind shares


def rows() -> list[dict[str, Any]]:
    """Measure scoring of one candidate and of a group on one core, and the blind share over bundled photos."""
    cv2.setNumThreads(1)
    photo = cv2.resize(load_photo(PHOTO), (PREVIEW_SIDE, PREVIEW_SIDE), interpolation=cv2.INTER_AREA)
    cropped = [render(photo, Recipe(crop=(10, 5, 85, 95), exposure=level, look="fade")) for level in range(-50, 50, 10)]
    candidates = [
        render(photo, Recipe(exposure=exposure, contrast=contrast, saturation=20, warmth=-20, sharpening=40))
        for exposure in range(-100, 101, 10)
        for contrast in range(-50, 51, 5)
    ]
    unseen = iter(candidates)  # each is scored once, because comparisons are cached
    reference = median_ms(lambda: scikit_image_metrics(photo, candidates[-1]), 3)
    ours = median_ms(lambda: score_pictures(photo, [next(unseen)]), 40)
    groups = iter([[*[next(unseen) for _ in range(4)], *cropped[index : index + 4]] for index in (0, 3, 6)])
    group = median_ms(lambda: score_pictures(photo, next(groups)), 2) / 8
    combined = {
        "name": f"all rewards of one candidate of {PREVIEW_SIDE} px",
        "value": ours,
        "unit": "ms",
        "baseline": reference,
        "ratio": reference / ours,
        "target": "<= 8",
        "note": "one core, a group of one; baseline: comparable metrics with scikit-image at full size",
    }
    separate = {
        name: median_ms(lambda reward=reward: reward(photo, [next(unseen)]), 40) for name, reward in REWARDS.items()
    }
    parts = [row(f"{name} of one candidate", value, "ms", "one core, alone") for name, value in separate.items()]
    per_candidate = row("all rewards per candidate of eight", group, "ms", "one core, half of them cropped")
    return [combined, *parts, per_candidate, *blind_shares()]


def row(name: str, value: float, unit: str, note: str, target: str | None = None) -> dict[str, Any]:
    """Build a row without a baseline."""
    return {"name": name, "value": value, "unit": unit, "target": target, "note": note}


def blind_shares() -> list[dict[str, Any]]:
    """Measure the gain of the best recipe per photo, of one recipe for all, and how often the best is at a limit."""
    recipes = random_recipes()
    files = sorted(PHOTOS.glob("*.jpg"))[::PHOTO_STEP]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        scores = np.concatenate(list(pool.map(partial(score_versions, recipes=recipes), files)))
    table = []
    for name, line in summarise(scores, recipes).items():
        best = line["best_per_photo"]
        note = f"{len(files)} photos, undamaged and degraded, 256 recipes; untouched {line['untouched']:.2f}"
        note += f", best single {line['best_single']:.2f}, best per photo {best:.2f}"
        table.append(row(f"gain of the best recipe for {name}", best - line["untouched"], "", note, ">= 0.1"))
        table.append(row(f"blind share of {name}", line["blind_share"], "", note, "<= 0.7"))
        table.append(row(f"best of {name} at a limit", line["at_limits"], "", "share of photos", "<= 0.35"))
    return table


def score_versions(file: Path, recipes: list[Recipe]) -> np.ndarray:
    """Score the recipes on a photo and on a degraded version: float64 [2, 1 + recipes, rewards]."""
    cv2.setNumThreads(1)
    photo = shrink(load_photo(file))
    return np.stack([score_photo(version, recipes) for version in (photo, degrade(photo, np.random.default_rng(0)))])


def scikit_image_metrics(source: np.ndarray, picture: np.ndarray) -> list[Any]:
    """Compute the metrics of the three rewards for a candidate of the source's size, as a reference."""
    grey_source, grey = color.rgb2gray(source), color.rgb2gray(picture)
    detail = [np.sqrt((laplace(gaussian(image, 0.7)) ** 2).mean()) for image in (grey_source, grey)]
    square = np.ones((5, 5))
    over = np.maximum(grey - morphology.dilation(grey_source, square), 0)
    under = np.maximum(morphology.erosion(grey_source, square) - grey, 0)
    clipped = [np.mean((image <= 1) | (image >= 254)) for image in (source, picture)]
    lab_source, lab = color.rgb2lab(source), color.rgb2lab(picture)
    change = color.deltaE_ciede2000(lab_source, lab).mean()
    hues = [np.arctan2(values[..., 2], values[..., 1]) for values in (lab_source, lab)]
    hue_shift = np.abs(np.angle(np.exp(1j * (hues[1] - hues[0])))).mean()
    colourful = [_colourfulness(image.astype(float)) for image in (source, picture)]
    structure = metrics.structural_similarity(grey_source, grey, data_range=1.0)
    palette = np.quantile(lab.reshape(-1, 3), np.linspace(0, 1, 33), axis=0)
    return [*detail, (over + under).mean(), *clipped, change, hue_shift, *colourful, structure, float(palette.mean())]


def _colourfulness(image: np.ndarray) -> float:
    red, green, blue = np.moveaxis(image, -1, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))
