"""Which files of DATA_DIR are state worth keeping, and consistent copies of them while the application writes.

Kept are the SQLite database (through SQLite's online backup), runs with their adapters and results, evaluations, the
list of enabled adapters, finetunes, usage events that wait for the database, uploaded photos of runs that can still be
resumed, and batches of /v1 whose upload is complete. Everything else in DATA_DIR stays on this machine: lock files,
temporary files, secrets, uploads of no run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

DATABASE = "playground.sqlite3"
RUNS, EVALUATIONS, FINETUNES, BATCHES = "runs", "evaluations", "tuning", "batches"
SPOOL, UPLOADS = "usage-spool", "uploads"
ROOTS = (DATABASE, RUNS, EVALUATIONS, FINETUNES, BATCHES, SPOOL, UPLOADS)
DATABASE_FILES = (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm")
ADAPTERS = "adopted.json"  # in RUNS: which adapters are in use
CHECKPOINT_END = "trainer_state.json"  # written last, so that a checkpoint with it is complete
LOCAL_NAMES = ("lock", "pid")  # in a run's folder: of the process on this machine
MAX_BATCH_INPUT = 64 << 20  # bytes; larger files of unfinished batches would delay the other state
MAX_ATTEMPTS = 5  # at a copy of a folder whose files disappear meanwhile
BLOCK = 1 << 20  # bytes
_RUN_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")
_CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")


@dataclass(frozen=True)
class FileVersion:
    """Content of a file: SHA-256 in hexadecimal, and size in bytes."""

    sha256: str
    size: int


class FileCopier:
    """Copies state files into a folder, named by their SHA-256, and remembers files that did not change.

    Args:
        data_dir: The application's data folder.
        with_database: Whether DATA_DIR contains the database.
    """

    def __init__(self, data_dir: Path, with_database: bool) -> None:
        self._data_dir, self._with_database = data_dir, with_database
        self._seen: dict[str, tuple[object, FileVersion]] = {}

    def copy_changes(self, folder: Path, is_stored: Callable[[str], bool]) -> dict[str, FileVersion]:
        """Copy every state file whose content is not stored yet.

        The database comes last: an event that has left the spool folder meanwhile is in the database by then.

        Args:
            folder: Receives the copies.
            is_stored: Whether the content with this SHA-256 needs no copy.

        Returns:
            All state files, by path relative to `data_dir`.

        Raises:
            OSError: A file cannot be read or copied, or the folders change faster than they can be copied.
            sqlite3.Error: The database cannot be read.
        """
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return self._copy_all(folder, is_stored)
            except FileNotFoundError:  # a checkpoint was replaced or a run deleted: choose the files again
                if attempt == MAX_ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def _copy_all(self, folder: Path, is_stored: Callable[[str], bool]) -> dict[str, FileVersion]:
        versions = {}
        for path in state_files(self._data_dir):
            name = path.relative_to(self._data_dir).as_posix()
            if not is_state_path(name):
                continue  # could not be restored
            try:
                status = path.stat()
                fingerprint = (status.st_size, status.st_mtime_ns, status.st_ino)
                versions[name] = self._copy(name, fingerprint, folder, is_stored, path)
            except FileNotFoundError:
                if path.parent.name != SPOOL:
                    raise
        database = self._data_dir / DATABASE
        if self._with_database and database.is_file():
            versions[DATABASE] = self._copy(DATABASE, _database_fingerprint(database), folder, is_stored, None)
        self._seen = {name: entry for name, entry in self._seen.items() if name in versions}
        return versions

    def _copy(
        self, name: str, fingerprint: object, folder: Path, is_stored: Callable[[str], bool], path: Path | None
    ) -> FileVersion:
        """Copy one file, or the database if `path` is None, unless it is unchanged and stored."""
        seen = self._seen.get(name)
        if seen and seen[0] == fingerprint and is_stored(seen[1].sha256):
            return seen[1]
        temporary = folder / "copy.part"
        if path is None:
            back_up_database(self._data_dir / DATABASE, temporary)
            version = file_version(temporary)
        else:
            version = _copy_file(path, temporary)
        if is_stored(version.sha256):
            temporary.unlink()
        else:
            os.replace(temporary, folder / version.sha256)
        self._seen[name] = (fingerprint, version)
        return version


def state_files(data_dir: Path) -> Iterator[Path]:
    """Yield the state files in `data_dir` except for the database.

    Files that refer to others come first: by the time the others are listed, they are at least as new.
    """
    yield from sorted((data_dir / SPOOL).glob("*.jsonl"))
    runs = data_dir / RUNS
    if (runs / ADAPTERS).is_file():
        yield runs / ADAPTERS
    for folder in (runs, data_dir / EVALUATIONS):
        for run in sorted(_folders(folder)):
            if _RUN_ID.fullmatch(run.name):
                yield from _run_files(run, data_dir / UPLOADS)
    yield from _batch_files(data_dir / BATCHES)
    for tenant in sorted(_folders(data_dir / FINETUNES)):
        for finetune in sorted(_folders(tenant)):
            if (finetune / "finetune.json").is_file():
                yield finetune / "finetune.json"
                yield from (file for file in _tree(finetune) if file.name != "finetune.json")


def _run_files(run: Path, uploads: Path) -> Iterator[Path]:
    """Yield the files of a run or evaluation; of checkpoints only the newest complete one, none of a finished run."""
    status = run / "status.json"
    if status.is_file():
        yield status
    is_done = _read_json(status).get("state") == "done"
    for entry in sorted(run.iterdir()):
        if _CHECKPOINT.fullmatch(entry.name) or entry.name in ("status.json", *LOCAL_NAMES):
            continue
        yield from _tree(entry) if entry.is_dir() else (file for file in [entry] if _is_kept(file))
    if is_done:
        return
    checkpoints = [folder for folder in _folders(run) if _CHECKPOINT.fullmatch(folder.name)]
    complete = [folder for folder in checkpoints if (folder / CHECKPOINT_END).is_file()]
    if complete:
        yield from _tree(max(complete, key=lambda folder: int(folder.name.rpartition("-")[2])))
    config = _read_json(run / "config.json")
    for source in {str(config.get(name)) for name in ("photos", "held_out")}:
        upload = Path(source)
        if upload.is_absolute() and upload.parent == uploads:
            yield from _tree(upload) if upload.is_dir() else (file for file in [upload] if file.is_file())


def _batch_files(batches: Path) -> Iterator[Path]:
    """Yield the files of batches that are not expired: state, results, and of unfinished ones the input."""
    for batch in sorted(batch for tenant in _folders(batches) for batch in _folders(tenant)):
        state = _read_json(batch / "state.json")
        expires = state.get("expires")
        if state.get("status", "uploading") == "uploading" or (isinstance(expires, float) and expires < time.time()):
            continue
        yield batch / "state.json"
        results, content = batch / "results.jsonl", batch / "input.jsonl"
        if results.is_file():
            yield results
        if content.is_file() and content.stat().st_size <= MAX_BATCH_INPUT:
            yield content


def _tree(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in sorted(names) if _is_kept(Path(parent, name)))


def _is_kept(file: Path) -> bool:
    return not file.name.startswith(".") and file.suffix not in (".part", ".lock") and not file.is_symlink()


def _folders(folder: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _read_json(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def back_up_database(database: Path, target: Path) -> None:
    """Copy an SQLite database with its online backup, while other connections read and write.

    Raises:
        sqlite3.Error: The database cannot be read, or the copy not written.
    """
    target.unlink(missing_ok=True)
    with (
        closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", uri=True, timeout=30)) as source,
        closing(sqlite3.connect(target)) as copy,
    ):
        source.backup(copy)


def _database_fingerprint(database: Path) -> object:
    """Return a value that changes with every write to the database, which goes to its log first."""
    log = database.with_name(f"{DATABASE}-wal")
    stats = [file.stat() for file in (database, log) if file.exists()]
    return tuple((status.st_size, status.st_mtime_ns, status.st_ino) for status in stats)


def _copy_file(source: Path, target: Path) -> FileVersion:
    """Copy a file up to its present size; what is appended meanwhile belongs to the next copy."""
    digest, size = hashlib.sha256(), 0
    with open(source, "rb") as reader, open(target, "wb") as writer:
        left = os.fstat(reader.fileno()).st_size
        while left and (block := reader.read(min(BLOCK, left))):
            digest.update(block)
            writer.write(block)
            left, size = left - len(block), size + len(block)
    return FileVersion(digest.hexdigest(), size)


def file_version(file: Path) -> FileVersion:
    """Return the SHA-256 and size of a file. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with open(file, "rb") as content:
        while block := content.read(BLOCK):
            digest.update(block)
            size += len(block)
    return FileVersion(digest.hexdigest(), size)


def is_state_path(path: str) -> bool:
    """Whether a path relative to DATA_DIR may belong to the state: below one of ROOTS, and without `..`."""
    parts = PurePosixPath(path).parts
    if path != "/".join(parts) or not parts or ".." in parts or re.search(r"[\x00-\x1f\\]", path):
        return False
    return path == DATABASE or (len(parts) > 1 and parts[0] in ROOTS and parts[0] != DATABASE)
