"""Tests of the /v1 API over HTTP: the official SDK, responses, errors, limits, disconnects, and schema fuzzing."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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

import app
import recipes
from inference.registry import BACKENDS, MODELS
from inference.types import (
    RECIPE_QUESTION,
    Answer,
    AnswerEvent,
    Box,
    InferenceError,
    ModelSpec,
    Request,
    TextUpdate,
    skill_of_question,
)
from rewards import score_recipes
from serving.api import create_api
from serving.middleware import MAX_BODY
from serving.schemas import decode_photo
from settings import Settings
from tests.support.api_client import PHOTO_URL, data_url, error_message, make_picture
from tests.support.app_server import app_server
from tests.support.usage_rows import read_usage, wait_for_usage

pytestmark = pytest.mark.slow

KEY = "a-key-of-20-letters-"
SKILLS = {
    "query": {"question": "Is the photo bright or dark?"},
    "caption": {"length": "short"},
    "detect": {"object": "the main subject"},
    "point": {"object": "the main subject"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the API without keys, with a model that fails as its prompt says. Yields its address."""
    BACKENDS["failing"] = __name__
    MODELS["failing"] = ModelSpec("failing", "Failing", "fails", "failing", "")
    with app_server(tmp_path_factory.mktemp("v1")) as address:
        yield f"{address}/v1"
    del MODELS["failing"], BACKENDS["failing"]


