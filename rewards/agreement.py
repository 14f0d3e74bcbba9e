"""`python -m rewards.agreement`: how often the rewards prefer the edit that judges preferred, with bootstrap intervals.

The pairs of edits in `assets/preferences` were judged twice by a large vision-language model as a stand-in for people;
those on which both judgements agree are used. A reward agrees with a pair if the preferred edit scores higher, each
scored as a group of one. Intervals resample photos, because pairs of one photo are not independent.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from recipes import Recipe, load_photo, parse, render, shrink
from rewards import EQUAL_WEIGHTS, REWARDS, RewardFunction, score_pictures

ASSETS = Path(__file__).resolve().parents[1] / "assets"
FUNCTIONS = {"equal weights": EQUAL_WEIGHTS} | {name: RewardFunction({name: 1.0}) for name in REWARDS}
BOOTSTRAP_SAMPLES = 2_000


@dataclass(frozen=True)
class Pair:
    """Two edits of a photo, and which one both judgements prefer.

    Attributes:
        photo: Name of the undamaged photo; pairs with the same name are split together.
        source: The file that both edits start from.
        preferred: The preferred recipe.
        rejected: The other recipe.
        degraded: Whether the source was degraded.
        models: Whether both recipes are models' answers.
        clear: Whether both judgements call the preference clear.
    """

    photo: str
    source: Path
    preferred: Recipe
    rejected: Recipe
    degraded: bool
    models: bool
    clear: bool


# Subset name -> whether a pair belongs to it.
SUBSETS: dict[str, Callable[[Pair], bool]] = {
    "undamaged": lambda pair: not pair.degraded,
    "undamaged, between models": lambda pair: not pair.degraded and pair.models,
    "degraded": lambda pair: pair.degraded,
    "degraded, clear": lambda pair: pair.degraded and pair.clear,
}


def load_pairs(folder: Path = ASSETS) -> list[Pair]:
    """Load the judged pairs on which both judgements agree."""
    pairs = []
    for file in ("pairs.json", "degraded_pairs.json"):
        for entry in json.loads((folder / "preferences" / file).read_text(encoding="utf-8")):
            picks = set(entry["picks"])
            if picks not in ({"A"}, {"B"}):
                continue
            first, second = parse(entry["a"]).recipe, parse(entry["b"]).recipe
            degraded = "source" in entry
            source = folder / ("preferences" if degraded else "photos") / entry.get("source", entry["photo"])
            pairs.append(
                Pair(
                    photo=entry["photo"],
                    source=source,
                    preferred=first if picks == {"A"} else second,
                    rejected=second if picks == {"A"} else first,
                    degraded=degraded,
                    models="model-model" in entry["kind"],
                    clear=min(entry["strengths"]) == 2,
                )
            )
    return pairs


def agreements(pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """Return, for each reward function, whether it prefers the preferred edit of each pair: bool [pairs]."""
    photos: dict[Path, np.ndarray] = {}
    rows: dict[str, list[bool]] = {name: [] for name in FUNCTIONS}
    for pair in pairs:
        if pair.source not in photos:
            photos[pair.source] = shrink(load_photo(pair.source))
        photo = photos[pair.source]
        better, worse = (
            score_pictures(photo, [render(photo, recipe)])[0] for recipe in (pair.preferred, pair.rejected)
        )
        for name, function in FUNCTIONS.items():
            rows[name].append((function.total(better) or 0.0) > (function.total(worse) or 0.0))
    return {name: np.array(values) for name, values in rows.items()}


def interval(right: np.ndarray, groups: Sequence[str], seed: int = 0) -> tuple[float, float, float]:
    """Return a share and its 95 % bootstrap interval over groups.

    Args:
        right: Whether each pair is right, bool [pairs].
        groups: The photo of each pair; photos are resampled as a whole.
        seed: Seed of the resampling.
    """
    names, index = np.unique(list(groups), return_inverse=True)
    hits, counts = np.bincount(index, right), np.bincount(index)
    samples = np.random.default_rng(seed).integers(0, len(names), (BOOTSTRAP_SAMPLES, len(names)))
    shares = hits[samples].sum(axis=1) / counts[samples].sum(axis=1)
    low, high = np.percentile(shares, [2.5, 97.5])
    return float(right.mean()), float(low), float(high)


def table(pairs: Sequence[Pair], right: dict[str, np.ndarray]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return share and interval by reward function and subset."""
    rows: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name, values in right.items():
        rows[name] = {}
        for subset, belongs in SUBSETS.items():
            chosen = [index for index, pair in enumerate(pairs) if belongs(pair)]
            rows[name][subset] = interval(values[chosen], [pairs[index].photo for index in chosen])
    return rows


def markdown_table(pairs: Sequence[Pair], rows: dict[str, dict[str, tuple[float, float, float]]]) -> str:
    """Format the rows of `table` as a Markdown table."""
    counts = [sum(map(belongs, pairs)) for belongs in SUBSETS.values()]
    lines = ["| | " + " | ".join(f"{name} ({count})" for name, count in zip(SUBSETS, counts, strict=True)) + " |"]
    lines.append("|---" * (len(SUBSETS) + 1) + "|")
    for name, row in rows.items():
        cells = " | ".join("{:.2f} ({:.2f} to {:.2f})".format(*cell) for cell in row.values())
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table as Markdown."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    cv2.setNumThreads(1)
    pairs = load_pairs()
    print(markdown_table(pairs, table(pairs, agreements(pairs))))


if __name__ == "__main__":
    main()
