"""`python -m training.specialists`: train the specialists of moondream-tiny that ship with the project.

One GRPO run per reward function from moondream-tiny with seed 1: 1.5 to 3 minutes each on two CPU cores. Writes
adapter, settings, model card and a contact sheet of the held-out photos to a folder in `assets/specialists`, and how
each model compares with the others on its own reward to `comparison.json`. Runs for `colour` alone end with nearly the
edits of `balanced`, since the rewards share what people reject, so that none is published.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from inference.registry import ASSETS, MODELS, SPECIALISTS
from recipes import encode_jpeg, shrink
from rewards import RewardFunction
from storage.files import write_atomically
from training.contact_sheet import draw_sheets
from training.data.sources import degrade, load_photos
from training.evaluate import DEFAULT_BASE, bootstrap_interval, model_answers, reward_totals, sheet_columns
from training.runs.adapters import ADAPTER_FILE, check_adapter
from training.runs.export import model_card
from training.runs.run import Run, RunConfig

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ASSETS / "specialists"
COMPARISON_FILE = FOLDER / "comparison.json"
SEED = 1
# Other settings than the defaults. After 120 steps, runs for one reward are hardly better at it than *balanced*.
SETTINGS: dict[str, dict[str, Any]] = {name: {"steps": 240, "beta": 0.003} for name in ("bold", "crisp")}
DEGRADED_COPIES = 4  # of each held-out photo in the comparison
SHEET_WIDTH, SHEET_QUALITY = 1000, 75  # px, JPEG
ADAPTER_CONFIG = "adapter_config.json"


def specialist_config(name: str) -> RunConfig:
    """Return the settings of a specialist's run."""
    settings = {
        "base": DEFAULT_BASE,
        "reward": dict(SPECIALISTS[name]),
        "seed": SEED,
        "name": f"moondream-tiny, {name}",
    }
    return RunConfig.create(**settings, **SETTINGS.get(name, {}))


def train(name: str, work: Path) -> Run:
    """Execute the run of a specialist in `work/<name>`, or return the finished run that is there."""
    run = Run(work / name)
    if run.result() is None:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "config.json").write_text(specialist_config(name).model_dump_json(), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "training.grpo", str(run.folder)], cwd=ROOT, check=True)
    check_adapter(run.adapter, MODELS[DEFAULT_BASE])
    return run


def publish(name: str, run: Run) -> None:
    """Copy a run's adapter to its folder in assets, with settings, model card and contact sheet."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run.adapter / ADAPTER_FILE, folder / ADAPTER_FILE)
    adapter = json.loads((run.adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    adapter["base_model_name_or_path"] = DEFAULT_BASE
    write_atomically(folder / ADAPTER_CONFIG, json.dumps(adapter, indent=2) + "\n")
    result = run.result() or {}
    settings = run.config().model_dump(include={"reward", "seed", "steps", "beta"})
    figures = {key: result[key] for key in ("held_out", "base", "tuned", "difference")}
    write_atomically(folder / "training.json", json.dumps(settings | figures, indent=1) + "\n")
    card = model_card(run, MODELS[DEFAULT_BASE])
    write_atomically(folder / "README.md", card + "\n![Held-out photos: untouched, base, tuned](sheet.jpg)\n")
    (folder / "sheet.jpg").write_bytes(encode_jpeg(draw_sheet(run), SHEET_QUALITY))
    for file in folder.iterdir():
        file.chmod(0o644)


def draw_sheet(run: Run) -> np.ndarray:
    """Draw all held-out photos, untouched and as edited by the base and by a run: uint8 RGB."""
    held_out = load_photos("bundled", "held-out")
    answers = model_answers([DEFAULT_BASE, str(run.folder)], held_out.photos)
    columns = sheet_columns(answers, held_out.photos, RewardFunction(run.config().reward))
    pages = draw_sheets(held_out.photos, held_out.names, columns)
    return np.vstack([shrink(np.asarray(page), SHEET_WIDTH) for page in pages])


def compare() -> list[dict[str, Any]]:
    """Compare the published specialists with the base and with each other, each on its own reward.

    Returns:
        One row per pair: "model", "other", and mean, low and high of the model's total minus the other's, on the
        held-out photos and on DEGRADED_COPIES of each. The interval is over the photos, of which each counts once.
    """
    photos = load_photos("bundled", "held-out").photos
    rng = np.random.default_rng(SEED)
    copies = [*photos, *(degrade(photo, rng) for _ in range(DEGRADED_COPIES) for photo in photos)]
    answers = model_answers([DEFAULT_BASE, *(f"moondream-tiny-{name}" for name in SPECIALISTS)], copies)
    rows = []
    for name, weights in SPECIALISTS.items():
        function, model = RewardFunction(weights), f"moondream-tiny-{name}"
        totals = {
            other: np.nanmean(reward_totals(answers[other], function).reshape(-1, len(photos)), 0) for other in answers
        }
        rows += [
            {"model": model, "other": other, **bootstrap_interval(totals[model] - totals[other])}
            for other in answers
            if other != model
        ]
    return rows


def main() -> None:
    """Train, publish and compare the specialists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the runs; finished ones are not repeated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name in SPECIALISTS:
            publish(name, train(name, options.work or Path(temporary)))
            print(f"wrote {FOLDER / name}")
    write_atomically(COMPARISON_FILE, json.dumps(compare(), indent=1) + "\n")


if __name__ == "__main__":
    main()
