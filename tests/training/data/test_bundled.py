"""The bundled photos: every file has its licence, every entry its file, and the splits do not mix."""

import pytest
from PIL import Image

from training.data.bundled import FOLDER, SPLITS, bundled


def test_every_file_is_listed_and_every_entry_has_its_file() -> None:
    assert {photo.path for photo in bundled()} == set(FOLDER.glob("*.jpg"))


def test_every_photo_has_a_licence_a_credit_and_a_subject() -> None:
    for photo in bundled():
        assert photo.licence and photo.credit and photo.source and photo.subject, photo.path.name


def test_the_files_are_what_the_list_says_and_carry_no_metadata() -> None:
    for photo in bundled():
        with Image.open(photo.path) as image:
            image.load()
            assert image.size == (photo.width, photo.height), photo.path.name
            assert (image.format, image.mode) == ("JPEG", "RGB"), photo.path.name
            assert max(image.size) <= 640, photo.path.name
            assert not image.getexif() and "icc_profile" not in image.info, photo.path.name


def test_the_splits_share_no_source_and_make_up_the_whole() -> None:
    train, held_out = (bundled(split) for split in SPLITS)
    assert not {photo.source for photo in train} & {photo.source for photo in held_out}
    assert len(train) + len(held_out) == len(bundled())
    assert len(held_out) >= 15


def test_the_photos_stay_small_enough_for_a_repository() -> None:
    assert sum(photo.path.stat().st_size for photo in bundled()) < 8_500_000


def test_an_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="held-out"):
        bundled("test")
