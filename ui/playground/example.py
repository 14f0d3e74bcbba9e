"""The example: a finished comparison on a sample photo, with which the page opens before any model is loaded.

`python -m ui.playground.example` computes it with the model that ships with the project, and makes the sample photos
that have a flaw. The repository keeps answers and scores; the pictures are rendered when the page is built.
"""

from __future__ import annotations

import json
import threading
from functools import cache
from typing import Any

import cv2
import numpy as np

from inference.metering import AnswerFunction
from inference.registry import ASSETS, MODELS, answer
from inference.types import Request
from recipes import Recipe, encode_jpeg, jpeg_data_url, load_photo, parse, render, render_all, shrink
from training.data.bundled import PHOTO_FOLDER, SAMPLE_FOLDER
from ui.playground.compare import PICTURE_QUALITY, Candidate, Column, Comparison, compare
from ui.playground.link import PlaygroundSettings
from ui.playground.samples import SAMPLES

EXAMPLE_FILE = ASSETS / "example.json"
EXAMPLE_SETTINGS = PlaygroundSettings(photo="coffee.jpg")
JPEG_QUALITY = 88


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def load_example() -> Comparison | None:
    """Return the example with its rendered pictures, or None if its files are missing, so that the page still opens."""
    try:
        columns = json.loads(EXAMPLE_FILE.read_text(encoding="utf-8"))["columns"]
        photo = load_photo(SAMPLES[EXAMPLE_SETTINGS.photo].path)
    except (OSError, KeyError):
        return None
    preview = shrink(photo)
    return Comparison("recipe", tuple(_column(column, preview) for column in columns), "done")


def _column(saved: dict[str, Any], preview: np.ndarray) -> Column:
    spec = MODELS[saved["model"]]
    parsed = [parse(candidate["text"]) for candidate in saved["candidates"]]
    pictures = render_all(preview, [result.recipe for result in parsed])
    candidates = (
        Candidate(
            index,
            candidate["text"],
            done=True,
            recipe=result.recipe,
            problems=result.problems,
            scores=candidate["scores"],
            fidelity=candidate["fidelity"],
            picture=jpeg_data_url(picture, PICTURE_QUALITY),
            seconds=candidate["seconds"],
        )
        for index, (candidate, result, picture) in enumerate(zip(saved["candidates"], parsed, pictures, strict=True))
    )
    return Column(spec.name, spec.title, spec.note, "done", candidates=tuple(candidates))


# ── Making ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def compute_example(answer: AnswerFunction = answer) -> dict[str, Any]:
    """Run the example's models and return the content of EXAMPLE_FILE.

    Args:
        answer: Function that runs one model. The file in the repository was made on a CPU.
    """
    settings = EXAMPLE_SETTINGS
    photo = load_photo(SAMPLES[settings.photo].path)
    request = Request(
        photo, settings.skill, settings.prompt, settings.length, settings.n, settings.temperature, settings.seed
    )
    *_, last = compare(list(settings.models), request, threading.Event(), answer)
    return {
        "columns": [
            {
                "model": column.name,
                "candidates": [
                    {
                        "text": candidate.text,
                        "scores": candidate.scores,
                        "fidelity": candidate.fidelity,
                        "seconds": round(candidate.seconds, 3),
                    }
                    for candidate in column.candidates
                ],
            }
            for column in last.columns
        ]
    }


def flawed_photos() -> dict[str, tuple[np.ndarray, str, str]]:
    """Make the flawed samples: photo (uint8 RGB), file it is made from, and what was done to it, by file name."""
    city, portrait, bee = "city11.jpg", "grace_hopper.jpg", "european-honey-bee.jpg"
    dark = render(load_photo(PHOTO_FOLDER / city), Recipe(exposure=-90, contrast=-20))
    yellow = load_photo(PHOTO_FOLDER / portrait) * np.array([1.0, 0.86, 0.55])
    bordered = cv2.copyMakeBorder(
        load_photo(PHOTO_FOLDER / bee), 15, 120, 20, 160, cv2.BORDER_CONSTANT, value=(40, 38, 36)
    )
    return {
        "dark-city.jpg": (dark, city, "too dark"),
        "tinted-portrait.jpg": (yellow.astype(np.uint8), portrait, "yellow tint"),
        "framed-bee.jpg": (shrink(bordered, 640), bee, "badly framed"),
    }


def main() -> None:
    """Write the flawed samples with their licences, then the example."""
    licences = {entry["file"]: entry for entry in json.loads((PHOTO_FOLDER / "LICENCES.json").read_text("utf-8"))}
    SAMPLE_FOLDER.mkdir(exist_ok=True)
    entries = []
    for name, (photo, origin, flaw) in flawed_photos().items():
        (SAMPLE_FOLDER / name).write_bytes(encode_jpeg(photo, JPEG_QUALITY))
        entry, height, width = licences[origin], *photo.shape[:2]
        subject = f"{entry['subject'].removeprefix('landscape/city: ')}, {flaw}"
        source = f"{entry['source']}, changed: {flaw}"
        entries.append(entry | {"file": name, "size": [width, height], "subject": subject, "source": source})
    lines = ",\n ".join(json.dumps(entry) for entry in entries)
    (SAMPLE_FOLDER / "LICENCES.json").write_text(f"[\n {lines}\n]\n", encoding="utf-8")
    EXAMPLE_FILE.write_text(json.dumps(compute_example(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
