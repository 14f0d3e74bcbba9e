"""Usage recorder: buffers events in memory, spools them to disk, and delivers them to the database exactly once.

Two background threads: one writes buffered events to a spool file twice a second, the other inserts spool files into
the database and deletes them. A slow or unreachable database therefore delays only the delivery. Files that a process
leaves behind are delivered by the next one; duplicates are ignored, because an event id is inserted once. A killed
process loses at most the events of its last second.
"""

from __future__ import annotations

import atexit
import json
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, select

from storage.database import Database
from storage.files import write_atomically
from storage.tables import DOLLAR, EVENTS, HOUR, HOURS, KIND_COLUMNS, KINDS, REWARD, SECOND
from usage.archive import RETENTION_MONTHS, archive_old_events
from usage.events import Deployment, UsageEvent, name_digest
from usage.time_window import from_micros, to_micros

SPOOL_INTERVAL = 0.5  # seconds between two spool files
MAX_BUFFER = 100_000  # events in memory if the disk rejects writes
MAX_SPOOL = 1 * 2**30  # bytes of spool files
RETRY_DELAYS = (1.0, 60.0)  # first and longest delay, in seconds, between attempts to reach the database
MAINTENANCE_INTERVAL = 60.0  # seconds between two searches for old events
DIGESTS_PER_QUERY = 500
if TYPE_CHECKING:
    from usage.telemetry import TelemetryExporter

_log = logging.getLogger(__name__)


