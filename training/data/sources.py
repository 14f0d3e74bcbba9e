"""Load the photos of a run: bundled photos, a folder, a zip file or a dataset on the Hugging Face Hub."""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recipes import PREVIEW_SIDE, PhotoError, load_photo, shrink
from recipes.photo_io import MAX_BYTES
from training.data.bundled import SPLITS, bundled_photos
from training.pretrain.degradation import random_degradation

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif", ".jp2", ".ppm")
MAX_FILES = 10_000
HUB_PREFIX = "hub:"
HUB_REVISIONS = ("main", "refs/convert/parquet")  # where a dataset's Parquet files are; the second is made by the Hub
HUB_BLOCK_BYTES = 2**20  # per request to the Hub
MAX_ROW_GROUP_BYTES = 1_000_000_000  # of images; Parquet is read in units of up to a row group
FLAWED_EVERY = 2  # every second training photo is degraded
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
    """Load photos from a source; skip unreadable files. One file at a time is in memory.

    Args:
        source: "bundled", a folder, a zip file, or "hub:owner/dataset".
        split: "train" or "held-out"; only used for bundled photos.
        limit: Maximum number of photos. From a larger source, a random sample is taken.
        seed: Seed of the random sample.

    Raises:
        PhotoSourceError: The source has no readable photo.
    """
    photo_set = PhotoSet()
    for name, photo in stream_photos(source, split, limit, seed, photo_set):
        photo_set.photos.append(photo)
        photo_set.names.append(name)
    return photo_set


