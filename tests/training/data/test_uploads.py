"""Photos that people bring: what is kept, what is refused in words, when it goes."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from training.data import uploads
from training.data.bundled import bundled
from training.runs.run import RunConfig, RunError, Runs

ASKED = {"base": "moondream-tiny", "reward": {"sharpness": 1.0}, "seed": 7}


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "data" / "runs")


def photo(folder: Path, name: str) -> Path:
    """A bundled photo under another name."""
    path = folder / name
    path.write_bytes(bundled()[0].path.read_bytes())
    return path


def zipped(folder: Path, names: list[str]) -> Path:
    path = folder / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return path


def test_photos_are_kept_under_harmless_names(runs: Runs, tmp_path: Path) -> None:
    files = [photo(tmp_path, name) for name in ("a b.JPG", "; rm -rf.png", "notes.jpeg")]
    (tmp_path / "notes.txt").write_text("no photo")
    kept = Path(uploads.keep(runs, [*files, tmp_path / "notes.txt"]))
    assert kept.parent == uploads.folder_of(runs)
    assert sorted(file.name for file in kept.iterdir()) == ["0000-a-b.jpg", "0001--rm--rf.png", "0002-notes.jpeg"]
    assert (kept / "0000-a-b.jpg").read_bytes() == files[0].read_bytes()


def test_a_zip_is_kept_as_it_is(runs: Runs, tmp_path: Path) -> None:
    kept = Path(uploads.keep(runs, [zipped(tmp_path, ["in/one.jpg", "two.txt"])]))
    assert kept.suffix == ".zip" and zipfile.is_zipfile(kept)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "Choose photos"),
        (["notes.txt"], "None of these files is a photo"),
        (["empty.zip"], "no photo in this zip"),
        (["broken.zip"], "cannot be read"),
        (["photos.zip", "one.jpg"], "not both"),
    ],
)
def test_what_holds_no_photos_is_refused(runs: Runs, tmp_path: Path, names: list[str], words: str) -> None:
    zipped(tmp_path, ["readme.txt"]).rename(tmp_path / "empty.zip")
    zipped(tmp_path, ["one.jpg"])
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "notes.txt").write_text("no photo")
    photo(tmp_path, "one.jpg")
    with pytest.raises(RunError, match=words):
        uploads.keep(runs, [tmp_path / name for name in names])
    assert not uploads.folder_of(runs).exists()


def test_too_many_and_too_large_is_refused(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [photo(tmp_path, f"{place}.jpg") for place in range(3)]
    monkeypatch.setattr(uploads, "MAX_PHOTOS", 2)
    monkeypatch.setattr(uploads, "MAX_FILES", 2)
    with pytest.raises(RunError, match="at most 2 photos; these are 3"):
        uploads.keep(runs, files)
    with pytest.raises(RunError, match="2 are the limit"):
        uploads.keep(runs, [zipped(tmp_path, ["1.jpg", "2.jpg", "3.jpg"])])
    monkeypatch.setattr(uploads, "MAX_UNPACKED", 1)
    with pytest.raises(RunError, match="unpacks to more"):
        uploads.keep(runs, [zipped(tmp_path, ["1.jpg", "2.jpg"])])
    monkeypatch.setattr(uploads, "MAX_TOTAL", os.path.getsize(files[0]) - 1)
    with pytest.raises(RunError, match="fewer or smaller"):
        uploads.keep(runs, files[:1])


def test_an_upload_goes_with_the_last_run_that_uses_it(runs: Runs, tmp_path: Path) -> None:
    kept = uploads.keep(runs, [photo(tmp_path, "one.jpg")])
    first, second = (runs.create(RunConfig.make(**ASKED, photos=kept)) for _ in range(2))
    runs.delete(first.id)
    uploads.forget(runs, kept)
    assert Path(kept).is_dir()
    runs.delete(second.id)
    uploads.forget(runs, kept)
    assert not Path(kept).exists()


def test_nothing_but_uploads_is_ever_removed(runs: Runs, tmp_path: Path) -> None:
    mine = photo(tmp_path, "mine.jpg")
    for source in (str(tmp_path), str(mine), "bundled", "hub:owner/name", str(uploads.folder_of(runs))):
        uploads.forget(runs, source)
    assert mine.is_file()


def test_what_a_person_reads_holds_no_path(runs: Runs, tmp_path: Path) -> None:
    kept = uploads.keep(runs, [photo(tmp_path, "one.jpg")])
    assert uploads.words(runs, kept) == "uploaded photos"
    assert uploads.words(runs, str(tmp_path)) == "a folder of photos"
    assert uploads.words(runs, "bundled") == "bundled photos"
    assert uploads.words(runs, "hub:owner/name") == "Hub dataset owner/name"
