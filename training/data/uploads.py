"""Photos that users upload for a run, kept until the last run that uses them is deleted or a quota is reached.

An upload is a folder of photos or a zip file, with its owner in a JSON file beside it. Uploads are saved and deleted
under a file lock, so that two processes cannot exceed a quota together.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from storage.files import write_atomically
from training.data.sources import EXTENSIONS, HUB_PREFIX, MAX_FILES
from training.runs.run import MAX_PHOTOS, RunError, RunStore

MAX_UPLOAD_BYTES = 1_000_000_000
OWNER_QUOTA_BYTES = 500_000_000  # uploads per person; the deployment's administrator is only bound by the total
TOTAL_QUOTA_BYTES = 2_000_000_000  # uploads of the deployment
RECENT_SECONDS = 60.0  # a younger upload may belong to a run that is being submitted
LOCK_TIMEOUT = 60.0  # seconds; another upload is copied meanwhile
MAX_EXTRACTED_BYTES = 4_000_000_000  # of the photos in a zip file
FORMATS = ", ".join(extension[1:].upper() for extension in EXTENSIONS[:4])


@dataclass(frozen=True)
class SavedPhotos:
    """Uploaded photos that were saved.

    Attributes:
        source: The upload as a photo source for `RunConfig.photos`.
        message: What was deleted to make room, for the user; "" if nothing was.
    """

    source: str
    message: str = ""


@dataclass(frozen=True)
class _Upload:
    path: Path
    owner: str
    size: int  # bytes
    saved: float  # Unix time


def uploads_folder(runs: RunStore) -> Path:
    """Return the folder that holds the uploads of these runs."""
    return runs.folder.parent / "uploads"


def save_photos(
    runs: RunStore, files: Sequence[str | Path], owner: str = "", total_bytes: int = TOTAL_QUOTA_BYTES
) -> SavedPhotos:
    """Copy uploaded photos, or one zip file of photos. Old uploads that no unfinished run needs make room.

    Args:
        runs: The runs that the upload belongs to.
        files: Photos, or a single zip file. Files of other types are ignored.
        owner: Identifies the visitor, as `access.roles.Visitor.id`; "" is the deployment's administrator.
        total_bytes: Quota of all uploads of the deployment, in bytes.

    Raises:
        RunError: The files contain no photos, exceed a limit or a quota, or could not be copied.
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
    return _save(runs, paths, owner, total_bytes, "photos")


def save_folder(runs: RunStore, source: Path, owner: str = "", total_bytes: int = TOTAL_QUOTA_BYTES) -> SavedPhotos:
    """Copy a folder of files, such as exported choices with their photos, as an upload.

    Args:
        runs: The runs that the upload belongs to.
        source: The folder, without folders inside.
        owner: Identifies the visitor, as for `save_photos`.
        total_bytes: Quota of all uploads of the deployment, in bytes.

    Raises:
        RunError: The files exceed a quota or could not be copied.
    """
    return _save(runs, sorted(source.iterdir()), owner, total_bytes, "files", keep_names=True)


def _save(
    runs: RunStore, paths: Sequence[Path], owner: str, total_bytes: int, title: str, keep_names: bool = False
) -> SavedPhotos:
    """Copy files to a new upload. Raises RunError, whose message calls them by `title`."""
    try:
        size = sum(path.stat().st_size for path in paths)
        if size > MAX_UPLOAD_BYTES:
            raise RunError(f"These files are over {MAX_UPLOAD_BYTES // 10**9} GB. Choose fewer or smaller photos.")
        folder = uploads_folder(runs)
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            _remove_leftovers(folder)
            message = _make_room(runs, size, owner, total_bytes)
            return SavedPhotos(str(_copy(paths, folder, owner, keep_names)), message)
    except Timeout:
        raise RunError("Another upload is being saved. Try again in a minute.") from None
    except OSError as error:
        raise RunError(f"The {title} could not be saved ({error.strerror}). Try again later.") from None


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_name(f".{folder.name}.lock"), timeout=LOCK_TIMEOUT)


def _copy(paths: Sequence[Path], folder: Path, owner: str, keep_names: bool) -> Path:
    """Copy a zip file or files to a new upload, which appears when it is complete. Raises OSError."""
    name, is_zip = secrets.token_hex(12), paths[0].suffix.lower() == ".zip"
    part, target = folder / f".{name}", folder / (f"{name}.zip" if is_zip else name)
    try:
        if is_zip:
            shutil.copyfile(paths[0], part)
        else:
            part.mkdir()
            for number, path in enumerate(paths):
                stem = re.sub(r"[^\w-]+", "-", path.stem)[:40]
                copied = path.name if keep_names else f"{number:04d}-{stem}{path.suffix.lower()}"
                shutil.copyfile(path, part / copied)
        write_atomically(_owner_file(target), json.dumps({"owner": owner, "saved": time.time()}))
        os.replace(part, target)
    except OSError:
        _remove(part)
        _owner_file(target).unlink(missing_ok=True)
        raise
    return target