def stream_photos(
    source: str, split: str, limit: int, seed: int, report: PhotoSet, hub_token: bool | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the photo (uint8 RGB) of each readable photo of a source, one at a time.

    Args:
        source: As for `load_photos`, like the other arguments.
        split: "train" or "held-out".
        limit: Maximum number of photos.
        seed: Seed of the random sample.
        report: Receives `unreadable` and `available`.
        hub_token: False keeps the token of this machine from a Hub dataset, so that only public ones can be read.

    Raises:
        PhotoSourceError: The source has no readable photo.
    """
    if source.startswith(HUB_PREFIX):
        files = itertools.islice(_stream_hub_dataset(source.removeprefix(HUB_PREFIX), hub_token), limit)
    else:
        files = _list_files(source, split)
        report.available = len(files)
        if len(files) > limit:
            files = [files[index] for index in np.random.default_rng(seed).permutation(len(files))]
    count = 0
    for name, load in files:
        if count == limit:
            break
        try:
            photo = shrink(load(), PREVIEW_SIDE)
        except PhotoError as error:
            report.unreadable.append(f"{name}: {error}")
            continue
        count += 1
        yield name, photo
    report.available = max(report.available, count + len(report.unreadable))
    if not count:
        first = f" The first: {report.unreadable[0]}" if report.unreadable else ""
        raise PhotoSourceError(
            f"No photo could be read from {_public_name(source)}.{first} Choose photos such as JPEG or PNG."
        )


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


def degrade(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Degrade a photo (uint8 RGB) at random: in light, contrast, colours, focus, or by a border."""
    return shrink(random_degradation(photo, rng, probability=1.0).degraded, PREVIEW_SIDE)


def mix_flawed(photo_set: PhotoSet, seed: int) -> PhotoSet:
    """Return the photos with every second one degraded at random; see `degrade`.

    A policy that sees only good photos learns to leave them alone; flawed ones show that an edit depends on the photo.

    Args:
        photo_set: Training photos.
        seed: Seed of the degradations.
    """
    rng = np.random.default_rng(seed)
    photos = [photo if index % FLAWED_EVERY else degrade(photo, rng) for index, photo in enumerate(photo_set.photos)]
    return PhotoSet(photos, photo_set.names, photo_set.unreadable, photo_set.available)


def _list_files(source: str, split: str) -> list[PhotoFile]:
    if source == "bundled":
        if split not in SPLITS:
            raise PhotoSourceError(f"There is no split {split!r}.")
        return [(photo.path.name, _file_loader(photo.path)) for photo in bundled_photos(split)]
    path = Path(source).expanduser()
    if path.is_dir():
        return [(file.name, _file_loader(file)) for file in photo_files(path)[:MAX_FILES]]
    if path.is_file() and zipfile.is_zipfile(path):
        return _list_zip(path)
    raise PhotoSourceError(f"{_public_name(source)} is neither a folder of photos nor a zip file. Choose one of these.")


def photo_files(folder: Path) -> list[Path]:
    """List the files in a folder, and in those below, whose names end like those of photos, in order."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())


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


def _stream_hub_dataset(name: str, token: bool | None = None) -> Iterator[PhotoFile]:
    """Yield the images in a dataset's Parquet files, in order: the first column of images, row by row.

    Only that column's bytes are read. A row's path or address, other columns and the dataset's own loading instructions
    are ignored, so that a dataset cannot make this process open anything else.
    """
    from huggingface_hub import HfFileSystem

    try:
        hub, number = HfFileSystem(token=token), 0
        for path in _parquet_files(hub, name):
            with hub.open(path, "rb", block_size=HUB_BLOCK_BYTES) as file:
                for data in _parquet_images(file):
                    yield f"{name.replace('/', '-')}-{number}", _bytes_loader(data)
                    number += 1
    except PhotoSourceError:
        raise
    except _NoImagesError:
        raise PhotoSourceError(
            f"The dataset {name} has no column of images. Choose one whose Parquet files contain images."
        ) from None
    except Exception as error:  # the Hub's libraries raise many types
        raise PhotoSourceError(
            f"The dataset {name} could not be read ({type(error).__name__}). Check its name and the network, and set "
            "HF_TOKEN for a private dataset."
        ) from None


class _NoImagesError(Exception):
    """Raised for Parquet data without a column of images."""


def _parquet_files(hub: Any, name: str) -> list[str]:
    """List the Parquet files of a dataset, those for training first. Raises PhotoSourceError if there are none."""
    for revision in HUB_REVISIONS:
        root = f"datasets/{name}@{revision.replace('/', '%2F')}"
        try:
            paths = [path for path in hub.find(root) if path.endswith(".parquet")]
        except FileNotFoundError:
            if revision == HUB_REVISIONS[0]:
                raise
            continue
        if paths:
            return sorted(paths, key=lambda path: ("train" not in path, path))[:MAX_FILES]
    raise PhotoSourceError(
        f"The dataset {name} has no Parquet files. Choose a dataset that contains its images in them."
    )


def _parquet_images(file: Any) -> Iterator[bytes | None]:
    """Yield the images of an open Parquet file, None for a row that does not contain its image.

    Raises:
        PhotoSourceError: A row group is too large.
    """
    from pyarrow import parquet

    table = parquet.ParquetFile(file, buffer_size=HUB_BLOCK_BYTES, pre_buffer=False)
    column, nested = _image_column(table.schema_arrow)
    leaf = f"{column}.bytes" if nested else column
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        chunks = (group.column(index) for index in range(group.num_columns))
        if sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == leaf) > MAX_ROW_GROUP_BYTES:
            limit = MAX_ROW_GROUP_BYTES // 1_000_000
            raise PhotoSourceError(f"The dataset's row groups are over {limit} MB. Choose one with smaller row groups.")
        for batch in table.iter_batches(batch_size=1, row_groups=[number], columns=[leaf]):
            for value in batch.column(column).to_pylist():
                yield value["bytes"] if isinstance(value, dict) else value


def _image_column(schema: Any) -> tuple[str, bool]:
    """Return the first column of images, and whether its bytes are a field of a struct. Raises _NoImagesError."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    for field_ in schema:
        if features and features.get(field_.name, {}).get("_type") != "Image":
            continue
        if is_bytes(field_.type):
            return field_.name, False
        if types.is_struct(field_.type) and any(part.name == "bytes" and is_bytes(part.type) for part in field_.type):
            return field_.name, True
    raise _NoImagesError


def _bytes_loader(data: bytes | None) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        if data is None:
            raise PhotoError("The row contains no image, only a path or an address, which is not opened.")
        return load_photo(data)

    return load


def _public_name(source: str) -> str:
    """Return a source's name for messages, without local paths."""
    return source if source.startswith(HUB_PREFIX) or source == "bundled" else Path(source).name or "this folder"
