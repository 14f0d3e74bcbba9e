"""The photos of pre-training: the bundled ones and any number of folders, drawn with weights and read when needed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from recipes import PhotoError, load_photo, shrink
from training.data.bundled import bundled_photos
from training.data.sources import photo_files
from training.pretrain import image_facts

MIN_SHARPNESS = 0.6  # of a photo at its own size: in a soft photo, the blur of a lesson cannot be seen
MIN_PROMINENCE = 1.5  # standard deviations between the main subject and the rest
PLAIN = 0.5  # CIELAB units: standard deviation of the saliency of a photo without anything to find
SIDE = 400  # px: long side at which the sharpness is measured
HASH_DIGITS = 16  # of the SHA-256 of each file in the list of sources
SAME_PHOTO_BITS = 6  # of the 64 bits of `difference_hash` that two copies of a photo may differ in
_HASH_CELLS = 8


class PretrainPhotosError(Exception):
    """Raised if a folder has no usable photo. The message says what to do."""


@dataclass
class Source:
    """A folder of photos.

    Attributes:
        folder: The folder.
        weight: How often its photos are drawn, relative to the bundled ones with weight 1.
        files: The photos used.
        sha256: The first digits of the hash of each of them.
        skipped: Number of files by the reason why they are not used.
    """

    folder: Path
    weight: float
    files: list[Path] = field(default_factory=list)
    sha256: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def describe(self) -> dict[str, Any]:
        """Return what `sources.json` says about the folder; files with the first digits of their SHA-256."""
        return {
            "name": self.folder.name,
            "weight": self.weight,
            "photos": len(self.files),
            "skipped": dict(sorted(self.skipped.items())),
            "files": {
                str(file.relative_to(self.folder)): digest for file, digest in zip(self.files, self.sha256, strict=True)
            },
        }


class PretrainPhotos(Sequence[np.ndarray]):
    """The training photos, uint8 [H, W, 3] RGB each. Those of folders are read when they are drawn.

    Attributes:
        bundled: The bundled photos, in memory, those of the smaller sources three times to balance the sources.
        sources: The folders.
        probabilities: The probability of each photo: float [N].
    """

    def __init__(self, bundled: Sequence[np.ndarray], sources: Sequence[Source] = ()) -> None:
        self.bundled, self.sources = bundled, sources
        self._files = [file for source in sources for file in source.files]
        shares = [(1.0, len(bundled)), *((source.weight, len(source.files)) for source in sources)]
        weights = np.concatenate([np.full(count, weight / count) for weight, count in shares])
        self.probabilities = weights / weights.sum()
        self._cumulative = np.cumsum(self.probabilities)

    def __len__(self) -> int:
        return len(self.bundled) + len(self._files)

    def __getitem__(self, index: Any) -> Any:
        return self.bundled[index] if index < len(self.bundled) else load_photo(self._files[index - len(self.bundled)])

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a photo at random."""
        if not self._files:
            return self.bundled[int(rng.integers(len(self.bundled)))]
        return self[min(int(np.searchsorted(self._cumulative, rng.random())), len(self) - 1)]

    def digest(self) -> str:
        """Return a hash of the folders' weights and photos, "" without folders: a run cannot continue with others."""
        if not self.sources:
            return ""
        return hashlib.sha256(repr([(s.weight, s.sha256) for s in self.sources]).encode()).hexdigest()[:HASH_DIGITS]

    def describe(self) -> list[dict[str, Any]]:
        """Return the content of `sources.json`: name, weight, count and files of the bundled photos and each folder."""
        files = [info.path for info in bundled_photos("train")]
        hashes = {file.name: _sha256(file.read_bytes()) for file in files}
        bundled = {"name": "bundled", "weight": 1.0, "photos": len(files), "files": hashes}
        return [bundled, *(source.describe() for source in self.sources)]


def load_training_photos(folders: Sequence[tuple[Path, float]] = ()) -> PretrainPhotos:
    """Load the bundled train split and list the photos of folders.

    A photo of a folder is not used if it is a copy of a held-out photo, soft, without a prominent subject, twice there,
    or not readable.

    Args:
        folders: Folder and weight of each source beside the bundled photos.

    Raises:
        PretrainPhotosError: A folder has no usable photo.
    """
    infos = bundled_photos("train")
    largest = Counter(info.source for info in infos).most_common(1)[0][0]
    photos = [(load_photo(info.path), 1 if info.source == largest else 3) for info in infos]
    bundled = [photo for photo, repeats in photos for _ in range(repeats)]
    held_out = [info.path.read_bytes() for info in bundled_photos("held-out")] if folders else []
    hashes = {_sha256(data) for data in held_out}
    copies = np.array([difference_hash(load_photo(data)) for data in held_out])
    return PretrainPhotos(bundled, [_list_source(folder, weight, hashes, copies) for folder, weight in folders])


def _list_source(folder: Path, weight: float, held_out: set[str], copies: np.ndarray) -> Source:
    """Check every photo of a folder. Raises PretrainPhotosError if none can be used.

    Args:
        folder: The folder.
        weight: Its weight.
        held_out: Hashes of the held-out photos.
        copies: Their difference hashes, bool [N, 64].
    """
    source = Source(folder, weight)
    for file in tqdm(photo_files(folder), f"checking {folder.name}", mininterval=5):
        data = file.read_bytes()
        digest = _sha256(data)
        if digest in source.sha256:
            source.skipped["a second copy"] += 1
        elif reason := "held out" if digest in held_out else _reason_to_skip(data, copies):
            source.skipped[reason] += 1
        else:
            source.files.append(file)
            source.sha256.append(digest)
    if not source.files:
        raise PretrainPhotosError(f"{folder} has no usable photo: {dict(source.skipped) or 'no files'}.")
    return source


def _reason_to_skip(data: bytes, held_out: np.ndarray) -> str:
    """Return why a file is not used, "" if it is. `held_out` are the difference hashes [N, 64] of held-out photos."""
    try:
        photo = load_photo(data)
    except PhotoError:
        return "not readable"
    if is_copy(difference_hash(photo), held_out):
        return "held out"
    if image_facts.sharpness(image_facts.to_lab(shrink(photo, SIDE))[..., 0]) < MIN_SHARPNESS:
        return "soft"
    return "no subject" if prominence(photo) < MIN_PROMINENCE else ""


def prominence(photo: np.ndarray) -> float:
    """Return how far the main subject of a photo (uint8 RGB) stands out, in standard deviations of the saliency."""
    area = image_facts.areas(photo, ("main subject",))["main subject"]
    left, top, right, bottom = (round(edge * image_facts.AREA_GRID) for edge in area.box)
    inside = np.zeros(area.level.shape, bool)
    inside[top:bottom, left:right] = True
    if inside.all() or area.level.std() < PLAIN:
        return 0.0
    return float((area.level[inside].mean() - area.level[~inside].mean()) / area.level.std())


def difference_hash(photo: np.ndarray) -> np.ndarray:
    """Return 64 bits, bool [64], that resized and compressed copies of a photo (uint8 RGB) share.

    Each bit says which of two neighbours on a grid of 8 by 9 cells is lighter.
    """
    grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_HASH_CELLS + 1, _HASH_CELLS), interpolation=cv2.INTER_AREA).astype(int)
    return (small[:, 1:] > small[:, :-1]).ravel()


def is_copy(digest: np.ndarray, others: np.ndarray) -> bool:
    """Return whether a difference hash [64] is that of a copy of one of the photos with the hashes `others` [N, 64]."""
    return bool(((digest != others).sum(1) <= SAME_PHOTO_BITS).any())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:HASH_DIGITS]
