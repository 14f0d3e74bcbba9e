"""Hosted models through the door that the playground uses, against a played Moondream Cloud over real HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from inference import photon
from inference.hosted.backend import model_ids
from inference.offers import discover_hosted_models, register_hosted_models
from inference.places import photon_unavailable
from inference.registry import MODELS, ModelSpec, answer
from inference.types import Answer, Box, CandidateFailed, Event, InferenceError, Point, Request, TextUpdate
from recipes import parse
from tests.support.cloud_server import CAPTION, PATH, cloud
from tests.support.fault_server import KEY, Faults, fault_server, hang, malformed


@pytest.fixture(scope="module")
def running() -> Iterator[Faults]:
    with fault_server() as found:
        yield found


@pytest.fixture
def entry(running: Faults) -> ModelSpec:
    """A Cloud model at the played Cloud, with its key."""
    running.play(cloud)
    return replace(MODELS["moondream3-preview"], source=running.address, key=SecretStr(KEY), rate=1_000)


def ask(entry: ModelSpec, photo: np.ndarray, skill: str, prompt: str = "", **settings: Any) -> list[Event]:
    return list(answer(entry, Request(photo, skill, prompt, **settings)))


def answers(events: list[Event]) -> list[Answer]:
    return sorted((event for event in events if isinstance(event, Answer)), key=lambda one: one.index)


def test_each_candidate_of_a_recipe_is_a_call_of_its_own(running: Faults, entry: ModelSpec, photo: np.ndarray) -> None:
    found = answers(ask(entry, photo, "recipe", n=4))
    assert len(found) == 4 == len({one.text for one in found}) == len(running.asked)
    assert all(parse(one.text).ok for one in found)
    body = running.asked[0][3]
    assert body["model"] == "moondream3-preview" and body["reasoning"] is False and body["stream"] is False
    assert body["settings"]["temperature"] == 0.5 and "sharpening" in body["question"]
    assert all(one.estimated and one.tokens_in > 730 and one.tokens_out > 5 for one in found)


def test_what_is_the_same_for_all_is_asked_once(running: Faults, entry: ModelSpec, photo: np.ndarray) -> None:
    for skill, settings in (("recipe", {"temperature": 0}), ("detect", {}), ("point", {}), ("segment", {})):
        running.asked.clear()
        found = answers(ask(entry, photo, skill, "a cat", n=3, **settings))
        assert len(found) == 3 and len(running.asked) == 1, skill
        assert len({replace(one, index=0) for one in found}) == 1


@pytest.mark.parametrize("length", ["short", "normal", "long"])
def test_a_caption_comes_word_by_word(running: Faults, entry: ModelSpec, photo: np.ndarray, length: str) -> None:
    events = ask(entry, photo, "caption", length=length)
    partial = [event.text for event in events if isinstance(event, TextUpdate)]
    (found,) = answers(events)
    assert found.text == CAPTION and len(partial) > 5 and all(CAPTION.startswith(text) for text in partial)
    assert (found.tokens_in, found.tokens_out, found.estimated) == (740, 12, False) and found.request_id
    assert running.asked[0][3]["length"] == length


def test_regions_are_read_with_care(entry: ModelSpec, photo: np.ndarray) -> None:
    assert answers(ask(entry, photo, "detect", "cat"))[0].boxes == (Box(0.1, 0.2, 0.5, 0.6),)
    assert answers(ask(entry, photo, "point", "cat"))[0].points == (Point(0.25, 1.0),)
    assert answers(ask(entry, photo, "segment", "cat"))[0].path == PATH


@pytest.mark.parametrize("path", ['M 0 0"><script>', "javascript:alert(1)", "M" + " 1" * 60_000])
def test_an_outline_that_is_none_is_refused(running: Faults, entry: ModelSpec, photo: np.ndarray, path: str) -> None:
    running.play({"path": path, "bbox": {}})
    with pytest.raises(InferenceError, match="no SVG path"):
        ask(entry, photo, "segment", "cat")


def test_reasoning_comes_with_what_it_points_at(running: Faults, entry: ModelSpec, photo: np.ndarray) -> None:
    (found,) = answers(ask(entry, photo, "query", "How many cats?", reasoning=True))
    assert (found.text, found.reasoning, found.grounded) == ("Two cats.", "I see cats <b>here</b>.", ((6, 10),))
    assert found.points == (Point(0.3, 0.4), Point(0.6, 0.4)) and running.asked[0][3]["reasoning"] is True


@pytest.mark.parametrize(
    "data",
    [
        {"answer": "x", "reasoning": 3},
        {"answer": "x", "reasoning": {"text": "y", "grounding": [{"start_idx": -1}, 7, None]}},
        {"answer": "x", "metrics": [1], "request_id": {"a": 1}},
        {"answer": "x", "metrics": {"input_tokens": "many", "output_tokens": True}},
    ],
)
def test_what_is_not_documented_is_read_with_care(
    running: Faults, entry: ModelSpec, photo: np.ndarray, data: dict[str, Any]
) -> None:
    running.play(data)
    assert answers(ask(entry, photo, "query", "What?", reasoning=True))[0].text == "x"


def test_one_failure_stays_with_its_candidate(running: Faults, entry: ModelSpec, photo: np.ndarray) -> None:
    running.play(cloud, malformed, cloud)
    events = ask(entry, photo, "recipe", n=3)
    (lost,) = [event for event in events if isinstance(event, CandidateFailed)]
    assert "something else than JSON" in lost.message
    assert len(answers(events)) == 2 and lost.index not in [one.index for one in answers(events)]


def test_a_model_whose_candidates_all_fail_fails(running: Faults, entry: ModelSpec, photo: np.ndarray) -> None:
    running.play(402)
    with pytest.raises(InferenceError, match="no credit") as caught:
        ask(entry, photo, "recipe", n=3)
    assert KEY not in str(caught.value)


def test_cancelling_does_not_wait_for_an_answer(running: Faults, entry: ModelSpec, photo: np.ndarray) -> None:
    running.play(hang)
    cancel = threading.Event()
    threading.Timer(0.3, cancel.set).start()
    with pytest.raises(InferenceError) as caught:
        list(answer(entry, Request(photo, "query", "What?"), cancel))
    assert caught.value.kind == "cancelled"


def test_without_a_key_a_cloud_model_is_greyed_and_ones_own_key_helps(photo: np.ndarray) -> None:
    entry = MODELS["moondream3.1-9B-A2B"]
    with pytest.raises(InferenceError, match="Your own Moondream key"):
        ask(entry, photo, "query", "What?")
    assert entry.with_key(SecretStr("k")).unavailable() is None
    assert KEY not in repr(entry.with_key(SecretStr(KEY)))


def test_a_key_goes_to_no_server_that_does_not_ask_for_it(running: Faults, photo: np.ndarray) -> None:
    models: dict[str, ModelSpec] = {}
    register_hosted_models("https://unused/v1", None, 1_000, {"lab": running.address}, models)
    station = models["lab"].with_key(SecretStr(KEY))
    running.play({"models": [{"id": "moondream2"}]}, {"answer": "a cat", "_stats": {"tokens": 2}})
    (found,) = answers(ask(station, photo, "query", "What?", temperature=0))
    assert found.text == "a cat" and found.estimated
    assert [body and body["model"] for _, _, _, body in running.asked] == [None, "moondream2"]
    assert not any("X-Moondream-Auth" in headers for _, _, headers, _ in running.asked)
    running.play({"error": "Image is required"})
    with pytest.raises(InferenceError, match="Image is required"):
        ask(station, photo, "query", "What?")


def test_the_deployments_key_brings_what_the_cloud_lists(running: Faults) -> None:
    models = dict(MODELS)
    running.play(cloud)
    register_hosted_models(running.address, KEY, 1_000, {}, models)
    discover_hosted_models(models).join(10)
    assert models["moondream9-new"].unavailable() is None and models["moondream3-preview"].source == running.address
    assert "moondream9-new" not in MODELS
    running.play({"data": [{"id": "<script>"}, {"id": 3}, 7]})
    entry = models["moondream3-preview"]
    from inference.hosted.client import MoondreamClient

    assert model_ids(MoondreamClient(entry.source, entry.key, 999)) == []


def test_local_models_say_that_they_cannot_segment(photo: np.ndarray) -> None:
    with pytest.raises(InferenceError, match="cannot segment"):
        ask(MODELS["moondream-tiny"], photo, "segment", "cat")


def test_photon_is_greyed_with_its_reason_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, said in ((None, "neither"), (7.5, "has 7.5"), (8.9, "requirements-gpu")):
        monkeypatch.setattr("inference.places.capability", lambda found=version: found)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        photon_unavailable.cache_clear()
        assert said in (MODELS["moondream2-photon"].unavailable() or "")
    photon_unavailable.cache_clear()
    assert "telemetry" in MODELS["moondream2-photon"].note


def test_photon_answers_as_the_others_do(photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another client in the engine's place, which has never run here."""

    class Client:
        def query(self, image: Any, question: str, reasoning: bool, settings: dict[str, Any]) -> dict[str, Any]:
            return {"answer": f"{question[:3]} {settings['temperature']:g}", "reasoning": None}

        def detect(self, image: Any, words: str, settings: dict[str, Any]) -> dict[str, Any]:
            return {"objects": [{"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1}]}

    monkeypatch.setattr(photon, "_client", lambda model: Client())
    entry, cancel = MODELS["moondream2-photon"], threading.Event()
    texts = [
        one for one in photon.answer(entry, Request(photo, "query", "Who?", n=2), cancel) if isinstance(one, Answer)
    ]
    assert [one.text for one in texts] == ["Who 0.5"] * 2
    boxes = answers(list(photon.answer(entry, Request(photo, "detect", "x", n=2), cancel)))
    assert [one.boxes for one in boxes] == [(Box(0, 0, 1, 1),)] * 2
