"""Uploaded photos: how they are stored, what is refused, and when they are deleted."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from tests.support.runs import make_config
from training.data import uploads
from training.data.bundled import bundled_photos
from training.runs.run import RunError, RunStore


@pytest.fixture
def runs(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "data" / "runs")


def write_photo(folder: Path, name: str) -> Path:
    """Copy a bundled photo under another name."""
    path = folder / name
    path.write_bytes(bundled_photos()[0].path.read_bytes())
    return path


def write_zip(folder: Path, names: list[str]) -> Path:
    path = folder / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return path


def test_photos_are_stored_under_sanitised_names(runs: RunStore, tmp_path: Path) -> None:
    files = [write_photo(tmp_path, name) for name in ("a b.JPG", "; rm -rf.png", "notes.jpeg")]
    (tmp_path / "notes.txt").write_text("no photo")
    folder = Path(uploads.save_photos(runs, [*files, tmp_path / "notes.txt"]))
    assert folder.parent == uploads.uploads_folder(runs)
    assert sorted(file.name for file in folder.iterdir()) == ["0000-a-b.jpg", "0001--rm--rf.png", "0002-notes.jpeg"]
    assert (folder / "0000-a-b.jpg").read_bytes() == files[0].read_bytes()


def test_zip_file_is_stored_unchanged(runs: RunStore, tmp_path: Path) -> None:
    upload = write_zip(tmp_path, ["in/one.jpg", "two.txt"])
    stored = Path(uploads.save_photos(runs, [upload]))
    assert stored.suffix == ".zip" and stored.read_bytes() == upload.read_bytes()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "Choose photos"),
        (["notes.txt"], "None of these files is a photo"),
        (["empty.zip"], "no photo in this zip"),
        (["broken.zip"], "cannot be read"),
        (["photos.zip", "one.jpg"], "not both"),
    ],
)
def test_files_without_photos_are_refused(runs: RunStore, tmp_path: Path, names: list[str], message: str) -> None:
    write_zip(tmp_path, ["readme.txt"]).rename(tmp_path / "empty.zip")
    write_zip(tmp_path, ["one.jpg"])
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "notes.txt").write_text("no photo")
    write_photo(tmp_path, "one.jpg")
    with pytest.raises(RunError, match=message):
        uploads.save_photos(runs, [tmp_path / name for name in names])
    assert not uploads.uploads_folder(runs).exists()


def test_uploads_over_a_limit_are_refused(runs: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write_photo(tmp_path, f"{index}.jpg") for index in range(3)]
    monkeypatch.setattr(uploads, "MAX_PHOTOS", 2)
    monkeypatch.setattr(uploads, "MAX_FILES", 2)
    with pytest.raises(RunError, match="at most 2 photos; these are 3"):
        uploads.save_photos(runs, files)
    with pytest.raises(RunError, match="the limit is 2"):
        uploads.save_photos(runs, [write_zip(tmp_path, ["1.jpg", "2.jpg", "3.jpg"])])
    monkeypatch.setattr(uploads, "MAX_EXTRACTED_BYTES", 1)
    with pytest.raises(RunError, match="unpacks to more"):
        uploads.save_photos(runs, [write_zip(tmp_path, ["1.jpg", "2.jpg"])])
    monkeypatch.setattr(uploads, "MAX_UPLOAD_BYTES", os.path.getsize(files[0]) - 1)
    with pytest.raises(RunError, match="fewer or smaller"):
        uploads.save_photos(runs, files[:1])


def test_upload_is_deleted_with_the_last_run_that_uses_it(runs: RunStore, tmp_path: Path) -> None:
    upload = uploads.save_photos(runs, [write_photo(tmp_path, "one.jpg")])
    first, second = (runs.create(make_config(photos=upload)) for _ in range(2))
    runs.delete(first.id)
    uploads.delete_unused(runs, upload)
    assert Path(upload).is_dir()
    runs.delete(second.id)
    uploads.delete_unused(runs, upload)
    assert not Path(upload).exists()


def test_only_uploads_are_deleted(runs: RunStore, tmp_path: Path) -> None:
    photo = write_photo(tmp_path, "mine.jpg")
    for source in (str(tmp_path), str(photo), "bundled", "hub:owner/name", str(uploads.uploads_folder(runs))):
        uploads.delete_unused(runs, source)
    assert photo.is_file()


def test_description_of_a_source_contains_no_path(runs: RunStore, tmp_path: Path) -> None:
    upload = uploads.save_photos(runs, [write_photo(tmp_path, "one.jpg")])
    assert uploads.describe_source(runs, upload) == "uploaded photos"
    assert uploads.describe_source(runs, str(tmp_path)) == "a folder of photos"
    assert uploads.describe_source(runs, "bundled") == "bundled photos"
    assert uploads.describe_source(runs, "hub:owner/name") == "Hub dataset owner/name"