@pytest.fixture(scope="module")
def server_with_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the API with one key. Yields its address."""
    keys = Settings.from_env({"PLAYGROUND_API_KEYS": KEY}).api_keys
    with app_server(tmp_path_factory.mktemp("server_with_key"), api_keys=keys, api_rate=1.0) as address:
        yield f"{address}/v1"


STARTED, STOPPED, RELEASED = threading.Event(), threading.Event(), threading.Event()


def answer(spec: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
    """Answer or fail as the prompt says. This module is the backend "failing"."""
    kind = request.prompt
    if kind.startswith("hang"):
        try:
            STARTED.set()
            if kind == "hang":
                yield TextUpdate(0, "wait")
            cancel.wait(30)
            if kind == "hang deaf":  # it goes on, although the client has left
                yield TextUpdate(0, "I have not noticed")
                yield Answer(0, "I have not noticed")
            raise InferenceError("cancelled", "Cancelled.")
        finally:
            STOPPED.set()
    if kind == "block":
        STARTED.set()
        RELEASED.wait(30)
        yield Answer(0, "released")
        return
    if kind == "half":
        yield TextUpdate(0, "half an ")
        raise InferenceError("out_of_memory", "No room.")
    if kind == "bug":
        raise TypeError("a bug")
    if kind == "words":
        yield TextUpdate(0, "two")
        yield Answer(0, "two words", tokens_in=740, tokens_out=2)
        return
    if kind == "say":
        yield Answer(0, f"{request.temperature:g} {spec.top_p:g} {request.max_tokens} {request.seed}", truncated=True)
        return
    if request.skill == "segment":
        yield Answer(0, "", (Box(0.1, 0.2, 0.9, 0.8),), path="M 0.1 0.2 L 0.9 0.2 Z")
        return
    raise InferenceError(kind, "It failed.")


def post(server: str, skill: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    body = {"image_url": PHOTO_URL} | SKILLS.get(skill, {}) | fields
    return httpx.post(f"{server}/{skill}", json=body, headers=headers, timeout=60)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line[6:]) for line in response.text.splitlines() if line]


# Official SDK


@pytest.fixture
def client(server: str) -> Any:
    return moondream.vl(endpoint=server)


def test_sdk_captions(client: Any) -> None:
    settings = {"temperature": 0}
    complete = client.caption(make_picture(), length="short", settings=settings)["caption"]
    chunks = list(client.caption(make_picture(), length="short", stream=True, settings=settings)["caption"])
    assert complete and "".join(chunks) == complete


def test_sdk_answers_questions(client: Any) -> None:
    settings = {"temperature": 0, "max_tokens": 20}
    complete = client.query(make_picture(), "Is it dark?", settings=settings)["answer"]
    chunks = list(client.query(make_picture(), "Is it dark?", stream=True, settings=settings)["answer"])
    assert complete and "".join(chunks) == complete
    assert client.query(client.encode_image(make_picture()), "Is it dark?", reasoning=True, settings=settings)["answer"]


def test_sdk_detects_and_points(client: Any) -> None:
    boxes = client.detect(make_picture(), "the main subject", settings={"max_objects": 3})["objects"]
    points = client.point(make_picture(), "the main subject")["points"]
    assert 0 < len(boxes) <= 3 and points
    for value in [side for box in boxes for side in box.values()] + [x for point in points for x in point.values()]:
        assert 0 <= value <= 1
    assert boxes[0].keys() == {"x_min", "y_min", "x_max", "y_max"} and points[0].keys() == {"x", "y"}


def test_sdk_selects_a_model(server: str) -> None:
    other = moondream.vl(endpoint=server, model="moondream-tiny-steady")
    assert other.query(make_picture(), "Is it dark?")["answer"]
    with pytest.raises(Exception, match="404"):
        moondream.vl(endpoint=server, model="moondream3-preview").query(make_picture(), "Is it dark?")


def test_sdk_sends_its_key(server_with_key: str) -> None:
    assert moondream.vl(endpoint=server_with_key, api_key=KEY).caption(make_picture(), length="short")["caption"]
    with pytest.raises(Exception, match="401"):
        moondream.vl(endpoint=server_with_key, api_key="wrong").caption(make_picture())


# Responses


@pytest.mark.parametrize("skill", SKILLS)
def test_response_has_metrics(server: str, skill: str) -> None:
    response = post(server, skill)
    body = response.json()
    assert response.status_code == 200 and body["request_id"] == response.headers["x-request-id"]
    assert body["model"] == "moondream-tiny" and body["finish_reason"] in ("stop", "length")
    metrics = body["metrics"]
    assert metrics["input_tokens"] > 10 and metrics["output_tokens"] >= 0
    assert metrics["ttft_ms"] >= metrics["prefill_time_ms"] > 0 and metrics["decode_time_ms"] >= 0


def test_stream_ends_with_metrics(server: str) -> None:
    stream = events(post(server, "caption", stream=True))
    assert [event["completed"] for event in stream] == [False] * (len(stream) - 1) + [True]
    assert stream[-1]["metrics"]["output_tokens"] > 0 and stream[-1]["finish_reason"] == "stop"
    assert len({event["request_id"] for event in stream}) == 1


def test_recipe_question_is_answered_within_the_grammar(server: str) -> None:
    answers = {
        post(server, "query", question=RECIPE_QUESTION, settings={"temperature": 1}).json()["answer"] for _ in range(3)
    }
    assert len(answers) > 1 and all(recipes.parse(text).ok for text in answers)


def test_words_after_the_recipe_question_are_instructions() -> None:
    assert skill_of_question(RECIPE_QUESTION) == ("recipe", RECIPE_QUESTION)
    assert skill_of_question(f"{RECIPE_QUESTION} Make it warm.") == ("recipe", "Make it warm.")
    assert skill_of_question("Is it warm?") == ("query", "Is it warm?")


def test_recipes_are_scored_as_on_the_page(server: str) -> None:
    photo = decode_photo(PHOTO_URL)
    texts = ["exposure +20", "no recipe", "saturation +40; look mono"]
    body = post(server, "score", recipes=texts, reward={"colour": 1.0}).json()
    scores = body["scores"]
    assert scores[1] == {"recipe": None, "words": "", "scores": {}, "reward": None} and body["request_id"]
    expected = score_recipes(photo, [recipes.parse(texts[index]).recipe for index in (0, 2)])
    for score, known in zip((scores[0], scores[2]), expected, strict=True):
        assert score["recipe"] == str(known.recipe) and score["words"]
        assert score["scores"] == known.scores
        assert score["reward"] == score["scores"]["colour"]
    assert post(server, "score", recipes=["nothing"]).json()["scores"][0]["scores"] == {}
    assert post(server, "score", recipes=[]).status_code == 400
    wrong = post(server, "score", recipes=texts, reward={"beauty": 1})
    assert wrong.status_code == 400 and "beauty" in wrong.json()["error"]["message"]


def test_sampling_settings_are_passed_to_the_model(server: str) -> None:
    sampling = {"temperature": 0.7, "top_p": 0.5, "max_tokens": 9, "seed": 11, "variant": "unknown"}
    body = post(server, "query", model="failing", question="say", settings=sampling).json()
    assert (body["answer"], body["finish_reason"]) == ("0.7 0.5 9 11", "length")
    capped = post(server, "query", model="failing", question="say", settings={"max_tokens": 5000, "seed": 0}).json()
    assert capped["answer"] == "0.2 0.9 768 0"


def test_seed_makes_answers_reproducible(server: str) -> None:
    fields = {"question": RECIPE_QUESTION, "settings": {"temperature": 1, "seed": 5}}
    assert post(server, "query", **fields).json()["answer"] == post(server, "query", **fields).json()["answer"]


def test_models_lists_local_models_only(server: str) -> None:
    body = httpx.get(f"{server}/models").json()
    names = [card["id"] for card in body["data"]]
    assert body["object"] == "list" and names[0] == "moondream-tiny" and "moondream-tiny-steady" in names
    assert not [name for name in names if name.startswith("moondream3")]


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_jpeg_png_and_webp_are_accepted(server: str, kind: str) -> None:
    assert (
        post(server, "query", image_url=data_url(make_picture(), kind), model="failing", question="say").status_code
        == 200
    )


def test_question_without_a_photo_is_answered(server: str) -> None:
    body = httpx.post(f"{server}/query", json={"question": "What is 2 plus 2?", "settings": {"temperature": 0}}).json()
    assert body["answer"] and body["metrics"]["input_tokens"] < 40
    message = error_message(httpx.post(f"{server}/query", json={"question": RECIPE_QUESTION}), 400, "invalid_request")
    assert "needs a photo" in message
    error_message(httpx.post(f"{server}/caption", json={}), 400, "invalid_request")


def test_segment_names_the_models_that_can(server: str) -> None:
    message = error_message(post(server, "segment", object="cat"), 400, "invalid_request")
    assert "moondream3-preview" in message and "cannot segment" in message


def test_sdk_segments_with_a_model_that_can(server: str, model: str) -> None:
    MODELS[model] = replace(MODELS[model], segments=True, spatial_refs=True)
    client = moondream.vl(endpoint=server, model=model)
    box = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.9, "y_max": 0.8}
    assert client.segment(make_picture(), "cat", [[0.5, 0.5]]) == {"path": "M 0.1 0.2 L 0.9 0.2 Z", "bbox": box}
    events = list(client.segment(make_picture(), "cat", stream=True))
    assert events[0] == {"bbox": box} and events[-1] == {
        "path": "M 0.1 0.2 L 0.9 0.2 Z",
        "bbox": box,
        "completed": True,
    }
    assert "".join(event.get("chunk", "") for event in events) == events[-1]["path"]


def test_idle_connection_stays_open_longer_than_clients_keep_it(server: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(server).netloc)
    connection.request("GET", "/healthz")
    connection.getresponse().read()
    connection.sock.settimeout(6)  # httpx keeps it 5 seconds
    with pytest.raises(TimeoutError):  # else the server has closed it
        connection.sock.recv(1)
    connection.close()


def test_request_id_of_the_client_is_kept(server: str) -> None:
    response = post(server, "query", {"X-Request-Id": "trace-7.a"}, model="failing", question="say")
    assert response.headers["x-request-id"] == response.json()["request_id"] == "trace-7.a"
    for invalid in ("two words", "x" * 65, "<script>"):
        response = post(server, "query", {"X-Request-Id": invalid}, model="failing", question="say")
        assert response.headers["x-request-id"] == response.json()["request_id"] != invalid


def test_server_timing_has_the_phases(server: str) -> None:
    timing = post(server, "query").headers["server-timing"]
    phases = {name: float(value) for name, _, value in (part.partition(";dur=") for part in timing.split(", "))}
    assert list(phases) == ["queue", "prefill", "decode", "total"]
    assert 0 < phases["prefill"] + phases["decode"] <= phases["total"] + 0.2


# Usage events


@pytest.fixture
def model(server: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the name of a model of the backend "failing" that no other test calls."""
    name = request.node.name
    MODELS[name] = replace(MODELS["failing"], name=name)
    yield name
    del MODELS[name]


