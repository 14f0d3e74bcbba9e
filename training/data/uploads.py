"""Photos that users upload for a run, kept until the last run that uses them is deleted."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from training.data.sources import EXTENSIONS, HUB_PREFIX, MAX_FILES
from training.runs.run import MAX_PHOTOS, RunError, RunStore

MAX_UPLOAD_BYTES = 1_000_000_000
MAX_EXTRACTED_BYTES = 4_000_000_000  # of the photos in a zip file
FORMATS = ", ".join(extension[1:].upper() for extension in EXTENSIONS[:4])


def uploads_folder(runs: RunStore) -> Path:
    """Return the folder that holds the uploads of these runs."""
    return runs.folder.parent / "uploads"


def save_photos(runs: RunStore, files: Sequence[str | Path]) -> str:
    """Copy uploaded photos, or one zip file of photos.

    Args:
        runs: The runs that the upload belongs to.
        files: Photos, or a single zip file. Files of other types are ignored.

    Returns:
        The upload as a photo source for `RunConfig.photos`.

    Raises:
        RunError: The files contain no photos, exceed a limit, or could not be copied.
    """
    paths = [Path(file) for file in files]
    if not paths:
        raise RunError("Choose photos or a zip of photos first, or use the bundled ones.")
    if any(path.suffix.lower() == ".zip" for path in paths):
        if len(paths) > 1:
            raise RunError("Choose either photos or one zip file, not both.")
        _check_zip(paths[0])
    else:
        paths = [path for path in paths if path.suffix.lower() in EXTENSIONS]
        if not paths:
            raise RunError(f"None of these files is a photo. Choose {FORMATS} files, or a zip file of them.")
        if len(paths) > MAX_PHOTOS:
            raise RunError(f"Choose at most {MAX_PHOTOS:,} photos; these are {len(paths):,}.")
    try:
        if sum(path.stat().st_size for path in paths) > MAX_UPLOAD_BYTES:
            raise RunError(f"These files are over {MAX_UPLOAD_BYTES // 10**9} GB. Choose fewer or smaller photos.")
        target = uploads_folder(runs) / secrets.token_hex(12)
        if paths[0].suffix.lower() == ".zip":
            target = target.with_suffix(".zip")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(paths[0], target)
            return str(target)
        target.mkdir(parents=True)
        for number, path in enumerate(paths):
            name = re.sub(r"[^\w-]+", "-", path.stem)[:40]
            shutil.copyfile(path, target / f"{number:04d}-{name}{path.suffix.lower()}")
        return str(target)
    except OSError as error:
        raise RunError(f"The photos could not be saved ({error.strerror}). Try again later.") from None


def _check_zip(path: Path) -> None:
    """Check that a zip file contains photos and stays within the limits. Raises RunError."""
    try:
        with zipfile.ZipFile(path) as archive:
            photos = [info for info in archive.infolist() if Path(info.filename).suffix.lower() in EXTENSIONS]
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        raise RunError("This zip file cannot be read. Create it again, or choose the photos themselves.") from None
    if not photos:
        raise RunError(f"There is no photo in this zip file. Add {FORMATS} files.")
    if len(photos) > MAX_FILES:
        raise RunError(f"This zip file contains {len(photos):,} photos; the limit is {MAX_FILES:,}.")
    if sum(info.file_size for info in photos) > MAX_EXTRACTED_BYTES:
        raise RunError(
            f"This zip file unpacks to more than {MAX_EXTRACTED_BYTES // 10**9} GB. Choose fewer or smaller photos."
        )


def delete_unused(runs: RunStore, source: str) -> None:
    """Delete the upload that a photo source names, unless a run still uses it. Other sources are left alone."""
    path = Path(source)
    if path.parent != uploads_folder(runs):
        return
    for run in runs.list():
        with contextlib.suppress(RunError):
            if run.config().photos == source:
                return
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def describe_source(runs: RunStore, source: str) -> str:
    """Describe a photo source for display, without local paths."""
    if source == "bundled":
        return "bundled photos"
    if source.startswith(HUB_PREFIX):
        return f"Hub dataset {source.removeprefix(HUB_PREFIX)}"
    return "uploaded photos" if Path(source).parent == uploads_folder(runs) else "a folder of photos"
