"""Photos for a run: from wherever they come, in good order, and what cannot be read is told and left out."""

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
from training.data import sources as collecting
from training.data.bundled import bundled
from training.data.sources import CollectError, collect, train_eval_split


def picture(shade: int, side: int = 40) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "photos"
    (made / "more").mkdir(parents=True)
    for place in range(4):
        (made / f"{place}.png").write_bytes(picture(10 * place))
    (made / "more" / "4.png").write_bytes(picture(40))
    (made / "half.jpg").write_bytes(b"\xff\xd8\xff\xe0 no photo")
    (made / "notes.txt").write_text("not asked for")
    return made


def test_the_bundled_photos_come_by_split_at_preview_size() -> None:
    train, held_out = train_eval_split("bundled", "bundled", 200, 0)
    assert len(train.photos) == len(bundled("train"))
    assert len(held_out.photos) == len(bundled("held-out"))
    assert not set(train.names) & set(held_out.names)
    assert max(max(photo.shape) for photo in train.photos) <= PREVIEW_SIDE


def test_a_folder_is_read_whole_and_the_damaged_file_is_told(folder: Path) -> None:
    found = collect(str(folder))
    assert found.names == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert [photo[0, 0, 0] for photo in found.photos] == [0, 10, 20, 30, 40]
    assert len(found.unreadable) == 1
    assert "half.jpg" in found.words() and "5 photos" in found.words()


def test_of_too_many_a_random_part_is_taken_by_seed(folder: Path) -> None:
    one, again, other = (collect(str(folder), limit=2, seed=seed) for seed in (1, 1, 2))
    assert one.names == again.names
    assert len(one.photos) == len(other.photos) == 2
    assert "out of 6" in one.words()
    assert len({tuple(collect(str(folder), limit=2, seed=seed).names) for seed in range(8)}) > 1


def test_ten_thousand_files_are_not_all_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in range(30):
        (tmp_path / f"{place:03}.png").write_bytes(picture(place))
    opened: list[str] = []
    load = collecting.load_photo
    monkeypatch.setattr(collecting, "load_photo", lambda path: (opened.append(str(path)), load(path))[1])
    assert len(collect(str(tmp_path), limit=3).photos) == len(opened) == 3


def test_a_zip_file_is_read_in_place(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, path.relative_to(folder))
        file.writestr("../../outside.png", picture(99))
        file.writestr("__MACOSX/._0.png", b"junk")
    found = collect(str(archive))
    assert sorted(found.names) == ["0.png", "1.png", "2.png", "3.png", "4.png", "outside.png"]
    assert not (tmp_path.parent / "outside.png").exists()
    assert [message.split(":")[0] for message in found.unreadable] == ["half.jpg"]


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "MAX_BYTES", 1_000)
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("big.png", b"\0" * 1_000_000)
        file.writestr("good.png", picture(5))
    found = collect(str(archive))
    assert found.names == ["good.png"]
    assert "big.png" in found.unreadable[0]


@pytest.mark.parametrize("what", ["nothing", "empty", "broken", "text"])
def test_no_photos_is_an_error_that_says_what_to_do(tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    elif what == "broken":
        path.mkdir()
        (path / "a.jpg").write_bytes(b"not a photo")
    elif what == "text":
        path.write_text("not a zip file")
    with pytest.raises(CollectError) as told:
        collect(str(path))
    assert "hoose" in str(told.value)
    assert str(tmp_path) not in str(told.value)


def test_one_set_for_both_is_divided(folder: Path) -> None:
    train, held_out = train_eval_split(str(folder), str(folder), 100, 0)
    assert held_out.names == ["0.png"]
    assert train.names == ["1.png", "2.png", "3.png", "4.png"]
    for path in folder.rglob("*.*"):
        if path.name != "1.png":
            path.unlink()
    with pytest.raises(CollectError, match="One photo"):
        train_eval_split(str(folder), str(folder), 100, 0)


def test_a_dataset_of_the_hub_gives_its_image_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is simulated by a dataset in memory; that it is streamed and cast is the library's own code."""
    features = Features({"label": Value("int64"), "photo": ImageFeature()})
    rows = {"label": [0, 1, 2], "photo": [{"bytes": picture(50 * k), "path": None} for k in range(3)]}
    data = Dataset.from_dict(rows, features=features).to_iterable_dataset()
    monkeypatch.setattr("datasets.load_dataset", lambda name, streaming: {"train": data})
    found = collect("hub:someone/pictures", limit=2)
    assert [photo[0, 0, 0] for photo in found.photos] == [0, 50]
    assert found.names == ["someone-pictures-0", "someone-pictures-1"]


def test_a_dataset_without_images_or_out_of_reach_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Dataset.from_dict({"label": [1]}).to_iterable_dataset()
    monkeypatch.setattr("datasets.load_dataset", lambda name, streaming: {"train": plain})
    with pytest.raises(CollectError, match="no column of images"):
        collect("hub:someone/numbers")

    def away(name: str, streaming: bool) -> None:
        raise ConnectionError("https://hub.example/secret-token")

    monkeypatch.setattr("datasets.load_dataset", away)
    with pytest.raises(CollectError, match="could not be read") as told:
        collect("hub:someone/gone")
    assert "secret" not in str(told.value)


def test_photos_are_re_decoded(tmp_path: Path) -> None:
    """What reaches the trainer are pixels, whatever else was in the file."""
    (tmp_path / "a.png").write_bytes(picture(7) + b"<script>")
    assert isinstance(collect(str(tmp_path)).photos[0], np.ndarray)
