"""The HTTP client against a server that plays Moondream's faults: what is tried again, what is told, how long it is."""

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

from inference.hosted.client import CloudError, Limiter, MoondreamClient, Timeouts, limiter, photo_url, retry_after
from tests.support import fault_server as faults
from tests.support.fault_server import KEY, Faults, fault_server

QUICK = Timeouts(connect=1, read=0.5, one=1, all=4)


@pytest.fixture(scope="module")
def running() -> Iterator[Faults]:
    with fault_server() as found:
        yield found


@pytest.fixture
def server(running: Faults, caplog: pytest.LogCaptureFixture) -> Iterator[MoondreamClient]:
    """A client of the fault server. Afterwards its key may stand in no log."""
    caplog.set_level(logging.DEBUG)
    yield MoondreamClient(running.address, SecretStr(KEY), rate=1_000, timeouts=QUICK)
    assert KEY not in caplog.text


def failure(call: Callable[[], Any]) -> CloudError:
    """The error that a call raises, with no key in it or in what led to it."""
    with pytest.raises(CloudError) as caught:
        call()
    error: BaseException | None = caught.value
    while error:
        assert KEY not in f"{error!r} {error.args}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return caught.value


def test_a_reply_has_its_object_and_its_id(running: Faults, server: MoondreamClient) -> None:
    running.play(200)
    reply = server.post("query", {"question": "?"})
    assert (reply.data["answer"], reply.request_id, reply.tries, reply.perhaps_charged) == ("A cat.", "req-1", 1, 0)
    method, path, headers, body = running.asked[0]
    assert (method, path, body) == ("POST", "/v1/query", {"question": "?"})
    assert headers["X-Moondream-Auth"] == KEY and headers["Authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(server) + str(server)


@pytest.mark.parametrize(
    ("status", "kind", "advice"),
    [
        (400, "provider", "refused the request"),
        (401, "key", "does not accept the key"),
        (402, "credit", "no credit"),
        (403, "credit", "no right"),
        (404, "unknown_model", "no such model"),
        (413, "too_large", "too large"),
        (422, "provider", "refused the request"),
    ],
)
def test_a_refusal_is_told_once_with_what_to_do(
    running: Faults, server: MoondreamClient, status: int, kind: str, advice: str
) -> None:
    running.play(status)
    error = failure(lambda: server.post("query", {}))
    assert (error.kind, error.status, error.uncertain) == (kind, status, False)
    assert advice in error.message and len(running.asked) == 1
    assert ("told [key] no" in error.message) == (status != 401)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 522])
def test_what_may_pass_is_tried_again(running: Faults, server: MoondreamClient, status: int) -> None:
    running.play(status, status, 200)
    reply = server.post("query", {})
    assert reply.tries == len(running.asked) == 3
    assert reply.perhaps_charged == (0 if status in (408, 425, 429, 503) else 2)


def test_what_does_not_pass_ends(running: Faults, server: MoondreamClient) -> None:
    running.play(500)
    error = failure(lambda: server.post("query", {}))
    assert len(running.asked) == 4 and "has trouble (status 500)" in error.message and error.uncertain


def test_a_server_that_wants_to_be_left_alone_is(running: Faults, server: MoondreamClient) -> None:
    running.play((429, {"Retry-After": "1"}), 200)
    assert server.post("query", {}).tries == 2
    assert running.times[1] - running.times[0] >= 0.99
    soon = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=2), usegmt=True)
    running.play((503, {"Retry-After": soon}), 200)
    assert server.post("query", {}).tries == 2 and running.times[1] - running.times[0] > 0.5
    running.play((429, {"Retry-After": "3600"}))
    began = time.monotonic()
    error = failure(lambda: server.post("query", {}))
    assert error.kind == "busy" and len(running.asked) == 1 and time.monotonic() - began < 2
    running.play(200)
    assert failure(lambda: server.post("query", {})).kind == "busy" and not running.asked
    limiter.cache_clear()


@pytest.mark.parametrize("fault", [faults.hang, faults.drip, faults.too_short, faults.reset])
def test_a_lost_answer_is_asked_for_again_only_where_that_may_be(running: Faults, fault: Any) -> None:
    server = MoondreamClient(running.address, SecretStr(KEY), rate=998, timeouts=QUICK)
    running.play(fault, 200)
    reply = server.post("query", {})
    assert (reply.tries, reply.perhaps_charged, len(running.asked)) == (2, 1, 2)
    running.play(fault, 200)
    error = failure(lambda: server.post("tuning/train_step", {}, repeatable=False))
    assert error.uncertain and len(running.asked) == 1


