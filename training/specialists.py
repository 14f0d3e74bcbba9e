"""`python -m training.specialists`: train the specialists of moondream-tiny that ship with the project.

One GRPO run per reward function from moondream-tiny, with the default settings and seed 1: 1.5 minutes each on two CPU
cores. Writes adapter, settings, model card and a contact sheet of the held-out photos to a folder in
`assets/specialists`. Runs for `sharpness` or `colour` alone end with nearly the edits of `balanced`, since the rewards
share what people reject, so that they are not published.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from inference.registry import ASSETS, MODELS, SPECIALISTS
from recipes import encode_jpeg, load_photo, shrink
from rewards import RewardFunction
from storage.files import write_atomically
from training.contact_sheet import draw_sheets
from training.data.bundled import bundled_photos
from training.evaluate import DEFAULT_BASE, model_answers, sheet_columns
from training.runs.adapters import ADAPTER_FILE, check_adapter
from training.runs.export import model_card
from training.runs.run import Run, RunConfig

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ASSETS / "specialists"
SEED = 1
SHEET_WIDTH, SHEET_QUALITY = 1000, 75  # px, JPEG
ADAPTER_CONFIG = "adapter_config.json"


def train(name: str, work: Path) -> Run:
    """Execute the run of a specialist in `work/<name>`, or return the finished run that is there."""
    run = Run(work / name)
    if run.result() is None:
        config = RunConfig.create(
            base=DEFAULT_BASE, reward=dict(SPECIALISTS[name]), seed=SEED, name=f"moondream-tiny, {name}"
        )
        run.folder.mkdir(parents=True, exist_ok=True)
        settings = config.model_dump_json(include={"base", "reward", "seed", "name"})
        (run.folder / "config.json").write_text(settings, encoding="utf-8")
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
    settings = run.config().model_dump(include={"reward", "seed", "steps"})
    figures = {key: result[key] for key in ("held_out", "base", "tuned", "difference")}
    write_atomically(folder / "training.json", json.dumps(settings | figures, indent=1) + "\n")
    card = model_card(run, MODELS[DEFAULT_BASE])
    write_atomically(folder / "README.md", card + "\n![Held-out photos: untouched, base, tuned](sheet.jpg)\n")
    (folder / "sheet.jpg").write_bytes(encode_jpeg(draw_sheet(run), SHEET_QUALITY))
    for file in folder.iterdir():
        file.chmod(0o644)


def draw_sheet(run: Run) -> np.ndarray:
    """Draw all held-out photos, untouched and as edited by the base and by a run: uint8 RGB."""
    infos = bundled_photos("held-out")
    photos = [shrink(load_photo(info.path)) for info in infos]
    answers = model_answers([DEFAULT_BASE, str(run.folder)], photos)
    columns = sheet_columns(answers, photos, RewardFunction(run.config().reward))
    pages = draw_sheets(photos, [info.path.name for info in infos], columns)
    return np.vstack([shrink(np.asarray(page), SHEET_WIDTH) for page in pages])


def main() -> None:
    """Train and publish the specialists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the runs; finished ones are not repeated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name in SPECIALISTS:
            publish(name, train(name, options.work or Path(temporary)))
            print(f"wrote {FOLDER / name}")


if __name__ == "__main__":
    main()
