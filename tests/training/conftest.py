"""What tests of training share: a few small photos."""

from pathlib import Path

import numpy as np
import pytest

from recipes import Recipe, load_photo, save_picture, shrink
from training.data.bundled import bundled


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Three small photos."""
    return [shrink(load_photo(info.path), 240) for info in bundled("held-out")[:3]]


@pytest.fixture
def few(tmp_path: Path, photos: list[np.ndarray]) -> str:
    """A folder of three small photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for place, photo in enumerate(photos):
        save_picture(photo, Recipe(), folder / f"{place}.png")
    return str(folder)
