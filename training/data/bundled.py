"""The photos that ship with the project, with their licences and their split."""

import json
from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2] / "assets"
PHOTO_FOLDER = ASSETS / "photos"
SAMPLE_FOLDER = ASSETS / "samples"  # copies with a flaw, on which an edit is visible; see ui/playground/example.py
SPLITS = ("train", "held-out")


@dataclass(frozen=True)
class BundledPhoto:
    """A bundled photo.

    Attributes:
        path: The file.
        width: In pixels.
        height: In pixels.
        split: "train" or "held-out".
        licence: Name of its licence.
        credit: The author to credit.
        source: Where it was published.
        subject: What it shows.
    """

    path: Path
    width: int
    height: int
    split: str
    licence: str
    credit: str
    source: str
    subject: str


def bundled_photos(split: str | None = None, folder: Path = PHOTO_FOLDER) -> list[BundledPhoto]:
    """Return the bundled photos listed in LICENCES.json, ordered by file name.

    Args:
        split: "train", "held-out", or None for all.
        folder: The folder of photos.

    Raises:
        ValueError: There is no such split.
        FileNotFoundError: The folder has no LICENCES.json.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"There is no split {split!r}. Choose one of {', '.join(SPLITS)}.")
    photos = []
    for entry in json.loads((folder / "LICENCES.json").read_text(encoding="utf-8")):
        width, height = entry["size"]
        texts = {key: entry[key] for key in ("split", "licence", "credit", "source", "subject")}
        photos.append(BundledPhoto(path=folder / entry["file"], width=width, height=height, **texts))
    return sorted((photo for photo in photos if split in (None, photo.split)), key=lambda photo: photo.path.name)
