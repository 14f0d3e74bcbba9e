"""Load the photos of a run: bundled photos, a folder, a zip file or a dataset on the Hugging Face Hub."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recipes import PREVIEW_SIDE, PhotoError, load_photo, shrink
from recipes.photo_io import MAX_BYTES
from training.data.bundled import SPLITS, bundled_photos

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif", ".jp2", ".ppm")
MAX_FILES = 10_000
HUB_PREFIX = "hub:"
HELD_OUT_EVERY = 5  # every fifth photo is held out if one set is used for both splits

PhotoFile = tuple[str, Callable[[], np.ndarray]]  # a name, and a function that loads the photo


class PhotoSourceError(Exception):
    """Raised when a source has no usable photos. The message says what to do."""


@dataclass
class PhotoSet:
    """Photos loaded from a source.

    Attributes:
        photos: uint8 RGB, long side at most PREVIEW_SIDE.
        names: One name per photo.
        unreadable: Names and reasons of the files that were skipped.
        available: Number of files in the source.
    """

    photos: list[np.ndarray] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    available: int = 0

    def select(self, keep: Callable[[int], bool]) -> PhotoSet:
        """Return the photos whose index passes a test."""
        indices = [index for index in range(len(self.photos)) if keep(index)]
        photos, names = [self.photos[index] for index in indices], [self.names[index] for index in indices]
        return PhotoSet(photos, names, self.unreadable, self.available)

    def describe(self) -> str:
        """Return a one-line summary: number of photos, and what was skipped."""
        text = f"{len(self.photos)} photos"
        if self.available > len(self.photos) + len(self.unreadable):
            text += f" out of {self.available}"
        if self.unreadable:
            text += f"; {len(self.unreadable)} could not be read, the first: {self.unreadable[0]}"
        return text


def load_photos(source: str, split: str = "train", limit: int = 200, seed: int = 0) -> PhotoSet:
    """Load photos from a source; skip unreadable files.

    Args:
        source: "bundled", a folder, a zip file, or "hub:owner/dataset".
        split: "train" or "held-out"; only used for bundled photos.
        limit: Maximum number of photos. From a larger source, a random sample is taken.
        seed: Seed of the random sample.

    Raises:
        PhotoSourceError: The source has no readable photo.
    """
    files = _list_files(source, split, limit)
    if len(files) > limit:
        files = [files[index] for index in np.random.default_rng(seed).permutation(len(files))]
    photo_set = PhotoSet(available=len(files))
    for name, load in files:
        if len(photo_set.photos) == limit:
            break
        try:
            photo_set.photos.append(shrink(load(), PREVIEW_SIDE))
            photo_set.names.append(name)
        except PhotoError as error:
            photo_set.unreadable.append(f"{name}: {error}")
    if not photo_set.photos:
        first = f" The first: {photo_set.unreadable[0]}" if photo_set.unreadable else ""
        raise PhotoSourceError(
            f"No photo could be read from {_public_name(source)}.{first} Choose photos such as JPEG or PNG."
        )
    return photo_set


def train_eval_split(photos: str, held_out: str, limit: int, seed: int) -> tuple[PhotoSet, PhotoSet]:
    """Load the training photos and the held-out photos. One source for both is divided, without overlap.

    Args:
        photos: Source of the training photos, as for `load_photos`.
        held_out: Source of the held-out photos.
        limit: Maximum number of photos per source.
        seed: Seed of the random samples.

    Raises:
        PhotoSourceError: A source has no readable photo, or a shared source has only one.
    """
    if photos != held_out or photos == "bundled":
        return load_photos(photos, "train", limit, seed), load_photos(held_out, "held-out", limit, seed)
    photo_set = load_photos(photos, limit=limit, seed=seed)
    if len(photo_set.photos) < 2:
        raise PhotoSourceError(
            "One photo is not enough for training and evaluation. Add photos, or choose other held-out photos."
        )
    return (
        photo_set.select(lambda index: index % HELD_OUT_EVERY != 0),
        photo_set.select(lambda index: index % HELD_OUT_EVERY == 0),
    )


def _list_files(source: str, split: str, limit: int) -> list[PhotoFile]:
    if source == "bundled":
        if split not in SPLITS:
            raise PhotoSourceError(f"There is no split {split!r}.")
        return [(photo.path.name, _file_loader(photo.path)) for photo in bundled_photos(split)]
    if source.startswith(HUB_PREFIX):
        return list(_stream_hub_dataset(source.removeprefix(HUB_PREFIX), limit))
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
        return [(file.name, _file_loader(file)) for file in files[:MAX_FILES]]
    if path.is_file() and zipfile.is_zipfile(path):
        return _list_zip(path)
    raise PhotoSourceError(f"{_public_name(source)} is neither a folder of photos nor a zip file. Choose one of these.")


def _file_loader(path: Path) -> Callable[[], np.ndarray]:
    return lambda: load_photo(path)


def _list_zip(path: Path) -> list[PhotoFile]:
    """List the photos in a zip file. They are read from the archive one by one, never extracted to disk."""

    def loader(name: str) -> Callable[[], np.ndarray]:
        def load() -> np.ndarray:
            try:
                with zipfile.ZipFile(path) as archive, archive.open(name) as file:
                    data = file.read(MAX_BYTES + 1)
            except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, EOFError) as error:
                raise PhotoError(f"The file cannot be extracted ({type(error).__name__}).") from None
            if len(data) > MAX_BYTES:
                raise PhotoError(f"The file is larger than {MAX_BYTES // 1_000_000} MB.")
            return load_photo(data)

        return load

    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist()[:MAX_FILES] if not info.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        raise PhotoSourceError(f"{path.name} is damaged ({type(error).__name__}). Create it again.") from None
    photos = [name for name in names if Path(name).suffix.lower() in EXTENSIONS and not Path(name).name.startswith(".")]
    return [(Path(name).name, loader(name)) for name in sorted(photos)]


def _stream_hub_dataset(name: str, limit: int) -> Iterator[PhotoFile]:
    """Yield the first `limit` images of a dataset: the first image column of the first split, streamed."""
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    try:
        splits = load_dataset(name, streaming=True)
        rows: Any = next(iter(splits.values()))
        column = next(key for key, kind in (rows.features or {}).items() if isinstance(kind, ImageFeature))
        rows = rows.cast_column(column, ImageFeature(decode=False))
        for index, row in enumerate(itertools.islice(rows, limit)):
            data = row[column]["bytes"] or Path(row[column]["path"]).read_bytes()
            yield f"{name.replace('/', '-')}-{index}", lambda data=data: load_photo(data)
    except StopIteration:
        raise PhotoSourceError(f"The dataset {name} has no column of images. Choose another one.") from None
    except Exception as error:  # the Hub's libraries raise many types
        raise PhotoSourceError(
            f"The dataset {name} could not be read ({type(error).__name__}). Check its name and the network, and set "
            "HF_TOKEN for a private dataset."
        ) from None


def _public_name(source: str) -> str:
    """Return a source's name for messages, without local paths."""
    return source if source.startswith(HUB_PREFIX) or source == "bundled" else Path(source).name or "this folder"
