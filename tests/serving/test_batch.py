"""Tests of /v1/batch: upload in parts, results, errors of lines and of batches, restarts, tenants and expiry."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import recipes
from inference.registry import BACKENDS, MODELS
from inference.types import RECIPE_QUESTION, Answer, AnswerEvent, InferenceError, ModelSpec, Request
from serving import batch
from settings import Settings
from tests.support.api_client import PHOTO_URL, error_message
from tests.support.app_server import app_server
from tests.support.usage_rows import wait_for_usage

pytestmark = pytest.mark.slow

KEYS = ("a-key-of-20-letters-", "another-key-20-chars")
IMAGE = PHOTO_URL.partition(",")[2]
PROMPTS: list[str] = []


def answer(spec: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
    """Answer with the prompt, once it may. This module is the backend "batch-echo"."""
    PROMPTS.append(request.prompt)
    if request.prompt == "fail":
        raise InferenceError("failed", "It failed.")
    yield Answer(0, request.prompt, tokens_in=740, tokens_out=2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the API with two keys. Yields its address."""
    with echo_server(tmp_path_factory.mktemp("batch")) as address:
        yield address


@contextmanager
def echo_server(folder: Path) -> Iterator[str]:
    """Serve the API with two keys and the model "batch-echo". Yields its address."""
    keys = Settings.from_env({"PLAYGROUND_API_KEYS": ",".join(KEYS)}).api_keys
    spec = ModelSpec("batch-echo", "Echo", "", "batch-echo", "", grammar_constrained=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "batch-echo", __name__)
        patch.setitem(MODELS, "batch-echo", spec)
        with app_server(folder, api_keys=keys, api_rate=1000.0) as address:
            yield f"{address}/v1"


def client(server: str, key: str = KEYS[0]) -> httpx.Client:
    return httpx.Client(base_url=server, headers={"X-Moondream-Auth": key}, timeout=60)


def lines(*items: Any) -> bytes:
    return b"".join((item if isinstance(item, bytes) else json.dumps(item).encode()) + b"\n" for item in items)


def upload(http: httpx.Client, *parts: bytes, model: str | None = "batch-echo") -> str:
    """Upload a file in parts, the last part first, and begin its batch. Returns its id."""
    created = http.post("/batch", params={"action": "mpu-create"}).json()
    where = {"uploadId": created["uploadId"]}
    etags = []
    for number, part in reversed(list(enumerate(parts, 1))):
        params = {**where, "action": "mpu-uploadpart", "partNumber": number}
        etags.append(http.put(f"/batch/{created['fileId']}", params=params, content=part).json())
    body = {"parts": etags, "model": model}
    response = http.post(f"/batch/{created['fileId']}", params={**where, "action": "mpu-complete"}, json=body)
    assert response.json() == {"id": created["fileId"], "status": "chunking", "size": sum(map(len, parts))}
    return created["fileId"]


def finished(http: httpx.Client, batch_id: str) -> dict[str, Any]:
    """Wait until a batch has ended; return its state."""
    for _ in range(600):
        state = http.get(f"/batch/{batch_id}").json()
        if state["status"] in ("completed", "failed"):
            return state
        time.sleep(0.1)
    raise AssertionError(state)


def results(http: httpx.Client, state: dict[str, Any]) -> list[dict[str, Any]]:
    """Download the results, in order of their lines."""
    (output,) = state["outputs"]
    found = [json.loads(line) for line in http.get(output["url"]).text.splitlines()]
    return sorted(found, key=lambda line: line["line_index"])


