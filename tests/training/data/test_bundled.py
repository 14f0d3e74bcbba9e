"""The bundled photos: files and licence entries agree, and the splits are disjoint."""

import pytest
from PIL import Image

from training.data.bundled import PHOTO_FOLDER, SPLITS, bundled_photos


def test_files_and_licence_entries_agree() -> None:
    assert {photo.path for photo in bundled_photos()} == set(PHOTO_FOLDER.glob("*.jpg"))


def test_every_photo_has_licence_credit_source_and_subject() -> None:
    for photo in bundled_photos():
        assert photo.licence and photo.credit and photo.source and photo.subject, photo.path.name


def test_files_have_the_listed_size_and_no_metadata() -> None:
    for photo in bundled_photos():
        with Image.open(photo.path) as image:
            image.load()
            assert image.size == (photo.width, photo.height), photo.path.name
            assert (image.format, image.mode) == ("JPEG", "RGB"), photo.path.name
            assert max(image.size) <= 640, photo.path.name
            assert not image.getexif() and "icc_profile" not in image.info, photo.path.name


def test_splits_share_no_source_and_cover_all_photos() -> None:
    train, held_out = (bundled_photos(split) for split in SPLITS)
    assert not {photo.source for photo in train} & {photo.source for photo in held_out}
    assert len(train) + len(held_out) == len(bundled_photos())
    assert len(held_out) >= 15


def test_total_size_is_small_enough_for_the_repository() -> None:
    assert sum(photo.path.stat().st_size for photo in bundled_photos()) < 8_500_000


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="held-out"):
        bundled_photos("test")