class Recorder:
    """Records the usage events of one deployment. `record` never blocks and never raises.

    Attributes:
        deployment: The deployment whose events are recorded.
        lost: Number of events dropped because neither memory nor disk had room.
    """

    def __init__(
        self,
        database: Database,
        folder: Path,
        deployment: Deployment,
        retention_months: int = RETENTION_MONTHS,
        telemetry: TelemetryExporter | None = None,
    ) -> None:
        """Create a recorder without starting its threads.

        Args:
            database: Destination of the events.
            folder: Folder of the spool files.
            deployment: The running deployment.
            retention_months: Months after which events are archived; see `usage.archive`.
            telemetry: Also receives the spool files.
        """
        self.deployment = deployment
        self.lost = 0
        self._database, self._folder, self._retention_months = database, folder, retention_months
        self._telemetry = telemetry
        self._buffer: deque[UsageEvent] = deque()
        self._lock = threading.Lock()
        self._spool_lock = threading.Lock()
        self._recorded, self._spooled, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the background threads, which also deliver spool files of earlier processes."""
        if not self._threads:
            self._threads = [
                threading.Thread(target=loop, name=f"usage-{name}", daemon=True)
                for name, loop in {"spool": self._spool_loop, "deliver": self._deliver_loop}.items()
            ]
            for thread in self._threads:
                thread.start()
            self._spooled.set()
            if self._telemetry:
                self._telemetry.start()
            atexit.register(self.close)

    def record(self, event: UsageEvent) -> None:
        """Add an event to the buffer, or count it in `lost` if the buffer is full."""
        with self._lock:
            if len(self._buffer) >= MAX_BUFFER:
                self.lost += 1
                return
            self._buffer.append(event)
        self._recorded.set()

    def flush(self) -> None:
        """Deliver all recorded events now.

        Raises:
            StoreError: The database cannot be reached.
            OSError: The spool file cannot be written.
        """
        self._spool()
        for file in self._files():
            self._deliver(file)

    def close(self) -> None:
        """Stop the threads and spool the remaining events; the next process delivers them."""
        self._stop.set()
        self._recorded.set()
        self._spooled.set()
        for thread in self._threads:
            thread.join(2)
        atexit.unregister(self.close)
        with suppress(OSError):
            self._spool()
        if self._telemetry:
            self._telemetry.close()

    # ── Memory to disk ──────────────────────────────────────────────────────────────────────────────────────────────

    def _spool_loop(self) -> None:
        while self._recorded.wait() and not self._stop.is_set():
            self._recorded.clear()
            self._stop.wait(SPOOL_INTERVAL)
            try:
                self._spool()
            except OSError as error:
                _log.warning("Cannot write usage events to disk (%s). Keeping them in memory.", error.strerror)
                self._stop.wait(1)
                self._recorded.set()

    def _spool(self) -> None:
        """Write the buffered events to a new spool file. On failure they return to the buffer."""
        with self._spool_lock:
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

    def _write(self, events: deque[UsageEvent]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if _size(self._folder) > MAX_SPOOL:
            self.lost += len(events)
            return
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.jsonl"
        lines = "".join(json.dumps(_to_json(event), separators=(",", ":")) + "\n" for event in events)
        copy = self._telemetry.folder / name if self._telemetry else None
        if copy:
            copy.parent.mkdir(parents=True, exist_ok=True)
            if _size(copy.parent) <= MAX_SPOOL:
                write_atomically(copy, lines)
        try:
            write_atomically(self._folder / name, lines)
        except OSError:  # the events will be written again, under another name
            if copy:
                copy.unlink(missing_ok=True)
            raise
        if self._telemetry:
            self._telemetry.notify()

    # ── Disk to database ────────────────────────────────────────────────────────────────────────────────────────────

    def _deliver_loop(self) -> None:
        delay, maintained = RETRY_DELAYS[0], 0.0
        while not self._stop.is_set():
            self._spooled.wait(MAINTENANCE_INTERVAL)
            self._spooled.clear()
            try:
                for file in self._files():
                    if self._stop.is_set():
                        return
                    self._deliver(file)
                if time.monotonic() - maintained > MAINTENANCE_INTERVAL:
                    archive_old_events(self._database, datetime.now(timezone.utc), self._retention_months)
                    maintained = time.monotonic()
                delay = RETRY_DELAYS[0]
            except Exception as error:
                _log.warning("Cannot deliver usage events; they stay on disk: %s", error)
                self._stop.wait(delay)
                delay = min(2 * delay, RETRY_DELAYS[1])
                self._spooled.set()

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*.jsonl"))

    def _deliver(self, file: Path) -> None:
        try:
            events = list(read_spool_file(file))
        except FileNotFoundError:
            return  # delivered by another process
        except (ValueError, TypeError, KeyError):
            _log.error("%s is not a file of usage events. Renaming it to .bad.", file.name)
            file.rename(file.with_suffix(".bad"))
            return
        insert_events(self._database, events)
        file.unlink(missing_ok=True)


def _size(folder: Path) -> int:
    """Return the size of the spool files in a folder in bytes. They may be deleted meanwhile."""
    size = 0
    for file in folder.glob("[0-9]*.jsonl"):
        with suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


# ── Spool files ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _to_json(event: UsageEvent) -> dict[str, Any]:
    values = {name: value for name, value in vars(event).items() if value is not None}
    if event.payer == "deployment":
        del values["payer"]  # versions without this field can then read the file
    return {**values, "time": to_micros(event.time)}


def read_spool_file(file: Path) -> Iterator[UsageEvent]:
    """Yield the events of a spool file. Session hashes that older versions wrote are replaced; see `UsageEvent`.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line is not an event; likewise TypeError and KeyError.
    """
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            values = json.loads(line)
            yield UsageEvent(**{**values, "time": from_micros(values["time"])})


# ── Database rows ───────────────────────────────────────────────────────────────────────────────────────────────────


def insert_events(database: Database, events: Sequence[UsageEvent]) -> None:
    """Insert events in one transaction; events whose id exists are ignored.

    The same transaction marks their hours as changed, by which caches find them; see `usage.cache`.

    Raises:
        StoreError: The database cannot be written; nothing was inserted.
    """
    if not events:
        return
    with database.transaction(write=True) as connection:
        kinds = kind_ids(database, connection, {_kind_names(event) for event in events})
        # Sorted, so that concurrent writers lock rows in the same order.
        rows = sorted((_to_row(event, kinds[_kind_names(event)]) for event in events), key=lambda row: row["id"])
        connection.execute(database.insert(EVENTS).on_conflict_do_nothing(index_elements=["id"]), rows)
        for hour in sorted({row["time"] - row["time"] % HOUR for row in rows}):
            statement = database.insert(HOURS).values(hour=hour, changes=1)
            changed = {"changes": HOURS.c.changes + 1}
            connection.execute(statement.on_conflict_do_update(index_elements=["hour"], set_=changed))


def _kind_names(event: UsageEvent) -> tuple[str, ...]:
    return tuple(getattr(event, name) for name in KIND_COLUMNS)


def _kind_digest(names: tuple[str, ...]) -> str:
    """Return the digest of a kind. Kinds that the deployment pays have that of versions without `payer`."""
    *others, payer = names
    return name_digest(*(others if payer == "deployment" else names))


def kind_ids(database: Database, connection: Connection, kinds: set[tuple[str, ...]]) -> dict[tuple[str, ...], int]:
    """Return the ids of kinds, given by their values of KIND_COLUMNS, and insert new kinds."""
    by_digest = {_kind_digest(names): names for names in kinds}
    ids = _select_kind_ids(connection, sorted(by_digest))
    missing = sorted(by_digest.keys() - ids)
    for digest in missing:
        values = {"digest": digest, **dict(zip(KIND_COLUMNS, by_digest[digest], strict=True))}
        connection.execute(database.insert(KINDS).values(values).on_conflict_do_nothing(index_elements=["digest"]))
    ids |= _select_kind_ids(connection, missing)
    return {names: ids[digest] for digest, names in by_digest.items()}


def _select_kind_ids(connection: Connection, digests: list[str]) -> dict[str, int]:
    ids: dict[str, int] = {}
    for start in range(0, len(digests), DIGESTS_PER_QUERY):
        query = select(KINDS.c.digest, KINDS.c.id).where(KINDS.c.digest.in_(digests[start : start + DIGESTS_PER_QUERY]))
        ids |= {row.digest: row.id for row in connection.execute(query)}
    return ids


def _to_row(event: UsageEvent, kind: int) -> dict[str, Any]:
    return {
        "id": event.id,
        "time": to_micros(event.time),
        "kind": kind,
        "latency": round(event.latency * SECOND),
        "first_token": _scale(event.first_token, SECOND),
        "queue": _scale(event.queue, SECOND),
        "cold_start": _scale(event.cold_start, SECOND),
        "tokens_in": event.tokens_in,
        "tokens_out": event.tokens_out,
        "cost": _scale(event.cost, DOLLAR),
        "reward": _scale(event.reward, REWARD),
        "candidates": event.candidates,
        "request": event.request_id,
        "session": event.session,
    }


def _scale(value: float | None, unit: int) -> int | None:
    return None if value is None else round(value * unit)