@pytest.mark.parametrize("fault", [faults.hang, faults.drip])
def test_nothing_takes_longer_than_its_timeouts(running: Faults, fault: Any) -> None:
    server = MoondreamClient(running.address, rate=997, timeouts=QUICK)
    running.play(fault)
    began = time.monotonic()
    assert failure(lambda: server.post("query", {})).kind == "timeout"
    assert time.monotonic() - began < QUICK.all + QUICK.one + QUICK.read
    running.play(fault)
    began = time.monotonic()
    assert failure(lambda: list(server.stream("query", {}))).kind == "timeout"
    assert time.monotonic() - began < QUICK.all + QUICK.one + QUICK.read


@pytest.mark.parametrize(
    ("fault", "said", "tries"),
    [
        (faults.malformed, "something else than JSON", 1),
        (faults.html_200, "Check its address", 1),
        (faults.html, "status 502", 4),
        (faults.endless, "too large", 1),
        ({"error": f"no engine {KEY}"}, "no engine [key]", 1),
        ((301, {"Location": "http://example.com"}), "status 301", 1),
    ],
)
def test_what_is_no_answer_is_told_without_its_markup(running: Faults, fault: Any, said: str, tries: int) -> None:
    server = MoondreamClient(running.address, SecretStr(KEY), rate=996, timeouts=Timeouts(1, 2, 5, 10))
    running.play(fault)
    error = failure(lambda: server.post("query", {}))
    assert said in error.message and "<" not in error.message and len(running.asked) == tries


def test_a_stream_comes_in_pieces(running: Faults, server: MoondreamClient) -> None:
    running.play(500, faults.stream)
    events = list(server.stream("caption", {}))
    assert [event.get("chunk", event.get("text")) for event in events] == ["A ", "cat.", ""]
    assert events[-1]["metrics"]["input_tokens"] == 735 and len(running.asked) == 2


def test_a_whole_answer_in_place_of_a_stream_is_one_piece(running: Faults, server: MoondreamClient) -> None:
    running.play(200)
    assert list(server.stream("query", {})) == [faults.FINE | {"completed": True}]


@pytest.mark.parametrize(("fault", "said"), [(faults.half_a_stream, "broke off"), (faults.stream_error, "[key]")])
def test_half_a_stream_is_an_error_and_not_begun_anew(
    running: Faults, server: MoondreamClient, fault: Any, said: str
) -> None:
    running.play(fault, 200)
    heard: list[dict[str, Any]] = []
    error = failure(lambda: heard.extend(server.stream("query", {})) or [])
    assert said in error.message and len(running.asked) == 1
    running.play(fault)
    pieces = server.stream("query", {})
    assert next(pieces)["chunk"] == "A "
    pieces.close()  # type: ignore[attr-defined]
    assert len(running.asked) == 1


def test_who_does_not_want_to_any_more_is_let_go(running: Faults) -> None:
    server = MoondreamClient(running.address, rate=0.4, timeouts=QUICK)
    running.play(200)
    server.post("query", {})
    gone = threading.Event()
    threading.Timer(0.3, gone.set).start()
    began = time.monotonic()
    error = failure(lambda: server.post("query", {}, gone.is_set))
    assert error.kind == "cancelled" and time.monotonic() - began < 2 and len(running.asked) == 1


def test_a_server_that_is_not_there_is_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    server = MoondreamClient("http://127.0.0.1:1/v1", SecretStr(KEY), timeouts=QUICK, rate=995)
    error = failure(lambda: server.post("query", {}))
    assert "cannot be reached" in error.message and not error.uncertain


def test_all_share_the_limit() -> None:
    shared, turns = Limiter(50), []

    def ask() -> None:
        for _ in range(5):
            shared.wait(lambda: False, time.monotonic() + 10)
            turns.append(time.monotonic())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(turns) == 20 and max(turns) - min(turns) >= 19 / 50 - 0.02


@pytest.mark.parametrize(
    "url", ["ftp://host/v1", "localhost:2020/v1", "https://user:pass@host/v1", "http://h/v1?key=x"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="looks like"):
        MoondreamClient(url)


@pytest.mark.parametrize("key", ["a b", "ключ", "x\r\nHost: evil", "k" * 501])
def test_a_key_that_is_none_is_refused_without_being_told(key: str) -> None:
    with pytest.raises(ValueError, match="Copy it again") as caught:
        MoondreamClient(key=SecretStr(key))
    assert key not in str(caught.value)


def test_a_photo_is_a_jpeg_of_2048_pixels() -> None:
    import base64

    import cv2

    url = photo_url(np.random.default_rng(0).integers(0, 256, (30, 3000, 3), np.uint8))
    head, _, data = url.partition(",")
    coded = np.frombuffer(base64.b64decode(data), np.uint8)
    assert head == "data:image/jpeg;base64" and cv2.imdecode(coded, cv2.IMREAD_COLOR).shape == (20, 2048, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize(("text", "seconds"), [("3", 3), ("-1", None), ("soon", None), (None, None), ("nan", None)])
def test_retry_after_is_read_with_care(text: str | None, seconds: float | None) -> None:
    assert retry_after(text) == seconds
