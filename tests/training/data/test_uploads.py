"""Uploaded photos: how they are stored, what is refused, and when they are deleted."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.runs import make_config
from training.data import uploads
from training.data.bundled import bundled_photos
from training.runs.run import RunError, RunState, RunStore


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
    folder = Path(uploads.save_photos(runs, [*files, tmp_path / "notes.txt"]).source)
    assert folder.parent == uploads.uploads_folder(runs)
    assert sorted(file.name for file in folder.iterdir()) == ["0000-a-b.jpg", "0001--rm--rf.png", "0002-notes.jpeg"]
    assert (folder / "0000-a-b.jpg").read_bytes() == files[0].read_bytes()


def test_zip_file_is_stored_unchanged(runs: RunStore, tmp_path: Path) -> None:
    upload = write_zip(tmp_path, ["in/one.jpg", "two.txt"])
    stored = Path(uploads.save_photos(runs, [upload]).source)
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
    upload = uploads.save_photos(runs, [write_photo(tmp_path, "one.jpg")]).source
    first, second = (runs.create(make_config(photos=upload)) for _ in range(2))
    runs.delete(first.id)
    uploads.delete_unused(runs, upload)
    assert Path(upload).is_dir()
    runs.delete(second.id)
    uploads.delete_unused(runs, upload)
    assert not Path(upload).exists() and upload_names(runs) == []


def test_only_uploads_are_deleted(runs: RunStore, tmp_path: Path) -> None:
    photo = write_photo(tmp_path, "mine.jpg")
    for source in (str(tmp_path), str(photo), "bundled", "hub:owner/name", str(uploads.uploads_folder(runs))):
        uploads.delete_unused(runs, source)
    assert photo.is_file()


def test_description_of_a_source_contains_no_path(runs: RunStore, tmp_path: Path) -> None:
    upload = uploads.save_photos(runs, [write_photo(tmp_path, "one.jpg")]).source
    assert uploads.describe_source(runs, upload) == "uploaded photos"
    assert uploads.describe_source(runs, str(tmp_path)) == "a folder of photos"
    assert uploads.describe_source(runs, "bundled") == "bundled photos"
    assert uploads.describe_source(runs, "hub:owner/name") == "Hub dataset owner/name"


# ── Quotas ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def upload_names(runs: RunStore) -> list[str]:
    """Return the files in the folder of uploads."""
    return sorted(path.name for path in uploads.uploads_folder(runs).iterdir())


def write_file(folder: Path, size: int) -> Path:
    """Write a file of `size` bytes that is named like a photo."""
    path = folder / f"{size}-{len(list(folder.iterdir()))}.jpg"
    path.write_bytes(b"x" * size)
    return path


@pytest.fixture
def quotas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the quota of a person to 100 bytes, and let every upload count as old."""
    monkeypatch.setattr(uploads, "OWNER_QUOTA_BYTES", 100)
    monkeypatch.setattr(uploads, "RECENT_SECONDS", 0.0)


@pytest.mark.usefixtures("quotas")
def test_oldest_unused_uploads_of_a_person_make_room_with_a_message(runs: RunStore, tmp_path: Path) -> None:
    other = uploads.save_photos(runs, [write_file(tmp_path, 90)], "hf:2")
    saved = [uploads.save_photos(runs, [write_file(tmp_path, 40)], "hf:1") for _ in range(2)]
    assert [upload.message for upload in saved] == ["", ""]
    runs.create(make_config(photos=saved[0].source)).set_status(state="done")
    third = uploads.save_photos(runs, [write_file(tmp_path, 30)], "hf:1")
    assert third.message == "The oldest upload was deleted to make room (0 MB)."
    assert not Path(saved[1].source).exists(), "it was newer, but no run used it"
    fourth = uploads.save_photos(runs, [write_file(tmp_path, 95)], "hf:1")
    assert "2 oldest uploads were deleted" in fourth.message
    assert {Path(upload.source).name for upload in (other, fourth)} == {
        name for name in upload_names(runs) if not name.endswith(".json")
    }