def _make_room(runs: RunStore, size: int, owner: str, total_bytes: int) -> str:
    """Delete old uploads until `size` more bytes fit into the quotas. Returns a message for the user.

    An upload that no run uses goes first, then one of runs that have ended, the oldest first. Uploads of other people
    are only deleted for the deployment's quota.

    Raises:
        RunError: The upload does not fit. Nothing was deleted.
    """
    uploads, ranks = _list_uploads(uploads_folder(runs)), _ranks(runs)
    own = [upload for upload in uploads if upload.owner == owner]
    own_quota = min(OWNER_QUOTA_BYTES, total_bytes) if owner else total_bytes
    deleted: list[_Upload] = []
    for group, quota in ((own, own_quota), (uploads, total_bytes)):
        used = sum(upload.size for upload in group if upload not in deleted)
        for upload in sorted(group, key=lambda upload: (ranks.get(str(upload.path), 0), upload.saved)):
            if used + size <= quota:
                break
            recent = time.time() - upload.saved < RECENT_SECONDS
            if upload in deleted or recent or ranks.get(str(upload.path), 0) == _NEEDED:
                continue
            deleted.append(upload)
            used -= upload.size
        if used + size > quota:
            whose, remedy = ("Your", "your runs") if group is own else ("The deployment's", "runs")
            raise RunError(
                f"{whose} uploads use {_megabytes(used)} MB of {_megabytes(quota)} MB, which unfinished runs or recent "
                f"uploads need, and these files have {_megabytes(size)} MB. Choose fewer or smaller photos, or delete "
                f"{remedy} with uploaded photos."
            )
    for upload in deleted:
        _remove(upload.path)
        _owner_file(upload.path).unlink(missing_ok=True)
    if not deleted:
        return ""
    count = "The oldest upload was" if len(deleted) == 1 else f"The {len(deleted)} oldest uploads were"
    return f"{count} deleted to make room ({_megabytes(sum(upload.size for upload in deleted))} MB)."


_ENDED, _NEEDED = 1, 2  # ranks of an upload's runs; 0 is an upload without runs


def _ranks(runs: RunStore) -> dict[str, int]:
    """Return by photo source whether its runs have ended, or need it: queued, running or interrupted ones."""
    ranks: dict[str, int] = {}
    for run in runs.list():
        with contextlib.suppress(RunError):
            config, state = run.config(), run.status().state
            rank = _NEEDED if state in ("queued", "running", "interrupted") else _ENDED
            for source in (config.photos, config.held_out):
                ranks[source] = max(rank, ranks.get(source, 0))
    return ranks


def _list_uploads(folder: Path) -> list[_Upload]:
    """List the uploads. Those of versions without owners belong to the administrator."""
    uploads = []
    for path in folder.iterdir():
        if path.name.startswith(".") or path.suffix not in ("", ".zip"):
            continue
        owner, saved = "", path.stat().st_mtime
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            values = json.loads(_owner_file(path).read_text(encoding="utf-8"))
            owner, saved = str(values["owner"]), float(values["saved"])
        files = path.iterdir() if path.is_dir() else [path]
        uploads.append(_Upload(path, owner, sum(file.stat().st_size for file in files), saved))
    return uploads


def _owner_file(upload: Path) -> Path:
    return upload.with_name(f"{upload.name}.json")


def _remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while copying left behind. Requires the lock."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            _remove(path)
        elif path.suffix == ".json" and not path.with_suffix("").exists():
            path.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}".removesuffix(".0")


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
    if path.parent != uploads_folder(runs) or not path.exists():
        return
    with contextlib.suppress(Timeout), _lock(path.parent):
        if source not in _ranks(runs):
            _remove(path)
            _owner_file(path).unlink(missing_ok=True)


def describe_source(runs: RunStore, source: str) -> str:
    """Describe a photo source for display, without local paths."""
    if source == "bundled":
        return "bundled photos"
    if source.startswith(HUB_PREFIX):
        return f"Hub dataset {source.removeprefix(HUB_PREFIX)}"
    return "uploaded photos" if Path(source).parent == uploads_folder(runs) else "a folder of photos"
