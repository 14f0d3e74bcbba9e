"""What may be uploaded: the photo itself, or words on what to do; never an exception of a decoder."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from gradio.data_classes import ImageData
from PIL import Image

from ui.playground.photo import photo_input, read_photo
from ui.playground.tab import check_photo


def bomb() -> bytes:
    """A PNG that says it has 30,000 by 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def jpeg(photo: np.ndarray, tmp_path: Path) -> bytes:
    Image.fromarray(photo).save(tmp_path / "whole.jpg")
    return (tmp_path / "whole.jpg").read_bytes()


BAD = {
    "text.jpg": b"I am no photo at all.",
    "empty.png": b"",
    "vector.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
    "bomb.png": bomb(),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_words(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(BAD[name])
    with pytest.raises(gr.Error) as refused:
        read_photo(str(path))
    assert len(refused.value.message) > 20 and "<" not in refused.value.message
    assert str(tmp_path) not in refused.value.message


def test_a_truncated_photo_is_refused_or_read(photo: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    path.write_bytes(jpeg(photo, tmp_path)[:400])
    with pytest.raises(gr.Error):
        read_photo(str(path))


@pytest.mark.parametrize("path", [None, "", "/nowhere/photo.jpg"])
def test_no_photo_is_said_to_be_missing(path: str | None) -> None:
    with pytest.raises(gr.Error, match=r"sample|again|opened"):
        read_photo(path)


def test_a_good_upload_is_kept_and_is_no_sample(photo: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    assert check_photo(str(path)) == (str(path), "")
    assert np.array_equal(read_photo(str(path)), photo)


def test_what_no_browser_shows_becomes_a_png(photo: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(photo).save(tmp_path / "scan.tiff")
    shown, sample = check_photo(str(tmp_path / "scan.tiff"))
    assert shown is not None and Path(shown).name == "scan.png" and sample == ""
    assert np.array_equal(read_photo(shown), photo)


def test_a_bad_upload_is_cleared_and_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr(gr, "Warning", lambda message, **settings: said.append(message))
    (tmp_path / "text.jpg").write_bytes(BAD["text.jpg"])
    assert check_photo(str(tmp_path / "text.jpg")) == (None, "")
    assert len(said) == 1


def test_the_component_does_not_open_the_file(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_bytes(BAD["text.jpg"])
    payload = ImageData(path=str(tmp_path / "text.jpg"), orig_name="text.jpg")
    assert photo_input().preprocess(payload) == str(tmp_path / "text.jpg")
    assert photo_input().preprocess(None) is None