def test_file_in_two_parts_is_answered(server: str) -> None:
    with client(server) as http:
        data = lines(*({"id": f"q{n}", "skill": "query", "question": f"why {n}", "image": IMAGE} for n in range(40)))
        state = finished(http, upload(http, data[: len(data) // 2], data[len(data) // 2 :]))
        assert state["status"] == "completed" and state["model"] == "batch-echo"
        assert state["progress"] == {"total": 40, "completed": 40, "failed": 0}
        assert state["usage"] == {"input_tokens": 40 * 740, "output_tokens": 80}
        assert state["expires_at"] > state["completed_at"] >= state["created_at"]
        for number, line in enumerate(results(http, state)):
            assert line == {
                "line_index": number,
                "id": f"q{number}",
                "status": "ok",
                "result": {"answer": f"why {number}"},
                "usage": {"input_tokens": 740, "output_tokens": 2},
            }
        (row,) = wait_for_usage(
            server, lambda row: row["request_id"] == f"{state['id']}:39", headers={"X-Moondream-Auth": KEYS[0]}
        )
        assert (row["source"], row["skill"], row["outcome"]) == ("v1-batch", "query", "ok")


def test_every_skill_of_a_real_model(server: str) -> None:
    with client(server) as http:
        items = [
            {"id": "a", "skill": "query", "question": RECIPE_QUESTION, "images": [IMAGE]},
            {"id": "b", "skill": "caption", "image": IMAGE, "length": "short", "settings": {"max_tokens": 8}},
            {"id": "c", "skill": "detect", "object": "the main subject", "image": PHOTO_URL},
            {"id": "d", "skill": "point", "object": "the main subject", "image": IMAGE},
            {"id": "e", "skill": "query", "question": "What is 2 plus 2?"},
        ]
        recipe, caption, boxes, points, text = [
            line["result"] for line in results(http, finished(http, upload(http, lines(*items), model=None)))
        ]
        assert recipes.parse(recipe["answer"]).ok and caption["caption"] and text["answer"]
        assert boxes["objects"][0].keys() >= {"x_min"} and points["points"][0].keys() == {"x", "y"}


def test_lines_fail_alone(server: str) -> None:
    with client(server) as http:
        query = {"skill": "query", "question": "why"}
        items = [
            b"{",
            [],
            {"skill": "summarize"},
            {"skill": "query", "question": ""},
            {**query, "images": [IMAGE, IMAGE]},
            {**query, "image": "AAAA"},
            {**query, "image": "https://example.org/a.jpg"},
            {"skill": "query", "question": "fail"},
            {**query, "id": 7},
        ]
        state = finished(http, upload(http, lines(*items)))
        assert state["progress"] == {"total": 9, "completed": 1, "failed": 8}
        found = results(http, state)
        assert [line["error"]["code"] for line in found[:-1]] == [
            *("invalid_request", "invalid_request", "unknown_skill", "invalid_request", "invalid_request"),
            *("image_decode_failed", "image_decode_failed", "processing_error"),
        ]
        assert found[-1]["id"] == 7 and found[-1]["result"] == {"answer": "why"}


def test_batches_fail_with_a_code(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with client(server) as http:
        assert finished(http, upload(http, b"\n\n"))["error"]["code"] == "empty_batch"
        monkeypatch.setattr(batch, "MAX_LINES", 2)
        failed = finished(http, upload(http, lines({}, {}, {})))
        assert failed["error"]["code"] == "limit_exceeded" and failed["outputs"] == []


def test_uploads_are_checked(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with client(server) as http:
        created = http.post("/batch", params={"action": "mpu-create"}).json()
        path, upload_id = f"/batch/{created['fileId']}", created["uploadId"]
        part = {"action": "mpu-uploadpart", "uploadId": upload_id, "partNumber": 1}
        first = http.put(path, params=part, content=lines({"skill": "query", "question": "one"})).json()
        again = http.put(path, params=part, content=lines({"skill": "query", "question": "two"})).json()
        assert http.get(path).json()["parts"] == [again]  # an interrupted upload can go on
        complete = {"action": "mpu-complete", "uploadId": upload_id}
        assert "Part 1" in error_message(
            http.post(path, params=complete, json={"parts": [first]}), 400, "invalid_request"
        )
        unknown = http.post(path, params=complete, json={"parts": [again], "model": "none"})
        error_message(unknown, 404, "not_found")
        error_message(http.put(path, params={**part, "uploadId": "x"}, content=b""), 409, "conflict")
        error_message(http.put(path, params={**part, "partNumber": 0}, content=b""), 400, "invalid_request")
        monkeypatch.setattr(batch, "MAX_FILE", 100)
        error_message(http.put(path, params={**part, "partNumber": 2}, content=b"x" * 101), 413, "too_large")
        assert http.get(path).json()["parts"] == [again]
        assert http.delete(path, params={"action": "mpu-abort", "uploadId": upload_id}).json() == {"ok": True}
        error_message(http.get(path), 404, "not_found")
        for name in ("..", "0" * 32, "%2e%2e%2fx", "x"):
            assert http.get(f"/batch/{name}").status_code in (400, 404, 405)


def test_batches_belong_to_their_key(server: str) -> None:
    with client(server) as http, client(server, KEYS[1]) as other:
        finished(http, upload(http, lines({"skill": "query", "question": "earlier"})))  # for the second page
        batch_id = upload(http, lines({"skill": "query", "question": "mine"}))
        state = finished(http, batch_id)
        error_message(other.get(f"/batch/{batch_id}"), 404, "not_found")
        error_message(other.get(state["outputs"][0]["url"]), 404, "not_found")
        assert other.get("/batch").json() == {"batches": [], "next_cursor": None, "has_more": False}
        pages = http.get("/batch", params={"limit": 1}).json()
        assert pages["has_more"] and pages["batches"][0]["id"] == batch_id
        rest = http.get("/batch", params={"limit": 100, "cursor": pages["next_cursor"]}).json()
        assert batch_id not in [state["id"] for state in rest["batches"]]
        error_message(httpx.get(f"{server}/batch"), 401, "unauthorized")
        ids = [other.post("/batch", params={"action": "mpu-create"}) for _ in range(batch.MAX_BATCHES + 1)]
        assert ids[-2].status_code == 200 and error_message(ids[-1], 429, "rate_limited")


def test_batch_goes_on_after_a_restart(tmp_path: Path) -> None:
    """The first server ends in the middle of a batch; its last result is cut. Answered lines are not answered again."""
    data = lines(*({"id": n, "skill": "query", "question": f"restart {n}"} for n in range(6)))
    with echo_server(tmp_path) as address, client(address) as http:
        batch_id = upload(http, data)
        finished(http, batch_id)
    (folder,) = tmp_path.glob(f"batches/*/{batch_id}")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "status": "processing"}))
    (folder / "input.jsonl").write_bytes(data)
    kept = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "results.jsonl").write_bytes(b"".join(kept[:3]) + kept[3][:10])
    done = {json.loads(line)["line_index"] for line in kept[:3]}
    PROMPTS.clear()
    with echo_server(tmp_path) as address, client(address) as http:
        resumed = finished(http, batch_id)
        assert resumed["progress"] == {"total": 6, "completed": 6, "failed": 0}
        assert [line["result"]["answer"] for line in results(http, resumed)] == [f"restart {n}" for n in range(6)]
        assert sorted(PROMPTS) == [f"restart {n}" for n in range(6) if n not in done]
        (folder / "state.json").write_text(json.dumps({**state, "status": "processing"}))
    with echo_server(tmp_path) as address, client(address) as http:  # the file of the batch is gone
        lost = finished(http, batch_id)
        assert lost["status"] == "failed" and lost["error"]["code"] == "input_lost"
        expired = {**resumed, "tenant": folder.parent.name, "expires": time.time() - 1}
        (folder / "state.json").write_text(json.dumps(expired))
        error_message(http.get(f"/batch/{batch_id}"), 404, "not_found")
        http.post("/batch", params={"action": "mpu-create"})
        assert not folder.exists()


def test_full_disk_is_an_error(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(batch, "write_atomically", full)
    with client(server) as http:
        response = http.post("/batch", params={"action": "mpu-create"})
        assert "disk" in error_message(response, 503, "unavailable") and response.headers["retry-after"]
