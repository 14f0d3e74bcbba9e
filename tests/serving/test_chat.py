"""Tests of POST /v1/chat/completions: answers, streams, structured output, errors in OpenAI's shape, and usage."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import moondream
import pytest

import recipes
from inference.registry import BACKENDS, MODELS
from inference.types import RECIPE_QUESTION, Answer, AnswerEvent, Box, InferenceError, ModelSpec, Point, Request
from inference.types import TextUpdate as Update
from settings import Settings
from tests.support.api_client import PHOTO_URL, make_picture
from tests.support.app_server import app_server
from tests.support.usage_rows import read_usage, wait_for_usage

pytestmark = pytest.mark.slow

KEY = "a-key-of-20-letters-"
PHOTO = {"type": "image_url", "image_url": {"url": PHOTO_URL}}
BOX = {"type": "object", "properties": {name: {"type": "number"} for name in ("x_min", "y_min", "x_max", "y_max")}}
POINT = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}, "label": {}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the API without keys, with a model that repeats what it was sent. Yields its address."""
    BACKENDS["echo"] = __name__
    MODELS["echo"] = ModelSpec("echo", "Echo", "repeats", "echo", "")
    MODELS["thinker"] = ModelSpec("thinker", "Thinker", "reasons", "echo", "", reasons=True)
    with app_server(tmp_path_factory.mktemp("v1")) as address:
        yield f"{address}/v1"
    for name in ("echo", "thinker"):
        del MODELS[name]
    del BACKENDS["echo"]