def recorded(server: str, model: str) -> dict[str, str]:
    """Return the only usage event of a model."""
    wait_for_usage(server, lambda row: row["model"] == model)
    marker = post(server, "query", model=model, question="say").json()["request_id"]  # recorded after all duplicates
    wait_for_usage(server, lambda row: row["request_id"] == marker)
    (row,) = [row for row in read_usage(server) if row["model"] == model and row["request_id"] != marker]
    assert row["source"] == "v1" and float(row["latency"]) >= 0
    return row


@pytest.mark.parametrize("stream", [False, True])
def test_completed_query_is_recorded_as_ok(server: str, model: str, stream: bool) -> None:
    response = post(server, "query", model=model, question="words", stream=stream)
    row = recorded(server, model)
    assert (row["outcome"], row["error"], row["skill"]) == ("ok", "", "query")
    assert row["request_id"] == response.headers["x-request-id"]
    assert (row["tokens_in"], row["tokens_out"]) == ("740", "2")


@pytest.mark.parametrize("skill", SKILLS)
def test_every_skill_of_a_real_model_is_recorded_as_ok(server: str, skill: str) -> None:
    request_id = post(server, skill).json()["request_id"]
    (row,) = wait_for_usage(server, lambda row: row["request_id"] == request_id)
    assert (row["outcome"], row["skill"], row["model"], row["source"]) == ("ok", skill, "moondream-tiny", "v1")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "error"), [("out_of_memory", "out_of_memory"), ("half", "out_of_memory"), ("bug", "TypeError")]
)
def test_failed_call_is_recorded_as_error(server: str, model: str, kind: str, error: str, stream: bool) -> None:
    post(server, "query", model=model, question=kind, stream=stream)
    row = recorded(server, model)
    assert (row["outcome"], row["error"]) == ("error", error)


