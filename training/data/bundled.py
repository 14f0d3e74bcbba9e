"""The photos that ship with the project: where they are, whose they are, and which split they belong to."""

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "photos"
SPLITS = ("train", "held-out")


@dataclass(frozen=True)
class PhotoInfo:
    """One bundled photo: its file, size in pixels, split, licence, whom to credit, and what it shows."""

    path: Path
    width: int
    height: int
    split: str
    licence: str
    credit: str
    source: str
    subject: str


def bundled(split: str | None = None, folder: Path = FOLDER) -> list[PhotoInfo]:
    """The bundled photos in the order of their names; of one split ("train", "held-out") or, without one, all.

    Raises ValueError for a split that does not exist, FileNotFoundError where the folder has no LICENCES.json.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"no split called {split!r}: choose one of {', '.join(SPLITS)}")
    entries = json.loads((folder / "LICENCES.json").read_text(encoding="utf-8"))
    photos = [_info(entry, folder) for entry in sorted(entries, key=lambda entry: entry["file"])]
    return [photo for photo in photos if split in (None, photo.split)]


def _info(entry: dict, folder: Path) -> PhotoInfo:
    width, height = entry["size"]
    kept = {key: entry[key] for key in ("split", "licence", "credit", "source", "subject")}
    return PhotoInfo(path=folder / entry["file"], width=width, height=height, **kept)
