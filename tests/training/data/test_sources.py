"""Photo sources: order, sampling, splits and errors of folders, zip files and Hub datasets."""

from __future__ import annotations

import io
import os
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from datasets import Audio, Features, Sequence, Value
from datasets import Image as ImageFeature
from PIL import Image
from pyarrow import parquet

from recipes import PREVIEW_SIDE, load_photo, photo_io
from tests.support.hub_server import TOKEN, HubServer
from training.data import sources
from training.data.bundled import bundled_photos
from training.data.sources import PhotoSourceError, load_photos, train_eval_split

ROWS_PER_GROUP = 4


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


def publish(hub: HubServer, rows: dict[str, list[Any]], features: Features, name: str = "train-0.parquet") -> None:
    """Store a Parquet file of a dataset on the simulated Hub, written as the datasets library writes it."""
    (hub.files / "data").mkdir(exist_ok=True)
    schema = features.arrow_schema
    columns = [pyarrow.array(values, type=schema.field(key).type) for key, values in rows.items()]
    table = pyarrow.Table.from_arrays(columns, schema=schema)
    parquet.write_table(table, hub.files / "data" / name, row_group_size=ROWS_PER_GROUP)


def test_hub_dataset_yields_its_image_column(hub: HubServer) -> None:
    features = Features({"label": Value("int64"), "photo": ImageFeature()})
    rows = {"label": [0, 1, 2], "photo": [{"bytes": png(50 * k), "path": None} for k in range(3)]}
    publish(hub, rows, features, "test-0.parquet")
    publish(hub, rows | {"photo": rows["photo"][::-1]}, features)
    photo_set = load_photos("hub:someone/pictures", limit=2)
    assert [photo[0, 0, 0] for photo in photo_set.photos] == [100, 50], "the training split comes first"
    assert photo_set.names == ["someone-pictures-0", "someone-pictures-1"]
    assert photo_set.available == 2
    assert any("/resolve/" in path for path in hub.paths)


def test_hub_dataset_never_opens_a_path_or_an_address(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows name this machine's files and servers, in the column of images and in all others."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(200))
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)  # opening it would block for ever
    address = f"{hub.address}/internal.png"
    names = ["/dev/zero", "/etc/passwd", str(secret), f"file://{secret}", str(pipe), address, f"zip://a::{address}"]
    images: list[Any] = [{"bytes": None, "path": name} for name in names]
    images += [None, {"bytes": b"", "path": str(secret)}, {"bytes": png(70), "path": str(secret)}]
    others = [{"bytes": None, "path": names[index % len(names)]} for index in range(len(images))]
    features = Features(
        {
            "photo": ImageFeature(),
            "second": ImageFeature(),
            "sound": Audio(),
            "nested": Sequence(ImageFeature()),
            "url": Value("string"),
        }
    )
    columns = {"photo": images, "second": others, "sound": others, "nested": [[row] for row in others]}
    publish(hub, columns | {"url": [row["path"] for row in others]}, features)
    opened: list[str] = []
    monkeypatch.setattr(sources, "load_photo", lambda data: (opened.append(type(data).__name__), load_photo(data))[1])
    photo_set = load_photos("hub:someone/pictures")
    assert [photo[0, 0, 0] for photo in photo_set.photos] == [70]
    assert photo_set.names == ["someone-pictures-9"]
    assert set(opened) == {"bytes"}
    assert "9 could not be read" in photo_set.describe() and "only a path or an address" in photo_set.describe()
    assert not any(str(tmp_path) in message or "/etc" in message for message in photo_set.unreadable)
    assert "/internal.png" not in hub.paths


def test_loading_instructions_of_a_hub_dataset_are_ignored(hub: HubServer, tmp_path: Path) -> None:
    """The card of a dataset may name files anywhere; the datasets library would read them."""
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "secret.png").write_bytes(png(200))
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {tmp_path}/local/*.png\n---\n"
    (hub.files / "README.md").write_text(card)
    publish(hub, {"photo": [{"bytes": png(60), "path": None}]}, Features({"photo": ImageFeature()}))
    assert [photo[0, 0, 0] for photo in load_photos("hub:someone/pictures").photos] == [60]
    assert not any("README" in path for path in hub.paths)


def test_large_rows_of_a_hub_dataset_are_skipped_one_at_a_time(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photo_io, "MAX_BYTES", 100_000)
    size = 1_000_000
    noise = np.random.default_rng(0).bytes(size)
    rows: list[Any] = [{"bytes": noise[index:] + noise[:index], "path": None} for index in range(40)]
    bomb = io.BytesIO()
    Image.new("1", (8_000, 7_000)).save(bomb, "PNG")  # a small file of 56 megapixels
    rows += [{"bytes": bomb.getvalue(), "path": None}, {"bytes": png(80), "path": None}]
    features = Features({"photo": ImageFeature()})
    publish(hub, {"photo": rows}, features)
    default = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(default)  # with a peak of its own
    pyarrow.set_memory_pool(pool)
    tracemalloc.start()
    try:
        photo_set = load_photos("hub:someone/pictures")
        peak = tracemalloc.get_traced_memory()[1] + (pool.max_memory() or 0)
    finally:
        tracemalloc.stop()
        pyarrow.set_memory_pool(default)
    assert [photo[0, 0, 0] for photo in photo_set.photos] == [80]
    assert len(photo_set.unreadable) == 41
    assert any("megapixels" in message for message in photo_set.unreadable)
    assert size < peak < 40 * size
    monkeypatch.setattr(sources, "MAX_ROW_GROUP_BYTES", size)
    with pytest.raises(PhotoSourceError, match="smaller row groups"):
        load_photos("hub:someone/pictures")


@pytest.mark.parametrize(
    ("rows", "features"),
    [
        ({"label": [1]}, Features({"label": Value("int64")})),
        ({"url": ["https://example.com/a.png"]}, Features({"url": Value("string")})),
        ({"sound": [{"bytes": b"x", "path": "a.wav"}]}, Features({"sound": Audio()})),
    ],
)
def test_hub_dataset_without_images_raises(hub: HubServer, rows: dict[str, Any], features: Features) -> None:
    publish(hub, rows, features)
    with pytest.raises(PhotoSourceError, match="no column of images"):
        load_photos("hub:someone/numbers")


def test_hub_dataset_of_links_only_raises(hub: HubServer) -> None:
    publish(hub, {"photo": [{"bytes": None, "path": "/etc/passwd"}]}, Features({"photo": ImageFeature()}))
    with pytest.raises(PhotoSourceError, match="only a path or an address"):
        load_photos("hub:someone/links")


def test_missing_or_unreachable_hub_dataset_raises(hub: HubServer) -> None:
    with pytest.raises(PhotoSourceError, match="no Parquet files"):
        load_photos("hub:someone/empty")
    hub.refuse = {"/api/datasets": 401}  # the simulated Hub's error contains the token
    with pytest.raises(PhotoSourceError, match="could not be read") as raised:
        load_photos("hub:someone/gone")
    assert TOKEN not in str(raised.value)


def test_photos_are_decoded_to_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(7) + b"<script>")
    assert isinstance(load_photos(str(tmp_path)).photos[0], np.ndarray)
