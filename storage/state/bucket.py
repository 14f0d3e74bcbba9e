"""Keep a deployment's state in a Hugging Face Storage Bucket: restore it at startup, save changes every 30 seconds.

Layout of the bucket:

    blobs/<sha256>                        contents of files
    manifests/<generation>-<start of the process>-<its id>.json
                                          list of all files of one saved state, with the SHA-256 and size of each
    lease.json                            which process saves, and until when

Contents are uploaded first and the manifest last, so that a process that is killed meanwhile leaves the last complete
state. The manifest with the highest generation counts. Contents that neither it nor the one before it lists are
deleted.

The Hub has no conditional writes. Two processes are kept apart by a lease, which is read before the contents and again
before the manifest are uploaded, and by the generation: a process only saves on top of the manifest that its own state
comes from. Of two processes of one deployment, the one that started last takes the lease at once, because it is the
successor at a restart; another deployment gets it when the lease has expired. Manifests are never overwritten. What
remains: if the lease changes hands between the last check and the upload of the manifest (about a second), both
processes add a manifest of the same generation, and that of the process that started last counts. Each reads the list
again after its upload; the other one stops saving and reports it, and its last changes are lost. Clocks of different
machines must agree within half of LEASE_SECONDS.

A process that could not load the state at startup starts without it, and does not save until it has been restarted:
its own state would replace the good one. If DATA_DIR survived the restart, it contains which manifest it comes from; it
is then kept, with what was not saved yet, unless the bucket has a newer one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from storage.files import write_atomically
from storage.state.files import (
    DATABASE,
    DATABASE_FILES,
    ROOTS,
    FileCopier,
    FileVersion,
    file_version,
    is_state_path,
)
from storage.state.remote import BucketClient, BucketError

SAVE_SECONDS = 30.0  # between two saves
LEASE_SECONDS = 120.0  # renewed after half of it
STALL_SECONDS = 60.0  # without a response or new bytes, after which the application starts without its state
RETRY_SECONDS = 2.0  # between two attempts to reach the Hub at startup, for the time of two saves
SLOW_SECONDS = 300.0  # duration of a save from which it is reported
STOP_SECONDS = 20.0  # for the last save; a Space is killed soon after SIGTERM
FORMAT = 1  # version of the manifest
LEASE = "lease.json"
WORK_FOLDER = ".state"  # in DATA_DIR
_MANIFEST = re.compile(r"manifests/([0-9]{10})-[0-9]{13}-[0-9a-f]{16}\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class BucketStatus:
    """What the page shows about the bucket.

    Attributes:
        ok: Whether the state is being saved.
        message: One or two sentences; says what to do if it is not.
        last_sync: Unix time at which the bucket last had the complete state; None before.
    """

    ok: bool
    message: str
    last_sync: float | None = None


@dataclass(frozen=True)
class Lease:
    """Which process saves.

    Attributes:
        owner: Id of the process.
        deployment: Name of its deployment.
        started: Unix time at which the process started.
        expires: Unix time from which any process may take the lease.
    """

    owner: str
    deployment: str
    started: float
    expires: float


@dataclass(frozen=True)
class Manifest:
    """A saved state.

    Attributes:
        name: Path in the bucket; "" for the empty state before the first save.
        files: Contents by path relative to DATA_DIR.
    """

    name: str = ""
    files: dict[str, FileVersion] = field(default_factory=dict)

    @property
    def blobs(self) -> set[str]:
        """Paths in the bucket of the contents."""
        return {_blob(version.sha256) for version in self.files.values()}


class StateBucket:
    """Restores and saves the state in DATA_DIR.

    Call `restore` before anything opens the database or reads DATA_DIR, then `start`, and `stop` before the process
    ends. None of them raises; `status` tells what happened.

    Args:
        bucket: Id of the bucket, "owner/name". It must exist and be private.
        data_dir: The application's data folder.
        database_url: URL of a database outside of DATA_DIR, which then keeps itself; None for the SQLite file.
        token: Access token with write access; by default HF_TOKEN or that of `hf auth login`.
        deployment: Name of the deployment; its newest process saves.
        save_seconds: Time between two saves.
        lease_seconds: Time after which another deployment may save, if this one stops without releasing the lease.
        stall_seconds: Time without progress after which `restore` gives up.
    """

    def __init__(
        self,
        bucket: str,
        data_dir: Path,
        database_url: str | None = None,
        token: str | None = None,
        deployment: str = "",
        save_seconds: float = SAVE_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._client, self._data_dir = BucketClient(bucket, token), data_dir
        self._has_database = database_url is None
        self._work = data_dir / WORK_FOLDER
        self._lease = Lease(secrets.token_hex(8), deployment, time.time(), 0.0)
        self._save_seconds, self._lease_seconds, self._stall_seconds = save_seconds, lease_seconds, stall_seconds
        self._copier = FileCopier(data_dir, self._has_database)
        self._base = ""  # manifest that the state in DATA_DIR comes from; "" if from none
        self._saved, self._previous = Manifest(), Manifest()
        self._blobs: set[str] | None = None  # in the bucket; None before they were listed
        self._is_private = False
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._save_begun: float | None = None  # on the monotonic clock
        self._consequence = "Changes are not saved."  # of a failure
        self._status = BucketStatus(False, f"The bucket {bucket} has not been read yet.")

    @property
    def bucket(self) -> str:
        """Id of the bucket."""
        return self._client.bucket

    def status(self) -> BucketStatus:
        """Return whether the state is being saved, and when it last was."""
        begun = self._save_begun
        if begun and (seconds := time.monotonic() - begun) > SLOW_SECONDS:
            message = f"Saving to the bucket {self.bucket} takes {seconds / 60:.0f} minutes so far. Check the network."
            return BucketStatus(False, message, self._status.last_sync)
        return self._status

    def restore(self) -> bool:
        """Load the last saved state into DATA_DIR; return whether it could be loaded or there is none.

        If the bucket cannot be reached for the time of two saves, or makes no progress for `stall_seconds`, the
        application starts without the saved state. State files that are in DATA_DIR and come from elsewhere are moved
        to a folder `replaced-…` in it, not deleted.
        """
        try:
            self._base = self._read_marker()
            manifest = _run_with_progress(self._download, self._measure_progress, self._stall_seconds)
            if manifest is not None:
                self._replace_files(manifest)
        except (BucketError, OSError) as error:
            self._consequence = "The application started without its saved state, and changes are not saved."
            self._report_failure(error)
            return False
        finally:
            shutil.rmtree(self._work / "restore", ignore_errors=True)
        last_sync = time.time() if self._base else None
        self._status = BucketStatus(True, f"The state is saved to the bucket {self.bucket}.", last_sync)
        return True

    def start(self) -> None:
        """Start the thread that saves changes."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._save_loop, name="state-bucket", daemon=True)
            self._thread.start()

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """Save a last time, release the lease and end the thread; give up after `timeout` seconds."""
        self._stop.set()
        if self._thread:
            self._thread.join(timeout)

    def save(self) -> bool:
        """Save the state now if it changed; return whether anything was uploaded.

        Raises:
            BucketError: The bucket cannot be used, or this process may not save.
            OSError: The files cannot be copied.
            sqlite3.Error: The database cannot be copied.
        """
        with self._lock:
            self._save_begun = time.monotonic()
            folder = self._work / "save"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                return self._save(folder)
            finally:
                self._save_begun = None
                shutil.rmtree(folder, ignore_errors=True)

    # ── Saving ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _save_loop(self) -> None:
        while not self._stop.wait(self._save_seconds):
            self._save_and_report()
        self._save_and_report()
        try:
            lease = self._read_lease()
            if lease and lease.owner == self._lease.owner:
                self._client.delete([LEASE])
        except BucketError as error:
            _log.warning("The lease was not released: %s", error)

    def _save_and_report(self) -> None:
        try:
            self.save()
        except Exception as error:  # also an unexpected one must not end the thread
            self._report_failure(error)
        else:
            self._consequence = "Changes are not saved."
            self._status = BucketStatus(True, f"The state is saved to the bucket {self.bucket}.", time.time())

    def _report_failure(self, error: Exception) -> None:
        if isinstance(error, BucketError):
            reason = str(error)
        elif isinstance(error, OSError | sqlite3.Error):
            cause = getattr(error, "strerror", None) or str(error)
            reason = f"The data folder cannot be read or written ({cause}). Check the disk."
        else:
            reason = f"An unexpected error occurred ({type(error).__name__})."
        message = f"{self._consequence} {reason}"
        if message != self._status.message:
            _log.warning("%s", message)
        self._status = BucketStatus(False, message, self._status.last_sync)

    def _save(self, folder: Path) -> bool:
        if self._blobs is None:
            self._check_may_save()
            self._blobs = self._client.list("blobs")
        blobs = self._blobs
        files = self._copier.copy_changes(folder, lambda sha256: _blob(sha256) in blobs)
        is_unchanged = files == self._saved.files
        if is_unchanged and self._lease.expires - time.time() > self._lease_seconds / 2:
            return False
        self._check_may_save()
        if is_unchanged:
            return False
        missing = {version.sha256 for version in files.values() if _blob(version.sha256) not in blobs}
        if missing:
            self._client.upload([(folder / sha256, _blob(sha256)) for sha256 in sorted(missing)])
            blobs |= {_blob(sha256) for sha256 in missing}
            self._check_may_save()
        generation, started = _generation(self._base) + 1, round(self._lease.started * 1000)
        manifest = Manifest(f"manifests/{generation:010d}-{started:013d}-{self._lease.owner}.json", files)
        self._client.upload([(_to_json(manifest, self._lease), manifest.name)])
        manifests = self._manifests()
        if manifests[-1] != manifest.name:
            raise BucketError(self._conflict_message())
        self._base, self._previous, self._saved = manifest.name, self._saved, manifest
        self._write_marker()
        self._delete_unused(manifests)
        return True

    def _check_may_save(self) -> None:
        """Take or renew the lease, and check that the bucket holds the state that this process continues."""
        if not self._is_private:
            self._is_private = self._client.is_private()
        if not self._is_private:
            raise BucketError(f"The bucket {self.bucket} is public, and the state is not. Make it private.")
        holder = self._take_lease()
        if holder is not None:
            same = holder.deployment == self._lease.deployment
            whose = "a newer process of this deployment" if same else f"the deployment {holder.deployment[:100]!r}"
            raise BucketError(f"The bucket {self.bucket} is in use by {whose}. Give each deployment its own bucket.")
        manifests = self._manifests()
        if (manifests[-1] if manifests else "") != self._base:
            raise BucketError(self._conflict_message())
        if self._saved.name != self._base:  # DATA_DIR has outlived the process that saved it
            self._saved = self._read_manifest(self._base)

    def _conflict_message(self) -> str:
        return (
            f"The bucket {self.bucket} holds a state that this process did not load, and that is kept. Restart the"
            " application to load it."
        )

    def _manifests(self) -> list[str]:
        """Return the names of the manifests, the one that counts last."""
        return sorted(filter(_MANIFEST.fullmatch, self._client.list("manifests")))

    def _delete_unused(self, manifests: list[str]) -> None:
        """Delete contents and manifests that neither the last nor the previous manifest needs."""
        kept = {self._saved.name, self._previous.name}
        blobs = (self._blobs or set()) - self._saved.blobs - self._previous.blobs
        unused = [*(name for name in manifests if name not in kept), *sorted(blobs)]
        if unused:
            try:
                self._client.delete(unused)
            except BucketError as error:  # the state is saved; the next save lists the contents again
                _log.warning("Old contents were not deleted: %s", error)
                self._blobs = None
                return
            self._blobs = (self._blobs or set()) - blobs

    # ── Lease ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _take_lease(self) -> Lease | None:
        """Take or renew the lease; return the one of another process if that keeps it."""
        lease, now = self._read_lease(), time.time()
        if lease and lease.owner != self._lease.owner:
            is_predecessor = lease.deployment == self._lease.deployment and lease.started < self._lease.started
            if lease.expires > now and not is_predecessor:
                return lease
        elif lease and lease.expires - now > self._lease_seconds / 2:
            return None
        renewed = Lease(self._lease.owner, self._lease.deployment, self._lease.started, now + self._lease_seconds)
        self._client.upload([(json.dumps(asdict(renewed)).encode(), LEASE)])
        self._lease = renewed
        return None

    def _read_lease(self) -> Lease | None:
        try:
            values = json.loads(self._client.read(LEASE) or b"null")
            expires = min(float(values["expires"]), time.time() + 2 * self._lease_seconds)
            lease = Lease(str(values["owner"]), str(values["deployment"]), float(values["started"]), expires)
        except (ValueError, TypeError, KeyError):
            return None
        return lease

    # ── Restoring ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _download(self) -> Manifest | None:
        """Download the last saved state into the work folder; return None if DATA_DIR has it or there is none."""
        deadline = time.monotonic() + 2 * self._save_seconds
        while True:
            try:
                return self._download_once()
            except BucketError as error:
                if not error.is_transient or time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_SECONDS)

    def _download_once(self) -> Manifest | None:
        self._is_private = self._client.is_private()
        try:
            self._take_lease()
        except BucketError as error:
            if error.is_transient:
                raise  # otherwise the state may still be readable; the first save reports the error
        target, manifests = self._work / "restore", self._manifests()
        if not manifests:
            self._base = ""
        if not manifests or manifests[-1] == self._base:
            return None
        shutil.rmtree(target, ignore_errors=True)
        try:
            manifest = self._read_manifest(manifests[-1])
            self._download_files(manifest, target)
        except BucketError:
            if self._manifests()[-1:] == manifests[-1:]:
                raise
        else:
            if self._manifests()[-1:] == manifests[-1:]:
                return manifest
        raise BucketError(f"The bucket {self.bucket} changed while it was read. It is tried again.", is_transient=True)

    def _read_manifest(self, name: str) -> Manifest:
        """Read a manifest, and refuse paths that do not belong to the state."""
        if not name:
            return Manifest()
        content = self._client.read(name)
        try:
            values = json.loads(content or b"")
            files = {str(row["path"]): FileVersion(str(row["sha256"]), int(row["size"])) for row in values["files"]}
            is_valid = values["format"] == FORMAT
        except (ValueError, TypeError, KeyError):
            raise BucketError(f"{name} in the bucket {self.bucket} cannot be read.") from None
        if not is_valid:
            raise BucketError(f"{name} in the bucket {self.bucket} was written by another version of the application.")
        for path, version in files.items():
            if not is_state_path(path) or not _SHA256.fullmatch(version.sha256):
                raise BucketError(f"{name} in the bucket {self.bucket} is refused: it lists the file {path[:100]!r}.")
        return Manifest(name, files)

    def _download_files(self, manifest: Manifest, target: Path) -> None:
        """Download the files of a manifest below `target`, and check the SHA-256 and size of each."""
        files = {path: version for path, version in manifest.files.items() if path != DATABASE or self._has_database}
        for path in files:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
        self._client.download([(_blob(version.sha256), target / path) for path, version in files.items()])
        for path, version in files.items():
            if file_version(target / path) != version:
                raise BucketError(f"{path} in the bucket {self.bucket} is damaged: it does not match its SHA-256.")

    def _measure_progress(self) -> int:
        """Return the number of bytes downloaded so far."""
        sizes = 0
        for folder, _, names in os.walk(self._work / "restore"):
            for name in names:
                try:
                    sizes += os.stat(os.path.join(folder, name)).st_blocks
                except OSError:
                    continue
        return sizes

    def _replace_files(self, manifest: Manifest) -> None:
        """Move the downloaded files to their places, after moving existing ones away."""
        self._marker.unlink(missing_ok=True)
        existing = [self._data_dir / name for name in dict.fromkeys((*DATABASE_FILES, *ROOTS))]
        existing = [path for path in existing if path.is_file() or (path.is_dir() and any(path.iterdir()))]
        if not self._has_database:
            existing = [path for path in existing if path.name not in DATABASE_FILES]
        if existing:
            replaced = self._data_dir / f"replaced-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
            replaced.mkdir(exist_ok=True)
            _log.warning("Files in %s that come from elsewhere are moved to %s", self._data_dir, replaced.name)
            for path in existing:
                os.replace(path, replaced / path.name)
        restored = self._work / "restore"
        for path in sorted(restored.iterdir()) if restored.is_dir() else []:
            target = self._data_dir / path.name
            if target.is_dir():
                target.rmdir()
            os.replace(path, target)
        self._base, self._saved = manifest.name, manifest
        self._write_marker()

    # ── Marker ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _marker(self) -> Path:
        """File in DATA_DIR that names the manifest that its state comes from."""
        return self._work / "base.json"

    def _read_marker(self) -> str:
        """Return the name of the manifest that DATA_DIR comes from, or "" if it comes from none of this bucket."""
        try:
            values = json.loads(self._marker.read_text(encoding="utf-8"))
            name = str(values["manifest"]) if values["bucket"] == self.bucket else ""
        except (OSError, ValueError, TypeError, KeyError):
            return ""
        return name if _MANIFEST.fullmatch(name) else ""

    def _write_marker(self) -> None:
        self._work.mkdir(parents=True, exist_ok=True)
        write_atomically(self._marker, json.dumps({"bucket": self.bucket, "manifest": self._base}))


def _run_with_progress(function: Callable[[], T], progress: Callable[[], int], stall_seconds: float) -> T:
    """Return a function's result; raise BucketError if `progress` does not change for `stall_seconds`.

    The function cannot be stopped: it ends in its own thread, and its result is then ignored.
    """
    outcome: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="state-restore", daemon=True)
    thread.start()
    last, deadline = progress(), time.monotonic() + stall_seconds
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(min(0.5, stall_seconds))
        if (current := progress()) != last:
            last, deadline = current, time.monotonic() + stall_seconds
    if not outcome:
        raise BucketError(f"The Hub did not respond for {stall_seconds:.0f} seconds.")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType]


def _blob(sha256: str) -> str:
    return f"blobs/{sha256}"


def _generation(name: str) -> int:
    match = _MANIFEST.fullmatch(name)
    return int(match[1]) if match else 0


def _to_json(manifest: Manifest, lease: Lease) -> bytes:
    rows = [{"path": path, **asdict(version)} for path, version in sorted(manifest.files.items())]
    return json.dumps({"format": FORMAT, "saved": time.time(), "deployment": lease.deployment, "files": rows}).encode()
