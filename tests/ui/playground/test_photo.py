"""Tests of the photo input: an invalid file raises a message for the user, never an exception of a decoder."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from gradio.data_classes import ImageData
from PIL import Image

from tests.support.invalid_photos import INVALID_PHOTOS
from ui.playground.photo import photo_input, read_photo
from ui.playground.tab import photo_changed


@pytest.mark.parametrize("name", INVALID_PHOTOS)
def test_invalid_file_raises_a_message_without_its_path(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(INVALID_PHOTOS[name])
    with pytest.raises(gr.Error) as raised:
        read_photo(str(path))
    assert len(raised.value.message) > 20 and "<" not in raised.value.message
    assert str(tmp_path) not in raised.value.message


def test_truncated_photo_is_refused(photo: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.fromarray(photo).save(path)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(gr.Error):
        read_photo(str(path))


@pytest.mark.parametrize("path", [None, "", "/nowhere/photo.jpg"])
def test_missing_photo_raises_a_message(path: str | None) -> None:
    with pytest.raises(gr.Error, match=r"sample|again|opened"):
        read_photo(path)


def test_valid_upload_is_kept_and_deselects_the_sample(photo: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    assert photo_changed(str(path)) == (str(path), "")
    assert np.array_equal(read_photo(str(path)), photo)


def test_tiff_is_converted_to_png(photo: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(photo).save(tmp_path / "scan.tiff")
    converted, sample = photo_changed(str(tmp_path / "scan.tiff"))
    assert converted is not None and Path(converted).name == "scan.png" and sample == ""
    assert np.array_equal(read_photo(converted), photo)


def test_invalid_upload_is_cleared_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings = []
    monkeypatch.setattr(gr, "Warning", lambda message, **settings: warnings.append(message))
    (tmp_path / "text.jpg").write_bytes(INVALID_PHOTOS["text.jpg"])
    assert photo_changed(str(tmp_path / "text.jpg")) == (None, "")
    assert len(warnings) == 1


def test_component_passes_the_path_without_opening_the_file(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_bytes(INVALID_PHOTOS["text.jpg"])
    payload = ImageData(path=str(tmp_path / "text.jpg"), orig_name="text.jpg")
    assert photo_input().preprocess(payload) == str(tmp_path / "text.jpg")
    assert photo_input().preprocess(None) is None
