"""Recipes: time of previews, full-size rendering, parsing and loading."""

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from scipy import ndimage

from recipes import OPERATIONS, PREVIEW_SIDE, Recipe, load_photo, parse, random_recipe, render, render_all

PHOTO = Path(__file__).resolve().parent.parent / "assets" / "photos" / "astronaut.jpg"
CORES = 2
PREVIEWS = 24


def rows() -> list[dict[str, Any]]:
    """Measure previews of one photo, a 12-megapixel picture, loading and parsing: medians of several runs."""
    cv2.setNumThreads(CORES)
    photo = cv2.resize(load_photo(PHOTO), (PREVIEW_SIDE, PREVIEW_SIDE), interpolation=cv2.INTER_AREA)
    recipes = _recipes(PREVIEWS)
    reference = median_ms(lambda: [numpy_render(photo, recipe) for recipe in recipes], 3)
    previews = median_ms(lambda: render_all(photo, recipes), 15)
    large = cv2.resize(photo, (4000, 3000), interpolation=cv2.INTER_CUBIC)
    file = io.BytesIO()
    Image.fromarray(large).save(file, "JPEG", quality=95)
    text, prose = str(recipes[0]), "the light is warm, raise exposure by 20 and crop 10 % off the left. " * 1500
    return [
        {
            "name": f"{PREVIEWS} previews at {PREVIEW_SIDE} px",
            "value": previews,
            "unit": "ms",
            "baseline": reference,
            "ratio": reference / previews,
            "target": "<= 250",
            "note": f"all operations; {CORES} cores; baseline: the same in NumPy and SciPy, float64",
        },
        row("a picture of 12 megapixels", median_ms(lambda: render(large, recipes[0]), 3), "all operations, full size"),
        row("loading a JPEG of 12 megapixels", median_ms(lambda: load_photo(file.getvalue()), 3), "to RGB"),
        row("parsing a canonical recipe", median_ms(lambda: parse(text), 200), ""),
        row("parsing 100,000 characters of prose", median_ms(lambda: parse(prose), 5), ""),
    ]


def row(name: str, milliseconds: float, note: str) -> dict[str, Any]:
    """Build a row without a target."""
    return {"name": name, "value": milliseconds, "unit": "ms", "note": note}


def median_ms(action: Callable[[], Any], repeats: int) -> float:
    """Return the median time of an action in milliseconds, after one warm-up run."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def _recipes(count: int) -> list[Recipe]:
    """Draw random recipes that change every operation of the whole frame, the slowest case."""
    rng = np.random.default_rng(0)
    return [random_recipe(rng, change_probability=1).replace(crop=(0, 0, 100, 100)) for _ in range(count)]


def numpy_render(photo: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Render a recipe without its look in NumPy and SciPy, as a reference."""
    assert set(OPERATIONS) == {"crop", "exposure", "contrast", "saturation", "warmth", "sharpening", "look"}
    weights = np.array([0.2126, 0.7152, 0.0722])
    coded = photo / 255.0
    linear = np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    gains = np.array([2 ** (recipe.warmth / 200), 1, 2 ** (-recipe.warmth / 200)])
    linear = linear * 2 ** (1.5 * recipe.exposure / 100) * gains / (gains @ weights)
    coded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    coded = 0.5 + (coded - 0.5) * 2 ** (recipe.contrast / 100)
    grey = (coded @ weights)[..., None]
    coded = grey + (coded - grey) * 2 ** (1.5 * recipe.saturation / 100)
    sigma = max(0.5, 0.0016 * max(photo.shape[:2]))
    blurred = ndimage.gaussian_filter(grey, (sigma, sigma, 0), mode="reflect")
    coded = coded + recipe.sharpening / 50 * (grey - blurred)
    return np.clip(coded * 255 + 0.5, 0, 255).astype(np.uint8)