def answer(spec: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
    """Repeat the prompt word by word. This module is the backend "echo"."""
    if request.prompt == "fail":
        raise InferenceError("out_of_memory", "No room.")
    for index in range(request.n):
        words = f"{index} {request.skill} {request.has_photo}: {request.prompt}".split(" ")
        for count in range(1, len(words)):
            yield Update(index, " ".join(words[:count]))
            if request.prompt.startswith("half"):
                raise InferenceError("failed", "It broke.")
        boxes = (Box(0.1, 0.2, 0.3, 0.4),) if request.skill == "detect" else ()
        points = (Point(0.5, 0.25),) if request.skill == "point" else ()
        reasoning = "I thought." if request.reasoning else ""
        yield Answer(index, " ".join(words), boxes, points, 740, len(words), reasoning=reasoning)


def chat(server: str, *messages: Any, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    """Send a conversation; a text is a user's message."""
    listed = [
        {"role": "user", "content": message} if not isinstance(message, dict) else message for message in messages
    ]
    body = {"model": "echo", "messages": listed} | fields
    return httpx.post(f"{server}/chat/completions", json=body, headers=headers, timeout=60)


def content(response: httpx.Response) -> str:
    """Return the content of the only choice."""
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["message"]["content"]


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the chunks of a stream before its end mark."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, last = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert last == "[DONE]"
    return [json.loads(line) for line in lines]


def failure(response: httpx.Response, status: int, kind: str, code: str, param: str | None = None) -> str:
    """Assert that a response is an error in OpenAI's shape; return its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code", "request_id"}
    assert (error["type"], error["code"], error["param"]) == (kind, code, param)
    assert error["request_id"] == response.headers["x-request-id"]
    return error["message"]


def refused(response: httpx.Response, param: str) -> str:
    """Assert that a request is refused because of a field; return the message."""
    return failure(response, 400, "invalid_request_error", "invalid_request", param)


def test_completion_has_openai_fields(server: str) -> None:
    response = chat(server, [{"type": "text", "text": "Who is it?"}, PHOTO])
    body = response.json()
    assert body["id"] == f"chatcmpl-{response.headers['x-request-id']}" and body["object"] == "chat.completion"
    assert body["created"] > 1_700_000_000 and body["model"] == "echo"
    assert body["usage"] == {"prompt_tokens": 740, "completion_tokens": 6, "total_tokens": 746}
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "0 query True: Who is it?", "refusal": None} | {
        "reasoning": None
    }
    assert choice["finish_reason"] == "stop" and "total;dur=" in response.headers["server-timing"]


def test_messages_are_one_prompt_with_one_photo(server: str) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [PHOTO, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Where?"},
    ]
    expected = "0 query True: Be brief. User: Who? Assistant: A cat. User: Where?"
    assert content(chat(server, *messages)) == expected
    assert content(chat(server, "Why?")) == "0 query False: Why?"
    assert "2" in refused(chat(server, [PHOTO, PHOTO, {"type": "text", "text": "Who?"}]), "messages")
    assert "role user" in refused(chat(server, *messages[:3]), "messages")


def test_real_model_answers_in_the_conversation(server: str) -> None:
    fields = {"model": "moondream-tiny", "temperature": 0, "max_tokens": 12}
    whole = chat(server, [{"type": "text", "text": "Is the photo dark?"}, PHOTO], **fields)
    same = httpx.post(
        f"{server}/query",
        json={
            "image_url": PHOTO_URL,
            "question": "Is the photo dark?",
            "settings": {"temperature": 0, "max_tokens": 12},
        },
        timeout=60,
    )
    assert content(whole) == same.json()["answer"]
    stream = chat(server, [{"type": "text", "text": "Is the photo dark?"}, PHOTO], stream=True, **fields)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks(stream)) == content(whole)


def test_recipe_question_gives_recipes_and_a_photo_alone_a_caption(server: str) -> None:
    parts = [PHOTO, {"type": "text", "text": RECIPE_QUESTION}]
    response = chat(server, parts, model="moondream-tiny", n=3, temperature=1, seed=-5)
    texts = [choice["message"]["content"] for choice in response.json()["choices"]]
    assert len(set(texts)) > 1 and all(recipes.parse(text).ok for text in texts)
    assert texts == [
        choice["message"]["content"]
        for choice in chat(server, parts, model="moondream-tiny", n=3, temperature=1, seed=-5).json()["choices"]
    ]
    assert content(chat(server, [PHOTO])) == "0 caption True: "
    assert "empty" in refused(chat(server, " "), "messages")


def test_stream_has_roles_reasons_and_usage(server: str) -> None:
    stream = chunks(chat(server, "one two", n=2, stream=True, stream_options={"include_usage": True}))
    for index in range(2):
        choices = [choice for chunk in stream for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == f"{index} query False: one two"
        assert [choice["delta"].get("role") for choice in choices] == ["assistant", *[None] * (len(choices) - 1)]
        assert [choice["finish_reason"] for choice in choices] == [*[None] * (len(choices) - 1), "stop"]
    assert stream[-1]["choices"] == [] and stream[-1]["usage"]["total_tokens"] == 740 + 10
    assert all(chunk["usage"] is None for chunk in stream[:-1])
    assert all("usage" not in chunk for chunk in chunks(chat(server, "one", stream=True)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "expected"), [("two t", "one"), (["x", "hree", "two three"], "one"), ("zzz", "one two three")]
)
def test_stop_ends_the_answer(server: str, stop: str | list[str], expected: str, stream: bool) -> None:
    response = chat(server, "one two three", stop=stop, stream=stream)
    text = (
        "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks(response))
        if stream
        else content(response)
    )
    assert text == f"0 query False: {expected}"


def test_stop_ends_generation(server: str) -> None:
    fields = {"model": "moondream-tiny", "temperature": 0}
    parts = [PHOTO, {"type": "text", "text": RECIPE_QUESTION}]
    whole, cut = chat(server, parts, **fields).json(), chat(server, parts, stop=";", **fields).json()
    first = whole["choices"][0]["message"]["content"].partition(";")[0]
    assert cut["choices"][0]["message"]["content"] == first
    assert cut["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"]


def schema(items: Any, key: str = "objects") -> dict[str, Any]:
    """Return a response format with a list of items."""
    root = {"type": "object", "properties": {key: {"type": "array", "items": items}}, "$defs": {"Box": BOX}}
    return {"type": "json_schema", "json_schema": {"name": "regions", "schema": root, "strict": True}}


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema_of_boxes_or_points_runs_detect_or_point(server: str, stream: bool) -> None:
    def ask(response_format: dict[str, Any]) -> Any:
        response = chat(
            server, [PHOTO, {"type": "text", "text": "cat"}], response_format=response_format, stream=stream
        )
        if not stream:
            return json.loads(content(response))
        return json.loads("".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks(response)))

    box = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.3, "y_max": 0.4}
    assert ask(schema(BOX)) == {"objects": [box]} == ask(schema({"$ref": "#/$defs/Box"}))
    assert ask(schema(POINT, "places")) == {"places": [{"x": 0.5, "y": 0.25, "label": "cat"}]}


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_object"},
        {"type": "json_schema"},
        schema({"type": "string"}),
        schema({"$ref": "#/$defs/Missing"}),
        schema({"$ref": "#/$defs/Box/properties"}),
        schema({"properties": {"x": {}, "y": {}, "z": {}}}),
        {
            "type": "json_schema",
            "json_schema": {"name": "loop", "schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
        },
    ],
)
def test_other_schemas_are_refused(server: str, response_format: dict[str, Any]) -> None:
    message = refused(
        chat(server, [PHOTO, {"type": "text", "text": "cat"}], response_format=response_format), "response_format"
    )
    assert "x_min" in message


def test_reasoning_is_given_or_refused(server: str) -> None:
    body = chat(server, "Why?", model="thinker", reasoning=True).json()
    assert body["choices"][0]["message"]["reasoning"] == "I thought."
    assert "cannot reason" in refused(chat(server, "Why?", reasoning=True), "reasoning")
    assert content(chat(server, "Why?", reasoning=False))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"tools": [{}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
    ],
)
def test_invalid_field_is_named(server: str, fields: dict[str, Any], param: str) -> None:
    assert refused(chat(server, "Why?", **fields), param)


def test_addresses_are_not_fetched(server: str) -> None:
    for url in ("http://127.0.0.1:1/a.jpg", "https://example.org/a.jpg", "file:///etc/passwd"):
        part = {"type": "image_url", "image_url": {"url": url}}
        message = failure(chat(server, [part]), 400, "invalid_request_error", "invalid_request")
        assert "not fetched" in message and url not in message


def test_failures_have_openai_errors(server: str) -> None:
    response = chat(server, "fail")
    assert failure(response, 503, "server_error", "unavailable") == "No room." and response.headers["retry-after"]
    failure(chat(server, "Why?", model="none"), 404, "invalid_request_error", "not_found", "model")
    failure(httpx.get(f"{server}/chat/completions"), 405, "invalid_request_error", "method_not_allowed")
    failure(chat(server, "x" * 2001), 400, "invalid_request_error", "invalid_request")
    stream = chunks(chat(server, "half way", stream=True))
    assert stream[0]["choices"] and stream[-1]["error"]["message"] == "It broke."
    assert failure(chat(server, "fail", stream=True), 503, "server_error", "unavailable")


def test_calls_are_recorded(server: str) -> None:
    request_id = chat(server, "one", n=2, headers={"X-Request-Id": "chat-1"}).headers["x-request-id"]
    chat(server, "fail", headers={"X-Request-Id": "chat-2"})
    wait_for_usage(server, lambda row: row["request_id"] == "chat-2")
    rows = {row["request_id"]: row for row in read_usage(server)}
    row = rows[request_id]
    assert (row["model"], row["skill"], row["outcome"], row["source"]) == ("echo", "query", "ok", "v1")
    assert (row["tokens_in"], row["candidates"]) == ("740", "2")
    assert (rows["chat-2"]["outcome"], rows["chat-2"]["error"]) == ("error", "out_of_memory")


def test_key_is_a_bearer_token(server: str, tmp_path: Any) -> None:
    keys = Settings.from_env({"PLAYGROUND_API_KEYS": KEY}).api_keys
    with app_server(tmp_path, api_keys=keys, api_rate=0.01) as address:
        url = f"{address}/v1"
        failure(chat(url, "Why?"), 401, "authentication_error", "unauthorized")
        headers = {"Authorization": f"Bearer {KEY}"}
        responses = [chat(url, "Why?", headers=headers) for _ in range(2)]
        assert content(responses[0])
        failure(responses[-1], 429, "rate_limit_error", "rate_limited")
        assert int(responses[-1].headers["retry-after"]) >= 1


def test_sdk_chats(server: str) -> None:
    client = moondream.vl(endpoint=server, model="echo")
    messages = [{"role": "user", "content": [PHOTO, {"type": "text", "text": "Who is it?"}]}]
    answer = client.chat(messages, settings={"temperature": 0.5, "top_p": 0.8, "max_tokens": 9})
    assert answer["message"]["content"] == "0 query True: Who is it?" and answer["finish_reason"] == "stop"
    assert "".join(client.chat(messages, stream=True)["message"]) == "0 query True: Who is it?"
    assert client.query(make_picture(), "Who?", reasoning=True)["answer"]


def test_model_list_has_openai_fields(server: str) -> None:
    for card in httpx.get(f"{server}/models").json()["data"]:
        assert {"id", "object", "created", "owned_by"} <= card.keys() and card["object"] == "model"
    assert httpx.get(f"{server}/models/moondream-tiny").json()["id"] == "moondream-tiny"
    assert httpx.get(f"{server}/models/none").status_code == 404
