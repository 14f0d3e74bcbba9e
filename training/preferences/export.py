"""Export choices in TRL's preference format, and read that export as training data. Imports no torch.

The export is a folder, or a zip file of it: `preferences.jsonl` has one row per choice of one side, with `prompt`,
`chosen` and `rejected` as chats, and `images`, which names the photo's file in the folder, or is empty.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inference.types import RECIPE_QUESTION
from recipes import PhotoError, load_photo, parse
from storage.preferences import Preference
from training.preferences.fit import Choice

FILE = "preferences.jsonl"
MIN_FOR_DPO = 50  # choices of one side with a photo


def to_choices(preferences: Sequence[Preference]) -> list[Choice]:
    """Convert stored choices to those that `fit_reward` takes."""
    return [Choice(item.left.scores, item.right.scores, item.outcome) for item in preferences]  # type: ignore[arg-type]


def to_rows(
    preferences: Sequence[Preference], samples: Mapping[str, Path]
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Convert choices of one side to rows of TRL's preference format; equal choices are left out.

    Args:
        preferences: The choices, with their photos.
        samples: The bundled photos that choices may refer to by name.

    Returns:
        The rows, and the photos as JPEG files by name.
    """
    rows: list[dict[str, Any]] = []
    photos: dict[str, bytes] = {}
    for item in preferences:
        if item.outcome == "equal":
            continue
        chosen, rejected = (item.left, item.right) if item.outcome == "left" else (item.right, item.left)
        images = []
        if item.sample in samples:
            images = [item.sample]
            photos[item.sample] = photos.get(item.sample) or samples[item.sample].read_bytes()
        elif item.photo:
            images = [f"{hashlib.sha256(item.photo).hexdigest()[:16]}.jpg"]
            photos[images[0]] = item.photo
        rows.append(
            {
                "prompt": [{"role": "user", "content": RECIPE_QUESTION}],
                "chosen": [{"role": "assistant", "content": chosen.recipe}],
                "rejected": [{"role": "assistant", "content": rejected.recipe}],
                "images": images,
                "chosen_model": chosen.model,
                "rejected_model": rejected.model,
                "chosen_scores": dict(chosen.scores),
                "rejected_scores": dict(rejected.scores),
            }
        )
    return rows, photos


def to_json_lines(rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def to_zip(preferences: Sequence[Preference], samples: Mapping[str, Path]) -> bytes:
    """Write the export as a zip file; arguments are those of `to_rows`."""
    rows, photos = to_rows(preferences, samples)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(FILE, to_json_lines(rows))
        for name, jpeg in photos.items():
            archive.writestr(name, jpeg)
    return file.getvalue()


def write_folder(preferences: Sequence[Preference], samples: Mapping[str, Path], folder: Path) -> int:
    """Write the rows that have a photo, with the photos, to an empty folder; return their number. Raises OSError."""
    rows, photos = to_rows(preferences, samples)
    rows = [row for row in rows if row["images"]]
    for name, jpeg in photos.items():
        (folder / name).write_bytes(jpeg)
    (folder / FILE).write_text(to_json_lines(rows), encoding="utf-8")
    return len(rows)


def read_folder(folder: Path) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Read what `write_folder` wrote.

    Returns:
        The rows whose photo and recipes can be read, and the photos, uint8 RGB, by file name.

    Raises:
        OSError: The folder has no such file.
    """
    rows: list[dict[str, Any]] = []
    photos: dict[str, np.ndarray] = {}
    for line in (folder / FILE).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        name = Path(row["images"][0]).name
        recipes = [parse(row[side][0]["content"]) for side in ("chosen", "rejected")]
        try:
            if name not in photos:
                photos[name] = load_photo(folder / name)
        except (PhotoError, OSError):
            continue
        if all(recipe.ok for recipe in recipes):
            rows.append(row)
    return rows, photos
