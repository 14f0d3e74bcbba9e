"""Evaluation: throughput against the Playground's path in a loop, its memory, and re-scoring a leaderboard.

Both paths answer the same photos with the same models and candidates, and render and score every answer. The scores of
the reference recipes, which the loop has not, are measured apart. `EVALUATION_PHOTOS=500` measures 500 photos.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from inference.metering import UsageMeter
from inference.registry import MODELS
from inference.types import Request
from recipes import load_photo
from rewards import EQUAL_WEIGHTS, REWARDS, RewardFunction
from rewards.report import random_recipes, score_each
from training.data.bundled import bundled_photos
from training.evaluate import UnrecordedCalls
from training.evaluations.evaluation import EvaluatedModel, EvaluationConfig, Results, create_folder
from training.evaluations.leaderboard import leaderboard
from training.evaluations.runner import ModelAccess, run_evaluation
from ui.playground.compare import compare
from usage.prices import Prices

NAMES = ("moondream-tiny", "moondream-tiny-bold")
CANDIDATES = 4
DEFAULT_COUNT = 48
LOOP_PHOTOS = 24  # of the loop, whose time per photo does not depend on their number
BOARD = (500, 6, 4)  # photos, models and candidates of the leaderboard
FRAME = 16  # ms


def rows() -> list[dict[str, Any]]:
    """Measure both paths on the same photos, one after the other."""
    count = int(os.environ.get("EVALUATION_PHOTOS", DEFAULT_COUNT))
    with tempfile.TemporaryDirectory(prefix="evaluation-bench-") as name:
        photos = _photo_folder(Path(name) / "photos", count)
        files = sorted(photos.iterdir())
        loop = _loop_seconds(files[:: max(1, count // LOOP_PHOTOS)][:LOOP_PHOTOS])
        seconds, growth = _evaluation_seconds(photos, Path(name) / "evaluation", count)
        pool = _pool_seconds(files[:2])
    rescoring, loading = _rescoring_milliseconds()
    size = f"{count} photos, {len(NAMES)} models, {CANDIDATES} candidates"
    board = f"{BOARD[0]} x {BOARD[1]} x {BOARD[2]} candidates"
    return [
        {
            "name": f"evaluation, {size}",
            "value": count / seconds,
            "unit": "photos/s",
            "baseline": 1 / loop,
            "ratio": loop * count / seconds,
            "target": "ratio >= 3",
            "note": f"baseline: the Playground's path in a loop over {LOOP_PHOTOS} of them, in the same run",
        },
        {"name": "growth of memory in the second half", "value": growth, "unit": "MB", "target": "<= 60"},
        {
            "name": "reference recipes, once per photo",
            "value": pool,
            "unit": "s",
            "note": "256 recipes rendered and scored; kept for later evaluations",
        },
        {
            "name": f"leaderboard for other weights, {board}",
            "value": rescoring,
            "unit": "ms",
            "target": f"<= {FRAME}",
            "note": f"with intervals and win shares; median of 40; the first one takes {loading:.0f} ms",
        },
    ]


def _photo_folder(folder: Path, count: int) -> Path:
    """Fill a folder with links to the bundled photos, each as often as needed."""
    folder.mkdir()
    files = [photo.path for photo in bundled_photos()]
    for index in range(count):
        source = files[index % len(files)]
        (folder / f"{index:04d}{source.suffix}").symlink_to(source)
    return folder


def _loop_seconds(files: list[Path]) -> float:
    """Return the seconds per photo of comparisons in a loop; the models are loaded before."""
    photos = [load_photo(file) for file in files]

    def run(photo: np.ndarray) -> None:
        for _ in compare(list(NAMES), Request(photo, "recipe", n=CANDIDATES), threading.Event()):
            pass

    run(photos[0])
    start = time.perf_counter()
    for photo in photos:
        run(photo)
    return (time.perf_counter() - start) / len(photos)


def _evaluation_seconds(photos: Path, folder: Path, count: int) -> tuple[float, float]:
    """Return the seconds of an evaluation without references, and the growth of memory in its second half in MB."""
    models = [EvaluatedModel(name=name, temperature=1.0, title=MODELS[name].title) for name in NAMES]
    weights = dict(EQUAL_WEIGHTS.weights)
    config = EvaluationConfig.create(
        models=models, reward=weights, photos=str(photos), candidates=CANDIDATES, max_photos=count, pool=0
    )
    evaluation = create_folder(folder, config)
    memory: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            memory.append(psutil.Process().memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    run_evaluation(evaluation, ModelAccess.of_specs(MODELS, UsageMeter(UnrecordedCalls(), Prices())))
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    assert len(evaluation.rows()) == count * len(NAMES), evaluation.status()
    half = len(memory) // 2
    return seconds, (max(memory[half:]) - max(memory[:half])) / 1e6


def _pool_seconds(files: list[Path]) -> float:
    recipes = random_recipes()
    start = time.perf_counter()
    for file in files:
        score_each(load_photo(file), recipes)
    return (time.perf_counter() - start) / len(files)


def _rescoring_milliseconds() -> tuple[float, float]:
    """Return the milliseconds of a leaderboard with other weights, median and first."""
    photos, models, candidates = BOARD
    rng = np.random.default_rng(0)
    config = EvaluationConfig.create(
        models=[EvaluatedModel(name=f"model-{index}", temperature=1.0, title="") for index in range(models)],
        reward=dict(EQUAL_WEIGHTS.weights),
        candidates=candidates,
    )
    shape, count = (photos, models), len(REWARDS)
    results = Results(
        config,
        [{"name": str(index), "digest": str(index)} for index in range(photos)],
        {},
        rng.random((*shape, candidates, count)),
        *(rng.random(shape) for _ in range(5)),
        untouched=rng.random((photos, count)),
        pool=rng.random((photos, 256, count)),
    )
    times = []
    for weights in rng.uniform(0.1, 1, (41, count)):
        function = RewardFunction(dict(zip(REWARDS, weights.tolist(), strict=True)))
        start = time.perf_counter()
        leaderboard(results, function)
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times[1:])), times[0]
