"""The recorder: takes events at once, keeps them on disk within half a second, and delivers them exactly once.

Two threads. One writes what has come in to a file in the spool, twice a second; the other one delivers files to the
database and deletes them. A database that is slow or down so delays delivery and nothing else: the files wait, and
whichever process finds them next delivers them, twice if need be, for an event's id is written once only.
A process that is killed loses what came in since the last file: at most a second's events.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from storage.database import Database
from usage import ledger, rollups
from usage.events import Deployment, Event
from usage.time_window import micros, moment

EVERY = 0.5  # seconds between two files
MAX_BUFFER = 100_000  # events in memory, should the disk not take them
MAX_SPOOL = 1 * 2**30  # bytes of events that wait for the database
PATIENCE = (1.0, 60.0)  # seconds between two tries at a database that is down: at first, at most
UPKEEP = 60.0  # seconds between two rounds of roll-ups and retention
HOURS_A_ROUND = 24
_log = logging.getLogger(__name__)


class Recorder:
    """Records events of one deployment. `record` never waits, never fails, and never raises."""

    def __init__(self, database: Database, folder: Path, deployment: Deployment, keep: bool = True) -> None:
        """folder: the spool. keep: whether this process sees to roll-ups and retention, too."""
        self.deployment = deployment
        self.lost = 0  # events that neither memory nor disk had room for
        self._database, self._folder, self._keep = database, folder, keep
        self._buffer: deque[Event] = deque()
        self._lock = threading.Lock()
        self._spooling = threading.Lock()
        self._came, self._spooled, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Starts its threads, which deliver what an earlier process left."""
        if not self._threads:
            self._threads = [
                threading.Thread(target=work, name=f"usage-{work.__name__}", daemon=True)
                for work in (self._spool_all, self._deliver_all)
            ]
            for thread in self._threads:
                thread.start()
            self._spooled.set()
            atexit.register(self.close)

    def record(self, event: Event) -> None:
        """Takes an event. Where there is no room for it, it is counted in `lost`."""
        with self._lock:
            if len(self._buffer) >= MAX_BUFFER:
                self.lost += 1
                return
            self._buffer.append(event)
        self._came.set()

    def flush(self) -> None:
        """Delivers all that has come in so far, now. Raises StoreError, and OSError where the spool takes nothing."""
        self._spool()
        for file in self._files():
            self._deliver(file)

    def close(self) -> None:
        """Ends the threads and puts what is left on disk; whoever starts next delivers it."""
        self._stop.set()
        self._came.set()
        self._spooled.set()
        for thread in self._threads:
            thread.join(2)
        atexit.unregister(self.close)
        with suppress(OSError):
            self._spool()

    # ── From memory to disk ─────────────────────────────────────────────────────────────────────────────────────────

    def _spool_all(self) -> None:
        while self._came.wait() and not self._stop.is_set():
            self._came.clear()
            self._stop.wait(EVERY)
            try:
                self._spool()
            except OSError as error:
                _log.warning("Usage events cannot be written to disk (%s); they wait in memory", error.strerror)
                self._stop.wait(1)
                self._came.set()

    def _spool(self) -> None:
        with self._spooling:
            with self._lock:
                events, self._buffer = self._buffer, deque()
            if not events:
                return
            try:
                self._write(events)
            except OSError:
                with self._lock:
                    self._buffer.extendleft(reversed(events))
                raise
        self._spooled.set()

    def _write(self, events: deque[Event]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if sum(file.stat().st_size for file in self._files()) > MAX_SPOOL:
            self.lost += len(events)
            return
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.jsonl"
        part = self._folder / f".{name}"
        try:
            with open(part, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(_plain(event), separators=(",", ":")) + "\n" for event in events)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self._folder / name)
        except OSError:
            part.unlink(missing_ok=True)
            raise

    # ── From disk to the database ───────────────────────────────────────────────────────────────────────────────────

    def _deliver_all(self) -> None:
        patience, kept = PATIENCE[0], 0.0
        while not self._stop.is_set():
            self._spooled.wait(UPKEEP)
            self._spooled.clear()
            try:
                for file in self._files():
                    if self._stop.is_set():
                        return
                    self._deliver(file)
                if self._keep and time.monotonic() - kept > UPKEEP:
                    upkeep(self._database)
                    kept = time.monotonic()
                patience = PATIENCE[0]
            except Exception as error:
                _log.warning("Usage events wait on disk: %s", error)
                self._stop.wait(patience)
                patience = min(2 * patience, PATIENCE[1])
                self._spooled.set()

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*.jsonl"))

    def _deliver(self, file: Path) -> None:
        try:
            events = list(read(file))
        except FileNotFoundError:
            return  # another process was faster
        except (ValueError, TypeError, KeyError):
            _log.error("%s holds no usage events and is put aside", file.name)
            file.rename(file.with_suffix(".bad"))
            return
        ledger.add(self._database, events)
        file.unlink(missing_ok=True)


def upkeep(database: Database, now: datetime | None = None, hours: int = HOURS_A_ROUND) -> int:
    """One round of roll-ups and retention, of at most so many hours each. Returns how many were done."""
    now = now or datetime.now(timezone.utc)
    done = rollups.build(database, hours, micros(now))
    return done + rollups.retire(database, hours, micros(now - rollups.RETENTION))


def _plain(event: Event) -> dict[str, Any]:
    return {**{name: value for name, value in vars(event).items() if value is not None}, "time": micros(event.time)}


def read(file: Path) -> Iterator[Event]:
    """The events of a file of the spool. Raises OSError, and ValueError, TypeError or KeyError for what is none."""
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            values = json.loads(line)
            yield Event(**{**values, "time": moment(values["time"])})