@pytest.mark.parametrize("stream", [False, True])
def test_invalid_photo_is_recorded_as_error(server: str, model: str, stream: bool) -> None:
    response = post(server, "query", model=model, image_url="data:image/jpeg;base64,AAAA", stream=stream)
    row = recorded(server, model)
    assert (row["outcome"], row["error"], row["skill"]) == ("error", "invalid_photo", "query")
    assert row["request_id"] == response.headers["x-request-id"]


def send_and_leave(server: str, model: str, prompt: str, stream: bool) -> None:
    """Send a request, disconnect once the model has started, and wait until it has stopped."""
    host, port = server.removeprefix("http://").removesuffix("/v1").split(":")
    body = json.dumps({"image_url": PHOTO_URL, "model": model, "question": prompt, "stream": stream}).encode()
    head = f"POST /v1/query HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    STARTED.clear()
    STOPPED.clear()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if stream and prompt == "hang":
            with connection.makefile("rb") as file:
                assert any(b"wait" in line for line in file)
        assert STARTED.wait(20) and not STOPPED.wait(0.2)
    assert STOPPED.wait(20)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hang", "hang silently", "hang deaf"])
def test_call_of_a_client_that_leaves_is_recorded_as_cancelled(
    server: str, model: str, prompt: str, stream: bool
) -> None:
    send_and_leave(server, model, prompt, stream)
    row = recorded(server, model)
    assert (row["outcome"], row["error"]) == ("cancelled", "")


def test_rejected_requests_are_not_recorded(server: str, model: str) -> None:
    error_message(post(server, "query", model=model, question=""), 400, "invalid_request")
    error_message(post(server, "query", {"Origin": "https://elsewhere.example"}, model=model), 403, "forbidden")
    post(server, "query", model=model, question="say")
    assert recorded(server, model)["outcome"] == "ok"


