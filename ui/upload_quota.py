"""Limits of the files that visitors upload to the page: per visitor and hour, and in total."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path

MEGABYTE = 2**20
VISITOR_BYTES = 500 * MEGABYTE  # per visitor and hour
TOTAL_BYTES = 4096 * MEGABYTE  # in Gradio's cache, which also holds pictures for download
WINDOW_SECONDS = 3600.0
RECENT_SECONDS = 60.0  # younger files may be in use by a request
MAX_VISITORS = 10_000
VISITOR_LIMIT = "You have uploaded {limit:.0f} MB within an hour, which is the limit. Try again later."
TOTAL_LIMIT = "The server's space for uploads is full. Try again in a minute."


class UploadQuota:
    """Admits uploads to a folder. The oldest files are deleted when the folder is full."""

    def __init__(
        self,
        folder: Path,
        visitor_bytes: int | None = None,
        total_bytes: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Create the quota.

        Args:
            folder: Folder of the uploads.
            visitor_bytes: Maximum bytes per visitor and hour. Default: VISITOR_BYTES.
            total_bytes: Maximum bytes in the folder. Default: TOTAL_BYTES.
            clock: Returns the Unix time in seconds.
        """
        self._folder, self._clock = folder, clock
        self._visitor_bytes, self._total_bytes = visitor_bytes or VISITOR_BYTES, total_bytes or TOTAL_BYTES
        self._uploads: dict[str, deque[tuple[float, int]]] = defaultdict(deque)  # visitor -> time and size
        self._lock = threading.Lock()

    def admit(self, visitor: str, size: int) -> str | None:
        """Reserve space for an upload.

        Args:
            visitor: Hash of the visitor; visitors without one share a quota.
            size: Size in bytes.

        Returns:
            Why the upload is refused, or None.
        """
        now = self._clock()
        with self._lock:
            uploads = self._uploads[visitor]
            while uploads and uploads[0][0] < now - WINDOW_SECONDS:
                uploads.popleft()
            if sum(uploaded for _, uploaded in uploads) + size > self._visitor_bytes:
                return VISITOR_LIMIT.format(limit=self._visitor_bytes / MEGABYTE)
            if not self._make_room(size, now):
                return TOTAL_LIMIT
            uploads.append((now, size))
            if len(self._uploads) > MAX_VISITORS:
                del self._uploads[next(iter(self._uploads))]
        return None

    def _make_room(self, size: int, now: float) -> bool:
        """Delete the oldest files until `size` bytes fit. Returns whether they do."""
        files = []
        for path in self._folder.rglob("*") if self._folder.is_dir() else ():
            with contextlib.suppress(OSError):  # deleted meanwhile
                status = path.stat()
                if path.is_file():
                    files.append((status.st_mtime, status.st_size, path))
        used = sum(file_size for _, file_size, _ in files)
        for modified, file_size, path in sorted(files, key=lambda file: file[0]):
            if used + size <= self._total_bytes or modified > now - RECENT_SECONDS:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                used -= file_size
        return used + size <= self._total_bytes
