"""The HTTP client against a fault server: retries, error messages and timeouts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from inference.hosted.client import (
    CloudError,
    MoondreamClient,
    RateLimiter,
    Timeouts,
    parse_retry_after,
    photo_data_url,
    rate_limiter,
)
from tests.support import fault_server as faults
from tests.support.fault_server import KEY, FaultServer, fault_server

pytestmark = pytest.mark.slow

SHORT_TIMEOUTS = Timeouts(connect=1, read=0.5, attempt=1, total=4)


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with fault_server() as running:
        yield running


@pytest.fixture
def client(server: FaultServer, caplog: pytest.LogCaptureFixture) -> Iterator[MoondreamClient]:
    """Return a client of the fault server, and check afterwards that no log contains its key."""
    caplog.set_level(logging.DEBUG)
    yield MoondreamClient(server.address, SecretStr(KEY), rate=1_000, timeouts=SHORT_TIMEOUTS)
    assert KEY not in caplog.text


def raised(call: Callable[[], Any]) -> CloudError:
    """Return the CloudError that a call raises. Neither it nor its causes may contain the key."""
    with pytest.raises(CloudError) as caught:
        call()
    error: BaseException | None = caught.value
    while error:
        assert KEY not in f"{error!r} {error.args}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return caught.value


def test_post_returns_data_and_request_id(server: FaultServer, client: MoondreamClient) -> None:
    server.respond_with(200)
    response = client.post("query", {"question": "?"})
    assert (response.data["answer"], response.request_id, response.attempts, response.possible_extra_charges) == (
        "A cat.",
        "req-1",
        1,
        0,
    )
    method, path, headers, body = server.requests[0]
    assert (method, path, body) == ("POST", "/v1/query", {"question": "?"})
    assert headers["X-Moondream-Auth"] == KEY and headers["Authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(client) + str(client)


@pytest.mark.parametrize(
    ("status", "kind", "advice"),
    [
        (400, "provider", "rejected the request"),
        (401, "key", "does not accept the key"),
        (402, "credit", "no credit"),
        (403, "credit", "no permission"),
        (404, "unknown_model", "does not have this model"),
        (413, "too_large", "too large"),
        (422, "provider", "rejected the request"),
    ],
)
def test_client_errors_are_not_retried_and_have_advice(
    server: FaultServer, client: MoondreamClient, status: int, kind: str, advice: str
) -> None:
    server.respond_with(status)
    error = raised(lambda: client.post("query", {}))
    assert (error.kind, error.status, error.uncertain) == (kind, status, False)
    assert advice in error.message and len(server.requests) == 1
    assert ("[key] was rejected" in error.message) == (status != 401)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 522])
def test_transient_errors_are_retried(server: FaultServer, client: MoondreamClient, status: int) -> None:
    server.respond_with(status, status, 200)
    response = client.post("query", {})
    assert response.attempts == len(server.requests) == 3
    assert response.possible_extra_charges == (0 if status in (408, 425, 429, 503) else 2)


def test_persistent_server_error_fails_after_all_attempts(server: FaultServer, client: MoondreamClient) -> None:
    server.respond_with(500)
    error = raised(lambda: client.post("query", {}))
    assert len(server.requests) == 4 and "has a problem (status 500)" in error.message and error.uncertain


def test_retry_after_header_is_respected(server: FaultServer, client: MoondreamClient) -> None:
    server.respond_with((429, {"Retry-After": "1"}), 200)
    assert client.post("query", {}).attempts == 2
    assert server.times[1] - server.times[0] >= 0.99
    soon = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=2), usegmt=True)
    server.respond_with((503, {"Retry-After": soon}), 200)
    assert client.post("query", {}).attempts == 2 and server.times[1] - server.times[0] > 0.5
    server.respond_with((429, {"Retry-After": "3600"}))
    start = time.monotonic()
    error = raised(lambda: client.post("query", {}))
    assert error.kind == "busy" and len(server.requests) == 1 and time.monotonic() - start < 2
    server.respond_with(200)
    assert raised(lambda: client.post("query", {})).kind == "busy" and not server.requests
    rate_limiter.cache_clear()


@pytest.mark.parametrize("fault", [faults.hang, faults.drip, faults.short_body, faults.reset_connection])
def test_lost_response_is_retried_only_if_repeatable(server: FaultServer, fault: Any) -> None:
    client = MoondreamClient(server.address, SecretStr(KEY), rate=998, timeouts=SHORT_TIMEOUTS)
    server.respond_with(fault, 200)
    response = client.post("query", {})
    assert (response.attempts, response.possible_extra_charges, len(server.requests)) == (2, 1, 2)
    server.respond_with(fault, 200)
    error = raised(lambda: client.post("tuning/train_step", {}, repeatable=False))
    assert error.uncertain and len(server.requests) == 1


@pytest.mark.parametrize("fault", [faults.hang, faults.drip])
def test_calls_end_within_the_timeouts(server: FaultServer, fault: Any) -> None:
    client = MoondreamClient(server.address, rate=997, timeouts=SHORT_TIMEOUTS)
    server.respond_with(fault)
    start = time.monotonic()
    assert raised(lambda: client.post("query", {})).kind == "timeout"
    assert time.monotonic() - start < SHORT_TIMEOUTS.total + SHORT_TIMEOUTS.attempt + SHORT_TIMEOUTS.read
    server.respond_with(fault)
    start = time.monotonic()
    assert raised(lambda: list(client.stream("query", {}))).kind == "timeout"
    assert time.monotonic() - start < SHORT_TIMEOUTS.total + SHORT_TIMEOUTS.attempt + SHORT_TIMEOUTS.read


@pytest.mark.parametrize(
    ("fault", "message", "attempts"),
    [
        (faults.malformed_json, "did not return a JSON object", 1),
        (faults.html_success, "Check its address", 1),
        (faults.html_error, "status 502", 4),
        (faults.oversized_body, "too large", 1),
        ({"error": f"no engine {KEY}"}, "no engine [key]", 1),
        ((301, {"Location": "http://example.com"}), "status 301", 1),
    ],
)
def test_invalid_responses_fail_with_a_message_without_markup(
    server: FaultServer, fault: Any, message: str, attempts: int
) -> None:
    client = MoondreamClient(server.address, SecretStr(KEY), rate=996, timeouts=Timeouts(1, 2, 5, 10))
    server.respond_with(fault)
    error = raised(lambda: client.post("query", {}))
    assert message in error.message and "<" not in error.message and len(server.requests) == attempts


def test_stream_yields_events(server: FaultServer, client: MoondreamClient) -> None:
    server.respond_with(500, faults.complete_stream)
    events = list(client.stream("caption", {}))
    assert [event.get("chunk", event.get("text")) for event in events] == ["A ", "cat.", ""]
    assert events[-1]["metrics"]["input_tokens"] == 735 and len(server.requests) == 2


def test_json_response_to_a_stream_request_is_one_event(server: FaultServer, client: MoondreamClient) -> None:
    server.respond_with(200)
    assert list(client.stream("query", {})) == [faults.SUCCESS | {"completed": True}]


@pytest.mark.parametrize(
    ("fault", "message"), [(faults.truncated_stream, "ended early"), (faults.stream_error, "[key]")]
)
def test_broken_stream_fails_and_is_not_retried(
    server: FaultServer, client: MoondreamClient, fault: Any, message: str
) -> None:
    server.respond_with(fault, 200)
    error = raised(lambda: list(client.stream("query", {})))
    assert message in error.message and len(server.requests) == 1
    server.respond_with(fault)
    events = client.stream("query", {})
    assert next(events)["chunk"] == "A "
    events.close()  # type: ignore[attr-defined]
    assert len(server.requests) == 1


def test_cancel_ends_waiting_for_the_rate_limit(server: FaultServer) -> None:
    client = MoondreamClient(server.address, rate=0.4, timeouts=SHORT_TIMEOUTS)
    server.respond_with(200)
    client.post("query", {})
    cancel = threading.Event()
    threading.Timer(0.3, cancel.set).start()
    start = time.monotonic()
    error = raised(lambda: client.post("query", {}, cancel.is_set))
    assert error.kind == "cancelled" and time.monotonic() - start < 2 and len(server.requests) == 1


def test_unreachable_server_fails_with_a_message(caplog: pytest.LogCaptureFixture) -> None:
    client = MoondreamClient("http://127.0.0.1:1/v1", SecretStr(KEY), timeouts=SHORT_TIMEOUTS, rate=995)
    error = raised(lambda: client.post("query", {}))
    assert "cannot be reached" in error.message and not error.uncertain


def test_rate_limit_is_shared_by_threads() -> None:
    limiter, times = RateLimiter(50), []

    def send_requests() -> None:
        for _ in range(5):
            limiter.acquire(lambda: False, time.monotonic() + 10)
            times.append(time.monotonic())

    threads = [threading.Thread(target=send_requests) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times) == 20 and max(times) - min(times) >= 19 / 50 - 0.02


@pytest.mark.parametrize(
    "url", ["ftp://host/v1", "localhost:2020/v1", "https://user:pass@host/v1", "http://h/v1?key=x"]
)
def test_invalid_url_is_rejected(url: str) -> None:
    with pytest.raises(ValueError, match="looks like"):
        MoondreamClient(url)


@pytest.mark.parametrize("key", ["a b", "ключ", "x\r\nHost: evil", "k" * 501])
def test_invalid_key_is_rejected_without_exposing_it(key: str) -> None:
    with pytest.raises(ValueError, match="Copy it again") as caught:
        MoondreamClient(key=SecretStr(key))
    assert key not in str(caught.value)


def test_photo_is_encoded_as_jpeg_of_at_most_2048_pixels() -> None:
    import base64

    import cv2

    url = photo_data_url(np.random.default_rng(0).integers(0, 256, (30, 3000, 3), np.uint8))
    prefix, _, data = url.partition(",")
    coded = np.frombuffer(base64.b64decode(data), np.uint8)
    assert prefix == "data:image/jpeg;base64" and cv2.imdecode(coded, cv2.IMREAD_COLOR).shape == (20, 2048, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize(("text", "seconds"), [("3", 3), ("-1", None), ("soon", None), (None, None), ("nan", None)])
def test_malformed_retry_after_is_ignored(text: str | None, seconds: float | None) -> None:
    assert parse_retry_after(text) == seconds
