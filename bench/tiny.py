"""moondream-tiny: time and memory of eight recipes for one photo, and the published quality figures."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from inference.registry import TINY, answer
from inference.types import Answer, Request
from recipes import load_photo
from training.data.bundled import bundled_photos

RUNS = 7


def sample(n: int, seed: int) -> list[Answer]:
    """Request `n` recipes through the call that the playground uses."""
    photo = load_photo(bundled_photos("held-out")[0].path)
    request = Request(photo=photo, skill="recipe", n=n, temperature=1.0, seed=seed)
    return [event for event in answer("moondream-tiny", request) if isinstance(event, Answer)]


def measure_seconds(n: int, seed: int) -> float:
    """Measure the seconds of one request."""
    start = time.perf_counter()
    if len(sample(n, seed)) != n:
        raise RuntimeError(f"moondream-tiny did not give {n} recipes")
    return time.perf_counter() - start


def peak_memory() -> dict[str, float]:
    """Return the peak memory (MiB) of a new process before and after eight recipes."""
    code = "from bench.tiny import print_memory; print_memory()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_memory() -> None:
    """Print this process's peak memory after importing the libraries, and after eight recipes."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sample(8, 0)
    print(json.dumps({"libraries": before, "answered": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def rows() -> list[dict[str, Any]]:
    """Measure speed and memory, and read the quality figures."""
    measure_seconds(8, 0)  # warm-up: loads the model
    batched = statistics.median(measure_seconds(8, seed) for seed in range(RUNS))
    separate = statistics.median(sum(measure_seconds(1, seed + i) for i in range(8)) for seed in range(3))
    distinct = statistics.median(len({a.text for a in sample(8, 10 * seed)}) for seed in range(5))
    memory = peak_memory()
    figures = json.loads((Path(TINY) / "quality.json").read_text(encoding="utf-8"))
    return [
        _row(
            "8 recipes for one photo", batched, "s", separate, separate / batched, "<= 1", f"median of {RUNS}; 8 calls"
        ),
        _row("distinct recipes of 8, temperature 1", distinct, "", note="median of 5 seeds", target=">= 8"),
        _row("peak memory, 8 recipes", memory["answered"], "MiB", memory["libraries"], note="torch and transformers"),
        *quality_rows(figures),
    ]


def quality_rows(figures: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Build rows of the published figures on held-out photos."""
    recipe, facts, regions = figures["recipe"], figures["facts"], figures["regions"]
    lowered, single = 100 * recipe["error_lowered_by"], recipe["error_best_single_recipe"]
    note = f"held-out photos, {recipe['cases']} degraded copies"
    return [
        _row("CIELAB error lowered by greedy recipe", lowered, "%", target=">= 30", note=note),
        _row("cases in which it is lowered", 100 * recipe["share_lowered"], "%", target=">= 80", note=note),
        _row(
            "error restored, against best single recipe",
            recipe["error_restored"],
            "dE",
            single,
            single / recipe["error_restored"],
            "ratio > 1",
            note,
        ),
        _row("stated facts that are true", 100 * facts["true"], "%", target=">= 90", note=f"{facts['facts']} facts"),
        _row("point inside the area", 100 * regions["hit"], "%", target=">= 80"),
        _row("detect, mean IoU", regions["iou"], "", target=">= 0.5"),
    ]


def _row(
    name: str,
    value: float,
    unit: str,
    baseline: float | None = None,
    ratio: float | None = None,
    target: str | None = None,
    note: str = "",
) -> dict[str, Any]:
    fields = {"name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": ratio}
    return {**fields, "target": target, "note": note}
