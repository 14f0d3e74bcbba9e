"""Photos that people bring to a run: kept beside the runs until the last run that uses them is deleted."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from training.data.sources import ENDINGS, MAX_FILES
from training.runs.run import MAX_PHOTOS, RunError, Runs

MAX_TOTAL = 1_000_000_000  # bytes of one upload, as it came
MAX_UNPACKED = 4_000_000_000  # bytes of a zip's photos when they are unpacked
PHOTOS = ", ".join(ending[1:].upper() for ending in ENDINGS[:4])


def folder_of(runs: Runs) -> Path:
    """Where the uploads of these runs are kept."""
    return runs.folder.parent / "uploads"


def keep(runs: Runs, files: Sequence[str | Path]) -> str:
    """Copies photos, or one zip of photos, and returns what a run's config says of them. Raises RunError."""
    paths = [Path(file) for file in files]
    if not paths:
        raise RunError("Choose photos or a zip of photos first, or take the bundled ones.")
    if any(path.suffix.lower() == ".zip" for path in paths):
        return _keep_zip(runs, paths)
    photos = [path for path in paths if path.suffix.lower() in ENDINGS]
    if not photos:
        raise RunError(f"None of these files is a photo. Choose {PHOTOS} files, or a zip of them.")
    if len(photos) > MAX_PHOTOS:
        raise RunError(f"Choose at most {MAX_PHOTOS:,} photos; these are {len(photos):,}.")
    return _copied(runs, photos)


def forget(runs: Runs, source: str) -> None:
    """Removes an upload, if `source` is one and no run uses it (any more)."""
    path = Path(source)
    if path.parent != folder_of(runs):
        return
    for run in runs.list():
        with contextlib.suppress(RunError):
            if run.config().photos == source:
                return
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def words(runs: Runs, source: str) -> str:
    """What a config's `photos` is, for a person: no path of the machine."""
    if source == "bundled":
        return "bundled photos"
    if source.startswith("hub:"):
        return f"Hub dataset {source[4:]}"
    return "uploaded photos" if Path(source).parent == folder_of(runs) else "a folder of photos"


def _keep_zip(runs: Runs, paths: list[Path]) -> str:
    if len(paths) > 1:
        raise RunError("Choose either photos or one zip file, not both.")
    try:
        with zipfile.ZipFile(paths[0]) as archive:
            found = [one for one in archive.infolist() if Path(one.filename).suffix.lower() in ENDINGS]
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        raise RunError("This zip file cannot be read. Make it anew, or choose the photos themselves.") from None
    if not found:
        raise RunError(f"There is no photo in this zip file. {PHOTOS} files are looked for.")
    if len(found) > MAX_FILES:
        raise RunError(f"This zip file holds {len(found):,} photos; {MAX_FILES:,} are the limit.")
    if sum(one.file_size for one in found) > MAX_UNPACKED:
        raise RunError(
            f"This zip file unpacks to more than {MAX_UNPACKED // 10**9} GB. Choose fewer or smaller photos."
        )
    return _copied(runs, paths)


def _copied(runs: Runs, paths: list[Path]) -> str:
    try:
        if sum(path.stat().st_size for path in paths) > MAX_TOTAL:
            raise RunError(f"These files are over {MAX_TOTAL // 10**9} GB. Choose fewer or smaller photos.")
        place = folder_of(runs) / secrets.token_hex(12)
        if paths[0].suffix.lower() == ".zip":
            place = place.with_suffix(".zip")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(paths[0], place)
            return str(place)
        place.mkdir(parents=True)
        for number, path in enumerate(paths):
            name = re.sub(r"[^\w-]+", "-", path.stem)[:40]
            shutil.copyfile(path, place / f"{number:04d}-{name}{path.suffix.lower()}")
        return str(place)
    except OSError as error:
        raise RunError(f"The photos could not be kept ({error.strerror}). Try again later.") from None
