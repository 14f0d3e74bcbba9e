"""Photos that agents upload and pictures that tools return, each under a random id for a day."""

from __future__ import annotations

import re
import secrets
import threading
import time
from pathlib import Path

import numpy as np

from recipes import PhotoError, data_url_content, encode_jpeg, load_photo, shrink
from storage.files import write_atomically
from ui.playground.samples import SAMPLES

MAX_PIXELS = 24_000_000
MAX_SIDE = 2048  # pixels; larger photos are scaled down
PHOTO_ID = re.compile(r"[0-9a-f]{32}")
KEEP_SECONDS = 24 * 3600.0
MAX_PHOTOS = 300  # the oldest are deleted first
WHAT_A_PHOTO_IS = (
    "A photo is a data URL (data:image/jpeg;base64,...) of a JPEG, PNG or WebP, the id of an uploaded photo "
    "(POST /photos), or the name of a sample: {samples}. Addresses and paths are not read."
)


class PhotoStore:
    """A folder of JPEG files whose names are random ids. The id of a photo is enough to read it."""

    def __init__(self, folder: Path, max_photos: int = MAX_PHOTOS, keep_seconds: float = KEEP_SECONDS) -> None:
        """Create the store.

        Args:
            folder: Folder of the files, created on first use.
            max_photos: Maximum number of files.
            keep_seconds: Time after which a file is deleted.
        """
        self.folder, self.max_photos, self.keep_seconds = folder, max_photos, keep_seconds
        self._lock = threading.Lock()

    def save(self, photo: np.ndarray) -> str:
        """Store a photo as a JPEG and return its id.

        Args:
            photo: RGB image, uint8 [height, width, 3].

        Raises:
            OSError: The file cannot be written.
        """
        data, photo_id = encode_jpeg(shrink(photo, MAX_SIDE)), secrets.token_hex(16)
        with self._lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._delete_old()
            write_atomically(self.folder / f"{photo_id}.jpg", data)
        return photo_id

    def save_upload(self, data: bytes) -> str:
        """Decode an uploaded file and store it; see `save`. Raises PhotoError if it is no usable photo."""
        return self.save(load_photo(data, MAX_PIXELS))

    def path(self, photo_id: str) -> Path | None:
        """Return the file of a photo, or None if there is none under this id."""
        if not PHOTO_ID.fullmatch(photo_id):
            return None
        path = self.folder / f"{photo_id}.jpg"
        try:
            return path if path.stat().st_mtime > time.time() - self.keep_seconds else None
        except OSError:
            return None

    def load(self, photo: str) -> np.ndarray:
        """Load the photo that a tool's caller names.

        Args:
            photo: Data URL, id, or name of a sample.

        Returns:
            RGB image, uint8 [height, width, 3].

        Raises:
            PhotoError: It is none of these, or cannot be read.
        """
        if (data := data_url_content(photo)) is not None:
            return shrink(load_photo(data, MAX_PIXELS), MAX_SIDE)
        sample = SAMPLES.get(photo)
        path = sample.path if sample else self.path(photo)
        if path is None:
            raise PhotoError(WHAT_A_PHOTO_IS.format(samples=", ".join(SAMPLES)))
        try:
            return load_photo(path)
        except OSError:
            raise PhotoError("The photo is no longer available. Upload it again.") from None

    def _delete_old(self) -> None:
        """Delete expired photos, and the oldest if there are too many for one more."""
        files = sorted(self.folder.glob("*.jpg"), key=lambda file: file.stat().st_mtime)
        oldest = time.time() - self.keep_seconds
        for number, file in enumerate(files):
            if file.stat().st_mtime < oldest or len(files) - number >= self.max_photos:
                file.unlink(missing_ok=True)