@pytest.mark.usefixtures("quotas")
@pytest.mark.parametrize("state", ["queued", "running", "interrupted"])
def test_uploads_of_unfinished_runs_stay(runs: RunStore, tmp_path: Path, state: RunState) -> None:
    used = uploads.save_photos(runs, [write_file(tmp_path, 60)], "hf:1").source
    unused = uploads.save_photos(runs, [write_file(tmp_path, 30)], "hf:1").source
    runs.create(make_config(photos="bundled", held_out=used)).set_status(state=state)
    with pytest.raises(RunError, match=r"Your uploads use .* MB .* delete your runs"):
        uploads.save_photos(runs, [write_file(tmp_path, 50)], "hf:1")
    assert Path(used).exists() and Path(unused).exists(), "nothing is deleted in vain"


@pytest.mark.usefixtures("quotas")
def test_deployments_quota_covers_everyone(runs: RunStore, tmp_path: Path) -> None:
    first = uploads.save_photos(runs, [write_file(tmp_path, 90)], "hf:1", total_bytes=200).source
    second = uploads.save_photos(runs, [write_file(tmp_path, 90)], "hf:2", total_bytes=200).source
    admin = uploads.save_photos(runs, [write_file(tmp_path, 110)], "", total_bytes=200)
    assert "deleted" in admin.message and not Path(first).exists() and Path(second).exists()
    runs.create(make_config(photos=admin.source))
    runs.create(make_config(photos=second))
    with pytest.raises(RunError, match=r"The deployment's uploads use"):
        uploads.save_photos(runs, [write_file(tmp_path, 50)], "hf:3", total_bytes=200)


def test_recent_upload_is_kept_until_its_run_is_submitted(
    runs: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "OWNER_QUOTA_BYTES", 100)
    first = uploads.save_photos(runs, [write_file(tmp_path, 90)], "hf:1").source
    with pytest.raises(RunError, match="recent uploads"):
        uploads.save_photos(runs, [write_file(tmp_path, 90)], "hf:1")
    assert Path(first).exists()


def test_simultaneous_uploads_stay_within_the_quota(runs: RunStore, tmp_path: Path) -> None:
    """Eight processes upload at once; three of the uploads fit and none is deleted, because all are recent."""
    photo = write_file(tmp_path, 300)
    code = (
        "import sys; from training.data.uploads import save_photos; from training.runs.run import RunError, RunStore\n"
        "try: save_photos(RunStore(sys.argv[1]), [sys.argv[2]], 'hf:1', total_bytes=1000)\n"
        "except RunError: sys.exit(3)"
    )
    command = [sys.executable, "-c", code, str(runs.folder), str(photo)]
    processes = [subprocess.Popen(command, cwd=Path(uploads.__file__).parents[2]) for _ in range(8)]
    assert sorted(process.wait() for process in processes) == [0] * 3 + [3] * 5
    assert len(upload_names(runs)) == 2 * 3


def test_failed_or_killed_upload_leaves_nothing(
    runs: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(source: object, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(uploads.shutil, "copyfile", full_disk)
        with pytest.raises(RunError, match="No space left"):
            uploads.save_photos(runs, [write_file(tmp_path, 10)], "hf:1")
    assert upload_names(runs) == []
    folder = uploads.uploads_folder(runs)
    (folder / ".0123").mkdir()  # of a process that was killed while copying
    (folder / ".4567").write_bytes(b"half")
    (folder / "4567.zip.json").write_text("{}")
    saved = Path(uploads.save_photos(runs, [write_file(tmp_path, 10)], "hf:1").source)
    assert upload_names(runs) == [saved.name, f"{saved.name}.json"]


def test_upload_of_a_version_without_owners_belongs_to_the_administrator(
    runs: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "RECENT_SECONDS", 0.0)
    old = uploads.uploads_folder(runs) / "0123"
    old.mkdir(parents=True)
    (old / "0000-a.jpg").write_bytes(b"x" * 80)
    saved = uploads.save_photos(runs, [write_file(tmp_path, 50)], "", total_bytes=100)
    assert saved.message and not old.exists()
