"""The API over real HTTP: the official SDK's every method, the wire itself, refusals, limits, faults, and a fuzzer."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import moondream
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import recipes
from inference.registry import BACKENDS, MODELS
from inference.types import RECIPE_QUESTION, Answer, Event, InferenceError, ModelSpec, Request, TextUpdate
from serving.middleware import MAX_BODY
from settings import Settings
from tests.support.api_client import PHOTO_URL, data_url, error_message, make_picture
from tests.support.app_server import app_server

KEY = "a-key-of-20-letters-"
SKILLS = {
    "query": {"question": "Is the photo bright or dark?"},
    "caption": {"length": "short"},
    "detect": {"object": "the main subject"},
    "point": {"object": "the main subject"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the API of an application without keys, with a model that fails as its prompt says."""
    BACKENDS["failing"] = __name__
    MODELS["failing"] = ModelSpec("failing", "Failing", "fails", "failing", "")
    with app_server(tmp_path_factory.mktemp("v1")) as address:
        yield f"{address}/v1"
    del MODELS["failing"], BACKENDS["failing"]


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the API of an application with a key."""
    keys = Settings.from_env({"PLAYGROUND_API_KEYS": KEY}).api_keys
    with app_server(tmp_path_factory.mktemp("locked"), api_keys=keys, api_rate=1.0) as address:
        yield f"{address}/v1"


STOPPED = threading.Event()


def answer(entry: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[Event]:
    """A backend that does what its prompt says."""
    kind = request.prompt
    if kind == "hang":
        STOPPED.clear()
        yield TextUpdate(0, "wait")
        cancel.wait(30)
        STOPPED.set()
        raise InferenceError("cancelled", "Cancelled.")
    if kind == "half":
        yield TextUpdate(0, "half an ")
        raise InferenceError("out_of_memory", "No room.")
    if kind == "say":
        yield Answer(0, f"{request.temperature:g} {entry.top_p:g} {request.max_tokens} {request.seed}", truncated=True)
        return
    raise InferenceError(kind, "It failed.")


def post(server: str, skill: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    body = {"image_url": PHOTO_URL} | SKILLS.get(skill, {}) | fields
    return httpx.post(f"{server}/{skill}", json=body, headers=headers, timeout=60)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line[6:]) for line in response.text.splitlines() if line]


# The official SDK


@pytest.fixture
def client(server: str) -> Any:
    return moondream.vl(endpoint=server)


def test_the_sdk_captions(client: Any) -> None:
    settings = {"temperature": 0}
    whole = client.caption(make_picture(), length="short", settings=settings)["caption"]
    pieces = list(client.caption(make_picture(), length="short", stream=True, settings=settings)["caption"])
    assert whole and "".join(pieces) == whole


def test_the_sdk_asks(client: Any) -> None:
    settings = {"temperature": 0, "max_tokens": 20}
    whole = client.query(make_picture(), "Is it dark?", settings=settings)["answer"]
    pieces = list(client.query(make_picture(), "Is it dark?", stream=True, settings=settings)["answer"])
    assert whole and "".join(pieces) == whole
    assert client.query(client.encode_image(make_picture()), "Is it dark?", reasoning=True, settings=settings)["answer"]


def test_the_sdk_detects_and_points(client: Any) -> None:
    boxes = client.detect(make_picture(), "the main subject", settings={"max_objects": 3})["objects"]
    points = client.point(make_picture(), "the main subject")["points"]
    assert 0 < len(boxes) <= 3 and points
    for value in [side for box in boxes for side in box.values()] + [x for spot in points for x in spot.values()]:
        assert 0 <= value <= 1
    assert boxes[0].keys() == {"x_min", "y_min", "x_max", "y_max"} and points[0].keys() == {"x", "y"}


def test_the_sdk_chooses_a_model(server: str) -> None:
    other = moondream.vl(endpoint=server, model="moondream-tiny-steady")
    assert other.query(make_picture(), "Is it dark?")["answer"]
    with pytest.raises(Exception, match="404"):
        moondream.vl(endpoint=server, model="moondream3-preview").query(make_picture(), "Is it dark?")


def test_the_sdk_sends_its_key(locked: str) -> None:
    assert moondream.vl(endpoint=locked, api_key=KEY).caption(make_picture(), length="short")["caption"]
    with pytest.raises(Exception, match="401"):
        moondream.vl(endpoint=locked, api_key="wrong").caption(make_picture())


# The wire


@pytest.mark.parametrize("skill", SKILLS)
def test_an_answer_has_its_numbers(server: str, skill: str) -> None:
    response = post(server, skill)
    told = response.json()
    assert response.status_code == 200 and told["request_id"] == response.headers["x-request-id"]
    assert told["model"] == "moondream-tiny" and told["finish_reason"] in ("stop", "length")
    metrics = told["metrics"]
    assert metrics["input_tokens"] > 10 and metrics["output_tokens"] >= 0
    assert metrics["ttft_ms"] >= metrics["prefill_time_ms"] > 0 and metrics["decode_time_ms"] >= 0


def test_a_stream_ends_with_its_numbers(server: str) -> None:
    told = events(post(server, "caption", stream=True))
    assert [event["completed"] for event in told] == [False] * (len(told) - 1) + [True]
    assert told[-1]["metrics"]["output_tokens"] > 0 and told[-1]["finish_reason"] == "stop"
    assert len({event["request_id"] for event in told}) == 1


def test_the_recipe_question_is_answered_inside_the_grammar(server: str) -> None:
    written = {
        post(server, "query", question=RECIPE_QUESTION, settings={"temperature": 1}).json()["answer"] for _ in range(3)
    }
    assert len(written) > 1 and all(recipes.parse(text).ok for text in written)


def test_settings_are_taken_as_they_are(server: str) -> None:
    asked = {"temperature": 0.7, "top_p": 0.5, "max_tokens": 9, "seed": 11, "variant": "unknown"}
    told = post(server, "query", model="failing", question="say", settings=asked).json()
    assert (told["answer"], told["finish_reason"]) == ("0.7 0.5 9 11", "length")
    most = post(server, "query", model="failing", question="say", settings={"max_tokens": 5000, "seed": 0}).json()
    assert most["answer"] == "0.2 0.9 768 0"


def test_a_seed_repeats_an_answer(server: str) -> None:
    asked = {"question": RECIPE_QUESTION, "settings": {"temperature": 1, "seed": 5}}
    assert post(server, "query", **asked).json()["answer"] == post(server, "query", **asked).json()["answer"]


def test_models_are_those_that_compute_here(server: str) -> None:
    told = httpx.get(f"{server}/models").json()
    names = [card["id"] for card in told["data"]]
    assert told["object"] == "list" and names[0] == "moondream-tiny" and "moondream-tiny-steady" in names
    assert not [name for name in names if name.startswith("moondream3")]


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_three_formats_are_read(server: str, kind: str) -> None:
    assert post(server, "query", image_url=data_url(make_picture(), kind), model="failing", question="say").status_code == 200


def test_calls_are_recorded_under_their_request_id(server: str) -> None:
    told = post(server, "query", settings={"max_tokens": 4}).json()
    for _ in range(100):
        rows = httpx.get(f"{server}/usage.csv").text
        if told["request_id"] in rows:
            break
        time.sleep(0.1)
    (row,) = [line for line in rows.splitlines() if told["request_id"] in line]
    assert "moondream-tiny" in row and "v1" in row and "query" in row


# Refusals


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://example.org/a.jpg", "not fetched"),
        ("file:///etc/passwd", "not fetched"),
        ("data:text/html;base64,AAAA", "not fetched"),
        ("data:image/svg+xml;base64,AAAA", "not fetched"),
        ("data:image/jpeg;base64,!!!", "no base64"),
        ("data:image/jpeg;base64,", "empty"),
        ("data:image/jpeg;base64,AAAA", "not"),
        (data_url(make_picture(8, 8)), "at least 16 x 16"),
        (data_url(Image.new("1", (6000, 5000)), "png"), "up to 24 can be read"),
    ],
)
def test_what_is_no_photo_is_refused(server: str, url: str, says: str) -> None:
    assert says in error_message(post(server, "query", image_url=url), 400, "invalid_request")


@pytest.mark.parametrize(
    "fields",
    [
        {"question": ""},
        {"question": "x" * 2001},
        {"question": 5},
        {"image_url": None},
        {"stream": "perhaps"},
        {"settings": {"temperature": -1}},
        {"settings": {"temperature": 1e400}},
        {"settings": {"top_p": 0}},
        {"settings": {"max_tokens": 0}},
        {"settings": []},
        {"spatial_refs": [[0.5, 0.5]]},
        {"model": 3},
    ],
)
def test_a_wrong_field_is_named(server: str, fields: dict[str, Any]) -> None:
    body = json.dumps({"image_url": PHOTO_URL} | SKILLS["query"] | fields)
    response = httpx.post(f"{server}/query", content=body, headers={"Content-Type": "application/json"}, timeout=60)
    message = error_message(response, 400, "invalid_request")
    assert next(iter(fields)) in message and PHOTO_URL[:40] not in message


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"image_url": "' + b"[" * 9000])
def test_what_is_no_json_is_refused(server: str, body: bytes) -> None:
    response = httpx.post(f"{server}/query", content=body, headers={"Content-Type": "application/json"})
    error_message(response, 400, "invalid_request")


def test_other_addresses_and_methods_have_the_same_shape(server: str) -> None:
    error_message(httpx.get(f"{server}/query"), 405, "method_not_allowed")
    error_message(httpx.post(f"{server}/segment", json={}), 404, "not_found")
    error_message(httpx.post(f"{server}/chat/completions", json={}), 404, "not_found")


def test_hosted_models_are_not_lent(server: str) -> None:
    for name in ("moondream3-preview", "moondream3.1-9B-A2B", "no such", "../../etc"):
        assert "GET /v1/models" in error_message(post(server, "query", model=name), 404, "not_found")


@pytest.mark.parametrize(
    ("kind", "status"), [("out_of_memory", 503), ("too_long", 400), ("failed", 500), ("something new", 500)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_models_failure_has_the_same_shape(server: str, kind: str, status: int, stream: bool) -> None:
    response = post(server, "query", model="failing", question=kind, stream=stream)
    assert response.status_code == status and response.json()["error"]["message"] == "It failed."


def test_a_failure_in_the_middle_of_a_stream_is_told(server: str) -> None:
    told = events(post(server, "query", model="failing", question="half", stream=True))
    assert told[0]["chunk"] == "half an " and told[-1]["completed"] is True
    assert told[-1]["error"]["message"] == "No room."


def test_a_body_that_is_too_large_is_refused_before_it_came(server: str) -> None:
    big = b'{"image_url": "' + b"A" * MAX_BODY + b'"}'
    headers = {"Content-Type": "application/json"}
    error_message(httpx.post(f"{server}/query", content=big, headers=headers, timeout=60), 413, "too_large")
    pieces = (big[place : place + 2**20] for place in range(0, len(big), 2**20))  # no length is stated
    error_message(httpx.post(f"{server}/query", content=pieces, headers=headers, timeout=60), 413, "too_large")


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_leaves_stops_the_model(server: str, stream: bool) -> None:
    host, port = server.removeprefix("http://").removesuffix("/v1").split(":")
    body = json.dumps({"image_url": PHOTO_URL, "model": "failing", "question": "hang", "stream": stream}).encode()
    head = f"POST /v1/query HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as line:
        line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.5)
        assert not STOPPED.is_set()
    assert STOPPED.wait(20)


def test_other_sites_pages_get_nothing(server: str) -> None:
    error_message(post(server, "query", {"Origin": "https://somewhere.example"}), 401, "unauthorized")
    asked = {"Origin": "https://somewhere.example", "Access-Control-Request-Method": "POST"}
    answered = httpx.options(f"{server}/query", headers=asked)
    assert not [name for name in answered.headers if name.startswith("access-control")]


def test_keys_are_asked_for_and_limited(locked: str) -> None:
    error_message(post(locked, "query"), 401, "unauthorized")
    error_message(httpx.get(f"{locked}/models"), 401, "unauthorized")
    key = {"X-Moondream-Auth": KEY}
    found = [httpx.get(f"{locked}/models", headers=key) for _ in range(8)]
    assert found[0].status_code == 200
    error_message(found[-1], 429, "rate_limited")
    assert int(found[-1].headers["retry-after"]) >= 1


def test_a_hundred_at_once_are_answered_or_sent_away(server: str) -> None:
    found: list[int] = []

    def ask() -> None:
        found.append(post(server, "query", question="Is it dark?", settings={"max_tokens": 4}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 100 and set(found) <= {200, 503} and found.count(200) >= 60


# The schema, and a fuzzer that follows it


@pytest.fixture(scope="module")
def described(server: str) -> Any:
    return schemathesis.openapi.from_url(f"{server}/openapi.json")


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize(("path", "method"), [("/models", "get"), *((f"/{skill}", "post") for skill in SKILLS)])
def test_whatever_the_schema_allows_or_forbids_is_answered_as_it_says(
    described: Any, path: str, method: str, mode: GenerationMode
) -> None:
    operation = described[path][method]

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def fuzz(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    if path != "/models" or mode is GenerationMode.POSITIVE:  # nothing can be wrong with what takes nothing
        fuzz()


TUNING = [
    ("/tuning/finetunes", "get"),
    ("/tuning/finetunes", "post"),
    ("/tuning/finetunes/{finetune_id}", "get"),
    ("/tuning/finetunes/{finetune_id}", "delete"),
    ("/tuning/rollouts", "post"),
    ("/tuning/train_step", "post"),
    ("/tuning/finetunes/{finetune_id}/metrics", "post"),
    ("/tuning/finetunes/{finetune_id}/checkpoints", "get"),
    ("/tuning/finetunes/{finetune_id}/checkpoints/save", "post"),
    ("/tuning/finetunes/{finetune_id}/checkpoints/{step}", "delete"),
]


@pytest.mark.parametrize(("path", "method"), TUNING)
def test_the_tuning_api_answers_as_its_schema_says(described: Any, path: str, method: str) -> None:
    operation = described[path][method]

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    def fuzz(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    fuzz()


def test_the_schema_names_every_skill_and_every_error(described: Any) -> None:
    told = described.raw_schema
    ours = {path for path in told["paths"] if not path.startswith("/tuning/")}
    assert ours == {"/models", *(f"/{skill}" for skill in SKILLS)} and len(told["paths"]) > 10
    for path in told["paths"].values():
        for operation in path.values():
            assert {"200", "400", "401", "413", "429", "503"} <= set(operation["responses"])
            assert operation["responses"]["400"]["content"]["application/json"]["schema"]["$ref"].endswith(
                "ErrorAnswer"
            )


def test_health_tells_version_branch_and_store(server: str, tmp_path: Path) -> None:
    post(server, "query", settings={"max_tokens": 2})
    told = httpx.get(f"{server.removesuffix('/v1')}/healthz").json()
    assert told.keys() == {"status", "version", "branch", "revision", "space", "models_loaded", "store"}
    assert "moondream-tiny" in told["models_loaded"] and told["store"] == "ok"
