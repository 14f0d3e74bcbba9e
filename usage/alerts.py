"""Alerts: a limit of a branch's error rate, latency or spend; when it is exceeded, one signed webhook is sent.

All processes that share the database check the limits. Each webhook is claimed in the database before it is sent, and
sent again until the receiver accepts it. It is signed as in https://www.standardwebhooks.com. Its address comes from
the settings only.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Literal, get_args

import httpx
from sqlalchemy import delete, or_, select, update

from storage.database import Database, StoreError
from storage.tables import ALERTS
from usage.analytics import UsageAnalytics
from usage.events import MAX_NAME_LENGTH, name_digest, sanitize
from usage.time_window import UsageFilter, from_micros, to_micros

Measure = Literal["error_rate", "p95", "cost"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
MAX_LIMITS: dict[Measure, float] = {"error_rate": 1.0, "p95": 3600.0, "cost": 1_000_000.0}
PERIODS: dict[Measure, str] = {"error_rate": "hour", "p95": "hour", "cost": "day"}
MIN_CALLS = 10  # in the period, for an error rate or a percentile to count
CHECK_SECONDS = 60.0
RETRY = timedelta(minutes=2)  # between two attempts to send a webhook
TIMEOUT = 10.0  # seconds
SECRET_PREFIX = "whsec_"
ALL_BRANCHES = ""
_log = logging.getLogger(__name__)


class AlertError(ValueError):
    """Raised for an invalid limit. The message says what to change."""


@dataclass(frozen=True)
class Alert:
    """A limit, and whether it is exceeded.

    Attributes:
        branch: Git branch, or "" for all branches together.
        measure: "error_rate" (fraction, of the last hour), "p95" (seconds, of the last hour) or "cost" (US dollars, of
            the last day).
        limit: The limit in the measure's unit.
        value: The last checked value, None if unknown.
        since: Time since which the limit is exceeded; None if it is not.
        sent: Whether the webhook was accepted.
    """

    branch: str
    measure: Measure
    limit: float
    value: float | None = None
    since: datetime | None = None
    sent: bool = False


@dataclass(frozen=True)
class Webhook:
    """Receiver of alerts.

    Attributes:
        address: Its URL.
        secret: Key of the signatures: base64 after "whsec_", else any text; "" for unsigned webhooks.
    """

    address: str
    secret: str = ""

    def send(self, webhook_id: str, alert: Alert) -> bool:
        """Send an alert; return whether the receiver accepted it. Errors are logged without the address."""
        content = {"type": "usage.limit_exceeded", "branch": alert.branch or None, "measure": alert.measure}
        content |= {"limit": alert.limit, "value": alert.value, "period": PERIODS[alert.measure]}
        content |= {"since": alert.since.isoformat() if alert.since else None}
        body, timestamp = json.dumps(content), str(int(time.time()))
        headers = {"content-type": "application/json", "webhook-id": webhook_id, "webhook-timestamp": timestamp}
        if self.secret:
            headers["webhook-signature"] = self.sign(webhook_id, timestamp, body)
        try:
            response = httpx.post(self.address, content=body, headers=headers, timeout=TIMEOUT)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            _log.warning("An alert could not be sent (%s). It is sent again.", type(error).__name__)
            return False
        if not response.is_success:
            _log.warning("The receiver of alerts answered with status %d. It is sent again.", response.status_code)
        return response.is_success

    def sign(self, webhook_id: str, timestamp: str, body: str) -> str:
        """Return the signature of a message. Raises ValueError if the secret is not base64 after its prefix."""
        encoded = self.secret.removeprefix(SECRET_PREFIX)
        key = self.secret.encode() if encoded == self.secret else base64.b64decode(encoded, validate=True)
        signature = hmac.new(key, f"{webhook_id}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
        return f"v1,{base64.b64encode(signature).decode()}"


class Alerts:
    """Limits stored in a database. Methods raise StoreError if the database cannot be used."""

    def __init__(self, analytics: UsageAnalytics, webhook: Webhook | None = None) -> None:
        """Create the alerts.

        Args:
            analytics: Queries of the usage events.
            webhook: Receives alerts; without it they only appear in the Usage tab.
        """
        self.webhook, self._analytics = webhook, analytics
        self._stop = threading.Event()

    @property
    def _database(self) -> Database:
        return self._analytics.database

    def start(self) -> None:
        """Check the limits and send webhooks once a minute, in a background thread."""
        threading.Thread(target=self._loop, name="usage-alerts", daemon=True).start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()

    def set(self, alert: Alert) -> None:
        """Create or replace a limit.

        Raises:
            AlertError: The measure is unknown or the limit out of range.
        """
        if alert.measure not in MEASURES:
            raise AlertError(f"The measure must be one of {', '.join(MEASURES)}.")
        if not 0 < alert.limit <= MAX_LIMITS[alert.measure]:
            raise AlertError(f"This limit must be more than 0 and at most {MAX_LIMITS[alert.measure]:,g}.")
        branch = sanitize(alert.branch, MAX_NAME_LENGTH)
        values = {"branch": branch, "measure": alert.measure, "limit": alert.limit}
        values |= {"value": None, "since": None, "attempt": 0, "sent": False}
        statement = self._database.insert(ALERTS).values(digest=name_digest(branch, alert.measure), **values)
        with self._database.transaction(write=True) as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=["digest"], set_=values))

    def remove(self, branch: str, measure: str) -> None:
        """Delete a limit, if it exists."""
        digest = name_digest(sanitize(branch, MAX_NAME_LENGTH), measure)
        with self._database.transaction(write=True) as connection:
            connection.execute(delete(ALERTS).where(ALERTS.c.digest == digest))

    def list(self) -> tuple[Alert, ...]:
        """Return all limits, sorted by branch and measure."""
        with self._database.transaction() as connection:
            rows = connection.execute(select(ALERTS).order_by(ALERTS.c.branch, ALERTS.c.measure)).all()
        return tuple(
            Alert(row.branch, row.measure, row.limit, row.value, row.since and from_micros(row.since), row.sent)
            for row in rows
        )

    def check(self, now: datetime | None = None) -> None:
        """Compare all limits with the usage."""
        now = now or datetime.now(timezone.utc)
        for alert in self.list():
            value = self._measure(alert, now)
            exceeded = value is not None and value > alert.limit
            row = ALERTS.c.digest == name_digest(alert.branch, alert.measure)
            with self._database.transaction(write=True) as connection:
                connection.execute(update(ALERTS).where(row).values(value=value))
                if exceeded:
                    begun = update(ALERTS).where(row, ALERTS.c.since.is_(None))
                    connection.execute(begun.values(since=to_micros(now), attempt=0, sent=False))
                else:
                    connection.execute(update(ALERTS).where(row).values(since=None))

    def send_webhooks(self, now: datetime | None = None) -> None:
        """Send the webhooks that are due."""
        now, webhook = now or datetime.now(timezone.utc), self.webhook
        if webhook is None:
            return
        for alert in self.list():
            if alert.since is None or alert.sent:
                continue
            digest, since = name_digest(alert.branch, alert.measure), to_micros(alert.since)
            row = (ALERTS.c.digest == digest, ALERTS.c.since == since)
            due = or_(ALERTS.c.attempt == 0, ALERTS.c.attempt <= to_micros(now - RETRY))
            claim = update(ALERTS).where(*row, ALERTS.c.sent.is_(False), due).values(attempt=to_micros(now))
            with self._database.transaction(write=True) as connection:
                if not connection.execute(claim).rowcount:
                    continue  # another process is sending it
            webhook_id = name_digest(digest, str(since))[:32]
            if webhook.send(webhook_id, alert):
                with self._database.transaction(write=True) as connection:
                    connection.execute(update(ALERTS).where(*row).values(sent=True))

    def _measure(self, alert: Alert, now: datetime) -> float | None:
        """Return the value of a measure; None if it is unknown or there are too few calls."""
        branches = (alert.branch,) if alert.branch != ALL_BRANCHES else ()
        metrics = self._analytics.metrics(UsageFilter(PERIODS[alert.measure], branches), now)
        too_few = alert.measure != "cost" and (metrics.calls.value or 0) < MIN_CALLS
        return None if too_few else getattr(metrics, alert.measure).value

    def _loop(self) -> None:
        while not self._stop.wait(CHECK_SECONDS):
            try:
                if self.list():
                    self.check()
                    self.send_webhooks()
            except Exception as error:
                reason = error if isinstance(error, StoreError) else type(error).__name__
                _log.warning("The limits of the usage could not be checked: %s", reason)
