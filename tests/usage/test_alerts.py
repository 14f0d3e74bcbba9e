"""Tests of alerts: one signed webhook per exceeded limit, sent again until a real receiver accepts it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import app
from settings import Settings
from storage.database import Database, StoreError
from usage.alerts import Alert, AlertError, Alerts, Webhook
from usage.analytics import UsageAnalytics
from usage.events import UsageEvent
from usage.recorder import insert_events

NOW = datetime(2026, 11, 20, 12, 30, tzinfo=timezone.utc)
SECRET = "a secret"


def check_and_send(alerts: Alerts, now: datetime) -> None:
    alerts.check(now)
    alerts.send_webhooks(now)


class Receiver(ThreadingHTTPServer):
    """Answers requests with `status` and keeps them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ReceiverHandler)
        self.status = 200
        self.requests: list[tuple[dict[str, str], str]] = []


class ReceiverHandler(BaseHTTPRequestHandler):
    """Keeps headers and body."""

    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.requests.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """Return a database of each kind with calls in the last minutes: 12 on main, a third failed, and 3 on topic."""
    file_url = f"sqlite:///{tmp_path / 'usage.sqlite3'}"
    database = Database(file_url if request.param == "sqlite" else request.getfixturevalue("postgres_url"))
    values = {"latency": 2.0, "cost": 0.5, "cost_basis": "reported"}
    events = [
        UsageEvent(
            NOW - timedelta(minutes=n),
            "m",
            "recipe",
            "ok" if n % 3 else "error",
            branch="main",
            **values,  # type: ignore[arg-type]
        )
        for n in range(1, 13)
    ]
    topic = [UsageEvent(NOW - timedelta(minutes=n), "m", "recipe", "error", branch="topic") for n in range(1, 4)]
    insert_events(database, events + topic)
    return database


def test_exceeded_limit_sends_one_signed_webhook_and_again_after_a_recovery(
    database: Database, receiver: Receiver
) -> None:
    webhook = Webhook(f"http://127.0.0.1:{receiver.server_port}/hook", SECRET)
    alerts, other_process = (Alerts(UsageAnalytics(database), webhook) for _ in range(2))
    alerts.set(Alert("main", "error_rate", 0.3))
    alerts.set(Alert("topic", "error_rate", 0.3))  # too few calls
    alerts.set(Alert("", "cost", 100.0))  # not reached
    for process in (alerts, other_process, alerts):
        check_and_send(process, NOW)
    ((headers, body),) = receiver.requests
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body}".encode()
    expected = base64.b64encode(hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    content = json.loads(body)
    assert content["branch"] == "main" and content["measure"] == "error_rate" and content["limit"] == 0.3
    assert content["value"] == pytest.approx(1 / 3) and content["since"] == NOW.isoformat()
    by_limit = {(alert.branch, alert.measure): alert for alert in alerts.list()}
    assert by_limit["main", "error_rate"].since == NOW and by_limit["main", "error_rate"].sent
    assert by_limit["topic", "error_rate"].since is None and by_limit["", "cost"].value == 6.0
    alerts.check(NOW + timedelta(hours=2))  # recovered: no calls
    assert all(alert.since is None for alert in alerts.list())
    check_and_send(alerts, NOW)
    assert len(receiver.requests) == 2


def test_webhook_is_sent_again_until_it_is_accepted(database: Database, receiver: Receiver) -> None:
    alerts = Alerts(UsageAnalytics(database), Webhook(f"http://127.0.0.1:{receiver.server_port}"))
    alerts.set(Alert("main", "p95", 1.5))
    receiver.status = 503
    for minutes in (0, 1, 2):  # the second is too early
        check_and_send(alerts, NOW + timedelta(minutes=minutes))
    assert len(receiver.requests) == 2 and not alerts.list()[0].sent
    receiver.status = 204
    check_and_send(alerts, NOW + timedelta(minutes=4))
    check_and_send(alerts, NOW + timedelta(minutes=8))
    assert len(receiver.requests) == 3 and alerts.list()[0].sent
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 1  # the receiver can tell repetitions
    assert "webhook-signature" not in receiver.requests[0][0]


def test_unreachable_receiver_is_not_an_error(database: Database) -> None:
    alerts = Alerts(UsageAnalytics(database), Webhook("http://127.0.0.1:1/"))
    alerts.set(Alert("main", "cost", 5.0))
    check_and_send(alerts, NOW)
    assert alerts.list()[0].since == NOW and not alerts.list()[0].sent
    alerts.remove("main", "cost")
    assert alerts.list() == ()


def test_secret_with_the_prefix_of_standard_webhooks_is_base64() -> None:
    """Check the example of https://github.com/standard-webhooks/standard-webhooks, also with a secret of plain text."""
    message = "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", '{"test": 2432232314}'
    signature = Webhook("http://unused", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").sign(*message)
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert Webhook("http://unused", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").sign(*message) != signature


def test_check_does_not_wait_for_the_receiver(database: Database, receiver: Receiver) -> None:
    alerts = Alerts(UsageAnalytics(database), Webhook(f"http://127.0.0.1:{receiver.server_port}"))
    alerts.set(Alert("main", "cost", 5.0))
    alerts.check(NOW)
    assert alerts.list()[0].since == NOW and not receiver.requests
    alerts.send_webhooks(NOW)
    assert alerts.list()[0].sent and len(receiver.requests) == 1


def test_thread_survives_errors(database: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("usage.alerts.CHECK_SECONDS", 0.01)
    alerts = Alerts(UsageAnalytics(database), Webhook(f"http://127.0.0.1:{receiver.server_port}"))
    alerts.set(Alert("main", "cost", 5.0))
    check, failures = alerts.check, [RuntimeError("unexpected"), StoreError("database", "unreachable")]
    checked = threading.Event()

    def fail_at_first() -> None:
        if failures:
            raise failures.pop()
        check(NOW)
        checked.set()

    monkeypatch.setattr(alerts, "check", fail_at_first)
    alerts.start()
    assert checked.wait(60)
    alerts.stop()


def test_address_of_the_webhook_is_not_logged(
    tmp_path: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    services = app.build_services(Settings(data_dir=tmp_path))
    with caplog.at_level(logging.INFO):
        address = f"http://127.0.0.1:{receiver.server_port}/hooks/token-in-the-path"
        assert Webhook(address, SECRET).send("id", Alert("", "cost", 1.0, 2.0))
    services.meter.recorder.close()
    assert len(receiver.requests) == 1 and "token-in-the-path" not in caplog.text


@pytest.mark.parametrize("alert", [Alert("b", "calls", 1.0), Alert("b", "error_rate", 1.1), Alert("b", "cost", 0.0)])  # type: ignore[arg-type]
def test_invalid_limit_is_refused(tmp_path: Path, alert: Alert) -> None:
    with pytest.raises(AlertError):
        Alerts(UsageAnalytics(Database(f"sqlite:///{tmp_path / 'x.sqlite3'}"))).set(alert)
