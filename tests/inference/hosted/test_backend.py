"""Hosted models through `registry.answer`, against a fake Moondream Cloud over real HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from inference.availability import photon_unavailable, unavailable
from inference.hosted.backend import model_ids
from inference.hosted.client import MoondreamClient
from inference.registry import MODELS, answer, discover_hosted_models, register_hosted_models
from inference.types import (
    Answer,
    AnswerEvent,
    Box,
    CandidateFailed,
    InferenceError,
    ModelSpec,
    Point,
    Request,
    TextUpdate,
)
from recipes import parse
from tests.support.cloud_server import CAPTION, PATH, cloud
from tests.support.fault_server import KEY, FaultServer, fault_server, hang, malformed_json


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with fault_server() as running:
        yield running


@pytest.fixture
def spec(server: FaultServer) -> ModelSpec:
    """Return a Cloud model on the fake Cloud, with its key."""
    server.respond_with(cloud)
    return replace(MODELS["moondream3-preview"], source=server.address, key=SecretStr(KEY), rate=1_000)


def run(spec: ModelSpec, photo: np.ndarray, skill: str, prompt: str = "", **settings: Any) -> list[AnswerEvent]:
    return list(answer(spec, Request(photo, skill, prompt, **settings)))


def answers(events: list[AnswerEvent]) -> list[Answer]:
    return sorted((event for event in events if isinstance(event, Answer)), key=lambda candidate: candidate.index)


def test_each_recipe_candidate_is_a_separate_call(server: FaultServer, spec: ModelSpec, photo: np.ndarray) -> None:
    results = answers(run(spec, photo, "recipe", n=4))
    assert len(results) == 4 == len({candidate.text for candidate in results}) == len(server.requests)
    assert all(parse(candidate.text).ok for candidate in results)
    body = server.requests[0][3]
    assert body["model"] == "moondream3-preview" and body["reasoning"] is False and body["stream"] is False
    assert body["settings"]["temperature"] == 0.5 and "sharpening" in body["question"]
    assert all(candidate.estimated and candidate.tokens_in > 730 and candidate.tokens_out > 5 for candidate in results)


def test_deterministic_answers_take_a_single_call(server: FaultServer, spec: ModelSpec, photo: np.ndarray) -> None:
    for skill, settings in (("recipe", {"temperature": 0}), ("detect", {}), ("point", {}), ("segment", {})):
        server.requests.clear()
        results = answers(run(spec, photo, skill, "a cat", n=3, **settings))
        assert len(results) == 3 and len(server.requests) == 1, skill
        assert len({replace(candidate, index=0) for candidate in results}) == 1


@pytest.mark.parametrize("length", ["short", "normal", "long"])
def test_caption_is_streamed(server: FaultServer, spec: ModelSpec, photo: np.ndarray, length: str) -> None:
    events = run(spec, photo, "caption", length=length)
    partial = [event.text for event in events if isinstance(event, TextUpdate)]
    (result,) = answers(events)
    assert result.text == CAPTION and len(partial) > 5 and all(CAPTION.startswith(text) for text in partial)
    assert (result.tokens_in, result.tokens_out, result.estimated) == (740, 12, False) and result.request_id
    assert server.requests[0][3]["length"] == length


def test_malformed_regions_are_skipped(spec: ModelSpec, photo: np.ndarray) -> None:
    assert answers(run(spec, photo, "detect", "cat"))[0].boxes == (Box(0.1, 0.2, 0.5, 0.6),)
    assert answers(run(spec, photo, "point", "cat"))[0].points == (Point(0.25, 1.0),)
    assert answers(run(spec, photo, "segment", "cat"))[0].path == PATH


@pytest.mark.parametrize("path", ['M 0 0"><script>', "javascript:alert(1)", "M" + " 1" * 60_000])
def test_invalid_svg_path_is_rejected(server: FaultServer, spec: ModelSpec, photo: np.ndarray, path: str) -> None:
    server.respond_with({"path": path, "bbox": {}})
    with pytest.raises(InferenceError, match="not a valid SVG path"):
        run(spec, photo, "segment", "cat")


def test_reasoning_is_returned_with_its_points(server: FaultServer, spec: ModelSpec, photo: np.ndarray) -> None:
    (result,) = answers(run(spec, photo, "query", "How many cats?", reasoning=True))
    assert (result.text, result.reasoning, result.grounded) == ("Two cats.", "I see cats <b>here</b>.", ((6, 10),))
    assert result.points == (Point(0.3, 0.4), Point(0.6, 0.4)) and server.requests[0][3]["reasoning"] is True


@pytest.mark.parametrize(
    "data",
    [
        {"answer": "x", "reasoning": 3},
        {"answer": "x", "reasoning": {"text": "y", "grounding": [{"start_idx": -1}, 7, None]}},
        {"answer": "x", "metrics": [1], "request_id": {"a": 1}},
        {"answer": "x", "metrics": {"input_tokens": "many", "output_tokens": True}},
    ],
)
def test_malformed_optional_fields_are_ignored(
    server: FaultServer, spec: ModelSpec, photo: np.ndarray, data: dict[str, Any]
) -> None:
    server.respond_with(data)
    assert answers(run(spec, photo, "query", "What?", reasoning=True))[0].text == "x"


def test_failed_call_affects_only_its_candidate(server: FaultServer, spec: ModelSpec, photo: np.ndarray) -> None:
    server.respond_with(cloud, malformed_json, cloud)
    events = run(spec, photo, "recipe", n=3)
    (failed,) = [event for event in events if isinstance(event, CandidateFailed)]
    assert "did not return a JSON object" in failed.message
    assert len(answers(events)) == 2 and failed.index not in [candidate.index for candidate in answers(events)]


def test_request_fails_if_all_candidates_fail(server: FaultServer, spec: ModelSpec, photo: np.ndarray) -> None:
    server.respond_with(402)
    with pytest.raises(InferenceError, match="no credit") as caught:
        run(spec, photo, "recipe", n=3)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("skill", ["query", "detect"])
@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "carrier-pigeon://127.0.0.1:1"])
def test_unexpected_error_in_a_call_reaches_the_reader(
    spec: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch, proxy: str, skill: str
) -> None:
    """The HTTP library raises ImportError for a SOCKS proxy without socksio, and ValueError for an unknown scheme."""
    monkeypatch.setenv("ALL_PROXY", proxy)
    with ThreadPoolExecutor(1) as pool:
        cancel = threading.Event()
        future = pool.submit(lambda: list(answer(spec, Request(photo, skill, "What?"), cancel)))
        try:
            error = future.exception(timeout=20)
        finally:
            cancel.set()  # ends the thread if the error has not arrived
    assert isinstance(error, InferenceError) and error.kind == "failed" and "ALL_PROXY" in error.message


def test_cancel_does_not_wait_for_the_response(server: FaultServer, spec: ModelSpec, photo: np.ndarray) -> None:
    server.respond_with(hang)
    cancel = threading.Event()
    threading.Timer(0.3, cancel.set).start()
    with pytest.raises(InferenceError) as caught:
        list(answer(spec, Request(photo, "query", "What?"), cancel))
    assert caught.value.kind == "cancelled"


def test_cloud_model_is_unavailable_without_a_key(photo: np.ndarray) -> None:
    spec = MODELS["moondream3.1-9B-A2B"]
    with pytest.raises(InferenceError, match="Moondream API key"):
        run(spec, photo, "query", "What?")
    assert unavailable(spec.with_key(SecretStr("k"))) is None
    assert KEY not in repr(spec.with_key(SecretStr(KEY)))


def test_key_is_not_sent_to_custom_endpoints(server: FaultServer, photo: np.ndarray) -> None:
    models: dict[str, ModelSpec] = {}
    register_hosted_models("https://unused/v1", None, 1_000, {"lab": server.address}, models)
    station = models["lab"].with_key(SecretStr(KEY))
    server.respond_with({"models": [{"id": "moondream2"}]}, {"answer": "a cat", "_stats": {"tokens": 2}})
    (result,) = answers(run(station, photo, "query", "What?", temperature=0))
    assert result.text == "a cat" and result.estimated
    assert [body and body["model"] for _, _, _, body in server.requests] == [None, "moondream2"]
    assert not any("X-Moondream-Auth" in headers for _, _, headers, _ in server.requests)
    server.respond_with({"error": "Image is required"})
    with pytest.raises(InferenceError, match="Image is required"):
        run(station, photo, "query", "What?")


def test_default_model_of_an_endpoint_is_requested_again_after_a_failure(
    server: FaultServer, photo: np.ndarray
) -> None:
    models: dict[str, ModelSpec] = {}
    register_hosted_models("https://unused/v1", None, 1_001, {"lab": server.address}, models)
    names = []
    for listing in ([404], [{"models": [{"id": "lab-model"}]}], []):
        server.respond_with(*listing, {"answer": "a cat"})
        run(models["lab"], photo, "query", "What?", temperature=0)
        names.append([body and body["model"] for _, _, _, body in server.requests])
    assert names == [[None, "moondream2"], [None, "lab-model"], ["lab-model"]]


def test_models_listed_by_the_cloud_are_discovered(server: FaultServer) -> None:
    models = dict(MODELS)
    server.respond_with(cloud)
    register_hosted_models(server.address, KEY, 1_000, {}, models)
    discover_hosted_models(models).join(10)
    assert unavailable(models["moondream9-new"]) is None and models["moondream3-preview"].source == server.address
    assert "moondream9-new" not in MODELS
    server.respond_with({"data": [{"id": "<script>"}, {"id": 3}, 7]})
    spec = models["moondream3-preview"]
    assert model_ids(MoondreamClient(spec.source, spec.key, 999)) == []


def test_local_models_cannot_segment(photo: np.ndarray) -> None:
    with pytest.raises(InferenceError, match="cannot segment"):
        run(MODELS["moondream-tiny"], photo, "segment", "cat")


def test_photon_is_unavailable_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, reason in ((None, "neither"), (7.5, "has 7.5"), (8.9, "requirements-gpu")):
        monkeypatch.setattr("inference.availability.compute_capability", lambda version=version: version)
        monkeypatch.setattr("inference.availability.find_spec", lambda name: None)
        photon_unavailable.cache_clear()
        assert reason in (unavailable(MODELS["moondream2-photon"]) or "")
    photon_unavailable.cache_clear()
    assert "telemetry" in MODELS["moondream2-photon"].note
