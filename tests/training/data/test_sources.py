"""Photo sources: order, sampling, splits and errors of folders, zip files and Hub datasets."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from recipes import PREVIEW_SIDE
from training.data import sources
from training.data.bundled import bundled_photos
from training.data.sources import PhotoSourceError, load_photos, train_eval_split


def png(shade: int, side: int = 40) -> bytes:
    """Return a grey PNG file."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Create a folder with five photos, one of them in a subfolder, a damaged photo and a text file."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for index in range(4):
        (folder / f"{index}.png").write_bytes(png(10 * index))
    (folder / "more" / "4.png").write_bytes(png(40))
    (folder / "half.jpg").write_bytes(b"\xff\xd8\xff\xe0 no photo")
    (folder / "notes.txt").write_text("not a photo")
    return folder


def test_bundled_photos_are_loaded_by_split_at_preview_size() -> None:
    train, held_out = train_eval_split("bundled", "bundled", 200, 0)
    assert len(train.photos) == len(bundled_photos("train"))
    assert len(held_out.photos) == len(bundled_photos("held-out"))
    assert not set(train.names) & set(held_out.names)
    assert max(max(photo.shape) for photo in train.photos) <= PREVIEW_SIDE


def test_folder_is_read_recursively_and_damaged_files_are_reported(folder: Path) -> None:
    photo_set = load_photos(str(folder))
    assert photo_set.names == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert [photo[0, 0, 0] for photo in photo_set.photos] == [0, 10, 20, 30, 40]
    assert len(photo_set.unreadable) == 1
    assert "half.jpg" in photo_set.describe() and "5 photos" in photo_set.describe()


def test_limit_takes_a_random_sample_by_seed(folder: Path) -> None:
    first, repeated, other = (load_photos(str(folder), limit=2, seed=seed) for seed in (1, 1, 2))
    assert first.names == repeated.names
    assert len(first.photos) == len(other.photos) == 2
    assert "out of 6" in first.describe()
    assert len({tuple(load_photos(str(folder), limit=2, seed=seed).names) for seed in range(8)}) > 1


def test_only_as_many_files_as_the_limit_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(30):
        (tmp_path / f"{index:03}.png").write_bytes(png(index))
    opened: list[str] = []
    load = sources.load_photo
    monkeypatch.setattr(sources, "load_photo", lambda path: (opened.append(str(path)), load(path))[1])
    assert len(load_photos(str(tmp_path), limit=3).photos) == len(opened) == 3


def test_zip_file_is_read_without_extracting_to_disk(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, path.relative_to(folder))
        file.writestr("../../outside.png", png(99))
        file.writestr("__MACOSX/._0.png", b"junk")
    photo_set = load_photos(str(archive))
    assert sorted(photo_set.names) == ["0.png", "1.png", "2.png", "3.png", "4.png", "outside.png"]
    assert not (tmp_path.parent / "outside.png").exists()
    assert [message.split(":")[0] for message in photo_set.unreadable] == ["half.jpg"]


def test_zip_bomb_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 1_000)
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("big.png", b"\0" * 1_000_000)
        file.writestr("good.png", png(5))
    photo_set = load_photos(str(archive))
    assert photo_set.names == ["good.png"]
    assert "big.png" in photo_set.unreadable[0]


@pytest.mark.parametrize("kind", ["nothing", "empty", "broken", "text"])
def test_source_without_photos_raises_with_advice_and_without_local_path(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
    elif kind == "broken":
        path.mkdir()
        (path / "a.jpg").write_bytes(b"not a photo")
    elif kind == "text":
        path.write_text("not a zip file")
    with pytest.raises(PhotoSourceError) as raised:
        load_photos(str(path))
    assert "hoose" in str(raised.value)
    assert str(tmp_path) not in str(raised.value)


def test_one_source_for_both_splits_is_divided(folder: Path) -> None:
    train, held_out = train_eval_split(str(folder), str(folder), 100, 0)
    assert held_out.names == ["0.png"]
    assert train.names == ["1.png", "2.png", "3.png", "4.png"]
    for path in folder.rglob("*.*"):
        if path.name != "1.png":
            path.unlink()
    with pytest.raises(PhotoSourceError, match="One photo"):
        train_eval_split(str(folder), str(folder), 100, 0)


def test_hub_dataset_yields_its_image_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset in memory replaces the Hub; streaming and casting are the library's own code."""
    features = Features({"label": Value("int64"), "photo": ImageFeature()})
    rows = {"label": [0, 1, 2], "photo": [{"bytes": png(50 * k), "path": None} for k in range(3)]}
    data = Dataset.from_dict(rows, features=features).to_iterable_dataset()
    monkeypatch.setattr("datasets.load_dataset", lambda name, streaming: {"train": data})
    photo_set = load_photos("hub:someone/pictures", limit=2)
    assert [photo[0, 0, 0] for photo in photo_set.photos] == [0, 50]
    assert photo_set.names == ["someone-pictures-0", "someone-pictures-1"]


def test_hub_dataset_without_images_or_unreachable_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = Dataset.from_dict({"label": [1]}).to_iterable_dataset()
    monkeypatch.setattr("datasets.load_dataset", lambda name, streaming: {"train": numbers})
    with pytest.raises(PhotoSourceError, match="no column of images"):
        load_photos("hub:someone/numbers")

    def unreachable(name: str, streaming: bool) -> None:
        raise ConnectionError("https://hub.example/secret-token")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(PhotoSourceError, match="could not be read") as raised:
        load_photos("hub:someone/gone")
    assert "secret" not in str(raised.value)


def test_photos_are_decoded_to_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(7) + b"<script>")
    assert isinstance(load_photos(str(tmp_path)).photos[0], np.ndarray)
