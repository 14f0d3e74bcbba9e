"""Fixtures for tests of training: a few small photos."""

from pathlib import Path

import numpy as np
import pytest

from recipes import Recipe, load_photo, save_picture, shrink
from training.data.bundled import bundled_photos


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Return three small photos."""
    return [shrink(load_photo(photo.path), 240) for photo in bundled_photos("held-out")[:3]]


@pytest.fixture
def photo_folder(tmp_path: Path, photos: list[np.ndarray]) -> str:
    """Return a folder of three small photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, photo in enumerate(photos):
        save_picture(photo, Recipe(), folder / f"{index}.png")
    return str(folder)
