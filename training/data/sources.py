"""Photos for a run: the bundled ones, a folder, a zip file or a dataset of the Hub; what cannot be read is left out."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recipes import PREVIEW_SIDE, PhotoError, load_photo, shrink
from recipes.photo_io import MAX_BYTES
from training.data.bundled import SPLITS, bundled

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif", ".jp2", ".ppm")
MAX_FILES = 10_000
HUB = "hub:"
HELD_OUT_OF = 5  # of one set for both, every fifth photo is held out


class CollectError(Exception):
    """There are no photos to work with; the message says what to do."""


@dataclass
class PhotoSet:
    """Photos (uint8 RGB, long side at most PREVIEW_SIDE) with their names, and what was left out and why."""

    photos: list[np.ndarray] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    found: int = 0

    def part(self, keep: Callable[[int], bool]) -> PhotoSet:
        """Those at the places that are kept."""
        places = [place for place in range(len(self.photos)) if keep(place)]
        chosen = [self.photos[place] for place in places], [self.names[place] for place in places]
        return PhotoSet(*chosen, self.unreadable, self.found)

    def words(self) -> str:
        """In a sentence: how many there are, and what is missing."""
        told = f"{len(self.photos)} photos"
        if self.found > len(self.photos) + len(self.unreadable):
            told += f" out of {self.found}"
        if self.unreadable:
            told += f"; {len(self.unreadable)} could not be read, the first: {self.unreadable[0]}"
        return told


Source = tuple[str, Callable[[], np.ndarray]]


def collect(source: str, split: str = "train", limit: int = 200, seed: int = 0) -> PhotoSet:
    """Up to `limit` photos. source: "bundled" (then `split` counts), a folder, a zip file, or "hub:owner/dataset".

    Of more than that, a random part by `seed`. Raises CollectError when there is no readable photo.
    """
    files = _shuffled(_sources(source, split, limit), limit, seed)
    collected = PhotoSet(found=len(files))
    for name, load in files:
        if len(collected.photos) == limit:
            break
        try:
            collected.photos.append(shrink(load(), PREVIEW_SIDE))
            collected.names.append(name)
        except PhotoError as error:
            collected.unreadable.append(f"{name}: {error}")
    if not collected.photos:
        first = f" The first: {collected.unreadable[0]}" if collected.unreadable else ""
        raise CollectError(f"No photo could be read from {_plain(source)}.{first} Choose photos such as JPEG or PNG.")
    return collected


def train_eval_split(photos: str, held_out: str, limit: int, seed: int) -> tuple[PhotoSet, PhotoSet]:
    """The photos to train on and those to judge by. One set for both is divided, so that nothing is in both."""
    if photos != held_out or photos == "bundled":
        return collect(photos, "train", limit, seed), collect(held_out, "held-out", limit, seed)
    everything = collect(photos, limit=limit, seed=seed)
    if len(everything.photos) < 2:
        raise CollectError("One photo cannot be both trained on and judged by. Add more photos, or hold out others.")
    out = HELD_OUT_OF
    return everything.part(lambda place: place % out != 0), everything.part(lambda place: place % out == 0)


def _sources(source: str, split: str, limit: int) -> list[Source]:
    if source == "bundled":
        if split not in SPLITS:
            raise CollectError(f"There is no split {split!r}.")
        return [(info.path.name, _loader(info.path)) for info in bundled(split)]
    if source.startswith(HUB):
        return list(_of_the_hub(source.removeprefix(HUB), limit))
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
        return [(file.name, _loader(file)) for file in files[:MAX_FILES]]
    if path.is_file() and zipfile.is_zipfile(path):
        return _in_zip(path)
    raise CollectError(f"{_plain(source)} is neither a folder of photos nor a zip file. Choose one that is.")


def _shuffled(files: list[Source], limit: int, seed: int) -> list[Source]:
    if len(files) <= limit:
        return files
    order = np.random.default_rng(seed).permutation(len(files))
    return [files[place] for place in order]


def _loader(path: Path) -> Callable[[], np.ndarray]:
    return lambda: load_photo(path)


def _in_zip(path: Path) -> list[Source]:
    """The photos in a zip file, read from it one by one and never unpacked to the disk."""

    def loader(name: str) -> Callable[[], np.ndarray]:
        def load() -> np.ndarray:
            try:
                with zipfile.ZipFile(path) as archive, archive.open(name) as file:
                    data = file.read(MAX_BYTES + 1)
            except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, EOFError) as error:
                raise PhotoError(f"It cannot be unpacked ({type(error).__name__}).") from None
            if len(data) > MAX_BYTES:
                raise PhotoError(f"It is over {MAX_BYTES // 1_000_000} MB.")
            return load_photo(data)

        return load

    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist()[:MAX_FILES] if not info.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        raise CollectError(f"{path.name} is damaged ({type(error).__name__}). Pack it again.") from None
    photos = [name for name in names if Path(name).suffix.lower() in ENDINGS and not Path(name).name.startswith(".")]
    return [(Path(name).name, loader(name)) for name in sorted(photos)]


def _of_the_hub(name: str, limit: int) -> Iterator[Source]:
    """The first image column of a dataset's first split, streamed: no more is fetched than is wanted."""
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    try:
        splits = load_dataset(name, streaming=True)
        rows: Any = next(iter(splits.values()))
        column = next(key for key, kind in (rows.features or {}).items() if isinstance(kind, ImageFeature))
        rows = rows.cast_column(column, ImageFeature(decode=False))
        for place, row in enumerate(_first(rows, limit)):
            data = row[column]["bytes"] or Path(row[column]["path"]).read_bytes()
            yield f"{name.replace('/', '-')}-{place}", lambda data=data: load_photo(data)
    except StopIteration:
        raise CollectError(f"The dataset {name} has no column of images. Choose another one.") from None
    except Exception as error:  # the Hub's libraries raise nearly anything
        raise CollectError(
            f"The dataset {name} could not be read ({type(error).__name__}). Check its name, the network, and for a "
            "private one HF_TOKEN."
        ) from None


def _first(rows: Iterable[Any], count: int) -> Iterator[Any]:
    for place, row in enumerate(rows):
        if place == count:
            return
        yield row


def _plain(source: str) -> str:
    """A source as a person knows it: no path of the machine."""
    return source if source.startswith(HUB) or source == "bundled" else Path(source).name or "this folder"