# Errors


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.org/a.jpg", "not fetched"),
        ("file:///etc/passwd", "not fetched"),
        ("data:text/html;base64,AAAA", "not fetched"),
        ("data:image/svg+xml;base64,AAAA", "not fetched"),
        ("data:image/jpeg;base64,!!!", "not valid base64"),
        ("data:image/jpeg;base64,", "empty"),
        ("data:image/jpeg;base64,AAAA", "not"),
        (data_url(make_picture(8, 8)), "at least 16 x 16"),
        (data_url(Image.new("1", (6000, 5000)), "png"), "the limit is 24"),
    ],
)
def test_invalid_photo_is_rejected_with_the_reason(server: str, url: str, message: str) -> None:
    assert message in error_message(post(server, "query", image_url=url), 400, "invalid_request")


@pytest.mark.parametrize(
    "fields",
    [
        {"question": ""},
        {"question": "x" * 2001},
        {"question": 5},
        {"image_url": 7},
        {"stream": "perhaps"},
        {"settings": {"temperature": -1}},
        {"settings": {"temperature": 1e400}},
        {"settings": {"top_p": 0}},
        {"settings": {"max_tokens": 0}},
        {"settings": []},
        {"spatial_refs": [[0.5, 0.5]]},  # the model cannot use them
        {"spatial_refs": [[0.5, 1.5]]},
        {"spatial_refs": [[0.5, 0.5, 0.5]]},
        {"model": 3},
    ],
)
def test_invalid_field_is_named(server: str, fields: dict[str, Any]) -> None:
    body = json.dumps({"image_url": PHOTO_URL} | SKILLS["query"] | fields)
    response = httpx.post(f"{server}/query", content=body, headers={"Content-Type": "application/json"}, timeout=60)
    message = error_message(response, 400, "invalid_request")
    assert next(iter(fields)) in message and PHOTO_URL[:40] not in message


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"image_url": "' + b"[" * 9000])
def test_invalid_json_is_rejected(server: str, body: bytes) -> None:
    response = httpx.post(f"{server}/query", content=body, headers={"Content-Type": "application/json"})
    error_message(response, 400, "invalid_request")


def test_unknown_paths_and_methods_return_the_documented_error(server: str) -> None:
    error_message(httpx.get(f"{server}/query"), 405, "method_not_allowed")
    error_message(httpx.post(f"{server}/summarize", json={}), 404, "not_found")


def test_hosted_models_are_not_available(server: str) -> None:
    for name in ("moondream3-preview", "moondream3.1-9B-A2B", "no such", "../../etc"):
        assert "GET /v1/models" in error_message(post(server, "query", model=name), 404, "not_found")


@pytest.mark.parametrize(
    ("kind", "status"), [("out_of_memory", 503), ("too_long", 400), ("failed", 500), ("something new", 500)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_model_failure_returns_the_documented_error(server: str, kind: str, status: int, stream: bool) -> None:
    response = post(server, "query", model="failing", question=kind, stream=stream)
    assert response.status_code == status and response.json()["error"]["message"] == "It failed."
    assert ("retry-after" in response.headers) == (kind == "out_of_memory")


def test_failure_during_a_stream_is_its_last_event(server: str) -> None:
    stream = events(post(server, "query", model="failing", question="half", stream=True))
    assert stream[0]["chunk"] == "half an " and stream[-1]["completed"] is True
    assert stream[-1]["error"]["message"] == "No room."


def test_oversized_body_is_rejected_with_and_without_content_length(server: str) -> None:
    big = b'{"image_url": "' + b"A" * MAX_BODY + b'"}'
    headers = {"Content-Type": "application/json"}
    error_message(httpx.post(f"{server}/query", content=big, headers=headers, timeout=60), 413, "too_large")
    chunks = (big[start : start + 2**20] for start in range(0, len(big), 2**20))  # sent without a Content-Length
    error_message(httpx.post(f"{server}/query", content=chunks, headers=headers, timeout=60), 413, "too_large")


def test_cross_origin_requests_are_rejected(server: str) -> None:
    error_message(post(server, "query", {"Origin": "https://somewhere.example"}), 403, "forbidden")
    headers = {"Origin": "https://somewhere.example", "Access-Control-Request-Method": "POST"}
    response = httpx.options(f"{server}/query", headers=headers)
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_keys_are_required_and_rate_limited(server_with_key: str) -> None:
    error_message(post(server_with_key, "query"), 401, "unauthorized")
    error_message(httpx.get(f"{server_with_key}/models"), 401, "unauthorized")
    headers = {"X-Moondream-Auth": KEY}
    responses = [httpx.get(f"{server_with_key}/models", headers=headers) for _ in range(8)]
    assert responses[0].status_code == 200
    error_message(responses[-1], 429, "rate_limited")
    assert int(responses[-1].headers["retry-after"]) >= 1


def test_request_beyond_the_limit_is_rejected_and_not_recorded(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "create_api", partial(create_api, max_requests=1))
    with app_server(tmp_path) as address, ThreadPoolExecutor(1) as pool:
        STARTED.clear()
        RELEASED.clear()
        running = pool.submit(post, f"{address}/v1", "query", model=model, question="block")
        assert STARTED.wait(20)
        rejected = [post(f"{address}/v1", "query", model=model, question="say", stream=each) for each in (False, True)]
        RELEASED.set()
        assert running.result().json()["answer"] == "released"
        for response in rejected:
            error_message(response, 503, "unavailable")
            assert int(response.headers["retry-after"]) >= 1
        assert recorded(f"{address}/v1", model)["request_id"] == running.result().json()["request_id"]


def test_hundred_concurrent_requests_are_answered_or_rejected(server: str) -> None:
    statuses: list[int] = []

    def send() -> None:
        statuses.append(post(server, "query", question="Is it dark?", settings={"max_tokens": 4}).status_code)

    threads = [threading.Thread(target=send) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(statuses) == 100 and set(statuses) <= {200, 503} and statuses.count(200) >= 60


# OpenAPI schema and fuzzing


@pytest.fixture(scope="module")
def schema(server: str) -> Any:
    post(server, "query", settings={"max_tokens": 2})  # loads the model
    return schemathesis.openapi.from_url(f"{server}/openapi.json")


POSTS = (*SKILLS, "segment", "score", "chat/completions")
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize(("path", "method"), [("/models", "get"), *((f"/{skill}", "post") for skill in POSTS)])
def test_skills_conform_to_the_schema(schema: Any, path: str, method: str, mode: GenerationMode) -> None:
    operation = schema[path][method]

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def fuzz(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=60)

    if path != "/models" or mode is GenerationMode.POSITIVE:  # a request without input cannot be invalid
        fuzz()


TUNING_ROUTES = [
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


BATCH_ROUTES = [
    ("/batch", "get"),
    ("/batch", "post"),
    ("/batch/{file_id}", "get"),
    ("/batch/{file_id}", "put"),
    ("/batch/{file_id}", "post"),
    ("/batch/{file_id}", "delete"),
    ("/batch/{file_id}/outputs/0", "get"),
]


@pytest.mark.parametrize(("path", "method"), TUNING_ROUTES + BATCH_ROUTES)
def test_tuning_and_batch_routes_conform_to_the_schema(schema: Any, path: str, method: str) -> None:
    operation = schema[path][method]

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    def fuzz(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=60)

    fuzz()


def test_schema_documents_every_skill_and_error(schema: Any) -> None:
    document = schema.raw_schema
    skill_paths = {path for path in document["paths"] if not path.startswith(("/tuning/", "/batch"))}
    assert (
        skill_paths == {"/models", "/models/{model}", *(f"/{skill}" for skill in POSTS)} and len(document["paths"]) > 10
    )
    for path in document["paths"].values():
        for operation in path.values():
            assert {"200", "400", "401", "413", "429", "503"} <= set(operation["responses"])
            assert operation["responses"]["400"]["content"]["application/json"]["schema"]["$ref"].endswith(
                "ErrorResponse"
            )


def test_health_reports_version_branch_models_and_database(server: str, tmp_path: Path) -> None:
    post(server, "query", settings={"max_tokens": 2})
    body = httpx.get(f"{server.removesuffix('/v1')}/healthz").json()
    assert body.keys() == {"status", "version", "branch", "revision", "space", "models_loaded", "engines", "store"}
    assert "moondream-tiny" in body["models_loaded"] and body["store"] == "ok"
