"""Photos of pre-training: folders with weights, held-out photos refused, sources listed."""

import argparse
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from recipes import Recipe, load_photo, render, save_picture, shrink
from training.data.bundled import bundled_photos
from training.pretrain import __main__ as command
from training.pretrain.photos import (
    PretrainPhotos,
    PretrainPhotosError,
    difference_hash,
    load_training_photos,
    prominence,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two usable photos in a folder below, with a second copy, held-out photos, and files that cannot be used."""
    folder = tmp_path / "scenes"
    (folder / "below").mkdir(parents=True)
    train, held_out = bundled_photos("train"), bundled_photos("held-out")
    for index in (0, 1):
        shutil.copy(train[index].path, folder / "below" / f"{index}.jpg")
    shutil.copy(train[0].path, folder / "copy.jpg")
    shutil.copy(held_out[3].path, folder / "held-out.jpg")
    smaller = shrink(load_photo(held_out[5].path), 300)
    save_picture(smaller, Recipe(exposure=10), folder / "held-out-edited.png")
    save_picture(cv2.GaussianBlur(load_photo(train[2].path), (0, 0), 6), Recipe(), folder / "soft.png")
    (folder / "broken.jpg").write_bytes(b"no photo")
    (folder / "notes.txt").write_text("no photo", encoding="utf-8")
    return folder


def test_folders_are_listed_without_held_out_copies_and_unusable_photos(folder: Path) -> None:
    photos = load_training_photos([(folder, 0.5)])
    assert [file.name for file in photos.sources[0].files] == ["0.jpg", "1.jpg"]
    bundled, source = json.loads(json.dumps(photos.describe()))
    assert bundled["name"] == "bundled" and len(bundled["files"]) == bundled["photos"] == len(bundled_photos("train"))
    assert source["name"] == "scenes" and source["weight"] == 0.5 and source["photos"] == 2
    assert list(source["files"]) == ["below/0.jpg", "below/1.jpg"]
    assert source["files"]["below/0.jpg"] == bundled["files"][bundled_photos("train")[0].path.name]
    assert source["skipped"] == {"a second copy": 1, "held out": 2, "not readable": 1, "soft": 1}
    assert str(folder.parent) not in json.dumps(photos.describe())


def test_photos_are_drawn_by_weight_and_read_when_drawn(folder: Path) -> None:
    photos = load_training_photos([(folder, 0.5)])
    bundled = len(photos.bundled)
    assert len(photos) == bundled + 2
    assert photos.probabilities[bundled:].sum() == pytest.approx(1 / 3)
    drawn = [photos.draw(np.random.default_rng(seed)) for seed in range(60)]
    from_folder = sum(not any(photo is other for other in photos.bundled) for photo in drawn)
    assert 8 <= from_folder <= 34
    assert np.array_equal(photos[bundled], load_photo(folder / "below" / "0.jpg"))


def test_the_digest_depends_on_folders_and_weights(folder: Path) -> None:
    assert load_training_photos().digest() == ""
    digests = {load_training_photos([(folder, weight)]).digest() for weight in (0.5, 0.5, 1.0)}
    assert len(digests) == 2


def test_without_folders_every_bundled_photo_is_equally_likely() -> None:
    photos = PretrainPhotos([np.full((2, 2, 3), value, np.uint8) for value in range(4)])
    drawn = [int(photos.draw(np.random.default_rng(seed))[0, 0, 0]) for seed in range(80)]
    assert set(drawn) == {0, 1, 2, 3}


def test_a_folder_without_usable_photos_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PretrainPhotosError, match="no usable photo"):
        load_training_photos([(tmp_path, 1.0)])


def test_copies_share_their_difference_hash() -> None:
    first, second = (load_photo(info.path) for info in bundled_photos("held-out")[3:5])
    copy = render(shrink(first, 200), Recipe(contrast=20, warmth=30))
    assert (difference_hash(first) != difference_hash(copy)).sum() <= 6
    assert (difference_hash(first) != difference_hash(second)).sum() > 6


def test_prominence_is_zero_without_a_subject() -> None:
    plain = np.full((60, 80, 3), 90, np.uint8)
    with_subject = plain.copy()
    with_subject[20:40, 30:50] = (200, 40, 40)
    assert prominence(plain) == 0
    assert prominence(with_subject) > 1.5


def test_command_line_folders_have_weights(tmp_path: Path) -> None:
    assert command.folder_and_weight(str(tmp_path)) == (tmp_path, 1.0)
    assert command.folder_and_weight(f"{tmp_path}=0.25") == (tmp_path, 0.25)
    for text in (f"{tmp_path}=0", f"{tmp_path}=many"):
        with pytest.raises(argparse.ArgumentTypeError, match="no positive weight"):
            command.folder_and_weight(text)
